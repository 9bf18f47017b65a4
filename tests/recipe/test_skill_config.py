import dataclasses
import json
import math
import os

import numpy as np
import pytest
from transformers import HfArgumentParser, TrainingArguments

from skill_hf import SkillConfig
from skill_hf.recipe.schedule import GATE_TRAVEL, gate_travel
from skill_hf.recipe.skill_config import FIELD_KINDS
from skill_hf.recipe.skill_training_args import SkillTrainingArguments


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"target_sparsity": 0.0}, ["target_sparsity", "0.0"]),
        ({"target_sparsity": 1.0}, ["target_sparsity", "1.0"]),
        ({"target_sparsity": 1.5}, ["target_sparsity", "1.5"]),
        ({"target_sparsity": float("nan")}, ["target_sparsity", "nan"]),
        ({"num_clusters": 3, "distance_threshold": 0.2}, ["num_clusters", "distance_threshold"]),
        ({"num_clusters": 0}, ["num_clusters"]),
        ({"distance_threshold": 0.0}, ["distance_threshold"]),
        ({"similarity": "svcca"}, ["similarity", "mutual_knn"]),
        ({"linkage": "median"}, ["linkage", "ward"]),
        ({"student_layers": "first"}, ["student_layers"]),
        ({"pruning_units": ["heads"]}, ["pruning_units", "attention_heads"]),
        ({"pruning_units": []}, ["pruning_units"]),
        ({"layer_groups": [[0], []]}, ["layer_groups"]),
        ({"layer_groups": [[0, 0]]}, ["layer_groups"]),
        ({"layer_groups": "[[0]"}, ["layer_groups", "JSON"]),
        ({"layer_groups": [[0], [-1]]}, ["layer_groups"]),
        ({"layer_groups": [[0], [4]], "projection_groups": [[0]]}, ["projection_groups"]),
        ({"l1_weight": 0.0, "cosine_weight": 0.0}, ["l1_weight"]),
        ({"gate_learning_rate": -1.0}, ["gate_learning_rate"]),
        ({"budget": "joules"}, ["budget", "parameters, macs, latency", "joules"]),
        ({"budget_seconds": 0.0}, ["budget_seconds", "0.0"]),
        ({"budget_seconds": float("inf")}, ["budget_seconds", "inf"]),
        ({"calibration_samples": 0}, ["calibration_samples"]),
        ({"calibration_seconds": float("inf")}, ["calibration_seconds"]),
    ],
)
def test_impossible_values_are_named(fields, names):
    with pytest.raises(ValueError) as error:
        SkillConfig(**fields)
    assert all(name in str(error.value) for name in names)
    assert "\n" not in str(error.value)


OPTIONAL = {field.name for field in dataclasses.fields(SkillConfig) if field.default is None}
TEXTS = ("similarity", "linkage", "student_layers", "teacher_targets", "budget", "latency_costs", "group_weights")
TEXTS += ("lagrange_multiplier",)
WHOLE = ("num_clusters", "calibration_samples", "width_multiple", "shrink_steps")
WHOLE += ("sparsity_warmup_steps", "final_steps", "final_warmup_steps")
FLAGS = ("contiguous", "include_embeddings", "shared_gate_noise", "normalize_states", "use_projections")
NUMBERS = ("distance_threshold", "calibration_seconds", "l1_weight", "l2_weight", "cosine_weight", "target_sparsity")
NUMBERS += ("budget_seconds", "gate_learning_rate", "final_learning_rate")
NUMBERS += ("student_mask_prob", "logits_weight", "logits_temperature", "task_weight")
SHARES = ("target_sparsity", "student_mask_prob")
LISTS = ("layer_groups", "projection_groups", "pruning_units")


def test_every_field_has_a_kind():
    names = {field.name for field in dataclasses.fields(SkillConfig)}
    assert names == set(FIELD_KINDS) == {*TEXTS, *WHOLE, *FLAGS, *NUMBERS, *LISTS}


@pytest.mark.parametrize("name", sorted(FIELD_KINDS))
@pytest.mark.parametrize(
    "value",
    [
        *(
            None,
            "some text",
            "",
            b"cka",
            math.nan,
            math.inf,
            -math.inf,
            -1,
            1j,
            10**400,
            object(),
            {},
            {"a": 1},
            [],
            (),
        ),
        *(True, "false", "3", 4.5, np.nan, np.array([1.0, 2.0]), [None], ["ffn_dims", 3], [["a"]], "[[" * 2000, {3}),
        *([["ffn_dims"]], [[True]], [[0.0]], ["ffn_dims", "ffn_dims"], print, float),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_a_value_of_another_type_is_one_line_that_names_the_field(name, value):
    fitting = value is None and name in OPTIONAL
    fitting |= value is True and name in FLAGS
    fitting |= value == 4.5 if name in NUMBERS and name not in SHARES and isinstance(value, float) else False
    fitting |= value == 10**400 and name in WHOLE if type(value) is int else False
    if fitting:
        SkillConfig(**{name: value})
        return
    with pytest.raises(ValueError) as error:
        SkillConfig(**{name: value})
    assert f"`{name}`" in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


def test_numbers_of_numpy_and_tuples_become_what_a_file_holds(tmp_path):
    """A run of hours must not end because its recipe is not JSON, or is not equal to its own checkpoint's."""
    given = {
        "num_clusters": np.int64(3),
        "target_sparsity": np.float32(0.5),
        "contiguous": np.bool_(True),
        "layer_groups": ((np.int32(0),), (np.int64(1), 2)),
        "pruning_units": ("ffn_dims", np.str_("attention_heads")),
        "calibration_seconds": 5,
    }
    recipe = SkillConfig(**given)
    assert (type(recipe.num_clusters), type(recipe.target_sparsity), type(recipe.contiguous)) == (int, float, bool)
    assert recipe.layer_groups == [[0], [1, 2]]
    recipe.save_pretrained(tmp_path)
    assert SkillConfig.from_pretrained(tmp_path) == recipe


@pytest.mark.parametrize(
    "content",
    [None, b"", b"{", b"[]", b"3", b"\xff\xfe{", b'{"target_sparsity": 7}', b'{"layer_groups": "x"}', b"[" * 100_000],
    ids=["missing", "empty", "cut off", "a list", "a number", "not UTF-8", "a value", "a group", "nested"],
)
def test_a_damaged_file_is_named(content, tmp_path):
    if content is not None:
        (tmp_path / "skill_config.json").write_bytes(content)
    with pytest.raises(ValueError, match="skill_config.json is not a recipe") as error:
        SkillConfig.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["/dev/zero", "costs.json"])
def test_a_recipe_of_others_names_no_file_of_this_machine(name, tmp_path):
    (tmp_path / "skill_config.json").write_text(json.dumps({"budget": "latency", "latency_costs": name}))
    with pytest.raises(ValueError, match="`latency_costs` must be the measured costs"):
        SkillConfig.from_pretrained(tmp_path)


def test_pipes_devices_and_large_files_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "skill_config.json")
    with pytest.raises(ValueError, match="not a regular file"):
        SkillConfig.from_pretrained(tmp_path)
    for path in ("/dev/zero", str(tmp_path / "skill_config.json"), str(tmp_path)):
        with pytest.raises(ValueError, match="`latency_costs`.*not a regular file"):
            SkillConfig(budget="latency", latency_costs=path)
    with open(tmp_path / "large.json", "wb") as file:
        file.truncate(2**25)
    with pytest.raises(ValueError, match="`latency_costs`.*bytes"):
        SkillConfig(budget="latency", latency_costs=str(tmp_path / "large.json"))


@pytest.mark.parametrize("directory", [None, 3, b"x", ["a"]])
def test_what_is_no_directory(directory):
    with pytest.raises(ValueError, match="is not a path|is not a recipe"):
        SkillConfig.from_pretrained(directory)


def test_a_warmup_of_the_full_recipe_set_by_hand_is_kept():
    with pytest.raises(ValueError, match="sparsity_warmup_steps.*5000.*250"):
        SkillConfig(sparsity_warmup_steps=5_000).resolve_steps(750)
    assert SkillConfig(sparsity_warmup_steps=5_000).resolve_steps(30_000).sparsity_warmup == 5_000
    assert SkillConfig().resolve_steps(3_000).sparsity_warmup == 500
    assert SkillConfig().resolve_steps(30_000).sparsity_warmup == 5_000
    assert SkillConfig(final_warmup_steps=5_000).resolve_steps(30_000).final_warmup == 5_000


def test_gates_learn_faster_in_short_runs():
    assert SkillConfig().resolve_gate_learning_rate(50_000) == 0.02
    for steps in (1, 40, 100, 400):
        assert gate_travel(SkillConfig().resolve_gate_learning_rate(steps), steps) == pytest.approx(GATE_TRAVEL)
    assert SkillConfig(gate_learning_rate=0.02).resolve_gate_learning_rate(40) == 0.02


def test_learning_rates_rise_in_short_runs_and_fall_with_the_width_that_is_left():
    assert SkillConfig().resolve_learning_rates(None, 75_000, 1024) == (2e-4, 1e-4)
    assert SkillConfig().resolve_learning_rates(None, 7_500, 1024) == (2e-4, 1e-4)
    wide, narrow = (SkillConfig().resolve_learning_rates(None, 150, width) for width in (1024, 256))
    assert np.divide(narrow, wide) == pytest.approx([4.0, 4.0])
    assert wide[0] > 2e-4 and wide[1] > 1e-4
    half, tenth = (SkillConfig(target_sparsity=s).resolve_learning_rates(None, 150, 256) for s in (0.5, 0.9))
    assert np.divide(tenth, half) == pytest.approx([5.0, 5.0])
    few, fewer = (SkillConfig(target_sparsity=s).resolve_learning_rates(None, 150, 256) for s in (0.95, 0.99))
    assert few == pytest.approx(fewer) and few[0] > tenth[0]
    for sparsity, factor in ((0.25, 1.0), (0.5, 1.0), (0.75, 2**0.5), (0.9, 5**0.5)):
        config = SkillConfig(target_sparsity=sparsity)
        post_norm, pre_norm = (
            config.resolve_learning_rates(None, 150, 256, pre_norm=is_pre) for is_pre in (False, True)
        )
        assert np.divide(pre_norm, post_norm) == pytest.approx([factor, factor])
    assert SkillConfig().resolve_learning_rates(None, 7_500, 1024, pre_norm=True) == (2e-4, 1e-4)
    by_hand = SkillConfig(final_learning_rate=0.0)
    assert (
        by_hand.resolve_learning_rates(0.5, 150, 256) == by_hand.resolve_learning_rates(0.5, 75_000, 768) == (0.5, 0)
    )


@pytest.mark.parametrize(
    "max_steps, expected",
    [
        (75_000, (50_000, 25_000, 5_000, 5_000)),
        (7_500, (5_000, 2_500, 2_500, 500)),
        # Runs with fewer steps are cut after a third of them, but not before step 50, if a third of them is left then.
        (7_497, (2_499, 4_998, 1_250, 1_000)),
        (750, (250, 500, 125, 100)),
        (150, (50, 100, 25, 20)),
        (100, (50, 50, 25, 10)),
        (75, (50, 25, 25, 5)),
        (60, (40, 20, 20, 4)),
        (1, (1, 0, 0, 0)),
    ],
)
def test_steps_fit_the_run(max_steps, expected):
    assert dataclasses.astuple(SkillConfig().resolve_steps(max_steps)) == expected


def test_steps_that_are_set_by_hand_are_kept():
    config = SkillConfig(final_steps=100, sparsity_warmup_steps=40, final_warmup_steps=7)
    assert dataclasses.astuple(config.resolve_steps(150)) == (50, 100, 40, 7)
    assert SkillConfig(final_steps=0).resolve_steps(10).final == 0
    assert SkillConfig(final_steps=10).resolve_steps(10).joint == 0


@pytest.mark.parametrize(
    "fields", [{"final_steps": 200}, {"sparsity_warmup_steps": 101}, {"final_steps": 50, "final_warmup_steps": 60}]
)
def test_steps_that_do_not_fit(fields):
    with pytest.raises(ValueError, match="steps"):
        SkillConfig(**fields).resolve_steps(150)


def test_save_and_load(tmp_path):
    recipe = SkillConfig(layer_groups=[[0], [4, 5]], projection_groups=[[0, 1]], target_sparsity=0.5, budget="macs")
    recipe.save_pretrained(tmp_path)
    assert SkillConfig.from_pretrained(tmp_path) == recipe
    path = tmp_path / "skill_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"of_a_later_version": 1}))
    assert SkillConfig.from_pretrained(tmp_path) == recipe


SHARED = {"layer_groups": [[0], [4, 5]], "projection_groups": [[0, 1]]}


@pytest.mark.parametrize(
    "fields, with_one, with_two",
    [
        ({}, False, True),
        ({"teacher_targets": "separate"}, False, False),
        ({"use_projections": False}, False, False),
        ({"use_projections": True, "teacher_targets": "separate"}, True, True),
        ({"student_layers": "last", "teacher_targets": "separate"}, True, True),
        (SHARED, True, True),
    ],
)
def test_projections_are_where_they_are_needed(fields, with_one, with_two):
    recipe = SkillConfig(**fields)
    assert (recipe.has_projections(), recipe.has_projections(2)) == (with_one, with_two)


@pytest.mark.parametrize("fields", [{"student_layers": "last"}, SHARED])
def test_projections_that_are_needed_cannot_be_left_out(fields):
    with pytest.raises(ValueError, match="`use_projections` is False, but"):
        SkillConfig(**fields, use_projections=False)


def test_recipes_of_before_projections_could_be_left_out_have_them(tmp_path):
    SkillConfig().save_pretrained(tmp_path)
    assert SkillConfig.from_pretrained(tmp_path) == SkillConfig()
    path = tmp_path / "skill_config.json"
    fields = json.loads(path.read_text())
    del fields["use_projections"]
    path.write_text(json.dumps(fields))
    assert SkillConfig.from_pretrained(tmp_path) == SkillConfig(use_projections=True)


def test_recipes_of_before_there_were_budgets(tmp_path):
    path = tmp_path / "skill_config.json"
    fields = SkillConfig(target_sparsity=0.5).to_dict()
    path.write_text(json.dumps({name: value for name, value in fields.items() if not name.startswith("budget")}))
    assert SkillConfig.from_pretrained(tmp_path) == SkillConfig(target_sparsity=0.5, budget="parameters")


def test_every_field_comes_from_a_command_line():
    line = "--layer_groups [[0],[4]] --num_clusters 2 --contiguous --pruning_units ffn_dims ffn_blocks --final_steps 3"
    line += " --budget macs --budget_seconds 2.5"
    (recipe,) = HfArgumentParser(SkillConfig).parse_args_into_dataclasses(line.split())
    assert recipe.layer_groups == [[0], [4]]
    assert recipe.pruning_units == ["ffn_dims", "ffn_blocks"]
    assert (recipe.num_clusters, recipe.contiguous, recipe.final_steps) == (2, True, 3)
    assert (recipe.budget, recipe.budget_seconds) == ("macs", 2.5)


@pytest.mark.parametrize("cls", [SkillConfig, SkillTrainingArguments])
def test_the_help_of_each_field_is_what_the_docstring_says(cls):
    described = " ".join((cls.__doc__ or "").replace("`", "").replace("[", "").replace("]", "").split())
    own = [field for field in dataclasses.fields(cls) if field.name in vars(cls)["__annotations__"]]
    assert len(own) >= 8
    for field in own:
        text = field.metadata["help"].replace("[", "").replace("]", "").replace("%%", "%")  # as argparse shows it
        assert text.endswith(".") and text.removesuffix(".").split("skill_hf.")[0] in described, field.name
    stock = {field.name: field.metadata.get("help") for field in dataclasses.fields(TrainingArguments)}
    assert all(stock.get(field.name) != field.metadata["help"] for field in own)  # the class itself is unchanged
