"""Counts the multiply-accumulates of a model."""

from itertools import chain

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from ..models.model_modes import eval_mode
from ..models.properties import has_gates, receptive_field


def count_macs(model: PreTrainedModel, seconds: float = 10.0, sampling_rate: int = 16_000) -> int:
    """
    Multiply-accumulates of one forward pass over one clip, half of what PyTorch's `FlopCounterMode` counts:
    convolutions and matrix products, including those of attention. Norms, activations, softmax and other elementwise
    operations do not count.

    The model runs in eval mode on the meta device, where only shapes are computed. It is not changed.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A speech model with the input `input_values`: a teacher, a student, or either with a head.
        seconds (`float`, *optional*, defaults to 10.0):
            Length of the clip. The cost of attention grows with its square.
        sampling_rate (`int`, *optional*, defaults to 16000):
            Sampling rate in Hz.

    Raises:
        `ValueError`: if the clip is too short for one frame, or the model has gates and is not pruned yet.

    Example:

    ```python
    >>> from transformers import WavLMConfig, WavLMModel

    >>> from skill_hf.analysis import count_macs

    >>> count_macs(WavLMModel(WavLMConfig()), seconds=1.0)  # WavLM Base
    6914987008
    ```
    """
    samples, min_samples = round(seconds * sampling_rate), receptive_field(model.config)
    if samples < min_samples:
        raise ValueError(
            f"`seconds` is {seconds}, {samples} samples, but the model needs {min_samples} for one frame."
        )
    if has_gates(model):
        raise ValueError("The student still has its gates: call `prune()`, or let `train()` end, before counting.")
    # A detached tensor: in a view of one that requires gradients the counter would look for its gradient function.
    tensors = chain(model.named_parameters(), model.named_buffers())
    shapes = {name: tensor.detach().to("meta") for name, tensor in tensors}
    clip = torch.empty(1, samples, device="meta", dtype=model.dtype)
    with torch.no_grad(), eval_mode(model), FlopCounterMode(display=False) as counter:
        torch.func.functional_call(model, shapes, (clip,))
    return counter.get_total_flops() // 2
