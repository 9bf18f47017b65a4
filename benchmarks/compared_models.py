"""What is compared: a teacher, stock and as an unpruned student, and students of fixed pruned shapes."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, WavLMConfig, WavLMModel

from skill_hf import WavLMForSkillStudent, WavLMSkillStudentConfig
from skill_hf.compression.macs import count_macs
from skill_hf.models.families import build_student


# What the config of WavLM Base+ sets; its shape is the default one of `WavLMConfig`.
BASE_PLUS = {"activation_dropout": 0.0, "layerdrop": 0.05}

# Weights of a new model leave biases at 0 and norms at 1, so that a weight in the wrong place would not show.
NOISE = 0.02


@dataclass(frozen=True)
class PrunedShape:
    """What is left of WavLM Base+ (512 channels, 12 layers of 12 heads and 3072 feed-forward units)."""

    about: str
    conv_dim: tuple[int, ...]
    heads: tuple[int, ...]
    ffn_dims: tuple[int, ...]


PRUNED_SHAPES = {
    # The usual budget leaves the convolutions wide, as they have few parameters. DPWavLM, the published model of this
    # size, has 23 586 325 parameters and 2.8 times fewer multiply-accumulates than its teacher; so has this one, with
    # 0.73 of the channels, and heads and feed-forward units as uneven over the layers.
    "parameters-75": PrunedShape(
        about="75 % of the parameters removed",
        conv_dim=(376, 400, 392, 384, 368, 352, 352),
        heads=(3, 3, 4, 4, 5, 7, 4, 3, 3, 2, 2, 1),
        ffn_dims=(443, 475, 507, 570, 633, 871, 491, 396, 317, 253, 190, 157),
    ),
    "diarizen-s80": PrunedShape(
        about="DiariZen's published WavLM Base+ with 80 % of the parameters removed",
        conv_dim=(90, 161, 173, 181, 351, 155, 137),
        heads=(2, 3, 3, 5, 2, 1, 4, 4, 0, 0, 2, 1),
        ffn_dims=(666, 660, 649, 1080, 237, 299, 437, 573, 53, 80, 211, 334),
    ),
    "macs-75": PrunedShape(
        about="75 % of the multiply-accumulates for 10 seconds removed, evenly",
        conv_dim=(224,) * 7,
        heads=(3,) * 12,
        ffn_dims=(720,) * 12,
    ),
}


@dataclass
class ComparedModel:
    """
    Args:
        name (`str`): as in the tables.
        model (`nn.Module`): takes `(batch, samples)`.
        about (`str`): what it is.
        counted (`PreTrainedModel`): the model of ours or stock that has the same arithmetic.
    """

    name: str
    model: nn.Module
    about: str
    counted: PreTrainedModel

    def describe(self, seconds: float) -> dict:
        return {
            "name": self.name,
            "about": self.about,
            "parameters": num_parameters(self.model),
            "macs_per_second": count_macs(self.counted, 1.0),
            "macs_seconds": seconds,
            "macs": count_macs(self.counted, seconds),
        }


def make_teacher(source: str | os.PathLike | None, seed: int) -> WavLMModel:
    """The stock model in `source`, a Hub id or directory, or one of random weights in the shape of WavLM Base+."""
    if source is not None:
        return WavLMModel.from_pretrained(source, dtype=torch.float32).eval()
    return random_weights(WavLMModel(WavLMConfig(**BASE_PLUS)), seed)


def make_pruned(name: str, teacher_config: WavLMConfig, seed: int) -> WavLMForSkillStudent:
    """A student of random weights in a shape of `PRUNED_SHAPES`."""
    return random_weights(WavLMForSkillStudent(pruned_config(name, teacher_config)), seed)


def pruned_config(name: str, teacher_config: WavLMConfig) -> WavLMSkillStudentConfig:
    """
    The config of a shape of `PRUNED_SHAPES`. Blocks of which nothing is left are removed.

    Raises:
        `ValueError`: if the shape is unknown, or the teacher's is not that of WavLM Base+.
    """
    if name not in PRUNED_SHAPES:
        raise ValueError(f"There is no pruned shape `{name}`; choose from {', '.join(PRUNED_SHAPES)}.")
    base = WavLMConfig()
    fields = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    if any(getattr(teacher_config, field) != getattr(base, field) for field in fields):
        raise ValueError(
            f"The pruned shape `{name}` is one of WavLM Base+, and the teacher is not; pass `--pruned none` and your"
            " own students with `--models`."
        )
    shape = PRUNED_SHAPES[name]
    return _student_config(
        teacher_config, shape.conv_dim, [list(range(heads)) for heads in shape.heads], shape.ffn_dims
    )


def halfway_config(teacher_config: WavLMConfig, config: WavLMSkillStudentConfig) -> WavLMSkillStudentConfig:
    """The shape in the middle between the teacher and a pruned student: each width is the mean of both."""
    heads, units = teacher_config.num_attention_heads, teacher_config.intermediate_size
    return _student_config(
        teacher_config,
        [(left + whole) // 2 for left, whole in zip(config.conv_dim, teacher_config.conv_dim, strict=True)],
        [list(range((len(left) + heads) // 2)) for left in config.remaining_heads],
        [(left + units) // 2 for left in config.intermediate_sizes],
    )


def _student_config(
    teacher_config: WavLMConfig,
    conv_dim: Iterable[int],
    remaining_heads: list[list[int]],
    intermediate_sizes: Iterable[int],
) -> WavLMSkillStudentConfig:
    fields = teacher_config.to_dict()
    for name in ("model_type", "architectures", "auto_map"):
        fields.pop(name, None)
    left = {
        "conv_dim": list(conv_dim),
        "remaining_heads": remaining_heads,
        "intermediate_sizes": list(intermediate_sizes),
        "removed_attention_blocks": [layer for layer, heads in enumerate(remaining_heads) if not heads],
        "removed_ffn_blocks": [layer for layer, units in enumerate(intermediate_sizes) if not units],
    }
    return WavLMSkillStudentConfig(**fields | left)


def make_compared_models(
    teacher: WavLMModel, pruned: Iterable[str], models: Iterable[str | os.PathLike], seed: int
) -> list[ComparedModel]:
    """Stock teacher and unpruned student of the same weights first, then the pruned students."""
    student = build_student(teacher).eval()
    compared = [
        ComparedModel("stock", teacher, "transformers' `WavLMModel`", teacher),
        ComparedModel("student", student, "the unpruned student", student),
    ]
    for name in pruned:
        model = make_pruned(name, teacher.config, seed)
        compared.append(ComparedModel(name, model, PRUNED_SHAPES[name].about, model))
    for directory in models:
        model = WavLMForSkillStudent.from_pretrained(directory, dtype=torch.float32).eval()
        compared.append(ComparedModel(Path(directory).name, model, "a student of yours", model))
    names = [one.name for one in compared]
    if len(set(names)) < len(names):
        raise ValueError(f"Two models have one name: {', '.join(names)}. Rename a directory of `--models`.")
    return compared


@torch.no_grad()
def random_weights(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Random weights that `seed` and the shapes of `model` fix, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.init_weights()
        for parameter in model.parameters():
            parameter += NOISE * torch.randn_like(parameter)
    return model.eval()


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
