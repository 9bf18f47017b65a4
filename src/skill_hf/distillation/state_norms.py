"""Hidden states that are normalised before they are averaged: constants of each layer, from the calibration clips."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from ..data.collator import calibration_waveforms
from ..distribution import from_main_process
from ..grouping.forward_pass import run_over_clips


# A channel that varies less than this share of its layer's mean deviation is divided by that instead.
LEAST_DEVIATION = 0.01


class StateNorms(nn.Module):
    r"""
    `(h_l - mean_l) / deviation_l` for each hidden state l of a model, by channel. Average targets of layers are usual
    only after such a normalisation (data2vec, arXiv 2202.03555, section 3.3): in a sum of raw states those with the
    largest values count most, in pre-norm models the highest.

    The same constants apply to teacher and student, so a copy of the teacher still predicts its targets exactly.

    Args:
        num_states (`int`): hidden states, one more than layers.
        width (`int`): their size.
    """

    def __init__(self, num_states: int, width: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(num_states, width))
        self.register_buffer("deviation", torch.ones(num_states, width))

    def forward(self, index: int, hidden_state: torch.Tensor) -> torch.Tensor:
        """Hidden state `index`, `(..., width)`, normalised, float32."""
        return (hidden_state.float() - self.mean[index]) / self.deviation[index]


class Moments:
    """Mean and deviation of each channel of each hidden state over streamed frames, in float64."""

    def __init__(self):
        self.count, self.sums = 0, None

    def update(self, states: Sequence[torch.Tensor]) -> None:
        """Adds the hidden states of a batch, each `(batch, frames, width)`."""
        frames = torch.stack([state.flatten(0, 1).cpu().double() for state in states])  # (N, frames, width)
        sums = torch.stack([frames.sum(1), frames.square().sum(1)])
        self.sums = sums if self.sums is None else self.sums + sums
        self.count += frames.shape[1]

    def compute(self) -> dict[str, np.ndarray]:
        """`mean` and `deviation`, float32 of shape `(N, width)`."""
        mean, square = self.sums / self.count
        deviation = (square - mean.square()).clamp(min=0).sqrt()
        deviation = torch.maximum(deviation, LEAST_DEVIATION * deviation.mean(-1, keepdim=True))
        return {"mean": mean.float().numpy(), "deviation": deviation.clamp(min=1e-6).float().numpy()}


def run_over_calibration_clips(trainer, models: Sequence, consume: Callable, title: str) -> None:
    """
    [`~skill_hf.grouping.forward_pass.run_over_clips`] with one model for each teacher, which hears audio as that
    teacher does.
    """
    config, ensemble = trainer.skill_config, trainer.ensemble
    reading = trainer.reading | {"feature_extractor": ensemble.collator_extractor()}
    clips = calibration_waveforms(
        trainer.calibration_dataset,
        config.calibration_samples,
        config.calibration_seconds,
        trainer.args.seed,
        **reading,
    )
    run_over_clips(
        models,
        clips,
        ensemble.extractors_for_waveforms,
        consume,
        batch_size=4,
        title=title,
        progress=not trainer.args.disable_tqdm,
    )


def measure_states(trainer) -> list[dict[str, np.ndarray]]:
    """
    Mean and deviation of the hidden states of each teacher on the calibration clips. The first process computes them
    for all.

    Args:
        trainer ([`SkillDistillationTrainer`]): before training.
    """
    return from_main_process(trainer.accelerator, lambda: _measure(trainer))


def _measure(trainer) -> list[dict[str, np.ndarray]]:
    moments = [Moments() for _ in trainer.teachers]

    def consume(*states_of_teachers) -> None:
        for one, states in zip(moments, states_of_teachers, strict=True):
            one.update(states)

    models = [teacher.fast_copy().base_model for teacher in trainer.teachers]
    run_over_calibration_clips(trainer, models, consume, "Scale of hidden states")
    return [one.compute() for one in moments]
