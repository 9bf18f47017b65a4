"""What a checkpoint consists of, and whether one is complete and belongs to this run."""

import json
import logging
import math
import re
import textwrap
import zlib
from itertools import zip_longest
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedConfig, TrainerState

from ..files import MAX_OWN_BYTES, parse_json
from ..models.configuration_skill_student import PRUNED_FIELDS
from ..publishing.run_record import RunRecord
from ..recipe.skill_config import EARLIER_VALUES, SKILL_CONFIG_NAME, SkillConfig
from ..version import __version__
from .distiller import SkillDistiller


logger = logging.getLogger(__name__)

SKILL_STATE_NAME = "skill_state.json"
TRAINER_STATE_NAME = "trainer_state.json"
CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
# In the directory of a finished student that others start from, written last: what its run was.
FINISHED_NAME = "finished_run.json"
# Written last: names, sizes and checksums of all other files.
MANIFEST_NAME = "checkpoint_files.json"
ALWAYS_THERE = (SKILL_STATE_NAME, SKILL_CONFIG_NAME, TRAINER_STATE_NAME, CONFIG_NAME, WEIGHTS_NAME, MANIFEST_NAME)
# The checkpoint of the cut starts stage 2 with an optimizer and a schedule of its own.
NOT_AT_THE_CUT = ("optimizer.pt", "scheduler.pt")
# Records of all teachers but the first, and what is there if nothing was recorded.
OF_OTHERS = {"silhouettes": {}, "half_groups": []}
# Settings of a run that may change if their product, the clips of an optimizer step, stays, and the order of the clips
# does not depend on them. It does for others than these, for streams, and where an epoch's last clips are dropped.
BATCH_SETTINGS = ("batch_size", "gradient_accumulation_steps", "processes")
ORDERED_WITHOUT_BATCHES = ("random", "sequential")


class CheckpointError(ValueError):
    """An incomplete or damaged checkpoint: which file, and what is wrong with it."""


def step_of(checkpoint: Path) -> int | None:
    """The step in the name of a checkpoint's directory."""
    match = re.fullmatch(r"checkpoint-(\d{1,18})", checkpoint.name)
    return None if match is None else int(match[1])


def fingerprint(path: Path) -> dict:
    """Size and checksum of a file."""
    size = checksum = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            size += len(block)
            checksum = zlib.crc32(block, checksum)
    return {"bytes": size, "crc32": checksum}


def check_checkpoint(directory: Path, trainer) -> None:
    """
    Checks a checkpoint completely before any of it is loaded: its files are complete and unchanged, its states are
    within their ranges, it belongs to this run, and its weights fit and are finite.

    Raises:
        `CheckpointError`: if it is incomplete or damaged.
        `ValueError`: if it belongs to a different run.
    """
    writer = ""
    try:
        for name in ALWAYS_THERE[:3]:
            if not (directory / name).is_file():
                raise CheckpointError(f"it has no {name}")
        writer = _written_by_another_version(read_json(directory / SKILL_STATE_NAME))
        state, step = _read_states(directory)
        if "run" not in state:
            raise ValueError(
                f"`{directory}` does not record its run.{writer} Resume with that version, or start again in another"
                " `output_dir`."
            )
        check_same_run(directory, state, trainer)
        _check_files(directory, needed=() if state["stage"] == 2 and step == trainer.steps.joint else NOT_AT_THE_CUT)
        for teacher, groups in zip(trainer.teachers, groups_in(state), strict=True):
            layers, largest = teacher.config.num_hidden_layers, max(map(max, groups))
            if largest > layers:
                raise CheckpointError(
                    f"{SKILL_STATE_NAME} groups layer {largest}, but the teacher has only {layers} layers"
                )
            config = trainer.skill_config
            if config.layer_groups not in (None, groups) or config.num_clusters not in (None, len(groups)):
                raise CheckpointError(f"{SKILL_STATE_NAME} has other groups than the recipe: {_short(groups)}")
        try:
            distiller = blank_distiller(trainer, directory, state)
        except RuntimeError as error:  # shapes beyond all bounds
            raise CheckpointError(f"{CONFIG_NAME} does not describe a valid student ({_first_line(error)})") from error
        _check_weights(directory, distiller)
    except CheckpointError as error:
        raise CheckpointError(
            f"`{directory}` is not a complete checkpoint of SkillDistillationTrainer: {error}.{writer}"
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


def blank_distiller(trainer, checkpoint: Path, state: dict) -> SkillDistiller:
    """A distiller with the shapes of the weights in `checkpoint`, whose skill_state.json is `state`."""
    config = read_student_config(checkpoint, trainer.student.config)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        student = type(trainer.student)(config).to("meta")  # an old constructor may use another device
        if state["stage"] == 1:
            trainer.add_gates(student)
        targets = trainer.ensemble.target_sets(groups_in(state))
        return SkillDistiller(student, targets, costs=None, **trainer.distiller_settings)


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
    others = state.get("other_teachers", [])
    if not isinstance(others, list) or not all(isinstance(other, dict) for other in others):
        raise CheckpointError(f"`other_teachers` in {SKILL_STATE_NAME} must list objects, but is {_short(others)}")
    for teacher in (state, *others):
        _check_groups(teacher)
    records = [state.get("record", {})]
    records += [{name: other.get(name, empty) for name, empty in OF_OTHERS.items()} for other in others]
    try:
        for record in records:
            RunRecord.from_dict(record)
    except ValueError as error:
        raise CheckpointError(f"`record` in {SKILL_STATE_NAME} is not valid ({error})") from error
    try:
        TrainerState.load_from_json(str(directory / TRAINER_STATE_NAME))
    except Exception as error:
        raise CheckpointError(f"{TRAINER_STATE_NAME} is not a valid Trainer state ({_first_line(error)})") from error
    return state, step


def _check_groups(state: dict) -> None:
    """Raises a `CheckpointError` unless groups and similarity of a teacher's layers have the right types."""
    groups = state.get("layer_groups")
    good = isinstance(groups, list) and groups and all(isinstance(group, list) and group for group in groups)
    if not good or not all(type(layer) is int and layer >= 0 for group in groups for layer in group):
        raise CheckpointError(f"`layer_groups` in {SKILL_STATE_NAME} must list layers, but is {_short(groups)}")
    matrix = state.get("layer_similarity")
    if matrix is not None:
        good = isinstance(matrix, list) and all(isinstance(row, list) and len(row) == len(matrix) for row in matrix)
        if not good or not all(type(value) in (int, float) for row in matrix for value in row):
            raise CheckpointError(f"`layer_similarity` in {SKILL_STATE_NAME} must be a square matrix of numbers")


def groups_in(state: dict) -> list[list[list[int]]]:
    """Groups of each teacher, from the content of skill_state.json."""
    return [teacher["layer_groups"] for teacher in (state, *state.get("other_teachers", []))]


def _written_by_another_version(state: dict) -> str:
    """A sentence for error messages, with a space before it; empty if this version wrote `state`."""
    version = state.get("version")
    if version == __version__:
        return ""
    name = "a version before this was recorded" if version is None else f"skill-hf {_short(version)}"
    return f" It was written by {name}; this is skill-hf {__version__}."


def check_same_run(directory: Path, state: dict, trainer) -> None:
    """
    Raises a `ValueError` that names each setting in which the run of `directory`, a checkpoint or a finished student
    with the content `state` of [`SkillDistillationTrainer._skill_state`], differs from this one.
    """
    # Of fields that were added later, what was done before.
    before = json.loads(json.dumps(SkillConfig().to_dict())) | EARLIER_VALUES
    stored = before | read_json(directory / SKILL_CONFIG_NAME)
    present = json.loads(json.dumps(trainer._skill_state(), default=str))
    present_recipe = json.loads(json.dumps(trainer.skill_config.to_dict(), default=str))
    pairs = [(name, stored.get(name), value) for name, value in present_recipe.items()]
    pairs += [(name, state.get(name), present[name]) for name in ("steps", "teacher")]
    others = (
        [teacher.get("teacher") for teacher in content.get("other_teachers", [])] for content in (state, present)
    )
    pairs += [(f"teacher[{index}]", *pair) for index, pair in enumerate(zip_longest(*others), start=1)]
    recipe = [difference for pair in pairs for difference in _differences(*pair)]
    stored_run, run = dict(state["run"]) if isinstance(state.get("run"), dict) else {}, dict(present["run"])
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
    is_listed = (run.get("data") or {}).get("rows") is not None and not run.get("dataloader_drop_last")
    same_order = is_listed and run.get("train_sampling_strategy") in ORDERED_WITHOUT_BATCHES
    differences += [] if same_batch and same_order else changed
    if recipe or differences:
        what = "recipe" if recipe else "run"
        raise ValueError(
            f"`{directory}` belongs to a different {what}: {'; '.join(recipe + differences)}."
            f"{_written_by_another_version(state)}"
        )
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
            if fingerprint(path) != expected:
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
        is_size = type(value) is int and type(expected.get(name)) is int and name not in PRUNED_FIELDS
        if is_size and value != expected[name]:
            raise CheckpointError(f"`{name}` in {CONFIG_NAME} is {value}, not {expected[name]}")
    try:
        config = type(like)(**fields)
    except Exception as error:
        raise CheckpointError(f"{CONFIG_NAME} is not a valid student config ({_first_line(error)})") from error
    if not {*config.remaining_layers} <= {*like.remaining_layers}:
        raise CheckpointError(
            f"`remaining_layers` in {CONFIG_NAME} is {_short(config.remaining_layers)}, but the initial student had"
            f" {_short(like.remaining_layers)}"
        )
    return config


def _short(value) -> str:
    return textwrap.shorten(str(value), 100, placeholder=" ...")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:100]
