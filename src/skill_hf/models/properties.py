"""Properties of a speech encoder, from its configuration or its parts."""

from torch import nn
from transformers import PreTrainedConfig


def receptive_field(config: PreTrainedConfig) -> int:
    """Minimum number of samples for one frame of the convolutions (400 in all published models)."""
    samples = 1
    kernels = getattr(config, "conv_kernel", ())
    strides = getattr(config, "conv_stride", ())
    for kernel, stride in zip(reversed(kernels), reversed(strides), strict=True):
        samples = (samples - 1) * stride + kernel
    return samples


def has_gates(model: nn.Module) -> bool:
    """Whether `model`, with or without a head, is a student with gates. Other models never have gates."""
    return getattr(getattr(model, "base_model", model), "gating", None) is not None
