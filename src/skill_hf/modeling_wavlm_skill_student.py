"""Kept for PEFT: adapters store the module of their base model, and those of earlier students store this one."""

from .models.modeling_wavlm_skill_student import (  # noqa: F401
    WavLMForSkillStudent,
    WavLMSkillStudentForAudioFrameClassification,
    WavLMSkillStudentForCTC,
    WavLMSkillStudentForSequenceClassification,
    WavLMSkillStudentForXVector,
)
