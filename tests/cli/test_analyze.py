"""`skill-hf analyze`: matrices, groups and their stability as text, as JSON and as pictures."""

import json
import shutil

import numpy as np
import pytest
import soundfile as sf
from conftest import tiny_teacher
from example_helpers import isolate, save_feature_extractor, save_student
from transformers import AutoModel, Wav2Vec2FeatureExtractor

from skill_hf import SkillConfig, cluster_layers, layer_similarity
from skill_hf.cli import analyze


@pytest.fixture(autouse=True)
def isolated(tmp_path_factory, monkeypatch):
    isolate(tmp_path_factory, monkeypatch)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A `teacher`, its `student`, a `wide` model, and two folders of clips: `english` and `dutch`."""
    folder = tmp_path_factory.mktemp("analyze")
    tiny_teacher().save_pretrained(folder / "teacher")
    tiny_teacher("large", hidden_size=48, num_hidden_layers=2).save_pretrained(folder / "wide")
    for name in ("teacher", "wide"):
        save_feature_extractor(folder / name)
    save_student(folder / "student")
    rng = np.random.default_rng(0)
    for name, number, smooth in (("english", 6, 1), ("dutch", 5, 30)):
        (folder / name).mkdir()
        for index in range(number):
            noise = np.convolve(rng.standard_normal(6_000), np.ones(smooth) / smooth, mode="same")
            sf.write(folder / name / f"{index}.wav", 0.1 * noise, 16_000)
    return folder


def run(capsys, *words) -> tuple[int, str, list[str]]:
    capsys.readouterr()
    status = analyze.main([str(word) for word in words])
    output = capsys.readouterr()
    return status, output.out, [line for line in output.err.splitlines() if line.startswith("error")]


def in_json(capsys, *words) -> dict:
    status, out, errors = run(capsys, *words, "--json")
    assert (status, errors, out.count("\n")) == (0, [], 1)
    return json.loads(out)


def clips_of(folder) -> list[np.ndarray]:
    extractor = Wav2Vec2FeatureExtractor(do_normalize=True)
    clips = [sf.read(path, dtype="float32")[0] for path in sorted(folder.iterdir())]
    return [extractor(clip, sampling_rate=16_000).input_values[0] for clip in clips]


# ------------------------------------------------------------------------------------------------------------- numbers
def test_one_model_on_one_folder(shared, capsys):
    found = in_json(capsys, shared / "teacher", "--audio_dir", shared / "english", "--num_parts", 2)
    (one,) = found.pop("sets")
    assert found == {
        "model": str(shared / "teacher"),
        "other": None,
        "measure": "cka",
        "linkage": "average",
        "contiguous": False,
        "hidden_states": [0, 1, 2, 3],
        "other_hidden_states": None,
        "difference": None,
    }
    assert (one["clips"], one["seconds"]) == (6, 6 * 6_000 / 16_000)
    teacher = AutoModel.from_pretrained(shared / "teacher")
    expected = layer_similarity(teacher, clips_of(shared / "english"), progress=False)
    np.testing.assert_allclose(one["similarity"], expected, atol=1e-6)
    assert [len(cut["groups"]) for cut in one["cuts"]] == [1, 2, 3, 4]
    for count, cut in enumerate(one["cuts"], 1):
        assert cut["groups"] == cluster_layers(expected, SkillConfig(num_clusters=count))
    assert one["cuts"][one["num_groups"] - 1]["groups"] == cluster_layers(expected, SkillConfig())
    assert (one["num_parts"], one["cuts"][0]["stability"]) == (2, 1.0)
    assert np.shape(one["tree"]) == (3, 4) and one["similarity_to_other"] is None


@pytest.mark.parametrize("similarity", ["cka", "mutual_knn"])
def test_two_models_of_other_width(shared, capsys, similarity):
    words = ["--audio_dir", shared / "english", "--other", shared / "wide", "--similarity", similarity]
    found = in_json(capsys, shared / "teacher", *words, "--include_embeddings", "false", "--num_parts", 0)
    models = [AutoModel.from_pretrained(shared / name) for name in ("teacher", "wide")]
    options = {"similarity": similarity, "include_embeddings": False, "progress": False}
    # Rounding may change a neighbour; and the clips come in another order, so that the sample of frames is another.
    tolerance = 1e-6 if similarity == "cka" else 0.02
    expected = layer_similarity(models[0], clips_of(shared / "english"), other=models[1], **options)
    np.testing.assert_allclose(found["sets"][0]["similarity_to_other"], expected, atol=tolerance)
    assert (found["hidden_states"], found["other_hidden_states"]) == ([1, 2, 3], [1, 2])
    assert found["sets"][0]["cuts"][0] == {"groups": [[1, 2, 3]], "silhouette": None, "stability": None} | {
        "height": found["sets"][0]["cuts"][0]["height"]
    }


def test_the_difference_of_two_folders(shared, capsys):
    words = ["--audio_dir", shared / "english", "--audio_dir", shared / "dutch", "--num_parts", 2]
    found = in_json(capsys, shared / "teacher", *words, "--other", shared / "student")
    english, dutch = found["sets"]
    assert (english["clips"], dutch["clips"]) == (6, 5)
    for name in ("similarity", "similarity_to_other"):
        difference = found["difference"][name]
        expected = np.subtract(english[name], dutch[name])
        np.testing.assert_allclose(difference["matrix"], expected, atol=1e-12)
        row, column = difference["largest_at"]
        assert difference["largest"] == expected[row, column] and abs(expected[row, column]) == np.abs(expected).max()
        assert min(difference["mean_between_sets"], difference["mean_within_sets"]) > 0
    assert len(found["difference"]["agreement"]) == 4 and found["difference"]["agreement"][0] == 1


def test_few_clips_have_no_stability(shared, tmp_path, capsys):
    (tmp_path / "audio").mkdir()
    shutil.copy(shared / "english" / "0.wav", tmp_path / "audio")
    found = in_json(capsys, shared / "teacher", "--audio_dir", tmp_path / "audio")
    assert found["sets"][0]["num_parts"] == 1
    assert all(cut["stability"] is None for cut in found["sets"][0]["cuts"])


# --------------------------------------------------------------------------------------------------- text and pictures
def test_text_and_pictures(shared, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    # Rendering takes most of the time, and `test_plots.py` does it.
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path: path.touch())
    words = ["--audio_dir", shared / "english", "--audio_dir", shared / "dutch", "--other", shared / "student"]
    status, out, errors = run(capsys, shared / "teacher", *words, "--output_dir", tmp_path / "out", "--num_parts", 2)
    assert (status, errors) == (0, [])
    assert max(map(len, out.splitlines()[:-2])) <= 100
    found = json.loads((tmp_path / "out" / "analysis.json").read_text())
    cells = [line.split() for line in out.splitlines()]
    for one in found["sets"]:
        for name in ("similarity", "similarity_to_other"):
            for state, row in enumerate(one[name]):
                assert [str(state), *(f"{value:.3f}" for value in row)] in cells
        chosen = one["cuts"][one["num_groups"] - 1]
        numbers = [f"{chosen[name]:.3f}" for name in ("height", "silhouette", "stability")]
        assert any(row[:4] == [f"{one['num_groups']}*", *numbers] for row in cells)
    assert "Similarity on the first folder minus that on the second" in out
    names = {"analysis.json", "difference.png", "cross_difference.png"}
    names |= {
        f"{name}_{number}.png"
        for name in ("layer_similarity", "layer_groups", "cross_similarity")
        for number in (1, 2)
    }
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    assert all(name in out.splitlines()[-1] for name in names)


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (("a/english", "b/dutch/"), ("english", "dutch")),
        (("/data/english/train", "/data/dutch/train"), ("english/train", "dutch/train")),
        (("train", "dutch/train"), ("train", "dutch/train")),
        (("org/model", "org/model"), ("org/model", "org/model")),
        ((".", "/"), (".", "/")),
    ],
)
def test_names_of_labels_are_as_long_as_it_takes_to_differ(paths, names):
    assert analyze._short_names(*paths) == names


def test_a_matrix_wider_than_a_terminal():
    states = list(range(25))
    text = analyze._matrix("Similarity", np.eye(25).tolist(), states)
    assert text == "Similarity: 25 x 25 values, in the pictures and in the JSON file of --output_dir"
    groups = [{"groups": [[state] for state in states], "height": 0.0, "silhouette": None, "stability": None}]
    text = analyze._cuts({"cuts": groups, "num_groups": 1, "num_parts": 0})
    assert max(map(len, text.splitlines())) <= 100
    for state in states:
        assert f"{{{state}}}" in text


# -------------------------------------------------------------------------------------------------------------- errors
def test_without_audio_it_says_what_is_needed(shared, capsys):
    status, out, errors = run(capsys, shared / "teacher")
    assert (status, out) == (2, "")
    assert errors == [
        "error: Layers are compared on speech: give a folder of audio with --audio_dir, or two to see how they differ;"
        " --help lists all options."
    ]


def test_models_that_cannot_be_compared(shared, tmp_path, capsys):
    tiny_teacher(conv_stride=(5, 2, 2, 2, 2, 2, 1)).save_pretrained(tmp_path / "fast")
    save_feature_extractor(tmp_path / "fast")
    for other, words, message in (
        (tmp_path / "fast", [], "every 160, of 400; only models of the same frame rate can be compared"),
        (shared / "wide", ["--similarity", "cosine"], "`cosine` compares features one by one"),
        (tmp_path / "none", [], "none` cannot be loaded"),
    ):
        words = [*words, "--audio_dir", tmp_path / "not read", "--other", other]
        status, out, (line,) = run(capsys, shared / "teacher", *words)
        assert (status, out) == (2, "") and message in line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--audio_dir", "a", "--audio_dir", "b", "--audio_dir", "c"], "There are 3 --audio_dir, but one or two"),
        (["--audio_dir", "a", "--audio_dir", "./a"], "Both --audio_dir are a; name two folders, or drop one"),
        (["--audio_dir", "missing"], "`missing` does not exist"),
        (["--audio_dir", "a", "--similarity", "cca"], "`similarity` must be one of cka, "),
        (["--audio_dir", "a", "--linkage", "centroid"], "`linkage` must be one of average, "),
        (["--audio_dir", "a", "--num_parts", "-1"], "`num_parts` must be an integer from 0 to 64, but is -1"),
        (["--audio_dir", "a", "--max_clips", "0"], "`max_clips` must be an integer from 1 "),
        (["--audio_dir", "a", "--contiguous", "maybe"], "`contiguous` must be true or false, but is 'maybe'"),
        (["--audio_dir", "a", "--device", "abacus"], "The device `abacus` cannot be used"),
        (["--audio_dirs", "a"], "unrecognized arguments: --audio_dirs a; --help lists all options"),
    ],
)
def test_wrong_settings(shared, capsys, monkeypatch, tmp_path, words, message):
    monkeypatch.chdir(tmp_path)
    status, out, (line,) = run(capsys, shared / "teacher", *words)
    assert (status, out) == (2, "") and message in line


def test_nothing_that_is_read_is_overwritten(shared, capsys):
    status, _, (line,) = run(
        capsys, shared / "teacher", "--audio_dir", shared / "english", "--output_dir", shared / "teacher"
    )
    assert status == 2 and "would be overwritten" in line
