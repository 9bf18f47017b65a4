"""
`skill-hf info`: how much of its teacher a student keeps, or how large an encoder is.

Sizes are computed from config.json. Weights in a directory are checked against it by name and shape; weights on the
Hub are not downloaded. No code from a directory or repository is run.
"""

import argparse
import json
import re
import textwrap
from pathlib import Path
from typing import Annotated, Any

import torch
from huggingface_hub import HfApi, hf_hub_url, try_to_load_from_cache
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status
from transformers import AutoModel, PreTrainedConfig
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_NAME

from ..compression.macs import count_macs
from ..compression.units import KINDS, is_cut, units_by_kind, units_in_teacher
from ..models.families import STUDENT_CLASSES
from ..models.loading import (
    empty_model,
    hub_id_of,
    load_config,
    load_feature_extractor,
    load_weights,
    num_parameters,
    one_error,
    weight_files,
)
from ..publishing.teacher_metadata import HUB_TIMEOUT
from .settings import Range, checked, run_script
from .text import WIDTH, Parser, align, print_result, printable, shorten


SAMPLING_RATE = 16_000  # Hz, of a model without a feature extractor
# The matrices of attention in longer clips take gigabytes, even if their values are not computed.
Length = Annotated[float, Range(above=0, most=120)]
WEIGHTS_ON_HUB = (r"model(-\d+-of-\d+)?\.safetensors", r"pytorch_model(-\d+-of-\d+)?\.bin")
# What a teacher and its student share.
SHARED = ("hidden_size", "num_attention_heads", "intermediate_size", "conv_kernel", "conv_stride")


def describe(source: str, teacher: str | None = None, seconds: float = 10.0) -> dict[str, Any]:
    """
    How much of its teacher a student keeps, or how large an encoder is.

    Args:
        source (`str`): Hub id or directory of a student, or of a stock encoder of waveforms, with or without a head.
        teacher (`str`, *optional*): Hub id or directory of the student's teacher; by default the one named in its
            config.
        seconds (`float`, *optional*, defaults to 10.0): length of the clip that multiply-accumulates are counted for.

    Returns:
        `dict`: what `--json` prints. `None` means unknown, or not applicable to a stock encoder.

    Raises:
        `ValueError`: if there is no such encoder, its weights do not fit its config, or it is not a student of the
            given teacher.
    """
    config = _load_config(source, "The model")
    is_student = hasattr(config, "remaining_heads")
    if teacher is not None and not is_student:
        raise ValueError(
            f"`{source}` is a `{config.model_type}`, not a student, so it has no teacher; leave out --teacher."
        )
    extractor = load_feature_extractor(source)
    rate = SAMPLING_RATE if extractor is None else extractor.sampling_rate
    size, notes = _size(source, config, units_in_teacher(config), seconds, rate), []
    weights = _weights_of_directory(source, config) if Path(source).is_dir() else _weights_on_hub(source, notes)
    teacher_size = left = None
    if is_student:
        teacher_size = _teacher_size(source, config, size, teacher, seconds, rate, notes)
        for name in _shown_kinds("layer"):  # of the teacher's layers, the highest may be missing
            size[name] += [0] * (len(teacher_size[name] or ()) - len(size[name]))
        if teacher_size["model"] is not None:
            left = {name: size[name] / teacher_size[name] for name in ("parameters", "macs")}
    return {
        "model": source,
        "architecture": _architecture(config),
        "model_type": config.model_type,
        "format_version": getattr(config, "format_version", None),
        "base_model": getattr(config, "base_model", None),
        "seconds": seconds,
        "sampling_rate": rate,
        **size,
        "remaining_layers": getattr(config, "remaining_layers", None),
        **{f"removed_{name}": _removed_blocks(config, name) for name in KINDS if KINDS[name].shown_by},
        "weights": weights,
        "teacher": teacher_size,
        "left": left,
        "sparsity": None if left is None else 1 - left["parameters"],
        "notes": notes,
    }


def _removed_blocks(config: PreTrainedConfig, kind: str) -> list[int] | None:
    removed = getattr(config, f"removed_{kind}", None)
    return None if removed is None else [config.remaining_layers[layer] for layer in removed]


def _architecture(config: PreTrainedConfig) -> str | None:
    names = config.architectures
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None


def _load_config(source: str, what: str) -> PreTrainedConfig:
    config = load_config(source, what)
    if not all(hasattr(config, name) for name in ("conv_dim", *SHARED)):
        raise ValueError(f"{what} `{source}` is a `{config.model_type}`, not a waveform encoder like WavLM.")
    return config


def _size(source: str, config: PreTrainedConfig, units: dict, seconds: float, rate: int) -> dict[str, Any]:
    """
    Parameters and multiply-accumulates of the encoder without a head, and the number of its `units`: by kind, those in
    each place, or `None`.
    """
    with one_error(f"The size of `{source}` cannot be determined."):
        model = empty_model(AutoModel._model_mapping[type(config)], config)
        macs = count_macs(model, seconds, rate)
    sizes = {name: [0 if place is None else place.size for place in units[name]] for name in _shown_kinds()}
    return {"parameters": num_parameters(model), "macs": macs, **sizes}


def _shown_kinds(places: str | None = None) -> list[str]:
    """Names of the kinds of units that have a column of their own, of all places or of those in `places`."""
    return [name for name, kind in KINDS.items() if kind.label is not None and places in (None, kind.places)]


def _teacher_size(
    source: str, config, size: dict, named: str | None, seconds: float, rate: int, notes: list[str]
) -> dict[str, Any]:
    """
    Size of the given teacher, or of the one named by the student; otherwise, what the student's config says about it.
    """
    teacher = hub_id_of(config.base_model) if named is None else named
    try:
        if teacher is None:
            raise ValueError("The student does not name a teacher on the Hub.")
        teacher_config = _load_config(_base_model_files(teacher) if named is None else teacher, "The teacher")
        found = _size(teacher, teacher_config, units_by_kind(teacher_config), seconds, rate)
        _check_teacher(source, config, size, teacher, teacher_config, found)
        return {"model": teacher} | found
    except ValueError as error:
        if named is not None:
            raise
        notes.append(f"The teacher is unknown; pass it with --teacher. {error}")
    places = units_in_teacher(config)
    wholes = {name: [next(filter(None, places[name])).whole] * len(places[name]) for name in _shown_kinds()}
    return dict.fromkeys(("model", *size)) | {name: sizes for name, sizes in wholes.items() if None not in sizes}


def _base_model_files(repo_id: str) -> str:
    """Where config.json of a repository is read from: the cache, or the Hub if it answers immediately."""
    cached = try_to_load_from_cache(repo_id, CONFIG_NAME)
    if isinstance(cached, str):
        return str(Path(cached).parent)
    with one_error(f"The teacher `{repo_id}` cannot be read on the Hub."):
        # The client itself would try for most of a minute where there is no network.
        url = hf_hub_url(repo_id, CONFIG_NAME)
        hf_raise_for_status(get_session().get(url, headers=build_hf_headers(), timeout=HUB_TIMEOUT))
    return repo_id


def _check_teacher(source: str, config, size: dict, teacher: str, teacher_config, teacher_size: dict) -> None:
    """
    Raises:
        `ValueError`: if no pruning could make the student of this teacher.
    """
    family = STUDENT_CLASSES.get(teacher_config.model_type)
    if family is None or family.config_class is not type(config):
        problem = f"a `{teacher_config.model_type}` cannot have a student of type `{config.model_type}`"
    elif differing := [name for name in SHARED if getattr(config, name) != getattr(teacher_config, name)]:
        ours, theirs = (getattr(one, differing[0]) for one in (config, teacher_config))
        problem = f"its `{differing[0]}` is {theirs}, but the student's is {ours}"
    elif config.remaining_layers[-1] >= (depth := teacher_config.num_hidden_layers):
        problem = f"it has only {depth} layers, but the student has layer {config.remaining_layers[-1] + 1}"
    elif wider := [
        name
        for name in _shown_kinds()
        if any(ours > theirs for ours, theirs in zip(size[name], teacher_size[name], strict=False))
    ]:
        problem = f"the student has more {wider[0]}"
    else:
        return
    raise ValueError(f"`{teacher}` is not the teacher of `{source}`: {problem}.")


def _weights_of_directory(source: str, config: PreTrainedConfig) -> dict[str, Any]:
    with one_error(f"The weights of the model `{source}` cannot be used; download them again."):
        paths, weights = weight_files(source), load_weights(source)
        head_parameters = _check_weights(config, weights)
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in weights.values() if tensor.is_floating_point()}
    return {
        "files": [path.name for path in paths],
        "bytes": sum(path.stat().st_size for path in paths),
        "dtypes": sorted(dtypes),
        "head_parameters": head_parameters,
    }


def _check_weights(config: PreTrainedConfig, weights: dict[str, torch.Tensor]) -> int:
    """How many numbers the file holds outside the encoder; a `ValueError` if it is not the encoder of this config."""
    model = empty_model(AutoModel._model_mapping[type(config)], config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    parts = {name.partition(".")[0] for name in expected}
    prefix = f"{model.base_model_prefix}."
    has_prefix = any(name.startswith(prefix) for name in weights)
    found, head_parameters = set(), 0
    for name, tensor in weights.items():
        own = name.removeprefix(prefix)
        for old, new in (("weight_g", "original0"), ("weight_v", "original1")):  # of torch before 2.1
            own = re.sub(rf"\.{old}$", f".parametrizations.weight.{new}", own)
        if name.startswith(prefix) == has_prefix and own.partition(".")[0] in parts:
            if own != "masked_spec_embed" and expected.get(own) != tuple(tensor.shape):
                wanted = f"instead of {expected[own]}" if own in expected else "but is not part of the model"
                raise ValueError(f"they do not fit config.json: {name} has shape {tuple(tensor.shape)} {wanted}")
            found.add(own)
        else:
            head_parameters += tensor.numel()
    missing = [name for name in expected if name not in found and name != "masked_spec_embed"]
    if missing:
        others = f" and {len(missing) - 1} more are" if len(missing) > 1 else " is"
        raise ValueError(f"they do not fit config.json: {missing[0]}{others} missing")
    return head_parameters


def _weights_on_hub(repo_id: str, notes: list[str]) -> dict[str, Any]:
    unknown = dict.fromkeys(("files", "bytes", "dtypes", "head_parameters"))
    try:
        sizes = {item.path: item.size for item in HfApi().list_repo_tree(repo_id) if isinstance(item, RepoFile)}
    except Exception as error:  # offline, of the network, or of the Hub
        notes.append(f"The size of the weights is unknown. {' '.join(str(error).split())}")
        return unknown
    for pattern in WEIGHTS_ON_HUB:
        if files := sorted(name for name in sizes if re.fullmatch(pattern, name)):
            return unknown | {"files": files, "bytes": sum(sizes[name] for name in files)}
    raise ValueError(f"The model `{repo_id}` has neither {SAFE_WEIGHTS_NAME} nor {WEIGHTS_NAME}.")


# ---------------------------------------------------------------------------------------------------------------- text
def format_text(info: dict[str, Any]) -> str:
    """Tables of at most `WIDTH` columns."""
    teacher, weights = info["teacher"], info["weights"]
    kind = info["architecture"] or info["model_type"]
    if info["format_version"] is not None:
        kind += f", format version {info['format_version']}"
    rows = [("model", info["model"]), ("class", kind)]
    if teacher is not None:
        rows += [("base model", info["base_model"] or "not named"), ("teacher", teacher["model"] or "unknown")]
    files = weights["files"] or []
    size = "unknown" if weights["bytes"] is None else f"{weights['bytes']:,} bytes"
    names = files if len(files) < 3 else [f"{len(files)} files"]
    rows.append(("weights", ", ".join([size, *names, *(weights["dtypes"] or [])])))
    if weights["head_parameters"]:
        rows.append(("outside the encoder", f"{weights['head_parameters']:,} parameters"))
    top = [f"{name:<20}  {shorten(value, WIDTH - 22)}" for name, value in rows]

    counts = [(f"multiply-accumulates for {info['seconds']:g} s", "macs"), ("parameters", "parameters")]
    sizes = [[name, _share(info[key], teacher and teacher[key])] for name, key in reversed(counts)]
    if info["sparsity"] is not None:
        sizes.append(["sparsity", f"{info['sparsity']:.4f}"])
    tables = [_units_table(info, places) for places in dict.fromkeys(KINDS[name].places for name in _shown_kinds())]
    tables = [top, *map(align, (sizes, *tables))]
    notes = [textwrap.fill(printable(note), WIDTH) for note in info["notes"]]
    return "\n\n".join(["\n".join(lines) for lines in tables] + notes)


def _units_table(info: dict[str, Any], places: str) -> list[list[str]]:
    """Header and rows: the units that are left in each convolution or layer."""
    teacher = info["teacher"]
    names = []
    for name in _shown_kinds(places):
        wholes = (teacher or {}).get(name) or info[name]
        if KINDS[name].is_default or any(map(is_cut, info[name], wholes)):
            names.append(name)
    rows = [[str(index + 1)] for index in range(len(info[names[0]]))]
    for name in names:
        removed = {
            index: "block removed"
            for other, kind in KINDS.items()
            if kind.shown_by == name
            for index in info[f"removed_{other}"] or ()
        }
        if places == "layer" and info["remaining_layers"] is not None:
            removed |= dict.fromkeys({*range(len(rows))} - {*info["remaining_layers"]}, "layer removed")
        wholes = teacher and teacher[name] or [None] * len(rows)
        for index, (row, count, whole) in enumerate(zip(rows, info[name], wholes, strict=True)):
            row.append(_share(count, whole, removed.get(index)))
    return [[places, *(KINDS[name].label for name in names)], *rows]


def _share(ours: int, theirs: int | None, note: str | None = None) -> str:
    """Count of the model, and of the teacher if known, with a note or the share that is left."""
    if theirs is None:
        return f"{ours:,}"
    note = note or (f"{100 * ours / theirs:.1f} %" if theirs else "-")
    return f"{ours:,} of {theirs:,}  {note:>{len('100.0 %')}}"


# ------------------------------------------------------------------------------------------------------------- command
def _parse(arguments: list[str] | None, prog: str | None) -> argparse.Namespace:
    parser = Parser(
        prog=prog,
        description="Show how much of its teacher a student keeps, or the size of an encoder. No model code is run.",
        allow_abbrev=False,
    )
    parser.add_argument("model", help="Hub id or directory of a student, or of a stock encoder.")
    parser.add_argument(
        "--teacher", help="Hub id or directory of the student's teacher, if the student does not name it."
    )
    parser.add_argument(
        "--seconds", default=10.0, help="Length in seconds of the clip that MACs are counted for; 10 by default."
    )
    parser.add_argument("--json", action="store_true", help="Print a JSON object.")
    args = parser.parse_args(arguments)
    args.seconds = checked("seconds", args.seconds, Length)
    return args


def main(arguments: list[str] | None = None, prog: str | None = None) -> int:
    """
    Prints what [`describe`] finds.

    Args:
        arguments (`list[str]`, *optional*): the command line; by default `sys.argv[1:]`.
        prog (`str`, *optional*): what the help calls the program.

    Returns:
        `int`: the exit code.
    """

    def body() -> None:
        args = _parse(arguments, prog)
        info = describe(args.model, args.teacher, args.seconds)
        print_result(json.dumps(info, allow_nan=False) if args.json else format_text(info))

    return run_script(body)
