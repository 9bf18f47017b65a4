# Copyright 2026 The skill-hf authors. Licensed under the Apache License, Version 2.0.
"""A pruned HuBERT: its classes and its names. This file is published with every student of the family."""

from transformers import (
    HubertForCTC,
    HubertForSequenceClassification,
    HubertModel,
)
from transformers.models.hubert.modeling_hubert import HubertFeatureEncoder, HubertPositionalConvEmbedding

from .configuration_hubert_skill_student import HubertSkillStudentConfig

# Transformers 4 copies only those published files that this one itself imports: all of them, used or not.
from .configuration_skill_student import SkillStudentConfig  # noqa: F401
from .fast_layers import FastFeatureEncoder, FastPositionalConv
from .modeling_skill_student import SkillStudentHead, SkillStudentModel
from .student_layers import SkillStudentAttention
from .weight_checks import check_weights  # noqa: F401


class HubertSkillStudentFeatureEncoder(FastFeatureEncoder, HubertFeatureEncoder):
    """The stock convolutions, computed faster."""


class HubertSkillStudentPositionalConvEmbedding(FastPositionalConv, HubertPositionalConvEmbedding):
    """The stock positional convolution, computed faster."""


class HubertForSkillStudent(SkillStudentModel, HubertModel):
    """
    HuBERT encoder (arXiv 2106.07447) of unequal layer widths; same inputs and outputs as
    [`~transformers.HubertModel`].

    `HubertForSkillStudent.from_pretrained` takes a published student or a stock checkpoint such as
    `facebook/hubert-base-ls960`, of which it makes an unpruned student with the same hidden states.
    """

    config_class = HubertSkillStudentConfig
    attention_class = SkillStudentAttention
    feature_encoder_class = HubertSkillStudentFeatureEncoder
    positional_conv_class = HubertSkillStudentPositionalConvEmbedding


class _HubertHead(SkillStudentHead):
    config_class = HubertSkillStudentConfig
    encoder_class = HubertForSkillStudent


class HubertSkillStudentForCTC(_HubertHead, HubertForCTC):
    """[`~transformers.HubertForCTC`] over a student."""


class HubertSkillStudentForSequenceClassification(_HubertHead, HubertForSequenceClassification):
    """[`~transformers.HubertForSequenceClassification`] over a student."""


HubertForSkillStudent.register_for_auto_class("AutoModel")
HubertSkillStudentForCTC.register_for_auto_class("AutoModelForCTC")
HubertSkillStudentForSequenceClassification.register_for_auto_class("AutoModelForAudioClassification")

__all__ = [
    "HubertForSkillStudent",
    "HubertSkillStudentForCTC",
    "HubertSkillStudentForSequenceClassification",
]
