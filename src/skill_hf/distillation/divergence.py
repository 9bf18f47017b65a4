"""
Detects NaN and infinity in losses, gradients and weights, without waiting for the device in each step (but for the
scale of float16).
"""

import torch
from torch import nn
from transformers import TrainerCallback

from ..distribution import gathered, own_part, stacked
from .checkpointing import last_checkpoint_to


# A gradient scaler halves its scale in each step that it skips: from 2**16 it gets to 2**-4. What is not finite then
# is not so because of the scale.
MOST_SKIPPED = 20


class NonFiniteError(ValueError):
    """The run diverged: the step, what is NaN or infinite, and the last checkpoint before it."""


class FiniteWatch(TrainerCallback):
    """
    Records in each optimizer step, on the device, which loss terms are not finite, and whether the gradient is.
    `check` reads these records: at each log line, before each checkpoint, before the student shrinks, and at the end
    of a stage.

    Steps that a gradient scaler skips because they overflowed in float16 do not count, unless there are `MOST_SKIPPED`
    in a row.

    Args:
        trainer ([`SkillDistillationTrainer`]): the trainer whose steps are watched.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        self.reset()

    def reset(self) -> None:
        """Forgets all steps; called at the start of a stage."""
        shape, device = (len(self.trainer.training_losses) + 1,), self.trainer.args.device
        self._now = torch.zeros(shape, dtype=torch.bool, device=device)
        self._first = torch.full(shape, -1, dtype=torch.long, device=device)
        self._skipped = 0
        self._scale = self._gradient_scale()

    def note_terms(self, outputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Records whether all loss terms of a micro-batch are finite; returns it as a boolean scalar."""
        losses = [outputs[name].detach().float().reshape(()) for name in self.trainer.training_losses]
        finite = torch.stack(losses).isfinite()
        self._now[: len(finite)] |= ~finite
        return finite.all()

    def note_gradient(self, norm: torch.Tensor | float | None) -> None:
        if norm is not None:
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
            norm = torch.as_tensor(norm, dtype=torch.float32, device=self._now.device)
            self._now[-1] |= ~norm.detach().reshape(()).isfinite()

    def _gradient_scale(self) -> float:
        scaler = self.trainer.accelerator.scaler
        return 1.0 if scaler is None else scaler.get_scale()

    def on_train_begin(self, args, state, control, **kwargs):
        self._scale = self._gradient_scale()

    def on_optimizer_step(self, args, state, control, **kwargs):
        # A scaler lowers its scale after each step that is skipped. accelerate's `optimizer_step_was_skipped` knows
        # nothing of fused optimizers, which skip steps themselves.
        before, self._scale = self._scale, self._gradient_scale()
        if self._scale < before:
            self._skipped += 1
        else:
            self._skipped = 0
            self._first = torch.where((self._first < 0) & self._now, state.global_step + 1, self._first)
        self._now = torch.zeros_like(self._now)

    def check(self, weights: bool = True) -> None:
        """
        Raises a [`NonFiniteError`] on all processes if something was not finite in a step that counts.

        Args:
            weights (`bool`, *optional*, defaults to `True`): whether to check the weights as well.
        """
        trainer = self.trainer
        first = stacked(trainer.accelerator, self._first)
        events = [(step, index) for steps in first.tolist() for index, step in enumerate(steps) if step >= 0]
        step = trainer.state.global_step
        if events:
            step, _ = min(events)
            quantities = (*trainer.training_losses, "gradient norm")
            names = sorted({quantities[index] for event_step, index in events if event_step == step})
            what = " and ".join(name.replace("_", " ") for name in names)
            raise NonFiniteError(self._message(step, f"the {what} became NaN or infinite"))
        most = min(MOST_SKIPPED, trainer.args.max_steps)
        if self._skipped >= most:
            raise NonFiniteError(
                self._message(step, f"the last {self._skipped} steps overflowed in float16 and were skipped")
            )
        if not weights:
            return
        names = gathered(trainer.accelerator, first_non_finite(trainer.distiller))
        name = next(filter(None, names), None)
        if name is not None:
            raise NonFiniteError(self._message(step, f"{name} contains NaN or infinite values"))

    def _message(self, step: int, what: str) -> str:
        checkpoint = last_checkpoint_to(self.trainer.args.output_dir, step - 1)
        safe, start = "There is no checkpoint before it.", "Start again"
        if checkpoint:
            # The settings of a run cannot change when it resumes, so it would repeat the same steps.
            safe = f"The last good checkpoint is `{checkpoint}`."
            start = "Resume from it if the cause was outside the run, or start again"
        cure = "a smaller learning rate"
        if self.trainer.accelerator.mixed_precision == "fp16":
            cure += " or bf16 instead of fp16"
        return f"Step {step}: {what}. Training has ended, and nothing was saved. {safe} {start} with {cure}."


def first_non_finite(model: nn.Module) -> str | None:
    """The first parameter that contains NaN or an infinite value, in this process's part of it, if there is one."""
    named = [(name, own_part(parameter)) for name, parameter in model.named_parameters()]
    named = [(name, parameter) for name, parameter in named if parameter.numel()]
    if not named:
        return None
    finite = torch.stack([parameter.detach().isfinite().all() for _, parameter in named]).tolist()
    return next((name for (name, _), is_finite in zip(named, finite, strict=True) if not is_finite), None)


def refuse_non_finite(student: nn.Module) -> None:
    """Raises a [`NonFiniteError`] if a student to be saved has NaN or infinite weights."""
    name = first_non_finite(student)
    if name is not None:
        raise NonFiniteError(
            f"The student is not saved: its {name} contains NaN or infinite values. Train again with a smaller"
            " learning rate."
        )
