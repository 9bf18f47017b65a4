# Copyright 2026 The skill-hf authors. Licensed under the Apache License, Version 2.0.
"""
A pruned WavLM: its attention, its classes and its names. This file is published with every student of the family.

- The gated relative position bias (WavLM, arXiv 2110.13900, section 3.1) of head h reads the h-th slice of the layer's
  *input*, so the config keeps the teacher's head indices.
- The bias is passed to `scaled_dot_product_attention` as the attention bias, so that fused kernels are used where
  available. Relative positions are looked up once per forward pass.
- The embedding of relative positions is used by all layers; layer 0 stores it, even without heads.
"""

import math

import torch
from torch import nn
from transformers import (
    WavLMForAudioFrameClassification,
    WavLMForCTC,
    WavLMForSequenceClassification,
    WavLMForXVector,
    WavLMModel,
)
from transformers.models.wavlm.modeling_wavlm import WavLMFeatureEncoder, WavLMPositionalConvEmbedding

# Transformers 4 copies only those published files that this one itself imports: all of them, used or not.
from .configuration_skill_student import SkillStudentConfig  # noqa: F401
from .configuration_wavlm_skill_student import WavLMSkillStudentConfig
from .fast_layers import FastFeatureEncoder, FastPositionalConv, flex_attention_forward
from .modeling_skill_student import SkillStudentHead, SkillStudentModel
from .student_layers import SkillStudentAttention
from .weight_checks import check_weights  # noqa: F401


class WavLMSkillStudentFeatureEncoder(FastFeatureEncoder, WavLMFeatureEncoder):
    """The stock convolutions, computed faster."""


class WavLMSkillStudentPositionalConvEmbedding(FastPositionalConv, WavLMPositionalConvEmbedding):
    """The stock positional convolution, computed faster."""


class WavLMSkillStudentAttention(SkillStudentAttention):
    """
    Self-attention over the remaining heads, with WavLM's gated relative position bias.

    Args:
        config (`WavLMSkillStudentConfig`): `remaining_heads[layer_index]` may be empty.
        layer_index (`int`): layer 0 also stores the embedding of relative positions, even without heads.
    """

    def __init__(self, config, layer_index):
        super().__init__(config, layer_index)
        self.num_heads = config.num_attention_heads  # the teacher's: the bias has a row for each
        if self.heads:
            self.gru_rel_pos_const = nn.Parameter(torch.ones(1, len(self.heads), 1, 1))
            self.gru_rel_pos_linear = nn.Linear(self.head_dim, 8)
        if layer_index == 0:
            self.rel_attn_embed = nn.Embedding(config.num_buckets, self.num_heads)

    def forward(self, hidden_states, attention_mask=None, position_bias=None, **kwargs):
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch, frames, hidden_size)`): input of the layer.
            attention_mask (`torch.BoolTensor` of shape `(batch, frames)`, *optional*): True where a frame is valid.
            position_bias (`torch.Tensor` of shape `(teacher_heads, frames, frames)`, *optional*): as returned by
                layer 0; `(teacher_heads, 2 * frames - 1)`, for all distances, if all layers use flex attention.

        Returns:
            `tuple`: output `(batch, frames, hidden_size)`; attention weights `(batch, heads, frames, frames)`, or
            `None` unless the implementation is `"eager"`; `position_bias`.
        """
        frames = hidden_states.shape[1]
        if position_bias is None:
            uses_flex = self._uses_flex(hidden_states)
            position_bias = self.compute_distance_bias(frames) if uses_flex else self.compute_bias(frames)
        if not self.heads:
            return *self.without_heads(hidden_states), position_bias

        query, key, value = self.project(hidden_states)
        gate = self.gate(hidden_states).to(query.dtype)
        selected_bias = self._select(position_bias, dim=0).to(query.dtype)
        mask = None if attention_mask is None else attention_mask.bool()
        if position_bias.dim() == 2:
            output = flex_attention_forward(query, key, value, gate[..., 0], selected_bias, mask, self.head_dim**-0.5)
            return self.join(output), None, position_bias
        bias = gate * selected_bias  # the largest tensor of a layer, (B, H, T, T)
        if mask is not None:
            # Half of the least number, so that the sum stays finite. onnxruntime adds five times as fast as it fills.
            padding = torch.finfo(bias.dtype).min / 2
            bias += bias.new_zeros(()).where(mask, padding)[:, None, None, :]
        implementation = self.config._attn_implementation
        implementation = "sdpa" if implementation == "flex_attention" else implementation
        return *self.attend(query, key, value, bias, implementation), position_bias

    def _uses_flex(self, hidden_states):
        """Whether the flex attention kernel is used: for inference on a GPU. Otherwise fused attention is used."""
        on_gpu = hidden_states.device.type == "cuda"
        return self.config._attn_implementation == "flex_attention" and on_gpu and not self.training

    def gate(self, hidden_states):
        """
        Gate of each query frame's position bias, `(batch, heads, frames, 1)`, computed from the head's input slice.
        """
        slices = hidden_states.unflatten(-1, (self.num_heads, self.head_dim))  # (B, T, H, head_dim)
        projected = self.gru_rel_pos_linear(self._select(slices, dim=2).transpose(1, 2))
        reset, update = projected.unflatten(-1, (2, 4)).sum(-1).sigmoid().chunk(2, dim=-1)  # each (B, H, T, 1)
        return reset * (update * self.gru_rel_pos_const - 1.0) + 2.0

    def compute_bias(self, frames):
        """Ungated relative position bias of all teacher heads, `(teacher_heads, frames, frames)`."""
        position = torch.arange(frames, device=self.rel_attn_embed.weight.device)
        return self.compute_distance_bias(frames)[:, position[None, :] - position[:, None] + frames - 1]

    def compute_distance_bias(self, frames):
        """
        Ungated bias for each of the distances, from `1 - frames` to `frames - 1`, `(teacher_heads, 2 * frames - 1)`.
        """
        distance = torch.arange(1 - frames, frames, device=self.rel_attn_embed.weight.device)
        return self.rel_attn_embed(self._bucket(distance)).transpose(0, 1)

    def _bucket(self, distance):
        """T5's bidirectional buckets: exact for short distances, logarithmic up to `max_bucket_distance`."""
        half = self.config.num_buckets // 2
        exact = half // 2
        length = distance.abs()
        scale = (half - exact) / math.log(self.config.max_bucket_distance / exact)
        far = (exact + torch.log(length.clamp(min=1).float() / exact) * scale).long().clamp(max=half - 1)
        return (distance > 0).long() * half + torch.where(length < exact, length, far)

    def _select(self, tensor, dim):
        # Views by Python index rather than an index tensor: no copy to the device, and no buffer to keep in
        # checkpoints.
        if len(self.heads) == self.num_heads:
            return tensor
        return torch.stack([tensor.select(dim, head) for head in self.heads], dim=dim)


class WavLMForSkillStudent(SkillStudentModel, WavLMModel):
    """
    WavLM encoder with unequal layer widths; same inputs and outputs as [`~transformers.WavLMModel`].

    `WavLMForSkillStudent.from_pretrained` loads a published student, or any stock WavLM checkpoint as an unpruned
    student with the same hidden states.

    Example:

    ```python
    >>> from skill_hf import WavLMForSkillStudent

    >>> student = WavLMForSkillStudent.from_pretrained("microsoft/wavlm-base-plus")
    >>> student.add_gates(["attention_heads", "ffn_dims"])
    >>> # ... train the gates against student.num_expected_parameters() ...
    >>> student.prune()
    >>> student.save_pretrained("wavlm-base-plus-small")
    ```
    """

    config_class = WavLMSkillStudentConfig
    attention_class = WavLMSkillStudentAttention
    feature_encoder_class = WavLMSkillStudentFeatureEncoder
    positional_conv_class = WavLMSkillStudentPositionalConvEmbedding
    _supports_flex_attn = True

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, WavLMSkillStudentAttention) and module.heads:
            nn.init.ones_(module.gru_rel_pos_const)

    def to_wavlm(self):
        """Alias of [`~WavLMForSkillStudent.to_stock`], from the time when WavLM was the only family."""
        return self.to_stock()


class _WavLMHead(SkillStudentHead):
    config_class = WavLMSkillStudentConfig
    encoder_class = WavLMForSkillStudent
    _supports_flex_attn = True


class WavLMSkillStudentForCTC(_WavLMHead, WavLMForCTC):
    """[`~transformers.WavLMForCTC`] over a student."""


class WavLMSkillStudentForSequenceClassification(_WavLMHead, WavLMForSequenceClassification):
    """[`~transformers.WavLMForSequenceClassification`] over a student."""


class WavLMSkillStudentForAudioFrameClassification(_WavLMHead, WavLMForAudioFrameClassification):
    """[`~transformers.WavLMForAudioFrameClassification`] over a student."""


class WavLMSkillStudentForXVector(_WavLMHead, WavLMForXVector):
    """[`~transformers.WavLMForXVector`] over a student."""


WavLMForSkillStudent.register_for_auto_class("AutoModel")
WavLMSkillStudentForCTC.register_for_auto_class("AutoModelForCTC")
WavLMSkillStudentForSequenceClassification.register_for_auto_class("AutoModelForAudioClassification")
WavLMSkillStudentForAudioFrameClassification.register_for_auto_class("AutoModelForAudioFrameClassification")
WavLMSkillStudentForXVector.register_for_auto_class("AutoModelForAudioXVector")

__all__ = [
    "WavLMForSkillStudent",
    "WavLMSkillStudentForAudioFrameClassification",
    "WavLMSkillStudentForCTC",
    "WavLMSkillStudentForSequenceClassification",
    "WavLMSkillStudentForXVector",
]
