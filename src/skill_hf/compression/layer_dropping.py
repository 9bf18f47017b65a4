"""
Removes whole layers without training: those that change the hidden states least, or the lowest or highest ones.

A student of fewer layers is an ordinary model with a smaller `num_hidden_layers`. Its remaining layers are unchanged.
"""

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from ..models.loading import empty_model
from .pruning import Cut


# What decides which layers go first.
ORDERS = ("influence", "bottom", "top")


def block_influence(similarity: np.ndarray) -> np.ndarray:
    """
    How much each layer changes its input: `1 - similarity` of a layer's input and output, the block influence of
    ShortGPT (arXiv 2403.03853, equation 1) if the measure is `cosine`; `mutual_knn` and `cka` work as well (arXiv
    2409.16302 compares them for speech encoders).

    Args:
        similarity (`np.ndarray` of shape `(layers + 1, layers + 1)`):
            What [`~skill_hf.layer_similarity`] returns with `include_embeddings=True`, its default.

    Returns:
        `np.ndarray` of shape `(layers,)`, float64.

    Raises:
        `ValueError`: if it is not a square matrix of at least two hidden states.
    """
    similarity = np.asarray(similarity, dtype=np.float64)
    if similarity.ndim != 2 or similarity.shape[0] != similarity.shape[1] or len(similarity) < 2:
        raise ValueError(
            f"`similarity` must be a square matrix over all hidden states, but has the shape {similarity.shape}; pass"
            " the result of `layer_similarity`."
        )
    return 1 - np.diagonal(similarity, offset=1)


def layers_to_drop(num_layers: int, num_dropped: int, order: str = "influence", influence=None) -> list[int]:
    """
    Which layers to remove, by an order of arXiv 2409.16302. The first layer always stays.

    Args:
        num_layers (`int`): number of layers of the model.
        num_dropped (`int`): how many to remove.
        order (`str`, *optional*, defaults to `"influence"`):
            `influence`, those with the least block influence; `bottom`, from the second one up; `top`, from the last
            one down.
        influence (`Sequence[float]`, *optional*): what [`block_influence`] returns, for `order="influence"`.

    Returns:
        `list[int]`: indices of layers from 0, ascending.

    Raises:
        `ValueError`: if the order is unknown, the influence is missing or of another number of layers, or no layer
            would be left.
    """
    if not 0 <= num_dropped < num_layers:
        raise ValueError(f"`num_dropped` must be from 0 to {num_layers - 1}, but is {num_dropped}.")
    if order == "bottom":
        return list(range(1, num_dropped + 1))
    if order == "top":
        return list(range(num_layers - num_dropped, num_layers))
    if order != "influence":
        raise ValueError(f"`order` must be one of {', '.join(ORDERS)}, but is {order!r}.")
    if influence is None or len(influence) != num_layers:
        number = None if influence is None else len(influence)
        raise ValueError(f"`influence` must have a value for each of {num_layers} layers, but has {number}.")
    return sorted((1 + np.argsort(influence[1:], kind="stable")[:num_dropped]).tolist())


def drop_layers(student: PreTrainedModel, layers: Sequence[int]) -> PreTrainedModel:
    """
    A copy of a student without some of its layers.

    Args:
        student (`PreTrainedModel`): of this package, such as [`WavLMForSkillStudent`], without gates; with or without
            a head.
        layers (`Sequence[int]`): indices from 0 of the layers to remove.

    Returns:
        `PreTrainedModel`: of the same class, on the same device, in the same mode and dtype.

    Raises:
        `ValueError`: if the student has gates or a head that weighs the hidden states of all layers, or `layers` are
            not indices of layers, each once, or all of them.
    """
    encoder = student.base_model
    if encoder.gating is not None:
        raise ValueError("The student has gates; call `prune()` before removing layers.")
    encoder.refuse_fused("copied without some of its layers")
    if encoder is not student and student.config.use_weighted_layer_sum:
        raise ValueError(
            "The student's head weighs the hidden states of all layers (`use_weighted_layer_sum`), so none can be"
            " removed: load the encoder alone."
        )
    dropped, number = sorted(layers), student.config.num_hidden_layers
    if len(set(dropped)) != len(dropped) or any(layer not in range(number) for layer in dropped):
        raise ValueError(f"`layers` must be indices from 0 to {number - 1}, each once, but is {list(layers)}.")
    if len(dropped) == number:
        raise ValueError("`layers` has all layers; leave at least one.")
    nothing = torch.tensor([], dtype=torch.long)
    cut = Cut(encoder, {f"encoder.layers.{layer}.layer_gate": nothing for layer in dropped})
    prefix = "" if encoder is student else f"{student.base_model_prefix}."
    weights = {f"{prefix}{name}": tensor for name, tensor in cut(encoder.state_dict()).items()}
    if encoder is not student:
        weights |= {name: tensor for name, tensor in student.state_dict().items() if not name.startswith(prefix)}
    shorter = empty_model(type(student), cut.config)
    shorter.load_state_dict({name: tensor.detach().clone() for name, tensor in weights.items()}, assign=True)
    return shorter.requires_grad_(True).train(student.training)
