# Copyright 2026 The skill-hf authors. Licensed under the Apache License, Version 2.0.
"""
A pruned WavLM: layers of unequal width, otherwise the stock model. This file is published with every student and
stands alone; it differs from [`~transformers.WavLMModel`] in its attention and feed-forward blocks.

- Each layer keeps its own subset of heads. The gated relative position bias (WavLM, arXiv 2110.13900, section 3.1) of
  head h reads the h-th slice of the layer's *input*, so the teacher's head indices stay in the config.
- The bias goes into `scaled_dot_product_attention` as the attention bias, so that the fused kernels run. Relative
  positions are looked up once per forward.
- A block may be empty. The embedding of relative positions is used by all layers; layer 0 only stores it.
- `masked_group_norm` takes the statistics of the group norm over valid samples only.

Parameter names are those of the stock model, so every stock WavLM checkpoint loads.
"""

import importlib
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
from transformers.activations import ACT2FN
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.wavlm.modeling_wavlm import WavLMFeatureEncoder, WavLMGroupNormConvLayer
from transformers.utils import logging

from .configuration_wavlm_skill_student import WavLMSkillStudentConfig


logger = logging.get_logger(__name__)


class WavLMSkillStudentGroupNormConvLayer(WavLMGroupNormConvLayer):
    """The first convolution of group-norm models, whose norm can leave padding out of its statistics."""

    def __init__(self, config):
        super().__init__(config, layer_id=0)

    def forward(self, hidden_states, num_samples=None):
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch, 1, samples)`): waveforms.
            num_samples (`torch.LongTensor` of shape `(batch,)`, *optional*): valid samples of each; all by default.

        Returns:
            `torch.Tensor` of shape `(batch, channels, frames)`.
        """
        if num_samples is None:
            return super().forward(hidden_states)
        hidden_states = self.conv(hidden_states)
        num_frames = (num_samples - self.conv.kernel_size[0]) // self.conv.stride[0] + 1
        frames = torch.arange(hidden_states.shape[-1], device=hidden_states.device)
        valid = (frames < num_frames[:, None])[:, None]  # (B, 1, T)
        number = num_frames.clamp(min=1)[:, None, None]
        # Each channel is a group of its own.
        features = hidden_states.float()
        mean = (features * valid).sum(-1, keepdim=True) / number
        variance = ((features - mean) * valid).square().sum(-1, keepdim=True) / number
        features = (features - mean) * torch.rsqrt(variance + self.layer_norm.eps)
        features = features * self.layer_norm.weight[:, None] + self.layer_norm.bias[:, None]
        return self.activation(features.to(hidden_states.dtype))


class WavLMSkillStudentFeatureEncoder(WavLMFeatureEncoder):
    """The stock convolutions, with `masked_group_norm`."""

    def __init__(self, config):
        super().__init__(config)
        if config.feat_extract_norm == "group":
            self.conv_layers[0] = WavLMSkillStudentGroupNormConvLayer(config)

    def forward(self, input_values, num_samples=None):
        """
        `(batch, samples)` -> `(batch, channels, frames)`. Features, `(batch, channels, frames)`, stay as they are: so
        that the stock model, which knows no `num_samples`, takes features that were made with them.
        """
        if input_values.dim() == 3:
            return input_values
        if num_samples is None:
            return super().forward(input_values)
        hidden_states = input_values[:, None]
        if self._requires_grad and self.training:  # as in the stock encoder, for gradient checkpointing
            hidden_states.requires_grad = True
        hidden_states = self.conv_layers[0](hidden_states, num_samples)
        for conv_layer in self.conv_layers[1:]:
            hidden_states = conv_layer(hidden_states)
        return hidden_states


class OutputBias(nn.Module):
    """
    What is left of an output projection without inputs: its bias, expanded to the shape of the layer's input. Its name
    is not that of a projection, which LoRA would try to adapt.
    """

    def __init__(self, hidden_size):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, hidden_states):
        return self.bias.expand(*hidden_states.shape[:-1], -1)


def eager_attention_forward(module, query, key, value, attention_mask, dropout=0.0, scaling=1.0, **kwargs):
    """Attention that returns its weights; signature and shapes are those of transformers' attention functions."""
    scores = query @ key.transpose(-1, -2) * scaling + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
    output = nn.functional.dropout(weights, p=dropout, training=module.training) @ value
    return output.transpose(1, 2).contiguous(), weights


class WavLMSkillStudentAttention(nn.Module):
    """
    Self-attention over the heads that are left, with WavLM's gated relative position bias.

    Args:
        config (`WavLMSkillStudentConfig`): `remaining_heads[layer_index]` may be empty.
        layer_index (`int`): layer 0 also stores the embedding of relative positions, whatever is left of its heads.
    """

    def __init__(self, config, layer_index):
        super().__init__()
        self.config = config
        self.heads = list(config.remaining_heads[layer_index])
        self.num_heads = config.num_attention_heads  # the teacher's: the bias has a row for each
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.dropout = config.attention_dropout

        width = len(self.heads) * self.head_dim
        if self.heads:
            self.k_proj = nn.Linear(config.hidden_size, width)
            self.v_proj = nn.Linear(config.hidden_size, width)
            self.q_proj = nn.Linear(config.hidden_size, width)
            self.out_proj = nn.Linear(width, config.hidden_size)
            self.gru_rel_pos_const = nn.Parameter(torch.ones(1, len(self.heads), 1, 1))
            self.gru_rel_pos_linear = nn.Linear(self.head_dim, 8)
            self.output_bias = None
        else:
            self.out_proj = None
            removed = layer_index in config.removed_attention_blocks
            self.output_bias = None if removed else OutputBias(config.hidden_size)
        if layer_index == 0:
            self.rel_attn_embed = nn.Embedding(config.num_buckets, self.num_heads)

    def forward(self, hidden_states, attention_mask=None, position_bias=None, **kwargs):
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch, frames, hidden_size)`): input of the layer.
            attention_mask (`torch.BoolTensor` of shape `(batch, frames)`, *optional*): True where a frame is valid.
            position_bias (`torch.Tensor` of shape `(teacher_heads, frames, frames)`, *optional*): as layer 0 returned
            it.

        Returns:
            `tuple`: output `(batch, frames, hidden_size)`; attention weights `(batch, heads, frames, frames)`, or
            `None` unless the implementation is `"eager"`; `position_bias`.
        """
        batch, frames, _ = hidden_states.shape
        if position_bias is None:
            position_bias = self.compute_bias(frames)
        if not self.heads:
            output = torch.zeros_like(hidden_states) if self.output_bias is None else self.output_bias(hidden_states)
            eager = self.config._attn_implementation == "eager"
            # Weights of no head rather than `None`, which would not be collected: the n-th stay those of layer n.
            return output, hidden_states.new_zeros(batch, 0, frames, frames) if eager else None, position_bias

        bias = self.gate(hidden_states) * self._select(position_bias, dim=0)  # (B, H, T, T)
        query, key, value = (
            projection(hidden_states).view(batch, frames, -1, self.head_dim).transpose(1, 2)  # (B, H, T, head_dim)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        bias = bias.to(query.dtype)
        if attention_mask is not None:
            bias = bias.masked_fill(~attention_mask.bool()[:, None, None, :], torch.finfo(bias.dtype).min)
        attention = eager_attention_forward
        if self.config._attn_implementation != "eager":
            attention = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        output, weights = attention(
            self,
            query,
            key,
            value,
            attention_mask=bias,
            dropout=self.dropout if self.training else 0.0,
            scaling=self.head_dim**-0.5,
            is_causal=False,
        )  # (B, T, H, head_dim)
        return self.out_proj(output.reshape(batch, frames, -1)), weights, position_bias

    @property
    def output(self):
        """The module that writes the block's output: `out_proj`, the bias that is left of it, or `None`."""
        return self.output_bias if self.out_proj is None else self.out_proj

    def gate(self, hidden_states):
        """Gate of each query frame's position bias, `(batch, heads, frames, 1)`; it reads the head's input slice."""
        slices = hidden_states.unflatten(-1, (self.num_heads, self.head_dim))  # (B, T, H, head_dim)
        projected = self.gru_rel_pos_linear(self._select(slices, dim=2).transpose(1, 2))
        reset, update = projected.unflatten(-1, (2, 4)).sum(-1).sigmoid().chunk(2, dim=-1)  # each (B, H, T, 1)
        return reset * (update * self.gru_rel_pos_const - 1.0) + 2.0

    def compute_bias(self, frames):
        """Ungated relative position bias of all teacher heads, `(teacher_heads, frames, frames)`."""
        position = torch.arange(frames, device=self.rel_attn_embed.weight.device)
        # Buckets are computed for the 2 * frames - 1 distances, not for each of the frames * frames pairs.
        distance = torch.arange(1 - frames, frames, device=position.device)
        values = self.rel_attn_embed(self._bucket(distance)).transpose(0, 1)  # (H, 2T - 1)
        return values[:, position[None, :] - position[:, None] + frames - 1]

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


class WavLMSkillStudentFeedForward(nn.Module):
    """
    Feed-forward block with `intermediate_sizes[layer_index]` units, possibly none.

    Args:
        config (`WavLMSkillStudentConfig`): names widths and removed blocks.
        layer_index (`int`): which layer this is.
    """

    def __init__(self, config, layer_index):
        super().__init__()
        size = config.intermediate_sizes[layer_index]
        if size:
            self.intermediate_dense = nn.Linear(config.hidden_size, size)
            self.intermediate_act_fn = (
                ACT2FN[config.hidden_act] if isinstance(config.hidden_act, str) else config.hidden_act
            )
            self.intermediate_dropout = nn.Dropout(config.activation_dropout)
            self.output_dense = nn.Linear(size, config.hidden_size)
            self.output_bias = None
        else:
            self.intermediate_dense = self.output_dense = None
            removed = layer_index in config.removed_ffn_blocks
            self.output_bias = None if removed else OutputBias(config.hidden_size)
        self.output_dropout = nn.Dropout(config.hidden_dropout)

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
        """The module that writes the block's output: `output_dense`, the bias that is left of it, or `None`."""
        return self.output_bias if self.output_dense is None else self.output_dense


def _pruning():
    try:
        return importlib.import_module("skill_hf.pruning")
    except ImportError as error:
        raise ImportError("Pruning a student needs the skill_hf package: `pip install skill-hf`.") from error


class _Student:
    """What the encoder and its task models share: how they are loaded and published."""

    config_class = WavLMSkillStudentConfig
    _supports_sdpa = True
    _can_set_attn_implementation_cached_value = True  # otherwise guessed from the wording of this file
    model_tags = ("skill-hf", "skill", "distillation", "structured-pruning", "speech")

    def post_init(self):
        super().post_init()
        self.model_tags = list(type(self).model_tags)  # transformers adds to the list in place

    @classmethod
    def from_pretrained(cls, *args, ignore_mismatched_sizes=False, output_loading_info=False, **kwargs):
        """
        As [`~transformers.PreTrainedModel.from_pretrained`], but weights of the encoder that do not fit its config are
        an error, where the stock method would start from random ones.

        Raises:
            `ValueError`: if weights and config disagree; the message names the field.
        """
        model, info = super().from_pretrained(*args, ignore_mismatched_sizes=True, output_loading_info=True, **kwargs)
        if getattr(model, "hf_quantizer", None) is None:  # quantised weights have names of their own
            model._check_weights(info, fewer_layers="num_hidden_layers" in kwargs)
        mismatched = _mismatched(info)
        if mismatched and not ignore_mismatched_sizes:
            raise ValueError(
                f"{'; '.join(f'{name} {problem}' for name, problem in sorted(mismatched.items()))}. Pass"
                " `ignore_mismatched_sizes=True` to start these weights anew."
            )
        return (model, info) if output_loading_info else model

    def _check_weights(self, info, fewer_layers):
        found = dict.fromkeys(info["missing_keys"], "is missing")
        found |= dict.fromkeys(info["unexpected_keys"], "is one too many")
        found |= _mismatched(info)
        found = {name.removeprefix(f"{self.base_model_prefix}."): problem for name, problem in found.items()}
        order = {name: index for index, name in enumerate(self.base_model.state_dict())}
        for name in sorted(found, key=lambda name: (order.get(name, len(order)), name)):
            field = _field_of(name, self.config.num_hidden_layers)
            if field is not None and not (fewer_layers and field == "num_hidden_layers"):
                raise ValueError(
                    f"Weights and config of this student disagree about `{field}`: {name} {found[name]}. One of them"
                    " is damaged or of another model: get both anew, or leave out the argument that has changed the"
                    " config."
                )

    def save_pretrained(self, *args, **kwargs):
        """
        As [`~transformers.PreTrainedModel.save_pretrained`].

        Raises:
            `ValueError`: if the student has gates.
        """
        if hasattr(self.base_model, "_gate_draw"):
            raise ValueError("This student has gates, which no other program reads; call `prune()` before saving it.")
        super().save_pretrained(*args, **kwargs)

    def push_to_hub(self, repo_id, **kwargs):
        """
        As [`~transformers.PreTrainedModel.push_to_hub`]; with the skill_hf package installed the model card tells what
        is left of each layer.
        """
        try:
            publishing = importlib.import_module("skill_hf.publishing")
        except ModuleNotFoundError as error:
            if not (error.name or "").startswith("skill_hf"):
                raise  # the package is there, but lacks something
            return super().push_to_hub(repo_id, **kwargs)
        return publishing.push_model(self, repo_id, **kwargs)


def _mismatched(info):
    """Names of the weights whose shape is not the model's, and what is wrong with each."""
    found = {}
    for entry in info["mismatched_keys"]:
        name, *shapes = [entry] if isinstance(entry, str) else entry  # transformers 4 gives the name alone
        found[name] = "has shape {} instead of {}".format(*map(tuple, shapes)) if shapes else "has another shape"
    return found


def _field_of(name, num_hidden_layers):
    """The field of the config that shapes the weight of this name, or `None` if no field of a pruned shape does."""
    parts = name.split(".")
    if name.startswith("feature_extractor.conv_layers."):
        return f"conv_dim[{parts[2]}]"
    if name.startswith("feature_projection."):
        return "conv_dim[-1]" if "layer_norm" in name else "hidden_size"
    if name.startswith("encoder.layers."):
        if "rel_attn_embed" in name:
            return "num_buckets"
        if int(parts[2]) >= num_hidden_layers:
            return "num_hidden_layers"
        block = {"attention": "remaining_heads", "feed_forward": "intermediate_sizes"}.get(parts[3])
        return f"{block}[{parts[2]}]" if block else "hidden_size"
    return "hidden_size" if name.startswith("encoder.") else None


class WavLMForSkillStudent(_Student, WavLMModel):
    """
    WavLM encoder of unequal layer widths; same inputs and outputs as [`~transformers.WavLMModel`].

    `WavLMForSkillStudent.from_pretrained` takes a published student or any stock WavLM checkpoint, of which it makes
    an unpruned student with the same hidden states.

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

    # transformers 4 has none, and hands hidden states and attention weights on by itself.
    _can_record_outputs = {**(WavLMModel._can_record_outputs or {}), "attentions": WavLMSkillStudentAttention}

    def __init__(self, config):
        super().__init__(config)
        self.feature_extractor = WavLMSkillStudentFeatureEncoder(config)
        for index, layer in enumerate(self.encoder.layers):
            layer.attention = WavLMSkillStudentAttention(config, index)
            layer.feed_forward = WavLMSkillStudentFeedForward(config, index)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, WavLMSkillStudentAttention) and module.heads:
            nn.init.ones_(module.gru_rel_pos_const)
        elif isinstance(module, OutputBias):
            nn.init.zeros_(module.bias)

    def forward(self, input_values, attention_mask=None, mask_time_indices=None, *args, **kwargs):
        """
        As [`~transformers.WavLMModel`], with `config.masked_group_norm`, for which padding must be on the right, where
        feature extractors put it.
        """
        group_norm = self.config.feat_extract_norm == "group"
        if self.config.masked_group_norm and group_norm and attention_mask is not None:
            input_values = self.feature_extractor(input_values, attention_mask.long().sum(-1))
        return super().forward(input_values, attention_mask, mask_time_indices, *args, **kwargs)

    @torch.no_grad()
    def to_wavlm(self):
        """
        A stock [`~transformers.WavLMModel`] with the same outputs. Convolutions stay as narrow as they are; heads and
        feed-forward units that were cut come back as zeros, so it loads anywhere and saves little.
        """
        if self.config.masked_group_norm and self.config.feat_extract_norm == "group":
            logger.warning(
                "The stock model has no `masked_group_norm`: it gives the same outputs for clips without padding only."
            )
        stock_config = WavLMModel.config_class
        own = self.config_class().to_dict().keys() - stock_config().to_dict().keys() | {"model_type", "architectures"}
        fields = {name: value for name, value in self.config.to_dict().items() if name not in own}
        stock = WavLMModel(stock_config(**fields))
        state, own = stock.state_dict(), self.state_dict()
        for index, layer in enumerate(self.encoder.layers):
            prefix = f"encoder.layers.{index}."
            for projection in ("attention.out_proj", "feed_forward.output_dense"):
                left = f"{prefix}{projection.partition('.')[0]}.output_bias.bias"
                if left in own:
                    own[f"{prefix}{projection}.bias"] = own.pop(left)
            heads = torch.tensor(layer.attention.heads, dtype=torch.long)
            rows = (heads[:, None] * layer.attention.head_dim + torch.arange(layer.attention.head_dim)).flatten()
            units = torch.arange(self.config.intermediate_sizes[index])
            # Where each tensor of this layer goes: (dimension that was cut, indices that are left).
            places = {f"attention.{name}_proj.{kind}": (0, rows) for name in "qkv" for kind in ("weight", "bias")}
            places |= {f"feed_forward.intermediate_dense.{kind}": (0, units) for kind in ("weight", "bias")}
            places["attention.out_proj.weight"] = (1, rows)
            places["attention.gru_rel_pos_const"] = (1, heads)
            places["feed_forward.output_dense.weight"] = (1, units)
            for name in [name for name in state if name.startswith(prefix + "attention.")] + [
                name for name in state if name.startswith(prefix + "feed_forward.")
            ]:
                whole, left = torch.zeros_like(state[name]), own.pop(name, None)
                dim, kept = places.get(name.removeprefix(prefix), (None, None))
                if left is not None:
                    left = left.to(whole)
                    whole = left if dim is None else whole.index_copy_(dim, kept, left)
                state[name] = whole
        stock.load_state_dict(state | own)
        return stock.to(device=self.device, dtype=self.dtype).train(self.training)

    # Like `add_adapter` of transformers, these work where the package that does it is installed: a student loaded from
    # the Hub has no use for them, and the file that describes it holds no training code.

    def add_gates(self, units=("conv_channels", "attention_heads", "ffn_dims")):
        """Puts a trainable gate on each of `units`; see [`skill_hf.pruning.add_gates`]."""
        _pruning().add_gates(self, units)

    def named_gates(self):
        """Pairs of name and gate, in the order of the layers; see [`skill_hf.pruning.named_gates`]."""
        return _pruning().named_gates(self)

    def num_expected_parameters(self):
        """Differentiable expected size, a scalar tensor; see [`skill_hf.pruning.num_expected_parameters`]."""
        return _pruning().num_expected_parameters(self)

    def prune(self):
        """Cuts what the gates close, in place, and removes the gates; see [`skill_hf.pruning.prune`]."""
        _pruning().prune(self)


class _StudentHead(_Student):
    """What makes a stock task model one over a student."""

    def __init__(self, config, *args, **kwargs):
        # The stock model first makes a stock encoder, which refuses the fused attention that the student has.
        attn_implementation, config._attn_implementation = config._attn_implementation, "eager"
        super().__init__(config, *args, **kwargs)
        config._attn_implementation = attn_implementation
        self.wavlm = WavLMForSkillStudent(config)
        self.post_init()


class WavLMSkillStudentForCTC(_StudentHead, WavLMForCTC):
    """[`~transformers.WavLMForCTC`] over a student."""


class WavLMSkillStudentForSequenceClassification(_StudentHead, WavLMForSequenceClassification):
    """[`~transformers.WavLMForSequenceClassification`] over a student."""


class WavLMSkillStudentForAudioFrameClassification(_StudentHead, WavLMForAudioFrameClassification):
    """[`~transformers.WavLMForAudioFrameClassification`] over a student."""


class WavLMSkillStudentForXVector(_StudentHead, WavLMForXVector):
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
