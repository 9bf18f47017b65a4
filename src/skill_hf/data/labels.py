"""Labels of rows: from what a row holds to padded ids of a head's outputs."""

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

import torch


IGNORED_LABEL = -100  # what labels are padded with, as transformers does


@dataclass(frozen=True)
class LabelEncoder:
    """
    Makes label ids of the `labels` of a row: ids as they are, text by the tokenizer or by the names of classes.

    Args:
        num_classes (`int`): outputs of the head.
        one_per_clip (`bool`): whether a clip has one label; otherwise a sequence, of tokens or of frames.
        ids (`dict[str, int]`, *optional*): names of classes.
        blank (`int`, *optional*): of connectionist temporal classification, which no label may be.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): what makes ids of a transcript.
    """

    num_classes: int
    one_per_clip: bool
    ids: Mapping[str, int] = field(default_factory=dict)
    blank: int | None = None
    tokenizer: Any = None

    def __call__(self, value: Any) -> list[int]:
        """
        The ids of one row; a list of one where a clip has one label, an empty list for `None`.

        Raises:
            `ValueError`: if they are not ids of the head's outputs, nor text that stands for them.
        """
        if value is None:
            return []
        if self.tokenizer is not None and isinstance(value, str):
            value = self.tokenizer(value).input_ids
        is_one = isinstance(value, (str, Integral)) or getattr(value, "ndim", None) == 0
        if is_one != self.one_per_clip:
            wanted = "one label" if self.one_per_clip else "a list of labels"
            raise ValueError(f"`labels` of a row is {reprlib.repr(value)}, but must be {wanted}.")
        values = [value] if is_one else list(value)
        return [self._id(one) for one in values if self.blank is None or one != IGNORED_LABEL]

    def _id(self, value: Any) -> int:
        label = self.ids.get(value) if isinstance(value, str) else getattr(value, "item", lambda: value)()
        is_id = isinstance(label, Integral) and not isinstance(label, bool)
        if not is_id or not (0 <= label < self.num_classes or label == IGNORED_LABEL):
            names = f" or of {reprlib.repr(list(self.ids))}" if self.ids else ""
            raise ValueError(
                f"`labels` of a row holds {reprlib.repr(value)}, but must be from 0 to {self.num_classes - 1}{names}."
            )
        if label == self.blank:
            raise ValueError(f"`labels` of a row holds {label}, the blank of the head; leave it out.")
        return int(label)


def pad_labels(rows: list[list[int]], one_per_clip: bool) -> torch.Tensor:
    """Ids of a batch, int64 of shape `(batch,)` or `(batch, most labels)`, padded on the right."""
    if one_per_clip:
        return torch.tensor([ids[0] if ids else IGNORED_LABEL for ids in rows])
    longest = max(1, *map(len, rows))
    return torch.tensor([ids + [IGNORED_LABEL] * (longest - len(ids)) for ids in rows])
