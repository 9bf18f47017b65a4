"""
DPHuBERT's format: `{"config", "state_dict"}`, the arguments of its `wav2vec2_model` and the weights of that model.

DPHuBERT and DPWavLM (arXiv 2305.17651) and DiariZen (arXiv 2505.24111) write it; their model descends from that of
torchaudio. Each layer has its own heads and feed-forward units, or no such block at all. The gates of the last
convolution are followed by a norm and can be folded into no weight: what they were in the end, a number for each
channel, is `feature_extractor.dummy_weight`, which is the `feature_extractor.scale` of a student.

Heads have the same indices in both, since WavLM's gate of the position bias reads the h-th slice of a layer's input.
Of the constants of these gates the format has one for each head of the teacher, a student one for each that is left.
For the other families the format has no indices, but numbers of heads.
"""

import re
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig

from ..models.configuration_skill_student import MAX_LAYERS, MAX_SIZE


# Arguments of the format's model -> fields of a student's config that are the same.
FIELDS = {
    "extractor_conv_bias": "conv_bias",
    "encoder_embed_dim": "hidden_size",
    "encoder_projection_dropout": "feat_proj_dropout",
    "encoder_pos_conv_kernel": "num_conv_pos_embeddings",
    "encoder_pos_conv_groups": "num_conv_pos_embedding_groups",
    "encoder_num_layers": "num_hidden_layers",
    "encoder_attention_dropout": "attention_dropout",
    "encoder_ff_interm_dropout": "activation_dropout",
    "encoder_dropout": "hidden_dropout",
    "encoder_layer_norm_first": "do_stable_layer_norm",
    "encoder_layer_drop": "layerdrop",
}
WAVLM_FIELDS = {"encoder_num_buckets": "num_buckets", "encoder_max_distance": "max_bucket_distance"}
# Fields that follow from others -> these, for errors that name a field of the student.
_SOURCES = {
    "feat_extract_norm": "extractor_mode",
    "conv_dim": "extractor_conv_layer_config",
    "conv_kernel": "extractor_conv_layer_config",
    "conv_stride": "extractor_conv_layer_config",
    "remaining_heads": "encoder_remaining_heads",
    "intermediate_sizes": "encoder_ff_interm_features",
}
MODES = {"group_norm": "group", "layer_norm": "layer"}
CONV_LAYERS = [(512, 10, 5), *[(512, 3, 2)] * 4, *[(512, 2, 2)] * 2]  # what `None` stands for
GATES = (
    "extractor_prune_conv_channels",
    "encoder_prune_attention_heads",
    "encoder_prune_attention_layer",
    "encoder_prune_feed_forward_intermediate",
    "encoder_prune_feed_forward_layer",
)
# Arguments that change nothing once the gates are cut, or that DiariZen's reports of sizes add.
UNUSED = (*GATES, "aux_num_out", "use_layerwise_prune", "limit_l", "limit_r", "temperature", "feature_grad_mult")
UNUSED += ("wavlm_original_params", "wavlm_original_macs", "wavlm_current_params", "wavlm_current_macs")
ARGUMENTS = {
    *FIELDS,
    *WAVLM_FIELDS,
    *_SOURCES.values(),
    *UNUSED,
    "encoder_total_num_heads",
    "encoder_num_heads",
    "encoder_head_dim",
    "encoder_use_attention",
    "encoder_use_feed_forward",
    "normalize_waveform",
}
# What the model computes in every one of these formats; a student that computes something else cannot be written.
FIXED_FIELDS = {
    "hidden_act": "gelu",
    "feat_extract_activation": "gelu",
    "layer_norm_eps": 1e-5,
    "feat_proj_layer_norm": True,
    "conv_pos_batch_norm": False,
    "adapter_attn_dim": None,
}

MASK_EMBEDDING = "masked_spec_embed"
_SCALE, DUMMY_WEIGHT = "feature_extractor.scale", "feature_extractor.dummy_weight"
_POSITIONS = "encoder.layers.0.attention.rel_attn_embed.weight"
_WEIGHT_NORM = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}


class Layer(NamedTuple):
    """
    Indices of the heads and number of the feed-forward units of a layer. `None` stands for a block that is missing and
    adds nothing; one without any heads or units still adds the bias of its output projection.
    """

    heads: list[int] | None
    units: int | None


@dataclass(frozen=True)
class Structure:
    """
    What the weights of a layer depend on.

    Args:
        layers (`list[Layer]`): what is left of each.
        hidden_size (`int`): width of the encoder.
        num_heads (`int`): heads of a layer of the teacher.
        num_buckets (`int`, *optional*): rows of WavLM's embedding of relative positions; `None` for other families.
    """

    layers: list[Layer]
    hidden_size: int
    num_heads: int
    num_buckets: int | None = None

    @property
    def is_wavlm(self) -> bool:
        return self.num_buckets is not None

    @classmethod
    def from_format(cls, config: Mapping[str, Any]) -> "Structure":
        """
        That of a model with the format's arguments. A number stands for the same number in each layer.

        Raises:
            `ValueError`: if one of these arguments is missing or has no possible value.
        """
        num_layers = _count(config, "encoder_num_layers", MAX_LAYERS)
        hidden_size, num_buckets = _count(config, "encoder_embed_dim"), None
        if "encoder_remaining_heads" in config:
            num_buckets = _count(config, "encoder_num_buckets")
            totals = _per_layer(
                config, "encoder_total_num_heads", num_layers, "a number of heads", _is_number(1, 1024)
            )
            if len(set(totals)) > 1:
                raise ValueError(f"`encoder_total_num_heads` is {totals}, but a student has one number for all layers")
            num_heads = totals[0]
            heads = _per_layer(
                config, "encoder_remaining_heads", num_layers, "a list of heads", lambda value: isinstance(value, list)
            )
        else:
            numbers = _per_layer(config, "encoder_num_heads", num_layers, "a number of heads", _is_number(0, 1024))
            if "encoder_head_dim" not in config and len(set(numbers)) == 1 and numbers[0]:
                config = {**config, "encoder_head_dim": hidden_size // numbers[0]}  # unpruned
            num_heads, rest = divmod(hidden_size, _count(config, "encoder_head_dim"))
            if rest or max(numbers) > num_heads:
                raise ValueError(
                    f"`encoder_head_dim` is {config['encoder_head_dim']}, which does not fit `encoder_embed_dim`,"
                    f" {hidden_size}, with `encoder_num_heads` of up to {max(numbers)}"
                )
            heads = [list(range(number)) for number in numbers]
        units = _per_layer(
            config, "encoder_ff_interm_features", num_layers, "a number of units", _is_number(0, MAX_SIZE)
        )
        layers = zip(
            heads,
            units,
            *(
                _per_layer({name: True, **config}, name, num_layers, "true or false", lambda value: value in (0, 1))
                for name in ("encoder_use_attention", "encoder_use_feed_forward")
            ),
            strict=True,
        )
        return cls(
            [
                Layer(of_layer if attention else None, number if feed_forward else None)
                for of_layer, number, attention, feed_forward in layers
            ],
            hidden_size,
            num_heads,
            num_buckets,
        )

    @classmethod
    def from_student(cls, config: PreTrainedConfig) -> "Structure":
        """
        That of a student. WavLM's first attention block, which stores the embedding of positions that all layers use,
        is there even if it adds nothing.
        """
        num_buckets = getattr(config, "num_buckets", None)
        layers = []
        for index, heads in enumerate(config.remaining_heads):
            stores_positions = index == 0 and num_buckets is not None
            has_attention = stores_positions or index not in config.removed_attention_blocks
            has_feed_forward = index not in config.removed_ffn_blocks
            units = config.intermediate_sizes[index]
            layers.append(Layer(list(heads) if has_attention else None, units if has_feed_forward else None))
        return cls(layers, config.hidden_size, config.num_attention_heads, num_buckets)


# ---- The config ----


def student_fields(
    config: Mapping[str, Any], structure: Structure, weights: Mapping[str, torch.Tensor]
) -> dict[str, Any]:
    """
    Fields of a student's config.

    Args:
        config (`Mapping`): arguments of the format's model.
        structure ([`Structure`]): of these.
        weights (`Mapping[str, torch.Tensor]`): as [`unify_names`] returns them.

    Raises:
        `ValueError`: if an argument is missing or is not among the possible ones.
    """
    mode = config.get("extractor_mode")
    if not isinstance(mode, str) or mode not in MODES:
        raise ValueError(f"`extractor_mode` must be one of {', '.join(MODES)}, but is {_short(mode)}")
    convolutions = config.get("extractor_conv_layer_config")
    convolutions = CONV_LAYERS if convolutions is None else convolutions
    is_list = isinstance(convolutions, (list, tuple)) and len(convolutions) > 0
    if not is_list or not all(isinstance(entry, (list, tuple)) and len(entry) == 3 for entry in convolutions):
        raise ValueError(
            "`extractor_conv_layer_config` must list channels, kernel and stride of each convolution, but is"
            f" {_short(convolutions)}"
        )
    same = FIELDS | (WAVLM_FIELDS if structure.is_wavlm else {})
    missing = [name for name in same if name not in config]
    if missing:
        raise ValueError(f"it lacks `{'`, `'.join(missing)}`")
    layers = structure.layers
    masks = MASK_EMBEDDING in weights
    fields = {
        **{field: config[name] for name, field in same.items()},
        "feat_extract_norm": MODES[mode],
        **dict(
            zip(("conv_dim", "conv_kernel", "conv_stride"), map(list, zip(*convolutions, strict=True)), strict=True)
        ),
        "num_attention_heads": structure.num_heads,
        # That of the teacher is not in the format; it is four times the width in all published models.
        "intermediate_size": max(4 * structure.hidden_size, *(layer.units or 0 for layer in layers)),
        "remaining_heads": [layer.heads or [] for layer in layers],
        "intermediate_sizes": [layer.units or 0 for layer in layers],
        "removed_attention_blocks": [
            index
            for index, layer in enumerate(layers)
            if layer.heads is None or _only_stores_positions(index, structure, weights)
        ],
        "removed_ffn_blocks": [index for index, layer in enumerate(layers) if layer.units is None],
        "scaled_features": bool((weights[DUMMY_WEIGHT] != 1).any()),
        "apply_spec_augment": masks,
        "hidden_act": FIXED_FIELDS["hidden_act"],
        "feat_extract_activation": FIXED_FIELDS["feat_extract_activation"],
        "layer_norm_eps": FIXED_FIELDS["layer_norm_eps"],
    }
    return fields if masks else fields | {"mask_time_prob": 0.0, "mask_feature_prob": 0.0}


def format_config(config: PreTrainedConfig, structure: Structure, normalize: bool) -> dict[str, Any]:
    """
    The arguments of the format's model for a student with `config`.

    Args:
        config (`PreTrainedConfig`): of the student.
        structure ([`Structure`]): of the student.
        normalize (`bool`): whether the model is to normalise waveforms, as the student's feature extractor does.

    Raises:
        `ValueError`: if the student computes something that the format has no argument for.
    """
    for name, value in FIXED_FIELDS.items():
        if getattr(config, name, value) != value:
            raise ValueError(
                f"`{name}` of the student is {getattr(config, name)!r}; models of DPHuBERT's format have {value!r}."
            )
    head_dim = config.hidden_size // config.num_attention_heads
    if any(size != head_dim for size in config.value_sizes):
        raise ValueError(
            f"The student's heads have values of {min(config.value_sizes)} to {max(config.value_sizes)} dimensions"
            f" (`value_sizes`); in models of DPHuBERT's format all have {head_dim}."
        )
    same = FIELDS | (WAVLM_FIELDS if structure.is_wavlm else {})
    layers, number = structure.layers, len(structure.layers)
    if structure.is_wavlm:
        heads = {
            "encoder_total_num_heads": [structure.num_heads] * number,
            "encoder_remaining_heads": [layer.heads or [] for layer in layers],
        }
    else:
        heads = {
            "encoder_num_heads": [len(layer.heads or []) for layer in layers],
            "encoder_head_dim": head_dim,
        }
    return {
        **{name: getattr(config, field) for name, field in same.items()},
        "extractor_mode": {norm: mode for mode, norm in MODES.items()}[config.feat_extract_norm],
        "extractor_conv_layer_config": list(zip(config.conv_dim, config.conv_kernel, config.conv_stride, strict=True)),
        **heads,
        "encoder_use_attention": [layer.heads is not None for layer in layers],
        "encoder_use_feed_forward": [layer.units is not None for layer in layers],
        "encoder_ff_interm_features": [layer.units or 0 for layer in layers],
        "aux_num_out": None,
        "normalize_waveform": normalize,
        **dict.fromkeys(GATES, False),
    }


def in_names_of_format(message: str) -> str:
    """An error of a student's config, with the names that the arguments have in the format."""
    names = {field: name for name, field in (FIELDS | WAVLM_FIELDS).items()} | _SOURCES
    for field, name in names.items():
        message = re.sub(rf"`{field}([`\[])", rf"`{name}\1", message)
    return message


# ---- The weights ----


def unify_names(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Weights by the names that DPHuBERT gives them, whether it, DiariZen or torchaudio has written them: the latter two
    have new names for the weight norm, and torchaudio's WavLM one tensor of query, key and value. The layer of a task
    (`aux`) is left out. A weight whose norm was removed gets it back.
    """
    unified = {}
    for name, tensor in weights.items():
        for new, old in _WEIGHT_NORM.items():
            name = name.replace(new, old)
        block, _, kind = name.rpartition("attention.attention.")
        if block and kind in ("in_proj_weight", "in_proj_bias"):
            for projection, part in zip("qkv", tensor.chunk(3), strict=False):
                unified[f"{block}attention.{projection}_proj.{kind.removeprefix('in_proj_')}"] = part
        elif block:
            unified[f"{block}attention.{kind}"] = tensor
        elif name.endswith("pos_conv_embed.conv.weight") and tensor.dim() == 3:
            unified[f"{name}_v"] = tensor
            unified[f"{name}_g"] = tensor.float().norm(dim=(0, 1), keepdim=True).to(tensor.dtype)
        elif not name.startswith("aux."):
            unified[name] = tensor
    projection = unified.get("encoder.feature_projection.projection.weight")
    if DUMMY_WEIGHT not in unified and projection is not None:  # torchaudio's models have none
        unified[DUMMY_WEIGHT] = projection.new_ones(projection.shape[-1])
    return unified


def to_format(state: Mapping[str, torch.Tensor], structure: Structure) -> dict[str, torch.Tensor]:
    """
    The weights of a student, by their names and in their shapes in the format; also of a student on the meta device.
    The embedding of SpecAugment, which the format does not have, is left out.
    """
    state = {name: tensor for name, tensor in state.items() if name != MASK_EMBEDDING}
    projection = state["feature_projection.projection.weight"]
    state.setdefault(_SCALE, projection.new_ones(projection.shape[1]))
    for index, layer in enumerate(structure.layers):
        prefix = f"encoder.layers.{index}."
        if layer.heads is None:
            state.pop(f"{prefix}attention.rel_attn_embed.weight", None)
        else:
            _complete_attention(state, f"{prefix}attention.", layer.heads, structure, projection.new_zeros)
        if layer.units == 0:
            _complete_linear(
                state,
                f"{prefix}feed_forward.",
                ("intermediate_dense",),
                "output_dense",
                structure,
                projection.new_zeros,
            )
    return {_format_name(name): tensor for name, tensor in state.items()}


def from_format(weights: Mapping[str, torch.Tensor], structure: Structure) -> dict[str, torch.Tensor]:
    """
    The weights of a student.

    Args:
        weights (`Mapping[str, torch.Tensor]`): complete, as [`unify_names`] returns them.
        structure ([`Structure`]): of their model.
    """
    state = {_student_name(name): tensor for name, tensor in weights.items()}
    if not (state[_SCALE] != 1).any():
        del state[_SCALE]
    for index, layer in enumerate(structure.layers):
        attention, feed_forward = (f"encoder.layers.{index}.{block}." for block in ("attention", "feed_forward"))
        if layer.heads == []:
            bias = state[f"{attention}out_proj.bias"]
            for name in [name for name in state if name.startswith(attention) and name != _POSITIONS]:
                del state[name]
            if not _only_stores_positions(index, structure, weights):
                state[f"{attention}output_bias.bias"] = bias
        elif layer.heads and structure.is_wavlm:
            constants = state[f"{attention}gru_rel_pos_const"]
            state[f"{attention}gru_rel_pos_const"] = constants[:, layer.heads]
        if layer.units == 0:
            bias = state[f"{feed_forward}output_dense.bias"]
            for name in [name for name in state if name.startswith(feed_forward)]:
                del state[name]
            state[f"{feed_forward}output_bias.bias"] = bias
    if structure.is_wavlm and structure.layers[0].heads is None:
        # Without its first attention block a model of the format has no position bias in any layer.
        reference = state["feature_projection.projection.weight"]
        state[_POSITIONS] = reference.new_zeros(structure.num_buckets, structure.num_heads)
    return state


def _complete_attention(state, prefix: str, heads: list[int], structure: Structure, zeros: Callable) -> None:
    """Adds what the block of the format has and that of the student has not, in place."""
    if not heads:
        projections = ("q_proj", "k_proj", "v_proj")
        _complete_linear(state, prefix, projections, "out_proj", structure, zeros)
    if structure.is_wavlm:
        head_dim = structure.hidden_size // structure.num_heads
        state.setdefault(f"{prefix}gru_rel_pos_linear.weight", zeros(8, head_dim))
        state.setdefault(f"{prefix}gru_rel_pos_linear.bias", zeros(8))
        constants = torch.ones_like(zeros(1, structure.num_heads, 1, 1))
        if heads:
            indices = torch.tensor(heads, device=constants.device)
            constants = constants.index_copy(1, indices, state[f"{prefix}gru_rel_pos_const"])
        state[f"{prefix}gru_rel_pos_const"] = constants


def _complete_linear(state, prefix: str, inputs: tuple, output: str, structure: Structure, zeros: Callable) -> None:
    """A block of no units: maps to and from a width of 0, of which the bias is what it adds."""
    size, bias = structure.hidden_size, state.pop(f"{prefix}output_bias.bias", None)
    for name in inputs:
        state |= {f"{prefix}{name}.weight": zeros(0, size), f"{prefix}{name}.bias": zeros(0)}
    state[f"{prefix}{output}.weight"] = zeros(size, 0)
    state[f"{prefix}{output}.bias"] = zeros(size) if bias is None else bias


def _only_stores_positions(index: int, structure: Structure, weights: Mapping[str, torch.Tensor]) -> bool:
    """Whether this is WavLM's first attention block, kept for its embedding alone, as [`to_format`] writes it."""
    bias = weights.get(f"encoder.transformer.layers.{index}.attention.out_proj.bias")
    return index == 0 and structure.is_wavlm and structure.layers[0].heads == [] and not (bias is None or bias.any())


def _format_name(name: str) -> str:
    if name == _SCALE:
        return DUMMY_WEIGHT
    if name.startswith("feature_projection."):
        return f"encoder.{name}"
    for new, old in _WEIGHT_NORM.items():
        name = name.replace(new, old)
    return re.sub(r"^encoder\.", "encoder.transformer.", name)


def _student_name(name: str) -> str:
    if name == DUMMY_WEIGHT:
        return _SCALE
    name = name.removeprefix("encoder.") if name.startswith("encoder.feature_projection.") else name
    for new, old in _WEIGHT_NORM.items():
        name = re.sub(rf"(pos_conv_embed\.conv\.){old}$", rf"\g<1>{new}", name)
    return name.replace("encoder.transformer.", "encoder.", 1)


# ---- Values in a config ----


def _is_number(least: int, most: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and least <= value <= most


def _count(config: Mapping[str, Any], name: str, most: int = MAX_SIZE) -> int:
    value = config.get(name)
    if not _is_number(1, most)(value):
        raise ValueError(f"`{name}` must be a whole number from 1 to {most}, but is {_short(value)}")
    return value


def _per_layer(config: Mapping[str, Any], name: str, num_layers: int, what: str, is_possible: Callable) -> list:
    value = config.get(name)
    values = list(value) if isinstance(value, (list, tuple)) else [value] * num_layers
    if len(values) != num_layers or not all(map(is_possible, values)):
        raise ValueError(f"`{name}` must be {what} for each of {num_layers} layers, but is {_short(value)}")
    return values


def _short(value: Any) -> str:
    try:
        return " ".join(reprlib.repr(value).split())
    except ValueError:  # a number of more digits than Python prints
        return f"a {type(value).__name__}"
