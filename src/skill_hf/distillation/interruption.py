"""Ctrl-C and SIGTERM while training: the step ends, a checkpoint is written, and the run says how to resume."""

import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import SaveStrategy

from ..distribution import stacked
from .checkpointing import how_to_resume


logger = logging.getLogger(__name__)

# The exit code that means "try again" in sysexits.h (EX_TEMPFAIL).
TRY_AGAIN = 75
# What a launcher that got Ctrl-C passes on to its processes is no second Ctrl-C.
SECOND_AFTER = 1.0  # seconds


class Terminated(SystemExit):
    """
    SIGTERM, as schedulers send it before they take a machine away: unless it is caught, it ends the process with exit
    code 75, by which they can tell that the same command goes on where this run has stopped.
    """

    def __init__(self, message: str):
        super().__init__(TRY_AGAIN)
        self.message = message

    def __str__(self) -> str:
        return self.message


class Interruption(TrainerCallback):
    """
    Handles SIGINT and SIGTERM during `train()`. In a stage, the current step and an evaluation that is due are
    completed, a checkpoint is written, and training stops on all processes, whichever received the signal. In
    calibration and before the first step it stops at once, and so does a second Ctrl-C. Handlers set by the user are
    not replaced.

    Args:
        trainer ([`SkillDistillationTrainer`]): the trainer to interrupt.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        self.signal, self._signalled_at = 0, 0.0
        self.is_deferred = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Raises `KeyboardInterrupt` or [`Terminated`], with how to resume, for signals received in this context."""
        replaced = {}
        self.signal, self.is_deferred = 0, False
        try:
            if threading.current_thread() is threading.main_thread():
                for number in (signal.SIGINT, signal.SIGTERM):
                    if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                        replaced[number] = signal.signal(number, self._handle)
            yield
        except KeyboardInterrupt as error:
            if error.args:  # says how to resume already
                raise
            self._raise(signal.SIGINT, error)
        except RuntimeError as error:
            if not self.signal:
                raise
            # The signal went to all of the run's processes: data workers or other ranks have ended.
            self._raise(self.signal, error)
        finally:
            self.is_deferred = False
            for number, handler in replaced.items():
                signal.signal(number, handler)

    def _handle(self, number, frame) -> None:
        now = time.monotonic()
        if not self.is_deferred or (
            self.signal and number == signal.SIGINT and now - self._signalled_at > SECOND_AFTER
        ):
            self._raise(number)
        if not self.signal:
            self.signal, self._signalled_at = number, now
            logger.warning("%s: training stops after this step.", signal.Signals(number).name)

    def _raise(self, number: int, cause: BaseException | None = None):
        message = f"Interrupted at step {self.trainer.state.global_step}. " + how_to_resume(
            self.trainer.args.output_dir
        )
        logger.warning(message)
        if number == signal.SIGTERM:
            raise Terminated(message) from cause
        raise KeyboardInterrupt(message) from cause

    def _agree(self) -> int:
        """The signal that any of the processes received."""
        signal = torch.tensor(self.signal, device=self.trainer.args.device)
        self.signal = int(stacked(self.trainer.accelerator, signal).max())
        return self.signal

    def raise_if_requested(self) -> None:
        """Raises on all processes if a signal was received."""
        if self._agree():
            self._raise(self.signal)

    def on_step_begin(self, args, state, control, **kwargs):
        self.is_deferred = True

    def on_step_end(self, args, state, control, **kwargs):
        if self._agree():
            # As it is written to resume from, whatever the user wants checkpoints for; `args` are this stage's own.
            args.save_strategy = SaveStrategy.STEPS
            control.should_save = control.should_training_stop = True
