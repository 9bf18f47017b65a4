"""Reads folders of speech with a `metadata.csv`; errors name the file and what is wrong."""

import csv
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import soundfile


def read_metadata(directory: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """
    Rows of `metadata.csv`, UTF-8, with `file_name` and `columns` at least.

    Raises:
        `ValueError`: if there is no such file, it lacks a column or a value of one, has no rows, or names a file
            outside of the directory.
    """
    path = Path(directory) / "metadata.csv"
    if not path.is_file():
        raise ValueError(f"{directory} has no metadata.csv; pass the directory that contains it.")
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            table = csv.DictReader(file)
            rows, header = list(table), table.fieldnames or ()
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a CSV file in UTF-8 ({error}); save it as one.") from error
    columns = ("file_name", *columns)
    if missing := [column for column in columns if column not in header]:
        raise ValueError(f"{path} has no column {' and no column '.join(missing)}.")
    if not rows:
        raise ValueError(f"{path} has no rows.")
    for number, row in enumerate(rows, start=1):
        if None in (row[column] for column in columns) or not row["file_name"]:
            raise ValueError(f"Row {number} of {path} lacks a value; it needs {', '.join(columns)}.")
        name = PurePosixPath(row["file_name"])
        if name.is_absolute() or ".." in name.parts or "\0" in row["file_name"]:
            raise ValueError(f"Row {number} of {path} names {row['file_name']!r}, which is not in the directory.")
    return rows


def speech_info(path: Path, rate: int):
    """
    What `soundfile.info` tells of a mono file of this rate in Hz.

    Raises:
        `ValueError`: if it is something else.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path} does not exist; correct its name in metadata.csv.")
    try:
        info = soundfile.info(path)
    except (soundfile.SoundFileError, OSError) as error:
        raise ValueError(f"{path} cannot be read as audio ({error}); leave it out.") from error
    if info.samplerate != rate or info.channels != 1:
        raise ValueError(
            f"{path} must be mono at {rate} Hz, but has {info.channels} channel(s) at {info.samplerate} Hz."
        )
    return info


def read_speech(path: Path, rate: int, start: int = 0, frames: int = -1) -> np.ndarray:
    """
    Samples of a mono file of this rate in Hz, float32 of shape `(samples,)`, from `start`, at most `frames`.

    Raises:
        `ValueError`: if it is something else, or holds NaN or infinite samples.
    """
    speech_info(path, rate)
    try:
        audio, _ = soundfile.read(path, start=start, frames=frames, dtype="float32")
    except (soundfile.SoundFileError, OSError) as error:
        raise ValueError(f"{path} cannot be read as audio ({error}); leave it out.") from error
    if not np.isfinite(audio).all():
        raise ValueError(f"{path} contains NaN or infinite samples; leave it out.")
    return audio
