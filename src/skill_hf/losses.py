"""The loss over groups of layers, the sparsity constraint, and the schedule of its target. Tensors in, tensors out."""

from collections.abc import Sequence

import torch


def group_means(hidden_states: Sequence[torch.Tensor], groups: Sequence[Sequence[int]]) -> torch.Tensor:
    """
    Mean hidden state of each group, `(groups, batch, frames, hidden_size)`, float32, from hidden states of shape
    `(batch, frames, hidden_size)` (SKILL, arXiv 2402.16830: the average representation of a cluster).
    """
    return torch.stack([sum(hidden_states[index].float() for index in group) / len(group) for group in groups])


def distillation_sums(
    prediction: torch.Tensor, target: torch.Tensor, frame_mask: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    r"""
    The terms of DPHuBERT's loss (arXiv 2305.17651, equation 1), summed over valid frames and averaged over groups:

    - `l1`: mean absolute error over features, `|p - t|_1 / D`
    - `l2`: mean squared error over features, `|p - t|_2^2 / D`
    - `cosine`: negative cosine similarity, `-cos(p, t)`

    Sums, so that a caller who divides by the frames of a whole accumulated batch gets the same update however that
    batch was split.

    Args:
        prediction (`torch.Tensor` of shape `(groups, batch, frames, hidden_size)`): the student's.
        target (`torch.Tensor` of the same shape): the teacher's.
        frame_mask (`torch.BoolTensor` of shape `(batch, frames)`, *optional*): True where a frame is no padding.
    """
    prediction, target = prediction.float(), target.float()
    error = prediction - target
    terms = {
        "l1": error.abs().mean(-1),
        "l2": error.square().mean(-1),
        "cosine": -torch.nn.functional.cosine_similarity(prediction, target, dim=-1),
    }
    if frame_mask is not None:
        # `where`, not a product: whatever padded frames hold, a NaN too, must not count.
        terms = {name: torch.where(frame_mask, term, 0.0) for name, term in terms.items()}
    return {name: term.sum() / len(prediction) for name, term in terms.items()}


def sparsity_at(step: int, target_sparsity: float, warmup_steps: int) -> float:
    """Target of the sparsity at an optimizer step: it rises linearly from 0 over `warmup_steps`."""
    return target_sparsity * min(1.0, step / warmup_steps) if warmup_steps else target_sparsity


def lagrangian(
    sparsity: torch.Tensor, target_sparsity: float, lambda_1: torch.Tensor, lambda_2: torch.Tensor
) -> torch.Tensor:
    r"""
    Augmented Lagrangian of the sparsity constraint, `lambda_1 (t - s) + lambda_2 (t - s)^2` (FLOP, arXiv 1910.04732,
    equation 6), to be minimised over what `sparsity` hangs on and maximised over both multipliers.

    The gradient of the multipliers comes out with its sign turned, so that the one optimizer that descends on all
    parameters ascends on these two, whichever optimizer it is.
    """

    def penalty(sparsity, lambda_1, lambda_2):
        gap = target_sparsity - sparsity
        return lambda_1 * gap + lambda_2 * gap.square()

    ascent = penalty(sparsity.detach(), lambda_1, lambda_2)
    return penalty(sparsity, lambda_1.detach(), lambda_2.detach()) + ascent.detach() - ascent
