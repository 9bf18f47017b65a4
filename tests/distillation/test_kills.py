"""Runs in processes of their own that are killed with SIGKILL, lose one another, or fill a real disk."""

import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import noise_clips, tiny_teacher
from processes import TORCHRUN, WITHOUT_GPU, read_results, run_in_processes, write_program
from test_skill_trainer import Kill, KillAt, make_trainer
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from transformers import TrainerCallback

from skill_hf import storage
from skill_hf.distillation import checkpointing
from skill_hf.distillation.checkpoint_validation import MANIFEST_NAME
from skill_hf.distillation.interruption import Terminated


# A run of 20 steps, the cut, and 20 more, with a checkpoint of each step and dropout.
RUN = {"max_steps": 40, "save_steps": 1, "save_total_limit": 2}
RECIPE = {"num_clusters": 2, "final_steps": 20}


# A run of 3 steps, the cut, and 3 more.
SHORT_RUN = {"max_steps": 6, "save_steps": 1, "save_total_limit": 2}
SHORT_RECIPE = {"layer_groups": [[0, 1], [2, 3]], "num_clusters": None, "final_steps": 3}


def make(output_dir):
    return make_trainer(output_dir, noise_clips(12, 12_000), recipe=RECIPE, **RUN)


def make_short(output_dir, *callbacks, **kwargs):
    settings = {"recipe": SHORT_RECIPE, "callbacks": list(callbacks), **SHORT_RUN}
    return make_trainer(output_dir, noise_clips(16, 12_000), **settings | kwargs)


def same(actual, expected) -> bool:
    return actual.keys() == expected.keys() and all(torch.equal(actual[name], expected[name]) for name in expected)


# -------------------------------------------------------------------------------------------------------- one process
# What a run is doing when it is killed.
PHASES = {
    "calibration": lambda trainer: (trainer, "_setup"),
    "step": lambda trainer: (trainer, "training_step"),
    "save": lambda trainer: (trainer, "_save_checkpoint"),
    "rotation": lambda trainer: (checkpointing, "rotate"),
    "cut": lambda trainer: (trainer, "_cut"),
}


def live(output_dir: str, phase: str | None, pipe: int) -> None:
    """Trains to the end; says when it enters `phase`, or its second step if `phase` is behind it."""
    trainer = make(output_dir)
    seconds = {}

    def watch(name):
        owner, attribute = PHASES[name](trainer)
        original = getattr(owner, attribute)

        def watched(*args, **kwargs):
            entered.append(name)
            is_behind = entered.count("step") == 2 and (phase != "cut" or trainer.stage == 2)
            if phase and (is_behind or name == phase != "step"):
                os.write(pipe, b".")
            start = time.perf_counter()
            result = original(*args, **kwargs)
            seconds[name] = max(seconds.get(name, 0.0), time.perf_counter() - start)
            return result

        setattr(owner, attribute, watched)

    entered = []
    for name in PHASES:
        watch(name)
    trainer.train(resume_from_checkpoint="auto")
    torch.save(trainer.model.state_dict(), Path(output_dir) / "weights.pt")
    (Path(output_dir) / "seconds.json").write_text(json.dumps(seconds))


def die(output_dir: str, phase: str | None, after: float = 0.0) -> dict:
    """Gives birth to a run, and kills it so many seconds after it has entered `phase`."""
    reading, writing = os.pipe()
    child = os.fork()  # nothing is imported again
    if not child:
        os.close(reading)
        status = 1
        try:
            live(output_dir, phase, writing)
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    if os.read(reading, 1):  # nothing comes from a run that has ended
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    os.close(reading)
    status = os.waitpid(child, 0)[1]
    left = sorted(path.name for path in Path(output_dir).iterdir())
    return {"phase": phase, "code": os.waitstatus_to_exitcode(status), "left": left}


def kill_again_and_again(folder: str, phases: list[str], seed: int) -> None:
    """One run that nothing disturbs, and one that is killed in each of `phases`, at random moments."""
    Path(folder, "whole").mkdir()
    Path(folder, "killed").mkdir()
    assert die(f"{folder}/whole", None)["code"] == 0
    seconds = json.loads(Path(folder, "whole", "seconds.json").read_text())
    rng = np.random.default_rng(seed)
    lives = [die(f"{folder}/killed", phase, rng.uniform(0, seconds[phase])) for phase in phases]
    lives.append(die(f"{folder}/killed", None))
    Path(folder, "lives.json").write_text(json.dumps(lives, indent=1))


KILLS = """
import sys
sys.path[:0] = {paths!r}
from test_kills import kill_again_and_again
kill_again_and_again({folder!r}, {phases!r}, seed={seed})
"""
BY_DAY = ["calibration", "step", "save", "cut", "rotation"]
BY_NIGHT = ["calibration"] * 3 + ["step", "save", "rotation"] * 2 + ["cut"] * 5 + ["step", "save", "rotation"] * 2


@pytest.mark.parametrize(
    "phases",
    [
        pytest.param(BY_DAY, marks=pytest.mark.slow, id="5 times"),
        pytest.param(BY_NIGHT, marks=pytest.mark.nightly, id="20 times"),
    ],
)
def test_killed_again_and_again_is_bitwise_the_same(tmp_path, phases):
    code = KILLS.format(paths=sys.path, folder=str(tmp_path), phases=phases, seed=len(phases))
    subprocess.run([sys.executable, "-c", code], check=True, timeout=900)
    lives = json.loads((tmp_path / "lives.json").read_text())
    assert [life["code"] for life in lives] == [-signal.SIGKILL] * len(phases) + [0], lives
    # The last life had to begin with what those before had left.
    assert any(name.startswith("checkpoint-") for name in lives[-2]["left"])
    assert same(torch.load(tmp_path / "killed" / "weights.pt"), torch.load(tmp_path / "whole" / "weights.pt"))
    names = {path.name for path in (tmp_path / "killed").iterdir()}
    assert names == {"checkpoint-39", "checkpoint-40", "weights.pt", "seconds.json"}


# -------------------------------------------------------------------------------------------------- several processes
class KillProcess(TrainerCallback):
    """Kills processes in the middle of a step, and notes the time."""

    def __init__(self, step: int, processes: tuple[int, ...]):
        self.step, self.processes = step, processes

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step and args.process_index in self.processes:
            (Path(args.output_dir).parent / "died_at").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)


def undisturbed(output, number):
    trainer = make_short(Path(output).parent / "whole")
    trainer.train()
    return trainer, trainer.model.state_dict()


def one_dies(output, number):
    make_short(Path(output).parent / "killed", KillProcess(3, processes=(1,))).train()


def one_is_full(output, number):
    """The system lets the first process write no more into a file, as if its disk was full."""

    class Fill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3 and args.process_index == 0:
                (Path(args.output_dir).parent / "died_at").write_text(str(time.time()))
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))

    make_short(Path(output).parent / "killed", Fill()).train()


def all_die(output, number):
    make_short(Path(output).parent / "killed", KillProcess(5, processes=(0, 1))).train()


def resumed(output, number):
    trainer = make_short(Path(output).parent / "killed")
    trainer.train(resume_from_checkpoint="auto")
    return trainer, trainer.model.state_dict()


@pytest.fixture(scope="module")
def weights_of_two_processes(tmp_path_factory):
    return run_in_processes(undisturbed, tmp_path_factory.mktemp("two") / "run", number=2)[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dying", "step"),
    [
        (one_dies, 3),
        pytest.param(one_is_full, 3, marks=pytest.mark.nightly),
        pytest.param(all_die, 5, marks=pytest.mark.nightly),
    ],
)
def test_a_process_that_dies_ends_the_others(tmp_path, weights_of_two_processes, dying, step, capfd):
    with pytest.raises(ChildFailedError):
        run_in_processes(dying, tmp_path / "first", number=2)
    assert time.time() - float((tmp_path / "died_at").read_text()) < 60
    newest = tmp_path / "killed" / f"checkpoint-{step - 1}"
    assert checkpointing.last_checkpoint_to(tmp_path / "killed", 99) == str(newest)
    (newest / "rng_state_1.pth").unlink()
    weights, others = run_in_processes(resumed, tmp_path / "second", number=2)
    errors = capfd.readouterr().err
    assert f"`{newest}` is not a complete checkpoint of SkillDistillationTrainer: it has no rng_state_1.pth." in errors
    assert same(weights, others)
    torch.testing.assert_close(weights, weights_of_two_processes, atol=1e-5, rtol=0)


def make_equal(output_dir, number, *callbacks):
    """The same run on one process or two: no dropout, one draw of the gates, clips padded to one length."""
    return make_short(
        output_dir,
        *callbacks,
        teacher=tiny_teacher("large", hidden_dropout=0.0, attention_dropout=0.0, activation_dropout=0.0),
        recipe=SHORT_RECIPE | {"shared_gate_noise": True},
        min_seconds=2.0,
        per_device_train_batch_size=4 // number,
        optim="sgd",
        learning_rate=0.1,
    )


def all_die_of_two(output, number):
    make_equal(Path(output).parent / "killed", number, KillProcess(3, processes=(0, 1))).train()


@pytest.mark.nightly
def test_resumed_with_another_number_of_processes(tmp_path, caplog):
    with pytest.raises(ChildFailedError):
        run_in_processes(all_die_of_two, tmp_path / "first", number=2)
    whole = make_equal(tmp_path / "whole", 1)
    whole.train()
    trainer = make_equal(tmp_path / "killed", 1)
    trainer.train(resume_from_checkpoint=True)
    assert "processes (checkpoint: 2, now: 1). The resumed run will not be bit-identical." in caplog.text
    torch.testing.assert_close(trainer.model.state_dict(), whole.model.state_dict(), atol=1e-5, rtol=1e-3)


def long(output, number):
    class Begun(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            (Path(output) / "begun").touch()

    trainer = make_short(Path(output).parent / "preempted", Begun(), max_steps=10_000, save_steps=10_000)
    try:
        trainer.train()
    except Terminated as stopped:
        (Path(output) / f"code-{trainer.args.process_index}").write_text(f"{stopped.code} {trainer.state.global_step}")
        raise


@pytest.mark.nightly
def test_a_launcher_that_is_preempted(tmp_path):
    """All processes write one checkpoint; torchrun's own exit code is always 1."""
    directory = tmp_path / "run"
    with subprocess.Popen([*TORCHRUN, "2", write_program(long, directory, number=2)], env=WITHOUT_GPU) as process:
        try:
            deadline = time.monotonic() + 300
            while not (directory / "begun").exists() and time.monotonic() < deadline and process.poll() is None:
                time.sleep(0.2)
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=60) == 1
        finally:
            process.kill()
    codes = [(directory / f"code-{index}").read_text() for index in range(2)]
    code, step = codes[0].split()
    assert codes[0] == codes[1] and code == "75"
    assert (
        checkpointing.last_checkpoint_to(tmp_path / "preempted", 10_000) == f"{tmp_path}/preempted/checkpoint-{step}"
    )
    assert not list(tmp_path.glob("preempted/*.safetensors"))


def on_two_machines(output, number):
    """In working directories of their own; returns what is refused, and the weights."""
    trainer = make_short("run")
    refused = []

    def refuse(trainer, **kwargs):
        with pytest.raises(ValueError) as error:
            trainer.train(**kwargs)
        refused.append(str(error.value))

    refuse(trainer)
    trainer.args.save_on_each_node = True
    trainer.add_callback(KillAt(5))
    with pytest.raises(Kill):
        trainer.train()
    trainer = make_short("run", save_on_each_node=True)
    torn = Path("run", "checkpoint-4", MANIFEST_NAME)
    if trainer.args.process_index == 1:
        torn.rename("manifest")
    refuse(trainer, resume_from_checkpoint=True)
    if trainer.args.process_index == 1:
        shutil.move("manifest", torn)
    trainer.train(resume_from_checkpoint="auto")
    return trainer, (refused, trainer.model.state_dict())


@pytest.mark.nightly
def test_machines_that_share_no_directory(tmp_path, weights_of_two_processes):
    program = write_program(on_two_machines, tmp_path / "run", number=2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    machines = []
    for index in range(2):
        (tmp_path / f"machine-{index}").mkdir()
        environment = WITHOUT_GPU | shared | {"RANK": str(index), "LOCAL_WORLD_SIZE": "1"}
        machines.append(
            subprocess.Popen([sys.executable, program], env=environment, cwd=tmp_path / f"machine-{index}")
        )
    try:
        assert [machine.wait(timeout=300) for machine in machines] == [0, 0]
    finally:
        for machine in machines:
            machine.kill()
    for refused, weights in read_results(tmp_path / "run", number=2):
        assert refused == [
            "`output_dir`, run, is not shared: process 1 of 2 cannot see what process 0 writes. Use a directory that"
            " all machines see, or set `save_on_each_node=True`.",
            "The machines would resume from different checkpoints, run/checkpoint-4 and run/checkpoint-3: copy the one"
            " to resume from to all of them, or remove what only some have.",
        ]
        torch.testing.assert_close(weights, weights_of_two_processes, atol=1e-5, rtol=0)
    for index in range(2):
        names = {path.name for path in (tmp_path / f"machine-{index}" / "run").iterdir()}
        assert names == {"checkpoint-5", "checkpoint-6"}


# ---------------------------------------------------------------------------------------------------------- real disks
def fill_disks(folder: str, sizes: list[int], is_checked: bool) -> None:
    """Runs on disks of so many KiB, which grow after the run has failed, so that it can resume."""
    folder = Path(folder)
    if not is_checked:
        storage.require_space = lambda directory, needed: None
    whole = make_short(folder / "whole")
    whole.train()
    outcomes = []
    for size in sizes:
        disk = folder / f"disk-{size}"  # unmounted with the end of this process
        disk.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(disk)], check=True)
        with pytest.raises(storage.StorageError) as full:
            make_short(disk / "run").train()
        left = sorted(str(path) for path in (disk / "run").iterdir())
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
        trainer = make_short(disk / "run")
        trainer.train(resume_from_checkpoint="auto")
        is_same = same(trainer.model.state_dict(), whole.model.state_dict())
        free, needed = (float(number) for number in re.findall(r"([\d.]+) MB", str(full.value)))
        outcome = {"message": str(full.value), "left": left, "is_same": is_same, "is_enough": free >= needed}
        outcomes.append(outcome)
    (folder / "outcomes.json").write_text(json.dumps(outcomes, indent=1))


DISKS = """
import sys
sys.path[:0] = {paths!r}
from test_kills import fill_disks
fill_disks({folder!r}, {sizes!r}, is_checked={is_checked})
"""
MOUNT = ["unshare", "--map-root-user", "--mount"]


@pytest.mark.nightly
@pytest.mark.parametrize("is_checked", [True, False])
def test_a_disk_that_is_really_full(tmp_path, is_checked):
    if shutil.which("unshare") is None or subprocess.run([*MOUNT, "mount", "-t", "tmpfs", "x", tmp_path]).returncode:
        pytest.skip("this system lets nobody mount a disk of his own")
    sizes = [1000, 1700, 2200] if is_checked else list(range(300, 1300, 70))
    code = DISKS.format(paths=sys.path, folder=str(tmp_path), sizes=sizes, is_checked=is_checked)
    subprocess.run([*MOUNT, sys.executable, "-c", code], check=True, timeout=600)
    outcomes = json.loads((tmp_path / "outcomes.json").read_text())
    assert all(outcome["is_same"] for outcome in outcomes)
    for outcome in outcomes:
        assert " MB free, " in outcome["message"] and " MB needed)" in outcome["message"]
        assert not outcome["is_enough"]
        if outcome["left"]:
            assert f"resume from `{outcome['left'][-1]}`" in outcome["message"]
        else:
            assert "There is no checkpoint yet" in outcome["message"]
        assert all(Path(path).name.startswith("checkpoint-") for path in outcome["left"])
    assert len({len(outcome["left"]) for outcome in outcomes}) == 3
