"""Checks when `train()` starts that arguments, data, optimizer and metrics of a run fit together."""

import copy
import math
from collections.abc import Mapping

import datasets
import torch
from transformers import SchedulerType, get_scheduler
from transformers.trainer_optimizer import is_optimizer_factory
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, has_length

from ..recipe.argument_validation import check_arguments, one_line, refuse
from .early_stopping import early_stoppers
from .optimization import OWN_GROUPS
from .task_heads import check_labels


# Steps of a stage at which its learning-rate schedule is tried.
TRIED_STEPS = 16

BY_METRIC = (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)


def check_run(trainer, resumed: bool = False) -> None:
    """
    Args:
        trainer ([`SkillDistillationTrainer`]): the trainer at the start of `train()`, with its `steps`.
        resumed (`bool`, *optional*, defaults to `False`): whether the student is from a checkpoint.

    Raises:
        `ValueError`: if the optimizer or the schedule cannot be created, a metric is requested that evaluation does
            not return, or nothing would be pruned.
    """
    for stage, steps in ((1, trainer.steps.joint), (2, trainer.steps.final)):
        if steps:
            _check_schedule(trainer, stage, steps, make_optimizer(trainer, stage))
    _check_metric(trainer)
    if not trainer.steps.joint and not resumed and trainer.budget.total(trainer.student) >= trainer.teacher_cost:
        refuse(
            "final_steps",
            trainer.steps.final,
            "stage 2 would take all steps and nothing would be pruned; lower it, or pass a `model` that is already"
            " pruned",
        )


def check_rows(name: str, dataset) -> None:
    """
    Raises:
        `ValueError`: if `dataset` does not consist of rows, such as a dict of splits or of columns.
    """
    if isinstance(dataset, Mapping):
        keys = ", ".join(map(str, list(dataset)[:5]))
        raise ValueError(f"`{name}` is a {type(dataset).__name__} of {keys or 'nothing'}; pass one of its datasets.")
    streams = (datasets.IterableDataset, torch.utils.data.IterableDataset)
    has_rows = hasattr(dataset, "__getitem__") and has_length(dataset) and not isinstance(dataset, (str, bytes))
    if not has_rows and not isinstance(dataset, streams):
        raise ValueError(f"`{name}` must be a dataset or a list of rows, but is a {type(dataset).__name__}.")


def check_data(trainer) -> None:
    """
    Raises:
        `ValueError`: if an argument has become invalid, or `trainer` has no batch to train on, or lacks what its
            sampling strategy needs.
    """
    args, dataset = trainer.args, trainer.train_dataset
    check_arguments(args)
    if dataset is None:
        raise ValueError("There is no `train_dataset` to train on; pass one.")
    check_rows("train_dataset", dataset)
    heldout = trainer.eval_dataset
    if isinstance(heldout, dict) and not heldout:
        raise ValueError("`eval_dataset` is an empty dict; pass a dataset, or leave it out.")
    for name, rows in heldout.items() if isinstance(heldout, dict) else [("", heldout)]:
        if rows is not None:
            check_rows(f"eval_dataset[{name!r}]" if name else "eval_dataset", rows)
    collators = {"data_collator": trainer.data_collator, "eval_data_collator": trainer.eval_data_collator}
    sets = heldout if isinstance(heldout, dict) else {"eval_dataset": heldout}
    trainer.ensemble.check_batches(collators, {"train_dataset": dataset, **sets})
    strategy = args.train_sampling_strategy
    if not has_length(dataset):
        if args.max_steps < 0:
            refuse("max_steps", args.max_steps, "a dataset without a length has no epochs; set it above 0")
        if strategy != "random":
            refuse("train_sampling_strategy", strategy, "a stream has an order of its own; leave it out")
        if getattr(dataset, "_distributed", None) is not None:
            raise ValueError(
                "`train_dataset` is split by node; pass the whole stream, whose shards are dealt to the processes."
            )
        if getattr(args, "seconds_per_batch", None) is not None and not trainer.stream.is_used:
            refuse(
                "seconds_per_batch",
                args.seconds_per_batch,
                f"a {type(dataset).__name__} is read in order; leave it out, or use a stream of `datasets`",
            )
        return
    if not len(dataset):
        raise ValueError("`train_dataset` has no rows; pass one with audio.")
    if trainer.label_encoder is not None:
        check_labels(dataset, trainer.label_encoder)
    try:
        num_batches = len(trainer.get_train_dataloader())
    except (KeyError, TypeError, ValueError) as error:
        if strategy not in ("group_by_length", "batch_rebalance"):
            raise
        refuse(
            "train_sampling_strategy",
            strategy,
            f"the rows have no numbers in a column `{args.length_column_name}` ({one_line(error)}); add it, or use"
            " random",
        )
    if not num_batches:
        refuse(
            "dataloader_drop_last",
            args.dataloader_drop_last,
            f"{len(dataset)} clips don't fill one batch of {args.per_device_train_batch_size} on each of"
            f" {args.world_size} processes; switch it off or lower `per_device_train_batch_size`",
        )


def make_optimizer(trainer, stage: int) -> torch.optim.Optimizer:
    """
    Creates the optimizer of a stage over one dummy parameter and takes a step.

    Raises:
        `ValueError`: if it is not installed, rejects its arguments, or can't be used in two stages.
    """
    args = trainer.args
    given = trainer.optimizer_cls_and_kwargs
    name, value = ("optim", args.optim) if given is None else ("optimizer_cls_and_kwargs", given)
    rate = trainer.learning_rates[stage - 1]
    parameter = torch.nn.Parameter(torch.zeros(8, 8, device=args.device))
    parameter.grad = torch.ones_like(parameter)
    try:
        cls, kwargs = trainer.optimizer_class(trainer.student)
    except Exception as error:  # each optimizer has its own library
        settings = f" with `optim_args` {args.optim_args!r}" if args.optim_args else ""
        refuse(name, value, f"the optimizer{settings} cannot be created: {one_line(error)}")
    grouping = sorted(kwargs.keys() & OWN_GROUPS)
    if grouping or is_optimizer_factory(cls):
        reason = f" (`{grouping[0]}`)" if grouping else ""
        refuse(
            name,
            value,
            f"it builds its own parameter groups{reason}, and gates need a separate one; use a different optimizer",
        )
    try:
        optimizer = cls([{"params": [parameter], "weight_decay": args.weight_decay}], **kwargs | {"lr": rate})
        if not callable(getattr(optimizer, "eval", None)):
            optimizer.step()
    except Exception as error:
        refuse(name, value, f"the optimizer fails: {one_line(error)}")
    if callable(getattr(optimizer, "eval", None)):
        refuse(
            name,
            value,
            "its averaged weights would not reach the cut and the checkpoints; use a different optimizer",
        )
    if given is None and args.optim_args:
        _check_optimizer_arguments(trainer, kwargs)
    return optimizer


def _check_optimizer_arguments(trainer, kwargs: dict) -> None:
    """Rejects unused `optim_args`, which transformers silently ignores."""
    without = copy.copy(trainer.args)
    for pair in trainer.args.optim_args.replace(" ", "").split(","):
        key = pair.partition("=")[0]
        without.optim_args = pair
        alone = trainer.get_optimizer_cls_and_kwargs(without, trainer.student)[1]
        without.optim_args = None
        if repr(alone) == repr(trainer.get_optimizer_cls_and_kwargs(without, trainer.student)[1]):
            default = f"; it accepts {', '.join(sorted(kwargs))}"
            refuse(
                "optim_args", trainer.args.optim_args, f"{trainer.args.optim.value} has no argument `{key}`{default}"
            )


def _check_schedule(trainer, stage: int, steps: int, optimizer: torch.optim.Optimizer) -> None:
    args = trainer.args
    warmup = args.get_warmup_steps(steps) if stage == 1 else trainer.steps.final_warmup
    try:
        for key, value in (args.lr_scheduler_kwargs or {}).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"`{key}` must be finite")
        scheduler = get_scheduler(
            args.lr_scheduler_type,
            optimizer=optimizer,
            num_warmup_steps=warmup,
            num_training_steps=steps,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )
        factors = [
            factor(round(steps * share / TRIED_STEPS))
            for factor in getattr(scheduler, "lr_lambdas", ())
            for share in range(TRIED_STEPS + 1)
        ]
        wrong = next((factor for factor in factors if not 0 <= factor < math.inf), None)
        reason = "" if wrong is None else f"the learning rate of stage {stage} would be {wrong} times its peak"
    except Exception as error:  # of the types of the arguments, their number, their range
        reason = one_line(error)
    if reason:
        kind = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
        refuse("lr_scheduler_kwargs", args.lr_scheduler_kwargs, f"the schedule {kind} rejects it: {reason}")


def _check_metric(trainer) -> None:
    """Options that select by a metric need evaluation, and a metric that it returns."""
    args = trainer.args
    users = {
        "load_best_model_at_end": args.load_best_model_at_end,
        "save_strategy": args.save_strategy == SaveStrategy.BEST,
        "lr_scheduler_type": args.lr_scheduler_type in BY_METRIC,
        "callbacks": bool(early_stoppers(trainer.callback_handler.callbacks)),
    }
    names = [name for name, uses in users.items() if uses]
    shown = {"callbacks": "EarlyStoppingCallback"}
    for name in names:
        value = shown.get(name, getattr(args, name, None))
        if args.eval_strategy == IntervalStrategy.NO:
            refuse(name, value, "nothing is evaluated; set `eval_strategy` to steps or epoch")
        if args.metric_for_best_model is None:
            refuse(name, value, "it needs a metric; set `metric_for_best_model`")
        if args.eval_strategy == IntervalStrategy.STEPS and args.eval_delay > trainer.steps.total:
            refuse(
                "eval_delay",
                args.eval_delay,
                f"no evaluation would take place in {trainer.steps.total} steps, and `{name}` needs one",
            )
    if args.metric_for_best_model is None or args.eval_strategy == IntervalStrategy.NO:
        return
    sets = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {"": None}
    known = [f"{name}_{metric}".lstrip("_") for name in sets for metric in trainer.evaluation_metrics]
    if args.metric_for_best_model.removeprefix("eval_") not in known:
        refuse("metric_for_best_model", args.metric_for_best_model, f"it must be one of {', '.join(known)}")
