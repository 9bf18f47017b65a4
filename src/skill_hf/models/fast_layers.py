# Copyright 2026 The skill-hf authors. Licensed under the Apache License, Version 2.0.
"""
Faster versions of layers of PyTorch and of the stock models, with the same outputs. This file is published with every
student and is self-contained; it does not depend on a configuration or a family of models.

- Convolutions over time run channels-last on a CPU, with gradients that are plain matrix products.
- The first convolution and its group norm are one linear map.
- The positional convolution uses the fast Fourier transform once it is fused.
- Dropout draws 16 bits per value, and attention has a kernel without tensors of the size of its weights.
"""

import math
from functools import cache, partial
from itertools import repeat

import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers.activations import GELUActivation


def _is_transformed():
    """Whether this runs under a transformation of `torch.func`, which supports only PyTorch's own kernels."""
    return getattr(torch._C, "_are_functorch_transforms_active", bool)()


def is_traced():
    """Whether a graph is being traced, which must not depend on the values of tensors."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or _is_transformed()


def _is_plain():
    """Whether to compute layers as in the stock model: for an export or a transformation."""
    # torch 2.6 cannot tell an export from a compilation.
    exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)()
    return exporting or torch.jit.is_tracing() or _is_transformed()


def _runs_channels_last(hidden_states):
    """Whether convolutions of these tensors use the layout that is faster on a CPU."""
    # torch's compiler (2.13) cannot order the strides of its gradients where the length is a symbol.
    compiled = torch.compiler.is_compiling() and torch.is_grad_enabled()
    return hidden_states.device.type == "cpu" and not compiled and not _is_plain()


def is_bare(*modules):
    """Whether these modules have no hooks that see their inputs and outputs."""
    return not any(module._forward_hooks or module._forward_pre_hooks for module in modules if module is not None)


class _StridedConv(torch.autograd.Function):
    """
    1-D convolution of features of shape `(batch, channels, frames)`, channels-last in memory, whose gradients are
    plain matrix products: `stride` neighbouring frames in memory are one row of a matrix, so the taps of a kernel are
    processed `stride` at a time without copies. Kernels must be at least as wide as the stride.
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


def frozen(tensor):
    return nn.Parameter(tensor, requires_grad=False)


def fold_weight_norm(module):
    """Replaces norm and direction of the weight of `module`, which training needs, by the weight itself, in place."""
    if parametrize.is_parametrized(module, "weight"):
        weight = module.weight
        # `remove_parametrizations` would strip the class, which copies of the module share.
        del module.parametrizations
        module.__class__ = type(module).__base__
        module.weight = frozen(weight)


def lay_out(conv):
    """Reorders the weight of a convolution for `_channels_last_conv`; not useful on a GPU."""
    if isinstance(conv, nn.Conv1d) and conv.weight.is_cpu:
        conv.weight = frozen(conv.weight.unsqueeze(2).contiguous(memory_format=torch.channels_last).squeeze(2))


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


class FastConv1d(nn.Conv1d):
    """
    [`~torch.nn.Conv1d`] that uses the channels-last kernel on the CPU: it is faster, and its output has the memory
    order that following norms and linear maps need. Shapes are those of the stock layer.
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


class FastConvLayer(nn.Module):
    """
    A convolution over time, a norm and an activation: one of the stock models' three kinds of convolutional layer.

    Args:
        conv ([`FastConv1d`]): without padding.
        layer_norm ([`~torch.nn.GroupNorm`], [`~torch.nn.LayerNorm`] or `None`):
            A group norm must have one group per channel and a convolution with one input channel.
        activation (`Callable`): the activation function.
    """

    def __init__(self, conv, layer_norm, activation):
        super().__init__()
        # Not read from `conv` later, which may be wrapped.
        self.channels, self.conv_kernel, self.conv_stride = conv.out_channels, conv.kernel_size[0], conv.stride[0]
        self.conv, self.activation, self.layer_norm = conv, activation, layer_norm

    def forward(self, hidden_states, num_samples=None):
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch, channels, frames)`): one channel of samples for layer 0.
            num_samples (`torch.LongTensor` of shape `(batch,)`, *optional*):
                Valid samples of each clip, for the statistics of a group norm; all by default.

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
            elif group_norm and _is_plain() and is_bare(self.layer_norm):
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
        in_place = not (torch.is_grad_enabled() or is_traced()) and is_bare(self.conv, self.layer_norm)
        if in_place and isinstance(self.activation, GELUActivation):
            return torch.ops.aten.gelu_(hidden_states)  # the largest activations of the model
        return self.activation(hidden_states)

    def _can_fold(self):
        """
        Whether the norm can be folded: not if the weight is shared, the norm's input is observed, or there is no
        float64.
        """
        if _is_plain() or type(self.conv) is not FastConv1d or not is_bare(self.conv, self.layer_norm):
            return False
        weight = self.conv.weight  # of which DeepSpeed (`ds_id`) may hold a part
        return weight.device.type in ("cpu", "cuda") and not hasattr(weight, "ds_id") and self.conv.bias is None

    def _valid_frames(self, features, num_samples):
        """Mask of frames that are not padding, `(batch, 1, frames)`, and their number, `(batch, 1, 1)`."""
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
        Convolution and group norm as one linear map. Each channel is its own group and reads windows of `kernel_size`
        samples, so its mean and variance follow from those of the windows: `w . mean` and `w' Cov w`. The norm then
        only scales the kernel, and its input is never formed.
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


class FastFeatureEncoder:
    """
    Mixin that makes the convolutions of a stock model, the next base class, faster, if its `conv_layers` are
    [`FastConvLayer`]: without gradients or with gradient checkpointing, a batch is processed a few clips at a time.
    """

    # Values that the widest activation may have at once: on a CPU what stays in the caches, and in memory that the
    # allocator keeps, is faster; a GPU is to be kept busy.
    max_values = {"cpu": 2**22, "cuda": 2**26}

    def forward(self, input_values, num_samples=None):
        """
        `(batch, samples)` -> `(batch, channels, frames)`. Features, `(batch, channels, frames)`, are returned
        unchanged: the stock model, which has no `num_samples`, can then be called with features computed with it.
        """
        if input_values.dim() == 3:
            return input_values
        encode, checkpointed = self._encode, self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        if checkpointed:
            encode = partial(self._gradient_checkpointing_func, self._encode)
            if not input_values.requires_grad:  # without it, checkpoints that are reentrant keep no gradient
                input_values = input_values.detach().requires_grad_(self._requires_grad)
        in_parts = checkpointed or (input_values.device.type == "cpu" and not torch.is_grad_enabled())
        if not in_parts or is_traced():
            return encode(input_values, num_samples)
        first = self.conv_layers[0]
        values = first.channels * input_values.shape[1] // first.conv_stride
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
    A grouped convolution of stride 1, computed with the fast Fourier transform (overlap-save): the kernel is applied
    to blocks of twice its length, as one complex product per frequency.

    Args:
        conv ([`~torch.nn.Conv1d`]): the convolution; its weight, in float32, is transformed here once.
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


class FastPositionalConv:
    """
    Mixin that makes the positional convolution of a stock model, the next base class, faster: on the CPU it uses the
    channels-last kernel, or the Fourier transform once it is fused.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.fourier = None  # see `fuse`
        if not hasattr(self, "batch_norm"):  # some models of HuBERT have one
            self.batch_norm = None

    def train(self, mode=True):
        """
        As of any module, but a batch norm keeps its statistics: those of a batch of a few clips would change them, and
        with them the outputs of a student that is still equal to its teacher.
        """
        super().train(mode)
        if self.batch_norm is not None:
            self.batch_norm.eval()
        return self

    def forward(self, hidden_states):
        """`(batch, frames, hidden_size)` -> `(batch, frames, hidden_size)`."""
        conv = self.conv
        if not (_runs_channels_last(hidden_states) and isinstance(conv, nn.Conv1d) and is_bare(conv)):
            return super().forward(hidden_states)
        if self.batch_norm is not None:
            hidden_states = self.batch_norm(hidden_states.mT).mT
        if self.fourier is not None and hidden_states.dtype == torch.float32 and not is_traced():
            hidden_states = self.fourier(hidden_states).mT
        else:
            hidden_states = _channels_last_conv(
                hidden_states.mT, conv.weight, conv.bias, conv.stride[0], conv.padding[0], conv.groups
            )
        return self.activation(self.padding(hidden_states)).mT

    def fuse(self):
        """Replaces norm and direction by the weight itself, on a CPU by its Fourier transform."""
        fold_weight_norm(self.conv)
        if type(self.conv) is nn.Conv1d and self.conv.weight.is_cpu and self.conv.weight.dtype == torch.float32:
            self.fourier = FourierConv1d(self.conv)
        lay_out(self.conv)


def fast_dropout(hidden_states, p, training):
    """
    Like [`~torch.nn.functional.dropout`], but with 16-bit random numbers on the CPU: torch draws a longer one for each
    value, which takes 7 to 10 % of a training step. The probability is rounded to a multiple of 2^-16, and remaining
    values are scaled by the rounded one, which preserves the expected value.
    """
    kept = round((1 - p) * 2**16)
    plain = type(hidden_states) is torch.Tensor and hidden_states.is_cpu and not is_traced()
    if not (training and plain and 0 < kept < 2**16):
        return nn.functional.dropout(hidden_states, p, training)
    words = hidden_states.new_empty(-(-hidden_states.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    numbers = words.view(torch.int16)[: hidden_states.numel()].view(hidden_states.shape)
    mask = torch.lt(numbers, kept - 2**15, out=torch.empty_like(hidden_states))
    return hidden_states * mask.mul_(2**16 / kept)


class FastDropout(nn.Dropout):
    """[`~torch.nn.Dropout`] with [`fast_dropout`]."""

    def forward(self, hidden_states):
        return fast_dropout(hidden_states, self.p, self.training)


def eager_attention_forward(module, query, key, value, attention_mask, dropout=0.0, scaling=1.0, **kwargs):
    """Attention that returns its weights; signature and shapes are those of transformers' attention functions."""
    scores = query @ key.transpose(-1, -2)
    scores = scores * scaling if attention_mask is None else torch.add(attention_mask, scores, alpha=scaling)
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
    output = fast_dropout(weights, dropout, module.training) @ value
    return output.transpose(1, 2).contiguous(), weights


def flex_attention_forward(query, key, value, gate, values, attention_mask=None, scaling=1.0):
    """
    Attention with a kernel that computes the position bias of each pair of frames from `gate` and `values` where it is
    needed, without tensors of the size of the attention weights.

    Args:
        query, key, value (`torch.Tensor` of shape `(batch, heads, frames, head_dim)`).
        gate (`torch.Tensor` of shape `(batch, heads, frames)`): gate of each query frame.
        values (`torch.Tensor` of shape `(heads, 2 * frames - 1)`): bias of each distance, from `1 - frames` on.
        attention_mask (`torch.BoolTensor` of shape `(batch, frames)`, *optional*): True where a frame is valid.
        scaling (`float`): factor of the scores.

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
    # Beyond its limit torch continues with a kernel that makes the large tensor. This one is compiled for each number
    # of heads that a layer may have, but not for each length, as that of transformers is.
    with torch._dynamo.config.patch(recompile_limit=64):
        return _flex_attention(compiled=True)(query, key, value, **settings).transpose(1, 2)


@cache
def _flex_attention(compiled):
    from torch.nn.attention.flex_attention import flex_attention  # not in every version that students are loaded with

    return torch.compile(flex_attention, dynamic=True) if compiled else flex_attention
