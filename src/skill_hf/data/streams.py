"""Batches of a stream by number: shards are dealt to the workers of all processes, rows shuffled in blocks."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import datasets
import fsspec.asyn
import numpy as np
import torch
from torch.utils.data import Dataset

from .audio import AudioError
from .duration_batches import DurationBatchSampler


class Bookmark(NamedTuple):
    """
    Where a batch is in a stream.

    Attributes:
        number (`int`): of the batch, among those of its process.
        round (`int`): how often the stream was read before, at the first row of the batch's block.
        place (`int`): index of the shard of this row, among those that its worker reads in this round.
        row (`int`): index of this row in its shard.
        index (`int`): of the batch in its block.
    """

    number: int
    round: int
    place: int
    row: int
    index: int


class StreamBatches(Dataset):
    """
    The training batches of one process, lists of rows, by their numbers. Each worker of each process is a reader of
    its own; the numbers of the batches go round the workers.

    In each round every shard is dealt to one reader. The readers take turns: each has every shard once in as many
    rounds as there are readers, so that none is ahead for long if shards are of unequal length. If there are more
    readers than shards, several read the same shard and each keeps its share of the rows. A reader goes from one round
    to the next without an end, so all processes always have a batch, and no accumulation window stays unfinished. Rows
    are shuffled in blocks, which may reach over the end of a shard.

    The batch of a number is a pure function of stream, seed and number of readers. Workers read forward only: from the
    block of a bookmark in `bookmarks` on, or from the beginning. What comes before that block in its shard is passed
    over and not decoded.

    Args:
        stream (`datasets.IterableDataset`): rows, audio not decoded.
        make_batches (`Callable`):
            Makes batches from a block: called with rows and a seed, a tuple of integers, it returns lists of indices.
        num_batches (`int`): number of batches, all that training takes.
        block_rows (`int`): rows of a block.
        rank, num_ranks (`int`): index of this process, and number of processes.
        num_workers (`int`, *optional*, defaults to 1): workers of each process; 1 if it reads itself.
        seed (`tuple[int, ...]`, *optional*): seed of the order.

    Attributes:
        bookmarks (`dict[int, Bookmark]`): worker -> bookmark of its last batch that was used.

    Raises:
        [`AudioError`]: when a batch is read, if the stream has no rows.
    """

    def __init__(
        self,
        stream: datasets.IterableDataset,
        make_batches: Callable[[list[Mapping], tuple[int, ...]], Iterator[list[int]]],
        num_batches: int,
        block_rows: int,
        rank: int = 0,
        num_ranks: int = 1,
        num_workers: int = 1,
        seed: tuple[int, ...] = (0,),
    ):
        self.stream, self.make_batches = stream, make_batches
        self.num_batches, self.block_rows = num_batches, block_rows
        self.rank, self.num_workers, self.seed = rank, num_workers, seed
        self.num_readers = num_ranks * num_workers
        self.bookmarks: dict[int, Bookmark] = {}
        self._parts = math.ceil(self.num_readers / stream.num_shards)  # of the rows of a shard
        self._open: dict[int, Iterator] = {}
        self._last: dict[int, int] = {}

    def __len__(self) -> int:
        return self.num_batches

    def __getitem__(self, number: int) -> tuple[Bookmark, list[Mapping]]:
        worker = number % self.num_workers
        if worker not in self._open or self._last[worker] >= number:
            if torch.utils.data.get_worker_info() is not None:
                fsspec.asyn.reset_lock()  # a thread of the parent process, which a fork has not, may hold it
            bookmark = self.bookmarks.get(worker)
            # A bookmark further on is of no use.
            usable = bookmark is not None and bookmark.number - bookmark.index * self.num_workers <= number
            self._open[worker] = self._batches(worker, bookmark if usable else None)
        for bookmark, rows in self._open[worker]:
            if bookmark.number == number:
                self._last[worker] = number
                return bookmark, rows

    def _batches(self, worker: int, bookmark: Bookmark | None) -> Iterator[tuple[Bookmark, list[Mapping]]]:
        """The batches of a worker, from the block of a bookmark on."""
        reader = self.rank * self.num_workers + worker
        if bookmark is None:
            bookmark = Bookmark(worker, 0, 0, 0, 0)
        number = bookmark.number - bookmark.index * self.num_workers
        rows, following = self._rows(reader, *bookmark[1:4]), []
        while True:
            block = following + list(itertools.islice(rows, self.block_rows - len(following)))
            start = block[0][0]
            batches = list(self.make_batches([row for _, row in block], (*self.seed, reader, *start)))
            following = []
            for index, batch in enumerate(batches):
                yield Bookmark(number, *start, index), [block[place][1] for place in batch]
                number += self.num_workers
                # The next block little by little: read at once, it would be waited for.
                following += itertools.islice(rows, self.block_rows // len(batches))

    def _rows(
        self, reader: int, first_round: int, first_place: int, first_row: int
    ) -> Iterator[tuple[tuple[int, int, int], Mapping]]:
        """All rows of a reader with their rounds, places and numbers, from a position on, without an end."""
        last_with_rows = first_round
        for round_ in itertools.count(first_round):
            shards = self._shards(reader, round_)
            for place in range(first_place, len(shards)):
                shard, part = divmod(shards[place], self._parts)
                for number, row in self._shard_rows(shard, first_row):
                    if number % self._parts == part:
                        last_with_rows = round_
                        yield (round_, place, number), row
                first_row = 0
            first_place = 0
            if round_ - last_with_rows > self.num_readers:  # it has seen every shard
                raise AudioError("The stream has no rows; choose another split or dataset.")

    def _shards(self, reader: int, round_: int) -> list[int]:
        """The shards, or parts of shards, of a reader in a round, in its order; `_parts` for each shard."""
        dealt = [
            part
            for part in range(self.stream.num_shards * self._parts)
            if (part + round_) % self.num_readers == reader
        ]
        return np.random.default_rng((*self.seed, reader, round_)).permutation(dealt).astype(int).tolist()

    def _shard_rows(self, shard: int, start: int) -> Iterator[tuple[int, Mapping]]:
        rows = self.stream.shard(self.stream.num_shards, shard)
        if start:
            rows = rows.skip(start)
        # `iter(rows)` would deal the shard to workers a second time.
        for number, batch in enumerate(rows.iter(batch_size=1), start):
            yield number, {name: values[0] for name, values in batch.items()}

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_open": {}, "_last": {}}  # generators stay in their process


def batches_of_clips(rows: Sequence[Mapping], seed: tuple[int, ...], *, clips: int) -> Iterator[list[int]]:
    """Batches of so many `clips` in random order, for [`StreamBatches`]."""
    order = np.random.default_rng(seed).permutation(len(rows)).tolist()
    for start in range(0, len(order), clips):
        yield order[start : start + clips]


def batches_of_seconds(
    rows: Sequence[Mapping],
    seed: tuple[int, ...],
    *,
    seconds_per_batch: float,
    measure: Callable[[Sequence[Mapping]], np.ndarray],
) -> Iterator[list[int]]:
    """
    Batches of similar lengths, as [`DurationBatchSampler`] makes them, for [`StreamBatches`]. `measure` gives the
    seconds of rows, as they are cropped.
    """
    return iter(DurationBatchSampler(measure(rows), seconds_per_batch, seed=seed))
