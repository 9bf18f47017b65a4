"""Clips that can no longer be read: counts them, and ends a run with too many."""

import torch

from ..data.audio import AudioError
from ..data.speech_datasets import MAX_BAD_SHARE
from ..distribution import stacked
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
        self._num_read = torch.zeros((), dtype=torch.int64)  # clips in batches since then

    @property
    def num_skipped(self) -> int:
        """Number of clips left out of training batches so far, in this process."""
        return getattr(self.trainer.data_collator, "num_skipped", 0)

    def reset(self) -> None:
        """Starts counting; called at the start of a stage."""
        self._judged = (self.trainer.state.global_step, self.num_skipped)
        self._num_read = torch.zeros((), dtype=torch.int64)

    def note(self, lengths: torch.Tensor) -> None:
        """Counts clips that were read, by their numbers of samples; 0 stands for a batch that could not be read."""
        self._num_read = self._num_read.to(lengths.device) + (lengths > 0).sum()

    def check(self) -> None:
        """Raises an `AudioError` on all processes if too many clips since the last check cannot be read."""
        trainer = self.trainer
        steps = trainer.state.global_step - self._judged[0]
        skipped = self.num_skipped - self._judged[1]
        counts = torch.stack([self._num_read, self._num_read + skipped]).to(trainer.args.device)
        # All processes continue or end.
        num_read, num_tried = stacked(trainer.accelerator, counts).sum(0).tolist()
        if num_tried < CLIPS_JUDGED:
            return
        self.reset()
        share = 1 - num_read / num_tried
        if share > MAX_BAD_SHARE:
            raise AudioError(
                f"{100 * share:.0f} % of the clips of the last {steps} steps cannot be read; the warnings above name"
                f" them. {how_to_resume(trainer.args.output_dir)}"
            )
