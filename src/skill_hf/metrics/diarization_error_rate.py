"""Diarization error rate with optimal mapping of speakers, as in SUPERB (arXiv 2105.01051)."""

import datasets
import evaluate
import numpy as np
from scipy.optimize import linear_sum_assignment


_DESCRIPTION = """
Diarization error rate (DER): `(missed + false alarm + confusion) / speech` in speaker time, so a second in which two
speakers talk counts as two seconds of speech. Overlaps are scored. All times are summed over the recordings before the
division. It is a fraction, not a percentage, and can exceed 1 because of false alarms.

At a time with N speakers in the reference and M in the prediction, of which C are correct, `max(0, N - M)` are missed,
`max(0, M - N)` are false alarms and `min(N, M) - C` are confused. Predicted speakers of a recording are matched with
true speakers by the one-to-one mapping with the largest total time in common. The times of the segments are used as
they are, not rounded to frames.

SUPERB scores speaker diarization (SD) with collar 0, the default here. The collar is the total width of the region
that is excluded around each boundary of the reference, half of it on either side, as in pyannote.metrics. NIST's
md-eval and dscore count it on each side: their collar of 0.25 is 0.5 here. Excluded regions do not affect the mapping.

Segments of one speaker that touch or overlap count as one.
"""

_CITATION = """
@inproceedings{yang2021superb,
  title     = {{SUPERB}: Speech processing Universal {PER}formance Benchmark},
  author    = {Yang, Shu-wen and Chi, Po-Han and Chuang, Yung-Sung and Lai, Cheng-I Jeff and others},
  booktitle = {Proc. Interspeech},
  pages     = {1194--1198},
  year      = {2021}
}
@inproceedings{fiscus2006rich,
  title     = {The Rich Transcription 2006 Spring Meeting Recognition Evaluation},
  author    = {Fiscus, Jonathan G. and Ajot, Jerome and Michel, Martial and Garofolo, John S.},
  booktitle = {Machine Learning for Multimodal Interaction},
  pages     = {309--322},
  year      = {2006}
}
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list[list[dict]]`): for each recording its segments, with the keys `speaker` (`str`), `start` and
        `end` (`float`, seconds). Speaker names may differ from those of the reference.
    references (`list[list[dict]]`): true segments of the same recordings, in the same order.
    collar (`float`, *optional*, defaults to 0.0): seconds excluded around each boundary of the reference, in total.
Returns:
    der (`float`): sum of the next three.
    missed (`float`): share of speech in which too few speakers are predicted.
    false_alarm (`float`): speaker time in which too many are predicted, relative to speech.
    confusion (`float`): share of speech that is assigned to the wrong speaker.
    reference_seconds (`float`): speech of the references, without collars.
Raises:
    `ValueError`: if a segment ends before it starts or has a time that is not finite, the collar is negative, or the
        references contain no speech.
Examples:
    >>> from skill_hf.metrics import load_metric
    >>> der = load_metric("diarization_error_rate")
    >>> reference = [{"speaker": "Ann", "start": 0, "end": 6}, {"speaker": "Bob", "start": 6, "end": 8}]
    >>> prediction = [{"speaker": "1", "start": 0, "end": 5}, {"speaker": "2", "start": 5, "end": 8}]
    >>> der.compute(predictions=[prediction], references=[reference])
    {'der': 0.125, 'missed': 0.0, 'false_alarm': 0.0, 'confusion': 0.125, 'reference_seconds': 8.0}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class DiarizationErrorRate(evaluate.Metric):
    def _info(self):
        segments = [
            {"speaker": datasets.Value("string"), "start": datasets.Value("float64"), "end": datasets.Value("float64")}
        ]
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": segments, "references": segments}),
            reference_urls=["https://arxiv.org/abs/2105.01051"],
        )

    def _compute(self, predictions, references, collar=0.0):
        if not 0 <= collar < np.inf:
            raise ValueError(f"`collar` must be a number of seconds, 0 or larger, but is {collar}.")
        times = np.zeros(4)
        for index, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
            for name, segments in (("predictions", prediction), ("references", reference)):
                _check(segments, f"Recording {index} of `{name}`")
            times += _times(prediction, reference, collar)
        missed, false_alarm, confusion, speech = (float(time) for time in times)
        if not speech:
            raise ValueError("The diarization error rate is undefined: `references` contain no speech to score.")
        return {
            "der": (missed + false_alarm + confusion) / speech,
            "missed": missed / speech,
            "false_alarm": false_alarm / speech,
            "confusion": confusion / speech,
            "reference_seconds": speech,
        }


def _check(segments, place):
    for segment in segments:
        start, end = np.array([segment["start"], segment["end"]], dtype=float)
        if segment["speaker"] is None or not np.isfinite([start, end]).all() or end < start:
            raise ValueError(f"{place} contains {segment}, but each segment needs a speaker and finite start <= end.")


def _times(prediction, reference, collar):
    """Missed speech, false alarm, confusion and total speech of a recording, in seconds."""
    edges = np.array([time for segment in reference for time in (segment["start"], segment["end"])])
    others = [time for segment in prediction for time in (segment["start"], segment["end"])]
    # Between two neighbours of the grid nothing changes.
    grid = np.unique(np.concatenate([edges, others, edges - collar / 2, edges + collar / 2]))
    middle, seconds = (grid[:-1] + grid[1:]) / 2, np.diff(grid)
    true, predicted = _activity(reference, middle), _activity(prediction, middle)  # (speakers, intervals)
    boundaries = grid[np.diff(true, axis=1, prepend=False, append=False).any(0)] if len(grid) else grid
    seconds[(np.abs(middle[:, None] - boundaries) < collar / 2).any(1)] = 0

    common = (true * seconds) @ predicted.T  # (true speakers, predicted speakers), seconds
    right = common[linear_sum_assignment(common, maximize=True)].sum()
    n, m = true.sum(0), predicted.sum(0)
    confusion = max(0, np.minimum(n, m) @ seconds - right)  # rounding may leave it below 0
    return np.array([np.maximum(n - m, 0) @ seconds, np.maximum(m - n, 0) @ seconds, confusion, n @ seconds])


def _activity(segments, times):
    """Whether each speaker is speaking at each time, `(speakers, times)`."""
    rows = {speaker: row for row, speaker in enumerate(sorted({segment["speaker"] for segment in segments}))}
    activity = np.zeros((len(rows), len(times)), dtype=bool)
    for segment in segments:
        activity[rows[segment["speaker"]]] |= (segment["start"] <= times) & (times < segment["end"])
    return activity
