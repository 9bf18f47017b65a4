"""The study's results so far: scores, shares of the teacher's gain, and comparisons by seed."""

import json
import logging
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import combinations
from pathlib import Path

import numpy as np
from scipy.optimize import brentq
from scipy.stats import nct, t, ttest_rel
from sklearn.metrics import adjusted_rand_score


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from run_study import run_key  # noqa: E402
from study_design import BASELINES, MEASURES, SEEDS, VARIANTS, Method, plan, resolve  # noqa: E402
from study_probes import METRICS  # noqa: E402

from skill_hf.files import read_json  # noqa: E402
from skill_hf.recipe.published_recipes import dphubert_layers  # noqa: E402
from skill_hf.superb import METRICS as SUPERB_METRICS  # noqa: E402


logger = logging.getLogger("draw_study")

# Runs that differ in one of these can't be compared.
SHARED_SETTINGS = ("max_steps", "batch_size", "max_seconds", "learning_rates")


@dataclass(frozen=True)
class Study:
    """
    Results as far as they go; each part may be empty.

    Args:
        similarities: seed -> measure -> matrix of the hidden states, by which the methods cluster.
        groups: seed -> measure -> number of calibration clips -> `skill` or `4 clusters` -> groups.
        references: encoder -> `scores` (metric -> a value for each seed) and `learning_rates` (the same by task).
        runs: key -> line of `runs.*.jsonl`.
        repeats: later lines of keys that `runs` has.
    """

    similarities: dict[int, dict[str, np.ndarray]]
    groups: dict[int, dict[str, dict[int, dict[str, list[list[int]]]]]]
    references: dict[str, dict]
    runs: dict[str, dict]
    repeats: tuple[dict, ...] = ()

    @cached_property
    def methods(self) -> dict[tuple[str, int], Method]:
        """Name and seed -> what the loss sees."""
        names = ("skill", *BASELINES, *VARIANTS)
        return {
            (name, seed): resolve(name, similarity, seed)
            for seed, similarity in self.similarities.items()
            for name in names
        }

    @cached_property
    def planned(self) -> set[str]:
        """Keys of all students, of the seeds whose layers have been clustered."""
        return {
            run_key(self.methods[name, seed], sparsity, seed)
            for name, sparsity, seed in plan()
            if seed in self.similarities
        }

    def runs_of(self, name: str, sparsity: float) -> dict[int, dict]:
        """Seed -> run, of the seeds that a method has been run with."""
        keys = {seed: run_key(self.methods[name, seed], sparsity, seed) for seed in self.similarities}
        return {seed: self.runs[key] for seed, key in keys.items() if key in self.runs}

    def score(self, encoder: str, metric: str) -> np.ndarray:
        """Values of a reference, one for each seed; none if it hasn't been measured."""
        return np.array(self.references.get(encoder, {}).get("scores", {}).get(metric, []))


def read_study(directory: Path) -> Study:
    """
    Reads `clusters.*.json`, `references.json` and `runs.*.jsonl`, whichever there are. Of two lines with one key the
    first counts, the other repeats it; lines that are torn are passed over with a warning.

    Raises:
        `ValueError`: if the directory is missing, or if runs are of different settings.
    """
    if not directory.is_dir():
        raise ValueError(f"There is no directory {directory}; pass the one that `run_study.py` adds results to.")
    path = directory / "references.json"
    references = read_json(path) if path.is_file() else {}
    clusters = {}
    for path in directory.glob("clusters.*.json"):
        seed = path.name.split(".")[1]
        if not seed.isdigit():
            raise ValueError(f"{path} is not a file of the study, clusters.SEED.json; move it elsewhere.")
        clusters[int(seed)] = read_json(path)
    runs: dict[str, dict] = {}
    repeats: list[dict] = []
    for path in sorted(directory.glob("runs.*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                logger.warning("%s has an incomplete line, which is skipped.", path)
                continue
            if not isinstance(row, dict) or "key" not in row or "settings" not in row:
                raise ValueError(f"{path} has a line that is not a run of the study: {line[:80]}")
            if runs.setdefault(row["key"], row) is not row:
                repeats.append(row)
    for name in SHARED_SETTINGS:
        found = {json.dumps(row["settings"][name], sort_keys=True) for row in runs.values()}
        if len(found) > 1:
            raise ValueError(
                f"Runs in {directory} have different `{name}`: {' and '.join(sorted(found))}. They cannot be compared;"
                " keep only the runs with one setting."
            )
    study = Study(
        similarities={
            seed: {measure: np.array(seed_clusters["similarity"][measure]) for measure in MEASURES}
            for seed, seed_clusters in sorted(clusters.items())
        },
        groups={
            seed: {
                measure: {int(size): kinds for size, kinds in seed_clusters["groups"][measure].items()}
                for measure in MEASURES
            }
            for seed, seed_clusters in sorted(clusters.items())
        },
        references=references,
        runs=runs,
        repeats=tuple(repeats),
    )
    if strays := len(runs.keys() - study.planned):
        logger.warning("%d runs in %s do not belong to any method; they are skipped.", strays, directory)
    return study


@dataclass(frozen=True)
class Outcome:
    """
    A number that a run comes to.

    Args:
        label: with its unit and, as an arrow, what is better.
        value: of a run.
        lower_is_better: whether it counts errors.
        digits: for tables.
    """

    label: str
    value: Callable[[dict], float]
    lower_is_better: bool = False
    digits: int = 1


def outcome_of(metric: str) -> Outcome:
    described = SUPERB_METRICS[metric]
    arrow = "↓" if described.lower_is_better else "↑"
    return Outcome(f"{described.label} {arrow}", lambda run: run["scores"][metric], described.lower_is_better)


SCORES = {metric: outcome_of(metric) for metric in METRICS}


def gain(study: Study, floor: str, metric: str) -> np.ndarray:
    """By how much the teacher is better than a floor, seed by seed, in points."""
    sign = -1 if SCORES[metric].lower_is_better else 1
    teacher, floors = study.score("teacher", metric), study.score(floor, metric)
    number = min(len(teacher), len(floors))
    return sign * (teacher[:number] - floors[:number])


def tasks_with_gain(study: Study, floor: str) -> list[str]:
    """
    Metrics in which the teacher beats the floor with every seed. Where there is no gain, or one that chance may have
    made, a share of it would mean nothing.
    """
    return [metric for metric in METRICS if (gains := gain(study, floor, metric)).size and (gains > 0).all()]


def shares(study: Study, run: dict, floor: str = "fbank") -> dict[str, float]:
    """
    Share of the teacher's gain that a student keeps, in percent: `(student - floor) / (teacher - floor)`, where
    teacher and floor are means over the seeds. Below 0 the student is worse than the floor, above 100 better than the
    teacher. Whether a metric counts errors cancels out.

    Args:
        study: for its references.
        run: of the student.
        floor: `fbank`, `mfcc` or `untrained`.

    Returns:
        `dict[str, float]`: a share for each of [`tasks_with_gain`].
    """
    found = {}
    for metric in tasks_with_gain(study, floor):
        low, high = study.score(floor, metric).mean(), study.score("teacher", metric).mean()
        found[metric] = 100 * (run["scores"][metric] - low) / (high - low)
    return found


def mean_share(study: Study, floor: str = "fbank") -> Outcome:
    """Mean of [`shares`]; NaN if the teacher has no gain in any task."""

    def value(run: dict) -> float:
        found = list(shares(study, run, floor).values())
        return float(np.mean(found)) if found else math.nan

    return Outcome("share kept (%) ↑", value)


MEAN_DISTANCE = Outcome(
    "mean distance (1 − CKA) ↓", lambda run: float(np.mean(run["distances"]["cka"])), lower_is_better=True, digits=3
)


def _mean_of_four(run: dict) -> float:
    distances = run["distances"]["cka"]
    return float(np.mean([distances[layer] for (layer,) in dphubert_layers(len(distances) - 1)]))


DPHUBERT_DISTANCE = Outcome("distance at DPHuBERT's four ↓", _mean_of_four, lower_is_better=True, digits=3)


@dataclass(frozen=True)
class Comparison:
    """
    One encoder minus another, by seed.

    Args:
        differences: one for each seed that both have.
        low, high: 95 % confidence interval of their mean, after Student's t; NaN with fewer than two seeds.
        p: of the paired t test, two-sided; 1 if all differences are 0.
        better: seeds with which the first is better.
        detectable: true mean of the differences that such a test, at 5 % and uncorrected, finds in 80 % of all cases,
            if they spread as these do.
    """

    differences: np.ndarray
    low: float
    high: float
    p: float
    better: int
    detectable: float


def compare(study: Study, outcome: Outcome, baseline: str, sparsity: float) -> Comparison | None:
    """SKILL minus a baseline; `None` if there is no seed with which both have been run."""
    ours, theirs = (
        {seed: outcome.value(run) for seed, run in study.runs_of(name, sparsity).items()}
        for name in ("skill", baseline)
    )
    return _compare(ours, theirs, outcome.lower_is_better)


def compare_on_one_machine(study: Study, outcome: Outcome, baseline: str, sparsity: float) -> Comparison | None:
    """As [`compare`], of the seeds with which both have been run on one machine, if need be by a repeat."""
    values: dict[str, dict[int, float]] = {"skill": {}, baseline: {}}
    for seed in study.similarities:
        versions = {}
        for name in values:
            key = run_key(study.methods[name, seed], sparsity, seed)
            found = [study.runs[key]] if key in study.runs else []
            found += [run for run in study.repeats if run["key"] == key]
            versions[name] = {run["settings"]["processor"]: run for run in reversed(found)}
        shared = [machine for machine in versions[baseline] if machine in versions["skill"]]
        for name, method_values in values.items():
            if shared:
                method_values[seed] = outcome.value(versions[name][shared[0]])
    return _compare(*values.values(), outcome.lower_is_better)


def compare_with_teacher(study: Study, metric: str, method: str, sparsity: float) -> Comparison | None:
    """A method minus the teacher, whose heads have the same seeds; `None` if there is nothing to compare."""
    ours = {seed: run["scores"][metric] for seed, run in study.runs_of(method, sparsity).items()}
    theirs = dict(zip(SEEDS, study.score("teacher", metric).tolist(), strict=False))
    return _compare(ours, theirs, SCORES[metric].lower_is_better)


def _compare(ours: dict[int, float], theirs: dict[int, float], lower_is_better: bool) -> Comparison | None:
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return None
    ours, theirs = (np.array([values[seed] for seed in seeds]) for values in (ours, theirs))
    differences = ours - theirs
    better = int((differences < 0).sum() if lower_is_better else (differences > 0).sum())
    if len(seeds) == 1:
        return Comparison(differences, math.nan, math.nan, math.nan, better, math.nan)
    if not differences.any():  # same groups, thus the same runs
        return Comparison(differences, 0.0, 0.0, 1.0, better, 0.0)
    test = ttest_rel(ours, theirs)
    interval = test.confidence_interval(0.95)
    detectable = detectable_effect(len(seeds)) * differences.std(ddof=1)
    return Comparison(differences, interval.low, interval.high, test.pvalue, better, detectable)


def power(effect: float, number: int, level: float = 0.05) -> float:
    """
    How often a paired t test at this level finds a true mean difference of `effect` standard deviations of the
    differences, in its own direction: noncentral t, `T(number - 1, effect * sqrt(number))`.
    """
    critical = t.ppf(1 - level / 2, number - 1)
    return float(nct.sf(critical, number - 1, effect * math.sqrt(number)))


@cache
def detectable_effect(number: int) -> float:
    """Effect of [`power`] 0.8 at a level of 5 %, for `number` pairs, at least two."""
    return brentq(lambda effect: power(effect, number) - 0.8, 0, 100)


def holm(p: Sequence[float]) -> np.ndarray:
    """p of several tests, corrected by Holm (1979): each times the number of those that are no smaller. NaN stays."""
    p = np.array(p, dtype=float)
    order = np.argsort(p)[: np.isfinite(p).sum()]  # NaN comes last
    p[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)), 1)
    return p


def agreements(study: Study, number: str, with_largest: bool) -> dict[str, dict[int, list[float]]]:
    """
    Adjusted Rand indices between groups of layers: 1 if they are the same, 0 on average if they are by chance.

    Args:
        study: for its groups.
        number: of clusters: `skill` (by the silhouette) or `4 clusters`.
        with_largest: compare with the groups of the same seed and the most calibration clips; else the groups of each
            two seeds, with as many clips.

    Returns:
        measure -> number of calibration clips -> an index for each seed or pair of seeds; without the most clips, if
        these are what is compared with.
    """
    found = {}
    for measure in MEASURES:
        groups_by_seed = {seed: groups[measure] for seed, groups in study.groups.items()}
        sizes = sorted(set.intersection(*(set(sizes) for sizes in groups_by_seed.values())))
        labels = {
            (seed, size): group_labels(groups_by_seed[seed][size][number]) for seed in groups_by_seed for size in sizes
        }
        found[measure] = {
            size: [
                float(adjusted_rand_score(labels[first], labels[second]))
                for first, second in (
                    [((seed, size), (seed, sizes[-1])) for seed in groups_by_seed]
                    if with_largest
                    else [((a, size), (b, size)) for a, b in combinations(groups_by_seed, 2)]
                )
            ]
            for size in (sizes[:-1] if with_largest else sizes)
        }
    return found


def group_labels(groups: Sequence[Sequence[int]]) -> np.ndarray:
    """Group of each hidden state, for groups that hold all of them."""
    label = {layer: index for index, group in enumerate(groups) for layer in group}
    return np.array([label[layer] for layer in range(len(label))])
