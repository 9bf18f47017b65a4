"""Properties of a speech encoder, from its configuration or its parts."""

import math

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


def family_of(config: PreTrainedConfig) -> str:
    """The family of a model or student as file names have it, such as `wavlm` or `unispeech_sat`."""
    return config.model_type.removesuffix("_skill_student").replace("-", "_")


def frame_step(config: PreTrainedConfig) -> int:
    """Number of samples from one frame to the next (320 in all published models)."""
    return math.prod(getattr(config, "conv_stride", ()))


def has_gates(model: nn.Module) -> bool:
    """Whether `model`, with or without a head, is a student with gates. Other models never have gates."""
    return getattr(getattr(model, "base_model", model), "gating", None) is not None
