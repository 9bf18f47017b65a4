"""
Compression of speech models by SKILL (arXiv 2402.16830): similar layers are distilled as groups, structures pruned.

Importing this package registers the student with the auto classes of transformers, so that
`AutoModel.from_pretrained(student)` works without `trust_remote_code`. The rest is imported at first use.
"""

import importlib
from typing import TYPE_CHECKING

from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForAudioClassification,
    AutoModelForAudioFrameClassification,
    AutoModelForAudioXVector,
    AutoModelForCTC,
    Wav2Vec2FeatureExtractor,
)

from .models.configuration_wavlm_skill_student import WavLMSkillStudentConfig
from .models.modeling_skill_student import ACTIONS
from .models.modeling_wavlm_skill_student import (
    WavLMForSkillStudent,
    WavLMSkillStudentForAudioFrameClassification,
    WavLMSkillStudentForCTC,
    WavLMSkillStudentForSequenceClassification,
    WavLMSkillStudentForXVector,
)
from .version import __version__


if TYPE_CHECKING:
    from .distillation.skill_trainer import SkillDistillationTrainer
    from .grouping.clustering import cluster_layers
    from .grouping.layer_similarity import layer_similarity
    from .recipe.skill_config import SkillConfig
    from .recipe.skill_training_args import SkillTrainingArguments

__all__ = [
    "SkillConfig",
    "SkillDistillationTrainer",
    "SkillTrainingArguments",
    "WavLMForSkillStudent",
    "WavLMSkillStudentConfig",
    "WavLMSkillStudentForAudioFrameClassification",
    "WavLMSkillStudentForCTC",
    "WavLMSkillStudentForSequenceClassification",
    "WavLMSkillStudentForXVector",
    "__version__",
    "cluster_layers",
    "layer_similarity",
]

# Those who only load a student don't wait for the Trainer, `datasets` and pandas.
_LAZY = {
    "SkillConfig": "recipe.skill_config",
    "SkillDistillationTrainer": "distillation.skill_trainer",
    "SkillTrainingArguments": "recipe.skill_training_args",
    "cluster_layers": "grouping.clustering",
    "layer_similarity": "grouping.layer_similarity",
}

# What students do by this package; see `ACTIONS` in their file.
_ACTIONS = {
    "add_gates": ("compression.pruning", "add_gates"),
    "named_gates": ("compression.pruning", "named_gates"),
    "num_expected_parameters": ("compression.pruning", "num_expected_parameters"),
    "prune": ("compression.pruning", "prune"),
    "push_to_hub": ("publishing.hub", "push_model"),
}


def _imported_when_called(module: str, function: str):
    def act(*args, **kwargs):
        return getattr(importlib.import_module(f".{module}", __name__), function)(*args, **kwargs)

    return act


ACTIONS.update({action: _imported_when_called(*place) for action, place in _ACTIONS.items()})

AutoConfig.register(WavLMSkillStudentConfig.model_type, WavLMSkillStudentConfig)
AutoModel.register(WavLMSkillStudentConfig, WavLMForSkillStudent)
AutoModelForCTC.register(WavLMSkillStudentConfig, WavLMSkillStudentForCTC)
AutoModelForAudioClassification.register(WavLMSkillStudentConfig, WavLMSkillStudentForSequenceClassification)
AutoModelForAudioFrameClassification.register(WavLMSkillStudentConfig, WavLMSkillStudentForAudioFrameClassification)
AutoModelForAudioXVector.register(WavLMSkillStudentConfig, WavLMSkillStudentForXVector)
AutoFeatureExtractor.register(WavLMSkillStudentConfig, Wav2Vec2FeatureExtractor)


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
