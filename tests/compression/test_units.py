"""The table of what can be pruned: a kind that is added works everywhere by its entry alone."""

import copy
import re

import pytest
import torch
from conftest import padded_batch, tiny_config, tiny_teacher
from test_latency import PICOSECONDS
from test_modeling_wavlm_skill_student import assert_same_hidden_states
from test_pruning import num_macs, num_parameters

from skill_hf import SkillConfig
from skill_hf.cli.info import describe, format_text
from skill_hf.compression import units
from skill_hf.compression.budgets import LatencyBudget, MacBudget, ParameterBudget
from skill_hf.compression.pruning import (
    cost_after_pruning,
    cut_closed_units,
    expected_cost,
    fit_gates,
    min_cost,
    num_expected_parameters,
)
from skill_hf.compression.units import KINDS, Kind, Units, sizes_of, units_in_teacher, units_of
from skill_hf.models.families import build_student, student_config
from skill_hf.publishing.model_card import student_card
from skill_hf.publishing.plots import plot_architecture


BUDGETS = (ParameterBudget(), MacBudget(0.7, 8_000), LatencyBudget(PICOSECONDS))


# ---- A kind that contains others: both blocks of a layer at once ----
def find_blocks(config, layer: int) -> Units:
    name = f"encoder.layers.{layer}"
    removed = {*getattr(config, "removed_attention_blocks", ())} & {*getattr(config, "removed_ffn_blocks", ())}
    projections = {"attention": "out_proj", "feed_forward": "output_dense"}
    return Units(
        "both_blocks",
        layer,
        f"{name}.both_gate",
        int(layer not in removed),
        whole=1,
        outputs=tuple(
            f"{name}.{block}.{part}" for block in projections for part in (projections[block], "output_bias")
        ),
        contains=tuple(f"{name}.{block}" for block in projections),
    )


BOTH_BLOCKS = Kind(
    find_blocks,
    lambda config, layer, kept: None,  # the blocks that it contains are recorded as removed
    "layer",
    drop_probability=0.01,
    coarseness=4,
    label="pairs of blocks",
)


ADDED = {
    "attention_value_dims": (KINDS["attention_value_dims"], [8, 8, 8]),
    "both_blocks": (BOTH_BLOCKS, [1, 1, 1]),
}


@pytest.fixture(params=ADDED)
def added(request, monkeypatch):
    """Name of a kind that is put into the table, and what makes a student that may have it, in eval mode."""
    kind, sizes = ADDED[request.param]
    monkeypatch.setitem(KINDS, request.param, kind)
    return request.param, lambda layout: build_student(tiny_teacher(layout)).eval(), sizes


def with_random_gates(student, kinds):
    student.add_gates(kinds)
    generator = torch.Generator().manual_seed(0)
    for name, gate in student.named_gates():
        gate.log_alpha.data = 2 * torch.randn(gate.size, generator=generator) - 0.5
        if name == "encoder.layers.1.both_gate":
            gate.log_alpha.data.fill_(-9)
    return student


def total(budget, student) -> int:
    """What is counted of the student for real, where it can be."""
    counts = {ParameterBudget: num_parameters, MacBudget: num_macs}
    return counts.get(type(budget), budget.total)(student)


@pytest.mark.parametrize("others", [[], list(KINDS)], ids=["alone", "with_all_others"])
def test_added_kind_is_gated_counted_and_pruned(added, layout, others):
    kind, make, sizes = added
    student = with_random_gates(make(layout), list(dict.fromkeys([*others, kind])))
    if kind == "attention_value_dims":  # and a layer that has no head left
        heads = dict(student.named_gates()).get("encoder.layers.2.attention.head_gate")
        if heads is not None:
            heads.log_alpha.data.fill_(-9)
    suffix = {"both_blocks": "both_gate", "attention_value_dims": "value_gate"}[kind]
    assert sum(name.endswith(suffix) for name, _ in student.named_gates()) == 3
    assert sizes_of(student.config)[kind] == sizes
    gated = copy.deepcopy(student)
    expected = [cost_after_pruning(student, budget.unit_costs(student)) for budget in BUDGETS]
    student.prune()
    assert [total(budget, student) for budget in BUDGETS] == expected
    assert num_parameters(student) < num_parameters(gated)
    assert sizes_of(student.config)[kind] != sizes
    assert_same_hidden_states(gated, student, padded_batch(), atol=1e-4)
    # Once more, from what is left.
    student = with_random_gates(student, list(dict.fromkeys([*others, kind])))
    gated, expected = copy.deepcopy(student), cost_after_pruning(student, ParameterBudget().unit_costs(student))
    student.prune()
    assert num_parameters(student) == expected
    assert_same_hidden_states(gated, student, padded_batch(), atol=1e-4)


def test_expected_size_of_added_kind_is_the_mean_over_all_architectures(added, layout):
    """Every gate of two kinds is open or closed for certain in each of them; the cut is counted for real."""
    kind, make, _ = added
    student = make(layout)
    student.add_gates(["attention_blocks", kind])
    gates = dict(student.named_gates())
    generator = torch.Generator().manual_seed(0)
    for gate in gates.values():
        gate.min_open = 0
        gate.log_alpha.data = torch.randn(gate.size, generator=generator)
    # Of a layer's value dimensions their number alone counts: with all but one for certain, one is left to chance.
    for name, gate in gates.items():
        if name.endswith("value_gate"):
            gate.log_alpha.data[1:] = 60.0
    chances = [(name, 0) for name in gates]
    mean = 0.0
    for choice in range(2 ** len(chances)):
        sampled, probability = copy.deepcopy(student), 1.0
        for bit, (name, index) in enumerate(chances):
            is_open = bool(choice >> bit & 1)
            chance = gates[name].open_probability()[index].item()
            probability *= chance if is_open else 1 - chance
            dict(sampled.named_gates())[name].log_alpha.data[index] = 60.0 if is_open else -60.0
        sampled.prune()
        mean += probability * num_parameters(sampled)
    assert num_expected_parameters(student).item() == pytest.approx(mean, rel=1e-6)
    expected_cost(student, ParameterBudget().unit_costs(student)).backward()
    assert all((gate.log_alpha.grad[:1] > 0).all() for gate in gates.values())


def test_added_kind_meets_a_target_and_shrinks(added, layout):
    kind, make, _ = added
    student = with_random_gates(make(layout), ["ffn_dims", kind])
    whole, costs = num_parameters(make(layout)), ParameterBudget().unit_costs(student)
    wanted = max(round(0.8 * whole), min_cost(student, costs))
    fit_gates(student, wanted, costs)
    for _, gate in student.named_gates():
        gate.log_alpha.data = torch.where(gate.log_alpha < 0, -40.0, 40.0)
        gate.shift = 0.0
    gated, left = copy.deepcopy(student), cost_after_pruning(student, costs)
    assert cut_closed_units(student, 0, costs) is not None
    assert cost_after_pruning(student, ParameterBudget().unit_costs(student)) == left
    assert_same_hidden_states(gated, student, padded_batch(), atol=1e-4)
    student.prune()
    assert num_parameters(student) == left
    assert_same_hidden_states(gated, student, padded_batch(), atol=1e-4)


def test_added_kind_is_in_recipe_card_figure_and_info(added, tmp_path):
    kind, make, sizes = added
    assert SkillConfig(pruning_units=[kind]).pruning_units == [kind]
    with pytest.raises(ValueError, match=f"`pruning_units`.*{kind}"):
        SkillConfig(pruning_units=["neurons"])
    with pytest.raises(ValueError, match=f"`units` must be one or more of .*{kind}"):
        make("base").add_gates(["neurons"])
    student = with_random_gates(make("base"), [kind])
    student.prune()
    left, label = sizes_of(student.config)[kind], KINDS[kind].label.capitalize()
    titles = {axes.get_title(): axes for axes in plot_architecture(student.config, tiny_config()).axes}
    bars = titles[f"{label} per layer"].containers
    assert [[bar.get_height() for bar in container] for container in bars] == [sizes, left]
    if kind == "both_blocks":  # a card is for the classes of this package
        lines = str(student_card(student)).splitlines()
        first = lines.index("| Layer | Attention heads | Feed-forward units | Pairs of blocks |") + 2
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[first : first + 3]]
        assert [row[-1] for row in rows] == [f"{number} of 1" for number in left]
        student.save_pretrained(tmp_path / "student")
        tiny_teacher().save_pretrained(tmp_path / "teacher")
        assert describe(str(tmp_path / "student"))["teacher"][kind] == sizes  # from its own config
        info = describe(str(tmp_path / "student"), str(tmp_path / "teacher"))
        assert (info[kind], info["teacher"][kind]) == (left, sizes)
        lines = format_text(info).splitlines()
        first = next(index for index, line in enumerate(lines) if line.startswith("layer ")) + 1
        assert lines[first - 1].split() == [
            "layer",
            "attention",
            "heads",
            "feed-forward",
            "units",
            "pairs",
            "of",
            "blocks",
        ]
        shares = [f"{number} of 1  {100 * number:5.1f} %" for number in left]
        assert [line[-len(shares[0]) :] for line in lines[first : first + 3]] == shares


# ---- The table itself ----
@pytest.mark.parametrize("config", [tiny_config(), student_config(tiny_config())], ids=["teacher", "student"])
def test_units_of_an_unpruned_model(config):
    assert sizes_of(config) == {
        "conv_channels": [16] * 7,
        "attention_heads": [4] * 3,
        "ffn_dims": [48] * 3,
        "attention_blocks": [1] * 3,
        "ffn_blocks": [1] * 3,
        "layers": [1] * 3,
        "attention_value_dims": [8] * 3,
    }
    gates = [group.gate for group in units_of(config)]
    assert gates[:2] == [f"feature_extractor.conv_layers.{index}.channel_gate" for index in range(2)]
    blocks = ("attention.head_gate", "attention.block_gate", "attention.value_gate")
    blocks += ("feed_forward.dim_gate", "feed_forward.block_gate")
    assert gates[7:13] == [f"encoder.layers.0.{name}" for name in ("layer_gate", *blocks)]
    assert len(set(gates)) == len(gates) == 7 + 3 * 6


def test_every_prunable_tensor_is_of_the_student(layout):
    """A name that is misspelt in the table would be ignored as one that a family does not have."""
    student = build_student(tiny_teacher(layout))
    names = {*student.state_dict()}
    groups = units_of(student.config)
    absent = {name for name in units.parts_of(groups) if name not in names and not name.endswith(".log_alpha")}
    absent = {name.rpartition("layers.")[2].partition(".")[2] for name in absent}
    absent = {name for name in absent if not name.startswith("adapter_layer.")}  # some wav2vec 2.0 have it
    no_conv_bias = {"conv.bias"} if layout == "base" else set()
    no_norm = {"layer_norm.weight", "layer_norm.bias"} if layout == "base" else set()
    assert absent == no_conv_bias | no_norm | {
        f"{block}.output_bias.{part}" for block in ("attention", "feed_forward") for part in ("weight", "bias")
    }
    kept = {name for name in names if name not in units.parts_of(groups)}
    kept = {re.sub(r"layers\.\d\.", "layers.N.", name).removeprefix("encoder.") for name in kept}
    parametrized = {f"pos_conv_embed.conv.parametrizations.weight.original{index}" for index in range(2)}
    assert kept == parametrized | {
        "masked_spec_embed",
        "feature_projection.projection.bias",
        "pos_conv_embed.conv.bias",
        "layers.N.attention.rel_attn_embed.weight",
        "layer_norm.weight",
        "layer_norm.bias",
    }


@pytest.mark.parametrize("kind", KINDS)
def test_recorded_units_are_found_again(kind):
    config = student_config(tiny_config())
    kept = [list(range(size)[place % 2 :: 2]) for place, size in enumerate(sizes_of(config)[kind])]
    for place in reversed(range(len(kept))):
        KINDS[kind].record(config, place, kept[place])
    places = units_in_teacher(config, 3)[kind]
    assert [0 if units is None else units.size for units in places] == list(map(len, kept))
