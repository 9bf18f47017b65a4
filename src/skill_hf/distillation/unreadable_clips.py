"""Clips that can no longer be read: counts them, and ends a run with too many."""

import torch

from ..data.audio import AudioError
from ..data.speech_datasets import MAX_BAD_SHARE
from .checkpointing import how_to_resume


# Clips of training after which the share of those that cannot be read is judged.
CLIPS_JUDGED = 256


class UnreadableClips:
    """
    Ends a run if most of its clips can no longer be read: it would continue to train on silence.

    Args:
        trainer ([`SkillDistillationTrainer`]): a trainer whose collator counts skipped clips.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        self._judged = (0, 0)  # step and clips left out, when the share was last judged

    @property
    def num_skipped(self) -> int:
        """Number of clips left out of training batches so far, in this process."""
        return getattr(self.trainer.data_collator, "num_skipped", 0)

    def reset(self) -> None:
        """Starts counting; called at the start of a stage."""
        self._judged = (self.trainer.state.global_step, self.num_skipped)

    def check(self) -> None:
        """Raises an `AudioError` on all processes if too many clips since the last check cannot be read."""
        trainer = self.trainer
        step, skipped = trainer.state.global_step, self.num_skipped
        steps = step - self._judged[0]
        clips = steps * trainer.args.train_batch_size * trainer.args.gradient_accumulation_steps
        if clips < CLIPS_JUDGED:
            return
        share = (skipped - self._judged[1]) / clips
        self._judged = (step, skipped)
        if trainer.accelerator.num_processes > 1:  # all of them continue or end
            share = trainer.accelerator.gather(torch.tensor([share], device=trainer.args.device)).mean().item()
        if share > MAX_BAD_SHARE:
            raise AudioError(
                f"{100 * share:.0f} % of the clips of the last {steps} steps cannot be read; the warnings above name"
                f" them. {how_to_resume(trainer.args.output_dir)}"
            )
