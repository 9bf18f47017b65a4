"""Checkpoints: how they are written and rotated, and which one a run resumes from."""

import json
import logging
import math
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from transformers.trainer_utils import get_last_checkpoint

from .. import storage
from ..distribution import gathered, on_all_processes, results_of_all
from ..files import keep_sources, read_json, try_directory, write_json
from ..recipe.skill_config import SKILL_CONFIG_NAME
from .checkpoint_validation import (
    CONFIG_NAME,
    FINISHED_NAME,
    MANIFEST_NAME,
    SKILL_STATE_NAME,
    TRAINER_STATE_NAME,
    CheckpointError,
    check_checkpoint,
    check_same_run,
    fingerprint,
    step_of,
)
from .run_identity import describe_run


logger = logging.getLogger(__name__)

# `resume_from_checkpoint` of a command that is repeated until the run has ended.
AUTO = "auto"
# Bytes of what a checkpoint has besides tensors: states, logs, random states.
SMALL_FILES = 1 << 20
# What makes another directory the output of an earlier run.
OF_A_STUDENT = (CONFIG_NAME, SKILL_CONFIG_NAME, "model*.safetensors", "pytorch_model*.bin", "adapter_config.json")


# ---- Writing ----


def write_skill_state(directory: str, state: dict) -> None:
    text = json.dumps(state, indent=1) + "\n"
    (Path(directory) / SKILL_STATE_NAME).write_text(text, encoding="utf-8")


def write_manifest(directory: Path) -> None:
    """Writes names, sizes and checksums of the files of a checkpoint, as its last file."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    files = {path.relative_to(directory).as_posix(): fingerprint(path) for path in paths}
    (directory / MANIFEST_NAME).write_text(json.dumps({"files": files}, indent=1) + "\n", encoding="utf-8")


@contextmanager
def written_whole(trainer, name: str) -> Iterator[Path]:
    """
    The directory in which all processes write the checkpoint `name` of `args.output_dir`. It is moved into place once
    it is complete; then older checkpoints are removed, according to `save_total_limit`.

    Raises:
        [`~skill_hf.storage.StorageError`]: if it cannot be written; the error names the checkpoint that is safe.
    """
    args, accelerator = trainer.args, trainer.accelerator
    output_dir = Path(args.output_dir)
    final = output_dir / name
    unfinished = storage.unfinished_name(final)
    safe = last_checkpoint_to(output_dir, math.inf)
    needed = checkpoint_bytes(trainer)
    then = (
        f"No checkpoint is lost: free disk space and resume from `{safe}` with `resume_from_checkpoint=True`."
        if safe
        else "There is no checkpoint yet: free disk space and start again."
    )

    def begin() -> None:
        shutil.rmtree(unfinished.parent, ignore_errors=True)
        unfinished.mkdir(parents=True)
        storage.require_space(unfinished, needed)

    def finish() -> None:
        write_manifest(unfinished)
        storage.replace_directory(final)

    with storage.explained(f"`{final}`", output_dir, then, needed):
        try:
            on_all_processes(accelerator, begin, needed=args.should_save)
            yield unfinished
            accelerator.wait_for_everyone()
            on_all_processes(accelerator, finish, needed=args.should_save)
        except BaseException:
            if args.should_save:  # a full disk would stay full
                storage.finish_replacements(output_dir)
            raise
    if args.should_save:
        rotate(final, args.save_total_limit, trainer.state.best_model_checkpoint)


def checkpoint_bytes(trainer) -> int:
    """Bytes that a checkpoint written now needs: weights, the optimizer's state if there is one, and small files."""
    states = [trainer.distiller.state_dict(), *(trainer.optimizer.state.values() if trainer.optimizer else ())]
    tensors = [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
    return SMALL_FILES + sum(tensor.nbytes for tensor in tensors)


def rotate(newest: Path, limit: int | None, best: str | None) -> None:
    """
    Removes checkpoints next to `newest` until `limit` are left: first those of later steps, which a run resumed from
    an earlier one no longer needs, then the oldest. `newest` and `best` are kept.
    """
    if limit is None or limit <= 0:
        return
    current = step_of(newest)
    checkpoints = _checkpoints(newest.parent)
    kept = {newest.name} | ({Path(best).name} if best else set())
    removable = [path for path in checkpoints if path.name not in kept]
    removable.sort(key=lambda path: (step_of(path) < current, step_of(path)))
    for path in removable[: max(len(checkpoints) - max(limit, len(kept)), 0)]:
        shutil.rmtree(path, ignore_errors=True)


def _checkpoints(output_dir: str | Path) -> list[Path]:
    """Checkpoints in `output_dir`, complete or not, by step."""
    paths = [path for path in Path(output_dir).glob("checkpoint-*") if step_of(path) is not None]
    return sorted(paths, key=step_of)


def last_checkpoint_to(output_dir: str | Path, step: float) -> str | None:
    """The newest checkpoint in `output_dir` whose step is not above `step`."""
    paths = [path for path in _checkpoints(output_dir) if step_of(path) <= step and (path / MANIFEST_NAME).is_file()]
    return str(paths[-1]) if paths else None


# ---- The directory of a run ----


@contextmanager
def run_directory(trainer, resume_from_checkpoint: str | bool | None) -> Iterator[str | None]:
    """
    Locks `args.output_dir` for one run; yields the checkpoint to resume from, or `None`.

    Raises:
        `ValueError`: if it is the directory of the teacher or of the initial student, or contains another run; if the
            checkpoint is incomplete or belongs to a different run; if the directory is not writable, or several
            machines do not share it; if they have different checkpoints with `save_on_each_node`.
        [`~skill_hf.storage.StorageError`]: if another run is writing to it, or the disk is full.
    """
    output_dir = trainer.args.output_dir

    def prepare() -> str | None:
        keep_sources(output_dir, trainer.sources)
        try_directory(output_dir)
        os.makedirs(output_dir, exist_ok=True)
        stack.enter_context(storage.exclusive(output_dir))
        storage.finish_replacements(Path(output_dir))
        checkpoint = find_checkpoint(
            resume_from_checkpoint, output_dir, lambda directory: check_checkpoint(directory, trainer)
        )
        if checkpoint is None or Path(checkpoint).absolute().parent.resolve() != Path(output_dir).resolve():
            make_room(output_dir, getattr(trainer.args, "overwrite_output_dir", False))
        return checkpoint

    with ExitStack() as stack:
        choices = results_of_all(trainer.accelerator, prepare, needed=trainer.args.should_save)
        checkpoint = choices[0]
        if len(set(choices)) > 1:
            raise ValueError(
                f"The machines would resume from different checkpoints, {' and '.join(map(str, choices))}: copy the"
                " one to resume from to all of them, or remove what only some have."
            )
        check_shared(trainer)
        try:
            yield checkpoint
        except OSError as error:  # of a callback that writes its own logs
            if isinstance(error, storage.StorageError) or error.errno not in storage.DISK_ERRORS:
                raise
            reason = storage.reason_of(error, output_dir)
            raise storage.StorageError(f"Training has ended: {reason}. {how_to_resume(output_dir)}") from error


def check_shared(trainer) -> None:
    """
    Raises:
        `ValueError`: if a process does not see what is written to `args.output_dir` for it.
    """
    args, accelerator = trainer.args, trainer.accelerator
    if accelerator.num_processes == 1:
        return
    name = gathered(accelerator, f".seen-{uuid.uuid4().hex}")[0]  # that no cache of a network file system knows
    path = Path(args.output_dir) / name
    on_all_processes(accelerator, path.touch, needed=args.should_save)
    sees = gathered(accelerator, path.is_file())
    if args.should_save:
        path.unlink(missing_ok=True)
    if not all(sees):
        raise ValueError(
            f"`output_dir`, {args.output_dir}, is not shared: process {sees.index(False)} of {len(sees)} cannot see"
            " what process 0 writes. Use a directory that all machines see, or set `save_on_each_node=True`."
        )


def make_room(output_dir: str, overwrite: bool) -> None:
    """
    Checks that `output_dir` contains no earlier run; with `overwrite`, its checkpoints are removed. A student there
    stays until the new one is saved.

    Raises:
        `ValueError`: if there is an earlier run.
    """
    checkpoints = _checkpoints(output_dir)
    if overwrite:
        (Path(output_dir) / FINISHED_NAME).unlink(missing_ok=True)
        for path in checkpoints:
            shutil.rmtree(path)
        return
    names = [path.name for path in checkpoints]
    names += sorted({path.name for pattern in OF_A_STUDENT for path in Path(output_dir).glob(pattern)})
    if names:
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        raise ValueError(
            f"`{output_dir}` contains an earlier run ({shown}): resume it with `resume_from_checkpoint=True`, choose"
            " another `output_dir`, or set `overwrite_output_dir=True` to replace it."
        )


def mark_finished(trainer) -> None:
    """Records that the student in `args.output_dir` is complete, and of which run, for [`is_finished`]."""
    if trainer.args.should_save:
        write_json(Path(trainer.args.output_dir) / FINISHED_NAME, trainer._skill_state())


def has_begun(output_dir: str | Path) -> bool:
    """Whether a run in `output_dir` can be resumed or was marked as finished."""
    return has_mark(output_dir) or _has_checkpoint(output_dir)


def _has_checkpoint(output_dir: str | Path) -> bool:
    # One that a kill left between two renames is moved back when the run resumes.
    moved = (Path(output_dir) / storage.REPLACED).glob("checkpoint-*")
    return last_checkpoint_to(output_dir, math.inf) is not None or any(moved)


def has_mark(output_dir: str | Path) -> bool:
    """Whether [`mark_finished`] was called for `output_dir`."""
    return (Path(output_dir) / FINISHED_NAME).is_file()


def is_finished(trainer) -> bool:
    """
    Whether `args.output_dir` has the finished student of the run that `trainer` would start.

    Raises:
        `ValueError`: if it has that of a different run.
    """
    directory = Path(trainer.args.output_dir)

    def check() -> bool:
        if not has_mark(directory):
            return False
        trainer.resolve_recipe()
        trainer.run = describe_run(trainer)
        check_same_run(directory, read_json(directory / FINISHED_NAME), trainer)
        return True

    return on_all_processes(trainer.accelerator, check, needed=trainer.args.should_save)


def resolve_resume(trainer, resume_from_checkpoint: str | bool | None) -> str | bool | None:
    """For `"auto"`, `True` if there is a checkpoint in `args.output_dir`, and `None` otherwise."""
    if resume_from_checkpoint != AUTO:
        return resume_from_checkpoint
    args = trainer.args
    found = on_all_processes(trainer.accelerator, lambda: _has_checkpoint(args.output_dir), needed=args.should_save)
    return True if found else None


def find_checkpoint(
    resume_from_checkpoint: str | bool | None, output_dir: str, check: Callable[[Path], None]
) -> str | None:
    """
    The checkpoint to resume from, or `None` to start from the beginning.

    Args:
        resume_from_checkpoint (`str` or `bool`, *optional*): a directory, or `True` for the last complete one in
            `output_dir`; others are named in a warning.
        output_dir (`str`): directory of the run's checkpoints.
        check (`Callable`): raises a `CheckpointError` if a directory is not a complete checkpoint, another
            `ValueError` if it belongs to a different run.

    Raises:
        `ValueError`: if there is none, or `check` rejects it.
    """
    if resume_from_checkpoint is None or resume_from_checkpoint is False:
        return None
    if resume_from_checkpoint is not True:
        if not isinstance(resume_from_checkpoint, (str, os.PathLike)) or not str(resume_from_checkpoint):
            raise ValueError(
                "`resume_from_checkpoint` must be a directory, or True for the last checkpoint in `output_dir`, or"
                f' "{AUTO}" for that one if there is one, but is {resume_from_checkpoint!r}.'
            )
        check(Path(resume_from_checkpoint))
        return str(resume_from_checkpoint)
    problems = []
    for directory in reversed(_checkpoints(output_dir)):
        try:
            check(directory)
        except CheckpointError as error:
            problems.append(str(error))
            logger.warning("%s It is skipped.", error)
            continue
        return str(directory)
    reasons = f": {' '.join(problems)}" if problems else "."
    instead = "and set `overwrite_output_dir`" if problems else f'or with "{AUTO}"'
    raise ValueError(
        f"There is no checkpoint to resume from in `{output_dir}`{reasons} Start without `resume_from_checkpoint`,"
        f" {instead}, and with a new trainer if this one has already started."
    )


def how_to_resume(output_dir: str) -> str:
    """One sentence: what to do after `train()` was interrupted."""
    checkpoint = last_checkpoint_to(output_dir, math.inf)
    if checkpoint is None:
        return "No checkpoint was written yet, so there is nothing to resume from: start again with a new trainer."
    return f"`train(resume_from_checkpoint=True)` resumes from `{checkpoint}`."


def where_it_is_safe(output_dir: str) -> str:
    """One sentence: what to do if a trained student cannot be saved."""
    checkpoint = last_checkpoint_to(output_dir, math.inf)
    if checkpoint is None:
        return "It exists only in memory: call `save_model` with a directory that has enough space."
    return f"It is safe: free disk space, then `resume_from_checkpoint=True` restores it from `{checkpoint}`."


def last_complete_checkpoint(output_dir: str) -> str | None:
    """The newest checkpoint of a plain `Trainer` that has the file written last; others are skipped."""
    checkpoints = []
    for state in Path(output_dir).glob(f"checkpoint-*/{TRAINER_STATE_NAME}"):
        step = state.parent.name.removeprefix("checkpoint-")
        if step.isdigit():
            checkpoints.append((int(step), str(state.parent)))
    newest = get_last_checkpoint(output_dir) if Path(output_dir).is_dir() else None
    last = max(checkpoints)[1] if checkpoints else None
    if newest is not None and newest != last:
        logger.warning("%s is incomplete and is skipped.", newest)
    return last
