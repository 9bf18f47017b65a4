"""SUPERB's metrics (arXiv 2105.01051), published results for comparison, and the SUPERB score."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """
    A metric of the benchmark.

    Args:
        task (`str`): short name of its task, such as `"ks"`.
        label (`str`): task and metric, for tables.
        floor (`float`): result of log-mel filterbanks in place of a model.
        best (`float`): best result of a frozen model when the score was defined.
        lower_is_better (`bool`, *optional*, defaults to `False`): whether it measures errors.
    """

    task: str
    label: str
    floor: float
    best: float
    lower_is_better: bool = False

    @property
    def digits(self) -> int:
        """Decimal places in tables."""
        return 4 if self.task == "qbe" else 2

    @property
    def title(self) -> str:
        """Label with an arrow that shows which direction is better."""
        return f"{self.label} {'↓' if self.lower_is_better else '↑'}"


# Percent, but for the term-weighted value of `qbe`. Floors are those of the leaderboard's newer FBANK row.
METRICS = {
    "ks_accuracy": Metric("ks", "KS acc", 41.38, 96.66),
    "ic_accuracy": Metric("ic", "IC acc", 9.65, 98.76),
    "pr_per": Metric("pr", "PR PER", 82.01, 3.53, lower_is_better=True),
    "asr_wer": Metric("asr", "ASR WER", 23.18, 3.62, lower_is_better=True),
    "er_accuracy": Metric("er", "ER acc", 48.24, 67.62),
    "qbe_mtwv": Metric("qbe", "QbE MTWV", 0.0058, 0.0736),
    "sf_f1": Metric("sf", "SF F1", 69.64, 89.81),
    "sf_cer": Metric("sf", "SF CER", 52.94, 21.76, lower_is_better=True),
    "sid_accuracy": Metric("sid", "SID acc", 20.06, 90.33),
    "asv_eer": Metric("asv", "ASV EER", 9.56, 5.11, lower_is_better=True),
    "sd_der": Metric("sd", "SD DER", 10.05, 5.62, lower_is_better=True),
}


@dataclass(frozen=True)
class PublishedResult:
    """A row of the leaderboard or of a paper: million parameters and one value for each of [`METRICS`], in order."""

    name: str
    million_parameters: float
    values: tuple[float, ...]

    @property
    def results(self) -> dict[str, float]:
        return dict(zip(METRICS, self.values, strict=True))


# From the public tables of the benchmark (WavLM, HuBERT) and of the projects themselves. Learning rates were swept for
# each of them, so rows are not at one setting.
PUBLISHED = (
    PublishedResult("WavLM Large", 316.6, (97.86, 99.31, 3.06, 3.44, 70.62, 0.0886, 92.21, 18.36, 95.49, 3.77, 3.24)),
    PublishedResult("WavLM Base+", 94.70, (97.37, 99.00, 3.92, 5.59, 68.65, 0.0988, 90.58, 21.20, 89.42, 4.07, 3.50)),
    PublishedResult("HuBERT Base", 94.68, (96.30, 98.34, 5.41, 6.42, 64.92, 0.0736, 88.53, 25.20, 81.42, 5.11, 5.88)),
    PublishedResult("DPWavLM", 23.59, (96.27, 98.58, 8.22, 10.19, 65.24, 0.0874, 87.68, 26.11, 82.11, 5.98, 5.53)),
    PublishedResult(
        "LightHuBERT small", 27.00, (96.07, 98.23, 6.60, 8.34, 64.12, 0.0764, 87.58, 26.90, 69.70, 5.42, 5.85)
    ),
    PublishedResult("STaRHuBERT-L", 26.63, (96.56, 97.50, 7.97, 8.91, 63.48, 0.0677, 88.01, 25.36, 78.66, 5.45, 5.83)),
    PublishedResult("STaRHuBERT", 22.31, (96.27, 97.55, 8.16, 9.35, 63.01, 0.0688, 87.94, 25.31, 77.58, 5.39, 6.05)),
    PublishedResult("DPHuBERT", 23.59, (96.36, 97.92, 9.67, 10.47, 63.16, 0.0693, 86.86, 28.26, 76.83, 5.84, 5.92)),
    PublishedResult("ARMHuBERT-S", 22.39, (96.82, 97.02, 8.63, 10.82, 62.96, 0.0720, 86.34, 29.02, 63.76, 5.58, 7.01)),
    PublishedResult(
        "DistilHuBERT", 23.49, (95.98, 94.99, 16.27, 13.37, 63.02, 0.0511, 82.57, 35.59, 73.54, 8.55, 6.19)
    ),
)


def superb_score(results: Mapping[str, float]) -> float:
    """
    The SUPERB score: 1000 times the mean over the ten tasks of `(result - floor) / (best - floor)`, where a task with
    two metrics counts as their mean. Filterbanks score 0, the best models at the time of its definition about 1000.

    Args:
        results (`Mapping[str, float]`): a value for each of [`METRICS`], in percent (except `qbe_mtwv`).

    Raises:
        `ValueError`: if metrics are missing or unknown; the message names each.

    Example:

    ```python
    >>> from skill_hf.superb import PUBLISHED, superb_score

    >>> {row.name: round(superb_score(row.results)) for row in PUBLISHED}["DPWavLM"]
    926
    ```
    """
    _check_names(results)
    missing = [name for name in METRICS if name not in results]
    if missing:
        raise ValueError(f"The SUPERB score needs all ten tasks; these results lack {', '.join(missing)}.")
    shares: dict[str, list[float]] = {}
    for name, metric in METRICS.items():
        share = (results[name] - metric.floor) / (metric.best - metric.floor)
        shares.setdefault(metric.task, []).append(share)
    return 1000 * sum(sum(of_task) / len(of_task) for of_task in shares.values()) / len(shares)


def comparison_table(name: str, results: Mapping[str, float], million_parameters: float | None = None) -> str:
    """
    A Markdown table of a model and [`PUBLISHED`], largest score first. Missing metrics are dashes; a model with
    missing metrics is the first row, without a score.

    Args:
        name (`str`): the model's name.
        results (`Mapping[str, float]`): measured values of [`METRICS`].
        million_parameters (`float`, *optional*): its size in million parameters.

    Raises:
        `ValueError`: if a metric is unknown.
    """
    _check_names(results)
    rows = [(row.name, row.million_parameters, row.results) for row in PUBLISHED]
    rows.append((f"**{name}**", million_parameters, results))
    scored = [
        (superb_score(metrics) if METRICS.keys() <= metrics.keys() else None, row, size, metrics)
        for row, size, metrics in rows
    ]
    scored.sort(key=lambda row: float("-inf") if row[0] is None else -row[0])
    header = ["model", "M parameters", "score"] + [metric.title for metric in METRICS.values()]
    lines = [header, ["---"] + ["---:"] * (len(header) - 1)]
    for score, row, size, metrics in scored:
        values = [f"{metrics[name]:.{metric.digits}f}" if name in metrics else "–" for name, metric in METRICS.items()]
        size, score = ("–" if value is None else f"{value:.{digits}f}" for value, digits in ((size, 1), (score, 0)))
        lines.append([row, size, score, *values])
    return _table(lines)


@dataclass(frozen=True)
class MeasuredTask:
    """
    Results of one task.

    Args:
        scores (`Mapping[str, float]`): metric -> value.
        dataset (`str`): name of the data.
        superb_data (`bool`): whether the data are SUPERB's own splits of this task, according to the caller.
    """

    scores: Mapping[str, float]
    dataset: str
    superb_data: bool = False


def results_page(name: str, tasks: Sequence[MeasuredTask], million_parameters: float | None = None) -> str:
    """
    The measured results of a model in Markdown: each metric with its data. Only results on SUPERB's own data are
    compared with [`PUBLISHED`]; if there are none, published rows are left out, and the page says so.

    Args:
        name (`str`): the model's name.
        tasks (`Sequence[MeasuredTask]`): the measured tasks.
        million_parameters (`float`, *optional*): its size in million parameters.

    Raises:
        `ValueError`: if a metric is unknown.
    """
    for task in tasks:
        _check_names(task.scores)
    size = "" if million_parameters is None else f", {million_parameters:.1f} M parameters"
    rows = [["metric", "result", "data"], ["---", "---:", "---"]]
    for key, metric in METRICS.items():
        rows += [[metric.title, f"{t.scores[key]:.{metric.digits}f}", t.dataset] for t in tasks if key in t.scores]
    parts = [f"# {name}{size}", _table(rows)]
    comparable = {metric: value for task in tasks if task.superb_data for metric, value in task.scores.items()}
    if comparable:
        parts += [
            "## Comparison with published models",
            "Only results on SUPERB's own data. Learning rates of published results were swept for each model.",
            comparison_table(name, comparable, million_parameters),
        ]
    if not all(task.superb_data for task in tasks):
        whose = "The other results" if comparable else "These results"
        parts.append(
            f"{whose} do not use SUPERB's own data: they are not comparable with published ones, which are left out."
        )
    return "\n\n".join(parts) + "\n"


def _table(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _check_names(results: Mapping[str, float]) -> None:
    unknown = sorted(set(results) - set(METRICS))
    if unknown:
        raise ValueError(f"SUPERB has no metric {', '.join(unknown)}; its metrics are {', '.join(METRICS)}.")
