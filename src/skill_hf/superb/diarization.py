"""Speaker diarization, as in SUPERB (arXiv 2105.01051): who speaks when; speech may overlap."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy.signal import medfilt
from torch import nn

from ..metrics import load_metric
from .heads import DiarizationHead
from .tasks import Splits, Task, check_column


class Diarization(Task):
    """
    Whether each speaker of a recording is speaking, frame by frame; the order of the speakers does not matter.

    For each recording, the column has a list of `speaker_id`, `start` and `end`, in the format of SUPERB on the Hub,
    relative to the beginning of the clip; the list is empty if nobody speaks. On the Hub, `start` and `end` are frames
    of 10 ms (`time_unit=0.01`), and a recording of more than 20 s has several rows, each with all of its audio and
    segments.

    Frames are those of the encoder. The head is trained on chunks and tested on whole recordings. Its output is
    smoothed with a median filter and scored in seconds with collar 0, overlaps included, like dscore. The head is
    selected by the error rate on the validation set (s3prl uses frame accuracy). The test error rate is for a
    threshold of 0.5 with filter; s3prl prints it for five thresholds, with and without filter.

    Args:
        column (`str`): column with the segments.
        frame_seconds (`float`): time from one frame of the encoder to the next.
        time_unit (`float`, *optional*, defaults to 1.0): seconds per unit of `start` and `end`; 1/16000 for samples at
            16 kHz.
        max_seconds (`float`, *optional*): length in seconds that clips were cropped to.
        lstm_size (`int`, *optional*, defaults to 512): width of the LSTM.
        chunk_seconds (`float`, *optional*, defaults to 20): length of chunks in training, as in SUPERB.
        median_frames (`int`, *optional*, defaults to 11): width of the median filter, odd.
    """

    name = "sd"
    metric = "sd_der"
    greater_is_better = False

    def __init__(
        self,
        column: str,
        frame_seconds: float,
        time_unit: float = 1.0,
        max_seconds: float | None = None,
        lstm_size: int = 512,
        chunk_seconds: float = 20.0,
        median_frames: int = 11,
    ):
        if time_unit <= 0:
            raise ValueError(f"`time_unit` must be above 0, but is {time_unit}.")
        self.column, self.frame_seconds, self.time_unit, self.lstm_size = column, frame_seconds, time_unit, lstm_size
        self.max_seconds = math.inf if max_seconds is None else max_seconds
        self.chunk_frames, self.median_frames = max(1, round(chunk_seconds / frame_seconds)), median_frames

    def read(self, splits: Splits) -> dict[str, list]:
        targets = {}
        for split, dataset in splits.items():
            check_column(dataset, self.column, split)
            targets[split] = [
                self._segments(value, f"`{self.column}` in row {row} of the {split} set")
                for row, value in enumerate(dataset[self.column])
            ]
            self.check(targets[split], split)
        self.num_speakers = max(len(_speakers(segments)) for segments in targets["train"])
        return targets

    def _segments(self, value: Any, place: str) -> list[dict[str, Any]]:
        """Segments in seconds, within the cropped clip."""
        segments = []
        if not isinstance(value, list):
            raise ValueError(f"{place} must be a list of segments with speaker_id, start and end, but is {value!r}.")
        for segment in value:
            if not isinstance(segment, Mapping) or not {"speaker_id", "start", "end"} <= segment.keys():
                raise ValueError(f"{place} has {segment!r}, which is not a dict with speaker_id, start and end.")
            speaker, start, end = (segment[key] for key in ("speaker_id", "start", "end"))
            if speaker is None or not all(isinstance(time, (int, float)) for time in (start, end)):
                raise ValueError(f"{place} has {segment!r}; `speaker_id` must be a name, `start` and `end` numbers.")
            if not 0 <= start <= end < math.inf:
                raise ValueError(f"{place} has a segment from {start} to {end}; 0 <= start <= end must hold.")
            start, end = start * self.time_unit, min(end * self.time_unit, self.max_seconds)
            if start < end:
                segments.append({"speaker": str(speaker), "start": start, "end": end})
        return segments

    def build_head(self, num_layers: int, hidden_size: int) -> DiarizationHead:
        return DiarizationHead(num_layers, hidden_size, self.num_speakers, self.lstm_size)

    def check(self, targets: Sequence, split: str, num_frames: Mapping[int, int] | None = None) -> None:
        """
        Raises:
            `ValueError`: if somebody speaks after the end of a clip, for instance because `time_unit` is wrong, or
                nobody speaks.
        """
        if not any(targets):
            raise ValueError(f"The {split} set contains no speech according to `{self.column}`.")
        for (row, frames), segments in zip((num_frames or {}).items(), targets, strict=num_frames is not None):
            end, last = frames * self.frame_seconds, max((segment["end"] for segment in segments), default=0)
            if last > end + 1:
                raise ValueError(
                    f"`{self.column}` in row {row} of the {split} set extends to {last:g} s, but the clip ends at"
                    f" {end:.2f} s; correct it, or set `time_unit` to the seconds per unit of `start` and `end` (now"
                    f" {self.time_unit:g})."
                )

    def train_examples(self, examples) -> "Chunks":
        return Chunks(examples, self.chunk_frames, self.frame_seconds)

    def collate(self, targets: Sequence) -> torch.Tensor:
        return nn.utils.rnn.pad_sequence([self._activity(segments) for segments in targets], batch_first=True)

    def _activity(self, segments: Sequence[Mapping]) -> torch.Tensor:
        """1 if a speaker is speaking at the middle of a frame, else 0; shape `(frames up to the last 1, speakers)`."""
        # Of more speakers than the training set has in any recording, the head can't know; they count in `score`.
        columns = {speaker: column for column, speaker in enumerate(_speakers(segments)[: self.num_speakers])}
        spans = [[round(segment[key] / self.frame_seconds) for key in ("start", "end")] for segment in segments]
        activity = torch.zeros(max((end for _, end in spans), default=0), self.num_speakers)
        for segment, (start, end) in zip(segments, spans, strict=True):
            if segment["speaker"] in columns:
                activity[start:end, columns[segment["speaker"]]] = 1
        return activity

    def score(self, predictions: np.ndarray, targets: Sequence) -> dict[str, float]:
        active = medfilt((predictions > 0).astype(float), (1, self.median_frames, 1)) > 0
        result = load_metric("diarization_error_rate").compute(
            predictions=[self._decode(recording) for recording in active], references=list(targets)
        )
        return {"sd_der": 100 * result["der"]}

    def _decode(self, active: np.ndarray) -> list[dict[str, Any]]:
        """Segments of each speaker in seconds, from an array of shape `(frames, speakers)`."""
        changes = np.diff(active.astype(int), axis=0, prepend=0, append=0)
        segments = []
        for speaker, change in enumerate(changes.T):
            for start, end in zip(np.flatnonzero(change == 1), np.flatnonzero(change == -1), strict=True):
                times = {"start": start * self.frame_seconds, "end": end * self.frame_seconds}
                segments.append({"speaker": str(speaker), **times})
        return segments


class Chunks(torch.utils.data.Dataset):
    """
    Recordings cut into chunks of the same length; the last chunk of each is the rest.

    Args:
        examples ([`Examples`]): whole recordings, whose targets are segments.
        chunk_frames (`int`): length of a chunk.
        frame_seconds (`float`): time from one frame to the next.
    """

    def __init__(self, examples, chunk_frames: int, frame_seconds: float):
        self.examples, self.chunk_frames, self.frame_seconds = examples, chunk_frames, frame_seconds
        self.places = [
            (item, start)
            for item, frames in enumerate(examples.states.num_frames)
            for start in range(0, frames, chunk_frames)
        ]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item, start = self.places[index]
        example = self.examples[item]
        begin, end = start * self.frame_seconds, (start + self.chunk_frames) * self.frame_seconds
        target = [
            {**segment, "start": max(segment["start"] - begin, 0), "end": min(segment["end"], end) - begin}
            for segment in example["target"]
            if segment["start"] < end and segment["end"] > begin
        ]
        return {"hidden_states": example["hidden_states"][start : start + self.chunk_frames], "target": target}


def _speakers(segments: Sequence[Mapping]) -> list[str]:
    return sorted({segment["speaker"] for segment in segments})
