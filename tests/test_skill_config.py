import json

import pytest
from transformers import HfArgumentParser

from skill_hf import SkillConfig


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


def test_steps_shrink_in_proportion_unless_set_by_hand():
    steps = SkillConfig().resolve_steps(75_000)
    assert (steps.joint, steps.final, steps.sparsity_warmup, steps.final_warmup) == (50_000, 25_000, 5_000, 5_000)
    steps = SkillConfig().resolve_steps(750)
    assert (steps.joint, steps.final, steps.sparsity_warmup, steps.final_warmup) == (500, 250, 50, 50)
    steps = SkillConfig(final_steps=100, sparsity_warmup_steps=40, final_warmup_steps=7).resolve_steps(150)
    assert (steps.joint, steps.final, steps.sparsity_warmup, steps.final_warmup) == (50, 100, 40, 7)
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
