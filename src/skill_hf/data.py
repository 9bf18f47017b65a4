"""Speech, from files and datasets to batches: read, resampled, cropped, normalised, padded."""

import contextlib
import functools
import glob
import io
import logging
import math
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import soundfile
import torch
from scipy.signal import resample_poly
from tqdm.auto import tqdm
from transformers import Wav2Vec2FeatureExtractor


logger = logging.getLogger(__name__)

AUDIO_EXTENSIONS = (".wav", ".flac", ".mp3", ".ogg", ".opus")

# The first 400 samples make the first frame: receptive field of the convolutions that all models of this family share.
MIN_SAMPLES = 400

# What libsndfile reports for a stream whose header leaves the length open.
UNKNOWN_FRAMES = 2**63 - 1

MAX_NAMED = 5


class AudioError(ValueError):
    """Audio, or a set of it, that cannot be used; the message is one line: which, why, and what mends it."""


class _StoredAudio(datasets.Audio):
    """
    `datasets.Audio` for rows that are made one by one: folders, tar shards, streams. There `datasets` (5.2) imports
    torchcodec to *encode* audio, even a path that stays a path; its wheels need CUDA libraries, which not all machines
    have.
    """

    def encode_example(self, value: str | os.PathLike | bytes | Mapping) -> dict[str, str | bytes | None]:
        if isinstance(value, (str, os.PathLike)):
            return {"bytes": None, "path": os.fspath(value)}
        if isinstance(value, bytes):
            return {"bytes": value, "path": None}
        return {"bytes": value.get("bytes"), "path": value.get("path")}


def read_audio(
    value: Any,
    sampling_rate: int = 16_000,
    max_seconds: float | None = None,
    choose_start: Callable[[int], int] | None = None,
    min_samples: int = 1,
) -> np.ndarray:
    """
    Reads one clip as a mono waveform: channels are averaged, then resampled by a polyphase filter.

    Args:
        value (`str`, `PathLike`, `bytes`, `dict`, `np.ndarray`, `torch.Tensor` or `list[float]`):
            Path or URL of a file, its content, a dict of `path` and `bytes`, a dict of `array` and `sampling_rate`, a
            torchcodec decoder, or floats that already have `sampling_rate`, of shape `(samples,)`, or with channels as
            the shorter of two axes.
        sampling_rate (`int`, *optional*, defaults to 16000):
            Rate in Hz of the result.
        max_seconds (`float`, *optional*):
            Length that is read at most; the rest of a file is not decoded.
        choose_start (`Callable[[int], int]`, *optional*):
            Picks where a longer clip is read, from 0 to the number of spare samples that it is given, both included;
            the beginning by default.
        min_samples (`int`, *optional*, defaults to 1):
            Samples that the result must have.

    Returns:
        `np.ndarray` of shape `(samples,)`, float32.

    Raises:
        [`AudioError`]: if the clip is missing, empty, no audio, corrupt, too short, or holds NaN or infinite samples.
    """
    name = _clip_name(value)
    if hasattr(value, "get_all_samples"):
        decoded = value.get_all_samples()
        value = {"array": decoded.data, "sampling_rate": decoded.sample_rate}
    if isinstance(value, Mapping) and value.get("array") is not None:
        rate = value.get("sampling_rate")
        if not rate or rate < 0:
            raise AudioError(f"{name} has the sampling rate {rate}; give the rate of `array` in Hz.")
        samples = _crop(_mono(value["array"], name), _num_samples(max_seconds, rate), choose_start)
    elif isinstance(value, (str, os.PathLike, bytes, Mapping)):
        with _open(value, name) as sound:
            rate = sound.samplerate
            length = min(sound.frames, _num_samples(max_seconds, rate))
            sound.seek(choose_start(sound.frames - length) if choose_start else 0)
            samples = _mono(sound.read(length, dtype="float32", always_2d=True).mean(axis=1), name)
    else:
        rate = sampling_rate
        samples = _crop(_mono(value, name), _num_samples(max_seconds, rate), choose_start)
    if rate != sampling_rate and len(samples):
        divisor = math.gcd(int(rate), sampling_rate)
        samples = resample_poly(samples, sampling_rate // divisor, int(rate) // divisor)
        samples = _crop(samples, _num_samples(max_seconds, sampling_rate))
    if len(samples) < min_samples:
        raise AudioError(
            f"{name} has {len(samples)} samples at {sampling_rate} Hz, too few (needed: {min_samples}); leave it out."
        )
    return samples


def load_audio_dir(directory: str | os.PathLike) -> datasets.Dataset:
    """
    Lists the audio of a directory and of all below it, in sorted order, without decoding it. Files whose header cannot
    be read are left out, counted and named in a warning.

    Args:
        directory (`str` or `PathLike`):
            Directory of .wav, .flac, .mp3, .ogg or .opus files of any rate and number of channels.

    Returns:
        `datasets.Dataset` with the columns `audio`, dicts of `path` (absolute) and `bytes` (`None`), and `length`, in
        seconds, for `train_sampling_strategy="group_by_length"`.

    Raises:
        [`AudioError`]: if the directory is missing, has no audio, or none that can be read.
    """
    if not os.path.isdir(directory):
        raise AudioError(f"The audio directory `{directory}` does not exist; correct its path.")
    # `glob` follows links to directories and passes over hidden files, such as those macOS leaves beside audio.
    pattern = os.path.join(glob.escape(os.path.abspath(directory)), "**", "*")
    candidates = (path for path in glob.iglob(pattern, recursive=True) if path.lower().endswith(AUDIO_EXTENSIONS))
    paths = sorted(path for path in candidates if os.path.isfile(path))
    if not paths:
        raise AudioError(
            f"The audio directory `{directory}` has no file that ends in {', '.join(AUDIO_EXTENSIONS)}; name another."
        )
    lengths, errors = {}, []
    for path in tqdm(paths, desc="Checking audio files", unit="file"):
        try:
            with _open(path, _clip_name(path)) as sound:
                lengths[path] = sound.frames / sound.samplerate
        except AudioError as error:
            errors.append(error)
    if not lengths:
        raise AudioError(f"None of the {len(paths)} audio files in `{directory}` can be read; the first: {errors[0]}")
    _warn_skipped(errors, len(paths))
    dataset = datasets.Dataset.from_dict({"audio": list(lengths), "length": list(lengths.values())})
    dataset.info.dataset_name = os.path.basename(os.path.abspath(directory))  # for the model card
    return dataset.cast_column("audio", datasets.Audio(decode=False))


def load_speech_dataset(
    name: str | os.PathLike,
    config_name: str | None = None,
    split: str = "train",
    streaming: bool = False,
    audio_column: str = "audio",
) -> datasets.Dataset | datasets.IterableDataset:
    """
    Loads speech from the Hub or from a local directory in any form that `datasets` reads: parquet, csv or json with a
    column of paths (relative ones start at the directory), `save_to_disk`, `audiofolder` (with metadata or with plain
    folders), tar shards (WebDataset; `audio_column` is then the ending of the audio files, such as `flac`).

    Args:
        name (`str` or `PathLike`):
            Hub id or local directory.
        config_name (`str`, *optional*):
            Configuration of a Hub dataset that has several.
        split (`str`, *optional*, defaults to `"train"`):
            Split, or in memory also a slice such as `train[:10%]` or a sum such as `train+validation`.
        streaming (`bool`, *optional*, defaults to `False`):
            Whether to read rows on the fly instead of preparing all of them first.
        audio_column (`str`, *optional*, defaults to `"audio"`):
            Column with the audio; it is renamed to `audio`.

    Returns:
        `datasets.Dataset`, or `datasets.IterableDataset` if `streaming`, with a column `audio`, not decoded, or a
        precomputed column `input_values`.

    Raises:
        [`AudioError`]: if the dataset or the split does not exist, is empty, or has no audio column.
    """
    name = os.fspath(name)
    try:
        dataset = disable_audio_decoding(_load_split(name, config_name, split, streaming, audio_column))
        # For the model card; `datasets` keeps neither the owner of a dataset on the Hub nor the name of a directory.
        dataset.info.dataset_name = os.path.basename(os.path.abspath(name)) if os.path.exists(name) else name
        first_row = next(iter(dataset), None)
        if first_row is None:
            raise AudioError(f"The split `{split}` of `{name}` has no rows; name another split or dataset.")
        if audio_column not in first_row:
            if "input_values" in first_row:
                return dataset
            raise AudioError(
                f"`{name}` has no column `{audio_column}`; name the one with the audio: {', '.join(first_row)}."
            )
        if isinstance(first_row[audio_column], str) and os.path.isdir(name):
            absolute = functools.partial(_absolute_path, column=audio_column, root=os.path.abspath(name))
            dataset = dataset.map(absolute)
        return dataset if audio_column == "audio" else dataset.rename_column(audio_column, "audio")
    except AudioError:
        raise
    except Exception as error:  # its loaders raise what their libraries do: of pyarrow, pandas, fsspec, the Hub
        cause = error.__cause__ or error
        reason = str(cause).strip().partition("\n")[0] or repr(cause)
        where = "" if os.path.isdir(name) else ", which is no local directory,"
        raise AudioError(f"The dataset `{name}`{where} cannot be loaded: {reason}") from error


def disable_audio_decoding(dataset: Any) -> Any:
    """
    Switches off the decoding of a `datasets` dataset, so that its audio arrives as a dict of `path` and `bytes`; every
    other dataset is returned as it is.
    """
    if isinstance(dataset, (datasets.Dataset, datasets.IterableDataset)):
        stored = datasets.Audio(decode=False) if isinstance(dataset, datasets.Dataset) else _StoredAudio(decode=False)
        # A stream of csv or json has no features before its first row, but no audio to decode either.
        for column, feature in (dataset.features or {}).items():
            if isinstance(feature, datasets.Audio):
                dataset = dataset.cast_column(column, stored)
    return dataset


def samples_per_frame(config) -> int:
    """Least number of samples from which the convolutions make one frame (400 in all published models)."""
    samples = 1
    kernels = getattr(config, "conv_kernel", ())
    strides = getattr(config, "conv_stride", ())
    for kernel, stride in zip(reversed(kernels), reversed(strides), strict=True):
        samples = (samples - 1) * stride + kernel
    return samples


@dataclass
class SpeechCollator:
    """
    Makes a batch from rows with `audio` (anything that [`read_audio`] takes) or with precomputed `input_values`.

    `crop="random"`, for training: as in DPHuBERT (arXiv 2305.17651), every clip is cropped at a random place to the
    length of the shortest one, so that a batch has no padding, which models with group norm do not ignore even if
    masked. A clip shorter than `min_seconds` does not shorten the others but is padded, one longer than `max_seconds`
    is cropped to that first. `crop="none"`, for evaluation: clips are read from their beginning, up to `max_seconds`,
    and padded to the longest.

    The crops follow from the rows of the batch, `seed` and `epoch` alone, and no global random state is read or moved:
    a run that is resumed, or has another number of workers, sees the same crops. (Batches are fetched ahead of the
    step that uses them, so after resuming a global generator would stand elsewhere.)

    Clips that cannot be read are left out of the batch, each is named once in a warning.

    Args:
        feature_extractor (`Wav2Vec2FeatureExtractor`):
            Normalises every crop of `audio` (`input_values` are taken to be normalised) and pads.
        max_seconds (`float`, *optional*, defaults to 15.6):
            Longest clip in seconds.
        min_seconds (`float`, *optional*, defaults to 2.0):
            Length in seconds below which a clip is padded rather than all others cropped.
        crop (`str`, *optional*, defaults to `"random"`):
            `random` or `none`.
        min_samples (`int`, *optional*, defaults to 400):
            Samples that make one frame of the model; a shorter clip counts as one that cannot be read.
        seed (`int`, *optional*, defaults to 0):
            Seed of the crops.
        epoch (`int`, *optional*, defaults to 0):
            Mixed into the seed: raised at the start of an epoch, it changes the crops of a batch that comes again.
    """

    feature_extractor: Wav2Vec2FeatureExtractor
    max_seconds: float = 15.6
    min_seconds: float = 2.0
    crop: str = "random"
    min_samples: int = MIN_SAMPLES
    seed: int = 0
    epoch: int = 0
    num_skipped: int = field(default=0, init=False)
    _named: set[str] = field(default_factory=set, init=False, repr=False)
    _spare: tuple[np.ndarray, bool] | None = field(default=None, init=False, repr=False)

    def __post_init__(self):
        if self.crop not in ("random", "none"):
            raise ValueError(f"`crop` must be one of random, none, but is {self.crop!r}.")
        if not 0 < self.min_seconds <= self.max_seconds:
            raise ValueError(
                f"`min_seconds` ({self.min_seconds}) must be above 0 and not above `max_seconds` ({self.max_seconds})."
            )
        if _num_samples(self.max_seconds, self.feature_extractor.sampling_rate) < self.min_samples:
            raise ValueError(f"`max_seconds` ({self.max_seconds}) is shorter than `min_samples` ({self.min_samples}).")

    def __call__(self, rows: list[Mapping]) -> dict[str, torch.Tensor]:
        """
        Returns:
            `input_values`, float32 of shape `(batch, samples)`, and, if a clip is padded, `attention_mask`, int64 of
            the same shape, 1 for samples and 0 for padding.

        Raises:
            [`AudioError`]: if no clip of the first batch can be read. (In a later one a clip of the batch before
                stands in.)
        """
        choose_start = None
        if self.crop == "random":
            content = functools.reduce(lambda checksum, row: zlib.crc32(_row_key(row), checksum), rows, 0)
            choose_start = _random_start(self.seed, self.epoch, content)
        clips, errors = [], []
        for row in rows:
            try:
                clips.append(_read_row(row, self.feature_extractor, self.max_seconds, choose_start, self.min_samples))
            except AudioError as error:
                errors.append(error)
        self._warn(errors)
        if not clips:
            if self._spare is None:
                raise AudioError(f"None of the {len(rows)} clips of a batch can be read; the first: {errors[0]}")
            # A long run must not end because one small batch happens to hold nothing but bad files.
            clips = [self._spare]
        self._spare = clips[0]
        if self.crop == "random":
            shortest = min(len(samples) for samples, _ in clips)
            length = max(shortest, _num_samples(self.min_seconds, self.feature_extractor.sampling_rate))
            clips = [(_crop(samples, length, choose_start), raw) for samples, raw in clips]
        values = [_normalise(samples, self.feature_extractor) if raw else samples for samples, raw in clips]
        batch = self.feature_extractor.pad(
            {"input_values": values}, padding=True, return_attention_mask=True, return_tensors="pt"
        )
        attention_mask = batch["attention_mask"].long()
        if attention_mask.all():
            return {"input_values": batch["input_values"]}
        return {"input_values": batch["input_values"], "attention_mask": attention_mask}

    def _warn(self, errors: list[AudioError]) -> None:
        self.num_skipped += len(errors)
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
) -> Iterator[np.ndarray]:
    """
    A seeded sample of the clips of a dataset, normalised as the model takes them. A clip that cannot be read is
    counted, named in a warning and replaced by the next one; of a set not larger than `num_samples` every clip is
    tried, so that this finds bad audio before training starts.

    Args:
        dataset (`datasets.Dataset`, `datasets.IterableDataset`, `torch.utils.data.Dataset` or `list[dict]`):
            Rows with `audio` or `input_values`; of a stream the first ones are taken, else a permutation by `seed`.
        num_samples (`int`):
            Number of clips, or fewer if the dataset is smaller.
        seconds (`float`):
            Length in seconds that a longer clip is cropped to, at a place that depends on `seed` and its row alone.
        seed (`int`):
            Seed of the choice and of the crops.
        feature_extractor (`Wav2Vec2FeatureExtractor`):
            Normalises every crop of `audio`; `input_values` are taken to be normalised.
        min_samples (`int`, *optional*, defaults to 400):
            Samples that make one frame of the model; a shorter clip counts as one that cannot be read.

    Yields:
        `np.ndarray` of shape `(samples,)`, float32.

    Raises:
        [`AudioError`]: if the dataset is empty or most of the clips tried cannot be read.
    """
    length = _num_samples(seconds, feature_extractor.sampling_rate)
    num_read, errors = 0, []
    for index, row in _sampled_rows(disable_audio_decoding(dataset), seed):
        try:
            # Read as a whole: a crop alone would not show what is wrong in the rest of a clip.
            samples, raw = _read_row(row, feature_extractor, None, None, min_samples)
        except AudioError as error:
            errors.append(AudioError(f"row {index}: {error}"))
        else:
            num_read += 1
            samples = _crop(samples, length, _random_start(seed, index))
            yield _normalise(samples, feature_extractor) if raw else samples
        if num_read == num_samples or len(errors) > num_samples:
            break
    if not num_read and not errors:
        raise AudioError("The dataset has no rows; give one with audio.")
    if num_read < len(errors):
        num_tried = num_read + len(errors)
        raise AudioError(f"{len(errors)} of the {num_tried} clips tried cannot be read; the first: {errors[0]}")
    _warn_skipped(errors, num_read + len(errors))


def _sampled_rows(dataset: Any, seed: int) -> Iterator[tuple[int, Mapping]]:
    if isinstance(dataset, (datasets.IterableDataset, torch.utils.data.IterableDataset)):
        yield from enumerate(dataset)
    else:
        for index in np.random.default_rng(seed).permutation(len(dataset)).tolist():
            yield index, dataset[index]


def _read_row(
    row: Mapping,
    feature_extractor: Wav2Vec2FeatureExtractor,
    max_seconds: float | None,
    choose_start: Callable[[int], int] | None,
    min_samples: int,
) -> tuple[np.ndarray, bool]:
    """Waveform of a row, float32 of shape `(samples,)`, and whether it has yet to be normalised."""
    column = next((name for name in ("input_values", "audio") if row.get(name) is not None), None)
    if column is None:
        raise AudioError(
            f"A row has neither `audio` nor `input_values`, only {', '.join(row) or 'nothing'}; rename the audio"
            " column and keep it with `remove_unused_columns=False`."
        )
    samples = read_audio(row[column], feature_extractor.sampling_rate, max_seconds, choose_start, min_samples)
    return samples, column == "audio"


def _row_key(row: Mapping) -> bytes:
    """What tells a row from others, the same on every machine: a file's name, else its content or its samples."""
    value = row.get("audio") if row.get("input_values") is None else row["input_values"]
    if isinstance(value, Mapping):
        value = value.get("path") or value.get("bytes") or value.get("array")
    if isinstance(value, (str, os.PathLike)):
        return os.path.basename(value).encode(errors="surrogateescape")
    if isinstance(value, bytes):
        return value
    return b"" if value is None or hasattr(value, "get_all_samples") else np.asarray(value).tobytes()


def _normalise(samples: np.ndarray, feature_extractor: Wav2Vec2FeatureExtractor) -> np.ndarray:
    return feature_extractor(samples, sampling_rate=feature_extractor.sampling_rate)["input_values"][0]


def _num_samples(seconds: float | None, rate: float) -> int | float:
    return math.inf if seconds is None else round(seconds * rate)


def _random_start(*seed: int) -> Callable[[int], int]:
    generator = np.random.default_rng(seed)
    return lambda spare: int(generator.integers(spare + 1))


def _crop(samples: np.ndarray, length: int | float, choose_start: Callable[[int], int] | None = None) -> np.ndarray:
    if len(samples) <= length:
        return samples
    start = choose_start(len(samples) - length) if choose_start else 0
    return samples[start : start + length]


def _mono(value: Any, name: str) -> np.ndarray:
    """Finite float32 samples of shape `(samples,)` from an array, tensor or list of floats."""
    try:
        samples = np.asarray(value)
    except ValueError:
        raise AudioError(f"{name} is ragged; give one list of floats, or one per channel.") from None
    if samples.dtype.kind != "f" and samples.size:
        raise AudioError(f"{name} holds {samples.dtype}, not floats; scale integers to between -1 and 1.")
    if samples.ndim == 2:
        samples = samples.mean(axis=int(np.argmin(samples.shape)))
    if samples.ndim != 1:
        raise AudioError(f"{name} has {samples.ndim} axes; give samples, or samples and channels.")
    if not np.isfinite(samples).all():
        raise AudioError(f"{name} holds NaN or infinite samples; repair it or leave it out.")
    return samples.astype(np.float32, copy=False)


def _clip_name(value: Any) -> str:
    path = value.get("path") if isinstance(value, Mapping) else value
    return f"`{os.fspath(path)}`" if isinstance(path, (str, os.PathLike)) else "A clip without a path"


@contextlib.contextmanager
def _open(value: str | os.PathLike | bytes | Mapping, name: str) -> Iterator[soundfile.SoundFile]:
    """Opens stored audio; what goes wrong then or while it is read becomes an [`AudioError`]."""
    if isinstance(value, Mapping):
        path, content = value.get("path"), value.get("bytes")
    else:
        path, content = (None, value) if isinstance(value, bytes) else (os.fspath(value), None)
    if path is None and content is None:
        raise AudioError(f"{name} has neither a path nor bytes nor an array; leave it out.")
    try:
        if content is None and "://" in path:
            with fsspec.open(path, "rb") as file:
                content = file.read()
        if content is None and not os.path.isfile(path):
            raise AudioError(f"{name} does not exist; correct its path.")
        if not (os.path.getsize(path) if content is None else len(content)):
            raise AudioError(f"{name} is empty (0 bytes); leave it out.")
        with soundfile.SoundFile(path if content is None else io.BytesIO(content)) as sound:
            if sound.frames == 0:
                raise AudioError(f"{name} has a header but no samples; leave it out.")
            if sound.frames == UNKNOWN_FRAMES:
                raise AudioError(f"{name} does not tell its length; encode it again, into a file rather than a pipe.")
            yield sound
    except (soundfile.SoundFileError, OSError) as error:
        reason = getattr(error, "error_string", error)
        raise AudioError(
            f"{name} is no audio that can be decoded ({reason}); convert it to WAV or FLAC, or leave it out."
        ) from error


def _warn_skipped(errors: list[AudioError], num_tried: int) -> None:
    if errors:
        named = " ".join(map(str, errors[:MAX_NAMED])) + (" ..." if len(errors) > MAX_NAMED else "")
        logger.warning("Left out %d of %d clips: %s", len(errors), num_tried, named)


def _load_split(
    name: str, config_name: str | None, split: str, streaming: bool, audio_column: str
) -> datasets.Dataset | datasets.IterableDataset:
    if (Path(name) / "dataset_dict.json").is_file() or (Path(name) / "state.json").is_file():
        loaded = datasets.load_from_disk(name)
        if isinstance(loaded, datasets.Dataset):
            loaded = {str(loaded.split or "train"): loaded}
        parts = split.split("+")
        _check_split(name, parts, list(loaded))
        joined = datasets.concatenate_datasets([loaded[part] for part in parts]) if len(parts) > 1 else loaded[split]
        return joined.to_iterable_dataset() if streaming else joined

    builder = datasets.load_dataset_builder(name, config_name)
    # Both would encode `datasets.Audio`; tar shards take their features from outside only.
    if builder.name == "webdataset":
        features = datasets.Features({audio_column: _StoredAudio()})
        builder = datasets.load_dataset_builder(name, config_name, features=features)
    elif builder.name == "audiofolder":
        builder.BASE_FEATURE = _StoredAudio
    splits = [str(known) for known in builder.config.data_files or builder.info.splits or ()]
    # A split may be sliced and added to others: `train[:10%]+validation`.
    _check_split(name, re.findall(r"(?:^|\+)\s*([^\[+\s]+)", split), splits)
    if streaming:
        return builder.as_streaming_dataset(split=split)
    builder.download_and_prepare()
    return builder.as_dataset(split=split)


def _check_split(name: str, wanted: list[str], splits: list[str]) -> None:
    unknown = [split for split in wanted if split not in splits]
    if unknown and splits:
        raise AudioError(f"`{name}` has no split `{unknown[0]}`; choose from {', '.join(splits)}.")


def _absolute_path(row: dict, column: str, root: str) -> dict:
    path = row[column]
    return {column: path if path is None or "://" in path else os.path.join(root, path)}
