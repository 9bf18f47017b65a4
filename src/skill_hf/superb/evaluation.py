"""Trains the head of a task on cached hidden states, once per learning rate, and scores the best one."""

import copy
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import EarlyStoppingCallback, EvalPrediction, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import SaveStrategy

from ..distillation.checkpointing import last_complete_checkpoint
from ..encoders import FilterBank, PretrainedEncoder
from ..files import read_json, try_directory, write_json
from .features import CachedHiddenStates, cache_hidden_states, check_settings
from .tasks import Splits, Task


logger = logging.getLogger(__name__)

# Training arguments that results depend on, beside the learning rate.
TRAINING_SETTINGS = (
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "optim",
    "weight_decay",
    "max_grad_norm",
    "lr_scheduler_type",
    "warmup_steps",
    "eval_strategy",
    "eval_steps",
    "seed",
    "data_seed",
)


class Examples(torch.utils.data.Dataset):
    """
    Hidden states of clips with their targets.

    Args:
        states ([`CachedHiddenStates`]): states of the clips of a split that could be read.
        targets (`list`): targets of all clips of the split.
    """

    def __init__(self, states: CachedHiddenStates, targets: Sequence):
        self.states = states
        self.targets = [targets[row] for row in states.rows]

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, item: int) -> dict[str, Any]:
        return {"hidden_states": self.states[item], "target": self.targets[item]}


class HiddenStatesCollator:
    """Pads hidden states with zeros to the longest, in their stored precision."""

    def __init__(self, task: Task):
        self.task = task

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        states = [torch.from_numpy(np.array(row["hidden_states"])) for row in rows]
        return {
            "hidden_states": nn.utils.rnn.pad_sequence(states, batch_first=True),
            "num_frames": torch.tensor([len(clip) for clip in states]),
            "labels": self.task.collate([row["target"] for row in rows]),
        }


def prepare_examples(
    task: Task,
    encoder: PretrainedEncoder | FilterBank,
    splits: Splits,
    cache_dir: str | os.PathLike,
    max_seconds: float | None = None,
    cache_dtype: str = "float16",
    settings: dict | None = None,
) -> dict[str, Examples]:
    """
    Reads the targets, then encodes every split, unless this is already done.

    Args:
        task ([`Task`]): it reads its classes or symbols from `splits["train"]`.
        encoder ([`PretrainedEncoder`] or [`FilterBank`]): frozen.
        splits (`Mapping[str, Dataset]`): `train`, `validation` and `test`, with undecoded `audio`.
        cache_dir (`str` or `PathLike`): a directory for these splits and this encoder.
        max_seconds, cache_dtype, settings: of [`cache_hidden_states`].

    Raises:
        `ValueError`: errors of `task.read` (before anything is encoded), of [`cache_hidden_states`] and of
            `task.check`.
    """
    targets = task.read(splits)
    examples = {
        split: Examples(
            cache_hidden_states(
                encoder,
                dataset,
                Path(cache_dir) / split,
                mean_over_time=task.mean_over_time,
                max_seconds=max_seconds,
                dtype=cache_dtype,
                settings={**(settings or {}), "split": split},
            ),
            targets[split],
        )
        for split, dataset in splits.items()
    }
    for split, split_examples in examples.items():
        task.check(
            split_examples.targets,
            split,
            dict(zip(split_examples.states.rows, split_examples.states.num_frames.tolist(), strict=True)),
        )
    return examples


def evaluate_task(
    task: Task,
    examples: Mapping[str, Examples],
    args: TrainingArguments,
    learning_rates: Sequence[float],
    patience: int | None = None,
    settings: dict | None = None,
) -> dict[str, Any]:
    """
    Trains a head with each learning rate, selects the best one on the validation set, and scores it on the test set.
    As in SUPERB, the encoder is frozen, and the best checkpoint on the validation set counts. SUPERB also keeps the
    learning rate constant; here `args` determines this. Finished parts of an interrupted run are not repeated.

    Args:
        task ([`Task`]): the task, after `read`.
        examples (`Mapping[str, Examples]`): `train`, `validation` and `test`, from [`prepare_examples`].
        args ([`~transformers.TrainingArguments`]): steps, batch, seed, device. Evaluation follows `eval_steps`; each
            learning rate has its own directory in `output_dir`.
        learning_rates (`Sequence[float]`): learning rates to try.
        patience (`int`, *optional*): number of evaluations without improvement after which training stops.
        settings (`dict`, *optional*): what else the results depend on, such as the model's name.

    Returns:
        `dict`: the test set's metrics by their SUPERB names; `learning_rate`; `validation` (learning rate -> metrics);
        `layer_weights` (share of each hidden state, list of `layers` floats); `num_clips`.

    Raises:
        `ValueError`: if `learning_rates` is empty, the validation set cannot be scored, `output_dir` contains results
            of other settings, or training leads to NaN with every learning rate.
    """
    if not learning_rates:
        raise ValueError("`learning_rates` is empty; pass at least one.")
    if args.eval_strategy == "no":
        raise ValueError("`eval_strategy` is no, but the validation set chooses the head; set it to steps or epoch.")
    first = examples["train"][0]["hidden_states"]
    try_directory(args.output_dir)
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    values = args.to_dict()
    settings = {**(settings or {}), **{name: values[name] for name in TRAINING_SETTINGS}, "patience": patience}
    check_settings(Path(args.output_dir), settings, "results")
    results: dict[float, dict] = {}
    for learning_rate in learning_rates:
        directory = Path(args.output_dir) / f"learning_rate_{learning_rate:g}"
        path = directory / "result.json"
        if path.is_file():
            result = read_json(path)
        else:
            set_seed(args.seed)
            head = task.build_head(first.shape[1], first.shape[2])
            result = _train_head(task, head, examples, args, learning_rate, patience, directory)
            write_json(path, result)
        results[learning_rate] = result
        logger.info(
            "%s: learning rate %g, %s on the validation set %.2f",
            task.name,
            learning_rate,
            task.metric,
            result["validation"][task.metric],
        )
    usable = [rate for rate, result in results.items() if math.isfinite(result["validation"][task.metric])]
    if not usable:
        raise ValueError(
            f"Training {task.name} produced NaN with every learning rate ({', '.join(map(str, learning_rates))}); try"
            " smaller ones."
        )
    best = (max if task.greater_is_better else min)(usable, key=lambda rate: results[rate]["validation"][task.metric])
    return {
        **results[best]["test"],
        "learning_rate": best,
        "validation": {f"{learning_rate:g}": result["validation"] for learning_rate, result in results.items()},
        "layer_weights": results[best]["layer_weights"],
        "num_clips": {split: len(split_examples) for split, split_examples in examples.items()},
    }


def _score(task: Task, head: nn.Module, predictions: np.ndarray, examples: Examples) -> dict[str, float]:
    """Result of `task.score`, or NaN if training has diverged, since predictions may then still look valid."""
    if not all(parameter.isfinite().all() for parameter in head.parameters()) or not np.isfinite(predictions).all():
        return {task.metric: math.nan}
    return task.score(predictions, examples.targets)


def _train_head(
    task: Task,
    head: nn.Module,
    examples: Mapping[str, Examples],
    args: TrainingArguments,
    learning_rate: float,
    patience: int | None,
    directory: Path,
) -> dict[str, Any]:
    args = copy.copy(args)  # `dataclasses.replace` would reset the state that accelerate shares
    args.output_dir, args.learning_rate = str(directory), learning_rate
    args.metric_for_best_model, args.greater_is_better = f"eval_{task.metric}", task.greater_is_better
    args.load_best_model_at_end, args.remove_unused_columns = True, False
    args.save_strategy, args.save_steps = SaveStrategy(args.eval_strategy), args.eval_steps
    args.restore_callback_states_from_checkpoint = True  # else a resumed run would count patience from 0

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        return _score(task, head, prediction.predictions, examples["validation"])

    trainer = Trainer(
        model=head,
        args=args,
        train_dataset=task.train_examples(examples["train"]),
        eval_dataset=examples["validation"],
        data_collator=HiddenStatesCollator(task),
        compute_metrics=compute_metrics,
        callbacks=[] if patience is None else [EarlyStoppingCallback(patience)],
    )
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(str(directory)))
    weights = head.weighted_sum.weights.detach().cpu()
    scores = {}
    trainer.compute_metrics = None
    for split in ("validation", "test"):
        scores[split] = _score(task, head, trainer.predict(examples[split]).predictions, examples[split])
    return {**scores, "layer_weights": weights.tolist(), "steps": trainer.state.global_step}
