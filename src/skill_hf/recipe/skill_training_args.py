"""`SkillTrainingArguments`: transformers' training arguments with the published recipe as defaults."""

import math
from dataclasses import dataclass

import torch
from transformers import TrainingArguments
from transformers.utils import is_torch_xla_available

from .argument_validation import check_arguments, launched_processes, one_line, refuse
from .fields import help_from_docstring
from .schedule import FULL_STEPS


FULL_LOGGING_STEPS = 50
CLIPS_PER_BATCH = 10
SHUFFLE_BUFFER = 500
LOG_LINES = 20  # that even a short run has, so that there is something to see


@help_from_docstring
@dataclass
class SkillTrainingArguments(TrainingArguments):
    r"""
    [`~transformers.TrainingArguments`] with the defaults of DPHuBERT's recipe (arXiv 2305.17651, section 3.1). Steps,
    warm-up and learning rate of the second stage are fields of [`SkillConfig`].

    > Changed defaults

    Args:
        max_steps (`int`, *optional*):
            Optimizer steps of both stages; -1 to use `num_train_epochs`. By default 75000, or epochs if
            `num_train_epochs` is set.
        num_train_epochs (`float`, *optional*):
            Passes over the data in both stages together, if `max_steps` is not set; 3 with a `max_steps` of -1.
        learning_rate (`float`, *optional*):
            Peak learning rate of the first stage; by default 2e-4, in runs of less than 7500 steps at least
            1 / (16 width (1 - target_sparsity)), with the width of the (first) teacher and a sparsity of at most
            0.95: 3.3e-4 for a Base model at 0.75. If its layers are pre-norm (`do_stable_layer_norm`), this is
            (2 (1 - target_sparsity))^-1/2 times as much above a sparsity of 0.5.
        warmup_steps (`float`, *optional*, defaults to 0.3):
            Share of the first stage's steps (below 1) or a number of steps.
        max_grad_norm (`float`, *optional*, defaults to 10.0):
            Maximum norm of the gradient; larger gradients are scaled down to it.
        logging_steps (`float`, *optional*):
            Optimizer steps between two log lines; by default 50, or fewer if a run would have less than 20 lines.
        per_device_train_batch_size (`int`, *optional*):
            Clips per batch and device, of any lengths and cropped to the shortest; by default 10, unless
            `seconds_per_batch` is set.
        save_total_limit (`int`, *optional*, defaults to 2):
            Checkpoints to keep, the last ones; None for all. One of WavLM Base+ in the first stage takes 1.1 GB.
        resume_from_checkpoint (`str`, *optional*):
            A checkpoint, `True` for the last complete one in `output_dir`, or `auto` for that one if there is one, and
            a new run otherwise: for a command that is repeated until the run has ended.

    > Of skill_hf

    Args:
        seconds_per_batch (`float`, *optional*):
            Most seconds of audio per batch and device: clips of similar length share a batch, as many as fit. With
            batches of a number of clips, cropping to the shortest loses about half of the audio.
        seconds_per_step (`float`, *optional*):
            Most seconds of audio per optimizer step on all devices together, 640 in the published recipe; sets
            `gradient_accumulation_steps`. A multiple of `seconds_per_batch` times the number of devices.
        shuffle_buffer (`int`, *optional*, defaults to 500):
            Rows of a stream that are shuffled together, and of which batches of `seconds_per_batch` are made, in each
            worker; it keeps twice as many.
        overwrite_output_dir (`bool`, *optional*, defaults to `False`):
            Whether a new run may start in an `output_dir` that contains another run, whose checkpoints are then
            removed.

    Raises:
        `ValueError`: if an argument is out of range, or a two-stage run cannot honour it.
    """

    max_steps: int | None = None
    num_train_epochs: float | None = None
    learning_rate: float | None = None
    warmup_steps: float = 0.3
    max_grad_norm: float = 10.0
    logging_steps: float | None = None
    per_device_train_batch_size: int | None = None
    seconds_per_batch: float | None = None
    seconds_per_step: float | None = None
    shuffle_buffer: int = SHUFFLE_BUFFER
    save_total_limit: int | None = 2
    resume_from_checkpoint: str | None = None
    overwrite_output_dir: bool = False

    def __post_init__(self):
        if self.max_steps is None:
            self.max_steps = FULL_STEPS if self.num_train_epochs is None else -1
        if self.num_train_epochs is None:
            self.num_train_epochs = 3.0
        if self.logging_steps is None:
            is_short = isinstance(self.max_steps, int) and 0 < self.max_steps < LOG_LINES * FULL_LOGGING_STEPS
            self.logging_steps = max(self.max_steps // LOG_LINES, 1) if is_short else FULL_LOGGING_STEPS
        if self.per_device_train_batch_size is None:
            self.per_device_train_batch_size = CLIPS_PER_BATCH if self.seconds_per_batch is None else 1
        elif self.seconds_per_batch is not None and self.per_device_train_batch_size != 1:
            refuse(
                "per_device_train_batch_size",
                self.per_device_train_batch_size,
                "`seconds_per_batch` is set, too; choose one",
            )
        if launched_processes() > 1 and not (torch.accelerator.is_available() or is_torch_xla_available()):
            # Else each process that torchrun starts would make a student of its own.
            self.use_cpu = True
        check_arguments(self)
        try:
            super().__post_init__()
        except Exception as error:  # of any type: what it converts and imports is of many libraries
            raise ValueError(f"The training arguments cannot be used: {one_line(error)}.") from error
        if self.seconds_per_step is not None:
            number = self._batches_per_step()
            if self.gradient_accumulation_steps not in (1, number):
                refuse(
                    "gradient_accumulation_steps",
                    self.gradient_accumulation_steps,
                    f"`seconds_per_step` makes it {number}; leave it out",
                )
            self.gradient_accumulation_steps = number

    def _batches_per_step(self) -> int:
        """Batches of each device in an optimizer step of `seconds_per_step`."""
        on_all = self.seconds_per_batch * self.world_size
        number = round(self.seconds_per_step / on_all)
        if number < 1 or not math.isclose(number * on_all, self.seconds_per_step, rel_tol=1e-6):
            refuse(
                "seconds_per_step",
                self.seconds_per_step,
                f"it must be a multiple of {on_all:g}: `seconds_per_batch` ({self.seconds_per_batch:g}) times"
                f" {self.world_size} devices",
            )
        return number
