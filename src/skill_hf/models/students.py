"""The families: a teacher's type and the class of its student. A family that is added is one line here."""

from .modeling_hubert_skill_student import HubertForSkillStudent
from .modeling_unispeech_sat_skill_student import UniSpeechSatForSkillStudent
from .modeling_unispeech_skill_student import UniSpeechForSkillStudent
from .modeling_wav2vec2_skill_student import Wav2Vec2ForSkillStudent
from .modeling_wavlm_skill_student import WavLMForSkillStudent


# Gates and pruning go by the module names that all of wav2vec 2.0's descendants share; what differs between them
# (attention, mostly) is the student class's business.
STUDENTS = (
    HubertForSkillStudent,
    UniSpeechForSkillStudent,
    UniSpeechSatForSkillStudent,
    Wav2Vec2ForSkillStudent,
    WavLMForSkillStudent,
)
# Types of the stock models.
FAMILIES = tuple(sorted(student.config_class.stock_class().model_type for student in STUDENTS))
# By the type of the stock model and by that of the student, which can be a teacher, too.
STUDENT_CLASSES = {student.config_class.stock_class().model_type: student for student in STUDENTS}
STUDENT_CLASSES |= {student.config_class.model_type: student for student in STUDENTS}

# Encoders that have no student class, by their type, and why: it would need layers of its own.
_CONFORMER = "there are convolutions within its layers"
NOT_FAMILIES = {
    "data2vec-audio": "its positional convolution is a stack of several",
    "sew": "its layers see half of the frames that its convolutions make",
    "sew-d": "its layers see half of the frames that its convolutions make",
    "wav2vec2-bert": f"{_CONFORMER}, and its input is a spectrogram, not a waveform",
    "wav2vec2-conformer": _CONFORMER,
    "whisper": "its input is a spectrogram, not a waveform",
}
