# Copyright 2026 The skill-hf authors. Licensed under the Apache License, Version 2.0.
"""Configuration of a pruned UniSpeech. This file is published with every student of the family."""

from transformers import UniSpeechConfig

from .configuration_skill_student import SkillStudentConfig


class UniSpeechSkillStudentConfig(SkillStudentConfig, UniSpeechConfig):
    """
    The fields of [`~transformers.UniSpeechConfig`] and the remaining units of each layer.

    Args:
        kwargs: fields of [`SkillStudentConfig`], such as `remaining_heads`, and of [`~transformers.UniSpeechConfig`].

    Raises:
        `ValueError`: if a field has a wrong type, is out of range or does not fit the others; the message names the
            field.
    """

    model_type = "unispeech_skill_student"
    tasks = ("CTC", "SequenceClassification")


UniSpeechSkillStudentConfig.register_for_auto_class()

__all__ = ["UniSpeechSkillStudentConfig"]
