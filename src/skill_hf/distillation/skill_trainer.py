"""`SkillDistillationTrainer`: calibrate, cluster, distil and prune, cut, distil again."""

import copy
import logging
import shutil
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, TrainerState, TrainingArguments
from transformers.trainer_utils import PredictionOutput, TrainOutput

from .. import storage
from ..compression.cut import fit_to_cost
from ..files import keep_sources, local_directory
from ..grouping.calibration import check_eval_clips
from ..grouping.clustering import layer_tree
from ..models.families import build_student
from ..models.loading import check_feature_extractor, plain_feature_extractor
from ..models.model_modes import MASKING, set_masking, trace_hidden_states
from ..models.properties import has_gates
from ..publishing.model_card import write_model_card
from ..publishing.run_record import RunRecord
from ..recipe.argument_validation import check_arguments, check_devices, check_trainer_arguments
from ..recipe.skill_config import SkillConfig
from ..recipe.skill_training_args import SkillTrainingArguments
from ..version import __version__
from .checkpoint_validation import TRAINER_STATE_NAME
from .checkpointing import (
    how_to_resume,
    resolve_resume,
    run_directory,
    where_it_is_safe,
    write_skill_state,
    written_whole,
)
from .distiller import SkillDistiller
from .divergence import refuse_non_finite
from .early_stopping import restore_patience, stopped_early, without_early_stopping
from .ensemble import TeacherEnsemble, load_teachers
from .interruption import Interruption
from .projection_start import fit_projections
from .publishing_trainer import PublishingTrainer
from .recipe_validation import check_recipe, check_student, validate_recipe, warn_of_slow_gates
from .restoring import restore
from .run_identity import checksum, describe_run
from .run_validation import check_data, check_run
from .shrinking import ShrinkCallback
from .state_norms import measure_states
from .student_measurements import StudentMeasurements
from .teacher import find_tokenizer
from .watching import ArchitectureCallback


logger = logging.getLogger(__name__)


class SkillDistillationTrainer(PublishingTrainer):
    r"""
    Compresses a self-supervised speech encoder with SKILL (arXiv 2402.16830), based on DPHuBERT (arXiv 2305.17651).

    `train()` runs a few hundred training clips through the teacher, clusters its layers by similarity, distils and
    prunes a copy of it jointly (stage 1), cuts the tensors, and distils again (stage 2). Steps and checkpoints are
    numbered across both stages: a run that was killed in either stage ends with the same weights after
    `train(resume_from_checkpoint=True)`. The loop of [`~transformers.Trainer`] is not changed. With `shrink_steps` in
    the recipe, stage 1 removes closed units during training (see [`ShrinkCallback`]).

    Args:
        teacher (`str` or `PreTrainedModel`, or a list of these):
            A speech encoder, maybe fine-tuned (see `task`): Hub id, local directory or loaded model. It is never part
            of a checkpoint. With several (Ensemble Knowledge Distillation, arXiv 2302.12757) the student starts as a
            copy of the first and learns from all, by `teacher_targets` of the recipe; they may be of any family, but
            of one sampling rate and frame rate.
        skill_config ([`SkillConfig`], *optional*):
            The recipe.
        args ([`~transformers.TrainingArguments`], *optional*):
            `max_steps` (or epochs) count both stages. [`SkillTrainingArguments`] has the published recipe's defaults.
        train_dataset, eval_dataset (*optional*):
            Rows with `audio` (a path, undecoded or decoded audio, at any rate) or with `input_values`.
        model (`PreTrainedModel`, *optional*):
            The initial student; by default an exact copy of the teacher. It may already be pruned.
        processing_class (*optional*):
            The feature extractor, or a processor with a feature extractor and a tokenizer; by default the first
            teacher's. A `Wav2Vec2FeatureExtractor` with the same fields is saved with the student, whatever its class.
        data_collator (*optional*):
            [`SpeechCollator`] by default, which crops the clips of a batch to one length in training and pads them in
            evaluation.
        task (`str`, *optional*):
            The head of the first teacher that the student keeps and learns: `ctc`, `classification` or
            `frame-classification`, or `encoder` for none. By default the head of a loaded model, and none of a
            directory or Hub id.
        kwargs:
            Other arguments of [`~transformers.Trainer`], except `model_init`, `optimizers`, `compute_metrics`,
            `compute_loss_func` and `preprocess_logits_for_metrics`.

    Attributes:
        teacher (`PreTrainedModel`): the frozen encoder, with the head that is kept; the first if there are several.
        teachers (`list[Teacher]`): each teacher with its name, size and feature extractor.
        layer_groups (`list[list[int]]`): hidden-state indices of each group (0 is the input of the first layer),
            available after clustering in `train()` or after resuming; those of the first teacher.
        layer_similarity (`numpy.ndarray` of shape `(N, N)`): the clustered similarity matrix; `None` if `layer_groups`
            was set by hand.
        other_calibrations (`list[Calibration]`): groups and similarity of each teacher but the first.
        model (`PreTrainedModel`): the student; pruned after `train()`.

    Raises:
        `ValueError`: if a teacher cannot be loaded, belongs to an unknown family, or lacks the head of `task` or its
            tokenizer, several teachers cannot be used together, the recipe does not fit (more clusters than layers,
            groups with a layer that does not exist, a sparsity that the gates cannot reach), or an argument is out of
            range or can't be honoured in both stages.

    Example:

    ```python
    >>> from skill_hf import SkillConfig, SkillDistillationTrainer, SkillTrainingArguments

    >>> trainer = SkillDistillationTrainer(
    ...     teacher="microsoft/wavlm-base-plus",
    ...     skill_config=SkillConfig(target_sparsity=0.75),
    ...     args=SkillTrainingArguments(output_dir="wavlm-base-plus-skill"),
    ...     train_dataset=train,
    ...     eval_dataset=dev,
    ... )
    >>> trainer.train()
    >>> trainer.save_model("wavlm-base-plus-skill")
    ```
    """

    def __init__(
        self,
        teacher: str | PreTrainedModel | list[str | PreTrainedModel],
        skill_config: SkillConfig | None = None,
        args: TrainingArguments | None = None,
        train_dataset=None,
        eval_dataset=None,
        model: PreTrainedModel | None = None,
        processing_class=None,
        data_collator: Callable | None = None,
        task: str | None = None,
        **kwargs,
    ):
        check_trainer_arguments(kwargs)
        skill_config = SkillConfig() if skill_config is None else skill_config
        check_recipe(skill_config)
        args = SkillTrainingArguments(output_dir="trainer_output") if args is None else args
        check_arguments(args)
        check_devices(args)
        teachers = load_teachers(teacher, task)
        student = build_student(teachers[0].model) if model is None else model
        check_student(student, teachers[0].model)
        tokenizer = find_tokenizer(teachers[0], processing_class)
        processing_class = teachers[0].feature_extractor() if processing_class is None else processing_class
        processing_class = getattr(processing_class, "feature_extractor", processing_class)  # of a processor
        check_feature_extractor(processing_class)
        validate_recipe(skill_config, teachers[0].model, student, processing_class.sampling_rate)
        ensemble = TeacherEnsemble(teachers, skill_config, processing_class)
        # LayerDrop and SpecAugment would shorten and mask the student's hidden states. What the student is later
        # fine-tuned with is the teacher's setting again.
        self._masking = {name: getattr(student.config, name) for name in MASKING}
        student.config.layerdrop = 0.0
        student.config.base_model = teachers[0].hub_id or student.config.base_model
        super().__init__(
            ensemble,
            student,
            skill_config,
            args,
            train_dataset,
            eval_dataset,
            processing_class,
            data_collator,
            tokenizer,
            **kwargs,
        )
        start = local_directory(getattr(model, "name_or_path", None))
        self.sources = {"teacher": teachers[0].directory, "model": start}
        self.sources |= {name: other.directory for name, other in ensemble.others.items()}
        self.start_checksum = None if model is None else checksum(student)
        self.learning_rates: tuple[float, float] | None = None  # peaks of the stages
        self.run: dict | None = None  # what `train()` tells it from other runs by
        self.layer_similarity: np.ndarray | None = None
        self.record = RunRecord(num_teachers=len(teachers))
        self.measurements = StudentMeasurements(self)
        self._checkpoint_parent: str | None = None
        self._border: str | None = None  # the last checkpoint that a stage, or what is left of it, went on from
        self.interruption = Interruption(self)
        self.add_callback(self.finite_watch)
        if skill_config.shrink_steps:
            self.shrinking = ShrinkCallback(self)
            self.add_callback(self.shrinking)
        if self.divides_parameters:
            self.check_optimizer("FSDP", "use data parallelism")
        self.add_callback(self.interruption)
        self.add_callback(ArchitectureCallback(self))

    # ---- Calibration ----

    def _total_steps(self) -> int:
        if self.args.max_steps > 0:
            return self.args.max_steps
        return self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]

    def resolve_recipe(self) -> None:
        """Sets steps and learning rates of the stages, as far as they are not set by hand."""
        self.steps = self.skill_config.resolve_steps(self._total_steps())
        shape = self.teacher.config
        self.learning_rates = self.skill_config.resolve_learning_rates(
            self.args.learning_rate, self.steps.total, shape.hidden_size, pre_norm=shape.do_stable_layer_norm
        )

    def _setup(self) -> None:
        """Calibrates and clusters, unless this is already done."""
        if self.layer_groups is not None:
            return
        if self.train_dataset is None:
            raise ValueError("There is no `train_dataset` to calibrate on; pass one.")
        check_eval_clips(self.eval_dataset, self.eval_data_collator, self.processing_class)
        calibration, *self.other_calibrations = self.ensemble.calibrate(
            self.calibration_dataset,
            self.skill_config,
            self.accelerator,
            seed=self.args.seed,
            progress=not self.args.disable_tqdm,
            reading=self.reading,
        )
        self.layer_groups, self.layer_similarity = calibration.groups, calibration.similarity
        self.record.half_groups, self.record.silhouettes = calibration.half_groups, calibration.silhouettes
        if self.skill_config.normalize_states:
            self.state_moments = measure_states(self)
        if not self.ensemble.is_averaged:
            self.projection_starts = fit_projections(self)

    def layer_tree(self) -> np.ndarray | None:
        """The clustering tree as scipy's linkage matrix, for a dendrogram; `None` if groups were set by hand."""
        return None if self.layer_similarity is None else layer_tree(self.layer_similarity, self.skill_config)

    # ---- The two stages ----

    def train(self, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None) -> TrainOutput:
        """
        Calibrates, clusters, distils and prunes, cuts, distils again.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                A checkpoint directory of either stage, `True` for the last complete one in `args.output_dir`, or
                `"auto"` for that one if there is one, and a new run otherwise.
            trial, ignore_keys_for_eval (*optional*):
                As in [`~transformers.Trainer.train`].

        Raises:
            `ValueError`: if `args.output_dir` contains another run or the teacher, if the checkpoint is incomplete or
                belongs to a different recipe or run, if machines do not share `args.output_dir`, or if `train()` has
                already finished. A [`NonFiniteError`] if the run diverges.
            [`~skill_hf.storage.StorageError`]: if another run uses `args.output_dir`, or the disk is full.
            `KeyboardInterrupt`, [`Terminated`]: after Ctrl-C or SIGTERM, once a checkpoint is written.
        """
        resume_from_checkpoint = resolve_resume(self, resume_from_checkpoint)
        if self.stage == 3:
            raise ValueError("This trainer has finished both stages; create a new one to train again.")
        if self.stage and not resume_from_checkpoint:
            raise ValueError(f"This trainer has already started. {how_to_resume(self.args.output_dir)}")
        check_data(self)
        self.resolve_recipe()
        check_run(self, resumed=bool(resume_from_checkpoint))
        self.run = describe_run(self)
        with self.interruption.listening(), run_directory(self, resume_from_checkpoint) as checkpoint:
            return self._train_stages(checkpoint, trial, ignore_keys_for_eval)

    def _train_stages(self, checkpoint: str | None, trial, ignore_keys_for_eval) -> TrainOutput:
        user_args = self.args
        self._begin() if checkpoint is None else restore(self, checkpoint)
        set_masking(self.student.config, self.skill_config.student_mask_prob)
        if user_args.torch_compile:
            trace_hidden_states(self.student)
        try:
            if self.stage == 1:
                output = self._train_stage(checkpoint, trial, ignore_keys_for_eval)
                if self.state.global_step < self.steps.joint:
                    logger.warning(
                        "Stopped at step %d of stage 1, before the cut: the student is not pruned. %s",
                        self.state.global_step,
                        how_to_resume(user_args.output_dir),
                    )
                    return output
                checkpoint = self._cut()
                self._set_border(checkpoint)
            self.args = user_args
            output = self._train_stage(checkpoint, trial, ignore_keys_for_eval)
            self.interruption.is_deferred = False  # no step follows that could end first
            if self.state.global_step >= self.steps.total or stopped_early(self.callback_handler.callbacks):
                self.stage = 3
                self.measurements.loss("end")
                for sentence in self.record.advice_on_student():
                    logger.warning(sentence)
        finally:
            self.args = user_args
            self.is_in_train = False
            self.student.config.update(self._masking)
            self.model = self.model_wrapped = self.callback_handler.model = self.student
        self._set_border(None)
        self.student.eval()
        self.measurements.distances()
        return output

    def _begin(self) -> None:
        """Prepares a new run before its first step."""
        warn_of_slow_gates(self.skill_config, self.steps.joint)
        self._setup()
        self.stage = 1 if self.steps.joint else 2
        with torch.random.fork_rng(devices=[]):  # in stage 1 another one follows, with gates
            self.distiller = self._make_distiller()
        self.measurements.loss("start")
        if self.stage == 1:
            self.add_gates(self.student)
            self.distiller = self._make_distiller()

    def add_gates(self, student: PreTrainedModel) -> None:
        student.base_model.add_gates(self.skill_config.pruning_units, self.skill_config.width_multiple)

    def _train_stage(self, checkpoint: str | None, trial, ignore_keys_for_eval) -> TrainOutput:
        """Runs the rest of the current stage."""
        output = self._train_loop(checkpoint, trial, ignore_keys_for_eval)
        while self.shrinking is not None and self.shrinking.ended:
            checkpoint, is_last = self.shrinking.shrink_whole()
            self._set_border(checkpoint)
            if is_last:
                break
            self.args.ignore_data_skip = self.args.eval_on_start = False  # of what is left of this stage
            output = self._train_loop(checkpoint, trial, ignore_keys_for_eval)
        self.interruption.raise_if_requested()
        return output

    def _train_loop(self, checkpoint: str | None, trial, ignore_keys_for_eval) -> TrainOutput:
        """The Trainer's own loop, to the end of the stage or to where FSDP's parameters must be whole."""
        args = copy.copy(self.args)
        args.learning_rate = self.learning_rates[self.stage - 1]
        self._train_losses = self._new_train_losses()
        self.unreadable_clips.reset()
        if self.stage == 1:
            args.max_steps = self.steps.joint
            args.load_best_model_at_end = False  # the best of the first stage is the one that is pruned the least
        else:
            args.max_steps = self.steps.total
            args.warmup_steps = self.steps.final_warmup
        self.args = args
        self.model = self.model_wrapped = self.callback_handler.model = self.distiller
        self.optimizer = self.lr_scheduler = None
        self.finite_watch.reset()
        restore_patience(self.callback_handler.callbacks, None)
        if checkpoint is not None:
            state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
            restore_patience(self.callback_handler.callbacks, state)
            if state.global_step >= args.max_steps or stopped_early(self.callback_handler.callbacks):
                self._load_from_checkpoint(checkpoint)
                self._load_rng_state(checkpoint)
                self.state = state
                if args.load_best_model_at_end and state.best_model_checkpoint is not None:
                    self._load_best_model()
                return TrainOutput(self.state.global_step, 0.0, {})
        self.divide()
        output = super().train(checkpoint, trial, ignore_keys_for_eval)
        self.reunite()
        self.finite_watch.check()
        return output

    def _set_border(self, checkpoint: str | None) -> None:
        """Notes what the run goes on from; the one before is removed if the user wants no checkpoints."""
        if self._border is not None and self.args.save_strategy == "no" and self.args.should_save:
            shutil.rmtree(self._border, ignore_errors=True)
        self._border = checkpoint

    @property
    def target_cost(self) -> int:
        """The cost that the cut is to leave."""
        return round((1 - self.skill_config.target_sparsity) * self.teacher_cost)

    def _cut(self) -> str:
        """Prunes the student and writes the checkpoint that stage 2 starts from; returns its directory."""
        self.measurements.loss("before_cut")
        encoder = self.student.base_model
        self.record.cut = fit_to_cost(encoder, self.target_cost, self.distiller.costs, self.teacher_cost)
        encoder.prune()
        self.distiller = self._make_distiller(previous=self.distiller)
        self.stage = 2
        self.measurements.loss("after_cut")
        for sentence in self.record.advice_on_cut():
            logger.warning(sentence)
        self.model = self.model_wrapped = self.distiller
        self.optimizer = None  # stage 2 starts with another
        self.state.best_metric = self.state.best_model_checkpoint = self.state.best_global_step = None

        # Stage 2 always starts from a checkpoint, so that a run that is killed and resumed does the same as this one.
        name = f"checkpoint-{self.steps.joint}"
        with written_whole(self, name) as unfinished:
            self.save_model(str(unfinished), _internal_call=True)
            self._save_rng_state(str(unfinished))
            self._save_scaler(str(unfinished))
            if self.args.should_save:
                self.state.save_to_json(str(unfinished / TRAINER_STATE_NAME))
        self.interruption.raise_if_requested()
        return str(Path(self.args.output_dir) / name)

    # ---- Evaluation ----

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """
        Held-out distillation loss over the groups: `eval_distillation_loss` and its terms, means over all valid
        frames, and the losses of a head. `eval_loss` is their weighted sum. If called before `train()`, it first
        clusters the teacher's layers.
        """
        with nullcontext() if self.is_in_train else self._distiller_as_model():
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def predict(self, test_dataset, ignore_keys=None, metric_key_prefix: str = "test") -> PredictionOutput:
        """
        The `metrics` of [`~SkillDistillationTrainer.evaluate`] for `test_dataset`; `predictions` and `label_ids` are
        `None`, since a student predicts hidden states.
        """
        with nullcontext() if self.is_in_train else self._distiller_as_model():
            return super().predict(test_dataset, ignore_keys, metric_key_prefix)

    @contextmanager
    def _distiller_as_model(self):
        if self.distiller is None:
            self._setup()
            if self.steps is None:
                self.resolve_recipe()
            with torch.random.fork_rng(devices=[]):  # training must not depend on it
                self.distiller = self._make_distiller()
        wrapped = self.model_wrapped
        self.model = self.model_wrapped = self.distiller
        try:
            yield
        finally:
            self.model, self.model_wrapped = self.student, wrapped

    def _evaluate(self, *args, **kwargs) -> dict[str, float]:
        with without_early_stopping(self.callback_handler) if self.stage == 1 else nullcontext():
            return super()._evaluate(*args, **kwargs)

    # ---- Checkpoints ----

    def _skill_state(self) -> dict:
        """The content of skill_state.json."""
        return {
            "version": __version__,
            "stage": self.stage,
            "steps": {"joint": self.steps.joint, "final": self.steps.final},
            "teacher": self.teachers[0].identity(),
            "layer_groups": self.layer_groups,
            "layer_similarity": None if self.layer_similarity is None else self.layer_similarity.tolist(),
            "record": self.record.to_dict(),
            "run": self.run,
            **self.ensemble.state_of_others(self.other_calibrations),
        }

    def _save_checkpoint(self, model, trial) -> None:
        if self.shrinking is not None and self.shrinking.is_due:
            return  # written once the student has shrunk
        self.finite_watch.check()
        name = f"checkpoint-{self.state.global_step}"
        with written_whole(self, name) as unfinished:
            self._checkpoint_parent = str(unfinished.parent)
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._checkpoint_parent = None
            if self.state.best_model_checkpoint == str(unfinished):
                self.state.best_model_checkpoint = str(Path(self.args.output_dir) / name)
                if self.args.should_save:
                    self.state.save_to_json(str(unfinished / TRAINER_STATE_NAME))

    def _get_output_dir(self, trial) -> str:
        return self._checkpoint_parent or super()._get_output_dir(trial)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        output_dir = self.args.output_dir if output_dir is None else output_dir
        if isinstance(self.model, SkillDistiller):
            given, self.processing_class = self.processing_class, plain_feature_extractor(self.processing_class)
            try:
                super()._save(output_dir, state_dict)
            finally:
                self.processing_class = given
            if self.args.should_save:
                self.student.config.to_json_file(str(Path(output_dir) / "config.json"))
                if self.tokenizer is not None:
                    self.save_processor(output_dir)
                self.skill_config.save_pretrained(output_dir)
                write_skill_state(output_dir, self._skill_state())
        elif has_gates(self.student):
            raise ValueError("The student still has its gates: finish `train()` (or resume it) before saving.")
        elif self.args.should_save:
            keep_sources(output_dir, self.sources)
            refuse_non_finite(self.student)
            with storage.saving("The student", output_dir, where_it_is_safe(self.args.output_dir)) as unfinished:
                self.save_student(str(unfinished))
            with storage.explained("The model card", output_dir, "The student itself is saved there."):
                write_model_card(output_dir, self.report())
