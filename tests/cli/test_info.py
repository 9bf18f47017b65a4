"""`skill-hf info`: the numbers of students and of stock encoders, as text and as JSON, without their weights."""

import json
import os
import resource
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import STUDENT_CODE, tiny_config, tiny_teacher
from example_helpers import isolate, save_feature_extractor, save_student
from hub_server import HubServer
from huggingface_hub.constants import ENDPOINT
from safetensors.torch import load_file, save_file
from test_hostile_directories import TEACHERS, field, names_of, put
from transformers import (
    AutoModel,
    AutoModelForCTC,
    BertConfig,
    BertModel,
    HubertConfig,
    HubertModel,
    Wav2Vec2Config,
    Wav2Vec2ForPreTraining,
    WavLMConfig,
)

from skill_hf import WavLMForSkillStudent
from skill_hf.cli import info
from skill_hf.compression.macs import count_macs
from skill_hf.models.loading import empty_model


ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def isolated(tmp_path_factory, monkeypatch):
    isolate(tmp_path_factory, monkeypatch)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A `teacher` and its `student`, which does not name it."""
    folder = tmp_path_factory.mktemp("info")
    tiny_teacher(num_hidden_layers=2, mask_time_prob=0.5).save_pretrained(folder / "teacher")
    save_feature_extractor(folder / "teacher")
    save_student(folder / "student")
    return folder


def run(capsys, *words) -> tuple[int, str, str]:
    capsys.readouterr()  # what has been printed before
    status = info.main([str(word) for word in words])
    output = capsys.readouterr()
    return status, output.out, output.err


def in_json(capsys, *words) -> dict:
    status, out, err = run(capsys, *words, "--json")
    assert (status, err, out.count("\n")) == (0, "", 1)
    return json.loads(out)


# ------------------------------------------------------------------------------------------------------------ numbers
def test_a_student_beside_its_teacher(shared, capsys):
    student, teacher = shared / "student", shared / "teacher"
    found = in_json(capsys, student, "--teacher", teacher, "--seconds", "2")
    models = [AutoModel.from_pretrained(path) for path in (student, teacher)]
    parameters = [model.num_parameters() for model in models]
    macs = [count_macs(model, 2.0) for model in models]
    assert found == {
        "model": str(student),
        "architecture": "WavLMForSkillStudent",
        "model_type": "wavlm_skill_student",
        "format_version": 1,
        "base_model": None,
        "seconds": 2.0,
        "sampling_rate": 16_000,
        "parameters": parameters[0],
        "macs": macs[0],
        "conv_channels": [16] * 7,
        "attention_heads": [3, 0],
        "ffn_dims": models[0].config.intermediate_sizes,
        "attention_value_dims": [8, 0],
        "remaining_layers": [0, 1],
        "removed_attention_blocks": [],
        "removed_ffn_blocks": [],
        "weights": {
            "files": ["model.safetensors"],
            "bytes": (student / "model.safetensors").stat().st_size,
            "dtypes": ["float32"],
            "head_parameters": 0,
        },
        "teacher": {
            "model": str(teacher),
            "parameters": parameters[1],
            "macs": macs[1],
            "conv_channels": [16] * 7,
            "attention_heads": [4, 4],
            "ffn_dims": [48, 48],
            "attention_value_dims": [8, 8],
        },
        "left": {"parameters": parameters[0] / parameters[1], "macs": macs[0] / macs[1]},
        "sparsity": 1 - parameters[0] / parameters[1],
        "notes": [],
    }
    assert found["parameters"] == sum(tensor.numel() for tensor in load_file(student / "model.safetensors").values())
    assert found == info.describe(str(student), str(teacher), 2.0)


@pytest.mark.parametrize("base_model", [None, "someone/not-in-the-cache", "/etc", "../teacher"])
def test_a_teacher_that_cannot_be_read_is_told(shared, tmp_path, capsys, monkeypatch, base_model):
    shutil.copytree(shared / "student", tmp_path / "student")
    field("base_model", base_model)(tmp_path / "student")
    requests = []

    def get(url, headers, timeout):
        requests.append((url, timeout))
        raise ConnectionError("there is\nno network")

    monkeypatch.setattr(info, "get_session", lambda: SimpleNamespace(get=get))
    found = in_json(capsys, tmp_path / "student")
    is_id = base_model is not None and base_model[0] not in "/."
    assert requests == [(f"{ENDPOINT}/{base_model}/resolve/main/config.json", 5.0)] * is_id
    assert found["base_model"] == base_model and found["left"] is None and found["sparsity"] is None
    # A student's config keeps the numbers of heads and units, though not of channels.
    assert found["teacher"] == {
        "model": None,
        "parameters": None,
        "macs": None,
        "conv_channels": None,
        "attention_heads": [4, 4],
        "attention_value_dims": [8, 8],
        "ffn_dims": [48, 48],
    }
    (note,) = found["notes"]
    assert note.startswith("The teacher is unknown; pass it with --teacher. ")
    assert not is_id or note.endswith(f"`{base_model}` cannot be read on the Hub. (there is no network)")
    status, out, err = run(capsys, tmp_path / "student")
    assert (status, err) == (0, "") and " ".join(out.split()).endswith(note)


def test_a_teacher_in_the_cache_is_found(shared, tmp_path, capsys, monkeypatch):
    shutil.copytree(shared / "student", tmp_path / "student")
    field("base_model", "someone/teacher")(tmp_path / "student")
    monkeypatch.setattr(info, "try_to_load_from_cache", lambda repo_id, name: str(shared / "teacher" / name))
    found = in_json(capsys, tmp_path / "student")
    assert found["teacher"]["model"] == "someone/teacher" and found["notes"] == []
    named = in_json(capsys, tmp_path / "student", "--teacher", shared / "teacher")
    assert {**found["teacher"], "model": None} == {**named["teacher"], "model": None}
    assert found["left"] == named["left"]


def test_removed_blocks_and_channels(tmp_path, capsys):
    tiny_teacher(num_hidden_layers=2).save_pretrained(tmp_path / "teacher")
    student = WavLMForSkillStudent.from_pretrained(tmp_path / "teacher")
    student.add_gates(["attention_blocks", "ffn_blocks", "conv_channels"])
    with torch.no_grad():
        for name, gate in student.named_gates():
            gate.log_alpha.fill_(30.0)
            if "layers.0.attention" in name or "layers.1.feed_forward" in name:
                gate.log_alpha.fill_(-30.0)
            elif "conv_layers.2" in name:
                gate.log_alpha[:4] = -30.0
    student.prune()
    student.save_pretrained(tmp_path / "student")
    found = in_json(capsys, tmp_path / "student", "--teacher", tmp_path / "teacher")
    assert (found["removed_attention_blocks"], found["removed_ffn_blocks"]) == ([0], [1])
    assert (found["attention_heads"], found["ffn_dims"]) == ([0, 4], [48, 0])
    assert found["conv_channels"] == [16, 16, 12, 16, 16, 16, 16]
    status, out, _ = run(capsys, tmp_path / "student", "--teacher", tmp_path / "teacher")
    cells = [line.split() for line in out.splitlines()]
    assert status == 0
    assert ["1", "0", "of", "4", "block", "removed", "48", "of", "48", "100.0", "%"] in cells
    assert ["2", "4", "of", "4", "100.0", "%", "0", "of", "48", "block", "removed"] in cells
    assert ["3", "12", "of", "16", "75.0", "%"] in cells
    assert ["sparsity", f"{found['sparsity']:.4f}"] in cells
    share = f"{100 * found['left']['parameters']:.1f}"
    teacher_parameters = f"{found['teacher']['parameters']:,}"
    assert ["parameters", f"{found['parameters']:,}", "of", teacher_parameters, share, "%"] in cells

    # A student can be a teacher.
    again = WavLMForSkillStudent.from_pretrained(tmp_path / "student")
    again.save_pretrained(tmp_path / "copy")
    found = in_json(capsys, tmp_path / "copy", "--teacher", tmp_path / "student")
    assert found["sparsity"] == 0 and found["teacher"]["attention_heads"] == [0, 4]
    status, out, _ = run(capsys, tmp_path / "copy", "--teacher", tmp_path / "student")
    assert status == 0 and "0 of 0" in out


def test_a_head_is_counted_by_itself(shared, tmp_path, capsys):
    model = AutoModelForCTC.from_pretrained(shared / "student", vocab_size=7, pad_token_id=0)
    model.half().save_pretrained(tmp_path)
    found = in_json(capsys, tmp_path)
    assert found["architecture"] == "WavLMSkillStudentForCTC"
    assert found["parameters"] == model.base_model.num_parameters()
    assert found["weights"]["head_parameters"] == sum(tensor.numel() for tensor in model.lm_head.parameters())
    assert found["weights"]["dtypes"] == ["float16"]
    assert in_json(capsys, shared / "student")["macs"] == found["macs"]


def stock(layout="base", **kwargs):
    torch.manual_seed(0)
    return tiny_config(layout, num_hidden_layers=2, **kwargs).to_dict()


@pytest.mark.parametrize("layout", ["base", "large"])
@pytest.mark.parametrize(
    ("config_class", "model_class"),
    [(WavLMConfig, AutoModel), (HubertConfig, HubertModel), (Wav2Vec2Config, Wav2Vec2ForPreTraining)],
)
def test_a_stock_encoder_has_its_own_numbers(tmp_path, capsys, layout, config_class, model_class):
    fields = {name: value for name, value in stock(layout).items() if name not in ("model_type", "architectures")}
    config = config_class(**fields)
    model = model_class.from_config(config) if model_class is AutoModel else model_class(config)
    model.save_pretrained(tmp_path)
    found = in_json(capsys, tmp_path, "--seconds", "1")
    encoder = model.base_model
    assert found["architecture"] == type(model).__name__
    assert found["parameters"] == encoder.num_parameters()
    assert found["macs"] == count_macs(encoder, 1.0)
    assert found["weights"]["head_parameters"] == model.num_parameters() - encoder.num_parameters()
    assert (found["attention_heads"], found["ffn_dims"]) == ([4, 4], [48, 48])
    for name in ("teacher", "left", "sparsity", "format_version", "base_model", "removed_ffn_blocks"):
        assert found[name] is None
    status, out, err = run(capsys, tmp_path)
    assert (status, err) == (0, "") and " of " not in out and "teacher" not in out


def test_weights_of_an_older_torch(shared, tmp_path, capsys):
    """A pickle whose weight norm has the names of before torch 2.1, as the published WavLMs are."""
    shutil.copytree(shared / "teacher", tmp_path / "teacher")
    weights = load_file(tmp_path / "teacher" / "model.safetensors")
    for old, new in (("weight_g", "original0"), ("weight_v", "original1")):
        prefix = "encoder.pos_conv_embed.conv."
        weights[prefix + old] = weights.pop(f"{prefix}parametrizations.weight.{new}")
    (tmp_path / "teacher" / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "teacher" / "pytorch_model.bin")
    old, new = (in_json(capsys, folder / "teacher") for folder in (tmp_path, shared))
    assert old["weights"]["files"] == ["pytorch_model.bin"] and old["weights"]["head_parameters"] == 0
    assert {**old, "model": None, "weights": None} == {**new, "model": None, "weights": None}


def test_another_rate_and_shards(shared, tmp_path, capsys):
    shutil.copytree(shared / "student", tmp_path / "student")
    field("sampling_rate", 8_000, "preprocessor_config.json")(tmp_path / "student")
    (tmp_path / "student" / "model.safetensors").unlink()
    model = AutoModel.from_pretrained(shared / "student")
    model.save_pretrained(tmp_path / "student", max_shard_size="20KB")
    found, whole = in_json(capsys, tmp_path / "student"), in_json(capsys, shared / "student")
    parts = sorted((tmp_path / "student").glob("model-*.safetensors"))
    assert found["weights"]["files"] == [path.name for path in parts] and len(parts) > 2
    assert found["weights"]["bytes"] == sum(path.stat().st_size for path in parts)
    assert (found["sampling_rate"], found["parameters"]) == (8_000, whole["parameters"])
    assert found["macs"] < whole["macs"]
    assert f"{len(parts)} files" in run(capsys, tmp_path / "student")[1]


# ------------------------------------------------------------------------------------------ what is read, what not
def test_weights_are_not_read(tmp_path, capsys):
    """Those of WavLM Large are a file of holes here: a gigabyte that would have to be filled."""
    config = WavLMConfig(
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
        architectures=["WavLMModel"],
    )
    config.save_pretrained(tmp_path)
    header, size = {}, 0
    model = empty_model(AutoModel._model_mapping[WavLMConfig], config)
    for name, tensor in model.state_dict().items():
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [size, size + 4 * tensor.numel()]}
        size += 4 * tensor.numel()
    with open(tmp_path / "model.safetensors", "wb") as file:
        text = json.dumps(header).encode()
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(file.tell() + size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = in_json(capsys, tmp_path)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 0.3 * size
    assert found["parameters"] == model.num_parameters() > 300e6
    assert found["weights"]["bytes"] > size > 1e9


def test_no_code_is_run(shared, tmp_path, capsys):
    shutil.copytree(shared / "student", tmp_path / "student")
    for name in STUDENT_CODE:
        (tmp_path / "student" / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert in_json(capsys, tmp_path / "student")["parameters"]
    assert not (tmp_path / "ran").exists()


# Values of weights, which are not read; and a rule of students alone.
ALLOWED = ("all zeros", "NaN", ".final_layer_norm.weight", ".projection.bias", "conv_layers.3.conv.weight")
ALLOWED += ("`do_stable_layer_norm`",)


@pytest.fixture(scope="module")
def teacher_files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("teacher")
    tiny_teacher().save_pretrained(directory)
    save_feature_extractor(directory)
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize(("damage", "pattern"), TEACHERS, ids=names_of(TEACHERS))
def test_directories_that_cannot_be_used(teacher_files, tmp_path, capsys, damage, pattern):
    directory = put(teacher_files, tmp_path / "teacher")
    damage(directory)
    start = time.process_time()
    status, out, err = run(capsys, directory, "--json")
    assert time.process_time() - start < 20
    if pattern.endswith(ALLOWED):
        assert (status, err) == (0, "") and json.loads(out)
        return
    assert (status, out) == (2, "")
    (line,) = [line for line in err.splitlines() if not line.startswith(("[transformers]", "Error while"))]
    assert line.startswith("error: ") and str(directory) in line and len(line) < 1500
    assert not (directory / "ran").exists()


@pytest.mark.parametrize(("count", "message"), [(1, "{} is missing"), (3, "{} and 2 more are missing")])
def test_missing_weights_are_counted(shared, tmp_path, capsys, count, message):
    folder = shutil.copytree(shared / "student", tmp_path / "student")
    weights = load_file(folder / "model.safetensors")
    names = [f"encoder.layers.0.final_layer_norm.{part}" for part in ("weight", "bias")] + [
        "encoder.layer_norm.weight"
    ]
    for name in names[:count]:
        del weights[name]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    status, _, err = run(capsys, folder)
    assert status == 2 and any(message.format(name) in err for name in names[:count])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "cannot be loaded; pass a Hub id or a directory"),
        (lambda folder: shutil.rmtree(folder) or folder.write_text("a file"), "it is a file; pass its directory"),
        (lambda folder: [path.unlink() for path in folder.iterdir()], "it has no config.json"),
        (lambda folder: (folder / "skill_state.json").write_text("{}"), "is a training checkpoint, not a student"),
        (field("format_version", 99), "`format_version` is 99"),
        (field("remaining_heads", [[0]]), "`remaining_heads` must list one entry for each of 2 layers"),
        (field("intermediate_sizes", [47, 1]), "encoder.layers.1.feed_forward"),
        (field("conv_dim", [16] * 6 + [15]), "conv_layers.6"),
        (field("sampling_rate", "fast", "preprocessor_config.json"), "feature extractor"),
        (lambda folder: BertModel(BertConfig(num_hidden_layers=1)).save_pretrained(folder), "not a waveform encoder"),
    ],
)
def test_students_that_cannot_be_used(shared, tmp_path, capsys, damage, message):
    folder = tmp_path / "student"
    shutil.copytree(shared / "student", folder)
    damage(folder)
    status, out, err = run(capsys, folder)
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (status, out) == (2, "") and message in line and str(folder) in line


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"num_hidden_layers": 1}, "it has only 1 layers, but the student has layer 2"),
        ({"num_hidden_layers": 3}, None),
        ({"hidden_size": 16}, "its `hidden_size` is 16, but the student's is 32"),
        ({"intermediate_size": 40}, "its `intermediate_size` is 40, but the student's is 48"),
        ({"num_attention_heads": 2}, "its `num_attention_heads` is 2, but the student's is 4"),
        ({"conv_dim": (16, 8) + (16,) * 5}, "the student has more conv_channels"),
        ({"conv_dim": (64,) * 7}, None),
        ({"conv_stride": (5,) * 7}, "its `conv_stride` is [5, 5, 5, 5, 5, 5, 5]"),
    ],
)
def test_another_teacher_is_none(shared, tmp_path, capsys, change, message):
    tiny_config(**{"num_hidden_layers": 2, **change}).save_pretrained(tmp_path)  # needs no weights
    status, out, err = run(capsys, shared / "student", "--teacher", tmp_path)
    if message is None:
        assert (status, err) == (0, "")
        return
    assert (status, out) == (2, "")
    assert err.startswith(f"error: `{tmp_path}` is not the teacher of `{shared / 'student'}`: ") and message in err


def test_teachers_that_are_no_teachers(shared, tmp_path, capsys):
    HubertConfig(**{"num_hidden_layers": 2}).save_pretrained(tmp_path)
    for words, message in (
        ([shared / "student", "--teacher", tmp_path / "none"], "The teacher `"),
        (
            [shared / "student", "--teacher", tmp_path],
            "a `hubert` cannot have a student of type `wavlm_skill_student`",
        ),
        ([shared / "student", "--teacher", ""], "is not a valid name"),
        ([shared / "teacher", "--teacher", shared / "teacher"], "is a `wavlm`, not a student, so it has no teacher"),
    ):
        status, out, err = run(capsys, *words)
        assert (status, out, err.count("\n")) == (2, "", 1) and message in err


@pytest.mark.parametrize("seconds", ["nan", "inf", "-1", "0", "0.01", "121", "1e9", "ten", "", "1_0"])
def test_a_clip_of_no_length(shared, capsys, seconds):
    status, out, err = run(capsys, shared / "student", f"--seconds={seconds}")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ") and "`seconds`" in err


@pytest.mark.parametrize("words", [[], ["a", "b"], ["a", "--jsn"], ["a", "--js"], ["a", "--teacher"], ["--json"]])
def test_words_that_are_not_understood(capsys, words):
    status, out, err = run(capsys, *words)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ") and err.endswith("; --help lists all options.\n")


# ---------------------------------------------------------------------------------------------------------------- text
def test_the_text_fits_a_terminal(shared, tmp_path, capsys):
    folder = tmp_path / ("long" * 50) / "student\x1b[31m\nname"
    folder.parent.mkdir()
    shutil.copytree(shared / "student", folder)
    field("base_model", "\x1b[2J\u202e" + "/long\n" * 100)(folder)
    status, out, err = run(capsys, folder, "--teacher", shared / "teacher")
    assert (status, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 100
    assert all(char.isprintable() or char == "\n" for char in out)
    assert out.splitlines()[0].endswith("student?[31m?name")
    assert json.loads(run(capsys, folder, "--json")[1])["model"] == str(folder)


def test_a_large_student_fits_a_terminal(tmp_path, capsys):
    info_of = {
        "model": "someone/wavlm-large-skill",
        "architecture": "WavLMForSkillStudent",
        "model_type": "wavlm_skill_student",
        "format_version": 1,
        "base_model": "microsoft/wavlm-large",
        "seconds": 119.999,
        "parameters": 2**33,
        "macs": 10**15,
        "conv_channels": [512] * 7,
        "attention_heads": [1024] * 256,
        "ffn_dims": [2**20] * 256,
        "attention_value_dims": [64] * 256,
        "remaining_layers": list(range(255)),
        "removed_attention_blocks": [],
        "removed_ffn_blocks": [255],
        "weights": {"files": ["a", "b", "c"], "bytes": 2**35, "dtypes": ["float16", "float32"], "head_parameters": 9},
        "sparsity": 0.0,
        "notes": ["word " * 100],
    }
    units = ("conv_channels", "attention_heads", "ffn_dims", "attention_value_dims")
    teacher = {name: info_of[name] for name in ("parameters", "macs", *units)}
    text = info.format_text(info_of | {"teacher": teacher | {"model": "microsoft/wavlm-large"}})
    assert max(map(len, text.splitlines())) <= 100


# ------------------------------------------------------------------------------------------------------------- the Hub
@pytest.mark.slow
def test_a_student_on_the_hub(shared, tmp_path):
    with HubServer(tmp_path / "hub", users={}).running() as hub:
        for name in ("student", "teacher"):
            files = {path.name: path.read_bytes() for path in (shared / name).iterdir()}
            if name == "student":
                config = json.loads(files["config.json"]) | {"base_model": "me/teacher"}
                files["config.json"] = json.dumps(config).encode()
            hub.create(f"me/{name}")
            hub.commit(f"me/{name}", "main", files)
        environment = os.environ | hub.environment(tmp_path / "home") | {"PYTHONPATH": str(ROOT / "src")}
        command = [sys.executable, "-m", "skill_hf.cli.main", "info", "me/student", "--json"]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        asked = [given["path"] for name, given in hub.requests if name == "resolve"]
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    size = (shared / "student" / "model.safetensors").stat().st_size
    assert (found["weights"]["files"], found["weights"]["bytes"]) == (["model.safetensors"], size)
    assert found["teacher"]["model"] == found["base_model"] == "me/teacher" and found["notes"] == []
    known = info.describe(str(shared / "student"), str(shared / "teacher"))
    assert (found["left"], found["sparsity"]) == (known["left"], known["sparsity"])
    assert "config.json" in asked and not any(name.endswith((".safetensors", ".py")) for name in asked)
