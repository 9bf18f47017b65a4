"""`skill-hf shorten`."""

import json

import pytest
from short_distillation import write_inputs
from transformers import AutoModel

from skill_hf.cli import shorten


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("shared"))


def test_by_influence(shared, tmp_path, capsys):
    words = [
        str(shared / "teacher"),
        "--num_layers",
        "1",
        "--audio_dir",
        str(shared / "audio"),
        "--max_seconds",
        "0.5",
    ]
    assert shorten.main([*words, "--output_dir", str(tmp_path / "out")]) == 0
    result = json.loads((tmp_path / "out" / "shortened.json").read_text())
    assert result["removed_layers"] == [2] and len(result["influence"]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["layer", "influence"] and lines[2].split()[-1] == "removed"
    student = AutoModel.from_pretrained(tmp_path / "out")
    assert student.config.num_hidden_layers == 1
    assert (tmp_path / "out" / "preprocessor_config.json").is_file()


def test_by_position(shared, tmp_path, capsys):
    words = [str(shared / "teacher"), "--num_layers", "1", "--order", "top", "--output_dir", str(tmp_path / "out")]
    assert shorten.main(words) == 0
    assert "influence" not in json.loads((tmp_path / "out" / "shortened.json").read_text())
    assert AutoModel.from_pretrained(tmp_path / "out").num_parameters() > 0
    assert f"written to {tmp_path / 'out'}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num_layers", "1"], "needs `--audio_dir`"),
        (["--num_layers", "2", "--order", "top"], "`num_layers` must be from 1 to 1 for this model, but is 2"),
        (["--num_layers", "no", "--order", "top"], "`num_layers` must be an integer"),
        (["--num_layers", "1", "--order", "middle"], "invalid choice: 'middle'"),
    ],
)
def test_wrong_settings(shared, tmp_path, capsys, words, message):
    assert shorten.main([str(shared / "teacher"), "--output_dir", str(tmp_path / "out"), *words]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line
