"""PEFT's adapters name the module of their base model; those of earlier students name this one."""

from .models.modeling_wavlm_skill_student import (  # noqa: F401
    WavLMForSkillStudent,
    WavLMSkillStudentForAudioFrameClassification,
    WavLMSkillStudentForCTC,
    WavLMSkillStudentForSequenceClassification,
    WavLMSkillStudentForXVector,
)
