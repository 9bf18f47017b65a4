"""Batches of `seconds_per_batch` in training: the loader of a process, and the order of an epoch."""

import functools
from collections.abc import Callable

import datasets
import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import TrainingArguments
from transformers.trainer_utils import has_length, seed_worker

from ..data.duration_batches import DurationBatchSampler
from ..data.durations import clip_seconds
from ..recipe.argument_validation import refuse


# Clips shorter than any that a model takes would otherwise fill a batch without end.
LEAST_SECONDS = 0.1


def data_seed(args: TrainingArguments) -> int:
    """The seed of the order of the data."""
    return args.seed if args.data_seed is None else args.data_seed


class DurationBatches:
    """
    Args:
        trainer ([`~skill_hf.distillation.distillation_trainer.DistillationTrainer`]): the trainer to make batches for,
            of clips as its collator crops them.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        self._sampler: DurationBatchSampler | None = None
        self._lengths: tuple | None = None  # the dataset and the seconds of its clips

    def loader(self) -> DataLoader | None:
        """
        The training batches of this process; `None` if `seconds_per_batch` is not set.

        accelerate does not wrap this loader, since a step's batches are dealt to the processes here: it could not set
        the epoch of a sampler that it wraps twice, as in a resumed run.
        """
        trainer, args = self.trainer, self.trainer.args
        if getattr(args, "seconds_per_batch", None) is None or not has_length(trainer.train_dataset):
            return None
        self._sampler = DurationBatchSampler(
            self._seconds_as_cropped(),
            args.seconds_per_batch,
            args.gradient_accumulation_steps * args.world_size,
            rank=args.process_index,
            num_ranks=args.world_size,
            seed=data_seed(args),
        )
        return make_loader(trainer, trainer.train_dataset, self._sampler)

    def begin_epoch(self, number: int) -> None:
        """Sets the order of the epoch that follows."""
        if self._sampler is not None:
            self._sampler.epoch = number

    def _seconds_as_cropped(self) -> np.ndarray:
        seconds, limit = as_cropped(self._seconds(), self.trainer.data_collator), self.trainer.args.seconds_per_batch
        if seconds.max() > limit:
            refuse(
                "seconds_per_batch",
                limit,
                f"clips are up to {seconds.max():g} s long; raise it, or lower `max_seconds`",
            )
        return seconds

    def _seconds(self) -> np.ndarray:
        trainer, args = self.trainer, self.trainer.args
        if self._lengths is None or self._lengths[0] is not trainer.train_dataset:
            reading = trainer.reading
            with args.main_process_first(desc="reading the lengths of clips"):  # the others find them in the cache
                seconds = clip_seconds(
                    trainer.train_dataset,
                    reading["feature_extractor"].sampling_rate,
                    args.length_column_name,
                    reading["protocols"],
                    num_processes=args.dataloader_num_workers,
                )
            self._lengths = (trainer.train_dataset, seconds)
        return self._lengths[1]


def as_cropped(seconds: np.ndarray, collator) -> np.ndarray:
    """Lengths of clips in the batches of a collator, which crops and pads them."""
    least, most = (getattr(collator, name, None) for name in ("min_seconds", "max_seconds"))
    return np.clip(seconds, LEAST_SECONDS if least is None else least, most)


def make_loader(trainer, dataset, batch_sampler, wrap_collator: Callable = lambda collator: collator) -> DataLoader:
    """
    A loader as [`~transformers.Trainer`] makes it, but for the batches of `batch_sampler`, all of this process. What
    `wrap_collator` makes of the collator is called with what the dataset returns.
    """
    args = trainer.args
    collator = trainer.data_collator
    if isinstance(dataset, datasets.Dataset):
        dataset = trainer._remove_unused_columns(dataset, description="training")
    else:
        collator = trainer._get_collator_with_removed_columns(collator, description="training")
    return DataLoader(
        dataset,
        batch_sampler=batch_sampler,
        collate_fn=wrap_collator(collator),
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        persistent_workers=args.dataloader_persistent_workers,
        multiprocessing_context=args.dataloader_multiprocessing_context,
        prefetch_factor=args.dataloader_prefetch_factor,
        worker_init_fn=functools.partial(
            seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index
        ),
        # To start an iteration a loader draws a number, which must not come from the global generator: the loader of a
        # resumed run starts more of them.
        generator=torch.Generator(),
    )
