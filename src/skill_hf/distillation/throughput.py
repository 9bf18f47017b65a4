"""How much audio training takes, and how long it waits for it: for logs and the progress bar."""

import time
from collections.abc import Iterator

import psutil
import torch
from transformers import ProgressCallback, TrainerCallback

from ..distribution import gathered


# Log entries that differ between two runs of the same steps.
TIMINGS = ("audio_hours_per_hour", "data_wait_share", "memory_gib")


class Throughput(TrainerCallback):
    """
    Measures optimizer steps, without evaluation and checkpoints. A log line has, since the line before and over all
    processes: `audio_seconds_per_step`, without padding; `audio_hours_per_hour`; `data_wait_share`, the share of the
    time of a step in which a process waits for its batches; and `memory_gib` of the process with the most, on a GPU
    the peak of tensors since the start, otherwise what it takes now.

    Args:
        trainer ([`~skill_hf.distillation.distillation_trainer.DistillationTrainer`]): the trainer to measure.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        self.reset()

    def on_train_begin(self, args, state, control, **kwargs):
        self.reset()

    def reset(self) -> None:
        """Starts anew, at the start of a stage or after a log line."""
        self._samples = torch.zeros((), dtype=torch.int64)
        self._num_steps = 0
        self._waited = self._took = 0.0
        self._step_began: float | None = None

    def timed(self, batches: Iterator) -> Iterator:
        """The same batches; the time until each is there counts as waiting. A step begins with its first batch."""
        began = self._step_began = time.perf_counter()
        for batch in batches:
            self._waited += time.perf_counter() - began
            yield batch
            began = time.perf_counter()

    def note(self, lengths: torch.Tensor) -> None:
        """Counts the valid samples of the clips of a step, by their numbers of samples."""
        self._samples = self._samples.to(lengths.device) + lengths.sum()

    def on_step_end(self, args, state, control, **kwargs):
        if self._step_began is not None:
            self._took += time.perf_counter() - self._step_began
            self._num_steps += 1
            self._step_began = None

    def means(self) -> dict[str, float]:
        """Entries for a log line; empty if there was no step since the one before."""
        accelerator = self.trainer.accelerator
        own = (self._samples.item(), self._waited, self._took, self._memory())
        *sums, memory = zip(*gathered(accelerator, own), strict=True)
        samples, waited, took = map(sum, sums)
        num_steps = self._num_steps
        self.reset()
        if not num_steps or not took:
            return {}
        seconds = samples / self.trainer.processing_class.sampling_rate
        return {
            "audio_seconds_per_step": seconds / num_steps,
            "audio_hours_per_hour": seconds / (took / accelerator.num_processes),
            "data_wait_share": waited / took,
            "memory_gib": max(memory) / 2**30,
        }

    def _memory(self) -> int:
        device = self.trainer.args.device
        if device.type == "cuda":
            return torch.cuda.max_memory_allocated(device)
        return psutil.Process().memory_info().rss

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not logs or "data_wait_share" not in logs:
            return
        text = f"{logs['audio_hours_per_hour']:.0f} h of audio an hour, {logs['data_wait_share']:.0%} waiting for it"
        for callback in self.trainer.callback_handler.callbacks:
            bar = getattr(callback, "training_bar", None)
            if isinstance(callback, ProgressCallback) and bar is not None:
                bar.set_postfix_str(text)
