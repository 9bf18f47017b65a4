"""Ways to run a model: in eval mode, with independent clips, or once before it is compiled."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .properties import receptive_field


# Fields of a config: whether frames and features are masked in training, and their shares.
MASKING = ("apply_spec_augment", "mask_time_prob", "mask_feature_prob")


def set_masking(config: PreTrainedConfig, mask_prob: float) -> None:
    """Masks a share of the frames in training, in place, or none; features are not masked."""
    # Without masks the shares stay: a model that is rebuilt from its config has a mask embedding only if one is set.
    masking = (True, mask_prob, 0.0) if mask_prob else (False,)
    config.update(dict(zip(MASKING, masking, strict=False)))


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Within this context, `model` is in eval mode; afterwards the mode of each of its modules is restored."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def padding_ignored(*models: PreTrainedModel) -> Iterator[None]:
    """
    Within this context, the frames of a clip do not depend on the other clips of its batch or their lengths: group
    norms of students compute their statistics over valid samples.
    """
    configs = [model.config for model in models if hasattr(model.config, "masked_group_norm")]
    settings = [config.masked_group_norm for config in configs]
    for config in configs:
        config.masked_group_norm = True
    try:
        yield
    finally:
        for config, setting in zip(configs, settings, strict=True):
            config.masked_group_norm = setting


def trace_hidden_states(model: PreTrainedModel) -> None:
    """
    Runs `model` once, in eval mode, so that it can be compiled: transformers hooks the layers in the first forward
    pass that requests hidden states, which would break the graph of a compiler.
    """
    clip = torch.zeros(1, receptive_field(model.config), device=model.device, dtype=model.dtype)
    with torch.no_grad():
        model.eval()(clip, output_hidden_states=True)
