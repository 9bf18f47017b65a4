"""Speech datasets: folders of audio, and what `datasets` loads. Nothing is decoded; no code from a dataset is run."""

import dataclasses
import functools
import json
import logging
import os
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import yaml
from huggingface_hub import DatasetCard, hf_hub_download
from tqdm.auto import tqdm

from .audio import AudioError, audio_seconds
from .remote_files import RemoteFileError, check_protocols, is_url


logger = logging.getLogger(__name__)

AUDIO_EXTENSIONS = (".wav", ".flac", ".mp3", ".ogg", ".opus")

# A set of which a larger share cannot be read is refused: it is another kind of data than its owner believes.
MAX_BAD_SHARE = 0.5

MAX_NAMED = 5

_ROWS_TRIED = 32

# Of a saved dataset that is streamed, so that each process and worker has its own.
_SHARDS_OF_SAVED = 64

# Tables of a split that may lie beside the folder of its audio, and what reads them.
_TABLES = {
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".ndjson": ("json", {}),
    ".parquet": ("parquet", {}),
}


# What `datasets` takes a directory for that has files of other kinds only.
_OTHER_FOLDERS = ("text", "imagefolder", "videofolder", "pdffolder", "xml")


class _StoredAudio(datasets.Audio):
    """
    `datasets.Audio` for rows that are created one by one: folders, tar shards, streams. There `datasets` (5.2) imports
    torchcodec to *encode* audio, even a path that stays a path, and wheels of torchcodec need CUDA libraries, which
    not all machines have.
    """

    def encode_example(self, value: str | os.PathLike | bytes | Mapping) -> dict[str, str | bytes | None]:
        if isinstance(value, (str, os.PathLike)):
            return {"bytes": None, "path": os.fspath(value)}
        if isinstance(value, bytes):
            return {"bytes": value, "path": None}
        return {"bytes": value.get("bytes"), "path": value.get("path")}


def load_audio_dir(directory: str | os.PathLike) -> datasets.Dataset:
    """
    Lists the audio in a directory and all its subdirectories, in sorted order, decoding only what is needed for the
    length. Each real directory is listed once, however many links lead to it; hidden files and directories are
    ignored. Files that are named like audio but cannot be read (also broken links, directories, FIFOs) are skipped,
    counted and named in a warning.

    Args:
        directory (`str` or `PathLike`):
            Directory of .wav, .flac, .mp3, .ogg or .opus files with any sampling rate and number of channels.

    Returns:
        `datasets.Dataset` with the columns `audio`, dicts of `path` (absolute) and `bytes` (`None`), and `length`, in
        seconds, for `seconds_per_batch` and `train_sampling_strategy="group_by_length"`.

    Raises:
        [`AudioError`]: if the directory is missing, has no readable audio, or more than half of its audio files cannot
            be read.
    """
    if not isinstance(directory, (str, os.PathLike)):
        raise AudioError(f"The audio directory must be a path, but is {reprlib.repr(directory)}.")
    if not os.path.isdir(directory):
        what = "is not a directory" if os.path.exists(directory) else "does not exist"
        raise AudioError(f"The audio directory `{directory}` {what}; correct its path.")
    errors: list[AudioError] = []
    paths = sorted(_audio_paths(os.path.abspath(directory), errors))
    if not paths and not errors:
        raise AudioError(
            f"The audio directory `{directory}` has no file that ends in {', '.join(AUDIO_EXTENSIONS)}; choose"
            " another."
        )
    lengths, num_bad_files = {}, 0
    for path in tqdm(paths, desc="Checking audio files", unit="file"):
        try:
            seconds = audio_seconds(path)
            path.encode()
        except UnicodeEncodeError:
            shown = path.encode(errors="backslashreplace").decode()
            errors.append(AudioError(f"`{shown}` has a name that is not UTF-8; rename it."))
        except AudioError as error:
            num_bad_files += os.path.isfile(path)
            errors.append(error)
        else:
            lengths[path] = seconds
    total = len(lengths) + len(errors)
    if not lengths:
        raise AudioError(f"None of the {total} audio files in `{directory}` can be read; the first: {errors[0]}")
    if num_bad_files > MAX_BAD_SHARE * (len(lengths) + num_bad_files):
        raise AudioError(
            f"{num_bad_files} of the {len(lengths) + num_bad_files} audio files in `{directory}` cannot be read; the"
            f" first: {errors[0]}"
        )
    warn_left_out(errors, total)
    dataset = datasets.Dataset.from_dict({"audio": list(lengths), "length": list(lengths.values())})
    dataset.info.dataset_name = os.path.basename(os.path.abspath(directory))  # for the model card
    return dataset.cast_column("audio", datasets.Audio(decode=False))


def load_speech_dataset(
    name: str | os.PathLike,
    config_name: str | None = None,
    split: str = "train",
    streaming: bool = False,
    audio_column: str = "audio",
    protocols: Sequence[str] = (),
) -> datasets.Dataset | datasets.IterableDataset:
    """
    Loads speech from the Hub or from a local directory in any format that `datasets` reads: parquet, csv or json with
    a column of paths (relative to the directory, or to that of their table), `save_to_disk`, `audiofolder` (with
    metadata or with plain folders), tar shards (WebDataset; `audio_column` is then the extension of the audio files,
    such as `flac`). If a table has the name of the split and is next to a folder of audio (`train.csv` next to
    `train/`), it is used as the list of clips, with a warning.

    Args:
        name (`str` or `PathLike`):
            Hub id or local directory.
        config_name (`str`, *optional*):
            Configuration, if a Hub dataset has several.
        split (`str`, *optional*, defaults to `"train"`):
            Split; without streaming also a slice such as `train[:10%]` or a sum such as `train+validation`.
        streaming (`bool`, *optional*, defaults to `False`):
            Whether to read rows on the fly instead of preparing all of them first.
        audio_column (`str`, *optional*, defaults to `"audio"`):
            Column with the audio; it is renamed to `audio`.
        protocols (`Sequence[str]`, *optional*):
            Protocols that the dataset's card may use for its files, in addition to `http`, `https` and `hf`.

    Returns:
        `datasets.Dataset`, or `datasets.IterableDataset` if `streaming`, with a column `audio`, not decoded, or a
        precomputed column `input_values`.

    Raises:
        [`AudioError`]: if the dataset or the split does not exist, is empty, or has no audio column, or its card
            refers to files with a protocol that is not allowed.
    """
    if not isinstance(name, (str, os.PathLike)) or not os.fspath(name):
        raise AudioError(f"The dataset must be a Hub id or a directory, but is {reprlib.repr(name)}.")
    name = os.fspath(name)
    try:
        _check_card(name, protocols)
        dataset, bases = _load_split(name, config_name, split, streaming, audio_column)
        dataset = disable_audio_decoding(dataset)
        # For the model card; `datasets` keeps neither the owner of a dataset on the Hub nor the name of a directory.
        dataset.info.dataset_name = os.path.basename(os.path.abspath(name)) if os.path.exists(name) else name
        first_row = next(iter(dataset), None)
        if first_row is None:
            raise AudioError(f"The split `{split}` of `{name}` has no rows; choose another split or dataset.")
        if audio_column not in first_row:
            if "input_values" in first_row:
                return dataset
            if dataset.info.builder_name in _OTHER_FOLDERS:
                raise AudioError(
                    f"`{name}` contains no audio files ({', '.join(AUDIO_EXTENSIONS)}) and no table of them; choose"
                    " another directory."
                )
            raise AudioError(
                f"`{name}` has no column `{audio_column}`; choose the audio column from: {', '.join(first_row)}."
            )
        if dataset.info.builder_name == "webdataset" and not _has_audio(dataset):
            raise AudioError(
                f"`{name}` contains no files that end in .{audio_column}; `audio_column` must be the extension of the"
                " audio files in its tar shards."
            )
        if bases:
            dataset = _with_absolute_paths(dataset, audio_column, bases)
        return dataset if audio_column == "audio" else dataset.rename_column(audio_column, "audio")
    except AudioError:
        raise
    except Exception as error:  # its loaders raise what their libraries do: of pyarrow, pandas, fsspec, the Hub
        cause = error.__cause__ or error
        reason = str(cause).strip().partition("\n")[0] or repr(cause)
        where = "" if os.path.isdir(name) else ", which is not a local directory,"
        raise AudioError(f"The dataset `{name}`{where} cannot be loaded: {reason}") from error


def disable_audio_decoding(dataset: Any) -> Any:
    """
    Switches off decoding in a `datasets` dataset, so that its audio is returned as a dict of `path` and `bytes`.
    Decoding of images and the like is switched off as well, since it would open any URL in a row. Other datasets are
    returned unchanged.
    """
    if isinstance(dataset, (datasets.Dataset, datasets.IterableDataset)):
        stored = datasets.Audio if isinstance(dataset, datasets.Dataset) else _StoredAudio
        # A stream of csv or json has no features before its first row, but nothing to decode either.
        for column, feature in (dataset.features or {}).items():
            undecoded = _undecoded(feature, stored)
            if undecoded != feature:
                dataset = dataset.cast_column(column, undecoded)
    return dataset


def warn_left_out(errors: list[AudioError], num_tried: int) -> None:
    if errors:
        named = " ".join(map(str, errors[:MAX_NAMED])) + (" ..." if len(errors) > MAX_NAMED else "")
        logger.warning("Left out %d of %d clips: %s", len(errors), num_tried, named)


# ---- Folders ----


def _audio_paths(root: str, errors: list[AudioError]) -> Iterator[str]:
    """Paths below `root` that are named like audio, of any kind; directories that can't be listed are errors."""
    seen, directories, links = set(), [root], []
    while directories or links:
        # Links come last, so that what they lead to is listed under its own path if it lies below `root`.
        directory = directories.pop() if directories else links.pop()
        try:
            status = os.stat(directory)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(directory) as entries:
                listed = sorted((entry for entry in entries if entry.name[0] != "."), key=lambda entry: entry.name)
        except OSError as error:
            errors.append(AudioError(f"`{directory}` cannot be listed ({error.strerror}); correct its permissions."))
            continue
        for entry in reversed(listed):
            named_like_audio = entry.name.lower().endswith(AUDIO_EXTENSIONS)
            if os.path.isdir(entry.path):  # False also for a loop of links
                (links if entry.is_symlink() else directories).append(entry.path)
            elif entry.is_symlink() and not os.path.exists(entry.path) and not os.path.splitext(entry.name)[1]:
                # It may have led to a directory.
                errors.append(AudioError(f"`{entry.path}` is a broken link; correct its path."))
            if named_like_audio:
                yield entry.path


# ---- What `datasets` loads ----


def _undecoded(feature: Any, stored: type[datasets.Audio]) -> Any:
    if isinstance(feature, dict):
        return {name: _undecoded(nested, stored) for name, nested in feature.items()}
    if isinstance(feature, (datasets.List, datasets.LargeList)):
        return dataclasses.replace(feature, feature=_undecoded(feature.feature, stored))
    if isinstance(feature, datasets.Audio):
        return stored(sampling_rate=feature.sampling_rate, decode=False)
    return dataclasses.replace(feature, decode=False) if getattr(feature, "decode", False) else feature


def _check_card(name: str, protocols: Sequence[str]) -> None:
    """
    Checks the URLs of data files in a card: `datasets` opens all of them, even chains and protocols that run code.
    """
    for file_name in ("README.md", ".huggingface.yaml"):
        if os.path.isdir(name):
            path = os.path.join(name, file_name)
        else:
            try:
                path = hf_hub_download(name, file_name, repo_type="dataset")
            except Exception:  # no such file, set or network, no valid name: `datasets` says it better
                continue
        if not os.path.isfile(path):
            continue
        if file_name.endswith(".md"):
            content = DatasetCard.load(path).data.to_dict()
        else:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        configs = content.get("configs") if isinstance(content, dict) else None
        for config in configs if isinstance(configs, list) else ():
            for key in ("data_files", "data_dir"):
                for text in _texts(config.get(key) if isinstance(config, dict) else None):
                    try:
                        if "://" in text or "::" in text:
                            check_protocols(text, protocols)
                    except RemoteFileError as error:
                        raise AudioError(f"The card of the dataset `{name}` {error}.") from None


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for nested in value.values() if isinstance(value, dict) else value:
            yield from _texts(nested)


def _load_split(
    name: str, config_name: str | None, split: str, streaming: bool, audio_column: str
) -> tuple[datasets.Dataset | datasets.IterableDataset, list[str]]:
    """The split, and the directories that relative paths may refer to."""
    root = [os.path.abspath(name)] if os.path.isdir(name) else []
    # A split may be sliced and added to others: `train[:10%]+validation`.
    parts = re.findall(r"(?:^|\+)\s*([^\[+\s]+)", split)
    saved = Path(name) / "dataset_dict.json"
    if saved.is_file() or (Path(name) / "state.json").is_file():
        if saved.is_file():
            _check_split(name, parts, json.loads(saved.read_text(encoding="utf-8"))["splits"])
            loaded = {part: _load_saved(os.path.join(name, part), part) for part in parts}
        else:
            dataset = _load_saved(name, split)
            loaded = {str(dataset.split or "train"): dataset}
            _check_split(name, parts, list(loaded))
        lengths = {part: len(dataset) for part, dataset in loaded.items()}
        pieces = [
            loaded[piece.splitname].select(range(lengths[piece.splitname])[slice(piece.from_, piece.to)])
            for piece in datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
        ]
        joined = datasets.concatenate_datasets(pieces) if len(pieces) > 1 else pieces[0]
        if not len(joined):
            raise AudioError(f"The split `{split}` of `{name}` has no rows; choose another split or dataset.")
        num_shards = min(len(joined), _SHARDS_OF_SAVED)
        return (joined.to_iterable_dataset(num_shards) if streaming else joined), root

    builder = datasets.load_dataset_builder(name, config_name)
    # Both would encode `datasets.Audio`; tar shards take their features from outside only.
    if builder.name == "webdataset":
        features = datasets.Features({audio_column: _StoredAudio()})
        builder = datasets.load_dataset_builder(name, config_name, features=features)
    elif builder.name == "audiofolder":
        builder.BASE_FEATURE = _StoredAudio
        if root and config_name is None:
            builder, root = _table_beside(builder, root[0], parts, audio_column)
    data_files = {str(known): files for known, files in (builder.config.data_files or {}).items()}
    _check_split(name, parts, list(data_files) or [str(known) for known in builder.info.splits or ()])
    if root and builder.name in {kind for kind, _ in _TABLES.values()}:
        tables = [file for part in parts for file in data_files.get(part, ()) if not is_url(file)]
        root = list(dict.fromkeys([*root, *map(os.path.dirname, tables)]))
    if streaming:
        return builder.as_streaming_dataset(split=split), root
    builder.download_and_prepare()
    return builder.as_dataset(split=split), root


def _has_audio(dataset: datasets.Dataset | datasets.IterableDataset) -> bool:
    """Whether one of the first rows of tar shards has a file of the given ending."""
    return any(value is not None for row in dataset.take(_ROWS_TRIED) for value in row.values())


def _load_saved(directory: str, split: str) -> datasets.Dataset:
    state = json.loads((Path(directory) / "state.json").read_text(encoding="utf-8"))
    if not state.get("_data_files"):  # which `datasets` (5.2) cannot load
        raise AudioError(f"The split `{split}` in `{directory}` has no rows; choose another split or dataset.")
    return datasets.load_from_disk(directory)


def _table_beside(
    builder: datasets.DatasetBuilder, root: str, parts: list[str], audio_column: str
) -> tuple[datasets.DatasetBuilder, list[str]]:
    """
    The loader for tables named like the splits, if each split has one, used instead of the audio next to them; and the
    directories that their paths may refer to. `datasets` itself only reads tables called metadata.
    """
    found = {}
    for part in dict.fromkeys(parts):
        for directory in (root, os.path.join(root, "data")):
            for extension in _TABLES:
                path = os.path.join(directory, part + extension)
                if part not in found and os.path.isfile(path):
                    found[part] = path
    kinds = {os.path.splitext(path)[1] for path in found.values()}
    if not found:
        return builder, [root]
    first = next(iter(found.values()))
    if len(found) < len(set(parts)) or len(kinds) > 1:
        logger.warning("`%s` is not used, since not every split of %s has such a table.", first, "+".join(parts))
        return builder, [root]
    kind, settings = _TABLES[kinds.pop()]
    tables = datasets.load_dataset_builder(kind, data_files=found, **settings)
    first_row = next(iter(tables.as_streaming_dataset(split=parts[0])), {})
    if audio_column not in first_row:
        logger.warning(
            "`%s` is not used, since it has no column `%s`, only %s; the rows are the audio files themselves.",
            first,
            audio_column,
            ", ".join(first_row),
        )
        return builder, [root]
    logger.warning("The rows are those of `%s`; audio files that it does not list are not used.", first)
    directories = [os.path.dirname(path) for path in found.values()]
    return tables, [*directories, *(os.path.join(base, part) for base, part in zip(directories, found, strict=True))]


def _check_split(name: str, wanted: list[str], splits: list[str]) -> None:
    unknown = [split for split in wanted if split not in splits]
    if unknown and splits:
        raise AudioError(f"`{name}` has no split `{unknown[0]}`; choose from {', '.join(splits)}.")


def _with_absolute_paths(dataset: Any, column: str, bases: list[str]) -> Any:
    """Makes relative paths of files that are not embedded absolute, from the first directory that contains them."""
    if isinstance(dataset, datasets.IterableDataset):
        return dataset.map(functools.partial(_absolute_row, column=column, bases=bases), features=dataset.features)
    stored_type = dataset.features.arrow_schema.field(column).type
    is_struct = pa.types.is_struct(stored_type) and stored_type.get_field_index("path") >= 0
    if not (is_struct or pa.types.is_string(stored_type) or pa.types.is_large_string(stored_type)):
        return dataset
    paths = dataset.data.column(column)
    if is_struct:
        has_bytes = stored_type.get_field_index("bytes") >= 0
        missing = pc.is_null(pc.struct_field(paths, "bytes")) if has_bytes else True
        paths = pc.if_else(missing, pc.struct_field(paths, "path"), None)
    if all(path is None or path == _absolute(path, bases) for chunk in paths.chunks for path in chunk.to_pylist()):
        return dataset
    absolute = functools.partial(_absolute_table, column=column, bases=bases)
    # As tables, since to encode a row of audio `datasets` needs torchcodec.
    changed = dataset.with_format("arrow").map(absolute, batched=True, features=dataset.features)
    return changed.with_format(**dataset.format)


def _absolute(path: str, bases: list[str]) -> str:
    if not path or is_url(path) or os.path.isabs(path):
        return path
    candidates = [os.path.join(base, path) for base in bases]
    return next(filter(os.path.exists, candidates), candidates[0]) if len(candidates) > 1 else candidates[0]


def _absolute_row(row: dict, column: str, bases: list[str]) -> dict:
    value = row[column]
    if isinstance(value, str):
        return {column: _absolute(value, bases)}
    if isinstance(value, dict) and value.get("bytes") is None and isinstance(value.get("path"), str):
        return {column: {**value, "path": _absolute(value["path"], bases)}}
    return {column: value}


def _absolute_table(table: pa.Table, column: str, bases: list[str]) -> pa.Table:
    index = table.schema.get_field_index(column)
    rows = [_absolute_row({column: value}, column, bases)[column] for value in table.column(column).to_pylist()]
    return table.set_column(index, table.schema.field(index), pa.array(rows, table.schema.field(index).type))
