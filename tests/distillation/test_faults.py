"""Kills, signals, divergence and full disks in the middle of a run: what they leave, what they say, how it resumes."""

import errno
import json
import os
import re
import resource
import signal
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import soundfile
import torch
from conftest import noise_clips, tiny_teacher
from example_helpers import save_feature_extractor
from processes import run_in_processes
from safetensors.torch import load_file
from test_shrinking import CloseGates
from test_skill_trainer import Kill, KillAt, StopAt, make_trainer, use_float16_on_cpus
from transformers import TrainerCallback

from skill_hf import storage
from skill_hf.cli import distill
from skill_hf.compression import pruning
from skill_hf.distillation import checkpointing
from skill_hf.distillation.divergence import MOST_SKIPPED, NonFiniteError
from skill_hf.distillation.interruption import Terminated
from skill_hf.losses import TRAINING_LOSSES


RECIPE = {"layer_groups": [[0, 1], [2, 3]], "num_clusters": None, "final_steps": 2}
SHORT = {"max_steps": 5, "save_steps": 1, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def clips():
    return noise_clips(12, 16_000)


def make(output_dir, clips, *callbacks, recipe=None, **kwargs):
    return make_trainer(output_dir, clips, None, RECIPE | (recipe or {}), list(callbacks), **SHORT | kwargs)


@pytest.fixture(scope="module")
def reference(tmp_path_factory, clips):
    """The weights of three steps, the cut and two more steps that nothing disturbed."""
    trainer = make(tmp_path_factory.mktemp("whole"), clips)
    trainer.train()
    return trainer.model.state_dict()


def assert_same(trainer, reference):
    actual = trainer.model.state_dict()
    assert actual.keys() == reference.keys()
    assert [name for name in reference if not torch.equal(actual[name], reference[name])] == []


# -------------------------------------------------------------------------------------------------------------- kills
class Killed(BaseException):
    """Nothing is cleaned up after it, as after SIGKILL."""


@pytest.fixture
def no_cleaning(monkeypatch):
    clean = storage.finish_replacements

    def finish(parent):
        if sys.exc_info()[0] is not Killed:
            clean(parent)

    monkeypatch.setattr(storage, "finish_replacements", finish)
    # The lock's file may stay, but the system releases the lock.


# What of the cut is done with the third checkpoint: beside it, out of its place, in its place.
@pytest.mark.parametrize(
    ("instant", "limit"),
    [("manifest", 1), ("first rename", 1), ("second rename", 1), ("removal", 1), ("removal", None)],
)
def test_killed_while_the_cut_is_saved(tmp_path, clips, reference, monkeypatch, no_cleaning, instant, limit):
    trainer = make(tmp_path, clips, save_total_limit=limit)
    with pytest.MonkeyPatch.context() as patch:
        replace, rmtree, manifest = os.replace, storage.shutil.rmtree, checkpointing.write_manifest

        def kill_if(condition, original, *args, **kwargs):
            if trainer.stage == 2 and trainer.state.global_step == 3 and condition:
                raise Killed
            return original(*args, **kwargs)

        patch.setattr(checkpointing, "write_manifest", lambda path: kill_if(instant == "manifest", manifest, path))

        def killed_replace(source, target):
            first = Path(source).name == "checkpoint-3" and storage.WRITING not in str(source)
            return kill_if(
                Path(source).name == "checkpoint-3" and instant == ("first rename" if first else "second rename"),
                replace,
                source,
                target,
            )

        def killed_rmtree(path, *args, **kwargs):
            there = Path(path).name == storage.REPLACED and Path(path).exists()
            return kill_if(there and instant == "removal", rmtree, path, *args, **kwargs)

        patch.setattr(os, "replace", killed_replace)
        patch.setattr(storage.shutil, "rmtree", killed_rmtree)
        with pytest.raises(Killed):
            trainer.train()
    assert checkpointing.has_begun(tmp_path)
    resumed = make(tmp_path, clips, save_total_limit=limit)
    monkeypatch.setattr(resumed, "_begin", lambda: pytest.fail("no checkpoint was found"))
    resumed.train(resume_from_checkpoint="auto")
    assert_same(resumed, reference)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == ({"checkpoint-5"} if limit else {f"checkpoint-{step}" for step in range(1, 6)})


@pytest.mark.parametrize(
    ("step", "name"), [(2, "model"), (2, "optimizer.pt"), (2, "rng_state.pth"), (4, "trainer_state.json")]
)
def test_killed_while_a_checkpoint_is_saved(tmp_path, clips, reference, no_cleaning, monkeypatch, name, step):
    """Each checkpoint file is half written; the step before is resumed."""
    trainer = make(tmp_path, clips, save_total_limit=1)

    def half(path):
        if Path(path).parent.name == f"checkpoint-{step}":
            Path(path).write_bytes(b"half of it")
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        save, to_json = torch.save, type(trainer.state).save_to_json

        def save_half(content, path, *args, **kwargs):
            if Path(path).name == name:
                half(path)
            return save(content, path, *args, **kwargs)

        def json_half(state, path):
            if name == "trainer_state.json":
                half(path)
            return to_json(state, path)

        def model_half(*args, **kwargs):
            if name == "model":
                half(args[1])
            return original(*args, **kwargs)

        original = safetensors.torch.save_file
        patch.setattr(torch, "save", save_half)
        patch.setattr(type(trainer.state), "save_to_json", json_half)
        patch.setattr(safetensors.torch, "save_file", model_half)
        with pytest.raises(Killed):
            trainer.train()
    assert (tmp_path / storage.WRITING).exists()
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {f"checkpoint-{step - 1}"}
    resumed = make(tmp_path, clips, save_total_limit=1)
    resumed.train(resume_from_checkpoint=True)
    assert_same(resumed, reference)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]


# ------------------------------------------------------------------------------------------------------------ signals
class SignalAt(TrainerCallback):
    """What arrives in the middle of a step."""

    def __init__(self, step, *signals, pause=0.0):
        self.step, self.signals, self.pause = step, signals, pause

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            for number in self.signals:
                os.kill(os.getpid(), number)
                time.sleep(self.pause)


@pytest.mark.parametrize(
    ("step", "number", "expected", "save_strategy"),
    [
        (2, signal.SIGINT, KeyboardInterrupt, "steps"),
        (3, signal.SIGTERM, Terminated, "no"),
        (4, signal.SIGTERM, Terminated, "steps"),
        (5, signal.SIGINT, KeyboardInterrupt, "no"),
    ],
)
def test_a_signal_ends_the_step_and_leaves_a_checkpoint(
    tmp_path, clips, reference, caplog, step, number, expected, save_strategy
):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    settings = {"save_strategy": save_strategy, "save_steps": 100}
    trainer = make(tmp_path, clips, SignalAt(step, number), **settings)
    with pytest.raises(expected) as stopped:
        trainer.train()
    assert getattr(stopped.value, "code", None) == (75 if number == signal.SIGTERM else None)
    words = f"Interrupted at step {step}. `train(resume_from_checkpoint=True)` resumes from"
    words += f" `{tmp_path}/checkpoint-{step}`."
    assert words in str(stopped.value) and words in caplog.text
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    with pytest.raises(ValueError, match=f"has already started. `train.resume.*`{tmp_path}/checkpoint-{step}`"):
        trainer.train()
    trainer.train(resume_from_checkpoint=True)  # in the same session
    assert_same(trainer, reference)


def test_another_session_resumes_too(tmp_path, clips, reference):
    with pytest.raises(Terminated):
        make(tmp_path, clips, SignalAt(4, signal.SIGTERM)).train()
    trainer = make(tmp_path, clips)
    trainer.train(resume_from_checkpoint=True)
    assert_same(trainer, reference)


def test_a_second_ctrl_c_does_not_wait(tmp_path, clips, monkeypatch):
    monkeypatch.setattr("skill_hf.distillation.interruption.SECOND_AFTER", 0.0)
    trainer = make(tmp_path, clips, SignalAt(3, signal.SIGINT, signal.SIGINT, pause=0.05))
    with pytest.raises(KeyboardInterrupt, match=f"step 2.*`{tmp_path}/checkpoint-2`"):
        trainer.train()


def test_a_signal_twice_at_once_is_one(tmp_path, clips):
    """A launcher hands on what the terminal has sent to all processes."""
    trainer = make(tmp_path, clips, SignalAt(3, signal.SIGINT, signal.SIGINT, signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt, match=f"`{tmp_path}/checkpoint-3`"):
        trainer.train()


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_a_signal_before_the_first_step(tmp_path, clips, reference, monkeypatch, number, expected):
    trainer = make(tmp_path, clips)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "_setup", lambda: os.kill(os.getpid(), number))
        with pytest.raises(expected, match="nothing to resume from: start again with a new trainer"):
            trainer.train()
    with pytest.raises(ValueError, match="There is no checkpoint to resume from"):
        trainer.train(resume_from_checkpoint=True)
    assert not list(tmp_path.iterdir())
    trainer.train()  # it has not begun
    assert_same(trainer, reference)


def test_a_signal_while_the_cut_is_made(tmp_path, clips, reference):
    original = pruning.prune

    def prune(student):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(student)

    trainer = make(tmp_path, clips, save_strategy="no")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pruning, "prune", prune)
        with pytest.raises(Terminated, match=f"`{tmp_path}/checkpoint-3`"):
            trainer.train()
    assert json.loads((tmp_path / "checkpoint-3" / "skill_state.json").read_text())["stage"] == 2
    trainer = make(tmp_path, clips)
    trainer.train(resume_from_checkpoint=True)
    assert_same(trainer, reference)


def test_workers_that_die_with_the_run(tmp_path, clips):
    """A signal to all processes of a run ends its data workers first."""

    class Die(SignalAt):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            super().on_pre_optimizer_step(args, state, control, **kwargs)
            if state.global_step + 1 == self.step:
                raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Terminated.")

    with pytest.raises(Terminated, match=f"`{tmp_path}/checkpoint-3`"):
        make(tmp_path, clips, Die(4, signal.SIGTERM)).train()
    (tmp_path / "again").mkdir()
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        make(tmp_path / "again", clips, Die(4)).train()


def test_handlers_of_the_user_stay(tmp_path, clips):
    received = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        make(tmp_path, clips, SignalAt(2, signal.SIGTERM), save_strategy="no").train()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received == [signal.SIGTERM]


# --------------------------------------------------------------------------------------------------------- divergence
class PoisonAt(TrainerCallback):
    """Makes a gradient, a loss term or a weight not finite in one step."""

    def __init__(self, step, what, value=float("nan")):
        self.step, self.what, self.value = step, what, value

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 != self.step:
            return
        weight = model.student.encoder.layers[0].final_layer_norm.weight
        if self.what == "gradient":
            handle = weight.register_hook(lambda gradient: (handle.remove(), gradient * self.value)[1])
        elif self.what == "loss":
            with torch.no_grad():
                weight[0] = self.value

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 == self.step and self.what == "weight":
            with torch.no_grad():
                model.student.encoder.layers[0].final_layer_norm.bias[0] = self.value


LONG = {"max_steps": 18, "save_steps": 2, "save_total_limit": 2, "logging_steps": 3}
# What becomes not finite in which step of 18, of which stage 1 has 12; settings; the step named, words.
DIVERGING = {
    "a gradient of NaN": ("gradient", 5, {}, 5, "the gradient norm became NaN or infinite"),
    "an infinite gradient": ("gradient", 5, {"value": float("inf")}, 5, "the gradient norm"),
    "a gradient that is not clipped": ("gradient", 5, {"max_grad_norm": 0.0}, 5, "the gradient norm"),
    "a gradient between two log lines": ("gradient", 5, {"logging_steps": 50}, 5, "the gradient norm"),
    "a loss of NaN": ("loss", 7, {}, 7, "the cosine loss and distillation loss and gradient norm and l1 loss"),
    "a weight": ("weight", 6, {}, 6, "student.encoder.layers.0.final_layer_norm.bias contains NaN or infinite values"),
    "a weight in the last step of stage 1": ("weight", 12, {"save_strategy": "no", "logging_steps": 50}, 12, "bias"),
    "a gradient in stage 2": ("gradient", 15, {}, 15, "the gradient norm"),
    "in the last step": ("gradient", 18, {"save_strategy": "no", "logging_steps": 50}, 18, "the gradient norm"),
    "in a run that shrinks": ("gradient", 5, {"recipe": {"shrink_steps": 2}, "logging_steps": 50}, 5, "gradient norm"),
    "accumulated": ("gradient", 5, {"gradient_accumulation_steps": 2}, 5, "the gradient norm"),
    "unfiltered": ("gradient", 5, {"logging_nan_inf_filter": False}, 5, "the gradient norm"),
}


@pytest.mark.parametrize("case", DIVERGING)
def test_a_run_that_leaves_the_finite_numbers(tmp_path, clips, case):
    what, step, settings, named, words = DIVERGING[case]
    settings = dict(settings)
    poison = PoisonAt(step, what, settings.pop("value", float("nan")))
    callbacks = [CloseGates()] if "recipe" in settings else []
    recipe = {"final_steps": 6} | settings.pop("recipe", {})
    trainer = make(tmp_path, clips, poison, *callbacks, recipe=recipe, **LONG | settings)
    with pytest.raises(NonFiniteError) as diverged:
        trainer.train()
    message = str(diverged.value)
    assert message.startswith(f"Step {named}: ") and words in message and "\n" not in message
    assert trainer.state.global_step <= named + LONG["logging_steps"]
    left = sorted(int(path.name.removeprefix("checkpoint-")) for path in tmp_path.glob("checkpoint-*"))
    good = [left_step for left_step in left if left_step < named]
    assert left == good  # none was saved since
    for path in tmp_path.glob("checkpoint-*/model.safetensors"):
        assert all(torch.isfinite(tensor).all() for tensor in load_file(path).values())
    if good:
        assert f"The last good checkpoint is `{tmp_path}/checkpoint-{good[-1]}`." in message
        assert "save_strategy" in settings or named - good[-1] <= LONG["save_steps"]
    else:
        assert "There is no checkpoint before it." in message


DIVERGED = {
    "learning rate": {"learning_rate": 1e30},
    "rate of the gates": {"recipe": {"gate_learning_rate": 1e30}},
    "rate of stage 2": {"recipe": {"final_learning_rate": 1e30}},
    "optimizer": {"optim": "sgd", "learning_rate": 1e30, "max_grad_norm": 0.0},
}


@pytest.mark.parametrize("case", DIVERGED)
def test_settings_of_1e30(tmp_path, clips, case):
    settings = dict(DIVERGED[case])
    recipe = {"final_steps": 6} | settings.pop("recipe", {})
    trainer = make(tmp_path, clips, recipe=recipe, **LONG | {"warmup_steps": 0} | settings)
    try:
        trainer.train()
    except NonFiniteError as error:
        assert str(error).startswith("Step ") and "\n" not in str(error)
    else:  # far away, but finite
        assert all(torch.isfinite(weight).all() for weight in trainer.model.parameters())


def test_a_student_of_nan_is_not_saved(tmp_path, clips):
    trainer = make(tmp_path, clips, save_strategy="no")
    trainer.train()
    with torch.no_grad():
        trainer.model.encoder.layers[0].final_layer_norm.bias[0] = float("nan")
    for save in (lambda: trainer.save_model(str(tmp_path / "student")), trainer.push_to_hub):
        with pytest.raises(NonFiniteError, match="not saved: its encoder.layers.0.final_layer_norm.bias contains NaN"):
            save()
    assert not list(tmp_path.glob("**/*.safetensors"))


@pytest.mark.parametrize("optim", ["adamw_torch", pytest.param("adamw_torch_fused", marks=pytest.mark.nightly)])
def test_steps_that_the_gradient_scaler_skips_do_not_count(tmp_path, clips, monkeypatch, optim):
    """A fused optimizer skips them itself, of which accelerate knows nothing."""

    class Overflow(TrainerCallback):
        """A forward pass overflows in both stages."""

        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            if state.global_step in (7, 14):
                trainer.finite_watch.note_terms(dict.fromkeys(TRAINING_LOSSES, torch.tensor(float("inf"))))
                trainer.finite_watch.note_gradient(float("inf"))
                next(gradient for p in model.parameters() if (gradient := p.grad) is not None).fill_(float("inf"))
                # It was unscaled when it was clipped.
                trainer.accelerator.scaler._per_optimizer_states.clear()

    use_float16_on_cpus(monkeypatch, init_scale=2.0**20)
    trainer = make(tmp_path, clips, Overflow(), recipe={"final_steps": 6}, optim=optim, **LONG)
    trainer.train()
    assert trainer.stage == 3
    assert 1 < trainer.accelerator.scaler.get_scale() < 2.0**18
    use_float16_on_cpus(monkeypatch, init_scale=2.0**100)
    many = make(tmp_path / "many", clips, recipe={"final_steps": 0}, optim=optim, **LONG | {"max_steps": 40})
    with pytest.raises(NonFiniteError, match=f"the last {MOST_SKIPPED} steps overflowed in float16 and were skipped"):
        many.train()


# --------------------------------------------------------------------------------------------------------- full disks
@contextmanager
def largest_file(size):
    """The system refuses to write more bytes than this into a file, as it does if the disk is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def fill_the_disk(trainer, step, size):
    """The checkpoint of this step finds a full disk."""

    def limited(original):
        def save(*args):
            with largest_file(size) if trainer.state.global_step == step else nullcontext():
                return original(*args)

        return save

    trainer._save_checkpoint, trainer._cut = limited(trainer._save_checkpoint), limited(trainer._cut)
    return trainer


# Up to which size files can be written decides which of them fails.
@pytest.mark.parametrize(("step", "size"), [(2, 0), (2, 20_000), (2, 200_000), (3, 1_000), (5, 10_000), (5, 60_000)])
def test_a_full_disk_says_which_checkpoint_is_safe(tmp_path, clips, reference, step, size):
    with pytest.raises(storage.StorageError) as full:
        fill_the_disk(make(tmp_path, clips, save_total_limit=1), step, size).train()
    assert_it_says_what_is_safe(full.value, tmp_path, step)
    trainer = make(tmp_path, clips)
    trainer.train(resume_from_checkpoint=True)
    assert_same(trainer, reference)


def assert_it_says_what_is_safe(error, tmp_path, step):
    message = str(error)
    assert message.startswith(f"`{tmp_path}/checkpoint-{step}` could not be written: ") and "\n" not in message
    assert f"resume from `{tmp_path}/checkpoint-{step - 1}`" in message
    assert re.search(r"\([\d,.]+ MB free, [\d,.]+ MB needed\)", message)
    assert [path.name for path in tmp_path.iterdir()] == [f"checkpoint-{step - 1}"]  # what was begun is gone


@pytest.mark.parametrize("step", [2, 3, 5])
def test_a_disk_that_is_too_small_is_found_out_before_writing(tmp_path, clips, monkeypatch, step):
    trainer = make(tmp_path, clips, save_total_limit=1)
    free = lambda directory: 10_000 if trainer.state.global_step == step else 10**9  # noqa: E731
    monkeypatch.setattr(storage, "free_bytes", free)
    monkeypatch.setattr(trainer, "save_model", unless(step, trainer, trainer.save_model))
    with pytest.raises(
        storage.StorageError, match=r"No space left on device \(0.0 MB free, 1.[1-9] MB needed\)"
    ) as full:
        trainer.train()
    assert_it_says_what_is_safe(full.value, tmp_path, step)


def unless(step, trainer, original):
    def act(*args, **kwargs):
        assert trainer.state.global_step != step
        return original(*args, **kwargs)

    return act


def test_how_large_a_checkpoint_will_be(tmp_path, clips, monkeypatch):
    trainer, expected = make(tmp_path, clips), []
    measure = checkpointing.checkpoint_bytes
    monkeypatch.setattr(checkpointing, "checkpoint_bytes", lambda trainer: expected.append(measure(trainer)) or 0)
    monkeypatch.setattr(checkpointing, "rotate", lambda newest, *args: written.append(size_of(newest)))
    written = []
    trainer.train()
    assert len(written) == 6  # the third step's twice: before and after the cut
    for bytes_expected, bytes_written in zip(expected, written, strict=True):
        assert bytes_expected - checkpointing.SMALL_FILES <= bytes_written < bytes_expected


def size_of(checkpoint: Path) -> int:
    return sum(path.stat().st_size for path in checkpoint.iterdir())


def test_a_full_disk_at_the_first_checkpoint_at_the_cut_and_in_a_callback(tmp_path, clips):
    for step, settings in ((1, {}), (3, {"save_strategy": "no"})):
        with pytest.raises(storage.StorageError, match="There is no checkpoint yet: free disk space and start again"):
            fill_the_disk(make(tmp_path / "a", clips, **settings), step, 1_000).train()
        assert not list((tmp_path / "a").iterdir())

    class Log(TrainerCallback):
        def on_log(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(storage.StorageError, match=f"has ended: No space.*resumes from `{tmp_path}/b/checkpoint-2`"):
        make(tmp_path / "b", clips, Log()).train()


def test_a_full_disk_leaves_the_student_that_was_there(tmp_path, clips):
    trainer = make(tmp_path, clips)
    trainer.train()
    trainer.save_model()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    with torch.no_grad():
        trainer.model.encoder.layers[0].final_layer_norm.bias += 1
    words = f"The student could not be written.*restores it from `{tmp_path}/checkpoint-5`"
    with pytest.raises(storage.StorageError, match=words), largest_file(20_000):
        trainer.save_model()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_a_directory_that_cannot_be_written_to_is_found_out_first(tmp_path, clips, monkeypatch):
    trainer = make(tmp_path / "out", clips)
    monkeypatch.setattr(trainer, "_setup", lambda: pytest.fail("calibration has begun"))
    (tmp_path / "out").rmdir()
    (tmp_path / "out").write_text("a file")
    with pytest.raises(ValueError, match="`output_dir`.*cannot be written to.*choose another"):
        trainer.train()


def test_two_runs_at_the_same_time(tmp_path, clips, monkeypatch):
    monkeypatch.setattr(storage, "LOCK_SECONDS", 0.1)

    class Second(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            for act in (second.train, lambda: second.train(resume_from_checkpoint=True), finished.save_model):
                with pytest.raises(storage.StorageError, match="Another run is writing to"):
                    act()

    finished = make(tmp_path / "finished", clips, save_strategy="no")
    finished.train()
    finished.args.output_dir = str(tmp_path / "out")
    second = make(tmp_path / "out", clips)
    with pytest.raises(Kill):
        make(tmp_path / "out", clips, Second(), KillAt(2)).train()
    second.train(resume_from_checkpoint=True)
    finished.args.overwrite_output_dir = True
    finished.save_model()


# -------------------------------------------------------------------------------------------------------- the command
@pytest.fixture
def script(tmp_path, clips):
    """Runs `distill` with what a callback or function does to its trainer; returns status and printed errors."""
    tiny_teacher().save_pretrained(tmp_path / "teacher")
    save_feature_extractor(tmp_path / "teacher")
    (tmp_path / "audio").mkdir()
    for index, clip in enumerate(clips):
        soundfile.write(tmp_path / "audio" / f"{index}.wav", 0.1 * clip["input_values"], 16_000)

    def run(capsys, fault=lambda trainer: None, **settings):
        settings = (
            {
                "teacher_name_or_path": tmp_path / "teacher",
                "audio_dir": tmp_path / "audio",
                "output_dir": tmp_path / "out",
                "layer_groups": "[[0, 1], [2, 3]]",
                "final_steps": 2,
                "per_device_train_batch_size": 4,
                "calibration_samples": 4,
                "max_seconds": 0.5,
                "min_seconds": 0.25,
                "report_to": "none",
                "use_cpu": True,
                "gate_learning_rate": 0.1,
                "disable_tqdm": True,
            }
            | SHORT
            | settings
        )
        make_trainer = distill.make_trainer

        def make_faulty(*args):
            trainer = make_trainer(*args)
            if isinstance(fault, TrainerCallback):
                trainer.add_callback(fault)
            else:
                fault(trainer)
            return trainer

        words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(distill, "make_trainer", make_faulty)
            status = distill.main(words)
        err = capsys.readouterr().err
        return status, [line for line in err.splitlines() if line.startswith(("error", "stopped"))], err

    return run


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.nightly
def test_exit_codes_of_the_command(tmp_path, script, capsys):
    """Only a student that was trained to the end is saved, and only that is a success."""
    out = tmp_path / "out"
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 75)):
        step = 2 if number == signal.SIGINT else 4
        status, lines, _ = script(capsys, SignalAt(step, number), resume_from_checkpoint="auto")
        assert status == code
        assert len(lines) == 1 and lines[0].startswith(f"stopped: Interrupted at step {step}. ")
        assert f"{out}/checkpoint-{step}`" in lines[0]
        assert not (out / "model.safetensors").exists() and not (out / "README.md").exists()
    status, lines, _ = script(capsys)  # started again instead of resumed
    assert status == 2 and "contains an earlier run" in lines[0]
    for fault, words in (
        (PoisonAt(2, "gradient"), "Step 2: the gradient norm became NaN or infinite"),
        (lambda trainer: fill_the_disk(trainer, 2, 1_000), "could not be written"),
        (StopAt(2), "ended at step 2 of 5; no student was saved"),
        (StopAt(4), "ended at step 4 of 5; no student was saved"),
    ):
        status, lines, err = script(capsys, fault, overwrite_output_dir=True)
        assert status == 2
        (line,) = lines
        assert line.startswith("error: ") and words in line and "Traceback" not in err
        assert not (out / "model.safetensors").exists()
    for name in ("save_state", "save_metrics", "create_model_card"):
        fault = lambda trainer: setattr(trainer, name, no_space)  # noqa: B023, E731
        status, lines, _ = script(capsys, fault, overwrite_output_dir=True)
        assert status == 2 and re.search(r"report could not.*No space left.*MB free\). The student.* saved", lines[0])
    status, lines, _ = script(capsys, overwrite_output_dir=True)
    assert (status, lines) == (0, [])
    assert (out / "model.safetensors").is_file()
    status, lines, _ = script(capsys)
    assert status == 2 and "contains an earlier run" in lines[0]
    status, lines, _ = script(capsys, output_dir=tmp_path / "teacher", overwrite_output_dir=True)
    assert status == 2 and "is the `teacher`" in lines[0]
    assert not (tmp_path / "teacher" / "skill_config.json").exists()


# -------------------------------------------------------------------------------------------------- several processes
def interrupted_on_one_process(output, number):
    """Only the second process gets SIGTERM; all of them stop at the same step. Returns the step."""
    rng = np.random.default_rng(0)
    clips = [{"input_values": rng.standard_normal(8_000).astype(np.float32)} for _ in range(8)]
    trainer = make(output, clips, save_steps=100)
    callback = SignalAt(2, *([signal.SIGTERM] if trainer.accelerator.process_index == 1 else []))
    trainer.add_callback(callback)
    with pytest.raises(Terminated):
        trainer.train()
    return trainer, trainer.state.global_step


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all(tmp_path):
    assert run_in_processes(interrupted_on_one_process, tmp_path / "2", number=2) == [2, 2]
    files = {path.name for path in (tmp_path / "2" / "checkpoint-2").iterdir()}
    assert files >= {"rng_state_0.pth", "rng_state_1.pth", checkpointing.MANIFEST_NAME}
