"""Before training: checks that the audio can be read, and groups similar layers of the teacher."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from accelerate import Accelerator
from transformers import PreTrainedModel

from ..data.collator import SpeechCollator, calibration_waveforms, check_clips
from ..distribution import from_main_process
from ..losses import term_weights
from ..recipe.skill_config import SkillConfig
from .clustering import cluster_layers, silhouettes
from .layer_similarity import layer_similarity


logger = logging.getLogger(__name__)

# Held-out clips that are tried before training.
EVAL_CLIPS_TRIED = 32


@dataclass
class Calibration:
    """
    Groups of a teacher's layers, and how much they depend on the audio.

    Args:
        groups (`list[list[int]]`): hidden-state indices of each group.
        similarity (`numpy.ndarray` of shape `(N, N)`, *optional*): of the layers; `None` if groups were set by hand.
        half_groups (`list[list[list[int]]]`): groups computed from each half of the clips.
        silhouettes (`dict[int, float]`): mean silhouette of each number of groups.
    """

    groups: list[list[int]]
    similarity: np.ndarray | None
    half_groups: list[list[list[int]]]
    silhouettes: dict[int, float]

    def to_dict(self) -> dict:
        """JSON values, under the names that a checkpoint has for those of the first teacher."""
        return {
            "layer_groups": self.groups,
            "layer_similarity": None if self.similarity is None else self.similarity.tolist(),
            "half_groups": self.half_groups,
            "silhouettes": self.silhouettes,
        }

    @classmethod
    def from_dict(cls, values: dict) -> "Calibration":
        """Inverse of `to_dict`, also after a round trip through JSON, whose keys are strings."""
        similarity = values.get("layer_similarity")
        return cls(
            groups=values["layer_groups"],
            similarity=None if similarity is None else np.array(similarity),
            half_groups=values.get("half_groups", []),
            silhouettes={int(count): score for count, score in values.get("silhouettes", {}).items()},
        )


def calibrate(
    teacher: PreTrainedModel,
    train_dataset,
    config: SkillConfig,
    accelerator: Accelerator,
    *,
    seed: int,
    progress: bool,
    reading: dict,
    feature_extractor=None,
    name: str = "",
) -> Calibration:
    """
    Reads the calibration clips, measures the similarity of the layers and groups them.

    Args:
        teacher (`PreTrainedModel`): the encoder whose layers are grouped.
        train_dataset: rows with `audio` or `input_values`.
        config ([`SkillConfig`]): the recipe.
        accelerator (`Accelerator`): one process decides for all, since groups could depend on rounding errors of a
            similarity.
        seed (`int`): seed of the selection and of the crops.
        progress (`bool`): whether to show a progress bar.
        reading (`dict`): arguments for reading clips with [`~skill_hf.data.collator.calibration_waveforms`].
        feature_extractor (*optional*): prepares clips that are read unprepared.
        name (`str`, *optional*): what the log calls the teacher, if there are several.

    Raises:
        `ValueError`: if there is no audio, most of it cannot be read, or the groups do not fit the recipe.
    """
    waveforms = calibration_waveforms(
        train_dataset, config.calibration_samples, config.calibration_seconds, seed=seed, **reading
    )
    if config.layer_groups is not None:
        for _ in waveforms:  # nothing to measure, but audio that cannot be read should show now
            pass
        return Calibration(config.layer_groups, None, [], {})
    similarity, *halves = from_main_process(
        accelerator, lambda: _similarities(teacher, waveforms, config, seed, progress, feature_extractor)
    )
    first_layer = 0 if config.include_embeddings else 1
    groups, *half_groups = [
        [[row + first_layer for row in group] for group in cluster_layers(matrix, config)]
        for matrix in (similarity, *halves)
    ]
    calibration = Calibration(groups, similarity, half_groups, silhouettes(similarity, config))
    config.validate_projection_groups(len(groups))
    _tell(calibration, f" of `{name}`" if name else "")
    return calibration


def _similarities(
    teacher: PreTrainedModel, waveforms: Iterable, config: SkillConfig, seed: int, progress: bool, feature_extractor
) -> list[np.ndarray]:
    """Similarity of all clips, then of each half."""
    return layer_similarity(
        teacher,
        waveforms,
        similarity=config.similarity,
        include_embeddings=config.include_embeddings,
        seed=seed,
        feature_extractor=feature_extractor,
        **{f"{term}_weight": weight for term, weight in term_weights(config).items()},
        progress=progress,
        num_parts=2,
    )


def _tell(calibration: Calibration, whose: str) -> None:
    scores = ", ".join(f"{count}: {score:.3f}" for count, score in calibration.silhouettes.items())
    logger.info("Groups of hidden states%s: %s; silhouette by number of groups: %s", whose, calibration.groups, scores)
    if any(groups != calibration.groups for groups in calibration.half_groups):
        logger.warning(
            "The groups%s depend on the audio: the whole calibration set gives %s, its halves give %s. Raise"
            " `calibration_samples`, or set `num_clusters` or `layer_groups`.",
            whose,
            calibration.groups,
            " and ".join(map(str, calibration.half_groups)),
        )


def check_eval_clips(eval_dataset, collator, feature_extractor) -> None:
    """
    Reads some clips of each evaluation set, to find unreadable audio now instead of at the first evaluation. With a
    user-defined collator, nothing is read.

    Raises:
        [`~skill_hf.data.audio.AudioError`]: if most of them cannot be read.
    """
    if not isinstance(collator, SpeechCollator) or eval_dataset is None:
        return
    for dataset in eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]:
        check_clips(
            dataset,
            EVAL_CLIPS_TRIED,
            feature_extractor,
            min_samples=collator.min_samples,
            protocols=collator.protocols,
        )
