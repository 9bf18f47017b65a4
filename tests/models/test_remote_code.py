"""
Published students in other versions of transformers, without this package: what `trust_remote_code=True` gives from
the Python files of a repository.
"""

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LAYOUTS, STUDENT_CODE, padded_batch, with_noise
from package_index import REQUESTS, install
from test_families import random_student
from test_modeling_wavlm_skill_student import pruned_student
from transformers import (
    AutoModelForAudioClassification,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    pipeline,
)

import skill_hf
from skill_hf.models.configuration_skill_student import TASKS
from skill_hf.models.students import STUDENTS


pytestmark = pytest.mark.slow

# The oldest that this package works with, and the last of transformers 4. The newest is the installed one.
VERSIONS = {
    "installed": (),
    "5.18.0": ("transformers==5.18.0",),
    "4.57.6": (
        "transformers==4.57.6",
        "datasets==4.0.0",
        "huggingface-hub==0.36.2",
        "tokenizers==0.22.2",
        *REQUESTS,
    ),
}
FILES = {"config.json", "model.safetensors", *STUDENT_CODE}


def layouts_with_heads() -> list[tuple[str, str]]:
    """Of the other families, each layout with some head and each head on some layout."""
    cases = []
    for student_class in STUDENTS:
        stock, tasks = student_class.config_class.stock_class(), student_class.config_class.tasks
        layouts = [layout for layout, (config_class, _) in LAYOUTS.items() if config_class is stock]
        pairs = zip(itertools.cycle(layouts), itertools.cycle(tasks), strict=False)
        if student_class is not skill_hf.WavLMForSkillStudent:
            cases += itertools.islice(pairs, max(len(layouts), len(tasks)))
    return cases


def publish(root: Path) -> None:
    """Encoders and task models of all families and a damaged encoder, each a directory as on the Hub."""
    inputs = padded_batch()
    torch.save(inputs, root / "inputs.pt")
    extractor = Wav2Vec2FeatureExtractor(return_attention_mask=True)
    students = {layout: pruned_student(layout) for layout in ("base", "large")}
    for layout, task in layouts_with_heads():
        encoder = random_student(layout)
        encoder.prune()
        head_class = getattr(skill_hf, encoder.config.auto_map[TASKS[task]].rpartition(".")[2])
        students[f"{layout}-{task}"] = with_noise(head_class(encoder.config))
    for name, student in students.items():
        student.save_pretrained(root / name)
        extractor.save_pretrained(root / name)
        with torch.no_grad():
            output = student.base_model(**inputs, output_hidden_states=True)
            expected = {name: output[name] for name in ("hidden_states", "last_hidden_state")}
            if student is not student.base_model:
                expected["logits"] = student(**inputs).logits
        torch.save(expected, root / f"{name}.expected")

    letters = ["<pad>", "<unk>", "|", *"abcdef"]
    (root / "vocab.json").write_text(json.dumps({letter: index for index, letter in enumerate(letters)}))
    tokenizer = Wav2Vec2CTCTokenizer(
        str(root / "vocab.json"), pad_token="<pad>", unk_token="<unk>", word_delimiter_token="|"
    )
    torch.manual_seed(0)
    names = {0: "yes", 1: "no", 2: "stop"}
    for name, model_class, kwargs in (
        ("ctc", skill_hf.WavLMSkillStudentForCTC, {"vocab_size": len(letters)}),
        (
            "classifier",
            skill_hf.WavLMSkillStudentForSequenceClassification,
            {"id2label": names, "label2id": {name: label for label, name in names.items()}},
        ),
    ):
        model = model_class.from_pretrained(root / "base", **kwargs)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
        model.save_pretrained(root / name)
        extractor.save_pretrained(root / name)
    tokenizer.save_pretrained(root / "ctc")

    pruned_student("base").save_pretrained(root / "broken")
    config = json.loads((root / "broken" / "config.json").read_text())
    (root / "broken" / "config.json").write_text(json.dumps(config | {"intermediate_sizes": [5, 0, 47]}))


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("published")
    publish(root)
    return root


@pytest.fixture(
    scope="module",
    params=["4.57.6", *(pytest.param(version, marks=pytest.mark.nightly) for version in ("5.18.0", "installed"))],
)
def visit(request, published, tmp_path_factory) -> tuple[str, Path, dict]:
    """A version of transformers, the published directories, and what a process with that version saw there."""
    root = shutil.copytree(published, tmp_path_factory.mktemp("visited") / request.param)
    environment = os.environ | {"HF_MODULES_CACHE": str(root / "modules"), "HF_HUB_OFFLINE": "1"}
    if VERSIONS[request.param]:
        environment["PYTHONPATH"] = str(install(f"transformers-{request.param}", *VERSIONS[request.param]))
    process = subprocess.run(
        [sys.executable, "-W", "ignore", str(Path(__file__).with_name("remote_code_child.py")), str(root)],
        env=environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    return request.param, root, json.loads((root / "results.json").read_text())


def test_version_is_the_one_meant(visit):
    version, _, results = visit
    assert version in ("installed", results["version"])


@pytest.mark.parametrize("layout", ["base", "large"])
def test_encoder_and_heads_give_the_same_hidden_states(visit, layout):
    version, _, results = visit
    seen = results["encoders"][layout]
    assert seen["module"] == "transformers_modules"  # code of the repository, not of the package
    assert seen["extractor"] == "Wav2Vec2FeatureExtractor"
    assert seen["attention"] == "sdpa"
    # transformers 4 returns the last hidden state of a Large model behind its final norm, 5 before it.
    moved = layout == "large" and version.startswith("4")
    assert len(seen["hidden_states"]) == 4
    assert max(seen["hidden_states"][: 3 if moved else 4]) < 1e-5
    assert (seen["hidden_states"][-1] > 0.1) == moved
    assert seen["last_hidden_state"] < 1e-5
    assert seen["stock"] < 1e-10
    assert {name: kind for name, (kind, *_) in seen["heads"].items()} == {
        "AutoModelForCTC": "WavLMSkillStudentForCTC",
        "AutoModelForAudioClassification": "WavLMSkillStudentForSequenceClassification",
        "AutoModelForAudioFrameClassification": "WavLMSkillStudentForAudioFrameClassification",
        "AutoModelForAudioXVector": "WavLMSkillStudentForXVector",
    }
    assert max(states for _, states, _ in seen["heads"].values()) < 1e-5
    assert "pip install skill-hf" in seen["prune"]


@pytest.mark.parametrize(("layout", "task"), layouts_with_heads())
def test_encoders_and_heads_of_other_families(visit, layout, task):
    version, root, results = visit
    seen = results["encoders"][f"{layout}-{task}"]
    assert seen["module"] == "transformers_modules"
    moved = json.loads((root / f"{layout}-{task}" / "config.json").read_text())["do_stable_layer_norm"]
    assert max(seen["hidden_states"][: -1 if moved and version.startswith("4") else None]) < 1e-5
    assert seen["last_hidden_state"] < 1e-5
    assert seen["stock"] < 1e-10
    assert list(seen["heads"]) == [TASKS[task]]
    [(_, states, logits)] = seen["heads"].values()
    assert states < 1e-5 and logits < 1e-5


def test_pipelines_agree_with_those_of_the_package(visit):
    _, root, results = visit
    audio = np.random.default_rng(0).standard_normal(16_000).astype(np.float32)
    text = pipeline("automatic-speech-recognition", model=str(root / "ctc"))(audio)["text"]
    assert text and results["text"] == text
    here = pipeline("audio-classification", model=str(root / "classifier"), top_k=3)(audio)
    assert [row["label"] for row in results["labels"]] == [row["label"] for row in here]
    assert [row["score"] for row in results["labels"]] == pytest.approx([row["score"] for row in here], abs=1e-5)


def test_fine_tuned_by_the_stock_trainer_it_is_published_whole_again(visit):
    _, root, results = visit
    seen = results["fine_tuning"]
    assert seen["changed"] > 0.9 * seen["all"]
    assert max(seen["difference"].values()) < 1e-6
    for directory in (root / "fine_tuned", root / "fine_tuned" / "checkpoint-2"):
        assert {path.name for path in directory.iterdir()} >= FILES
        for name in STUDENT_CODE:
            assert (directory / name).read_bytes() == (root / "base" / name).read_bytes()
        config = json.loads((directory / "config.json").read_text())
        assert config["auto_map"] == skill_hf.WavLMSkillStudentConfig().auto_map
    # What any version has saved, the package loads.
    model = AutoModelForAudioClassification.from_pretrained(root / "fine_tuned").eval()
    assert type(model) is skill_hf.WavLMSkillStudentForSequenceClassification
    audio = torch.randn(1, 8000, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(
            model(audio).logits, torch.load(root / "fine_tuned" / "logits.pt"), atol=1e-5, rtol=0
        )


def test_errors_name_the_field_and_the_flag(visit):
    _, _, results = visit
    assert results["broken"].startswith("ValueError") and "`intermediate_sizes[2]`" in results["broken"]
    assert "trust_remote_code" in results["refused"]
