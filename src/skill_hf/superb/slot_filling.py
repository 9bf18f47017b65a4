"""
Slot filling, as in SUPERB (arXiv 2105.01051): transcribes speech, and finds the words that fill slots and their types.
"""

import itertools
import re
from collections.abc import Iterator, Sequence

import datasets
import numpy as np

from ..metrics import load_metric
from .tasks import Splits, Transcription, check_column


_MARK = re.compile(r"[BE]-\S+")
_PUNCTUATION = set("?!.,;:-–…\"'")


class SlotFilling(Transcription):
    """
    CTC over one sequence of characters and of marks for the beginning and end of slots, with the head of speech
    recognition.

    Transcripts have one of two formats:

    - Marks are words of the text, as in `PLAY B-artist NINA SIMONE E-artist NOW`. Every word that starts with `B-` or
      `E-` counts as one.
    - The text is plain, and another column has a tag for each word, as in SUPERB's Audio SNIPS: `O` or the type of the
      slot, as in `O artist artist O`. Neighbouring words of one type form one slot. Tags may have the prefixes `B-`
      and `I-`; then every `B-` begins a slot.

    As in SUPERB, texts are converted to capitals, `&` becomes `AND`, and words that are only punctuation are removed.
    A slot contains at least one word and no other slot.

    Args:
        column (`str`): column with the text.
        tags (`str`, *optional*): column with the tags; by default, the marks are in the text.
        lstm_size (`int`, *optional*): width of the LSTM; 1024 by default, as in SUPERB.
    """

    greater_is_better = True

    def __init__(self, column: str, tags: str | None = None, lstm_size: int | None = None):
        super().__init__("asr", column, lstm_size=lstm_size)
        self.name, self.metric, self.tags = "sf", "sf_f1", tags

    def read(self, splits: Splits) -> dict[str, list]:
        targets = super().read(splits)
        for split, texts in targets.items():
            if not any(_MARK.fullmatch(word) for text in texts for word in text.split()):
                raise ValueError(
                    f"The {split} set has no slot in `{self.column}`; write them as `B-type words E-type`, or tag"
                    " every word in a column `iob`."
                )
        return targets

    def read_texts(self, dataset: datasets.Dataset, split: str) -> list[str]:
        check_column(dataset, self.column, split)
        texts = [str(text or "").split() for text in dataset[self.column]]
        if self.tags is not None:
            check_column(dataset, self.tags, split)
        tags = [None] * len(texts) if self.tags is None else dataset[self.tags]
        targets = []
        for row, (words, row_tags) in enumerate(zip(texts, tags, strict=True)):
            try:
                if self.tags is not None:
                    words = list(_add_marks(words, row_tags.split() if isinstance(row_tags, str) else row_tags or []))
                _check_marks(words)
            except ValueError as error:
                raise ValueError(f"Row {row} of the {split} set: {error}") from None
            targets.append(self.normalise(" ".join(words)))
            if not targets[-1]:
                raise ValueError(f"Row {row} of the {split} set has no text in `{self.column}`; leave out such rows.")
        return targets

    def normalise(self, text: str) -> str:
        words = ["AND" if word == "&" else word for word in text.split() if not set(word) <= _PUNCTUATION]
        return " ".join(word if _MARK.fullmatch(word) else _upper(word) for word in words)

    def split(self, text: str) -> list[str]:
        """Splits into characters and whole marks, without a blank between a mark and the words of its slot."""
        symbols = []
        for word in text.split():
            inside = symbols and symbols[-1].startswith("B-") or word.startswith("E-")
            symbols += ([" "] if symbols and not inside else []) + ([word] if _MARK.fullmatch(word) else list(word))
        return symbols

    def decode(self, best: np.ndarray) -> str:
        kept = [self.symbols[symbol] for symbol, _ in itertools.groupby(best.tolist()) if symbol > 0]
        return " ".join("".join(f" {symbol} " if len(symbol) > 1 else symbol for symbol in kept).split())

    def score(self, predictions: np.ndarray, targets: Sequence) -> dict[str, float]:
        texts = [self.decode(best) for best in predictions]
        result = load_metric("slot_filling").compute(predictions=texts, references=list(targets))
        return {"sf_f1": 100 * result["slot_type_f1"], "sf_cer": 100 * result["slot_value_cer"]}


def _add_marks(words: list[str], tags: Sequence[str]) -> Iterator[str]:
    """Words with the marks for their tags."""
    if len(words) != len(tags):
        raise ValueError(
            f"it has {len(words)} words, but {len(tags)} tags; each word needs one, `O` outside of slots."
        )
    slot = None
    for word, tag in zip(words, tags, strict=True):
        tag_slot = None if tag == "O" else re.sub(r"^[BI]-", "", tag)
        if slot is not None and (tag_slot != slot or tag.startswith("B-")):
            yield f"E-{slot}"
            slot = None
        if set(word) <= _PUNCTUATION:
            continue  # it would be left out later, and a slot with nothing else would stay
        if tag_slot is not None and slot is None:
            yield f"B-{tag_slot}"
            slot = tag_slot
        yield _upper(word)
    if slot is not None:
        yield f"E-{slot}"


def _upper(word: str) -> str:
    """A word in capitals that is not a mark: `EMAIL`, since `E-MAIL` would end a slot."""
    word = word.upper()
    return word.replace("-", "", 1) if _MARK.fullmatch(word) else word


def _check_marks(words: list[str]) -> None:
    slot, size = None, 0
    for word in words:
        if not _MARK.fullmatch(word):
            size += not set(word) <= _PUNCTUATION
        elif word.startswith("B-"):
            if slot is not None:
                raise ValueError(f"`{word}` begins a slot within another, `{slot}`; slots can't be nested.")
            slot, size = word[2:], 0
        else:
            if slot != word[2:]:
                began = "none began" if slot is None else f"the slot that began is `{slot}`"
                raise ValueError(f"`{word}` ends a slot, but {began}; words must not start with `B-` or `E-`.")
            if not size:
                raise ValueError(f"the slot `{slot}` contains no word; leave out its marks.")
            slot = None
    if slot is not None:
        raise ValueError(f"the slot `{slot}` has no end, `E-{slot}`.")
