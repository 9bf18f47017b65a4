"""
Shrinking during training: every few steps, stage 1 removes units that are closed for good from the student, its gates
and the optimizer's state, and continues with the smaller student.

This happens in place, between two steps of the Trainer's loop, and depends only on the gates: the loop continues, no
data is read again, and a run resumed from a checkpoint before or after it does the same. Where FSDP divides the
parameters, they are first made whole: the loop ends, and goes on from a checkpoint of the smaller student.
"""

import logging

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from transformers import TrainerCallback

from ..compression import pruning
from ..distribution import rebuild_data_parallel, whole


logger = logging.getLogger(__name__)


class ShrinkCallback(TrainerCallback):
    """
    Shrinks the student of `trainer` every `shrink_steps` optimizer steps of stage 1. Weights stored by other
    callbacks, such as an average, and hooks on the student's layers are not updated.

    Args:
        trainer ([`SkillDistillationTrainer`]): a trainer with `shrink_steps` in its recipe.

    Attributes:
        waiting (`tuple`, *optional*): what optimizer and schedule have come to, where the Trainer's loop must end
            before the student can be shrunk.

    Raises:
        `ValueError`: if its optimizer does not allow it.
    """

    def __init__(self, trainer):
        trainer.check_optimizer("`shrink_steps`", "set it to 0")
        self.trainer = trainer
        self.waiting: tuple[dict, dict] | None = None

    def on_step_end(self, args, state, control, **kwargs):
        trainer = self.trainer
        # At the last step of stage 1 the cut itself follows.
        within = trainer.stage == 1 and state.global_step < trainer.steps.joint
        if not within or state.global_step % trainer.skill_config.shrink_steps:
            return
        if not trainer.divides_parameters:
            shrink(trainer)
        elif is_due(trainer):
            optimizer = whole(trainer.optimizer.state_dict(), args.should_save)
            self.waiting = (optimizer, trainer.lr_scheduler.state_dict())
            control.should_training_stop = True


def is_due(trainer) -> bool:
    """Whether there are units to remove."""
    student, costs = trainer.student.base_model, trainer.distiller.costs
    return pruning.closed_for_good(student, trainer.target_cost, costs) is not None


def shrink_whole(trainer, optimizer: dict, schedule: dict) -> None:
    """
    Shrinks the student after the Trainer's loop has ended and the student is whole again, and writes a checkpoint.

    Args:
        trainer ([`SkillDistillationTrainer`]): between two loops.
        optimizer, schedule (`dict`): states at the end of the loop, whole on the processes that save.
    """
    trainer.optimizer = AcceleratedOptimizer(trainer.make_optimizer(trainer.model), device_placement=False)
    trainer.lr_scheduler = trainer.create_scheduler(trainer.steps.joint, trainer.optimizer)
    trainer.lr_scheduler.load_state_dict(schedule)
    if trainer.args.should_save:
        trainer.optimizer.load_state_dict(optimizer)
    shrink(trainer)
    trainer._save_checkpoint(trainer.model, trial=None)


def cut_optimizer_state(
    optimizer: torch.optim.Optimizer, before: dict[str, nn.Parameter], student: nn.Module, cut: pruning.Cut
) -> None:
    """
    Replaces the parameters of an optimizer by the remaining ones, with the remaining part of their state.

    Args:
        optimizer (`torch.optim.Optimizer`): optimizer of the student's parameters and others, which are unchanged.
        before (`dict[str, nn.Parameter]`): the student's named parameters before `cut`.
        student (`nn.Module`): the student after `cut`.
        cut ([`~skill_hf.compression.pruning.Cut`]): the result of [`~skill_hf.compression.pruning.cut_closed_units`].
    """
    after = dict(student.named_parameters())
    successors = {parameter: after.get(cut.name_of(name)) for name, parameter in before.items()}
    for name, parameter in before.items():
        state, successor = optimizer.state.pop(parameter, None), successors[parameter]
        if state is not None and successor is not None:
            optimizer.state[successor] = {
                key: cut.tensor(name, value) if getattr(value, "shape", None) == parameter.shape else value
                for key, value in state.items()
            }
    for group in optimizer.param_groups:
        remaining = [successors.get(parameter, parameter) for parameter in group["params"]]
        group["params"] = [parameter for parameter in remaining if parameter is not None]


def shrink(trainer) -> None:
    """Removes units that are closed for good from the student, its distiller and its optimizer, between two steps."""
    trainer.finite_watch.check()
    student, budget, step = trainer.student.base_model, trainer.budget, trainer.state.global_step
    before, size = dict(student.named_parameters()), pruning.num_parameters(student)
    cut = pruning.cut_closed_units(student, trainer.target_cost, trainer.distiller.costs)
    if cut is None:
        return
    if trainer.args.torch_compile:
        torch.compiler.reset()  # or what was compiled for larger students would count against torch's limit
    trainer.distiller.costs = budget.unit_costs(trainer.student)
    # accelerate wraps the optimizer
    cut_optimizer_state(getattr(trainer.optimizer, "optimizer", trainer.optimizer), before, student, cut)
    rebuild_data_parallel(trainer.model_wrapped, trainer.accelerator)
    logger.info(
        "Step %d: permanently closed units are cut, %s parameters become %s",
        step,
        f"{size:,}",
        f"{pruning.num_parameters(student):,}",
    )
