"""The results as Markdown; `python benchmarks/tables.py FILE.json` prints the tables of a file."""

import json
import sys
from pathlib import Path


def render(results: dict) -> str:
    """All tables of what `run_benchmarks.py` has measured."""
    parts = [_machine(results["machine"], results["settings"], results["peaks"])]
    parts += [draw(results[name]) for name, draw in DRAWN.items() if results.get(name)]
    return "\n\n".join(parts) + "\n"


def _machine(machine: dict, settings: dict, peaks: dict) -> str:
    flops = ", ".join(f"{value / 1e9:,.0f} GFLOP/s in {precision}" for precision, value in peaks["flops"].items())
    return (
        f"{machine['processor']}, {machine['instructions']}, {machine['threads']} threads; torch {machine['torch']},"
        f" transformers {machine['transformers']}; seed {settings['seed']}, medians of {settings['runs']}.\n"
        f"Measured peaks: {flops}; {peaks['bandwidth'] / 1e9:,.1f} GB/s of memory traffic."
    )


def table(title: str, header: list[str], rows: list[list[str]]) -> str:
    lines = [f"### {title}", "", f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def _models(rows: list[dict]) -> str:
    seconds = rows[0]["macs_seconds"]
    return table(
        "Models",
        ["model", "parameters", "MACs for 1 s", f"MACs for {seconds:g} s", "what it is"],
        [
            [
                row["name"],
                f"{row['parameters']:,}",
                f"{row['macs_per_second'] / 1e9:.3f} G",
                f"{row['macs'] / 1e9:.2f} G",
                row["about"],
            ]
            for row in rows
        ],
    )


def _inference(rows: list[dict]) -> str:
    return table(
        "Inference",
        [
            "clips x seconds",
            "model",
            "precision",
            "mode",
            "median",
            "faster than stock",
            "at peak it would take",
            "share of peak arithmetic",
            "share of peak traffic",
        ],
        [
            [
                row["case"],
                row["model"],
                row["precision"],
                row["mode"],
                _time(row["median"]),
                f"{row['ratio']:.2f}x",
                _time(row["bound"]),
                _share(row["share_of_flops"]),
                _share(row["share_of_bandwidth"]),
            ]
            for row in rows
        ],
    )


def _training(rows: list[dict]) -> str:
    return table(
        "Training step of stage 1",
        [
            "clips x seconds",
            "rival",
            "precision",
            "student's parameters",
            "median",
            "of the peer's time",
            "peak memory",
            "of the peer's memory",
            "at peak it would take",
            "share of peak arithmetic",
        ],
        [
            [
                row["case"],
                row["rival"],
                row["precision"],
                f"{row['student_parameters'] / 1e6:.1f} M",
                _time(row["median"]),
                f"{row['ratio']:.2f}",
                f"{row['peak_bytes'] / 1e9:.2f} GB",
                f"{row['memory_ratio']:.2f}",
                _time(row["bound"]),
                _share(row["share_of_flops"]),
            ]
            for row in rows
        ],
    )


def _stages(rows: list[dict]) -> str:
    return table(
        "A whole stage 1 that shrinks, by the given schedule",
        ["precision", "average step", "of the peer's time"],
        [[row["precision"], _time(row["average"]), f"{row['ratio']:.2f}"] for row in rows],
    )


def _clustering(rows: list[dict]) -> str:
    return table(
        "Clustering",
        ["clips x seconds", "measure", "median", "of the bare forward"],
        [[row["case"], row["measure"], _time(row["median"]), f"{row['ratio']:.2f}"] for row in rows],
    )


def _profiles(rows: list[dict]) -> str:
    tables = []
    for row in rows:
        total = sum(row["groups"].values())
        title = f"Profile of {row['model']}, {row['precision']} {row['mode']}, {row['case']}"
        groups = [[name, _time(taken), _share(taken / total)] for name, taken in row["groups"].items()]
        operators = [
            [f"`{one['name']}`", one["group"], str(one["calls"]), _time(one["seconds"])] for one in row["operators"]
        ]
        tables.append(table(title, ["group", "time", "share"], groups))
        tables.append(table("Its operators", ["operator", "group", "calls", "time"], operators))
    return "\n\n".join(tables)


DRAWN = {
    "models": _models,
    "inference": _inference,
    "training": _training,
    "stages": _stages,
    "clustering": _clustering,
    "profiles": _profiles,
}


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def _share(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f} %"


if __name__ == "__main__":
    print(render(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
