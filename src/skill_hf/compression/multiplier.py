"""The multiplier of the constraint on the expected cost, estimated anew at each step."""

from collections.abc import Sequence

import torch
from torch import nn


# How much a gap between target and expected sparsity raises or lowers the multiplier, relative to what the cut is to
# leave: a fifth more than that doubles it, a fifth less takes it away. More closes units without regard to what they
# do, less leaves the target too far behind.
GAIN = 5.0
# How much a gap that stays adds to that, for each unit that `log_alpha` could have travelled meanwhile.
GAIN_OF_SUM = 0.2


class MultiplierEstimate(nn.Module):
    r"""
    With a multiplier `lambda`, gates descend on `L + lambda (t - s)`, with loss `L`, expected sparsity `s` and its
    target `t`. A multiplier that is learned by ascent, as in FLOP (arXiv 1910.04732), has steps of its own, which do
    not know the scale of the loss: in a short run it arrives too late, and then goes on too long. This one follows
    from the gradients of each step:

        lambda = max(0, lambda*) (1 + (GAIN (t - s) + GAIN_OF_SUM sum of r (t - s)) / (1 - T))
        lambda* = sum_i dL/d(log_alpha_i) / sum_i ds/d(log_alpha_i)

    With `lambda*`, no common shift of all `log_alpha` lowers the Lagrangian: a first-order estimate of the multiplier
    at the constrained minimum, as in Fletcher's method (1970). The other factor leads the sparsity to its target, `T`
    in the end, as a controller with a proportional and an integral part; the sum is over the steps so far, with the
    peak learning rate `r` of the gates. If the loss is multiplied by a number, so is `lambda`, and the gates move as
    before.

    Args:
        final_sparsity (`float`): `T`, the target at the end of the schedule, below 1.

    Attributes:
        gap_sum (`torch.Tensor`): the sum, a scalar that is saved with the weights.
        value (`torch.Tensor`, *optional*): `lambda` of the last backward pass, a scalar; times the factor that a
            gradient scaler has put on the loss.
    """

    def __init__(self, final_sparsity: float):
        super().__init__()
        self.left = 1 - final_sparsity
        self.register_buffer("gap_sum", torch.zeros(()))
        self.value: torch.Tensor | None = None

    def add_gap(self, gap: torch.Tensor, learning_rate: float) -> None:
        """Adds `t - s`, a scalar, to the sum, once in each optimizer step."""
        self.gap_sum += learning_rate * gap

    # Gradients within a forward pass cannot be compiled.
    @torch.compiler.disable
    def common_shift(
        self,
        log_alphas: Sequence[torch.Tensor],
        sparsity: torch.Tensor,
        target_sparsity: float,
        loss_scale: float = 1.0,
    ) -> torch.Tensor:
        """
        The scalar 0, to be added to every `log_alpha`. In the backward pass it gives each of them the gradient of
        `lambda (t - s)`, in addition to that of the loss.

        Args:
            log_alphas (`Sequence[torch.Tensor]`): of all gates.
            sparsity (`torch.Tensor`): expected, a scalar that depends on them.
            target_sparsity (`float`): at this step.
            loss_scale (`float`, *optional*, defaults to 1.0): share of this batch in the loss of a step.
        """
        gradients = torch.autograd.grad(sparsity, list(log_alphas), retain_graph=True)
        slope = sum(gradient.sum() for gradient in gradients)
        # All gates at their limit: nothing moves the sparsity.
        slope = torch.where(slope == 0, -1.0, slope)
        shift = (sparsity.detach() - sparsity) / slope
        gap = target_sparsity - sparsity.detach()
        pressure = 1 + (GAIN * gap + GAIN_OF_SUM * self.gap_sum) / self.left

        def press(gradient: torch.Tensor) -> torch.Tensor:
            # The loss falls as gates open; where it does not, nothing has to hold them.
            pressed = gradient.clamp(max=0) * pressure
            self.value = pressed.detach() / slope / loss_scale
            return pressed

        shift.register_hook(press)
        return shift
