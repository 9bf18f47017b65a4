"""
Heads of fine-tuned teachers: which one a run keeps, what its logits and labels add to the loss, and what makes label
ids of the `labels` of rows.
"""

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..data.labels import IGNORED_LABEL, LabelEncoder
from ..losses import ctc_losses, logits_divergence
from ..models.families import STUDENT_CLASSES, check_family, head_named, load_student
from ..models.loading import COUNTERS, load_config
from ..recipe.skill_config import SkillConfig


logger = logging.getLogger(__name__)

CTC, CLASSIFICATION, FRAMES = "CTC", "SequenceClassification", "AudioFrameClassification"
# Public name of a task -> head, as class names end.
HEADS = {"ctc": CTC, "classification": CLASSIFICATION, "frame-classification": FRAMES}
ENCODER = "encoder"
TASK_NAMES = (ENCODER, *HEADS)
# Heads of pretraining, which are no loss to anybody.
_OF_PRETRAINING = ("ForPreTraining", "ForMaskedLM", "ForSkillStudent")
# How many of a batch there are: what sums of a loss are divided by.
BATCH_COUNTS = ("num_frames", "num_clips", "num_labels")


def kept_head(task: str | None, class_name: str | None, config: PreTrainedConfig, what: str, loaded: bool):
    """
    The head that a run keeps of its teacher.

    Args:
        task (`str`, *optional*):
            One of `TASK_NAMES`; by default a loaded model keeps the head that it has, and of a directory or repository
            the encoder alone is taken, with a warning if there is a head.
        class_name (`str`, *optional*): of the teacher, or what its config.json says.
        config (`PreTrainedConfig`): of the teacher.
        what (`str`): what messages call the teacher.
        loaded (`bool`): whether it was given as a loaded model.

    Returns:
        `str`, *optional*: one of the values of `HEADS`; `None` for the encoder alone.

    Raises:
        `ValueError`: if `task` is unknown, or is not that of the teacher's head, or the family has no such head.
    """
    if task is not None and task not in TASK_NAMES:
        raise ValueError(f"`task` must be one of {', '.join(TASK_NAMES)}, but is {task!r}.")
    head = head_named(class_name or "")
    name_of = {value: name for name, value in HEADS.items()}
    if task is None and loaded and head in name_of:
        return head
    if task is None:
        if re.search("For[A-Z]", class_name or "") and not class_name.endswith(_OF_PRETRAINING):
            _warn_of_lost_head(what, class_name, name_of.get(head))
        return None
    if task == ENCODER:
        return None
    tasks = STUDENT_CLASSES[config.model_type].config_class.tasks
    if HEADS[task] not in tasks:
        known = ", ".join(name for name, value in HEADS.items() if value in tasks)
        raise ValueError(f"`task` is {task}, but models of the family `{config.model_type}` have heads for {known}.")
    if head != HEADS[task]:
        has = f"is a {class_name}" if class_name else "does not say in config.json which head it has"
        advice = f"pass `task={name_of[head]!r}`" if head in name_of else "fine-tune it first, or leave `task` out"
        raise ValueError(f"`task` is {task}, but {what} {has}: {advice}.")
    return head


def load_initial_student(source: str | os.PathLike, task: str | None = None) -> PreTrainedModel:
    """
    What [`~skill_hf.models.families.load_student`] loads from `source`, a Hub id or directory, with the head that
    [`kept_head`] keeps of it.
    """
    config = load_config(source, "Student")
    check_family(config.model_type, source)
    class_name = (config.architectures or [None])[0]
    return load_student(source, kept_head(task, class_name, config, f"student `{source}`", loaded=False))


def _warn_of_lost_head(what: str, class_name: str, task: str | None) -> None:
    if task is None:
        advice = "Its head is of a kind that is not distilled: train one on the student"
    else:
        advice = f"To keep its head, pass `task={task!r}`"
    logger.warning(
        "%s is a %s, but the student will be an encoder without a head. %s. `task='encoder'` is for encoders alone and"
        " gives no warning.",
        what[0].upper() + what[1:],
        class_name,
        advice,
    )


def check_head(model: PreTrainedModel, head: str, what: str) -> None:
    """
    Raises:
        `ValueError`: if the logits of a head are not those of one distribution over classes, or it has weights that
            are NaN or infinite.
    """
    config = model.config
    if head != CTC and (config.num_labels < 2 or config.problem_type in ("regression", "multi_label_classification")):
        kind = config.problem_type or "regression"
        raise ValueError(
            f"{what} has a head for {kind} with {config.num_labels} outputs, but logits are distilled as one"
            " distribution over two classes or more. Pass `task='encoder'` to compress the encoder alone."
        )
    encoder = {id(tensor) for tensor in model.base_model.state_dict(keep_vars=True).values()}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in encoder and not name.endswith(COUNTERS) and not torch.isfinite(tensor).all():
            raise ValueError(f"{what} has NaN or infinite weights in {name}; download the weights again.")


@dataclass(frozen=True)
class HeadLoss:
    """
    What the head of a fine-tuned teacher adds to the loss of its student.

    Args:
        head (`str`): one of the values of `HEADS`.
        logits_weight (`float`): of `logits_loss`, [`~skill_hf.losses.logits_divergence`] as a mean over valid frames,
            or over clips where there is one prediction for each.
        temperature (`float`): of the same.
        task_weight (`float`): of `task_loss`, that of the labels: connectionist temporal classification as a mean over
            labelled clips, or cross entropy as a mean over labelled clips or frames. 0 where labels are not read.
    """

    head: str
    logits_weight: float
    temperature: float
    task_weight: float

    @property
    def units(self) -> dict[str, str]:
        """Name of each loss -> which of `BATCH_COUNTS` it is a mean over."""
        units = {"logits_loss": "num_clips" if self.head == CLASSIFICATION else "num_frames"}
        return units | ({"task_loss": "num_labels"} if self.task_weight else {})

    @property
    def weights(self) -> dict[str, float]:
        """Of each loss, by its name."""
        return {"logits_loss": self.logits_weight, "task_loss": self.task_weight}

    def sums(
        self,
        student: PreTrainedModel,
        logits: torch.Tensor,
        target: torch.Tensor,
        attention_mask: torch.Tensor | None,
        frame_mask: torch.Tensor | None,
        labels: torch.Tensor | None,
    ) -> dict[str, torch.Tensor]:
        """
        Each loss, summed over what it is a mean over.

        Args:
            student (`PreTrainedModel`): with its head.
            logits, target (`torch.Tensor` of shape `(batch, frames, classes)` or `(batch, classes)`): student's and
                teacher's.
            attention_mask (`torch.LongTensor` of shape `(batch, samples)`, *optional*): 0 at padded samples.
            frame_mask (`torch.BoolTensor` of shape `(batch, frames)`, *optional*): True where a frame is valid.
            labels (`torch.LongTensor`, *optional*): of shape `(batch,)` for clips, else `(batch, most labels)`; padded
                on the right with `IGNORED_LABEL`.

        Raises:
            `ValueError`: if there are labels for more frames than a clip has.
        """
        mask = frame_mask
        if self.head == CLASSIFICATION and attention_mask is not None:
            mask = attention_mask.bool().any(-1)
        divergence = logits_divergence(logits, target, self.temperature)
        # `where`, not a product: whatever padded frames hold, a NaN too, must not count.
        sums = {"logits_loss": (divergence if mask is None else torch.where(mask, divergence, 0.0)).sum()}
        if self.task_weight:
            sums["task_loss"] = divergence.new_zeros(())
            if labels is not None:
                sums["task_loss"] = self._of_labels(student, logits, frame_mask, labels).sum()
        return sums

    def _of_labels(self, student, logits, frame_mask, labels) -> torch.Tensor:
        if self.head == CTC:
            frames = logits.shape[1]
            num_frames = labels.new_full((len(labels),), frames) if frame_mask is None else frame_mask.sum(-1)
            per_label = student.config.ctc_loss_reduction == "mean"
            # A batch that could not be read has no frame.
            return ctc_losses(logits, labels, num_frames.clamp(min=1), student.config.pad_token_id, per_label)
        if self.head == FRAMES:
            spare = logits.shape[1] - labels.shape[1]
            if spare < 0:
                raise ValueError(
                    f"`labels` of a row name {labels.shape[1]} frames, but its clip has at most {logits.shape[1]}:"
                    " give one label for each frame of the model."
                )
            labels = F.pad(labels, (0, spare), value=IGNORED_LABEL)
        return F.cross_entropy(
            logits.float().flatten(0, -2), labels.flatten(), ignore_index=IGNORED_LABEL, reduction="none"
        )

    def count_labels(self, labels: torch.Tensor | None) -> torch.Tensor:
        """What `task_loss` is a mean over in a batch: labelled clips, or labelled frames."""
        if labels is None:
            return torch.zeros((), dtype=torch.long)
        is_labelled = labels >= 0
        return (is_labelled.any(-1) if self.head == CTC else is_labelled).sum()


def make_head_loss(head: str | None, config: SkillConfig) -> HeadLoss | None:
    """
    Raises:
        `ValueError`: if the recipe weighs labels, but the teacher keeps no head.
    """
    if head is not None:
        return HeadLoss(head, config.logits_weight, config.logits_temperature, config.task_weight)
    if config.task_weight:
        raise ValueError(
            f"`task_weight` is {config.task_weight}, but the teacher keeps no head to learn labels with: pass a"
            f" fine-tuned teacher and its `task` ({', '.join(HEADS)}), or set `task_weight` to 0."
        )
    return None


def label_encoder(model: PreTrainedModel, head: str, tokenizer: PreTrainedTokenizerBase | None) -> LabelEncoder:
    """What makes label ids for `model`, whose `head` is one of the values of `HEADS`, of the `labels` of rows."""
    config = model.config
    if head == CTC:
        return LabelEncoder(config.vocab_size, one_per_clip=False, blank=config.pad_token_id, tokenizer=tokenizer)
    return LabelEncoder(config.num_labels, one_per_clip=head == CLASSIFICATION, ids=dict(config.label2id))


def check_labels(dataset, encoder: LabelEncoder) -> None:
    """
    Tries the labels of the first row of a training set that is not a stream.

    Raises:
        `ValueError`: if it has none, or they are not those of the head.
    """
    row = dataset[0]
    if not isinstance(row, Mapping) or "labels" not in row:
        columns = ", ".join(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
        raise ValueError(
            f"`task_weight` is above 0, but the rows of `train_dataset` have no `labels`, only {columns}: add them, or"
            " set it to 0."
        )
    encoder(row["labels"])
