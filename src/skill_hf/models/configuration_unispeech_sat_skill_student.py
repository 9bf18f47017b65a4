# Copyright 2026 The skill-hf authors. Licensed under the Apache License, Version 2.0.
"""Configuration of a pruned UniSpeech-SAT. This file is published with every student of the family."""

from transformers import UniSpeechSatConfig

from .configuration_skill_student import SkillStudentConfig


class UniSpeechSatSkillStudentConfig(SkillStudentConfig, UniSpeechSatConfig):
    """
    The fields of [`~transformers.UniSpeechSatConfig`] and the remaining units of each layer.

    Args:
        kwargs: fields of [`SkillStudentConfig`], such as `remaining_heads`, and of
            [`~transformers.UniSpeechSatConfig`].

    Raises:
        `ValueError`: if a field has a wrong type, is out of range or does not fit the others; the message names the
            field.
    """

    model_type = "unispeech_sat_skill_student"
    tasks = ("CTC", "SequenceClassification", "AudioFrameClassification", "XVector")


UniSpeechSatSkillStudentConfig.register_for_auto_class()

__all__ = ["UniSpeechSatSkillStudentConfig"]
