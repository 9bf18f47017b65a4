import copy
import math

import pytest
import torch

from skill_hf.compression.gates import Gating, HardConcreteGate, KeptLayerNorm, gate_inputs, noise_seed, sample


def gate_with(log_alpha, min_open=0) -> HardConcreteGate:
    gate = HardConcreteGate(len(log_alpha), 0.5, min_open)
    gate.log_alpha.data = torch.tensor(log_alpha, dtype=torch.float32)
    return gate


@pytest.mark.parametrize("log_alpha", [-3.0, -0.7, 0.0, 1.5])
def test_samples_follow_the_closed_form(log_alpha):
    """P(z = 0), P(z = 1) and the range against arXiv 1712.01312, written out here."""
    gate = gate_with([log_alpha] * 200_000)
    drawn = sample(gate.log_alpha, torch.Generator().manual_seed(0)).detach()
    beta, low, high = 2 / 3, -0.1, 1.1

    def below(value):  # P(stretched <= value)
        s = (value - low) / (high - low)
        return 1 / (1 + math.exp(-(beta * math.log(s / (1 - s)) - log_alpha)))

    assert drawn.min() >= 0
    assert drawn.max() <= 1
    assert (drawn == 0).float().mean().item() == pytest.approx(below(0.0), abs=4e-3)
    assert (drawn == 1).float().mean().item() == pytest.approx(1 - below(1.0), abs=4e-3)
    assert (drawn <= 0.5).float().mean().item() == pytest.approx(below(0.5), abs=4e-3)
    assert gate.open_probability()[0].item() == pytest.approx(1 - below(0.0), rel=1e-5)


def test_initial_probabilities():
    # FIGURES: with drop probability 0.01 P(open) = .998, with 0.5 it is .832.
    assert HardConcreteGate(10_000, 0.01).open_probability().mean().item() == pytest.approx(0.998, abs=1e-3)
    assert HardConcreteGate(10_000, 0.5).open_probability().mean().item() == pytest.approx(0.832, abs=1e-3)


def test_deterministic_value():
    gate = gate_with([-9.0, 3.0, -9.0, 0.5, -2.0])
    # P(open): 0, .990, 0, .891, .401: 2.28 in all, so two stay open.
    assert gate.num_open() == 2
    expected = torch.tensor([0.0, 1 / (1 + math.exp(-3.6)), 0.0, 1 / (1 + math.exp(-0.6)), 0.0])
    torch.testing.assert_close(gate.deterministic().detach(), expected)


def test_min_open():
    gate = gate_with([-9.0, -8.0, -9.5], min_open=1)
    assert gate.num_open() == 1
    assert gate.deterministic().nonzero().flatten().tolist() == [1]


@pytest.mark.parametrize(
    ("size", "multiple_of", "min_open", "probability", "expected"),
    [
        (32, 8, 0, 0.45, 16),  # 14.4
        (32, 8, 0, 0.1, 0),
        (32, 8, 1, 0.1, 8),
        (30, 8, 0, 0.99, 24),  # the largest multiple that there is
        (6, 8, 1, 0.1, 1),  # fewer than one multiple
    ],
)
def test_open_units_are_a_multiple(size, multiple_of, min_open, probability, expected):
    gate = HardConcreteGate(size, 0.5, min_open, multiple_of)
    shift = 2 / 3 * math.log(0.1 / 1.1)
    gate.log_alpha.data.fill_(math.log(probability / (1 - probability)) + shift)
    gate.log_alpha.data += 1e-3 * torch.randn(size)
    assert gate.num_open() == expected
    assert int((gate.deterministic() > 0).sum()) == expected


def test_of_gates_that_are_equal_the_first_stay_open():
    gate = gate_with([4.6] * 200 + [9.0] + [-9.0] * 3)
    gate.shift = -4.6 + 2 / 3 * math.log(0.1 / 1.1)  # those that are equal are then even odds
    assert gate.num_open() == 101
    assert gate.deterministic().nonzero().flatten().tolist() == [*range(100), 200]


def test_sample_has_gradients_and_obeys_its_generator():
    gate = gate_with([0.0] * 50)
    one = sample(gate.log_alpha, torch.Generator().manual_seed(3))
    two = sample(gate.log_alpha, torch.Generator().manual_seed(3))
    other = sample(gate.log_alpha, torch.Generator().manual_seed(4))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    one.sum().backward()
    assert (gate.log_alpha.grad > 0).any()


def test_gates_drawn_together_are_those_drawn_one_by_one():
    owner = torch.nn.ModuleList(gate_with([0.1] * number) for number in (1, 40, 3, 17))
    hook = Gating(list(owner), ["ffn_dims"], 1)
    hook.seed = 5
    hook(owner, ())
    generator = torch.Generator().manual_seed(5)
    for gate in owner:
        torch.testing.assert_close(gate.value, sample(gate.log_alpha, generator), rtol=1e-6, atol=1e-6)
    sum(number * gate.value.sum() for number, gate in enumerate(owner)).backward()
    assert owner[0].log_alpha.grad.abs().sum() == 0 < owner[1].log_alpha.grad.sum()
    hook(owner.eval(), ())
    assert all(torch.equal(gate.value, gate.deterministic()) for gate in owner)


def test_kept_layer_norm_equals_a_narrow_one():
    torch.manual_seed(0)
    norm = torch.nn.LayerNorm(6)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    gate = gate_with([3.0, -9.0, 3.0, 3.0, -9.0, 3.0]).eval()
    gate.value = gate.deterministic()
    kept = gate.value.nonzero().flatten()
    assert len(kept) == 4
    hidden_states = torch.randn(2, 5, 6) + 3
    narrow = torch.nn.functional.layer_norm(hidden_states[..., kept], (4,), norm.weight[kept], norm.bias[kept])
    torch.testing.assert_close(KeptLayerNorm(norm, gate)(hidden_states)[..., kept], narrow)


@pytest.mark.parametrize(
    ("module", "shape", "repeats"),
    [(torch.nn.Linear(6, 5), (2, 7, 6), 2), (torch.nn.Conv1d(3, 5, 3, stride=2), (2, 3, 9), 1)],
)
def test_gated_weight_is_gated_inputs(module, shape, repeats):
    gate = gate_with([0.3, -0.2, 0.5]).eval()  # none of whose values is at an end, where it has no gradient
    inputs, found = torch.randn(shape, requires_grad=True), []
    gated = copy.deepcopy(module)
    gate_inputs(gated, gate)
    for run in (gated, module):
        gate.zero_grad()
        inputs.grad = None
        gate.value = gate.deterministic()
        value = gate.value.repeat_interleave(repeats)
        scale = 1 if run is gated else value if inputs.shape[-1] == 6 else value[:, None]
        output = run(inputs * scale)
        output.square().sum().backward()
        found.append([output.detach(), inputs.grad, gate.log_alpha.grad, run.weight.grad, run.bias.grad])
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected)
    assert found[0][2].all()


def test_a_copy_of_a_gated_module_has_a_gate_of_its_own():
    owner = torch.nn.Module()
    owner.gate, owner.linear = gate_with([0.3, -0.2]), torch.nn.Linear(2, 2)
    gate_inputs(owner.linear, owner.gate)
    other = copy.deepcopy(owner)
    assert other.linear.forward.module is other.linear
    assert [gate for gate, _ in other.linear.forward.gates] == [other.gate] != [owner.gate]


def test_a_drawn_gate_can_be_copied():
    gate = gate_with([0.0, 1.0])
    gate.value = gate.deterministic()
    assert copy.deepcopy(gate).value is None


def test_noise_follows_the_seed_and_the_step():
    """torch's generator on the CPU reads the low 32 bits of a seed: both numbers must reach them."""
    draws = {}
    for seed in (0, 1, 42, 2022, 2**31):
        for numbers in ((seed, 0), (seed, 1), (seed, 50_000), (seed, 1, 1, 0), (seed, 1, 0, 1)):
            generator = torch.Generator().manual_seed(noise_seed(*numbers))
            draws[numbers] = tuple(sample(torch.zeros(64), generator).tolist())
    assert len(set(draws.values())) == len(draws)
    assert all(0 <= noise_seed(seed, 7) < 2**32 for seed in range(100))
    assert noise_seed(3, 5) == noise_seed(3, 5)
