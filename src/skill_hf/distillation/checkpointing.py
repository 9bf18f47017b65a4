"""Checkpoints: their contents, whether one is complete and belongs to this run, and which one a run resumes from."""

import json
import logging
import math
import os
import re
import shutil
import textwrap
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedConfig, TrainerState
from transformers.trainer_utils import get_last_checkpoint

from .. import storage
from ..files import MAX_OWN_BYTES, keep_sources, parse_json, try_directory
from ..recipe.skill_config import SKILL_CONFIG_NAME


logger = logging.getLogger(__name__)

SKILL_STATE_NAME = "skill_state.json"
TRAINER_STATE_NAME = "trainer_state.json"
CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
# Written last: names, sizes and checksums of all other files.
MANIFEST_NAME = "checkpoint_files.json"
ALWAYS_THERE = (SKILL_STATE_NAME, SKILL_CONFIG_NAME, TRAINER_STATE_NAME, CONFIG_NAME, WEIGHTS_NAME, MANIFEST_NAME)
# The checkpoint of the cut starts stage 2 with an optimizer and a schedule of its own.
NOT_AT_THE_CUT = ("optimizer.pt", "scheduler.pt")

# What makes another directory the output of an earlier run.
OF_A_STUDENT = (CONFIG_NAME, SKILL_CONFIG_NAME, "model*.safetensors", "pytorch_model*.bin", "adapter_config.json")
# Settings of a run that may change if their product, the clips of an optimizer step, stays.
BATCH_SETTINGS = ("batch_size", "gradient_accumulation_steps", "processes")


class CheckpointError(ValueError):
    """An incomplete or damaged checkpoint: which file, and what is wrong with it."""


# ---- Writing ----


def write_skill_state(directory: str, state: dict) -> None:
    text = json.dumps(state, indent=1) + "\n"
    (Path(directory) / SKILL_STATE_NAME).write_text(text, encoding="utf-8")


def write_manifest(directory: Path) -> None:
    """Writes names, sizes and checksums of the files of a checkpoint, as its last file."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    files = {path.relative_to(directory).as_posix(): _fingerprint(path) for path in paths}
    (directory / MANIFEST_NAME).write_text(json.dumps({"files": files}, indent=1) + "\n", encoding="utf-8")


def _fingerprint(path: Path) -> dict:
    size = checksum = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            size += len(block)
            checksum = zlib.crc32(block, checksum)
    return {"bytes": size, "crc32": checksum}


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
    then = (
        f"No checkpoint is lost: free disk space and resume from `{safe}` with `resume_from_checkpoint=True`."
        if safe
        else "There is no checkpoint yet: free disk space and start again."
    )
    with storage.explained(f"`{final}`", output_dir, then):
        try:
            if args.should_save:
                shutil.rmtree(unfinished.parent, ignore_errors=True)
                unfinished.mkdir(parents=True)
            accelerator.wait_for_everyone()
            yield unfinished
            accelerator.wait_for_everyone()
            if args.should_save:
                write_manifest(unfinished)
                storage.replace_directory(final)
        except BaseException:
            if args.should_save:  # a full disk would stay full
                storage.finish_replacements(output_dir)
            raise
    accelerator.wait_for_everyone()
    if args.should_save:
        rotate(final, args.save_total_limit, trainer.state.best_model_checkpoint)


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


def step_of(checkpoint: Path) -> int | None:
    """The step in the name of a checkpoint's directory."""
    match = re.fullmatch(r"checkpoint-(\d{1,18})", checkpoint.name)
    return None if match is None else int(match[1])


def _checkpoints(output_dir: str | Path) -> list[Path]:
    """Checkpoints in `output_dir`, complete or not, by step."""
    paths = [path for path in Path(output_dir).glob("checkpoint-*") if step_of(path) is not None]
    return sorted(paths, key=step_of)


def last_checkpoint_to(output_dir: str | Path, step: float) -> str | None:
    """The newest checkpoint in `output_dir` whose step is not above `step`."""
    paths = [path for path in _checkpoints(output_dir) if step_of(path) <= step and (path / MANIFEST_NAME).is_file()]
    return str(paths[-1]) if paths else None


# ---- The directory of a run ----


def on_all_processes(accelerator, function: Callable, needed: bool = True):
    """
    Returns the result of `function()` on the main process. It runs where it is `needed`; a `ValueError` or `OSError`
    in one process is raised in all of them.
    """
    outcome = (None, None)
    if needed:
        try:
            outcome = (function(), None)
        except (ValueError, OSError) as error:
            outcome = (None, error)
    outcomes = gather_object([outcome]) if accelerator.num_processes > 1 else [outcome]
    for _, error in outcomes:
        if error is not None:
            raise error
    return outcomes[0][0]


@contextmanager
def run_directory(trainer, resume_from_checkpoint: str | bool | None) -> Iterator[str | None]:
    """
    Locks `args.output_dir` for one run; yields the checkpoint to resume from, or `None`.

    Raises:
        `ValueError`: if it is the directory of the teacher or of the initial student, or contains another run; if the
            checkpoint is incomplete or belongs to a different run; if the directory is not writable.
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
        checkpoint = on_all_processes(trainer.accelerator, prepare, needed=trainer.args.should_save)
        try:
            yield checkpoint
        except OSError as error:  # of a callback that writes its own logs
            if isinstance(error, storage.StorageError) or error.errno not in storage.DISK_ERRORS:
                raise
            reason = storage.reason_of(error, output_dir)
            raise storage.StorageError(f"Training has ended: {reason}. {how_to_resume(output_dir)}") from error


def make_room(output_dir: str, overwrite: bool) -> None:
    """
    Checks that `output_dir` contains no earlier run; with `overwrite`, its checkpoints are removed. A student there
    stays until the new one is saved.

    Raises:
        `ValueError`: if there is an earlier run.
    """
    checkpoints = _checkpoints(output_dir)
    if overwrite:
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
                "`resume_from_checkpoint` must be a directory, or True for the last checkpoint in `output_dir`, but is"
                f" {resume_from_checkpoint!r}."
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
    raise ValueError(
        f"There is no checkpoint to resume from in `{output_dir}`{reasons} Start without `resume_from_checkpoint`, and"
        " with a new trainer if this one has already started."
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


# ---- Reading ----


def check_checkpoint(directory: Path, trainer) -> None:
    """
    Checks a checkpoint completely before any of it is loaded: its files are complete and unchanged, its states are
    within their ranges, it belongs to this run, and its weights fit and are finite.

    Raises:
        `CheckpointError`: if it is incomplete or damaged.
        `ValueError`: if it belongs to a different run.
    """
    try:
        for name in ALWAYS_THERE[:3]:
            if not (directory / name).is_file():
                raise CheckpointError(f"it has no {name}")
        state, step = _read_states(directory)
        if "run" not in state:
            raise ValueError(
                f"`{directory}` was written by a version of skill-hf that did not record its run: resume with that"
                " version, or start again in another `output_dir`."
            )
        _check_same_run(directory, state, trainer)
        _check_files(directory, needed=() if state["stage"] == 2 and step == trainer.steps.joint else NOT_AT_THE_CUT)
        layers = trainer.teacher.config.num_hidden_layers
        for group in state["layer_groups"]:
            if max(group) > layers:
                raise CheckpointError(
                    f"{SKILL_STATE_NAME} groups layer {max(group)}, but the teacher has only {layers} layers"
                )
        try:
            distiller = trainer.blank_distiller(directory, state)
        except RuntimeError as error:  # shapes beyond all bounds
            raise CheckpointError(f"{CONFIG_NAME} does not describe a valid student ({_first_line(error)})") from error
        _check_weights(directory, distiller)
    except CheckpointError as error:
        raise CheckpointError(
            f"`{directory}` is not a complete checkpoint of SkillDistillationTrainer: {error}."
        ) from error.__cause__


def read_json(path: Path) -> dict:
    """Reads a file of a checkpoint; raises a `CheckpointError` if it does not contain a JSON object."""
    try:
        content = parse_json(path, MAX_OWN_BYTES)
    except ValueError as error:
        raise CheckpointError(f"{path.name} cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path.name} must contain a JSON object, but contains {_short(content)}")
    return content


def _read_states(directory: Path) -> tuple[dict, int]:
    """Reads `skill_state.json` and the step, and checks that both are within their ranges."""
    state, progress = (read_json(directory / name) for name in (SKILL_STATE_NAME, TRAINER_STATE_NAME))

    def integer(name: str, value, low: int, high: float, file: str) -> int:
        if type(value) is not int or not low <= value <= high:
            raise CheckpointError(f"`{name}` in {file} must be from {low} to {high}, but is {_short(value)}")
        return value

    stage = integer("stage", state.get("stage"), 1, 2, SKILL_STATE_NAME)
    steps = state.get("steps")
    if not isinstance(steps, dict):
        raise CheckpointError(f"`steps` in {SKILL_STATE_NAME} must be an object, but is {_short(steps)}")
    joint, final = (
        integer(f"steps.{name}", steps.get(name), 0, 10**12, SKILL_STATE_NAME) for name in ("joint", "final")
    )
    low, high = (0, joint) if stage == 1 else (joint, joint + final)
    step = integer("global_step", progress.get("global_step"), low, high, TRAINER_STATE_NAME)
    if step_of(directory) not in (None, step):
        raise CheckpointError(f"`global_step` in {TRAINER_STATE_NAME} is {step}")
    groups = state.get("layer_groups")
    good = isinstance(groups, list) and groups and all(isinstance(group, list) and group for group in groups)
    if not good or not all(type(layer) is int and layer >= 0 for group in groups for layer in group):
        raise CheckpointError(f"`layer_groups` in {SKILL_STATE_NAME} must list layers, but is {_short(groups)}")
    matrix = state.get("layer_similarity")
    if matrix is not None:
        good = isinstance(matrix, list) and all(isinstance(row, list) and len(row) == len(matrix) for row in matrix)
        if not good or not all(type(value) in (int, float) for row in matrix for value in row):
            raise CheckpointError(f"`layer_similarity` in {SKILL_STATE_NAME} must be a square matrix of numbers")
    try:
        TrainerState.load_from_json(str(directory / TRAINER_STATE_NAME))
    except Exception as error:
        raise CheckpointError(f"{TRAINER_STATE_NAME} is not a valid Trainer state ({_first_line(error)})") from error
    return state, step


def _check_same_run(directory: Path, state: dict, trainer) -> None:
    """Raises a `ValueError` that names each setting in which the run of a checkpoint differs from this one."""
    stored = read_json(directory / SKILL_CONFIG_NAME)
    present = json.loads(json.dumps(trainer._skill_state(), default=str))
    present_recipe = json.loads(json.dumps(trainer.skill_config.to_dict(), default=str))
    pairs = [(name, stored.get(name), value) for name, value in present_recipe.items()]
    pairs += [(name, state.get(name), present[name]) for name in ("steps", "teacher")]
    recipe = [difference for pair in pairs for difference in _differences(*pair)]
    stored_run, run = dict(state["run"]) if isinstance(state["run"], dict) else {}, dict(present["run"])
    batches = [{name: settings.pop(name, None) for name in BATCH_SETTINGS} for settings in (stored_run, run)]
    try:
        same_batch = math.prod(batches[0].values()) == math.prod(batches[1].values())
    except TypeError:
        same_batch = False
    differences = [
        difference
        for name in stored_run | run
        for difference in _differences(name, stored_run.get(name), run.get(name))
    ]
    changed = [difference for name in BATCH_SETTINGS for difference in _differences(name, *(b[name] for b in batches))]
    differences += [] if same_batch else changed
    if recipe or differences:
        what = "recipe" if recipe else "run"
        raise ValueError(f"`{directory}` belongs to a different {what}: {'; '.join(recipe + differences)}.")
    if changed:
        logger.warning(
            "%s was written with different settings for the same number of clips per step: %s. The resumed run will"
            " not be bit-identical.",
            directory,
            "; ".join(changed),
        )


def _differences(name: str, stored, present) -> list[str]:
    """Differences between two values, entry by entry if both are dicts."""
    if isinstance(stored, dict) and isinstance(present, dict):
        entries = [(f"{name}.{key}", stored.get(key), present.get(key)) for key in stored | present]
        return [difference for entry in entries for difference in _differences(*entry)]
    return [] if stored == present else [f"{name} (checkpoint: {_short(stored)}, now: {_short(present)})"]


def _check_files(directory: Path, needed: tuple[str, ...]) -> None:
    """Raises a `CheckpointError` unless all listed and all `needed` files exist, with unchanged content."""
    for name in ALWAYS_THERE:
        if not (directory / name).is_file():
            raise CheckpointError(f"it has no {name}")
    listed = read_json(directory / MANIFEST_NAME).get("files")
    if not isinstance(listed, dict) or not all(isinstance(entry, dict) for entry in listed.values()):
        raise CheckpointError(f"{MANIFEST_NAME} must list files, but lists {_short(listed)}")
    for name in needed:
        if name not in listed:
            raise CheckpointError(f"it was written without {name} (by `save_only_model`)")
    for name, expected in listed.items():
        path = directory / name
        if not path.is_file():
            raise CheckpointError(f"it has no {name}")
        try:
            size = path.stat().st_size
            if size != expected.get("bytes"):
                raise CheckpointError(
                    f"{name} has {size} bytes instead of the {expected.get('bytes')} that were written"
                )
            if _fingerprint(path) != expected:
                raise CheckpointError(f"{name} has changed since it was written")
        except OSError as error:
            raise CheckpointError(f"{name} cannot be read ({error.strerror})") from error


def _check_weights(directory: Path, distiller: nn.Module) -> None:
    """Raises a `CheckpointError` unless the weights are finite and have the names and shapes of `distiller`."""
    expected = {name: list(tensor.shape) for name, tensor in distiller.state_dict().items()}
    try:
        with safe_open(directory / WEIGHTS_NAME, framework="pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
            for name in expected | shapes:
                if name not in shapes:
                    raise CheckpointError(f"{WEIGHTS_NAME} lacks {name}")
                if name not in expected:
                    raise CheckpointError(f"{WEIGHTS_NAME} contains {name}, which {CONFIG_NAME} does not describe")
                if shapes[name] != expected[name]:
                    raise CheckpointError(
                        f"{name} has shape {shapes[name]} in {WEIGHTS_NAME}, but {expected[name]} in {CONFIG_NAME}"
                    )
                if not torch.isfinite(file.get_tensor(name)).all():
                    raise CheckpointError(f"{name} in {WEIGHTS_NAME} contains NaN or infinite values")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{WEIGHTS_NAME} cannot be read ({_first_line(error)})") from error


def read_student_config(directory: Path, like: PreTrainedConfig) -> PreTrainedConfig:
    """
    The config of a checkpoint's student.

    Raises:
        `CheckpointError`: if it is not a config, or its sizes differ from `like` in anything that pruning does not
            change.
    """
    fields, expected = read_json(directory / CONFIG_NAME), like.to_dict()
    for name, value in fields.items():
        # Whatever pruning changes is a list.
        if type(value) is int and type(expected.get(name)) is int and value != expected[name]:
            raise CheckpointError(f"`{name}` in {CONFIG_NAME} is {value}, not {expected[name]}")
    try:
        return type(like)(**fields)
    except Exception as error:
        raise CheckpointError(f"{CONFIG_NAME} is not a valid student config ({_first_line(error)})") from error


def _short(value) -> str:
    return textwrap.shorten(str(value), 100, placeholder=" ...")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:100]


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
