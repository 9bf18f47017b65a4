"""`skill-hf`: the table of commands, what it prints without one, and that the wheel installs it."""

import importlib
import os
import subprocess
import sys
from configparser import ConfigParser
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from conftest import IMPORTED_WITH_THE_PACKAGE

import skill_hf
from skill_hf.cli.main import COMMANDS, main


ROOT = Path(__file__).resolve().parents[2]


def program(*words, **environment) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-m", "skill_hf.cli.main", *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["--help", "distill"]])
def test_help_names_all_commands(capsys, words):
    assert main(words) == 0
    output = capsys.readouterr()
    assert output.err == ""
    lines = output.out.splitlines()
    assert lines[0] == "usage: skill-hf [-h] [--version] COMMAND ..."
    for name, what in COMMANDS.items():
        assert [line.split(maxsplit=1) for line in lines if line.split()[:1] == [name]] == [[name, what]]
    assert max(map(len, lines)) <= 100


def test_no_command_is_the_help_and_an_error(capsys):
    assert main([]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert main(["--help"]) == 0
    assert output.err == capsys.readouterr().out


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr() == (f"skill-hf {skill_hf.__version__}\n", "")


@pytest.mark.parametrize(
    "word",
    ["distil", "Distill", "__init__", "main", "settings", "../cli/info", "os", "", " ", "-x", "--info", "a\nb"],
)
def test_what_is_no_command_is_one_line_with_those_there_are(capsys, word):
    assert main([word, "--json"]) == 2
    output = capsys.readouterr()
    (line,) = output.err.splitlines()
    assert line.startswith(f"error: There is no {'option' if word.startswith('-') else 'command'} {word!r}")
    assert ", ".join(COMMANDS) in line and output.out == ""


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_module_that_is_called_by_its_name(capsys, monkeypatch, name):
    module = importlib.import_module(f"skill_hf.cli.{name}")
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: skill-hf {name} [-h] ")
    assert main([name]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "--" in line
    calls = []
    monkeypatch.setattr(module, "main", lambda words, prog: calls.append((words, prog)) or 7)
    assert main([name, "a", "--b"]) == 7
    assert calls == [(["a", "--b"], f"skill-hf {name}")]


def test_distill_without_settings_says_what_it_needs(capsys):
    assert main(["distill"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    for word in ("--audio_dir", "--dataset_name", "--output_dir", "JSON or YAML settings file", "--help"):
        assert word in line


def test_help_imports_no_command():
    code = (
        "import sys\n"
        "from skill_hf.cli.main import main\n"
        "main(['--help'])\n"
        "print(*sorted(name for name in sys.modules if name.startswith('skill_hf.')), file=sys.stderr)\n"
        "assert 'transformers.trainer' not in sys.modules and 'datasets' not in sys.modules\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert result.stderr.split() == ["skill_hf.cli", "skill_hf.cli.main", *IMPORTED_WITH_THE_PACKAGE]


def test_entry_point_of_the_package():
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    scripts = setup["options.entry_points"]["console_scripts"]
    name, value = (part.strip() for part in scripts.strip().split("="))
    assert name == "skill-hf"
    assert EntryPoint(name, value, "console_scripts").load() is main


@pytest.mark.slow
def test_as_a_module(tmp_path):
    result = program("distill", "--audio_dir", f"{tmp_path}/none", "--output_dir", f"{tmp_path}/out")
    assert result.returncode == 2 and result.stdout == ""
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert line.startswith("error: ") and "none` does not exist" in line and "Traceback" not in result.stderr
