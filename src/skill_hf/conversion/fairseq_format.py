"""
The formats of fairseq and of programs that follow it: names of weights and settings, for unpruned models.

- WavLM as its authors publish it: `{"cfg", "model"}`, the settings in one dict.
- fairseq's own: the same with the settings of the model in `cfg["model"]` and those of the task in `cfg["task"]`.
- s3prl's copies of these: `{"model_cfg", "task_cfg", "model_weight"}`.
"""

import ast
import re
from collections.abc import Mapping
from typing import Any

import torch

from .dphubert_format import CONV_LAYERS, MASK_EMBEDDING


# Patterns of names -> those of DPHuBERT's format.
_NAMES = {
    r"feature_extractor\.conv_layers\.(\d+)\.0\.(weight|bias)": r"feature_extractor.conv_layers.\1.conv.\2",
    r"feature_extractor\.conv_layers\.(\d+)\.2\.(?:1\.)?(weight|bias)": (
        r"feature_extractor.conv_layers.\1.layer_norm.\2"
    ),
    r"post_extract_proj\.(weight|bias)": r"encoder.feature_projection.projection.\1",
    r"layer_norm\.(weight|bias)": r"encoder.feature_projection.layer_norm.\1",
    r"encoder\.pos_conv\.0\.(.+)": r"encoder.transformer.pos_conv_embed.conv.\1",
    r"encoder\.layer_norm\.(weight|bias)": r"encoder.transformer.layer_norm.\1",
    r"encoder\.layers\.(\d+)\.self_attn\.([qkv]|out)_proj\.(weight|bias)": (
        r"encoder.transformer.layers.\1.attention.\2_proj.\3"
    ),
    r"encoder\.layers\.(\d+)\.self_attn\.grep_linear\.(weight|bias)": (
        r"encoder.transformer.layers.\1.attention.gru_rel_pos_linear.\2"
    ),
    r"encoder\.layers\.(\d+)\.self_attn\.grep_a": r"encoder.transformer.layers.\1.attention.gru_rel_pos_const",
    r"encoder\.layers\.(\d+)\.self_attn\.relative_attention_bias\.weight": (
        r"encoder.transformer.layers.\1.attention.rel_attn_embed.weight"
    ),
    r"encoder\.layers\.(\d+)\.self_attn_layer_norm\.(weight|bias)": r"encoder.transformer.layers.\1.layer_norm.\2",
    r"encoder\.layers\.(\d+)\.fc1\.(weight|bias)": (
        r"encoder.transformer.layers.\1.feed_forward.intermediate_dense.\2"
    ),
    r"encoder\.layers\.(\d+)\.fc2\.(weight|bias)": r"encoder.transformer.layers.\1.feed_forward.output_dense.\2",
    r"encoder\.layers\.(\d+)\.final_layer_norm\.(weight|bias)": (r"encoder.transformer.layers.\1.final_layer_norm.\2"),
    r"mask_emb": MASK_EMBEDDING,
}
# Of pretraining alone.
_LEFT_OUT = r"(quantizer|project_q|final_proj|label_embs_concat|target_glu|input_quantizer|project_inp)(\..+)?"

_MODES = {"default": "group_norm", "layer_norm": "layer_norm"}
# Settings that are arguments of DPHuBERT's model, and what they are where they are not set.
_SETTINGS = {
    "conv_bias": ("extractor_conv_bias", False),
    "encoder_embed_dim": ("encoder_embed_dim", 768),
    "dropout_input": ("encoder_projection_dropout", 0.0),
    "conv_pos": ("encoder_pos_conv_kernel", 128),
    "conv_pos_groups": ("encoder_pos_conv_groups", 16),
    "encoder_layers": ("encoder_num_layers", 12),
    "attention_dropout": ("encoder_attention_dropout", 0.1),
    "encoder_ffn_embed_dim": ("encoder_ff_interm_features", 3072),
    "activation_dropout": ("encoder_ff_interm_dropout", 0.0),
    "dropout": ("encoder_dropout", 0.1),
    "layer_norm_first": ("encoder_layer_norm_first", False),
    "encoder_layerdrop": ("encoder_layer_drop", 0.0),
}
# What models of other families set, and the only values that are converted.
_FIXED = {"activation_fn": "gelu", "layer_type": "transformer", "pos_conv_depth": 1, "conv_pos_batch_norm": False}
_MOST_CONVOLUTIONS = 256


def model_settings(content: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], Mapping[str, Any]] | None:
    """Settings of the model, those of the task, and the weights; `None` if the content is of another format."""
    if "model_weight" in content:
        model, task, weights = content.get("model_cfg"), content.get("task_cfg"), content["model_weight"]
    elif "model" in content and "cfg" in content:
        model, weights = content["cfg"], content["model"]
        task = model
        if isinstance(model, Mapping) and isinstance(model.get("model"), Mapping):
            model, task = model["model"], model.get("task")
    else:
        return None
    if not isinstance(model, Mapping):
        raise ValueError("the settings of its model (`cfg`) are not a dict")
    return dict(model), dict(task) if isinstance(task, Mapping) else {}, weights


def family_of(model: Mapping[str, Any], weights: Mapping[str, Any]) -> str:
    """The `model_type` of the stock model: by the weights, since WavLM's files do not name it."""
    if any(".grep_" in name for name in weights):
        return "wavlm"
    is_wav2vec2 = model.get("_name") == "wav2vec2" or any(name.startswith("quantizer.") for name in weights)
    return "wav2vec2" if is_wav2vec2 else "hubert"


def dphubert_config(model: Mapping[str, Any], task: Mapping[str, Any], is_wavlm: bool) -> dict[str, Any]:
    """
    The arguments of DPHuBERT's model.

    Raises:
        `ValueError`: if a setting is of a model that computes something else.
    """
    for name, value in _FIXED.items():
        if model.get(name, value) != value:
            raise ValueError(f"`{name}` of its settings is {model[name]!r}; only {value!r} is converted")
    mode = model.get("extractor_mode", "default")
    if not isinstance(mode, str) or mode not in _MODES:
        raise ValueError(f"`extractor_mode` of its settings is {mode!r}; it must be one of {', '.join(_MODES)}")
    config = {name: model.get(setting, default) for setting, (name, default) in _SETTINGS.items()}
    config |= {
        "extractor_mode": _MODES[mode],
        "extractor_conv_layer_config": read_conv_layers(model.get("conv_feature_layers")),
        "normalize_waveform": bool(task.get("normalize", model.get("normalize", False))),
    }
    heads = model.get("encoder_attention_heads", 12)
    if not is_wavlm:
        return config | {"encoder_num_heads": heads}
    known = type(heads) is int and 0 < heads <= 1024
    return config | {
        "encoder_total_num_heads": heads,
        "encoder_remaining_heads": [list(range(heads)) if known else heads] * _layers(config["encoder_num_layers"]),
        "encoder_num_buckets": model.get("num_buckets", 320),
        "encoder_max_distance": model.get("max_distance", 1280),
    }


def _layers(number: Any) -> int:
    return number if type(number) is int and 0 <= number <= _MOST_CONVOLUTIONS else 0


def read_conv_layers(text: Any) -> list:
    """
    Channels, kernel and stride of each convolution, of an expression such as `[(512,10,5)] + [(512,3,2)] * 4`, of
    which nothing is run.

    Raises:
        `ValueError`: if it is something else.
    """
    if text is None:
        return CONV_LAYERS
    if not isinstance(text, str):
        return text
    try:
        return _value(ast.parse(text[:10_000].strip(), mode="eval").body)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError(f"`conv_feature_layers` of its settings is {text[:80]!r}, no list of convolutions") from error


def _value(node: ast.AST) -> Any:
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(entry) for entry in node.elts]
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Mult):
        left, right = _value(node.left), _value(node.right)
        value = left + right if isinstance(node.op, ast.Add) else _repeated(left, right)
        if isinstance(value, list) and len(value) <= _MOST_CONVOLUTIONS:
            return value
    raise ValueError("unknown expression")


def _repeated(left: Any, right: Any) -> list:
    """A list that is repeated a number of times, in either order."""
    values, times = (left, right) if isinstance(left, list) else (right, left)
    if not isinstance(values, list) or type(times) is not int or times * len(values) > _MOST_CONVOLUTIONS:
        raise ValueError("no repetition of a list")
    return values * times


def dphubert_weights(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Weights by the names of DPHuBERT's format. Those of pretraining alone are left out; unknown ones keep their names.

    Raises:
        `ValueError`: if they are of a model with a layer for a task.
    """
    if any(name.startswith(("w2v_encoder.", "w2v_model.")) for name in weights):
        raise ValueError("it was fine-tuned for a task, which fairseq's format tells in another way; take its encoder")
    renamed = {}
    for name, tensor in weights.items():
        if re.fullmatch(_LEFT_OUT, name):
            continue
        for pattern, new in _NAMES.items():
            match = re.fullmatch(pattern, name)
            if match:
                name = match.expand(new)
                break
        renamed[name] = tensor
    return renamed
