"""What a checkpoint holds beside weights: stage, groups and recipe; and which one a run may go on from."""

import json
import logging
import textwrap
from pathlib import Path

from transformers.trainer_utils import get_last_checkpoint

from .skill_config import SKILL_CONFIG_NAME, SkillConfig


logger = logging.getLogger(__name__)

SKILL_STATE_NAME = "skill_state.json"
TRAINER_STATE_NAME = "trainer_state.json"


def find_checkpoint(resume_from_checkpoint: str | bool | None, output_dir: str) -> str | None:
    """
    The checkpoint to go on from, or `None` to begin anew.

    Args:
        resume_from_checkpoint (`str` or `bool`, *optional*): a directory, or `True` for the last one in `output_dir`.
        output_dir (`str`): where the run's checkpoints are.

    Raises:
        `ValueError`: if there is none, or the directory is no checkpoint of `SkillDistillationTrainer`.
    """
    if not resume_from_checkpoint:
        return None
    if resume_from_checkpoint is True:
        checkpoint = last_complete_checkpoint(output_dir)
        if checkpoint is None:
            raise ValueError(f"There is no checkpoint to resume from in `{output_dir}`.")
        return checkpoint
    for name in (SKILL_STATE_NAME, SKILL_CONFIG_NAME, TRAINER_STATE_NAME):
        if not (Path(resume_from_checkpoint) / name).is_file():
            raise ValueError(
                f"`{resume_from_checkpoint}` is no checkpoint of SkillDistillationTrainer: it has no {name}."
            )
    return str(resume_from_checkpoint)


def write_skill_state(directory: str, state: dict) -> None:
    text = json.dumps(state, indent=1) + "\n"
    (Path(directory) / SKILL_STATE_NAME).write_text(text, encoding="utf-8")


def read_same_recipe(checkpoint: str, skill_config: SkillConfig, present: dict) -> dict:
    """
    The state that `write_skill_state` stored in `checkpoint`.

    Raises:
        `ValueError`: if its recipe, steps or teacher are not those of `skill_config` and `present`; each is named.
    """
    stored = SkillConfig.from_pretrained(checkpoint).to_dict()
    state = json.loads((Path(checkpoint) / SKILL_STATE_NAME).read_text(encoding="utf-8"))
    pairs = [(name, stored[name], value) for name, value in skill_config.to_dict().items()]
    pairs += [(name, state[name], present[name]) for name in ("steps", "teacher")]
    differing = [difference for pair in pairs for difference in _differences(*pair)]
    if differing:
        raise ValueError(f"`{checkpoint}` is of another recipe: {'; '.join(differing)}.")
    return state


def _differences(name: str, there, here) -> list[str]:
    """What differs between two values, entry by entry where both are dicts."""
    if isinstance(there, dict) and isinstance(here, dict):
        entries = [(f"{name}.{key}", there.get(key), here.get(key)) for key in there | here]
        return [difference for entry in entries for difference in _differences(*entry)]
    short = [textwrap.shorten(str(value), 100, placeholder=" ...") for value in (there, here)]
    return [] if there == here else [f"{name} ({short[0]} there, {short[1]} here)"]


def last_complete_checkpoint(output_dir: str) -> str | None:
    """The newest checkpoint whose last-written file is there; one that a kill left half-written is passed over."""
    found = []
    for state in Path(output_dir).glob(f"checkpoint-*/{TRAINER_STATE_NAME}"):
        step = state.parent.name.removeprefix("checkpoint-")
        if step.isdigit():
            found.append((int(step), str(state.parent)))
    newest = get_last_checkpoint(output_dir) if Path(output_dir).is_dir() else None
    last = max(found)[1] if found else None
    if newest is not None and newest != last:
        logger.warning("%s is incomplete and is passed over.", newest)
    return last
