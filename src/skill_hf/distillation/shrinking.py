"""
Shrinking during training: every few steps, stage 1 removes units that are closed for good from the student, its gates
and the optimizer's state, and continues with the smaller student.

This happens in place, between two steps of the Trainer's loop, and depends only on the gates: the loop continues, no
data is read again, and a run resumed from a checkpoint before or after it does the same.
"""

import logging

import torch
from torch import nn
from transformers import TrainerCallback

from ..compression import pruning
from ..distribution import rebuild_data_parallel


logger = logging.getLogger(__name__)


class ShrinkCallback(TrainerCallback):
    """
    Shrinks the student of `trainer` every `shrink_steps` optimizer steps of stage 1. Weights stored by other
    callbacks, such as an average, and hooks on the student's layers are not updated.

    Args:
        trainer ([`SkillDistillationTrainer`]): a trainer with `shrink_steps` in its recipe.

    Raises:
        `ValueError`: if its optimizer or its kind of distributed training does not allow it.
    """

    def __init__(self, trainer):
        if trainer.divides_parameters:
            raise ValueError(
                "`shrink_steps` needs whole parameters, but FSDP divides them among processes: use data parallelism"
                " only, or set it to 0."
            )
        trainer.check_optimizer("`shrink_steps`", "set it to 0")
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        # At the last step of stage 1 the cut itself follows.
        within = self.trainer.stage == 1 and state.global_step < self.trainer.steps.joint
        if within and state.global_step % self.trainer.skill_config.shrink_steps == 0:
            shrink(self.trainer)


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
