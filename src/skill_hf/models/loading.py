"""
Loads speech encoders by name, for the trainer, `layer_similarity` and the examples.

Three files of a directory or repository are read: config.json, the weights, and the feature extractor's. No code in
them is run, only fields of classes defined by transformers and this package are used, and sizes are checked before
memory is allocated. All errors are a `ValueError` of one line.
"""

import logging
import math
import os
from contextlib import contextmanager
from numbers import Integral
from pathlib import Path

import numpy as np
import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import safe_open
from transformers import CONFIG_MAPPING, AutoModel, PreTrainedConfig, PreTrainedModel, Wav2Vec2FeatureExtractor
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    CONFIG_NAME,
    FEATURE_EXTRACTOR_NAME,
    PROCESSOR_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
)

from ..files import parse_json
from .configuration_skill_student import MAX_LABELS, MAX_LAYERS, MAX_SIZE, refuse_training_checkpoint
from .properties import has_gates


logger = logging.getLogger(__name__)

# The largest speech encoders have 2 to 3 billion.
MAX_PARAMETERS = 2**33
MAX_HEAD_PARAMETERS = 2**28
SAMPLING_RATES = (2_000, 384_000)  # Hz
COUNTERS = ("num_batches_tracked",)  # of batch norms, whole numbers
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
EXTRACTOR_FIELDS = ("feature_size", "sampling_rate", "padding_value", "padding_side", "return_attention_mask")
EXTRACTOR_FIELDS += ("do_normalize",)


@contextmanager
def one_error(what: str):
    """
    Turns any error of loading into a `ValueError` of one line: `what`, and the reason. transformers and its
    dependencies raise some twenty kinds of errors for broken files.
    """
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, KeyError):
            reason = f"there is no {reason}"
        raise ValueError(f"{what} ({reason[:500]})") from error


def valid_hub_id(name) -> str | None:
    """`name` if it is a valid id for the Hub."""
    name = str(name or "")
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name or None


def hub_id_of(name) -> str | None:
    """`name` if it is an id on the Hub; a local path means nothing to others and must not be published."""
    name = valid_hub_id(name)
    return name if name and "/" in name and not Path(name).exists() else None


def load_config(source: str | os.PathLike, what: str = "The model", **settings) -> PreTrainedConfig:
    """
    The configuration of an encoder, with or without a head.

    Args:
        source (`str` or `PathLike`): Hub id or local directory.
        what (`str`, *optional*, defaults to `"The model"`): name in errors.
        settings: fields to set.

    Raises:
        `ValueError`: if it is missing, damaged, of an unknown type or impossible size, or has an adapter.
    """
    refuse_training_checkpoint(source)
    with one_error(f"{what} `{source}` cannot be loaded; pass a Hub id or a directory with config.json."):
        fields = _read_json(_find(source, CONFIG_NAME) or _missing(f"no {CONFIG_NAME}", source))
        model_type = fields.get("model_type")
        if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
            raise ValueError(f"`model_type` in {CONFIG_NAME} is {model_type!r}, which transformers does not know")
        if fields.get("quantization_config") is not None:
            raise ValueError("its weights are quantised and cannot be converted to float32; use the original")
        config_class = CONFIG_MAPPING[model_type]
        known = config_class().to_dict().keys() | {"num_labels", "torch_dtype"}
        fields = {name: value for name, value in fields.items() if name in known}
        _check_numbers(fields)
        config = config_class.from_dict(fields, **settings)
        config.name_or_path = str(source)
        if hasattr(config, "conv_stride"):  # an encoder of waveforms
            _check_sizes(config)
    return config


def load_model(
    source: str | os.PathLike,
    auto_class=AutoModel,
    config: PreTrainedConfig | None = None,
    dtype: torch.dtype = torch.float32,
    what: str = "The model",
    new_head: bool = True,
) -> PreTrainedModel:
    """
    Loads a speech encoder, with or without a head, and checks that all weights of the encoder come from the file.

    Args:
        source (`str` or `PathLike`): Hub id or local directory; may have been saved with another head, including a
            pretraining head.
        auto_class (*optional*, defaults to `AutoModel`): auto class of transformers, which determines the head. A head
            that the file lacks, or has in different shapes, is initialised at random.
        config (`PreTrainedConfig`, *optional*): result of `load_config`, possibly modified.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): of the weights.
        what (`str`, *optional*, defaults to `"The model"`): name in errors.
        new_head (`bool`, *optional*, defaults to `True`): whether the head may be initialised at random.

    Returns:
        [`~transformers.PreTrainedModel`], in eval mode.

    Raises:
        `ValueError`: if it cannot be loaded, does not take waveforms, or weights of its encoder are missing,
            unexpected, of the wrong shape, not floating-point, not finite or all zeros. Only `masked_spec_embed` may
            be missing or unused.
    """
    config = load_config(source, what) if config is None else config
    with one_error(f"{what} `{source}` cannot be loaded as {auto_class.__name__}."):
        model_class = auto_class._model_mapping[type(config)]
        if model_class.main_input_name != "input_values":
            raise ValueError(f"its input is `{model_class.main_input_name}`, not waveforms")
    with one_error(f"The weights of {_lower(what)} `{source}` cannot be loaded; download them again."):
        weights = load_weights(source)
        _check_memory(model_class, config, weights)
        weights = {name: tensor.to(dtype, copy=True) for name, tensor in weights.items()}
        model, info = model_class.from_pretrained(
            None,
            config=config,
            state_dict=weights,
            dtype=dtype,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
        _check_complete(model, info, weights, new_head)
    model.config.name_or_path = str(source)
    if "layer_weights" in info["missing_keys"]:
        # transformers (5.24) leaves what was in memory in those that a checkpoint doesn't have.
        torch.nn.init.constant_(model.layer_weights, 1 / len(model.layer_weights))
    check_encoder(model, f"{what} `{source}`")
    return model


def load_weights(source: str | os.PathLike) -> dict[str, torch.Tensor]:
    """
    The weights in a directory or repository, by name: from model.safetensors (or its parts, listed in an index),
    otherwise from pytorch_model.bin, of which only plain tensors are unpickled. They stay on disk until they are used.

    Raises:
        `ValueError`, or any error of reading: if there are none or they are not floating-point tensors.
    """
    weights = {}
    for path in weight_files(source):
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                weights |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        else:
            weights |= _read_pickle(path)
    for name, tensor in weights.items():
        if tensor.dtype not in FLOATS and not name.endswith(COUNTERS):
            raise ValueError(
                f"{name} is of type {str(tensor.dtype).removeprefix('torch.')}, but must be floating point"
            )
    return weights


def load_feature_extractor(
    source: str | os.PathLike, what: str = "The model", token: bool | str | None = None
) -> Wav2Vec2FeatureExtractor | None:
    """
    The feature extractor in a directory or repository, built only from fields that its class knows; `None` if there is
    none.

    Raises:
        `ValueError`: if its class is not supported, or a field has an invalid value.
    """
    advice = "download the file again or pass another feature extractor"
    with one_error(f"The feature extractor of {_lower(what)} `{source}` cannot be used."):
        fields = None
        path = _find(source, PROCESSOR_NAME, token)
        if path is not None:
            fields = _read_json(path).get("feature_extractor")
        if fields is None:
            path = _find(source, FEATURE_EXTRACTOR_NAME, token)
            if path is None:
                return None
            fields = _read_json(path)
        if not isinstance(fields, dict):
            raise ValueError(f"{path.name} contains no fields; {advice}")
        kind = fields.get("feature_extractor_type", Wav2Vec2FeatureExtractor.__name__)
        if kind != Wav2Vec2FeatureExtractor.__name__:
            raise ValueError(f"{path.name} is for a {kind}, but waveform encoders need a Wav2Vec2FeatureExtractor")
        extractor = Wav2Vec2FeatureExtractor(**{name: fields[name] for name in EXTRACTOR_FIELDS if name in fields})
        check_feature_extractor(extractor)
        return extractor


def check_feature_extractor(extractor) -> None:
    """
    Tests a feature extractor, of any class, on a tenth of a second of noise.

    Raises:
        `ValueError`: if its rate or another field has an invalid value, or it does not return `input_values` with one
            value per sample.
    """
    name = type(extractor).__name__
    rate = getattr(extractor, "sampling_rate", None)
    low, high = SAMPLING_RATES
    if isinstance(rate, bool) or not isinstance(rate, Integral) or not low <= rate <= high:
        raise ValueError(f"`sampling_rate` of the {name} is {rate!r}, but must be an integer from {low} to {high} Hz.")
    noise = _noise(int(rate))
    with one_error(f"The {name} does not prepare waveforms."):
        made = extractor(noise, sampling_rate=rate)
        if "input_values" not in made:
            raise ValueError(f"it produces {', '.join(made)} instead of `input_values`")
        shape = np.shape(made["input_values"][0])
        if shape != noise.shape:
            raise ValueError(f"it produces {shape} from {noise.shape} samples")
    for field in ("do_normalize", "return_attention_mask"):
        if not isinstance(getattr(extractor, field, False), bool):
            raise ValueError(f"`{field}` of the {name} is {getattr(extractor, field)!r}, but must be true or false.")
    if getattr(extractor, "feature_size", 1) != 1:
        raise ValueError(f"`feature_size` of the {name} is {extractor.feature_size!r}, but waveforms have 1.")
    if getattr(extractor, "padding_side", "right") != "right":
        raise ValueError(f"`padding_side` of the {name} is {extractor.padding_side!r}, but must be right.")
    padding = getattr(extractor, "padding_value", 0.0)
    if isinstance(padding, bool) or not isinstance(padding, (int, float)) or not math.isfinite(padding):
        raise ValueError(f"`padding_value` of the {name} is {padding!r}, but must be a finite number.")


def plain_feature_extractor(extractor) -> Wav2Vec2FeatureExtractor:
    """
    The part of a feature extractor or processor that is published with a student: a `Wav2Vec2FeatureExtractor` with
    its known fields, without references to code or other content. If the original has another class, which others
    could not load, and prepares audio differently, a warning says so.
    """
    extractor = getattr(extractor, "feature_extractor", extractor)
    fields = {"do_normalize": False}
    fields |= {name: getattr(extractor, name) for name in EXTRACTOR_FIELDS if hasattr(extractor, name)}
    plain = Wav2Vec2FeatureExtractor(**fields | {"sampling_rate": int(extractor.sampling_rate)})
    if type(extractor) is not Wav2Vec2FeatureExtractor:
        one, other = (
            convert(_noise(plain.sampling_rate), sampling_rate=plain.sampling_rate) for convert in (extractor, plain)
        )
        if not np.allclose(one["input_values"][0], other["input_values"][0], atol=1e-5):
            logger.warning(
                "The student is saved with a Wav2Vec2FeatureExtractor, which prepares audio differently from your"
                " %s: use yours to prepare audio for the student.",
                type(extractor).__name__,
            )
    return plain


def _noise(sampling_rate: int) -> np.ndarray:
    """A tenth of a second of noise, not normalised."""
    return (0.2 + 0.3 * np.random.default_rng(0).standard_normal(sampling_rate // 10)).astype(np.float32)


def check_encoder(model, what: str) -> None:
    """
    Rejects a loaded model whose encoder cannot be used as it is.

    Args:
        model (`PreTrainedModel`): with or without a head.
        what (`str`): name in errors.

    Raises:
        `ValueError`: if it is not a model of transformers, is wrapped, quantised or without values, has gates or an
            adapter, or has weights that are not floating-point, not finite or all zeros.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"{what} is a {type(model).__name__}, but must be a Hub id, a directory or a model of transformers; for a"
            " PEFT model pass the result of `merge_and_unload()`."
        )
    encoder = model.base_model
    refuse_adapter(encoder.config, what)
    if getattr(model, "hf_quantizer", None) is not None or getattr(model, "is_quantized", False):
        raise ValueError(f"{what} is quantised; load it without `quantization_config`.")
    if has_gates(encoder):
        raise ValueError(f"{what} is a student with gates; call `prune()` first.")
    for name, module in encoder.named_modules():
        if type(module).__module__.partition(".")[0] == "peft":
            raise ValueError(f"{what} has a PEFT adapter in {name}; merge it first (`merge_and_unload()`).")
        if ".quantized." in f"{type(module).__module__}.":
            raise ValueError(f"{what} is quantised ({name} is a {type(module).__name__}); use the original.")
    matrices = {}
    for name, tensor in encoder.state_dict().items():
        if tensor.is_meta:
            raise ValueError(f"{what} has no values in {name}, which is on the meta device; load its weights.")
        if name.endswith(COUNTERS):
            continue
        if tensor.dtype not in FLOATS:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(f"{what} has weights of type {kind} in {name}; load it as a floating-point model.")
        if not tensor.numel():
            continue
        low, high = torch.aminmax(tensor.detach())
        if not (torch.isfinite(low) and torch.isfinite(high)):
            raise ValueError(f"{what} has NaN or infinite weights in {name}; download the weights again.")
        if tensor.dim() > 1:
            matrices[name] = bool(low == 0) and bool(high == 0)
    # What nothing gets through, and layers that add nothing; a single matrix may be zero where heads were cut.
    first = ("feature_extractor.", "feature_projection.")
    dead = [name for name, zero in matrices.items() if zero and name.startswith(first)]
    layers = [name for name in matrices if name.startswith("encoder.layers.")]
    if layers and all(matrices[name] for name in layers):
        dead += layers
    if dead:
        raise ValueError(f"{what} has weights that are all zeros, such as {dead[0]}; download the weights again.")


def refuse_adapter(config: PreTrainedConfig, what: str) -> None:
    """Raises a `ValueError` if convolutions after the encoder change the number of frames."""
    if getattr(config, "add_adapter", False):
        raise ValueError(f"{what} has `add_adapter`, which changes the encoder's frames; set it to false.")


def _find(source, name: str, token: bool | str | None = None) -> Path | None:
    """The local path of a file in a directory or repository, or `None` if it does not exist."""
    if not isinstance(source, (str, os.PathLike)) or not str(source):
        raise ValueError(f"{source!r} is not a valid name")
    if os.path.isfile(source):
        raise ValueError("it is a file; pass its directory")
    if os.path.isdir(source):
        path = Path(source, name)
        if path.is_file():
            return path
        if os.path.lexists(path):
            raise ValueError(f"{name} in it is not a file")  # but a directory, a pipe, or a link to nothing
        return None
    path = cached_file(str(source), name, token=token, _raise_exceptions_for_missing_entries=False)
    return None if path is None else Path(path)


def _lower(what: str) -> str:
    return what[0].lower() + what[1:]


def _missing(what: str, source=None):
    """Raises the error about a file, or about the adapter in `source` without the config or weights of a model."""
    if source is not None and _find(source, ADAPTER_CONFIG_NAME):
        raise ValueError("it has a PEFT adapter alone; merge that into its model first (`merge_and_unload()`)")
    raise ValueError(f"it has {what}")


def _read_json(path: Path) -> dict:
    try:
        fields = parse_json(path)
    except ValueError as error:
        raise ValueError(f"{path.name} is not a readable JSON file ({error})") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path.name} contains a {type(fields).__name__} instead of names and values")
    return fields


def weight_files(source: str | os.PathLike) -> list[Path]:
    """
    Local paths of the weight files of a directory or repository.

    Raises:
        `ValueError`: if there are none, or an index lists anything but a file next to it.
    """
    for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME):
        path = _find(source, name)
        if path is None:
            continue
        if not name.endswith(".json"):
            return [path]
        places = _read_json(path).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(part, str) for part in places.values()):
            raise ValueError(f"`weight_map` in {name} does not name a file for each weight")
        suffix = Path(name.removesuffix(".index.json")).suffix
        for part in places.values():
            if Path(part).name != part or not part.endswith(suffix):
                raise ValueError(f"{name} names {part!r}, which is not a {suffix} file in the same directory")
        return [_find(source, part) or _missing(f"no {part}") for part in sorted(set(places.values()))]
    _missing(f"neither {SAFE_WEIGHTS_NAME} nor {WEIGHTS_NAME}", source)


def _read_pickle(path: Path) -> dict[str, torch.Tensor]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path.name} is not a pickle of plain weights; no other kind is read") from error
    if not isinstance(found, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in found.items()
    ):
        raise ValueError(f"{path.name} contains something other than named weights")
    for name, tensor in found.items():
        if tensor.layout != torch.strided or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise ValueError(f"{name} in {path.name} is larger than its stored data")
    return found


def _check_numbers(fields: dict) -> None:
    """Checks numbers before a config is created: `num_labels` alone creates a name for each label."""
    for name, value in fields.items():
        for number in value if isinstance(value, list) else [value]:
            most = MAX_LABELS if name == "num_labels" else MAX_SIZE
            if isinstance(number, (int, float)) and not -most <= number <= most:  # NaN is not, either
                raise ValueError(f"`{name}` in {CONFIG_NAME} is {number}, but must be at most {most:,}")


def _check_sizes(config: PreTrainedConfig) -> None:
    """Checks that a model with this config is plausible, before it is created."""
    refuse_adapter(config, CONFIG_NAME)
    _check_numbers(config.to_dict())
    if not 1 <= config.num_hidden_layers <= MAX_LAYERS or not 1 <= len(config.conv_dim) <= MAX_LAYERS:
        raise ValueError(
            f"{CONFIG_NAME} has {config.num_hidden_layers:,} layers and {len(config.conv_dim):,} convolutions; both"
            f" must be from 1 to {MAX_LAYERS:,}"
        )
    for name in ("conv_dim", "conv_stride", "conv_kernel"):
        value = getattr(config, name)
        if len(value) != len(config.conv_dim) or not all(type(size) is int and size > 0 for size in value):
            raise ValueError(f"`{name}` in {CONFIG_NAME} is {list(value)!r}, but must be integers above 0")
    number = num_parameters(empty_model(AutoModel._model_mapping[type(config)], config))
    if number > MAX_PARAMETERS:
        raise ValueError(f"{CONFIG_NAME} describes {number:,} parameters; the maximum is {MAX_PARAMETERS:,}")


def empty_model(model_class, config: PreTrainedConfig) -> PreTrainedModel:
    """A model without values, on the meta device; it needs no memory and draws no random numbers."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        return model_class(config)


def num_parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _check_memory(model_class, config: PreTrainedConfig, weights: dict[str, torch.Tensor]) -> None:
    """Checks memory, since transformers allocates all that a config describes, whatever the weights are."""
    stored = sum(tensor.numel() for tensor in weights.values())
    if config.num_hidden_layers > len(weights):
        raise ValueError(
            f"{CONFIG_NAME} has {config.num_hidden_layers} layers, but the weights are {len(weights)} tensors"
        )
    model = empty_model(model_class, config)
    encoder = num_parameters(model.base_model)
    if encoder > 2 * stored + 2**20:
        raise ValueError(f"{CONFIG_NAME} describes {encoder:,} parameters, but the weights are {stored:,} numbers")
    head = num_parameters(model) - encoder
    if head > MAX_HEAD_PARAMETERS:
        raise ValueError(f"{CONFIG_NAME} describes a head of {head:,} parameters, more than {MAX_HEAD_PARAMETERS:,}")


def _check_complete(model: PreTrainedModel, info: dict, weights: dict[str, torch.Tensor], new_head: bool) -> None:
    """Checks that the file has every weight of the encoder, in the right shape, and no others of an encoder."""
    encoder = model.base_model
    prefix = f"{model.base_model_prefix}."
    parts = {name.removeprefix(prefix).partition(".")[0] for name in (encoder if new_head else model).state_dict()}
    of_encoder = prefix if new_head and encoder is not model else ""
    problems = [(name, "is missing") for name in info["missing_keys"]]
    for name, there, here in info["mismatched_keys"]:
        problems.append((name, f"has shape {tuple(there)} instead of {tuple(here)}"))
    problems = [(name, problem) for name, problem in problems if name.startswith(of_encoder)]
    # Names without the prefix are those of the head, if the file has a head.
    in_file = prefix if any(name.startswith(prefix) for name in weights) else ""
    problems += [(name, "is not part of the model") for name in info["unexpected_keys"] if name.startswith(in_file)]
    found = {name.removeprefix(prefix): problem for name, problem in problems}
    found = {
        name: problem
        for name, problem in found.items()
        if name.partition(".")[0] in parts and name != "masked_spec_embed"
    }
    if not found:
        return
    order = {name: index for index, name in enumerate(encoder.state_dict())}
    names = sorted(found, key=lambda name: (order.get(name, len(order)), name))
    some = "; ".join(f"{name} {found[name]}" for name in names[:3])
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    raise ValueError(f"they do not fit {CONFIG_NAME}: {some}{more}")
