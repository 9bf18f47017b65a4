"""
Removes layers of a speech encoder without training, in each order of `skill-hf shorten`, and measures how far the rest
is from the whole encoder on speech that it has not heard.

    python examples/study/drop_layers.py
    python examples/study/drop_layers.py --teacher examples/study/teacher

Offline, in a few minutes on 2 CPU cores. The last hidden state is what most users of an encoder read; the mean is over
all hidden states, where a layer that was removed is taken to return its input. `--output` saves the results as JSON.
"""

import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch


sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

from draw_study import number, table  # noqa: E402
from example_utils import DEMO_DATA, print_table  # noqa: E402
from run_study import machine  # noqa: E402

from skill_hf import layer_similarity  # noqa: E402
from skill_hf.analysis import layer_distances  # noqa: E402
from skill_hf.cli.settings import Count, Seconds, Seed, parse, run_script  # noqa: E402
from skill_hf.compression.layer_dropping import block_influence, drop_layers, layers_to_drop  # noqa: E402
from skill_hf.data import calibration_waveforms  # noqa: E402
from skill_hf.data.speech_datasets import load_audio_dir  # noqa: E402
from skill_hf.encoders import feature_extractor_for  # noqa: E402
from skill_hf.models.families import load_student  # noqa: E402


# Name in the table -> order and, for `influence`, the measure.
ORDERS = {
    "influence, cosine": ("influence", "cosine"),
    "influence, mutual k-NN": ("influence", "mutual_knn"),
    "influence, CKA": ("influence", "cka"),
    "from the bottom": ("bottom", None),
    "from the top": ("top", None),
}


@dataclass
class DropArguments:
    teacher: str = field(default=str(DEMO_DATA / "teacher"), metadata={"help": "Hub id or directory of the encoder."})
    audio_dir: str = field(
        default=str(DEMO_DATA / "audio" / "train"), metadata={"help": "Folder of audio to measure influence on."}
    )
    eval_audio_dir: str = field(
        default=str(DEMO_DATA / "audio" / "heldout"), metadata={"help": "Folder of audio to measure distances on."}
    )
    num_dropped: list[int] = field(
        default_factory=lambda: [1, 2, 4], metadata={"help": "How many layers to remove, several numbers."}
    )
    max_clips: Count = field(default=24, metadata={"help": "Clips of each folder."})
    max_seconds: Seconds = field(default=3.0, metadata={"help": "Length to crop clips to, in seconds."})
    seed: Seed = field(default=0, metadata={"help": "Of the choice of clips and crops."})
    output: Path | None = field(default=None, metadata={"help": "JSON file for the results."})


def measure(args: DropArguments) -> dict:
    """
    Distances, `1 - CKA`, by order and number of layers removed.

    Raises:
        `ValueError`: if the model or the audio cannot be used, or it has too few layers.
    """
    teacher = load_student(args.teacher).eval()
    layers = teacher.config.num_hidden_layers
    for count in args.num_dropped:
        layers_to_drop(layers, count, "top")  # an impossible number is an error before any audio is read
    extractor = feature_extractor_for(args.teacher, teacher.config)
    train, heldout = (
        list(calibration_waveforms(load_audio_dir(folder), args.max_clips, args.max_seconds, args.seed, extractor))
        for folder in (args.audio_dir, args.eval_audio_dir)
    )
    rows, known = [], {}
    for name, (order, similarity) in ORDERS.items():
        influence = None
        if order == "influence":
            influence = block_influence(layer_similarity(teacher, train, similarity, seed=args.seed))
        for count in args.num_dropped:
            dropped = layers_to_drop(layers, count, order, influence)
            if tuple(dropped) not in known:
                shorter = drop_layers(teacher, dropped)
                known[tuple(dropped)] = {
                    "parameters": shorter.num_parameters(),
                    "distances": layer_distances(teacher, shorter, heldout, progress=False)["cka"].round(6).tolist(),
                }
            rows.append({"order": name, "removed": [layer + 1 for layer in dropped], **known[tuple(dropped)]})
    settings = {name: getattr(args, name) for name in ("max_clips", "max_seconds", "seed")}
    sizes = {"layers": layers, "parameters": teacher.num_parameters()}
    return sizes | {"rows": rows, "settings": settings, "machine": machine(torch.device("cpu"))}


def markdown(results: dict) -> str:
    """A row for each order: distance of the last hidden state, and in brackets the layers that were removed."""
    rows, sizes = {}, {}
    for row in results["rows"]:
        removed = ", ".join(map(str, row["removed"]))
        rows.setdefault(row["order"], []).append(f"{number(row['distances'][-1], 3)} ({removed})")
        sizes[len(row["removed"])] = f"{row['parameters']:,}"
    header = [f"order, of {results['layers']} layers", *(f"{count} removed" for count in sizes)]
    return table(header, [*([order, *cells] for order, cells in rows.items()), ["*parameters left*", *sizes.values()]])


def main(arguments: list[str] | None = None) -> int:
    logging.basicConfig(format="%(message)s")
    return run_script(lambda: print_table(measure, markdown, *parse(arguments, (DropArguments,))))


if __name__ == "__main__":
    sys.exit(main())
