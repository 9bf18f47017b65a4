"""What the study compares: the methods, the conditions, and the order of the runs."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedConfig

from skill_hf import SkillConfig
from skill_hf.compression.units import DEFAULT_KINDS
from skill_hf.recipe.published_recipes import dphubert_layers
from skill_hf.recipe.schedule import FULL_LEARNING_RATES


HERE = Path(__file__).resolve().parent

SEEDS = (0, 1, 2, 3, 4)
TEACHERS = {"wavlm": HERE / "teacher", "hubert": HERE.parent / "demo" / "teacher-hubert"}
# What all students share, beside the defaults of the recipe.
COMMON = {"calibration_samples": 256, "calibration_seconds": 2.5}

# Name -> number of layers -> what differs from the default recipe, which is SKILL's.
METHODS: dict[str, Callable[[int], dict]] = {
    "SKILL": lambda layers: {},
    # As published: its first layer has a projection of its own, the others share one.
    "DPHuBERT": lambda layers: {"layer_groups": dphubert_layers(layers), "projection_groups": [[0], [1, 2, 3]]},
    "DPHuBERT's layers": lambda layers: {"layer_groups": dphubert_layers(layers)},
    "DistilHuBERT": lambda layers: {"layer_groups": dphubert_layers(layers)[1:], "student_layers": "last"},
    "last layer": lambda layers: {"layer_groups": [[layers]]},
    "every layer": lambda layers: {"layer_groups": [[layer] for layer in range(layers + 1)]},
    "one group": lambda layers: {"layer_groups": [list(range(layers + 1))]},
    # Two groups of neighbours as SKILL's, but cut elsewhere: are its clusters better than any two targets?
    "early cut": lambda layers: {"layer_groups": consecutive(layers, round(layers / 4) + 1)},
    "late cut": lambda layers: {"layer_groups": consecutive(layers, round(3 * layers / 4) + 1)},
    # Groups of very different sizes.
    "first two apart": lambda layers: {"layer_groups": consecutive(layers, 2)},
    "first apart": lambda layers: {"layer_groups": consecutive(layers, 1, layers // 2 + 1)},
}
# DistilHuBERT as published: its loss, and a student that starts as the first two layers and is not pruned.
SHAPE = "two layers"
METHODS[SHAPE] = METHODS["DistilHuBERT"]
BASELINES = (
    *("SKILL + 6 clusters", "SKILL + projections", "DPHuBERT", "DPHuBERT's layers", "DistilHuBERT", "last layer"),
    *("every layer", "one group", "early cut", "late cut"),
)
UNEQUAL = ("first two apart", "first apart")

# Name -> steps of stage 1 -> what it changes in a method.
OPTIONS: dict[str, Callable[[int], dict]] = {
    # As in SKILL, one for each group; or one for both groups that SKILL finds in these teachers.
    "projections": lambda joint: {"use_projections": True},
    "shared projection": lambda joint: {"projection_groups": [[0, 1]]},
    # Silhouette finds two.
    "4 clusters": lambda joint: {"num_clusters": 4},
    "6 clusters": lambda joint: {"num_clusters": 6},
    "by size": lambda joint: {"group_weights": "size"},
    "normalised": lambda joint: {"normalize_states": True},
    # DPHuBERT's, in proportion to its 50 000 steps, and its multipliers.
    "short ramp": lambda joint: {"sparsity_warmup_steps": joint // 10},
    "learned multipliers": lambda joint: {"lagrange_multiplier": "learned"},
    "value dimensions": lambda joint: {"pruning_units": [*DEFAULT_KINDS, "attention_value_dims"]},
    "blocks": lambda joint: {"pruning_units": [*DEFAULT_KINDS, "attention_blocks", "ffn_blocks"]},
    "layers": lambda joint: {"pruning_units": [*DEFAULT_KINDS, "layers"]},
    # The other teacher of [`TEACHERS`] is a second one.
    "two teachers": lambda joint: {"teacher_targets": "separate"},
    "shrinking": lambda joint: {"shrink_steps": max(joint // 16, 1)},
    "masked": lambda joint: {"student_mask_prob": 0.2},
    # In half of the clips of the student's batches ([`SECOND_SPEAKER`]).
    "second speaker": lambda joint: {},
}
SECOND_SPEAKER = {"mixing_prob": 0.5}
# Options that won nothing and are no longer part of the recipe: a group of all layers beside the others, with half of
# the loss or with a share that rises with the sparsity; predictions from a learned mixture of the student's layers; a
# sparsity that rises fast at first.
REMOVED = ("half root", "rising root", "mixture", "cubic ramp")

# Name -> steps -> those after the cut. The published recipe has a third of all.
STAGES: dict[str, Callable[[int], int]] = {
    "equal stages": lambda steps: steps // 2,
    "longer first stage": lambda steps: steps // 3,
}

# Tuning by hand: learning rates of the student and of the gates, times those of the default recipe; or the default
# rates of post-norm teachers for others.
POST_NORM = "post-norm rates"
TUNED = {
    POST_NORM: (1.0, 1.0),
    "rates halved": (0.5, 1.0),
    "rates doubled": (2.0, 1.0),
    "gates halved": (1.0, 0.5),
    "gates doubled": (1.0, 2.0),
}
# Learned multipliers, ramp and learning rates of the published recipe, in a run that is as short as the others.
PUBLISHED = "as published"
SHORT_STEPS = (60, 150, 600)


def consecutive(layers: int, *starts: int) -> list[list[int]]:
    """The hidden states 0 to `layers` in groups of neighbours; all but the first begin at `starts`."""
    bounds = [0, *starts, layers + 1]
    return [list(range(low, high)) for low, high in zip(bounds, bounds[1:], strict=False)]


def recipe(name: str, sparsity: float, steps: int, shape: PreTrainedConfig) -> tuple[SkillConfig, float]:
    """
    The recipe of a student, and the learning rate of its first stage.

    Args:
        name (`str`): one of [`METHODS`], perhaps with some of [`OPTIONS`], one of [`STAGES`], and one of [`TUNED`] or
            [`PUBLISHED`]: `SKILL + by size + normalised`.
        sparsity (`float`): share of the parameters to remove.
        steps (`int`): optimizer steps of both stages.
        shape ([`~transformers.PreTrainedConfig`]): of the teacher.

    Raises:
        `KeyError`: if there is no such method or option.
    """
    method, *options = name.split(" + ")
    fields = {"target_sparsity": sparsity, **COMMON, **METHODS[method](shape.num_hidden_layers)}
    stages = ["longer first stage"] if PUBLISHED in options else [option for option in options if option in STAGES]
    for option in stages:
        fields["final_steps"] = STAGES[option](steps)
    joint = SkillConfig(**fields).resolve_steps(steps).joint
    if PUBLISHED in options:
        fields |= {"sparsity_warmup_steps": joint // 10, "final_warmup_steps": None}
        return SkillConfig.skill(**fields), FULL_LEARNING_RATES[0]
    default = SkillConfig(target_sparsity=sparsity)
    pre_norm = shape.do_stable_layer_norm and POST_NORM not in options
    first, final = default.resolve_learning_rates(None, steps, shape.hidden_size, pre_norm=pre_norm)
    for option in options:
        if option in TUNED:
            of_student, of_gates = TUNED[option]
            first *= of_student
            fields["final_learning_rate"] = of_student * final
            fields["gate_learning_rate"] = of_gates * SkillConfig().resolve_gate_learning_rate(joint)
        elif option not in STAGES:
            fields |= OPTIONS[option](joint)
    if method == SHAPE:
        fields["final_steps"] = steps
    return SkillConfig(**fields), first


@dataclass(frozen=True)
class Condition:
    """What students that are compared share: name of the teacher, target sparsity, steps of both stages."""

    teacher: str
    sparsity: float
    steps: int = 240

    @property
    def label(self) -> str:
        return f"{self.sparsity:g}" + ("" if self.steps == 240 else f", {self.steps} steps")


@dataclass(frozen=True)
class Student:
    """One run of the study."""

    method: str
    condition: Condition
    seed: int

    @property
    def key(self) -> str:
        condition = self.condition
        return f"{condition.teacher}, {condition.sparsity:g}, {condition.steps}, {self.method}, {self.seed}"

    @classmethod
    def of_key(cls, key: str) -> "Student":
        teacher, sparsity, steps, method, seed = key.split(", ")
        return cls(method, Condition(teacher, float(sparsity), int(steps)), int(seed))


@dataclass(frozen=True)
class Block:
    """Students that are run one after another; seeds take turns, so that a study that is stopped compares all."""

    methods: tuple[str, ...]
    conditions: tuple[Condition, ...]
    seeds: tuple[int, ...]
    with_tasks: bool = False

    def __iter__(self) -> Iterator[Student]:
        for seed in self.seeds:
            for condition in self.conditions:
                for method in self.methods:
                    yield Student(method, condition, seed)


def at(sparsity: float, steps: int = 240, teachers: tuple[str, ...] = tuple(TEACHERS)) -> tuple[Condition, ...]:
    return tuple(Condition(teacher, sparsity, steps) for teacher in teachers)


def in_short_runs(*steps: int) -> tuple[Condition, ...]:
    return tuple(condition for sparsity in (0.75, 0.9, 0.5) for number in steps for condition in at(sparsity, number))


# Sparsities that nearly use up what can be removed: 0.947 of the first teacher's parameters, 0.925 of the second's.
HIGHEST = (Condition("wavlm", 0.94), Condition("hubert", 0.92))
WEIGHTED = ("", " + by size", " + by size + normalised")
OF_SKILL = tuple(f"SKILL + {option}" for option in OPTIONS)
ROBUST = ("SKILL + masked", "SKILL + second speaker")
FEW = SEEDS[:3]
CHANGED = ("projections", PUBLISHED, *(name for name in TUNED if name != POST_NORM))
DEFAULTS = ("SKILL", *(f"SKILL + {option}" for option in CHANGED))
MAIN = ("SKILL", "SKILL + 6 clusters", "every layer", "one group", "DPHuBERT's layers")
# What matters most comes first.
BLOCKS = (
    Block((*MAIN, "DPHuBERT"), at(0.9, teachers=("wavlm",)), SEEDS, with_tasks=True),
    Block(MAIN, at(0.9, teachers=("hubert",)), SEEDS),
    Block(("SKILL + projections", "DPHuBERT", "SKILL + 4 clusters", "early cut", "late cut"), at(0.9), FEW),
    Block(("SKILL + shrinking",), at(0.9), FEW),
    Block((f"SKILL + {POST_NORM}",), at(0.9, teachers=("hubert",)), SEEDS),
    Block(DEFAULTS, in_short_runs(*SHORT_STEPS[:2]), (0,)),
    Block(("SKILL",), in_short_runs(*SHORT_STEPS[:2]), FEW),
    Block((*(group + way for group in UNEQUAL for way in WEIGHTED),), at(0.75, teachers=("wavlm",)), FEW),
    Block(("SKILL + blocks", "SKILL + layers"), at(0.9, teachers=("wavlm",)), FEW),
    Block((SHAPE, *ROBUST, "DistilHuBERT"), at(0.75, teachers=("wavlm",)), FEW),
    Block(OF_SKILL, at(0.9, teachers=("wavlm",)), FEW),
    Block((*MAIN, "DPHuBERT", "early cut", "late cut"), (*at(0.75), *at(0.5), *HIGHEST), FEW),
    Block((*MAIN, "DPHuBERT"), at(0.9, 960), FEW),
    Block(DEFAULTS, in_short_runs(*SHORT_STEPS), FEW),
    Block(OF_SKILL, (*at(0.75, teachers=("wavlm",)), *at(0.9, teachers=("hubert",))), FEW),
    Block((*MAIN, "SKILL + projections", "DPHuBERT"), at(0.9), SEEDS, with_tasks=True),
    Block(("SKILL", *BASELINES), (*at(0.9), *at(0.75), *at(0.5), *HIGHEST), SEEDS),
    Block(("SKILL", *BASELINES), at(0.9, 960), SEEDS),
)


def plan() -> dict[Student, bool]:
    """Every student, in order, and whether it is tested on tasks, too."""
    students: dict[Student, bool] = {}
    for block in BLOCKS:
        for student in block:
            students[student] = students.get(student, False) or block.with_tasks
    return students
