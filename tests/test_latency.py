"""`budget="latency"`: costs from measurements, and from there to a student that meets its target."""

import copy
import json
import re

import datasets
import numpy as np
import pytest
import torch
import yaml
from conftest import LAYOUTS, family_config, tiny_config, tiny_teacher
from example_helpers import command_line, run_main
from short_distillation import on_folder, results_of, write_inputs
from test_pruning import ALL_UNITS, gated_student
from test_skill_trainer import Kill, KillAt, make_trainer
from transformers import AutoModel, BertConfig

from skill_hf import SkillConfig
from skill_hf.cli import distill
from skill_hf.compression.budgets import LatencyBudget
from skill_hf.compression.pruning import cost_after_pruning, expected_cost, fit_gates, min_cost
from skill_hf.latency import draw_architecture, fit_costs, fit_latency, measure_parts
from skill_hf.models.families import STUDENT_CLASSES, build_student, student_config
from skill_hf.recipe.latency_costs import architecture_differences, architecture_of


import calibrate_latency  # noqa: E402  # isort: skip

MEASURED = [kind for kind in ALL_UNITS if kind != "attention_value_dims"]
MEASURED_SETS = [[kind] for kind in MEASURED] + [MEASURED]

# Of every kind another number.
PICOSECONDS = {
    "channel_pairs": [70_000_000, 3_000_000, 2_000_000, 1_100_000, 700_000, 500_000, 300_000],
    "conv_channels": [9_000_000, 8_000_000, 7_000_000, 6_000_000, 5_000_000, 4_000_000, 3_000_000],
    "projection": 2_500_000,
    "attention_heads": 150_000_000,
    "any_head": 40_000_000,
    "ffn_dims": 6_000_000,
    "any_ffn_dim": 20_000_000,
    "fixed": 900_000_000,
}


def latency_costs(layout="base", **kwargs) -> dict:
    return {
        "picoseconds": PICOSECONDS,
        "architecture": architecture_of(tiny_config(layout, **kwargs)),
        "measured_on": {"device": "abacus", "dtype": "float32", "num_threads": 1, "batch_size": 1, "seconds": 2.0},
    }


def with_costs(**costs) -> dict:
    return latency_costs() | {"picoseconds": PICOSECONDS | costs}


def seconds_by_hand(config, constants: float) -> dict[str, float]:
    """What `measure_parts` would find if time were linear; each convolution and the projection has a constant, too."""
    costs, channels = PICOSECONDS, [1, *config.conv_dim]
    picoseconds = {"projection": costs["projection"] * channels[-1] + constants}
    for index, (before, after) in enumerate(zip(channels, channels[1:], strict=False)):
        # Half of what a channel costs besides is for its maker, half for its reader; the last one has none.
        own = costs["conv_channels"][index] / (2 if index < 6 else 1)
        read = costs["conv_channels"][index - 1] / 2 * before if index else 0
        picoseconds[f"convolution.{index}"] = after * (before * costs["channel_pairs"][index] + own) + read + constants
    for index, (heads, units) in enumerate(zip(config.remaining_heads, config.intermediate_sizes, strict=True)):
        attention = costs["attention_heads"] * len(heads) + costs["any_head"] * bool(heads)
        # The first layer makes the position bias.
        picoseconds[f"attention.{index}"] = attention + (index == 0) * constants
        picoseconds[f"feed_forward.{index}"] = costs["ffn_dims"] * units + costs["any_ffn_dim"] * bool(units)
    picoseconds["whole"] = sum(picoseconds.values()) + costs["fixed"] - 9 * constants
    return {name: value * 1e-12 for name, value in picoseconds.items()}


def drawn(layout="base", number=24, seed=0) -> list:
    rng = np.random.default_rng(seed)
    config = student_config(tiny_config(layout, conv_dim=(48,) * 7, num_attention_heads=8))
    return [draw_architecture(config, rng) for _ in range(number)]


# ------------------------------------------------------------------------------------------------------------- the fit
def test_costs_are_recovered_from_linear_times():
    architectures = drawn()
    costs = fit_costs(architectures, [seconds_by_hand(config, constants=90e6) for config in architectures])
    budget = LatencyBudget(copy.deepcopy(costs))
    # The waveform is one channel: what its pairs cost and what the first channels cost besides is the same.
    costs["channel_pairs"][0] += costs["conv_channels"][0]
    known = copy.deepcopy(PICOSECONDS)
    known["channel_pairs"][0] += known["conv_channels"][0]
    known["conv_channels"][0] = costs["conv_channels"][0]
    for name, value in known.items():
        assert costs[name] == pytest.approx(value, rel=1e-5), name
    for config in drawn(seed=1):
        assert budget.predict(config) * 1e-12 == pytest.approx(seconds_by_hand(config, 90e6)["whole"], rel=1e-6)


def test_costs_are_never_negative():
    architectures = drawn()
    timings = [seconds_by_hand(config, constants=0.0) for config in architectures]
    for timing, config in zip(timings, architectures, strict=True):
        timing["convolution.3"] = 1e-3  # whatever its width
        for layer, units in enumerate(config.intermediate_sizes):
            timing[f"feed_forward.{layer}"] = 1e-3 - units * 1e-6
    costs = fit_costs(architectures, timings)
    assert costs["channel_pairs"][3] == costs["ffn_dims"] == 0
    assert 0.9e9 < costs["any_ffn_dim"] < 1e9
    assert min(costs["conv_channels"]) >= 0


def test_drawn_architectures_are_narrower_students():
    whole = student_config(tiny_config())
    for config in drawn():
        student = STUDENT_CLASSES["wavlm"](config)
        assert all(1 <= channels <= 48 for channels in config.conv_dim)
        assert all(1 <= len(heads) <= 8 for heads in config.remaining_heads)
        assert all(1 <= units <= 48 for units in config.intermediate_sizes)
        assert student.num_parameters() > 0
    assert [config.to_dict() for config in drawn()] == [config.to_dict() for config in drawn()]
    assert len({tuple(config.conv_dim) for config in drawn()}) > 20
    assert whole.intermediate_sizes == [48] * 3


class Clock:
    """Stands still but for what `take` adds."""

    def __init__(self, monkeypatch):
        self.now, self.speed = 0.0, 1.0
        monkeypatch.setattr("skill_hf.latency.time.perf_counter", lambda: self.now)

    def take(self, seconds, slower=1.0):
        self.now += seconds * self.speed
        self.speed *= slower


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_time_is_that_of_the_part_that_takes_it(clock):
    student, other = (build_student(tiny_teacher()).eval() for _ in range(2))
    slow = student.encoder.layers[1].feed_forward
    slow.intermediate_dense.register_forward_hook(lambda *_: clock.take(3.0))
    student.encoder.layer_norm.register_forward_hook(lambda *_: clock.take(1.0))
    other.encoder.layer_norm.register_forward_hook(lambda *_: clock.take(10.0))
    with torch.no_grad():
        shares = measure_parts(student, other, torch.randn(2, 8000), num_runs=3)
    assert set(shares) == {
        "whole",
        "projection",
        "reference",
        *(f"convolution.{index}" for index in range(7)),
        *(f"{part}.{index}" for part in ("attention", "feed_forward") for index in range(3)),
    }
    expected = {"whole": 0.4, "feed_forward.1": 0.3, "reference": 10.0}
    assert shares == pytest.approx(dict.fromkeys(shares, 0.0) | expected)
    assert not student._forward_hooks and not slow._forward_hooks and not slow._forward_pre_hooks


def test_a_batch_that_the_convolutions_take_in_parts_is_measured_whole(clock):
    student, other = (build_student(tiny_teacher()).eval() for _ in range(2))
    student.feature_extractor.max_values = {"cpu": 1}
    student.feature_extractor.conv_layers[2].conv.register_forward_hook(lambda *_: clock.take(2.0))
    other.encoder.layer_norm.register_forward_hook(lambda *_: clock.take(10.0))
    with torch.no_grad():
        shares = measure_parts(student, other, torch.randn(3, 4000), num_runs=2)
    assert shares["convolution.2"] == pytest.approx(3 * 0.2)


def test_a_device_that_slows_down_changes_no_share(clock):
    student, other = (build_student(tiny_teacher()).eval() for _ in range(2))
    student.feature_projection.register_forward_pre_hook(lambda *_: clock.take(1.0, slower=1.5))
    student.encoder.layers[0].attention.register_forward_hook(lambda *_: clock.take(2.0, slower=1.5))
    other.feature_projection.register_forward_hook(lambda *_: clock.take(8.0, slower=1.5))
    with torch.no_grad():
        shares = measure_parts(student, other, torch.randn(1, 4000), num_runs=5)
    # The reference's 8 seconds are 1.5^-1 times as long before and 1.5^2 times after, by the speed at the first part.
    around = 8 * (1.5**-1 + 1.5**2) / 2
    assert shares["whole"] == pytest.approx((1 + 1.5 * 2) / around)
    assert shares["attention.0"] == pytest.approx(1.5 * 2 / around)


def test_measured_costs_make_a_recipe():
    layout, state, before = "large", torch.get_rng_state(), torch.get_num_threads()
    torch.set_num_threads(2)
    costs = fit_latency(
        tiny_config(layout),
        seconds=0.2,
        batch_size=2,
        dtype="bfloat16",
        num_threads=1,
        num_architectures=5,
        num_heldout=2,
        num_runs=1,
        progress=False,
    )
    assert torch.equal(state, torch.get_rng_state())
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)
    assert costs["measured_on"].pop("device")
    expected = {"dtype": "bfloat16", "num_threads": 1, "batch_size": 2, "seconds": 0.2}
    assert costs["measured_on"] == expected
    assert costs["errors"]["heldout"]["worst"] >= costs["errors"]["heldout"]["mean"] > 0
    assert costs["errors"]["fitted"]["worst"] >= costs["errors"]["unpruned"] > 0
    recipe = SkillConfig(budget="latency", latency_costs=costs)
    assert recipe.latency_costs == json.loads(json.dumps(costs)) == costs
    assert (
        costs["architecture"] == architecture_of(tiny_config(layout)) == architecture_of(tiny_teacher(layout).config)
    )
    assert LatencyBudget(costs["picoseconds"]).total(tiny_teacher(layout)) > costs["picoseconds"]["fixed"] >= 0


def test_costs_are_of_one_family_and_layout():
    for layout in LAYOUTS:
        measured = json.loads(json.dumps(architecture_of(family_config(layout))))
        for other in LAYOUTS:
            differing = architecture_differences(measured, family_config(other), 16_000)
            # Masking is nothing that takes time.
            assert bool(differing) == (layout != other and {layout, other} != {"wav2vec2-robust", "xls-r"}), (
                layout,
                other,
            )
    # What was measured before there were other families is of WavLM.
    before = {name: value for name, value in architecture_of(tiny_config()).items() if name != "family"}
    assert architecture_differences(before, tiny_config(), 16_000) == []


def test_students_of_another_family_are_measured():
    settings = {"seconds": 0.1, "num_architectures": 5, "num_heldout": 1, "num_runs": 1, "progress": False}
    costs = fit_latency(family_config("hubert-batch-norm", num_hidden_layers=1), num_threads=1, **settings)
    assert costs["architecture"]["family"] == "hubert" and costs["architecture"]["conv_pos_batch_norm"]


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"seconds": 0.01}, "`seconds` is 0.01, 160 samples.* 400 for one frame"),
        ({"batch_size": 0}, "`batch_size` must be at least 1"),
        ({"num_threads": 0}, "`num_threads` must be at least 1"),
        ({"num_architectures": 4}, "`num_architectures` must be at least 5"),
        ({"num_heldout": 0}, "`num_heldout` must be at least 1"),
        ({"dtype": "int8"}, "`dtype` must be one of float32, bfloat16, float16"),
        ({"device": "abacus"}, "`device` must be cpu or cuda"),
        ({"device": "meta"}, "`device` must be cpu or cuda"),
        ({"device": "cuda:99"}, "`device` is cuda:99, but"),
        ({"config": BertConfig()}, "is a `bert`"),
    ],
)
def test_impossible_measurements(kwargs, match):
    with pytest.raises(ValueError, match=match):
        fit_latency(**{"config": tiny_config()} | kwargs)


# ---------------------------------------------------------------------------------------------------------- the budget
@pytest.mark.parametrize("units", MEASURED_SETS, ids="-".join)
def test_gates_cost_what_the_pruned_student_takes(layout, units):
    budget, teacher = LatencyBudget(PICOSECONDS), tiny_teacher(layout)
    whole = seconds_by_hand(student_config(teacher.config), 0.0)["whole"] * 1e12
    assert budget.total(teacher) == budget.total(build_student(teacher)) == pytest.approx(whole, rel=1e-12)
    student = gated_student(layout, units)
    costs = budget.unit_costs(student)
    assert budget.total(student) == budget.total(teacher)
    expected_cost(student, costs).backward()
    assert all((gate.log_alpha.grad > 0).all() for _, gate in student.named_gates())
    for _, gate in student.named_gates():
        # Open or closed for certain: one of three is open, whole blocks are closed.
        gate.log_alpha.data = torch.where(torch.arange(gate.size) % 3 == 1, 60.0, -60.0)
    left = cost_after_pruning(student, costs)
    assert expected_cost(student, costs).item() == pytest.approx(left, rel=1e-9)
    student.prune()
    assert budget.total(student) == left < budget.total(teacher)
    assert left == pytest.approx(seconds_by_hand(student.config, 0.0)["whole"] * 1e12, rel=1e-12)


def test_a_feed_forward_block_without_units_takes_no_time():
    budget, student = LatencyBudget(PICOSECONDS), gated_student("base", ["ffn_dims"])
    costs, whole = budget.unit_costs(student), budget.total(student)
    for _, gate in student.named_gates():
        gate.log_alpha.data.fill_(-60.0)
    assert cost_after_pruning(student, costs) == whole - 3 * (48 * 6_000_000 + 20_000_000)
    student.prune()
    assert budget.total(student) == whole - 3 * (48 * 6_000_000 + 20_000_000)


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7])
def test_fit_gates_meets_the_time(layout, sparsity):
    budget, student = LatencyBudget(PICOSECONDS, 3.0, 2), gated_student(layout, ALL_UNITS[:3])
    costs, whole = budget.unit_costs(student), budget.total(tiny_teacher(layout))
    fit_gates(student, round((1 - sparsity) * whole), costs)
    student.prune()
    assert abs(budget.total(student) / whole - (1 - sparsity)) < 0.005
    student = gated_student(layout, ["ffn_dims"])
    costs = budget.unit_costs(student)
    with pytest.raises(
        ValueError, match="predicted picoseconds for 2 clips of 3 seconds of audio: the parts without gates"
    ):
        fit_gates(student, min_cost(student, costs) - 1, costs)


# ---------------------------------------------------------------------------------------------------------- the recipe
@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"latency_costs": None}, ["`budget` is latency", "no `latency_costs`", "calibrate_latency.py"]),
        ({"budget": "macs"}, ["`budget` is macs", "`latency_costs`"]),
        ({"latency_costs": "missing.json"}, ["latency_costs", "missing.json", "calibrate_latency.py"]),
        ({"latency_costs": {}}, ["latency_costs", "`picoseconds`", "channel_pairs"]),
        ({"latency_costs": [1]}, ["latency_costs", "`picoseconds`"]),
        ({"latency_costs": {"picoseconds": {1, 2}}}, ["latency_costs", "JSON"]),
        ({"latency_costs": latency_costs() | {"architecture": 3}}, ["`architecture`", "conv_kernel"]),
        ({"latency_costs": latency_costs() | {"measured_on": {"seconds": 1}}}, ["`measured_on`", "batch_size"]),
        (
            {"latency_costs": latency_costs() | {"measured_on": {"seconds": "1", "batch_size": 1}}},
            ["`seconds`", "above 0", "'1'"],
        ),
        ({"latency_costs": latency_costs() | {"architecture": {"conv_kernel": 3}}}, ["`conv_kernel`", "a list", "3"]),
        (
            {"latency_costs": with_costs(**{name: [0] * 7 if "chan" in name else 0 for name in PICOSECONDS})},
            ["`picoseconds`", "above 0"],
        ),
        ({"latency_costs": with_costs(ffn_dims=-3)}, ["`ffn_dims`", "at least 0", "-3"]),
        ({"latency_costs": with_costs(ffn_dims=1.5)}, ["`ffn_dims`", "integers", "1.5"]),
        ({"latency_costs": with_costs(ffn_dims=[1])}, ["`ffn_dims`", "[1]"]),
        ({"latency_costs": with_costs(channel_pairs=[1] * 6)}, ["`channel_pairs`", "7 convolutions"]),
        ({"latency_costs": with_costs(conv_channels=5)}, ["`conv_channels`", "7 convolutions", "5"]),
        ({"latency_costs": with_costs(conv_channels=[-1] * 7)}, ["`conv_channels`", "at least 0"]),
    ],
)
def test_recipes_without_the_right_costs(fields, names):
    with pytest.raises(ValueError) as error:
        SkillConfig(**{"budget": "latency", "latency_costs": latency_costs()} | fields)
    assert all(name in str(error.value) for name in names), error.value
    assert "\n" not in str(error.value)


def test_files_that_hold_no_costs(tmp_path):
    for text in ("{", "[]", '"a"'):
        (tmp_path / "latency.json").write_text(text)
        with pytest.raises(ValueError, match="`latency_costs`"):
            SkillConfig(budget="latency", latency_costs=str(tmp_path / "latency.json"))


def test_the_recipe_holds_what_the_file_holds(tmp_path):
    (tmp_path / "latency.json").write_text(json.dumps(latency_costs()))
    recipe = SkillConfig(budget="latency", latency_costs=str(tmp_path / "latency.json"))
    assert recipe.latency_costs == latency_costs()
    recipe.save_pretrained(tmp_path)
    (tmp_path / "latency.json").unlink()
    assert SkillConfig.from_pretrained(tmp_path) == recipe


@pytest.mark.parametrize(
    ("recipe", "match"),
    [
        ({"latency_costs": latency_costs(num_hidden_layers=2)}, "`num_hidden_layers` was 2, but is 3"),
        ({"latency_costs": latency_costs(num_attention_heads=2)}, "`num_attention_heads` was 2, but is 4"),
        ({"latency_costs": latency_costs("large")}, "`feat_extract_norm` was 'layer', but is 'group'"),
        ({"pruning_units": ["ffn_dims"]}, "ffn_dims.*predicted picoseconds for 2 seconds of audio can be removed"),
    ],
)
def test_costs_that_do_not_fit_the_teacher(tmp_path, clips, recipe, match):
    with pytest.raises(ValueError, match=match):
        make_trainer(tmp_path, clips, recipe={"budget": "latency", "latency_costs": latency_costs()} | recipe)


def test_a_run_ends_at_its_target(layout, tmp_path, clips, caplog):
    """Killed in stage 1 and resumed, with a card that tells what was measured."""
    teacher, budget = tiny_teacher(layout), LatencyBudget(PICOSECONDS, seconds=2.0)
    recipe = {"budget": "latency", "latency_costs": latency_costs(layout), "target_sparsity": 0.6}
    with pytest.raises(Kill):
        make_trainer(tmp_path, clips, teacher, recipe, [KillAt(3)]).train()
    other = copy.deepcopy(recipe)
    other["latency_costs"]["picoseconds"]["ffn_dims"] = 7_000_000
    with pytest.raises(
        ValueError, match=r"latency_costs.picoseconds.ffn_dims \(checkpoint: 6000000, now: 7000000\)\.$"
    ):
        make_trainer(tmp_path, clips, teacher, other).train(resume_from_checkpoint=True)
    with pytest.raises(
        ValueError, match=r"budget \(checkpoint: latency, .*; latency_costs \(checkpoint: .{,100}, now: None"
    ):
        make_trainer(tmp_path, clips, teacher).train(resume_from_checkpoint=True)
    trainer = make_trainer(tmp_path, clips, teacher, recipe)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.budget == budget
    assert trainer.teacher_cost == budget.total(teacher)
    share = budget.total(trainer.model) / budget.total(teacher)
    assert abs(share - 0.4) < 0.005
    assert "predicted picoseconds for 2 seconds of audio, but the target is" in caplog.text
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert rows[-1]["sparsity"] == pytest.approx(1 - share, abs=1e-6)
    trainer.save_model(str(tmp_path / "student"))
    assert SkillConfig.from_pretrained(tmp_path / "student").latency_costs == latency_costs(layout)
    card = (tmp_path / "student" / "README.md").read_text()
    assert f"the teacher's predicted picoseconds for 2 seconds of audio that was removed: {1 - share:.4f}" in card
    assert '| `latency_costs` | `{"device": "abacus", "dtype": "float32", "num_threads": 1,' in card


# --------------------------------------------------------------------------------------------------------- the command
@pytest.fixture
def shared(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return write_inputs(tmp_path)


@pytest.mark.nightly
def test_from_the_command_to_a_student(shared, tmp_path):
    file = tmp_path / "costs" / "latency.json"
    settings = {"teacher_name_or_path": shared / "teacher", "seconds": 0.2, "output": file}
    settings |= {"num_architectures": 6, "num_heldout": 2, "num_runs": 2, "num_threads": 1}
    status, lines, errors = run_main(calibrate_latency, settings)
    assert (status, errors) == (0, [])
    costs = json.loads(file.read_text())
    assert lines[0].split() == ["what", "microseconds"]
    assert lines[1].split()[-1] == f"{costs['picoseconds']['channel_pairs'][0] / 1e6:,.3f}"
    assert f"{100 * costs['picoseconds']['ffn_dims'] / 1e6:,.3f}" in {line.split()[-1] for line in lines}
    assert f"{costs['errors']['heldout']['mean']:.1f} % on average" in lines[-1]
    assert list(file.parent.iterdir()) == [file]

    # Times of so small a model are noise.
    file.write_text(json.dumps(costs | {"picoseconds": PICOSECONDS}))
    of_run = {"budget": "latency", "latency_costs": str(file), "save_strategy": "steps", "save_steps": 2}
    of_run["save_total_limit"] = 3
    settings = on_folder(shared, tmp_path / "out", **of_run)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(settings))
    assert distill.parse([str(recipe)]) == distill.parse(command_line(settings))
    inline = tmp_path / "recipe.json"
    inline.write_text(json.dumps(settings | {"latency_costs": json.loads(file.read_text())}))
    assert distill.parse([str(inline)]) == distill.parse(command_line(settings))
    assert distill.main([str(recipe)]) == 0
    results = results_of(tmp_path / "out")
    student = AutoModel.from_pretrained(tmp_path / "out")
    assert results["student_latency"] == LatencyBudget(PICOSECONDS).total(student)
    assert results["sparsity"] == pytest.approx(0.3, abs=0.005)
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()
    resume = {"resume_from_checkpoint": str(tmp_path / "out" / "checkpoint-2")}
    assert distill.main(command_line(settings | resume)) == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"seconds": 0.01}, "`seconds` is 0.01"),
        ({"dtype": "int8"}, "invalid choice: 'int8'"),
        ({"teacher_name_or_path": "/nowhere/teacher"}, "/nowhere/teacher.*cannot be loaded"),
    ],
)
def test_mistakes_are_one_line(tmp_path, settings, match):
    status, lines, (error,) = run_main(calibrate_latency, {"output": tmp_path / "latency.json", **settings})
    assert (status, lines) == (2, [])
    assert re.search(match, error)
    assert not list(tmp_path.iterdir())
