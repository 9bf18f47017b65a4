"""The estimate of the Lagrange multiplier against scipy's solution of the same constrained problem."""

import numpy as np
import pytest
import torch
from conftest import tiny_teacher
from scipy.optimize import NonlinearConstraint, minimize

from skill_hf.compression.budgets import ParameterBudget
from skill_hf.compression.multiplier import GAIN, GAIN_OF_SUM, MultiplierEstimate
from skill_hf.compression.pruning import expected_cost, named_gates
from skill_hf.models.families import build_student


def log_alphas(student) -> list[torch.Tensor]:
    return [gate.log_alpha for _, gate in named_gates(student)]


@pytest.fixture
def problem():
    """A gated student, and a smooth loss of the gates, each of which has a weight of its own."""
    student = build_student(tiny_teacher())
    student.add_gates(["attention_heads", "ffn_dims"])
    costs = ParameterBudget().unit_costs(student)
    total = costs.count()
    gates = [gate for _, gate in named_gates(student)]
    size = sum(gate.size for gate in gates)
    weights = torch.rand(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.1

    def set_log_alpha(values) -> None:
        parts = torch.as_tensor(values, dtype=torch.float32).split([gate.size for gate in gates])
        for gate, part in zip(gates, parts, strict=True):
            gate.log_alpha.data.copy_(part)

    def loss(shift=0.0) -> torch.Tensor:
        closed = torch.cat([torch.sigmoid(-(gate.log_alpha + shift)) for gate in gates]).double()
        return (weights * (closed + closed.square())).sum() / size

    def sparsity() -> torch.Tensor:
        return 1 - expected_cost(student, costs) / total

    def gradient(function) -> np.ndarray:
        gradients = torch.autograd.grad(function(), [gate.log_alpha for gate in gates])
        return torch.cat(gradients).double().numpy()

    return student, size, set_log_alpha, loss, sparsity, gradient


def test_the_estimate_is_the_multiplier_at_the_constrained_minimum(problem):
    student, size, set_log_alpha, loss, sparsity, gradient = problem

    def at(function, value=lambda result: result):
        def evaluate(values):
            set_log_alpha(values)
            return value(function)

        return evaluate

    target = 0.25
    solution = minimize(
        at(loss, lambda function: function().item()),
        np.zeros(size),
        jac=at(loss, gradient),
        method="trust-constr",
        constraints=NonlinearConstraint(
            at(sparsity, lambda function: function().item()), target, target, jac=at(sparsity, gradient)
        ),
        options={"maxiter": 300},
    )
    set_log_alpha(solution.x)
    assert sparsity().item() == pytest.approx(target, abs=1e-3)
    estimate = MultiplierEstimate(0.9)
    loss(estimate.common_shift(log_alphas(student), sparsity(), sparsity().item())).backward()
    # scipy adds its multiplier times the constraint to the loss, we subtract it.
    assert estimate.value.item() == pytest.approx(-solution.v[0].item(), rel=0.03)


@pytest.mark.parametrize("gap", [-1.0, -0.01, 0.0, 0.02])
def test_gates_get_the_gradient_of_the_lagrangian(problem, gap):
    student, size, set_log_alpha, loss, sparsity, gradient = problem
    set_log_alpha(torch.randn(size, generator=torch.Generator().manual_seed(1)))
    of_loss, of_sparsity = gradient(loss), gradient(sparsity)
    estimate = MultiplierEstimate(0.9)
    loss(estimate.common_shift(log_alphas(student), sparsity(), sparsity().item() + gap)).backward()
    multiplier = of_loss.sum() / of_sparsity.sum() * (1 + GAIN * gap / (1 - 0.9))
    assert estimate.value.item() == pytest.approx(multiplier, rel=1e-3)
    given = torch.cat([gate.log_alpha.grad for _, gate in named_gates(student)]).numpy()
    np.testing.assert_allclose(given, of_loss - multiplier * of_sparsity, atol=1e-6)


def test_a_gap_that_stays_adds_up(problem):
    student, size, set_log_alpha, loss, sparsity, gradient = problem
    of_loss, of_sparsity = gradient(loss), gradient(sparsity)
    estimate = MultiplierEstimate(0.9)
    for gap, learning_rate in ((0.3, 0.1), (0.2, 0.2), (-0.05, 0.4)):
        estimate.add_gap(torch.tensor(gap), learning_rate)
    again = MultiplierEstimate(0.9)
    again.load_state_dict(estimate.state_dict())
    loss(again.common_shift(log_alphas(student), sparsity(), sparsity().item() + 0.01)).backward()
    factor = 1 + (GAIN * 0.01 + GAIN_OF_SUM * (0.03 + 0.04 - 0.02)) / (1 - 0.9)
    assert again.value.item() == pytest.approx(of_loss.sum() / of_sparsity.sum() * factor, rel=1e-3)


def test_no_pressure_where_closing_lowers_the_loss(problem):
    student, _, _, loss, sparsity, gradient = problem
    of_loss = gradient(loss)
    estimate = MultiplierEstimate(0.9)
    (-loss(estimate.common_shift(log_alphas(student), sparsity(), 0.5))).backward()
    assert estimate.value == 0
    given = torch.cat([gate.log_alpha.grad for _, gate in named_gates(student)]).numpy()
    np.testing.assert_allclose(given, -of_loss, atol=1e-7)
