# Copyright 2026 The skill-hf authors. Licensed under the Apache License, Version 2.0.
"""A pruned wav2vec 2.0: its classes and its names. This file is published with every student of the family."""

from transformers import (
    Wav2Vec2ForAudioFrameClassification,
    Wav2Vec2ForCTC,
    Wav2Vec2ForSequenceClassification,
    Wav2Vec2ForXVector,
    Wav2Vec2Model,
)
from transformers.models.wav2vec2.modeling_wav2vec2 import Wav2Vec2FeatureEncoder, Wav2Vec2PositionalConvEmbedding

# Transformers 4 copies only those published files that this one itself imports: all of them, used or not.
from .configuration_skill_student import SkillStudentConfig  # noqa: F401
from .configuration_wav2vec2_skill_student import Wav2Vec2SkillStudentConfig
from .fast_layers import FastFeatureEncoder, FastPositionalConv
from .modeling_skill_student import SkillStudentHead, SkillStudentModel
from .student_layers import SkillStudentAttention
from .weight_checks import check_weights  # noqa: F401


class Wav2Vec2SkillStudentFeatureEncoder(FastFeatureEncoder, Wav2Vec2FeatureEncoder):
    """The stock convolutions, computed faster."""


class Wav2Vec2SkillStudentPositionalConvEmbedding(FastPositionalConv, Wav2Vec2PositionalConvEmbedding):
    """The stock positional convolution, computed faster."""


class Wav2Vec2ForSkillStudent(SkillStudentModel, Wav2Vec2Model):
    """
    wav2vec 2.0 encoder (arXiv 2006.11477), XLS-R and the like, of unequal layer widths; same inputs and outputs as
    [`~transformers.Wav2Vec2Model`].

    `Wav2Vec2ForSkillStudent.from_pretrained` takes a published student or a stock checkpoint such as
    `facebook/wav2vec2-base`, of which it makes an unpruned student with the same hidden states.
    """

    config_class = Wav2Vec2SkillStudentConfig
    attention_class = SkillStudentAttention
    feature_encoder_class = Wav2Vec2SkillStudentFeatureEncoder
    positional_conv_class = Wav2Vec2SkillStudentPositionalConvEmbedding


class _Wav2Vec2Head(SkillStudentHead):
    config_class = Wav2Vec2SkillStudentConfig
    encoder_class = Wav2Vec2ForSkillStudent


class Wav2Vec2SkillStudentForCTC(_Wav2Vec2Head, Wav2Vec2ForCTC):
    """[`~transformers.Wav2Vec2ForCTC`] over a student."""


class Wav2Vec2SkillStudentForSequenceClassification(_Wav2Vec2Head, Wav2Vec2ForSequenceClassification):
    """[`~transformers.Wav2Vec2ForSequenceClassification`] over a student."""


class Wav2Vec2SkillStudentForAudioFrameClassification(_Wav2Vec2Head, Wav2Vec2ForAudioFrameClassification):
    """[`~transformers.Wav2Vec2ForAudioFrameClassification`] over a student."""


class Wav2Vec2SkillStudentForXVector(_Wav2Vec2Head, Wav2Vec2ForXVector):
    """[`~transformers.Wav2Vec2ForXVector`] over a student."""


Wav2Vec2ForSkillStudent.register_for_auto_class("AutoModel")
Wav2Vec2SkillStudentForCTC.register_for_auto_class("AutoModelForCTC")
Wav2Vec2SkillStudentForSequenceClassification.register_for_auto_class("AutoModelForAudioClassification")
Wav2Vec2SkillStudentForAudioFrameClassification.register_for_auto_class("AutoModelForAudioFrameClassification")
Wav2Vec2SkillStudentForXVector.register_for_auto_class("AutoModelForAudioXVector")

__all__ = [
    "Wav2Vec2ForSkillStudent",
    "Wav2Vec2SkillStudentForAudioFrameClassification",
    "Wav2Vec2SkillStudentForCTC",
    "Wav2Vec2SkillStudentForSequenceClassification",
    "Wav2Vec2SkillStudentForXVector",
]
