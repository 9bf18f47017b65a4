"""Where the projections to other teachers start: the least-squares fit of their group means on calibration clips."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from ..distribution import from_main_process
from ..losses import group_means
from .distiller import SkillDistiller
from .state_norms import run_over_calibration_clips


# Share of the mean variance of the student's features that is added to each of them.
RIDGE = 1e-3


class LinearFit(NamedTuple):
    """`weight @ x + bias`: float32 arrays of shape `(width, hidden_size)` and `(width,)`."""

    weight: np.ndarray
    bias: np.ndarray


class LeastSquares:
    r"""
    Ridge regression on streamed frames, in float64:
    `min |W x + b - y|^2 + RIDGE * mean variance of x * |W - I|^2`, `I` the identity, cut or filled with zeros.

    Directions in which x hardly varies stay as they start. A teacher that is the student's copy gets the identity.
    """

    def __init__(self):
        self.count, self.sums = 0, None

    def update(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Adds frames: x of shape `(frames, hidden_size)`, y of shape `(frames, width)`."""
        # MPS has no float64.
        device = torch.device("cpu") if x.device.type == "mps" else x.device
        x, y = x.to(device).double(), y.to(device).double()
        sums = (x.sum(0), y.sum(0), x.T @ x, x.T @ y)
        self.sums = sums if self.sums is None else tuple(map(torch.add, self.sums, sums))
        self.count += len(x)

    def solve(self) -> LinearFit:
        """The fit of all frames; on the CPU, whose solver takes matrices of any rank."""
        x_mean, y_mean, xx, xy = (total.cpu() / self.count for total in self.sums)
        xx, xy = xx - torch.outer(x_mean, x_mean), xy - torch.outer(x_mean, y_mean)
        start = torch.eye(*xy.shape, dtype=xy.dtype)
        ridge = RIDGE * xx.diagonal().mean() * torch.eye(len(xx), dtype=xx.dtype)
        # "gelsy", the default driver, reads memory that torch does not initialise (pytorch/pytorch#187411): from equal
        # frames, fits would differ.
        weight = start + torch.linalg.lstsq(xx + ridge, xy - xx @ start, driver="gelsd").solution
        bias = y_mean - x_mean @ weight
        return LinearFit(weight.T.float().numpy(), bias.float().numpy())


def fit_projections(trainer) -> list[LinearFit]:
    """
    A linear map from the student's states to each group of each teacher but the first, fitted on calibration clips.
    The first process computes it for all.

    Args:
        trainer ([`SkillDistillationTrainer`]): with the groups of all teachers, and a student without gates.
    """
    return from_main_process(trainer.accelerator, lambda: _fit(trainer))


def _fit(trainer) -> list[LinearFit]:
    with torch.random.fork_rng(devices=[]):
        distiller = trainer._make_distiller()
    _, *others = distiller.target_sets
    fits = [LeastSquares() for targets in others for _ in targets.groups]

    def consume(student_states, *states_of_teachers) -> None:
        predictors = distiller.group_features(student_states)[-len(fits) :]
        targets = []
        for index, (states, target_set) in enumerate(zip(states_of_teachers, others, strict=True), start=1):
            if distiller.state_norms:
                states = [distiller.state_norms[index](layer, state) for layer, state in enumerate(states)]
            targets += group_means(states, target_set.groups)
        for fit, x, y in zip(fits, predictors, targets, strict=True):
            fit.update(x.flatten(0, 1), y.to(x.device).flatten(0, 1))

    models = [trainer.student.base_model, *(teacher.fast_copy().base_model for teacher in trainer.teachers[1:])]
    run_over_calibration_clips(trainer, models, consume, "Start of projections")
    return [fit.solve() for fit in fits]


def set_projections(distiller: SkillDistiller, starts: Sequence[LinearFit]) -> None:
    """Sets the last projections of `distiller` to `starts`."""
    for linear, start in zip(distiller.projections[-len(starts) :], starts, strict=True):
        linear.load_state_dict({name: torch.as_tensor(value) for name, value in start._asdict().items()})
