"""
The SUPERB benchmark (arXiv 2105.01051): evaluates a frozen speech encoder on ten tasks.

Audio -> hidden states on disk (`features`) -> weighted sum and a small head (`heads`), defined by each task (`tasks`)
-> metrics of the best learning rate (`evaluation`) -> a score compared with published ones (`scores`).
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
