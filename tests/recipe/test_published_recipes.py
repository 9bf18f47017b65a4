"""The recipes of papers against what the papers state, field by field, and against other defaults."""

import dataclasses

import pytest

from skill_hf import SkillConfig
from skill_hf.recipe.published_recipes import dphubert_layers
from skill_hf.recipe.schedule import StageSteps
from skill_hf.recipe.skill_training_args import SkillTrainingArguments


LOSS = {"l1_weight": 1.0, "l2_weight": 0.0, "cosine_weight": 1.0, "normalize_states": False}
LOSS |= {"group_weights": "equal", "use_projections": True}
# arXiv 2305.17651, section 3.1.
PRUNING = {
    "target_sparsity": 0.75,
    "budget": "parameters",
    "sparsity_warmup_steps": 5_000,
    "pruning_units": ["conv_channels", "attention_heads", "ffn_dims"],
    "width_multiple": 1,
    "lagrange_multiplier": "learned",
    "gate_learning_rate": 0.02,
    "shared_gate_noise": False,
    "shrink_steps": 0,
    "final_steps": 25_000,
    "final_learning_rate": 1e-4,
    "final_warmup_steps": 5_000,
}
STATED = {
    "skill": LOSS | PRUNING | {"layer_groups": None, "projection_groups": None, "student_layers": "group"},
    "dphubert": LOSS
    | PRUNING
    | {"layer_groups": [[0], [4], [8], [12]], "projection_groups": [[0], [1, 2, 3]], "student_layers": "group"},
    "distilhubert": LOSS
    | {"layer_groups": [[4], [8], [12]], "projection_groups": None, "student_layers": "last"},
}  # fmt: skip
# A valid value of each field of the above that no paper has.
OTHER = {
    **{"l1_weight": 0.5, "l2_weight": 0.5, "cosine_weight": 0.5, "normalize_states": True, "group_weights": "size"},
    **{"use_projections": None},
    **{"target_sparsity": 0.1, "budget": "macs", "sparsity_warmup_steps": 7},
    **{"pruning_units": ["layers"], "width_multiple": 8, "gate_learning_rate": 0.5},
    **{"shared_gate_noise": True, "shrink_steps": 7, "final_steps": 7, "final_learning_rate": 0.5},
    **{"final_warmup_steps": 7, "layer_groups": [[1]], "projection_groups": [[0]]},
}


@pytest.mark.parametrize("name", STATED)
def test_fields_are_those_of_the_paper(name):
    recipe = getattr(SkillConfig, name)().to_dict()
    assert {field: recipe[field] for field in STATED[name]} == STATED[name]


@pytest.mark.parametrize("name", STATED)
def test_they_stay_when_defaults_change(name):
    other = OTHER | {"student_layers": "group" if name == "distilhubert" else "last"}
    Changed = dataclasses.make_dataclass(
        "Changed",
        [
            (field, object, dataclasses.field(default_factory=lambda value=value: value))
            for field, value in other.items()
        ],
        bases=(SkillConfig,),
    )
    assert Changed().l1_weight == 0.5 and Changed().student_layers == other["student_layers"]
    recipe = getattr(Changed, name)().to_dict()
    assert {field: recipe[field] for field in STATED[name]} == STATED[name]


@pytest.mark.parametrize("name", ["skill", "dphubert"])
def test_with_the_training_arguments_they_are_the_published_run(name, tmp_path):
    args = SkillTrainingArguments(output_dir=str(tmp_path))
    steps = getattr(SkillConfig, name)().resolve_steps(args.max_steps)
    assert steps == StageSteps(joint=50_000, final=25_000, sparsity_warmup=5_000, final_warmup=5_000)
    assert (args.get_warmup_steps(steps.joint), args.max_grad_norm) == (15_000, 10.0)
    rates = getattr(SkillConfig, name)().resolve_learning_rates(args.learning_rate, steps.total, hidden_size=768)
    assert rates == (2e-4, 1e-4)
    scaled = dict.fromkeys(["final_steps", "sparsity_warmup_steps", "final_warmup_steps", "gate_learning_rate"])
    short = getattr(SkillConfig, name)(**scaled)
    assert short.resolve_steps(7_500) == StageSteps(joint=5_000, final=2_500, sparsity_warmup=2_500, final_warmup=500)


@pytest.mark.parametrize("name", STATED)
def test_any_field_can_be_changed(name):
    recipe = getattr(SkillConfig, name)(target_sparsity=0.5, l2_weight=2.0, linkage="ward")
    assert (recipe.target_sparsity, recipe.l2_weight, recipe.linkage) == (0.5, 2.0, "ward")
    with pytest.raises(ValueError, match="`target_sparsity` must be"):
        getattr(SkillConfig, name)(target_sparsity=2.0)


def test_layers_are_scaled_to_the_depth():
    assert dphubert_layers(12) == [[0], [4], [8], [12]]
    assert dphubert_layers(24) == [[0], [8], [16], [24]]
    assert dphubert_layers(8) == [[0], [3], [5], [8]]
    assert SkillConfig.dphubert(24).layer_groups == [[0], [8], [16], [24]]
    assert SkillConfig.distilhubert(num_layers=8).layer_groups == [[3], [5], [8]]
    for wrong in (0, 2.0, "12", None):
        with pytest.raises(ValueError, match="`num_layers` must be an integer of at least 1"):
            SkillConfig.dphubert(wrong)
