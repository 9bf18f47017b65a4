# Copyright 2026 The skill-hf authors. Licensed under the Apache License, Version 2.0.
"""Configuration of a pruned WavLM. This file is published with every student of the family."""

from transformers import WavLMConfig

from .configuration_skill_student import SkillStudentConfig


class WavLMSkillStudentConfig(SkillStudentConfig, WavLMConfig):
    """
    The fields of [`~transformers.WavLMConfig`] and the remaining units of each layer.

    Args:
        kwargs: fields of [`SkillStudentConfig`], such as `remaining_heads`, and of [`~transformers.WavLMConfig`].

    Raises:
        `ValueError`: if a field has a wrong type, is out of range or does not fit the others; the message names the
            field.
    """

    model_type = "wavlm_skill_student"
    tasks = ("CTC", "SequenceClassification", "AudioFrameClassification", "XVector")

    def _validate_stock_shapes(self):
        super()._validate_stock_shapes()
        if self.do_stable_layer_norm != (self.feat_extract_norm == "layer"):
            # Layers of both orders have the same weights. In every WavLM those of the convolutions tell which it is.
            raise ValueError(
                f"`do_stable_layer_norm` is {self.do_stable_layer_norm} and `feat_extract_norm`"
                f" {self.feat_extract_norm!r}, but WavLM combines True with 'layer' and False with 'group'. One of"
                " the two belongs to a different model."
            )
        if not self.max_bucket_distance > self.num_buckets // 4 > 0:
            raise ValueError(
                "`max_bucket_distance` must be above a quarter of `num_buckets`, which must be at least 1, but they"
                f" are {self.max_bucket_distance!r} and {self.num_buckets!r}."
            )


WavLMSkillStudentConfig.register_for_auto_class()

__all__ = ["WavLMSkillStudentConfig"]
