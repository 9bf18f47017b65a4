# Copyright 2026 The skill-hf authors. Licensed under the Apache License, Version 2.0.
"""Configuration of a pruned WavLM. This file is published with every student and stands alone."""

import os
import reprlib

from transformers import WavLMConfig


_MODELING = "modeling_wavlm_skill_student"
# Raised when a published field changes its meaning. Version 1 is the first.
FORMAT_VERSION = 1
# What a published config cannot leave out: the defaults are those of an unpruned model.
_REQUIRED = (
    "format_version",
    "remaining_heads",
    "intermediate_sizes",
    "removed_attention_blocks",
    "removed_ffn_blocks",
)


class WavLMSkillStudentConfig(WavLMConfig):
    r"""
    Everything of [`~transformers.WavLMConfig`] and what is left of each layer. `num_attention_heads` and
    `intermediate_size` keep the teacher's values; `conv_dim` holds the channels that are left.

    Args:
        remaining_heads (`list[list[int]]`, *optional*):
            For each layer the indices of the teacher's attention heads that are left, in ascending order; a list may
            be empty. All heads by default.
        intermediate_sizes (`list[int]`, *optional*):
            For each layer the number of feed-forward units that are left, which may be 0. All by default.
        removed_attention_blocks (`list[int]`, *optional*):
            Layers whose attention adds nothing at all. (A layer with no heads that is not listed here still adds the
            bias of its output projection.)
        removed_ffn_blocks (`list[int]`, *optional*):
            Layers whose feed-forward block adds nothing at all, not even its output bias.
        masked_group_norm (`bool`, *optional*, defaults to `False`):
            With `feat_extract_norm="group"`: take the statistics of the group norm over the valid samples that
            `attention_mask` names (padding must be on the right), so that a clip has the same hidden states alone and
            padded in a batch. Off by default because the teacher was trained with statistics over the padding, too.
        base_model (`str`, *optional*):
            Hub id of the teacher.
        format_version (`int`, *optional*, defaults to 1):
            Version of these fields. A config of a later one is refused.

    Raises:
        `ValueError`: if a field does not fit the architecture; the message names the field.
    """

    model_type = "wavlm_skill_student"

    def __init__(
        self,
        remaining_heads=None,
        intermediate_sizes=None,
        removed_attention_blocks=None,
        removed_ffn_blocks=None,
        masked_group_norm=False,
        base_model=None,
        format_version=FORMAT_VERSION,
        **kwargs,
    ):
        # A bool is an int, and 1.0 == 1: neither is a version.
        if type(format_version) is not int or not 1 <= format_version <= FORMAT_VERSION:
            raise ValueError(
                f"`format_version` is {format_version!r}, but this code reads versions 1 to {FORMAT_VERSION}: update"
                " skill-hf (`pip install -U skill-hf`), or pass `trust_remote_code=True` without it."
            )
        self.format_version = format_version
        # `save_pretrained` would name only the class being saved; a student serves every auto class. Never taken from
        # a file, which could name code of others.
        kwargs["auto_map"] = {
            "AutoConfig": "configuration_wavlm_skill_student.WavLMSkillStudentConfig",
            "AutoModel": f"{_MODELING}.WavLMForSkillStudent",
            "AutoModelForCTC": f"{_MODELING}.WavLMSkillStudentForCTC",
            "AutoModelForAudioClassification": f"{_MODELING}.WavLMSkillStudentForSequenceClassification",
            "AutoModelForAudioFrameClassification": f"{_MODELING}.WavLMSkillStudentForAudioFrameClassification",
            "AutoModelForAudioXVector": f"{_MODELING}.WavLMSkillStudentForXVector",
        }
        super().__init__(**kwargs)
        layers, heads = self.num_hidden_layers, self.num_attention_heads
        self.remaining_heads = (
            [list(range(heads)) for _ in range(layers)] if remaining_heads is None else remaining_heads
        )
        self.intermediate_sizes = (
            [self.intermediate_size] * layers if intermediate_sizes is None else intermediate_sizes
        )
        self.removed_attention_blocks = [] if removed_attention_blocks is None else removed_attention_blocks
        self.removed_ffn_blocks = [] if removed_ffn_blocks is None else removed_ffn_blocks
        self.masked_group_norm = masked_group_norm
        self.base_model = base_model
        self._validate_pruned_shapes()
        # Pruning changes them in place.
        self.remaining_heads = [list(left) for left in self.remaining_heads]
        for name in ("intermediate_sizes", "removed_attention_blocks", "removed_ffn_blocks"):
            setattr(self, name, list(getattr(self, name)))

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        family = config_dict.get("model_type", cls.model_type)
        if family == WavLMConfig.model_type:
            # A stock checkpoint is an unpruned student. The class names are those of the stock model.
            config_dict = {k: v for k, v in config_dict.items() if k not in ("model_type", "architectures")}
            if not os.path.exists(pretrained_model_name_or_path):  # a local path tells others nothing
                config_dict["base_model"] = str(pretrained_model_name_or_path)
        elif family != cls.model_type:
            raise ValueError(
                f"{pretrained_model_name_or_path} holds a model of type `{family}`; {cls.model_type} takes a student"
                f" of its own type or a stock `{WavLMConfig.model_type}` checkpoint."
            )
        return config_dict, kwargs

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        if config_dict.get("model_type") == cls.model_type:
            missing = [name for name in _REQUIRED if name not in config_dict]
            if missing:
                raise ValueError(
                    f"The config of this student lacks `{'`, `'.join(missing)}`: config.json is damaged or of another"
                    " model. Get the file anew, or save the student again."
                )
        return super().from_dict(config_dict, **kwargs)

    def _validate_pruned_shapes(self):
        layers, heads = self.num_hidden_layers, self.num_attention_heads
        for name in ("remaining_heads", "intermediate_sizes"):
            value = getattr(self, name)
            if not isinstance(value, (list, tuple)) or len(value) != layers:
                raise ValueError(f"`{name}` must list one entry for each of {layers} layers, but is {_short(value)}.")
        for layer, left in enumerate(self.remaining_heads):
            if (
                not isinstance(left, (list, tuple))
                or not all(_is_index(head, heads) for head in left)
                or list(left) != sorted(set(left))
            ):
                raise ValueError(
                    f"`remaining_heads[{layer}]` must be ascending head indices below {heads}, but is {_short(left)}."
                )
        for layer, size in enumerate(self.intermediate_sizes):
            if not _is_index(size):
                raise ValueError(f"`intermediate_sizes[{layer}]` must be an integer of at least 0, but is {size!r}.")
        for layer, size in enumerate(self.conv_dim):
            if not _is_index(size) or size == 0:
                raise ValueError(f"`conv_dim[{layer}]` must be an integer of at least 1, but is {size!r}.")
        for name, left in (
            ("removed_attention_blocks", self.remaining_heads),
            ("removed_ffn_blocks", self.intermediate_sizes),
        ):
            removed = getattr(self, name)
            if not isinstance(removed, (list, tuple)):
                raise ValueError(f"`{name}` must be a list of layers, but is {_short(removed)}.")
            for layer in removed:
                if not _is_index(layer, layers):
                    raise ValueError(f"`{name}` must hold layers below {layers}, but holds {_short(layer)}.")
                if left[layer]:
                    raise ValueError(f"`{name}` names layer {layer}, of which something is left: {left[layer]!r}.")
            if list(removed) != sorted(set(removed)):
                raise ValueError(f"`{name}` must be ascending layers, each once, but is {_short(removed)}.")
        if not self.max_bucket_distance > self.num_buckets // 4 > 0:
            raise ValueError(
                f"`max_bucket_distance` must be above a quarter of `num_buckets`, and that at least 1, but they are"
                f" {self.max_bucket_distance!r} and {self.num_buckets!r}."
            )
        if not isinstance(self.masked_group_norm, bool):
            raise ValueError(f"`masked_group_norm` must be true or false, but is {self.masked_group_norm!r}.")
        if self.base_model is not None and not isinstance(self.base_model, str):
            raise ValueError(f"`base_model` must be a Hub id, but is {self.base_model!r}.")


def _short(value):
    return reprlib.repr(value)  # a broken file may hold anything, of any length


def _is_index(value, end=float("inf")):
    return type(value) is int and 0 <= value < end  # not `isinstance`: a bool is none


WavLMSkillStudentConfig.register_for_auto_class()

__all__ = ["WavLMSkillStudentConfig"]
