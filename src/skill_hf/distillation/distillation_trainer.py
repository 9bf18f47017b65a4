"""`DistillationTrainer`: the methods of transformers' `Trainer` loop for a student and its teachers."""

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch.utils.data import IterableDataset
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_pt_utils import LengthGroupedSampler

from ..compression.budgets import make_budget
from ..compression.gates import MAX_LOG_ALPHA, noise_seed
from ..compression.pruning import num_parameters
from ..data.audio import AudioError
from ..data.collator import SpeechCollator
from ..data.speech_datasets import disable_audio_decoding
from ..distribution import forward_context, stacked
from ..grouping.calibration import Calibration
from ..losses import DISTILLATION_LOSSES, TRAINING_LOSSES, sparsity_at, term_weights
from ..models.model_modes import padding_ignored
from ..models.properties import receptive_field
from ..recipe.schedule import StageSteps
from ..recipe.skill_config import SkillConfig
from .distiller import SkillDistiller
from .divergence import FiniteWatch
from .duration_batches import DurationBatches, data_seed
from .engine_trainer import EngineTrainer
from .ensemble import TeacherEnsemble
from .loss_sums import HeldOutLosses, LossSums
from .optimization import make_optimizer
from .projection_start import LinearFit, set_projections
from .stream_batches import TrainingStream
from .task_heads import BATCH_COUNTS, label_encoder, make_head_loss
from .throughput import Throughput
from .unreadable_clips import UnreadableClips


logger = logging.getLogger(__name__)


class DistillationTrainer(EngineTrainer):
    """
    Batches, loss, optimizer, evaluation and logs of a distillation in two stages. The loop itself is that of
    [`~transformers.Trainer`]; [`SkillDistillationTrainer`] decides when to cluster, cut and stop.

    Args:
        ensemble ([`~skill_hf.distillation.ensemble.TeacherEnsemble`]): the teachers, which give the targets.
        student (`PreTrainedModel`): the model to train, with the head that the teacher keeps.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): converts the output of a CTC head to text.
        skill_config ([`SkillConfig`]): the recipe.
        data_collator (*optional*): [`~skill_hf.data.collator.SpeechCollator`] by default, and another one in
            evaluation.
        args, train_dataset, eval_dataset, processing_class, kwargs:
            As in [`~transformers.Trainer`].
    """

    # `compute_loss` divides by the frames of the whole accumulated batch.
    loss_is_scaled_for_ga = True

    # What evaluation gives, by any of which `metric_for_best_model` may choose; a subclass that gives more adds them.
    evaluation_metrics = ("loss", *DISTILLATION_LOSSES)

    def __init__(
        self,
        ensemble: TeacherEnsemble,
        student: PreTrainedModel,
        skill_config: SkillConfig,
        args: TrainingArguments,
        train_dataset,
        eval_dataset,
        processing_class,
        data_collator: Callable | None,
        tokenizer=None,
        **kwargs,
    ):
        teachers = ensemble.teachers
        self.ensemble, self.teachers, self.student, self.skill_config = ensemble, teachers, student, skill_config
        self.tokenizer = tokenizer
        self.head_loss = make_head_loss(teachers[0].head, skill_config)
        self.head_losses = () if self.head_loss is None else tuple(self.head_loss.units)
        self.evaluation_metrics = (*self.evaluation_metrics, *self.head_losses)
        self.training_losses = (*TRAINING_LOSSES, *self.head_losses)
        self.label_encoder = None
        if skill_config.task_weight:
            self.label_encoder = label_encoder(student, teachers[0].head, tokenizer)
        self.budget = make_budget(skill_config, processing_class.sampling_rate)
        self.teacher_cost = self.budget.total(teachers[0].model)
        # Of a student to start from, whose gates must not be pulled open again first.
        self.start_sparsity = max(1 - self.budget.total(student) / self.teacher_cost, 0.0)
        self.eval_data_collator = data_collator
        if data_collator is None:
            settings = {"min_samples": receptive_field(student.config), "seed": args.seed}
            settings["label_encoder"] = self.label_encoder
            extractor = ensemble.collator_extractor()
            data_collator = SpeechCollator(extractor, **settings)
            self.eval_data_collator = SpeechCollator(extractor, crop="none", **settings)
        if isinstance(eval_dataset, dict):
            eval_dataset = {name: disable_audio_decoding(dataset) for name, dataset in eval_dataset.items()}
        else:
            eval_dataset = disable_audio_decoding(eval_dataset)
        super().__init__(
            model=student,
            args=args,
            data_collator=data_collator,
            train_dataset=disable_audio_decoding(train_dataset),
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        if isinstance(train_dataset, IterableDataset) and self.accelerator.dispatch_batches is None:
            # One process that reads for all would have to join crops of different lengths.
            self.accelerator.dataloader_config.dispatch_batches = False
        self.can_return_loss = True  # evaluation has a loss though the rows have no labels
        self.model_accepts_loss_kwargs = True
        self.label_names = []
        self._signature_columns = ["audio", "input_values", "attention_mask", self.args.length_column_name]
        if skill_config.task_weight:
            self._signature_columns.append("labels")
        for teacher in teachers:
            teacher.model.to(self.args.device)

        self.distiller: SkillDistiller | None = None
        self.stage = 0  # 0: not begun, 1: distil and prune, 2: distil after the cut, 3: done
        self.steps: StageSteps | None = None
        self.layer_groups: list[list[int]] | None = None
        self.other_calibrations: list[Calibration] = []  # of each teacher but the first
        self.state_moments: list[dict] = []  # mean and deviation of the states of each teacher, if they are normalised
        self.projection_starts: list[LinearFit] = []  # of the groups of these teachers, where they are predicted
        self.finite_watch = FiniteWatch(self)
        self.unreadable_clips = UnreadableClips(self)
        self._micro_batch = 0
        self._length_order: torch.Generator | None = None
        self.duration_batches = DurationBatches(self)
        self.stream = TrainingStream(self)
        self.throughput = Throughput(self)
        self.add_callback(self.throughput)
        self._train_losses = self._new_train_losses()
        self._eval_losses = self.new_held_out_losses()

    # ---- The teacher ----

    @property
    def teacher(self) -> PreTrainedModel:
        """The teacher that the student is a copy of, the first one: an encoder, with the head that is kept."""
        return self.teachers[0].model

    @property
    def groups_of_teachers(self) -> list[list[list[int]]]:
        """Hidden-state indices of each group, for each teacher."""
        return [self.layer_groups, *(calibration.groups for calibration in self.other_calibrations)]

    @property
    def _autocast_dtype(self) -> torch.dtype | None:
        if not self.accelerator.native_amp:  # DeepSpeed has half precision without autocast
            return None
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision)

    @property
    def encoders(self) -> list[PreTrainedModel]:
        """The models that run in a step: the student, and the copy of each teacher that computes targets."""
        return [self.student, *(teacher.fast_copy(self._autocast_dtype) for teacher in self.teachers)]

    def teacher_targets(self, input_values, attention_mask=None) -> list[torch.Tensor]:
        """
        What the student is to predict for a batch of the collator, without gradient: mean hidden states of each group,
        `(groups, batch, frames, width)`, one tensor for each set of [`~TeacherEnsemble.target_sets`].
        """
        return self.teacher_outputs(input_values, attention_mask)[0]

    def teacher_outputs(self, input_values, attention_mask=None) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        """`teacher_targets`, and the logits of the head that the teacher keeps, if any, without gradient."""
        with self.accelerator.autocast():
            return self.ensemble.outputs(
                self.groups_of_teachers,
                input_values,
                attention_mask,
                self._autocast_dtype,
                self.distiller.state_norms if self.skill_config.normalize_states else (),
            )

    # ---- What is trained ----

    @property
    def distiller_settings(self) -> dict:
        config = self.skill_config
        return {
            "teacher_cost": self.teacher_cost,
            "loss_weights": term_weights(config),
            "use_projections": config.has_projections(len(self.teachers)),
            "projection_groups": config.projection_groups,
            "student_layers": config.student_layers,
            "group_weights": config.group_weights,
            "multiplier": config.lagrange_multiplier,
            "final_sparsity": config.target_sparsity,
            "state_sizes": self._state_sizes,
            "head_loss": self.head_loss,
        }

    @property
    def _state_sizes(self) -> list[tuple[int, int]]:
        """Number and width of the hidden states of each teacher, if they are normalised."""
        configs = [teacher.config for teacher in self.teachers] if self.skill_config.normalize_states else []
        return [(config.num_hidden_layers + 1, config.hidden_size) for config in configs]

    def _make_distiller(self, previous: SkillDistiller | None = None) -> SkillDistiller:
        costs = self.budget.unit_costs(self.student)
        targets = self.ensemble.target_sets(self.groups_of_teachers)
        distiller = SkillDistiller(self.student, targets, costs=costs, previous=previous, **self.distiller_settings)
        if previous is None:
            for norms, moments in zip(distiller.state_norms, self.state_moments, strict=False):
                norms.load_state_dict({name: torch.from_numpy(value) for name, value in moments.items()})
            if self.projection_starts:
                set_projections(distiller, self.projection_starts)
        return distiller.to(self.args.device)

    # ---- The data ----

    @property
    def reading(self) -> dict:
        """Arguments for reading clips with [`~skill_hf.data.collator.calibration_waveforms`]."""
        return {
            "feature_extractor": self.processing_class,
            "min_samples": receptive_field(self.student.config),
            "protocols": getattr(self.data_collator, "protocols", ()),
        }

    def get_train_dataloader(self):
        for source in (self.duration_batches, self.stream):
            loader = source.loader()
            if loader is not None:
                return loader
        loader = super().get_train_dataloader()
        if self.args.dataloader_persistent_workers:
            # Only a loader's first pass starts workers, for which it would draw from the global generator: another
            # pass after resuming.
            loader.generator = torch.Generator()
            if hasattr(loader, "base_dataloader"):  # that accelerate wraps
                loader.base_dataloader.generator = loader.generator
        return loader

    def _get_train_sampler(self, train_dataset=None):
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, LengthGroupedSampler):
            # Its order would come from the global generator, which is in another state after resuming.
            sampler.generator = self._length_order = torch.Generator()
        return sampler

    def get_eval_dataloader(self, eval_dataset=None):
        with self._held_out():
            return super().get_eval_dataloader(disable_audio_decoding(eval_dataset))

    def get_test_dataloader(self, test_dataset):
        with self._held_out():
            return super().get_test_dataloader(disable_audio_decoding(test_dataset))

    @contextmanager
    def _held_out(self) -> Iterator[None]:
        """Within this context, data loaders read all clips, and each completely."""
        collator, args = self.data_collator, self.args
        self.data_collator, self.args = self.eval_data_collator, copy.copy(args)
        # Loaders with persistent workers are kept, by a name that another dataset can have.
        self.args.dataloader_drop_last = self.args.dataloader_persistent_workers = False
        try:
            yield
        finally:
            self.data_collator, self.args = collator, args

    @property
    def calibration_dataset(self):
        """What clips are taken from before training."""
        return self.stream.shuffled() if self.stream.is_used else self.train_dataset

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.stream.save(output_dir)

    def _run_epoch(self, *args, epoch: int, **kwargs) -> None:
        # Each epoch has its own crops and order; stage 2 uses odd numbers, so that it repeats none of stage 1.
        number = 2 * epoch + (self.stage == 2)
        self.duration_batches.begin_epoch(number)
        if isinstance(self.data_collator, SpeechCollator):
            if self.args.dataloader_persistent_workers:
                # Workers that outlive an epoch keep their copy of the collator.
                shared = torch.as_tensor(self.data_collator.epoch).share_memory_()
                self.data_collator.epoch = shared.fill_(number)
            else:
                self.data_collator.epoch = number
        if self._length_order is not None:
            self._length_order.manual_seed(
                int(np.random.SeedSequence((data_seed(self.args), number)).generate_state(1)[0])
            )
        super()._run_epoch(*args, epoch=epoch, **kwargs)
        if self.unreadable_clips.num_skipped:
            logger.warning("Clips left out of training batches so far: %d.", self.unreadable_clips.num_skipped)

    def get_batch_samples(self, epoch_iterator, num_batches: int, device: torch.device) -> tuple[list, torch.Tensor]:
        timed = self.throughput.timed(epoch_iterator)
        batch_samples, counts = super().get_batch_samples(timed, num_batches, device)
        # A stream that ends within a window, which would never be stepped: its gradient would stay for the next one.
        return (batch_samples, counts) if len(batch_samples) == num_batches else ([], None)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | None:
        """
        Valid frames, clips and labels (`BATCH_COUNTS`) of all micro-batches of all processes: the divisors of the loss
        sums, a tensor of shape `(3,)`.
        """
        self._micro_batch = 0  # the first of an optimizer step comes next
        if not batch_samples:  # a stream that has come to its end
            return None
        self.stream.note(batch_samples)
        lengths = torch.cat([_lengths(batch) for batch in batch_samples])
        self.unreadable_clips.note(lengths)
        self.throughput.note(lengths)
        # A batch that could not be read is one clip without a valid sample: no frames.
        frames = self.student._get_feat_extract_output_lengths(lengths).clamp(min=0).sum()
        labels = lengths.new_zeros(())
        if self.skill_config.task_weight:
            labels = sum(self.head_loss.count_labels(batch.get("labels")).to(lengths) for batch in batch_samples)
        counts = torch.stack([frames, (lengths > 0).sum(), labels]).to(device)
        return stacked(self.accelerator, counts).sum(0)

    # ---- Optimizer and schedule of a stage ----

    def make_optimizer(self, model) -> torch.optim.Optimizer:
        cls, kwargs = self.optimizer_class(model)
        return make_optimizer(
            model,
            cls,
            kwargs,
            decayed=set(self.get_decay_parameter_names(model)),
            weight_decay=self.args.weight_decay,
            learning_rate=self.args.learning_rate,
            gate_learning_rate=self.skill_config.resolve_gate_learning_rate(self.steps.joint),
            max_log_alpha=MAX_LOG_ALPHA if self.skill_config.lagrange_multiplier == "estimated" else None,
        )

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        return super().create_scheduler(self.steps.final if self.stage == 2 else self.steps.joint, optimizer)

    def create_optimizer_and_scheduler(self, num_training_steps: int) -> None:
        raise ValueError("`create_optimizer_and_scheduler` cannot be called: each stage of `train()` creates its own.")

    def hyperparameter_search(self, *args, **kwargs):
        raise ValueError(
            "`hyperparameter_search` cannot be called: a trainer trains only once; create one for each trial."
        )

    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ) -> tuple[int, int]:
        position = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        if resume_from_checkpoint is not None:
            self.stream.restore(resume_from_checkpoint)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ExportableState):  # one that the checkpoint's run did not have
                self.state.stateful_callbacks.setdefault(type(callback).__name__, callback.state())
        if self.stage != 2:
            return position
        # Steps count on through both stages, but each reads the data from its beginning.
        epochs, updates = divmod(max(self.state.global_step - self.steps.joint, 0), num_update_steps_per_epoch)
        return epochs, 0 if self.args.ignore_data_skip else updates * self.args.gradient_accumulation_steps

    # ---- A step ----

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.get("labels") if self.skill_config.task_weight else None
        distorted = inputs.get("distorted_values") if model.training else None
        inputs = {name: inputs[name] for name in ("input_values", "attention_mask") if name in inputs}
        noise = (self.args.seed, self.state.global_step)
        if not self.skill_config.shared_gate_noise:
            noise += (self.accelerator.process_index, self._micro_batch)
            self._micro_batch += model.training
        counts = {}
        if num_items_in_batch is not None:
            # Gradients are averaged over processes, but frames were counted over all of them.
            items = num_items_in_batch / self.accelerator.num_processes
            counts = dict(zip(BATCH_COUNTS, items.unbind(), strict=True))
        penalty_scale = 1 / getattr(self, "current_gradient_accumulation_steps", 1)
        target_sparsity = self._target_sparsity()
        targets, target_logits = self.teacher_outputs(**inputs)
        if distorted is not None:
            inputs["input_values"] = distorted
        inputs["input_values"] = self.ensemble.prepare(0, **inputs)
        with forward_context(self.accelerator, self.divides_parameters):
            outputs = model(
                **inputs,
                targets=targets,
                target_logits=target_logits,
                labels=labels,
                target_sparsity=target_sparsity,
                # A function of these numbers alone, so that it is the same after resuming.
                gate_seed=noise_seed(*noise),
                penalty_scale=penalty_scale,
                **counts,
            )
        if model.training:
            if self.accelerator.sync_gradients and self.distiller.multiplier_estimate is not None:
                gate_rate = self.skill_config.resolve_gate_learning_rate(self.steps.joint)
                self.distiller.multiplier_estimate.add_gap(target_sparsity - outputs["sparsity"], gate_rate)
            terms, finite = outputs, self.finite_watch.note_terms(outputs)
            # The loss of a step is the sum over its micro-batches, whose weights add up to 1. Steps without a valid
            # frame are left out of the mean; they would count as zero loss.
            has_frames = (counts["num_frames"] > 0).float() if counts else 1.0
            if self.accelerator.mixed_precision == "fp16":  # the scaler skips steps that overflow
                terms = {name: torch.where(finite, value.detach(), 0.0) for name, value in outputs.items()}
                has_frames = has_frames * finite
            self._train_losses.add(terms, has_frames, weight=penalty_scale * has_frames)
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def _target_sparsity(self) -> float:
        target = self.skill_config.target_sparsity
        if self.stage != 1:
            return target
        return sparsity_at(self.state.global_step, target, self.steps.sparsity_warmup, self.start_sparsity)

    def _get_grad_norm(self, model, grad_norm=None):
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self.finite_watch.note_gradient(grad_norm)
        return grad_norm

    # ---- Evaluation ----

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with torch.no_grad():
            loss, outputs = self.compute_loss(model, self._prepare_inputs(inputs), return_outputs=True)
        self._eval_losses.add(outputs)
        return loss.detach(), None, None

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix: str = "eval", **kwargs):
        self._eval_losses = self.new_held_out_losses()
        # Its loader draws a number: training must not depend on whether anything was evaluated.
        with padding_ignored(*self.encoders), torch.random.fork_rng(devices=[]):
            output = super().evaluation_loop(
                dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs
            )
        means = self._eval_losses.means(self.accelerator)
        if self._eval_losses.any_batch and "distillation_loss" not in means:
            raise AudioError("None of the evaluation clips can be read; the warnings above say why.")
        if means:
            known = [name for name in self.evaluation_metrics if name in means]
            output.metrics.update({f"{metric_key_prefix}_{name}": means[name] for name in known})
            # The Trainer averages over batches, whatever they hold.
            output.metrics[f"{metric_key_prefix}_loss"] = self.total_loss(means)
        return output

    def new_held_out_losses(self) -> HeldOutLosses:
        units = dict.fromkeys(TRAINING_LOSSES, "num_frames")
        return HeldOutLosses(self.args.device, units if self.head_loss is None else units | self.head_loss.units)

    def total_loss(self, means: dict[str, float]) -> float:
        """The weighted sum of the means of an evaluation; labels count where there are any."""
        weights = {} if self.head_loss is None else self.head_loss.weights
        return means["distillation_loss"] + sum(
            weight * means[name] for name, weight in weights.items() if name in means
        )

    # ---- Logs ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self.is_in_train:
            self.finite_watch.check()
            self.unreadable_clips.check()
            logs = logs | self._train_losses.means(self.accelerator) | self._state_of_pruning()
            logs |= self.throughput.means()
            self._train_losses = self._new_train_losses()
        if getattr(self.args, "seconds_per_batch", None) is not None:
            logs.pop("train_samples_per_second", None)  # of batches, for the Trainer does not know how many clips
        super().log(logs, start_time)

    def _new_train_losses(self) -> LossSums:
        return LossSums(self.args.device, self.training_losses)

    def _state_of_pruning(self) -> dict[str, float]:
        lambda_1, lambda_2 = self.distiller.multipliers()
        return {
            "sparsity": self.distiller.sparsity().item(),
            "target_sparsity": self._target_sparsity(),
            "lambda_1": lambda_1,
            "lambda_2": lambda_2,
            "num_parameters": num_parameters(self.student),
            "stage": self.stage,
        }


def _lengths(batch: dict) -> torch.Tensor:
    """Valid samples of each clip."""
    if batch.get("attention_mask") is not None:
        return batch["attention_mask"].sum(-1)
    clips, samples = batch["input_values"].shape
    return torch.full((clips,), samples, device=batch["input_values"].device)
