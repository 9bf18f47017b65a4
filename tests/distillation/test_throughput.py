"""What logs say about the audio of a step, its speed, and the wait for it, by a clock that the test moves."""

from types import SimpleNamespace

import pytest
import torch
from test_batches_by_duration import CLIPS, RATE, make_trainer

from skill_hf.distillation import throughput


class Clock:
    now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Slow(torch.utils.data.Dataset):
    """Clips of a disk that takes three seconds for each."""

    def __init__(self, clock):
        self.clock = clock

    def __len__(self):
        return len(CLIPS)

    def __getitem__(self, index):
        self.clock.now += 3.0
        return CLIPS[index]


def test_audio_and_speed(tmp_path, monkeypatch, capsys):
    """A step has two batches, 3 s on this disk for each clip, and two forward passes of 4 s each."""
    clock = Clock()
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=clock.perf_counter))
    trainer = make_trainer(
        tmp_path,
        Slow(clock),
        save_strategy="no",
        max_steps=6,
        logging_steps=2,
        gradient_accumulation_steps=2,
        disable_tqdm=False,
    )
    compute_loss = trainer.compute_loss

    def slow_loss(model, *args, **kwargs):
        clock.now += 4.0
        return compute_loss(model, *args, **kwargs)

    trainer.compute_loss = slow_loss
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["step"] for row in rows] == [2, 4, 6]
    for index, row in enumerate(rows):
        batches = trainer.batches[4 * index : 4 * index + 4]
        seconds = sum(batch.numel() for batch in batches) / RATE
        waited = 3.0 * sum(map(len, batches))
        assert row["audio_seconds_per_step"] == pytest.approx(seconds / 2)
        assert row["data_wait_share"] == pytest.approx(waited / (waited + 16))
        assert 0.1 < row["memory_gib"] < 30
        assert row["audio_hours_per_hour"] == pytest.approx(seconds / (waited + 16))
    shown = f"0 h of audio an hour, {rows[-1]['data_wait_share']:.0%} waiting for it"
    assert shown in capsys.readouterr().err


def test_padding_is_no_audio_and_nothing_is_said_without_a_step():
    accelerator = SimpleNamespace(num_processes=1)
    trainer = SimpleNamespace(accelerator=accelerator, processing_class=SimpleNamespace(sampling_rate=RATE))
    trainer.args = SimpleNamespace(device=torch.device("cpu"))
    measured = throughput.Throughput(trainer)
    assert measured.means() == {}
    list(measured.timed(iter([1, 2])))
    measured.note(torch.tensor([RATE, 0, 2 * RATE]))
    measured.on_step_end(None, None, None)
    assert measured.means()["audio_seconds_per_step"] == 3.0
    assert measured.means() == {}
