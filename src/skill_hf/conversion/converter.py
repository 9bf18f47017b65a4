"""Students of checkpoints that other programs have written, and files of DPHuBERT's format of students."""

import os
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, Wav2Vec2FeatureExtractor

from ..models.families import STUDENT_CLASSES, check_family, load_student
from ..models.loading import check_encoder, empty_model, load_feature_extractor, one_error
from .checkpoints import STUDENT_ENTRY, Checkpoint, read_checkpoint
from .dphubert_format import (
    MASK_EMBEDDING,
    Structure,
    format_config,
    from_format,
    in_names_of_format,
    student_fields,
    to_format,
)


# What a student's own config says better than a file of DPHuBERT's format, which does not have it.
_NOT_IN_FORMAT = ("intermediate_size", "apply_spec_augment", "mask_time_prob", "mask_feature_prob")
_NOT_KEPT = (
    "_name_or_path",
    "name_or_path",
    "model_type",
    "architectures",
    "auto_map",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "format_version",
)


def convert_checkpoint(
    path: str | os.PathLike,
    config_file: str | os.PathLike | None = None,
    family: str | None = None,
    base_model: str | None = None,
) -> tuple[PreTrainedModel, Wav2Vec2FeatureExtractor, Checkpoint]:
    """
    A student with the hidden states of another program's model.

    Args:
        path (`str` or `PathLike`): its checkpoint.
        config_file (`str` or `PathLike`, *optional*): JSON file of its config, if the checkpoint has none.
        family (`str`, *optional*): `model_type` of the stock model, where the checkpoint does not tell it.
        base_model (`str`, *optional*): Hub id of the teacher, to be named in the student's config.

    Returns:
        The student, float32 and in eval mode; its feature extractor; what was read.

    Raises:
        `ValueError`: if the checkpoint cannot be read, is incomplete, or is of a family that has no student.
    """
    with one_error(f"The checkpoint `{path}` cannot be converted."):
        checkpoint = read_checkpoint(path, config_file, family)
    check_family(checkpoint.family, path)
    with one_error(f"The checkpoint `{path}` cannot be converted."):
        student = _build(checkpoint, base_model)
    check_encoder(student, f"The checkpoint `{path}`")
    normalize = checkpoint.config.get("normalize_waveform", False) is True
    extractor = Wav2Vec2FeatureExtractor(
        do_normalize=normalize, return_attention_mask=student.config.feat_extract_norm == "layer"
    )
    return student, extractor, checkpoint


def _build(checkpoint: Checkpoint, base_model: str | None) -> PreTrainedModel:
    student_class, structure = STUDENT_CLASSES[checkpoint.family], checkpoint.structure
    fields = student_fields(checkpoint.config, structure, checkpoint.weights)
    known = student_class.config_class().to_dict().keys() - {*_NOT_KEPT}
    own = {name: value for name, value in checkpoint.student_config.items() if name in known}
    fields = _with_own_fields(fields, own, structure)
    if base_model is not None:
        fields["base_model"] = base_model
    try:
        config = student_class.config_class(**fields)
    except ValueError as error:
        raise ValueError(in_names_of_format(str(error))) from error
    student = empty_model(student_class, config)
    weights = dict(checkpoint.weights)
    shapes = {name: tuple(tensor.shape) for name, tensor in student.state_dict().items()}
    expected = {name: tuple(tensor.shape) for name, tensor in to_format(student.state_dict(), structure).items()}
    if MASK_EMBEDDING in shapes:
        expected[MASK_EMBEDDING] = shapes[MASK_EMBEDDING]
    else:
        weights.pop(MASK_EMBEDDING, None)
    _check_weights(weights, expected)
    state = from_format(weights, structure)
    state = {name: tensor.to(torch.float32, copy=True).contiguous() for name, tensor in state.items()}
    student.load_state_dict(state, assign=True)
    return student.requires_grad_(True).eval()


def _with_own_fields(fields: dict[str, Any], own: dict[str, Any], structure: Structure) -> dict[str, Any]:
    """Fields of a file's format, and of the student that it was written from what the format does not have."""
    merged = {**own, **fields} | {name: own[name] for name in _NOT_IN_FORMAT if name in own}
    heads = own.get("remaining_heads")
    numbers = [len(layer) for layer in fields["remaining_heads"]]
    told = isinstance(heads, list) and all(isinstance(layer, list) for layer in heads)
    if not structure.is_wavlm and told and [len(layer) for layer in heads] == numbers:
        merged["remaining_heads"] = heads
    return merged


def _check_weights(weights: dict[str, torch.Tensor], expected: dict[str, tuple]) -> None:
    problems = []
    for name, shape in expected.items():
        if name not in weights:
            problems.append(f"{name} is missing")
        elif tuple(weights[name].shape) != shape:
            problems.append(f"{name} has shape {tuple(weights[name].shape)} instead of {shape}")
    problems += [f"{name} is not part of such a model" for name in weights if name not in expected]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"its weights do not fit its config: {'; '.join(problems[:3])}{more}")


def convert_student(source: str | os.PathLike) -> dict[str, Any]:
    """
    The content of a file of DPHuBERT's format.

    Args:
        source (`str` or `PathLike`): Hub id or local directory of a student, or of a stock model of a family that
            students can be made of.

    Returns:
        `dict`: `config` and `state_dict`, as the code of DPHuBERT and of DiariZen takes them, and what a student has
        besides, which that code ignores and [`convert_checkpoint`] reads.

    Raises:
        `ValueError`: if it cannot be loaded or computes something that the format has no argument for.
    """
    student, extractor = load_student(source), load_feature_extractor(source)
    config = student.config
    normalize = config.feat_extract_norm == "layer" if extractor is None else extractor.do_normalize
    structure = Structure.from_student(config)
    weights = {name: tensor.detach() for name, tensor in student.state_dict().items()}
    own = {name: value for name, value in config.to_dict().items() if name not in _NOT_KEPT}
    content = {
        "config": format_config(config, structure, normalize),
        "state_dict": to_format(weights, structure),
        STUDENT_ENTRY: {"family": type(config).stock_class().model_type, "config": own},
    }
    if MASK_EMBEDDING in weights:
        content[STUDENT_ENTRY][MASK_EMBEDDING] = weights[MASK_EMBEDDING]
    return content


def save_checkpoint(content: dict[str, Any], path: str | os.PathLike) -> None:
    """Writes a file at once: a process that is stopped leaves no half of it."""
    part = Path(path).with_name(f"{Path(path).name}.{os.getpid()}.part")
    try:
        torch.save(content, part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
