"""Accuracy, for SUPERB's keyword spotting, intents, speakers and emotions (arXiv 2105.01051)."""

import datasets
import evaluate
from sklearn.metrics import accuracy_score


_DESCRIPTION = """
Accuracy: the share of predictions that equal their reference, between 0 and 1.

SUPERB uses it for keyword spotting (KS), speaker identification (SID), emotion recognition (ER) and intent
classification (IC). An utterance of IC is correct if its action, object and location are all correct, so pass the
three as one label, such as "activate|lights|kitchen".
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
    predictions (`list[str]` or `list[int]`): predicted classes.
    references (`list[str]` or `list[int]`): true classes, of the same type.
Returns:
    accuracy (`float`): share of correct predictions, from 0 to 1.
Raises:
    `ValueError`: if there is nothing to score, a class is missing (`None`), or a number is a score instead of a class.
Examples:
    >>> from skill_hf.metrics import load_metric
    >>> accuracy = load_metric("accuracy")
    >>> accuracy.compute(predictions=["yes", "no", "up", "up"], references=["yes", "no", "up", "down"])
    {'accuracy': 0.75}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class Accuracy(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            # Numbers as floats: int64 would cut scores that were given instead of classes down to integers.
            features=[
                datasets.Features({name: datasets.Value(dtype) for name in ("predictions", "references")})
                for dtype in ("string", "float64")
            ],
            reference_urls=["https://arxiv.org/abs/2105.01051"],
        )

    def add_batch(self, *, predictions=None, references=None, **kwargs):
        """Adds a batch of predictions and references."""
        # `evaluate` finds the type of the classes by the first one.
        if references is not None and len(references) == 0:
            raise ValueError("There is nothing to score: `references` is empty.")
        super().add_batch(predictions=predictions, references=references, **kwargs)

    def _compute(self, predictions, references):
        for name, classes in (("predictions", predictions), ("references", references)):
            for index, value in enumerate(classes):
                if value is None or (isinstance(value, float) and not value.is_integer()):
                    raise ValueError(
                        f"`{name}` must contain classes as strings or integers, but item {index} is {value}."
                    )
        return {"accuracy": float(accuracy_score(references, predictions))}
