"""
The SUPERB benchmark (arXiv 2105.01051): what a frozen speech encoder knows, task by task.

Audio -> hidden states on disk (`features`) -> weighted sum and a small head (`heads`), as each task defines it
(`tasks`) -> metrics of the best learning rate (`evaluation`) -> a score beside published ones (`scores`).
"""

from .scores import (
    METRICS,
    PUBLISHED,
    MeasuredTask,
    Metric,
    PublishedResult,
    comparison_table,
    results_page,
    superb_score,
)


__all__ = [
    "METRICS",
    "PUBLISHED",
    "MeasuredTask",
    "Metric",
    "PublishedResult",
    "comparison_table",
    "results_page",
    "superb_score",
]
