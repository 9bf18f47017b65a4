# Copyright 2026 The skill-hf authors. Licensed under the Apache License, Version 2.0.
"""Configuration of a pruned HuBERT. This file is published with every student of the family."""

from transformers import HubertConfig

from .configuration_skill_student import SkillStudentConfig


class HubertSkillStudentConfig(SkillStudentConfig, HubertConfig):
    """
    The fields of [`~transformers.HubertConfig`] and the remaining units of each layer.

    Args:
        kwargs: fields of [`SkillStudentConfig`], such as `remaining_heads`, and of [`~transformers.HubertConfig`].

    Raises:
        `ValueError`: if a field has a wrong type, is out of range or does not fit the others; the message names the
            field.
    """

    model_type = "hubert_skill_student"
    tasks = ("CTC", "SequenceClassification")


HubertSkillStudentConfig.register_for_auto_class()

__all__ = ["HubertSkillStudentConfig"]
