"""What identifies a run: everything that determines its weights except the recipe, as JSON values."""

import dataclasses
import os
import zlib
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import nn
from torch.utils.data import IterableDataset

from ..data.collator import row_key


# Others change what is written or shown, or how fast it goes, and may change when a run resumes.
ARGUMENTS = (
    "seed",
    "data_seed",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "optim",
    "optim_args",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "weight_decay",
    "max_grad_norm",
    "train_sampling_strategy",
    "dataloader_drop_last",
    "seconds_per_batch",
)
# Enough to tell data sets apart, few enough to be read from a slow disk.
ROWS = 64
BLOCK = 1 << 16


def describe_run(trainer) -> dict:
    """Settings of a run: name -> JSON value."""
    args, accelerator = trainer.args, trainer.accelerator
    run = {name: _plain(getattr(args, name, None)) for name in ARGUMENTS}
    if trainer.optimizer_cls_and_kwargs is not None:
        cls, kwargs = trainer.optimizer_cls_and_kwargs
        run["optimizer"] = [cls.__name__, {name: _plain(value) for name, value in kwargs.items() if name != "lr"}]
    distortion = getattr(trainer.data_collator, "distortion", None)
    return run | {
        "learning_rate": trainer.learning_rates[0],
        "final_learning_rate": trainer.learning_rates[1],
        "gate_learning_rate": trainer.skill_config.resolve_gate_learning_rate(trainer.steps.joint),
        "warmup_steps": args.get_warmup_steps(trainer.steps.joint),
        "sparsity_warmup_steps": trainer.steps.sparsity_warmup,
        "final_warmup_steps": trainer.steps.final_warmup,
        "precision": accelerator.mixed_precision,
        "batch_size": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "processes": accelerator.num_processes,
        "teacher_weights": trainer.teachers[0].weights_checksum(),
        **{
            name: {"weights": other.weights_checksum(), "audio": _simple_fields(extractor)}
            for (name, other), extractor in zip(
                trainer.ensemble.others.items(), trainer.ensemble.feature_extractors[1:], strict=True
            )
        },
        "student_weights": trainer.start_checksum,
        "audio": _simple_fields(trainer.processing_class),
        "crops": _simple_fields(trainer.data_collator),
        **({"distortion": distortion.describe()} if distortion is not None else {}),
        "data": describe_data(trainer.train_dataset, labels=trainer.label_encoder is not None),
        **({"stream": trainer.stream.identity()} if trainer.stream.is_used else {}),
    }


def describe_data(dataset, labels: bool = False) -> dict:
    """
    Number of rows, columns and a checksum over some rows: the same on every machine, whatever the path of the data. No
    row of a stream is read. With `labels`, the labels of these rows count as well.
    """
    columns = getattr(dataset, "column_names", None)
    described = {"columns": sorted(map(str, columns)) if isinstance(columns, Iterable) else None}
    try:
        rows = len(dataset)
    except Exception:
        rows = None
    if rows is None or isinstance(dataset, IterableDataset):
        info = getattr(dataset, "info", None)
        known = {name: getattr(info, name, None) for name in ("dataset_name", "config_name")}
        return described | known | {"split": _plain(getattr(dataset, "split", None)), "rows": rows}
    indices = sorted({int(index) for index in np.linspace(0, rows - 1, ROWS)}) if rows else []
    keys = [_key(dataset, index, labels) for index in indices]
    # Rows that change at random each time they are read have nothing to be told by.
    is_fixed = bool(keys) and keys == [_key(dataset, index, labels) for index in indices]
    return described | {"rows": rows, "checksum": zlib.crc32(b"\0".join(keys)) if is_fixed else None}


def _key(dataset, index: int, labels: bool) -> bytes:
    try:
        row = dataset[index]
        if not isinstance(row, Mapping):
            return b""
        return row_key(row) + _content(row.get("audio")) + (repr(row.get("labels")).encode() if labels else b"")
    except Exception:  # a row that cannot be read is named elsewhere
        return b""


def _content(audio) -> bytes:
    """Size, beginning and end of a local file, since different recordings may have the same name."""
    if isinstance(audio, Mapping):
        audio = audio.get("path") if audio.get("bytes") is None and audio.get("array") is None else None
    if not isinstance(audio, (str, os.PathLike)) or not os.path.isfile(audio):
        return b""
    with open(audio, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - BLOCK, 0))
        end = file.read(BLOCK)
        file.seek(0)
        return b"%d:%d" % (size, zlib.crc32(end, zlib.crc32(file.read(BLOCK))))


def checksum(model: nn.Module) -> int:
    """Checksum over all weights and buffers of `model` that are saved, such as batch-norm statistics, in order."""
    value = 0
    for tensor in model.state_dict().values():
        # As bytes: numpy has no bfloat16.
        value = zlib.crc32(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy(), value)
    return value


def _simple_fields(settings) -> dict:
    """Numbers, words and switches among the settings of a collator or feature extractor."""
    if settings is None:
        return {}
    if dataclasses.is_dataclass(settings):
        names = [field.name for field in dataclasses.fields(settings) if field.init and field.name != "epoch"]
    else:
        names = ("do_normalize", "sampling_rate", "padding_value", "return_attention_mask")
    values = {name: getattr(settings, name, None) for name in names}
    kept = {name: _plain(value) for name, value in values.items() if isinstance(value, (bool, int, float, str))}
    return {"class": getattr(settings, "__name__", type(settings).__name__), **kept}


def _plain(value):
    """
    A value that survives JSON unchanged: numbers and strings; enumerations by their values; anything else as text.
    """
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, Mapping):
        return {str(name): _plain(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, os.PathLike):
        return os.path.basename(value)
    return str(getattr(value, "value", value))
