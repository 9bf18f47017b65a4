"""`SkillConfig`: the recipe of one compression, every number of it."""

import dataclasses
import json
import math
import reprlib
from dataclasses import dataclass, field
from pathlib import Path


SIMILARITIES = ("cka", "cosine", "distillation", "mutual_knn")
LINKAGES = ("average", "single", "complete", "weighted", "ward")
PRUNING_UNITS = ("conv_channels", "attention_heads", "ffn_dims", "attention_blocks", "ffn_blocks")
STUDENT_LAYERS = ("group", "last")
BUDGETS = ("parameters", "macs", "latency")
# What `latency_costs` must hold; a cost is a number, of convolutions one for each.
COSTS_OF_CONVOLUTIONS = ("channel_pairs", "conv_channels")
COSTS = (*COSTS_OF_CONVOLUTIONS, "projection", "attention_heads", "any_head", "ffn_dims", "any_ffn_dim", "fixed")
LATENCY_ENTRIES = {"picoseconds": COSTS, "architecture": ("conv_kernel",), "measured_on": ("batch_size", "seconds")}

SKILL_CONFIG_NAME = "skill_config.json"

# The published recipe trains for 50 000 + 25 000 steps (DPHuBERT, arXiv 2305.17651, section 3.1).
FULL_STEPS = 75_000
FULL_FINAL_STEPS = 25_000
FULL_WARMUP_STEPS = 5_000  # of the sparsity target, and of the learning rate in the final stage


def _help(default, text: str):
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass
class SkillConfig:
    r"""
    Recipe of one compression: how layers are grouped, what may be pruned, how far, and what the losses weigh.

    The defaults are DPHuBERT's (arXiv 2305.17651) for pruning and distillation and this project's own for similarity
    and clustering, which the SKILL paper (arXiv 2402.16830) does not state. Usable with
    [`~transformers.HfArgumentParser`]; saved as `skill_config.json` beside every student.

    > Parameters that group the layers

    Args:
        similarity (`str`, *optional*, defaults to `"cka"`):
            Measure of how alike two teacher layers are: `cka`, `cosine`, `distillation` or `mutual_knn`.
        linkage (`str`, *optional*, defaults to `"average"`):
            Distance between two groups: `average`, `single`, `complete`, `weighted` or `ward`.
        num_clusters (`int`, *optional*):
            Number of groups to cut the tree into.
        distance_threshold (`float`, *optional*):
            Height (1 - similarity) to cut the tree at; without this and `num_clusters` the largest silhouette decides.
        contiguous (`bool`, *optional*, defaults to `False`):
            Whether groups must be runs of neighbouring layers.
        include_embeddings (`bool`, *optional*, defaults to `True`):
            Whether hidden state 0, the input of the first layer, is grouped too.
        layer_groups (`list[list[int]]`, *optional*):
            Groups of hidden-state indices set by hand, which switches clustering off; `[[0],[4],[8],[12]]` is
            DPHuBERT.
        projection_groups (`list[list[int]]`, *optional*):
            Indices of groups that share one projection, such as `[[0],[1,2,3]]`; by default each group has its own.
        student_layers (`str`, *optional*, defaults to `"group"`):
            What predicts a group: `group`, the mean of the student's same layers, or `last`, its last layer.
        calibration_samples (`int`, *optional*, defaults to 256):
            Number of training clips from which similarity is computed.
        calibration_seconds (`float`, *optional*, defaults to 10.0):
            Length in seconds that a calibration clip is cropped to.

    > Parameters of the loss

    Args:
        l1_weight (`float`, *optional*, defaults to 1.0):
            Weight of the mean absolute error.
        l2_weight (`float`, *optional*, defaults to 0.0):
            Weight of the mean squared error.
        cosine_weight (`float`, *optional*, defaults to 1.0):
            Weight of the negative cosine similarity.

    > Parameters of pruning and of the two stages

    Args:
        target_sparsity (`float`, *optional*, defaults to 0.75):
            Share of the teacher's parameters, or of what `budget` names, to remove, between 0 and 1, both excluded.
        budget (`str`, *optional*, defaults to `"parameters"`):
            What the target is a share of: `parameters`; `macs`, the multiply-accumulates of one clip; or `latency`,
            the time of one forward where `latency_costs` were measured. Convolutions run at a high frame rate, so they
            have few of the first and many of the others.
        budget_seconds (`float`, *optional*, defaults to 10.0):
            Length in seconds of the clip that `macs` are counted for; attention grows with its square. `latency` is
            that of clips of the length that was measured.
        latency_costs (`dict` or `str`, *optional*):
            What each unit costs in time, as [`~skill_hf.latency.fit_latency`] returns it, or the JSON file that
            `examples/calibrate_latency.py` has written, whose content becomes part of the recipe. Goes with
            `budget="latency"` and with no other.
        sparsity_warmup_steps (`int`, *optional*, defaults to 5000):
            Steps over which the target rises from 0; the default shrinks in proportion when a run is shorter than
            75000.
        pruning_units (`list[str]`, *optional*, defaults to `["conv_channels", "attention_heads", "ffn_dims"]`):
            What may be removed; `attention_blocks` and `ffn_blocks` as well.
        width_multiple (`int`, *optional*, defaults to 1):
            What the cut rounds the channels of convolutions and the units of feed-forward blocks to a multiple of;
            with 8 or 16 matrix products of half precision run on the tensor cores of GPUs.
        gate_learning_rate (`float`, *optional*, defaults to 0.02):
            Learning rate of the gates and of the Lagrange multipliers.
        shrink_steps (`int`, *optional*, defaults to 0):
            Every so many optimizer steps the first stage cuts the units that are closed for good and goes on with a
            smaller student, which takes less time and memory; 0 for never. Needs an optimizer whose state has the
            shapes of the parameters, such as AdamW, and no FSDP or DeepSpeed.
        final_steps (`int`, *optional*):
            Steps of the second stage, after the cut; a third of all steps by default.
        final_learning_rate (`float`, *optional*, defaults to 1e-4):
            Peak learning rate of the second stage.
        final_warmup_steps (`int`, *optional*, defaults to 5000):
            Learning-rate warm-up of the second stage; the default shrinks in proportion when that is below 25000
            steps.

    Example:

    ```python
    >>> from skill_hf import SkillConfig

    >>> recipe = SkillConfig(target_sparsity=0.5, num_clusters=4)
    >>> recipe.resolve_steps(max_steps=7_500)
    StageSteps(joint=5000, final=2500, sparsity_warmup=500, final_warmup=500)
    ```
    """

    similarity: str = _help("cka", "Measure of how alike two layers are: cka, cosine, distillation or mutual_knn.")
    linkage: str = _help("average", "Distance between two groups: average, single, complete, weighted or ward.")
    num_clusters: int | None = _help(None, "Number of groups to cut the tree into.")
    distance_threshold: float | None = _help(
        None, "Height (1 - similarity) to cut the tree at; without it and num_clusters the largest silhouette decides."
    )
    contiguous: bool = _help(False, "Whether groups must be runs of neighbouring layers.")
    include_embeddings: bool = _help(True, "Whether hidden state 0, the input of the first layer, is grouped too.")
    layer_groups: list[list[int]] | str | None = _help(
        None, "Groups of hidden-state indices set by hand, as JSON: [[0],[4],[8],[12]] is DPHuBERT."
    )
    projection_groups: list[list[int]] | str | None = _help(
        None, "Indices of groups that share one projection, as JSON: [[0],[1,2,3]]; by default each its own."
    )
    student_layers: str = _help("group", "What predicts a group: group (mean of the same layers) or last (layer).")
    calibration_samples: int = _help(256, "Number of training clips from which similarity is computed.")
    calibration_seconds: float = _help(10.0, "Length in seconds that a calibration clip is cropped to.")
    l1_weight: float = _help(1.0, "Weight of the mean absolute error.")
    l2_weight: float = _help(0.0, "Weight of the mean squared error.")
    cosine_weight: float = _help(1.0, "Weight of the negative cosine similarity.")
    target_sparsity: float = _help(
        0.75, "Share of the teacher's parameters, or of what budget names, to remove, between 0 and 1."
    )
    budget: str = _help(
        "parameters", "What the target is a share of: parameters, macs (multiply-accumulates) or latency (time)."
    )
    budget_seconds: float = _help(10.0, "Length in seconds of the clip that macs are counted for.")
    latency_costs: dict | str | None = _help(
        None, "JSON file of examples/calibrate_latency.py: what each unit costs in time. Goes with latency as budget."
    )
    sparsity_warmup_steps: int = _help(
        FULL_WARMUP_STEPS, "Steps over which the target rises from 0; the default shrinks with shorter runs."
    )
    pruning_units: list[str] = _help(
        ["conv_channels", "attention_heads", "ffn_dims"],
        "What may be removed: conv_channels, attention_heads, ffn_dims, attention_blocks, ffn_blocks.",
    )
    width_multiple: int = _help(
        1, "What the cut rounds widths of convolutions and feed-forward blocks to a multiple of, such as 8 or 16."
    )
    gate_learning_rate: float = _help(0.02, "Learning rate of the gates and of the Lagrange multipliers.")
    shrink_steps: int = _help(
        0, "Every so many steps the first stage cuts the units that are closed for good; 0 for never."
    )
    final_steps: int | None = _help(None, "Steps of the second stage, after the cut; a third of all steps by default.")
    final_learning_rate: float = _help(1e-4, "Peak learning rate of the second stage.")
    final_warmup_steps: int = _help(
        FULL_WARMUP_STEPS, "Learning-rate warm-up of the second stage; the default shrinks with shorter runs."
    )

    def __post_init__(self):
        self.layer_groups = _index_groups("layer_groups", self.layer_groups)
        self.projection_groups = _index_groups("projection_groups", self.projection_groups)
        self.latency_costs = _latency_costs(self.latency_costs)
        _one_of("similarity", self.similarity, SIMILARITIES)
        _one_of("linkage", self.linkage, LINKAGES)
        _one_of("student_layers", self.student_layers, STUDENT_LAYERS)
        _one_of("budget", self.budget, BUDGETS)
        if (self.budget == "latency") != (self.latency_costs is not None):
            raise ValueError(
                f"`budget` is {self.budget}, but there are {'no ' * (self.latency_costs is None)}`latency_costs`: they"
                " go with `latency` and with no other budget. examples/calibrate_latency.py measures them."
            )
        if not self.pruning_units:
            raise ValueError(f"`pruning_units` is empty; name at least one of {', '.join(PRUNING_UNITS)}.")
        for unit in self.pruning_units:
            _one_of("pruning_units", unit, PRUNING_UNITS)
        if self.num_clusters is not None and self.distance_threshold is not None:
            raise ValueError(
                f"`num_clusters` ({self.num_clusters}) and `distance_threshold` ({self.distance_threshold}) both cut"
                " the tree; set one of them or neither."
            )
        if not 0 < self.target_sparsity < 1:
            raise ValueError(
                f"`target_sparsity` must lie between 0 and 1, both excluded, but is {self.target_sparsity}."
            )
        for name in ("num_clusters", "calibration_samples", "width_multiple"):
            _at_least(name, getattr(self, name), 1)
        for name in ("sparsity_warmup_steps", "shrink_steps", "final_steps", "final_warmup_steps"):
            _at_least(name, getattr(self, name), 0)
        for name in ("l1_weight", "l2_weight", "cosine_weight", "gate_learning_rate", "final_learning_rate"):
            _at_least(name, getattr(self, name), 0)
        if self.l1_weight + self.l2_weight + self.cosine_weight == 0:
            raise ValueError("`l1_weight`, `l2_weight` and `cosine_weight` are all 0; at least one term must count.")
        for name in ("distance_threshold", "calibration_seconds", "budget_seconds"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"`{name}` must be above 0 and finite, but is {value}.")
        if self.projection_groups is not None and self.layer_groups is not None:
            self.validate_projection_groups(len(self.layer_groups))

    def validate_projection_groups(self, num_groups: int) -> None:
        """Raises a `ValueError` unless `projection_groups` names each of `num_groups` groups exactly once."""
        if self.projection_groups is None:
            return
        named = sorted(index for group in self.projection_groups for index in group)
        if named != list(range(num_groups)):
            raise ValueError(
                f"`projection_groups` must name each group from 0 to {num_groups - 1} exactly once, but is"
                f" {self.projection_groups}."
            )

    def resolve_steps(self, max_steps: int) -> "StageSteps":
        """
        The steps of both stages for a run of `max_steps` optimizer steps in all. Defaults shrink in proportion to the
        full recipe; what was set by hand is kept.

        Raises:
            `ValueError`: if a stage or its warm-up does not fit.
        """
        if max_steps < 1:
            raise ValueError(f"`max_steps` must be at least 1, but is {max_steps}.")
        final = self.final_steps
        if final is None:
            final = round(max_steps * FULL_FINAL_STEPS / FULL_STEPS)
        if final > max_steps:
            raise ValueError(
                f"`final_steps` ({final}) must not be above the steps of the run, `max_steps` ({max_steps})."
            )
        joint = max_steps - final
        full_joint = FULL_STEPS - FULL_FINAL_STEPS
        return StageSteps(
            joint=joint,
            final=final,
            sparsity_warmup=_fit_warmup("sparsity_warmup_steps", self.sparsity_warmup_steps, joint, full_joint),
            final_warmup=_fit_warmup("final_warmup_steps", self.final_warmup_steps, final, FULL_FINAL_STEPS),
        )

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes `skill_config.json` into `directory`."""
        text = json.dumps(self.to_dict(), indent=2) + "\n"
        (Path(directory) / SKILL_CONFIG_NAME).write_text(text, encoding="utf-8")

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> "SkillConfig":
        """Reads `skill_config.json` of `directory`; fields that this version does not know are left out."""
        fields = json.loads((Path(directory) / SKILL_CONFIG_NAME).read_text(encoding="utf-8"))
        known = {item.name for item in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in fields.items() if name in known})


@dataclass(frozen=True)
class StageSteps:
    """Optimizer steps: `joint` distils and prunes, `final` distils after the cut; both warm-ups lie inside them."""

    joint: int
    final: int
    sparsity_warmup: int
    final_warmup: int

    @property
    def total(self) -> int:
        return self.joint + self.final


def _fit_warmup(name: str, steps: int, stage: int, full_stage: int) -> int:
    """The default belongs to the full recipe and shrinks with the stage; a number set by hand must fit as it is."""
    if steps == FULL_WARMUP_STEPS and stage < full_stage:
        return round(stage * FULL_WARMUP_STEPS / full_stage)
    if stage and steps > stage:
        raise ValueError(f"`{name}` ({steps}) must not be above the steps of its stage ({stage}).")
    return steps


def _one_of(name: str, value, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"`{name}` must be one of {', '.join(allowed)}, but is {value!r}.")


def _at_least(name: str, value, minimum) -> None:
    if value is not None and (not math.isfinite(value) or value < minimum):
        raise ValueError(f"`{name}` must be at least {minimum}, but is {value}.")


def _index_groups(name: str, value) -> list[list[int]] | None:
    """Checks groups of indices; a string is read as JSON, since a command line has no lists of lists."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            raise ValueError(f"`{name}` must be JSON such as [[0],[1,2]], but is {value!r}.") from None
    if value is None:
        return None
    good = isinstance(value, (list, tuple)) and value and all(isinstance(group, (list, tuple)) for group in value)
    if not good or not all(group and all(type(i) is int and i >= 0 for i in group) for group in value):
        raise ValueError(f"`{name}` must be a list of lists of indices such as [[0],[1,2]], but is {value!r}.")
    if any(len(set(group)) < len(group) for group in value):
        raise ValueError(f"`{name}` names an index twice in one group: {value!r}.")
    return [list(group) for group in value]


def _latency_costs(value) -> dict | None:
    """Checks what `fit_latency` returns; a string is the path of a JSON file with it."""
    if value is None:
        return None
    try:
        # As it will be read back from skill_config.json: a tuple is a list.
        value = json.loads(Path(value).read_text(encoding="utf-8") if isinstance(value, str) else json.dumps(value))
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(
            "`latency_costs` must be a JSON file that examples/calibrate_latency.py has written, or what it holds"
            f" ({error})."
        ) from None

    def refuse(name: str, what: str, found):
        raise ValueError(
            f"`{name}` in `latency_costs` must be {what}, but is {reprlib.repr(found)}. Take what"
            " examples/calibrate_latency.py has written, as it is."
        )

    for group, entries in LATENCY_ENTRIES.items():
        found = value.get(group) if isinstance(value, dict) else None
        if not isinstance(found, dict) or not set(found) >= set(entries):
            refuse(group, f"a dict with {', '.join(entries)}", found)
    for name in ("batch_size", "seconds"):
        number = value["measured_on"][name]
        if type(number) not in (int, float) or not 0 < number < math.inf:
            refuse(name, "a number above 0", number)
    convolutions = value["architecture"]["conv_kernel"]
    if not isinstance(convolutions, list):
        refuse("conv_kernel", "a list", convolutions)
    for name in LATENCY_ENTRIES["picoseconds"]:
        costs = value["picoseconds"][name]
        of_convolutions = name in COSTS_OF_CONVOLUTIONS
        listed = costs if of_convolutions else [costs]
        if not isinstance(listed, list) or (of_convolutions and len(listed) != len(convolutions)):
            refuse(name, f"a list with a cost of each of {len(convolutions)} convolutions", costs)
        if not all(type(cost) is int and cost >= 0 for cost in listed):
            refuse(name, "whole and at least 0", costs)
    if not any(cost if type(cost) is int else any(cost) for cost in value["picoseconds"].values()):
        refuse("picoseconds", "above 0 somewhere", value["picoseconds"])
    return value
