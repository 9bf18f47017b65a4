"""`RunRecord`: the measurements of a run, for the log, the model card, the figures and all_results.json."""

import dataclasses
import reprlib
from collections.abc import Callable
from dataclasses import dataclass, field


# Moments at which a run measures its student, in order, and how they are called where people read them.
MOMENTS = {
    "start": "start",
    "before_cut": "end of stage 1, before the cut",
    "after_cut": "after the cut",
    "end": "end of stage 2",
}
# A loss that rises by more than this over the cut says that stage 1 has not prepared the student for it.
MAX_LOSS_RISE = 0.2
# A student whose hidden states are less similar to the teacher's than this is hardly of use.
MIN_COSINE_SIMILARITY = 0.8


@dataclass
class RunRecord:
    """
    Plain numbers, lists and strings, so that checkpoints can store it as JSON. Empty or `None` means unknown.

    Args:
        silhouettes (`dict[int, float]`): mean silhouette of each number of groups of the teacher's layers.
        half_groups (`list[list[list[int]]]`): groups computed from each half of the calibration set.
        cut (`dict`, *optional*): `left`, the cost left by the gates at the end of stage 1; `wanted`, the target;
            `shift`, the value added to all `log_alpha` to choose units, 0 if not needed.
        measured_on (`str`): data of `losses`, such as "32 held-out clips".
        losses (`dict[str, dict[str, float]]`): `distillation_loss` and `cosine_similarity` at each of `MOMENTS`;
            with a head also `logits_loss`, and `task_loss` if there are labels.
        layer_distances (`dict[str, list[float]]`): `cka` and `cosine` distance to the teacher at each hidden state; to
            the first of several.
        num_teachers (`int`): teachers that give the targets. `cosine_similarity` is that to the targets: with several,
            a copy of one of them does not reach 1.
    """

    silhouettes: dict[int, float] = field(default_factory=dict)
    half_groups: list[list[list[int]]] = field(default_factory=list)
    cut: dict | None = None
    measured_on: str = ""
    losses: dict[str, dict[str, float]] = field(default_factory=dict)
    layer_distances: dict[str, list[float]] = field(default_factory=dict)
    num_teachers: int = 1

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "RunRecord":
        """
        Inverse of `to_dict`, also after a round trip through JSON, whose keys are strings. Fields unknown to this
        version are ignored.

        Raises:
            `ValueError`: if a value has the wrong type; the message names the field.
        """
        if not isinstance(values, dict):
            raise ValueError(f"it must be an object, but is {reprlib.repr(values)}")
        values = {entry.name: values[entry.name] for entry in dataclasses.fields(cls) if entry.name in values}
        for name, value in values.items():
            wanted, is_valid = _FIELDS[name]
            if not is_valid(value):
                raise ValueError(f"`{name}` must be {wanted}, but is {reprlib.repr(value)}")
        record = cls(**values)
        record.silhouettes = {int(count): score for count, score in record.silhouettes.items()}
        return record

    def loss_rows(self) -> list[tuple[str, float, float]]:
        """Name of a moment, distillation loss, cosine similarity."""
        return [
            (name, self.losses[moment]["distillation_loss"], self.losses[moment]["cosine_similarity"])
            for moment, name in MOMENTS.items()
            if moment in self.losses
        ]

    def loss_rise(self) -> float | None:
        """Rise of the loss at the cut, if it was measured before and after."""
        if not {"before_cut", "after_cut"} <= self.losses.keys():
            return None
        return self.losses["after_cut"]["distillation_loss"] - self.losses["before_cut"]["distillation_loss"]

    def summary(self) -> list[str]:
        """Lines for the end of a run: losses, cut, and advice if something went wrong."""
        lines = []
        if self.losses:
            best = "the teacher" if self.num_teachers == 1 else "exact prediction of all targets"
            lines.append(f"Distillation loss and cosine similarity on {self.measured_on} ({best}: -1 and 1)")
            lines += [f"  {name:<32}{loss:>8.3f}{cosine:>8.3f}" for name, loss, cosine in self.loss_rows()]
        if self.cut is not None and self.cut["shift"]:
            lines.append(
                f"The gates of stage 1 left {self.cut['left']:,}, but the target was {self.cut['wanted']:,}; they were"
                f" shifted by {self.cut['shift']:+.3f} to choose the units to cut."
            )
        return lines + self.advice()

    def advice(self) -> list[str]:
        """Advice for the next run, one sentence each; empty if all went well."""
        return self.advice_on_cut() + self.advice_on_student()

    def advice_on_cut(self) -> list[str]:
        rise = self.loss_rise()
        if rise is None or rise <= MAX_LOSS_RISE:
            return []
        return [
            f"The loss rose by {rise:.2f} over the cut (up to {MAX_LOSS_RISE} is usual): stage 1 ended before its"
            " gates had closed. Lower `target_sparsity`; leave out `gate_learning_rate`, if it is set. More steps"
            " (`max_steps`) mend what the cut breaks, but near the highest sparsity they do not close more gates."
        ]

    def advice_on_student(self) -> list[str]:
        end, lowest, whose = self.losses.get("end"), MIN_COSINE_SIMILARITY, "the teacher's"
        if self.num_teachers > 1:  # of which the unpruned copy of the first is not nearer than it is
            start = self.losses.get("start", {"cosine_similarity": 1.0})
            lowest, whose = lowest * start["cosine_similarity"], "the teachers'"
        if end is None or end["cosine_similarity"] >= lowest:
            return []
        return [
            f"The student's hidden states have a cosine similarity of {end['cosine_similarity']:.2f} to {whose}"
            f" (below {lowest:.2g} the student is of little use): train for more steps or lower `target_sparsity`."
        ]


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_count(value) -> bool:
    return type(value) is int or isinstance(value, str) and value.isdecimal() and value.isascii()


def _list_of(is_valid: Callable) -> Callable:
    return lambda value: isinstance(value, list) and all(map(is_valid, value))


def _object_of(is_valid: Callable, is_key: Callable = lambda key: True) -> Callable:
    return lambda value: isinstance(value, dict) and all(map(is_key, value)) and all(map(is_valid, value.values()))


def _has_numbers(*names: str) -> Callable:
    return lambda value: isinstance(value, dict) and all(_is_number(value.get(name)) for name in names)


_is_cut = _has_numbers("left", "wanted", "shift")
_are_distances = _object_of(_list_of(_is_number))
# Field of `RunRecord` -> what a file must contain for it.
_FIELDS: dict[str, tuple[str, Callable]] = {
    "num_teachers": ("a count", lambda value: type(value) is int and value > 0),
    "silhouettes": ("numbers of groups with their silhouettes", _object_of(_is_number, _is_count)),
    "half_groups": ("lists of groups", _list_of(_list_of(_list_of(lambda layer: type(layer) is int)))),
    "cut": ("the numbers `left`, `wanted` and `shift`", lambda value: value is None or _is_cut(value)),
    "measured_on": ("text", lambda value: isinstance(value, str)),
    "losses": (
        "`distillation_loss` and `cosine_similarity` at each moment",
        _object_of(_has_numbers("distillation_loss", "cosine_similarity")),
    ),
    "layer_distances": (
        "lists of numbers, `cka` among them",
        lambda value: value == {} or _are_distances(value) and "cka" in value,
    ),
}
