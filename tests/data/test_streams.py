"""Shards dealt to readers: who reads what, how often, and from where after a stop."""

import functools
from collections import Counter

import datasets
import numpy as np
import pytest
from torch.utils.data import BatchSampler, DataLoader

from skill_hf.data import AudioError
from skill_hf.data.durations import row_seconds
from skill_hf.data.streams import StreamBatches, batches_of_clips, batches_of_seconds


UNEVEN = (20, 40, 60)


READ = []


def rows_of_shards(shards):
    for shard, rows in shards:
        for row in range(rows):
            READ.append((shard, row))
            yield {"row": f"{shard}/{row}", "input_values": [0.0] * (1_000 + 100 * row)}


def stream_of(sizes):
    return datasets.IterableDataset.from_generator(rows_of_shards, gen_kwargs={"shards": list(enumerate(sizes))})


def batches_of(stream, number=10_000, clips=4, **kwargs):
    make_batches = functools.partial(batches_of_clips, clips=clips)
    return StreamBatches(stream, make_batches, number, **{"block_rows": 16, "seed": (5,)} | kwargs)


def names(batch):
    return [row["row"] for row in batch[1]]


def only(items):
    return items[0]


def read_by(stream, rank, num_batches, num_ranks, num_workers, **kwargs):
    """Names of the rows of each batch, as a loader with worker processes gives them."""
    batches = batches_of(stream, num_batches, rank=rank, num_ranks=num_ranks, num_workers=num_workers, **kwargs)
    numbers = BatchSampler(range(num_batches), batch_size=1, drop_last=False)
    loader = DataLoader(batches, batch_sampler=numbers, collate_fn=only, num_workers=num_workers)
    return [names(batch) for batch in loader]


def rounds_of(batches, num_batches):
    """For each reader of `batches`, a list of (round, row), until it has given `num_batches`."""
    return [
        [(position[0], row["row"]) for position, row in rows]
        for rows in (
            [next(iterator) for _ in range(4 * num_batches)]
            for iterator in (batches._rows(reader, 0, 0, 0) for reader in range(batches.num_readers))
        )
    ]


def test_three_uneven_shards_on_two_ranks_with_two_workers_each():
    """Five rounds of 120 rows: 150 batches of 4, of which each rank takes 75, the same as without worker processes."""
    seen = Counter()
    for rank in range(2):
        rows = read_by(stream_of(UNEVEN), rank, 75, 2, 2)
        assert len(rows) == 75 and all(len(batch) == 4 for batch in rows)
        alone = batches_of(stream_of(UNEVEN), rank=rank, num_ranks=2, num_workers=2)
        assert rows == [names(alone[number]) for number in range(75)]
        seen.update(row for batch in rows for row in batch)
    assert len(seen) == 120
    assert max(seen.values()) - min(seen.values()) <= 3


@pytest.mark.parametrize(
    ("sizes", "readers"),
    [(UNEVEN, 4), (UNEVEN, 2), (UNEVEN, 3), (UNEVEN, 1), ((50,), 4), ((7, 0, 9), 2), ((5,) * 9, 8), ((1, 2), 5)],
)
def test_every_row_is_there_once_a_round(sizes, readers):
    batches = batches_of(stream_of(sizes), num_ranks=readers)
    rows = sum(sizes)
    lists = rounds_of(batches, num_batches=rows * readers)
    whole = min(pairs[-1][0] for pairs in lists)  # rounds that all readers have left behind
    assert whole >= 3
    for round_ in range(whole):
        counts = Counter(name for pairs in lists for number, name in pairs if number == round_)
        assert len(counts) == rows and set(counts.values()) == {1}
    # No reader is ahead for good: each has every row once in as many rounds as there are readers.
    for pairs in lists:
        if whole > readers:
            counts = Counter(name for number, name in pairs if number < readers)
            assert (len(counts) == rows or len(sizes) < readers) and set(counts.values()) == {1}


def test_rows_are_shuffled_in_blocks_and_anew_each_round():
    batches = batches_of(stream_of((200,)), block_rows=40)
    order = [int(name.split("/")[1]) for number in range(100) for name in names(batches[number])]
    first, second = order[:200], order[200:]
    assert sorted(first) == sorted(second) == list(range(200)) and first != second
    assert first[:40] != sorted(first[:40]) and sorted(first[:40]) == list(range(40))


@pytest.mark.parametrize("num_workers", [1, 2])
def test_resumed_at_any_batch_without_reading_what_came_before(num_workers):
    settings = {"rank": 1, "num_ranks": 2, "num_workers": num_workers}
    whole = batches_of(stream_of(UNEVEN), **settings)
    expected = [whole[number] for number in range(60)]
    for start in (1, 2, 7, 23, 48):
        again, slow = (batches_of(stream_of(UNEVEN), **settings) for _ in range(2))
        again.bookmarks = {bookmark.number % num_workers: bookmark for bookmark, _ in expected[:start]}
        READ.clear()
        assert again[start] == expected[start]
        rows_read = len(READ)
        assert [again[number] for number in range(start + 1, 60)] == expected[start + 1 :]
        READ.clear()
        assert slow[start] == expected[start]  # without a bookmark, from the beginning
        # At most the shards that a block of 16 rows reaches into.
        assert rows_read <= min(len(READ), 120)
    assert len(READ) > 180 / num_workers


def test_a_bookmark_further_on_is_not_used():
    batches = batches_of(stream_of(UNEVEN))
    expected = [batches[number] for number in range(12)]
    again = batches_of(stream_of(UNEVEN))
    again.bookmarks = {0: expected[11][0]}
    assert again[0] == expected[0] and again[1] == expected[1]
    assert again[0] == expected[0]  # back


def test_batches_of_seconds():
    seconds = 3 * 7_000 / 16_000

    def measure(rows):
        return np.array([row_seconds(row, 16_000) for row in rows])

    make_batches = functools.partial(batches_of_seconds, seconds_per_batch=seconds, measure=measure)
    batches = StreamBatches(stream_of(UNEVEN), make_batches, 10_000, block_rows=60)
    seen, kept, number = Counter(), 0.0, 0
    while sum(seen.values()) < 120:
        lengths = [len(row["input_values"]) / 16_000 for row in batches[number][1]]
        assert len(lengths) * max(lengths) <= seconds
        kept += len(lengths) * min(lengths)
        seen.update(names(batches[number]))
        number += 1
    assert set(seen.values()) == {1} and len(seen) == 120
    everything = sum(1_000 + 100 * row for rows in UNEVEN for row in range(rows)) / 16_000
    assert kept > 0.8 * everything  # shuffled, batches of 7 keep 0.5


def test_a_stream_without_rows():
    with pytest.raises(AudioError, match="has no rows"):
        batches_of(stream_of((0, 0)))[0]
