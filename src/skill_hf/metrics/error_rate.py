"""Word, phoneme and character error rate of a whole set, as in SUPERB (arXiv 2105.01051)."""

import datasets
import evaluate
import jiwer


_DESCRIPTION = """
Error rate of transcripts: the fewest substitutions, deletions and insertions that turn the reference into the
prediction, summed over the set and divided by the summed length of the references. 0 is perfect; insertions can raise
it above 1. It is a fraction, not a percentage, and not the mean of the rates of single utterances.

SUPERB reports
- WER of speech recognition (ASR, LibriSpeech test-clean, without a language model): unit "word";
- PER of phoneme recognition (PR): unit "word" as well, on phonemes separated by spaces, such as "HH AH L OW";
- CER of the values of slots (SF), see the metric slot_filling; unit "character" is the CER of whole transcripts.

A run of whitespace counts as one space and is ignored at either end of a transcript; with unit "character" a space is
a character like any other. Case and punctuation count: normalise both sides in the same way first.

If a reference is empty, everything predicted for it counts as insertions, and it adds nothing to the length of the
references.
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
    predictions (`list[str]`): transcripts to score.
    references (`list[str]`): true transcripts.
    unit (`str`, *optional*, defaults to `"word"`): unit to count, `"word"` (also for phonemes) or `"character"`.
Returns:
    error_rate (`float`): edits per unit of the references, 0 or larger.
Raises:
    `ValueError`: if there is nothing to score, all references are empty, or the unit is unknown.
Examples:
    >>> from skill_hf.metrics import load_metric
    >>> error_rate = load_metric("error_rate")
    >>> error_rate.compute(predictions=["A CAT SAT", "NO"], references=["A CAT", "YES NO"])
    {'error_rate': 0.5}
    >>> error_rate.compute(predictions=["HAT"], references=["CATS"], unit="character")
    {'error_rate': 0.5}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class ErrorRate(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({name: datasets.Value("string") for name in ("predictions", "references")}),
            reference_urls=["https://arxiv.org/abs/2105.01051"],
        )

    def _compute(self, predictions, references, unit="word"):
        processes = {"word": jiwer.process_words, "character": jiwer.process_characters}
        if unit not in processes:
            raise ValueError(f"`unit` must be one of {', '.join(processes)}, but is {unit!r}.")
        for name, texts in (("predictions", predictions), ("references", references)):
            if None in texts:
                raise ValueError(f"`{name}` must contain strings, but item {texts.index(None)} is None.")
        # jiwer would return the number of insertions.
        if not any(text.strip() for text in references):
            raise ValueError("The error rate is undefined: all references are empty.")
        true, predicted = ([" ".join(text.split()) for text in texts] for texts in (references, predictions))
        counts = processes[unit](true, predicted)
        edits = counts.substitutions + counts.deletions + counts.insertions
        return {"error_rate": edits / (counts.hits + counts.substitutions + counts.deletions)}
