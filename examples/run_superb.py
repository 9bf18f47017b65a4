"""
Evaluates a frozen speech encoder, such as a teacher or a student, on the tasks of SUPERB (arXiv 2105.01051).

The demo's keywords, offline, with the student of `make demo`, its teacher, and filterbanks:

    python examples/run_superb.py
    python examples/run_superb.py --model examples/demo/teacher
    python examples/run_superb.py --model fbank

A published model, on data from the Hub:

    python examples/run_superb.py --task asr --model you/wavlm-base-plus-skill \\
        --dataset_name openslr/librispeech_asr --dataset_config_name clean \\
        --train_split train.100 --validation_split validation --test_split test

A local directory, in any format that `datasets` reads, such as `audiofolder` (a `metadata.csv` with `file_name` and
labels in each split's folder):

    python examples/run_superb.py --task sid --model microsoft/wavlm-base-plus --dataset_name voxceleb \\
        --label_column speaker --max_seconds 8

| task | what | columns | metric |
|---|---|---|---|
| ks | keyword spotting | label | accuracy |
| ic | intent classification | action, object, location | accuracy of all three |
| sid | speaker identification | label, speaker_id or speaker | accuracy |
| er | emotion recognition, `--folds` for cross-validation | label or emotion | accuracy |
| asv | speaker verification, `--trials` for given pairs | speaker_id, speaker or label | equal error rate |
| pr | phoneme recognition, `--lexicon` for other words than English | phonemes, or text | phoneme error rate |
| asr | speech recognition, without language model | text | word error rate |
| sf | slot filling | text with slots as `B-type words E-type`, or text and iob | F1 of slot types, CER of values |
| sd | speaker diarization, `--time_unit` for other times than seconds | speakers | diarization error rate |
| qbe | query by example: spoken words are searched in documents | word or text, or documents | term-weighted value |

`iob` has `O` or the slot's type for each word. `speakers` is a list of `speaker_id`, `start` and `end`, for instance
in a `metadata.jsonl`. For qbe, the training split contains the documents, the others contain queries. A document
matches if the query's words are in its text; or the queries have a column `documents` with lists of file names.
Nothing is trained: the best layer on the validation set is tested.

The encoder's hidden states are written to `cache_dir` once, in half precision. A head on their weighted sum is then
trained for each of `--learning_rates`, and the best one on the validation set is tested. The same command resumes an
interrupted run. In `output_dir`, the model then has a folder with `all_results.json` and `superb.md`, a table of its
results and their data. Several tasks with the same `output_dir` are collected in one table.

Results are comparable with published ones only on SUPERB's own data: its splits of Speech Commands, Fluent Speech
Commands, VoxCeleb1, IEMOCAP, LibriSpeech and so on. If you use them, pass `--superb_data`: `superb.md` then compares
the results with published models and, with all ten tasks, has a score.

For ks, ic, sid and er only means over time are stored; for the others and for x-vectors, a model of Base size needs
3.6 GB for an hour of speech.

The published protocol uses far more steps than the default (keywords: 200,000) and more data than the demo.
"""

import hashlib
import logging
import re
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import datasets
import numpy as np
import torch
import transformers
from example_utils import (
    DEMO_DATA,
    DEMO_STUDENT,
    REPOSITORY,
    FineTuningArguments,
    load_config,
)
from transformers import AutoModel, set_seed

from skill_hf.cli.settings import Count, Positive, Range, Seconds, parse, run_script
from skill_hf.data import load_speech_dataset
from skill_hf.encoders import FilterBank, PretrainedEncoder, feature_extractor_for
from skill_hf.files import keep_sources, read_json, try_directory, write_json
from skill_hf.models.loading import load_model
from skill_hf.superb import METRICS, MeasuredTask, results_page
from skill_hf.superb.evaluation import evaluate_task, prepare_examples
from skill_hf.superb.query_by_example import evaluate_query_by_example
from skill_hf.superb.registry import TASKS, Columns, load_task


logger = logging.getLogger("run_superb")

# What a head and its targets depend on beside the hidden states.
TASK_SETTINGS = (
    "label_column",
    "text_column",
    "speaker_column",
    "trials",
    "asv_head",
    "lexicon",
    "stress",
    "lstm_size",
    "time_unit",
)


@dataclass
class SuperbArguments:
    task: str = field(default="ks", metadata={"help": "SUPERB task to evaluate.", "choices": [*TASKS, "qbe"]})
    model: str = field(
        default=str(DEMO_STUDENT),
        metadata={
            "help": "Hub id or directory of a speech encoder, or fbank or mfcc; the student of `make demo` by default."
        },
    )
    untrained: bool = field(
        default=False, metadata={"help": "Initialise the model's weights at random, as a lower bound."}
    )
    dataset_name: str = field(
        default=str(DEMO_DATA / "keywords"),
        metadata={"help": "Hub id, or a local directory in any format that `datasets` can load."},
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    train_split: str = field(
        default="train",
        metadata={"help": "Split to train heads on, or with the documents of qbe; `a+b` concatenates two."},
    )
    validation_split: str | None = field(
        default=None, metadata={"help": "Split to select the head on; a part of the training split by default."}
    )
    validation_share: Annotated[float, Range(above=0, below=1)] = field(
        default=0.2,
        metadata={
            "help": "Share of the training split to use for validation, split by speaker if there is such a column."
        },
    )
    test_split: str = field(default="test", metadata={"help": "Split to test on."})
    folds: list[str] | None = field(
        default=None,
        metadata={"help": "Splits for cross-validation (er): each is tested once with heads trained on the others."},
    )
    audio_column: str = field(default="audio", metadata={"help": "Column with the audio."})
    label_column: list[str] | None = field(
        default=None,
        metadata={"help": "Name of the label column, three names for ic, or the column of segments for sd."},
    )
    text_column: str | None = field(
        default=None, metadata={"help": "Name of the column with text or phonemes; also for qbe."}
    )
    speaker_column: str | None = field(default=None, metadata={"help": "Name of the speaker column, for asv."})
    trials: str | None = field(
        default=None,
        metadata={"help": "File of trial pairs for asv, in VoxCeleb's format; all pairs of the test set by default."},
    )
    asv_head: str = field(
        default="x_vector", metadata={"help": "Type of the head for asv.", "choices": ["x_vector", "mean"]}
    )
    lexicon: str | None = field(
        default=None,
        metadata={"help": "Lexicon of words and phonemes for pr; the CMU pronouncing dictionary by default."},
    )
    stress: bool = field(
        default=True, metadata={"help": "Distinguish stressed from unstressed vowels, as SUPERB does."}
    )
    lstm_size: Annotated[int, Range(0, most=16384)] | None = field(
        default=None, metadata={"help": "Size of the LSTM; 1024 by default, 512 for sd."}
    )
    time_unit: Positive = field(
        default=1.0,
        metadata={"help": "Seconds per time unit of sd: 0.01 for the Hub's SUPERB, 0.0000625 for samples."},
    )
    max_seconds: Seconds | None = field(default=None, metadata={"help": "Length in seconds to crop clips to."})
    learning_rates: list[Positive] = field(
        default_factory=lambda: [1e-4, 1e-3, 1e-2], metadata={"help": "Learning rates to try."}
    )
    patience: Count = field(default=10, metadata={"help": "Evaluations without improvement before training stops."})
    superb_data: bool = field(
        default=False,
        metadata={"help": "Declare that the data are SUPERB's own splits, to compare with published results."},
    )
    cache_dir: str = field(
        default=str(REPOSITORY / "outputs" / "superb_cache"), metadata={"help": "Directory for the hidden states."}
    )
    cache_dtype: str = field(
        default="float16",
        metadata={"help": "Precision of the stored hidden states.", "choices": ["float16", "float32"]},
    )

    def __post_init__(self):
        if self.folds is not None and len(self.folds) < 2:
            raise ValueError("`folds` needs at least two splits.")
        if self.task == "qbe" and (self.folds is not None or self.validation_split is None):
            raise ValueError(
                "qbe needs `--validation_split`, a split with queries to choose the layer on, and no folds."
            )
        if self.untrained and self.model in FilterBank.KINDS:
            raise ValueError(f"`{self.model}` has no weights to initialise; leave out `--untrained`.")
        if not self.learning_rates:
            raise ValueError("`learning_rates` is empty; pass at least one.")


@dataclass
class HeadArguments(FineTuningArguments):
    """[`~transformers.TrainingArguments`] with other defaults: SUPERB's optimizer, on fewer steps."""

    output_dir: str = field(default=str(REPOSITORY / "outputs" / "superb"), metadata={"help": "Output directory."})
    max_steps: int = field(default=2000, metadata={"help": "Optimizer steps per learning rate."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Clips per step and device."})
    per_device_eval_batch_size: int = field(default=32, metadata={"help": "Clips per step and device in tests."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Learning rate schedule."})
    warmup_steps: float = field(default=0, metadata={"help": "Share of all steps (below 1) or a number of steps."})
    eval_strategy: str = field(default="steps", metadata={"help": "When to score the validation set."})
    eval_steps: float = field(default=200, metadata={"help": "Optimizer steps between scores of the validation set."})
    save_strategy: str = field(
        default="steps", metadata={"help": "When to save checkpoints; follows `eval_strategy`."}
    )
    save_steps: float = field(default=200, metadata={"help": "As `eval_steps`."})
    save_total_limit: int = field(
        default=1, metadata={"help": "Number of checkpoints to keep in addition to the best."}
    )
    load_best_model_at_end: bool = field(
        default=True, metadata={"help": "Test the head that is best on the validation set."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must be False."})

    def __post_init__(self):
        self.save_strategy, self.save_steps = self.eval_strategy, self.eval_steps
        super().__post_init__()


def load_encoder(args: SuperbArguments, seed: int, device: torch.device) -> PretrainedEncoder | FilterBank:
    if args.model in FilterBank.KINDS:
        return FilterBank(args.model)
    config = load_config(args.model)
    feature_extractor = feature_extractor_for(args.model, config)
    if args.untrained:
        set_seed(seed)
        model = AutoModel.from_config(config, dtype=torch.float32)
    else:
        model = load_model(args.model, config=config)
    return PretrainedEncoder(model.to(device), feature_extractor)


def fingerprint(encoder: PretrainedEncoder | FilterBank, splits: dict, args: SuperbArguments) -> str:
    """Of all that hidden states follow from: weights, clips and settings."""
    checksum = hashlib.sha256()
    if isinstance(encoder, PretrainedEncoder):
        checksum.update(encoder.model.config.to_json_string().encode())
        for name, tensor in sorted(encoder.model.state_dict().items()):
            checksum.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    for split, dataset in splits.items():
        checksum.update(f"{split} {dataset._fingerprint}".encode())
    checksum.update(f"{args.model} {args.max_seconds} {args.cache_dtype}".encode())
    return checksum.hexdigest()[:16]


def load_split(args: SuperbArguments, split: str) -> datasets.Dataset:
    return load_speech_dataset(
        args.dataset_name, args.dataset_config_name, split=split, audio_column=args.audio_column
    )


def load_splits(args: SuperbArguments, train: str, test: str, seed: int) -> dict[str, datasets.Dataset]:
    splits = {"train": load_split(args, train), "test": load_split(args, test)}
    if args.validation_split is not None:
        splits["validation"] = load_split(args, args.validation_split)
    else:
        splits["train"], splits["validation"] = hold_out(splits["train"], args, seed)
    return splits


def hold_out(dataset: datasets.Dataset, args: SuperbArguments, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Training and validation set. Where speakers are known and aren't the classes, none is in both."""
    rng = np.random.default_rng(seed)
    names = (args.speaker_column, "speaker", "speaker_id", "label" if args.task == "asv" else None)
    column = next((name for name in names if name in dataset.column_names), None)
    if column is None or args.task == "sid":
        return hold_out_clips(dataset, args, rng)
    speakers = np.array([str(speaker) for speaker in dataset[column]])
    known = sorted(set(speakers))
    size = max(2 if args.task == "asv" else 1, round(args.validation_share * len(known)))
    if size >= len(known):
        raise ValueError(
            f"The training set has {len(known)} speakers, too few to hold some out; pass a validation split."
        )
    chosen = np.isin(speakers, rng.permutation(known)[:size])
    return dataset.select(np.flatnonzero(~chosen)), dataset.select(np.flatnonzero(chosen))


def hold_out_clips(
    dataset: datasets.Dataset, args: SuperbArguments, rng: np.random.Generator
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Clips by chance, but never the last one of a class."""
    columns = args.label_column or [name for name in Columns.USUAL.get(args.task, ()) if name in dataset.column_names]
    classified = args.task in ("ks", "sid", "er") and columns and columns[0] in dataset.column_names
    classes = list(dataset[columns[0]]) if classified else [None] * len(dataset)
    left, chosen = Counter(classes), []
    for row in rng.permutation(len(dataset)):
        if len(chosen) < max(1, round(args.validation_share * len(dataset))) and left[classes[row]] > 1:
            left[classes[row]] -= 1
            chosen.append(row)
    if not chosen:
        raise ValueError(f"The training set has {len(dataset)} clips, too few to hold some out.")
    held = np.isin(np.arange(len(dataset)), chosen)
    return dataset.select(np.flatnonzero(~held)), dataset.select(np.flatnonzero(held))


def run_fold(args: SuperbArguments, head_args: HeadArguments, encoder, train: str, test: str, directory: Path) -> dict:
    splits = load_splits(args, train, test, head_args.seed)
    columns = Columns(args.label_column, args.text_column, args.speaker_column)
    task = load_task(
        args.task,
        splits["train"],
        columns,
        trials=args.trials,
        x_vector=args.asv_head == "x_vector",
        lexicon=args.lexicon,
        stress=args.stress,
        lstm_size=args.lstm_size,
        frame_seconds=encoder.frame_seconds,
        time_unit=args.time_unit,
        max_seconds=args.max_seconds,
    )
    key = fingerprint(encoder, splits, args) + ("-mean" if task.mean_over_time else "")
    examples = prepare_examples(task, encoder, splits, Path(args.cache_dir) / key, args.max_seconds, args.cache_dtype)
    head_args.output_dir = str(directory)
    settings = {name: getattr(args, name) for name in TASK_SETTINGS} | {"cache": key}
    return evaluate_task(task, examples, head_args, args.learning_rates, args.patience, settings)


def run_query_by_example(args: SuperbArguments, device: torch.device, encoder) -> dict:
    names = {"documents": args.train_split, "validation": args.validation_split, "test": args.test_split}
    splits = {split: load_split(args, name) for split, name in names.items()}
    column = Columns(text=args.text_column).of("qbe", splits["test"])
    cache_dir = Path(args.cache_dir) / fingerprint(encoder, splits, args)
    return evaluate_query_by_example(
        encoder, splits, column, cache_dir, args.max_seconds, args.cache_dtype, device=device
    )


def run(args: SuperbArguments, head_args: HeadArguments) -> None:
    path = Path(args.model)
    name = (path.resolve() if path.is_dir() else path).name + (" (untrained)" if args.untrained else "")
    model_dir = Path(head_args.output_dir) / re.sub(r"[^\w.-]+", "_", name)
    try_directory(model_dir)
    try_directory(args.cache_dir, "cache_dir")
    keep_sources(model_dir, {"model": args.model, "dataset_name": args.dataset_name})
    for task, task_results in read_results(model_dir).items():  # which this adds to
        if _place(str(task_results.get("model"))) != _place(args.model):
            raise ValueError(
                f"{model_dir} has results of {task} by {task_results.get('model')}, not by {args.model}; choose"
                " another `output_dir`."
            )
    encoder = load_encoder(args, head_args.seed, head_args.device)
    runs = {}
    if args.task == "qbe":
        runs["test"] = run_query_by_example(args, head_args.device, encoder)
    elif args.folds is None:
        runs["test"] = run_fold(args, head_args, encoder, args.train_split, args.test_split, model_dir / args.task)
    else:
        for fold in args.folds:
            train = "+".join(other for other in args.folds if other != fold)
            runs[fold] = run_fold(args, head_args, encoder, train, fold, model_dir / f"{args.task}_{fold}")
    scores = {
        metric: float(np.mean([run[metric] for run in runs.values()]))
        for metric in METRICS
        if all(metric in run for run in runs.values())
    }
    parameters = encoder.model.num_parameters() if isinstance(encoder, PretrainedEncoder) else 0
    if head_args.process_index == 0:
        report(model_dir, args, head_args, name, parameters, scores, runs)


def _place(model: str) -> str:
    return str(Path(model).resolve()) if Path(model).is_dir() else model


def read_results(model_dir: Path) -> dict[str, dict]:
    """`all_results.json`: task -> what was measured; empty if there is none."""
    path = model_dir / "all_results.json"
    results = read_json(path) if path.is_file() else {}
    if not isinstance(results, dict) or not all(
        isinstance(task_results, dict) and "scores" in task_results for task_results in results.values()
    ):
        raise ValueError(f"{path} was not written by this script; choose another `output_dir`.")
    return results


def report(model_dir, args, head_args, name: str, parameters: int, scores: dict, runs: dict) -> None:
    """Adds this task to `all_results.json`, and writes the table of all tasks that were measured."""
    model_dir.mkdir(parents=True, exist_ok=True)
    results = read_results(model_dir)
    results[args.task] = {
        "model": args.model,
        "parameters": parameters,
        "dataset": [args.dataset_name, args.dataset_config_name],
        "superb_data": args.superb_data,
        "scores": scores,
        "runs": runs,
        "seed": head_args.seed,
        "max_steps": head_args.max_steps,
        "batch_size": head_args.train_batch_size,
        "versions": {package.__name__: package.__version__ for package in (torch, transformers, datasets)},
    }
    write_json(model_dir / "all_results.json", results)
    measured = [
        MeasuredTask(
            task_results["scores"],
            " ".join(filter(None, task_results.get("dataset", ["?"]))),
            task_results.get("superb_data", False),
        )
        for task_results in results.values()
    ]
    page = results_page(name, measured, parameters / 1e6 or None)
    (model_dir / "superb.md").write_text(page, encoding="utf-8")
    for metric, value in scores.items():
        logger.info("%s: %.*f", METRICS[metric].label, METRICS[metric].digits, value)
    logger.info("%s", page)


def main(arguments: list[str] | None = None) -> int:
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO)
    logging.getLogger("skill_hf").setLevel(logging.INFO)
    return run_script(lambda: run(*parse(arguments, (SuperbArguments, HeadArguments))))


if __name__ == "__main__":
    sys.exit(main())
