"""`SkillTrainingArguments`: transformers' training arguments with the published recipe as defaults."""

from dataclasses import dataclass

from transformers import TrainingArguments

from .argument_validation import check_arguments, one_line
from .fields import help_from_docstring
from .skill_config import FULL_STEPS


FULL_LOGGING_STEPS = 50
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
        learning_rate (`float`, *optional*, defaults to 2e-4):
            Peak learning rate of the first stage.
        warmup_steps (`float`, *optional*, defaults to 0.3):
            Share of the first stage's steps (below 1) or a number of steps.
        max_grad_norm (`float`, *optional*, defaults to 10.0):
            Maximum norm of the gradient; larger gradients are scaled down to it.
        logging_steps (`float`, *optional*):
            Optimizer steps between two log lines; by default 50, or fewer if a run would have less than 20 lines.
        per_device_train_batch_size (`int`, *optional*, defaults to 10):
            Clips per step and device. The published recipe uses 640 s of audio per step in total: set
            `gradient_accumulation_steps` and the number of devices accordingly.
        save_total_limit (`int`, *optional*, defaults to 2):
            Checkpoints to keep, the last ones; None for all. One of WavLM Base+ in the first stage takes 1.1 GB.
        resume_from_checkpoint (`str`, *optional*):
            A checkpoint, `True` for the last complete one in `output_dir`, or `auto` for that one if there is one, and
            a new run otherwise: for a command that is repeated until the run has ended.

    > Of skill_hf

    Args:
        overwrite_output_dir (`bool`, *optional*, defaults to `False`):
            Whether a new run may start in an `output_dir` that contains another run, whose checkpoints are then
            removed.

    Raises:
        `ValueError`: if an argument is out of range, or a two-stage run cannot honour it.
    """

    max_steps: int | None = None
    num_train_epochs: float | None = None
    learning_rate: float = 2e-4
    warmup_steps: float = 0.3
    max_grad_norm: float = 10.0
    logging_steps: float | None = None
    per_device_train_batch_size: int = 10
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
        check_arguments(self)
        try:
            super().__post_init__()
        except Exception as error:  # of any type: what it converts and imports is of many libraries
            raise ValueError(f"The training arguments cannot be used: {one_line(error)}.") from error
