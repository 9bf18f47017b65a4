"""What a model computes: its multiply-accumulates."""

from itertools import chain

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from ..models.model_modes import eval_mode
from ..models.properties import has_gates, receptive_field


def count_macs(model: PreTrainedModel, seconds: float = 10.0, sampling_rate: int = 16_000) -> int:
    """
    Multiply-accumulates of one forward pass over one clip, half of what PyTorch's `FlopCounterMode` counts:
    convolutions and matrix products, those of the attention scores among them. Norms, activations, softmax and all
    else that is done value by value do not count.

    The model runs in eval mode on the meta device, so only shapes are computed, whatever its size. It is left as it
    is.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A speech model that takes `input_values`: a teacher, a student, or either with a head.
        seconds (`float`, *optional*, defaults to 10.0):
            Length of the clip. Attention grows with its square.
        sampling_rate (`int`, *optional*, defaults to 16000):
            Samples in one of its seconds.

    Raises:
        `ValueError`: if the clip is too short for one frame, or the model has gates, of which nothing is cut yet.

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
