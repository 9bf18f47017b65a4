"""The families of teachers: what a student of each is, and how a teacher becomes one."""

import os

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .loading import check_encoder, load_config, load_model, one_error
from .modeling_wavlm_skill_student import WavLMForSkillStudent, fold_weight_norm


# A family is one line here. Gates and pruning go by the module names that all of wav2vec 2.0's descendants share; what
# differs between them (attention, mostly) is the student class's business.
STUDENT_CLASSES = {
    "wavlm": WavLMForSkillStudent,
    "wavlm_skill_student": WavLMForSkillStudent,  # a student can be a teacher
}


def load_teacher(teacher: str | os.PathLike | PreTrainedModel) -> PreTrainedModel:
    """
    The encoder of `teacher` in float32, frozen, in eval mode.

    Args:
        teacher (`str`, `PathLike` or `PreTrainedModel`): Hub id, local directory, or a loaded model, with or without a
        head.

    Raises:
        `ValueError`: if it cannot be loaded or used, or its family has no student class.
    """
    if isinstance(teacher, (str, os.PathLike)):
        config = load_config(teacher, "Teacher")
        _check_family(config.model_type, teacher)
        _check_student_config(config, teacher)
        teacher = load_model(teacher, config=config, what="Teacher")
    else:
        check_encoder(teacher, "The teacher")
        teacher = teacher.base_model
        name = teacher.config.name_or_path or type(teacher).__name__
        _check_family(teacher.config.model_type, name)
        if isinstance(teacher, tuple(STUDENT_CLASSES.values())):
            teacher.refuse_fused("a teacher")
        _check_student_config(teacher.config, name)
        _check_plain(teacher, name)
    return teacher.float().requires_grad_(False).eval()


def _check_student_config(config: PreTrainedConfig, name) -> None:
    with one_error(f"Of `{name}` no student can be made."):
        student_config(config)


def _check_plain(teacher: PreTrainedModel, name: str) -> None:
    """A student is a copy: the model must have the weights of its family, and no others."""
    with one_error(f"Teacher `{name}` is not what its config describes."):
        weights = {name: tensor.shape for name, tensor in teacher.state_dict().items()}
        for weight, tensor in empty_student(teacher.config).state_dict().items():
            there = weights.pop(weight, None)
            if there != tensor.shape:
                problem = (
                    "is missing" if there is None else f"has shape {tuple(there)} instead of {tuple(tensor.shape)}"
                )
                raise ValueError(f"{weight} {problem}")
        # A model keeps it when masking is switched off after loading; a student has no use for it then.
        weights.pop("masked_spec_embed", None)
        if weights:
            raise ValueError(f"{next(iter(weights))} is no weight of a {teacher.config.model_type}")


def _check_family(model_type: str, name) -> None:
    if model_type not in STUDENT_CLASSES:
        known = ", ".join(sorted(STUDENT_CLASSES))
        raise ValueError(f"`{name}` is of the family `{model_type}`; teachers and students can be of: {known}.")


def student_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """
    The configuration of an unpruned copy of a teacher with `config`, as its family's student.

    Raises:
        `ValueError`: if the family has no student class.
    """
    _check_family(config.model_type, config.name_or_path or type(config).__name__)
    other = ("model_type", "architectures", "auto_map", "quantization_config")
    fields = {name: value for name, value in config.to_dict().items() if name not in other}
    return STUDENT_CLASSES[config.model_type].config_class(**fields)


def empty_student(config: PreTrainedConfig) -> PreTrainedModel:
    """An unpruned copy of a teacher with `config`, as its family's student, with shapes alone (on the meta device)."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        return STUDENT_CLASSES[config.model_type](student_config(config))


def build_student(teacher: PreTrainedModel) -> PreTrainedModel:
    """An exact, unpruned copy of `teacher` as its family's student, in train mode."""
    # The weights are replaced at once: no memory for them, and no draw from the random generator.
    student = empty_student(teacher.config)
    weights = {name: tensor.detach().clone() for name, tensor in _own_weights(student, teacher).items()}
    student.load_state_dict(weights, assign=True)
    return student.requires_grad_(True).train()


def _own_weights(student: PreTrainedModel, teacher: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The teacher's, without that of a masking that was switched off after it was loaded."""
    weights = teacher.state_dict()
    if "masked_spec_embed" not in student.state_dict():
        weights.pop("masked_spec_embed", None)
    return weights


def load_student(source: str | os.PathLike) -> PreTrainedModel:
    """
    A student to start from, in float32 and in train mode: one that was pruned before, or a copy of a stock model.

    Raises:
        `ValueError`: if it cannot be loaded or its family has no student class.
    """
    config = load_config(source, "Student")
    _check_family(config.model_type, source)
    _check_student_config(config, source)
    return build_student(load_model(source, config=config, what="Student"))


def fast_teacher(teacher: PreTrainedModel, autocast_dtype: torch.dtype | None = None) -> PreTrainedModel:
    """
    `teacher` with the faster forward that its family's student has, for the device that it is on. A model of another
    class than the stock one or the student may compute something else and is returned as it is. Hooks stay behind.
    The weights are shared, but for that of the positional convolution: the student's `fuse()` would copy more of them
    and win little more.

    With `autocast_dtype`, weights that autocast would cast to it in every forward are cast here, once, and it runs
    under autocast only, with the same outputs.
    """
    if type(teacher) not in STUDENT_CLASSES[teacher.config.model_type].__mro__:
        return teacher
    student = empty_student(teacher.config)
    student.load_state_dict(_own_weights(student, teacher), assign=True)
    student.requires_grad_(False).eval()
    student._is_fused = True  # in part: it cannot be saved or trained
    if autocast_dtype is None:
        student.encoder.pos_conv_embed.fuse()
    else:  # which knows no Fourier transform
        fold_weight_norm(student.encoder.pos_conv_embed.conv)
        _cast_products(student, autocast_dtype)
    return student


def _cast_products(student: PreTrainedModel, dtype: torch.dtype) -> None:
    """Casts the weights of linear maps and convolutions, but for one that something is computed of beforehand."""
    folded = {
        layer.conv for layer in student.feature_extractor.conv_layers if isinstance(layer.layer_norm, nn.GroupNorm)
    }
    for module in student.modules():
        if isinstance(module, nn.Linear | nn.Conv1d) and module not in folded:
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(parameter.to(dtype), requires_grad=False))
