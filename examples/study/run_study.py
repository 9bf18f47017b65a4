"""
Does it help to distil groups of similar layers? Trains and probes students of one teacher that differ only in what
their loss compares: SKILL's groups, DPHuBERT's layers, other baselines and variants (`study_design.py`).

    python examples/study/run_study.py \\
        --librispeech DIR/librispeech-train-clean-5 --speech_commands DIR/speech-commands-test

The directories are the same as for `examples/pretrain_teacher.py`. The study takes hours; runs in `results` are not
repeated, so it can be stopped at any time, and several workers can share it, each with its own core:

    python examples/study/run_study.py ... --worker 0 --num_workers 2 --num_threads 1 &
    python examples/study/run_study.py ... --worker 1 --num_workers 2 --num_threads 1

`results` then contains `clusters.*.json` (for each seed the similarity of the teacher's layers by four measures, and
groups by calibration size), `references.json` (teacher, untrained network and filterbanks on the same tasks) and
`runs.*.jsonl`, one student per line; `draw_study.py` makes tables and figures from them.
"""

import json
import logging
import platform
import sys
import tempfile
import time
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import datasets
import numpy as np
import torch
import transformers
from filelock import FileLock
from tqdm.auto import tqdm
from transformers import AutoModel, set_seed


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from study_design import (  # noqa: E402
    CALIBRATION_SAMPLES,
    CALIBRATION_SECONDS,
    CALIBRATION_SIZES,
    MEASURES,
    SEEDS,
    Method,
    groups_of,
    plan,
    resolve,
)
from study_probes import METRICS, TASKS, probe, probe_splits, speech_to_distil  # noqa: E402

from skill_hf import SkillConfig, SkillDistillationTrainer, SkillTrainingArguments  # noqa: E402
from skill_hf.analysis import layer_distances  # noqa: E402
from skill_hf.cli.settings import MAX_COUNT, Count, Positive, Range, Seconds, Whole, parse, run_script  # noqa: E402
from skill_hf.data import calibration_waveforms  # noqa: E402
from skill_hf.data.batches import equal_length_batches  # noqa: E402
from skill_hf.encoders import FilterBank, PretrainedEncoder, feature_extractor_for  # noqa: E402
from skill_hf.files import read_json, try_directory, write_json  # noqa: E402
from skill_hf.grouping.similarity import SIMILARITY_MEASURES  # noqa: E402
from skill_hf.latency import device_name  # noqa: E402
from skill_hf.models.loading import load_model  # noqa: E402


logger = logging.getLogger("run_study")

HERE = Path(__file__).resolve().parent


@dataclass
class StudyArguments:
    librispeech: Path = field(metadata={"help": "Directory with metadata.csv (file_name, speaker, text) and audio."})
    speech_commands: Path = field(metadata={"help": "Directory with metadata.csv (file_name, speaker, label)."})
    teacher: Path = field(default=HERE / "teacher", metadata={"help": "Hub id or directory of the teacher."})
    results: Path = field(default=HERE / "results", metadata={"help": "Directory to add results to."})
    max_steps: Annotated[int, Range(4, most=MAX_COUNT)] = field(
        default=240, metadata={"help": "Optimizer steps per student, both stages together."}
    )
    batch_size: Count = field(default=4, metadata={"help": "Crops per step."})
    max_seconds: Seconds = field(default=2.0, metadata={"help": "Length of a crop in seconds."})
    worker: Whole = field(default=0, metadata={"help": "Index of this worker, from 0."})
    num_workers: Count = field(default=1, metadata={"help": "Number of workers that share the study."})
    num_threads: Annotated[int, Range(1, most=1024)] = field(
        default=2, metadata={"help": "CPU threads of this worker."}
    )
    hours: Positive | None = field(default=None, metadata={"help": "No new run is started after this many hours."})
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


@torch.no_grad()
def compute_similarities(teacher, feature_extractor, train, seed: int) -> dict[str, dict[int, np.ndarray]]:
    """Measure -> number of calibration clips -> matrix; one pass of the teacher serves all."""
    accumulators = {
        measure: SIMILARITY_MEASURES[measure](**({"seed": seed} if measure == "mutual_knn" else {}))
        for measure in MEASURES
    }
    found = {measure: {} for measure in MEASURES}
    waveforms = calibration_waveforms(train, max(CALIBRATION_SIZES), CALIBRATION_SECONDS, seed, feature_extractor)
    done = 0
    with tqdm(total=max(CALIBRATION_SIZES), desc=f"Similarity, seed {seed}", unit="clip") as bar:
        for batch in equal_length_batches((torch.from_numpy(waveform) for waveform in waveforms), 1):
            states = teacher(batch.to(teacher.device), output_hidden_states=True).hidden_states
            done += 1
            for measure, accumulator in accumulators.items():
                accumulator.update([state[0] for state in states])
                if done in CALIBRATION_SIZES:
                    # A copy, since the accumulator goes on.
                    found[measure][done] = deepcopy(accumulator).compute()
            bar.update()
    return found


def cluster(args: StudyArguments, teacher, feature_extractor, train, seed: int) -> dict[str, np.ndarray]:
    """
    Similarity by each measure. `clusters.SEED.json` has these matrices, of [`CALIBRATION_SAMPLES`] clips, and the
    groups that come of each number of clips.
    """
    path = args.results / f"clusters.{seed}.json"
    if not path.is_file():
        found = compute_similarities(teacher, feature_extractor, train, seed)
        groups = {
            measure: {
                str(size): {name: groups_of(name, {"cka": matrix}) for name in ("skill", "4 clusters")}
                for size, matrix in by_size.items()
            }
            for measure, by_size in found.items()
        }
        similarity = {measure: by_size[CALIBRATION_SAMPLES].round(6).tolist() for measure, by_size in found.items()}
        write_json(path, {"similarity": similarity, "groups": groups})
    stored = read_json(path)["similarity"]
    return {measure: np.array(matrix) for measure, matrix in stored.items()}


def references(args: StudyArguments, teacher, feature_extractor, splits) -> dict:
    """
    `references.json`: scores of teacher and floors for each seed (of heads and of the untrained network) and
    the learning rates that were best on the validation sets.
    """
    path = args.results / "references.json"
    found = read_json(path) if path.is_file() else {}

    def untrained(seed: int) -> PretrainedEncoder:
        set_seed(seed)
        return PretrainedEncoder(AutoModel.from_config(teacher.config).to(teacher.device), feature_extractor)

    encoders = {
        "teacher": lambda: {SEEDS: PretrainedEncoder(teacher, feature_extractor)},
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
            runs = probe(encoder, splits, seeds, {task: task_rates[:1] for task, task_rates in rates.items()} or None)
            for task, metric in zip(TASKS, METRICS, strict=True):
                scores[metric] += [run[metric] for run in runs[task]]
                rates.setdefault(task, []).extend(run["learning_rate"] for run in runs[task])
        found[name] = {"scores": scores, "learning_rates": rates}
        write_json(path, found)
    return found


def train_student(args: StudyArguments, teacher, feature_extractor, train, method: Method, sparsity: float, seed: int):
    set_seed(seed)
    with tempfile.TemporaryDirectory() as directory:
        trainer = SkillDistillationTrainer(
            teacher=teacher,
            skill_config=SkillConfig(
                target_sparsity=sparsity,
                # With 0.15 stage 1 ends far from 0.9; at 0.75 the larger one overshoots.
                gate_learning_rate=0.3 if sparsity > 0.8 else 0.15,
                final_learning_rate=5e-4,
                **method.fields(),
            ),
            args=SkillTrainingArguments(
                output_dir=directory,
                max_steps=args.max_steps,
                per_device_train_batch_size=args.batch_size,
                learning_rate=5e-4,
                save_strategy="no",
                logging_steps=args.max_steps // 4,
                report_to="none",
                disable_tqdm=True,
                dataloader_pin_memory=torch.cuda.is_available(),
                seed=seed,
            ),
            train_dataset=train,
            processing_class=feature_extractor,
        )
        trainer.data_collator.max_seconds = args.max_seconds
        trainer.train()
    return trainer.model.eval(), trainer.state.log_history


def run_one(args, teacher, feature_extractor, train, heldout, splits, rates, method, sparsity, seed) -> dict:
    """Trains a student, measures its distance to the teacher on unheard readers, and probes it."""
    start = time.perf_counter()
    student, history = train_student(args, teacher, feature_extractor, train, method, sparsity, seed)
    trained = time.perf_counter()
    audio = list(calibration_waveforms(heldout, 40, 5.0, 0, feature_extractor))
    distances = layer_distances(teacher, student, audio, progress=False)
    student.config.masked_group_norm = True
    probes = probe(PretrainedEncoder(student, feature_extractor), splits, [seed], rates)
    config = student.config
    return {
        "parameters": student.num_parameters(),
        "sparsity_reached": 1 - student.num_parameters() / teacher.num_parameters(),
        "train_loss": [line["distillation_loss"] for line in history if "distillation_loss" in line],
        "distances": {measure: values.round(6).tolist() for measure, values in distances.items()},
        "scores": {metric: probes[task][0][metric] for task, metric in zip(TASKS, METRICS, strict=True)},
        "layer_weights": {task: np.round(probes[task][0]["layer_weights"], 4).tolist() for task in TASKS},
        "architecture": {
            "conv_dim": list(config.conv_dim),
            "num_heads": [len(heads) for heads in config.remaining_heads],
            "intermediate_sizes": list(config.intermediate_sizes),
        },
        "seconds": {"training": round(trained - start, 1), "probes": round(time.perf_counter() - trained, 1)},
    }


def run_key(method: Method, sparsity: float, seed: int) -> str:
    """Methods that come to the same groups share a run."""
    return json.dumps([method.fields(), sparsity, seed])


def append(path: Path, row: dict) -> None:
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    with open(path, "a", encoding="utf-8") as file:
        # A line that was being written when a worker stopped must not take this one along.
        file.write(("" if text.endswith("\n") or not text else "\n") + json.dumps(row) + "\n")


def finished(results: Path) -> set[str]:
    """Keys of the students in `runs.*.jsonl`; a line that was being written when a worker stopped is passed over."""
    keys = set()
    for path in results.glob("runs.*.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                keys.add(json.loads(line)["key"])
            except json.JSONDecodeError:
                logger.warning("%s has an incomplete line, which is skipped.", path)
    return keys


def run(args: StudyArguments) -> None:
    try_directory(args.results, "results")
    datasets.disable_progress_bars()
    start = time.monotonic()
    torch.set_num_threads(args.num_threads)
    args.results.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.allow_tf32 = False  # so that a GPU rounds as a CPU does
    teacher = load_model(str(args.teacher)).to(device).eval()
    feature_extractor = feature_extractor_for(str(args.teacher), teacher.config)
    train, heldout = speech_to_distil(args.librispeech)
    splits = probe_splits(args.librispeech, args.speech_commands)
    with FileLock(args.results / "references.lock"):  # else workers that start together would all encode all of it
        found = references(args, teacher, feature_extractor, splits)
    rates = {task: task_rates[:1] for task, task_rates in found["teacher"]["learning_rates"].items()}
    settings = {
        "max_steps": args.max_steps,
        "batch_size": args.batch_size,
        "max_seconds": args.max_seconds,
        "learning_rates": rates,
        **machine(device),
    }
    planned = list(plan())
    mine = planned[args.worker :: args.num_workers]
    logger.info("%d students are planned, %d for this worker", len(planned), len(mine))
    trained = 0
    for number, (name, sparsity, seed) in enumerate(mine, start=1):
        if args.hours is not None and time.monotonic() - start > 3600 * args.hours or trained == args.max_runs:
            logger.info("%d students are left for later.", len(mine) - number + 1)
            return
        method = resolve(name, cluster(args, teacher, feature_extractor, train, seed), seed)
        key = run_key(method, sparsity, seed)
        if key in finished(args.results):
            continue
        result = run_one(args, teacher, feature_extractor, train, heldout, splits, rates, method, sparsity, seed)
        row = {"key": key, **method.fields(), "sparsity": sparsity, "seed": seed, **result, "settings": settings}
        append(args.results / f"runs.{args.worker}.jsonl", row)
        trained += 1
        logger.info("%d of %d: %s %s %s %s", number, len(mine), name, key, result["scores"], result["seconds"])


def main(arguments: list[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    return run_script(lambda: run(*parse(arguments, (StudyArguments,))))


if __name__ == "__main__":
    sys.exit(main())
