"""What the configuration or the parts of a speech encoder tell of it."""

import math

from torch import nn
from transformers import PreTrainedConfig


def receptive_field(config: PreTrainedConfig) -> int:
    """Least number of samples from which the convolutions make one frame (400 in all published models)."""
    samples = 1
    kernels = getattr(config, "conv_kernel", ())
    strides = getattr(config, "conv_stride", ())
    for kernel, stride in zip(reversed(kernels), reversed(strides), strict=True):
        samples = (samples - 1) * stride + kernel
    return samples


def frame_step(config: PreTrainedConfig) -> int:
    """Number of samples from one frame to the next (320 in all published models)."""
    return math.prod(getattr(config, "conv_stride", ()))


def has_gates(model: nn.Module) -> bool:
    """Whether `model`, with or without a head, is a student with gates. Any other model has none."""
    return getattr(getattr(model, "base_model", model), "gating", None) is not None
