"""Training on batches of `seconds_per_batch`: which clips, in which order, whatever interrupts it."""

import dataclasses
import shutil

import datasets
import numpy as np
import pytest
import torch
from conftest import noise_clips, tiny_teacher
from processes import run_in_processes
from test_training_arguments import assert_one_line, differing, weights_of
from transformers import Wav2Vec2FeatureExtractor

from skill_hf import SkillConfig, SkillDistillationTrainer, SkillTrainingArguments
from skill_hf.data import SpeechCollator


RATE = 16_000
CLIPS = noise_clips(20, 20_000)  # of 0.5 to 1.25 s
SETTINGS = {
    "max_steps": 12,
    "seconds_per_batch": 3.0,
    "logging_steps": 1,
    "save_steps": 1,
    "save_total_limit": None,
    "learning_rate": 1e-3,
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
}


class Recording(SkillDistillationTrainer):
    """Notes the lengths of the clips of each batch, in samples after cropping."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        if model.training:
            self.batches = [*getattr(self, "batches", []), inputs["input_values"].clone()]
        return super().compute_loss(model, inputs, *args, **kwargs)


def make_trainer(output_dir, rows=CLIPS, teacher=None, recipe=None, **kwargs):
    """Stage 1 ends at step 8 of 12; an epoch has about seven batches."""
    recipe = {"layer_groups": [[0, 1], [2]], "gate_learning_rate": 0.1} | (recipe or {})
    return Recording(
        teacher=tiny_teacher(num_hidden_layers=2) if teacher is None else teacher,
        skill_config=SkillConfig(**recipe | {"calibration_samples": 2, "calibration_seconds": 0.5}),
        args=SkillTrainingArguments(output_dir=str(output_dir), **SETTINGS | kwargs),
        train_dataset=rows,
        data_collator=SpeechCollator(Wav2Vec2FeatureExtractor(do_normalize=False), min_seconds=0.5, max_seconds=1.2),
    )


@pytest.mark.parametrize(
    "settings",
    [
        {},
        pytest.param({"dataloader_num_workers": 2, "dataloader_persistent_workers": True}, marks=pytest.mark.nightly),
        pytest.param({"dataloader_num_workers": 2, "gradient_accumulation_steps": 2}, marks=pytest.mark.slow),
    ],
    ids=["one process", "persistent workers", "workers and accumulation"],
)
def test_resumed_in_any_epoch_of_either_stage(tmp_path, settings):
    trainer = make_trainer(tmp_path / "run", **settings)
    trainer.train()
    expected, batches = weights_of(trainer), trainer.batches
    accumulate = settings.get("gradient_accumulation_steps", 1)
    assert len(batches) == 12 * accumulate
    steps = (2, 6, 11) if accumulate == 1 else (5, 10)
    for step in steps:
        again = make_trainer(tmp_path / "run", **settings)
        again.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}"))
        assert all(map(torch.equal, again.batches, batches[step * accumulate :]))
        assert len(again.batches) == len(batches) - step * accumulate
        assert differing(expected, weights_of(again)) == []


def test_clips_of_each_epoch(tmp_path):
    """Each clip is a constant that tells its number; an epoch has all, in batches of at most 3 s, in another order."""
    lengths = np.random.default_rng(0).integers(8_000, 19_000, 30)
    rows = [{"input_values": np.full(length, number, np.float32)} for number, length in enumerate(lengths)]
    trainer = make_trainer(tmp_path, rows, save_strategy="no", gradient_accumulation_steps=2, max_steps=24)
    trainer.train()
    epoch = len(trainer.get_train_dataloader())
    assert epoch == 14 and len(trainer.batches) == 48
    orders = []
    for start in (0, epoch):  # of stage 1, which has 32 batches
        numbers = [batch[:, 0].int().tolist() for batch in trainer.batches[start : start + epoch]]
        assert sorted(sum(numbers, [])) == list(range(30))
        orders.append(numbers)
    assert orders[0] != orders[1]
    for batch in trainer.batches:
        longest = lengths[batch[:, 0].int()].max()
        assert len(batch) * longest <= 3 * RATE and batch.shape[1] > 0.6 * longest  # some of all clips have 0.42


def test_clips_that_cannot_be_read_are_skipped(tmp_path):
    rows = [*CLIPS[:8], {"audio": "missing.wav"}, {"audio": np.full(12_000, np.nan, np.float32)}]
    trainer = make_trainer(tmp_path, rows, save_strategy="no", max_steps=6)
    trainer.train()
    assert trainer.data_collator.num_skipped >= 2
    assert all(torch.isfinite(parameter).all() for parameter in trainer.model.parameters())


def train_thirty_clips(output, number):
    trainer = make_trainer(
        output,
        noise_clips(30, 20_000),
        tiny_teacher(num_hidden_layers=2, hidden_dropout=0.0, attention_dropout=0.0, activation_dropout=0.0),
        {"shared_gate_noise": True},
        save_strategy="no",
        optim="sgd",
        learning_rate=0.1,
        seconds_per_step=6.0,
        max_steps=20,
    )
    assert trainer.args.gradient_accumulation_steps == 2 // number
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    losses, seconds = ([row[name] for row in rows] for name in ("loss", "audio_seconds_per_step"))
    return trainer, (trainer.batches, losses, seconds, weights_of(trainer))


@pytest.mark.slow
def test_two_processes_see_the_batches_of_one(tmp_path):
    ranks = run_in_processes(train_thirty_clips, tmp_path / "2", number=2)
    _, (batches, losses, seconds, weights) = train_thirty_clips(tmp_path / "1", number=1)
    dealt = [batch for together in zip(*(rank[0] for rank in ranks), strict=True) for batch in together]
    assert len(dealt) == 40 and all(map(torch.equal, dealt, batches))
    for _, same_losses, same_seconds, same_weights in ranks:
        assert same_seconds == pytest.approx(seconds)
        assert same_losses == pytest.approx(losses, abs=1e-4) and len(losses) == 20
        for name, tensor in weights.items():
            torch.testing.assert_close(same_weights[name], tensor, atol=1e-5, rtol=1e-3)


# ---- Settings ----


def arguments(**kwargs):
    return SkillTrainingArguments(output_dir="x", use_cpu=True, report_to="none", **kwargs)


def test_settings_of_a_batch():
    assert arguments().per_device_train_batch_size == 10
    args = arguments(seconds_per_batch=160, seconds_per_step=640)
    assert args.gradient_accumulation_steps == 4
    assert dataclasses.replace(args, seed=3).gradient_accumulation_steps == 4


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"per_device_train_batch_size": 10}, "`per_device_train_batch_size` is 10, but `seconds_per_batch` is set"),
        ({"seconds_per_step": 100}, "`seconds_per_step` is 100, but it must be a multiple of 160"),
        ({"seconds_per_step": 400}, "`seconds_per_step` is 400, but it must be a multiple of 160"),
        (
            {"seconds_per_step": 640, "gradient_accumulation_steps": 3},
            "`gradient_accumulation_steps` is 3, but `seconds_per_step` makes it 4",
        ),
        ({"train_sampling_strategy": "group_by_length"}, "`train_sampling_strategy` is 'group_by_length', but"),
        ({"dataloader_drop_last": True}, "`dataloader_drop_last` is True, but"),
    ],
)
def test_settings_that_contradict_it(kwargs, message):
    with pytest.raises(ValueError, match=message) as error:
        arguments(seconds_per_batch=160, **kwargs)
    assert_one_line(error.value)


def test_a_clip_longer_than_a_batch_is_found_before_calibration(tmp_path, monkeypatch):
    monkeypatch.setattr(SkillDistillationTrainer, "_setup", lambda self: pytest.fail("calibration has begun"))
    with pytest.raises(ValueError, match="`seconds_per_batch` is 1.1, but clips are up to 1.2 s long") as error:
        make_trainer(tmp_path, seconds_per_batch=1.1).train()
    assert_one_line(error.value)


def test_another_duration_is_another_run(tmp_path):
    make_trainer(tmp_path / "run", max_steps=3).train()
    shutil.copytree(tmp_path / "run" / "checkpoint-1", tmp_path / "start" / "checkpoint-1")
    with pytest.raises(ValueError, match=r"different run: seconds_per_batch \(checkpoint: 3.0, now: 4.0\)"):
        make_trainer(tmp_path / "start", max_steps=3, seconds_per_batch=4.0).train(resume_from_checkpoint=True)


def test_rows_of_datasets(tmp_path):
    rows = datasets.Dataset.from_list([{"input_values": row["input_values"].tolist(), "speaker": 1} for row in CLIPS])
    trainer = make_trainer(tmp_path, rows, save_strategy="no", max_steps=3)
    trainer.train()
    assert trainer.stage == 3 and len(trainer.batches) == 3
    assert all("train_samples_per_second" not in row for row in trainer.state.log_history)
    assert (trainer.report().seconds_per_step, trainer.report().clips_per_step) == (3.0, None)
