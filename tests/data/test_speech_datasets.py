"""Folders and tables as they lie about: each is listed honestly, and nothing hangs."""

import os
import socket
import tarfile
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from skill_hf.data import AudioError, disable_audio_decoding, load_audio_dir, load_speech_dataset, read_audio


RATE = 16_000


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def write(path, seconds=0.5, value=0.1):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.full(int(seconds * RATE), value, np.float32), RATE, subtype="FLOAT")


def names(dataset, root):
    return [os.path.relpath(row["path"], root) for row in dataset["audio"]]


# ---- Folders ----


def test_links_are_followed_once_and_loops_end(tmp_path):
    root = tmp_path / "root"
    write(root / "a" / "x.wav")
    write(tmp_path / "elsewhere" / "y.wav")
    (root / "0_link_to_a").symlink_to(root / "a")
    (root / "a" / "up").symlink_to(root)
    (root / "a" / "self").symlink_to(root / "a")
    (root / "other").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(root)
    (root / "z.wav").symlink_to(root / "a" / "x.wav")
    start = time.monotonic()
    assert names(load_audio_dir(root), root) == ["a/x.wav", "other/y.wav", "z.wav"]
    (tmp_path / "entrance").symlink_to(root)
    assert len(load_audio_dir(tmp_path / "entrance")) == 3
    assert time.monotonic() - start < 10


def test_what_is_named_like_audio_but_is_none_is_named(tmp_path, caplog, monkeypatch):
    write(tmp_path / "good.wav")
    (tmp_path / "dangling.wav").symlink_to(tmp_path / "gone.wav")
    (tmp_path / "loop.flac").symlink_to(tmp_path / "loop.flac")
    (tmp_path / "recordings").symlink_to(tmp_path / "not_mounted")
    (tmp_path / "device.mp3").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "fifo.ogg")
    write(tmp_path / "folder.WAV" / "inner.wav")
    monkeypatch.chdir(tmp_path)  # names of sockets are short
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind("socket.opus")
        monkeypatch.setattr("skill_hf.data.speech_datasets.MAX_NAMED", 10)
        start = time.monotonic()
        dataset = load_audio_dir(tmp_path)
    assert names(dataset, tmp_path) == ["folder.WAV/inner.wav", "good.wav"]
    assert time.monotonic() - start < 10
    (warning,) = caplog.messages
    assert warning.startswith("Left out 7 of 9 clips: ")
    for name, what in {
        "dangling.wav": "is a broken link",
        "loop.flac": "cannot be opened",
        "recordings": "is a broken link",
        "device.mp3": "is a device",
        "fifo.ogg": "is a FIFO",
        "folder.WAV": "is a directory",
        "socket.opus": "is a socket",
    }.items():
        assert f"`{tmp_path / name}` " in warning and what in warning.partition(f"{name}` ")[2].partition("`")[0]


def test_names_that_are_not_utf8_are_named(tmp_path, caplog):
    write(tmp_path / "good.wav")
    with open(os.fsencode(tmp_path) + b"/caf\xe9.wav", "wb") as file:
        file.write((tmp_path / "good.wav").read_bytes())
    assert names(load_audio_dir(tmp_path), tmp_path) == ["good.wav"]
    (warning,) = caplog.messages
    assert "Left out 1 of 2" in warning and "caf\\udce9.wav` has a name that is not UTF-8; rename it" in warning
    warning.encode()


def test_a_folder_of_mostly_bad_files_is_refused(tmp_path):
    for i in range(4):
        write(tmp_path / f"{i}.wav")
    for i in range(4):
        (tmp_path / f"bad{i}.wav").write_text("no audio")
    assert len(load_audio_dir(tmp_path)) == 4
    (tmp_path / "one_more.wav").touch()
    with pytest.raises(AudioError, match="5 of the 9 audio files in .* cannot be read; the first: `.*bad0.wav`"):
        load_audio_dir(tmp_path)


@pytest.mark.parametrize("value", [None, 3, b"x", ["a"], ""])
def test_what_is_no_path(value):
    for load in (load_audio_dir, load_speech_dataset):
        with pytest.raises(AudioError, match="must be a|does not exist"):
            load(value)


@pytest.mark.parametrize("name", ["notes.txt", "paper.pdf", "cover.png"])
def test_a_directory_of_other_files(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(AudioError, match="contains no audio files .*; choose another directory"):
        load_speech_dataset(tmp_path)


@pytest.mark.parametrize("streaming", [False, True])
def test_tar_shards_without_files_of_that_ending(tmp_path, streaming):
    write(tmp_path / "a.wav")
    with tarfile.open(tmp_path / "train-0.tar", "w") as archive:
        archive.add(tmp_path / "a.wav", "a.wav")
    (tmp_path / "a.wav").unlink()
    assert len(list(load_speech_dataset(tmp_path, streaming=streaming, audio_column="wav"))) == 1
    with pytest.raises(AudioError, match="contains no files that end in .flac; `audio_column` must be the extension"):
        load_speech_dataset(tmp_path, streaming=streaming, audio_column="flac")


def test_a_file_is_no_directory(tmp_path):
    write(tmp_path / "a.wav")
    with pytest.raises(AudioError, match="a.wav` is not a directory"):
        load_audio_dir(tmp_path / "a.wav")


# ---- A table beside the audio ----


def make_split(root, table, text, folder="train"):
    for i in range(8):
        write(root / folder / f"{i}.wav")
    (root / table).parent.mkdir(parents=True, exist_ok=True)
    (root / table).write_text(text)


TABLES = {
    "paths from the directory": ("train.csv", "audio,text\ntrain/0.wav,a\ntrain/1.wav,b\ntrain/2.wav,c\n"),
    "names of files": ("train.csv", "audio,text\n0.wav,a\n1.wav,b\n2.wav,c\n"),
    "tabs": ("train.tsv", "audio\ttext\n0.wav\ta\n1.wav\tb\n2.wav\tc\n"),
    "lines of json": ("train.jsonl", "".join(f'{{"audio": "{i}.wav", "text": "{t}"}}\n' for i, t in enumerate("abc"))),
    "in data": ("data/train.csv", "audio,text\ntrain/0.wav,a\ntrain/1.wav,b\ntrain/2.wav,c\n"),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("table, text", TABLES.values(), ids=TABLES)
def test_the_table_of_a_split_is_its_list(tmp_path, caplog, table, text, streaming):
    root = tmp_path / "data"
    make_split(root, table, text, "data/train" if table.startswith("data") else "train")
    rows = list(load_speech_dataset(root, streaming=streaming))
    assert [row["text"] for row in rows] == ["a", "b", "c"]
    assert all(len(read_audio(row["audio"])) == RATE // 2 for row in rows)
    assert (
        f"The rows are those of `{root / table}`; audio files that it does not list are not used." in caplog.messages
    )


def test_a_table_that_is_not_used_is_named(tmp_path, caplog):
    make_split(tmp_path, "train.csv", "speaker,text\n1,a\n2,b\n")
    assert len(load_speech_dataset(tmp_path)) == 8
    assert "`audio`, only speaker, text; the rows are the audio files themselves." in caplog.text
    assert len(load_speech_dataset(tmp_path, audio_column="speaker")) == 2  # as the user says


def test_metadata_and_other_splits_stay_as_they_were(tmp_path, caplog):
    make_split(tmp_path, "train/metadata.csv", "file_name,text\n0.wav,a\n1.wav,b\n")
    write(tmp_path / "test" / "0.wav")
    (tmp_path / "notes.csv").write_text("audio\nx.wav\n")
    assert load_speech_dataset(tmp_path)["text"] == ["a", "b"]
    assert not caplog.messages


def test_two_splits_need_two_tables(tmp_path, caplog):
    make_split(tmp_path, "train.csv", "audio\n0.wav\n")
    write(tmp_path / "test" / "0.wav")
    assert len(load_speech_dataset(tmp_path, split="train+test")) == 9
    assert "is not used, since not every split of train+test has such a table" in caplog.text
    (tmp_path / "test.csv").write_text("audio\ntest/0.wav\n")
    both = load_speech_dataset(tmp_path, split="train+test")
    assert both["audio"] == [str(tmp_path / name) for name in ("train/0.wav", "test/0.wav")]


# ---- Paths, row by row ----


@pytest.mark.parametrize("streaming", [False, True])
def test_paths_are_made_absolute_row_by_row(tmp_path, streaming):
    write(tmp_path / "a.wav")
    (tmp_path / "train.csv").write_text(f"audio,text\n,no audio\na.wav,a\n{tmp_path}/a.wav,b\nhttp://x/a.wav,c\n")
    paths = [row["audio"] for row in load_speech_dataset(tmp_path, streaming=streaming)]
    assert paths == [None, str(tmp_path / "a.wav"), str(tmp_path / "a.wav"), "http://x/a.wav"]


@pytest.mark.parametrize("typed", [False, True])
@pytest.mark.parametrize("streaming", [False, True])
def test_relative_paths_in_a_struct(tmp_path, streaming, typed):
    write(tmp_path / "clips" / "a.wav")
    content = (tmp_path / "clips" / "a.wav").read_bytes()
    rows = [
        {"bytes": content, "path": "embedded.wav"},
        {"bytes": None, "path": "clips/a.wav"},
        {"bytes": None, "path": str(tmp_path / "clips" / "a.wav")},
        {"bytes": None, "path": None},
        None,
    ]
    table = pa.table({"audio": pa.array(rows), "text": list("abcde")})
    if typed:
        features = datasets.Features({"audio": datasets.Audio(), "text": datasets.Value("string")})
        table = table.cast(features.arrow_schema)
    pq.write_table(table, tmp_path / "train.parquet")
    loaded = list(load_speech_dataset(tmp_path, streaming=streaming))
    assert [row["text"] for row in loaded] == list("abcde")
    assert all(len(read_audio(row["audio"])) == RATE // 2 for row in loaded[:3])
    assert loaded[0]["audio"]["path"] == "embedded.wav"
    for row in loaded[3:]:
        with pytest.raises(AudioError):
            read_audio(row["audio"])


# ---- Splits ----


@pytest.mark.parametrize("streaming", [False, True])
def test_slices_of_a_saved_dataset(tmp_path, streaming):
    whole = datasets.Dataset.from_dict({"audio": [f"{i}.wav" for i in range(10)], "n": list(range(10))})
    datasets.DatasetDict({"train": whole, "test": whole.select([3]), "none": whole.select([])}).save_to_disk(tmp_path)

    def rows(split):
        return [row["n"] for row in load_speech_dataset(tmp_path, split=split, streaming=streaming)]

    assert rows("train[:50%]") == [0, 1, 2, 3, 4]
    assert rows("train[8:]+test") == [8, 9, 3]
    assert rows("train[-1:]") == [9]
    for split, reason in {
        "train[:0]": "has no rows",
        "none": "has no rows",
        "dev[:50%]": "no split `dev`",
        "train[a:b]": "cannot be loaded",
        "train[": "cannot be loaded",
        "": "cannot be loaded|no split",
    }.items():
        with pytest.raises(AudioError, match=rf"^[^\n]*({reason})[^\n]*$"):
            rows(split)


def test_audio_that_is_null_everywhere(tmp_path):
    (tmp_path / "train.csv").write_text("audio,text\n,a\n,b\n")
    for streaming in (False, True):
        rows = list(load_speech_dataset(tmp_path, streaming=streaming))
        assert [row["audio"] for row in rows] == [None, None]


@pytest.mark.parametrize(
    "content", ["audio\n\xff\xfe".encode("utf-16"), b"\xff\xff\xff", b'audio\n"unclosed', b"\0" * 100]
)
def test_tables_in_a_wrong_encoding_are_one_line(tmp_path, content):
    (tmp_path / "train.csv").write_bytes(content)
    try:
        dataset = load_speech_dataset(tmp_path)
    except AudioError as error:
        assert "\n" not in str(error)
    else:
        assert dataset.column_names == ["audio"]


def test_nested_audio_is_not_decoded():
    features = datasets.Features(
        {"turns": datasets.List({"audio": datasets.Audio(), "text": datasets.Value("string")})}
    )
    turn = {"audio": {"bytes": None, "path": "gone.wav"}, "text": "a"}
    plain = datasets.Dataset.from_dict({"turns": [[turn]]})
    dataset = datasets.Dataset(plain.data.table.cast(features.arrow_schema))
    assert dataset.features == features
    assert disable_audio_decoding(dataset)[0]["turns"] == [turn]


def test_the_working_directory_has_no_say(tmp_path, monkeypatch):
    write(tmp_path / "set" / "a.wav")
    (tmp_path / "set" / "train.csv").write_text("audio\na.wav\n")
    monkeypatch.chdir(tmp_path)
    dataset = load_speech_dataset(Path("set"))
    monkeypatch.chdir("/")
    assert len(read_audio(dataset[0]["audio"])) == RATE // 2
