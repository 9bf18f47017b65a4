"""`SkillConfig`: the complete recipe of one compression."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

from ..compression.units import DEFAULT_KINDS, KINDS
from ..files import parse_json
from ..losses import LOSS_TERMS, check_weights, term_weights
from . import fields, published_recipes, schedule
from .latency_costs import check_latency_costs
from .schedule import StageSteps


SIMILARITIES = ("cka", "cosine", "distillation", "mutual_knn")
LINKAGES = ("average", "single", "complete", "weighted", "ward")
STUDENT_LAYERS = ("group", "last")
GROUP_WEIGHTS = ("equal", "size")
TEACHER_TARGETS = ("average", "separate")
BUDGETS = ("parameters", "macs", "latency")
LAGRANGE_MULTIPLIERS = ("estimated", "learned")
SKILL_CONFIG_NAME = "skill_config.json"


@fields.help_from_docstring
@dataclass
class SkillConfig:
    r"""
    Recipe of one compression: grouping of layers, units to prune, target sparsity, and weights of the losses.

    The defaults are DPHuBERT's (arXiv 2305.17651) for pruning and distillation where short runs have not shown others
    to be better, and this project's own for similarity and clustering, which the SKILL paper (arXiv 2402.16830) does
    not state. It can be used with [`~transformers.HfArgumentParser`] and is saved as `skill_config.json` with every
    student.

    > Parameters that group the layers

    Args:
        similarity (`str`, *optional*, defaults to `"cka"`):
            Similarity measure of two teacher layers: `cka`, `cosine`, `distillation` or `mutual_knn`.
        linkage (`str`, *optional*, defaults to `"average"`):
            Linkage method of the clustering: `average`, `single`, `complete`, `weighted` or `ward`.
        num_clusters (`int`, *optional*):
            Number of groups to cut the tree into.
        distance_threshold (`float`, *optional*):
            Height (1 - similarity) to cut the tree at. Without this and `num_clusters`, the number of groups with the
            largest silhouette is used.
        contiguous (`bool`, *optional*, defaults to `False`):
            Whether groups may only contain consecutive layers.
        include_embeddings (`bool`, *optional*, defaults to `True`):
            Whether to include hidden state 0, the input of the first layer, in the grouping.
        layer_groups (`list[list[int]]`, *optional*):
            Groups of hidden-state indices set by hand (as JSON on a command line), which disables clustering.
            `[[0],[4],[8],[12]]` are DPHuBERT's layers of a Base model, except that DPHuBERT uses layer 0 before the
            positional convolution.
        use_projections (`bool`, *optional*):
            Whether the student's mean of a group goes through a projection, a learned linear map, before it is
            compared with the teacher's, as in SKILL and DPHuBERT. Without it the student's hidden states stay in the
            teacher's space. By default there are projections only with `projection_groups`, with
            `student_layers="last"` and for averages over several teachers; groups of other teachers always have them.
            Losses with and without projections cannot be compared.
        projection_groups (`list[list[int]]`, *optional*):
            Indices of groups that share a projection, as DPHuBERT's `[[0],[1,2,3]]` (see [`SkillConfig.dphubert`]). By
            default each group that has a projection has its own.
        student_layers (`str`, *optional*, defaults to `"group"`):
            What predicts a group: `group`, the mean of the same layers of the student, or `last`, its last layer.
        group_weights (`str`, *optional*, defaults to `"equal"`):
            How much a group counts in the loss: `equal`, or `size`, by the number of its layers.
        normalize_states (`bool`, *optional*, defaults to `False`):
            Whether each hidden state is brought to mean 0 and deviation 1 in every channel before states are
            averaged, by constants from the calibration clips.
        teacher_targets (`str`, *optional*, defaults to `"average"`):
            What a student of several teachers predicts: `average`, the mean over teachers of each group, or
            `separate`, each group of each teacher. Only `separate` allows teachers of different widths. No effect with
            one teacher.
        calibration_samples (`int`, *optional*, defaults to 256):
            Number of training clips to compute the similarity on.
        calibration_seconds (`float`, *optional*, defaults to 10.0):
            Length in seconds to crop calibration clips to.

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
        student_mask_prob (`float`, *optional*, defaults to 0.0):
            Share of the student's frames that are masked in training, in spans as in transformers'
            `mask_time_prob`; the student must predict what the teacher hears there (MaskHuBERT, arXiv 2305.11685).

    > Parameters of pruning and of the two stages

    Args:
        target_sparsity (`float`, *optional*, defaults to 0.75):
            Share of the teacher's parameters, or of the quantity set by `budget`, to remove; above 0 and below 1.
        budget (`str`, *optional*, defaults to `"parameters"`):
            Quantity that the target refers to: `parameters`; `macs`, the multiply-accumulates of one clip; or
            `latency`, the time of one forward pass on the machine where `latency_costs` were measured. Convolutions
            run at a high frame rate, so they have few parameters, but many MACs and a high latency.
        budget_seconds (`float`, *optional*, defaults to 10.0):
            Length in seconds of the clip that `macs` are counted for; the cost of attention grows with its square.
            `latency` always refers to the clip length that was measured.
        latency_costs (`dict` or `str`, *optional*):
            Time that each unit costs, as returned by [`~skill_hf.latency.fit_latency`], or the JSON file that
            `examples/calibrate_latency.py` has written, whose content becomes part of the recipe. Required for
            `budget="latency"`, and only allowed with it.
        sparsity_warmup_steps (`int`, *optional*):
            Steps over which the target rises from 0, or from the sparsity of the student to start from; DPHuBERT's
            5000 by default, but at most half of the first stage.
        pruning_units (`list[str]`, *optional*, defaults to `["conv_channels", "attention_heads", "ffn_dims"]`):
            Units that may be removed: any of `conv_channels`, `attention_heads`, `ffn_dims`, `attention_value_dims`
            (dimensions of the values, as many of each head of a layer), `attention_blocks`, `ffn_blocks` and `layers`.
            A student that loses layers has a smaller `num_hidden_layers`; the first layer
            always stays.
        width_multiple (`int`, *optional*, defaults to 1):
            The cut rounds the numbers of convolution channels and feed-forward units to multiples of this. With 8 or
            16, matrix products in half precision run on the tensor cores of GPUs.
        lagrange_multiplier (`str`, *optional*, defaults to `"estimated"`):
            How the pressure on the size is found: `estimated` at each step from the gradients (see
            [`~skill_hf.compression.multiplier.MultiplierEstimate`]), or `learned` by gradient ascent, as in DPHuBERT.
            In short runs learned multipliers miss the target by far. With `estimated`, no `log_alpha` exceeds 4.6.
        gate_learning_rate (`float`, *optional*):
            Peak learning rate of the gates and of learned multipliers. By default DPHuBERT's 0.02, and more in
            short runs, where it would be too small to close a gate (see [`gate_travel`]).
        shared_gate_noise (`bool`, *optional*, defaults to `False`):
            Whether all micro-batches and processes of a step use the same gate noise. An update then equals that of
            one large batch, up to rounding; independent noise has less variance and gives better students.
        shrink_steps (`int`, *optional*, defaults to 0):
            Interval in optimizer steps at which the first stage cuts permanently closed units and continues with a
            smaller student, which saves time and memory; 0 for never. Needs an optimizer whose state has the shapes of
            the parameters, such as AdamW.
        final_steps (`int`, *optional*):
            Optimizer steps of the second stage, after the cut. By default a third of all steps; in runs of less than
            7500 steps two thirds, but at most what leaves 50 for the first stage.
        final_learning_rate (`float`, *optional*):
            Peak learning rate of the second stage; by default 1e-4, in runs of less than 7500 steps at least
            1 / (16 width (1 - target_sparsity)), with the width of the (first) teacher and a sparsity of at most 0.95.
            If its layers are pre-norm, this is (2 (1 - target_sparsity))^-1/2 times as much above a sparsity of 0.5.
        final_warmup_steps (`int`, *optional*):
            Warm-up steps of the learning rate in the second stage; a fifth of the stage by default, at most 5000. Each
            stage starts at a learning rate of 0, like the schedules of transformers.

    Example:

    ```python
    >>> from skill_hf import SkillConfig

    >>> recipe = SkillConfig(target_sparsity=0.5, num_clusters=4)
    >>> recipe.resolve_steps(max_steps=7_500)
    StageSteps(joint=5000, final=2500, sparsity_warmup=2500, final_warmup=500)
    ```
    """

    similarity: str = "cka"
    linkage: str = "average"
    num_clusters: int | None = None
    distance_threshold: float | None = None
    contiguous: bool = False
    include_embeddings: bool = True
    layer_groups: list[list[int]] | str | None = None
    use_projections: bool | None = None
    projection_groups: list[list[int]] | str | None = None
    student_layers: str = "group"
    group_weights: str = "equal"
    normalize_states: bool = False
    teacher_targets: str = "average"
    calibration_samples: int = 256
    calibration_seconds: float = 10.0
    l1_weight: float = 1.0
    l2_weight: float = 0.0
    cosine_weight: float = 1.0
    logits_weight: float = 1.0
    logits_temperature: float = 1.0
    task_weight: float = 0.0
    student_mask_prob: float = 0.0
    target_sparsity: float = 0.75
    budget: str = "parameters"
    budget_seconds: float = 10.0
    latency_costs: dict | str | None = None
    sparsity_warmup_steps: int | None = None
    pruning_units: list[str] = field(default_factory=lambda: list(DEFAULT_KINDS))
    width_multiple: int = 1
    lagrange_multiplier: str = "estimated"
    gate_learning_rate: float | None = None
    shared_gate_noise: bool = False
    shrink_steps: int = 0
    final_steps: int | None = None
    final_learning_rate: float | None = None
    final_warmup_steps: int | None = None

    def __post_init__(self):
        self.validate()

    def validate(self) -> None:
        """
        Checks every field and converts it to its type: NumPy numbers become Python numbers, tuples become lists.

        Raises:
            `ValueError`: if a field's value has the wrong type or is out of range; the message states field and value.
        """
        for name, kind in FIELD_KINDS.items():
            setattr(self, name, kind(name, getattr(self, name)))
        if (self.budget == "latency") != (self.latency_costs is not None):
            if self.latency_costs is None:
                raise ValueError(
                    "`budget` is latency, but there are no `latency_costs`; measure them with"
                    " examples/calibrate_latency.py."
                )
            raise ValueError(
                f"`budget` is {self.budget}, but only latency uses `latency_costs`; leave them out or set `budget` to"
                " latency."
            )
        if self.num_clusters is not None and self.distance_threshold is not None:
            raise ValueError(
                f"`num_clusters` ({self.num_clusters}) and `distance_threshold` ({self.distance_threshold}) both cut"
                " the tree; set one of them or neither."
            )
        check_weights(term_weights(self))
        if self.use_projections is False and self._needs_projections:
            raise ValueError(
                "`use_projections` is False, but `projection_groups` and `student_layers` last need projections; leave"
                " it out, or leave them out."
            )
        if self.projection_groups is not None and self.layer_groups is not None:
            self.validate_projection_groups(len(self.layer_groups))

    @property
    def _needs_projections(self) -> bool:
        return self.projection_groups is not None or self.student_layers == "last"

    def has_projections(self, num_teachers: int = 1) -> bool:
        """Whether groups of the first teacher, or averages over all, are predicted through projections."""
        if self.use_projections is not None:
            return self.use_projections
        return self._needs_projections or (num_teachers > 1 and self.teacher_targets == "average")

    def validate_projection_groups(self, num_groups: int) -> None:
        """Raises a `ValueError` unless `projection_groups` contains each of `num_groups` groups exactly once."""
        if self.projection_groups is None:
            return
        named = sorted(index for group in self.projection_groups for index in group)
        if named != list(range(num_groups)):
            raise ValueError(
                f"`projection_groups` must name each group from 0 to {num_groups - 1} exactly once, but is"
                f" {self.projection_groups}."
            )

    @classmethod
    def skill(cls, **changes) -> "SkillConfig":
        """
        SKILL (arXiv 2402.16830): groups of similar layers are distilled, each through a projection of its own. Losses,
        pruning and steps are those of [`SkillConfig.dphubert`], which SKILL extends. Similarity, linkage, number of
        groups and calibration set are not stated in the parts of the paper that were available to us: they are
        the defaults of this class.

        Args:
            changes: any fields of this class.
        """
        return cls(**published_recipes.skill() | changes)

    @classmethod
    def dphubert(cls, num_layers: int = 12, **changes) -> "SkillConfig":
        """
        DPHuBERT (arXiv 2305.17651, section 3.1): hidden states 0, 4, 8 and 12 of a Base model, of which the last three
        share a projection; L1 and cosine loss with equal weights; sparsity rises linearly over the first 5000 of
        50 000 steps to 0.75; 25 000 steps without gates follow at 1e-4. The defaults of [`SkillTrainingArguments`] are
        the rest of this recipe.

        `final_steps`, both warm-ups, `gate_learning_rate` and `final_learning_rate` are for 75 000 steps: with `None`
        they fit a shorter run, as the `learning_rate` of the training arguments does by default. DPHuBERT takes layer
        0 before the positional convolution, this package after it.

        Args:
            num_layers (`int`, *optional*, defaults to 12): layers of the teacher, to which the four are scaled.
            changes: any fields of this class.

        Raises:
            `ValueError`: if `num_layers` is not an integer of at least 1, or a field has an invalid value.
        """
        return cls(**published_recipes.dphubert(num_layers) | changes)

    @classmethod
    def distilhubert(cls, num_layers: int = 12, **changes) -> "SkillConfig":
        """
        The loss of DistilHuBERT (arXiv 2110.01900): the student's last layer predicts layers 4, 8 and 12 of a Base
        model through separate projections, by L1 and cosine similarity with equal weights. Its cosine term is
        `-log sigmoid(cos)`; here it is `-cos`.

        DistilHuBERT does not prune, so all other fields are the defaults of this class. Its student of two layers is
        not part of the recipe: `skill-hf shorten --order top --num_layers 2` makes it, to be passed as `model`; with
        `final_steps` equal to the steps of the run, nothing else is removed.

        Args:
            num_layers (`int`, *optional*, defaults to 12): layers of the teacher, to which the three are scaled.
            changes: any fields of this class.

        Raises:
            `ValueError`: if `num_layers` is not an integer of at least 1, or a field has an invalid value.
        """
        return cls(**published_recipes.distilhubert(num_layers) | changes)

    def resolve_steps(self, max_steps: int) -> StageSteps:
        """
        The steps of both stages for a run of `max_steps` optimizer steps in total. Defaults fit it; values set by hand
        are kept.

        Raises:
            `ValueError`: if a stage or its warm-up does not fit.
        """
        max_steps = fields.whole(1)("max_steps", max_steps)
        return schedule.stage_steps(max_steps, self.final_steps, self.sparsity_warmup_steps, self.final_warmup_steps)

    def resolve_gate_learning_rate(self, joint_steps: int) -> float:
        """
        The learning rate of the gates for a first stage of `joint_steps`: the value set by hand; otherwise 0.02, or
        more in a short one.
        """
        given = self.gate_learning_rate
        return schedule.gate_learning_rate(joint_steps) if given is None else given

    def resolve_learning_rates(
        self, learning_rate: float | None, max_steps: int, hidden_size: int, *, pre_norm: bool = False
    ) -> tuple[float, float]:
        """
        Peak learning rates of both stages in a run of `max_steps`; those not set by hand are the default ones (see
        `final_learning_rate`): for a Base model at 0.75 in a short run 3.3e-4, for a Large one 3.5e-4.

        Args:
            learning_rate (`float`, *optional*): that of the first stage, if it was set by hand.
            max_steps (`int`): optimizer steps of both stages.
            hidden_size (`int`): width of the teacher.
            pre_norm (`bool`): whether its layers normalise their inputs, not their outputs.
        """
        defaults = schedule.learning_rates(max_steps, hidden_size, 1 - self.target_sparsity, pre_norm)
        given = (learning_rate, self.final_learning_rate)
        return tuple(default if rate is None else rate for rate, default in zip(given, defaults, strict=True))

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes `skill_config.json` into `directory`."""
        text = json.dumps(self.to_dict(), indent=2) + "\n"
        (Path(directory) / SKILL_CONFIG_NAME).write_text(text, encoding="utf-8")

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> "SkillConfig":
        """
        Reads `skill_config.json` from `directory`; fields unknown to this version are ignored. A recipe that an
        earlier version saved has projections, as recipes had then.

        Raises:
            `ValueError`: if the file is missing or invalid, or a field has an invalid value.
        """
        try:
            path = Path(directory) / SKILL_CONFIG_NAME
        except TypeError:
            raise ValueError(f"A recipe is read from a directory, but {directory!r} is not a path.") from None
        try:
            values = parse_json(path)
            if not isinstance(values, dict):
                raise ValueError(f"it contains a {type(values).__name__}, not names and values")
            if isinstance(values.get("latency_costs"), str):  # somebody else's file may name any of this machine
                raise ValueError("`latency_costs` must be the measured costs, but is the name of a file")
            values = EARLIER_VALUES | values
            return cls(**{name: value for name, value in values.items() if name in FIELD_KINDS})
        except ValueError as error:
            raise ValueError(f"{path} is not a recipe of skill-hf: {' '.join(str(error).split())}") from error


# What was done before a field was added, where it is not the default of today.
EARLIER_VALUES = {"use_projections": True}

# The one type and range of each field of `SkillConfig`.
FIELD_KINDS = {
    "similarity": fields.one_of(SIMILARITIES),
    "linkage": fields.one_of(LINKAGES),
    "num_clusters": fields.optional(fields.whole(1)),
    "distance_threshold": fields.optional(fields.number(above=0)),
    "contiguous": fields.true_or_false,
    "include_embeddings": fields.true_or_false,
    "layer_groups": fields.optional(fields.index_groups),
    "use_projections": fields.optional(fields.true_or_false),
    "projection_groups": fields.optional(fields.index_groups),
    "student_layers": fields.one_of(STUDENT_LAYERS),
    "group_weights": fields.one_of(GROUP_WEIGHTS),
    "normalize_states": fields.true_or_false,
    "teacher_targets": fields.one_of(TEACHER_TARGETS),
    "calibration_samples": fields.whole(1),
    "calibration_seconds": fields.number(above=0),
    **{f"{term}_weight": fields.number(least=0) for term in LOSS_TERMS},
    "logits_weight": fields.number(least=0),
    "logits_temperature": fields.number(above=0),
    "task_weight": fields.number(least=0),
    "student_mask_prob": fields.number(least=0, most=1),
    "target_sparsity": fields.number(above=0, below=1),
    "budget": fields.one_of(BUDGETS),
    "budget_seconds": fields.number(above=0),
    "latency_costs": fields.optional(check_latency_costs),
    "sparsity_warmup_steps": fields.optional(fields.whole(0)),
    "pruning_units": fields.some_of(KINDS),
    "width_multiple": fields.whole(1),
    "lagrange_multiplier": fields.one_of(LAGRANGE_MULTIPLIERS),
    "gate_learning_rate": fields.optional(fields.number(least=0)),
    "shared_gate_noise": fields.true_or_false,
    "shrink_steps": fields.whole(0),
    "final_steps": fields.optional(fields.whole(0)),
    "final_learning_rate": fields.optional(fields.number(least=0)),
    "final_warmup_steps": fields.optional(fields.whole(0)),
}
