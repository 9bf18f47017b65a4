"""`RunReport`: everything that the model card, the figures and all_results.json show of a run."""

import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel

from ..compression.budgets import Budget, make_budget
from ..recipe.schedule import StageSteps
from ..recipe.skill_config import SkillConfig
from .run_record import RunRecord


@dataclass
class OtherTeacher:
    """
    A teacher that the student is not a copy of.

    Args:
        name (`str` or `PathLike`, *optional*): Hub id or local directory.
        model (`PreTrainedModel`): the encoder.
        layer_groups (`list[list[int]]`, *optional*): hidden-state indices of each group.
    """

    name: str | os.PathLike | None
    model: PreTrainedModel
    layer_groups: list[list[int]] | None = None


@dataclass
class RunReport:
    """
    The current state of a run. `None` or empty means not known yet; such values are left out everywhere. Sizes are
    computed once: make a new report when the student has changed.

    Args:
        student, teacher (`PreTrainedModel`): the encoders, or both with their heads; the first of several teachers.
        teacher_name (`str` or `PathLike`, *optional*): Hub id or local directory of the teacher.
        skill_config ([`SkillConfig`]): the recipe.
        record ([`~skill_hf.publishing.run_record.RunRecord`]): measurements of the run.
        head_losses (`tuple[str, ...]`): names of the losses of the head, if there is one.
        hub_model_id (`str`, *optional*): id of the student's repository on the Hub.
        layer_groups (`list[list[int]]`, *optional*): hidden-state indices of each group.
        layer_similarity (`numpy.ndarray` of shape `(N, N)`, *optional*): the clustered similarity.
        layer_tree (`numpy.ndarray` of shape `(N - 1, 4)`, *optional*): the clustering tree as scipy's linkage matrix.
        steps ([`~skill_hf.recipe.schedule.StageSteps`], *optional*): steps of both stages.
        num_steps_done (`int`): optimizer steps so far.
        log_history (`list[dict]`): log lines.
        learning_rates (`tuple[float, float]`, *optional*): peak learning rates of both stages.
        clips_per_step (`int`, *optional*): clips per optimizer step in all processes together.
        seconds_per_step (`float`, *optional*): instead, most seconds of audio per step.
        precision (`str`): of training, in accelerate's terms: `no`, `bf16` or `fp16`.
        seed (`int`): seed of the run.
        sampling_rate (`int`): sampling rate in Hz.
        train_dataset, eval_dataset (*optional*): the data; `eval_dataset` may be a dict of several.
        other_teachers (`list[OtherTeacher]`): all teachers but the first.
    """

    student: PreTrainedModel
    teacher: PreTrainedModel
    teacher_name: str | os.PathLike | None
    skill_config: SkillConfig
    record: RunRecord
    head_losses: tuple[str, ...] = ()
    hub_model_id: str | None = None
    layer_groups: list[list[int]] | None = None
    layer_similarity: np.ndarray | None = None
    layer_tree: np.ndarray | None = None
    steps: StageSteps | None = None
    num_steps_done: int = 0
    log_history: list[dict] = field(default_factory=list)
    learning_rates: tuple[float, float] | None = None
    clips_per_step: int | None = 1
    seconds_per_step: float | None = None
    precision: str = "no"
    seed: int = 0
    sampling_rate: int = 16_000
    train_dataset: object = None
    eval_dataset: object = None
    other_teachers: list[OtherTeacher] = field(default_factory=list)

    @cached_property
    def budget(self) -> Budget:
        """The budget of the recipe."""
        return make_budget(self.skill_config, self.sampling_rate)

    @cached_property
    def num_teacher_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.teacher.parameters())

    @cached_property
    def num_student_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.student.parameters())

    @cached_property
    def teacher_cost(self) -> int:
        """The teacher's cost in the unit of the budget."""
        return self.budget.total(self.teacher)

    @cached_property
    def student_cost(self) -> int:
        """The student's cost in the unit of the budget."""
        return self.budget.total(self.student)

    @cached_property
    def sparsity(self) -> float:
        """Removed share of the teacher's cost."""
        return 1 - self.student_cost / self.teacher_cost

    def results(self) -> dict:
        """Values of the run for all_results.json: plain values, no local paths."""
        budget = self.skill_config.budget
        several = {}
        if self.other_teachers:
            several["teacher_targets"] = self.skill_config.teacher_targets
            several["other_teachers"] = [
                {
                    "teacher": _public_name(other.name),
                    "teacher_parameters": sum(parameter.numel() for parameter in other.model.parameters()),
                    "layer_groups": other.layer_groups,
                }
                for other in self.other_teachers
            ]
        return {
            "teacher": _public_name(self.teacher_name),
            "teacher_parameters": self.num_teacher_parameters,
            "student_parameters": self.num_student_parameters,
            f"teacher_{budget}": self.teacher_cost,
            f"student_{budget}": self.student_cost,
            "sparsity": self.sparsity,
            "budget": budget,
            "target_sparsity": self.skill_config.target_sparsity,
            "layer_groups": self.layer_groups,
            "record": self.record.to_dict(),
            **({"student_class": type(self.student).__name__} if self.head_losses else {}),
            **several,
        }


def _public_name(name: str | os.PathLike | None) -> str | os.PathLike | None:
    """Without the path of a local directory."""
    return Path(name).name if name and Path(name).exists() else name
