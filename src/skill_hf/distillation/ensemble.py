"""
`TeacherEnsemble`: the targets of one teacher or several, and audio as each of them expects it.

Several teachers: Ensemble Knowledge Distillation of speech encoders (Huang et al., arXiv 2302.12757).
"""

import copy
import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from transformers import PreTrainedModel, Wav2Vec2FeatureExtractor

from ..grouping.calibration import Calibration, calibrate
from ..grouping.forward_pass import check_models
from ..recipe.skill_config import SkillConfig
from .task_heads import ENCODER
from .teacher import Teacher


@dataclass(frozen=True)
class TargetSet:
    """
    Targets of one width, one for each group of layers.

    Args:
        groups (`list[list[int]]`): hidden-state indices of each group in the teacher.
        num_layers (`int`): layers of that teacher.
        width (`int`): its `hidden_size`.
    """

    groups: list[list[int]]
    num_layers: int
    width: int


def load_teachers(teacher: str | os.PathLike | PreTrainedModel | Sequence, task: str | None) -> list[Teacher]:
    """
    One teacher, or each of a list. Only the first keeps its head; the others are encoders.

    Raises:
        `ValueError`: if the list is empty, or one of them cannot be loaded or used.
    """
    if not isinstance(teacher, (list, tuple)):
        return [Teacher(teacher, task)]
    if not teacher:
        raise ValueError("`teacher` is an empty list; pass a Hub id, a directory or a model, or a list of these.")
    first, *others = teacher
    return [Teacher(first, task), *(Teacher(other, ENCODER) for other in others)]


class TeacherEnsemble:
    """
    What a student learns from its teachers in one step. The student starts as a copy of the first one.

    With `teacher_targets="average"` the target of group k is the mean over teachers of their means of group k. With
    `"separate"` each group of each teacher is a target of its own. One teacher gives the same targets either way.

    Args:
        teachers (`list[Teacher]`): one or more, of the same frame rate and sampling rate.
        config ([`SkillConfig`]): the recipe.
        feature_extractor: what prepares audio for the first teacher and the student. Each other teacher gets audio as
            its own feature extractor prepares it.

    Raises:
        `ValueError`: if the teachers cannot be used together, or with this recipe.
    """

    def __init__(self, teachers: list[Teacher], config: SkillConfig, feature_extractor):
        self.teachers = teachers
        self.is_averaged = len(teachers) == 1 or config.teacher_targets == "average"
        advice = "Save its feature extractor in its directory if that is wrong."
        others = [other.feature_extractor(f"`{name}`", advice) for name, other in self.others.items()]
        self.feature_extractors = [feature_extractor, *others]
        normalising = {_normalises(one) for one in self.feature_extractors}
        # Whether batches contain audio as it was recorded, which is then prepared for each model separately.
        self.is_audio_raw = len(normalising) > 1
        self._check(config)

    @property
    def others(self) -> dict[str, Teacher]:
        """All teachers but the first, by what messages call them."""
        return {f"teacher[{index}]": other for index, other in enumerate(self.teachers[1:], start=1)}

    def _check(self, config: SkillConfig) -> None:
        first = self.teachers[0]
        for (name, other), extractor in zip(self.others.items(), self.feature_extractors[1:], strict=True):
            check_models([first.model, other.model], [self.feature_extractors[0], extractor], ["teacher[0]", name])
            widths = [first.config.hidden_size, other.config.hidden_size]
            if self.is_averaged and widths[0] != widths[1]:
                raise ValueError(
                    f"`teacher[0]` has `hidden_size` {widths[0]} and `{name}` {widths[1]}, but averages need equal"
                    " sizes: set `teacher_targets` to separate."
                )
            last = other.config.num_hidden_layers
            largest = max((layer for group in config.layer_groups or [] for layer in group), default=0)
            if largest > last:
                raise ValueError(
                    f"`layer_groups` applies to all teachers and names layer {largest}, but the hidden states of"
                    f" `{name}` are 0 to {last}."
                )
            if config.num_clusters is not None and config.layer_groups is None:
                self.check_number_of_groups(name, config.num_clusters, config)
        if not self.is_averaged and config.projection_groups is not None:
            raise ValueError(
                f"`projection_groups` is {config.projection_groups}, but with several teachers and `teacher_targets`"
                " separate no groups share a projection; leave it out."
            )
        if self.is_audio_raw:
            _check_class(self.feature_extractors[0])

    def check_number_of_groups(self, name: str, num_groups: int, config: SkillConfig) -> None:
        """Raises a `ValueError` if teacher `name` has fewer layers to group than `num_groups`."""
        rows = self.others[name].config.num_hidden_layers + int(config.include_embeddings)
        if num_groups > rows:
            raise ValueError(
                f"`{name}` has only {rows} layers to group, too few for {num_groups} groups: set `num_clusters` to at"
                f" most {rows}."
            )

    # ---- Groups ----

    def calibrate(
        self, train_dataset, config: SkillConfig, accelerator: Accelerator, *, seed: int, progress: bool, reading: dict
    ) -> list[Calibration]:
        """
        Groups the layers of each teacher on the same clips; the arguments are those of
        [`~skill_hf.grouping.calibration.calibrate`]. For averages, the first teacher decides the number of groups.

        Raises:
            `ValueError`: if there is no audio, most of it cannot be read, or the groups do not fit the recipe or a
                teacher.
        """
        settings = {"seed": seed, "progress": progress}
        encoder = self.teachers[0].fast_copy().base_model
        calibrations = [calibrate(encoder, train_dataset, config, accelerator, reading=reading, **settings)]
        if config.layer_groups is not None:
            return calibrations * len(self.teachers)
        num_groups = len(calibrations[0].groups)
        if self.is_averaged:
            config = dataclasses.replace(config, num_clusters=num_groups, distance_threshold=None)
        reading = reading | {"feature_extractor": self.collator_extractor()}
        for (name, other), extractor in zip(self.others.items(), self.extractors_for_waveforms[1:], strict=True):
            if self.is_averaged:
                self.check_number_of_groups(name, num_groups, config)
            settings |= {"reading": reading, "feature_extractor": extractor, "name": name}
            encoder = other.fast_copy().base_model
            calibrations.append(calibrate(encoder, train_dataset, config, accelerator, **settings))
        return calibrations

    def state_of_others(self, calibrations: Sequence[Calibration]) -> dict:
        """
        The part of skill_state.json on all teachers but the first: their identities and, once they are known, their
        groups. Nothing for one teacher.
        """
        states = [{"teacher": other.identity()} for other in self.others.values()]
        for state, calibration in zip(states, calibrations, strict=False):
            state |= calibration.to_dict()
        return {"other_teachers": states} if states else {}

    # ---- Audio ----

    def collator_extractor(self):
        """The feature extractor for batches: that of the student, without normalisation if teachers differ in it."""
        extractor = self.feature_extractors[0]
        if self.is_audio_raw:
            extractor = copy.copy(extractor)
            extractor.do_normalize = False
        return extractor

    @property
    def extractors_for_waveforms(self) -> list:
        """What prepares clips that were read with `collator_extractor`, for each teacher; `None` where they are."""
        return self.feature_extractors if self.is_audio_raw else [None] * len(self.teachers)

    def check_batches(self, collators: dict[str, Callable], datasets: dict) -> None:
        """
        If batches must contain audio as it was recorded, raises a `ValueError` if a collator normalises it, or rows
        have `input_values` that are normalised already.

        Args:
            collators (`dict[str, Callable]`): argument -> collator of a trainer.
            datasets (`dict`): argument -> dataset.
        """
        if not self.is_audio_raw:
            return
        why = "The teachers differ in `do_normalize`, so audio is prepared for each separately"
        for name, collator in collators.items():
            extractor = getattr(collator, "feature_extractor", self.feature_extractors[0])
            if _normalises(extractor):
                raise ValueError(
                    f"{why}, but `{name}` normalises all of it: give it a feature extractor with `do_normalize=False`."
                )
        for name, dataset in datasets.items():
            if _normalises(self.feature_extractors[0]) and _has_input_values(dataset):
                raise ValueError(f"{why}, but the rows of `{name}` have `input_values`; pass rows with `audio`.")

    def prepare(
        self, index: int, input_values: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        A batch as teacher `index` expects it; with index 0, as the student does.

        Args:
            index (`int`): of the teacher.
            input_values (`torch.FloatTensor` of shape `(batch, samples)`): of the collator.
            attention_mask (`torch.LongTensor` of shape `(batch, samples)`, *optional*): 0 at padded samples.
        """
        if self.is_audio_raw and _normalises(self.feature_extractors[index]):
            return zero_mean_unit_variance(input_values, attention_mask)
        return input_values

    # ---- Targets ----

    def target_sets(self, groups_of_teachers: Sequence[list[list[int]]]) -> list[TargetSet]:
        """
        What is predicted: one set for the averages, or one for each teacher.

        Args:
            groups_of_teachers (sequence of `list[list[int]]`): hidden-state indices of each group, for each teacher.
        """
        sets = [
            TargetSet(groups, teacher.config.num_hidden_layers, teacher.config.hidden_size)
            for groups, teacher in zip(groups_of_teachers, self.teachers, strict=True)
        ]
        return sets[:1] if self.is_averaged else sets

    def outputs(
        self,
        groups_of_teachers: Sequence[list[list[int]]],
        input_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        autocast_dtype: torch.dtype | None = None,
        state_norms: Sequence[Callable] = (),
    ) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        """
        Runs the teachers in turn, without gradients.

        Returns:
            `tuple`: the targets of each of `target_sets`, float32 of shape `(groups, batch, frames, width)`; and the
            logits of the first teacher's head, float32, or `None` without one.
        """
        targets, logits = [], None
        for index, (teacher, groups) in enumerate(zip(self.teachers, groups_of_teachers, strict=True)):
            audio = self.prepare(index, input_values, attention_mask)
            norms = state_norms[index] if state_norms else None
            means, of_head = teacher.outputs(groups, audio, attention_mask, autocast_dtype, norms)
            logits = of_head if index == 0 else logits
            if index and self.is_averaged:
                targets[0].add_(means)
            else:
                targets.append(means)
        if self.is_averaged and len(self.teachers) > 1:
            targets[0].div_(len(self.teachers))
        return targets, logits


def zero_mean_unit_variance(input_values: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
    """
    Normalises each clip over its valid samples, as [`~transformers.Wav2Vec2FeatureExtractor`] does with
    `do_normalize=True`; padded samples are 0.

    Args:
        input_values (`torch.FloatTensor` of shape `(batch, samples)`): waveforms.
        attention_mask (`torch.LongTensor` of shape `(batch, samples)`, *optional*): 0 at padded samples.
    """
    mask = torch.ones_like(input_values) if attention_mask is None else attention_mask.to(input_values)
    count = mask.sum(-1, keepdim=True).clamp(min=1)
    deviation = (input_values - (input_values * mask).sum(-1, keepdim=True) / count) * mask
    return deviation / (deviation.square().sum(-1, keepdim=True) / count + 1e-7).sqrt()


def _normalises(extractor) -> bool:
    return bool(getattr(extractor, "do_normalize", False))


def _check_class(extractor) -> None:
    """Raises a `ValueError` if normalisation is not all that a feature extractor does."""
    noise = 0.2 + 0.3 * np.random.default_rng(0).standard_normal(int(extractor.sampling_rate) // 10)
    plain = Wav2Vec2FeatureExtractor(do_normalize=_normalises(extractor), sampling_rate=extractor.sampling_rate)
    one, other = (convert(noise, sampling_rate=plain.sampling_rate) for convert in (extractor, plain))
    if not np.allclose(one["input_values"][0], other["input_values"][0], atol=1e-5):
        raise ValueError(
            "The teachers differ in `do_normalize`, so audio is prepared for each separately, which needs a"
            f" Wav2Vec2FeatureExtractor, but `processing_class` is a {type(extractor).__name__}."
        )


def _has_input_values(dataset) -> bool:
    """Whether rows have `input_values`; of a stream, whether there is such a column."""
    columns = getattr(dataset, "column_names", None)
    if columns is None and hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__") and len(dataset):
        row = dataset[0]
        columns = [name for name in row if row[name] is not None] if isinstance(row, Mapping) else None
    return "input_values" in (columns or ())
