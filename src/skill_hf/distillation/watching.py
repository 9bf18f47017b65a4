"""Pictures for trackers while stage 1 runs: what the gates would leave of each layer now."""

import logging
from collections.abc import Callable

import numpy as np
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.integrations.integration_utils import TrackioCallback

from ..compression.pruning import config_after_pruning
from ..publishing.plots import plot_architecture


logger = logging.getLogger(__name__)

# Of a first stage, at equal distances.
NUM_PICTURES = 10
NAME = "architecture"


def _to_tensorboard(tracker: TensorBoardCallback, picture: np.ndarray, step: int) -> None:
    if tracker.tb_writer is not None:
        tracker.tb_writer.add_image(NAME, picture, step, dataformats="HWC")


def _to_trackio(tracker: TrackioCallback, picture: np.ndarray, step: int) -> None:
    trackio = tracker._trackio
    trackio.log({NAME: trackio.Image(picture), "train/global_step": step})


# What takes pictures, of what `report_to` can name. A picture is `(height, width, 3)`, uint8.
TRACKERS: dict[type[TrainerCallback], Callable] = {
    TensorBoardCallback: _to_tensorboard,
    TrackioCallback: _to_trackio,
}


class ArchitectureCallback(TrainerCallback):
    """
    Sends the remaining units of each layer, as the model card shows them, to the trackers of `trainer` that take
    pictures. Without such a tracker, or without matplotlib, it does nothing.

    Args:
        trainer ([`SkillDistillationTrainer`]): the trainer.
    """

    def __init__(self, trainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        trainer, joint = self.trainer, self.trainer.steps.joint
        due = state.global_step % max(joint // NUM_PICTURES, 1) == 0 and state.global_step < joint
        if trainer.stage != 1 or not due or not state.is_world_process_zero:
            return
        trackers = [tracker for tracker in trainer.callback_handler.callbacks if type(tracker) in TRACKERS]
        if not trackers:
            return
        try:
            picture = draw(config_after_pruning(trainer.student.base_model), trainer.teachers[0].config)
        except ImportError as error:
            logger.info("No pictures are sent to trackers. %s", error)
            trainer.remove_callback(self)
            return
        for tracker in trackers:
            TRACKERS[type(tracker)](tracker, picture, state.global_step)


def draw(config, teacher_config) -> np.ndarray:
    """[`~skill_hf.publishing.plots.plot_architecture`] as pixels, `(height, width, 3)`, uint8."""
    figure = plot_architecture(config, teacher_config)
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
