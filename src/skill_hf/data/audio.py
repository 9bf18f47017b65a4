"""Reads one clip, in any form that a row contains, as samples at one rate, or raises one clear error."""

import contextlib
import math
import os
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import soxr
import torch

from .audio_decoding import DecodingError, open_stored
from .remote_files import RemoteFileError, is_url, read_url


# Rates in Hz that audio comes in; a header that says anything else is broken.
MIN_RATE, MAX_RATE = 2_000, 384_000

# Below this peak (-80 dB of full scale) a clip is silence; 16 bits reach down to -90 dB.
SILENT_PEAK = 1e-4

# The mean of channels that has less than this share of their energy is what is left after they cancel.
CANCELLED_ENERGY = 1e-3

_NAME_CHARACTERS = 200


class AudioError(ValueError):
    """Audio, or a set of audio, that cannot be used; the message is one line: which, why, and what to do."""


@dataclass(frozen=True)
class ClipLevels:
    """
    Attributes:
        silent (`bool`): no sample of any channel reaches [`SILENT_PEAK`].
        cancelled (`bool`): the channels cancel each other, so that their mean is nearly 0.
    """

    silent: bool
    cancelled: bool


class Clip:
    """
    One open clip. Stored audio is decoded on demand, one block at a time.

    Attributes:
        rate (`int`): in Hz.
    """

    def __init__(self, name: str, rate: int, stream: Any):
        self.name = name
        self.rate = rate
        self._stream = stream

    def read(
        self,
        sampling_rate: int,
        max_seconds: float | None = None,
        choose_start: Callable[[int], int] | None = None,
        min_samples: int = 1,
    ) -> np.ndarray:
        """See [`read_audio`]."""
        length = samples_in(max_seconds, self.rate)
        start = 0
        if choose_start is not None:
            total = self._stream.num_frames()
            start = choose_start(max(0, total - length) if length < total else 0)
        blocks = self._stream.blocks(start, None if math.isinf(length) else length)
        parts = [self._mono(block) for block in blocks]
        samples = np.concatenate(parts) if parts else np.zeros(0, np.float32)
        if self.rate != sampling_rate and len(samples):
            samples = soxr.resample(samples, self.rate, sampling_rate)
            samples = crop_samples(samples, samples_in(max_seconds, sampling_rate))
        if len(samples) < min_samples:
            raise AudioError(
                f"{self.name} has {len(samples)} samples at {sampling_rate} Hz, but needs at least {min_samples};"
                " leave it out."
            )
        return samples

    def seconds(self) -> float:
        """Length in seconds, from the header, or by decoding if the header contains only an estimate."""
        num_frames = self._stream.num_frames()
        if not num_frames:
            raise AudioError(f"{self.name} has a header but no samples; leave it out.")
        return num_frames / self.rate

    def levels(self) -> ClipLevels:
        """Reads the whole clip in blocks, to find errors anywhere in it with little memory."""
        peak = energy = mono_energy = 0.0
        for block in self._stream.blocks():
            mono = self._mono(block)
            peak = max(peak, float(block.max()), -float(block.min()))
            energy += float(np.vdot(block, block)) / block.shape[1]
            mono_energy += float(np.vdot(mono, mono))
        silent = peak < SILENT_PEAK
        return ClipLevels(silent, cancelled=not silent and mono_energy < CANCELLED_ENERGY * energy)

    def moments(self) -> tuple[float, float]:
        """Mean and variance of all samples of the mono waveform at its own rate, read in blocks."""
        number, total, squares = 0, 0.0, 0.0
        for block in self._stream.blocks():
            mono = self._mono(block).astype(np.float64)
            number, total, squares = number + len(mono), total + mono.sum(), squares + np.vdot(mono, mono)
        mean = total / max(number, 1)
        return mean, max(squares / max(number, 1) - mean**2, 0.0)

    def _mono(self, block: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore", invalid="ignore"):
            mono = block[:, 0].copy()
            for channel in block.T[1:]:  # much faster than a mean over such a short axis
                mono += channel
            mono /= block.shape[1]
            # A sum, which is finite only if all samples are, is the faster check.
            finite = np.isfinite(mono.sum(dtype=np.float64))
        if not finite:
            raise AudioError(f"{self.name} contains NaN or infinite samples; repair it or leave it out.")
        return mono


class _Array:
    """Samples in memory, with the interface of a stream that [`Clip`] uses."""

    def __init__(self, samples: np.ndarray):
        self.samples = samples  # (samples, channels)

    def num_frames(self) -> int:
        return len(self.samples)

    def blocks(self, start: int = 0, length: int | None = None) -> Iterator[np.ndarray]:
        block = self.samples[start : None if length is None else start + length]
        if len(block):
            yield block


@contextlib.contextmanager
def open_clip(value: Any, sampling_rate: int = 16_000, protocols: Sequence[str] = ()) -> Iterator[Clip]:
    """
    Opens any `value` that [`read_audio`] accepts.

    Raises:
        [`AudioError`]: if it is not such a value or cannot be used; also for errors while the clip is open.
    """
    name = _clip_name(value)
    try:
        if callable(getattr(value, "get_all_samples", None)):
            decoded = value.get_all_samples()
            value = {"array": decoded.data, "sampling_rate": decoded.sample_rate}
        stored = _stored(value, name, protocols)
        if stored is not None:
            with open_stored(stored) as stream:
                yield Clip(name, _checked_rate(stream.rate, name), stream)
        elif isinstance(value, Mapping):
            rate = _checked_rate(value.get("sampling_rate"), name)
            yield Clip(name, rate, _Array(_samples(value["array"], name)))
        else:
            yield Clip(name, _checked_rate(sampling_rate, name), _Array(_samples(value, name)))
    except (DecodingError, RemoteFileError) as error:
        raise AudioError(f"{name} {error}.") from error
    except AudioError:
        raise
    except Exception as error:  # decoders, numpy and tensors of all kinds raise what they like
        reason = " ".join(str(error).split())[:_NAME_CHARACTERS]
        raise AudioError(f"{name} cannot be read ({type(error).__name__}: {reason}); leave it out.") from error


def read_audio(
    value: Any,
    sampling_rate: int = 16_000,
    max_seconds: float | None = None,
    choose_start: Callable[[int], int] | None = None,
    min_samples: int = 1,
    protocols: Sequence[str] = (),
) -> np.ndarray:
    """
    Reads one clip as a mono waveform: channels are averaged, then resampled (by soxr, in its high quality).

    Stored audio is read until the decoder reaches its end: the length stated in an mp3 file may be an estimate, and an
    Ogg file may be a chain of streams.

    Args:
        value (`str`, `PathLike`, `bytes`, `dict`, `np.ndarray`, `torch.Tensor` or `list[float]`):
            Path or URL of a file, its content, a dict of `path` and `bytes`, a dict of `array` and `sampling_rate`, a
            torchcodec decoder, or floats at `sampling_rate`, of shape `(samples,)` or with channels as the shorter of
            two axes.
        sampling_rate (`int`, *optional*, defaults to 16000):
            Sampling rate of the result in Hz.
        max_seconds (`float`, *optional*):
            Maximum length to read; the rest of a file is not decoded, unless its length is unknown.
        choose_start (`Callable[[int], int]`, *optional*):
            Chooses the start in a longer clip: called with the number of spare samples, it returns a sample index from
            0 to this number, both included. By default, the beginning is read.
        min_samples (`int`, *optional*, defaults to 1):
            Minimum number of samples of the result.
        protocols (`Sequence[str]`, *optional*):
            URL protocols to allow in addition to `http`, `https` and `hf`, such as `s3`; also for chained URLs.

    Returns:
        `np.ndarray` of shape `(samples,)`, float32.

    Raises:
        [`AudioError`]: if the clip is missing, empty, not audio, corrupt or too short, contains NaN or infinite
            samples, has a rate outside 2 to 384 kHz, has a URL that is not allowed, or the server takes too long.
        `ValueError`: if `sampling_rate` is outside this range, or `max_seconds` is not above 0.
    """
    if not _is_rate(sampling_rate):
        raise ValueError(
            f"`sampling_rate` must be an integer from {MIN_RATE} to {MAX_RATE} Hz, but is"
            f" {reprlib.repr(sampling_rate)}."
        )
    sampling_rate = int(sampling_rate)
    if max_seconds is not None:
        check_seconds("max_seconds", max_seconds)
    with open_clip(value, sampling_rate, protocols) as clip:
        return clip.read(sampling_rate, max_seconds, choose_start, min_samples)


def audio_seconds(path: str) -> float:
    """
    Length of a local file in seconds: from its header, or by decoding it if the header contains only an estimate.

    Raises:
        [`AudioError`]: if the file cannot be used.
    """
    with open_clip(path) as clip:
        return clip.seconds()


def check_seconds(name: str, seconds: float) -> None:
    """Raises a `ValueError` unless `seconds` is a number above 0."""
    if isinstance(seconds, bool) or not (isinstance(seconds, (int, float, np.number)) and seconds > 0):
        raise ValueError(f"`{name}` must be a number of seconds above 0, but is {seconds!r}.")


def samples_in(seconds: float | None, rate: float) -> int | float:
    return math.inf if seconds is None or math.isinf(seconds) else round(seconds * rate)


def crop_samples(
    samples: np.ndarray, length: int | float, choose_start: Callable[[int], int] | None = None
) -> np.ndarray:
    if len(samples) <= length:
        return samples
    start = choose_start(len(samples) - length) if choose_start else 0
    return samples[start : start + length]


def _stored(value: Any, name: str, protocols: Sequence[str]) -> str | bytes | None:
    """The local path or the (downloaded) content of stored audio; `None` if `value` contains samples."""
    if isinstance(value, (str, os.PathLike)):
        path, content = value, None
    elif isinstance(value, (bytes, bytearray, memoryview)):
        path, content = None, value
    elif isinstance(value, Mapping):
        path, content = value.get("path"), value.get("bytes")
        if content is None and value.get("array") is not None:
            return None
    else:
        return None
    if content is not None:
        if not isinstance(content, (bytes, bytearray, memoryview)):
            raise AudioError(f"{name} has a {type(content).__name__} for `bytes`; pass the content of a file.")
        return bytes(content)
    if path is None:
        raise AudioError(f"{name} has neither a path nor bytes nor an array; leave it out.")
    if not isinstance(path, (str, bytes, os.PathLike)):
        raise AudioError(f"{name} has a {type(path).__name__} for `path`; pass the path of a file.")
    path = os.fsdecode(path)
    return read_url(path, protocols) if is_url(path) else path


def _checked_rate(rate: Any, name: str) -> int:
    """A rate as an integer in Hz, from any type of number."""
    if isinstance(rate, (np.ndarray, torch.Tensor)) and rate.ndim == 0:
        rate = rate.item()
    if not _is_rate(rate):
        shown = repr(rate)[:_NAME_CHARACTERS]
        raise AudioError(
            f"{name} has the sampling rate {shown}; it must be an integer from {MIN_RATE} to {MAX_RATE} Hz."
        )
    return int(rate)


def _is_rate(rate: Any) -> bool:
    is_number = isinstance(rate, (int, float, np.integer, np.floating)) and not isinstance(rate, bool)
    return is_number and MIN_RATE <= rate <= MAX_RATE and rate == int(rate)


def _samples(value: Any, name: str) -> np.ndarray:
    """Float samples of shape `(samples, channels)` from an array, tensor or list of floats."""
    if isinstance(value, torch.Tensor):
        if value.device.type == "meta":
            raise AudioError(f"{name} is a tensor on the meta device, which has no samples; load its data.")
        value = value.detach().cpu()
        value = (value.float() if value.is_floating_point() else value).numpy()
    if value is None:
        raise AudioError(f"{name} has no audio (None); leave it out.")
    try:
        samples = np.asarray(value)
    except ValueError:
        raise AudioError(f"{name} is ragged; pass one list of floats, or one per channel.") from None
    if samples.dtype.kind != "f" and (samples.size or samples.dtype.kind not in "fiu"):
        kind = f"{samples.dtype}, not floats" if samples.dtype.kind != "O" else "objects (None? lists?), not floats"
        raise AudioError(f"{name} contains {kind}; scale integers to the range from -1 to 1.")
    if samples.ndim not in (1, 2):
        raise AudioError(f"{name} has {samples.ndim} axes; pass samples, or samples and channels.")
    with np.errstate(over="ignore"):
        samples = samples.astype(np.float32, copy=False)
    if not samples.size:
        return np.zeros((0, 1), np.float32)
    if samples.ndim == 1:
        return samples[:, None]
    return samples.T if np.argmin(samples.shape) == 0 else samples


def _clip_name(value: Any) -> str:
    """The path, in printable characters; otherwise the type of the value."""
    path = value.get("path") if isinstance(value, Mapping) else value
    if isinstance(path, (str, os.PathLike)):
        shown = "".join(
            character if character.isprintable() else character.encode("unicode_escape", "backslashreplace").decode()
            for character in str(path)[: _NAME_CHARACTERS + 1]
        )
        return f"`{shown[:_NAME_CHARACTERS]}{'...' if len(shown) > _NAME_CHARACTERS else ''}`"
    return f"A clip without a path ({type(value).__name__})"
