import copy
import dataclasses
import math

import pytest
import torch
from conftest import padded_batch, tiny_teacher
from test_modeling_wavlm_skill_student import assert_same_hidden_states

from skill_hf import WavLMForSkillStudent
from skill_hf.compression.budgets import MacBudget, ParameterBudget
from skill_hf.compression.macs import count_macs
from skill_hf.compression.pruning import (
    cost_after_pruning,
    expected_cost,
    fit_gates,
    min_cost,
    seed_gates,
)
from skill_hf.compression.units import KINDS, Factor
from skill_hf.models.families import build_student


ALL_UNITS = list(KINDS)
UNIT_SETS = [[unit] for unit in ALL_UNITS] + [ALL_UNITS]


def num_parameters(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def num_macs(model) -> int:
    return count_macs(model, 0.7, sampling_rate=8_000)


# A budget, and what counts the same of a model without gates.
BUDGETS = {"parameters": (ParameterBudget(), num_parameters), "macs": (MacBudget(0.7, 8_000), num_macs)}


def cost_of(costs, *gates) -> int:
    """Cost of one unit of each of `gates` together, where the block that they are in, if any, is left."""
    wanted = set(map(Factor, gates))
    (cost,) = (cost for factors, cost in costs.terms.items() if {f for f in factors if not f.some} == wanted)
    return cost


def channel_pairs(costs) -> list[int]:
    """Cost of a channel that each convolution reads with one that it writes; the first reads the waveform alone."""
    gates = [f"feature_extractor.conv_layers.{index}.channel_gate" for index in range(7)]
    return [cost_of(costs, *gates[max(index - 1, 0) : index + 1]) for index in range(7)]


@pytest.fixture(params=BUDGETS)
def budget(request):
    return BUDGETS[request.param]


def gated_student(layout="base", units=ALL_UNITS, seed=0, **kwargs):
    """A student with random gates of which a third or so is closed."""
    student = build_student(tiny_teacher(layout, **kwargs)).eval()
    student.add_gates(units)
    generator = torch.Generator().manual_seed(seed)
    for _, gate in student.named_gates():
        gate.log_alpha.data = 2 * torch.randn(gate.size, generator=generator) - 0.5
    return student


@pytest.mark.parametrize("units", UNIT_SETS, ids="-".join)
@pytest.mark.parametrize("emptied", [False, True])
def test_pruned_equals_gated(layout, units, emptied):
    student = gated_student(layout, units)
    if emptied:
        for name, gate in student.named_gates():
            if name.startswith("encoder.layers.0."):
                gate.log_alpha.data.fill_(-9)
    gated = copy.deepcopy(student)
    expected = {name: cost_after_pruning(student, costs.unit_costs(student)) for name, (costs, _) in BUDGETS.items()}
    student.prune()
    assert num_parameters(student) == expected["parameters"] < num_parameters(gated)
    assert num_macs(student) == expected["macs"]
    assert not student.named_gates()
    assert_same_hidden_states(gated, student, padded_batch(), atol=1e-4)
    if emptied and set(units) & {"attention_heads", "attention_blocks"}:
        assert student.config.remaining_heads[0] == []
        assert (student.encoder.layers[0].attention.output is None) == ("attention_blocks" in units)


def test_pruned_student_saves_and_loads(layout, tmp_path):
    student = gated_student(layout)
    student.prune()
    student.save_pretrained(tmp_path)
    assert_same_hidden_states(student, WavLMForSkillStudent.from_pretrained(tmp_path).eval(), padded_batch(), atol=0)


def test_prune_twice(layout):
    student = gated_student(layout)
    student.prune()
    student.add_gates(ALL_UNITS)
    for _, gate in student.named_gates():
        gate.log_alpha.data = torch.linspace(-4, 4, gate.size)
    gated = copy.deepcopy(student)
    expected = [cost_after_pruning(student, costs.unit_costs(student)) for costs, _ in BUDGETS.values()]
    student.prune()
    assert [num_parameters(student), num_macs(student)] == expected
    assert num_parameters(student) < num_parameters(gated)
    assert_same_hidden_states(gated, student, padded_batch(), atol=1e-4)


@pytest.mark.parametrize("units", UNIT_SETS, ids="-".join)
def test_expected_cost_with_all_gates_open_is_that_of_the_teacher(layout, units, budget):
    teacher = tiny_teacher(layout)
    student, (budget, count) = build_student(teacher), budget
    whole = count(teacher)
    assert budget.total(teacher) == budget.total(student) == whole
    assert expected_cost(student, budget.unit_costs(student)).item() == whole
    student.add_gates(units)
    assert budget.total(student) == whole
    for _, gate in student.named_gates():
        gate.log_alpha.data.fill_(100.0)
    costs = budget.unit_costs(student)
    assert expected_cost(student, costs).item() == pytest.approx(whole, rel=1e-9)
    assert cost_after_pruning(student, costs) == whole


def test_expected_parameters_without_and_with_gates(layout):
    student = build_student(tiny_teacher(layout))
    assert student.num_expected_parameters().item() == num_parameters(student)
    student = gated_student(layout)
    expected = expected_cost(student, ParameterBudget().unit_costs(student))
    assert torch.equal(student.num_expected_parameters(), expected)
    assert expected.dtype == torch.float64


def test_macs_of_wavlm_base_plus():
    """Those of one second are 6.911 G in published tables (DiariZen's), and the gates of the position bias besides."""
    with torch.device("meta"):
        student = WavLMForSkillStudent(WavLMForSkillStudent.config_class())
    costs = MacBudget(1.0).unit_costs(student)
    assert costs.count() == 6_914_987_008
    assert channel_pairs(costs) == [3199 * 10, 1599 * 3, 799 * 3, 399 * 3, 199 * 3, 99 * 2, 49 * 2]
    for layer in range(12):
        attention, feed_forward = (f"encoder.layers.{layer}.{block}" for block in ("attention", "feed_forward"))
        assert cost_of(costs, f"{attention}.head_gate") == 49 * 64 * (2 * 768 + 2 * 49 + 8)
        assert cost_of(costs, f"{attention}.head_gate", f"{attention}.value_gate") == 49 * 2 * 768
        assert cost_of(costs, f"{feed_forward}.dim_gate") == 49 * 2 * 768
    assert costs.fixed == 50 * 768 * 48 * 128  # the positional convolution, which no gate is on


def test_what_stands_behind_the_encoder_is_counted(layout, budget):
    budget, count = budget
    student = build_student(tiny_teacher(layout, add_adapter=True, output_hidden_size=20))
    without = build_student(tiny_teacher(layout))
    more = count(student) - count(without)
    assert more > 0
    assert budget.unit_costs(student) == dataclasses.replace(
        budget.unit_costs(without), fixed=budget.unit_costs(without).fixed + more
    )


def test_expected_cost_is_the_mean_over_sampled_architectures(layout, budget):
    """Each unit is kept or not by its own coin; what the pruned model costs is then counted for real."""
    student, (budget, _) = gated_student(layout), budget
    costs = budget.unit_costs(student)
    generator = torch.Generator().manual_seed(0)
    expected, gates = expected_cost(student, costs), [gate for _, gate in student.named_gates()]
    probabilities = [gate.open_probability() for gate in gates]
    sampled_costs = []
    for _ in range(150):
        for gate, probability in zip(gates, probabilities, strict=True):
            is_open = torch.rand(gate.size, generator=generator) < probability
            gate.min_open = 0
            gate.log_alpha.data = torch.where(is_open, 50.0, -50.0)
        sampled_costs.append(float(cost_after_pruning(student, costs)))
    sampled_costs = torch.tensor(sampled_costs)
    error = sampled_costs.std() / len(sampled_costs) ** 0.5
    assert abs(sampled_costs.mean() - expected) < 4 * error


def test_expected_cost_pulls_every_gate(budget):
    student, (budget, _) = gated_student(), budget
    expected_cost(student, budget.unit_costs(student)).backward()
    for name, gate in student.named_gates():
        assert (gate.log_alpha.grad > 0).all(), name


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7])
def test_fit_gates_meets_the_size(layout, sparsity):
    student = gated_student(layout, ALL_UNITS[:3])
    whole = num_parameters(build_student(tiny_teacher(layout)))
    wanted = round((1 - sparsity) * whole)
    fit_gates(student, wanted)
    student.prune()
    # A feed-forward unit, the smallest part, has 2 * 32 + 1 parameters.
    assert abs(num_parameters(student) - wanted) <= 65


@pytest.mark.parametrize(("sparsity", "closes"), [(0.7, True), (0.05, False)])
def test_fit_gates_chooses_units_and_scales_nothing_down(layout, sparsity, closes):
    student = gated_student(layout, ALL_UNITS[:3])
    before = {
        name: (gate.log_alpha.clone(), torch.sigmoid(0.8 * gate.log_alpha / (2 / 3)))
        for name, gate in student.named_gates()
    }
    shift = fit_gates(student, round((1 - sparsity) * num_parameters(build_student(tiny_teacher(layout)))))
    assert (shift < -1) if closes else (shift > 0.1)
    for name, gate in student.named_gates():
        log_alpha, value = before[name]
        assert torch.equal(gate.log_alpha, log_alpha)
        kept = gate.deterministic() > 0
        assert (gate.deterministic()[kept] >= value[kept]).all()
        if closes and "dim_gate" not in name:  # which a further shift of their own may open
            assert torch.equal(gate.deterministic()[kept], value[kept])


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("seconds", [0.5, 10.0])
def test_fit_gates_meets_the_macs(layout, sparsity, seconds):
    student = gated_student(layout, ALL_UNITS[:3])
    whole = count_macs(tiny_teacher(layout), seconds)
    fit_gates(student, round((1 - sparsity) * whole), MacBudget(seconds).unit_costs(student))
    student.prune()
    assert abs(count_macs(student, seconds) / whole - (1 - sparsity)) < 0.005


@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.9])
def test_widths_are_multiples_of_what_hardware_likes(layout, sparsity):
    student = build_student(tiny_teacher(layout, intermediate_size=52)).eval()  # of which 48 are a multiple of 8
    student.add_gates(ALL_UNITS[:3], width_multiple=8)
    generator = torch.Generator().manual_seed(0)
    for _, gate in student.named_gates():
        gate.log_alpha.data = 2 * torch.randn(gate.size, generator=generator)
    costs = ParameterBudget().unit_costs(student)
    wanted = max(round((1 - sparsity) * num_parameters(build_student(tiny_teacher(layout)))), min_cost(student, costs))
    fit_gates(student, wanted)
    expected, left = student(**padded_batch()).last_hidden_state, cost_after_pruning(student, costs)
    student.prune()
    torch.testing.assert_close(student(**padded_batch()).last_hidden_state, expected, atol=1e-4, rtol=0)
    assert num_parameters(student) == left
    assert abs(left - wanted) <= 8 * 65 / 2 + 8  # half of eight feed-forward units
    widths = student.config.conv_dim + student.config.intermediate_sizes
    assert all(width % 8 == 0 for width in widths), widths


def test_fit_gates_where_feed_forward_units_are_gone(layout, budget):
    """Blocks are coarse, and with closed feed-forward blocks other units have to fill what is left."""
    student, (budget, count) = gated_student(layout), budget
    whole = count(build_student(tiny_teacher(layout)))
    for name, gate in student.named_gates():
        gate.log_alpha.data += -8 if "feed_forward" in name else 2
    fit_gates(student, whole // 4, budget.unit_costs(student))
    student.prune()
    assert sum(student.config.intermediate_sizes) == 0
    assert abs(count(student) / whole - 0.25) < 0.01


def test_macs_take_more_from_the_convolutions_than_parameters_do(layout):
    """All gates alike to begin with, and nothing but the budget to pull at them, until half of the MACs is gone."""
    of_convolutions, parameters = {}, {}
    for name, (budget, _) in BUDGETS.items():
        student = gated_student(layout, ALL_UNITS[:3])
        gates = [gate for _, gate in student.named_gates()]
        for gate in gates:
            gate.log_alpha.data.fill_(2.0)
        costs, whole, half = budget.unit_costs(student), budget.total(student), num_macs(tiny_teacher(layout)) / 2
        macs = MacBudget(0.7, 8_000).unit_costs(student)
        optimizer = torch.optim.SGD([gate.log_alpha for gate in gates], lr=60.0)
        while expected_cost(student, macs) > half:
            optimizer.zero_grad()
            (expected_cost(student, costs) / whole).backward()
            optimizer.step()
        student.prune()
        widths = student.config.conv_dim
        of_convolutions[name] = sum(map(math.prod, zip(channel_pairs(macs), [1, *widths], widths, strict=False)))
        parameters[name] = num_parameters(student)
    assert of_convolutions["macs"] < 0.7 * of_convolutions["parameters"]
    assert parameters["macs"] > 1.3 * parameters["parameters"]


def test_impossible_cost(layout, budget):
    student, (budget, _) = gated_student(layout, ["ffn_dims"]), budget
    costs = budget.unit_costs(student)
    with pytest.raises(ValueError, match=f"{budget.quantity}: the parts without gates.*pruning_units"):
        fit_gates(student, min_cost(student, costs) - 1, costs)


def test_least_cost_is_that_of_closed_gates(layout, budget):
    student, (budget, count) = gated_student(layout), budget
    costs = budget.unit_costs(student)
    for _, gate in student.named_gates():
        gate.log_alpha.data.fill_(-9.0)
    student.prune()
    assert count(student) == min_cost(gated_student(layout), costs)


def test_gates_are_drawn_once_per_forward_and_seeded():
    student = gated_student().train()
    inputs = {"input_values": torch.randn(1, 8000)}
    student.config.apply_spec_augment = False
    student.config.layerdrop = 0.0
    for module in student.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for layer in student.encoder.layers:
        layer.attention.dropout = 0.0
    outputs = []
    for seed in (1, 1, 2):
        seed_gates(student, seed)
        outputs.append(student(**inputs).last_hidden_state)
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


def test_pruning_draws_no_random_number_and_keeps_what_is_frozen():
    student = gated_student()
    student.freeze_feature_encoder()
    state = torch.get_rng_state()
    student.prune()
    assert torch.equal(state, torch.get_rng_state())
    assert not any(parameter.requires_grad for parameter in student.feature_extractor.parameters())
    assert student.feature_projection.projection.weight.requires_grad


def test_names_hold_the_layer():
    names = [name for name, _ in gated_student().named_gates()]
    assert "encoder.layers.0.attention.head_gate" in names
    assert "feature_extractor.conv_layers.6.channel_gate" in names


def test_misuse():
    student = build_student(tiny_teacher())
    with pytest.raises(ValueError, match="add_gates"):
        student.prune()
    with pytest.raises(ValueError, match="neurons"):
        student.add_gates(["neurons"])
    student.add_gates()
    with pytest.raises(ValueError, match="already"):
        student.add_gates()
