"""Trainings of tests on several processes."""

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.launcher.api import LaunchConfig, elastic_launch


# NCCL takes one GPU for each process.
WITHOUT_GPU = os.environ | {"CUDA_VISIBLE_DEVICES": ""}

# torchrun: `accelerate launch --cpu` starts several processes only by way of MPI.
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]

# Those whose handlers a launcher within this process replaces, and the one that ends it.
OF_LAUNCHER = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGALRM)
MOST_SECONDS = 400

# Imported once, by a process that all those of `run_in_processes` are copies of.
IMPORTED = ["torch", "datasets", "skill_hf.distillation.skill_trainer", "pytest"]

# Python that ends makes Gloo's threads abort the process while they hold its tensors; those of a device mesh outlive
# `end_training`, for torch keeps meshes.
PROGRAM = """
import os, sys
sys.path[:0] = {paths!r}
from {module} import {function}
from processes import train_and_save
train_and_save({function}, {output!r}, {number})
sys.stdout.flush()
os._exit(0)
"""


def train_and_save(train, output: str, number: int) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    trainer, result = train(output, number)
    torch.save(result, f"{output}/rank-{trainer.accelerator.process_index}.pt")
    trainer.accelerator.wait_for_everyone()


def run_in_processes(train, directory: Path, number: int) -> list:
    """
    What `train(directory, number)`, a function of a test module that returns a trainer and its result, results in on
    each of `number` processes. What torchrun does, with processes that need not import everything anew.

    Raises:
        `ChildFailedError`: if a process fails. A `TimeoutError` if they hang.
    """
    directory.mkdir()
    multiprocessing.set_forkserver_preload(IMPORTED)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=number,
        run_id=directory.name,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="forkserver",
        logs_specs=DefaultLogsSpecs(log_dir=f"{directory}-logs", tee=Std.ERR),
    )
    handlers = {of_signal: signal.getsignal(of_signal) for of_signal in OF_LAUNCHER}
    signal.signal(signal.SIGALRM, too_late)
    signal.alarm(MOST_SECONDS)
    try:
        elastic_launch(config, train_and_save)(train, str(directory), number)
    finally:
        signal.alarm(0)
        for of_signal, handler in handlers.items():
            signal.signal(of_signal, handler)
    return read_results(directory, number)


def too_late(*args) -> None:
    raise TimeoutError(f"The processes did not end within {MOST_SECONDS} seconds.")


def run_by_torchrun(train, directory: Path, number: int) -> list:
    """
    As [`run_in_processes`], in processes whose environment is the test's from their start, and whose data loaders may
    have workers: those that read a stream end late in the others.
    """
    program = write_program(train, directory, number)
    subprocess.run([*TORCHRUN, str(number), program], check=True, timeout=MOST_SECONDS, env=WITHOUT_GPU)
    return read_results(directory, number)


def write_program(train, directory: Path, number: int) -> str:
    """A file with the program of each process; for a launcher."""
    directory.mkdir()
    path = directory / "run.py"
    names = {"module": train.__module__, "function": train.__name__}
    path.write_text(PROGRAM.format(paths=sys.path, output=str(directory), number=number, **names))
    return str(path)


def read_results(directory: Path, number: int) -> list:
    """What the processes left."""
    saved = sorted(directory.glob("rank-*.pt"))
    assert len(saved) == number
    return [torch.load(path, weights_only=False) for path in saved]
