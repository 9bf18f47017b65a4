"""Slot-type F1 and slot-value CER of slot filling, as in SUPERB (arXiv 2105.01051)."""

import re

import datasets
import evaluate
import jiwer


_DESCRIPTION = """
Slot filling (SF of SUPERB, on Audio SNIPS): whether the slots of an utterance are found and their values transcribed.

Transcripts contain each slot between two marks, `B-type` and `E-type`, as in "PLAY B-artist NINA SIMONE E-artist NOW".
The first `E-type` after a `B-type` ends it; a `B-type` without one is not a slot. Marks of other slots within a value
are removed. As in s3prl, a mark is also recognised if a word is attached to its outer side ("PLAYB-artist",
"E-artistNOW").

- Slot-type F1: `2 |R & P| / (|R| + |P|)` of the sets of types in reference and prediction, 1 if both are empty,
  averaged over utterances. Values are ignored.
- Slot-value CER: each slot of a reference is compared with the predicted slot of the same type in the same utterance
  that has the smallest edit distance, or with an empty value if there is none. All edits of the set are divided by all
  characters of the references' values. A predicted slot may be matched with several slots of the reference, and
  superfluous ones are not penalised: the F1 covers them.

Both are fractions, not percentages: the F1 lies between 0 and 1, the CER can exceed 1. Case and punctuation count. The
definitions are those of s3prl's slot_type_f1 and slot_value_cer, but marks are also removed from the values of
references, and values may contain colons and semicolons.
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
    predictions (`list[str]`): transcripts with slots, to score.
    references (`list[str]`): true transcripts with slots.
Returns:
    slot_type_f1 (`float`): from 0 to 1.
    slot_value_cer (`float`): edits per character of the references' values, 0 or larger.
Raises:
    `ValueError`: if there is nothing to score, or no reference contains a slot.
Examples:
    >>> from skill_hf.metrics import load_metric
    >>> slot_filling = load_metric("slot_filling")
    >>> references = ["WAKE ME B-time AT SIX E-time", "PLAY B-artist NINA E-artist"]
    >>> predictions = ["WAKE ME B-time AT SIX E-time", "PLAY B-album NINA E-album"]
    >>> slot_filling.compute(predictions=predictions, references=references)
    {'slot_type_f1': 0.5, 'slot_value_cer': 0.4}
"""

_SLOT = re.compile(r"B-(?P<type>\S+) (?P<value>.+?) E-(?P=type)")
_BEGIN = re.compile(r"B-\S+ ")
_END = re.compile(r" E-\S+")


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class SlotFilling(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({name: datasets.Value("string") for name in ("predictions", "references")}),
            reference_urls=["https://arxiv.org/abs/2105.01051", "https://github.com/s3prl/s3prl"],
        )

    def _compute(self, predictions, references):
        for name, texts in (("predictions", predictions), ("references", references)):
            if None in texts:
                raise ValueError(f"`{name}` must contain strings, but item {texts.index(None)} is None.")
        f1 = edits = characters = 0
        for prediction, reference in zip(predictions, references, strict=True):
            predicted, true = _slots(prediction), _slots(reference)
            f1 += 2 * len(predicted.keys() & true.keys()) / (len(predicted) + len(true)) if predicted or true else 1
            for slot_type, values in true.items():
                for value in values:
                    edits += min(_edits(value, candidate) for candidate in predicted.get(slot_type, [""]))
                    characters += len(value)
        if not characters:
            raise ValueError(
                "The slot-value CER is undefined: no reference contains a slot, which is written `B-type value"
                " E-type`."
            )
        return {"slot_type_f1": f1 / len(references), "slot_value_cer": edits / characters}


def _slots(text):
    """The values of each type of slot, in order."""
    slots = {}
    for slot_type, value in _SLOT.findall(" ".join(text.split())):
        # One after the other, as marks may follow each other with a single space between them.
        slots.setdefault(slot_type, []).append(_END.sub("", _BEGIN.sub("", value)))
    return slots


def _edits(reference, prediction):
    counts = jiwer.process_characters(reference, prediction)
    return counts.substitutions + counts.deletions + counts.insertions
