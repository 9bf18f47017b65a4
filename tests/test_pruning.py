import copy

import pytest
import torch
from conftest import padded_batch, tiny_teacher
from test_modeling_wavlm_skill_student import assert_same_hidden_states

from skill_hf import WavLMForSkillStudent
from skill_hf.families import build_student
from skill_hf.pruning import (
    DROP_PROBABILITY,
    fit_gates,
    min_num_parameters,
    num_parameters_after_pruning,
    seed_gates,
)


ALL_UNITS = list(DROP_PROBABILITY)
UNIT_SETS = [[unit] for unit in ALL_UNITS] + [ALL_UNITS[:3], ALL_UNITS]


def num_parameters(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


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
    expected = num_parameters_after_pruning(student)
    student.prune()
    assert num_parameters(student) == expected < num_parameters(gated)
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
    student.prune()
    assert num_parameters(student) < num_parameters(gated)
    assert_same_hidden_states(gated, student, padded_batch(), atol=1e-4)


@pytest.mark.parametrize("units", UNIT_SETS, ids="-".join)
def test_expected_size_with_all_gates_open_is_the_number_of_parameters(layout, units):
    student = build_student(tiny_teacher(layout))
    whole = num_parameters(student)
    assert student.num_expected_parameters().item() == whole
    student.add_gates(units)
    for _, gate in student.named_gates():
        gate.log_alpha.data.fill_(100.0)
    assert student.num_expected_parameters().item() == pytest.approx(whole, rel=1e-9)
    assert num_parameters_after_pruning(student) == whole


def test_expected_size_is_the_mean_over_sampled_architectures(layout):
    """Each unit is kept or not by its own coin; the pruned model's parameters are then counted for real."""
    student = gated_student(layout)
    generator = torch.Generator().manual_seed(0)
    sizes = []
    for _ in range(150):
        sampled = copy.deepcopy(student)
        for _, gate in sampled.named_gates():
            is_open = torch.rand(gate.size, generator=generator) < gate.open_probability()
            gate.min_open = 0
            gate.log_alpha.data = torch.where(is_open, 50.0, -50.0)
        sizes.append(float(num_parameters_after_pruning(sampled)))
    sizes = torch.tensor(sizes)
    error = sizes.std() / len(sizes) ** 0.5
    assert abs(sizes.mean() - student.num_expected_parameters()) < 4 * error


def test_expected_size_pulls_every_gate():
    student = gated_student()
    student.num_expected_parameters().backward()
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


def test_fit_gates_where_feed_forward_units_are_gone(layout):
    """Blocks are coarse, and with closed feed-forward blocks other units have to fill what is left."""
    student = gated_student(layout)
    whole = num_parameters(build_student(tiny_teacher(layout)))
    for name, gate in student.named_gates():
        gate.log_alpha.data += -8 if "feed_forward" in name else 2
    fit_gates(student, whole // 4)
    student.prune()
    assert sum(student.config.intermediate_sizes) == 0
    assert abs(num_parameters(student) / whole - 0.25) < 0.01


def test_impossible_size(layout):
    student = gated_student(layout, ["ffn_dims"])
    least = min_num_parameters(student)
    with pytest.raises(ValueError, match="pruning_units"):
        fit_gates(student, least - 1)


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
    with pytest.raises(ValueError, match="layers"):
        student.add_gates(["layers"])
    student.add_gates()
    with pytest.raises(ValueError, match="already"):
        student.add_gates()
