"""Students and distillers that are built anew: as a checkpoint describes them, or whole again after FSDP."""

from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedConfig

from ..compression import pruning
from ..distribution import copy_whole
from ..grouping.calibration import Calibration
from ..publishing.run_record import RunRecord
from .checkpoint_validation import SKILL_STATE_NAME, read_json, read_student_config


def restore(trainer, checkpoint: str) -> None:
    """Gives `trainer` groups, stage and shapes of a checkpoint; the Trainer loads the weights."""
    state = read_json(Path(checkpoint) / SKILL_STATE_NAME)
    trainer.layer_groups = state["layer_groups"]
    similarity = state.get("layer_similarity")
    trainer.layer_similarity = None if similarity is None else np.array(similarity)
    trainer.other_calibrations = [Calibration.from_dict(other) for other in state.get("other_teachers", [])]
    trainer.record = RunRecord.from_dict(state.get("record", {}))
    trainer.stage = state["stage"]
    config = read_student_config(Path(checkpoint), trainer.student.config)
    config._attn_implementation = trainer.student.config._attn_implementation
    _build(trainer, config)


def reunite(trainer) -> None:
    """Gives every process the whole student and the whole teachers again, after a stage with FSDP."""
    divided = trainer.distiller.state_dict()
    # What only training needs would take as much memory as the student.
    for owner in (trainer, trainer.callback_handler):
        owner.optimizer = owner.lr_scheduler = None
    trainer.accelerator.free_memory()
    _build(trainer, trainer.student.config)
    copy_whole(divided, trainer.distiller.state_dict())
    trainer.model = trainer.model_wrapped = trainer.callback_handler.model = trainer.distiller
    for teacher in trainer.teachers:
        teacher.reunite(trainer.args.device)


def _build(trainer, config: PreTrainedConfig) -> None:
    """A student of `config`, with what the current one is trained of and the gates of the stage, and its distiller."""
    trainable = {name: parameter.requires_grad for name, parameter in trainer.student.named_parameters()}
    layers = trainer.student.config.remaining_layers
    with torch.random.fork_rng(devices=[]):
        trainer.student = type(trainer.student)(config)
        pruning.set_trainable(trainer.student, trainable, layers)
        if trainer.stage == 1:
            trainer.add_gates(trainer.student)
        trainer.distiller = trainer._make_distiller()
