"""Running sums of the loss, for the means that are logged."""

from collections.abc import Mapping, Sequence

import torch
from accelerate import Accelerator

from ..distribution import stacked
from ..losses import TRAINING_LOSSES


class LossSums:
    """
    Adds up losses on the device, without waiting for it until means are requested.

    Args:
        device (`torch.device`): device of the losses.
        names (`Sequence[str]`, *optional*): names of the losses, [`~skill_hf.losses.TRAINING_LOSSES`] by default.

    Attributes:
        losses (`dict[str, torch.Tensor]`): sum of each loss, a float32 scalar; empty before the first `add`.
        weight (`torch.Tensor`): divisor of the sums, a float32 scalar.
    """

    def __init__(self, device: torch.device, names: Sequence[str] = TRAINING_LOSSES):
        self.names = names
        self.losses: dict[str, torch.Tensor] = {}
        self.weight = torch.zeros((), device=device)

    def add(self, losses: dict[str, torch.Tensor], scale: torch.Tensor | float, weight: torch.Tensor | float) -> None:
        """Adds `scale` times each loss, with the weight `weight`."""
        for name in self.names:
            self.losses[name] = self.losses.get(name, 0.0) + losses[name] * scale
        self.weight = self.weight + torch.as_tensor(weight, dtype=torch.float32, device=self.weight.device)

    def means(self, accelerator: Accelerator | None = None) -> dict[str, float]:
        """Mean of each loss over all processes of `accelerator`; empty if the total weight is 0."""
        if not self.losses:
            return {}
        sums = torch.stack([value.float().reshape(()) for value in (*self.losses.values(), self.weight)])
        if accelerator is not None:
            sums = stacked(accelerator, sums).sum(0)
        if not sums[-1]:
            return {}
        return dict(zip(self.losses, (sums[:-1] / sums[-1]).tolist(), strict=True))


class HeldOutLosses:
    """
    Means of losses over all batches of an evaluation: each over what it is a mean over in one batch, such as frames.

    Args:
        device (`torch.device`): where the losses are.
        units (`Mapping[str, str]`): name of each loss -> name of the count, in a batch's outputs, of what it is a mean
            over.
    """

    def __init__(self, device: torch.device, units: Mapping[str, str]):
        self._sums = {
            unit: LossSums(device, [name for name, of_loss in units.items() if of_loss == unit])
            for unit in dict.fromkeys(units.values())
        }

    @property
    def any_batch(self) -> bool:
        """Whether anything was added, of whatever weight."""
        return any(sums.losses for sums in self._sums.values())

    def add(self, outputs: dict[str, torch.Tensor]) -> None:
        """Adds the losses of one batch, in which there are its counts, too."""
        for unit, sums in self._sums.items():
            sums.add(outputs, outputs[unit], weight=outputs[unit])

    def means(self, accelerator: Accelerator | None = None) -> dict[str, float]:
        """Mean of each loss of which there was anything, over all processes of `accelerator`."""
        return {name: mean for sums in self._sums.values() for name, mean in sums.means(accelerator).items()}
