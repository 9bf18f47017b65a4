"""
Exports students for other runtimes: ONNX, in float32 and int8, and programs of `torch.export`.

Batch size and length are dynamic. Before a function returns, each float32 file is loaded again and compared with the
model at several batch sizes and lengths, with and without padding.

All files have the inputs `input_values` `(batch, samples)`, float32, as prepared by the student's feature extractor,
and `attention_mask` `(batch, samples)`, int64, 1 for samples and 0 for padding (all ones without padding). Their
outputs are those of the model: `last_hidden_state` `(batch, frames, hidden_size)`, or `logits` of a task head, and
`embeddings` of an x-vector head; if requested, also `hidden_states.0` (the input of the first layer),
`hidden_states.1` and so on.
"""

import contextlib
import copy
import functools
import importlib.util
import itertools
import logging
import math
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.wavlm.modeling_wavlm import TDNNLayer

from .files import try_file
from .models.fast_layers import fold_weight_norm
from .models.properties import has_gates, receptive_field


OUTPUT_NAMES = ("last_hidden_state", "logits", "embeddings")

# Of the noise that models are traced and compared with: frames beyond the least that a model takes.
SPARE_FRAMES = (0, 20, 90)

NO_AUDIO = "There is no audio to compare outputs on; pass at least one waveform."


class OnnxModel:
    """
    An ONNX file in onnxruntime on the CPU, called like the model.

    Args:
        path (`str` or `PathLike`): the file.

    Raises:
        `ImportError`: if onnxruntime is missing.
    """

    def __init__(self, path: str | os.PathLike):
        _require("onnxruntime")
        import onnxruntime

        self.session = onnxruntime.InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])

    def __call__(self, input_values: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns all outputs of the file by name, for inputs on the CPU."""
        inputs = {"input_values": input_values.numpy(), "attention_mask": attention_mask.numpy()}
        names = [output.name for output in self.session.get_outputs()]
        return dict(zip(names, map(torch.from_numpy, self.session.run(names, inputs)), strict=True))


class NamedOutputs(nn.Module):
    """
    A model whose outputs are a flat dict of tensors, named as in its exported files.

    Args:
        model ([`~transformers.PreTrainedModel`]): a student or a stock model of its family, with or without a head.
        output_hidden_states (`bool`, *optional*, defaults to `False`): whether hidden states are outputs.
    """

    def __init__(self, model: PreTrainedModel, output_hidden_states: bool = False):
        super().__init__()
        self.model = model
        self.output_hidden_states = output_hidden_states

    def forward(self, input_values: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        output = self.model(
            input_values,
            attention_mask=attention_mask,
            output_hidden_states=self.output_hidden_states,
            output_attentions=False,
            return_dict=True,
        )
        # The last hidden state may be one of all; older exporters (torch 2.7) then give both outputs one name.
        named = {name: output[name].clone() for name in OUTPUT_NAMES if name in output}
        if self.output_hidden_states:
            named |= {f"hidden_states.{index}": state for index, state in enumerate(output["hidden_states"])}
        return named


def export_onnx(
    model: PreTrainedModel, path: str | os.PathLike, output_hidden_states: bool = False, tolerance: float = 1e-4
) -> float:
    """
    Writes `model` as one ONNX file in float32 and checks it in onnxruntime.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A student or a stock model of its family, with or without a head, on any device and in any dtype; it is not
            changed.
        path (`str` or `PathLike`):
            Output file, such as `model.onnx`.
        output_hidden_states (`bool`, *optional*, defaults to `False`):
            Whether hidden states are outputs as well.
        tolerance (`float`, *optional*, defaults to 1e-4):
            Largest accepted difference from the model, measured like the returned value.

    Returns:
        `float`: the largest difference between an output of the file and the model's, relative to the output's largest
        value.

    Raises:
        `ImportError`: if onnx, onnxscript or onnxruntime is missing.
        `ValueError`: if the model has gates, or the file can't be written.
        `RuntimeError`: if the file differs from the model; it is removed.
    """
    _require("onnx", "onnxscript", "onnxruntime")
    try_file(path, "path")
    reference = NamedOutputs(_frozen_copy(model), output_hidden_states)
    # The fused attention is traced as one kernel and taken apart later, when the memory layout of its output is taken
    # for granted already (torch 2.13: "Cannot view a tensor ..."). The eager one computes the same without that step.
    exported = _traceable_copy(reference, attn_implementation="eager")
    example = _noise(model, batch=2, spare_frames=SPARE_FRAMES[1])
    program = torch.onnx.export(
        exported,
        tuple(example.values()),
        input_names=list(example),
        output_names=list(exported(**example)),
        dynamic_shapes=dict.fromkeys(example, {0: "batch", 1: "samples"}),
        dynamo=True,
        verbose=False,
    )
    for node in program.model.graph:
        node.metadata_props.clear()  # lines of source code with the paths of this machine
        if node.op_type == "LayerNormalization":
            # onnxruntime (1.32) makes one operator of an addition and a layer norm, which on a CPU takes four times as
            # long as both. Of a sum of two it does not.
            residual = node.inputs[0].producer()
            if residual is not None and residual.op_type == "Add":
                residual.op_type = "Sum"
    program.save(path, external_data=False)
    return _check(path, OnnxModel(path), reference, tolerance)


def export_program(
    model: PreTrainedModel, path: str | os.PathLike, output_hidden_states: bool = False, tolerance: float = 1e-4
) -> float:
    """
    Writes `model` as a `torch.export` program (a `.pt2` file) in float32, loads it again and checks it.

    `torch.export.load(path).module()(input_values=..., attention_mask=...)` returns a dict of the outputs. It runs on
    the CPU and needs only torch, neither transformers nor this package. Clips must have at least two frames (720
    samples).

    Arguments, returned value and errors are those of [`export_onnx`].
    """
    try_file(path, "path")
    reference = NamedOutputs(_frozen_copy(model), output_hidden_states)
    example = _noise(model, batch=2, spare_frames=SPARE_FRAMES[1])
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    program = torch.export.export(
        _traceable_copy(reference), (), example, dynamic_shapes=dict.fromkeys(example, free), strict=False
    )
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # lines of source code with the paths of this machine
    torch.export.save(program, path)
    return _check(path, torch.export.load(path).module(), reference, tolerance)


def quantize_onnx(path: str | os.PathLike, quantized_path: str | os.PathLike, audio: Iterable) -> dict:
    """
    Quantises an ONNX file of [`export_onnx`] to int8 and returns how much its outputs change.

    Linear layers and the positional convolution multiply integers. Activations of linear layers are scaled in each
    forward pass by their range over the whole batch, those of the positional convolution by their range over `audio`.
    Weights are scaled per output channel and have 7 bits, since two 8-bit products overflow on x86 processors without
    VNNI instructions. All other convolutions store their weights in int8, per output channel, and compute in floating
    point: features of pauses are much smaller than those of speech, and with 8 bits and one scale for both, hidden
    states would be far off.

    Args:
        path (`str` or `PathLike`):
            ONNX file in float32.
        quantized_path (`str` or `PathLike`):
            Output file, such as `model_int8.onnx`.
        audio (iterable of waveforms):
            Speech for measuring ranges and for the comparison, each a 1-D float array or tensor as prepared by the
            feature extractor.

    Returns:
        `dict`: `megabytes` and `megabytes_before` (10^6 bytes), and `cosine_similarity`: for each output, the cosine
        between the values of the two files, averaged over all frames.

    Raises:
        `ImportError`: if onnx or onnxruntime is missing.
        `ValueError`: if there is no audio, or the file can't be written.
    """
    _require("onnx", "onnxruntime")
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic, quantize_static

    audio = [torch.as_tensor(waveform, dtype=torch.float32) for waveform in audio]
    if not audio:
        raise ValueError(NO_AUDIO)
    try_file(quantized_path, "quantized_path")
    model, settings = onnx.load(path), {"per_channel": True, "reduce_range": True}
    positional = [
        node.name
        for node in model.graph.node
        if node.op_type == "Conv" and any(field.name == "group" and field.i > 1 for field in node.attribute)
    ]
    with tempfile.TemporaryDirectory() as scratch, _without_advice():
        source = Path(path)
        if positional:  # the name of no node would stand for all
            source = Path(scratch) / "model.onnx"
            quantize_static(
                model,
                source,
                _Waveforms(audio),
                op_types_to_quantize=["Conv"],
                nodes_to_quantize=positional,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                **settings,
            )
        quantize_dynamic(source, Path(quantized_path), op_types_to_quantize=["MatMul", "Gemm"], **settings)
    quantized = onnx.load(quantized_path)
    _store_convolutions_in_int8(quantized.graph)
    onnx.save(quantized, quantized_path)
    compared = compare_outputs(OnnxModel(path), OnnxModel(quantized_path), audio)
    return {
        "megabytes_before": os.path.getsize(path) / 1e6,
        "megabytes": os.path.getsize(quantized_path) / 1e6,
        "cosine_similarity": {name: values["cosine_similarity"] for name, values in compared.items()},
    }


@torch.no_grad()
def compare_outputs(reference: Callable, other: Callable, audio: Iterable) -> dict[str, dict[str, float]]:
    """
    Differences between the outputs of `other` and those of `reference`.

    Args:
        reference, other (`Callable`):
            Two forms of one model: [`NamedOutputs`], [`OnnxModel`], or the module of a loaded program.
        audio (iterable of waveforms):
            Each a 1-D float array or tensor as prepared by the feature extractor. They are run one by one, so all
            frames are valid.

    Returns:
        `dict[str, dict[str, float]]`: for each output, `largest_difference`, relative to the largest value of a clip,
        and `cosine_similarity`, the mean over all frames of all clips.

    Raises:
        `ValueError`: if there is no audio.
    """
    differences, cosines = {}, {}
    for waveform in audio:
        inputs = _inputs(waveform)
        actual = other(**inputs)
        for name, expected in reference(**inputs).items():
            differences.setdefault(name, []).append(_difference(actual[name], expected))
            cosine = nn.functional.cosine_similarity(actual[name].double(), expected.double(), dim=-1)
            cosines.setdefault(name, []).append(cosine.flatten())
    if not differences:
        raise ValueError(NO_AUDIO)
    return {
        name: {"largest_difference": max(differences[name]), "cosine_similarity": torch.cat(values).mean().item()}
        for name, values in cosines.items()
    }


def _frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    if has_gates(model):
        raise ValueError(f"The {type(model).__name__} has gates; call the student's `prune()` before exporting it.")
    return copy.deepcopy(model).float().cpu().eval().requires_grad_(False)


def _traceable_copy(reference: NamedOutputs, attn_implementation: str | None = None) -> NamedOutputs:
    """A copy of `reference` with the same outputs that exporters can trace."""
    exported = copy.deepcopy(reference)
    model = exported.model
    if attn_implementation is not None:
        model.set_attn_implementation(attn_implementation)
    if hasattr(model, "tdnn"):
        model.tdnn = nn.ModuleList(map(_convolution, model.tdnn))
        model.forward = functools.partial(_x_vector, model)
    for module in model.modules():
        fold_weight_norm(module)
    return exported.eval()


def _convolution(layer: TDNNLayer) -> nn.Conv1d:
    """The convolution equivalent to a layer of an x-vector head, whose weight is that of a linear layer."""
    convolution = nn.Conv1d(layer.in_conv_dim, layer.out_conv_dim, layer.kernel_size, dilation=layer.dilation)
    weight = layer.kernel.weight.view(layer.out_conv_dim, layer.kernel_size, layer.in_conv_dim).transpose(1, 2)
    convolution.load_state_dict({"weight": weight, "bias": layer.kernel.bias})
    return convolution.requires_grad_(False)


def _x_vector(model: PreTrainedModel, input_values: torch.Tensor, attention_mask: torch.Tensor, **kwargs) -> dict:
    """
    Forward of an x-vector head, such as [`~transformers.WavLMForXVector`], that pools all clips at once. The stock one
    loops over them, which would fix the size of the batch.
    """
    kwargs["output_hidden_states"] = kwargs["output_hidden_states"] or model.config.use_weighted_layer_sum
    output = model.base_model(input_values, attention_mask=attention_mask, **kwargs)
    features = output.last_hidden_state
    if model.config.use_weighted_layer_sum:
        weights = model.layer_weights.softmax(dim=-1)[:, None, None, None]
        features = (torch.stack(output.hidden_states) * weights).sum(0)
    features = model.projector(features).transpose(1, 2)
    for convolution in model.tdnn:
        features = convolution(features).relu()
    features = features.transpose(1, 2)  # (B, T, C)

    lengths = model._get_tdnn_output_lengths(model._get_feat_extract_output_lengths(attention_mask.sum(1)))
    valid = (torch.arange(features.shape[1], device=features.device) < lengths[:, None])[..., None]  # (B, T, 1)
    count = valid.sum(1)
    mean = features.where(valid, 0).sum(1) / count
    variance = (features - mean[:, None]).where(valid, 0).square().sum(1) / (count - 1)
    embeddings = model.feature_extractor(torch.cat([mean, variance.sqrt()], dim=-1))
    return {"logits": model.classifier(embeddings), "embeddings": embeddings, "hidden_states": output.hidden_states}


def _noise(model: PreTrainedModel, batch: int, spare_frames: int) -> dict[str, torch.Tensor]:
    """
    Noise that is `spare_frames` and a few samples longer than the minimum for `model`; the last clip is padded by half
    of them. The minimum is two frames before an adapter or a head's own convolutions: torch treats a size of 1 as
    constant.
    """
    config = model.config
    least = 2 * config.adapter_stride**config.num_adapter_layers if getattr(config, "add_adapter", False) else 2
    if hasattr(model, "tdnn"):
        least += sum((size - 1) * step for size, step in zip(config.tdnn_kernel, config.tdnn_dilation, strict=True))
    stride = math.prod(config.conv_stride)
    samples = receptive_field(config) + (least + spare_frames - 1) * stride + spare_frames % stride
    attention_mask = torch.ones(batch, samples, dtype=torch.long)
    attention_mask[-1, samples - spare_frames // 2 * stride :] = 0
    noise = torch.randn(batch, samples, generator=torch.Generator().manual_seed(spare_frames))
    return {"input_values": noise * attention_mask, "attention_mask": attention_mask}


@torch.no_grad()
def _check(path: str | os.PathLike, saved: Callable, reference: NamedOutputs, tolerance: float) -> float:
    """Largest difference between the model in `path` and `reference`, over outputs, lengths and batch sizes."""
    largest = 0.0
    for batch, spare_frames in itertools.product((1, 3), SPARE_FRAMES):
        inputs = _noise(reference.model, batch, spare_frames)
        actual = saved(**inputs)
        for name, expected in reference(**inputs).items():
            difference = _difference(actual[name], expected)
            if not difference <= tolerance:  # NaN is caught, too
                os.remove(path)
                raise RuntimeError(
                    f"`{name}` of the exported {type(reference.model).__name__} differs from the model's by"
                    f" {difference:.2g} (tolerance: {tolerance:.2g}) for inputs of shape"
                    f" {tuple(inputs['input_values'].shape)}; {path} was removed. Please report it."
                )
            largest = max(largest, difference)
    return largest


def _difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    if actual.shape != expected.shape:
        return math.inf
    return ((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-6)).item()


class _Waveforms:
    """Yields waveforms one by one as model inputs, for calibration in onnxruntime."""

    def __init__(self, audio: list[torch.Tensor]):
        self.inputs = ({name: tensor.numpy() for name, tensor in _inputs(waveform).items()} for waveform in audio)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.inputs, None)


@contextlib.contextmanager
def _without_advice():
    """
    Hides onnxruntime's advice, logged by the root logger, to optimise files before quantising them: this would make
    them specific to the installed version and this processor.
    """
    logging.root.addFilter(hide := lambda record: False)
    try:
        yield
    finally:
        logging.root.removeFilter(hide)


def _inputs(waveform) -> dict[str, torch.Tensor]:
    """One waveform, a 1-D array or tensor, as inputs of a model."""
    input_values = torch.as_tensor(waveform, dtype=torch.float32)[None]
    return {"input_values": input_values, "attention_mask": torch.ones_like(input_values, dtype=torch.long)}


def _store_convolutions_in_int8(graph) -> None:
    """Replaces float weights of `Conv` nodes by int8 weights and a dequantising node, in place."""
    from onnx import helper, numpy_helper

    initializers = {tensor.name: tensor for tensor in graph.initializer}
    names = [node.input[1] for node in graph.node if node.op_type == "Conv"]
    for name in dict.fromkeys(name for name in names if name in initializers):
        weight = numpy_helper.to_array(initializers[name])
        scale = np.abs(weight).max(axis=tuple(range(1, weight.ndim)), keepdims=True) / 127
        scale[scale == 0] = 1
        graph.initializer.remove(initializers[name])
        graph.initializer.append(numpy_helper.from_array(np.rint(weight / scale).astype(np.int8), f"{name}_int8"))
        graph.initializer.append(numpy_helper.from_array(scale.ravel(), f"{name}_scale"))
        to_float = helper.make_node("DequantizeLinear", [f"{name}_int8", f"{name}_scale"], [name], axis=0)
        graph.node.insert(0, to_float)


def _require(*packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"This export needs {' and '.join(missing)}, which is not installed: pip install skill-hf[export]."
        )
