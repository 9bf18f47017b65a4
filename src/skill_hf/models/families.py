"""The families of teachers: their student classes, and how to build a student from a teacher."""

import os

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from .loading import load_config, load_model, one_error
from .students import STUDENT_CLASSES, STUDENTS


def check_student_config(config: PreTrainedConfig, name) -> None:
    """Raises a `ValueError` unless a student can be made of a teacher, `name` in errors, with `config`."""
    with one_error(f"No student can be created from `{name}`."):
        student_config(config)


def check_family(model_type: str, name) -> None:
    """Raises a `ValueError` unless the family of a model has a student class; errors call the model `name`."""
    if model_type not in STUDENT_CLASSES:
        families = ", ".join(sorted(student.config_class.stock_class().model_type for student in STUDENTS))
        raise ValueError(
            f"`{name}` is a `{model_type}`; teachers and students must be of one of the families {families}."
        )


def student_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """
    The configuration of an unpruned student of a teacher with `config`.

    Raises:
        `ValueError`: if the family has no student class.
    """
    check_family(config.model_type, config.name_or_path or type(config).__name__)
    other = ("model_type", "architectures", "auto_map", "quantization_config")
    fields = {name: value for name, value in config.to_dict().items() if name not in other}
    return STUDENT_CLASSES[config.model_type].config_class(**fields)


def empty_student(config: PreTrainedConfig) -> PreTrainedModel:
    """An unpruned student of a teacher with `config`, without values (on the meta device)."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        return STUDENT_CLASSES[config.model_type](student_config(config))


def build_student(teacher: PreTrainedModel) -> PreTrainedModel:
    """An unpruned student with the same outputs as `teacher`, in train mode."""
    # The weights are replaced at once: no memory for them, and no draw from the random generator.
    student = empty_student(teacher.config)
    weights = {name: tensor.detach().clone() for name, tensor in weights_for_student(student, teacher).items()}
    student.load_state_dict(weights, assign=True)
    return student.requires_grad_(True).train()


def weights_for_student(student: PreTrainedModel, teacher: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The teacher's weights, without the mask embedding if masking was switched off after loading."""
    weights = teacher.state_dict()
    if "masked_spec_embed" not in student.state_dict():
        weights.pop("masked_spec_embed", None)
    return weights


def load_student(source: str | os.PathLike) -> PreTrainedModel:
    """
    Loads an initial student, in float32 and train mode: a pruned student, or a copy of a stock model.

    Raises:
        `ValueError`: if it cannot be loaded or its family has no student class.
    """
    config = load_config(source, "Student")
    check_family(config.model_type, source)
    check_student_config(config, source)
    return build_student(load_model(source, config=config, what="Student"))
