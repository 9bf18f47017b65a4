import numpy as np
import pytest
from conftest import tiny_teacher

from skill_hf.compression.budgets import ParameterBudget
from skill_hf.compression.cut import COST_TOLERANCE, fit_to_cost
from skill_hf.compression.pruning import add_gates, cost_after_pruning
from skill_hf.models.families import build_student


@pytest.mark.parametrize(
    ("target_of", "shifted"),
    [
        (lambda cost, teacher: cost, 0),
        (lambda cost, teacher: cost - int(0.9 * COST_TOLERANCE * teacher), 0),
        (lambda cost, teacher: teacher // 3, -1),
        (lambda cost, teacher: teacher - 1, 1),
    ],
)
def test_gates_are_shifted_where_the_cut_would_miss_its_target(caplog, target_of, shifted):
    student = build_student(tiny_teacher())
    add_gates(student)
    student.eval()
    costs, teacher_cost = ParameterBudget().unit_costs(student), tiny_teacher().num_parameters()
    cost = cost_after_pruning(student, costs)
    target = target_of(cost, teacher_cost)
    cut = fit_to_cost(student, target, costs, teacher_cost)
    assert (cut["left"], cut["wanted"]) == (cost, target)
    assert np.sign(cut["shift"]) == shifted
    assert bool(caplog.text) == bool(shifted)
    left = cost_after_pruning(student, costs)
    assert abs(left - target) <= 0.01 * teacher_cost
    assert (f"leave {cost:,} parameters, but the target is {target:,}" in caplog.text) == bool(shifted)
