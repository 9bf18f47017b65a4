# Copyright 2026 The skill-hf authors. Licensed under the Apache License, Version 2.0.
"""
A pruned WavLM: layers of unequal width, otherwise the stock model. This file is published with every student and
stands alone; it differs from [`~transformers.WavLMModel`] in its attention and feed-forward blocks.

- Each layer keeps its own subset of heads. The gated relative position bias (WavLM, arXiv 2110.13900, section 3.1) of
  head h reads the h-th slice of the layer's *input*, so the teacher's head indices stay in the config.
- The bias goes into `scaled_dot_product_attention` as the attention bias, so that fused kernels run where they are
  available. Relative positions are looked up once per forward.
- A block may be empty. The embedding of relative positions is used by all layers; layer 0 only stores it.
- `masked_group_norm` takes the statistics of the group norm over valid samples only.

Parameter names are those of the stock model, so every stock WavLM checkpoint loads.
"""

import copy
import importlib.util
import math
import os
from functools import cache, partial
from itertools import repeat

import torch
from safetensors import safe_open
from torch import nn
from torch.nn.utils import parametrize
from transformers import (
    WavLMForAudioFrameClassification,
    WavLMForCTC,
    WavLMForSequenceClassification,
    WavLMForXVector,
    WavLMModel,
)
from transformers.activations import ACT2FN, GELUActivation
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.wavlm.modeling_wavlm import WavLMFeatureEncoder, WavLMPositionalConvEmbedding
from transformers.utils import logging

from .configuration_wavlm_skill_student import CUT_TENSORS, WavLMSkillStudentConfig, refuse_training_checkpoint


logger = logging.get_logger(__name__)

_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
_HEAD_FIELDS = {
    "lm_head": "vocab_size",
    "projector": "classifier_proj_size",
    "classifier": "num_labels",
    "tdnn": "tdnn_dim",
    "feature_extractor": "xvector_output_dim",
    "objective": "num_labels",
    "adapter": "output_hidden_size",
}
# What pruning changes in the config.
_PRUNED_FIELDS = (
    "conv_dim",
    "remaining_heads",
    "intermediate_sizes",
    "removed_attention_blocks",
    "removed_ffn_blocks",
)


def _is_transformed():
    """Whether this runs under a transformation of `torch.func`, which knows the kernels of PyTorch alone."""
    return getattr(torch._C, "_are_functorch_transforms_active", bool)()


def _is_traced():
    """Whether a graph is being made of this, which must not depend on the values of tensors."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or _is_transformed()


def _is_plain():
    """Whether layers are to be computed as the stock model does it: for an export or a transformation."""
    # torch 2.6 cannot tell an export from a compilation.
    exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)()
    return exporting or torch.jit.is_tracing() or _is_transformed()


def _runs_channels_last(hidden_states):
    """Whether convolutions of these have the layout that is faster on a CPU."""
    # torch's compiler (2.13) cannot order the strides of its gradients where the length is a symbol.
    compiled = torch.compiler.is_compiling() and torch.is_grad_enabled()
    return hidden_states.device.type == "cpu" and not compiled and not _is_plain()


def _is_bare(*modules):
    """Whether nobody looks at what goes into these modules and comes out of them."""
    return not any(module._forward_hooks or module._forward_pre_hooks for module in modules if module is not None)


class _StridedConv(torch.autograd.Function):
    """
    1-D convolution of features that are `(batch, channels, frames)` and channels-last in memory, whose gradients are
    plain matrix products: `stride` neighbouring frames are one row of a matrix that lies in memory already, so the
    taps of a kernel are taken `stride` at a time, and nothing is copied. Kernels are no narrower than the stride.
    """

    @staticmethod
    def forward(ctx, hidden_states, weight, bias, stride):
        ctx.save_for_backward(hidden_states, weight)
        ctx.stride = stride
        return _channels_last_conv(hidden_states, weight, bias, stride)

    @staticmethod
    def backward(ctx, grad):
        hidden_states, weight = ctx.saved_tensors
        to_inputs, to_weight, to_bias, _ = ctx.needs_input_grad
        if torch.is_grad_enabled():  # the gradient is to have one itself
            settings = {"stride": ctx.stride}
            return (
                nn.grad.conv1d_input(hidden_states.shape, weight, grad, **settings) if to_inputs else None,
                nn.grad.conv1d_weight(hidden_states, weight.shape, grad, **settings) if to_weight else None,
                grad.sum((0, 2)) if to_bias else None,
                None,
            )
        grad, inputs = grad.mT.contiguous(), hidden_states.mT.contiguous()  # (B, T', C'), (B, T, C)
        frames, channels, kernel = grad.shape[1], weight.shape[1], weight.shape[2]
        taps = weight.mT.contiguous()  # (C', K, C)
        grad_inputs = torch.empty_like(inputs) if to_inputs else None
        if to_inputs:
            grad_inputs[:, frames * ctx.stride :] = 0  # what only later taps reach, or none
        grad_taps = torch.zeros_like(taps) if to_weight else None
        for first in range(0, kernel, ctx.stride):
            width = min(ctx.stride, kernel - first)
            rows = (frames, width * channels), (ctx.stride * channels, 1)  # size and stride of the matrix
            offsets = [clip * inputs.stride(0) + first * channels for clip in range(len(inputs))]
            if to_weight:
                # In half precision a sum over many clips would be rounded after each.
                part = taps.new_zeros(
                    len(taps), width * channels, dtype=torch.promote_types(grad.dtype, torch.float32)
                )
                for clip, offset in enumerate(offsets):
                    matrix = inputs.as_strided(*rows, inputs.storage_offset() + offset)
                    if part.dtype == grad.dtype:
                        part.addmm_(grad[clip].T, matrix)
                    else:
                        part += grad[clip].T @ matrix
                grad_taps[:, first : first + width] = part.unflatten(1, (width, channels))
            if to_inputs:
                part = taps[:, first : first + width].flatten(1)
                for clip, offset in enumerate(offsets):
                    grad_inputs.as_strided(*rows, offset).addmm_(grad[clip], part, beta=int(first > 0))
        return (
            grad_inputs.mT if to_inputs else None,
            grad_taps.mT if to_weight else None,
            grad.sum((0, 1)) if to_bias else None,
            None,
        )


def _frozen(tensor):
    return nn.Parameter(tensor, requires_grad=False)


def fold_weight_norm(module):
    """Gives `module` its weight instead of the norm and the direction that training needs, in place."""
    if parametrize.is_parametrized(module, "weight"):
        weight = module.weight
        # `remove_parametrizations` would strip the class, which copies of the module share.
        del module.parametrizations
        module.__class__ = type(module).__base__
        module.weight = _frozen(weight)


def _lay_out(conv):
    """Puts the weight of a convolution in the order that `_channels_last_conv` reads, which a GPU has no use for."""
    if isinstance(conv, nn.Conv1d) and conv.weight.is_cpu:
        conv.weight = _frozen(conv.weight.unsqueeze(2).contiguous(memory_format=torch.channels_last).squeeze(2))


def _channels_last_conv(hidden_states, weight, bias, stride, padding=0, groups=1):
    layout = {"memory_format": torch.channels_last}
    return nn.functional.conv2d(
        hidden_states.unsqueeze(2).contiguous(**layout),
        weight.unsqueeze(2).contiguous(**layout),
        bias,
        stride=(1, stride),
        padding=(0, padding),
        groups=groups,
    ).squeeze(2)


class WavLMSkillStudentConv1d(nn.Conv1d):
    """
    [`~torch.nn.Conv1d`], on the CPU by the kernel for channels-last memory: it is faster, and leaves features in the
    order that norms and linear maps after it read. Shapes are those of the stock layer.
    """

    def _conv_forward(self, hidden_states, weight, bias):
        if not _runs_channels_last(hidden_states):
            return super()._conv_forward(hidden_states, weight, bias)
        gaps = self.kernel_size < self.stride  # between the windows
        if gaps or not torch.is_grad_enabled():
            return _channels_last_conv(hidden_states, weight, bias, self.stride[0])
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            hidden_states, weight = hidden_states.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        return _StridedConv.apply(hidden_states, weight, bias, self.stride[0])


class WavLMSkillStudentConvLayer(nn.Module):
    """
    One of the stock model's three kinds of convolutional layer: with group norm (the first one of Base models), with
    layer norm (all of Large models), or without a norm.

    Args:
        config (`WavLMSkillStudentConfig`): `conv_dim` holds the channels that are left.
        layer_index (`int`): which layer this is.
    """

    def __init__(self, config, layer_index):
        super().__init__()
        channels = config.conv_dim[layer_index]
        # Not read from `conv`, which may be wrapped.
        self.conv_kernel, self.conv_stride = config.conv_kernel[layer_index], config.conv_stride[layer_index]
        self.conv = WavLMSkillStudentConv1d(
            config.conv_dim[layer_index - 1] if layer_index else 1,
            channels,
            kernel_size=self.conv_kernel,
            stride=self.conv_stride,
            bias=config.conv_bias,
        )
        self.activation = ACT2FN[config.feat_extract_activation]
        if config.feat_extract_norm == "layer":
            self.layer_norm = nn.LayerNorm(channels)
        elif layer_index == 0:
            self.layer_norm = nn.GroupNorm(num_groups=channels, num_channels=channels)
        else:
            self.layer_norm = None

    def forward(self, hidden_states, num_samples=None):
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch, channels, frames)`): one channel of samples for layer 0.
            num_samples (`torch.LongTensor` of shape `(batch,)`, *optional*):
                Valid samples of each clip, for a group norm to take its statistics over; all by default.

        Returns:
            `torch.Tensor` of shape `(batch, channels, frames)`.
        """
        group_norm = isinstance(self.layer_norm, nn.GroupNorm)
        if group_norm and self._can_fold():
            hidden_states = self._convolve_and_normalise(hidden_states[:, 0], num_samples)
        else:
            hidden_states = self.conv(hidden_states)
            if group_norm and num_samples is not None:
                hidden_states = self._normalise(hidden_states, self._valid_frames(hidden_states, num_samples))
            elif group_norm and _is_plain() and _is_bare(self.layer_norm):
                # The same where each channel is a group, and one operator of ONNX instead of five.
                norm = self.layer_norm
                hidden_states = nn.functional.instance_norm(
                    hidden_states, weight=norm.weight, bias=norm.bias, eps=norm.eps
                )
            elif group_norm:
                hidden_states = self.layer_norm(hidden_states)
            elif self.layer_norm is not None:
                hidden_states = self.layer_norm(hidden_states.mT).mT
        if not _runs_channels_last(hidden_states):
            return self._activate(hidden_states)
        # Channels last, which kernels and compilers take for contiguous only where it is the last dimension, too.
        return self._activate(hidden_states.mT).mT

    def _activate(self, hidden_states):
        in_place = not (torch.is_grad_enabled() or _is_traced()) and _is_bare(self.conv, self.layer_norm)
        if in_place and isinstance(self.activation, GELUActivation):
            return torch.ops.aten.gelu_(hidden_states)  # the largest activations of the model
        return self.activation(hidden_states)

    def _can_fold(self):
        """Not where somebody else has the weight or looks at what the norm reads, nor without float64."""
        if _is_plain() or type(self.conv) is not WavLMSkillStudentConv1d or not _is_bare(self.conv, self.layer_norm):
            return False
        weight = self.conv.weight  # of which DeepSpeed (`ds_id`) may hold a part
        return weight.device.type in ("cpu", "cuda") and not hasattr(weight, "ds_id") and self.conv.bias is None

    def _valid_frames(self, features, num_samples):
        """Which frames are no padding, `(batch, 1, frames)`, and how many, `(batch, 1, 1)`."""
        num_frames = (num_samples - self.conv_kernel) // self.conv_stride + 1
        frames = torch.arange(features.shape[-1], device=features.device)
        return (frames < num_frames[:, None])[:, None], num_frames.clamp(min=1)[:, None, None]

    def _normalise(self, hidden_states, valid_frames):
        """Group norm of `(batch, channels, frames)`, each channel a group of its own, over valid frames."""
        valid, number = valid_frames
        features = hidden_states.float()
        mean = (features * valid).sum(-1, keepdim=True) / number
        variance = ((features - mean) * valid).square().sum(-1, keepdim=True) / number
        features = (features - mean) * torch.rsqrt(variance + self.layer_norm.eps)
        features = features * self.layer_norm.weight[:, None] + self.layer_norm.bias[:, None]
        return features.to(hidden_states.dtype)

    def _convolve_and_normalise(self, samples, num_samples):
        """
        Convolution and group norm as one linear map. Each channel is a group of its own and reads a window of
        `kernel_size` samples, so its mean and variance follow from those of the windows: `w . mean` and `w' Cov w`.
        The norm then only scales the kernel, and neither its input nor its statistics are ever formed.
        """
        windows = samples.unfold(-1, self.conv_kernel, self.conv_stride).mT  # (B, K, T)
        with torch.autocast(samples.device.type, enabled=False):
            # float64 keeps the variance exact where a kernel takes out most of what it reads.
            centred, weight = windows.double(), self.conv.weight[:, 0].double()  # (C, K)
            if num_samples is None:
                centred = centred - centred.mean(-1, keepdim=True)
                covariance = centred @ centred.mT / centred.shape[-1]  # (B, K, K)
            else:
                valid, number = self._valid_frames(centred, num_samples)
                centred = centred - (centred * valid).sum(-1, keepdim=True) / number
                covariance = (centred * valid) @ centred.mT / number
            variance = ((weight @ covariance) * weight).sum(-1)  # (B, C)
            scale = self.layer_norm.weight.double() * torch.rsqrt(variance + self.layer_norm.eps)
            kernels = (scale[..., None] * weight).to(samples.dtype)  # (B, C, K)
            # The bias is the tap of a constant: to add it would be a pass over the largest activation of the model.
            bias = self.layer_norm.bias.to(samples.dtype).expand(len(kernels), 1, -1).mT
            kernels = torch.cat((kernels, bias), dim=-1)
            centred = nn.functional.pad(centred.to(samples.dtype), (0, 0, 0, 1), value=1.0)
        if samples.device.type == "cpu":
            return (centred.mT @ kernels.mT).mT  # channels last in memory
        return kernels @ centred


class WavLMSkillStudentFeatureEncoder(WavLMFeatureEncoder):
    """
    The stock convolutions, with `masked_group_norm`. Where nothing is kept for a gradient (there is none, or
    checkpoints are made), a batch goes through them a few clips at a time.
    """

    # Values that the widest activation may have at once: on a CPU what stays in the caches, and in memory that the
    # allocator keeps, is faster; a GPU is to be kept busy.
    max_values = {"cpu": 2**22, "cuda": 2**26}

    def __init__(self, config):
        super().__init__(config)
        self.channels = config.conv_dim[0]
        self.conv_layers = nn.ModuleList(
            WavLMSkillStudentConvLayer(config, index) for index in range(config.num_feat_extract_layers)
        )

    def forward(self, input_values, num_samples=None):
        """
        `(batch, samples)` -> `(batch, channels, frames)`. Features, `(batch, channels, frames)`, stay as they are: so
        that the stock model, which knows no `num_samples`, takes features that were made with them.
        """
        if input_values.dim() == 3:
            return input_values
        encode, checkpointed = self._encode, self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        if checkpointed:
            encode = partial(self._gradient_checkpointing_func, self._encode)
            if not input_values.requires_grad:  # without it, checkpoints that are reentrant keep no gradient
                input_values = input_values.detach().requires_grad_(self._requires_grad)
        in_parts = checkpointed or (input_values.device.type == "cpu" and not torch.is_grad_enabled())
        if not in_parts or _is_traced():
            return encode(input_values, num_samples)
        values = self.channels * input_values.shape[1] // self.conv_layers[0].conv_stride
        clips = max(1, self.max_values.get(input_values.device.type, 2**26) // max(1, values))
        lengths = repeat(None) if num_samples is None else num_samples.split(clips)
        parts = [encode(*part).mT for part in zip(input_values.split(clips), lengths, strict=False)]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).mT

    def _encode(self, input_values, num_samples):
        hidden_states = self.conv_layers[0](input_values[:, None], num_samples)
        for conv_layer in self.conv_layers[1:]:
            hidden_states = conv_layer(hidden_states)
        return hidden_states


class FourierConv1d(nn.Module):
    """
    What a grouped convolution of stride 1 computes, by the fast Fourier transform (overlap-save): its kernel is
    applied to blocks of twice its length, where it is one complex product for each frequency.

    Args:
        conv ([`~torch.nn.Conv1d`]): whose weight, in float32, is transformed here, once.
    """

    def __init__(self, conv):
        super().__init__()
        self.kernel, self.padding, self.groups = conv.kernel_size[0], conv.padding[0], conv.groups
        self.block = 2 ** math.ceil(math.log2(2 * self.kernel))
        self.step = self.block - self.kernel + 1  # samples of a block that no other one wraps around into
        spectrum = torch.fft.rfft(conv.weight.detach(), n=self.block).conj()  # (C', C / groups, F): a correlation
        spectrum = spectrum.unflatten(0, (self.groups, -1)).permute(3, 0, 2, 1)  # (F, groups, C / groups, C' / groups)
        # As pairs of real numbers, since `.to(dtype)` of a module would drop the imaginary part of complex ones.
        spectrum = torch.view_as_real(spectrum.resolve_conj().contiguous())
        self.register_buffer("spectrum", spectrum, persistent=False)
        self.register_buffer("bias", None if conv.bias is None else conv.bias.detach(), persistent=False)

    def forward(self, hidden_states):
        """`(batch, frames, channels)`, float32 -> `(batch, frames + 2 * padding - kernel_size + 1, channels)`."""
        batch, frames, _ = hidden_states.shape
        length = frames + 2 * self.padding - self.kernel + 1
        blocks = -(-length // self.step)
        end = blocks * self.step + self.kernel - 1 - self.padding - frames
        padded = nn.functional.pad(hidden_states, (0, 0, self.padding, end))
        windows = padded.unfold(1, self.block, self.step)  # (B, blocks, C, block)
        features = torch.fft.rfft(windows).unflatten(2, (self.groups, -1))  # (B, blocks, groups, C / groups, F)
        features = features.permute(4, 2, 0, 1, 3).flatten(2, 3)  # (F, groups, B * blocks, C / groups)
        features = (features @ torch.view_as_complex(self.spectrum)).unflatten(2, (batch, blocks))
        features = torch.fft.irfft(features.permute(2, 3, 1, 4, 0), n=self.block)  # (B, blocks, groups, C', block)
        features = features[..., : self.step].flatten(2, 3).mT.flatten(1, 2)[:, :length]
        return features if self.bias is None else features + self.bias


class WavLMSkillStudentPositionalConvEmbedding(WavLMPositionalConvEmbedding):
    """
    The stock positional convolution, on the CPU by the kernel for channels-last memory, or by the Fourier transform
    once it is fused.
    """

    def __init__(self, config):
        super().__init__(config)
        self.fourier = None  # see `fuse`

    def forward(self, hidden_states):
        """`(batch, frames, hidden_size)` -> `(batch, frames, hidden_size)`."""
        conv = self.conv
        if not (_runs_channels_last(hidden_states) and isinstance(conv, nn.Conv1d) and _is_bare(conv)):
            return super().forward(hidden_states)
        if self.fourier is not None and hidden_states.dtype == torch.float32 and not _is_traced():
            hidden_states = self.fourier(hidden_states).mT
        else:
            hidden_states = _channels_last_conv(
                hidden_states.mT, conv.weight, conv.bias, conv.stride[0], conv.padding[0], conv.groups
            )
        return self.activation(self.padding(hidden_states)).mT

    def fuse(self):
        """The weight itself instead of its norm and direction, and on a CPU its Fourier transform."""
        fold_weight_norm(self.conv)
        if type(self.conv) is nn.Conv1d and self.conv.weight.is_cpu and self.conv.weight.dtype == torch.float32:
            self.fourier = FourierConv1d(self.conv)
        _lay_out(self.conv)


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


def fast_dropout(hidden_states, p, training):
    """
    As [`~torch.nn.functional.dropout`], but on the CPU a random number has 16 bits: torch draws a long one for each
    value, which takes 7 to 10 % of a training step. The probability is rounded to a multiple of 2^-16, and what is
    left scaled by the rounded one, so that the expected value stays.
    """
    kept = round((1 - p) * 2**16)
    plain = type(hidden_states) is torch.Tensor and hidden_states.is_cpu and not _is_traced()
    if not (training and plain and 0 < kept < 2**16):
        return nn.functional.dropout(hidden_states, p, training)
    words = hidden_states.new_empty(-(-hidden_states.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    numbers = words.view(torch.int16)[: hidden_states.numel()].view(hidden_states.shape)
    mask = torch.lt(numbers, kept - 2**15, out=torch.empty_like(hidden_states))
    return hidden_states * mask.mul_(2**16 / kept)


class WavLMSkillStudentDropout(nn.Dropout):
    """[`~torch.nn.Dropout`] by [`fast_dropout`]."""

    def forward(self, hidden_states):
        return fast_dropout(hidden_states, self.p, self.training)


def eager_attention_forward(module, query, key, value, attention_mask, dropout=0.0, scaling=1.0, **kwargs):
    """Attention that returns its weights; signature and shapes are those of transformers' attention functions."""
    weights = nn.functional.softmax(
        torch.add(attention_mask, query @ key.transpose(-1, -2), alpha=scaling), dim=-1, dtype=torch.float32
    ).to(value.dtype)
    output = fast_dropout(weights, dropout, module.training) @ value
    return output.transpose(1, 2).contiguous(), weights


def flex_attention_forward(query, key, value, gate, values, attention_mask=None, scaling=1.0):
    """
    Attention by a kernel that takes the position bias of each pair of frames from `gate` and `values` where it is
    needed, so that no tensor of the size of the attention weights is made.

    Args:
        query, key, value (`torch.Tensor` of shape `(batch, heads, frames, head_dim)`).
        gate (`torch.Tensor` of shape `(batch, heads, frames)`): of each query frame.
        values (`torch.Tensor` of shape `(heads, 2 * frames - 1)`): bias of each distance, from `1 - frames` on.
        attention_mask (`torch.BoolTensor` of shape `(batch, frames)`, *optional*): True where a frame is valid.
        scaling (`float`): of the scores.

    Returns:
        `torch.Tensor` of shape `(batch, frames, heads, head_dim)`.
    """
    last = query.shape[2] - 1

    def score_mod(score, batch, head, query_frame, key_frame):
        score = score + gate[batch, head, query_frame] * values[head, key_frame - query_frame + last]
        return score if attention_mask is None else score.where(attention_mask[batch, key_frame], -math.inf)

    settings = {"score_mod": score_mod, "scale": scaling}
    if torch.compiler.is_compiling():
        return _flex_attention(compiled=False)(query, key, value, **settings).transpose(1, 2)
    # Beyond its limit torch goes on with a kernel that makes the large tensor. This one is compiled for each number of
    # heads that a layer may have, but not for each length, as that of transformers is.
    with torch._dynamo.config.patch(recompile_limit=64):
        return _flex_attention(compiled=True)(query, key, value, **settings).transpose(1, 2)


@cache
def _flex_attention(compiled):
    from torch.nn.attention.flex_attention import flex_attention  # not in every version that students are loaded with

    return torch.compile(flex_attention, dynamic=True) if compiled else flex_attention


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
            self.qkv_proj = None  # see `fuse`
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
            it; `(teacher_heads, 2 * frames - 1)`, that of all distances, if all layers are to use flex attention.

        Returns:
            `tuple`: output `(batch, frames, hidden_size)`; attention weights `(batch, heads, frames, frames)`, or
            `None` unless the implementation is `"eager"`; `position_bias`.
        """
        batch, frames, _ = hidden_states.shape
        implementation = self.config._attn_implementation
        if position_bias is None:
            uses_flex = self._uses_flex(hidden_states)
            position_bias = self.compute_distance_bias(frames) if uses_flex else self.compute_bias(frames)
        if not self.heads:
            output = torch.zeros_like(hidden_states) if self.output_bias is None else self.output_bias(hidden_states)
            eager = implementation == "eager"
            # Weights of no head rather than `None`, which would not be collected: the n-th stay those of layer n.
            return output, hidden_states.new_zeros(batch, 0, frames, frames) if eager else None, position_bias

        query, key, value = (
            features.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H, T, head_dim)
            for features in self._project(hidden_states)
        )
        gate = self.gate(hidden_states).to(query.dtype)
        selected_bias = self._select(position_bias, dim=0).to(query.dtype)
        mask = None if attention_mask is None else attention_mask.bool()
        scaling = self.head_dim**-0.5
        if position_bias.dim() == 2:
            weights = None
            output = flex_attention_forward(query, key, value, gate[..., 0], selected_bias, mask, scaling)
        else:
            bias = gate * selected_bias  # the largest tensor of a layer, (B, H, T, T)
            if mask is not None:
                # Half of the least number, so that the sum stays finite. onnxruntime adds five times as fast as it
                # fills.
                padding = torch.finfo(bias.dtype).min / 2
                bias += bias.new_zeros(()).where(mask, padding)[:, None, None, :]
            attention = eager_attention_forward
            dropout = self.dropout if self.training else 0.0
            implementation = "sdpa" if implementation == "flex_attention" else implementation
            # On a CPU the fused attention has no kernel with dropout, and takes the same steps as the eager one, but
            # slower. In half precision it is the more precise one.
            in_steps = implementation == "sdpa" and dropout and query.is_cpu and query.dtype == torch.float32
            if implementation != "eager" and not in_steps:
                attention = ALL_ATTENTION_FUNCTIONS[implementation]
            output, weights = attention(
                self,
                query,
                key,
                value,
                attention_mask=bias,
                dropout=dropout,
                scaling=scaling,
                is_causal=False,
            )  # (B, T, H, head_dim)
            weights = None if in_steps else weights
        return self.out_proj(output.reshape(batch, frames, -1)), weights, position_bias

    def _project(self, hidden_states):
        """Query, key and value, each `(batch, frames, heads * head_dim)`."""
        if self.qkv_proj is None:
            return [projection(hidden_states) for projection in (self.q_proj, self.k_proj, self.v_proj)]
        return self.qkv_proj(hidden_states).chunk(3, dim=-1)

    def fuse(self):
        """One linear map for query, key and value, unless theirs are something else or somebody looks at them."""
        if not self.heads or self.qkv_proj is not None:
            return
        projections = self.q_proj, self.k_proj, self.v_proj
        if any(type(projection) is not nn.Linear for projection in projections) or not _is_bare(*projections):
            return
        weight, bias = (torch.cat([getattr(one, kind) for one in projections]) for kind in ("weight", "bias"))
        self.qkv_proj = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
        self.qkv_proj.weight, self.qkv_proj.bias = _frozen(weight), _frozen(bias)
        del self.q_proj, self.k_proj, self.v_proj

    def _uses_flex(self, hidden_states):
        """Whether its kernel is available: for inference on a GPU. Elsewhere the fused attention is used instead."""
        on_gpu = hidden_states.device.type == "cuda"
        return self.config._attn_implementation == "flex_attention" and on_gpu and not self.training

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
        return self.compute_distance_bias(frames)[:, position[None, :] - position[:, None] + frames - 1]

    def compute_distance_bias(self, frames):
        """The same for each of the distances, from `1 - frames` to `frames - 1`, `(teacher_heads, 2 * frames - 1)`."""
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
            self.intermediate_dropout = WavLMSkillStudentDropout(config.activation_dropout)
            self.output_dense = nn.Linear(size, config.hidden_size)
            self.output_bias = None
        else:
            self.intermediate_dense = self.output_dense = None
            removed = layer_index in config.removed_ffn_blocks
            self.output_bias = None if removed else OutputBias(config.hidden_size)
        self.output_dropout = WavLMSkillStudentDropout(config.hidden_dropout)

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


# What acts on students from outside, by name. The skill-hf package puts its functions here when it is imported. This
# file names none of its modules: they may move, but files that are published stay as they are.
ACTIONS = {}


def _act(action, student, *args, **kwargs):
    if action not in ACTIONS:
        raise ImportError(
            f"`{action}` needs the skill-hf package: `pip install skill-hf`, then `import skill_hf` and load the"
            " student again."
        )
    return ACTIONS[action](student, *args, **kwargs)


class _Student:
    """What the encoder and its task models share: how they are loaded and published."""

    config_class = WavLMSkillStudentConfig
    _supports_sdpa = True
    _supports_flex_attn = True
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
        refuse_training_checkpoint(*args[:1])
        model, info = super().from_pretrained(*args, ignore_mismatched_sizes=True, output_loading_info=True, **kwargs)
        mismatched = _mismatched(info)
        if getattr(model, "hf_quantizer", None) is None:  # quantised weights have names of their own
            found = dict.fromkeys(info["missing_keys"], ("is missing", None))
            found |= dict.fromkeys(info["unexpected_keys"], ("is unexpected", None))
            model._check_weights(found | mismatched, fewer_layers="num_hidden_layers" in kwargs)
            _check_finite(model, but={*info["missing_keys"], *mismatched})
        if mismatched and not ignore_mismatched_sizes:
            raise ValueError(
                f"{'; '.join(f'{name} {problem}' for name, (problem, _) in sorted(mismatched.items()))}. Pass"
                " `ignore_mismatched_sizes=True` to initialise these weights again."
            )
        return (model, info) if output_loading_info else model

    @classmethod
    def _load_pretrained_model(cls, model, state_dict, checkpoint_files, *args, **kwargs):
        # In transformers 4 and 5 alike, the model has shapes here but no memory yet, and then gets all that its config
        # describes, whatever the weights are.
        if getattr(model.config, "quantization_config", None) is None:
            model._check_declared(_declared(model, state_dict, checkpoint_files))
        return super()._load_pretrained_model(model, state_dict, checkpoint_files, *args, **kwargs)

    def _check_declared(self, declared):
        """
        Raises a `ValueError` if the model does not have the shapes that its weights declare, by name, or if they are
        not floating or much fewer than the model's.
        """
        prefix = f"{self.base_model_prefix}."
        for name, tensor in declared.items():
            if not tensor.is_floating_point():
                kind = str(tensor.dtype).removeprefix("torch.")
                raise ValueError(
                    f"{name} of this student is of type {kind}, but weights must be floating: the file is damaged or"
                    " of another model. Get it again."
                )
        declared = {name.removeprefix(prefix): tensor.shape for name, tensor in declared.items()}
        wanted = {name.removeprefix(prefix): tensor.shape for name, tensor in self.state_dict().items()}
        differing = {name: shape for name, shape in wanted.items() if declared.get(name, shape) != shape}
        self._check_weights({name: _mismatch(declared[name], shape) for name, shape in differing.items()})
        absent = {name: shape.numel() for name, shape in wanted.items() if declared.get(name) != shape}
        stored = sum(shape.numel() for shape in declared.values())
        if sum(absent.values()) > 2 * stored + 2**24:
            name = max(absent, key=absent.get)
            field = _field_of(name, self.config.num_hidden_layers) or _HEAD_FIELDS.get(name.partition(".")[0], name)
            raise ValueError(
                f"The config of this student describes far more than its weights hold, {stored:,} numbers: {name} of"
                f" shape {tuple(wanted[name])}. Check `{field}`."
            )

    def _check_weights(self, found, fewer_layers=False):
        """
        Raises a `ValueError` of the first weight of the encoder in `found`, which holds what is wrong with each, and
        for a wrong shape the shapes of the file and the model.
        """
        found = {name.removeprefix(f"{self.base_model_prefix}."): problem for name, problem in found.items()}
        order = {name: index for index, name in enumerate(self.base_model.state_dict())}
        # The number of heads changes other shapes, too, but only this one alone.
        order |= {name: -1 for name in order if "rel_attn_embed" in name}
        for name in sorted(found, key=lambda name: (order.get(name, len(order)), name)):
            problem, shapes = found[name]
            field = _field_of(name, self.config.num_hidden_layers, shapes)
            if field is not None and not (fewer_layers and field == "num_hidden_layers"):
                raise ValueError(
                    f"Weights and config of this student disagree about `{field}`: {name} {problem}. One of them"
                    " is damaged or of another model: get both again, or leave out the argument that has changed the"
                    " config."
                )

    def save_pretrained(self, *args, **kwargs):
        """
        As [`~transformers.PreTrainedModel.save_pretrained`].

        Raises:
            `ValueError`: if the student has gates or is fused.
        """
        if self.base_model.gating is not None:
            raise ValueError("This student has gates, which no other program reads; call `prune()` before saving it.")
        self.base_model.refuse_fused("saved")
        for name in _PRUNED_FIELDS:  # a head may have been given another encoder since it was made
            setattr(self.config, name, copy.deepcopy(getattr(self.base_model.config, name)))
        super().save_pretrained(*args, **kwargs)

    @torch.no_grad()
    def fuse(self):
        """
        Prepares the student for inference, in place, and sets it to eval mode: folds the weight norm of the positional
        convolution and makes one linear map of query, key and value; on a CPU it puts the weights of convolutions in
        the order that kernels read and computes the positional one by the Fourier transform. Outputs stay the same
        (1e-5). The Fourier transform of its weight takes memory: 38 MB for Base models.

        Call it where the student is to run, after `.to(device)`. It can be neither saved nor trained any more;
        `from_pretrained` gives one that can.

        Returns:
            The model itself.

        Raises:
            `ValueError`: if the student has gates.
        """
        if self.base_model.gating is not None:
            raise ValueError("This student has gates; call `prune()` before fusing it.")
        self.requires_grad_(False).eval()
        for module in list(self.base_model.modules()):
            if isinstance(module, WavLMSkillStudentAttention | WavLMSkillStudentPositionalConvEmbedding):
                module.fuse()
            elif isinstance(module, WavLMSkillStudentConv1d):
                _lay_out(module)
        self.base_model._is_fused = True
        return self

    def push_to_hub(self, repo_id, **kwargs):
        """
        As [`~transformers.PreTrainedModel.push_to_hub`]. After `import skill_hf` a model card that tells what is left
        of each layer goes along.
        """
        if "push_to_hub" in ACTIONS:
            return _act("push_to_hub", self, repo_id, **kwargs)
        if importlib.util.find_spec("skill_hf") is not None:
            logger.warning(
                "This student runs the code of its own repository, which may be of another version than the skill-hf"
                " package that is installed: it is pushed as transformers does it, without the package's model card."
                " To have the card, `import skill_hf`, load the student again and push that."
            )
        return super().push_to_hub(repo_id, **kwargs)


def _declared(model, state_dict, checkpoint_files):
    """The weights by name, as tensors without memory, and of local files only those in the model's own directory."""
    if state_dict is not None:
        return {name: tensor for name, tensor in state_dict.items() if isinstance(tensor, torch.Tensor)}
    directory = os.path.abspath(model.config.name_or_path or "")
    declared = {}
    for path in map(str, checkpoint_files or ()):
        if os.path.isdir(directory) and os.path.commonpath([directory, os.path.abspath(path)]) != directory:
            raise ValueError(f"The index of this student names weights outside its directory: {path}.")
        try:
            weights = _read_shapes(path)
        except Exception as error:
            reason = next(iter(str(error).splitlines()), "")
            raise ValueError(
                f"{os.path.basename(path)} of this student cannot be read: get it again. ({reason})"
            ) from error
        if sum(tensor.nbytes for tensor in weights.values()) > 2 * os.path.getsize(path):
            raise ValueError(f"{os.path.basename(path)} of this student declares more weights than it holds.")
        declared |= weights
    return declared


def _read_shapes(path):
    if not path.endswith(".safetensors"):
        return torch.load(path, map_location="meta", weights_only=True)
    with safe_open(path, framework="pt") as file:
        parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {
            name: torch.empty(part.get_shape(), dtype=_DTYPES.get(part.get_dtype(), torch.uint8), device="meta")
            for name, part in parts.items()
        }


def _check_finite(model, but):
    for name, tensor in model.state_dict().items():
        if name in but or tensor.is_meta or not tensor.numel() or not tensor.is_floating_point():
            continue
        if not all(torch.isfinite(extreme) for extreme in torch.aminmax(tensor)):
            raise ValueError(f"{name} of this student has NaN or infinite weights: the file is damaged. Get it again.")


def _mismatch(there, here):
    return f"has shape {tuple(there)} instead of {tuple(here)}", (tuple(there), tuple(here))


def _mismatched(info):
    """Names of the weights whose shape is not the model's, and what is wrong with each."""
    found = {}
    for entry in info["mismatched_keys"]:
        name, *shapes = [entry] if isinstance(entry, str) else entry  # transformers 4 gives the name alone
        found[name] = _mismatch(*shapes) if shapes else ("has another shape", None)
    return found


def _field_of(name, num_hidden_layers, shapes=None):
    """
    The field of the config that shapes the weight of this name, or `None` if no field of a pruned shape does.
    `shapes` are those of the file and the model, if both have it.
    """
    parts = name.split(".")
    differing = [there != here for there, here in zip(*shapes, strict=False)] if shapes else []
    if name.startswith("feature_extractor.conv_layers."):
        if not shapes and name.endswith("conv.bias"):
            return "conv_bias"
        if not shapes and "layer_norm" in name:
            return "feat_extract_norm"
        return f"conv_kernel[{parts[2]}]" if differing == [False, False, True] else f"conv_dim[{parts[2]}]"
    if name.startswith("feature_projection."):
        return "conv_dim[-1]" if "layer_norm" in name else "hidden_size"
    if name.startswith("encoder.pos_conv_embed."):
        if differing[-1:] == [True]:
            return "num_conv_pos_embeddings"
        return "num_conv_pos_embedding_groups" if differing[:2] == [False, True] else "hidden_size"
    if name.startswith("encoder.layers."):
        if "rel_attn_embed" in name:
            return "num_attention_heads" if differing == [False, True] else "num_buckets"
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

    # What the skill-hf package has put gates on this student with; `None` if it has none. Models with gates are
    # neither saved nor fused.
    gating = None

    # transformers 4 has none, and hands hidden states and attention weights on by itself.
    _can_record_outputs = {**(WavLMModel._can_record_outputs or {}), "attentions": WavLMSkillStudentAttention}

    def __init__(self, config):
        config = copy.deepcopy(config)  # pruning changes it, and other models may be made of the same one
        super().__init__(config)
        self.feature_extractor = WavLMSkillStudentFeatureEncoder(config)
        self.feature_projection.dropout = WavLMSkillStudentDropout(config.feat_proj_dropout)
        self.encoder.pos_conv_embed = WavLMSkillStudentPositionalConvEmbedding(config)
        self.encoder.dropout = WavLMSkillStudentDropout(config.hidden_dropout)
        for index, layer in enumerate(self.encoder.layers):
            layer.dropout = WavLMSkillStudentDropout(config.hidden_dropout)
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
        # To look at values costs nothing on the CPU alone. Subclasses of tensors may have none.
        readable = type(attention_mask) is torch.Tensor and attention_mask.is_cpu and not _is_traced()
        if readable and attention_mask.all():
            attention_mask = None  # nothing is padded
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
        self.refuse_fused("made a stock model")
        if self.config.masked_group_norm and self.config.feat_extract_norm == "group":
            logger.warning(
                "The stock model has no `masked_group_norm`: it gives the same outputs for clips without padding only."
            )
        config_class, student_fields = WavLMModel.config_class, self.config_class().to_dict()
        added = student_fields.keys() - config_class().to_dict().keys() | {"model_type", "architectures"}
        fields = {name: value for name, value in self.config.to_dict().items() if name not in added}
        stock, weights = WavLMModel(config_class(**fields)), self.state_dict()
        state = stock.state_dict()
        for index, layer in enumerate(self.encoder.layers):
            for block, projection, kept, number in (
                ("attention", "out_proj", layer.attention.heads, self.config.num_attention_heads),
                (
                    "feed_forward",
                    "output_dense",
                    range(self.config.intermediate_sizes[index]),
                    self.config.intermediate_size,
                ),
            ):
                prefix = f"encoder.layers.{index}.{block}."
                if f"{prefix}output_bias.bias" in weights:
                    weights[f"{prefix}{projection}.bias"] = weights.pop(f"{prefix}output_bias.bias")
                for name in [name for name in state if name.startswith(prefix)]:
                    whole, narrow = torch.zeros_like(state[name]), weights.pop(name, None)
                    dim = CUT_TENSORS[block].get(name.removeprefix(prefix))
                    if narrow is not None and dim is not None:
                        width = whole.shape[dim] // number  # neighbouring entries of one head or unit
                        entries = torch.tensor(kept)[:, None] * width + torch.arange(width)
                        whole.index_copy_(dim, entries.flatten(), narrow.to(whole))
                    elif narrow is not None:
                        whole = narrow.to(whole)
                    state[name] = whole
        stock.load_state_dict(state | weights)
        return stock.to(device=self.device, dtype=self.dtype).train(self.training)

    def refuse_fused(self, use):
        """Raises a `ValueError`, of `use` such as "saved", if the student is fused."""
        if getattr(self, "_is_fused", False):
            raise ValueError(f"This student is fused and cannot be {use}. Load it again with `from_pretrained`.")

    # Like `add_adapter` of transformers, these work where the package that does it is installed: a student loaded from
    # the Hub has no use for them, and the file that describes it holds no training code.

    def add_gates(self, units=None, width_multiple=1):
        """
        Puts a trainable gate on each of `units`, in place, for training with the skill-hf package.

        Args:
            units (`Iterable[str]`, *optional*, defaults to `("conv_channels", "attention_heads", "ffn_dims")`):
                Kinds of units; `attention_blocks` and `ffn_blocks` as well.
            width_multiple (`int`, *optional*, defaults to 1):
                What the cut rounds widths of convolutions and feed-forward blocks to a multiple of.

        Raises:
            `ImportError`: without the skill-hf package.
            `ValueError`: if the student is fused or has gates already, or a kind of unit is unknown.
        """
        self.refuse_fused("pruned")
        _act("add_gates", self, units, width_multiple)

    def named_gates(self):
        """Pairs of name and gate, in the order of the layers. Needs the skill-hf package."""
        return _act("named_gates", self)

    def num_expected_parameters(self):
        """Expected number of parameters after the cut, a differentiable scalar. Needs the skill-hf package."""
        return _act("num_expected_parameters", self)

    def prune(self):
        """
        Cuts what the gates close, in place, and removes the gates.

        Raises:
            `ImportError`: without the skill-hf package.
            `ValueError`: if the student has no gates.
        """
        _act("prune", self)


class _StudentHead(_Student):
    """What makes a stock task model one over a student."""

    def __init__(self, config, *args, **kwargs):
        # The stock model first makes a stock encoder, which refuses the fused attention that the student has.
        attn_implementation, config._attn_implementation = config._attn_implementation, "eager"
        super().__init__(config, *args, **kwargs)
        config._attn_implementation = attn_implementation
        self.wavlm = WavLMForSkillStudent(config)
        self.config = self.wavlm.config  # one object, so that the head's is right after its encoder was pruned
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
