"""
Writes the hidden states of a student, or of any speech encoder, one file for each clip.

Of the demo's held-out speech, by the student that `make demo` leaves, offline:

    python examples/extract_hidden_states.py

Of a folder of audio (wav, flac, mp3, ogg, opus; any rate): two of the hidden states, in half precision:

    python examples/extract_hidden_states.py --model you/wavlm-base-plus-skill --audio_dir recordings \\
        --layers 6 9 --dtype bfloat16 --save_dtype float16 --batch_seconds 600 --output_dir hidden_states

Of a dataset: one vector for each layer, the mean over time, as numpy arrays that are named by a column:

    python examples/extract_hidden_states.py --model you/wavlm-base-plus-skill \\
        --dataset_name openslr/librispeech_asr --dataset_config_name clean --split test --id_column id \\
        --mean_over_time --file_format npy --output_dir hidden_states

Every file holds one array of shape `(layers, frames, hidden size)`, or `(layers, hidden size)` for means, in the order
of `--layers`; 0 is what enters the first layer. In safetensors its name is `hidden_states`. `index.csv` lists the
clips, their files, and how many samples and frames they have. The same command goes on with a run that was stopped.

Hidden states are those of the clip alone, whatever is beside it in a batch: to 1e-4 in float32. Students and models
with layer norms ignore padding. Other models with a group norm, such as WavLM Base, can't: with these, only clips of
the very same length share a batch.
"""

import csv
import json
import logging
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import datasets
import numpy as np
import torch
from example_utils import (
    DEMO_DATA,
    DEMO_STUDENT,
    check_column,
    complain,
    load_config,
    load_feature_extractor,
    parse,
)
from run_skill import REPOSITORY
from safetensors.numpy import save_file
from tqdm.auto import tqdm
from transformers import AutoModel

from skill_hf.data import AudioError, load_audio_dir, load_speech_dataset, read_audio
from skill_hf.encoders import PretrainedEncoder, make_batches


logger = logging.getLogger("extract_hidden_states")

COLUMNS = ("clip", "file_name", "samples", "frames")


@dataclass
class ExtractArguments:
    model: str = field(
        default=str(DEMO_STUDENT),
        metadata={"help": "Hub id or directory of a speech encoder; by default what `make demo` leaves."},
    )
    audio_dir: str | None = field(
        default=None, metadata={"help": "Folder of audio, with all below it; by default the demo's held-out speech."}
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Hub id, or a local directory in any form that `datasets` reads."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    split: str = field(default="train", metadata={"help": "Split of the dataset."})
    audio_column: str = field(default="audio", metadata={"help": "Column of the dataset with the audio."})
    id_column: str | None = field(
        default=None, metadata={"help": "Column of the dataset that names each clip; by default its row does."}
    )
    output_dir: str = field(
        default=str(REPOSITORY / "outputs" / "hidden_states"), metadata={"help": "Where the files go."}
    )
    layers: list[int] | None = field(
        default=None, metadata={"help": "Hidden states to keep, from 0 or, counted from the end, -1; by default all."}
    )
    mean_over_time: bool = field(default=False, metadata={"help": "Keep the mean over the frames of each clip."})
    file_format: str = field(
        default="safetensors", metadata={"help": "Kind of file.", "choices": ["safetensors", "npy"]}
    )
    dtype: str = field(
        default="float32", metadata={"help": "Precision to compute in.", "choices": ["float32", "bfloat16"]}
    )
    save_dtype: str = field(
        default="float32", metadata={"help": "Precision to save in.", "choices": ["float32", "float16"]}
    )
    max_seconds: float | None = field(
        default=None, metadata={"help": "Length in seconds that clips are cropped to; by default they stay whole."}
    )
    batch_seconds: float = field(
        default=60.0, metadata={"help": "Most audio in a batch in seconds, padding included."}
    )
    buffer_clips: int = field(default=256, metadata={"help": "Clips that are sorted by length at a time."})
    device: str | None = field(default=None, metadata={"help": "Such as cpu or cuda:1; by default a GPU if there is."})

    def __post_init__(self):
        if self.audio_dir is not None and self.dataset_name is not None:
            raise ValueError("Give the speech by either `audio_dir` or `dataset_name`.")
        if self.audio_dir is None and self.dataset_name is None:
            self.audio_dir = str(DEMO_DATA / "audio" / "heldout")
        if self.id_column is not None and self.dataset_name is None:
            raise ValueError("`id_column` is a column of `dataset_name`; files of `audio_dir` have names.")
        for name in ("batch_seconds", "buffer_clips", "max_seconds"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"`{name}` must be above 0, but is {value}.")
        if self.device is None:
            self.device = "cuda" if torch.cuda.is_available() else "cpu"


def load_clips(args: ExtractArguments) -> tuple[datasets.Dataset, list[str]]:
    """Rows with `audio`, not decoded, and the name of each."""
    if args.audio_dir is not None:
        dataset = load_audio_dir(args.audio_dir)
        return dataset, [os.path.relpath(audio["path"], args.audio_dir) for audio in dataset["audio"]]
    dataset = load_speech_dataset(
        args.dataset_name, args.dataset_config_name, split=args.split, audio_column=args.audio_column
    )
    check_column(dataset, "audio", "audio_column")
    if args.id_column is None:
        return dataset, [f"{row:08d}" for row in range(len(dataset))]
    check_column(dataset, args.id_column, "id_column")
    names = [str(name) for name in dataset[args.id_column]]
    seen = set()
    for name in names:
        # A name becomes the path of a file, which must not leave the output directory.
        if name in seen:
            raise ValueError(f"Two clips have the name {name!r} in `{args.id_column}`; choose another `id_column`.")
        if not name.strip() or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise ValueError(f"{name!r} in `{args.id_column}` cannot name a file; choose another `id_column`.")
        seen.add(name)
    return dataset, names


class Folder:
    """
    Files of hidden states and their index. A clip is done once the index lists it, so that a run can stop anywhere.

    Args:
        directory (`Path`): made if missing.
        file_format (`str`): `safetensors` or `npy`.
        settings (`dict`): what the contents depend on.

    Raises:
        `ValueError`: if the directory holds hidden states of other settings.
    """

    def __init__(self, directory: Path, file_format: str, settings: dict):
        self.directory, self.file_format = directory, file_format
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / "settings.json"
        before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else settings
        for name, value in settings.items():
            if before.get(name) != value:
                raise ValueError(
                    f"{directory} has hidden states with `{name}` {before.get(name)!r}, not {value!r}; name another"
                    " `output_dir`."
                )
        path.write_text(json.dumps(settings, indent=2), encoding="utf-8")
        self.index = directory / "index.csv"
        rows = []
        if self.index.is_file():
            with open(self.index, newline="", encoding="utf-8") as file:
                # A run may have been stopped in the middle of its last line.
                rows = [row for row in csv.reader(file) if len(row) == len(COLUMNS) and row[-1].isdigit()]
        self.done = {row[0] for row in rows if (directory / row[1]).is_file()}
        with open(self.index, "w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([COLUMNS, *(row for row in rows if row[0] in self.done)])

    def save(self, name: str, states: np.ndarray, num_samples: int, num_frames: int) -> None:
        path = self.directory / f"{name}.{self.file_format}"
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        if self.file_format == "npy":
            with open(part, "wb") as file:
                np.save(file, states)
        else:
            save_file({"hidden_states": states}, part, metadata={"clip": name})
        os.replace(part, path)
        with open(self.index, "a", newline="", encoding="utf-8") as file:
            row = (name, path.relative_to(self.directory).as_posix(), num_samples, num_frames)
            csv.writer(file, lineterminator="\n").writerow(row)
        self.done.add(name)


def load_encoder(args: ExtractArguments) -> PretrainedEncoder:
    """
    Raises:
        `ValueError`: if there is no such model, layer or device.
    """
    config = load_config(args.model)
    number = config.num_hidden_layers + 1
    layers = range(number) if args.layers is None else args.layers
    wrong = [layer for layer in layers if not -number <= layer < number]
    if wrong:
        raise ValueError(f"`layers` holds {wrong[0]}, but the hidden states of `{args.model}` are 0 to {number - 1}.")
    feature_extractor = load_feature_extractor(args.model, config)
    model = AutoModel.from_pretrained(args.model, config=config, dtype=getattr(torch, args.dtype))
    try:
        model = model.to(args.device)
    except RuntimeError as error:
        raise ValueError(f"The device `{args.device}` cannot be used: {str(error).splitlines()[0]}") from error
    return PretrainedEncoder(model, feature_extractor, [layer % number for layer in layers])


def read_clips(args, dataset, names, done, encoder) -> Iterator[tuple[str, np.ndarray]]:
    """Names and normalised waveforms of the clips that are not done; a clip that cannot be read is left out."""
    for row, name in enumerate(names):
        if name in done:
            continue
        try:
            samples = read_audio(
                dataset[row]["audio"], encoder.sampling_rate, args.max_seconds, min_samples=encoder.min_samples
            )
        except AudioError as error:
            logger.warning("Left out: %s", error)
            continue
        yield name, encoder.prepare(samples)


def main(arguments: list[str] | None = None) -> int:
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO)
    try:
        (args,) = parse(arguments, (ExtractArguments,))
        dataset, names = load_clips(args)
        encoder = load_encoder(args)
        settings = {
            "speech": [os.path.abspath(args.audio_dir)]
            if args.audio_dir is not None
            else [args.dataset_name, args.dataset_config_name, args.split, args.id_column],
            "model": os.path.abspath(args.model) if os.path.isdir(args.model) else args.model,
            "layers": encoder.layers,
            "mean_over_time": args.mean_over_time,
            "file_format": args.file_format,
            "dtype": args.dtype,
            "save_dtype": args.save_dtype,
            "max_seconds": args.max_seconds,
        }
        folder = Folder(Path(args.output_dir), args.file_format, settings)
    except (ValueError, OSError) as error:
        return complain(error)
    already = len(folder.done)
    clips = read_clips(args, dataset, names, frozenset(folder.done), encoder)
    most_samples = int(args.batch_seconds * encoder.sampling_rate)
    with tqdm(total=len(names), initial=already, desc="Hidden states", unit="clip") as bar:
        for batch in make_batches(clips, most_samples, args.buffer_clips, encoder.equal_lengths):
            for (name, waveform), states in zip(batch, encoder([waveform for _, waveform in batch]), strict=True):
                array = (states.mean(0) if args.mean_over_time else states.transpose(0, 1)).cpu().numpy()
                # safetensors writes the memory as it lies, whatever the strides.
                array = np.ascontiguousarray(array, args.save_dtype)
                folder.save(name, array, len(waveform), len(states))
            bar.update(len(batch))
    if not folder.done:
        return complain(AudioError(f"None of the {len(names)} clips can be read; the warnings above say why."))
    logger.info(
        "%d clips in %s, %d of them new, %d left out",
        len(folder.done),
        folder.directory,
        len(folder.done) - already,
        len(names) - len(folder.done),
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
