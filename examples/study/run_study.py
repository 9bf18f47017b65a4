"""
Does it help to distil groups of similar layers? Trains students that differ only in their recipe (`study_design.py`)
and measures how far they are from their teacher; some are tested on tasks, too.

    python examples/study/run_study.py \\
        --librispeech DIR/librispeech-train-clean-5 --speech_commands DIR/speech-commands-test

The directories are the same as for `examples/pretrain_teacher.py`. The study takes hours; students in `results` are
not trained again, so it can be stopped at any time, and several workers can share it, each with its own core:

    python examples/study/run_study.py ... --worker 0 --num_workers 2 --num_threads 1 &
    python examples/study/run_study.py ... --worker 1 --num_workers 2 --num_threads 1

`results` then contains `students.*.jsonl`, one student per line, and `references.TEACHER.json` (teacher, untrained
network and filterbanks on the same tasks). `draw_study.py` makes tables and figures from them.
"""

import json
import logging
import platform
import sys
import tempfile
import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated

import datasets
import numpy as np
import torch
import transformers
from filelock import FileLock
from transformers import AutoModel, set_seed


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from study_design import SECOND_SPEAKER, SEEDS, SHAPE, TEACHERS, Student, plan, recipe  # noqa: E402
from study_probes import METRICS, TASKS, probe, probe_splits, speech_to_distil  # noqa: E402

from skill_hf import SkillDistillationTrainer, SkillTrainingArguments  # noqa: E402
from skill_hf.analysis import layer_distances  # noqa: E402
from skill_hf.cli.settings import Count, Positive, Range, Seconds, Whole, parse, run_script  # noqa: E402
from skill_hf.compression.layer_dropping import drop_layers  # noqa: E402
from skill_hf.data import calibration_waveforms  # noqa: E402
from skill_hf.data.distortion import Distortion  # noqa: E402
from skill_hf.encoders import FilterBank, PretrainedEncoder, feature_extractor_for  # noqa: E402
from skill_hf.files import read_json, try_directory, write_json  # noqa: E402
from skill_hf.latency import device_name  # noqa: E402
from skill_hf.models.families import build_student  # noqa: E402
from skill_hf.models.loading import load_model  # noqa: E402


logger = logging.getLogger("run_study")

HERE = Path(__file__).resolve().parent


@dataclass
class StudyArguments:
    librispeech: Path = field(metadata={"help": "Directory with metadata.csv (file_name, speaker, text) and audio."})
    speech_commands: Path = field(metadata={"help": "Directory with metadata.csv (file_name, speaker, label)."})
    results: Path = field(default=HERE / "results", metadata={"help": "Directory to add results to."})
    batch_size: Count = field(default=4, metadata={"help": "Crops per step."})
    max_seconds: Seconds = field(default=2.0, metadata={"help": "Length of a crop in seconds."})
    worker: Whole = field(default=0, metadata={"help": "Index of this worker, from 0."})
    num_workers: Count = field(default=1, metadata={"help": "Number of workers that share the study."})
    num_threads: Annotated[int, Range(1, most=1024)] = field(
        default=2, metadata={"help": "CPU threads of this worker."}
    )
    bf16: bool = field(default=False, metadata={"help": "Train in bfloat16, where the processor is fast at it."})
    hours: Positive | None = field(default=None, metadata={"help": "No student is started after this many hours."})
    max_runs: Whole | None = field(
        default=None, metadata={"help": "Maximum number of students that this worker trains."}
    )

    def __post_init__(self):
        if not 0 <= self.worker < self.num_workers:
            raise ValueError(f"`worker` must be from 0 to {self.num_workers - 1}, but is {self.worker}.")
        for directory in (self.librispeech, self.speech_commands):
            if not (directory / "metadata.csv").is_file():
                raise ValueError(f"{directory} has no metadata.csv; pass the directory that contains it.")


def machine(device: torch.device) -> dict[str, str]:
    versions = {package.__name__: package.__version__ for package in (torch, transformers, datasets)}
    return {"processor": device_name(device), "python": platform.python_version(), **versions}


class Workbench:
    """A teacher, the speech, and what is trained and measured with both."""

    def __init__(self, args: StudyArguments, name: str):
        self.args, self.name = args, name
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.teacher = load_model(str(TEACHERS[name])).to(self.device).eval()
        self.feature_extractor = feature_extractor_for(str(TEACHERS[name]), self.teacher.config)
        self.train, self.heldout = speech_to_distil(args.librispeech)

    @cached_property
    def heldout_audio(self) -> list[np.ndarray]:
        return list(calibration_waveforms(self.heldout, 40, 5.0, 0, self.feature_extractor))

    @cached_property
    def splits(self) -> dict:
        return probe_splits(self.args.librispeech, self.args.speech_commands)

    @cached_property
    def learning_rates(self) -> dict[str, list[float]]:
        """Of the heads: those that were best for the teacher on the validation sets, with the first seed."""
        with FileLock(self.args.results / "references.lock"):  # else workers that start together would all do it
            found = self.references()
        return {task: rates[:1] for task, rates in found["teacher"]["learning_rates"].items()}

    def references(self) -> dict:
        """Scores of teacher and floors for each seed (of heads and of the untrained network), and learning rates."""
        path = self.args.results / f"references.{self.name}.json"
        found = read_json(path) if path.is_file() else {}

        def untrained(seed: int) -> PretrainedEncoder:
            set_seed(seed)
            return self.encoder(AutoModel.from_config(self.teacher.config).to(self.device))

        encoders = {
            "teacher": lambda: {SEEDS: self.encoder(self.teacher)},
            "fbank": lambda: {SEEDS: FilterBank("fbank")},
            "mfcc": lambda: {SEEDS: FilterBank("mfcc")},
            "untrained": lambda: {(seed,): untrained(seed) for seed in SEEDS},
        }
        for name, build in encoders.items():
            if name in found:
                continue
            scores = {metric: [] for metric in METRICS}
            rates: dict[str, list[float]] = {}
            for seeds, encoder in build().items():
                firsts = {task: task_rates[:1] for task, task_rates in rates.items()}
                runs = probe(encoder, self.splits, seeds, firsts or None)
                for task, metric in zip(TASKS, METRICS, strict=True):
                    scores[metric] += [run[metric] for run in runs[task]]
                    rates.setdefault(task, []).extend(run["learning_rate"] for run in runs[task])
            found[name] = {"scores": scores, "learning_rates": rates}
            write_json(path, found)
        return found

    def encoder(self, model) -> PretrainedEncoder:
        return PretrainedEncoder(model, self.feature_extractor)

    def distil(self, student: Student) -> SkillDistillationTrainer:
        condition, shape = student.condition, self.teacher.config
        layers = shape.num_hidden_layers
        config, learning_rate = recipe(student.method, condition.sparsity, condition.steps, shape)
        two_teachers = [str(TEACHERS[name]) for name in sorted(TEACHERS, key=lambda name: name != self.name)]
        set_seed(student.seed)
        with tempfile.TemporaryDirectory() as directory:
            trainer = SkillDistillationTrainer(
                teacher=two_teachers if config.teacher_targets == "separate" else self.teacher,
                model=drop_layers(build_student(self.teacher), range(2, layers)) if student.method == SHAPE else None,
                skill_config=config,
                args=SkillTrainingArguments(
                    output_dir=directory,
                    max_steps=condition.steps,
                    per_device_train_batch_size=self.args.batch_size,
                    learning_rate=learning_rate,
                    save_strategy="no",
                    logging_steps=max(condition.steps // 12, 1),
                    report_to="none",
                    disable_tqdm=True,
                    use_cpu=self.device.type == "cpu",
                    bf16=self.args.bf16,
                    dataloader_pin_memory=torch.cuda.is_available(),
                    seed=student.seed,
                ),
                train_dataset=self.train,
                eval_dataset=self.heldout,
                processing_class=self.feature_extractor,
            )
            trainer.data_collator.max_seconds = trainer.eval_data_collator.max_seconds = self.args.max_seconds
            if "second speaker" in student.method.split(" + "):
                trainer.data_collator.distortion = Distortion(**SECOND_SPEAKER)
            trainer.train()
        return trainer

    def distances(self, model, hears: Distortion | None = None) -> dict[str, list[float]]:
        """Mean distance to the teacher at each hidden state; `hears` distorts the student's input alone."""
        heard = self.heldout_audio
        if hears is not None:
            heard = hears(heard, self.feature_extractor.sampling_rate, (0,))
        clips = iter(heard)

        def hear(module, args, inputs):
            audio = inputs["input_values"]
            return args, inputs | {"input_values": torch.from_numpy(np.stack([next(clips) for _ in audio])).to(audio)}

        handle = model.register_forward_pre_hook(hear, with_kwargs=True)
        try:
            distances = layer_distances(self.teacher, model, self.heldout_audio, progress=False)
        finally:
            handle.remove()
        return {measure: values.round(6).tolist() for measure, values in distances.items()}

    def run(self, student: Student, with_tasks: bool) -> dict:
        """Trains a student and measures its distance to the teacher on unheard readers; tests it on tasks, too."""
        start = time.perf_counter()
        trainer = self.distil(student)
        seconds = {"training": round(time.perf_counter() - start, 1)}
        model = trainer.model.eval()
        config, logs = model.config, trainer.state.log_history
        result = {
            "peak_learning_rates": {
                "stages": trainer.learning_rates,
                "gates": trainer.skill_config.resolve_gate_learning_rate(trainer.steps.joint),
            },
            "layer_groups": trainer.layer_groups,
            "sparsity_reached": 1 - model.num_parameters() / self.teacher.num_parameters(),
            "parameters": model.num_parameters(),
            "cut": trainer.record.cut and {"step": trainer.steps.joint, **trainer.record.cut},
            "losses": [[line["step"], line["distillation_loss"]] for line in logs if "distillation_loss" in line],
            "held_out": {moment: loss["distillation_loss"] for moment, loss in trainer.record.losses.items()},
            "distances": self.distances(model),
            "distances_second_speaker": self.distances(model, Distortion(mixing_prob=1.0, mixing_snr=(5.0, 5.0))),
            "architecture": {
                "conv_dim": list(config.conv_dim),
                "num_heads": [len(heads) for heads in config.remaining_heads],
                "intermediate_sizes": list(config.intermediate_sizes),
            },
        }
        if with_tasks:
            start = time.perf_counter()
            config.masked_group_norm = True
            probes = probe(self.encoder(model), self.splits, [student.seed], self.learning_rates)
            result["scores"] = {metric: probes[task][0][metric] for task, metric in zip(TASKS, METRICS, strict=True)}
            result["learning_rates"] = self.learning_rates
            seconds["tasks"] = round(time.perf_counter() - start, 1)
        return result | {"seconds": seconds}


def append(path: Path, row: dict) -> None:
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    with open(path, "a", encoding="utf-8") as file:
        # A line that was being written when a worker stopped must not take this one along.
        file.write(("" if text.endswith("\n") or not text else "\n") + json.dumps(row) + "\n")


def read_rows(results: Path) -> dict[str, dict]:
    """
    Key -> row of `students.*.jsonl`. Of two rows of one student the first counts, unless only the second has scores; a
    line that was being written when a worker stopped is passed over.

    Raises:
        `ValueError`: if a line is not a student.
    """
    rows: dict[str, dict] = {}
    for path in sorted(results.glob("students.*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                logger.warning("%s has an incomplete line, which is skipped.", path)
                continue
            if not isinstance(row, dict) or not {"key", "settings"} <= row.keys():
                raise ValueError(f"{path} has a line that is not a student of the study: {line[:80]}")
            if row["key"] not in rows or "scores" in row and "scores" not in rows[row["key"]]:
                rows[row["key"]] = row
    return rows


def run(args: StudyArguments) -> None:
    try_directory(args.results, "results")
    datasets.disable_progress_bars()
    start = time.monotonic()
    torch.set_num_threads(args.num_threads)
    torch.backends.cudnn.allow_tf32 = False  # so that a GPU rounds as a CPU does
    args.results.mkdir(parents=True, exist_ok=True)
    workbenches: dict[str, Workbench] = {}
    planned = list(plan().items())
    mine = planned[args.worker :: args.num_workers]
    logger.info("%d students are planned, %d for this worker", len(planned), len(mine))
    trained = 0
    for number, (student, with_tasks) in enumerate(mine, start=1):
        row = read_rows(args.results).get(student.key)
        if row is not None and ("scores" in row or not with_tasks):
            continue
        if args.hours is not None and time.monotonic() - start > 3600 * args.hours or trained == args.max_runs:
            logger.info("%d students are left for later.", len(mine) - number + 1)
            return
        teacher = student.condition.teacher
        if teacher not in workbenches:
            workbenches[teacher] = Workbench(args, teacher)
        workbench = workbenches[teacher]
        result = workbench.run(student, with_tasks)
        settings = {
            "batch_size": args.batch_size,
            "max_seconds": args.max_seconds,
            "threads": args.num_threads,
            "precision": "bfloat16" if args.bf16 else "float32",
            **machine(workbench.device),
        }
        append(args.results / f"students.{args.worker}.jsonl", {"key": student.key, **result, "settings": settings})
        trained += 1
        mean = np.mean(result["distances"]["cka"])
        logger.info("%d of %d: %s: %.4f %s", number, len(mine), student.key, mean, result["seconds"])


def main(arguments: list[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    return run_script(lambda: run(*parse(arguments, (StudyArguments,))))


if __name__ == "__main__":
    sys.exit(main())
