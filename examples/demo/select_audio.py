"""Picks the speech that the demo ships: whole utterances of Mini LibriSpeech, copied as they are, balanced by speaker.

    python examples/demo/select_audio.py --source DIR/librispeech-train-clean-5 --output examples/demo/audio

`heldout` has speakers that neither the teacher nor the student is trained on. `train` has recordings of the others
that the teacher was trained on; the remaining ones are reserved for `probe_teacher.py`. The same seed picks the same
files on every machine.
"""

import csv
import hashlib
import shutil
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pretrain_teacher import RATE, heldout_split  # noqa: E402
from speech_folders import read_metadata, speech_info  # noqa: E402

from skill_hf.cli.settings import Positive, Seed, parse, run_script  # noqa: E402
from skill_hf.files import try_directory  # noqa: E402


COLUMNS = ("file_name", "speaker", "chapter", "text")
SPLITS = {"train": "train", "heldout": "speakers"}  # folder -> what `heldout_split` calls its utterances


@dataclass
class SelectArguments:
    source: Path = field(
        metadata={"help": "Directory with audio and metadata.csv (file_name, speaker, chapter, text)."}
    )
    output: Path = field(metadata={"help": "Output directory for the folders train and heldout."})
    train_megabytes: Positive = field(default=4.5, metadata={"help": "Maximum size of train, in units of 10^6 bytes."})
    heldout_megabytes: Positive = field(
        default=1.0, metadata={"help": "Maximum size of heldout, in units of 10^6 bytes."}
    )
    seed: Seed = field(default=0, metadata={"help": "Seed of the order in which a speaker's utterances are chosen."})


def select(rows: list[dict], budget: int, seed: int = 0) -> list[dict]:
    """
    Takes utterances in turn from the speaker who has the fewest seconds so far, until the next one exceeds the budget.

    Args:
        rows (`list[dict]`): utterances with `file_name`, `speaker`, `bytes` and `seconds`.
        budget (`int`): most bytes in all.
        seed (`int`): seed of the order within a speaker.

    Returns:
        `list[dict]`: the chosen rows, ordered by file name.

    Raises:
        `ValueError`: if the budget is too small for one utterance of each speaker.
    """
    waiting = defaultdict(list)
    # A hash gives the same order on every version of every library; the last item is taken first.
    for row in sorted(rows, key=lambda row: hashlib.sha256(f"{seed} {row['file_name']}".encode()).hexdigest()):
        waiting[row["speaker"]].append(row)
    seconds = dict.fromkeys(sorted(waiting), 0.0)
    chosen, used = [], 0
    while seconds:
        speaker = min(seconds, key=seconds.get)
        if not waiting[speaker]:
            del seconds[speaker]
            continue
        row = waiting[speaker].pop()
        if used + row["bytes"] > budget:
            break
        chosen.append(row)
        used += row["bytes"]
        seconds[speaker] += row["seconds"]
    if len({row["speaker"] for row in chosen}) < len(waiting):
        raise ValueError(
            f"{budget} bytes are too few for an utterance of each of {len(waiting)} speakers; raise the limit."
        )
    return sorted(chosen, key=lambda row: row["file_name"])


def copy_clips(source: Path, folder: Path, rows: list[dict], columns: Sequence[str]) -> int:
    """
    Copies clips, to the path `target` or else under their own, and writes `metadata.csv` beside them.

    Args:
        source (`Path`): directory that `file_name` starts at.
        folder (`Path`): directory to make.
        rows (`list[dict]`): clips with `columns` and, where the copy has another path, `target`.
        columns (`Sequence[str]`): columns of `metadata.csv`, the first of which is `file_name`.

    Returns:
        `int`: bytes of audio.
    """
    folder.mkdir(parents=True)
    size = 0
    with open(folder / "metadata.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        for row in rows:
            target = row.get("target", row["file_name"])
            (folder / target).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / row["file_name"], folder / target)
            size += (folder / target).stat().st_size
            writer.writerow([target, *(row[column] for column in columns[1:])])
    return size


def check_folders(output: Path, names: Sequence[str]) -> None:
    """
    Raises:
        `ValueError`: if one of these folders exists in `output`, or none can be made there.
    """
    try_directory(output, "output")
    for name in names:
        if (output / name).exists():
            raise ValueError(f"{output / name} already exists; remove it, or choose another `output`.")


def run(args: SelectArguments) -> None:
    check_folders(args.output, list(SPLITS))
    rows = read_metadata(args.source, COLUMNS[1:])
    for row in rows:
        path = args.source / row["file_name"]
        row["seconds"] = speech_info(path, RATE).duration
        row["bytes"] = path.stat().st_size
        row["split"] = heldout_split(row["file_name"], row["speaker"], librispeech=True)
    megabytes = {"train": args.train_megabytes, "heldout": args.heldout_megabytes}
    splits = {
        name: select([row for row in rows if row["split"] == split], int(megabytes[name] * 1e6), args.seed)
        for name, split in SPLITS.items()
    }  # all before any is copied
    for name, chosen in splits.items():
        if not chosen:
            raise ValueError(f"{args.source} has no utterances for {name}.")
        for row in chosen:
            row["target"] = Path(row["file_name"]).name
        if len({row["target"] for row in chosen}) < len(chosen):
            raise ValueError(f"Utterances of {args.source} in different folders have the same name; rename them.")
    for name, chosen in splits.items():
        size = copy_clips(args.source, args.output / name, chosen, COLUMNS)
        seconds = defaultdict(float)
        for row in chosen:
            seconds[row["speaker"]] += row["seconds"]
        print(
            f"{name}: {len(chosen)} utterances, {sum(seconds.values()) / 60:.1f} minutes, {len(seconds)} speakers with"
            f" {min(seconds.values()):.0f} to {max(seconds.values()):.0f} s each,"
            f" {size / 1e6:.2f} MB"
        )


def main(arguments: list[str] | None = None) -> int:
    return run_script(lambda: run(*parse(arguments, (SelectArguments,))))


if __name__ == "__main__":
    sys.exit(main())
