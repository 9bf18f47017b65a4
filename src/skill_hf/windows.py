"""Hidden states of recordings of any length, in windows that overlap."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from .data.audio import Clip, open_clip
from .encoders import PretrainedEncoder
from .models.properties import frame_step


# Added to the variance, as `Wav2Vec2FeatureExtractor` does.
EPSILON = 1e-7


class WindowedEncoder:
    """
    Runs a speech encoder over a recording in windows, of which only the middle is kept, so that memory does not depend
    on the length. Windows begin at whole seconds, so frames are those of one pass: as many, at the same times.

    Hidden states differ from those of one pass, since attention ends at the borders of a window, and a group norm
    after the first convolution takes its statistics over the window; see docs/using_students.md for how much. The
    waveform is normalised with the statistics of the whole recording, which is therefore read twice.

    Args:
        encoder ([`~skill_hf.encoders.PretrainedEncoder`]): the encoder.
        window_seconds (`int`, *optional*, defaults to 30): length of a window in seconds.
        context_seconds (`int`, *optional*, defaults to 5): seconds that are left out at each inner border.
        batch_size (`int`, *optional*, defaults to 1): windows that run at the same time.

    Raises:
        `ValueError`: if nothing of a window would be kept, or a second is no whole number of frames.
    """

    def __init__(
        self, encoder: PretrainedEncoder, window_seconds: int = 30, context_seconds: int = 5, batch_size: int = 1
    ):
        if context_seconds < 1 or window_seconds <= 2 * context_seconds:
            raise ValueError(
                f"`window_seconds` ({window_seconds}) must be more than twice `context_seconds` ({context_seconds}),"
                " which must be at least 1."
            )
        step = frame_step(encoder.model.config)
        if encoder.sampling_rate % step:
            raise ValueError(
                f"Frames of this model are {step} samples apart, of {encoder.sampling_rate} in a second: windows of"
                " whole seconds do not fit."
            )
        self.encoder = encoder
        self.window_seconds, self.context_seconds, self.batch_size = window_seconds, context_seconds, batch_size
        self.frames_per_second = encoder.sampling_rate // step

    def num_frames(self, audio: Any, protocols: Sequence[str] = ()) -> int:
        """Frames of a recording; see [`WindowedEncoder.__call__`]."""
        with open_clip(audio, self.encoder.sampling_rate, protocols) as clip:
            *_, last = self._starts(clip)
            frames = self.encoder.num_frames(len(self._read(clip, last)))
            return last * self.frames_per_second + frames

    def __call__(self, audio: Any, protocols: Sequence[str] = ()) -> Iterator[torch.Tensor]:
        """
        Args:
            audio: any value that [`~skill_hf.data.audio.read_audio`] accepts.
            protocols (`Sequence[str]`, *optional*): URL protocols to allow, as there.

        Yields:
            `torch.Tensor` of shape `(frames, layers, hidden size)`, float32: consecutive parts of the hidden states.

        Raises:
            [`~skill_hf.data.audio.AudioError`]: if the recording cannot be read, or is shorter than one frame.
        """
        with open_clip(audio, self.encoder.sampling_rate, protocols) as clip:
            normalise = self._normaliser(clip)
            starts = list(self._starts(clip))
            *whole, last = starts
            for first in range(0, len(whole), self.batch_size):
                group = whole[first : first + self.batch_size]
                states = self.encoder([normalise(self._read(clip, start)) for start in group])
                for start, of_window in zip(group, states, strict=True):
                    end = (self.window_seconds - self.context_seconds) * self.frames_per_second
                    yield of_window[self._first_kept(start) : end]
            (states,) = self.encoder([normalise(self._read(clip, last))])
            yield states[self._first_kept(last) :]

    def _starts(self, clip: Clip) -> Iterator[int]:
        """Where windows begin, in seconds; the last one, which may be shorter, is longer than both contexts."""
        total, start = clip.seconds(), 0
        while True:
            yield start
            if total <= start + self.window_seconds:
                return
            start += self.window_seconds - 2 * self.context_seconds

    def _first_kept(self, start: int) -> int:
        return self.context_seconds * self.frames_per_second if start else 0

    def _read(self, clip: Clip, start: int) -> np.ndarray:
        return clip.read(
            self.encoder.sampling_rate, self.window_seconds, lambda spare: start * clip.rate, self.encoder.min_samples
        )

    def _normaliser(self, clip: Clip):
        if not self.encoder.feature_extractor.do_normalize:
            return lambda samples: samples
        mean, variance = clip.moments()
        scale = 1 / np.sqrt(variance + EPSILON)
        return lambda samples: ((samples - mean) * scale).astype(np.float32)
