"""Training on streams of `datasets`: three uneven shards of real files, resumed in the middle, on two processes."""

import io
import json
import shutil
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from conftest import tiny_teacher
from datasets.distributed import split_dataset_by_node
from processes import run_by_torchrun
from test_batches_by_duration import make_trainer
from test_training_arguments import assert_one_line, differing, weights_of

from skill_hf.data import load_speech_dataset


RATE = 16_000
ROWS = (4, 9, 12)
# Six batches are an epoch, so that a resumed run has read the stream several times.
SETTINGS = {
    "seconds_per_batch": None,
    "per_device_train_batch_size": 4,
    "max_steps": 18,
    "save_steps": 4,
    "save_total_limit": None,
    "shuffle_buffer": 8,
}
QUIET = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}


def write_shards(folder: Path) -> Path:
    """Constants that tell the number of the clip, as FLAC in parquet files."""
    folder.mkdir(parents=True)
    features = datasets.Features({"audio": datasets.Audio(sampling_rate=RATE), "speaker": datasets.Value("int64")})
    lengths = iter(np.random.default_rng(0).integers(8_000, 16_000, sum(ROWS)).tolist())
    number = 0
    for shard, rows in enumerate(ROWS):
        clips = []
        for _ in range(rows):
            number += 1
            content = io.BytesIO()
            samples = np.full(next(lengths), number / 64, np.float32)
            soundfile.write(content, samples, RATE, format="FLAC", subtype="PCM_16")
            clips.append({"bytes": content.getvalue(), "path": f"{number}.flac"})
        table = pa.table({"audio": clips, "speaker": [shard] * rows}).cast(features.arrow_schema)
        pq.write_table(table, folder / f"train-{shard}-of-{len(ROWS)}.parquet", row_group_size=2)
    return folder


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    """`datasets` waits for five seconds each time a shuffled stream is not read to its end."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.0)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("stream") / "shards")


def stream_trainer(output_dir, shards, rows=None, **kwargs):
    """Stage 1 ends at step 12 of 18."""
    stream = load_speech_dataset(shards, streaming=True) if rows is None else rows
    teacher = tiny_teacher(num_hidden_layers=2, **QUIET)
    return make_trainer(output_dir, stream, teacher, {"shared_gate_noise": True}, **SETTINGS | kwargs)


def numbers_in(batch: torch.Tensor) -> list[int]:
    return (64 * batch[:, 0]).round().int().tolist()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"seconds_per_batch": 3.0, "per_device_train_batch_size": None},
        pytest.param({"dataloader_num_workers": 2}, marks=pytest.mark.nightly),
        pytest.param(
            {
                "dataloader_num_workers": 2,
                "dataloader_persistent_workers": True,
                "gradient_accumulation_steps": 2,
                "seconds_per_batch": 3.0,
                "per_device_train_batch_size": None,
            },
            marks=pytest.mark.nightly,
        ),
    ],
    ids=["clips", "seconds", "workers", "seconds, workers and accumulation"],
)
def test_resumed_in_any_round_of_either_stage(shards, tmp_path, settings):
    trainer = stream_trainer(tmp_path / "run", shards, **settings)
    trainer.train()
    expected, batches = weights_of(trainer), trainer.batches
    accumulate = settings.get("gradient_accumulation_steps", 1)
    assert len(batches) == 18 * accumulate
    for stage in (batches[: 12 * accumulate], batches[12 * accumulate :]):
        seen = Counter(number for batch in stage for number in numbers_in(batch))
        times = [seen[number] for number in range(1, 26)]
        assert max(times) - min(times) <= 2
    for step in (8, 12, 16):
        again = stream_trainer(tmp_path / "run", shards, **settings)
        again.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}"))
        assert len(again.batches) == len(batches) - step * accumulate
        assert all(map(torch.equal, again.batches, batches[step * accumulate :]))
        assert differing(expected, weights_of(again)) == []


def test_without_its_position_a_run_reads_the_stream_again(shards, tmp_path, caplog):
    trainer = stream_trainer(tmp_path / "run", shards)
    trainer.train()
    checkpoint = tmp_path / "run" / "checkpoint-8"
    listed = json.loads((checkpoint / "checkpoint_files.json").read_text())
    del listed["files"]["stream_position_0.json"]
    (checkpoint / "checkpoint_files.json").write_text(json.dumps(listed))
    (checkpoint / "stream_position_0.json").unlink()
    again = stream_trainer(tmp_path / "run", shards)
    again.train(resume_from_checkpoint=str(checkpoint))
    assert "has no stream_position_0.json: the stream is read again up to its step" in caplog.text
    assert differing(weights_of(trainer), weights_of(again)) == []


def test_clips_to_calibrate_on_are_not_the_first(shards, tmp_path):
    trainer = stream_trainer(tmp_path, shards, shuffle_buffer=100)
    speakers = [row["speaker"] for row in trainer.calibration_dataset.take(12)]
    assert 2 in speakers and 2 not in [row["speaker"] for row in trainer.train_dataset.take(12)]


def train_on_stream(output, number):
    shards = Path(output).parent / "shards"
    settings = {"dataloader_num_workers": 2, "gradient_accumulation_steps": 2}
    trainer = stream_trainer(output, shards, **settings)
    trainer.train()
    again = stream_trainer(output, shards, **settings)
    again.train(resume_from_checkpoint=str(Path(output) / "checkpoint-8"))
    norms = [row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row]
    return trainer, (trainer.batches, again.batches, weights_of(trainer), weights_of(again), norms)


@pytest.mark.slow
def test_two_processes_with_two_workers_each(tmp_path):
    """Ranks and windows are even to the end, whatever the shards; resumed in the middle, all is the same."""
    write_shards(tmp_path / "shards")
    ranks = run_by_torchrun(train_on_stream, tmp_path / "run", number=2)
    seen = Counter()
    for batches, again, weights, same_weights, _ in ranks:
        assert len(batches) == 36 and len(again) == 36 - 2 * 8
        assert all(map(torch.equal, again, batches[16:]))
        for name, tensor in weights.items():
            torch.testing.assert_close(same_weights[name], tensor, atol=1e-5, rtol=1e-3)
        seen.update(number for batch in batches[:24] for number in numbers_in(batch))
    assert set(seen) == set(range(1, 26))
    assert max(seen.values()) - min(seen.values()) <= 3  # of 192 / 25


# ---- Refused ----


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        while True:
            yield {"input_values": np.zeros(8_000, np.float32)}


def test_streams_that_batches_by_duration_cannot_be_made_of(shards, tmp_path):
    with pytest.raises(ValueError, match="`seconds_per_batch` is 3.0, but a Endless is read in order") as error:
        stream_trainer(tmp_path, shards, Endless(), seconds_per_batch=3.0, per_device_train_batch_size=None).train()
    assert_one_line(error.value)


def test_a_stream_that_is_split_already(shards, tmp_path):
    part = split_dataset_by_node(load_speech_dataset(shards, streaming=True), rank=0, world_size=3)
    with pytest.raises(ValueError, match="`train_dataset` is split by node; pass the whole stream"):
        stream_trainer(tmp_path, shards, part).train()


def test_a_clip_may_not_be_longer_than_a_batch(shards, tmp_path):
    with pytest.raises(ValueError, match="`seconds_per_batch` is 1.0, but clips may be 1.2 s long") as error:
        stream_trainer(tmp_path, shards, seconds_per_batch=1.0, per_device_train_batch_size=None).train()
    assert_one_line(error.value)


@pytest.mark.parametrize("settings", [{"dataloader_num_workers": 2}, {"shuffle_buffer": 5}])
def test_other_readers_are_another_run(shards, tmp_path, settings):
    stream_trainer(tmp_path / "run", shards, max_steps=3, save_steps=1).train()
    shutil.copytree(tmp_path / "run" / "checkpoint-1", tmp_path / "start" / "checkpoint-1")
    with pytest.raises(ValueError, match=r"different run: stream\.(readers|shuffle_buffer) \(checkpoint: [18], now: "):
        stream_trainer(tmp_path / "start", shards, max_steps=3, **settings).train(resume_from_checkpoint=True)


class Short(torch.utils.data.IterableDataset):
    """Fourteen clips: three and a half windows of two batches of two."""

    def __iter__(self):
        rng = np.random.default_rng(0)
        for _ in range(14):
            yield {"input_values": rng.standard_normal(9_000).astype(np.float32)}


def test_the_end_of_a_stream_leaves_no_gradient_behind(shards, tmp_path):
    """Of any other stream, which ends: its last window is left out, not added to the next step's."""
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 12}
    trainer = stream_trainer(tmp_path, shards, Short(), save_strategy="no", **settings)
    trainer.train()
    assert len(trainer.batches) == 24
    first = [batch[0, 0].item() for batch in trainer.batches]
    assert first[:6] == first[6:12]
