"""`RunReport`: all that the model card, the figures and all_results.json tell of a run."""

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel

from ..compression.budgets import Budget, make_budget
from ..recipe.skill_config import SkillConfig, StageSteps
from .run_record import RunRecord


@dataclass
class RunReport:
    """
    A run as it stands. What is `None`, or empty, is not known yet, and is left out wherever it would be told.

    Args:
        student, teacher (`PreTrainedModel`): the encoders, or both with their heads.
        teacher_name (`str` or `PathLike`, *optional*): Hub id or local directory of the teacher.
        skill_config ([`SkillConfig`]): the recipe.
        record ([`~skill_hf.publishing.run_record.RunRecord`]): what the run has measured.
        head_losses (`tuple[str, ...]`): names of the losses of the head, if there is one.
        hub_model_id (`str`, *optional*): of the student's repository on the Hub.
        layer_groups (`list[list[int]]`, *optional*): hidden-state indices of each group.
        layer_similarity (`numpy.ndarray` of shape `(N, N)`, *optional*): what was clustered.
        layer_tree (`numpy.ndarray` of shape `(N - 1, 4)`, *optional*): the tree of the clustering, scipy's linkage
            matrix.
        steps ([`~skill_hf.recipe.skill_config.StageSteps`], *optional*): of both stages.
        num_steps_done (`int`): optimizer steps so far.
        log_history (`list[dict]`): logged lines.
        learning_rate (`float`): peak of the first stage.
        clips_per_step (`int`): in all processes together.
        precision (`str`): of training, as accelerate calls it: `no`, `bf16` or `fp16`.
        seed (`int`): of the run.
        sampling_rate (`int`): of the audio, in Hz.
        train_dataset, eval_dataset (*optional*): the data; `eval_dataset` may be a dict of several.
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
    learning_rate: float = 0.0
    clips_per_step: int = 1
    precision: str = "no"
    seed: int = 0
    sampling_rate: int = 16_000
    train_dataset: object = None
    eval_dataset: object = None

    @property
    def budget(self) -> Budget:
        """What the recipe's target is a share of."""
        return make_budget(self.skill_config, self.sampling_rate)

    @property
    def num_teacher_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.teacher.parameters())

    @property
    def teacher_cost(self) -> int:
        return self.budget.total(self.teacher)

    @property
    def sparsity(self) -> float:
        """Share of the teacher's cost that the student does without."""
        return 1 - self.budget.total(self.student) / self.teacher_cost

    def results(self) -> dict:
        """What all_results.json holds of the run: plain values, and no path of this machine."""
        name, budget = self.teacher_name, self.skill_config.budget
        return {
            "teacher": Path(name).name if name and Path(name).exists() else name,
            "teacher_parameters": self.num_teacher_parameters,
            f"teacher_{budget}": self.teacher_cost,
            "budget": budget,
            "target_sparsity": self.skill_config.target_sparsity,
            "layer_groups": self.layer_groups,
            "record": self.record.to_dict(),
            **({"student_class": type(self.student).__name__} if self.head_losses else {}),
        }
