"""From rows to batches and calibration clips: cropped, normalised, padded. Bad clips are skipped and counted."""

import contextlib
import functools
import itertools
import logging
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets
import numpy as np
import torch
from transformers import Wav2Vec2FeatureExtractor

from .audio import AudioError, Clip, check_seconds, crop_samples, open_clip, samples_in
from .distortion import Distortion
from .labels import LabelEncoder, pad_labels
from .speech_datasets import (
    MAX_BAD_SHARE,
    disable_audio_decoding,
    warn_left_out,
)


logger = logging.getLogger(__name__)

# The first 400 samples make the first frame: receptive field of the convolutions that all models of this family share.
MIN_SAMPLES = 400

_MOST_WORKERS = 255


@dataclass
class SpeechCollator:
    """
    Makes a batch from rows with `audio` (any value that [`read_audio`] accepts) or with precomputed `input_values`.

    `crop="random"`, for training: as in DPHuBERT (arXiv 2305.17651), every clip is cropped at a random position to the
    length of the shortest one. The batch then has no padding, which models with group norm do not ignore even if it is
    masked. A clip shorter than `min_seconds` is padded instead of shortening the others; one longer than `max_seconds`
    is cropped to that first. `crop="none"`, for evaluation: clips are read from their beginning, up to `max_seconds`,
    and padded to the longest.

    Crops depend only on the rows of the batch, `seed` and `epoch`; no global random state is read or changed. A
    resumed run, or one with another number of workers, sees the same crops. (Batches are fetched before the step that
    uses them, so a global generator would be in another state after resuming.)

    Clips that cannot be read are left out of the batch, named once in a warning and counted in `num_skipped`, also in
    workers of data loaders. If no clip is left, the batch is one silent clip with an `attention_mask` of zeros: it has
    no valid frames, so a loss over valid frames is 0.

    Args:
        feature_extractor (`Wav2Vec2FeatureExtractor`):
            Normalises every crop of `audio` and pads; `input_values` must already be normalised.
        max_seconds (`float`, *optional*, defaults to 15.6):
            Maximum length of a clip in seconds.
        min_seconds (`float`, *optional*, defaults to 2.0):
            Shorter clips are padded instead of cropping all others to their length.
        crop (`str`, *optional*, defaults to `"random"`):
            `random` or `none`.
        min_samples (`int`, *optional*, defaults to 400):
            Samples needed for one frame of the model; shorter clips count as unreadable.
        seed (`int`, *optional*, defaults to 0):
            Seed of the crops.
        epoch (`int`, *optional*, defaults to 0):
            Combined with the seed: increase it at the start of each epoch to get new crops. A tensor in shared memory
            if workers persist across epochs.
        protocols (`Sequence[str]`, *optional*):
            URL protocols to allow in addition to `http`, `https` and `hf`, such as `s3`.
        label_encoder ([`~skill_hf.data.labels.LabelEncoder`], *optional*):
            Converts the `labels` of rows to ids. Labels describe whole clips, so clips are then read from their
            beginning and padded in training, too. A clip longer than `max_seconds` keeps its class, but loses a
            sequence of labels.
        distortion ([`~skill_hf.data.distortion.Distortion`], *optional*):
            Distorts what the student hears in training; the teacher hears the clean clips.
    """

    feature_extractor: Wav2Vec2FeatureExtractor
    max_seconds: float = 15.6
    min_seconds: float = 2.0
    crop: str = "random"
    min_samples: int = MIN_SAMPLES
    seed: int = 0
    epoch: int | torch.Tensor = 0
    protocols: Sequence[str] = ()
    label_encoder: LabelEncoder | None = None
    distortion: Distortion | None = None
    _named: set[str] = field(default_factory=set, init=False, repr=False, compare=False)
    _skipped: torch.Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        # One counter for each worker, since two cannot add to one without a lock; the first is of the main process.
        self._skipped = torch.zeros(1 + _MOST_WORKERS, dtype=torch.int64).share_memory_()
        if self.crop not in ("random", "none"):
            raise ValueError(f"`crop` must be one of random, none, but is {self.crop!r}.")
        check_seconds("max_seconds", self.max_seconds)
        check_seconds("min_seconds", self.min_seconds)
        if not 0 < self.min_seconds <= self.max_seconds:
            raise ValueError(
                f"`min_seconds` ({self.min_seconds}) must be above 0 and at most `max_seconds` ({self.max_seconds})."
            )
        if samples_in(self.max_seconds, self.feature_extractor.sampling_rate) < self.min_samples:
            raise ValueError(f"`max_seconds` ({self.max_seconds}) is shorter than `min_samples` ({self.min_samples}).")

    @property
    def num_skipped(self) -> int:
        """Number of clips left out so far."""
        return int(self._skipped.sum())

    def __call__(self, rows: list[Mapping]) -> dict[str, torch.Tensor]:
        """
        Returns:
            `input_values`, float32 of shape `(batch, samples)`, and, if a clip is padded, `attention_mask`, int64 of
            the same shape, 1 for samples and 0 for padding; with `label_encoder` also `labels`, as
            [`~skill_hf.data.labels.pad_labels`] gives them; with `distortion` also `distorted_values`, of the shape
            of `input_values`.

        Raises:
            `ValueError`: if labels of a row cannot be used.
        """
        choose_start, crop = None, self.crop == "random" and self.label_encoder is None
        if crop or self.distortion is not None:
            content = functools.reduce(lambda checksum, row: zlib.crc32(row_key(row), checksum), rows, 0)
            seed = (self.seed, int(self.epoch), content)
        if crop:
            choose_start = _random_start(*seed)
        clips, labels, errors = [], [], []
        for row in rows:
            try:
                with open_row(row, self.feature_extractor.sampling_rate, self.protocols) as (clip, raw):
                    rate = self.feature_extractor.sampling_rate
                    ids = self._labels_of(row, clip)
                    clips.append((clip.read(rate, self.max_seconds, choose_start, self.min_samples), raw))
                    labels.append(ids)
            except AudioError as error:
                errors.append(error)
        self._count(errors)
        if crop and clips:
            clips = self._cropped(clips, choose_start)
        batch = self._batch(clips)
        if self.distortion is not None and clips:
            rate, raw = self.feature_extractor.sampling_rate, [raw for _, raw in clips]
            distorted = self.distortion([samples for samples, _ in clips], rate, seed)
            batch["distorted_values"] = self._batch(list(zip(distorted, raw, strict=True)))["input_values"]
        if self.label_encoder is not None:
            batch["labels"] = pad_labels(labels or [[]], self.label_encoder.one_per_clip)
        return batch

    def _labels_of(self, row: Mapping, clip: Clip) -> list[int]:
        if self.label_encoder is None:
            return []
        ids = self.label_encoder(row.get("labels"))
        is_whole = not ids or self.label_encoder.one_per_clip or clip.seconds() <= self.max_seconds
        return ids if is_whole else []

    def _cropped(
        self, clips: list[tuple[np.ndarray, bool]], choose_start: Callable[[int], int]
    ) -> list[tuple[np.ndarray, bool]]:
        shortest = min(len(samples) for samples, _ in clips)
        length = max(shortest, samples_in(self.min_seconds, self.feature_extractor.sampling_rate))
        return [(crop_samples(samples, length, choose_start), raw) for samples, raw in clips]

    def _batch(self, clips: list[tuple[np.ndarray, bool]]) -> dict[str, torch.Tensor]:
        if not clips:
            # As long as a clip may be padded to: a single frame is more than some networks and settings can take.
            rate = self.feature_extractor.sampling_rate
            nothing = torch.zeros(1, max(self.min_samples, int(samples_in(self.min_seconds, rate))))
            return {"input_values": nothing, "attention_mask": nothing.long()}
        values = [_normalise(samples, self.feature_extractor) if raw else samples for samples, raw in clips]
        batch = self.feature_extractor.pad(
            {"input_values": values}, padding=True, return_attention_mask=True, return_tensors="pt"
        )
        attention_mask = batch["attention_mask"].long()
        if attention_mask.all():
            return {"input_values": batch["input_values"]}
        return {"input_values": batch["input_values"], "attention_mask": attention_mask}

    def _count(self, errors: list[AudioError]) -> None:
        worker = torch.utils.data.get_worker_info()
        self._skipped[0 if worker is None else 1 + worker.id % _MOST_WORKERS] += len(errors)
        for message in map(str, errors):
            if message not in self._named:
                self._named.add(message)
                logger.warning("Left out of a batch (%d so far): %s", self.num_skipped, message)


def calibration_waveforms(
    dataset: Any,
    num_samples: int,
    seconds: float,
    seed: int,
    feature_extractor: Wav2Vec2FeatureExtractor,
    min_samples: int = MIN_SAMPLES,
    protocols: Sequence[str] = (),
) -> Iterator[np.ndarray]:
    """
    A seeded sample of the clips of a dataset, normalised for the model. A clip that cannot be read is counted, named
    in a warning and replaced by the next one. In a set no larger than `num_samples` every clip is tried. Each clip is
    checked completely, block by block, so bad audio is found before training starts. Channels that cancel when
    averaged, and a set that is mostly silent, cause a warning.

    Args:
        dataset (`datasets.Dataset`, `datasets.IterableDataset`, `torch.utils.data.Dataset` or `list[dict]`):
            Rows with `audio` or `input_values`; of a stream the first rows are used, otherwise a permutation that
            depends on `seed`.
        num_samples (`int`):
            Number of clips, or fewer if the dataset is smaller.
        seconds (`float`):
            Length in seconds that longer clips are cropped to, at a position that depends only on `seed` and the row.
        seed (`int`):
            Seed of the selection and of the crops.
        feature_extractor (`Wav2Vec2FeatureExtractor`):
            Normalises every crop of `audio`; `input_values` must already be normalised.
        min_samples (`int`, *optional*, defaults to 400):
            Samples needed for one frame of the model; shorter clips count as unreadable.
        protocols (`Sequence[str]`, *optional*):
            URL protocols to allow in addition to `http`, `https` and `hf`, such as `s3`.

    Yields:
        `np.ndarray` of shape `(samples,)`, float32.

    Raises:
        [`AudioError`]: if the dataset is empty, or more than half of the tried clips cannot be read.
    """
    check_seconds("seconds", seconds)
    rate = feature_extractor.sampling_rate
    num_read, num_silent, errors, cancelled = 0, 0, [], []
    for index, row in _sampled_rows(disable_audio_decoding(dataset), seed):
        try:
            with open_row(row, rate, protocols) as (clip, raw):
                levels = clip.levels()
                samples = clip.read(rate, seconds, _random_start(seed, index), min_samples)
        except AudioError as error:
            errors.append(AudioError(f"row {index}: {error}"))
        else:
            num_read += 1
            num_silent += levels.silent
            if levels.cancelled:
                cancelled.append(f"row {index}: {clip.name}")
            yield _normalise(samples, feature_extractor) if raw else samples
        if num_read == num_samples or len(errors) > num_samples:
            break
    num_tried = num_read + len(errors)
    if not num_tried:
        raise AudioError("The dataset has no rows; pass one with audio.")
    if len(errors) > MAX_BAD_SHARE * num_tried:
        raise AudioError(f"{len(errors)} of the {num_tried} clips tried cannot be read; the first: {errors[0]}")
    warn_left_out(errors, num_tried)
    if cancelled:
        logger.warning(
            "In %d of %d clips the channels cancel out when averaged; keep one channel of each. The first: %s",
            len(cancelled),
            num_read,
            cancelled[0],
        )
    if num_silent > MAX_BAD_SHARE * num_read:
        logger.warning("%d of %d clips are completely silent; check the recordings.", num_silent, num_read)


def check_clips(dataset: Any, num_samples: int, feature_extractor: Wav2Vec2FeatureExtractor, **kwargs) -> None:
    """
    Reads a sample of a dataset like [`calibration_waveforms`], only for its errors and warnings: bad audio should be
    found before hours of training, not after.
    """
    for _ in calibration_waveforms(dataset, num_samples, 1.0, 0, feature_extractor, **kwargs):
        pass


def sample_rows(dataset: Any, num_rows: int, seed: int) -> list[Mapping]:
    """A seeded sample of the rows of a dataset, without decoding audio; of a stream, the first rows."""
    rows = itertools.islice(_sampled_rows(disable_audio_decoding(dataset), seed), num_rows)
    return [row for _, row in rows]


def _sampled_rows(dataset: Any, seed: int) -> Iterator[tuple[int, Mapping]]:
    if isinstance(dataset, (datasets.IterableDataset, torch.utils.data.IterableDataset)):
        yield from enumerate(dataset)
    else:
        for index in np.random.default_rng(seed).permutation(len(dataset)).tolist():
            yield index, dataset[index]


@contextlib.contextmanager
def open_row(row: Any, sampling_rate: int, protocols: Sequence[str] = ()) -> Iterator[tuple[Clip, bool]]:
    """
    The clip of a row, and whether it still has to be normalised. All code reads rows through this function; errors are
    an [`AudioError`].
    """
    if not isinstance(row, Mapping):
        raise AudioError(
            f"A row is a {type(row).__name__}, not a dict; make it a dict with `audio`, such as {{'array': ...,"
            " 'sampling_rate': ...}."
        )
    column = next((name for name in ("input_values", "audio") if row.get(name) is not None), None)
    if column is None:
        raise AudioError(
            f"A row has neither `audio` nor `input_values`, only {', '.join(map(str, row)) or 'nothing'}; rename the"
            " audio column and keep it with `remove_unused_columns=False`."
        )
    value = row[column]
    if column == "input_values" and isinstance(value, (str, bytes, os.PathLike, Mapping)):
        raise AudioError(f"A row has a {type(value).__name__} for `input_values`; pass floats, or name it `audio`.")
    with open_clip(value, sampling_rate, protocols) as clip:
        yield clip, column == "audio"


def row_key(row: Any) -> bytes:
    """A key that identifies a row, the same on every machine: a file's name, otherwise its content or its samples."""
    try:
        value = row.get("audio") if row.get("input_values") is None else row["input_values"]
        if isinstance(value, Mapping):
            value = value.get("path") or value.get("bytes") or value.get("array")
        if isinstance(value, (str, os.PathLike)):
            return os.path.basename(value).encode(errors="surrogateescape")
        if isinstance(value, bytes):
            return value
        array = np.asarray(value)
        return b"" if array.dtype.kind == "O" else array.tobytes()  # of objects they would be addresses in memory
    except Exception:  # whatever it holds cannot be read, which is said when it is
        return b""


def _normalise(samples: np.ndarray, feature_extractor: Wav2Vec2FeatureExtractor) -> np.ndarray:
    return feature_extractor(samples, sampling_rate=feature_extractor.sampling_rate)["input_values"][0]


def _random_start(*seed: int) -> Callable[[int], int]:
    generator = np.random.default_rng(seed)
    return lambda spare: int(generator.integers(spare + 1))
