# Copyright 2026 The skill-hf authors. Licensed under the Apache License, Version 2.0.
"""
Checks a student's weights against its config, before memory is allocated and after loading. This file is published
with every student and is self-contained.
"""

import os

import torch
from safetensors import safe_open


_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
_HEAD_FIELDS = {
    "lm_head": "vocab_size",
    "projector": "classifier_proj_size",
    "classifier": "num_labels",
    "tdnn": "tdnn_dim",
    "feature_extractor": "xvector_output_dim",
    "objective": "num_labels",
    "adapter": "output_hidden_size",
}


def check_declared(model, declared):
    """
    Raises a `ValueError` if the shapes of the model differ from the declared ones (name -> weight), or if weights are
    not floating-point or far fewer than the model's.
    """
    prefix = f"{model.base_model_prefix}."
    for name, tensor in declared.items():
        # A batch norm counts its batches.
        if not tensor.is_floating_point() and not name.endswith(".num_batches_tracked"):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(
                f"{name} of this student is of type {kind}, but weights must be floating point: the file is damaged or"
                " belongs to a different model. Download it again."
            )
    declared = {name.removeprefix(prefix): tensor.shape for name, tensor in declared.items()}
    wanted = {name.removeprefix(prefix): tensor.shape for name, tensor in model.state_dict().items()}
    differing = {name: shape for name, shape in wanted.items() if declared.get(name, shape) != shape}
    check_weights(model, {name: _mismatch(declared[name], shape) for name, shape in differing.items()})
    absent = {name: shape.numel() for name, shape in wanted.items() if declared.get(name) != shape}
    stored = sum(shape.numel() for shape in declared.values())
    if sum(absent.values()) > 2 * stored + 2**24:
        name = max(absent, key=absent.get)
        field = _field_of(name, model.config.num_hidden_layers) or _HEAD_FIELDS.get(name.partition(".")[0], name)
        raise ValueError(
            f"The config of this student describes far more than its weights contain ({stored:,} numbers): {name} of"
            f" shape {tuple(wanted[name])}. Check `{field}`."
        )


def check_weights(model, found, fewer_layers=False):
    """
    Raises a `ValueError` for the first weight of the encoder in `found`, which contains the problem of each weight
    and, for a wrong shape, the shapes in the file and in the model.
    """
    found = {name.removeprefix(f"{model.base_model_prefix}."): problem for name, problem in found.items()}
    order = {name: index for index, name in enumerate(model.base_model.state_dict())}
    # The number of heads changes other shapes, too, but only this one alone.
    order |= {name: -1 for name in order if "rel_attn_embed" in name}
    for name in sorted(found, key=lambda name: (order.get(name, len(order)), name)):
        problem, shapes = found[name]
        field = _field_of(name, model.config.num_hidden_layers, shapes)
        if field is not None and not (fewer_layers and field == "num_hidden_layers"):
            raise ValueError(
                f"Weights and config of this student disagree about `{field}`: {name} {problem}. One of them is"
                " damaged or belongs to a different model: download both again, or leave out the argument that"
                " changed the config."
            )


def declared_weights(model, state_dict, checkpoint_files):
    """The weights by name, as tensors without memory; of local files, only those in the model's own directory."""
    if state_dict is not None:
        return {name: tensor for name, tensor in state_dict.items() if isinstance(tensor, torch.Tensor)}
    directory = os.path.abspath(model.config.name_or_path or "")
    declared = {}
    for path in map(str, checkpoint_files or ()):
        if os.path.isdir(directory) and os.path.commonpath([directory, os.path.abspath(path)]) != directory:
            raise ValueError(f"The index of this student names weights outside its directory: {path}.")
        try:
            weights = _read_shapes(path)
        except Exception as error:
            reason = next(iter(str(error).splitlines()), "")
            raise ValueError(
                f"{os.path.basename(path)} of this student cannot be read: download it again. ({reason})"
            ) from error
        if sum(tensor.nbytes for tensor in weights.values()) > 2 * os.path.getsize(path):
            raise ValueError(f"{os.path.basename(path)} of this student declares more weights than it contains.")
        declared |= weights
    return declared


def _read_shapes(path):
    if not path.endswith(".safetensors"):
        return torch.load(path, map_location="meta", weights_only=True)
    with safe_open(path, framework="pt") as file:
        parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {
            name: torch.empty(part.get_shape(), dtype=_DTYPES.get(part.get_dtype(), torch.uint8), device="meta")
            for name, part in parts.items()
        }


def check_finite(model, but):
    for name, tensor in model.state_dict().items():
        if name in but or tensor.is_meta or not tensor.numel() or not tensor.is_floating_point():
            continue
        if not all(torch.isfinite(extreme) for extreme in torch.aminmax(tensor)):
            raise ValueError(
                f"{name} of this student has NaN or infinite weights: the file is damaged. Download it again."
            )


def _mismatch(there, here):
    return f"has shape {tuple(there)} instead of {tuple(here)}", (tuple(there), tuple(here))


def mismatched_weights(info):
    """Names of weights with a wrong shape, and the problem of each."""
    found = {}
    for entry in info["mismatched_keys"]:
        name, *shapes = [entry] if isinstance(entry, str) else entry  # transformers 4 gives the name alone
        found[name] = _mismatch(*shapes) if shapes else ("has a different shape", None)
    return found


def _field_of(name, num_hidden_layers, shapes=None):
    """
    The field of the config that determines the shape of this weight, or `None` if it is not one of the pruned shapes.
    `shapes` are those in the file and in the model, if both have it.
    """
    parts = name.split(".")
    differing = [there != here for there, here in zip(*shapes, strict=False)] if shapes else []
    if name.startswith("feature_extractor.conv_layers."):
        if not shapes and name.endswith("conv.bias"):
            return "conv_bias"
        if not shapes and "layer_norm" in name:
            return "feat_extract_norm"
        return f"conv_kernel[{parts[2]}]" if differing == [False, False, True] else f"conv_dim[{parts[2]}]"
    if name.startswith("feature_projection."):
        return "conv_dim[-1]" if "layer_norm" in name else "hidden_size"
    if name.startswith("encoder.pos_conv_embed."):
        if differing[-1:] == [True]:
            return "num_conv_pos_embeddings"
        return "num_conv_pos_embedding_groups" if differing[:2] == [False, True] else "hidden_size"
    if name.startswith("encoder.layers."):
        if "rel_attn_embed" in name:
            return "num_attention_heads" if differing == [False, True] else "num_buckets"
        if int(parts[2]) >= num_hidden_layers:
            return "num_hidden_layers"
        block = {"attention": "remaining_heads", "feed_forward": "intermediate_sizes"}.get(parts[3])
        return f"{block}[{parts[2]}]" if block else "hidden_size"
    return "hidden_size" if name.startswith("encoder.") else None
