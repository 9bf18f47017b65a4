"""Equal error rate of speaker verification, as in SUPERB (arXiv 2105.01051)."""

import datasets
import evaluate
import numpy as np
from sklearn.metrics import roc_curve


_DESCRIPTION = """
Equal error rate (EER): the rate at which false acceptances, FP / (FP + TN), and false rejections, FN / (FN + TP), are
equal, between 0 and 1. SUPERB uses it for automatic speaker verification (ASV) on the VoxCeleb1 test trials, with
cosine similarities as scores.

A trial is accepted if its score is at least the threshold. The two rates follow scikit-learn's `roc_curve` as the
threshold falls; they are interpolated linearly between the last point with more false rejections and the next one, and
the EER is the value where they cross. Trials with equal scores are accepted together. The threshold is interpolated in
the same way, starting from the largest score, since a higher threshold has no meaning.
"""

_CITATION = """
@inproceedings{yang2021superb,
  title     = {{SUPERB}: Speech processing Universal {PER}formance Benchmark},
  author    = {Yang, Shu-wen and Chi, Po-Han and Chuang, Yung-Sung and Lai, Cheng-I Jeff and others},
  booktitle = {Proc. Interspeech},
  pages     = {1194--1198},
  year      = {2021}
}
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list[float]`): scores of the trials, higher for the same speaker.
    references (`list[int]`): 1 for trials of the same speaker, 0 for those of different speakers.
Returns:
    equal_error_rate (`float`): from 0 to 1; 0.5 is chance.
    threshold (`float`): lowest score of an accepted trial.
Raises:
    `ValueError`: if a score is not finite, a label is not 0 or 1, or all labels are equal.
Examples:
    >>> from skill_hf.metrics import load_metric
    >>> eer = load_metric("equal_error_rate")
    >>> eer.compute(predictions=[0.9, 0.6, 0.5, 0.1], references=[1, 0, 1, 0])
    {'equal_error_rate': 0.5, 'threshold': 0.6}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class EqualErrorRate(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            # Labels as floats: int64 would cut others than 0 and 1 down to them.
            features=datasets.Features({name: datasets.Value("float64") for name in ("predictions", "references")}),
            reference_urls=["https://arxiv.org/abs/2105.01051"],
        )

    def _compute(self, predictions, references):
        scores, labels = (np.asarray(values, dtype=float) for values in (predictions, references))
        if not np.isfinite(scores).all():
            index = int(np.flatnonzero(~np.isfinite(scores))[0])
            raise ValueError(f"Scores (`predictions`) must be finite, but item {index} is {scores[index]}.")
        if set(labels) != {0, 1}:
            raise ValueError(
                "Labels (`references`) must be 0 and 1, with at least one trial of each, but contain"
                f" {sorted(set(labels)) or 'nothing'}."
            )
        false_acceptance, true_acceptance, thresholds = roc_curve(labels, scores, drop_intermediate=False)
        thresholds[0] = scores.max()  # instead of infinity
        excess = 1 - true_acceptance - false_acceptance  # of false rejections: falls from 1 to -1
        after = int(np.argmax(excess <= 0))
        weight = excess[after - 1] / (excess[after - 1] - excess[after])

        def crossing(values):
            return float(values[after - 1] + weight * (values[after] - values[after - 1]))

        return {"equal_error_rate": crossing(false_acceptance), "threshold": crossing(thresholds)}
