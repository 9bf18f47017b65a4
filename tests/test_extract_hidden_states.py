"""`examples/extract_hidden_states.py` on clips of several lengths, rates and formats."""

import csv
import json
import re
import shutil

import datasets
import numpy as np
import pytest
import soundfile
import torch
from conftest import WIDE_GROUPS, tiny_teacher
from example_helpers import DEMO, isolate, read_metadata, run_main, save_feature_extractor, save_student
from safetensors import safe_open
from safetensors.numpy import load_file
from transformers import AutoFeatureExtractor, AutoModel, BertConfig

from skill_hf.data import read_audio


HELDOUT = DEMO / "audio" / "heldout"

import example_utils  # noqa: E402
import extract_hidden_states  # noqa: E402


# Samples of each clip.
LENGTHS = (6000, 9000, 9000, 12_000, 4000, 9000, 401)
MODELS = ("student_base", "student_large", "stock_base", "stock_large")


def name_of(index: int) -> str:
    return f"{('even', 'odd')[index % 2]}/{index}.{('wav', 'flac', 'wav')[index % 3]}"


@pytest.fixture(autouse=True)
def isolated(tmp_path_factory, monkeypatch):
    isolate(tmp_path_factory, monkeypatch)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A folder with `audio`, crops of real speech in two folders and three formats, and a model of each kind."""
    folder = tmp_path_factory.mktemp("extract")
    speech = read_audio(HELDOUT / read_metadata(HELDOUT)[0]["file_name"])
    for index, length in enumerate(LENGTHS):
        path = folder / "audio" / name_of(index)
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, speech[8000 * index : 8000 * index + length], 16_000)
    for layout in ("base", "large"):
        save_student(folder / f"student_{layout}", layout)
        tiny_teacher(layout, num_hidden_layers=2).save_pretrained(folder / f"stock_{layout}")
        save_feature_extractor(folder / f"stock_{layout}")
    return folder


def settings_of(shared, output_dir, **settings) -> dict:
    return {
        "model": shared / "student_base",
        "audio_dir": shared / "audio",
        "output_dir": output_dir,
        "device": "cpu",
        **settings,
    }


def extract(shared, output_dir, **settings) -> dict[str, np.ndarray]:
    """What was written, by the name of each clip."""
    assert run_main(extract_hidden_states, settings_of(shared, output_dir, **settings))[0] == 0
    return {row["clip"]: read_states(output_dir / row["file_name"]) for row in index_of(output_dir)}


def index_of(output_dir) -> list[dict]:
    with open(output_dir / "index.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def read_states(path) -> np.ndarray:
    return np.load(path) if path.suffix == ".npy" else load_file(path)["hidden_states"]


@torch.no_grad()
def states_alone(directory, path) -> np.ndarray:
    """All hidden states of one clip by itself, `(layers, frames, hidden size)`, by the model as it is published."""
    feature_extractor = AutoFeatureExtractor.from_pretrained(directory)
    audio, rate = soundfile.read(path, dtype="float32")
    inputs = feature_extractor(audio, sampling_rate=rate, return_tensors="pt")
    model = AutoModel.from_pretrained(directory, dtype=torch.float32).eval()
    return torch.stack(model(inputs.input_values, output_hidden_states=True).hidden_states)[:, 0].numpy()


# ------------------------------------------------------------------------------------------------------ what it writes
@pytest.mark.parametrize("model", MODELS)
def test_states_are_those_of_the_clip_alone(shared, tmp_path, model):
    written = extract(shared, tmp_path, model=shared / model)
    assert set(written) == set(map(name_of, range(len(LENGTHS))))
    for name, states in written.items():
        alone = states_alone(shared / model, shared / "audio" / name)
        assert states.shape == alone.shape and states.dtype == np.float32
        np.testing.assert_allclose(states, alone, atol=1e-4)


def test_a_group_norm_that_sees_padding_has_equal_lengths_in_a_batch(shared, tmp_path, monkeypatch):
    batches = []
    make_batches = extract_hidden_states.make_batches

    def watched(*args):
        for batch in make_batches(*args):
            batches.append([len(samples) for _, samples in batch])
            yield batch

    monkeypatch.setattr(extract_hidden_states, "make_batches", watched)
    extract(shared, tmp_path / "stock", model=shared / "stock_base")
    assert batches == [[401], [4000], [6000], [9000, 9000, 9000], [12_000]]
    batches.clear()
    extract(shared, tmp_path / "student")
    assert batches == [sorted(LENGTHS)]


def test_index_lists_clips_samples_and_frames(shared, tmp_path):
    written = extract(shared, tmp_path)
    rows = {row["clip"]: row for row in index_of(tmp_path)}
    for name, states in written.items():
        assert int(rows[name]["samples"]) == soundfile.info(shared / "audio" / name).frames
        assert int(rows[name]["frames"]) == states.shape[1]
        with safe_open(tmp_path / rows[name]["file_name"], framework="np") as file:
            assert file.metadata() == {"clip": name}


@pytest.mark.parametrize("file_format", ["safetensors", "npy"])
def test_layers_mean_and_precision(shared, tmp_path, file_format):
    everything = extract(shared, tmp_path / "all")
    some = extract(shared, tmp_path / "some", layers=[-1, 0], file_format=file_format)
    means = extract(shared, tmp_path / "means", mean_over_time=True, file_format=file_format, save_dtype="float16")
    for name, states in everything.items():
        np.testing.assert_allclose(some[name], states[[2, 0]], atol=1e-5)
        assert means[name].dtype == np.float16 and means[name].shape == (3, 32)
        np.testing.assert_allclose(means[name], states.mean(1), atol=5e-3)


def test_bfloat16_is_near_float32(shared, tmp_path):
    save_student(tmp_path / "student", **WIDE_GROUPS)
    exact = extract(shared, tmp_path / "float32", model=tmp_path / "student")
    near = extract(shared, tmp_path / "bfloat16", model=tmp_path / "student", dtype="bfloat16")
    for name, states in exact.items():
        assert near[name].dtype == np.float32 and not np.array_equal(near[name], states)
        cosine = (near[name] * states).sum() / np.linalg.norm(near[name]) / np.linalg.norm(states)
        assert cosine > 0.99


def test_long_clips_are_cropped_if_asked(shared, tmp_path):
    written = extract(shared, tmp_path, max_seconds=0.25)
    assert {states.shape[1] for states in written.values()} == {1, 12}


def test_small_buffers_and_batches_give_the_same(shared, tmp_path):
    whole = extract(shared, tmp_path / "whole")
    parts = extract(shared, tmp_path / "parts", buffer_clips=3, batch_seconds=0.8)
    assert whole.keys() == parts.keys()
    for name, states in whole.items():
        np.testing.assert_allclose(parts[name], states, atol=1e-5)


@pytest.mark.parametrize("equal_lengths", [False, True])
@pytest.mark.parametrize("most_samples, buffer_clips", [(1, 3), (20, 100), (25, 4), (1000, 7)])
def test_batches_hold_every_clip_once_within_bounds(equal_lengths, most_samples, buffer_clips):
    lengths = np.random.default_rng(0).integers(1, 12, 60)
    clips = [(str(index), np.zeros(length)) for index, length in enumerate(lengths)]
    batches = list(extract_hidden_states.make_batches(iter(clips), most_samples, buffer_clips, equal_lengths))
    assert sorted(name for batch in batches for name, _ in batch) == sorted(name for name, _ in clips)
    for batch in batches:
        sizes = [len(samples) for _, samples in batch]
        assert len(batch) == 1 or max(sizes) * len(sizes) <= most_samples
        assert len(batch) <= buffer_clips
        assert len(set(sizes)) == 1 or not equal_lengths


# ------------------------------------------------------------------------------------------------------------ resuming
def test_a_run_goes_on_where_it_was_stopped(shared, tmp_path, monkeypatch):
    whole = extract(shared, tmp_path / "whole")
    save, saved = extract_hidden_states.Folder.save, []

    def stop_after_three(self, name, *args):
        if len(saved) == 3:
            raise KeyboardInterrupt
        saved.append(name)
        save(self, name, *args)

    monkeypatch.setattr(extract_hidden_states.Folder, "save", stop_after_three)
    with pytest.raises(KeyboardInterrupt):
        run_main(extract_hidden_states, settings_of(shared, tmp_path / "parts"))
    monkeypatch.undo()
    with open(tmp_path / "parts" / "index.csv", "a") as file:
        file.write("even/6.wav,even/6.wa")  # a line that was cut off
    times = {name: (tmp_path / "parts" / f"{name}.safetensors").stat().st_mtime_ns for name in saved}
    parts = extract(shared, tmp_path / "parts")
    assert times == {name: (tmp_path / "parts" / f"{name}.safetensors").stat().st_mtime_ns for name in saved}
    assert len(index_of(tmp_path / "parts")) == len(whole) == len(parts) == 7
    for name, states in whole.items():
        np.testing.assert_allclose(parts[name], states, atol=1e-5)
    assert not list((tmp_path / "parts").rglob("*.part"))


def test_a_file_that_is_gone_is_written_again_and_new_clips_come_in(shared, tmp_path):
    shutil.copytree(shared / "audio", tmp_path / "audio")
    extract(shared, tmp_path / "out", audio_dir=tmp_path / "audio")
    (tmp_path / "out" / "even" / "0.wav.safetensors").unlink()
    shutil.copy(shared / "audio" / "even" / "0.wav", tmp_path / "audio" / "new.wav")
    again = extract(shared, tmp_path / "out", audio_dir=tmp_path / "audio")
    assert len(again) == 8
    np.testing.assert_allclose(again["new.wav"], again["even/0.wav"], atol=1e-5)


def test_other_settings_want_another_folder(shared, tmp_path):
    extract(shared, tmp_path, layers=[0])
    status, _, errors = run_main(extract_hidden_states, settings_of(shared, tmp_path, layers=[1]))
    assert status == 2
    assert errors == [f"error: {tmp_path} has hidden states with `layers` [0], not [1]; choose another `output_dir`."]
    assert json.loads((tmp_path / "settings.json").read_text())["layers"] == [0]


# ------------------------------------------------------------------------------------------------- what is in the way
@pytest.mark.parametrize("name", ["index.csv", "even/0.wav.safetensors", "settings.json"])
def test_files_of_something_else_stay(shared, tmp_path, name):
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    status, _, errors = run_main(extract_hidden_states, settings_of(shared, tmp_path / "out"))
    assert status == 2 and len(errors) == 1 and "choose another `output_dir`" in errors[0] and name in errors[0]
    assert [file for file in (tmp_path / "out").rglob("*") if file.is_file()] == [path] and path.read_text() == "{}"


def test_an_index_of_something_else_beside_these_settings_stays(shared, tmp_path):
    extract(shared, tmp_path, layers=[0])
    (tmp_path / "index.csv").write_text("my,own,table\n1,2,3\n")
    status, _, errors = run_main(extract_hidden_states, settings_of(shared, tmp_path, layers=[0]))
    assert status == 2 and f"{tmp_path / 'index.csv'} was not written by this script" in errors[0]
    assert (tmp_path / "index.csv").read_text() == "my,own,table\n1,2,3\n"


def test_names_of_any_length_and_case_have_files():
    long = ["é" * 120, "é" * 127, "a" * 255, "a" * 254 + "b", "x" * 300 + "/" + "y" * 300]
    files = extract_hidden_states.file_names(long, ".safetensors")
    for file in files.values():
        assert max(len(part.encode()) for part in f"{file}.part".split("/")) <= 255
    assert len(set(files.values())) == len(long)
    assert files == extract_hidden_states.file_names(long[::-1], ".safetensors")  # the same in each run
    assert extract_hidden_states.file_names(["A", "a"], ".npy") == {"A": "A.npy", "a": "a.npy"}
    for pair in (["A", "a"], ["\u00e9", "e\u0301"], ["Straße", "STRASSE"]):
        with pytest.raises(ValueError, match="map to the same file"):
            extract_hidden_states.file_names(pair, ".npy", folds_case=True)


def test_a_clip_s_name_may_have_255_bytes(shared, tmp_path):
    shutil.copytree(shared / "audio" / "even", tmp_path / "audio")
    name = "é" * 125 + "x.wav"
    shutil.copy(tmp_path / "audio" / "0.wav", tmp_path / "audio" / name)
    assert len(name.encode()) == 255
    written = extract(shared, tmp_path / "out", audio_dir=tmp_path / "audio")
    np.testing.assert_allclose(written[name], written["0.wav"], atol=1e-5)
    assert extract(shared, tmp_path / "out", audio_dir=tmp_path / "audio").keys() == written.keys()


# -------------------------------------------------------------------------------------------------- what is too large
def test_long_clips_are_left_out_named_and_passed_over_again(shared, tmp_path, caplog):
    settings = settings_of(shared, tmp_path, longest_seconds=0.6)
    for new in (6, 0):
        caplog.clear()
        assert run_main(extract_hidden_states, settings)[0] == 0
        assert f"{name_of(3)} is longer than 0.6 s; raise `longest_seconds`" in caplog.text
        assert f"6 clips in {tmp_path}, {new} of them new, 1 left out" in caplog.text
    assert extract_hidden_states.ExtractArguments().longest_seconds == 120
    assert len(extract(shared, tmp_path / "cropped", longest_seconds=0.6, max_seconds=0.7)) == 7


def test_a_clip_that_the_memory_is_too_small_for_is_left_out(shared, tmp_path, monkeypatch, caplog):
    call, sizes = extract_hidden_states.PretrainedEncoder.__call__, []

    def small(self, waveforms):
        sizes.append(len(waveforms))
        if sum(map(len, waveforms)) > 10_000:
            raise RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
            )
        return call(self, waveforms)

    whole = extract(shared, tmp_path / "whole")
    monkeypatch.setattr(extract_hidden_states.PretrainedEncoder, "__call__", small)
    written = extract(shared, tmp_path / "out")
    assert sizes == [7, *[1] * 7] and written.keys() == whole.keys() - {name_of(3)}
    for name, states in written.items():
        np.testing.assert_allclose(states, whole[name], atol=1e-5)
    assert f"Left out: out of memory for {name_of(3)} of 1 s" in caplog.text

    def broken(self, waveforms):
        raise RuntimeError("a bug")

    monkeypatch.setattr(extract_hidden_states.PretrainedEncoder, "__call__", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        run_main(extract_hidden_states, settings_of(shared, tmp_path / "broken"))


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (1e6, r"the clip .*\.(wav|flac) reach .*, too large for float16 \(at most 65504\)"),
        (np.nan, "contain NaN or infinite"),
    ],
)
def test_values_too_large_for_half_precision_are_an_error(shared, tmp_path, monkeypatch, scale, message):
    call = extract_hidden_states.PretrainedEncoder.__call__
    monkeypatch.setattr(
        extract_hidden_states.PretrainedEncoder,
        "__call__",
        lambda self, clips: [scale * states for states in call(self, clips)],
    )
    status, _, errors = run_main(extract_hidden_states, settings_of(shared, tmp_path / "half", save_dtype="float16"))
    assert status == 2 and len(errors) == 1 and re.search(message, errors[0])
    assert index_of(tmp_path / "half") == []
    if scale == 1e6:
        assert len(extract(shared, tmp_path / "whole")) == 7


# ------------------------------------------------------------------------------------------------------------ datasets
def save_dataset(shared, directory, **columns):
    paths = sorted(map(str, (shared / "audio").rglob("*.*")))[:2]
    datasets.Dataset.from_dict({"sound": paths, **columns}).save_to_disk(directory)
    return {"audio_dir": None, "dataset_name": directory, "audio_column": "sound"}


def run_on_dataset(shared, tmp_path, columns, **settings):
    settings = settings_of(shared, tmp_path / "out", **save_dataset(shared, tmp_path / "data", **columns), **settings)
    return run_main(extract_hidden_states, {name: value for name, value in settings.items() if value is not None})


def test_a_dataset_s_clips_are_named_by_row_or_column(shared, tmp_path):
    columns = {"id": ["a/x", "b"]}
    assert run_on_dataset(shared, tmp_path / "rows", columns)[0] == 0
    assert sorted(row["clip"] for row in index_of(tmp_path / "rows" / "out")) == ["00000000", "00000001"]
    assert run_on_dataset(shared, tmp_path / "names", columns, id_column="id")[0] == 0
    assert {row["file_name"] for row in index_of(tmp_path / "names" / "out")} == {"a/x.safetensors", "b.safetensors"}


@pytest.mark.parametrize(
    "columns, message",
    [
        ({"id": ["a", "a"]}, "Two clips have the name 'a'; choose another `id_column`"),
        ({"id": ["a", "./a"]}, "The clips 'a' and './a' map to the same file, a.safetensors; choose another"),
        ({"id": ["b//a", "b/./a/"]}, "The clips 'b//a' and 'b/./a/' map to the same file, b/a.safetensors"),
        ({"id": ["a.safetensors/b", "a"]}, "The file of 'a' has the path of a folder of 'a.safetensors/b'"),
        ({"id": ["a", "../b"]}, "'../b' cannot name a file; choose another `id_column`"),
        ({"id": ["a", "a/../b"]}, "'a/../b' cannot name a file"),
        ({"id": ["/etc/b", "a"]}, "'/etc/b' cannot name a file"),
        ({"id": ["", "a"]}, "'' cannot name a file"),
        ({"id": ["a", "./"]}, "'./' cannot name a file"),
        ({"id": ["a", " "]}, "' ' cannot name a file"),
        ({"id": ["a", "b\0c"]}, "'b\\x00c' cannot name a file"),
        ({"id": ["a", None]}, "'' cannot name a file"),
        ({"id": [0.5, 1.5]}, "'' cannot name a file"),
        ({"id": [["a"], ["b"]]}, "'' cannot name a file"),
        ({"name": ["a", "b"]}, "has no column `id`; set `id_column` to one of: audio, name"),
    ],
)
def test_a_column_must_name_files(shared, tmp_path, columns, message):
    status, _, errors = run_on_dataset(shared, tmp_path, columns, id_column="id")
    assert status == 2 and len(errors) == 1 and message in errors[0]
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    "settings, message",
    [
        ({"model": "no/such-directory/x"}, "The model `no/such-directory/x` cannot be loaded"),
        ({"model": "{shared}/bert"}, "is a `bert`, not a waveform encoder"),
        ({"layers": [3]}, "`layers` contains 3, but the hidden states of `.*` are 0 to 2"),
        ({"layers": [0, -4]}, "`layers` contains -4"),
        ({"audio_dir": "no-such-folder"}, "The audio directory `no-such-folder` does not exist"),
        ({"dataset_name": "x"}, "Pass the audio as either `audio_dir` or `dataset_name`"),
        ({"id_column": "id"}, "`id_column` needs `dataset_name`"),
        ({"batch_seconds": 0}, "`batch_seconds` must be a number above 0 and at most 1000000, but is 0.0"),
        ({"max_seconds": -2}, "`max_seconds` must be a number above 0 and at most 1000000, but is -2.0"),
        ({"max_seconds": 0.01}, "None of the 7 clips can be used"),
        ({"file_format": "csv"}, "invalid choice: 'csv'"),
        ({"device": "abacus"}, "The device `abacus` cannot be used"),
    ],
)
def test_bad_input_is_one_line(shared, tmp_path, settings, message):
    BertConfig().save_pretrained(shared / "bert")
    settings = settings_of(shared, tmp_path / "out", **settings)
    settings["model"] = str(settings["model"]).format(shared=shared)
    status, _, errors = run_main(extract_hidden_states, settings)
    assert status == 2
    assert len(errors) == 1 and re.search(message, errors[0]), errors


def test_without_a_student_it_says_how_to_make_one(shared, tmp_path, monkeypatch):
    monkeypatch.setattr(example_utils, "DEMO_STUDENT", tmp_path / "demo")
    status, _, errors = run_main(extract_hidden_states, settings_of(shared, tmp_path, model=tmp_path / "demo"))
    assert status == 2 and "yet: run `make demo`" in errors[0]


def test_unreadable_clips_are_left_out_and_named(shared, tmp_path, caplog):
    shutil.copytree(shared / "audio", tmp_path / "audio")
    soundfile.write(tmp_path / "audio" / "short.wav", np.zeros(300), 16_000)
    assert len(extract(shared, tmp_path / "out", audio_dir=tmp_path / "audio")) == 7
    assert "short.wav` has 300 samples" in caplog.text and "7 of them new, 1 left out" in caplog.text


def test_long_clips_are_read_in_windows(shared, tmp_path):
    speech = read_audio(HELDOUT / read_metadata(HELDOUT)[0]["file_name"])
    audio = tmp_path / "audio"
    audio.mkdir()
    soundfile.write(audio / "long.wav", np.resize(speech, 16_000 * 7 + 123), 16_000)
    soundfile.write(audio / "short.wav", speech[:16_000], 16_000)
    settings = {"audio_dir": audio, "model": shared / "student_large", "file_format": "npy"}
    whole = extract(shared, tmp_path / "whole", **settings)
    windows = {"window_seconds": 3, "context_seconds": 1}
    in_windows = extract(shared, tmp_path / "windows", **settings, **windows)
    assert {row["clip"]: row["samples"] for row in index_of(tmp_path / "windows")} == {
        row["clip"]: row["samples"] for row in index_of(tmp_path / "whole")
    }
    np.testing.assert_allclose(in_windows["short.wav"], whole["short.wav"], atol=1e-5)
    assert in_windows["long.wav"].shape == whole["long.wav"].shape
    np.testing.assert_allclose(in_windows["long.wav"][0], whole["long.wav"][0], atol=2e-4)
    means = extract(shared, tmp_path / "means", **settings, **windows, mean_over_time=True)
    np.testing.assert_allclose(means["long.wav"], in_windows["long.wav"].mean(1), atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window_seconds": 30}, "set `file_format` to npy"),
        ({"window_seconds": 30, "max_seconds": 5, "file_format": "npy"}, "`max_seconds` crops"),
        ({"window_seconds": 10, "file_format": "npy"}, "`window_seconds` (10) must be more than twice"),
    ],
)
def test_windows_that_do_not_fit_are_one_line(shared, tmp_path, settings, message):
    status, _, (error,) = run_main(extract_hidden_states, settings_of(shared, tmp_path / "out", **settings))
    assert status == 2 and message in error
