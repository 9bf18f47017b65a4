"""Running sums of the loss, for the means that are logged."""

import torch
from accelerate import Accelerator

from ..losses import TRAINING_LOSSES


class LossSums:
    """
    Adds up [`~skill_hf.losses.TRAINING_LOSSES`] on the device, without waiting for it until means are requested.

    Args:
        device (`torch.device`): device of the losses.

    Attributes:
        losses (`dict[str, torch.Tensor]`): sum of each loss, a float32 scalar; empty before the first `add`.
        weight (`torch.Tensor`): divisor of the sums, a float32 scalar.
    """

    def __init__(self, device: torch.device):
        self.losses: dict[str, torch.Tensor] = {}
        self.weight = torch.zeros((), device=device)

    def add(self, losses: dict[str, torch.Tensor], scale: torch.Tensor | float, weight: torch.Tensor | float) -> None:
        """Adds `scale` times each loss, with the weight `weight`."""
        for name in TRAINING_LOSSES:
            self.losses[name] = self.losses.get(name, 0.0) + losses[name] * scale
        self.weight = self.weight + torch.as_tensor(weight, dtype=torch.float32, device=self.weight.device)

    def means(self, accelerator: Accelerator | None = None) -> dict[str, float]:
        """Mean of each loss over all processes of `accelerator`; empty if the total weight is 0."""
        if not self.losses:
            return {}
        sums = torch.stack([value.float().reshape(()) for value in (*self.losses.values(), self.weight)])
        if accelerator is not None and accelerator.num_processes > 1:
            sums = accelerator.gather(sums[None]).sum(0)
        if not sums[-1]:
            return {}
        return dict(zip(self.losses, (sums[:-1] / sums[-1]).tolist(), strict=True))
