"""The order of batches by duration: a pure function, the same whatever the number of processes."""

import time

import numpy as np
import pytest
from accelerate import skip_first_batches
from torch.utils.data import DataLoader, Dataset

from skill_hf.data.duration_batches import DurationBatchSampler


def read_speech(clips, seed=0):
    """Lengths as in LibriSpeech, cropped to 15.6 s: most between 11 and 16 s."""
    rng = np.random.default_rng(seed)
    return np.where(rng.random(clips) < 0.7, rng.uniform(11, 16.5, clips), rng.uniform(2, 11, clips)).clip(2, 15.6)


def sampler_of(lengths, seconds=160.0, **kwargs):
    return DurationBatchSampler(lengths, seconds, **kwargs)


@pytest.mark.parametrize("clips", [1, 7, 40, 1_519, 20_000])
@pytest.mark.parametrize("batches_per_step", [1, 4, 6])
def test_every_clip_is_there_once_an_epoch_and_no_batch_is_too_long(clips, batches_per_step):
    lengths = read_speech(clips)
    sampler = sampler_of(lengths, batches_per_step=batches_per_step)
    epochs = []
    for sampler.epoch in range(3):
        batches = list(sampler)
        epochs.append(batches)
        assert len(batches) == len(sampler) == sampler.num_steps * batches_per_step
        assert all(len(batch) * lengths[batch].max() <= 160 for batch in batches)
        places = np.concatenate(batches)
        # Only a set with less than a clip for each batch repeats some.
        assert len(places) == max(clips, batches_per_step) and set(places) == set(range(clips))
    if clips > 100:
        assert len({frozenset(map(frozenset, batches)) for batches in epochs}) == 3


def test_little_audio_is_lost():
    """Cropped to the shortest of each batch; at random, as many clips keep less than half."""
    lengths = read_speech(20_000)
    for batches_per_step, least in ((1, 0.98), (4, 0.99)):
        batches = list(sampler_of(lengths, batches_per_step=batches_per_step))
        kept = [len(batch) * lengths[batch].min() for batch in batches]
        assert sum(kept) > least * lengths.sum()
        assert np.mean(kept) > 0.92 * 160
    shuffled = np.random.default_rng(0).permutation(lengths)[:20_000].reshape(-1, 10)
    assert 10 * shuffled.min(1).sum() < 0.5 * lengths.sum()


def test_a_step_is_the_same_on_any_number_of_processes():
    lengths = read_speech(1_519)
    whole = sampler_of(lengths, batches_per_step=4, seed=3)
    whole.epoch = 5
    batches = list(whole)
    for num_ranks in (2, 4):
        ranks = []
        for rank in range(num_ranks):
            sampler = sampler_of(lengths, batches_per_step=4, rank=rank, num_ranks=num_ranks, seed=3)
            sampler.epoch = 5
            ranks.append(list(sampler))
            assert len(ranks[-1]) == len(sampler) == len(batches) // num_ranks
        assert [batch for together in zip(*ranks, strict=True) for batch in together] == batches


def test_the_processes_of_a_step_have_clips_of_similar_length():
    lengths = read_speech(20_000)
    sampler = sampler_of(lengths, batches_per_step=8)
    batches = list(sampler)
    ratios = []
    for step in range(sampler.num_steps):
        clips = np.concatenate(batches[8 * step : 8 * step + 8])
        ratios.append(lengths[clips].max() / lengths[clips].min())
    # Steps of the few shortest clips have more different ones.
    assert np.median(ratios) < 1.02 and np.quantile(ratios, 0.9) < 1.1


def test_the_order_depends_on_seed_and_epoch_alone():
    lengths = read_speech(300)
    first, again, other = (sampler_of(lengths, seed=seed) for seed in (1, 1, 2))
    assert list(first) == list(first) == list(again) != list(other)
    again.epoch = 1
    assert list(again) != list(first)


@pytest.mark.parametrize(
    ("lengths", "kwargs", "message"),
    [
        ([], {}, "at least one length"),
        ([1.0, 0.0], {}, "above 0"),
        ([1.0, np.nan], {}, "above 0"),
        ([1.0], {"batches_per_step": 3, "num_ranks": 2}, "is 3, but must be a multiple of `num_ranks` \\(2\\)"),
    ],
)
def test_what_cannot_be_dealt(lengths, kwargs, message):
    with pytest.raises(ValueError, match=message):
        sampler_of(lengths, **kwargs)


class Recorder(Dataset):
    """A million rows, which notes those that are read."""

    def __init__(self):
        self.read = []

    def __getitem__(self, index):
        self.read.append(index)
        return index


def test_a_million_rows_resume_at_step_50_000_at_once():
    """As transformers resumes: it skips batches of the sampler, not of the data."""
    lengths, rows = read_speech(1_000_000), Recorder()
    start = time.perf_counter()
    sampler = sampler_of(lengths)
    sampler.epoch = 2
    loader = DataLoader(rows, batch_sampler=sampler, collate_fn=list)
    batch = next(iter(skip_first_batches(loader, 50_000)))
    assert time.perf_counter() - start < 30  # two seconds on a free processor
    assert rows.read == batch and 10 <= len(batch) <= 80
    assert batch == list(sampler)[50_000]
