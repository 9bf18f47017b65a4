# Copyright 2026 The skill-hf authors. Licensed under the Apache License, Version 2.0.
"""Configuration of a pruned wav2vec 2.0. This file is published with every student of the family."""

from transformers import Wav2Vec2Config

from .configuration_skill_student import SkillStudentConfig


class Wav2Vec2SkillStudentConfig(SkillStudentConfig, Wav2Vec2Config):
    """
    The fields of [`~transformers.Wav2Vec2Config`] and the remaining units of each layer.

    Args:
        kwargs: fields of [`SkillStudentConfig`], such as `remaining_heads`, and of [`~transformers.Wav2Vec2Config`].

    Raises:
        `ValueError`: if a field has a wrong type, is out of range or does not fit the others; the message names the
            field.
    """

    model_type = "wav2vec2_skill_student"
    tasks = ("CTC", "SequenceClassification", "AudioFrameClassification", "XVector")


Wav2Vec2SkillStudentConfig.register_for_auto_class()

__all__ = ["Wav2Vec2SkillStudentConfig"]
