"""
The metrics of SUPERB (arXiv 2105.01051) as modules of the `evaluate` library, kept in this package: no download.

All values are shares between 0 and 1 (error rates may exceed 1), not percent; [`~skill_hf.superb.superb_score`]
expects them times 100, except the term-weighted value. Each file is self-contained, so
`evaluate.load(path_of_the_file)` works as well.
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
    Loads a metric of this package. Unlike `evaluate.load`, it copies no code to a cache and keeps predictions in
    memory, so parallel processes share no files.

    Args:
        name (`str`): one of [`METRICS`].

    Returns:
        [`evaluate.Metric`], whose `inputs_description` lists the arguments and results of `compute`.

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
