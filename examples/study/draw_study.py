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
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np


sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

from study_design import (  # noqa: E402
    BASELINES,
    METHODS,
    OPTIONS,
    POST_NORM,
    PUBLISHED,
    REMOVED,
    ROBUST,
    SHAPE,
    SHORT_STEPS,
    STAGES,
    TEACHERS,
    TUNED,
    UNEQUAL,
    WEIGHTED,
    Condition,
    at,
    plan,
)
from study_probes import METRICS  # noqa: E402
from study_results import (  # noqa: E402
    DISTANCE,
    DISTANCE_SECOND_SPEAKER,
    HELD_OUT,
    SCORES,
    Outcome,
    Study,
    compare,
    gain,
    holm,
    paired,
    read_study,
    share_kept,
)

from skill_hf.cli.settings import parse, require, run_script  # noqa: E402
from skill_hf.files import try_directory, try_file  # noqa: E402
from skill_hf.publishing.plots import COLOURS, DARK, LIGHT, MARKERS, index_runs, label_axes, new_figure  # noqa: E402


HERE = Path(__file__).resolve().parent
DOCS = HERE.parents[1] / "docs"

COMPARED = ("SKILL", *BASELINES, SHAPE)
FLOORS = ("fbank", "mfcc", "untrained")
LAYERS_SHOWN = (*at(0.75), *at(0.9))
NOTHING = "No results yet."
# One colour and mark for a method, in all figures.
STYLES = dict(
    zip(
        COMPARED,
        zip(
            (*COLOURS, DARK, "#999999", "#882255", "#117733", "#AA4499", "#AA7700"), (*MARKERS, *"X*pd<>"), strict=True
        ),
        strict=True,
    )
)


@dataclass
class DrawArguments:
    results: Path = field(default=HERE / "results", metadata={"help": "Results directory of `run_study.py`."})
    page: Path = field(default=DOCS / "study.md", metadata={"help": "Markdown page whose blocks to fill."})
    figures: Path = field(default=DOCS / "figures", metadata={"help": "Output directory for the figures."})


def table(header: Sequence[str], rows: Sequence[Sequence], texts: int = 1) -> str:
    """A Markdown table; the first `texts` columns hold text, the others numbers."""
    rule = ["---"] * texts + ["---:"] * (len(header) - texts)
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (header, rule, *rows))


def number(value: float, digits: int = 1, signed: bool = False) -> str:
    if not math.isfinite(value):
        return "–"
    value = round(value, digits) + 0.0  # no negative zero
    return f"{value:{'+' if signed else ''}.{digits}f}".replace("-", "−")


def spread(values: Sequence[float], digits: int = 1, signed: bool = False) -> str:
    """Mean and standard deviation; of a single value, the value."""
    values = [value for value in values if math.isfinite(value)]
    if not values:
        return "–"
    mean = number(np.mean(values), digits, signed)
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


def with_number(values: Sequence[float], digits: int = 1, signed: bool = False) -> str:
    """Mean and standard deviation, and the number of values."""
    return f"{spread(values, digits, signed)} ({len(values)})" if values else "–"


def p_value(p: float) -> str:
    return "–" if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def conditions_of(study: Study, teacher: str) -> list[Condition]:
    """Those with which something has been measured, by sparsity."""
    found = {student.condition for student in study.rows if student.condition.teacher == teacher}
    return sorted(found, key=lambda condition: (condition.sparsity, condition.steps))


def compared_conditions(study: Study, teacher: str) -> list[Condition]:
    """Those in which methods are compared; short runs show the defaults."""
    return [condition for condition in conditions_of(study, teacher) if condition.steps not in SHORT_STEPS]


def per_teacher(make: Callable[[Study, str], str]) -> Callable[[Study], str]:
    """A block with a part for each teacher that has results."""

    def block(study: Study) -> str:
        parts = {teacher: make(study, teacher) for teacher in TEACHERS if conditions_of(study, teacher)}
        return "\n\n".join(f"Teacher: {teacher}.\n\n{text}" for teacher, text in parts.items() if text)

    return block


def of_before(make: Callable[[Study], str]) -> Callable[[Study], str]:
    """The same, of the students of the recipe before."""
    return lambda study: make(study.before) if study.before else ""


def latest(make: Callable[[Study], str]) -> Callable[[Study], str]:
    """The same, of the latest recipe that has such students."""
    return lambda study: next(filter(None, map(make, study.generations())), "")


def setting(study: Study) -> str:
    rows, planned = study.rows, plan()
    if not rows:
        return ""
    run = len(rows.keys() & planned.keys())
    machines = defaultdict(list)
    for row in rows.values():
        kind = f"{row['settings']['processor']}, {row['settings']['precision']}"
        machines[kind].append(row["seconds"]["training"])
    lines = [
        ["students", f"{len(rows)} ({run} of the {len(planned)} planned, {len(rows) - run} others)"],
        *([f"of {name}", sum(s.condition.teacher == name for s in rows)] for name in TEACHERS),
        ["tested on tasks, too", sum("scores" in row for row in rows.values())],
        *(
            [f"on {name}", f"{len(seconds)} students, {np.median(seconds):.0f} s to train one (median)"]
            for name, seconds in sorted(machines.items())
        ),
    ]
    versions = defaultdict(set)
    for row in rows.values():
        for name in ("python", "torch", "transformers", "datasets"):
            versions[name].add(row["settings"][name])
    lines.append(["versions", ", ".join(f"{name} {' and '.join(sorted(found))}" for name, found in versions.items())])
    return table(["", ""], lines, texts=2)


def outcome_by_condition(study: Study, teacher: str, outcome: Outcome) -> str:
    """Methods in rows, conditions in columns."""
    shown = [
        condition
        for condition in compared_conditions(study, teacher)
        if any(study.values(outcome, name, condition) for name in COMPARED[1:])
    ]
    rows = []
    for name in COMPARED:
        found = [list(study.values(outcome, name, condition).values()) for condition in shown]
        if any(found):
            rows.append([name, *(with_number(values, outcome.digits) for values in found)])
    return table([f"{outcome.label} (seeds)", *(condition.label for condition in shown)], rows) if rows else ""


def distances(study: Study, teacher: str) -> str:
    return outcome_by_condition(study, teacher, DISTANCE)


def tasks(study: Study, teacher: str) -> str:
    parts = []
    if scores := [name for name in ("teacher", *FLOORS) if study.score(teacher, name, METRICS[0]).size]:
        rows = [[name, *(spread(study.score(teacher, name, metric)) for metric in METRICS)] for name in scores]
        rows += [
            [f"teacher's gain over {floor}", *(spread(gain(study, teacher, floor, metric)) for metric in METRICS)]
            for floor in FLOORS
            if floor in scores
        ]
        parts.append(table(["", *(SCORES[metric].label for metric in METRICS)], rows))
    parts.append(outcome_by_condition(study, teacher, share_kept(study, teacher)))
    for condition in compared_conditions(study, teacher):
        rows = []
        for name in COMPARED:
            scored = {seed: row for seed, row in study.rows_of(name, condition).items() if "scores" in row}
            if scored:
                values = (spread([SCORES[metric].value(row) for row in scored.values()]) for metric in METRICS)
                rows.append([name, len(scored), *values])
        if rows:
            header = [f"sparsity {condition.label}", "seeds", *(SCORES[metric].label for metric in METRICS)]
            parts.append(table(header, rows))
    return "\n\n".join(part for part in parts if part)


def layers(study: Study, teacher: str) -> str:
    """What the figure does not say: SKILL's groups."""
    shown = [condition for condition in compared_conditions(study, teacher) if condition in LAYERS_SHOWN]
    if not any(study.rows_of(name, condition) for name in COMPARED for condition in shown):
        return ""
    return f"SKILL's groups: {groups_of(study, *shown) or 'no run yet'}."


def against_skill(study: Study, teacher: str) -> str:
    """Each baseline minus SKILL, paired by seed; corrected over the baselines of a condition."""
    rows = []
    for condition in compared_conditions(study, teacher):
        for outcome in (DISTANCE, share_kept(study, teacher)):
            pairs = {name: compare(study, outcome, name, "SKILL", condition) for name in COMPARED[1:]}
            pairs = {name: pair for name, pair in pairs.items() if pair is not None}
            corrected = holm([pair.p for pair in pairs.values()])
            for (name, pair), p in zip(pairs.items(), corrected, strict=True):
                rows.append(
                    [
                        condition.label,
                        outcome.label,
                        name,
                        len(pair.differences),
                        spread(pair.differences, outcome.digits, signed=True),
                        f"{pair.better} of {len(pair.differences)}",
                        p_value(pair.p),
                        p_value(p),
                    ]
                )
    header = ["sparsity", "what", "method minus SKILL", "seeds", "difference", "better than SKILL", "p", "p, Holm"]
    return table(header, rows, texts=3) if rows else ""


def unequal(study: Study) -> str:
    condition = Condition("wavlm", 0.75)
    rows = []
    for group in UNEQUAL:
        cells = [list(study.values(DISTANCE, group + way, condition).values()) for way in WEIGHTED]
        if any(cells):
            rows.append([group, partition(METHODS[group](12)["layer_groups"]), *(spread(cell, 3) for cell in cells)])
    if not rows:
        return ""
    skill = list(study.values(DISTANCE, "SKILL", condition).values())
    rows.append(["SKILL", groups_of(study, condition), spread(skill, 3), "–", "–"])
    return table(["", "groups", "equal weights", "by size", "by size, normalised"], rows, texts=2)


def partition(groups: Sequence[Sequence[int]]) -> str:
    names = [", ".join(str(a) if a == b else f"{a}–{b}" for a, b in index_runs(group)) for group in groups]
    return ", ".join(f"{{{name}}}" for name in names)


def groups_of(study: Study, *conditions: Condition) -> str:
    """SKILL's groups, which depend on the teacher and the seed alone, with the number of seeds if these differ."""
    rows = {seed: row for condition in conditions for seed, row in study.rows_of("SKILL", condition).items()}
    found = [partition(row["layer_groups"]) for _, row in sorted(rows.items())]
    return "; ".join(
        name if len(set(found)) == 1 else f"{name} ({found.count(name)} of {len(found)} seeds)"
        for name in dict.fromkeys(found)
    )


def options(study: Study, teacher: str) -> str:
    """SKILL with an option minus SKILL, paired by seed; then the same for the defaults of before."""
    longer = " + longer first stage"
    bases = (("SKILL", ""), ("SKILL", longer), ("SKILL + projections", longer))
    tried = (*OPTIONS, *STAGES, POST_NORM, *REMOVED)
    shown = [
        condition
        for condition in compared_conditions(study, teacher)
        if any(study.rows_of(f"{base} + {option}{stages}", condition) for base, stages in bases for option in tried)
    ]
    rows = []
    for base, stages in bases:
        methods = {f"+ {option}": f"{base} + {option}{stages}" for option in tried}
        if (base, stages) == bases[0]:
            methods[f"{SHAPE} instead"] = SHAPE
        pairs = {
            label: [compare(study, DISTANCE, method, base + stages, condition) for condition in shown]
            for label, method in methods.items()
        }
        pairs = {label: found for label, found in pairs.items() if any(found)}
        if pairs:
            plain = [list(study.values(DISTANCE, base + stages, condition).values()) for condition in shown]
            rows.append([f"*{base}{stages}*", *(spread(values, 3) for values in plain)])
            rows += [[label, *map(option_cell, found)] for label, found in pairs.items()]
    header = ["distance; of options: minus that above", *(condition.label for condition in shown)]
    return table(header, rows) if rows else ""


def against_before(study: Study, teacher: str) -> str:
    """What the change of the default recipe gave, paired by seed."""
    rows = []
    for condition in compared_conditions(study, teacher) if study.before else ():
        for outcome in (DISTANCE, share_kept(study, teacher)):
            for name in COMPARED:
                before, now = (of.values(outcome, name, condition) for of in (study.before, study))
                if pair := paired(outcome, now, before):
                    rows.append(
                        [
                            condition.label,
                            outcome.label,
                            name,
                            len(pair.differences),
                            spread(list(before.values()), outcome.digits),
                            spread(pair.differences, outcome.digits, signed=True),
                            p_value(pair.p),
                        ]
                    )
    header = ["sparsity", "what", "method", "seeds", "before", "now minus before", "p"]
    return table(header, rows, texts=3) if rows else ""


def defaults(study: Study, teacher: str) -> str:
    """
    Held-out losses of the default recipe and of what tuning finds; and distances, which can be compared with those of
    recipes with projections, too: the published recipe in as few steps.
    """
    rows = []
    for condition in conditions_of(study, teacher):
        names = {"default": "SKILL"} | {option: f"SKILL + {option}" for option in (*TUNED, *STAGES)}
        losses = {name: study.values(HELD_OUT, method, condition) for name, method in names.items()}
        if condition.steps not in SHORT_STEPS or not losses["default"]:
            continue
        default = losses.pop("default")
        changes = {
            name: [loss - default[seed] for seed, loss in found.items() if seed in default]
            for name, found in losses.items()
        }
        tuned = {name: np.mean(differences) for name, differences in changes.items() if differences}
        best = min(tuned, key=tuned.get, default=None)
        rows.append(
            [
                f"{condition.sparsity:g}",
                condition.steps,
                with_number(list(default.values()), 3),
                f"{with_number(changes[best], 3, signed=True)} {best}" if best else "–",
                *(
                    with_number(list(study.values(DISTANCE, method, condition).values()), 3)
                    for method in ("SKILL", f"SKILL + {PUBLISHED}")
                ),
            ]
        )
    header = [
        "sparsity",
        "steps",
        "default: held-out loss (seeds)",
        "best change by hand, minus default",
        "default: distance",
        PUBLISHED,
    ]
    return table(header, rows) if rows else ""


def robust(study: Study) -> str:
    """What distortions of the student's input give, for what the student hears."""
    condition = Condition("wavlm", 0.75)
    if not any(study.rows_of(name, condition) for name in ROBUST):
        return ""
    rows = []
    for name in ("SKILL", *ROBUST):
        cells = [
            list(study.values(outcome, name, condition).values()) for outcome in (DISTANCE, DISTANCE_SECOND_SPEAKER)
        ]
        if cells[1]:
            rows.append([name, len(cells[0]), *(spread(cell, 3) for cell in cells)])
    return table(["", "seeds", DISTANCE.label, DISTANCE_SECOND_SPEAKER.label], rows) if rows else ""


def option_cell(pair) -> str:
    if pair is None:
        return "–"
    better = f"{pair.better} of {len(pair.differences)} better"
    return f"{spread(pair.differences, 3, signed=True)} ({better}, p {p_value(pair.p)})"


def cuts(study: Study, teacher: str) -> str:
    """The shift of the gates at the cut, and the loss before it, after it and at the end."""
    rows = []
    for condition in compared_conditions(study, teacher):
        for name in dict.fromkeys(student.method for student in study.rows):
            if found := [row for row in study.rows_of(name, condition).values() if row["cut"]]:
                losses = [around_the_cut(row) for row in found]
                rows.append(
                    [
                        condition.label,
                        name,
                        len(found),
                        ", ".join(spread([row["cut"]["shift"]], 1, signed=True) for row in found),
                        *(spread(values, 3) for values in zip(*losses, strict=True)),
                        ", ".join(str(sum(row["architecture"]["num_heads"])) for row in found),
                    ]
                )
    header = ["sparsity", "method", "seeds", "shift", "loss before the cut", "after", "at the end", "heads left"]
    return table(header, rows, texts=2) if rows else ""


def around_the_cut(row: dict) -> tuple[float, float, float]:
    """Training loss in the last lines of the log before the cut, the first after it, and the last."""
    before = [loss for step, loss in row["losses"] if step <= row["cut"]["step"]]
    after = [loss for step, loss in row["losses"] if step > row["cut"]["step"]]
    return (before[-1] if before else math.nan, *((after[0], after[-1]) if after else (math.nan, math.nan)))


def panels_of(study: Study, width: float, height: float, shown: Callable[[Condition], bool] = lambda c: True):
    """A figure with a row for each teacher, and pairs of axes and condition, of those with methods to compare."""
    rows = {
        teacher: [
            condition
            for condition in compared_conditions(study, teacher)
            if shown(condition) and any(study.rows_of(name, condition) for name in COMPARED[1:])
        ]
        for teacher in TEACHERS
    }
    rows = [conditions for conditions in rows.values() if conditions]
    columns = max(map(len, rows), default=1)
    figure = new_figure(max(width * columns + 1.2, 5.0), height * max(len(rows), 1) + 0.5)
    panels = figure.subplots(max(len(rows), 1), columns, squeeze=False)
    filled = [
        pair for axes, conditions in zip(panels, rows, strict=False) for pair in zip(axes, conditions, strict=False)
    ]
    for axes in set(panels.flat) - {axes for axes, _ in filled}:
        axes.set_visible(False)
    return figure, filled


def draw_distances(study: Study):
    """A mark for each student, a bar for the mean of each method."""
    figure, panels = panels_of(study, 2.2, 2.6)
    conditions = [condition for _, condition in panels]
    shown = [name for name in COMPARED if any(study.values(DISTANCE, name, condition) for condition in conditions)]
    for axes, condition in panels:
        for place, name in enumerate(shown):
            values = list(study.values(DISTANCE, name, condition).values())
            if values:
                colour, marker = STYLES[name]
                axes.plot(values, [place] * len(values), ls="", color=colour, marker=marker, markersize=5)
                axes.plot([np.mean(values)] * 2, [place - 0.3, place + 0.3], color=colour, lw=2)
        is_first = axes.get_subplotspec().is_first_col()
        axes.set_yticks(range(len(shown)), shown if is_first else [""] * len(shown))
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.locator_params(axis="x", nbins=4)
        axes.grid(axis="x", color=LIGHT, lw=0.8)
        label_axes(axes, f"{condition.teacher}, {condition.label}", "", "")
    figure.supxlabel("mean distance to the teacher (1 − CKA); bars are means", fontsize=9)
    return figure


def draw_layers(study: Study):
    """Distance at each hidden state."""
    figure, panels = panels_of(study, 3.8, 3.2, lambda condition: condition in LAYERS_SHOWN)
    handles = {}
    for axes, condition in panels:
        for name in COMPARED:
            if rows := study.rows_of(name, condition):
                values = np.array([row["distances"]["cka"] for row in rows.values()]).mean(0)
                colour, marker = STYLES[name]
                (handles[name],) = axes.plot(values, color=colour, marker=marker, markersize=4.5, lw=1.5)
                axes.set_xticks(range(len(values)))
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", color=LIGHT, lw=0.8)
        label_axes(axes, f"{condition.teacher}, {condition.label}", "hidden state", "distance (1 − CKA)")
    style = {"loc": "outside lower center", "ncols": 3, "frameon": False, "fontsize": 9}
    figure.legend(list(handles.values()), list(handles), **style)
    return figure


TABLES: dict[str, Callable[[Study], str]] = {
    "setting": setting,
    "distances": per_teacher(distances),
    "layers": per_teacher(layers),
    "against SKILL": per_teacher(against_skill),
    "tasks": per_teacher(tasks),
    "unequal": latest(unequal),
    "second speaker": latest(robust),
    "options": per_teacher(options),
    "defaults": per_teacher(defaults),
    "against before": per_teacher(against_before),
    "distances before": of_before(per_teacher(distances)),
    "against SKILL before": of_before(per_teacher(against_skill)),
    "options before": of_before(per_teacher(options)),
    "against the first": of_before(per_teacher(against_before)),
    "options of the first": of_before(of_before(per_teacher(options))),
    "cuts": per_teacher(cuts),
}


@dataclass(frozen=True)
class Picture:
    file: str
    text: str
    draw: Callable


PICTURES = {
    "distances": Picture("study_distances.png", "Mean distance of each student to its teacher", draw_distances),
    "layers": Picture("study_layers.png", "Mean distance of each method at each hidden state", draw_layers),
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
