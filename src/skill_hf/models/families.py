"""The families of teachers: their student classes, and how to build a student from a teacher."""

import os
import re

import torch
import transformers
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel

from .configuration_skill_student import TASKS
from .loading import load_config, load_model, one_error
from .students import FAMILIES, NOT_FAMILIES, STUDENT_CLASSES


def check_student_config(config: PreTrainedConfig, name) -> None:
    """Raises a `ValueError` unless a student can be made of a teacher, `name` in errors, with `config`."""
    with one_error(f"No student can be created from `{name}`."):
        student_config(config)


def check_family(model_type: str, name) -> None:
    """Raises a `ValueError` unless the family of a model has a student class; errors call the model `name`."""
    if model_type not in STUDENT_CLASSES:
        reason = f" Not `{model_type}`: {NOT_FAMILIES[model_type]}." if model_type in NOT_FAMILIES else ""
        raise ValueError(
            f"`{name}` is a `{model_type}`; teachers and students must be of one of the families"
            f" {', '.join(FAMILIES)}.{reason}"
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


def head_of(model: PreTrainedModel) -> str | None:
    """
    The head of a stock model or student, one of [`TASKS`](configuration_skill_student.py) such as `CTC`; `None` for an
    encoder, and for a head of another kind.
    """
    if model.base_model is model:
        return None
    return next(filter(None, (head_named(cls.__name__) for cls in type(model).__mro__)), None)


def head_named(class_name: str) -> str | None:
    """The head of a model whose class has this name, by the names that all families follow; `None` if it has none."""
    match = re.search(rf"For({'|'.join(TASKS)})$", class_name)
    return match and match[1]


def auto_class_of(head: str | None):
    """The auto class of transformers that loads a model with `head`."""
    return AutoModel if head is None else getattr(transformers, TASKS[head])


def student_class(model_type: str, head: str | None = None) -> type[PreTrainedModel]:
    """The student's class of a family, by the type of its teacher or of its student, with or without a head."""
    encoder = STUDENT_CLASSES[model_type]
    return encoder if head is None else auto_class_of(head)._model_mapping[encoder.config_class]


def empty_student(config: PreTrainedConfig, head: str | None = None) -> PreTrainedModel:
    """An unpruned student of a teacher with `config`, without values (on the meta device)."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        return student_class(config.model_type, head)(student_config(config))


def build_student(teacher: PreTrainedModel) -> PreTrainedModel:
    """An unpruned student with the same outputs as `teacher`, with its head if it has one, in train mode."""
    student = _copy_as_student(teacher)
    # A teacher that is a student itself has been given these numbers by its own teacher.
    student.config.remaining_layers = list(range(student.config.num_hidden_layers))
    return student


def _copy_as_student(teacher: PreTrainedModel) -> PreTrainedModel:
    # The weights are replaced at once: no memory for them, and no draw from the random generator.
    student = empty_student(teacher.config, head_of(teacher))
    weights = {name: tensor.detach().clone() for name, tensor in weights_for_student(student, teacher).items()}
    student.load_state_dict(weights, assign=True)
    return student.requires_grad_(True).train()


def weights_for_student(student: PreTrainedModel, teacher: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The teacher's weights, without the mask embedding if masking was switched off after loading."""
    weights, expected = teacher.state_dict(), student.state_dict()
    spare = [name for name in weights if name.endswith("masked_spec_embed") and name not in expected]
    return {name: tensor for name, tensor in weights.items() if name not in spare}


def load_student(source: str | os.PathLike, head: str | None = None) -> PreTrainedModel:
    """
    Loads an initial student, in float32 and train mode: a pruned student, or a copy of a stock model.

    Args:
        source (`str` or `PathLike`): Hub id or local directory.
        head (`str`, *optional*): the head to load with it, one of [`TASKS`](configuration_skill_student.py).

    Raises:
        `ValueError`: if it cannot be loaded, has no such head, or its family has no student class.
    """
    config = load_config(source, "Student")
    check_family(config.model_type, source)
    check_student_config(config, source)
    model = load_model(source, auto_class_of(head), config=config, what="Student", new_head=head is None)
    return _copy_as_student(model)
