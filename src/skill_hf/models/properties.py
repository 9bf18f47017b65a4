"""Properties of a speech encoder, from its configuration or its parts."""

import math
from bisect import bisect_left

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


def student_states(config: PreTrainedConfig, num_layers: int) -> list[int]:
    """
    Which hidden state of a student stands for each hidden state of its teacher. Where the student lacks layers, it is
    the output of the layer below: a layer that is removed leaves its input unchanged.

    Args:
        config (`PreTrainedConfig`): of the student, or of a stock model with all layers.
        num_layers (`int`): of the teacher.

    Returns:
        `list[int]` of length `num_layers + 1`: indices from 0, the input of the first layer.
    """
    layers = getattr(config, "remaining_layers", range(config.num_hidden_layers))
    return [bisect_left(layers, state) for state in range(num_layers + 1)]


def has_gates(model: nn.Module) -> bool:
    """Whether `model`, with or without a head, is a student with gates. Other models never have gates."""
    return getattr(getattr(model, "base_model", model), "gating", None) is not None
