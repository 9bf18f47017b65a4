"""Maximum term-weighted value of query by example, as in SUPERB (arXiv 2105.01051)."""

import datasets
import evaluate
import numpy as np


_DESCRIPTION = """
Term-weighted value (TWV) of query by example, with one threshold for all queries:

`TWV(t) = 1 - mean over queries of (P_miss(t) + beta * P_fa(t))`, `beta = (C_fa / C_miss) * (1 / P - 1)`.

A document is accepted for a query if its score is at least t. `P_miss` is the share of documents with the query that
are not accepted, `P_fa` the share of documents without it that are accepted; if every document contains the query,
`P_fa` is 0. The mean is over queries that occur in at least one document; others are left out, as in MediaEval's
scorer.

The maximum (MTWV) is over all thresholds, including one that accepts nothing and gives 0. 1 is perfect; TWV at a given
threshold can be far below 0. It is not a percentage.

Defaults are those of QUESST 2014, which SUPERB uses (QbE): prior P = 0.0008, C_fa = 1, C_miss = 100, so beta = 12.49.
SUPERB reports the MTWV of the test queries, for the layer with the largest MTWV of the development queries.

List every trial, that is, each document for each query. s3prl scores English queries on English documents and lets the
scorer set every other trial of the ground truth to -10. To compare with published values, list those trials as well,
with a score below all others: their queries count as missed.
"""

_CITATION = """
@inproceedings{yang2021superb,
  title     = {{SUPERB}: Speech processing Universal {PER}formance Benchmark},
  author    = {Yang, Shu-wen and Chi, Po-Han and Chuang, Yung-Sung and Lai, Cheng-I Jeff and others},
  booktitle = {Proc. Interspeech},
  pages     = {1194--1198},
  year      = {2021}
}
@inproceedings{anguera2014query,
  title     = {Query by Example Search on Speech at {MediaEval} 2014},
  author    = {Anguera, Xavier and Rodriguez-Fuentes, Luis Javier and Szöke, Igor and Buzo, Andi and Metze, Florian},
  booktitle = {Working Notes Proceedings of the MediaEval 2014 Workshop},
  year      = {2014}
}
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list[float]`): score of each trial, higher if the query is more likely in the document.
    references (`list[int]`): 1 if the document contains the query, 0 if not.
    queries (`list[str]`): the query of each trial.
    prior (`float`, *optional*, defaults to 0.0008): prior probability P that a document contains a query.
    cost_false_alarm (`float`, *optional*, defaults to 1.0): C_fa.
    cost_miss (`float`, *optional*, defaults to 100.0): C_miss.
    actual_threshold (`float`, *optional*): a threshold whose TWV is returned as well.
Returns:
    mtwv (`float`): maximum term-weighted value, from 0 to 1.
    threshold (`float`): largest threshold that reaches it; infinity if accepting nothing is best.
    atwv (`float`): term-weighted value at `actual_threshold`, at most 1; only if `actual_threshold` was passed.
Raises:
    `ValueError`: if a score is NaN, a label is not 0 or 1, no query has a true document, or a cost or the prior is out
        of range.
Examples:
    >>> from skill_hf.metrics import load_metric
    >>> twv = load_metric("term_weighted_value")
    >>> scores, truth, queries = [0.9, 0.1, 0.3, 0.8], [1, 0, 1, 0], ["a", "a", "b", "b"]
    >>> twv.compute(predictions=scores, references=truth, queries=queries, actual_threshold=0.9)
    {'mtwv': 0.5, 'threshold': 0.9, 'atwv': 0.5}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class TermWeightedValue(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            # Labels as floats: int64 would cut others than 0 and 1 down to them.
            features=datasets.Features(
                {
                    "predictions": datasets.Value("float64"),
                    "references": datasets.Value("float64"),
                    "queries": datasets.Value("string"),
                }
            ),
            reference_urls=[
                "https://arxiv.org/abs/2105.01051",
                "https://ceur-ws.org/Vol-1263/mediaeval2014_submission_35.pdf",
            ],
        )

    def _compute(
        self,
        predictions,
        references,
        queries,
        prior=0.0008,
        cost_false_alarm=1.0,
        cost_miss=100.0,
        actual_threshold=None,
    ):
        if not 0 < prior < 1:
            raise ValueError(f"`prior` must be between 0 and 1, but is {prior}.")
        if not (cost_false_alarm > 0 and cost_miss > 0):
            raise ValueError(
                f"`cost_false_alarm` and `cost_miss` must be above 0, but are {cost_false_alarm} and {cost_miss}."
            )
        scores, labels = (np.asarray(values, dtype=float) for values in (predictions, references))
        if np.isnan(scores).any():
            raise ValueError(f"Scores (`predictions`) must be numbers, but item {np.isnan(scores).argmax()} is NaN.")
        if not set(labels) <= {0, 1}:
            raise ValueError(f"Labels (`references`) must be 0 or 1, but contain {sorted(set(labels) - {0, 1})[:5]}.")
        if not labels.any():
            raise ValueError("The term-weighted value is undefined: no query has a document that contains it.")
        beta = cost_false_alarm / cost_miss * (1 / prior - 1)

        _, query = np.unique(queries, return_inverse=True)
        trials = np.bincount(query)
        true = np.bincount(query, weights=labels)
        counted = true[query] > 0
        scores, labels, query = scores[counted], labels[counted], query[counted]
        # What TWV gains or loses by accepting a trial.
        gains = np.where(labels == 1, 1 / true[query], -beta / np.maximum(trials - true, 1)[query])
        gains /= np.count_nonzero(true)

        order = np.argsort(-scores)
        thresholds, gains = scores[order], gains[order]
        last = np.append(thresholds[1:] != thresholds[:-1], True)  # of its score: equal ones are accepted together
        values = np.append(0, gains.cumsum()[last])
        thresholds = np.append(np.inf, thresholds[last])
        best = values.argmax()
        result = {"mtwv": float(values[best]), "threshold": float(thresholds[best])}
        if actual_threshold is not None:
            result["atwv"] = float(values[np.count_nonzero(thresholds[1:] >= actual_threshold)])
        return result
