"""Evaluates an encoder of the study on four of SUPERB's tasks on held-out speech, small enough for every student."""

import sys
import tempfile
import zlib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import datasets
import torch
from transformers import TrainingArguments


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pretrain_teacher import RATE, heldout_split  # noqa: E402
from speech_folders import read_metadata, speech_info  # noqa: E402

from skill_hf.encoders import FilterBank, PretrainedEncoder  # noqa: E402
from skill_hf.superb.evaluation import evaluate_task, prepare_examples  # noqa: E402
from skill_hf.superb.registry import load_task  # noqa: E402


TASKS = ("ks", "asv", "sid", "pr")
METRICS = ("ks_accuracy", "asv_eer", "sid_accuracy", "pr_per")
MAX_SECONDS = {"ks": 1.0, "asv": 1.0, "sid": 2.0, "pr": None}
LEARNING_RATES = (1e-3, 3e-3, 1e-2, 3e-2)
STEPS = {"ks": 300, "asv": 300, "sid": 300, "pr": 150}
BATCH = {"ks": 64, "asv": 64, "sid": 64, "pr": 8}


def read_rows(directory: Path, librispeech: bool) -> list[dict]:
    """Rows of `metadata.csv` with the absolute path in `audio` and, by [`heldout_split`], `split`."""
    rows = read_metadata(directory, ["speaker", "text"] if librispeech else ["speaker", "label"])
    for row in rows:
        row["split"] = heldout_split(row["file_name"], row["speaker"], librispeech)
        row["audio"] = str((directory / row["file_name"]).resolve())
    return rows


def draw(rows: list[dict], count: int) -> list[dict]:
    """`count` rows that look like chance and depend on their names alone."""
    return sorted(rows, key=lambda row: zlib.crc32(row["file_name"][::-1].encode()))[:count]


def by(rows: list[dict], column: str) -> dict[str, list[dict]]:
    groups = defaultdict(list)
    for row in rows:
        groups[row[column]].append(row)
    return groups


def as_dataset(rows: list[dict], columns: tuple[str, ...]) -> datasets.Dataset:
    dataset = datasets.Dataset.from_dict({name: [row[name] for row in rows] for name in ("audio", *columns)})
    return dataset.cast_column("audio", datasets.Audio(decode=False))


def speech_to_distil(librispeech: Path) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Speech that the teacher was pretrained on, and that of four readers whom no model has heard."""
    rows = read_rows(librispeech, True)
    return tuple(as_dataset([row for row in rows if row["split"] == split], ()) for split in ("train", "speakers"))


def probe_splits(librispeech: Path, speech_commands: Path) -> dict[str, dict[str, datasets.Dataset]]:
    """
    Task -> split -> clips.

    - Keywords (11 classes: without silence, which has no speaker) and verification: 640 clips of known speakers to
      train on, 160 clips of other speakers to choose by, 600 clips of speakers whom no encoder and no head has heard.
    - Identification of 24 readers: 16 recordings of each, 4 of each to choose by, one in five of all that no encoder
      has heard.
    - Phonemes: 160 recordings, 40 of other readers to choose by, 60 of four readers whom nobody has heard.
    """
    commands = [row for row in read_rows(speech_commands, False) if row["speaker"]]
    known, unknown = (by(commands, "split")[name] for name in ("train", "speakers"))
    chosen = [row for row in known if zlib.crc32(row["speaker"][::-1].encode()) % 5 == 0]
    training = [row for row in known if zlib.crc32(row["speaker"][::-1].encode()) % 5]
    keywords = {
        "train": as_dataset(draw(training, 640), ("label", "speaker")),
        "validation": as_dataset(draw(chosen, 160), ("label", "speaker")),
        "test": as_dataset(draw(unknown, 600), ("label", "speaker")),
    }
    books = read_rows(librispeech, True)
    for row in books:
        row["seconds"] = speech_info(row["audio"], RATE).duration
    readers = {reader: draw(rows, 20) for reader, rows in by(by(books, "split")["train"], "speaker").items()}
    heard = by(books, "split")
    speakers = {
        "train": as_dataset([row for rows in readers.values() for row in rows[:16]], ("speaker",)),
        "validation": as_dataset([row for rows in readers.values() for row in rows[16:]], ("speaker",)),
        "test": as_dataset(heard["recordings"], ("speaker",)),
    }
    short = [row for row in books if 3 <= row["seconds"] <= 9]
    others = sorted(readers)[:4]
    phonemes = {
        "train": [row for row in short if row["split"] == "train" and row["speaker"] not in others],
        "validation": [row for row in short if row["split"] == "train" and row["speaker"] in others],
        "test": [row for row in short if row["split"] == "speakers"],
    }
    sizes = {"train": 160, "validation": 40, "test": 60}
    return {
        "ks": keywords,
        "asv": keywords,
        "sid": speakers,
        "pr": {split: as_dataset(draw(rows, sizes[split]), ("text",)) for split, rows in phonemes.items()},
    }


def probe(
    encoder: PretrainedEncoder | FilterBank,
    splits: dict[str, dict[str, datasets.Dataset]],
    seeds: Sequence[int],
    learning_rates: dict[str, Sequence[float]] | None = None,
) -> dict[str, list[dict]]:
    """
    Trains and scores a head for each task and seed; all share one pass of the encoder.

    Args:
        encoder: frozen.
        splits: of [`probe_splits`].
        seeds: of the heads. The first tries all learning rates, the others take the one that was best for it.
        learning_rates: for each task; by default [`LEARNING_RATES`] for all.

    Returns:
        `dict[str, list[dict]]`: task -> for each seed what [`~skill_hf.superb.evaluation.evaluate_task`] returns.
    """
    results = {task: [] for task in TASKS}
    with tempfile.TemporaryDirectory() as directory:
        for name in TASKS:
            task = load_task(name, splits[name]["train"], x_vector=False, stress=False)
            shared = "commands" if name in ("ks", "asv") else name
            examples = prepare_examples(task, encoder, splits[name], Path(directory, shared), MAX_SECONDS[name])
            rates = LEARNING_RATES if learning_rates is None else learning_rates[name]
            for seed in seeds:
                args = TrainingArguments(
                    output_dir=str(Path(directory, "heads", name, str(seed))),
                    max_steps=STEPS[name],
                    per_device_train_batch_size=BATCH[name],
                    per_device_eval_batch_size=32,
                    lr_scheduler_type="constant",
                    eval_strategy="steps",
                    eval_steps=STEPS[name] // 3,
                    save_total_limit=1,
                    save_only_model=True,
                    logging_strategy="no",
                    report_to="none",
                    disable_tqdm=True,
                    dataloader_pin_memory=torch.cuda.is_available(),
                    seed=seed,
                )
                results[name].append(evaluate_task(task, examples, args, rates))
                rates = [results[name][0]["learning_rate"]]
    return results
