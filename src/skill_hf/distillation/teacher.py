"""`Teacher`: a frozen speech encoder that a student learns from."""

import logging
import os
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, Wav2Vec2FeatureExtractor

from ..distribution import divide_frozen
from ..files import local_directory
from ..losses import attended
from ..models.families import (
    STUDENT_CLASSES,
    auto_class_of,
    check_family,
    check_student_config,
    empty_student,
    head_of,
    student_class,
    weights_for_student,
)
from ..models.fast_layers import fold_weight_norm
from ..models.loading import check_encoder, hub_id_of, load_config, load_feature_extractor, load_model, one_error
from ..models.processors import load_tokenizer
from .run_identity import checksum
from .task_heads import CTC, check_head, kept_head


logger = logging.getLogger(__name__)


class Teacher:
    """
    A frozen speech encoder, its name, and faster copies that compute a student's targets.

    Args:
        source (`str`, `PathLike` or `PreTrainedModel`):
            Hub id, local directory, or a loaded model, with or without a head.
        task (`str`, *optional*):
            See [`~skill_hf.distillation.task_heads.kept_head`].

    Attributes:
        model (`PreTrainedModel`): the encoder, with the head that is kept, in float32, frozen, in eval mode.
        head (`str`, *optional*): that head, one of the values of [`~skill_hf.distillation.task_heads.HEADS`].
        name (`str` or `PathLike`): Hub id or directory; empty if unknown.
        directory (`Path`, *optional*): the local directory that it was loaded from, absolute.
        num_parameters (`int`): of `model`.

    Raises:
        `ValueError`: if it cannot be loaded or used, or its family has no student class.
    """

    def __init__(self, source: str | os.PathLike | PreTrainedModel, task: str | None = None):
        self.model = load_teacher(source, task)
        self.head = head_of(self.model)
        self.name = _name_of(source)
        self.directory = local_directory(self.name)
        self.num_parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self._fast_copies: dict[torch.dtype | None, PreTrainedModel] = {}

    @property
    def config(self) -> PreTrainedConfig:
        return self.model.config

    @property
    def encoder(self) -> PreTrainedModel:
        """`model` without its head."""
        return self.model.base_model

    @property
    def hub_id(self) -> str | None:
        return hub_id_of(self.name)

    def fast_copy(self, autocast_dtype: torch.dtype | None = None) -> PreTrainedModel:
        """The result of [`fast_teacher`] for the model's current device; created once for each dtype."""
        if autocast_dtype not in self._fast_copies:
            self._fast_copies[autocast_dtype] = fast_teacher(self.model, autocast_dtype)
        return self._fast_copies[autocast_dtype]

    def divide(self, accelerator: Accelerator, autocast_dtype: torch.dtype | None = None) -> None:
        """
        Divides the layers of the fast copy for `autocast_dtype` among processes, until [`~Teacher.reunite`]; `model`
        waits on the CPU. All processes must then run it alike. A model without a fast copy stays whole.
        """
        copy = self.fast_copy(autocast_dtype)
        if copy is not self.model:
            self._fast_copies = {autocast_dtype: copy}  # others would keep the weights where they are
            encoder = copy.base_model.encoder
            divide_frozen(copy, encoder.layers, encoder, accelerator)
            self.model.to("cpu")

    def reunite(self, device: torch.device) -> None:
        """Ends what [`~Teacher.divide`] began."""
        self._fast_copies.clear()
        self.model.to(device)

    def targets(
        self,
        groups: Sequence[Sequence[int]],
        input_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        autocast_dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """[`target_means`] of the fast copy for `autocast_dtype`, the dtype of the caller's autocast, if any."""
        return target_means(self.fast_copy(autocast_dtype), groups, input_values, attention_mask)

    def outputs(
        self,
        groups: Sequence[Sequence[int]],
        input_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        autocast_dtype: torch.dtype | None = None,
        norms: Callable | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        What `targets` gives, of hidden states that `norms` has normalised, if given; and the logits of the head, if
        there is one. Both are of the same forward.
        """
        return teacher_outputs(self.fast_copy(autocast_dtype), groups, input_values, attention_mask, norms)

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """
        The one that was saved with a model for connectionist temporal classification, if there is one.

        Raises:
            `ValueError`: if there is one that cannot be loaded.
        """
        return load_tokenizer(self.name, "Teacher") if self.name and self.head == CTC else None

    def feature_extractor(
        self, what: str = "The teacher", advice: str = "Pass `processing_class` if that is wrong."
    ) -> Wav2Vec2FeatureExtractor:
        """
        The feature extractor saved with the model. Without one, a warning says what is assumed of `what`, and gives
        `advice`.

        Raises:
            `ValueError`: if it cannot be used.
        """
        extractor = load_feature_extractor(self.name, "Teacher") if self.name else None
        if extractor is not None:
            return extractor
        normalise = self.config.feat_extract_norm == "layer"
        logger.warning(
            "%s has no preprocessor_config.json; audio is %s. %s",
            what,
            "normalised, as usual for layer-norm models"
            if normalise
            else "not normalised, as usual for group-norm models",
            advice,
        )
        return Wav2Vec2FeatureExtractor(do_normalize=normalise, return_attention_mask=True)

    def weights_checksum(self) -> int:
        """Checksum of all weights, unlike that of [`~Teacher.identity`]."""
        return checksum(self.model)

    def identity(self) -> dict:
        """How checkpoints identify it: type, size, head, and the checksum of one weight, as plain values."""
        projection = self.encoder.feature_projection.projection.weight
        head = {} if self.head is None else {"head": self.head}
        return {
            "model_type": self.config.model_type,
            "num_parameters": self.num_parameters,
            # Tells checkpoints of one size apart, such as WavLM Base from Base+.
            "checksum": zlib.crc32(projection.cpu().numpy().tobytes()),
            **head,
        }


def find_tokenizer(teacher: Teacher, processor=None) -> PreTrainedTokenizerBase | None:
    """
    What makes text of the output of a head for connectionist temporal classification; `None` for another teacher.

    Args:
        teacher ([`Teacher`]): whose own is taken, if there is no other.
        processor (*optional*): what the user has given: a processor, whose tokenizer it is, or a feature extractor,
            with which there is none if the teacher has none.

    Raises:
        `ValueError`: if there is none, and nothing was given.
    """
    if teacher.head != CTC:
        return None
    tokenizer = getattr(processor, "tokenizer", None) or teacher.tokenizer()
    if tokenizer is None:
        missing = "The teacher comes without a tokenizer (vocab.json, tokenizer_config.json)"
        advice = "`processing_class=Wav2Vec2Processor.from_pretrained(...)`"
        if processor is None:
            raise ValueError(
                f"{missing}, and its student could write no text: put it beside the weights, or pass {advice}."
            )
        logger.warning("%s: the student is saved without one, and writes no text. Pass %s.", missing, advice)
    return tokenizer


def _name_of(source: str | os.PathLike | PreTrainedModel) -> str | os.PathLike:
    """Hub id or directory; empty if unknown."""
    if not isinstance(source, PreTrainedModel):
        return source
    name = source.config.name_or_path
    # Without a commit it is from no repository but from a directory, which may have been relative to another one.
    return name if getattr(source.config, "_commit_hash", None) or Path(name).exists() else ""


def load_teacher(teacher: str | os.PathLike | PreTrainedModel, task: str | None = None) -> PreTrainedModel:
    """
    `teacher` in float32, frozen, in eval mode: its encoder, with the head that is kept.

    Args:
        teacher (`str`, `PathLike` or `PreTrainedModel`): Hub id, local directory, or a loaded model, with or without a
            head.
        task (`str`, *optional*): see [`~skill_hf.distillation.task_heads.kept_head`].

    Raises:
        `ValueError`: if it cannot be loaded or used, its family has no student class, or `task` is not that of its
            head.
    """
    if isinstance(teacher, (str, os.PathLike)):
        what = f"teacher `{teacher}`"
        config = load_config(teacher, "Teacher")
        check_family(config.model_type, teacher)
        check_student_config(config, teacher)
        head = kept_head(task, (config.architectures or [None])[0], config, what, loaded=False)
        teacher = load_model(teacher, auto_class_of(head), config=config, what="Teacher", new_head=head is None)
    else:
        check_encoder(teacher, "The teacher")
        name = teacher.config.name_or_path or type(teacher).__name__
        what = f"teacher `{name}`"
        check_family(teacher.config.model_type, name)
        class_name = None if teacher.base_model is teacher else _class_with_head(teacher)
        head = kept_head(task, class_name or type(teacher).__name__, teacher.config, what, loaded=True)
        if head is None:
            teacher = teacher.base_model
        if isinstance(teacher.base_model, tuple(STUDENT_CLASSES.values())):
            teacher.base_model.refuse_fused("a teacher")
        check_student_config(teacher.config, name)
        _check_plain(teacher, name, head)
    if head is not None:
        check_head(teacher, head, what[0].upper() + what[1:])
    return teacher.float().requires_grad_(False).eval()


def _class_with_head(model: PreTrainedModel) -> str:
    """Name of the class that gives `model` its head; its own, if that is of a kind that is not known."""
    names = [cls.__name__ for cls in type(model).__mro__]
    head = head_of(model)
    return names[0] if head is None else next(name for name in names if name.endswith(f"For{head}"))


def _check_plain(teacher: PreTrainedModel, name: str, head: str | None) -> None:
    """A student is a copy: the model must have the weights of its family, and no others."""
    with one_error(f"Teacher `{name}` does not match its config."):
        weights = {name: tensor.shape for name, tensor in teacher.state_dict().items()}
        for weight, tensor in empty_student(teacher.config, head).state_dict().items():
            shape = weights.pop(weight, None)
            if shape is None:
                raise ValueError(f"{weight} is missing")
            if shape != tensor.shape:
                raise ValueError(f"{weight} has shape {tuple(shape)} instead of {tuple(tensor.shape)}")
        # A model keeps it when masking is switched off after loading; a student has no use for it then.
        spare = [weight for weight in weights if not weight.endswith("masked_spec_embed")]
        if spare:
            raise ValueError(f"{spare[0]} is not a weight of a {teacher.config.model_type}")


def fast_teacher(teacher: PreTrainedModel, autocast_dtype: torch.dtype | None = None) -> PreTrainedModel:
    """
    A copy of `teacher` with the faster forward of its family's student, for its current device. A model of any class
    but the stock one or the student may compute something else and is returned unchanged. Hooks are not copied.
    Weights are shared, except that of the positional convolution; the student's `fuse()` would copy more for little
    gain.

    With `autocast_dtype`, weights that autocast would cast in every forward pass are cast here once; the copy must run
    under autocast and has the same outputs.
    """
    head = head_of(teacher)
    if type(teacher) not in student_class(teacher.config.model_type, head).__mro__:
        return teacher
    student = empty_student(teacher.config, head)
    student.load_state_dict(weights_for_student(student, teacher), assign=True)
    student.requires_grad_(False).eval()
    encoder = student.base_model
    encoder._is_fused = True  # in part: it cannot be saved or trained
    if autocast_dtype is None:
        encoder.encoder.pos_conv_embed.fuse()
    else:  # which knows no Fourier transform
        fold_weight_norm(encoder.encoder.pos_conv_embed.conv)
        _cast_products(student, autocast_dtype)
    return student


def _cast_products(student: PreTrainedModel, dtype: torch.dtype) -> None:
    """Casts the weights of linear maps and convolutions, except one from which something is computed beforehand."""
    folded = {
        layer.conv
        for layer in student.base_model.feature_extractor.conv_layers
        if isinstance(layer.layer_norm, nn.GroupNorm)
    }
    for module in student.modules():
        if isinstance(module, nn.Linear | nn.Conv1d) and module not in folded:
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(parameter.to(dtype), requires_grad=False))


def target_means(
    teacher: PreTrainedModel,
    groups: Sequence[Sequence[int]],
    input_values: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    The student's targets, [`~skill_hf.losses.group_means`] of the teacher's hidden states,
    `(groups, batch, frames, hidden_size)`, float32, without gradient. No hidden state is kept: each is added to the
    means of its groups when its layer has run.
    """
    return teacher_outputs(teacher, groups, input_values, attention_mask)[0]


@torch.no_grad()
def teacher_outputs(
    teacher: PreTrainedModel,
    groups: Sequence[Sequence[int]],
    input_values: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    norms: Callable | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    What [`target_means`] gives, and the logits of the teacher's head, if it has one, float32; of one forward. `norms`:
    (index, hidden state) -> the hidden state that is averaged.
    """
    means: dict[int, torch.Tensor] = {}

    def add(index: int, hidden_state: torch.Tensor) -> None:
        if norms is not None:
            hidden_state = norms(index, hidden_state)
        for number, group in enumerate(groups):
            if index in group:
                share = hidden_state.float() / len(group)
                means[number] = means[number].add_(share) if number in means else share

    def add_output(index: int, module: nn.Module, args: tuple, output: torch.Tensor | tuple) -> None:
        # Layers of WavLM, and all in transformers 4, return more than the hidden state.
        add(index, output if isinstance(output, torch.Tensor) else output[0])

    encoder = teacher.base_model
    layers = encoder.encoder.layers
    # transformers can replace the last layer's output by the model's, which comes after a last norm.
    tied = getattr(teacher.config, "tie_last_hidden_states", False)
    hooks = [layers[0].register_forward_pre_hook(lambda module, args: add(0, args[0]))]
    for index, layer in enumerate(layers[: len(layers) - tied], start=1):
        hooks.append(layer.register_forward_hook(partial(add_output, index)))
    if tied:
        hooks.append(encoder.register_forward_hook(partial(add_output, len(layers))))
    try:
        output = teacher(input_values, attention_mask=attended(attention_mask))
    finally:
        for hook in hooks:
            hook.remove()
    logits = None if encoder is teacher else output.logits.float()
    return torch.stack([means[number] for number in range(len(groups))]), logits
