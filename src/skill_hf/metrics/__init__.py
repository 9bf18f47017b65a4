"""
The metrics of SUPERB (arXiv 2105.01051) as modules of the `evaluate` library, kept in this package: no download.

All values are shares between 0 and 1 (error rates may exceed 1), not percent; [`~skill_hf.superb.superb_score`] takes
them times 100, the term-weighted value as it is. Each file stands alone, so `evaluate.load(path_of_the_file)` works
too.
"""

import importlib


# Module -> its class; the tasks of SUPERB that use it.
METRICS = {
    "accuracy": "Accuracy",  # KS, IC, SID, ER
    "diarization_error_rate": "DiarizationErrorRate",  # SD
    "equal_error_rate": "EqualErrorRate",  # ASV
    "error_rate": "ErrorRate",  # ASR, PR
    "slot_filling": "SlotFilling",  # SF
    "term_weighted_value": "TermWeightedValue",  # QbE
}


def load_metric(name: str):
    """
    Loads a metric of this package. Unlike `evaluate.load` it copies no code to a cache, and what is to be scored is
    kept in memory, so processes that run at once have no file in common.

    Args:
        name (`str`): one of [`METRICS`].

    Returns:
        [`evaluate.Metric`], whose `inputs_description` lists what `compute` takes and returns.

    Raises:
        `ValueError`: if there is no such metric.
        `ImportError`: if a package that the metric needs is missing.

    Example:

    ```python
    >>> from skill_hf.metrics import load_metric

    >>> load_metric("error_rate").compute(predictions=["a cat"], references=["a hat"])
    {'error_rate': 0.5}
    ```
    """
    if name not in METRICS:
        raise ValueError(f"There is no metric {name!r}; the metrics are {', '.join(METRICS)}.")
    try:
        module = importlib.import_module(f".{name}", __name__)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"The metric {name} needs {error.name}, which is not installed: pip install skill-hf[superb]."
        ) from error
    return getattr(module, METRICS[name])(keep_in_memory=True)
