"""
Tables and figures of the study, from the results of `run_study.py`, finished or not.

    python examples/study/draw_study.py

It prints the tables, draws the figures, and inserts both into the docs page between `<!-- study: NAME -->` and
`<!-- end -->`. Run it again whenever there are new results.
"""

import io
import logging
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import ascii_uppercase

import numpy as np


sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

from study_design import (  # noqa: E402
    BASELINES,
    CALIBRATION_SAMPLES,
    CALIBRATION_SECONDS,
    MEASURES,
    SPARSITIES,
    VARIANTS,
    groups_of,
)
from study_probes import METRICS, TASKS  # noqa: E402
from study_results import (  # noqa: E402
    DPHUBERT_DISTANCE,
    MEAN_DISTANCE,
    SCORES,
    Comparison,
    Outcome,
    Study,
    agreements,
    compare,
    compare_on_one_machine,
    compare_with_teacher,
    detectable_effect,
    gain,
    group_labels,
    holm,
    mean_share,
    power,
    read_study,
    shares,
    tasks_with_gain,
)

from skill_hf import SkillConfig, cluster_layers  # noqa: E402
from skill_hf.cli.settings import parse, require, run_script  # noqa: E402
from skill_hf.files import try_directory, try_file  # noqa: E402
from skill_hf.grouping.clustering import layer_tree, silhouette  # noqa: E402
from skill_hf.publishing.plots import (  # noqa: E402
    COLOURS,
    DARK,
    LIGHT,
    MARKERS,
    index_runs,
    label_axes,
    new_figure,
    plot_layer_similarity,
)


HERE = Path(__file__).resolve().parent
DOCS = HERE.parents[1] / "docs"

MAIN_SPARSITY = 0.75
COMPARED = ("skill", *BASELINES)
NAMES = {"skill": "SKILL", "dphubert": "DPHuBERT", "distilhubert": "DistilHuBERT"}
FLOORS = ("fbank", "mfcc", "untrained")
REFERENCES = ("teacher", *FLOORS)
NOTHING = "No results yet."
# One colour and mark for a method, in all figures.
STYLES = dict(zip(COMPARED, zip((*COLOURS, DARK), (*MARKERS, "X"), strict=True), strict=True))


@dataclass
class DrawArguments:
    results: Path = field(default=HERE / "results", metadata={"help": "Results directory of `run_study.py`."})
    page: Path = field(default=DOCS / "study.md", metadata={"help": "Markdown page whose blocks to fill."})
    figures: Path = field(default=DOCS / "figures", metadata={"help": "Output directory for the figures."})


def name_of(method: str) -> str:
    return NAMES.get(method, method)


def table(header: Sequence[str], rows: Sequence[Sequence], texts: int = 1) -> str:
    """A Markdown table; the first `texts` columns hold text, the others numbers."""
    rule = ["---"] * texts + ["---:"] * (len(header) - texts)
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (header, rule, *rows))


def number(value: float, digits: int = 1, signed: bool = False) -> str:
    if not math.isfinite(value):
        return "–"
    value = round(value, digits) + 0.0  # no negative zero
    return f"{value:{'+' if signed else ''}.{digits}f}".replace("-", "−")


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean and standard deviation; of a single value, the value."""
    if not len(values) or not math.isfinite(np.mean(values)):
        return "–"
    mean = number(np.mean(values), digits)
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


def cell(outcome: Outcome, runs: dict[int, dict]) -> str:
    return spread([outcome.value(run) for run in runs.values()], outcome.digits)


def partition(groups: Sequence[Sequence[int]]) -> str:
    names = [", ".join(str(a) if a == b else f"{a}–{b}" for a, b in index_runs(group)) for group in groups]
    return ", ".join(f"{{{name}}}" for name in names)


def lacking(study: Study, methods: Sequence[str], sparsity: float) -> str:
    names = [name_of(method) for method in methods if not study.runs_of(method, sparsity)]
    return f"\n\nNo runs yet: {', '.join(names)}." if names else ""


def floors_note(study: Study, floor: str) -> str:
    left_out = [SCORES[metric].label for metric in METRICS if metric not in tasks_with_gain(study, floor)]
    if not left_out or not study.score("teacher", METRICS[0]).size or not study.score(floor, METRICS[0]).size:
        return ""
    return (
        f"\n\nThe teacher does not beat {floor} with every seed in {', '.join(left_out)}, so the mean share over"
        f" {floor} excludes these tasks."
    )


def setting(study: Study) -> str:
    if not study.runs or not study.similarities:
        return ""
    runs = list(study.runs.values())
    settings = [run["settings"] for run in runs]
    first = settings[0]

    def all_of(name: str) -> str:
        return ", ".join(sorted({str(setting[name]) for setting in settings}))

    reached = []
    for sparsity in sorted(SPARSITIES):
        shares_reached = [run["sparsity_reached"] for run in runs if run["sparsity"] == sparsity]
        if shares_reached:
            low, high = (f"{value:.3f}" for value in (min(shares_reached), max(shares_reached)))
            reached.append(f"{sparsity:g}: {low}" if low == high else f"{sparsity:g}: {low} to {high}")
    seconds = first["max_steps"] * first["batch_size"] * first["max_seconds"]
    done = len(study.runs.keys() & study.planned)
    rates = ", ".join(
        f"{task.upper()} {'/'.join(f'{rate:g}' for rate in task_rates)}"
        for task, task_rates in first["learning_rates"].items()
    )
    rows = [
        ("teacher", f"{num_hidden_states(study) - 1} layers, {teacher_parameters(study):,} parameters"),
        ("students", f"{done} of {len(study.planned)} planned; methods with the same groups share them"),
        ("seeds", f"{', '.join(map(str, sorted(study.similarities)))}: of calibration, training and heads"),
        ("calibration", f"{CALIBRATION_SAMPLES} clips of at most {CALIBRATION_SECONDS:g} s"),
        (
            "training of a student",
            f"{first['max_steps']} steps of {first['batch_size']} crops of {first['max_seconds']:g} s",
        ),
        ("audio per student", f"{seconds / 60:.0f} min"),
        ("sparsity reached", "; ".join(reached)),
        ("learning rates of the heads", rates),
        *((f"on {processor}", time_of(machine_runs)) for processor, machine_runs in by_machine(runs).items()),
        (
            "versions",
            ", ".join(f"{package} {all_of(package)}" for package in ("python", "torch", "transformers", "datasets")),
        ),
    ]
    return f"{table(('', ''), rows, texts=2)}\n\n{machines(study)}{repeats_note(study)}"


def machines(study: Study) -> str:
    """Which machine trained the students of each method, as these are not evenly shared out."""
    letters = dict(zip(sorted(by_machine(list(study.runs.values()))), ascii_uppercase, strict=False))
    ordered, rows = sorted(SPARSITIES), []
    for name in (*COMPARED, *VARIANTS):
        runs_by_sparsity = [study.runs_of(name, sparsity) for sparsity in ordered]
        if any(runs_by_sparsity):
            cells = [
                "".join(letters[runs[seed]["settings"]["processor"]] for seed in sorted(runs))
                for runs in runs_by_sparsity
            ]
            rows.append([name_of(name), *(cell or "–" for cell in cells)])
    names = ", ".join(f"{letter}: {machine}" for machine, letter in letters.items())
    header = ["machine of training and probing, by seed", *(f"sparsity {sparsity:g}" for sparsity in ordered)]
    return f"{table(header, rows, texts=len(header))}\n\n{names}."


def by_machine(runs: Sequence[dict]) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for run in runs:
        found.setdefault(run["settings"]["processor"], []).append(run)
    return found


def time_of(runs: Sequence[dict]) -> str:
    train, probe = (np.array([run["seconds"][name] for run in runs]) for name in ("training", "probes"))
    return (
        f"{len(runs)} students, {np.median(train):.0f} s to train one, {np.median(probe):.0f} s to probe it (medians)"
    )


def repeats_note(study: Study) -> str:
    """How far students are apart that were trained twice."""
    if not study.repeats:
        return ""
    pairs = [(study.runs[run["key"]], run) for run in study.repeats]
    most = [
        f"{outcome.label} {number(max(abs(outcome.value(a) - outcome.value(b)) for a, b in pairs), outcome.digits)}"
        for outcome in (*SCORES.values(), mean_share(study), MEAN_DISTANCE)
    ]
    places = Counter(" and ".join(sorted(run["settings"]["processor"] for run in pair)) for pair in pairs)
    where = "; ".join(f"{count} on {names}" for names, count in sorted(places.items()))
    return (
        f"\n\n{len(pairs)} students were trained twice: {where}. Largest differences between the two:"
        f" {', '.join(most)}."
    )


def teacher_parameters(study: Study) -> int:
    run = next(iter(study.runs.values()))
    return round(run["parameters"] / (1 - run["sparsity_reached"]))


def references(study: Study) -> str:
    found = [name for name in REFERENCES if name in study.references]
    if not found:
        return ""
    rows = [
        [name, len(study.score(name, METRICS[0])), *(spread(study.score(name, metric)) for metric in METRICS)]
        for name in found
    ]
    if "teacher" in found:
        for floor in found[1:]:
            gains = [gain(study, floor, metric) for metric in METRICS]
            rows.append([f"teacher's gain over {floor}", len(gains[0]), *map(spread, gains)])
    text = table(["", "seeds", *(SCORES[metric].label for metric in METRICS)], rows)
    if "teacher" in found:
        rates = [
            f"{task.upper()} {task_rates[0]:g}"
            for task, task_rates in study.references["teacher"]["learning_rates"].items()
        ]
        text += (
            f"\n\nBest learning rates for the teacher on the validation sets, with the first seed:"
            f" {', '.join(rates)}. All students are probed with these."
        )
    return text + "".join(floors_note(study, floor) for floor in FLOORS)


def kept_by_task(study: Study, sparsity: float) -> str:
    """The share of the teacher's gain that each method keeps; empty without runs."""
    rows = []
    for name in COMPARED:
        if runs := study.runs_of(name, sparsity):
            shares_of_runs = [shares(study, run) for run in runs.values()]
            by_task = [spread([share[metric] for share in shares_of_runs if metric in share]) for metric in METRICS]
            means = [cell(mean_share(study, floor), runs) for floor in FLOORS]
            rows.append([name_of(name), len(runs), *by_task, *means])
    tasks, means = [task.upper() for task in TASKS], [f"mean, over {floor}" for floor in FLOORS[1:]]
    return table(["% of the gain over fbank", "seeds", *tasks, "mean", *means], rows) if rows else ""


def scores_of_students(study: Study, sparsity: float) -> list[list[str]]:
    rows = []
    for name in COMPARED:
        if runs := study.runs_of(name, sparsity):
            size = np.mean([run["parameters"] for run in runs.values()])
            scores = [cell(outcome, runs) for outcome in SCORES.values()]
            rows.append([name_of(name), len(runs), f"{size:,.0f}", *scores])
    return rows


def scores_table(rows: Sequence[Sequence]) -> str:
    return table(["", "seeds", "parameters", *(SCORES[metric].label for metric in METRICS)], rows)


def main_table(study: Study) -> str:
    kept = kept_by_task(study, MAIN_SPARSITY)
    if not kept:
        return ""
    rows = []
    for name in REFERENCES:
        if study.score(name, METRICS[0]).size:
            size = f"{teacher_parameters(study):,}" if name in ("teacher", "untrained") else "–"
            scores = [study.score(name, metric) for metric in METRICS]
            rows.append([f"*{name}*", len(scores[0]), size, *map(spread, scores)])
    scores = scores_table(rows + scores_of_students(study, MAIN_SPARSITY))
    notes = "".join(floors_note(study, floor) for floor in FLOORS) + lacking(study, COMPARED, MAIN_SPARSITY)
    return f"{scores}\n\n{kept}{notes}"


def scores_caption(study: Study) -> str:
    if not any(study.runs_of(name, sparsity) for name in COMPARED for sparsity in SPARSITIES):
        return ""
    return (
        "Each mark is a seed, each bar the mean of a method. Axes of error rates are reversed, so higher is better."
        " The line of the untrained network is omitted where it is far from the others."
    )


def sparsities(study: Study) -> str:
    outcome, rows = mean_share(study), []
    ordered = sorted(SPARSITIES)
    for name in COMPARED:
        runs = [study.runs_of(name, sparsity) for sparsity in ordered]
        if any(runs):
            rows.append(
                [name_of(name), *(f"{cell(outcome, seeds)} ({len(seeds)})" if seeds else "–" for seeds in runs)]
            )
    if not rows:
        return ""
    header = [
        "% of the gain over fbank, mean of the tasks (seeds)",
        *(f"sparsity {sparsity:g}" for sparsity in ordered),
    ]
    tables = [table(header, rows) + floors_note(study, "fbank")]
    for sparsity in ordered:
        if sparsity != MAIN_SPARSITY and (kept := kept_by_task(study, sparsity)):
            scores = scores_table(scores_of_students(study, sparsity))
            tables.append(f"Task by task at sparsity {sparsity:g}:\n\n{scores}\n\n{kept}")
    return "\n\n".join(tables)


def against_teacher(study: Study) -> str:
    """Students minus teacher, task by task, and which differences are more than chance."""
    tables = []
    for sparsity in sorted(SPARSITIES):
        found = {
            (name, metric): compared
            for name in COMPARED
            for metric in METRICS
            if (compared := compare_with_teacher(study, metric, name, sparsity)) is not None
        }
        if not found:
            continue
        corrected = dict(zip(found, holm([comparison.p for comparison in found.values()]), strict=True))
        rows = []
        for name in dict.fromkeys(name for name, _ in found):
            cells = []
            for metric in METRICS:
                comparison, digits = found[name, metric], SCORES[metric].digits
                text = f"{number(comparison.differences.mean(), digits, True)} ({p_value(comparison.p)})"
                cells.append(f"**{text}**" if corrected[name, metric] < 0.05 else text)
            rows.append([name_of(name), len(comparison.differences), *cells])
        header = [f"sparsity {sparsity:g}: student minus teacher (p)", "seeds"]
        tables.append(table([*header, *(SCORES[metric].label for metric in METRICS)], rows))
    note = "Differences are paired by the seed of the heads; bold: p below 0.05 after Holm's correction over a table."
    return "\n\n".join([*tables, note]) if tables else ""


def significance(study: Study) -> str:
    outcomes = {
        f"Mean share kept (%) at sparsity {sparsity:g}": ([mean_share(study)], sparsity) for sparsity in SPARSITIES
    }
    if not tasks_with_gain(study, "fbank"):
        outcomes = {}
    outcomes |= {f"Scores at sparsity {sparsity:g}": (list(SCORES.values()), sparsity) for sparsity in SPARSITIES}
    for sparsity in SPARSITIES:
        title = (
            f"Distance to the teacher (1 − CKA), mean of all hidden states and of DPHuBERT's, at sparsity {sparsity:g}"
        )
        outcomes[title] = ([MEAN_DISTANCE, DPHUBERT_DISTANCE], sparsity)
    tables, most = [], 0
    for title, (compared_outcomes, sparsity) in outcomes.items():
        several = len(compared_outcomes) > 1
        if not (compared := against_baselines(study, compare, compared_outcomes, sparsity)):
            continue
        most = max(most, *(len(found.differences) for _, _, found in compared))
        tables.append(f"{title}: SKILL minus baseline\n\n{comparisons(compared, several)}")
        if several:
            continue
        on_one = against_baselines(study, compare_on_one_machine, compared_outcomes, sparsity)
        # Where all pairs are, it is the same table.
        if on_one and [found.p for *_, found in on_one] != [found.p for *_, found in compared]:
            text = comparisons(on_one, several)
            tables.append(f"The same for pairs that were trained on one machine:\n\n{text}")
    if not tables:
        return ""
    text = (
        "Differences are paired by seed; intervals and p come from a two-sided paired t test, and Holm's correction"
        " is over all rows of a table. *Detectable* is the true difference that such a test would find with a power"
        " of 80 %, at the 5 % level, without correction and with the spread observed here."
    )
    if most > 1:
        text += (
            f" With {most} seeds this is {detectable_effect(most):.1f} standard deviations of the differences; a"
            f" difference of one standard deviation is missed in {100 * (1 - power(1, most)):.0f} % of all cases, so a"
            f" difference may exist even if it is not significant. Even if all {most} seeds agree in sign, a sign test"
            f" gives p = {0.5 ** (most - 1):.3g}. Seeds cover calibration clips, training and heads: results with"
            " another teacher or other data may differ."
        )
    return "\n\n".join([*tables, text])


def against_baselines(
    study: Study, comparing: Callable, outcomes: Sequence[Outcome], sparsity: float
) -> list[tuple[Outcome, str, Comparison]]:
    """What [`compare`] or [`compare_on_one_machine`] finds for each outcome and baseline that was run."""
    return [
        (outcome, baseline, found)
        for outcome in outcomes
        for baseline in BASELINES
        if (found := comparing(study, outcome, baseline, sparsity)) is not None
    ]


def comparisons(compared: Sequence[tuple[Outcome, str, Comparison]], several: bool) -> str:
    corrected = holm([found.p for _, _, found in compared])
    rows = []
    for (outcome, baseline, found), by_holm in zip(compared, corrected, strict=True):
        digits = outcome.digits
        mean, low, high = (number(value, digits, True) for value in (found.differences.mean(), found.low, found.high))
        rows.append(
            [
                *([outcome.label] if several else []),
                name_of(baseline),
                len(found.differences),
                mean,
                "–" if low == "–" else f"{low} to {high}",
                *map(p_value, (found.p, by_holm)),
                f"{found.better} of {len(found.differences)}",
                number(found.detectable, digits),
            ]
        )
    header = ["baseline", "seeds", "difference", "95 % interval", "p", "p, Holm", "SKILL better", "detectable"]
    return table([*(["score"] if several else []), *header], rows, texts=2 if several else 1)


def distances(study: Study) -> str:
    rows = []
    for sparsity in sorted(SPARSITIES):
        for name in COMPARED:
            if runs := study.runs_of(name, sparsity):
                parts = distance_parts(study, name, runs)
                heads = [sum(run["architecture"]["num_heads"]) for _, run in sorted(runs.items())]
                left = ", ".join(map(str, heads))
                rows.append(
                    [sparsity, name_of(name), len(runs), *(spread(values, 3) for values in parts.values()), left]
                )
    if not rows:
        return ""
    header = ["sparsity", "mean distance (1 − CKA)", "seeds", "all hidden states", "distilled ones", "the others"]
    text = table([*header, "DPHuBERT's four", "all but these", "heads left, by seed"], rows, texts=2)
    return text + lacking(study, COMPARED, MAIN_SPARSITY)


def distance_parts(study: Study, name: str, runs: dict[int, dict]) -> dict[str, list[float]]:
    """Mean distance of each seed over all hidden states, over those distilled or not, and over DPHuBERT's or not."""
    parts = {"all": [], "own": [], "others": [], "spread": [], "rest": []}
    for seed, run in runs.items():
        distances = np.array(run["distances"]["cka"])
        for kind, method in (("own", name), ("spread", "dphubert")):
            distilled = np.isin(np.arange(len(distances)), np.concatenate(study.methods[method, seed].layer_groups))
            parts[kind].append(distances[distilled].mean())
            if not distilled.all():
                parts["others" if kind == "own" else "rest"].append(distances[~distilled].mean())
        parts["all"].append(distances.mean())
    return parts


def variants(study: Study) -> str:
    rows, means = [], (mean_share(study), MEAN_DISTANCE)
    for name in ("skill", *VARIANTS):
        runs = study.runs_of(name, MAIN_SPARSITY)
        if not runs:
            continue
        groups = {seed: study.methods[name, seed].layer_groups for seed in study.similarities}
        (usual, times), *others = Counter(groups.values()).most_common()
        same = sum(seed_groups == study.methods["skill", seed].layer_groups for seed, seed_groups in groups.items())
        rows.append(
            [
                "SKILL: cka, average linkage" if name == "skill" else name,
                f"{partition(usual)} ({times} of {len(groups)} seeds)",
                1 + len(others),
                f"{same} of {len(groups)}",
                len(runs),
                *(cell(outcome, runs) for outcome in SCORES.values()),
                *(cell(outcome, runs) for outcome in (mean_share(study), MEAN_DISTANCE)),
                *(
                    "–" if name == "skill" else p_against_skill(study, outcome, name)
                    for outcome in (mean_share(study), MEAN_DISTANCE)
                ),
            ]
        )
    if not rows:
        return ""
    header = ["", "usual groups", "distinct", "same as SKILL's", "seeds run"]
    labels = [outcome.label for outcome in (*SCORES.values(), *means)]
    text = table([*header, *labels, "p of the share", "p of the distance"], rows, texts=2)
    note = (
        "p: paired by seed against SKILL, without correction; 1 where all groups, and thus the students, are the same."
    )
    return f"{text}\n\n{note}{lacking(study, VARIANTS, MAIN_SPARSITY)}"


def p_against_skill(study: Study, outcome: Outcome, name: str) -> str:
    found = compare(study, outcome, name, MAIN_SPARSITY)
    return "–" if found is None else p_value(found.p)


def p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else number(p, 3)


def num_hidden_states(study: Study) -> int:
    return len(next(iter(study.similarities.values()))["cka"])


def chosen_groups(study: Study, measure: str) -> dict[int, list[list[int]]]:
    """Seed -> groups by the silhouette, as the methods have them."""
    name = "skill" if measure == "cka" else f"measure {measure}"
    return {seed: groups_of(name, similarity) for seed, similarity in study.similarities.items()}


def groups_table(study: Study) -> str:
    if not study.similarities:
        return ""
    found, alike, silhouettes = [], [], []
    num_layers = num_hidden_states(study)
    numbers = range(2, num_layers)
    for measure in MEASURES:
        seeds_of: dict[str, list[int]] = {}
        pairs = {"all": [], "inside": [], "between": []}
        by_number = []
        for seed, groups in sorted(chosen_groups(study, measure).items()):
            similarity = study.similarities[seed][measure]
            seeds_of.setdefault(f"{len(groups)} | {partition(groups)}", []).append(seed)
            labels = group_labels(groups)
            first, second = np.triu_indices(num_layers, k=1)
            same, pair_similarity = labels[first] == labels[second], similarity[first, second]
            for kind, chosen in (("all", same | True), ("inside", same), ("between", ~same)):
                pairs[kind] += [pair_similarity[chosen].mean()] if chosen.any() else []
            by_number.append(
                [
                    silhouette(
                        np.maximum(1 - similarity, 0),
                        group_labels(cluster_layers(similarity, SkillConfig(num_clusters=count))),
                    )
                    for count in numbers
                ]
            )
        found += [(measure, groups, ", ".join(map(str, seeds))) for groups, seeds in seeds_of.items()]
        alike.append((measure, *(spread(values, 3) for values in pairs.values())))
        means = np.mean(by_number, axis=0)
        silhouettes.append(
            (
                measure,
                *(
                    f"**{values:.2f}**" if index == means.argmax() else f"{values:.2f}"
                    for index, values in enumerate(means)
                ),
            )
        )
    tables = [
        table(("measure", "number", "groups", "seeds"), found, texts=4),
        "Silhouette by the number of groups, mean over the seeds:\n\n" + table(("measure", *numbers), silhouettes),
        "Mean similarity of two hidden states, ± over the seeds:\n\n"
        + table(("measure", "all pairs", "in a group", "in different groups"), alike),
    ]
    return "\n\n".join(tables)


def most_clips(study: Study) -> int:
    return min(max(seed_groups["cka"]) for seed_groups in study.groups.values())


def stability(study: Study) -> str:
    if not study.groups:
        return ""
    tables = []
    seeds = ", ".join(map(str, study.groups))
    most = f"those of {most_clips(study)} clips with the same seed, which include them"
    titles = {
        True: f"Groups by number of clips against {most}: mean adjusted Rand index over the seeds {seeds} (lowest).",
        False: (
            f"Groups of two seeds with the same number of clips: mean over all pairs of the seeds {seeds} (lowest)."
        ),
    }
    for with_largest, title in titles.items():
        if not with_largest and len(study.groups) < 2:
            continue
        rows = []
        for number_of, label in (("skill", "by silhouette"), ("4 clusters", "4")):
            for measure, by_size in agreements(study, number_of, with_largest).items():
                cells = [f"{number(np.mean(values), 2)} ({number(min(values), 2)})" for values in by_size.values()]
                rows.append([measure, label, *cells])
        sizes = list(by_size)
        text = table(["measure", "number of groups", *(f"{size} clips" for size in sizes)], rows, texts=2)
        tables.append(f"{title}\n\n{text}")
    return "\n\n".join(tables)


def draw_scores(study: Study):
    figure = new_figure(8, 7)
    panels = figure.subplots(2, 2)
    ordered = sorted(SPARSITIES)
    places = dict(zip(COMPARED, np.linspace(-0.36, 0.36, len(COMPARED)), strict=True))
    line = {"color": DARK, "lw": 1.4, "zorder": 1}
    for axes, (metric, outcome) in zip(panels.flat, SCORES.items(), strict=True):
        for name, style in (("teacher", "-"), ("fbank", "--"), ("mfcc", "-.")):
            if (scores := study.score(name, metric)).size:
                axes.axhline(scores.mean(), label=name, ls=style, **line)
        for name, (colour, marker) in STYLES.items():
            points = [
                (index + places[name], [run["scores"][metric] for run in study.runs_of(name, sparsity).values()])
                for index, sparsity in enumerate(ordered)
            ]
            label = name_of(name)
            for x, values in points:
                if values:
                    style = {"color": colour, "marker": marker, "ls": "", "markersize": 4.5, "alpha": 0.7}
                    axes.plot([x] * len(values), values, label=label, markeredgewidth=0, **style)
                    axes.plot([x - 0.05, x + 0.05], [np.mean(values)] * 2, color=colour, lw=2.2)
                    label = None
        for edge in range(1, len(ordered)):
            axes.axvline(edge - 0.5, color=LIGHT, lw=0.8)
        axes.set_ylim(axes.get_ylim()[:: -1 if outcome.lower_is_better else 1])
        if (scores := study.score("untrained", metric)).size:
            axes.axhline(scores.mean(), label="untrained", ls=":", **line)
        axes.set_xticks(range(len(ordered)), [f"{sparsity:g}" for sparsity in ordered])
        axes.set_xlim(-0.5, len(ordered) - 0.5)
        axes.grid(axis="y", color=LIGHT, lw=0.6)
        title = outcome.label[:-2] + (" (%), reversed: better is up" if outcome.lower_is_better else " (%)")
        label_axes(axes, title, "sparsity" if axes in panels[-1] else "")
        axes.tick_params(axis="x", length=0)
    handles = {}
    for axes in panels.flat:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    labels = [label for label in (*REFERENCES, *map(name_of, COMPARED)) if label in handles]
    style = {"loc": "outside lower center", "ncols": 5, "frameon": False, "fontsize": 9}
    figure.legend([handles[label] for label in labels], labels, **style)
    return figure


def draw_distances(study: Study):
    shown = [sparsity for sparsity in sorted(SPARSITIES) if any(study.runs_of(name, sparsity) for name in COMPARED)]
    shown = shown or [MAIN_SPARSITY]
    figure = new_figure(8, 0.9 + 3.3 * len(shown))
    panels = figure.subplots(len(shown), 2, sharex=True, sharey="row", squeeze=False)
    every = ("every layer", "one group", "random groups")
    some = tuple(name for name in BASELINES if name not in every)
    kinds = {"distil some": some, "distil all": every}
    layers = np.arange(num_hidden_states(study))
    for row, sparsity in zip(panels, shown, strict=True):
        for axes, (kind, names) in zip(row, kinds.items(), strict=True):
            for name in ("skill", *names):
                if runs := study.runs_of(name, sparsity):
                    _plot_distances(axes, layers, study, name, runs)
            axes.set_xticks(layers)
            axes.grid(axis="y", color=LIGHT, lw=0.8)
            if axes.lines:
                axes.legend(frameon=False, fontsize=8)
            bottom = "hidden state (0: input of the first layer)" if sparsity == shown[-1] else ""
            left = "distance (1 − CKA), held-out readers" if axes is row[0] else ""
            label_axes(axes, f"sparsity {sparsity:g}: SKILL and those that {kind}", bottom, left)
        row[0].set_ylim(bottom=0)
    figure.suptitle(
        "Mean of n seeds and their standard deviation; filled marks: hidden states that are distilled", fontsize=10
    )
    return figure


def _plot_distances(axes, layers: np.ndarray, study: Study, name: str, runs: dict[int, dict]) -> None:
    distances = np.array([run["distances"]["cka"] for run in runs.values()])
    mean = distances.mean(0)
    colour, marker = STYLES[name]
    style = {"color": colour, "marker": marker, "markersize": 5.5}
    distilled = np.isin(layers, np.concatenate(study.methods[name, next(iter(runs))].layer_groups))
    label = f"{name_of(name)} (n = {len(runs)})"
    axes.plot(mean, label=label, lw=1.8, markevery=layers[distilled].tolist(), **style)
    axes.plot(layers[~distilled], mean[~distilled], ls="", markerfacecolor="white", **style)
    if len(runs) > 1:
        sd = distances.std(0, ddof=1)
        axes.fill_between(layers, mean - sd, mean + sd, color=colour, alpha=0.18, lw=0)


def draw_groups(study: Study):
    seed = min(study.similarities)
    similarity = study.similarities[seed]["cka"]
    return plot_layer_similarity(similarity, layer_tree(similarity, SkillConfig()), chosen_groups(study, "cka")[seed])


def draw_stability(study: Study):
    figure = new_figure(8, 5.6)
    panels = figure.subplots(2, 2, sharex=True, sharey=True)
    for row, with_largest in zip(panels, (True, False), strict=True):
        for axes, number_of in zip(row, ("skill", "4 clusters"), strict=True):
            found = agreements(study, number_of, with_largest)
            for index, (measure, colour, marker) in enumerate(zip(MEASURES, COLOURS, MARKERS, strict=False)):
                sizes = list(found[measure])
                means = [np.mean(values) if values else math.nan for values in found[measure].values()]
                places = np.arange(len(sizes)) + 0.05 * (index - 1.5)  # lines may coincide
                axes.plot(places, means, label=measure, color=colour, marker=marker, markersize=5.5, lw=1.6)
            axes.set_xticks(range(len(sizes)), sizes)
            axes.grid(axis="y", color=LIGHT, lw=0.8)
            against = f"against {most_clips(study)} clips, same seed" if with_largest else "between two seeds"
            title = ("number by silhouette, " if number_of == "skill" else "4 groups, ") + against
            xlabel = "" if with_largest else "calibration clips"
            label_axes(axes, title, xlabel, "adjusted Rand index" if axes is row[0] else "")
    panels[0, 0].set_ylim(min(0, panels[0, 0].get_ylim()[0]), 1.05)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure


TABLES: dict[str, Callable[[Study], str]] = {
    "setting": setting,
    "references": references,
    "main": main_table,
    "scores figure": scores_caption,
    "sparsities": sparsities,
    "against the teacher": against_teacher,
    "significance": significance,
    "distances": distances,
    "variants": variants,
    "groups": groups_table,
    "stability": stability,
}


@dataclass(frozen=True)
class Picture:
    file: str
    text: str
    draw: Callable


PICTURES = {
    "scores figure": Picture(
        "study_scores.png", "Scores of each method by sparsity, a mark for each seed", draw_scores
    ),
    "distances": Picture("study_distances.png", "Distance of each method to the teacher by layer", draw_distances),
    "groups": Picture(
        "study_groups.png", "CKA of the teacher's hidden states, seed 0, and SKILL's groups", draw_groups
    ),
    "stability": Picture("study_stability.png", "Agreement of groups by number of calibration clips", draw_stability),
}


def make_blocks(study: Study, figures: str) -> dict[str, str]:
    """
    Args:
        study: what there is.
        figures: the directory of the figures, as the page links to it.

    Returns:
        `dict[str, str]`: name of a block -> Markdown; [`NOTHING`] where it has no results yet.
    """
    blocks = {name: make(study) or NOTHING for name, make in TABLES.items()}
    for name, picture in PICTURES.items():
        if blocks[name] != NOTHING:
            blocks[name] = f"![{picture.text}]({figures}/{picture.file})\n\n{blocks[name]}"
    return blocks


BLOCK = re.compile(r"(<!-- study: (?P<name>[^>]*?) -->\n)(?P<content>.*?)(<!-- end -->)", re.DOTALL)


def fill(page: str, blocks: dict[str, str]) -> str:
    """
    A page with new contents between its markers. It may lack blocks.

    Raises:
        `ValueError`: if it has a block of an unknown name, or one without an end.
    """

    def replace(match: re.Match) -> str:
        name = match["name"]
        if "<!-- study:" in match["content"]:
            raise ValueError(f"The block {name!r} has no `<!-- end -->`.")
        if name not in blocks:
            raise ValueError(f"There is no block {name!r}; the blocks are {', '.join(blocks)}.")
        return f"{match[1]}{blocks[name]}\n{match[4]}"

    filled = BLOCK.sub(replace, page)
    if page.count("<!-- study:") != len(BLOCK.findall(page)):
        raise ValueError(
            "A block has no `<!-- end -->`, or its marker is not a line of the form `<!-- study: NAME -->`."
        )
    return filled


def save(figure, path: Path) -> None:
    """A PNG of 256 colours, which makes it a third of the size."""
    from PIL import Image

    image = io.BytesIO()
    figure.savefig(image)
    Image.open(image).convert("RGB").quantize(256).save(path, optimize=True)


def link_to(figures: Path, page: Path) -> str:
    return Path(os.path.relpath(figures, page.parent)).as_posix()


def run(args: DrawArguments) -> None:
    require("matplotlib", "matplotlib", "The figures need")
    if not args.page.is_file():
        raise ValueError(f"There is no page {args.page}; pass one with lines of the form `<!-- study: NAME -->`.")
    study = read_study(args.results)
    blocks = make_blocks(study, link_to(args.figures, args.page))
    try_directory(args.figures, "figures")
    try_file(args.page, "page")
    filled = fill(args.page.read_text(encoding="utf-8"), blocks)
    if any(blocks[name] != NOTHING for name in PICTURES):
        args.figures.mkdir(parents=True, exist_ok=True)
    for name, picture in PICTURES.items():
        if blocks[name] != NOTHING:
            save(picture.draw(study), args.figures / picture.file)
    args.page.write_text(filled, encoding="utf-8")
    for name, block in blocks.items():
        print(f"## {name}\n\n{block}\n")


def main(arguments: list[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return run_script(lambda: run(*parse(arguments, (DrawArguments,))))


if __name__ == "__main__":
    sys.exit(main())
