"""Linear probes of the demo's teacher: compares its layers with the untrained network and MFCC.

Each clip becomes one vector, the mean over time of its features; the same classifier is used for every kind of
feature. Two tasks, on audio that `examples/pretrain_teacher.py` leaves out:

- *word*: ten keywords of Speech Commands, by speakers that neither the network nor the classifier was trained on;
- *speaker*: who reads a segment of 2 s of LibriSpeech, in recordings that neither was trained on.

    python examples/demo/probe_teacher.py --librispeech DIR/librispeech-train-clean-5 \\
        --speech_commands DIR/speech-commands-test --output probe.json

It prints a table in Markdown and writes all figures, per fold, to the JSON file.
"""

import os
import platform
import sys
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import transformers
from tqdm.auto import tqdm
from transformers import AutoModel, PreTrainedModel
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function
from transformers.trainer_utils import set_seed


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pretrain_teacher import RATE, WINDOW, heldout_split, mfcc, normalise  # noqa: E402
from speech_folders import read_metadata, read_speech  # noqa: E402

from skill_hf.cli.settings import Count, Range, Seed, parse, require, run_script  # noqa: E402
from skill_hf.files import try_file, write_json  # noqa: E402
from skill_hf.models.loading import load_model  # noqa: E402


KEYWORDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
SEGMENT_SECONDS = 2.0
SEGMENTS_PER_RECORDING = 4
NUM_FOLDS = 5
C_GRID = (0.01, 0.1, 1.0, 10.0)  # inverse strength of the L2 penalty


@dataclass
class ProbeArguments:
    librispeech: Path = field(metadata={"help": "Directory with metadata.csv (file_name, speaker) and audio."})
    speech_commands: Path = field(metadata={"help": "The same for one-second clips, with the column label."})
    output: Path = field(metadata={"help": "JSON file for the results."})
    teacher: Path = field(
        default=Path(__file__).resolve().parent / "teacher", metadata={"help": "Directory of the trained model."}
    )
    untrained_seeds: Count = field(
        default=3, metadata={"help": "Number of untrained models, each with a different seed."}
    )
    share: Annotated[float, Range(above=0, most=1)] = field(
        default=1.0, metadata={"help": "Share of the clips to use, for a quick test."}
    )
    seed: Seed = field(default=0, metadata={"help": "Seed of the folds; untrained models use the seeds that follow."})


@dataclass
class Task:
    """Clips (1-D float32 at 16 kHz), what the probe is to tell of each, and what must not span training and test."""

    clips: list[np.ndarray]
    labels: np.ndarray
    groups: np.ndarray


def columns_of(librispeech: bool) -> list[str]:
    return ["speaker"] if librispeech else ["speaker", "label"]


def heldout_rows(directory: Path, librispeech: bool, split: str, share: float) -> list[dict]:
    """Rows of `metadata.csv` that belong to `split`, thinned to `share` of them by a hash of the file name."""
    rows = [row for row in read_metadata(directory, columns_of(librispeech)) if row["speaker"]]
    return [
        row
        for row in rows
        if heldout_split(row["file_name"], row["speaker"], librispeech) == split
        # The hash is salted since `heldout_split` has used the plain one.
        and zlib.crc32(b"probe" + row["file_name"].encode()) < share * 2**32
    ]


def read_audio(path: Path) -> np.ndarray:
    audio = read_speech(path, RATE)
    if len(audio) < WINDOW:
        raise ValueError(f"{path} has {len(audio)} samples, but one frame needs {WINDOW}; leave it out.")
    return audio


def segments(audio: np.ndarray, seconds: float = SEGMENT_SECONDS, most: int = SEGMENTS_PER_RECORDING) -> np.ndarray:
    """At most `most` segments of `seconds`, `(segments, samples)`, without overlap and spread over the recording."""
    length = int(seconds * RATE)
    whole = audio[: len(audio) // length * length].reshape(-1, length)
    if len(whole) <= most:
        return whole
    return whole[np.linspace(0, len(whole) - 1, most).round().astype(int)]


def check_folds(directory: Path, rows: list[dict], group: str) -> None:
    if len({row[group] for row in rows}) < 2 * NUM_FOLDS:
        raise ValueError(
            f"{directory} has {len(rows)} clips to probe from fewer than {2 * NUM_FOLDS} different {group}s; use more"
            " clips or a larger `share`."
        )


def word_task(directory: Path, share: Annotated[float, Range(above=0, most=1)] = 1.0) -> Task:
    rows = [row for row in heldout_rows(directory, False, "speakers", share) if row["label"] in KEYWORDS]
    check_folds(directory, rows, "speaker")
    return Task(
        [read_audio(directory / row["file_name"]) for row in rows],
        np.array([row["label"] for row in rows]),
        np.array([row["speaker"] for row in rows]),
    )


def speaker_task(directory: Path, share: Annotated[float, Range(above=0, most=1)] = 1.0) -> Task:
    clips, labels, groups = [], [], []
    rows = heldout_rows(directory, True, "recordings", share)
    check_folds(directory, rows, "file_name")
    for row in rows:
        parts = segments(read_audio(directory / row["file_name"]))
        clips += list(parts)
        labels += [row["speaker"]] * len(parts)
        groups += [row["file_name"]] * len(parts)
    return Task(clips, np.array(labels), np.array(groups))


def log_mel(audio: np.ndarray) -> np.ndarray:
    """`(frames, 40)`, with the windows and filters of `mfcc`."""
    filters = mel_filter_bank(257, 40, 20.0, 7600.0, RATE, norm="slaney", mel_scale="slaney")
    return spectrogram(
        audio,
        window_function(400, "hann"),
        frame_length=400,
        hop_length=160,
        fft_length=512,
        power=2.0,
        center=False,
        mel_filters=filters,
        mel_floor=1e-8,
        log_mel="log",
    ).T


@torch.no_grad()
def mean_hidden_states(model: PreTrainedModel, clips: list[np.ndarray]) -> np.ndarray:
    """Mean over time of every hidden state, `(hidden states, clips, hidden size)`; index 0 enters the first layer."""
    model.eval()
    means = []
    for clip in tqdm(clips, desc="hidden states"):
        states = model(normalise(torch.from_numpy(clip))[None], output_hidden_states=True).hidden_states
        means.append(torch.stack(states)[:, 0].mean(1).numpy())
    return np.stack(means, axis=1)


def probe(features: np.ndarray, labels: np.ndarray, groups: np.ndarray, seed: int = 0) -> dict:
    """
    Accuracy of a multinomial logistic regression in a cross-validation whose folds share no group.

    Args:
        features (`np.ndarray` of shape `(clips, dimensions)`): one vector per clip.
        labels (`np.ndarray` of shape `(clips,)`): the class of each clip.
        groups (`np.ndarray` of shape `(clips,)`): clips of one group are never in training and test both.
        seed (`int`): seed of the folds; the same seed gives the same folds whatever the features.

    Returns:
        `dict`: `accuracy`, one per fold, and `C`, the penalty of each fold. It is chosen from `C_GRID` on a quarter of
        the fold's own training groups, so the test clips have no say.
    """
    accuracy, chosen = [], []
    for train, test in _folds(NUM_FOLDS, features, groups, seed):
        inner_train, inner_test = next(_folds(4, train, groups[train], seed))
        inner_train, inner_test = train[inner_train], train[inner_test]
        scores = [_accuracy(features, labels, inner_train, inner_test, C) for C in C_GRID]
        chosen.append(C_GRID[int(np.argmax(scores))])
        accuracy.append(_accuracy(features, labels, train, test, chosen[-1]))
    return {"accuracy": accuracy, "C": chosen}


def _folds(number: int, features: np.ndarray, groups: np.ndarray, seed: int):
    from sklearn.model_selection import GroupKFold

    return GroupKFold(number, shuffle=True, random_state=seed).split(features, groups=groups)


def _accuracy(features: np.ndarray, labels: np.ndarray, train: np.ndarray, test: np.ndarray, C: float) -> float:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=1000, tol=1e-3))
    return float(classifier.fit(features[train], labels[train]).score(features[test], labels[test]))


def probe_task(task: Task, teacher: PreTrainedModel, untrained: list[PreTrainedModel], seed: int) -> dict:
    """`probe` for MFCC, log-mel and each hidden state of each network."""

    def all_layers(model):
        return [probe(layer, task.labels, task.groups, seed) for layer in mean_hidden_states(model, task.clips)]

    floors = {
        name: probe(np.stack([frames(clip).mean(0) for clip in task.clips]), task.labels, task.groups, seed)
        for name, frames in (("mfcc", mfcc), ("log_mel", log_mel))
    }
    return {
        "clips": len(task.clips),
        "classes": len(set(task.labels)),
        "groups": len(set(task.groups)),
        "largest_class": float(max(np.mean(task.labels == label) for label in set(task.labels))),
        **floors,
        "trained": all_layers(teacher),
        "untrained": [all_layers(model) for model in untrained],
    }


def table(tasks: dict[str, dict]) -> str:
    """The figures in percent, as Markdown; a bold one is the best of its column."""
    names = list(tasks)
    lines = ["| features | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]

    def add(title: str, cells: list[str]):
        lines.append(f"| {title} | " + " | ".join(cells) + " |")

    add("largest class", [f"{100 * tasks[name]['largest_class']:.1f}" for name in names])
    for key, title in (("mfcc", "MFCC, 39"), ("log_mel", "log-mel, 40")):
        add(title, [_percent(tasks[name][key]["accuracy"]) for name in names])
    best = {name: best_layer(tasks[name]["trained"]) for name in names}
    layers = range(len(tasks[names[0]]["trained"]))
    for layer in layers:
        cells = [_percent(tasks[name]["trained"][layer]["accuracy"]) for name in names]
        add(
            f"trained, hidden state {layer}",
            [f"**{cell}**" if best[name] == layer else cell for name, cell in zip(names, cells, strict=True)],
        )
    for layer in layers:
        means = [[np.mean(network[layer]["accuracy"]) for network in tasks[name]["untrained"]] for name in names]
        add(f"untrained, hidden state {layer}", [_percent(values) for values in means])
    return "\n".join(lines)


def best_layer(layers: list[dict]) -> int:
    return int(np.argmax([np.mean(layer["accuracy"]) for layer in layers]))


def _percent(values: list[float]) -> str:
    return f"{100 * np.mean(values):.1f} ± {100 * np.std(values):.1f}"


def verdict(name: str, task: dict) -> str:
    """Best layer against the floors, fold by fold: all of them were tested on the same folds."""
    best = best_layer(task["trained"])
    accuracy = np.array(task["trained"][best]["accuracy"])
    # The strongest layer of the strongest untrained network, though one could not know it beforehand.
    floor = max((layer for network in task["untrained"] for layer in network), key=lambda x: np.mean(x["accuracy"]))
    rivals = {"MFCC": task["mfcc"], "log-mel": task["log_mel"], "best untrained": floor}
    against = ", ".join(
        f"{rival} {100 * np.mean(other['accuracy']):.1f} (better in {np.sum(accuracy > other['accuracy'])} of"
        f" {len(accuracy)} folds)"
        for rival, other in rivals.items()
    )
    return f"{name}: hidden state {best} has {_percent(accuracy)} % against {against}."


def run(args: ProbeArguments) -> None:
    require("sklearn", "scikit-learn", "Probes need")
    import sklearn

    try_file(args.output)
    teacher = load_model(str(args.teacher))
    config = teacher.config
    untrained = []
    for offset in range(args.untrained_seeds):
        set_seed(args.seed + offset)
        untrained.append(AutoModel.from_config(config))
    tasks = {
        "word": probe_task(word_task(args.speech_commands, args.share), teacher, untrained, args.seed),
        "speaker": probe_task(speaker_task(args.librispeech, args.share), teacher, untrained, args.seed),
    }
    result = {
        "tasks": tasks,
        "folds": NUM_FOLDS,
        "C_grid": C_GRID,
        "seed": args.seed,
        "untrained_seeds": [args.seed + offset for offset in range(args.untrained_seeds)],
        "share": args.share,
        "machine": {"system": platform.system(), "processor": platform.machine(), "cores": os.cpu_count()},
        "versions": {
            "python": platform.python_version(),
            **{module.__name__: module.__version__ for module in (torch, transformers, sklearn, np)},
        },
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.output, result)
    print(table(tasks))
    for name, task in tasks.items():
        print("\n" + verdict(name, task))


def main(arguments: list[str] | None = None) -> int:
    return run_script(lambda: run(*parse(arguments, (ProbeArguments,))))


if __name__ == "__main__":
    sys.exit(main())
