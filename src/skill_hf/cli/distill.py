"""
`skill-hf distill`: distils and prunes a speech encoder, from audio to a directory that loads with `AutoModel`, or to
several if `--target_sparsity` has several values.

Exit codes: 0 if the student is saved, 2 after a line that begins with `error`, 130 after Ctrl-C and 75 after SIGTERM.
Both signals write a checkpoint first; with `--resume_from_checkpoint auto` the same command goes on.
"""

import dataclasses
import logging
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from safetensors import safe_open
from transformers import TrainerCallback, set_seed

from .. import storage
from ..data.audio import AudioError
from ..data.distortion import Distortion
from ..data.speech_datasets import load_audio_dir, load_speech_dataset
from ..distillation.checkpointing import has_begun, is_finished, mark_finished
from ..distillation.divergence import NonFiniteError
from ..distillation.interruption import Terminated
from ..distillation.skill_trainer import SkillDistillationTrainer
from ..distillation.task_heads import TASK_NAMES, load_initial_student
from ..models.families import auto_class_of, head_of
from ..recipe.skill_config import SkillConfig
from ..recipe.skill_training_args import SkillTrainingArguments
from .recipes import load_recipe
from .settings import MAX_COUNT, ArgumentParser, Count, Range, Seconds, Share, require, run_script
from .sparsity_chain import chain, check_later, resume_setting


logger = logging.getLogger(__name__)


@dataclass
class ModelArguments:
    recipe: str | None = field(
        default=None,
        metadata={
            "help": "Name of a recipe of this package, such as hubert-base-075; all other settings override it. A"
            " wrong name lists all."
        },
    )
    teacher_name_or_path: list[str] | str = field(
        default_factory=lambda: ["microsoft/wavlm-base-plus"],
        metadata={
            "help": "Hub id or local directory of the teacher; several, separated by spaces, teach together, and the"
            " student starts from the first.",
            "aliases": ["--teacher"],
        },
    )
    student_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Hub id or local directory of the student to start from; a copy of the teacher by default."},
    )
    task: str | None = field(
        default=None,
        metadata={
            "help": "The teacher's head that goes along and is distilled; by default, and with `encoder`, none.",
            "choices": list(TASK_NAMES),
        },
    )

    def __post_init__(self):
        if len(self.teacher_name_or_path) == 1 and isinstance(self.teacher_name_or_path, list):
            self.teacher_name_or_path = self.teacher_name_or_path[0]


@dataclass
class DataArguments:
    dataset_name: str | None = field(
        default=None, metadata={"help": "Hub id, or a local directory in any format that `datasets` can load."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    train_split: str = field(default="train", metadata={"help": "Split to train on; `a+b` concatenates two."})
    eval_split: str | None = field(default=None, metadata={"help": "Split to evaluate on; none by default."})
    audio_column: str = field(default="audio", metadata={"help": "Name of the audio column."})
    streaming: bool = field(default=False, metadata={"help": "Stream the dataset; requires max_steps."})
    audio_dir: str | None = field(
        default=None, metadata={"help": "Directory of audio to train on, including its subdirectories."}
    )
    eval_audio_dir: str | None = field(default=None, metadata={"help": "Directory of audio to evaluate on."})
    max_seconds: Seconds = field(default=15.6, metadata={"help": "Length in seconds to crop clips to."})
    min_seconds: Seconds = field(
        default=2.0,
        metadata={
            "help": "Minimum crop length in seconds; shorter clips are padded instead of cropping the others to match."
        },
    )
    max_eval_samples: Count | None = field(
        default=None, metadata={"help": "Number of clips to evaluate on; all by default."}
    )
    audio_protocols: list[str] = field(
        default_factory=list,
        metadata={"help": "URL protocols to allow in rows in addition to http, https and hf, such as s3 or zip."},
    )
    noise_dir: str | None = field(
        default=None,
        metadata={
            "help": "Directory of noise to add to the student's clips in training; the teacher hears the clean audio."
        },
    )
    noise_prob: Share = field(default=0.5, metadata={"help": "Share of clips that get noise."})
    noise_snr: list[Annotated[float, Range(least=-100, most=100)]] = field(
        default_factory=lambda: [0.0, 20.0], metadata={"help": "Lowest and highest signal-to-noise ratio in dB."}
    )
    reverb_dir: str | None = field(
        default=None, metadata={"help": "Directory of room impulse responses to convolve the student's clips with."}
    )
    reverb_prob: Share = field(default=0.5, metadata={"help": "Share of clips that get reverberation."})
    mixing_prob: Share = field(
        default=0.0,
        metadata={"help": "Share of clips in which the student hears a second speaker, of the same batch."},
    )
    num_heldout: Annotated[int, Range(least=0, most=MAX_COUNT)] = field(
        default=32,
        metadata={
            "help": "Number of training clips to hold out if no evaluation data is given, at most a tenth of all; 0"
            " for none. Nothing is held out of a stream."
        },
    )

    def __post_init__(self):
        if (self.dataset_name is None) == (self.audio_dir is None):
            raise ValueError("Pass the training data as either `dataset_name` or `audio_dir`.")
        if self.eval_split is not None and (self.dataset_name is None or self.eval_audio_dir is not None):
            raise ValueError(
                "`eval_split` is a split of `dataset_name` and cannot be combined with `eval_audio_dir`; remove one"
                " of them."
            )

    def distortion(self) -> Distortion | None:
        distortion = Distortion(
            noise_dir=self.noise_dir,
            noise_prob=self.noise_prob,
            noise_snr=self.noise_snr,
            reverb_dir=self.reverb_dir,
            reverb_prob=self.reverb_prob,
            mixing_prob=self.mixing_prob,
        )
        return None if distortion.does_nothing else distortion


# The classes that hold all options, and an object of each.
KINDS = (ModelArguments, DataArguments, SkillConfig, SkillTrainingArguments)
Settings = tuple[ModelArguments, DataArguments, SkillConfig, SkillTrainingArguments]
# A setting of the batches -> those of a recipe that it takes the place of.
INSTEAD_OF = {
    "per_device_train_batch_size": ("seconds_per_batch", "seconds_per_step"),
    "gradient_accumulation_steps": ("seconds_per_step",),
}


class RecipeParser(ArgumentParser):
    """
    Settings that are given override those of the recipe that they name. `target_sparsity` may have several values, and
    the result is a list with a tuple of objects for each.
    """

    def __init__(self, kinds, prog=None):
        super().__init__(kinds, prog=prog)
        action = self._option_string_actions["--target_sparsity"]
        action.nargs = "+"
        action.help += (
            " Several rising values make several students: each starts from the one before, is trained for `max_steps`"
            " and saved in a folder `sparsity-VALUE` of `output_dir`."
        )

    def build(self, settings, where=""):
        recipe = settings.get("recipe")
        if recipe is not None:
            excluded = {name for given, names in INSTEAD_OF.items() if given in settings for name in names}
            settings = {name: value for name, value in load_recipe(recipe).items() if name not in excluded} | settings
        sparsities = settings.get("target_sparsity")
        if not isinstance(sparsities, list) or not sparsities:
            return [super().build(settings, where)]
        build = super().build
        return chain([build(settings | {"target_sparsity": sparsity}, where) for sparsity in sparsities])


class UnfinishedError(ValueError):
    """The run ended before its last step, so there is no student to save."""


class StageClock(TrainerCallback):
    """Seconds of each part of the run, and whether training has begun."""

    def __init__(self):
        self.restart()

    def restart(self) -> None:
        """For the next student."""
        self.seconds = defaultdict(float)
        self.training_began = False

    @contextmanager
    def measure(self, name: str):
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.training_began = True
        self._stage = "stage_1" if model.has_gates else "stage_2"
        self._start = time.perf_counter()
        what = "distilling and pruning" if model.has_gates else "distilling the pruned student"
        logger.info("%s, up to step %d: %s", self._stage.replace("_", " ").capitalize(), state.max_steps, what)

    def on_train_end(self, args, state, control, **kwargs):
        self.seconds[self._stage] += time.perf_counter() - self._start


def parse(arguments: list[str], prog: str | None = None) -> list[Settings]:
    """
    Settings of each student, from the command line, or from the JSON or YAML file that is its only argument.

    Raises:
        `ValueError`: if settings are missing or invalid.
    """
    if not arguments:
        raise ValueError(
            "There are no settings: pass the training data (--audio_dir or --dataset_name) and --output_dir, or a"
            " JSON or YAML settings file; --help lists all options."
        )
    return RecipeParser(KINDS, prog=prog).parse(arguments)


def load_data(args: DataArguments) -> tuple:
    """Returns the training set, and the evaluation set or `None`."""
    if args.audio_dir is not None:
        train = load_audio_dir(args.audio_dir)
    else:
        form = {"config_name": args.dataset_config_name, "audio_column": args.audio_column}
        form["protocols"] = args.audio_protocols
        train = load_speech_dataset(args.dataset_name, split=args.train_split, streaming=args.streaming, **form)
    heldout = None
    if args.eval_audio_dir is not None:
        heldout = load_audio_dir(args.eval_audio_dir)
    elif args.eval_split is not None:
        heldout = load_speech_dataset(args.dataset_name, split=args.eval_split, streaming=args.streaming, **form)
    if heldout is not None and args.max_eval_samples is not None:
        if isinstance(heldout, datasets.IterableDataset):
            heldout = heldout.take(args.max_eval_samples)
        else:
            # Neighbours are often of one speaker. The sample does not follow the run's seed, so that runs compare.
            heldout = heldout.shuffle(seed=0).select(range(min(args.max_eval_samples, len(heldout))))
    if heldout is None and not args.streaming:
        train, heldout = hold_out(train, args.num_heldout)
    return train, heldout


def hold_out(train: datasets.Dataset, num_clips: int) -> tuple:
    """Takes some clips out of the training set, to evaluate the student on clips that it was not trained on."""
    num_clips = min(num_clips, len(train) // 10)
    if not num_clips:
        return train, None
    # Not by the run's seed, so that runs compare.
    order = np.random.default_rng(0).permutation(len(train))
    logger.info("No evaluation data was given: %d of %d clips are held out for evaluation", num_clips, len(train))
    return train.select(sorted(order[num_clips:])), train.select(sorted(order[:num_clips]))


def make_trainer(
    model_args: ModelArguments,
    data_args: DataArguments,
    skill_config: SkillConfig,
    training_args: SkillTrainingArguments,
    clock: StageClock,
) -> SkillDistillationTrainer:
    with training_args.main_process_first(desc="loading the data"):
        train, heldout = load_data(data_args)
        distortion = data_args.distortion()
    student = None
    if model_args.student_name_or_path is not None:
        student = load_initial_student(model_args.student_name_or_path, model_args.task)
    trainer = SkillDistillationTrainer(
        teacher=model_args.teacher_name_or_path,
        skill_config=skill_config,
        args=training_args,
        train_dataset=train,
        eval_dataset=heldout,
        model=student,
        task=model_args.task,
        callbacks=[clock],
    )
    lengths = {"max_seconds": data_args.max_seconds, "min_seconds": data_args.min_seconds}
    lengths["protocols"] = data_args.audio_protocols
    trainer.data_collator = dataclasses.replace(
        trainer.data_collator, seed=training_args.seed, distortion=distortion, **lengths
    )
    trainer.eval_data_collator = dataclasses.replace(trainer.eval_data_collator, **lengths)
    return trainer


def saved_names(directory: str) -> set[str]:
    """Names of the tensors in the safetensors files of `directory`."""
    names = set()
    for path in Path(directory).glob("model*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names.update(file.keys())
    return names


@torch.no_grad()
def check_saved_student(trainer: SkillDistillationTrainer) -> None:
    """
    Raises a `RuntimeError` unless the saved directory contains every parameter, loads with its auto class and gives
    the trained outputs.
    """
    directory = trainer.args.output_dir
    absent = {name for name, _ in trainer.model.named_parameters()} - saved_names(directory)
    if absent:
        raise RuntimeError(f"The student in {directory} lacks {', '.join(sorted(absent))}. Please report it.")
    auto_class = auto_class_of(head_of(trainer.model))
    saved = auto_class.from_pretrained(directory, dtype=trainer.model.dtype).to(trainer.model.device)
    noise = torch.randn(1, 16_000, generator=torch.Generator().manual_seed(0))
    audio = noise.to(trainer.model.device, trainer.model.dtype)
    # Hidden states of an encoder, logits of a head.
    difference = (saved.eval()(audio)[0] - trainer.model(audio)[0]).abs().max().item()
    if not difference < 1e-3:
        raise RuntimeError(
            f"The student in {directory} differs from the trained one by {difference}. Please report it."
        )


def run(arguments: list[str], clock: StageClock, prog: str | None = None, report: Callable | None = None) -> None:
    """Does the work of [`main`]; errors are raised."""
    students = parse(arguments, prog)
    require("matplotlib", "matplotlib", "The figures need")
    main_process = students[0][3].process_index == 0
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("skill_hf").setLevel(logging.INFO if main_process else logging.ERROR)
    for index in range(len(students)):
        accelerator = make_student(students, index, clock, report)
        accelerator.free_memory()  # the next student comes with a teacher of its own
    accelerator.end_training()


def make_student(
    students: list[Settings], index: int, clock: StageClock, report: Callable | None = None
) -> Accelerator:
    """Makes one of the students, unless an earlier run that is resumed has finished it."""
    model_args, data_args, skill_config, training_args = students[index]
    clock.restart()
    set_seed(training_args.seed)
    with clock.measure("set_up"):
        trainer = make_trainer(model_args, data_args, skill_config, training_args, clock)
    names = model_args.teacher_name_or_path
    logger.info(
        "Teacher %s: %s %s; target sparsity: %s",
        names if isinstance(names, str) else f"{names[0]}, with {' and '.join(names[1:])}",
        f"{trainer.teacher_cost:,}",
        trainer.budget.quantity,
        skill_config.target_sparsity,
    )
    resume = resume_setting(training_args)
    if len(students) > 1:
        if index == 0:
            check_later(trainer, students[1:])
        is_done = resume and is_finished(trainer)
        logger.info(
            "Student %d of %d, in %s: %s",
            index + 1,
            len(students),
            training_args.output_dir,
            "already finished" if is_done else "if this is stopped, `--resume_from_checkpoint auto` goes on with it",
        )
        if is_done:
            return trainer.accelerator
        if index and not has_begun(training_args.output_dir):
            resume = None
    distil(trainer, resume, clock, report)
    if len(students) > 1:
        mark_finished(trainer)
    # A process that ends while gloo's threads still hold its tensors is aborted; those that only listen wait here.
    trainer.accelerator.wait_for_everyone()
    return trainer.accelerator


def distil(
    trainer: SkillDistillationTrainer, resume: str | bool | None, clock: StageClock, report: Callable | None
) -> None:
    """Trains a student, saves it, measures it, and publishes it if that is asked for."""
    with clock.measure("train"):
        trainer.train(resume_from_checkpoint=resume)
    if trainer.stage != 3:
        raise UnfinishedError(
            f"The run ended at step {trainer.state.global_step} of {trainer.steps.total}; no student was saved. Resume"
            " it with `--resume_from_checkpoint True`."
        )
    # What neither stage took went into calibration, clustering and the cut.
    stages = sum(seconds for name, seconds in clock.seconds.items() if name.startswith("stage_"))
    clock.seconds["calibration_and_cut"] = clock.seconds.pop("train") - stages
    trainer.save_model(_internal_call=True)  # it is published below, with what is measured until then
    written = partial(storage.explained, "The report", trainer.args.output_dir, "The student itself is saved there.")
    with written():
        trainer.save_state()

    results = trainer.report().results() | {"seconds": clock.seconds}
    if trainer.eval_dataset is not None:
        with clock.measure("evaluation"):
            results |= trainer.evaluate()
    if trainer.is_world_process_zero():
        check_saved_student(trainer)
        logger.info("Groups of hidden states: %s", "; ".join(map(str, trainer.groups_of_teachers)))
        for line in trainer.record.summary():
            logger.info(line)
        logger.info(
            "Student with %s parameters (sparsity %.4f of %s) saved in %s; load it with %s.from_pretrained",
            f"{results['student_parameters']:,}",
            results["sparsity"],
            trainer.budget.quantity,
            trainer.args.output_dir,
            auto_class_of(head_of(trainer.model)).__name__,
        )
    if report is not None:
        results |= report(trainer)
    with written():
        trainer.save_metrics("all", results, combined=False)
        if not trainer.args.push_to_hub:
            trainer.create_model_card()
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
        logger.info("Published as https://huggingface.co/%s", trainer.hub_model_id)


def main(arguments: list[str] | None = None, prog: str | None = None, report: Callable | None = None) -> int:
    """
    Distils, prunes, saves and reports.

    Args:
        arguments (`list[str]`, *optional*): the command line; by default `sys.argv[1:]`.
        prog (`str`, *optional*): what the help calls the program.
        report (`Callable`, *optional*): called with the trainer at the end of training; the dict that it returns is
            added to `all_results.json`.

    Returns:
        `int`: the exit code.
    """
    clock = StageClock()
    words = sys.argv[1:] if arguments is None else arguments

    def is_input(error: Exception) -> bool:
        return not clock.training_began or isinstance(error, (AudioError, NonFiniteError, UnfinishedError))

    try:
        return run_script(lambda: run(words, clock, prog, report), is_input)
    except (KeyboardInterrupt, Terminated) as stop:
        print(f"stopped: {stop}" if str(stop) else "stopped.", file=sys.stderr)
        return stop.code if isinstance(stop, Terminated) else 128 + signal.SIGINT
