"""What the tests of several examples share: their path, a tiny student on disk, command lines, shipped clips."""

import contextlib
import csv
import io
import shutil
import sys
from pathlib import Path

import datasets
import huggingface_hub
import torch
from conftest import tiny_teacher
from transformers import Wav2Vec2FeatureExtractor

from skill_hf.models.families import build_student


EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
DEMO = EXAMPLES / "demo"
sys.path[:0] = [str(EXAMPLES), str(DEMO)]


# What a test needs that is about something else; a frame is of 340 samples, not of 400.
FEW_CONVOLUTIONS = {"conv_dim": (16, 16), "conv_kernel": (40, 16), "conv_stride": (20, 16)}


def save_student(directory: Path, layout: str = "base", **kwargs) -> Path:
    """A pruned student of two layers, the second of which has neither heads nor feed-forward units."""
    student = build_student(tiny_teacher(layout, num_hidden_layers=2, mask_time_prob=0.5, **kwargs))
    student.add_gates(["attention_heads", "ffn_dims"])
    with torch.no_grad():
        for name, gate in student.named_gates():
            gate.log_alpha.fill_(30.0)
            gate.log_alpha[1 if "layers.0." in name else 0 :] = -30.0
            if "layers.0." in name:
                gate.log_alpha[2:] = 30.0
    student.prune()
    assert student.config.remaining_heads == [[0, 2, 3], []]
    student.save_pretrained(directory)
    return save_feature_extractor(directory)


def save_feature_extractor(directory: Path) -> Path:
    Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True).save_pretrained(directory)
    return directory


def read_metadata(directory: Path) -> list[dict]:
    with open(directory / "metadata.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def copy_clips(source: Path, target: Path, rows: list[dict]) -> Path:
    """An `audiofolder` of some clips of another."""
    target.mkdir(parents=True)
    with open(target / "metadata.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        (target / row["file_name"]).parent.mkdir(exist_ok=True)
        shutil.copy(source / row["file_name"], target / row["file_name"])
    return target


def isolate(tmp_path_factory, monkeypatch) -> None:
    """A cache of datasets for one test, and no Hub."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def command_line(settings: dict) -> list[str]:
    words = []
    for name, value in settings.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def run_main(example, settings: dict) -> tuple[int, list[str], list[str]]:
    """Exit status, lines of standard output, lines of standard error that name an error."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = example.main(command_line(settings))
    errors = [line for line in err.getvalue().splitlines() if line.startswith("error")]
    return status, out.getvalue().splitlines(), errors
