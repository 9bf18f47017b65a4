"""The study's results so far: distances to the teacher, shares of its gain in tasks, and comparisons by seed."""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import ttest_rel


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from run_study import read_rows  # noqa: E402
from study_design import TEACHERS, Condition, Student, plan  # noqa: E402
from study_probes import METRICS  # noqa: E402

from skill_hf.files import read_json  # noqa: E402
from skill_hf.superb import METRICS as SUPERB_METRICS  # noqa: E402


# Students that differ in one of these can't be compared.
SHARED_SETTINGS = ("batch_size", "max_seconds")


@dataclass(frozen=True)
class Study:
    """
    Results as far as they go; each part may be empty.

    Args:
        rows: student -> what was measured.
        references: teacher -> encoder -> `scores` (metric -> a value for each seed) and `learning_rates`.
        before: students of the recipe that was the default before, and so on.
    """

    rows: dict[Student, dict]
    references: dict[str, dict[str, dict]]
    before: "Study | None" = None

    def generations(self) -> list["Study"]:
        """This study, that of the recipe before, that of the one before it."""
        return [self, *(self.before.generations() if self.before else ())]

    def rows_of(self, method: str, condition: Condition) -> dict[int, dict]:
        """Seed -> row, of the seeds that a method has been run with."""
        return {
            student.seed: row
            for student, row in sorted(self.rows.items(), key=lambda pair: pair[0].seed)
            if (student.method, student.condition) == (method, condition)
        }

    def values(self, outcome: "Outcome", method: str, condition: Condition) -> dict[int, float]:
        """Seed -> value, of the seeds that it was measured with."""
        values = {seed: outcome.value(row) for seed, row in self.rows_of(method, condition).items()}
        return {seed: value for seed, value in values.items() if math.isfinite(value)}

    def score(self, teacher: str, encoder: str, metric: str) -> np.ndarray:
        """Values of a reference, one for each seed; none if it hasn't been measured."""
        return np.array(self.references.get(teacher, {}).get(encoder, {}).get("scores", {}).get(metric, []))


def read_study(directory: Path, references: dict[str, dict[str, dict]] | None = None) -> Study:
    """
    Reads `students.*.jsonl` and `references.*.json`, whichever there are, and the same of the directory `before`. One
    without references has those of the directory above it.

    Args:
        directory: with results, and perhaps with a directory `before`.
        references: of the directory above it.

    Raises:
        `ValueError`: if the directory is missing, or if students were trained with different settings.
    """
    if not directory.is_dir():
        raise ValueError(f"There is no directory {directory}; pass the one that `run_study.py` adds results to.")
    found = read_rows(directory)
    for name in SHARED_SETTINGS:
        values = {row["settings"][name] for row in found.values()}
        if len(values) > 1:
            raise ValueError(
                f"Students in {directory} have different `{name}`: {' and '.join(map(str, sorted(values)))}. They"
                " cannot be compared; keep only those with one setting."
            )
    students = dict.fromkeys([*plan(), *map(Student.of_key, found)])
    paths = {teacher: directory / f"references.{teacher}.json" for teacher in TEACHERS}
    references = (references or {}) | {teacher: read_json(path) for teacher, path in paths.items() if path.is_file()}
    before = directory / "before"
    return Study(
        rows={student: found[student.key] for student in students if student.key in found},
        references=references,
        before=read_study(before, references) if before.is_dir() else None,
    )


@dataclass(frozen=True)
class Outcome:
    """
    A number that a student comes to.

    Args:
        label: with its unit and, as an arrow, what is better.
        value: of a row; NaN if it was not measured.
        lower_is_better: whether it counts errors.
        digits: for tables.
    """

    label: str
    value: Callable[[dict], float]
    lower_is_better: bool = False
    digits: int = 1


DISTANCE = Outcome(
    "mean distance (1 − CKA) ↓", lambda row: float(np.mean(row["distances"]["cka"])), lower_is_better=True, digits=3
)
DISTANCE_SECOND_SPEAKER = Outcome(
    "the same, the student hears a second speaker ↓",
    lambda row: float(np.mean(row.get("distances_second_speaker", {}).get("cka", math.nan))),
    lower_is_better=True,
    digits=3,
)
HELD_OUT = Outcome(
    "held-out loss ↓", lambda row: row.get("held_out", {}).get("end", math.nan), lower_is_better=True, digits=3
)
SCORES = {
    metric: Outcome(
        f"{SUPERB_METRICS[metric].label} {'↓' if SUPERB_METRICS[metric].lower_is_better else '↑'}",
        lambda row, metric=metric: row.get("scores", {}).get(metric, math.nan),
        SUPERB_METRICS[metric].lower_is_better,
    )
    for metric in METRICS
}


def gain(study: Study, teacher: str, floor: str, metric: str) -> np.ndarray:
    """By how much the teacher is better than a floor, seed by seed, in points."""
    sign = -1 if SCORES[metric].lower_is_better else 1
    scores, floors = study.score(teacher, "teacher", metric), study.score(teacher, floor, metric)
    number = min(len(scores), len(floors))
    return sign * (scores[:number] - floors[:number])


def tasks_with_gain(study: Study, teacher: str, floor: str = "fbank") -> list[str]:
    """
    Metrics in which the teacher beats the floor with every seed. Where there is no gain, or one that chance may have
    made, a share of it would mean nothing.
    """
    gains = {metric: gain(study, teacher, floor, metric) for metric in METRICS}
    return [metric for metric, values in gains.items() if values.size and (values > 0).all()]


def share_kept(study: Study, teacher: str, floor: str = "fbank") -> Outcome:
    """
    Mean over [`tasks_with_gain`] of the share of the teacher's gain that a student keeps, in percent: `(student -
    floor) / (teacher - floor)`, where teacher and floor are means over the seeds. Below 0 the student is worse than
    the floor, above 100 better than the teacher. Whether a metric counts errors cancels out.
    """

    def value(row: dict) -> float:
        shares = []
        for metric in tasks_with_gain(study, teacher, floor):
            low = study.score(teacher, floor, metric).mean()
            high = study.score(teacher, "teacher", metric).mean()
            shares.append(100 * (SCORES[metric].value(row) - low) / (high - low))
        return float(np.mean(shares)) if shares else math.nan

    return Outcome("share kept (%) ↑", value)


@dataclass(frozen=True)
class Comparison:
    """
    One method minus another, by seed.

    Args:
        differences: one for each seed that both have.
        p: of the paired t test, two-sided; 1 if all differences are 0, NaN with fewer than two seeds.
        better: seeds with which the first is better.
    """

    differences: np.ndarray
    p: float
    better: int


def compare(study: Study, outcome: Outcome, method: str, other: str, condition: Condition) -> Comparison | None:
    """`method` minus `other`; `None` if there is no seed with which both have been run."""
    return paired(outcome, *(study.values(outcome, name, condition) for name in (method, other)))


def paired(outcome: Outcome, ours: dict[int, float], theirs: dict[int, float]) -> Comparison | None:
    """The same for values by seed."""
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return None
    ours, theirs = (np.array([values[seed] for seed in seeds]) for values in (ours, theirs))
    differences = ours - theirs
    better = int((differences < 0).sum() if outcome.lower_is_better else (differences > 0).sum())
    if not differences.any():  # the same groups, thus the same students
        return Comparison(differences, 1.0, better)
    return Comparison(differences, math.nan if len(seeds) == 1 else float(ttest_rel(ours, theirs).pvalue), better)


def holm(p: Sequence[float]) -> np.ndarray:
    """p of several tests, corrected by Holm (1979): each times the number of those that are no smaller. NaN stays."""
    p = np.array(p, dtype=float)
    order = np.argsort(p)[: np.isfinite(p).sum()]  # NaN comes last
    p[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)), 1)
    return p
