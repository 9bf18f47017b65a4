"""Training on a stream of `datasets`: the loader of a process, and its position in checkpoints."""

import functools
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import datasets
import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader

from ..data.durations import row_seconds
from ..data.streams import Bookmark, StreamBatches, batches_of_clips, batches_of_seconds
from ..recipe.argument_validation import refuse
from ..recipe.skill_training_args import SHUFFLE_BUFFER
from .duration_batches import as_cropped, data_seed, make_loader


logger = logging.getLogger(__name__)

# In a batch, until it is used.
BOOKMARK = "bookmark"


class TrainingStream:
    """
    Args:
        trainer ([`~skill_hf.distillation.distillation_trainer.DistillationTrainer`]): the trainer to make batches for.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        self._batches: StreamBatches | None = None
        self._stage: int | None = None

    @property
    def is_used(self) -> bool:
        """Whether the training data is a stream of `datasets`."""
        return isinstance(self.trainer.train_dataset, datasets.IterableDataset)

    @property
    def num_workers(self) -> int:
        """Workers of each process; 1 if it reads itself."""
        return max(1, self.trainer.args.dataloader_num_workers)

    @property
    def shuffle_buffer(self) -> int:
        """Rows that are shuffled together."""
        return getattr(self.trainer.args, "shuffle_buffer", None) or SHUFFLE_BUFFER

    def shuffled(self) -> datasets.IterableDataset:
        """The stream in another order, to take clips from: its first rows are often of one speaker."""
        return self.trainer.train_dataset.shuffle(seed=self.trainer.args.seed, buffer_size=self.shuffle_buffer)

    def identity(self) -> dict:
        """What the order depends on beside the data and its seed."""
        return {
            "shuffle_buffer": self.shuffle_buffer,
            "readers": self.num_workers * self.trainer.accelerator.num_processes,
        }

    def loader(self) -> DataLoader | None:
        """The batches of this process in a stage; `None` if the data is not a stream of `datasets`."""
        trainer, args = self.trainer, self.trainer.args
        if not self.is_used:
            return None
        seconds_per_batch = getattr(args, "seconds_per_batch", None)
        if seconds_per_batch is None:
            block_rows = -(-self.shuffle_buffer // args.train_batch_size) * args.train_batch_size
            make_batches = functools.partial(batches_of_clips, clips=args.train_batch_size)
        else:
            block_rows = self.shuffle_buffer
            make_batches = functools.partial(
                batches_of_seconds, seconds_per_batch=seconds_per_batch, measure=self._measure()
            )
        num_batches = args.max_steps * args.gradient_accumulation_steps
        self._stage = trainer.stage
        self._batches = StreamBatches(
            trainer.train_dataset,
            make_batches,
            num_batches,
            block_rows,
            rank=args.process_index,
            num_ranks=args.world_size,
            num_workers=self.num_workers,
            seed=(data_seed(args), trainer.stage),
        )
        numbers = BatchSampler(range(num_batches), batch_size=1, drop_last=False)
        return make_loader(trainer, self._batches, numbers, _StreamCollator)

    def _measure(self) -> Callable[[Sequence[Mapping]], np.ndarray]:
        trainer, collator = self.trainer, self.trainer.data_collator
        longest = getattr(collator, "max_seconds", None)
        if longest is not None and longest > trainer.args.seconds_per_batch:
            refuse(
                "seconds_per_batch",
                trainer.args.seconds_per_batch,
                f"clips may be {longest:g} s long; raise it, or lower `max_seconds`",
            )
        reading = trainer.reading
        rate, protocols = reading["feature_extractor"].sampling_rate, reading["protocols"]
        return functools.partial(_seconds_of, collator=collator, sampling_rate=rate, protocols=tuple(protocols))

    # ---- The position ----

    def note(self, batches: list[dict]) -> None:
        """Takes the bookmarks out of batches that are used next."""
        for batch in batches:
            bookmark = batch.pop(BOOKMARK, None)
            if bookmark is not None:
                bookmark = Bookmark(*bookmark.tolist())
                self._batches.bookmarks[bookmark.number % self.num_workers] = bookmark

    def save(self, directory: str) -> None:
        """Writes the bookmarks of this process into a checkpoint."""
        if self._batches is not None:
            content = {"stage": self._stage, "bookmarks": list(self._batches.bookmarks.values())}
            self._path(directory).write_text(json.dumps(content) + "\n", encoding="utf-8")

    def restore(self, directory: str) -> None:
        """Restores the bookmarks of this process for the stage that is resumed."""
        if self._batches is None:
            return
        path = self._path(directory)
        if not path.is_file():
            logger.warning("`%s` has no %s: the stream is read again up to its step.", directory, path.name)
            return
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["stage"] == self._stage:  # a stage begins at the beginning
            bookmarks = [Bookmark(*bookmark) for bookmark in content["bookmarks"]]
            self._batches.bookmarks = {bookmark.number % self.num_workers: bookmark for bookmark in bookmarks}

    def _path(self, directory: str) -> Path:
        return Path(directory) / f"stream_position_{self.trainer.args.process_index}.json"


class _StreamCollator:
    """Collates what [`StreamBatches`] returns; the bookmark travels in the batch, from the worker that knows it."""

    def __init__(self, collator: Callable):
        self.collator = collator

    def __call__(self, items: list[tuple[Bookmark, list[Mapping]]]) -> dict:
        ((bookmark, rows),) = items
        return {**self.collator(rows), BOOKMARK: torch.tensor(bookmark)}


def _seconds_of(rows: Sequence[Mapping], collator, sampling_rate: int, protocols: Sequence[str]) -> np.ndarray:
    seconds = np.array([row_seconds(row, sampling_rate, protocols) for row in rows])
    return as_cropped(seconds, collator)
