"""How long the clips of a dataset are, in seconds, from the headers of their files."""

import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np
from tqdm.auto import tqdm

from .audio import AudioError
from .collator import open_row


logger = logging.getLogger(__name__)

LENGTH_COLUMN = "length"

# Rows whose length in a column is compared with that in the header, and by how much the two may differ.
_ROWS_COMPARED = 8
_SHARE_OFF, _SECONDS_OFF = 0.1, 0.2


def row_seconds(row: Mapping, sampling_rate: int, protocols: Sequence[str] = ()) -> float:
    """Length of the clip of a row in seconds; 0 if it cannot be read, which the collator says when it is needed."""
    try:
        with open_row(row, sampling_rate, protocols) as (clip, _):
            return clip.seconds()
    except AudioError:
        return 0.0


def clip_seconds(
    dataset: Any,
    sampling_rate: int,
    length_column: str = LENGTH_COLUMN,
    protocols: Sequence[str] = (),
    num_processes: int | None = None,
) -> np.ndarray:
    """
    Length of each clip of a dataset.

    A column `length_column` is used if it has seconds, by comparison with the audio of a few rows. Otherwise each
    header is read once; of a dataset on disk, `datasets` keeps the lengths in its cache.

    Args:
        dataset (`datasets.Dataset`, `torch.utils.data.Dataset` or `list[dict]`):
            Rows with `audio`, not decoded, or with `input_values`.
        sampling_rate (`int`): rate in Hz of `input_values` and of samples without a rate.
        length_column (`str`, *optional*, defaults to `"length"`): column that may have lengths in seconds.
        protocols (`Sequence[str]`, *optional*): of URLs to read beside `http`, `https` and `hf`.
        num_processes (`int`, *optional*): processes that read headers of a `datasets.Dataset`.

    Returns:
        `np.ndarray` of shape `(clips,)`, float64; 0 for clips that cannot be read.
    """
    dataset = dataset.with_format(None) if isinstance(dataset, datasets.Dataset) else dataset
    seconds = _seconds_in(dataset, length_column, sampling_rate, protocols)
    if seconds is not None:
        return seconds
    if not isinstance(dataset, datasets.Dataset):
        rows = (dataset[index] for index in tqdm(range(len(dataset)), "Reading lengths", unit="clip", disable=None))
        return np.array([row_seconds(row, sampling_rate, protocols) for row in rows], dtype=np.float64)
    columns = [name for name in ("audio", "input_values") if name in dataset.column_names]
    audio = dataset.select_columns(columns or dataset.column_names)
    measured = audio.map(
        functools.partial(_measure, sampling_rate=sampling_rate, protocols=tuple(protocols)),
        remove_columns=audio.column_names,
        features=datasets.Features({"seconds": datasets.Value("float64")}),
        num_proc=num_processes or None,
        desc="Reading lengths",
    )
    return np.array(measured["seconds"][:], dtype=np.float64)


def _measure(row: Mapping, sampling_rate: int, protocols: Sequence[str]) -> dict[str, float]:
    return {"seconds": row_seconds(row, sampling_rate, protocols)}


def _column(dataset: Any, name: str) -> Any:
    """The values of a column; `None` if there is none, or if each row would have to be read for it."""
    if isinstance(dataset, datasets.Dataset):
        return dataset[name][:] if name in dataset.column_names else None
    is_list = isinstance(dataset, list) and all(isinstance(row, Mapping) and name in row for row in dataset)
    return [row[name] for row in dataset] if is_list else None


def _seconds_in(dataset: Any, name: str, sampling_rate: int, protocols: Sequence[str]) -> np.ndarray | None:
    """The lengths in a column; `None` if they are not seconds: others count samples or tokens there."""
    values = _column(dataset, name)
    if values is None:
        return None
    try:
        seconds = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        seconds = np.full(len(dataset), np.nan)
    for index in {int(index) for index in np.linspace(0, len(seconds) - 1, _ROWS_COMPARED)}:
        measured = row_seconds(dataset[index], sampling_rate, protocols)
        if measured and not abs(seconds[index] - measured) <= _SHARE_OFF * measured + _SECONDS_OFF:
            logger.warning("The column `%s` has no lengths in seconds; they are read from the audio instead.", name)
            return None
    return np.where(np.isfinite(seconds), seconds, 0.0)
