"""`Teacher`: a frozen speech encoder that a student learns from."""

import logging
import os
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, Wav2Vec2FeatureExtractor

from ..files import local_directory
from ..losses import attended
from ..models.families import STUDENT_CLASSES, check_family, check_student_config, empty_student, weights_for_student
from ..models.fast_layers import fold_weight_norm
from ..models.loading import check_encoder, hub_id_of, load_config, load_feature_extractor, load_model, one_error
from .run_identity import checksum


logger = logging.getLogger(__name__)


class Teacher:
    """
    A frozen speech encoder, its name, and faster copies that compute a student's targets.

    Args:
        source (`str`, `PathLike` or `PreTrainedModel`):
            Hub id, local directory, or a loaded model, with or without a head.

    Attributes:
        model (`PreTrainedModel`): the encoder in float32, frozen, in eval mode.
        name (`str` or `PathLike`): Hub id or directory; empty if unknown.
        directory (`Path`, *optional*): the local directory that it was loaded from, absolute.
        num_parameters (`int`): of the encoder.

    Raises:
        `ValueError`: if it cannot be loaded or used, or its family has no student class.
    """

    def __init__(self, source: str | os.PathLike | PreTrainedModel):
        self.model = load_teacher(source)
        self.name = _name_of(source)
        self.directory = local_directory(self.name)
        self.num_parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self._fast_copies: dict[torch.dtype | None, PreTrainedModel] = {}

    @property
    def config(self) -> PreTrainedConfig:
        return self.model.config

    @property
    def hub_id(self) -> str | None:
        return hub_id_of(self.name)

    def fast_copy(self, autocast_dtype: torch.dtype | None = None) -> PreTrainedModel:
        """The result of [`fast_teacher`] for the model's current device; created once for each dtype."""
        if autocast_dtype not in self._fast_copies:
            self._fast_copies[autocast_dtype] = fast_teacher(self.model, autocast_dtype)
        return self._fast_copies[autocast_dtype]

    def targets(
        self,
        groups: Sequence[Sequence[int]],
        input_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        autocast_dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """[`target_means`] of the fast copy for `autocast_dtype`, the dtype of the caller's autocast, if any."""
        return target_means(self.fast_copy(autocast_dtype), groups, input_values, attention_mask)

    def feature_extractor(self) -> Wav2Vec2FeatureExtractor:
        """
        The feature extractor saved with the model. Without one, a warning says what is assumed.

        Raises:
            `ValueError`: if it cannot be used.
        """
        extractor = load_feature_extractor(self.name, "Teacher") if self.name else None
        if extractor is not None:
            return extractor
        normalise = self.config.feat_extract_norm == "layer"
        logger.warning(
            "The teacher has no preprocessor_config.json; audio is %s. Pass `processing_class` if that is wrong.",
            "normalised, as usual for layer-norm models"
            if normalise
            else "not normalised, as usual for group-norm models",
        )
        return Wav2Vec2FeatureExtractor(do_normalize=normalise, return_attention_mask=True)

    def weights_checksum(self) -> int:
        """Checksum of all weights, unlike that of [`~Teacher.identity`]."""
        return checksum(self.model)

    def identity(self) -> dict:
        """How checkpoints identify it: type, size, and the checksum of one weight, as plain values."""
        projection = self.model.feature_projection.projection.weight
        return {
            "model_type": self.config.model_type,
            "num_parameters": self.num_parameters,
            # Tells checkpoints of one size apart, such as WavLM Base from Base+.
            "checksum": zlib.crc32(projection.cpu().numpy().tobytes()),
        }


def _name_of(source: str | os.PathLike | PreTrainedModel) -> str | os.PathLike:
    """Hub id or directory; empty if unknown."""
    if not isinstance(source, PreTrainedModel):
        return source
    name = source.config.name_or_path
    # Without a commit it is from no repository but from a directory, which may have been relative to another one.
    return name if getattr(source.config, "_commit_hash", None) or Path(name).exists() else ""


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
        check_family(config.model_type, teacher)
        check_student_config(config, teacher)
        teacher = load_model(teacher, config=config, what="Teacher")
    else:
        check_encoder(teacher, "The teacher")
        teacher = teacher.base_model
        name = teacher.config.name_or_path or type(teacher).__name__
        check_family(teacher.config.model_type, name)
        if isinstance(teacher, tuple(STUDENT_CLASSES.values())):
            teacher.refuse_fused("a teacher")
        check_student_config(teacher.config, name)
        _check_plain(teacher, name)
    return teacher.float().requires_grad_(False).eval()


def _check_plain(teacher: PreTrainedModel, name: str) -> None:
    """A student is a copy: the model must have the weights of its family, and no others."""
    with one_error(f"Teacher `{name}` does not match its config."):
        weights = {name: tensor.shape for name, tensor in teacher.state_dict().items()}
        for weight, tensor in empty_student(teacher.config).state_dict().items():
            shape = weights.pop(weight, None)
            if shape is None:
                raise ValueError(f"{weight} is missing")
            if shape != tensor.shape:
                raise ValueError(f"{weight} has shape {tuple(shape)} instead of {tuple(tensor.shape)}")
        # A model keeps it when masking is switched off after loading; a student has no use for it then.
        weights.pop("masked_spec_embed", None)
        if weights:
            raise ValueError(f"{next(iter(weights))} is not a weight of a {teacher.config.model_type}")


def fast_teacher(teacher: PreTrainedModel, autocast_dtype: torch.dtype | None = None) -> PreTrainedModel:
    """
    A copy of `teacher` with the faster forward of its family's student, for its current device. A model of any class
    but the stock one or the student may compute something else and is returned unchanged. Hooks are not copied.
    Weights are shared, except that of the positional convolution; the student's `fuse()` would copy more for little
    gain.

    With `autocast_dtype`, weights that autocast would cast in every forward pass are cast here once; the copy must run
    under autocast and has the same outputs.
    """
    if type(teacher) not in STUDENT_CLASSES[teacher.config.model_type].__mro__:
        return teacher
    student = empty_student(teacher.config)
    student.load_state_dict(weights_for_student(student, teacher), assign=True)
    student.requires_grad_(False).eval()
    student._is_fused = True  # in part: it cannot be saved or trained
    if autocast_dtype is None:
        student.encoder.pos_conv_embed.fuse()
    else:  # which knows no Fourier transform
        fold_weight_norm(student.encoder.pos_conv_embed.conv)
        _cast_products(student, autocast_dtype)
    return student


def _cast_products(student: PreTrainedModel, dtype: torch.dtype) -> None:
    """Casts the weights of linear maps and convolutions, except one from which something is computed beforehand."""
    folded = {
        layer.conv for layer in student.feature_extractor.conv_layers if isinstance(layer.layer_norm, nn.GroupNorm)
    }
    for module in student.modules():
        if isinstance(module, nn.Linear | nn.Conv1d) and module not in folded:
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(parameter.to(dtype), requires_grad=False))


@torch.no_grad()
def target_means(
    teacher: nn.Module,
    groups: Sequence[Sequence[int]],
    input_values: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    The student's targets, [`~skill_hf.losses.group_means`] of the teacher's hidden states,
    `(groups, batch, frames, hidden_size)`, float32, without gradient. No hidden state is kept: each is added to the
    means of its groups when its layer has run.
    """
    means: dict[int, torch.Tensor] = {}

    def add(index: int, hidden_state: torch.Tensor) -> None:
        for number, group in enumerate(groups):
            if index in group:
                share = hidden_state.float() / len(group)
                means[number] = means[number].add_(share) if number in means else share

    def add_output(index: int, module: nn.Module, args: tuple, output: torch.Tensor | tuple) -> None:
        # Layers of WavLM, and all in transformers 4, return more than the hidden state.
        add(index, output if isinstance(output, torch.Tensor) else output[0])

    layers = teacher.encoder.layers
    # transformers can replace the last layer's output by the model's, which comes after a last norm.
    tied = getattr(teacher.config, "tie_last_hidden_states", False)
    hooks = [layers[0].register_forward_pre_hook(lambda module, args: add(0, args[0]))]
    for index, layer in enumerate(layers[: len(layers) - tied], start=1):
        hooks.append(layer.register_forward_hook(partial(add_output, index)))
    try:
        output = teacher(input_values, attention_mask=attended(attention_mask))
        if tied:
            add(len(layers), output.last_hidden_state)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack([means[number] for number in range(len(groups))])
