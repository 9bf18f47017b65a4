import pytest
from conftest import tiny_teacher

from skill_hf.compression.budgets import ParameterBudget
from skill_hf.compression.cut import COST_TOLERANCE, fit_to_cost
from skill_hf.compression.pruning import add_gates, cost_after_pruning
from skill_hf.models.families import build_student


@pytest.mark.parametrize(
    ("target_of", "advice"),
    [
        (lambda cost, teacher: cost, None),
        (lambda cost, teacher: cost - int(0.9 * COST_TOLERANCE * teacher), None),
        (lambda cost, teacher: teacher // 3, "larger"),
        (lambda cost, teacher: teacher - 1, "smaller"),
    ],
)
def test_gates_are_shifted_where_the_cut_would_miss_its_target(caplog, target_of, advice):
    student = build_student(tiny_teacher())
    add_gates(student)
    student.eval()
    costs, teacher_cost = ParameterBudget().unit_costs(student), tiny_teacher().num_parameters()
    cost = cost_after_pruning(student, costs)
    target = target_of(cost, teacher_cost)
    cut = fit_to_cost(student, target, costs, teacher_cost)
    assert (cut["left"], cut["wanted"]) == (cost, target)
    assert (cut["shift"] != 0) == (advice is not None) == bool(caplog.text)
    left = cost_after_pruning(student, costs)
    assert abs(left - target) <= 0.01 * teacher_cost
    if advice is not None:
        assert f"a {advice} `gate_learning_rate`" in caplog.text and f"the target is {target:,}" in caplog.text
