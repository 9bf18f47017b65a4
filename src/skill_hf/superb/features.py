"""Hidden states of a whole data set on disk: one pass of the encoder for any number of heads."""

import csv
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import torch
from filelock import FileLock
from tqdm.auto import tqdm

from ..data.audio import AudioError, check_seconds, read_audio, samples_in
from ..data.batches import make_batches
from ..encoders import FilterBank, PretrainedEncoder, is_out_of_memory
from ..files import read_json, try_directory, write_json


logger = logging.getLogger(__name__)

STATES, INDEX, SETTINGS, LOCK = "hidden_states.bin", "index.csv", "settings.json", ".lock"


class CachedHiddenStates(torch.utils.data.Dataset):
    """
    Hidden states written by [`cache_hidden_states`], read from disk on demand.

    Attributes:
        rows (`list[int]`): row in the data set of each item, ascending; rows with unreadable clips are missing.
        num_frames (`np.ndarray` of shape `(items,)`): number of frames of each item.

    Args:
        directory (`Path`): directory written by [`cache_hidden_states`].
    """

    def __init__(self, directory: Path):
        settings = read_json(directory / SETTINGS)
        shape, dtype = (settings["num_layers"], settings["hidden_size"]), np.dtype(settings["dtype"])
        index = np.array(sorted(_read_index(directory)), dtype=np.int64).reshape(-1, 3)
        self.rows, self._starts, self.num_frames = index[:, 0].tolist(), index[:, 1], index[:, 2]
        total = int(self.num_frames.sum())
        self._states = np.memmap(directory / STATES, dtype, mode="r", shape=(total, *shape))
        self._directory = directory

    def __reduce__(self):
        # A data loader's process that is spawned opens the file; what a memory map holds would be sent to it whole.
        return CachedHiddenStates, (self._directory,)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, item: int) -> np.ndarray:
        """Array of shape `(frames, layers, hidden size)`, with a single "frame" if means over time were stored."""
        start = self._starts[item]
        return self._states[start : start + self.num_frames[item]]


def cache_hidden_states(
    encoder: PretrainedEncoder | FilterBank,
    dataset: datasets.Dataset,
    directory: str | os.PathLike,
    mean_over_time: bool = False,
    max_seconds: float | None = None,
    dtype: str = "float16",
    batch_seconds: float = 60.0,
    settings: dict | None = None,
) -> CachedHiddenStates:
    """
    Writes the hidden states of all clips to one file, one after the other. A clip counts once it is in the index, so
    an interrupted run continues where it stopped. Clips that cannot be read are skipped, each with a warning.

    Args:
        encoder ([`PretrainedEncoder`] or [`FilterBank`]): frozen.
        dataset (`datasets.Dataset`): rows with undecoded `audio`.
        directory (`str` or `PathLike`): output directory; created if missing.
        mean_over_time (`bool`, *optional*, defaults to `False`): store only the mean over the frames of a clip: heads
            that are linear up to a mean over time need nothing else.
        max_seconds (`float`, *optional*): longer clips are cropped to their first seconds.
        dtype (`str`, *optional*, defaults to `"float16"`): precision on disk.
        batch_seconds (`float`, *optional*, defaults to 60): maximum audio in a batch in seconds.
        settings (`dict`, *optional*): what else the hidden states depend on, such as the model's name.

    Returns:
        [`CachedHiddenStates`]

    Raises:
        [`AudioError`]: if no clip can be read.
        `ValueError`: if there is no column `audio`, the directory contains hidden states of other settings, the disk
            is too small, or hidden states are NaN or too large for `dtype`.
    """
    if "audio" not in dataset.column_names:
        raise ValueError(
            f"The dataset has no column `audio`, only {', '.join(dataset.column_names)}; rename the audio column."
        )
    if max_seconds is not None:
        check_seconds("max_seconds", max_seconds)
    check_seconds("batch_seconds", batch_seconds)
    directory = Path(directory)
    try_directory(directory, "cache_dir")
    directory.mkdir(parents=True, exist_ok=True)
    settings = {
        **(settings or {}),
        "num_layers": encoder.num_layers,
        "hidden_size": encoder.hidden_size,
        "mean_over_time": mean_over_time,
        "max_seconds": max_seconds,
        "dtype": dtype,
        "num_rows": len(dataset),
    }
    # Of processes that want the same hidden states, one makes them; the others then find them done.
    with FileLock(directory / LOCK):
        check_settings(directory, settings, "hidden states")
        bytes_per_frame = encoder.num_layers * encoder.hidden_size * np.dtype(dtype).itemsize
        index = _read_written(directory, bytes_per_frame)
        done = {row for row, _, _ in index}
        total = sum(frames for _, _, frames in index)
        failed = []
        with (
            open(directory / STATES, "ab") as states_file,
            open(directory / INDEX, "a", newline="", encoding="utf-8") as index_file,
            tqdm(total=len(dataset), initial=len(done), desc="Hidden states", unit="clip") as bar,
        ):
            states_file.truncate(total * bytes_per_frame)  # what a run was writing when it was stopped
            writer = csv.writer(index_file, lineterminator="\n")
            clips = _read_clips(encoder, dataset, max_seconds, done, failed)
            most_samples = samples_in(batch_seconds, encoder.sampling_rate)
            new_clips = new_frames = 0
            for batch in make_batches(clips, most_samples, 256, encoder.equal_lengths):
                rows, waveforms = zip(*batch, strict=True)
                try:
                    encoded = encoder(list(waveforms))
                except (MemoryError, RuntimeError) as error:
                    if not is_out_of_memory(error):
                        raise
                    seconds = max(map(len, waveforms)) / encoder.sampling_rate
                    raise ValueError(
                        f"Out of memory for rows {', '.join(map(str, rows))} of up to {seconds:.0f} s; crop clips with"
                        " `max_seconds`."
                    ) from error
                for row, states in zip(rows, encoded, strict=True):
                    states = states.mean(0, keepdim=True) if mean_over_time else states
                    array = cast_states(states, dtype, f"row {row}", "cache_dtype")
                    states_file.write(array.tobytes())
                    states_file.flush()
                    writer.writerow((row, total, len(array)))
                    index_file.flush()
                    total, new_frames = total + len(array), new_frames + len(array)
                    done.add(row)
                bar.update(len(batch))
                new_clips += len(batch)
                left = len(dataset) - len(done) - len(failed)
                _check_disk(directory, new_frames / new_clips * bytes_per_frame * left)
            bar.update(len(failed))
        if not done:
            raise AudioError(f"None of the {len(dataset)} clips can be read; the first: {failed[0]}")
    return CachedHiddenStates(directory)


def _read_clips(
    encoder, dataset: datasets.Dataset, max_seconds: float | None, done: set[int], failed: list[AudioError]
) -> Iterator[tuple[int, np.ndarray]]:
    for row in range(len(dataset)):
        if row in done:
            continue
        try:
            samples = read_audio(
                dataset[row]["audio"], encoder.sampling_rate, max_seconds, min_samples=encoder.min_samples
            )
        except AudioError as error:
            logger.warning("Left out: %s", error)
            failed.append(error)
            continue
        yield row, encoder.prepare(samples)


def cast_states(states: torch.Tensor, dtype: str, clip: str, setting: str) -> np.ndarray:
    """
    Converts hidden states to the stored form.

    Args:
        states (`torch.Tensor`): float32, of any shape.
        dtype (`str`): `"float16"` or `"float32"`.
        clip, setting (`str`): for the error: the clip, and the setting of `dtype`.

    Returns:
        `np.ndarray`: contiguous, with `dtype` and the same shape.

    Raises:
        `ValueError`: if they are not finite in float32, or not in `dtype`.
    """
    values = states.cpu().numpy()
    largest = float(np.abs(values).max(initial=0))
    if not np.isfinite(largest):
        raise ValueError(
            f"The hidden states of {clip} contain NaN or infinite values; check the weights of the model."
        )
    if largest > float(np.finfo(dtype).max):
        raise ValueError(
            f"The hidden states of {clip} reach {largest:.3g}, too large for {dtype} (at most"
            f" {np.finfo(dtype).max:.0f}); keep them in float32 (`{setting}`)."
        )
    return np.ascontiguousarray(values, dtype)


def check_settings(directory: Path, settings: dict, what: str) -> None:
    """
    Writes `settings` into a directory, or compares them with the settings there.

    Raises:
        `ValueError`: if the directory contains `what` of other settings.
    """
    path = directory / SETTINGS
    settings = json.loads(json.dumps(settings))  # as it is read back: a tuple is a list
    before = read_json(path) if path.is_file() else settings
    if not isinstance(before, dict):
        raise ValueError(f"{path} contains no settings of {what}; choose another directory.")
    for name in before | settings:
        if before.get(name) != settings.get(name):
            raise ValueError(
                f"{directory} has {what} with `{name}` {before.get(name)!r}, not {settings.get(name)!r}; choose"
                " another directory."
            )
    if not path.is_file():
        write_json(path, settings)


def _read_index(directory: Path) -> list[tuple[int, int, int]]:
    """Row, first frame and number of frames of every clip; ignores a line that was incomplete when a run stopped."""
    path = directory / INDEX
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    complete = text[: text.rfind("\n") + 1]
    if len(complete) < len(text):
        path.write_text(complete, encoding="utf-8")
    rows = [line.split(",") for line in complete.splitlines()]
    if not all(len(row) == 3 and all(value.isascii() and value.isdigit() for value in row) for row in rows):
        raise ValueError(f"{path} is not a valid index of hidden states; remove {directory} to compute them again.")
    return [tuple(map(int, row)) for row in rows]


def _read_written(directory: Path, bytes_per_frame: int) -> list[tuple[int, int, int]]:
    """The index without states that never reached the disk: after a power failure it may be ahead of them."""
    index = _read_index(directory)
    size = (directory / STATES).stat().st_size if index and (directory / STATES).is_file() else 0
    written = [line for line in index if (line[1] + line[2]) * bytes_per_frame <= size]
    if len(written) < len(index):
        lines = "".join(f"{','.join(map(str, line))}\n" for line in written)
        (directory / INDEX).write_text(lines, encoding="utf-8")
    return written


def _check_disk(directory: Path, needed: float) -> None:
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise ValueError(
            f"The hidden states need {needed / 1e9:.1f} GB more, but the disk of {directory} has {free / 1e9:.1f} GB"
            " left; choose another `cache_dir`, or use fewer or shorter clips."
        )
