"""
Writes the hidden states of a student, or of any speech encoder, one file for each clip.

For the demo's held-out speech, with the student of `make demo`, offline:

    python examples/extract_hidden_states.py

For a folder of audio (wav, flac, mp3, ogg, opus; any sampling rate): two of the hidden states, in half precision:

    python examples/extract_hidden_states.py --model you/wavlm-base-plus-skill --audio_dir recordings \\
        --layers 6 9 --dtype bfloat16 --save_dtype float16 --batch_seconds 600 --output_dir hidden_states

For a dataset: one vector per layer, the mean over time, as NumPy arrays named by a column:

    python examples/extract_hidden_states.py --model you/wavlm-base-plus-skill \\
        --dataset_name openslr/librispeech_asr --dataset_config_name clean --split test --id_column id \\
        --mean_over_time --file_format npy --output_dir hidden_states

Every file contains one array of shape `(layers, frames, hidden size)`, or `(layers, hidden size)` for means, in the
order of `--layers`; 0 is the input of the first layer. In safetensors files its name is `hidden_states`. `index.csv`
lists the clips, their files, and their numbers of samples and frames. The same command resumes an interrupted run.

Memory grows with the square of a clip's length. Clips longer than `--longest_seconds`, and clips for which memory is
not sufficient, are therefore skipped with a warning that names each. `--max_seconds` crops clips instead.
`--window_seconds 30` reads longer clips, up to many hours, in windows that overlap by twice `--context_seconds`;
memory then does not depend on their length. Values too large for `--save_dtype float16` are an error that names the
clip.

The hidden states of a clip do not depend on the rest of its batch (to 1e-4 in float32). Students and models with layer
norms ignore padding. Other models with a group norm, such as WavLM Base, can't; for these, a batch contains only clips
of exactly the same length.
"""

import csv
import hashlib
import logging
import os
import sys
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Annotated

import datasets
import numpy as np
import torch
from example_utils import DEMO_DATA, DEMO_STUDENT, REPOSITORY, check_column, load_config
from safetensors.numpy import save as serialize
from tqdm.auto import tqdm

from skill_hf.cli.settings import Count, Range, Seconds, checked_device, parse, run_script
from skill_hf.data import AudioError, load_audio_dir, load_speech_dataset, read_audio
from skill_hf.data.audio import open_clip
from skill_hf.data.batches import make_batches
from skill_hf.encoders import PretrainedEncoder, feature_extractor_for, is_out_of_memory
from skill_hf.files import read_json, try_directory, write_json
from skill_hf.models.loading import load_model
from skill_hf.superb.features import cast_states
from skill_hf.windows import WindowedEncoder


logger = logging.getLogger("extract_hidden_states")

COLUMNS = ("clip", "file_name", "samples", "frames")
MAX_NAME_BYTES = 255  # of Linux, macOS and Windows


@dataclass
class ExtractArguments:
    model: str = field(
        default=str(DEMO_STUDENT),
        metadata={"help": "Hub id or directory of a speech encoder; the output of `make demo` by default."},
    )
    audio_dir: str | None = field(
        default=None,
        metadata={"help": "Directory of audio, including its subdirectories; the demo's held-out speech by default."},
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Hub id, or a local directory in any format that `datasets` can load."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    split: str = field(default="train", metadata={"help": "Split of the dataset."})
    audio_column: str = field(default="audio", metadata={"help": "Name of the audio column."})
    id_column: str | None = field(
        default=None, metadata={"help": "Name of the column with the names of the clips; row numbers by default."}
    )
    output_dir: str = field(
        default=str(REPOSITORY / "outputs" / "hidden_states"), metadata={"help": "Output directory."}
    )
    layers: list[Annotated[int, Range(-1000, most=1000)]] | None = field(
        default=None,
        metadata={"help": "Hidden states to keep, from 0, or from -1 counting from the end; all by default."},
    )
    mean_over_time: bool = field(default=False, metadata={"help": "Keep only the mean over the frames of each clip."})
    file_format: str = field(
        default="safetensors", metadata={"help": "File format.", "choices": ["safetensors", "npy"]}
    )
    dtype: str = field(
        default="float32", metadata={"help": "Precision to compute in.", "choices": ["float32", "bfloat16"]}
    )
    save_dtype: str = field(
        default="float32", metadata={"help": "Precision to save in.", "choices": ["float32", "float16"]}
    )
    max_seconds: Seconds | None = field(
        default=None, metadata={"help": "Length in seconds to crop clips to; not cropped by default."}
    )
    longest_seconds: Seconds = field(
        default=120.0, metadata={"help": "Clips longer than this, in seconds, are left out unless they are cropped."}
    )
    window_seconds: Count | None = field(
        default=None,
        metadata={"help": "Read clips longer than this, in whole seconds, in windows; not done by default."},
    )
    context_seconds: Count = field(
        default=5, metadata={"help": "Seconds that each window has in addition at its inner borders, not kept."}
    )
    batch_seconds: Seconds = field(
        default=60.0, metadata={"help": "Maximum audio per batch in seconds, including padding."}
    )
    buffer_clips: Count = field(default=256, metadata={"help": "Number of clips to sort by length at a time."})
    device: str | None = field(
        default=None, metadata={"help": "Device, such as cpu or cuda:1; a GPU by default, if available."}
    )

    def __post_init__(self):
        if self.audio_dir is not None and self.dataset_name is not None:
            raise ValueError("Pass the audio as either `audio_dir` or `dataset_name`.")
        if self.audio_dir is None and self.dataset_name is None:
            self.audio_dir = str(DEMO_DATA / "audio" / "heldout")
        if self.id_column is not None and self.dataset_name is None:
            raise ValueError("`id_column` needs `dataset_name`; files of `audio_dir` already have names.")
        if self.window_seconds is not None:
            if self.max_seconds is not None:
                raise ValueError("`max_seconds` crops clips that `window_seconds` would read to their end; set one.")
            if self.file_format != "npy" and not self.mean_over_time:
                raise ValueError(
                    "`window_seconds` writes a file in parts, which safetensors cannot; set `file_format` to npy."
                )


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
    return dataset, [str(name) if isinstance(name, (str, int)) else "" for name in dataset[args.id_column]]


def file_names(names: list[str], suffix: str, folds_case: bool = False) -> dict[str, str]:
    """
    The file of each clip, a relative path: its name with `suffix`. What is too long for a file system ends in a
    checksum instead.

    Args:
        names (`list[str]`): of the clips.
        suffix (`str`): such as `.npy`.
        folds_case (`bool`, *optional*): whether the file system takes `a` and `A` for one name.

    Raises:
        `ValueError`: if a name can't be one of a file in a folder, or two clips fall on one file.
    """
    files, owners = {}, {}
    for name in names:
        parts = [part for part in name.split("/") if part not in ("", ".")]
        odd = any(character == "\0" or unicodedata.category(character) == "Cs" for character in name)
        if odd or not parts or not name.strip() or name.startswith("/") or ".." in parts:
            raise ValueError(f"{name!r} cannot name a file; choose another `id_column`.")
        parts = [*(_shortened(part) for part in parts[:-1]), _shortened(parts[-1], suffix) + suffix]
        file = "/".join(parts)
        key = unicodedata.normalize("NFC", file).casefold() if folds_case else file
        if key in owners:
            twice = f"Two clips have the name {name!r}" if owners[key] == name else None
            raise ValueError(
                f"{twice or f'The clips {owners[key]!r} and {name!r} map to the same file, {file}'}; choose another"
                " `id_column`."
            )
        owners[key], files[name] = name, file
    for key, name in owners.items():
        for parent in PurePosixPath(key).parents:
            if str(parent) in owners:
                raise ValueError(
                    f"The file of {owners[str(parent)]!r} has the path of a folder of {name!r}; choose another"
                    " `id_column`."
                )
    return files


def _shortened(part: str, suffix: str = "") -> str:
    room = MAX_NAME_BYTES - len(f"{suffix}.part")
    content = part.encode()
    if len(content) <= room:
        return part
    checksum = hashlib.sha256(content).hexdigest()[:16]
    return f"{content[: room - 17].decode(errors='ignore')}-{checksum}"


def _folds_case(directory: Path) -> bool:
    """Whether the file system of a directory takes `a` and `A` for one name."""
    probe = directory / ".try-case"
    probe.touch()
    try:
        return (directory / ".TRY-CASE").exists()
    finally:
        probe.unlink()


class Folder:
    """
    Files of hidden states and their index. A clip is done once the index lists it, so that a run can stop anywhere.

    Args:
        directory (`Path`): made if missing.
        names (`list[str]`): of all clips.
        file_format (`str`): `safetensors` or `npy`.
        settings (`dict`): what the contents depend on.

    Raises:
        `ValueError`: if the directory can't be written to, holds hidden states of other settings or something else
            that would be overwritten, or a clip can't have a file of its own.
    """

    def __init__(self, directory: Path, names: list[str], file_format: str, settings: dict):
        self.directory, self.file_format = directory, file_format
        suffix = f".{file_format}"
        self.files = file_names(names, suffix)  # once before anything is made
        try_directory(directory)
        directory.mkdir(parents=True, exist_ok=True)
        if _folds_case(directory):
            self.files = file_names(names, suffix, folds_case=True)
        self.index = directory / "index.csv"
        path = directory / "settings.json"
        if path.is_file():
            self._compare(path, settings)
        else:
            for file in (self.index.name, *self.files.values()):
                if (directory / file).exists():
                    raise ValueError(
                        f"{directory} already has {file}, which was not written by this script; choose another"
                        " `output_dir`."
                    )
        rows = self._read_index()
        write_json(path, settings)
        self.done = {row[0] for row in rows if (directory / row[1]).is_file()}
        part = self.index.with_name("index.csv.part")
        with open(part, "w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([COLUMNS, *(row for row in rows if row[0] in self.done)])
        os.replace(part, self.index)

    def _compare(self, path: Path, settings: dict) -> None:
        before = read_json(path)
        if not isinstance(before, dict) or not settings.keys() & before.keys():
            raise ValueError(f"{path} was not written by this script; choose another `output_dir`.")
        for name, value in settings.items():
            if before.get(name) != value:
                raise ValueError(
                    f"{self.directory} has hidden states with `{name}` {before.get(name)!r}, not {value!r}; choose"
                    " another `output_dir`."
                )

    def _read_index(self) -> list[list[str]]:
        """Rows of the index but one that was being written when a run was stopped."""
        if not self.index.is_file():
            return []
        try:
            with open(self.index, newline="", encoding="utf-8") as file:
                header, *rows = list(csv.reader(file)) or [list(COLUMNS)]
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{self.index} cannot be read ({error}); choose another `output_dir`.") from error
        if tuple(header) != COLUMNS:
            raise ValueError(f"{self.index} was not written by this script; choose another `output_dir`.")
        return [row for row in rows if len(row) == len(COLUMNS) and row[-1].isdigit()]

    def save(self, name: str, states: np.ndarray, num_samples: int, num_frames: int) -> None:
        def write(part: Path) -> None:
            if self.file_format == "npy":
                with open(part, "wb") as file:
                    np.save(file, states)
            else:
                # `save_file` raises errors of its own where the disk is full.
                part.write_bytes(serialize({"hidden_states": states}, metadata={"clip": name}))

        self._save(name, write, num_samples, num_frames)

    def save_parts(self, name: str, parts: Iterator[np.ndarray], num_samples: int, num_frames: int) -> None:
        """As `save` in npy, from consecutive parts, `(layers, frames, hidden size)`, with one in memory at a time."""

        def write(path: Path) -> None:
            start = 0
            for part in parts:
                layers, frames, size = part.shape
                if not start:
                    shape = (layers, num_frames, size)
                    offset = np.lib.format.open_memmap(path, "w+", dtype=part.dtype, shape=shape).offset
                # Not into the map, whose pages would count as memory of this process.
                with open(path, "r+b") as file:
                    for layer, of_layer in enumerate(part):
                        file.seek(offset + (layer * num_frames + start) * size * part.itemsize)
                        file.write(of_layer.tobytes())
                start += frames

        self._save(name, write, num_samples, num_frames)

    def _save(self, name: str, write: Callable[[Path], None], num_samples: int, num_frames: int) -> None:
        path = self.directory / self.files[name]
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        write(part)
        os.replace(part, path)
        with open(self.index, "a", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerow((name, self.files[name], num_samples, num_frames))
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
        raise ValueError(
            f"`layers` contains {wrong[0]}, but the hidden states of `{args.model}` are 0 to {number - 1}."
        )
    device = checked_device(args.device)
    feature_extractor = feature_extractor_for(args.model, config)
    model = load_model(args.model, config=config, dtype=getattr(torch, args.dtype)).to(device)
    return PretrainedEncoder(model, feature_extractor, [layer % number for layer in layers])


def read_clips(args, dataset, names, done, encoder, long_clips: list[int]) -> Iterator[tuple[str, np.ndarray]]:
    """
    Names and normalised waveforms of the clips that are not done; one that cannot be read or is too long is left out.
    Rows of clips that are read in windows are added to `long_clips` instead.
    """
    longest = args.longest_seconds if args.max_seconds is None else args.max_seconds
    if args.window_seconds is not None:
        longest = args.window_seconds
    for row, name in enumerate(names):
        if name in done:
            continue
        try:
            samples = read_audio(
                dataset[row]["audio"],
                encoder.sampling_rate,
                longest if args.max_seconds is not None else longest + 1,  # no more of hours is decoded
                min_samples=encoder.min_samples,
            )
            if len(samples) > round(longest * encoder.sampling_rate):
                if args.window_seconds is not None:
                    long_clips.append(row)
                    continue
                raise AudioError(
                    f"{name} is longer than {longest:g} s; raise `longest_seconds` if there is enough memory, crop"
                    " clips with `max_seconds`, or read them in windows with `window_seconds`."
                )
        except AudioError as error:
            logger.warning("Left out: %s", error)
            continue
        yield name, encoder.prepare(samples)


def encode(encoder: PretrainedEncoder, batch: list[tuple[str, np.ndarray]]) -> Iterator[tuple[str, int, torch.Tensor]]:
    """
    Name, number of samples and hidden states, `(frames, layers, hidden size)`, of each clip. Where the memory is too
    small for the batch, each clip is tried alone, and left out if that is too much, too.
    """
    try:
        states = encoder([waveform for _, waveform in batch])
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        if len(batch) == 1:
            seconds = len(batch[0][1]) / encoder.sampling_rate
            logger.warning("Left out: out of memory for %s of %.0f s", batch[0][0], seconds)
            return
        states = None  # the error holds what was computed
    if states is None:
        for clip in batch:
            yield from encode(encoder, [clip])
        return
    for (name, waveform), clip_states in zip(batch, states, strict=True):
        yield name, len(waveform), clip_states


def save_long_clip(args: ExtractArguments, audio, name: str, windows: WindowedEncoder, folder: Folder) -> None:
    """
    Saves what one pass would, window by window.

    Raises:
        [`AudioError`]: if the clip cannot be read to its end.
    """
    with open_clip(audio, windows.encoder.sampling_rate) as clip:
        num_samples = round(clip.seconds() * windows.encoder.sampling_rate)
    num_frames, parts = windows.num_frames(audio), windows(audio)

    def cast(states: torch.Tensor) -> np.ndarray:
        return cast_states(states, args.save_dtype, f"the clip {name}", "save_dtype")

    if args.mean_over_time:
        total = sum(part.double().sum(0) for part in parts)
        folder.save(name, cast((total / num_frames).float()), num_samples, num_frames)
    else:
        folder.save_parts(name, (cast(part.transpose(0, 1)) for part in parts), num_samples, num_frames)


def extract(args: ExtractArguments) -> None:
    try_directory(args.output_dir)
    dataset, names = load_clips(args)
    file_names(names, f".{args.file_format}")
    encoder = load_encoder(args)
    windows = None
    if args.window_seconds is not None:
        batch_size = max(int(args.batch_seconds / args.window_seconds), 1)
        windows = WindowedEncoder(encoder, args.window_seconds, args.context_seconds, batch_size)
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
        "windows": None if args.window_seconds is None else [args.window_seconds, args.context_seconds],
    }
    folder = Folder(Path(args.output_dir), names, args.file_format, settings)
    already = len(folder.done)
    long_clips: list[int] = []
    clips = read_clips(args, dataset, names, frozenset(folder.done), encoder, long_clips)
    most_samples = int(args.batch_seconds * encoder.sampling_rate)
    with tqdm(total=len(names), initial=already, desc="Hidden states", unit="clip") as bar:
        for batch in make_batches(clips, most_samples, args.buffer_clips, encoder.equal_lengths):
            for name, num_samples, states in encode(encoder, batch):
                kept = states.mean(0) if args.mean_over_time else states.transpose(0, 1)
                array = cast_states(kept, args.save_dtype, f"the clip {name}", "save_dtype")
                folder.save(name, array, num_samples, len(states))
            bar.update(len(batch))
        for row in long_clips:
            try:
                save_long_clip(args, dataset[row]["audio"], names[row], windows, folder)
            except AudioError as error:
                logger.warning("Left out: %s", error)
            bar.update()
    if not folder.done:
        raise AudioError(f"None of the {len(names)} clips can be used; the warnings above say why.")
    logger.info(
        "%d clips in %s, %d of them new, %d left out",
        len(folder.done),
        folder.directory,
        len(folder.done) - already,
        len(names) - len(folder.done),
    )


def main(arguments: list[str] | None = None) -> int:
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO)
    return run_script(lambda: extract(*parse(arguments, (ExtractArguments,))))


if __name__ == "__main__":
    sys.exit(main())
