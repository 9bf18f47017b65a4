"""Several target sparsities of one command: a student of each, which the next one starts from."""

from pathlib import Path

import torch

from ..distillation.checkpointing import AUTO, has_begun, has_mark, make_room
from ..distillation.recipe_validation import validate_recipe
from ..distillation.skill_trainer import SkillDistillationTrainer
from ..distribution import on_all_processes
from ..files import keep_sources
from ..recipe.skill_training_args import SkillTrainingArguments


def chain(students: list[tuple]) -> list[tuple]:
    """
    Gives each student a folder of its own in `output_dir`, a repository of its own on the Hub, and the student before
    it as its start. With one student, nothing changes.

    Args:
        students (`list[tuple]`): for each sparsity, an object of each of the settings' classes.

    Raises:
        `ValueError`: if the sparsities do not rise, or one checkpoint is to be resumed.
    """
    if len(students) == 1:
        return students
    sparsities = [skill_config.target_sparsity for _, _, skill_config, _ in students]
    if any(later <= earlier for earlier, later in zip(sparsities, sparsities[1:], strict=False)):
        raise ValueError(
            "The values of `target_sparsity` must rise, as each student starts from the one before, but are"
            f" {', '.join(map(str, sparsities))}."
        )
    start = students[0][0].student_name_or_path
    for model_args, _, skill_config, training_args in students:
        if resume_setting(training_args) not in (None, True, AUTO):
            raise ValueError(
                f"`resume_from_checkpoint` is {training_args.resume_from_checkpoint}, but each sparsity has its own"
                f" checkpoints; pass True or {AUTO}."
            )
        output_dir, folder = Path(training_args.output_dir), f"sparsity-{skill_config.target_sparsity}"
        training_args.hub_model_id = f"{training_args.hub_model_id or output_dir.absolute().name}-{folder}"
        training_args.output_dir = str(output_dir / folder)
        model_args.student_name_or_path, start = start, training_args.output_dir
    return students


def resume_setting(training_args: SkillTrainingArguments) -> str | bool | None:
    """A checkpoint, `True` for the last one, or `AUTO`; `True` is text on a command line."""
    resume = training_args.resume_from_checkpoint
    return {"true": True, AUTO: AUTO}.get(str(resume).lower(), resume)


def check_later(trainer: SkillDistillationTrainer, later: list[tuple]) -> None:
    """
    Checks before the first student is trained what the others need, and makes room for them.

    Raises:
        `ValueError`: if a sparsity cannot be reached, or a folder contains another run, the teacher or the start.
    """
    with torch.random.fork_rng(devices=[]):  # gates are drawn there; the first student's must not depend on it
        for _, _, skill_config, _ in later:
            validate_recipe(skill_config, trainer.teacher, trainer.model, trainer.processing_class.sampling_rate)

    def make_all_room() -> None:
        start = trainer.args.output_dir
        for _, _, _, args in later:
            keep_sources(args.output_dir, trainer.sources)
            # What began before its start was finished began from another one.
            if not (resume_setting(args) and has_mark(start) and has_begun(args.output_dir)):
                make_room(args.output_dir, args.overwrite_output_dir)
            start = args.output_dir

    on_all_processes(trainer.accelerator, make_all_room, needed=trainer.args.should_save)
