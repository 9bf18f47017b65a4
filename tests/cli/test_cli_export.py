"""`skill-hf export` and `examples/export_student.py`: every format from the command line, on real speech."""

import importlib.util
import json
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import tiny_teacher
from example_helpers import DEMO, FEW_CONVOLUTIONS, isolate, run_main, save_feature_extractor, save_student
from safetensors.torch import load_file, save_file
from transformers import (
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForCTC,
    AutoTokenizer,
    Wav2Vec2CTCTokenizer,
    WavLMModel,
)

from skill_hf.cli import export
from skill_hf.data import read_audio
from skill_hf.export import OnnxModel


import export_student  # noqa: E402  isort: skip


CLIP = sorted((DEMO / "audio" / "heldout").glob("*.ogg"))[0]
SPEECH = {"max_clips": 2, "max_seconds": 2}


@pytest.fixture(autouse=True)
def isolated(tmp_path_factory, monkeypatch):
    isolate(tmp_path_factory, monkeypatch)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return save_student(tmp_path_factory.mktemp("student"), **FEW_CONVOLUTIONS)


@pytest.fixture(scope="module")
def exported(student, tmp_path_factory):
    """Directory with every format, and what was printed."""
    folder = tmp_path_factory.mktemp("exported")
    settings = {"model": student, "output_dir": folder, "output_hidden_states": True, **SPEECH}
    status, lines, errors = run_main(
        export_student, settings | {"formats": ["onnx", "onnx_int8", "torch_export", "stock"]}
    )
    assert (status, errors) == (0, [])
    return folder, lines


@pytest.mark.slow
def test_files_and_report(exported):
    folder, lines = exported
    assert {path.name for path in folder.iterdir()} == {
        "model.onnx",
        "model_int8.onnx",
        "model.pt2",
        "stock",
        "config.json",
        "preprocessor_config.json",
        "export.json",
    }
    report = json.loads((folder / "export.json").read_text(encoding="utf-8"))
    assert report["architecture"] == "WavLMForSkillStudent"
    assert (report["clips"], report["seconds"]) == (2, 4.0)
    results = report["formats"]
    assert list(results) == ["onnx", "onnx_int8", "torch_export", "stock"]
    for name, result in results.items():
        path = folder / result["file"]
        path = path / "model.safetensors" if path.is_dir() else path
        assert result["megabytes"] == path.stat().st_size / 1e6
        assert result["cosine_similarity"].keys() == {"last_hidden_state", *(f"hidden_states.{i}" for i in range(3))}
        if name == "onnx_int8":
            assert "largest_difference" not in result
            assert result["megabytes_before"] == results["onnx"]["megabytes"] > result["megabytes"]
            assert 0.98 < min(result["cosine_similarity"].values()) < 1
        else:
            assert result["largest_difference"] < 1e-4
            assert min(result["cosine_similarity"].values()) > 0.999999
    assert results["stock"]["parameters"] > results["onnx"]["parameters"]

    assert [line.split()[0] for line in lines] == ["format", *results]
    assert lines[2].split() == [
        "onnx_int8",
        "model_int8.onnx",
        f"{results['onnx_int8']['megabytes']:.2f}",
        f"{results['onnx_int8']['parameters']:,}",
        "–",
        f"{min(results['onnx_int8']['cosine_similarity'].values()):.5f}",
    ]


@pytest.mark.slow
def test_every_format_gives_the_students_hidden_states(exported, student):
    folder, _ = exported
    model = AutoModel.from_pretrained(student).eval()
    inputs = {"input_values": torch.randn(2, 9000), "attention_mask": torch.ones(2, 9000, dtype=torch.long)}
    inputs["attention_mask"][1, 5000:] = 0
    with torch.no_grad():
        expected = model(**inputs, output_hidden_states=True).hidden_states
        stock = WavLMModel.from_pretrained(folder / "stock").eval()(**inputs, output_hidden_states=True).hidden_states
    torch.testing.assert_close(stock, expected, atol=1e-4, rtol=0)
    for saved in (OnnxModel(folder / "model.onnx"), torch.export.load(folder / "model.pt2").module()):
        actual = saved(**inputs)
        torch.testing.assert_close(
            tuple(actual[f"hidden_states.{index}"] for index in range(3)), expected, atol=1e-4, rtol=0
        )


@pytest.mark.slow
def test_snippet_of_the_documentation_runs(exported, student):
    folder, _ = exported
    (snippet,) = re.findall(r"```python\n(.*?)```", export_student.__doc__, re.DOTALL)
    names = {"waveform": read_audio(CLIP, max_seconds=1.0)}
    exec(snippet.replace("outputs/exported", str(folder)), names)
    assert names["hidden_states"].shape == (1, 49, 32)
    waveform = AutoFeatureExtractor.from_pretrained(student)(
        names["waveform"], sampling_rate=16_000, return_tensors="pt"
    ).input_values
    with torch.no_grad():
        expected = AutoModel.from_pretrained(student).eval()(waveform).last_hidden_state
    np.testing.assert_allclose(names["hidden_states"], expected, atol=1e-4)


@pytest.mark.slow
def test_int8_alone(exported, student, tmp_path, monkeypatch):
    folder, _ = exported
    monkeypatch.setattr(export, "export_onnx", lambda model, path, *args: shutil.copy(folder / "model.onnx", path))
    settings = {"model": student, "output_dir": tmp_path, "formats": ["onnx_int8"], **SPEECH}
    status, lines, errors = run_main(export_student, settings)
    assert (status, errors) == (0, [])
    assert [path.name for path in tmp_path.glob("*.onnx")] == ["model_int8.onnx"]
    assert [line.split()[0] for line in lines] == ["format", "onnx_int8"]


@pytest.fixture(scope="module")
def ctc(student, tmp_path_factory):
    """A CTC model over the student, in float16, with a tokenizer."""
    folder = tmp_path_factory.mktemp("ctc")
    torch.manual_seed(0)
    AutoModelForCTC.from_pretrained(student, vocab_size=4, pad_token_id=0).half().save_pretrained(folder)
    save_feature_extractor(folder)
    (folder / "vocab.json").write_text(json.dumps({"<pad>": 0, "<unk>": 1, "|": 2, "a": 3}), encoding="utf-8")
    Wav2Vec2CTCTokenizer(folder / "vocab.json").save_pretrained(folder)
    return folder


@pytest.mark.nightly
def test_head_with_its_tokenizer(ctc, tmp_path):
    status, _, errors = run_main(
        export_student, {"model": ctc, "output_dir": tmp_path, "formats": ["torch_export"], **SPEECH}
    )
    assert (status, errors) == (0, [])
    report = json.loads((tmp_path / "export.json").read_text(encoding="utf-8"))
    assert report["architecture"] == "WavLMSkillStudentForCTC"
    assert report["formats"]["torch_export"]["cosine_similarity"].keys() == {"logits"}
    assert AutoTokenizer.from_pretrained(tmp_path).decode([3, 2, 3]) == "a a"
    assert (tmp_path / "preprocessor_config.json").is_file()


def edit_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | fields), encoding="utf-8")


def make_stock(folder):
    shutil.rmtree(folder)
    tiny_teacher(num_hidden_layers=1).save_pretrained(folder)


def drop_classifier(folder):
    edit_config(folder, architectures=["WavLMSkillStudentForSequenceClassification"])


def drop_norm(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["encoder.layer_norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "cannot be loaded; pass a Hub id or a directory"),
        (make_stock, r"is a `wavlm`, not a student.*WavLMForSkillStudent.from_pretrained"),
        (
            lambda folder: edit_config(folder, architectures=None),
            "`architectures` in config.json of .* is None; the supported",
        ),
        (
            lambda folder: edit_config(folder, architectures=["WavLMModel"]),
            "the supported ones are WavLMForSkillStudent, ",
        ),
        (drop_classifier, "classifier.bias is missing; classifier.weight is missing; projector.bias is missing"),
        (drop_norm, "encoder.layer_norm.weight is missing"),
        (lambda folder: (folder / "preprocessor_config.json").unlink(), "preprocessor_config.json"),
    ],
)
def test_damaged_directory(student, tmp_path, damage, message):
    folder = tmp_path / "student"
    shutil.copytree(student, folder)
    damage(folder)
    status, lines, errors = run_main(export_student, {"model": folder, "output_dir": tmp_path / "out", **SPEECH})
    assert (status, lines, len(errors)) == (2, [], 1)
    assert re.search(message, errors[0]), errors
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"formats": ["onnx", "tflite"]}, "tflite"),
        ({"max_clips": 0}, "`max_clips` must be an integer from 1 to 2147483647, but is 0"),
        ({"max_seconds": 0.1}, "`max_seconds` must be a number from 0.5 to 1000000, but is 0.1"),
        ({"audio_dir": "nowhere"}, "`nowhere` does not exist"),
    ],
)
def test_wrong_settings(student, tmp_path, settings, message):
    settings = {"model": student, "output_dir": tmp_path, **settings}
    status, _, errors = run_main(export_student, settings)
    assert (status, len(errors)) == (2, 1)
    assert message in errors[0]


def test_head_has_no_stock_form(ctc, tmp_path):
    settings = {"model": ctc, "output_dir": tmp_path, "formats": ["stock"], **SPEECH}
    status, _, errors = run_main(export_student, settings)
    assert (status, errors) == (
        2,
        [
            "error: `stock` exports only encoders without a head, but the model is a WavLMSkillStudentForCTC; leave it"
            " out of `formats`."
        ],
    )


def test_missing_packages(student, tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnx" else find_spec(name))
    status, _, errors = run_main(export_student, {"model": student, "output_dir": tmp_path, **SPEECH})
    assert status == 2
    assert errors == ["error: This export needs onnx, which is not installed: pip install skill-hf[export]."]


def test_float32_that_differs_is_an_error(student, tmp_path, monkeypatch):
    compared = {"last_hidden_state": {"largest_difference": float("nan"), "cosine_similarity": 1.0}}
    monkeypatch.setattr(export, "compare_outputs", lambda *args: compared)
    settings = {"model": student, "output_dir": tmp_path, "formats": ["stock"], **SPEECH}
    with pytest.raises(RuntimeError, match="model.safetensors differs from the student"):
        run_main(export_student, settings)
    assert not (tmp_path / "export.json").exists()
