"""The cache of hidden states: what is in it, and that no interruption, bad clip or other setting spoils it."""

import contextlib
import csv
import json
import pickle
from concurrent.futures import ThreadPoolExecutor

import datasets
import numpy as np
import pytest
import soundfile
import torch
from conftest import tiny_teacher
from transformers import Wav2Vec2FeatureExtractor

from skill_hf.data import AudioError
from skill_hf.encoders import FilterBank, PretrainedEncoder
from skill_hf.superb import features
from skill_hf.superb.evaluation import Examples
from skill_hf.superb.features import CachedHiddenStates, cache_hidden_states


LENGTHS = (9000, 4000, 12_000, 6000, 9000)


def samples_of(row: int) -> np.ndarray:
    return (0.1 * np.random.default_rng(row).standard_normal(LENGTHS[row])).astype(np.float32)


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> datasets.Dataset:
    folder = tmp_path_factory.mktemp("clips")
    for row, _ in enumerate(LENGTHS):
        soundfile.write(folder / f"{row}.wav", samples_of(row), 16_000, subtype="FLOAT")
    return dataset_of([str(folder / f"{row}.wav") for row in range(len(LENGTHS))])


def dataset_of(paths: list[str]) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"audio": paths}).cast_column("audio", datasets.Audio(decode=False))


@pytest.fixture(scope="module")
def model():
    return tiny_teacher("large", num_hidden_layers=2)


def encoder_of(model) -> PretrainedEncoder:
    return PretrainedEncoder(model, Wav2Vec2FeatureExtractor(do_normalize=False))


@torch.no_grad()
def alone(model, samples: np.ndarray) -> np.ndarray:
    states = model(torch.from_numpy(samples)[None], output_hidden_states=True).hidden_states
    return torch.stack(states, dim=2)[0].numpy()


class Interrupted(FilterBank):
    """It is stopped before it has encoded its third batch; batches are single clips."""

    calls = 0

    def __call__(self, waveforms):
        self.calls += 1
        if self.calls == 3:
            raise KeyboardInterrupt
        return super().__call__(waveforms)


class Scaled(FilterBank):
    """Features times `scale`."""

    def __init__(self, scale: float):
        super().__init__("mfcc")
        self.scale = scale

    def __call__(self, waveforms):
        return [self.scale * states for states in super().__call__(waveforms)]


class Counted(FilterBank):
    """It counts the clips that it is given."""

    def __init__(self):
        super().__init__("mfcc")
        self.clips = 0

    def __call__(self, waveforms):
        self.clips += len(waveforms)
        return super().__call__(waveforms)


def content(cached: CachedHiddenStates) -> dict[int, bytes]:
    return {row: cached[item].tobytes() for item, row in enumerate(cached.rows)}


# ------------------------------------------------------------------------------------------------------ what is in it
@pytest.mark.parametrize("batch_seconds", [0.1, 60])
@pytest.mark.parametrize("dtype, tolerance", [("float32", 2e-5), ("float16", 5e-3)])
def test_states_are_those_of_a_direct_forward(clips, model, tmp_path, batch_seconds, dtype, tolerance):
    cached = cache_hidden_states(encoder_of(model), clips, tmp_path, dtype=dtype, batch_seconds=batch_seconds)
    assert isinstance(cached, torch.utils.data.Dataset)
    assert len(cached) == len(LENGTHS) and cached.rows == list(range(len(LENGTHS)))
    for row in range(len(LENGTHS)):
        expected = alone(model, samples_of(row))
        assert cached[row].shape == expected.shape and cached[row].dtype == dtype
        np.testing.assert_allclose(cached[row], expected, atol=tolerance)


def test_half_precision_is_rounded_to_nearest(clips, tmp_path):
    exact = cache_hidden_states(FilterBank("fbank"), clips, tmp_path / "exact", dtype="float32")
    half = cache_hidden_states(FilterBank("fbank"), clips, tmp_path / "half")
    for row in range(len(LENGTHS)):
        np.testing.assert_array_equal(half[row], exact[row].astype(np.float16))
    sizes = [(tmp_path / name / features.STATES).stat().st_size for name in ("exact", "half")]
    assert sizes == [4 * 240 * sum(map(len, exact)), 2 * 240 * sum(map(len, exact))]


def test_means_over_time(clips, model, tmp_path):
    cached = cache_hidden_states(encoder_of(model), clips, tmp_path, mean_over_time=True, dtype="float32")
    for row in range(len(LENGTHS)):
        assert cached[row].shape == (1, 3, 32)
        np.testing.assert_allclose(cached[row][0], alone(model, samples_of(row)).mean(0), atol=2e-5)


def test_long_clips_are_cropped_to_their_first_seconds(clips, model, tmp_path):
    cached = cache_hidden_states(encoder_of(model), clips, tmp_path, max_seconds=0.3, dtype="float32")
    for row, length in enumerate(LENGTHS):
        expected = alone(model, samples_of(row)[: min(length, 4800)])
        np.testing.assert_allclose(cached[row], expected, atol=2e-5)


def test_it_can_be_sent_to_other_processes_without_what_it_holds(clips, tmp_path):
    cached = cache_hidden_states(FilterBank("mfcc"), clips, tmp_path)
    sent = pickle.dumps(cached)
    assert len(sent) < 1000 < (tmp_path / features.STATES).stat().st_size
    assert content(pickle.loads(sent)) == content(cached)


# ----------------------------------------------------------------------------------------------------------- resuming
def test_what_is_done_is_not_done_again(clips, tmp_path):
    first, second = Counted(), Counted()
    before = content(cache_hidden_states(first, clips, tmp_path))
    times = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert set(times) == {features.STATES, features.INDEX, features.SETTINGS, features.LOCK}
    assert content(cache_hidden_states(second, clips, tmp_path)) == before
    assert (first.clips, second.clips) == (len(LENGTHS), 0)
    assert (tmp_path / features.SETTINGS).stat().st_mtime_ns == times[features.SETTINGS]


def test_a_run_goes_on_where_it_was_stopped(clips, tmp_path):
    whole = content(cache_hidden_states(FilterBank("mfcc"), clips, tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        cache_hidden_states(Interrupted("mfcc"), clips, tmp_path / "parts", batch_seconds=0.1)
    assert len(CachedHiddenStates(tmp_path / "parts")) == 2
    rest = Counted()
    assert content(cache_hidden_states(rest, clips, tmp_path / "parts")) == whole
    assert rest.clips == 3


def test_two_at_once_do_the_work_once(clips, tmp_path):
    """As the processes of a run on several devices do; one that finds the other at work waits for it."""
    whole = content(cache_hidden_states(FilterBank("mfcc"), clips, tmp_path / "whole"))
    encoders = [Counted(), Counted()]
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(cache_hidden_states, encoder, clips, tmp_path / "both") for encoder in encoders]
        assert [content(run.result()) for run in runs] == [whole, whole]
    assert sum(encoder.clips for encoder in encoders) == len(LENGTHS)
    assert len(index_lines(tmp_path / "both")) == len(LENGTHS)


def index_lines(directory) -> list[str]:
    return (directory / features.INDEX).read_text().splitlines(keepends=True)


@pytest.mark.parametrize("lost", [1, 2, 8, 14])
def test_an_index_line_that_was_cut_off(clips, tmp_path, lost):
    """A line has 8 to 10 characters: by the largest cut a line and a part of the one before are gone."""
    whole = content(cache_hidden_states(FilterBank("mfcc"), clips, tmp_path))
    text = (tmp_path / features.INDEX).read_text()
    (tmp_path / features.INDEX).write_text(text[:-lost])
    rest = Counted()
    assert content(cache_hidden_states(rest, clips, tmp_path)) == whole
    assert rest.clips == len(LENGTHS) - text[:-lost].count("\n")
    assert sorted(index_lines(tmp_path)) == sorted(text.splitlines(keepends=True))


@pytest.mark.parametrize("written", [0, 1, 78, 500])
def test_states_that_were_being_written(clips, tmp_path, written):
    """Bytes of a clip that the index doesn't list yet, at and beside the bounds of a frame of 78."""
    whole = content(cache_hidden_states(FilterBank("mfcc"), clips, tmp_path))
    *lines, last = index_lines(tmp_path)
    (tmp_path / features.INDEX).write_text("".join(lines))
    start = int(last.split(",")[1]) * 39 * 2
    states = (tmp_path / features.STATES).read_bytes()
    (tmp_path / features.STATES).write_bytes(states[: start + written])
    assert content(cache_hidden_states(FilterBank("mfcc"), clips, tmp_path)) == whole
    assert (tmp_path / features.STATES).stat().st_size == len(states)


@pytest.mark.parametrize("size", [0, 100, -1])
def test_states_that_never_reached_the_disk_are_written_again(clips, tmp_path, size):
    """After a power cut, the index may be ahead of the states."""
    whole = content(cache_hidden_states(FilterBank("mfcc"), clips, tmp_path))
    states = (tmp_path / features.STATES).read_bytes()
    (tmp_path / features.STATES).write_bytes(states[:size])
    assert content(cache_hidden_states(FilterBank("mfcc"), clips, tmp_path)) == whole


def test_a_progress_bar_that_is_off_changes_nothing(clips, tmp_path, monkeypatch):
    whole = content(cache_hidden_states(FilterBank("mfcc"), clips, tmp_path / "with"))
    monkeypatch.setattr(features.tqdm, "__init__", quiet(features.tqdm.__init__))
    assert content(cache_hidden_states(FilterBank("mfcc"), clips, tmp_path / "without")) == whole


def quiet(init):
    """As `TQDM_DISABLE=1` does, which is read when tqdm is imported."""
    return lambda self, *args, **kwargs: init(self, *args, **kwargs, disable=True)


# ---------------------------------------------------------------------------------------------------------- bad clips
def spoil(clips: datasets.Dataset, directory, bad: dict[int, str]) -> datasets.Dataset:
    paths = [audio["path"] for audio in clips["audio"]]
    for row, kind in bad.items():
        path = directory / f"bad{row}.wav"
        if kind == "text":
            path.write_text("This is no audio.")
        elif kind == "short":
            soundfile.write(path, np.zeros(300), 16_000)
        paths[row] = str(path)
    return dataset_of(paths)


def test_unreadable_clips_are_left_out_and_targets_stay_with_theirs(clips, tmp_path, caplog):
    whole = content(cache_hidden_states(FilterBank("mfcc"), clips, tmp_path / "whole"))
    spoilt = spoil(clips, tmp_path, {0: "missing", 2: "text", 3: "short"})
    cached = cache_hidden_states(FilterBank("mfcc"), spoilt, tmp_path / "spoilt")
    assert cached.rows == [1, 4] and len(cached) == 2
    assert content(cached) == {row: whole[row] for row in (1, 4)}
    named = [record.getMessage() for record in caplog.records if "Left out" in record.getMessage()]
    assert len(named) == 3
    for name in ("bad0.wav` does not exist", "bad2.wav` cannot be decoded as audio", "bad3.wav` has 300 samples"):
        assert sum(name in line for line in named) == 1
    examples = Examples(cached, [f"target {row}" for row in range(len(LENGTHS))])
    assert [examples[item]["target"] for item in range(len(examples))] == ["target 1", "target 4"]
    np.testing.assert_array_equal(examples[1]["hidden_states"], cached[1])


def test_a_clip_that_was_mended_comes_in_later(clips, tmp_path):
    whole = content(cache_hidden_states(FilterBank("mfcc"), clips, tmp_path / "whole"))
    spoilt = spoil(clips, tmp_path, {0: "missing"})
    assert cache_hidden_states(FilterBank("mfcc"), spoilt, tmp_path / "cache").rows == [1, 2, 3, 4]
    soundfile.write(tmp_path / "bad0.wav", samples_of(0), 16_000, subtype="FLOAT")
    cached = cache_hidden_states(FilterBank("mfcc"), spoilt, tmp_path / "cache")
    assert cached.rows == [0, 1, 2, 3, 4] and content(cached) == whole


def test_no_clip_at_all_is_an_error(clips, tmp_path):
    spoilt = spoil(clips, tmp_path, dict.fromkeys(range(5), "missing"))
    with pytest.raises(AudioError, match="None of the 5 clips can be read; the first: .*bad0.wav` does not exist"):
        cache_hidden_states(FilterBank("mfcc"), spoilt, tmp_path / "cache")


# -------------------------------------------------------------------------------------------------------- clear errors
@pytest.mark.parametrize(
    "changed, message",
    [
        ({"dtype": "float32"}, "`dtype` 'float16', not 'float32'"),
        ({"mean_over_time": True}, "`mean_over_time` False, not True"),
        ({"max_seconds": 3.0}, "`max_seconds` None, not 3.0"),
        ({"encoder": FilterBank("fbank")}, "`hidden_size` 39, not 240"),
        ({"settings": {"model": "b"}}, "`model` 'a', not 'b'"),
        ({"settings": {}}, "`model` 'a', not None"),
        ({"settings": {"model": "a", "seed": 1}}, "`seed` None, not 1"),
        ({"rows": 4}, "`num_rows` 5, not 4"),
    ],
)
def test_other_settings_want_another_directory(clips, tmp_path, changed, message):
    same = {"encoder": FilterBank("mfcc"), "settings": {"model": "a"}, "directory": tmp_path}
    before = content(cache_hidden_states(dataset=clips, **same))
    rows = changed.get("rows", len(clips))
    other = same | {name: value for name, value in changed.items() if name != "rows"}
    with pytest.raises(ValueError, match=f"{message}; choose another directory"):
        cache_hidden_states(dataset=clips.select(range(rows)), **other)
    assert content(cache_hidden_states(dataset=clips, **same)) == before


@pytest.mark.parametrize("scale", [float("nan"), 1e6])
def test_nan_and_overflow_are_errors(clips, tmp_path, scale):
    message = (
        "contain NaN or infinite values" if scale != scale else r"reach .*, too large for float16 \(at most 65504\)"
    )
    with pytest.raises(ValueError, match=f"The hidden states of row 1 {message}"):
        cache_hidden_states(Scaled(scale), clips, tmp_path, batch_seconds=0.1)
    assert index_lines(tmp_path) == []
    if scale == 1e6:
        cached = cache_hidden_states(Scaled(scale), clips, tmp_path / "float32", dtype="float32")
        assert np.abs(cached[0]).max() > 65_504


def test_a_disk_that_is_too_small_is_told_early(clips, tmp_path, monkeypatch):
    """Clips are of 23, 36, 54, 54 and 73 frames; what is left is taken to be like those that were written."""
    usage = features.shutil.disk_usage(tmp_path)
    for frames, number in ((23 + 91, 1), (23 + 92, 2), (240, 5)):
        directory = tmp_path / str(frames)

        def disk_usage(_, frames=frames, directory=directory):
            return usage._replace(free=frames * 78 - (directory / features.STATES).stat().st_size)

        monkeypatch.setattr(features.shutil, "disk_usage", disk_usage)
        message = r"need .* GB more, but the disk of .* has .* GB left; choose another `cache_dir`"
        with pytest.raises(ValueError, match=message) if number < 5 else contextlib.nullcontext():
            cache_hidden_states(FilterBank("mfcc"), clips, directory, batch_seconds=0.1)
        assert len(CachedHiddenStates(directory)) == number


def test_a_data_set_without_audio(tmp_path):
    dataset = datasets.Dataset.from_dict({"sound": ["a.wav"], "label": ["a"]})
    with pytest.raises(ValueError, match="no column `audio`, only sound, label; rename"):
        cache_hidden_states(FilterBank("mfcc"), dataset, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_index_and_settings_can_be_read_by_others(clips, tmp_path):
    cached = cache_hidden_states(FilterBank("mfcc"), clips, tmp_path, settings={"model": "mfcc"})
    with open(tmp_path / features.INDEX, newline="") as file:
        rows = [tuple(map(int, row)) for row in csv.reader(file)]
    states = np.fromfile(tmp_path / features.STATES, "float16").reshape(-1, 1, 39)
    for row, start, frames in rows:
        np.testing.assert_array_equal(states[start : start + frames], cached[row])
    settings = json.loads((tmp_path / features.SETTINGS).read_text())
    assert settings["model"] == "mfcc" and settings["num_rows"] == 5
