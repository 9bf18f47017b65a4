"""Batches of clips that are read once, with little or no padding."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch

from .audio import AudioError
from .collator import open_row
from .speech_datasets import disable_audio_decoding


Name = TypeVar("Name")


def make_batches(
    clips: Iterator[tuple[Name, np.ndarray]], most_samples: int, buffer_clips: int, equal_lengths: bool
) -> Iterator[list[tuple[Name, np.ndarray]]]:
    """
    Groups clips of similar length.

    Args:
        clips (`Iterator[tuple[Name, np.ndarray]]`): names of any kind, and waveforms.
        most_samples (`int`): maximum samples in a batch, padding included; a longer clip gets its own batch.
        buffer_clips (`int`): number of clips that are read ahead and sorted.
        equal_lengths (`bool`): whether all clips of a batch must have the same length.
    """
    while buffer := list(itertools.islice(clips, buffer_clips)):
        batch = []
        for clip in sorted(buffer, key=lambda clip: len(clip[1])):  # so that the newest is the longest
            length = len(clip[1])
            if batch and (length * (len(batch) + 1) > most_samples or equal_lengths and length > len(batch[0][1])):
                yield batch
                batch = []
            batch.append(clip)
        yield batch


def checked_input_values(
    audio: Iterable, feature_extractor, min_samples: int, protocols: Sequence[str] = ()
) -> Iterator[torch.Tensor]:
    """Checks each waveform or row and yields it as the 1-D float32 input of the model."""
    rate = 16_000 if feature_extractor is None else feature_extractor.sampling_rate
    for index, row in enumerate(disable_audio_decoding(audio)):
        if not isinstance(row, Mapping):
            shape = _shape(row)
            if shape is not None and len(shape) != 1:
                raise AudioError(
                    f"`audio` must contain 1-D waveforms with one channel, but item {index} ({type(row).__name__}) has"
                    f" shape {shape}."
                )
            row = {"audio": row}
        try:
            with open_row(row, rate, protocols) as (clip, raw):
                values = clip.read(rate, min_samples=min_samples)
        except AudioError as error:
            raise AudioError(f"Waveform {index}: {error}") from error
        if raw and feature_extractor is not None:
            values = feature_extractor(values, sampling_rate=rate, return_tensors="np").input_values[0]
        yield torch.as_tensor(values)


def equal_length_batches(waveforms: Iterable[torch.Tensor], batch_size: int) -> Iterator[torch.Tensor]:
    """Batches `(B, samples)` of neighbouring waveforms of the same length, in order."""
    for _, run in itertools.groupby(waveforms, key=len):
        while batch := list(itertools.islice(run, batch_size)):
            yield torch.stack(batch)


def _shape(value: Any) -> tuple[int, ...] | None:
    """Shape, or `None` for ragged lists, whose reader raises a clearer error."""
    try:
        return tuple(np.shape(value))
    except Exception:
        return None
