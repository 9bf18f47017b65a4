"""What the student hears instead of the clean audio: noise, reverberation, a second speaker."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.signal import fftconvolve

from .audio import AudioError, read_audio
from .speech_datasets import load_audio_dir


# A second speaker talks during at most this share of a clip, so that it stays clear whom the teacher hears.
MAX_OVERLAP = 0.5


@dataclass
class Distortion:
    """
    Distorts the student's input, while the teacher hears the clean audio: the student learns hidden states that do not
    depend on the acoustics (RobustDistiller, arXiv 2403.08654). Each kind is applied to a clip with a probability of
    its own, in the order in which it happens in a room: another speaker of the same batch (utterance mixing of WavLM,
    arXiv 2110.13900, section 3.2), reverberation, noise.

    Args:
        noise_dir (`str`, *optional*):
            Directory of noise recordings, including its subdirectories. A random part of one is added to the clip; one
            that is shorter than the clip is repeated.
        noise_prob (`float`, *optional*, defaults to 0.5):
            Share of clips that get noise.
        noise_snr (`Sequence[float]`, *optional*, defaults to `(0.0, 20.0)`):
            Lowest and highest signal-to-noise ratio in dB; it is drawn uniformly.
        reverb_dir (`str`, *optional*):
            Directory of room impulse responses, which clips are convolved with. The direct sound stays where it was,
            and the energy of the clip is the same as before.
        reverb_prob (`float`, *optional*, defaults to 0.5):
            Share of clips that get reverberation.
        mixing_prob (`float`, *optional*, defaults to 0.0):
            Share of clips that get a second speaker: a part of another clip of the batch, at most half as long, at a
            random place.
        mixing_snr (`Sequence[float]`, *optional*, defaults to `(-5.0, 5.0)`):
            Lowest and highest ratio in dB of the clip to the second speaker.

    Raises:
        `ValueError`: if a value is out of its range. An [`AudioError`] if a directory has no audio that can be read.
    """

    noise_dir: str | None = None
    noise_prob: float = 0.5
    noise_snr: Sequence[float] = (0.0, 20.0)
    reverb_dir: str | None = None
    reverb_prob: float = 0.5
    mixing_prob: float = 0.0
    mixing_snr: Sequence[float] = (-5.0, 5.0)
    _noises: list[str] = field(default_factory=list, init=False, repr=False, compare=False)
    _responses: list[str] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self):
        for name in ("noise_prob", "reverb_prob", "mixing_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must be from 0 to 1, but is {getattr(self, name)}.")
        for name in ("noise_snr", "mixing_snr"):
            bounds = getattr(self, name)
            if len(bounds) != 2 or not np.isfinite(bounds).all() or bounds[0] > bounds[1]:
                raise ValueError(f"`{name}` must be the lowest and the highest ratio in dB, but is {list(bounds)}.")
        self._noises, self._responses = _files_in(self.noise_dir), _files_in(self.reverb_dir)

    @property
    def does_nothing(self) -> bool:
        """Whether no clip is ever changed."""
        kinds = (self._noises and self.noise_prob, self._responses and self.reverb_prob, self.mixing_prob)
        return not any(kinds)

    def __call__(self, clips: Sequence[np.ndarray], sampling_rate: int, seed: Sequence[int]) -> list[np.ndarray]:
        """
        Args:
            clips (`Sequence[np.ndarray]`): waveforms of a batch, 1-D float32, of any lengths.
            sampling_rate (`int`): of the clips, in Hz; noise and impulse responses are resampled to it.
            seed (`Sequence[int]`): everything that is random depends only on these numbers.

        Returns:
            `list[np.ndarray]`: waveforms of the same lengths.

        Raises:
            [`AudioError`]: if a noise or an impulse response cannot be read, or is silent.
        """
        generator = np.random.default_rng(tuple(seed))
        return [self._distorted(index, clips, sampling_rate, generator) for index in range(len(clips))]

    def _distorted(
        self, index: int, clips: Sequence[np.ndarray], sampling_rate: int, generator: np.random.Generator
    ) -> np.ndarray:
        samples = clips[index]
        # Drawn in any case, so that one kind does not change the draws of the others.
        mixed, reverberated, noisy = generator.random(3)
        if mixed < self.mixing_prob and len(clips) > 1:
            other = clips[(index + generator.integers(1, len(clips))) % len(clips)]
            part = _part_of(other, len(samples), generator)
            samples = add_at_ratio(samples, part, generator.uniform(*self.mixing_snr))
        if self._responses and reverberated < self.reverb_prob:
            samples = reverberate(samples, _read_any(self._responses, sampling_rate, generator))
        if self._noises and noisy < self.noise_prob:
            noise = _read_any(self._noises, sampling_rate, generator, len(samples) / sampling_rate)
            samples = add_at_ratio(samples, np.resize(noise, len(samples)), generator.uniform(*self.noise_snr))
        return samples


def add_at_ratio(samples: np.ndarray, added: np.ndarray, ratio: float) -> np.ndarray:
    """
    Adds a waveform that is scaled so that the mean power of `samples` is `ratio` dB above it, where it sounds: zeros
    of `added` do not count. Without power on either side, `samples` as they are.
    """
    sounds = added != 0
    power = float(np.square(samples, dtype=np.float64).mean())
    of_added = float(np.square(added[sounds], dtype=np.float64).mean()) if sounds.any() else 0.0
    if not power or not of_added:
        return samples
    return samples + added * np.float32((power / of_added / 10 ** (ratio / 10)) ** 0.5)


def reverberate(samples: np.ndarray, response: np.ndarray) -> np.ndarray:
    """
    Convolves a clip with a room impulse response, whose largest sample counts as the direct sound. Length, delay and
    energy stay as they are, so frames still match the teacher's.
    """
    wet = fftconvolve(samples, response)[np.abs(response).argmax() :][: len(samples)]
    energy = np.linalg.norm(wet)
    return (wet * (np.linalg.norm(samples) / energy if energy else 0.0)).astype(np.float32)


def _part_of(other: np.ndarray, length: int, generator: np.random.Generator) -> np.ndarray:
    """A part of another clip at a random place in silence, `(length,)`."""
    longest = max(1, min(len(other), int(MAX_OVERLAP * length)))
    number = generator.integers(1, longest + 1)
    source, place = generator.integers(len(other) - number + 1), generator.integers(length - number + 1)
    part = np.zeros(length, np.float32)
    part[place : place + number] = other[source : source + number]
    return part


def _read_any(
    paths: list[str], sampling_rate: int, generator: np.random.Generator, max_seconds: float | None = None
) -> np.ndarray:
    """One of the files, or a random part of one that is longer than `max_seconds`."""
    path = paths[generator.integers(len(paths))]
    samples = read_audio(path, sampling_rate, max_seconds, lambda spare: int(generator.integers(spare + 1)))
    if not samples.any():
        raise AudioError(f"`{path}` is silent and cannot distort a clip; leave it out.")
    return samples


def _files_in(directory: str | None) -> list[str]:
    return [] if directory is None else [row["path"] for row in load_audio_dir(directory)["audio"]]
