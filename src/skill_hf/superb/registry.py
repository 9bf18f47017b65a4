"""The tasks by short name, and the columns that they use in a data set."""

import os
from dataclasses import dataclass
from typing import Any

import datasets

from .diarization import Diarization
from .slot_filling import SlotFilling
from .tasks import Classification, Lexicon, Task, Transcription, Verification


@dataclass(frozen=True)
class Columns:
    """
    Names of columns; for `None`, the first of the task's usual columns that exists in the data set is used.

    Args:
        label (`list[str]`, *optional*): columns for classification, one per label, and for diarization.
        text (`str`, *optional*): column for transcription and for query by example.
        speaker (`str`, *optional*): column for speaker verification.
    """

    label: list[str] | None = None
    text: str | None = None
    speaker: str | None = None

    USUAL = {
        "ks": ("label", "keyword"),
        "sid": ("label", "speaker_id", "speaker"),
        "er": ("label", "emotion"),
        "asv": ("speaker_id", "speaker", "label"),
        "asr": ("text", "transcript", "transcription", "sentence"),
        "pr": ("phonemes", "text", "transcript", "transcription", "sentence"),
        "sf": ("text", "transcript", "transcription", "sentence"),
        "sd": ("speakers",),
        "qbe": ("documents", "word", "text", "transcript", "transcription", "sentence"),
    }
    INTENT = ("action", "object", "location")

    def of(self, task: str, dataset: datasets.Dataset) -> Any:
        """
        Raises:
            `ValueError`: if the data set has none of the usual columns.
        """
        if task == "ic":
            return self.label or list(self.INTENT)
        named = self.speaker if task == "asv" else self.text if task in ("asr", "pr", "sf", "qbe") else None
        if named is None and self.label and len(self.label) > 1:
            raise ValueError(f"`{task}` has one label column, but {len(self.label)} were given.")
        named = named or (self.label or [None])[0]
        if named is not None:
            return named
        for column in self.USUAL[task]:
            if column in dataset.column_names:
                return column
        raise ValueError(
            f"`{task}` needs one of the columns {', '.join(self.USUAL[task])}, but the dataset has"
            f" {', '.join(dataset.column_names)}; specify yours."
        )


TASKS = ("ks", "ic", "sid", "er", "asv", "pr", "asr", "sf", "sd")  # without `qbe`, which trains nothing


def load_task(
    name: str,
    dataset: datasets.Dataset,
    columns: Columns | None = None,
    trials: str | os.PathLike | None = None,
    x_vector: bool = True,
    lexicon: str | os.PathLike | None = None,
    stress: bool = True,
    lstm_size: int | None = None,
    frame_seconds: float | None = None,
    time_unit: float = 1.0,
    max_seconds: float | None = None,
) -> Task:
    """
    Args:
        name (`str`): one of `TASKS`.
        dataset (`datasets.Dataset`): the training set, for its columns.
        columns ([`Columns`], *optional*): columns to use.
        trials, x_vector: arguments of [`Verification`].
        lexicon, stress: arguments of [`Lexicon`]; used if the column does not contain phonemes.
        lstm_size: argument of [`Transcription`], [`SlotFilling`] and [`Diarization`].
        frame_seconds, time_unit, max_seconds: arguments of [`Diarization`], which requires the first.

    Raises:
        `ValueError`: if there is no such task, or the data set lacks its columns.
    """
    if name not in TASKS:
        raise ValueError(f"There is no task {name!r}; the tasks are {', '.join(TASKS)}.")
    column = (columns or Columns()).of(name, dataset)
    if name == "ic":
        return Classification(name, column)
    if name in ("ks", "sid", "er"):
        return Classification(name, [column])
    if name == "asv":
        return Verification(column, trials, x_vector)
    if name == "sf":
        return SlotFilling(column, "iob" if "iob" in dataset.column_names else None, lstm_size)
    if name == "sd":
        return Diarization(column, frame_seconds, time_unit, max_seconds, lstm_size or 512)
    words = name == "pr" and (column != "phonemes" or lexicon is not None)
    return Transcription(name, column, Lexicon(lexicon, stress) if words else None, lstm_size)
