"""Batches that have about as many seconds of audio each, of clips of similar length."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler


# Clips that may share a batch differ in length by this factor at most, unless they would make fewer batches than
# `MIN_BATCHES`: a clip then had the same company in every epoch.
LENGTH_RATIO = 1.02
MIN_BATCHES = 4


class _Segment(NamedTuple):
    """Clips of similar length: a range of places in the order from the longest to the shortest."""

    start: int
    stop: int
    num_steps: int


class DurationBatchSampler(Sampler[list[int]]):
    """
    Batches of one process, as lists of indices. A batch is as many clips as fit into `seconds_per_batch` if all are as
    long as its longest one.

    The clips, sorted by length, are cut into segments of similar length, and each segment into optimizer steps. Only
    which clips of a segment form a step, and the order of the steps, change with the epoch. So every epoch has the
    same number of batches and each clip once; all processes and micro-batches of a step have clips of similar length;
    and a step consists of the same batches whatever its split into processes and micro-batches. All is a pure function
    of lengths, seed and epoch: a resumed run recomputes the order, and no state is stored.

    Fewer clips than batches in a step are repeated.

    Args:
        seconds (`Sequence[float]`): length of each clip in seconds, as it is cropped or padded; above 0.
        seconds_per_batch (`float`): most seconds of a batch; a longer clip is a batch of its own.
        batches_per_step (`int`, *optional*, defaults to 1): batches of an optimizer step, in all processes together.
        rank (`int`, *optional*, defaults to 0): index of this process.
        num_ranks (`int`, *optional*, defaults to 1): number of processes; a divisor of `batches_per_step`.
        seed (`int` or `tuple[int, ...]`, *optional*, defaults to 0): seed of the order.

    Attributes:
        epoch (`int`): combined with the seed; 0 at first. Not set by `set_epoch`, which data loaders would call.

    Example:

    ```python
    >>> sampler = DurationBatchSampler([9.0, 1.0, 8.0, 1.0, 4.0, 4.0], seconds_per_batch=10.0)
    >>> sorted(map(sorted, sampler))
    [[0], [1, 3], [2], [4, 5]]
    ```
    """

    # Without an attribute `batch_size`: accelerate then drops every batch of another size.

    def __init__(
        self,
        seconds: Sequence[float],
        seconds_per_batch: float,
        batches_per_step: int = 1,
        rank: int = 0,
        num_ranks: int = 1,
        seed: int | tuple[int, ...] = 0,
    ):
        seconds = np.asarray(seconds, dtype=np.float64)
        if not len(seconds) or not (seconds > 0).all():
            raise ValueError("`seconds` must have at least one length, and all must be above 0.")
        if batches_per_step % num_ranks:
            raise ValueError(
                f"`batches_per_step` is {batches_per_step}, but must be a multiple of `num_ranks` ({num_ranks})."
            )
        self.batches_per_step, self.rank, self.num_ranks = batches_per_step, rank, num_ranks
        self.seed = seed if isinstance(seed, tuple) else (seed,)
        self.epoch = 0
        self._order = np.argsort(-seconds, kind="stable")
        self._segments = list(_segments(seconds[self._order], seconds_per_batch, batches_per_step))

    @property
    def num_steps(self) -> int:
        """Optimizer steps of an epoch."""
        return sum(segment.num_steps for segment in self._segments)

    def __len__(self) -> int:
        return self.num_steps * (self.batches_per_step // self.num_ranks)

    def __iter__(self) -> Iterator[list[int]]:
        rng = np.random.default_rng((*self.seed, self.epoch))
        steps = []
        for start, stop, num_steps in self._segments:
            places = start + rng.permutation(stop - start)
            if len(places) < num_steps * self.batches_per_step:
                places = np.resize(places, num_steps * self.batches_per_step)
            # Sorted within a step, so that its batches lose less where they are cropped to their shortest clip.
            steps.extend(np.sort(step) for step in np.array_split(places, num_steps))
        for index in rng.permutation(len(steps)):
            for batch in np.array_split(steps[index], self.batches_per_step)[self.rank :: self.num_ranks]:
                yield self._order[batch].tolist()


def _segments(seconds: np.ndarray, seconds_per_batch: float, batches_per_step: int) -> Iterator[_Segment]:
    """Segments of `seconds`, which fall: whole numbers of full steps, but the last may have emptier batches."""
    start, least_steps = 0, math.ceil(MIN_BATCHES / batches_per_step)
    while start < len(seconds):
        longest = seconds[start]
        step = batches_per_step * max(1, int(seconds_per_batch / longest + 1e-9))
        similar = np.searchsorted(-seconds, -longest / LENGTH_RATIO, side="right") - start
        size = step * max(similar // step, least_steps)
        if start + size + step > len(seconds):  # what is left would not fill a step
            size = len(seconds) - start
        yield _Segment(start, start + size, math.ceil(size / step))
        start += size
