"""
`EarlyStoppingCallback` in a run of two stages. Stage 1 follows its schedule up to the cut, and its loss rises while
units close, so these callbacks do not see its evaluations. Stage 2 may stop early; it is then finished.
"""

from collections.abc import Iterable
from contextlib import contextmanager

from transformers import EarlyStoppingCallback, TrainerCallback, TrainerState
from transformers.trainer_callback import CallbackHandler


def early_stoppers(callbacks: Iterable[TrainerCallback]) -> list[EarlyStoppingCallback]:
    return [callback for callback in callbacks if isinstance(callback, EarlyStoppingCallback)]


@contextmanager
def without_early_stopping(handler: CallbackHandler):
    """Within this context, early-stopping callbacks of `handler` receive no events."""
    callbacks = handler.callbacks
    stoppers = early_stoppers(callbacks)
    handler.callbacks = [callback for callback in callbacks if callback not in stoppers]
    try:
        yield
    finally:
        handler.callbacks = callbacks


def restore_patience(callbacks: Iterable[TrainerCallback], state: TrainerState | None) -> None:
    """Sets the counters from `state` of a checkpoint, or to 0 without one, so that resuming is exact."""
    counters: dict[str, list[int]] = {}
    for name, stored in (state.stateful_callbacks if state is not None else {}).items():
        stored = stored if isinstance(stored, list) else [stored]
        counters[name] = [entry.get("attributes", {}).get("early_stopping_patience_counter", 0) for entry in stored]
    for callback in early_stoppers(callbacks):
        remaining = counters.get(type(callback).__name__)
        callback.early_stopping_patience_counter = remaining.pop(0) if remaining else 0


def stopped_early(callbacks: Iterable[TrainerCallback]) -> bool:
    return any(
        callback.early_stopping_patience_counter >= callback.early_stopping_patience
        for callback in early_stoppers(callbacks)
    )
