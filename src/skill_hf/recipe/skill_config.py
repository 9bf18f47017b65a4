"""`SkillConfig`: the recipe of one compression, every number of it."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

from ..compression.units import DEFAULT_KINDS, KINDS
from ..files import parse_json
from . import fields
from .latency_costs import check_latency_costs


SIMILARITIES = ("cka", "cosine", "distillation", "mutual_knn")
LINKAGES = ("average", "single", "complete", "weighted", "ward")
STUDENT_LAYERS = ("group", "last")
BUDGETS = ("parameters", "macs", "latency")
SKILL_CONFIG_NAME = "skill_config.json"

# The published recipe trains for 50 000 + 25 000 steps (DPHuBERT, arXiv 2305.17651, section 3.1).
FULL_STEPS = 75_000
FULL_FINAL_STEPS = 25_000
FULL_WARMUP_STEPS = 5_000  # of the sparsity target, and of the learning rate in the final stage
FULL_GATE_LEARNING_RATE = 0.02
# What `log_alpha` must be able to travel in the first stage, wherever that is set by default.
GATE_TRAVEL = 12.0


@fields.help_from_docstring
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
            Groups of hidden-state indices set by hand (on a command line as JSON), which switches clustering off.
            `[[0],[4],[8],[12]]` are DPHuBERT's layers of a Base model, except that its layer 0 is taken before the
            positional convolution.
        projection_groups (`list[list[int]]`, *optional*):
            Indices of groups that share one projection; by default each group has its own. DPHuBERT's recipe is
            `layer_groups=[[0],[4],[8],[12]]` with `projection_groups=[[0],[1,2,3]]`.
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
        logits_weight (`float`, *optional*, defaults to 1.0):
            Weight of the divergence between the logits of teacher and student; of effect where the teacher keeps a
            head (`task`). With 0 the head goes along without being distilled.
        logits_temperature (`float`, *optional*, defaults to 1.0):
            Temperature of that divergence, `T^2 KL(softmax(t / T) || softmax(s / T))`.
        task_weight (`float`, *optional*, defaults to 0.0):
            Weight of the loss of the labels, in rows with `labels`: connectionist temporal classification or cross
            entropy, by the head that the teacher keeps. Clips are then padded, not cropped to one length.

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
        sparsity_warmup_steps (`int`, *optional*):
            Steps over which the target rises from 0; by default a tenth of the first stage, at most 5000.
        pruning_units (`list[str]`, *optional*, defaults to `["conv_channels", "attention_heads", "ffn_dims"]`):
            What may be removed: any of `conv_channels`, `attention_heads`, `ffn_dims`, `attention_blocks` and
            `ffn_blocks`.
        width_multiple (`int`, *optional*, defaults to 1):
            What the cut rounds the channels of convolutions and the units of feed-forward blocks to a multiple of;
            with 8 or 16 matrix products of half precision run on the tensor cores of GPUs.
        gate_learning_rate (`float`, *optional*):
            Peak learning rate of the gates and of the Lagrange multipliers; by default DPHuBERT's 0.02, and more in
            short runs, where a gate would not get from open to closed with it (see [`gate_travel`]).
        shared_gate_noise (`bool`, *optional*, defaults to `False`):
            Whether all micro-batches and processes of a step draw the same noise of the gates. An update is then that
            of one large batch, to rounding; noise of their own has less variance and gives better students.
        shrink_steps (`int`, *optional*, defaults to 0):
            Every so many optimizer steps the first stage cuts the units that are closed for good and continues with a
            smaller student, which takes less time and memory; 0 for never. Needs an optimizer whose state has the
            shapes of the parameters, such as AdamW, and no FSDP or DeepSpeed.
        final_steps (`int`, *optional*):
            Steps of the second stage, after the cut; a third of all steps by default.
        final_learning_rate (`float`, *optional*, defaults to 1e-4):
            Peak learning rate of the second stage.
        final_warmup_steps (`int`, *optional*):
            Learning-rate warm-up of the second stage; by default a fifth of it, at most 5000. Each stage starts with a
            learning rate of 0, as transformers' schedules do.

    Example:

    ```python
    >>> from skill_hf import SkillConfig

    >>> recipe = SkillConfig(target_sparsity=0.5, num_clusters=4)
    >>> recipe.resolve_steps(max_steps=7_500)
    StageSteps(joint=5000, final=2500, sparsity_warmup=500, final_warmup=500)
    ```
    """

    similarity: str = "cka"
    linkage: str = "average"
    num_clusters: int | None = None
    distance_threshold: float | None = None
    contiguous: bool = False
    include_embeddings: bool = True
    layer_groups: list[list[int]] | str | None = None
    projection_groups: list[list[int]] | str | None = None
    student_layers: str = "group"
    calibration_samples: int = 256
    calibration_seconds: float = 10.0
    l1_weight: float = 1.0
    l2_weight: float = 0.0
    cosine_weight: float = 1.0
    logits_weight: float = 1.0
    logits_temperature: float = 1.0
    task_weight: float = 0.0
    target_sparsity: float = 0.75
    budget: str = "parameters"
    budget_seconds: float = 10.0
    latency_costs: dict | str | None = None
    sparsity_warmup_steps: int | None = None
    pruning_units: list[str] = field(default_factory=lambda: list(DEFAULT_KINDS))
    width_multiple: int = 1
    gate_learning_rate: float | None = None
    shared_gate_noise: bool = False
    shrink_steps: int = 0
    final_steps: int | None = None
    final_learning_rate: float = 1e-4
    final_warmup_steps: int | None = None

    def __post_init__(self):
        self.validate()

    def validate(self) -> None:
        """
        Checks every field and gives it its own type: numpy's numbers become Python's, tuples become lists.

        Raises:
            `ValueError`: if a field has a value of another type or outside its range; the message names both.
        """
        for name, kind in FIELD_KINDS.items():
            setattr(self, name, kind(name, getattr(self, name)))
        if (self.budget == "latency") != (self.latency_costs is not None):
            missing = "no " if self.latency_costs is None else ""
            raise ValueError(
                f"`budget` is {self.budget}, but there are {missing}`latency_costs`: they go with `latency` and with"
                " no other budget. examples/calibrate_latency.py measures them."
            )
        if self.num_clusters is not None and self.distance_threshold is not None:
            raise ValueError(
                f"`num_clusters` ({self.num_clusters}) and `distance_threshold` ({self.distance_threshold}) both cut"
                " the tree; set one of them or neither."
            )
        if self.l1_weight + self.l2_weight + self.cosine_weight == 0:
            raise ValueError("`l1_weight`, `l2_weight` and `cosine_weight` are all 0; at least one term must count.")
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
        max_steps = fields.whole(1)("max_steps", max_steps)
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

    def resolve_gate_learning_rate(self, joint_steps: int) -> float:
        """
        The learning rate of the gates for a first stage of `joint_steps`: what was set by hand, or else 0.02, or more
        where [`gate_travel`] would be below `GATE_TRAVEL` with it.
        """
        if self.gate_learning_rate is not None:
            return self.gate_learning_rate
        return max(FULL_GATE_LEARNING_RATE, GATE_TRAVEL / gate_travel(1.0, max(joint_steps, 1)))

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes `skill_config.json` into `directory`."""
        text = json.dumps(self.to_dict(), indent=2) + "\n"
        (Path(directory) / SKILL_CONFIG_NAME).write_text(text, encoding="utf-8")

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> "SkillConfig":
        """
        Reads `skill_config.json` of `directory`; fields that this version does not know are left out.

        Raises:
            `ValueError`: if the file is missing, is not such a file, or a field has an impossible value.
        """
        try:
            path = Path(directory) / SKILL_CONFIG_NAME
        except TypeError:
            raise ValueError(f"A recipe is read from a directory, but {directory!r} is none.") from None
        try:
            values = parse_json(path)
            if not isinstance(values, dict):
                raise ValueError(f"it holds a {type(values).__name__}, not names and values")
            if isinstance(values.get("latency_costs"), str):  # somebody else's file may name any of this machine
                raise ValueError("`latency_costs` must be what was measured, but is the name of a file")
            return cls(**{name: value for name, value in values.items() if name in FIELD_KINDS})
        except ValueError as error:
            raise ValueError(f"{path} is not a recipe of skill-hf: {' '.join(str(error).split())}") from error


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


def gate_travel(learning_rate: float, joint_steps: int) -> float:
    """
    How far `log_alpha` can go in a first stage of `joint_steps`, all of them in one direction: an adaptive optimizer
    moves it by about the learning rate in each, which is half of its peak on average.
    """
    return learning_rate * joint_steps / 2


def _fit_warmup(name: str, steps: int | None, stage: int, full_stage: int) -> int:
    """The default shrinks in proportion to the full recipe; a number set by hand must fit as it is."""
    if steps is None:
        return min(FULL_WARMUP_STEPS, round(stage * FULL_WARMUP_STEPS / full_stage))
    if stage and steps > stage:
        raise ValueError(f"`{name}` ({steps}) must not be above the steps of its stage ({stage}).")
    return steps


# The one type and range of each field of `SkillConfig`.
FIELD_KINDS = {
    "similarity": fields.one_of(SIMILARITIES),
    "linkage": fields.one_of(LINKAGES),
    "num_clusters": fields.optional(fields.whole(1)),
    "distance_threshold": fields.optional(fields.number(above=0)),
    "contiguous": fields.true_or_false,
    "include_embeddings": fields.true_or_false,
    "layer_groups": fields.optional(fields.index_groups),
    "projection_groups": fields.optional(fields.index_groups),
    "student_layers": fields.one_of(STUDENT_LAYERS),
    "calibration_samples": fields.whole(1),
    "calibration_seconds": fields.number(above=0),
    "l1_weight": fields.number(least=0),
    "l2_weight": fields.number(least=0),
    "cosine_weight": fields.number(least=0),
    "logits_weight": fields.number(least=0),
    "logits_temperature": fields.number(above=0),
    "task_weight": fields.number(least=0),
    "target_sparsity": fields.number(above=0, below=1),
    "budget": fields.one_of(BUDGETS),
    "budget_seconds": fields.number(above=0),
    "latency_costs": fields.optional(check_latency_costs),
    "sparsity_warmup_steps": fields.optional(fields.whole(0)),
    "pruning_units": fields.some_of(KINDS),
    "width_multiple": fields.whole(1),
    "gate_learning_rate": fields.optional(fields.number(least=0)),
    "shared_gate_noise": fields.true_or_false,
    "shrink_steps": fields.whole(0),
    "final_steps": fields.optional(fields.whole(0)),
    "final_learning_rate": fields.number(least=0),
    "final_warmup_steps": fields.optional(fields.whole(0)),
}
