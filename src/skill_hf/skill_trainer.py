"""`SkillDistillationTrainer`: calibrate, cluster, distil and prune, cut, distil once more."""

import copy
import logging
import os
import shutil
import zlib
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from huggingface_hub import CommitInfo
from torch import nn
from torch.utils.data import IterableDataset
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerState,
    TrainingArguments,
    Wav2Vec2FeatureExtractor,
)
from transformers.trainer_callback import ExportableState
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import PredictionOutput, TrainOutput

from . import pruning, publishing, storage
from .analysis import layer_distances
from .argument_validation import check_arguments, check_trainer_arguments
from .budgets import make_budget
from .checkpointing import (
    SKILL_STATE_NAME,
    TRAINER_STATE_NAME,
    how_to_resume,
    read_json,
    read_student_config,
    run_directory,
    where_it_is_safe,
    write_skill_state,
    written_whole,
)
from .clustering import cluster_layers, layer_tree, silhouettes
from .data import (
    MAX_BAD_SHARE,
    AudioError,
    SpeechCollator,
    calibration_waveforms,
    check_clips,
    disable_audio_decoding,
    sample_rows,
    samples_per_frame,
)
from .distillation import SkillDistiller, target_means
from .divergence import FiniteWatch, refuse_non_finite
from .early_stopping import restore_patience, stopped_early, without_early_stopping
from .families import STUDENT_CLASSES, build_student, fast_teacher, load_teacher
from .files import keep_sources
from .gates import has_gates, noise_seed
from .interruption import Interruption
from .loading import check_encoder, check_feature_extractor, load_feature_extractor, plain_feature_extractor
from .losses import DISTILLATION_LOSSES, TRAINING_LOSSES, sparsity_at, term_weights
from .model_card import hub_id_of, write_model_card
from .recipe_validation import validate_recipe, warn_of_slow_gates
from .run_identity import checksum, describe_run
from .run_record import RunRecord
from .run_validation import check_data, check_run
from .shrinking import ShrinkCallback
from .similarity import layer_similarity
from .skill_config import SkillConfig, StageSteps
from .skill_training_args import SkillTrainingArguments


logger = logging.getLogger(__name__)

# Held-out clips that are tried before training.
EVAL_CLIPS_TRIED = 32

# A cut whose cost is off by more than this share of the teacher's has its gates shifted to the target first.
COST_TOLERANCE = 0.005
# Clips that the student is measured on before and after the cut and at the end.
REPORT_CLIPS = 32
# Clips of training after which the share of those that cannot be read is judged.
CLIPS_JUDGED = 256


class SkillDistillationTrainer(Trainer):
    r"""
    Compresses a self-supervised speech encoder by SKILL (arXiv 2402.16830) on top of DPHuBERT (arXiv 2305.17651).

    One `train()` runs a few hundred training clips through the teacher, clusters its layers by similarity, distils and
    prunes a copy of it at once (stage 1), cuts the tensors, and distils once more (stage 2). Steps count on through
    both stages, and so do checkpoints: a run that was killed in either ends with the same weights after
    `train(resume_from_checkpoint=True)`. The loop of [`~transformers.Trainer`] is left as it is. With `shrink_steps`
    in the recipe, stage 1 cuts on its way what is closed for good (see [`~skill_hf.shrinking.ShrinkCallback`]).

    Args:
        teacher (`str` or `PreTrainedModel`):
            Hub id, local directory or loaded model of a speech encoder. Never part of a checkpoint.
        skill_config ([`SkillConfig`], *optional*):
            The recipe.
        args ([`~transformers.TrainingArguments`], *optional*):
            `max_steps` (or epochs) are those of both stages. [`SkillTrainingArguments`] has the published recipe's
            defaults.
        train_dataset, eval_dataset (*optional*):
            Rows with `audio` (a path, undecoded or decoded audio; any rate) or with `input_values`.
        model (`PreTrainedModel`, *optional*):
            A student to start from; an exact copy of the teacher by default. May be pruned already.
        processing_class (*optional*):
            The feature extractor; the teacher's own by default. With the student a `Wav2Vec2FeatureExtractor` of the
            same fields is saved, whatever the class.
        data_collator (*optional*):
            [`~skill_hf.data.SpeechCollator`] by default: crops the clips of a batch to one length in training, pads
            them in evaluation.
        kwargs:
            Anything else that [`~transformers.Trainer`] takes, but `model_init`, `optimizers`, `compute_metrics`,
            `compute_loss_func` and `preprocess_logits_for_metrics`.

    Attributes:
        layer_groups (`list[list[int]]`): hidden-state indices of each group (0 is the input of the first layer), once
            `train()` has clustered or a checkpoint was resumed.
        layer_similarity (`numpy.ndarray` of shape `(N, N)`): what was clustered; `None` with `layer_groups` set
            by hand.
        model (`PreTrainedModel`): the student; pruned after `train()`.

    Raises:
        `ValueError`: if the teacher cannot be loaded or is of an unknown family, or the recipe does not fit it (more
            clusters than layers, groups that name a layer it does not have, a sparsity that its gates cannot reach),
            or an argument is out of its range or can't be honoured in both stages.

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

    # `compute_loss` divides by the frames of the whole accumulated batch.
    loss_is_scaled_for_ga = True

    # What evaluation gives, by any of which `metric_for_best_model` may choose; a subclass that gives more adds them.
    evaluation_metrics = ("loss", *DISTILLATION_LOSSES)

    def __init__(
        self,
        teacher: str | PreTrainedModel,
        skill_config: SkillConfig | None = None,
        args: TrainingArguments | None = None,
        train_dataset=None,
        eval_dataset=None,
        model: PreTrainedModel | None = None,
        processing_class=None,
        data_collator: Callable | None = None,
        **kwargs,
    ):
        check_trainer_arguments(kwargs)
        self.skill_config = SkillConfig() if skill_config is None else skill_config
        if not isinstance(self.skill_config, SkillConfig):
            raise ValueError(f"`skill_config` must be a SkillConfig, but is a {type(skill_config).__name__}.")
        self.skill_config.validate()  # its fields may have been changed since it was made
        args = SkillTrainingArguments(output_dir="trainer_output") if args is None else args
        check_arguments(args)
        if args.n_gpu > 1:
            raise ValueError(
                f"One process cannot train on {args.n_gpu} devices; start it with `accelerate launch`, or name one"
                " device in CUDA_VISIBLE_DEVICES."
            )
        if args.enable_jit_checkpoint:
            raise ValueError("`enable_jit_checkpoint` must be False: SIGTERM writes a checkpoint without it.")
        if isinstance(train_dataset, IterableDataset) and args.accelerator_config.dispatch_batches is None:
            # One process that reads for all would have to join crops of different lengths.
            args.accelerator_config.dispatch_batches = False
        self.teacher_name = _name_of(teacher)
        self.sources = _directories({"teacher": self.teacher_name, "model": getattr(model, "name_or_path", None)})
        self.teacher = load_teacher(teacher)
        self.num_teacher_parameters = sum(parameter.numel() for parameter in self.teacher.parameters())
        student = build_student(self.teacher) if model is None else model
        student_class = STUDENT_CLASSES[self.teacher.config.model_type]
        if not isinstance(student, student_class) or has_gates(student):
            raise ValueError(
                f"`model` must be a {student_class.__name__} without gates, but is a {type(student).__name__}"
                f"{' with gates' if isinstance(student, student_class) else ''}."
            )
        check_encoder(student, "`model`")
        processing_class = self._load_feature_extractor() if processing_class is None else processing_class
        check_feature_extractor(processing_class)
        sampling_rate = processing_class.sampling_rate
        validate_recipe(self.skill_config, self.teacher, student, sampling_rate)
        self.budget = make_budget(self.skill_config, sampling_rate)
        self.teacher_cost = self.budget.total(self.teacher)
        # LayerDrop and SpecAugment would shorten and mask the student's hidden states. What the student is later
        # fine-tuned with is the teacher's setting again.
        self._apply_spec_augment = student.config.apply_spec_augment
        student.config.layerdrop = 0.0
        student.config.base_model = hub_id_of(self.teacher_name) or student.config.base_model

        min_samples = samples_per_frame(student.config)
        if data_collator is None:
            shared = {"min_samples": min_samples, "seed": args.seed}
            data_collator = SpeechCollator(processing_class, **shared)
            self.eval_data_collator = SpeechCollator(processing_class, crop="none", **shared)
        else:
            self.eval_data_collator = data_collator
        super().__init__(
            model=student,
            args=args,
            data_collator=data_collator,
            train_dataset=disable_audio_decoding(train_dataset),
            eval_dataset=(
                {name: disable_audio_decoding(dataset) for name, dataset in eval_dataset.items()}
                if isinstance(eval_dataset, dict)
                else disable_audio_decoding(eval_dataset)
            ),
            processing_class=processing_class,
            **kwargs,
        )
        self.can_return_loss = True  # evaluation has a loss though the rows have no labels
        self.model_accepts_loss_kwargs = True
        self.label_names = []
        self._signature_columns = ["audio", "input_values", "attention_mask", self.args.length_column_name]
        self.teacher.to(self.args.device)
        self._fast_teacher = fast_teacher(self.teacher)

        self.student = student
        self.distiller: SkillDistiller | None = None
        self.stage = 0  # 0: not begun, 1: distil and prune, 2: distil after the cut, 3: done
        self.steps: StageSteps | None = None
        self.run: dict | None = None  # what `train()` tells it from other runs by
        self._checkpoint_parent: str | None = None
        self.layer_groups: list[list[int]] | None = None
        self.layer_similarity: np.ndarray | None = None
        self.record = RunRecord()
        self._micro_batch = 0
        self._length_order: torch.Generator | None = None
        self._train_sums: dict[str, torch.Tensor] = {}
        self._eval_sums: dict[str, torch.Tensor] = {}
        self.start_checksum = None if model is None else checksum(student)
        self.finite_watch = FiniteWatch(self)
        self.interruption = Interruption(self)
        self.add_callback(self.finite_watch)
        if self.skill_config.shrink_steps:
            self.add_callback(ShrinkCallback(self))
        self.add_callback(self.interruption)

    # ---- Checks and set-up ----

    def _load_feature_extractor(self) -> Wav2Vec2FeatureExtractor:
        extractor = load_feature_extractor(self.teacher_name, "Teacher") if self.teacher_name else None
        if extractor is not None:
            return extractor
        normalise = self.teacher.config.feat_extract_norm == "layer"
        logger.warning(
            "The teacher comes without preprocessor_config.json; audio is %s. Pass `processing_class` if that is"
            " wrong.",
            "normalised, as usual for layer-norm models"
            if normalise
            else "not normalised, as usual for group-norm models",
        )
        return Wav2Vec2FeatureExtractor(do_normalize=normalise, return_attention_mask=True)

    def _total_steps(self) -> int:
        if self.args.max_steps > 0:
            return self.args.max_steps
        return self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]

    @property
    def _reading(self) -> dict:
        """How clips are read."""
        return {
            "feature_extractor": self.processing_class,
            "min_samples": samples_per_frame(self.student.config),
            "protocols": getattr(self.data_collator, "protocols", ()),
        }

    def _setup(self) -> None:
        """Calibrates and clusters, unless that is done."""
        if self.layer_groups is not None:
            return
        if self.train_dataset is None:
            raise ValueError("There is no `train_dataset` to calibrate on.")
        config = self.skill_config
        self._check_eval_clips()
        waveforms = calibration_waveforms(
            self.train_dataset,
            config.calibration_samples,
            config.calibration_seconds,
            seed=self.args.seed,
            **self._reading,
        )
        if config.layer_groups is not None:
            for _ in waveforms:  # nothing to measure, but audio that cannot be read should show now
                pass
            self.layer_groups = config.layer_groups
            return
        # One process decides, since clusters could hang on the last digit of a similarity.
        shared = [None]
        if self.accelerator.is_main_process:
            shared = [
                layer_similarity(
                    self._fast_teacher,
                    waveforms,
                    similarity=config.similarity,
                    include_embeddings=config.include_embeddings,
                    seed=self.args.seed,
                    **{f"{name}_weight": weight for name, weight in term_weights(config).items()},
                    progress=not self.args.disable_tqdm,
                    num_parts=2,
                )
            ]
        if self.accelerator.num_processes > 1:
            broadcast_object_list(shared)
        self.layer_similarity, *halves = shared[0]
        first = 0 if config.include_embeddings else 1
        self.layer_groups, *self.record.half_groups = [
            [[row + first for row in group] for group in cluster_layers(similarity, config)]
            for similarity in (self.layer_similarity, *halves)
        ]
        self.record.silhouettes = silhouettes(self.layer_similarity, config)
        config.validate_projection_groups(len(self.layer_groups))
        scores = ", ".join(f"{count}: {score:.3f}" for count, score in self.record.silhouettes.items())
        logger.info("Groups of hidden states: %s; silhouette by number of groups: %s", self.layer_groups, scores)
        if any(groups != self.layer_groups for groups in self.record.half_groups):
            logger.warning(
                "The groups depend on the audio: all of the calibration set gives %s, its halves %s. Raise"
                " `calibration_samples`, or set `num_clusters` or `layer_groups`.",
                self.layer_groups,
                " and ".join(map(str, self.record.half_groups)),
            )

    def _check_eval_clips(self) -> None:
        """An evaluation set that cannot be read should show now, not at the first evaluation."""
        collator = self.eval_data_collator
        if not isinstance(collator, SpeechCollator) or self.eval_dataset is None:
            return
        sets = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        for dataset in sets:
            check_clips(
                dataset,
                EVAL_CLIPS_TRIED,
                self.processing_class,
                min_samples=collator.min_samples,
                protocols=collator.protocols,
            )

    def layer_tree(self) -> np.ndarray | None:
        """The tree of the clustering as scipy's linkage matrix, for a dendrogram; `None` with groups set by hand."""
        return None if self.layer_similarity is None else layer_tree(self.layer_similarity, self.skill_config)

    def _make_distiller(self, projections: nn.ModuleList | None = None) -> SkillDistiller:
        config = self.skill_config
        return SkillDistiller(
            self.student,
            self.layer_groups,
            self.budget.unit_costs(self.student),
            self.teacher_cost,
            term_weights(config),
            projection_groups=config.projection_groups,
            student_layers=config.student_layers,
            projections=projections,
        ).to(self.args.device)

    # ---- The two stages ----

    def train(self, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None) -> TrainOutput:
        """
        Calibrates, clusters, distils and prunes, cuts, distils once more.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                A checkpoint directory of either stage, or `True` for the last complete one in `args.output_dir`.
            trial, ignore_keys_for_eval (*optional*):
                As in [`~transformers.Trainer.train`].

        Raises:
            `ValueError`: if `args.output_dir` holds another run, or the teacher; if the checkpoint is not whole, or of
                another recipe or run; if `train()` was finished. A [`~skill_hf.divergence.NonFiniteError`] if the run
                diverges.
            [`~skill_hf.storage.StorageError`]: if another run uses `args.output_dir`, or the disk is full.
            `KeyboardInterrupt`, [`~skill_hf.interruption.Terminated`]: after Ctrl-C or SIGTERM, once a checkpoint is
                written.
        """
        if self.stage == 3:
            raise ValueError("This trainer has finished both stages; make a new one to train again.")
        if self.stage and not resume_from_checkpoint:
            raise ValueError(f"This trainer has begun already. {how_to_resume(self.args.output_dir)}")
        check_data(self)
        self.steps = self.skill_config.resolve_steps(self._total_steps())
        check_run(self, resumed=bool(resume_from_checkpoint))
        self.run = describe_run(self)
        with self.interruption.listening(), run_directory(self, resume_from_checkpoint) as checkpoint:
            return self._train_stages(checkpoint, trial, ignore_keys_for_eval)

    def _train_stages(self, checkpoint: str | None, trial, ignore_keys_for_eval) -> TrainOutput:
        user_args = self.args
        if checkpoint is not None:
            self._restore(checkpoint)
        else:
            warn_of_slow_gates(self.skill_config, self.steps.joint)
            self._setup()
            self.stage = 1 if self.steps.joint else 2
            with torch.random.fork_rng(devices=[]):  # in stage 1 another one follows, with gates
                self.distiller = self._make_distiller()
            self._measure("start")
            if self.stage == 1:
                self.student.add_gates(self.skill_config.pruning_units, self.skill_config.width_multiple)
                self.distiller = self._make_distiller()
        self.student.config.apply_spec_augment = False
        if user_args.torch_compile:
            # transformers hooks the layers in the first forward that asks for hidden states, for which a compiler
            # would leave its graph and begin anew.
            clip = torch.zeros(1, samples_per_frame(self.student.config), device=self.student.device)
            with torch.no_grad():
                self.student.eval()(clip.to(self.student.dtype), output_hidden_states=True)
        boundary = None
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
                checkpoint = boundary = self._cut()
            self.args = user_args
            output = self._train_stage(checkpoint, trial, ignore_keys_for_eval)
            self.interruption.is_deferred = False  # no step follows that could end first
            if self.state.global_step >= self.steps.total or stopped_early(self.callback_handler.callbacks):
                self.stage = 3
                self._measure("end")
                for sentence in self.record.advice_on_student():
                    logger.warning(sentence)
        finally:
            self.args = user_args
            self.is_in_train = False
            self.student.config.apply_spec_augment = self._apply_spec_augment
            self.model = self.model_wrapped = self.callback_handler.model = self.student
        if boundary is not None and user_args.save_strategy == "no" and user_args.should_save:
            shutil.rmtree(boundary, ignore_errors=True)
        self.student.eval()
        self._measure_distances()
        return output

    def _train_stage(self, checkpoint: str | None, trial, ignore_keys_for_eval) -> TrainOutput:
        """Runs the rest of the present stage with the Trainer's own loop."""
        args = copy.copy(self.args)
        self._train_sums = {}
        self._counted = torch.tensor([self.state.global_step, getattr(self.data_collator, "num_skipped", 0)])
        if self.stage == 1:
            args.max_steps = self.steps.joint
            args.load_best_model_at_end = False  # the best of the first stage is the one that is pruned the least
        else:
            args.max_steps = self.steps.total
            args.learning_rate = self.skill_config.final_learning_rate
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
        output = super().train(checkpoint, trial, ignore_keys_for_eval)
        self.finite_watch.check()
        self.interruption.raise_if_requested()
        return output

    @property
    def wanted_cost(self) -> int:
        """What the cut shall leave of the teacher's cost."""
        return round((1 - self.skill_config.target_sparsity) * self.teacher_cost)

    def _cut(self) -> str:
        """Prunes the student and writes the checkpoint that stage 2 starts from; returns its directory."""
        costs, wanted = self.distiller.costs, self.wanted_cost
        left, shift = pruning.cost_after_pruning(self.student, costs), 0.0
        self._measure("before_cut")
        if abs(left - wanted) > COST_TOLERANCE * self.teacher_cost:
            shift = pruning.fit_gates(self.student, wanted, costs)
            logger.warning(
                "At the end of stage 1 the gates leave %s %s, the target is %s; a shift of all log_alpha by %.3f"
                " chooses the units to cut. With more steps, or a %s `gate_learning_rate`, stage 1 gets closer by"
                " itself.",
                f"{left:,}",
                costs.quantity,
                f"{wanted:,}",
                shift,
                "larger" if left > wanted else "smaller",
            )
        self.record.cut = {"left": left, "wanted": wanted, "shift": shift}
        self.student.prune()
        self.distiller = self._make_distiller(projections=self.distiller.projections)
        self.stage = 2
        self._measure("after_cut")
        for sentence in self.record.advice_on_cut():
            logger.warning(sentence)
        self.model = self.model_wrapped = self.distiller
        self.state.best_metric = self.state.best_model_checkpoint = self.state.best_global_step = None

        # Stage 2 always starts from a checkpoint, so a run that is killed and resumed takes no other way than this
        # one.
        name = f"checkpoint-{self.steps.joint}"
        with written_whole(self, name) as unfinished:
            self.save_model(str(unfinished), _internal_call=True)
            self._save_rng_state(str(unfinished))
            self._save_scaler(str(unfinished))
            if self.args.should_save:
                self.state.save_to_json(str(unfinished / TRAINER_STATE_NAME))
        self.interruption.raise_if_requested()
        return str(Path(self.args.output_dir) / name)

    # ---- Checkpoints ----

    def _skill_state(self) -> dict:
        return {
            "stage": self.stage,
            "steps": {"joint": self.steps.joint, "final": self.steps.final},
            "teacher": {
                "model_type": self.teacher.config.model_type,
                "num_parameters": self.num_teacher_parameters,
                # Tells checkpoints of one size apart, such as WavLM Base from Base+.
                "checksum": zlib.crc32(self.teacher.feature_projection.projection.weight.cpu().numpy().tobytes()),
            },
            "layer_groups": self.layer_groups,
            "layer_similarity": None if self.layer_similarity is None else self.layer_similarity.tolist(),
            "record": self.record.to_dict(),
            "run": self.run,
        }

    def _save_checkpoint(self, model, trial) -> None:
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

    def blank_distiller(self, checkpoint: Path, state: dict) -> SkillDistiller:
        """What the weights of `checkpoint`, with `state` as its skill_state.json, belong to: shapes alone."""
        config = read_student_config(checkpoint, self.student.config)
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            student = type(self.student)(config).to("meta")  # a tensor of an old constructor is elsewhere
            if state["stage"] == 1:
                student.add_gates(self.skill_config.pruning_units, self.skill_config.width_multiple)
            groups, sharing = state["layer_groups"], self.skill_config.projection_groups
            weights = term_weights(self.skill_config)
            return SkillDistiller(student, groups, None, self.teacher_cost, weights, projection_groups=sharing)

    def _restore(self, checkpoint: str) -> None:
        """Groups, stage and shapes of a checkpoint; the weights are loaded by the Trainer."""
        state = read_json(Path(checkpoint) / SKILL_STATE_NAME)
        self.layer_groups = state["layer_groups"]
        self.layer_similarity = None if state["layer_similarity"] is None else np.array(state["layer_similarity"])
        self.record = RunRecord.from_dict(state.get("record", {}))
        self.stage = state["stage"]
        config = read_student_config(Path(checkpoint), self.student.config)
        config._attn_implementation = self.student.config._attn_implementation
        trainable = {name: parameter.requires_grad for name, parameter in self.student.named_parameters()}
        with torch.random.fork_rng(devices=[]):
            self.student = type(self.student)(config)
            pruning.set_trainable(self.student, trainable)
            if self.stage == 1:
                self.student.add_gates(self.skill_config.pruning_units, self.skill_config.width_multiple)
            self.distiller = self._make_distiller()

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        output_dir = self.args.output_dir if output_dir is None else output_dir
        if isinstance(self.model, SkillDistiller):
            own, self.processing_class = self.processing_class, plain_feature_extractor(self.processing_class)
            try:
                super()._save(output_dir, state_dict)
            finally:
                self.processing_class = own
            if self.args.should_save:
                self.student.config.to_json_file(str(Path(output_dir) / "config.json"))
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
                write_model_card(output_dir, self)

    def save_student(self, output_dir: str) -> None:
        """Saves model, feature extractor and recipe, without a card."""
        self.student.save_pretrained(output_dir)
        plain_feature_extractor(self.processing_class).save_pretrained(output_dir)
        self.skill_config.save_pretrained(output_dir)

    # ---- The Hub ----

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """As in [`~transformers.Trainer.init_hf_repo`]; a failure is an `OSError` of one line."""
        with publishing.explain_refusal(self.args.hub_model_id or Path(self.args.output_dir).absolute().name):
            super().init_hf_repo(token, private)

    def push_to_hub(
        self,
        commit_message: str = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs,
    ) -> CommitInfo | Future | None:
        """
        Saves the student to `args.output_dir` and uploads it to `args.hub_model_id`, in one commit: what
        [`~Trainer.save_model`] writes, the figures and all_results.json if they are there. Checkpoints and whatever
        else lies in `args.output_dir` stay where they are.

        Args:
            commit_message, blocking, token, private, kwargs (*optional*):
                As in [`~transformers.Trainer.push_to_hub`].
            revision (`str`, *optional*):
                The branch to push to, made if it does not exist; by default `args.hub_revision`, or else `main`.

        Returns:
            `CommitInfo` with `blocking`, otherwise a `Future` of it; `None` on all processes but the first.

        Raises:
            `ValueError`: if the student is being trained or still has its gates.
            `OSError`: if the Hub cannot be reached or refuses; the student has been saved by then.
        """
        if isinstance(self.model, SkillDistiller) or has_gates(self.student):
            raise ValueError("The student is not finished: let `train()` end (or resume it) before publishing it.")
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        return publishing.push_trained(
            self,
            commit_message=commit_message,
            blocking=blocking,
            token=token,
            revision=revision,
            private=private,
            card_metadata=kwargs,
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """A checkpoint holds gates and projections and is nothing to publish; `push_to_hub` publishes the student."""

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """
        Writes the model card, `README.md`, into `args.output_dir`.

        Args:
            language, license, tags, finetuned_from, dataset_tags (*optional*):
                As in [`~transformers.Trainer.create_model_card`], for the card's metadata; `tags` are added.
            model_name, tasks, dataset, dataset_args (*optional*):
                Of no effect: the text of the card comes from the run.
        """
        if not self.is_world_process_zero():
            return
        write_model_card(self.args.output_dir, self)
        given = {"language": language, "license": license, "base_model": finetuned_from, "datasets": dataset_tags}
        publishing.edit_metadata(self.args.output_dir, given, tags)

    # ---- What the end of a run reports ----

    @cached_property
    def _report_rows(self) -> list:
        """Rows of some clips that the student is measured on: held out, if there are any, else of the training set."""
        heldout = self.eval_dataset
        heldout = next(iter(heldout.values()), None) if isinstance(heldout, dict) else heldout
        source = self.train_dataset if heldout is None else heldout
        rows = sample_rows(source, REPORT_CLIPS, self.args.seed)
        self.record.measured_on = f"{len(rows)} {'training' if heldout is None else 'held-out'} clips"
        return rows

    @torch.no_grad()
    def _measure(self, moment: str) -> None:
        """Records the loss of the student as it stands, in eval mode; on the first process alone."""
        if not self.is_world_process_zero() or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return
        sums, size = {}, self.args.per_device_eval_batch_size
        self.distiller.eval()
        for start in range(0, len(self._report_rows), size):
            batch = self._prepare_inputs(self.eval_data_collator(self._report_rows[start : start + size]))
            with self._clips_alone(), self.accelerator.autocast():
                _, outputs = self.compute_loss(self.distiller, batch, return_outputs=True)
            self._add_to(sums, outputs, outputs["num_frames"], weight=outputs["num_frames"])
        if not sums.get("weight"):  # not one of the clips can be read
            return
        self.record.losses[moment] = {
            "distillation_loss": (sums["distillation_loss"] / sums["weight"]).item(),
            "cosine_similarity": -(sums["cosine_loss"] / sums["weight"]).item(),
        }

    def _measure_distances(self) -> None:
        """Records how far the student is from the teacher at every layer; on the first process alone."""
        if not self.is_world_process_zero() or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return
        rows, seconds = self._report_rows, self.skill_config.calibration_seconds
        clips = calibration_waveforms(rows, len(rows), seconds, self.args.seed, **self._reading)
        try:
            distances = layer_distances(self.teacher, self.student, clips, progress=not self.args.disable_tqdm)
        except ValueError as error:  # hidden states that do not vary have no distance
            logger.warning("Distances between student and teacher were not measured: %s", error)
            return
        self.record.layer_distances = {measure: values.tolist() for measure, values in distances.items()}

    # ---- What the Trainer's loop calls ----

    def _init_training_state(self, max_steps, num_update_steps_per_epoch, *args, **kwargs) -> tuple[int, int]:
        position = super()._init_training_state(max_steps, num_update_steps_per_epoch, *args, **kwargs)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ExportableState):  # one that the checkpoint's run did not have
                self.state.stateful_callbacks.setdefault(type(callback).__name__, callback.state())
        if self.stage != 2:
            return position
        # Steps count on through both stages, but each reads the data from its beginning: a stream could otherwise
        # start stage 2 only after reading all of stage 1 again.
        epochs, updates = divmod(max(self.state.global_step - self.steps.joint, 0), num_update_steps_per_epoch)
        return epochs, 0 if self.args.ignore_data_skip else updates * self.args.gradient_accumulation_steps

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            opt_model = self.model if model is None else model
            decayed = set(self.get_decay_parameter_names(opt_model))
            groups = {"decayed": [], "not_decayed": [], "gates": []}
            for name, parameter in opt_model.named_parameters():
                if not parameter.requires_grad:
                    continue
                is_gate = name.endswith("log_alpha") or name.rpartition(".")[2] in ("lambda_1", "lambda_2")
                groups["gates" if is_gate else "decayed" if name in decayed else "not_decayed"].append(parameter)
            cls, kwargs = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args, opt_model)
            settings = {
                "decayed": {"weight_decay": self.args.weight_decay},
                "not_decayed": {"weight_decay": 0.0},
                "gates": {"weight_decay": 0.0, "lr": self.skill_config.resolve_gate_learning_rate(self.steps.joint)},
            }
            for name in ("params", "model", "optimizer_dict"):
                if name in kwargs:
                    raise ValueError(
                        f"The optimizer {cls.__name__} sets its own `{name}`; gates need their own group."
                    )
            kwargs = kwargs | {"lr": self.args.learning_rate}  # of this stage, whoever made `kwargs`
            # The order matters: the learning rate that is logged is that of the first group.
            self.optimizer = cls(
                [{"params": group, **settings[name]} for name, group in groups.items() if group], **kwargs
            )
        return self.optimizer

    def _run_epoch(self, *args, epoch: int, **kwargs) -> None:
        # Each pass over the data has its own crops and order, and those of stage 2 are none of stage 1.
        number = 2 * epoch + (self.stage == 2)
        if isinstance(self.data_collator, SpeechCollator):
            if self.args.dataloader_persistent_workers:
                # Workers that outlive an epoch keep their copy of the collator.
                shared = torch.as_tensor(self.data_collator.epoch).share_memory_()
                self.data_collator.epoch = shared.fill_(number)
            else:
                self.data_collator.epoch = number
        if self._length_order is not None:
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            self._length_order.manual_seed(int(np.random.SeedSequence((seed, number)).generate_state(1)[0]))
        super()._run_epoch(*args, epoch=epoch, **kwargs)
        if getattr(self.data_collator, "num_skipped", 0):
            logger.warning("Clips left out of training batches so far: %d.", self.data_collator.num_skipped)

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        return super().create_scheduler(self.steps.final if self.stage == 2 else self.steps.joint, optimizer)

    def create_optimizer_and_scheduler(self, num_training_steps: int) -> None:
        raise ValueError("`create_optimizer_and_scheduler` cannot be called: each stage of `train()` makes its own.")

    def hyperparameter_search(self, *args, **kwargs):
        raise ValueError("`hyperparameter_search` cannot be called: a trainer trains once; make one for each trial.")

    def get_train_dataloader(self):
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
            # Its order would come from the global generator, which stands elsewhere after resuming.
            sampler.generator = self._length_order = torch.Generator()
        return sampler

    @contextmanager
    def _held_out(self):
        """What loads data within this context reads whole clips, and all of them."""
        collator, args = self.data_collator, self.args
        self.data_collator, self.args = self.eval_data_collator, copy.copy(args)
        # Loaders with persistent workers are kept, by a name that another dataset can have.
        self.args.dataloader_drop_last = self.args.dataloader_persistent_workers = False
        try:
            yield
        finally:
            self.data_collator, self.args = collator, args

    def get_eval_dataloader(self, eval_dataset=None):
        with self._held_out():
            return super().get_eval_dataloader(disable_audio_decoding(eval_dataset))

    def get_test_dataloader(self, test_dataset):
        with self._held_out():
            return super().get_test_dataloader(disable_audio_decoding(test_dataset))

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | None:
        """Valid frames of all micro-batches of all processes: what the sums of the loss are divided by."""
        self._micro_batch = 0  # the first of an optimizer step comes next
        if not batch_samples:  # a stream that has come to its end
            return None
        lengths = torch.cat([_lengths(batch) for batch in batch_samples])
        # A batch that could not be read is one clip without a valid sample: no frames.
        frames = self.student._get_feat_extract_output_lengths(lengths).clamp(min=0).sum().to(device)
        return self.accelerator.gather(frames).sum() if self.accelerator.num_processes > 1 else frames

    def teacher_targets(self, input_values, attention_mask=None) -> torch.Tensor:
        """Mean hidden state of the teacher in each group, `(groups, batch, frames, hidden_size)`, without gradient."""
        with self.accelerator.autocast():
            return target_means(self._target_teacher, self.layer_groups, input_values, attention_mask)

    @cached_property
    def _target_teacher(self) -> nn.Module:
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision)
        if dtype is None or not self.accelerator.native_amp:  # DeepSpeed has half precision without autocast
            return self._fast_teacher
        return fast_teacher(self.teacher, dtype)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = {name: inputs[name] for name in ("input_values", "attention_mask") if name in inputs}
        noise = (self.args.seed, self.state.global_step)
        if not self.skill_config.shared_gate_noise:
            noise += (self.accelerator.process_index, self._micro_batch)
            self._micro_batch += model.training
        if num_items_in_batch is not None:
            # Gradients are averaged over processes, but frames were counted over all of them.
            num_items_in_batch = num_items_in_batch / self.accelerator.num_processes
        step = self.state.global_step
        penalty_scale = 1 / getattr(self, "current_gradient_accumulation_steps", 1)
        outputs = model(
            **inputs,
            targets=self.teacher_targets(**inputs),
            target_sparsity=self._target_sparsity(step),
            # A function of these numbers alone, so that it is the same after resuming.
            gate_seed=noise_seed(*noise),
            num_frames=num_items_in_batch,
            penalty_scale=penalty_scale,
        )
        if model.training:
            terms, finite = outputs, self.finite_watch.note_terms(outputs)
            # Each micro-batch holds its share of the step's loss: a step's is their sum, and weighs 1 in all.
            # A step without a valid frame is not one of zero loss.
            counts = 1.0 if num_items_in_batch is None else (num_items_in_batch > 0).float()
            if self.accelerator.mixed_precision == "fp16":  # nor is one that overflows, which is skipped
                terms = {name: torch.where(finite, value.detach(), 0.0) for name, value in outputs.items()}
                counts = counts * finite
            self._add_to(self._train_sums, terms, counts, weight=penalty_scale * counts)
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def _get_grad_norm(self, model, grad_norm=None):
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self.finite_watch.note_gradient(grad_norm)
        return grad_norm

    def _target_sparsity(self, step: int) -> float:
        target = self.skill_config.target_sparsity
        return sparsity_at(step, target, self.steps.sparsity_warmup) if self.stage == 1 else target

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with torch.no_grad():
            loss, outputs = self.compute_loss(model, self._prepare_inputs(inputs), return_outputs=True)
        self._add_to(self._eval_sums, outputs, outputs["num_frames"], weight=outputs["num_frames"])
        return loss.detach(), None, None

    def _evaluate(self, *args, **kwargs) -> dict[str, float]:
        with without_early_stopping(self.callback_handler) if self.stage == 1 else nullcontext():
            return super()._evaluate(*args, **kwargs)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """
        Held-out distillation loss over the groups: `eval_distillation_loss` and its parts, means over all valid
        frames. Before `train()` this clusters the teacher's layers first.
        """
        if self.is_in_train:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        with self._distiller_as_model():
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def predict(self, test_dataset, ignore_keys=None, metric_key_prefix: str = "test") -> PredictionOutput:
        """
        The `metrics` of [`~SkillDistillationTrainer.evaluate`] for `test_dataset`; `predictions` and `label_ids` are
        `None`, since what a student predicts are hidden states.
        """
        with nullcontext() if self.is_in_train else self._distiller_as_model():
            return super().predict(test_dataset, ignore_keys, metric_key_prefix)

    @contextmanager
    def _distiller_as_model(self):
        if self.distiller is None:
            self._setup()
            self.steps = self.steps or self.skill_config.resolve_steps(self._total_steps())
            self.distiller = self._make_distiller()
        wrapped = self.model_wrapped
        self.model = self.model_wrapped = self.distiller
        try:
            yield
        finally:
            self.model, self.model_wrapped = self.student, wrapped

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix: str = "eval", **kwargs):
        self._eval_sums = {}
        # Its loader draws a number: training must not depend on whether anything was evaluated.
        with self._clips_alone(), torch.random.fork_rng(devices=[]):
            output = super().evaluation_loop(
                dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs
            )
        means = self._mean_over_processes(self._eval_sums)
        if self._eval_sums and not means:
            raise AudioError("No clip of the evaluation set can be read; the warnings above say why.")
        for name in DISTILLATION_LOSSES:
            if name in means:
                output.metrics[f"{metric_key_prefix}_{name}"] = means[name]
        if means:
            # The Trainer averages over batches, whatever they hold.
            output.metrics[f"{metric_key_prefix}_loss"] = means["distillation_loss"]
        return output

    @contextmanager
    def _clips_alone(self):
        """A clip's frames are what they are without any other clip beside it, whatever the batch size."""
        configs = [model.config for model in (self.student, self._target_teacher)]
        configs = [config for config in configs if hasattr(config, "masked_group_norm")]
        before = [config.masked_group_norm for config in configs]
        for config in configs:
            config.masked_group_norm = True
        try:
            yield
        finally:
            for config, masked in zip(configs, before, strict=True):
                config.masked_group_norm = masked

    # ---- Logs ----

    def _add_to(self, sums: dict[str, torch.Tensor], outputs: dict[str, torch.Tensor], scale, weight) -> None:
        """Adds up on the device; nothing waits for it until a line is logged."""
        for name in TRAINING_LOSSES:
            sums[name] = sums.get(name, 0.0) + outputs[name] * scale
        sums["weight"] = sums.get("weight", 0.0) + torch.as_tensor(
            weight, dtype=torch.float32, device=self.args.device
        )

    def _mean_over_processes(self, sums: dict[str, torch.Tensor]) -> dict[str, float]:
        if not sums:
            return {}
        values = torch.stack([value.float().reshape(()) for value in sums.values()])
        if self.accelerator.num_processes > 1:
            values = self.accelerator.gather(values[None]).sum(0)
        if not values[list(sums).index("weight")]:
            return {}
        means = dict(zip(sums, (values / values[list(sums).index("weight")]).tolist(), strict=True))
        del means["weight"]
        return means

    def _check_skipped(self) -> None:
        """Ends a run most of whose clips cannot be read any more: it would go on to train on silence."""
        counts = torch.tensor([self.state.global_step, getattr(self.data_collator, "num_skipped", 0)])
        clips = self.args.train_batch_size * self.args.gradient_accumulation_steps
        steps, skipped = (counts - self._counted).tolist()
        if steps * clips < CLIPS_JUDGED:
            return
        self._counted = counts
        share = skipped / (steps * clips)
        if self.accelerator.num_processes > 1:  # all of them go on or end
            share = self.accelerator.gather(torch.tensor([share], device=self.args.device)).mean().item()
        if share > MAX_BAD_SHARE:
            raise AudioError(
                f"{100 * share:.0f} % of the clips of the last {steps} steps cannot be read; the warnings above name"
                f" them. {how_to_resume(self.args.output_dir)}"
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self.is_in_train:
            self.finite_watch.check()
            self._check_skipped()
            terms = self._mean_over_processes(self._train_sums)
            self._train_sums = {}
            gates = self.distiller.has_gates
            logs = (
                logs
                | terms
                | {
                    "sparsity": self.distiller.sparsity().item(),
                    "target_sparsity": self._target_sparsity(self.state.global_step),
                    "lambda_1": self.distiller.lambda_1.item() if gates else 0.0,
                    "lambda_2": self.distiller.lambda_2.item() if gates else 0.0,
                    "num_parameters": pruning.num_parameters(self.student),
                    "stage": self.stage,
                }
            )
        super().log(logs, start_time)


def _name_of(teacher: str | os.PathLike | PreTrainedModel) -> str | os.PathLike:
    """Hub id or directory, or nothing if it is not known."""
    if not isinstance(teacher, PreTrainedModel):
        return teacher
    name = teacher.config.name_or_path
    # Without a commit it is from no repository but from a directory, which may have been relative to another one.
    return name if getattr(teacher.config, "_commit_hash", None) or Path(name).exists() else ""


def _directories(sources: dict) -> dict[str, Path]:
    """Those of `sources` that are local directories, wherever this process goes from here."""
    return {what: Path(path).absolute() for what, path in sources.items() if path and Path(path).is_dir()}


def _lengths(batch: dict) -> torch.Tensor:
    """Valid samples of each clip."""
    if batch.get("attention_mask") is not None:
        return batch["attention_mask"].sum(-1)
    clips, samples = batch["input_values"].shape
    return torch.full((clips,), samples, device=batch["input_values"].device)
