"""
Shrinking during training: every few steps, stage 1 removes units that are closed for good from the student, its gates
and the optimizer's state, and continues with the smaller student.

This happens between two steps and depends only on the gates: a run resumed from a checkpoint before or after it does
the same. It happens in place and the Trainer's loop continues, except where FSDP divides the parameters: then the loop
ends, so that they are whole, and another one goes on from a checkpoint of the smaller student.
"""

import logging
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DynamoBackend
from torch import nn
from transformers import TrainerCallback, TrainerControl

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
        is_due (`bool`): whether the Trainer's loop must end after this step, since the student has to be whole.
        ended (`LoopState`, *optional*): what the loop has come to, until the student is shrunk.

    Raises:
        `ValueError`: if its optimizer does not allow it.
    """

    def __init__(self, trainer):
        trainer.check_optimizer("`shrink_steps`", "set it to 0")
        self.trainer = trainer
        self.is_due, self.ended = False, None

    def on_train_begin(self, args, state, control, **kwargs):
        self.is_due, self.ended = False, None

    def on_step_end(self, args, state, control, **kwargs):
        trainer = self.trainer
        # At the last step of stage 1 the cut itself follows.
        within = trainer.stage == 1 and state.global_step < trainer.steps.joint
        if not within or state.global_step % trainer.skill_config.shrink_steps:
            return
        if trainer.divides_parameters:
            kept = pruning.units_to_keep(trainer.student.base_model, trainer.target_cost, trainer.distiller.costs)
            self.is_due = kept is not None
        else:
            shrink(trainer)

    def before_evaluation(self, control: TrainerControl) -> None:
        """Before the Trainer logs, evaluates and saves, at the end of a step or epoch: the checkpoint comes later."""
        if self.is_due:
            control.should_save = False
        if self.ended and not float(self.trainer.state.epoch).is_integer():
            # The epoch has not ended, only the loop.
            control.should_log = control.should_evaluate = False

    def after_evaluation(self, control: TrainerControl) -> None:
        """Ends the loop if the student is to be shrunk."""
        if not self.is_due or self.ended:
            return
        trainer = self.trainer
        self.ended = LoopState(
            optimizer=whole(trainer.optimizer.state_dict(), trainer.args.should_save),
            schedule=trainer.lr_scheduler.state_dict(),
            is_last=control.should_training_stop,
        )
        control.should_training_stop = True

    def shrink_whole(self) -> tuple[str, bool]:
        """
        After the loop has ended and the student is whole again: shrinks it and writes a checkpoint. Returns the
        checkpoint, and whether training was to stop there in any case.
        """
        trainer, ended = self.trainer, self.ended
        self.is_due, self.ended = False, None
        trainer.optimizer = AcceleratedOptimizer(trainer.make_optimizer(trainer.model), device_placement=False)
        trainer.lr_scheduler = trainer.create_scheduler(trainer.steps.joint, trainer.optimizer)
        trainer.lr_scheduler.load_state_dict(ended.schedule)
        if trainer.args.should_save:
            trainer.optimizer.load_state_dict(ended.optimizer)
        shrink(trainer)
        trainer.control.should_training_stop = False  # it is part of the checkpoint
        trainer._save_checkpoint(trainer.model, trial=None)
        trainer.control = trainer.callback_handler.on_save(trainer.args, trainer.state, trainer.control)
        return str(Path(trainer.args.output_dir) / f"checkpoint-{trainer.state.global_step}"), ended.is_last


class LoopState(NamedTuple):
    """States of optimizer and schedule, whole on the processes that save, and whether no other loop is to follow."""

    optimizer: dict
    schedule: dict
    is_last: bool


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
    if trainer.accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
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
