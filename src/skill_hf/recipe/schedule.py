"""Steps and learning rates: those of the published recipe, and how they fit shorter runs."""

from dataclasses import dataclass


# The published recipe trains for 50 000 + 25 000 steps (DPHuBERT, arXiv 2305.17651, section 3.1).
FULL_STEPS = 75_000
FULL_FINAL_STEPS = 25_000
FULL_WARMUP_STEPS = 5_000  # of the sparsity target, and of the learning rate in the final stage
FULL_GATE_LEARNING_RATE = 0.02
FULL_LEARNING_RATES = (2e-4, 1e-4)
# Sparsity must rise over as large a share of the first stage, where that is too short for `FULL_WARMUP_STEPS`.
SPARSITY_WARMUP_SHARE = 1 / 2
# What `log_alpha` must be able to travel in the first stage, wherever that is set by default.
GATE_TRAVEL = 24.0
# A run with fewer steps has time for larger updates: its learning rates are this over the width that is to be left,
# about the teacher's times 1 - `target_sparsity`, since the updates of adaptive optimizers add up over the inputs of a
# layer (arXiv 2203.03466). Smaller shares, for which no rates have been tried, count as `LEAST_SHARE_LEFT`. Pre-norm
# layers stand larger updates (arXiv 2002.04745), and with less their gates stay open where little is to be left.
SHORT_STEPS = FULL_STEPS // 10
SHORT_LEARNING_RATE = 1 / 16
LEAST_SHARE_LEFT = 1 / 20
# In such a run the student gains more from steps after the cut than from steps under gates, once these have had the
# steps that they need to tell units apart.
SHORT_FINAL_SHARE = 2 / 3
LEAST_JOINT_STEPS = 50


@dataclass(frozen=True)
class StageSteps:
    """
    Optimizer steps: `joint` for distilling and pruning, `final` for distilling after the cut; each includes its
    warm-up.
    """

    joint: int
    final: int
    sparsity_warmup: int
    final_warmup: int

    @property
    def total(self) -> int:
        return self.joint + self.final


def stage_steps(
    max_steps: int, final: int | None, sparsity_warmup: int | None, final_warmup: int | None
) -> StageSteps:
    """
    The steps of both stages of a run of `max_steps`. Those that are `None` fit it, the others are kept.

    Raises:
        `ValueError`: if a stage or its warm-up does not fit.
    """
    if final is None:
        final = round(max_steps * FULL_FINAL_STEPS / FULL_STEPS)
        if max_steps < SHORT_STEPS:
            final = max(final, min(round(max_steps * SHORT_FINAL_SHARE), max_steps - LEAST_JOINT_STEPS))
    if final > max_steps:
        raise ValueError(f"`final_steps` ({final}) must not exceed the steps of the run, `max_steps` ({max_steps}).")
    joint = max_steps - final
    return StageSteps(
        joint=joint,
        final=final,
        sparsity_warmup=_fit_warmup("sparsity_warmup_steps", sparsity_warmup, joint, SPARSITY_WARMUP_SHARE),
        final_warmup=_fit_warmup("final_warmup_steps", final_warmup, final, FULL_WARMUP_STEPS / FULL_FINAL_STEPS),
    )


def _fit_warmup(name: str, steps: int | None, stage: int, share: float) -> int:
    """By default that of the full recipe, or `share` of a shorter stage; a number set by hand must fit unchanged."""
    if steps is None:
        return min(FULL_WARMUP_STEPS, round(stage * share))
    if stage and steps > stage:
        raise ValueError(f"`{name}` ({steps}) must not exceed the steps of its stage ({stage}).")
    return steps


def gate_travel(learning_rate: float, joint_steps: int) -> float:
    """
    How far `log_alpha` can move in a first stage of `joint_steps` if all steps have the same direction: an adaptive
    optimizer moves it by about the learning rate per step, which on average is half of its peak.
    """
    return learning_rate * joint_steps / 2


def gate_learning_rate(joint_steps: int) -> float:
    """That of the published recipe, or more if [`gate_travel`] would be below `GATE_TRAVEL` with it."""
    return max(FULL_GATE_LEARNING_RATE, GATE_TRAVEL / gate_travel(1.0, max(joint_steps, 1)))


def learning_rates(max_steps: int, hidden_size: int, share_left: float, pre_norm: bool) -> list[float]:
    """Peaks of both stages of a run of `max_steps`; of a teacher of this width, `share_left` is to be left."""
    left = max(share_left, LEAST_SHARE_LEFT)
    least = SHORT_LEARNING_RATE / (hidden_size * left) if max_steps < SHORT_STEPS else 0.0
    least /= min(2 * left, 1.0) ** 0.5 if pre_norm else 1
    return [max(rate, least) for rate in FULL_LEARNING_RATES]
