"""`PublishingTrainer`: writes a student's model card and publishes the student."""

from concurrent.futures import Future
from itertools import zip_longest
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import CommitInfo

from ..models.loading import plain_feature_extractor
from ..models.processors import save_processor
from ..models.properties import has_gates
from ..publishing import hub as publishing
from ..publishing.model_card import write_model_card
from ..publishing.run_report import OtherTeacher, RunReport
from .distillation_trainer import DistillationTrainer
from .distiller import SkillDistiller


class PublishingTrainer(DistillationTrainer):
    """
    Saving, describing and publishing: the Hub methods of transformers' `Trainer`, for a student only. A subclass
    measures the run (`record`, `layer_similarity`, `layer_tree`).
    """

    def save_student(self, output_dir: str) -> None:
        """Saves model, feature extractor, tokenizer and recipe, without a card."""
        self.student.save_pretrained(output_dir)
        self.save_processor(output_dir)
        self.skill_config.save_pretrained(output_dir)

    def save_processor(self, output_dir: str) -> None:
        """Saves what prepares audio, and the tokenizer of a student that writes text."""
        save_processor(output_dir, plain_feature_extractor(self.processing_class), self.tokenizer)

    def report(self) -> RunReport:
        """The run as it stands, for the model card, the figures and all_results.json."""
        args = self.args
        groups_of_others = [calibration.groups for calibration in self.other_calibrations]
        others = [
            OtherTeacher(teacher.name, teacher.model, groups)
            for teacher, groups in zip_longest(self.teachers[1:], groups_of_others)
        ]
        seconds = getattr(args, "seconds_per_batch", None)
        batches = args.gradient_accumulation_steps * args.world_size
        return RunReport(
            student=self.student,
            teacher=self.teacher,
            teacher_name=self.teachers[0].name,
            head_losses=self.head_losses,
            skill_config=self.skill_config,
            record=self.record,
            hub_model_id=self.hub_model_id,  # once the repository is made
            layer_groups=self.layer_groups,
            layer_similarity=self.layer_similarity,
            layer_tree=self.layer_tree(),
            steps=self.steps,
            num_steps_done=self.state.global_step,
            log_history=self.state.log_history,
            learning_rates=self.learning_rates,
            clips_per_step=None if seconds else args.train_batch_size * batches,
            seconds_per_step=seconds and seconds * batches,
            precision=self.accelerator.mixed_precision,  # which `accelerate launch` may have set
            seed=args.seed,
            sampling_rate=self.processing_class.sampling_rate,
            train_dataset=self.train_dataset,
            eval_dataset=self.eval_dataset,
            other_teachers=others,
        )

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """See [`~transformers.Trainer.init_hf_repo`]; a failure is an `OSError` of one line."""
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
        Saves the student to `args.output_dir` and uploads it to `args.hub_model_id`, in one commit: the files of
        [`~Trainer.save_model`], and the figures and all_results.json if they exist. Checkpoints and other files in
        `args.output_dir` are not uploaded.

        Args:
            commit_message, blocking, token, private, kwargs (*optional*):
                As in [`~transformers.Trainer.push_to_hub`].
            revision (`str`, *optional*):
                The branch to push to, created if it does not exist; by default `args.hub_revision`, otherwise `main`.

        Returns:
            `CommitInfo` with `blocking`, otherwise a `Future` of it; `None` on all processes but the first.

        Raises:
            `ValueError`: if the student is being trained or still has gates.
            `OSError`: if the Hub cannot be reached or refuses; the student is already saved then.
        """
        if isinstance(self.model, SkillDistiller) or has_gates(self.student):
            raise ValueError("The student is not finished: let `train()` end (or resume it) before publishing it.")
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        args, is_named = self.args, self.hub_model_id is not None
        destination = publishing.open_repository(
            self.hub_model_id or args.hub_model_id or Path(args.output_dir).absolute().name,
            args.output_dir,
            exists=is_named,
            token=args.hub_token if token is None else token,
            revision=args.hub_revision if revision is None else revision,
            private=args.hub_private_repo if private is None else private,
        )
        self.hub_model_id = destination.repo_id
        if not is_named or kwargs:  # otherwise the card that was just saved is right
            self.create_model_card(**kwargs)
        folder = TemporaryDirectory()  # uploads in the background outlive this call
        self.save_student(folder.name)
        return publishing.push_run(folder, destination, commit_message or "End of training", blocking)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """
        Does nothing: checkpoints contain gates and projections and are not published; `push_to_hub` publishes the
        student.
        """

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
                No effect: the text of the card is generated from the run.
        """
        if not self.is_world_process_zero():
            return
        write_model_card(self.args.output_dir, self.report())
        metadata = {"language": language, "license": license, "base_model": finetuned_from, "datasets": dataset_tags}
        publishing.edit_metadata(self.args.output_dir, metadata, tags)
