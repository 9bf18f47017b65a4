"""
Checks before a run which of transformers' arguments it can honour: the type and range of each, and the ones rejected
because a two-stage run cannot honour them.
"""

import dataclasses
import json
import math
import os
import reprlib
from enum import Enum
from numbers import Integral, Real
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import DynamoBackend
from transformers import TrainerCallback, TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.trainer_utils import HubStrategy, IntervalStrategy, SaveStrategy, SchedulerType
from transformers.training_args import OptimizerNames

from ..distribution import NO_DEEPSPEED, check_environment


class Number(NamedTuple):
    """A range that includes its ends, except those given by `above` or `below`."""

    whole: bool
    least: float
    most: float = math.inf
    above: bool = False
    below: bool = False
    optional: bool = False

    def __str__(self):
        kind = "an integer" if self.whole else "a finite number"
        least = f"above {self.least}" if self.above else f"of at least {self.least}"
        most = "" if self.most == math.inf else f" {'below' if self.below else 'up to'} {self.most}"
        return f"{kind} {least}{' and' if most else ''}{most}{' or None' if self.optional else ''}"

    def holds(self, value) -> bool:
        low = value > self.least if self.above else value >= self.least
        return math.isfinite(value) and low and (value < self.most if self.below else value <= self.most)


_COUNT = Number(True, 1)
_OPTIONAL_COUNT = Number(True, 1, optional=True)
_WEIGHT = Number(False, 0)
_DECAY = Number(False, 0, 1, below=True)
_INTERVAL = Number(False, 0, above=True)
_SECONDS = Number(False, 0, above=True, optional=True)
_SEED = Number(True, 0, 2**32 - 1)  # what numpy takes

NUMBERS = {
    "max_steps": Number(True, -1),
    "num_train_epochs": _WEIGHT,
    "per_device_train_batch_size": _COUNT,
    "per_device_eval_batch_size": _COUNT,
    "seconds_per_batch": _SECONDS,  # of `SkillTrainingArguments`, as the next
    "seconds_per_step": _SECONDS,
    "shuffle_buffer": _OPTIONAL_COUNT,
    "gradient_accumulation_steps": _COUNT,
    "learning_rate": Number(False, 0, above=True, optional=True),
    "warmup_steps": _WEIGHT,
    "weight_decay": _WEIGHT,
    "adam_beta1": _DECAY,
    "adam_beta2": _DECAY,
    "adam_epsilon": Number(False, 0, above=True),
    "max_grad_norm": _WEIGHT,
    "logging_steps": _INTERVAL,
    "save_steps": _INTERVAL,
    "eval_steps": _INTERVAL._replace(optional=True),
    "eval_delay": _WEIGHT,
    "eval_accumulation_steps": _OPTIONAL_COUNT,
    "save_total_limit": _OPTIONAL_COUNT,
    "torch_empty_cache_steps": _OPTIONAL_COUNT,
    "seed": _SEED,
    "data_seed": _SEED._replace(optional=True),
    "dataloader_num_workers": Number(True, 0),
    "dataloader_prefetch_factor": _OPTIONAL_COUNT,
    "ddp_bucket_cap_mb": _OPTIONAL_COUNT,
    "ddp_timeout": _COUNT,
}
# A share of the steps of a stage below 1, a number of steps from there on.
SHARES = ("logging_steps", "save_steps", "eval_steps", "warmup_steps")

OPTIONAL_FLAGS = (
    "activation_checkpointing",
    "gradient_checkpointing",
    "tf32",
    "disable_tqdm",
    "hub_private_repo",
    "greater_is_better",
    "ddp_find_unused_parameters",
    "ddp_broadcast_buffers",
    "ddp_static_graph",
)
FLAGS = (
    *(item.name for item in dataclasses.fields(TrainingArguments) if isinstance(item.default, bool)),
    *OPTIONAL_FLAGS,
    "overwrite_output_dir",  # of `SkillTrainingArguments`
)
# Of type bool by default, but of others, too.
FLAGS = tuple(name for name in dict.fromkeys(FLAGS) if name != "fsdp")

TEXTS = (
    "optim_args",
    "run_name",
    "project",
    "hub_token",
    "hub_model_id",
    "hub_revision",
    "metric_for_best_model",
    "length_column_name",
    "torch_compile_backend",
    "torch_compile_mode",
)

CHOICES = {
    "optim": OptimizerNames,
    "lr_scheduler_type": SchedulerType,
    "logging_strategy": IntervalStrategy,
    "eval_strategy": IntervalStrategy,
    "save_strategy": SaveStrategy,
    "hub_strategy": HubStrategy,
    "train_sampling_strategy": ("random", "sequential", "group_by_length", "batch_rebalance"),
    "log_level": ("debug", "info", "warning", "error", "critical", "passive", "detail"),
    "log_level_replica": ("debug", "info", "warning", "error", "critical", "passive", "detail"),
    "ddp_backend": (None, "nccl", "mpi", "xccl", "gloo", "hccl", "ccl", "cncl", "mccl"),
    "dataloader_multiprocessing_context": (None, "fork", "spawn", "forkserver"),
    "include_num_input_tokens_seen": (True, False, "all", "non_padding", "no"),
}

_LAUNCHED = "the engine is chosen by `accelerate launch --config_file`; leave it out"

# Field -> the only value that it may have (`None` and what is empty stand for one another), and why.
REFUSED = {
    "neftune_noise_alpha": (None, "a speech encoder has no token embeddings to add noise to; leave it out"),
    "label_smoothing_factor": (0.0, "distillation has no labels; leave it out"),
    "label_names": (None, "distillation has no labels; leave it out"),
    "use_liger_kernel": (False, "there are no Liger kernels for speech encoders; leave it out"),
    "liger_kernel_config": (None, "there are no Liger kernels for speech encoders; leave it out"),
    "use_cache": (False, "an encoder has no cache; leave it out"),
    "auto_find_batch_size": (
        False,
        "a run whose batch size changes cannot be resumed; find `per_device_train_batch_size` with a run of a few"
        " steps",
    ),
    "optim_target_modules": (None, "optimizers that use it are not supported; leave it out"),
    "average_tokens_across_devices": (True, "the loss is always a mean over the frames of all devices; leave it out"),
    "bf16_full_eval": (False, "it would leave the student in half precision; use `bf16`"),
    "fp16_full_eval": (False, "it would leave the student in half precision; use `fp16` on a GPU"),
    "batch_eval_metrics": (False, "evaluation keeps losses, but no predictions for metrics; leave it out"),
    "include_for_metrics": (None, "evaluation keeps losses, but no predictions for metrics; leave it out"),
    "save_only_model": (
        False,
        "checkpoints without the state of the optimizer cannot be resumed; limit their number with `save_total_limit`",
    ),
    "dataloader_in_order": (True, "a run with batches in arbitrary order cannot be resumed; leave it out"),
    "hub_always_push": (False, "only the finished student is published, with `save_model` or `push_to_hub`"),
    "fsdp": (None, _LAUNCHED),
    "fsdp_config": (None, _LAUNCHED),
    "deepspeed": (None, NO_DEEPSPEED),
    "parallelism_config": (None, "only data parallelism is supported; leave it out"),
}

# Arguments of `Trainer` itself.
REFUSED_OF_TRAINER = {
    "model_init": "each stage creates its own; use `model`",
    "optimizers": "each stage creates its own; use `optimizer_cls_and_kwargs`",
    "compute_loss_func": "the recipe defines the loss; subclass and override `compute_loss`",
    "compute_metrics": "evaluation keeps losses, but no predictions; subclass and override `evaluate`",
    "preprocess_logits_for_metrics": "evaluation keeps losses, but no predictions; leave it out",
}

# Field of `accelerator_config` -> the values that it may have, and why.
_ACCELERATOR_CONFIG = {
    "split_batches": ((False,), "set the batch size per device with `per_device_train_batch_size`"),
    "even_batches": ((True,), "processes with unequal numbers of batches would wait for each other"),
    "use_seedable_sampler": ((True, None), "a run whose order comes from a global generator can't be resumed"),
}


_CHECKPOINT_SETTINGS = ("use_reentrant", "preserve_rng_state", "determinism_check", "context_fn", "debug")


def check_arguments(args: TrainingArguments) -> None:
    """
    Checks types, ranges and rejected values of single training arguments. NumPy numbers become Python numbers.

    Args:
        args ([`~transformers.TrainingArguments`]): before or after its `__post_init__`.

    Raises:
        `ValueError`: states one argument, its value, and the valid values.
    """
    if not isinstance(args, TrainingArguments):
        raise ValueError(f"`args` must be TrainingArguments, but is a {type(args).__name__}.")
    for name in FLAGS:
        _check_flag(args, name)
    for name, number in NUMBERS.items():
        _check_number(args, name, number)
    for name in TEXTS:
        value = getattr(args, name, None)
        if value is not None and not isinstance(value, str):
            refuse(name, value, "it must be text")
    for name, choices in CHOICES.items():
        _check_choice(args, name, choices)
    if not isinstance(args.output_dir, (str, os.PathLike, type(None))) or args.output_dir == "":
        refuse("output_dir", args.output_dir, "it must be a directory")
    for name, (only, why) in REFUSED.items():
        value = getattr(args, name, only)
        if value != only and not (only in (None, False) and value in (None, False, "", [], {})):
            refuse(name, value, why)
    check_environment()
    _check_combinations(args)


def check_trainer_arguments(arguments: dict[str, Any]) -> None:
    """
    Raises:
        `ValueError`: if `arguments`, those of `Trainer.__init__` by name, contain one that a run cannot honour.
    """
    for name, why in REFUSED_OF_TRAINER.items():
        if arguments.get(name) not in (None, (None, None)):
            raise ValueError(f"`{name}` is not supported: {why}.")
    callbacks = arguments.get("callbacks") or []
    if not isinstance(callbacks, (list, tuple)):
        raise ValueError(f"`callbacks` must be a list, but is a {type(callbacks).__name__}.")
    for callback in callbacks:
        is_class = isinstance(callback, type) and issubclass(callback, TrainerCallback)
        if not is_class and not isinstance(callback, TrainerCallback):
            raise ValueError(
                f"`callbacks` contains {reprlib.repr(callback)}, which is not a TrainerCallback; leave it out."
            )


def check_devices(args: TrainingArguments) -> None:
    """
    Raises:
        `ValueError`: if one process would train on several devices, several processes would not know each other, or
            another SIGTERM handler is requested.
    """
    if args.world_size == 1 < launched_processes():
        refuse("use_cpu", args.use_cpu, f"there is no GPU for the {launched_processes()} processes; set it to True")
    if args.n_gpu > 1:
        raise ValueError(
            f"One process cannot train on {args.n_gpu} devices; start it with `accelerate launch`, or select one"
            " device with CUDA_VISIBLE_DEVICES."
        )
    if args.enable_jit_checkpoint:
        raise ValueError("`enable_jit_checkpoint` must be False: SIGTERM writes a checkpoint without it.")


def launched_processes() -> int:
    """How many processes the launcher started, whether or not they know each other."""
    return int(os.environ.get("WORLD_SIZE", 1))


def refuse(name: str, value, why: str):
    """Raises the error of this module: argument, value, and why it is rejected or what to do."""
    value = getattr(value, "value", value)
    shown = "***" if name == "hub_token" else reprlib.repr(value)
    raise ValueError(f"`{name}` is {shown}, but {why}.")


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def _check_flag(args, name: str) -> None:
    optional = name in OPTIONAL_FLAGS
    value = getattr(args, name, False)
    if isinstance(value, np.bool_):
        setattr(args, name, bool(value))
    elif not isinstance(value, bool) and not (optional and value is None):
        refuse(name, value, f"it must be True{', False or None' if optional else ' or False'}")


def _check_number(args, name: str, number: Number) -> None:
    value = getattr(args, name, None)
    if value is None and number.optional:
        return
    is_number = isinstance(value, Integral if number.whole else Real) and not isinstance(value, (bool, np.bool_))
    if is_number and isinstance(value, np.generic):
        value = value.item()
        setattr(args, name, value)
    # Beyond 64 bit even comparing a whole number with a float fails.
    if not is_number or (isinstance(value, int) and abs(value) >= 2**63) or not number.holds(value):
        refuse(name, value, f"it must be {number}")
    if name in SHARES and value > 1 and value != int(value):
        refuse(
            name,
            value,
            "values from 1 up are a number of steps and must be integers; below 1 they are a share of all steps",
        )


def _check_choice(args, name: str, choices) -> None:
    value = getattr(args, name, None)
    values = [item.value for item in choices] if isinstance(choices, type) and issubclass(choices, Enum) else choices
    given = getattr(value, "value", value)
    if hasattr(args, name) and (not isinstance(given, (str, bool, type(None))) or given not in values):
        refuse(name, value, f"it must be one of {', '.join(str(item) for item in values)}")


def _check_combinations(args: TrainingArguments) -> None:
    if args.max_steps == 0:
        refuse("max_steps", 0, "it must be above 0, or -1 to use `num_train_epochs`")
    if args.max_steps < 0 and args.num_train_epochs <= 0:
        refuse("num_train_epochs", args.num_train_epochs, "it must be above 0 without `max_steps`")
    if args.dataloader_num_workers == 0:
        for name in ("persistent_workers", "prefetch_factor", "multiprocessing_context"):
            name = f"dataloader_{name}"
            if getattr(args, name, None):
                refuse(name, getattr(args, name), "there are no workers; set `dataloader_num_workers` above 0")
    _check_durations(args)
    if args.fp16 and args.bf16:
        raise ValueError("`fp16` and `bf16` are both True; set only one.")
    if args.use_cpu or not torch.accelerator.is_available():
        launched = os.environ.get("ACCELERATE_MIXED_PRECISION") == "fp16"
        if args.fp16 or (launched and not args.bf16):
            refuse("fp16" if args.fp16 else "mixed_precision", args.fp16 or "fp16", "CPUs don't support it; use bf16")
    if os.environ.get("ACCELERATE_MIXED_PRECISION", "no") not in ("no", "fp16", "bf16"):
        refuse("mixed_precision", os.environ["ACCELERATE_MIXED_PRECISION"], "it must be no, bf16 or fp16")
    if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        refuse(
            "hub_strategy",
            args.hub_strategy,
            "only the finished student is published; use `end` or `every_save`",
        )
    _check_reports(args)
    _check_debug(args)
    _check_checkpointing(args)
    _check_compiler(args)
    _check_accelerator_config(args)


def _check_durations(args) -> None:
    if getattr(args, "seconds_per_batch", None) is None:
        if getattr(args, "seconds_per_step", None) is not None:
            refuse("seconds_per_step", args.seconds_per_step, "`seconds_per_batch` is None; set it, too")
        return
    if args.train_sampling_strategy != "random":
        refuse(
            "train_sampling_strategy", args.train_sampling_strategy, "`seconds_per_batch` sets the order; leave it out"
        )
    if args.dataloader_drop_last:
        refuse("dataloader_drop_last", True, "batches of `seconds_per_batch` have all clips; leave it out")


def _check_reports(args) -> None:
    names = [args.report_to] if isinstance(args.report_to, str) else args.report_to or []
    if not isinstance(names, (list, tuple)):
        refuse(
            "report_to",
            names,
            f"it must be none, all, or one or more of {', '.join(sorted(INTEGRATION_TO_CALLBACK))}",
        )
    installed = get_available_reporting_integrations()
    for name in names:
        if name in ("none", "all"):
            continue
        if name not in INTEGRATION_TO_CALLBACK:
            refuse("report_to", name, f"it must be none, all, or one of {', '.join(sorted(INTEGRATION_TO_CALLBACK))}")
        if name not in installed and name != "flyte":
            refuse("report_to", name, f"{name} is not installed; install it or set `report_to` to none")


def _check_debug(args) -> None:
    options = args.debug.split() if isinstance(args.debug, str) else args.debug or []
    for option in options if isinstance(options, (list, tuple)) else [options]:
        if getattr(option, "value", option) != "underflow_overflow":
            refuse("debug", option, "only underflow_overflow is supported; leave it out")


def _check_checkpointing(args) -> None:
    for name in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
        settings = _dict_of(args, name)
        if settings is None:
            continue
        known = set(_CHECKPOINT_SETTINGS)
        if hasattr(args, "activation_checkpointing"):  # transformers 5.24
            known |= {"every_n_layers", "offload"}
        if settings.keys() - known:
            refuse(name, settings, f"its keys must be among {', '.join(sorted(known))}")
        if settings.get("use_reentrant"):
            refuse(name, settings, "gates need non-reentrant checkpointing; leave out `use_reentrant`")


def _check_compiler(args) -> None:
    if not (args.torch_compile or args.torch_compile_backend or args.torch_compile_mode):
        return
    backends = [name for name in torch.compiler.list_backends() if name.upper() in DynamoBackend.list()]
    if args.torch_compile_backend is not None and args.torch_compile_backend.lower() not in [*backends, "eager"]:
        refuse("torch_compile_backend", args.torch_compile_backend, f"it must be one of {', '.join(backends)}")
    if args.torch_compile_mode is not None and args.torch_compile_backend in (None, "inductor"):
        modes = torch._inductor.list_mode_options()
        if args.torch_compile_mode not in modes:
            refuse("torch_compile_mode", args.torch_compile_mode, f"it must be one of {', '.join(modes)}")


def _check_accelerator_config(args) -> None:
    config = args.accelerator_config
    if isinstance(config, (str, dict)):  # `__post_init__` makes an object of it
        config = _dict_of(args, "accelerator_config")
    elif isinstance(config, AcceleratorConfig):
        config = dict(vars(config))
    elif config is not None:
        refuse("accelerator_config", config, "it must be a dict, JSON or an AcceleratorConfig")
    if not isinstance(config, dict):
        return
    for name, (allowed, why) in _ACCELERATOR_CONFIG.items():
        if config.get(name, allowed[0]) not in allowed:
            refuse(f"accelerator_config.{name}", config[name], f"{why}; leave it out")
    settings = config.get("gradient_accumulation_kwargs") or {}
    if isinstance(settings, dict) and settings.get("num_steps", 1) != 1:
        refuse(
            "accelerator_config.gradient_accumulation_kwargs",
            settings,
            "the number of steps is set with `gradient_accumulation_steps`",
        )
    if config.get("dispatch_batches") and launched_processes() > 1:
        refuse(
            "accelerator_config.dispatch_batches",
            True,
            "one process would have to join crops of different lengths; leave it out",
        )


def _dict_of(args, name: str) -> dict | None:
    """Value of a field that may be a dict or its JSON; file names are left to transformers."""
    value = getattr(args, name, None)
    if isinstance(value, str) and value.startswith("{"):
        try:
            value = json.loads(value)
        except ValueError as error:
            refuse(name, value, f"it is not valid JSON: {one_line(error)}")
    if value is not None and not isinstance(value, (dict, str)):
        refuse(name, value, "it must be a dict or JSON")
    return value if isinstance(value, dict) else None
