"""What a model is set to for a while, and set back from: eval mode, and clips that do not see each other."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedModel


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """`model` is in eval mode within this context; afterwards each of its modules has its mode back."""
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
    Within this context the frames of a clip do not depend on the other clips of its batch, nor on their lengths: group
    norms of students take their statistics over valid samples.
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
