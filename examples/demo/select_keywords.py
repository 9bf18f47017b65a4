"""Picks the keywords that the demo ships: clips of Speech Commands, copied as they are, balanced by word and speaker.

    python examples/demo/select_keywords.py --source DIR/speech-commands-test --output examples/demo/keywords

`test` has speakers that the demo's teacher was not trained on, `train` has speakers of its training set. The same seed
picks the same files on every machine.
"""

import hashlib
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pretrain_teacher import RATE, heldout_split  # noqa: E402
from probe_teacher import KEYWORDS  # noqa: E402
from select_audio import check_folders, copy_clips  # noqa: E402
from speech_folders import read_metadata, speech_info  # noqa: E402

from skill_hf.cli.settings import Count, Seed, parse, run_script  # noqa: E402


COLUMNS = ("file_name", "label", "speaker")
SPLITS = {"train": "train", "test": "speakers"}  # folder -> what `heldout_split` calls its clips


@dataclass
class SelectArguments:
    source: Path = field(metadata={"help": "Directory with audio and metadata.csv (file_name, label, speaker)."})
    output: Path = field(metadata={"help": "Output directory for the folders train and test."})
    train_clips: Count = field(default=40, metadata={"help": "Clips per word in train."})
    test_clips: Count = field(default=25, metadata={"help": "Clips per word in test."})
    seed: Seed = field(default=0, metadata={"help": "Seed of the order in which clips are chosen."})


def select(rows: list[dict], clips_per_word: int, seed: int = 0) -> list[dict]:
    """
    Takes a clip of each word in turn, always of the speaker who has the fewest so far.

    Args:
        rows (`list[dict]`): clips with `file_name`, `label` and `speaker`.
        clips_per_word (`int`): clips of each of `KEYWORDS`.
        seed (`int`): seed of the order among speakers who have equally few.

    Returns:
        `list[dict]`: the chosen rows, ordered by file name.

    Raises:
        `ValueError`: if a word has fewer clips.
    """
    # A hash gives the same order on every version of every library.
    ordered = sorted(rows, key=lambda row: hashlib.sha256(f"{seed} {row['file_name']}".encode()).hexdigest())
    waiting = {word: [row for row in ordered if row["label"] == word] for word in KEYWORDS}
    taken, chosen = Counter(), []
    for _ in range(clips_per_word):
        for word, clips in waiting.items():
            if not clips:
                raise ValueError(f"There are fewer than {clips_per_word} clips of `{word}`; request fewer.")
            row = min(clips, key=lambda row: taken[row["speaker"]])
            clips.remove(row)
            taken[row["speaker"]] += 1
            chosen.append(row)
    return sorted(chosen, key=lambda row: row["file_name"])


def run(args: SelectArguments) -> None:
    check_folders(args.output, list(SPLITS))
    rows = [row for row in read_metadata(args.source, COLUMNS[1:]) if row["label"] in KEYWORDS]
    numbers = {"train": args.train_clips, "test": args.test_clips}
    splits = {}
    for name, heldout in SPLITS.items():  # all before any is copied
        split = [row for row in rows if heldout_split(row["file_name"], row["speaker"], librispeech=False) == heldout]
        splits[name] = select(split, numbers[name], args.seed)
        for row in splits[name]:
            speech_info(args.source / row["file_name"], RATE)
    for name, chosen in splits.items():
        # A speaker's clips of two words may have one name: the folders of the words stay.
        size = copy_clips(args.source, args.output / name, chosen, COLUMNS)
        by_speaker = Counter(row["speaker"] for row in chosen)
        print(
            f"{name}: {len(chosen)} clips, {numbers[name]} of each of {len(KEYWORDS)} words, {len(by_speaker)}"
            f" speakers with {min(by_speaker.values())} to {max(by_speaker.values())} each, {size / 1e6:.2f} MB"
        )


def main(arguments: list[str] | None = None) -> int:
    return run_script(lambda: run(*parse(arguments, (SelectArguments,))))


if __name__ == "__main__":
    sys.exit(main())
