# Copyright 2026 The skill-hf authors. Licensed under the Apache License, Version 2.0.
"""
The layers of unequal width that the students of all families share. This file is published with every student and
imports no family's code. Parameter names are those of the stock models, so every stock checkpoint of a family loads.
"""

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .fast_layers import FastConv1d, FastConvLayer, FastDropout, eager_attention_forward, frozen, is_bare


# What the layers of transformers 4 unpack besides the output of attention and its weights.
_SPARE_OUTPUTS = (None,) if int(transformers.__version__.split(".")[0]) < 5 else ()


def conv_layers(config):
    """The stock convolutions with `conv_dim` channels. Base models have a norm in the first, Large models in all."""
    inputs = 1
    for index, channels in enumerate(config.conv_dim):
        conv = FastConv1d(
            inputs, channels, config.conv_kernel[index], stride=config.conv_stride[index], bias=config.conv_bias
        )
        norm = None
        if config.feat_extract_norm == "layer":
            norm = nn.LayerNorm(channels)
        elif index == 0:
            norm = nn.GroupNorm(num_groups=channels, num_channels=channels)
        yield FastConvLayer(conv, norm, ACT2FN[config.feat_extract_activation])
        inputs = channels


class OutputBias(nn.Module):
    """
    The remaining part of an output projection without inputs: its bias, expanded to the shape of the layer's input. It
    does not have the name of a projection, which LoRA would try to adapt.
    """

    def __init__(self, hidden_size):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, hidden_states):
        return self.bias.expand(*hidden_states.shape[:-1], -1)


class SkillStudentAttention(nn.Module):
    """
    Self-attention over the remaining heads. Its `forward` is that of wav2vec 2.0 and the models derived from it; WavLM
    has its own, with the same steps.

    Args:
        config ([`SkillStudentConfig`]): `remaining_heads[layer_index]` may be empty.
        layer_index (`int`): index of the layer.
    """

    def __init__(self, config, layer_index):
        super().__init__()
        self.config = config
        self.heads = list(config.remaining_heads[layer_index])
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.dropout = config.attention_dropout

        # What is left of each head's values, which fused attention wants as wide as queries and keys.
        self.value_size = config.value_sizes[layer_index]
        width, value_width = (len(self.heads) * size for size in (self.head_dim, self.value_size))
        if self.heads:
            self.k_proj = nn.Linear(config.hidden_size, width)
            self.v_proj = nn.Linear(config.hidden_size, value_width)
            self.q_proj = nn.Linear(config.hidden_size, width)
            self.qkv_proj = None  # see `fuse`
            self.out_proj = nn.Linear(value_width, config.hidden_size)
            self.output_bias = None
        else:
            self.out_proj = None
            removed = layer_index in config.removed_attention_blocks
            self.output_bias = None if removed else OutputBias(config.hidden_size)

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch, frames, hidden_size)`): input of the layer.
            attention_mask (`torch.Tensor` of shape `(batch, 1, frames, frames)`, *optional*): made by transformers for
                the attention implementation: True where a frame is valid, or added to the scores.

        Returns:
            `tuple`: output `(batch, frames, hidden_size)`; attention weights `(batch, heads, frames, frames)`, or
            `None` unless the implementation is `"eager"`; in transformers 4 also `None`.
        """
        if not self.heads:
            return *self.without_heads(hidden_states), *_SPARE_OUTPUTS
        query, key, value = self.project(hidden_states)
        outputs = self.attend(query, key, value, attention_mask, self.config._attn_implementation)
        return *outputs, *_SPARE_OUTPUTS

    def without_heads(self, hidden_states):
        """Output and attention weights, like those of `attend`, if no heads are left."""
        batch, frames, _ = hidden_states.shape
        output = torch.zeros_like(hidden_states) if self.output_bias is None else self.output_bias(hidden_states)
        eager = self.config._attn_implementation == "eager"
        # Weights of no head rather than `None`, which would not be collected: the n-th stay those of layer n.
        return output, hidden_states.new_zeros(batch, 0, frames, frames) if eager else None

    def project(self, hidden_states):
        """Query, key and value, each `(batch, heads, frames, head_dim)`; values are padded with zeros."""
        query, key, value = (
            features.unflatten(-1, (len(self.heads), -1)).transpose(1, 2) for features in self._project(hidden_states)
        )
        spare = self.head_dim - self.value_size
        return [query, key, F.pad(value, (0, spare)) if spare else value]

    def join(self, output):
        """The heads' outputs, `(batch, frames, heads, head_dim)`, projected to `(batch, frames, hidden_size)`."""
        return self.out_proj(output[..., : self.value_size].flatten(2))

    def attend(self, query, key, value, mask, implementation):
        """
        Args:
            query, key, value (`torch.Tensor` of shape `(batch, heads, frames, head_dim)`): results of `project`.
            mask (`torch.Tensor` of shape `(batch, heads or 1, frames or 1, frames)`, *optional*): added to the scores;
                if boolean, True where a score counts.
            implementation (`str`): `"eager"` or the name of an attention function of transformers.

        Returns:
            `tuple`: output `(batch, frames, hidden_size)`; attention weights `(batch, heads, frames, frames)`, or
            `None` unless the implementation is `"eager"`.
        """
        attention = eager_attention_forward
        dropout = self.dropout if self.training else 0.0
        # On a CPU the fused attention has no kernel with dropout, and takes the same steps as the eager one, but
        # slower. In half precision it is the more precise one.
        in_steps = implementation == "sdpa" and dropout and query.is_cpu and query.dtype == torch.float32
        if implementation != "eager" and not in_steps:
            attention = ALL_ATTENTION_FUNCTIONS[implementation]
        elif mask is not None and mask.dtype == torch.bool:
            # Half of the least number, so that the sum stays finite.
            mask = query.new_zeros(()).where(mask, torch.finfo(query.dtype).min / 2)
        output, weights = attention(
            self,
            query,
            key,
            value,
            attention_mask=mask,
            dropout=dropout,
            scaling=self.head_dim**-0.5,
            is_causal=False,
        )  # (B, T, H, head_dim)
        return self.join(output), None if in_steps else weights

    def _project(self, hidden_states):
        """Query, key and value, `(batch, frames, heads * head_dim)`, the value with `value_size` in place of that."""
        if self.qkv_proj is None:
            return [projection(hidden_states) for projection in (self.q_proj, self.k_proj, self.v_proj)]
        sizes = [len(self.heads) * size for size in (self.head_dim, self.head_dim, self.value_size)]
        return self.qkv_proj(hidden_states).split(sizes, dim=-1)

    def fuse(self):
        """Merges query, key and value into one linear map, unless they are not plain linear maps or have hooks."""
        if not self.heads or self.qkv_proj is not None:
            return
        projections = self.q_proj, self.k_proj, self.v_proj
        if any(type(projection) is not nn.Linear for projection in projections) or not is_bare(*projections):
            return
        weight, bias = (torch.cat([getattr(one, kind) for one in projections]) for kind in ("weight", "bias"))
        self.qkv_proj = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
        self.qkv_proj.weight, self.qkv_proj.bias = frozen(weight), frozen(bias)
        del self.q_proj, self.k_proj, self.v_proj

    @property
    def output(self):
        """The module that computes the block's output: `out_proj`, its remaining bias, or `None`."""
        return self.output_bias if self.out_proj is None else self.out_proj


class SkillStudentFeedForward(nn.Module):
    """
    Feed-forward block with `intermediate_sizes[layer_index]` units, possibly none.

    Args:
        config ([`SkillStudentConfig`]): specifies widths and removed blocks.
        layer_index (`int`): index of the layer.
    """

    def __init__(self, config, layer_index):
        super().__init__()
        size = config.intermediate_sizes[layer_index]
        if size:
            self.intermediate_dense = nn.Linear(config.hidden_size, size)
            self.intermediate_act_fn = (
                ACT2FN[config.hidden_act] if isinstance(config.hidden_act, str) else config.hidden_act
            )
            self.intermediate_dropout = FastDropout(config.activation_dropout)
            self.output_dense = nn.Linear(size, config.hidden_size)
            self.output_bias = None
        else:
            self.intermediate_dense = self.output_dense = None
            removed = layer_index in config.removed_ffn_blocks
            self.output_bias = None if removed else OutputBias(config.hidden_size)
        self.output_dropout = FastDropout(config.hidden_dropout)

    def forward(self, hidden_states):
        """`(batch, frames, hidden_size)` -> `(batch, frames, hidden_size)`."""
        if self.output is None:
            return torch.zeros_like(hidden_states)
        if self.intermediate_dense is not None:
            hidden_states = self.intermediate_act_fn(self.intermediate_dense(hidden_states))
            hidden_states = self.intermediate_dropout(hidden_states)
        return self.output_dropout(self.output(hidden_states))

    @property
    def output(self):
        """The module that computes the block's output: `output_dense`, its remaining bias, or `None`."""
        return self.output_bias if self.output_dense is None else self.output_dense
