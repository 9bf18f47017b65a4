"""`skill-hf convert`, from the command line to what is written, both ways."""

import pytest
import torch
from foreign_models import assert_same_states, dphubert_content
from transformers import AutoFeatureExtractor, AutoModel, AutoModelForCTC

from skill_hf.cli.convert import FILE
from skill_hf.cli.main import main


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    return dphubert_content(tmp_path_factory.mktemp("model"))


@pytest.fixture
def checkpoint(content, tmp_path):
    torch.save(content, tmp_path / "DPWavLM.pth")
    return tmp_path / "DPWavLM.pth"


def run(capsys, *words) -> tuple[int, str, str]:
    capsys.readouterr()
    status = main(["convert", *map(str, words)])
    return status, *capsys.readouterr()


def test_both_ways(capsys, checkpoint, content, tmp_path):
    status, out, err = run(capsys, checkpoint, "--output_dir", tmp_path / "student", "--base_model", "you/teacher")
    assert status == 0 and "error" not in err
    assert "DPHuBERT's format, wavlm" in out and "6 attention heads and 53 feed-forward units in 3 layers" in out
    assert "`feature_extractor.scale` in the student" in out and "not known" not in out
    student = AutoModel.from_pretrained(tmp_path / "student")
    assert student.config.base_model == "you/teacher"
    assert_same_states(student, content)
    assert AutoFeatureExtractor.from_pretrained(tmp_path / "student").sampling_rate == 16_000

    status, out, err = run(capsys, tmp_path / "student", "--to", "dphubert", "--output_dir", tmp_path / "back")
    assert status == 0 and "error" not in err
    assert str(tmp_path / "back" / FILE) in out
    assert sorted(path.name for path in (tmp_path / "back").iterdir()) == [FILE]
    written = torch.load(tmp_path / "back" / FILE, weights_only=True)
    assert written["config"] == content["config"]
    assert written["state_dict"].keys() == content["state_dict"].keys()
    for name, tensor in content["state_dict"].items():
        torch.testing.assert_close(written["state_dict"][name], tensor, atol=0, rtol=0)


def test_a_head_is_left_out(capsys, content, checkpoint, tmp_path):
    run(capsys, checkpoint, "--output_dir", tmp_path / "student")
    AutoModelForCTC.from_pretrained(tmp_path / "student").save_pretrained(tmp_path / "ctc")
    status, out, _ = run(capsys, tmp_path / "ctc", "--to", "dphubert", "--output_dir", tmp_path / "back")
    assert status == 0 and "the head of WavLMSkillStudentForCTC is left out" in out
    assert torch.load(tmp_path / "back" / FILE, weights_only=True)["config"] == content["config"]


def test_arguments_that_are_not_known_are_named(capsys, content, tmp_path):
    torch.save({**content, "config": content["config"] | {"encoder_speed": 3}}, tmp_path / "file.pth")
    status, out, _ = run(capsys, tmp_path / "file.pth", "--output_dir", tmp_path / "student")
    assert status == 0
    assert "not known, and were not used: encoder_speed." in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: checkpoint, --output_dir"),
        (["FILE"], "the following arguments are required: --output_dir"),
        (["FILE", "--output_dir", "DIR", "--to", "onnx"], "invalid choice: 'onnx'"),
        (["missing.pth", "--output_dir", "DIR"], "`missing.pth` cannot be converted. (there is no such file)"),
        (["FILE", "--output_dir", "FILE"], "`output_dir`, "),
        (["FILE", "--output_dir", "DIR", "--base_model", "a b"], "--base_model is 'a b', which is not an id"),
        (["FILE", "--output_dir", "DIR", "--family", "whisper"], "it is of WavLM, not `whisper`"),
        (["FILE", "--output_dir", "DIR", "--config", "FILE"], "it has a config of its own"),
        (["FILE", "--output_dir", "DIR", "--to", "dphubert"], "cannot be loaded"),
        (["FILE", "--output_dir", "DIR", "--to", "dphubert", "--family", "wavlm"], "--family is for the way"),
    ],
)
def test_one_line_for_each_error(capsys, checkpoint, tmp_path, words, message):
    places = {"FILE": checkpoint, "DIR": tmp_path / "out"}
    status, out, err = run(capsys, *(places.get(word, word) for word in words))
    assert (status, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("error: ") and message in line
    assert not (tmp_path / "out").exists()


def test_a_student_is_not_overwritten_by_its_own_file(capsys, checkpoint, tmp_path):
    run(capsys, checkpoint, "--output_dir", tmp_path / "student")
    words = [tmp_path / "student", "--to", "dphubert", "--output_dir", tmp_path / "student"]
    status, _, err = run(capsys, *words)
    assert status == 2 and "which would be overwritten" in err
