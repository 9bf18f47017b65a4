"""Lengths of clips, compared with what soundfile wrote."""

import datasets
import numpy as np
import pytest
import soundfile

from skill_hf.data import durations, load_audio_dir
from skill_hf.data.durations import clip_seconds


RATE = 16_000
WRITTEN = {  # name -> seconds, rate
    "a.wav": (0.5, 16_000),
    "b.flac": (1.25, 44_100),
    "c.ogg": (0.75, 8_000),
    "d.mp3": (2.0, 44_100),
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("audio")
    for name, (seconds, rate) in WRITTEN.items():
        noise = np.random.default_rng(0).normal(0, 0.1, round(seconds * rate))
        soundfile.write(folder / name, noise, rate)
    return folder


def seconds_written():
    return [seconds for seconds, _ in WRITTEN.values()]


def rows_of(folder):
    return [{"audio": str(folder / name)} for name in WRITTEN]


@pytest.mark.parametrize("make", [list, datasets.Dataset.from_list], ids=["list", "dataset"])
def test_headers_are_read(folder, make):
    measured = clip_seconds(make(rows_of(folder)), RATE)
    assert measured.dtype == np.float64
    np.testing.assert_allclose(measured, seconds_written(), atol=0.06)  # an mp3 has whole frames
    np.testing.assert_allclose(measured[:2], seconds_written()[:2])


def test_stored_audio_and_precomputed_values(folder):
    stored = [{"audio": {"bytes": (folder / name).read_bytes(), "path": None}} for name in WRITTEN]
    np.testing.assert_array_equal(clip_seconds(stored, RATE), clip_seconds(rows_of(folder), RATE))
    assert clip_seconds([{"input_values": np.zeros(4_000, np.float32)}], RATE).tolist() == [0.25]
    assert clip_seconds(datasets.Dataset.from_dict({"input_values": [[0.0] * 8_000]}), RATE).tolist() == [0.5]


def test_a_clip_that_cannot_be_read_has_no_length(folder):
    assert clip_seconds(
        [{"audio": str(folder / "missing.wav")}, {"other": 1}, *rows_of(folder)[:1]], RATE
    ).tolist() == [
        0.0,
        0.0,
        0.5,
    ]


def test_rows_without_audio_have_no_length():
    assert clip_seconds(datasets.Dataset.from_dict({"text": ["a", "b"]}), RATE).tolist() == [0.0, 0.0]


def test_a_column_in_seconds_is_taken(folder, monkeypatch):
    monkeypatch.setattr(datasets.Dataset, "map", lambda *args, **kwargs: pytest.fail("the headers are read"))
    listed = load_audio_dir(folder)
    np.testing.assert_array_equal(clip_seconds(listed, RATE), listed["length"][:])


def test_a_million_rows_with_lengths_are_not_opened(monkeypatch):
    """A few are, in which the lengths are checked."""
    opened = []

    def count(row, *args):
        opened.append(row)
        return row["length"]

    monkeypatch.setattr(durations, "row_seconds", count)
    rows = [{"length": seconds} for seconds in (1.0, 2.0, 4.0, 8.0)] * 250_000
    assert clip_seconds(rows, RATE).sum() == 3.75e6
    assert len(opened) == 8


@pytest.mark.parametrize("make", [list, datasets.Dataset.from_list], ids=["list", "dataset"])
@pytest.mark.parametrize("values", [[8_000, 55_125, 6_000, 88_200], ["short", "long", "short", "long"]])
def test_a_column_of_anything_else_is_not(folder, values, make, caplog):
    rows = make([row | {"length": value} for row, value in zip(rows_of(folder), values, strict=True)])
    np.testing.assert_allclose(clip_seconds(rows, RATE), seconds_written(), atol=0.06)
    assert "The column `length` has no lengths in seconds" in caplog.text


def test_lengths_of_a_dataset_on_disk_are_kept(folder, tmp_path, monkeypatch):
    datasets.Dataset.from_list(rows_of(folder)).save_to_disk(tmp_path / "set")
    first = clip_seconds(datasets.load_from_disk(tmp_path / "set"), RATE)
    monkeypatch.setattr(durations, "open_row", lambda *args: pytest.fail("read again"))
    np.testing.assert_array_equal(clip_seconds(datasets.load_from_disk(tmp_path / "set"), RATE), first)
