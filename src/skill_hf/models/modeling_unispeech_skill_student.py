# Copyright 2026 The skill-hf authors. Licensed under the Apache License, Version 2.0.
"""A pruned UniSpeech: its classes and its names. This file is published with every student of the family."""

from transformers import (
    UniSpeechForCTC,
    UniSpeechForSequenceClassification,
    UniSpeechModel,
)
from transformers.models.unispeech.modeling_unispeech import UniSpeechFeatureEncoder, UniSpeechPositionalConvEmbedding

# Transformers 4 copies only those published files that this one itself imports: all of them, used or not.
from .configuration_skill_student import SkillStudentConfig  # noqa: F401
from .configuration_unispeech_skill_student import UniSpeechSkillStudentConfig
from .fast_layers import FastFeatureEncoder, FastPositionalConv
from .modeling_skill_student import SkillStudentHead, SkillStudentModel
from .student_layers import SkillStudentAttention
from .weight_checks import check_weights  # noqa: F401


class UniSpeechSkillStudentFeatureEncoder(FastFeatureEncoder, UniSpeechFeatureEncoder):
    """The stock convolutions, computed faster."""


class UniSpeechSkillStudentPositionalConvEmbedding(FastPositionalConv, UniSpeechPositionalConvEmbedding):
    """The stock positional convolution, computed faster."""


class UniSpeechForSkillStudent(SkillStudentModel, UniSpeechModel):
    """
    UniSpeech encoder (arXiv 2101.07597) of unequal layer widths; same inputs and outputs as
    [`~transformers.UniSpeechModel`].

    `UniSpeechForSkillStudent.from_pretrained` takes a published student or a stock checkpoint such as
    `microsoft/unispeech-large-1500h-cv`, of which it makes an unpruned student with the same hidden states.
    """

    config_class = UniSpeechSkillStudentConfig
    attention_class = SkillStudentAttention
    feature_encoder_class = UniSpeechSkillStudentFeatureEncoder
    positional_conv_class = UniSpeechSkillStudentPositionalConvEmbedding


class _UniSpeechHead(SkillStudentHead):
    config_class = UniSpeechSkillStudentConfig
    encoder_class = UniSpeechForSkillStudent


class UniSpeechSkillStudentForCTC(_UniSpeechHead, UniSpeechForCTC):
    """[`~transformers.UniSpeechForCTC`] over a student."""


class UniSpeechSkillStudentForSequenceClassification(_UniSpeechHead, UniSpeechForSequenceClassification):
    """[`~transformers.UniSpeechForSequenceClassification`] over a student."""


UniSpeechForSkillStudent.register_for_auto_class("AutoModel")
UniSpeechSkillStudentForCTC.register_for_auto_class("AutoModelForCTC")
UniSpeechSkillStudentForSequenceClassification.register_for_auto_class("AutoModelForAudioClassification")

__all__ = [
    "UniSpeechForSkillStudent",
    "UniSpeechSkillStudentForCTC",
    "UniSpeechSkillStudentForSequenceClassification",
]
