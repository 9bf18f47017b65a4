"""What `import skill_hf` gives: the public names, the auto classes, how long it takes, and what the wheel holds."""

import email
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import IMPORTED_WITH_THE_PACKAGE
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForAudioClassification,
    AutoModelForAudioFrameClassification,
    AutoModelForAudioXVector,
    AutoModelForCTC,
    Wav2Vec2FeatureExtractor,
)

import skill_hf


ROOT = Path(__file__).parents[1]

TINY = {
    "conv_dim": (8,) * 7,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_conv_pos_embedding_groups": 2,
    "num_conv_pos_embeddings": 4,
    "num_hidden_layers": 1,
}


def run_python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=600
    ).stdout.strip()


@pytest.mark.parametrize("name", skill_hf.__all__)
def test_public_name_is_there_and_listed(name):
    assert getattr(skill_hf, name).__class__ is not type(skill_hf)  # the thing, not a module of the same name
    assert name in dir(skill_hf)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'skill_hf' has no attribute 'SkilConfig'"):
        skill_hf.SkilConfig  # noqa: B018


@pytest.mark.parametrize(
    ("auto_class", "student_class"),
    [
        (AutoModel, "WavLMForSkillStudent"),
        (AutoModelForCTC, "WavLMSkillStudentForCTC"),
        (AutoModelForAudioClassification, "WavLMSkillStudentForSequenceClassification"),
        (AutoModelForAudioFrameClassification, "WavLMSkillStudentForAudioFrameClassification"),
        (AutoModelForAudioXVector, "WavLMSkillStudentForXVector"),
    ],
)
def test_auto_class_gives_the_student(auto_class, student_class):
    config = AutoConfig.for_model("wavlm_skill_student", **TINY)
    assert type(config) is skill_hf.WavLMSkillStudentConfig
    assert type(auto_class.from_config(config)) is getattr(skill_hf, student_class)


def test_feature_extractor_is_found_by_the_model_type(tmp_path):
    skill_hf.WavLMSkillStudentConfig(**TINY).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"sampling_rate": 8000}))
    extractor = AutoFeatureExtractor.from_pretrained(tmp_path)
    assert type(extractor) is Wav2Vec2FeatureExtractor
    assert extractor.sampling_rate == 8000


def test_import_is_quick_beside_torch_and_the_trainer():
    # Processor time, which a busy machine doesn't stretch as it does the time on the clock.
    seconds = run_python(
        "import time, torch, transformers.trainer\n"
        "start = time.process_time()\n"
        "import skill_hf\n"
        "print(time.process_time() - start)"
    )
    assert float(seconds) < 1.0  # a tenth of that is usual


def test_import_loads_only_the_student():
    loaded = run_python("import sys, skill_hf\nprint(*sorted(m for m in sys.modules if m.startswith('skill_hf.')))")
    assert loaded.split() == IMPORTED_WITH_THE_PACKAGE


@pytest.mark.slow
def test_wheel_holds_the_package_and_its_metadata(tmp_path):
    # Built from a copy, since setuptools leaves a build folder in the sources and takes stale files from it.
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    subprocess.run(
        [sys.executable, "-c", "from setuptools import build_meta; build_meta.build_wheel('dist')"],
        cwd=tmp_path,
        check=True,
        timeout=120,
    )
    (wheel,) = (tmp_path / "dist").iterdir()
    with zipfile.ZipFile(wheel) as archive:
        files = set(archive.namelist())
        metadata = email.message_from_bytes(archive.read(next(name for name in files if name.endswith("/METADATA"))))
    installed = tmp_path / "installed"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", installed, wheel]
    subprocess.run(pip, check=True, timeout=120)
    command = [installed / "bin" / "skill-hf", "--version"]
    environment = os.environ | {"PYTHONPATH": str(installed)}
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=300).stdout
    assert printed == f"skill-hf {skill_hf.__version__}\n"

    sources = {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src" / "skill_hf").rglob("*.py")}
    assert sources | {"skill_hf/py.typed", "skill_hf/publishing/templates/model_card.md"} <= files
    assert {name.split("/")[0] for name in files} == {"skill_hf", f"skill_hf-{skill_hf.__version__}.dist-info"}
    assert any(name.endswith("/LICENSE") for name in files)
    assert metadata["Name"] == "skill-hf"
    assert metadata["Version"] == skill_hf.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    assert "transformers<6,>=5.18" in metadata.get_all("Requires-Dist")
    assert set(metadata.get_all("Provides-Extra")) == {"dev", "export", "plots", "superb"}
