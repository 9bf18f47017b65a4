"""Measures the student before the cut, after it and at the end of a run."""

import logging
from functools import cached_property

import torch

from ..data.collator import calibration_waveforms, sample_rows
from ..grouping.layer_distances import layer_distances
from ..models.model_modes import padding_ignored


logger = logging.getLogger(__name__)

# Clips that the student is measured on.
CLIPS_MEASURED = 32


class StudentMeasurements:
    """
    Measures the student of `trainer` on some clips and stores the results in `trainer.record`; only on the first
    process.

    Args:
        trainer ([`SkillDistillationTrainer`]): the trainer whose student is measured.
    """

    def __init__(self, trainer):
        self.trainer = trainer

    @cached_property
    def rows(self) -> list:
        """Rows of some clips: held-out clips if there are any, otherwise training clips."""
        heldout = self.trainer.eval_dataset
        heldout = next(iter(heldout.values()), None) if isinstance(heldout, dict) else heldout
        source = self.trainer.calibration_dataset if heldout is None else heldout
        rows = sample_rows(source, CLIPS_MEASURED, self.trainer.args.seed)
        self.trainer.record.measured_on = f"{len(rows)} {'training' if heldout is None else 'held-out'} clips"
        return rows

    @torch.no_grad()
    def loss(self, moment: str) -> None:
        """Records the student's current loss in eval mode; `moment` is one of `run_record.MOMENTS`."""
        if not self.trainer.is_world_process_zero():
            return
        trainer, size = self.trainer, self.trainer.args.per_device_eval_batch_size
        losses = trainer.new_held_out_losses()
        trainer.distiller.eval()
        for start in range(0, len(self.rows), size):
            batch = trainer._prepare_inputs(trainer.eval_data_collator(self.rows[start : start + size]))
            with padding_ignored(*trainer.encoders), trainer.accelerator.autocast():
                _, outputs = trainer.compute_loss(trainer.distiller, batch, return_outputs=True)
            losses.add(outputs)
        means = losses.means()
        if "distillation_loss" in means:  # otherwise not one of the clips can be read
            trainer.record.losses[moment] = {
                "distillation_loss": means["distillation_loss"],
                "cosine_similarity": -means["cosine_loss"],
            } | {name: means[name] for name in trainer.head_losses if name in means}

    def distances(self) -> None:
        """Records the distance between student and teacher at every layer."""
        if not self.trainer.is_world_process_zero():
            return
        trainer, seconds = self.trainer, self.trainer.skill_config.calibration_seconds
        clips = calibration_waveforms(self.rows, len(self.rows), seconds, trainer.args.seed, **trainer.reading)
        progress = not trainer.args.disable_tqdm
        try:
            distances = layer_distances(
                trainer.teachers[0].encoder, trainer.student.base_model, clips, progress=progress
            )
        except ValueError as error:  # hidden states that do not vary have no distance
            logger.warning("Distances between student and teacher were not measured: %s", error)
            return
        trainer.record.layer_distances = {measure: values.tolist() for measure, values in distances.items()}
