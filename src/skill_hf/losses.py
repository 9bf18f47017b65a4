"""
The loss over groups of layers, the sparsity constraint, and the schedule of its target. Pure functions of tensors.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F


class LossTerm(NamedTuple):
    """
    One term of the distillation loss.

    Args:
        label (`str`): name in cards and figures.
        loss (`Callable`): (prediction, target, their difference), each float32 of shape `(..., hidden_size)` -> the
            term in each frame, `(...)`.
        layer_distances (`Callable`): frames of N layers and of M others, float32 of shapes `(frames, N, hidden_size)`
            and `(frames, M, hidden_size)` -> distance of each of the former to each of the latter, summed over frames,
            float64 of shape `(N, M)`; 0 for equal layers.
        default_weight (`float`): weight in the published recipe.
    """

    label: str
    loss: Callable
    layer_distances: Callable
    default_weight: float = 0.0


def squared_distances(frames: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """
    `(frames, N, D)` and `(frames, M, D)` to the `(N, M)` float64 sum over frames of `|x - y|^2`, from the differences
    themselves.
    """
    norms = torch.cdist(frames, others, p=2, compute_mode="donot_use_mm_for_euclid_dist")
    return norms.double().square_().sum(0)


# The terms of DPHuBERT's loss (arXiv 2305.17651, equation 1), each a mean over features D:
# - `l1`: mean absolute error, `|p - t|_1 / D`
# - `l2`: mean squared error, `|p - t|_2^2 / D`
# - `cosine`: negative cosine similarity, `-cos(p, t)`; `1 - cos(x, y)` as a distance, computed as
#   `|x / |x| - y / |y||^2 / 2`, which keeps its precision when layers are alike.
# `SkillConfig` and `layer_similarity` have a weight for each, `l1_weight` for `l1`.
LOSS_TERMS = {
    "l1": LossTerm(
        "L1",
        lambda prediction, target, error: error.abs().mean(-1),
        lambda frames, others: torch.cdist(frames, others, p=1).sum(0, dtype=torch.float64) / frames.shape[-1],
        default_weight=1.0,
    ),
    "l2": LossTerm(
        "L2",
        lambda prediction, target, error: error.square().mean(-1),
        lambda frames, others: squared_distances(frames, others) / frames.shape[-1],
    ),
    "cosine": LossTerm(
        "− cosine similarity",
        lambda prediction, target, error: -F.cosine_similarity(prediction, target, dim=-1),
        lambda frames, others: squared_distances(F.normalize(frames, dim=-1), F.normalize(others, dim=-1)) / 2,
        default_weight=1.0,
    ),
}
# Names in logs. Evaluation gives the weighted sum of the terms and each of them; training the penalty, too.
DISTILLATION_LOSSES = ("distillation_loss", *(f"{term}_loss" for term in LOSS_TERMS))
TRAINING_LOSSES = (*DISTILLATION_LOSSES, "lagrangian_loss")


def term_weights(settings) -> dict[str, float]:
    """The weight of each of `LOSS_TERMS` by name, from attributes such as `l1_weight`."""
    return {term: getattr(settings, f"{term}_weight") for term in LOSS_TERMS}


def weights_from(keywords: Mapping[str, float]) -> dict[str, float]:
    """
    The weight of each of `LOSS_TERMS` by name, from keyword arguments such as `l1_weight`; the default for others.

    Raises:
        `TypeError`: if a keyword is not the weight of a term.
    """
    names = {f"{term}_weight": term for term in LOSS_TERMS}
    unknown = next((keyword for keyword in keywords if keyword not in names), None)
    if unknown is not None:
        raise TypeError(f"`{unknown}` is not an argument; the weights of the loss terms are {', '.join(names)}.")
    return {term: keywords.get(name, LOSS_TERMS[term].default_weight) for name, term in names.items()}


def check_weights(weights: Mapping[str, float]) -> None:
    """Raises a `ValueError` if all weights of loss terms, by name, are 0."""
    if not any(weights.values()):
        *others, last = (f"`{term}_weight`" for term in weights)
        raise ValueError(f"{', '.join(others)} and {last} are all 0; at least one must be above 0.")


def attended(attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """
    A mask over samples for models. A clip without valid samples, which replaces an unreadable batch, is attended
    completely: softmax over nothing would be NaN, and so would gradients that are masked later.
    """
    if attention_mask is None:
        return None
    return torch.where(attention_mask.bool().any(-1, keepdim=True), attention_mask, torch.ones_like(attention_mask))


def group_means(hidden_states: Sequence[torch.Tensor], groups: Sequence[Sequence[int]]) -> torch.Tensor:
    """
    Mean hidden state of each group, `(groups, batch, frames, hidden_size)`, float32, from hidden states of shape
    `(batch, frames, hidden_size)` (SKILL, arXiv 2402.16830: the average representation of a cluster).
    """
    return torch.stack([sum(hidden_states[index].float() for index in group) / len(group) for group in groups])


def distillation_sums(
    prediction: torch.Tensor,
    target: torch.Tensor,
    frame_mask: torch.Tensor | None = None,
    weights: Sequence[float] | None = None,
) -> dict[str, torch.Tensor]:
    r"""
    Each of `LOSS_TERMS`, summed over valid frames and averaged over groups, or summed with `weights`.

    Sums, because a caller that divides by the frames of a whole accumulated batch then gets the same update however
    the batch was split.

    Args:
        prediction (`torch.Tensor` of shape `(groups, batch, frames, hidden_size)`): the student's.
        target (`torch.Tensor` of the same shape): the teacher's.
        frame_mask (`torch.BoolTensor` of shape `(batch, frames)`, *optional*): True for frames that are not padding.
        weights (`Sequence[float]`, *optional*): one for each group.
    """
    prediction, target = prediction.float(), target.float()
    error = prediction - target
    terms = {name: term.loss(prediction, target, error) for name, term in LOSS_TERMS.items()}
    if frame_mask is not None:
        # `where`, not a product: whatever padded frames hold, a NaN too, must not count.
        terms = {name: torch.where(frame_mask, term, 0.0) for name, term in terms.items()}
    if weights is None:
        return {name: term.sum() / len(prediction) for name, term in terms.items()}
    weights = torch.tensor(weights, device=prediction.device)
    return {name: term.flatten(1).sum(1) @ weights for name, term in terms.items()}


def logits_divergence(prediction: torch.Tensor, target: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    r"""
    `T^2 KL(softmax(t / T) || softmax(s / T))` at each position (Hinton, Vinyals and Dean, arXiv 1503.02531, section
    2), in nats. The factor keeps the size of gradients whatever the temperature is.

    Args:
        prediction (`torch.Tensor` of shape `(..., classes)`): the student's logits `s`.
        target (`torch.Tensor` of the same shape): the teacher's logits `t`.
        temperature (`float`, *optional*, defaults to 1.0): `T`.

    Returns:
        `torch.Tensor` of shape `(...)`, float32.
    """
    student, teacher = (F.log_softmax(logits.float() / temperature, dim=-1) for logits in (prediction, target))
    return temperature**2 * F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)


def ctc_losses(
    logits: torch.Tensor, labels: torch.Tensor, num_frames: torch.Tensor, blank: int, per_label: bool
) -> torch.Tensor:
    """
    Negative log-likelihood of each clip's labels (connectionist temporal classification, Graves et al. 2006). It is 0
    for a clip without labels, and for one whose frames are too few for its labels.

    Args:
        logits (`torch.Tensor` of shape `(batch, frames, classes)`): of the head.
        labels (`torch.LongTensor` of shape `(batch, most labels)`): padded on the right with -100.
        num_frames (`torch.LongTensor` of shape `(batch,)`): valid frames of each clip.
        blank (`int`): index of the blank.
        per_label (`bool`): whether to divide by the number of labels, as the reduction "mean" of PyTorch does.

    Returns:
        `torch.Tensor` of shape `(batch,)`, float32.
    """
    num_labels = (labels >= 0).sum(-1)
    log_probabilities = F.log_softmax(logits, dim=-1, dtype=torch.float32).transpose(0, 1)
    with torch.backends.cudnn.flags(enabled=False):  # it has conditions on the labels
        losses = F.ctc_loss(
            log_probabilities,
            labels.clamp(min=0),
            num_frames,
            num_labels,
            blank=blank,
            reduction="none",
            zero_infinity=True,
        )
    losses = torch.where(num_labels > 0, losses, 0.0)
    return losses / num_labels.clamp(min=1) if per_label else losses


def sparsity_at(step: int, target_sparsity: float, warmup_steps: int, start: float = 0.0) -> float:
    """
    Target sparsity at an optimizer step. It rises linearly from `start`, that of the initial student, over
    `warmup_steps` (DPHuBERT, arXiv 2305.17651, section 3.1).
    """
    if not warmup_steps:
        return target_sparsity
    return start + (target_sparsity - start) * min(1.0, step / warmup_steps)


def lagrangian(
    sparsity: torch.Tensor, target_sparsity: float, lambda_1: torch.Tensor, lambda_2: torch.Tensor
) -> torch.Tensor:
    r"""
    Augmented Lagrangian of the sparsity constraint, `lambda_1 (t - s) + lambda_2 (t - s)^2` (FLOP, arXiv 1910.04732,
    equation 6), to be minimised with respect to `sparsity` and maximised with respect to both multipliers.

    The sign of the multipliers' gradient is reversed, so any optimizer that performs descent on all parameters
    performs ascent on these two.
    """

    def penalty(sparsity, lambda_1, lambda_2):
        gap = target_sparsity - sparsity
        return lambda_1 * gap + lambda_2 * gap.square()

    ascent = penalty(sparsity.detach(), lambda_1, lambda_2)
    return penalty(sparsity, lambda_1.detach(), lambda_2.detach()) + ascent.detach() - ascent
