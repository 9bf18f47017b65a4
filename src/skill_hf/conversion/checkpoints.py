"""
Checkpoints of other programs, read without running any code of theirs: pickles of plain data alone are loaded.

Whatever the format, what is read is told in that of DPHuBERT (see `dphubert_format.py`). Formats that do not name the
shape of their model get it from the shapes of the weights, which is enough where nothing was pruned.
"""

import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..files import parse_json
from . import fairseq_format
from .dphubert_format import MASK_EMBEDDING, Structure, unify_names


# Where a file that this package writes keeps what DPHuBERT's format has no place for.
STUDENT_ENTRY = "skill_hf"

# The encoder in a checkpoint of DiariZen's whole model, whose other parts are left out.
_DIARIZEN_PREFIX = "wavlm_model."
_FORMATS = "those of DPHuBERT, DiariZen, torchaudio, fairseq and s3prl"
# Strides of the convolutions of all published models, by their kernels.
_STRIDES = {(10, 3, 3, 3, 3, 2, 2): (5, 2, 2, 2, 2, 2, 2)}
# Heads of all published models, by their width, for families that do not show them in any shape.
_HEADS = {768: 12, 1024: 16, 1280: 16, 1920: 16}


@dataclass
class Checkpoint:
    """
    An encoder as another program has saved it.

    Args:
        format (`str`): what its format is called.
        family (`str`): `model_type` of the stock model.
        config (`dict`): arguments of DPHuBERT's model.
        weights (`dict[str, torch.Tensor]`): by the names that DPHuBERT gives them.
        structure ([`Structure`]): of the config.
        left_out (`list[str]`): what of the file is not part of the encoder.
        student_config (`dict`): fields of the student that the file was written from, if it was.
    """

    format: str
    family: str
    config: dict[str, Any]
    weights: dict[str, torch.Tensor] = field(repr=False)
    structure: Structure = field(repr=False)
    left_out: list[str] = field(default_factory=list)
    student_config: dict[str, Any] = field(default_factory=dict, repr=False)


def read_checkpoint(
    path: str | os.PathLike, config_file: str | os.PathLike | None = None, family: str | None = None
) -> Checkpoint:
    """
    Reads a file of any of the formats.

    Args:
        path (`str` or `PathLike`): the file.
        config_file (`str` or `PathLike`, *optional*): JSON file of the arguments of DPHuBERT's model, for a file of
            pruned weights that does not have them.
        family (`str`, *optional*): `model_type` of the stock model. By default WavLM is told by its weights, fairseq's
            wav2vec 2.0 by its settings, and everything else is HuBERT.

    Raises:
        `ValueError`: if it cannot be read, is of another format, or has no possible config. The message is the reason.
    """
    content = _load(Path(path))
    settings = fairseq_format.model_settings(content)
    if settings is not None:
        return _from_fairseq(*settings, config_file, family)
    name, config, weights, left_out = _parts_of(content)
    weights = unify_names(_checked(weights))
    if "encoder.feature_projection.projection.weight" not in weights:
        raise ValueError(_unknown(content))
    config = _chosen_config(config, config_file, weights)
    entry = content.get(STUDENT_ENTRY)
    entry = entry if isinstance(entry, Mapping) else {}
    if isinstance(entry.get(MASK_EMBEDDING), torch.Tensor):
        weights |= _checked({MASK_EMBEDDING: entry[MASK_EMBEDDING]})
    structure, own = Structure.from_format(config), entry.get("config")
    if family is None and not structure.is_wavlm and isinstance(entry.get("family"), str):
        family = entry["family"]
    return Checkpoint(
        name,
        _family(structure, family, "hubert"),
        config,
        weights,
        structure,
        left_out,
        dict(own) if isinstance(own, Mapping) else {},
    )


def _parts_of(content: Mapping[str, Any]) -> tuple[str, Any, Any, list[str]]:
    """
    Name of the format, config and weights of the encoder, and what else there is.

    Raises:
        `ValueError`: if its program has to do something with it before.
    """
    name, config, weights, others = "DPHuBERT's format", content.get("config"), content.get("state_dict"), []
    if weights is None:
        name, config, weights = "torchaudio's weights", None, content
    if not isinstance(weights, Mapping):
        return name, config, weights, others
    names = [key for key in weights if isinstance(key, str)]
    if any(key.startswith("student_model.") for key in names):
        raise ValueError("it is a checkpoint of DPHuBERT's training; take what its save_final_ckpt.py writes")
    if any("hard_concrete" in key for key in names):
        raise ValueError("it still has gates (hard_concrete); take what prune.py or apply_pruning.py writes")
    encoder = [key for key in names if key.startswith(_DIARIZEN_PREFIX)]
    if encoder:
        name, others = "DiariZen's whole model", sorted({key.partition(".")[0] for key in {*names} - {*encoder}})
        weights = {key.removeprefix(_DIARIZEN_PREFIX): weights[key] for key in encoder}
    if any(str(key).startswith("aux.") for key in weights):
        others.append("aux")
    return name, config, weights, others


def _chosen_config(config: Any, config_file: str | os.PathLike | None, weights: Mapping[str, torch.Tensor]) -> dict:
    if config_file is not None and config is not None:
        raise ValueError("it has a config of its own; leave out the other one")
    if config_file is not None:
        config = _read_config(config_file)
    config = infer_config(weights) if config is None else config
    if not isinstance(config, Mapping):
        raise ValueError(f"its `config` is a {type(config).__name__}, not names and values")
    return dict(config)


def _from_fairseq(model, task, weights, config_file, family) -> Checkpoint:
    if config_file is not None:
        raise ValueError("it has a config of its own; leave out the other one")
    weights = _checked(weights)
    told = fairseq_format.family_of(model, weights)
    config = fairseq_format.dphubert_config(model, task, told == "wavlm")
    weights = unify_names(fairseq_format.dphubert_weights(weights))
    structure = Structure.from_format(config)
    return Checkpoint("fairseq's format", _family(structure, family, told), config, weights, structure)


def _family(structure: Structure, wanted: str | None, default: str) -> str:
    family = "wavlm" if structure.is_wavlm else default
    if wanted is not None and structure.is_wavlm != (wanted == "wavlm"):
        raise ValueError(f"it is of {'WavLM' if structure.is_wavlm else 'another family than WavLM'}, not `{wanted}`")
    return wanted or family


def infer_config(weights: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """
    The arguments of DPHuBERT's model for unpruned weights, from their shapes. Those that have no shape are as in all
    published models: the strides, post-norm with the group norm and pre-norm with layer norms, and the width of heads.

    Args:
        weights (`Mapping[str, torch.Tensor]`): as [`~skill_hf.conversion.dphubert_format.unify_names`] returns them.

    Raises:
        `ValueError`: if the shapes are of no published model, or heads were pruned, of which they do not tell which.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    number = len({name for name in shapes if re.fullmatch(r"feature_extractor\.conv_layers\.\d+\.conv\.weight", name)})
    convolutions = [shapes.get(f"feature_extractor.conv_layers.{index}.conv.weight", ()) for index in range(number)]
    kernels = tuple(shape[-1] for shape in convolutions if len(shape) == 3)
    layers = [name for name in shapes if re.fullmatch(r"encoder\.transformer\.layers\.\d+\.layer_norm\.weight", name)]
    heads_of_wavlm = shapes.get("encoder.transformer.layers.0.attention.gru_rel_pos_const")
    hidden_size = shapes["encoder.feature_projection.projection.weight"][0]
    heads = _HEADS.get(hidden_size) if heads_of_wavlm is None else heads_of_wavlm[1]
    positional = shapes.get("encoder.transformer.pos_conv_embed.conv.weight_v", ())
    projections = [shapes.get(f"encoder.transformer.layers.{i}.attention.q_proj.weight") for i in range(len(layers))]
    units = [
        shapes.get(f"encoder.transformer.layers.{i}.feed_forward.intermediate_dense.weight")
        for i in range(len(layers))
    ]
    whole = all(shape == (hidden_size, hidden_size) for shape in projections) and None not in units
    if kernels not in _STRIDES or heads is None or len(positional) != 3 or not layers or not whole:
        raise ValueError(
            "it contains weights alone, which do not tell the whole shape of this model; give its config with --config"
        )
    layer_norms = "feature_extractor.conv_layers.1.layer_norm.weight" in shapes
    config = {
        "extractor_mode": "layer_norm" if layer_norms else "group_norm",
        "extractor_conv_layer_config": [
            (shape[0], shape[2], stride) for shape, stride in zip(convolutions, _STRIDES[kernels], strict=True)
        ],
        "extractor_conv_bias": "feature_extractor.conv_layers.0.conv.bias" in shapes,
        "encoder_embed_dim": hidden_size,
        "encoder_projection_dropout": 0.0,
        "encoder_pos_conv_kernel": positional[2],
        "encoder_pos_conv_groups": positional[0] // max(1, positional[1]),
        "encoder_num_layers": len(layers),
        "encoder_attention_dropout": 0.0,
        "encoder_ff_interm_features": [shape[0] for shape in units],
        "encoder_ff_interm_dropout": 0.0,
        "encoder_dropout": 0.0,
        "encoder_layer_norm_first": layer_norms,
        "encoder_layer_drop": 0.0,
        "normalize_waveform": layer_norms,
    }
    if heads_of_wavlm is None:
        return config | {"encoder_num_heads": heads}
    return config | {
        "encoder_total_num_heads": heads,
        "encoder_remaining_heads": [list(range(heads)) for _ in layers],
        "encoder_num_buckets": shapes.get("encoder.transformer.layers.0.attention.rel_attn_embed.weight", (320,))[0],
        "encoder_max_distance": 800,
    }


def _load(path: Path) -> Mapping[str, Any]:
    if path.is_dir():
        raise ValueError("it is a directory; name the file of the checkpoint in it")
    if not path.is_file():
        raise ValueError("there is no such file" if not os.path.lexists(path) else "it is not a regular file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch tells how old the file is
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        classes = sorted(set(re.findall(r"GLOBAL ([\w.]+)", str(error))))
        if classes:
            raise ValueError(
                f"it contains objects ({', '.join(classes)[:100]}), whose code is not run; save its settings as a dict"
                " beside its weights, or take the model that transformers has"
            ) from error
        raise ValueError("it is not a pickle of plain data and weights, the only one that is read") from error
    if not isinstance(content, Mapping):
        raise ValueError(
            f"its content is of type {type(content).__name__}, which is none of the formats that are read: {_FORMATS}"
        )
    return content


def _unknown(content: Mapping[str, Any]) -> str:
    names = ", ".join(str(key)[:60] for key in list(content)[:4]) or "nothing"
    return f"its content, {names}, is of none of the formats that are read: {_FORMATS}"


def _checked(weights: Any) -> dict[str, torch.Tensor]:
    """
    Weights by name, each as large as the file says.

    Raises:
        `ValueError`: if they are something else.
    """
    if not isinstance(weights, Mapping):
        raise ValueError(f"its weights are a {type(weights).__name__}, not tensors by name")
    for name, tensor in weights.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise ValueError(_unknown(weights))
        if tensor.layout != torch.strided or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise ValueError(f"{name} in it is larger than the file says")
        if not tensor.is_floating_point():
            raise ValueError(
                f"{name} in it is of type {str(tensor.dtype).removeprefix('torch.')}, but must be floating"
            )
    return dict(weights)


def _read_config(path: str | os.PathLike) -> Any:
    try:
        return parse_json(path)
    except ValueError as error:
        raise ValueError(f"its config {path} is not a JSON file that can be read: {error}") from error
