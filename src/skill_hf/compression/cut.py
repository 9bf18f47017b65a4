"""The cut between the two stages: which units are removed if the gates have not reached the target."""

import logging

from transformers import PreTrainedModel

from . import pruning
from .budgets import UnitCosts


logger = logging.getLogger(__name__)

# A cut whose cost is off by more than this share of the teacher's has its gates shifted to the target first.
COST_TOLERANCE = 0.005


def fit_to_cost(student: PreTrainedModel, target_cost: int, costs: UnitCosts, teacher_cost: int) -> dict:
    """
    Shifts the gates of a student, if necessary, so that the cut leaves `target_cost`.

    Args:
        student (`PreTrainedModel`): with gates.
        target_cost, teacher_cost (`int`): in the unit of `costs`.
        costs ([`~skill_hf.compression.budgets.UnitCosts`]): costs of the student's units.

    Returns:
        `dict`: see `cut` of [`~skill_hf.publishing.run_record.RunRecord`].
    """
    cost, shift = pruning.cost_after_pruning(student, costs), 0.0
    if abs(cost - target_cost) > COST_TOLERANCE * teacher_cost:
        shift = pruning.fit_gates(student, target_cost, costs)
        logger.warning(
            "At the end of stage 1 the gates leave %s %s, but the target is %s; all log_alpha are shifted by %.3f to"
            " choose the units to cut.",
            f"{cost:,}",
            costs.quantity,
            f"{target_cost:,}",
            shift,
        )
    return {"left": cost, "wanted": target_cost, "shift": shift}
