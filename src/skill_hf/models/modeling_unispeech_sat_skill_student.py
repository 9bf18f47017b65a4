# Copyright 2026 The skill-hf authors. Licensed under the Apache License, Version 2.0.
"""A pruned UniSpeech-SAT: its classes and its names. This file is published with every student of the family."""

from transformers import (
    UniSpeechSatForAudioFrameClassification,
    UniSpeechSatForCTC,
    UniSpeechSatForSequenceClassification,
    UniSpeechSatForXVector,
    UniSpeechSatModel,
)
from transformers.models.unispeech_sat.modeling_unispeech_sat import (
    UniSpeechSatFeatureEncoder,
    UniSpeechSatPositionalConvEmbedding,
)

# Transformers 4 copies only those published files that this one itself imports: all of them, used or not.
from .configuration_skill_student import SkillStudentConfig  # noqa: F401
from .configuration_unispeech_sat_skill_student import UniSpeechSatSkillStudentConfig
from .fast_layers import FastFeatureEncoder, FastPositionalConv
from .modeling_skill_student import SkillStudentHead, SkillStudentModel
from .student_layers import SkillStudentAttention
from .weight_checks import check_weights  # noqa: F401


class UniSpeechSatSkillStudentFeatureEncoder(FastFeatureEncoder, UniSpeechSatFeatureEncoder):
    """The stock convolutions, computed faster."""


class UniSpeechSatSkillStudentPositionalConvEmbedding(FastPositionalConv, UniSpeechSatPositionalConvEmbedding):
    """The stock positional convolution, computed faster."""


class UniSpeechSatForSkillStudent(SkillStudentModel, UniSpeechSatModel):
    """
    UniSpeech-SAT encoder (arXiv 2110.05752) of unequal layer widths; same inputs and outputs as
    [`~transformers.UniSpeechSatModel`].

    `UniSpeechSatForSkillStudent.from_pretrained` takes a published student or a stock checkpoint such as
    `microsoft/unispeech-sat-base-plus`, of which it makes an unpruned student with the same hidden states.
    """

    config_class = UniSpeechSatSkillStudentConfig
    attention_class = SkillStudentAttention
    feature_encoder_class = UniSpeechSatSkillStudentFeatureEncoder
    positional_conv_class = UniSpeechSatSkillStudentPositionalConvEmbedding


class _UniSpeechSatHead(SkillStudentHead):
    config_class = UniSpeechSatSkillStudentConfig
    encoder_class = UniSpeechSatForSkillStudent


class UniSpeechSatSkillStudentForCTC(_UniSpeechSatHead, UniSpeechSatForCTC):
    """[`~transformers.UniSpeechSatForCTC`] over a student."""


class UniSpeechSatSkillStudentForSequenceClassification(_UniSpeechSatHead, UniSpeechSatForSequenceClassification):
    """[`~transformers.UniSpeechSatForSequenceClassification`] over a student."""


class UniSpeechSatSkillStudentForAudioFrameClassification(_UniSpeechSatHead, UniSpeechSatForAudioFrameClassification):
    """[`~transformers.UniSpeechSatForAudioFrameClassification`] over a student."""


class UniSpeechSatSkillStudentForXVector(_UniSpeechSatHead, UniSpeechSatForXVector):
    """[`~transformers.UniSpeechSatForXVector`] over a student."""


UniSpeechSatForSkillStudent.register_for_auto_class("AutoModel")
UniSpeechSatSkillStudentForCTC.register_for_auto_class("AutoModelForCTC")
UniSpeechSatSkillStudentForSequenceClassification.register_for_auto_class("AutoModelForAudioClassification")
UniSpeechSatSkillStudentForAudioFrameClassification.register_for_auto_class("AutoModelForAudioFrameClassification")
UniSpeechSatSkillStudentForXVector.register_for_auto_class("AutoModelForAudioXVector")

__all__ = [
    "UniSpeechSatForSkillStudent",
    "UniSpeechSatSkillStudentForAudioFrameClassification",
    "UniSpeechSatSkillStudentForCTC",
    "UniSpeechSatSkillStudentForSequenceClassification",
    "UniSpeechSatSkillStudentForXVector",
]
