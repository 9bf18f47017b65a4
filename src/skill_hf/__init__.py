"""
Compresses speech models with SKILL (arXiv 2402.16830): distils groups of similar layers and prunes structures.

Importing this package registers the students of all families with the auto classes of transformers, so that
`AutoModel.from_pretrained(student)` works without `trust_remote_code`. The rest is imported at first use.
"""

import importlib
from typing import TYPE_CHECKING

import transformers
from transformers import AutoConfig, AutoFeatureExtractor, Wav2Vec2FeatureExtractor

from .models.configuration_hubert_skill_student import HubertSkillStudentConfig
from .models.configuration_unispeech_sat_skill_student import UniSpeechSatSkillStudentConfig
from .models.configuration_unispeech_skill_student import UniSpeechSkillStudentConfig
from .models.configuration_wav2vec2_skill_student import Wav2Vec2SkillStudentConfig
from .models.configuration_wavlm_skill_student import WavLMSkillStudentConfig
from .models.modeling_hubert_skill_student import (
    HubertForSkillStudent,
    HubertSkillStudentForCTC,
    HubertSkillStudentForSequenceClassification,
)
from .models.modeling_skill_student import ACTIONS
from .models.modeling_unispeech_sat_skill_student import (
    UniSpeechSatForSkillStudent,
    UniSpeechSatSkillStudentForAudioFrameClassification,
    UniSpeechSatSkillStudentForCTC,
    UniSpeechSatSkillStudentForSequenceClassification,
    UniSpeechSatSkillStudentForXVector,
)
from .models.modeling_unispeech_skill_student import (
    UniSpeechForSkillStudent,
    UniSpeechSkillStudentForCTC,
    UniSpeechSkillStudentForSequenceClassification,
)
from .models.modeling_wav2vec2_skill_student import (
    Wav2Vec2ForSkillStudent,
    Wav2Vec2SkillStudentForAudioFrameClassification,
    Wav2Vec2SkillStudentForCTC,
    Wav2Vec2SkillStudentForSequenceClassification,
    Wav2Vec2SkillStudentForXVector,
)
from .models.modeling_wavlm_skill_student import (
    WavLMForSkillStudent,
    WavLMSkillStudentForAudioFrameClassification,
    WavLMSkillStudentForCTC,
    WavLMSkillStudentForSequenceClassification,
    WavLMSkillStudentForXVector,
)
from .models.students import STUDENTS
from .version import __version__


if TYPE_CHECKING:
    from .distillation.skill_trainer import SkillDistillationTrainer
    from .grouping.clustering import cluster_layers
    from .grouping.similarity import layer_similarity
    from .recipe.skill_config import SkillConfig
    from .recipe.skill_training_args import SkillTrainingArguments

__all__ = [
    "HubertForSkillStudent",
    "HubertSkillStudentConfig",
    "HubertSkillStudentForCTC",
    "HubertSkillStudentForSequenceClassification",
    "SkillConfig",
    "SkillDistillationTrainer",
    "SkillTrainingArguments",
    "UniSpeechForSkillStudent",
    "UniSpeechSatForSkillStudent",
    "UniSpeechSatSkillStudentConfig",
    "UniSpeechSatSkillStudentForAudioFrameClassification",
    "UniSpeechSatSkillStudentForCTC",
    "UniSpeechSatSkillStudentForSequenceClassification",
    "UniSpeechSatSkillStudentForXVector",
    "UniSpeechSkillStudentConfig",
    "UniSpeechSkillStudentForCTC",
    "UniSpeechSkillStudentForSequenceClassification",
    "Wav2Vec2ForSkillStudent",
    "Wav2Vec2SkillStudentConfig",
    "Wav2Vec2SkillStudentForAudioFrameClassification",
    "Wav2Vec2SkillStudentForCTC",
    "Wav2Vec2SkillStudentForSequenceClassification",
    "Wav2Vec2SkillStudentForXVector",
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
    "layer_similarity": "grouping.similarity",
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

for _student in STUDENTS:
    _config = _student.config_class
    AutoConfig.register(_config.model_type, _config)
    AutoFeatureExtractor.register(_config, Wav2Vec2FeatureExtractor)
    for _auto_class, _place in _config.student_classes().items():
        if _auto_class != "AutoConfig":
            getattr(transformers, _auto_class).register(_config, globals()[_place.rpartition(".")[2]])


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
