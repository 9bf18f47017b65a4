"""What commands and scripts take for settings, and how each refuses what it doesn't take: in one line, at once."""

import dataclasses
import os
import sys
import typing
from typing import Annotated

import pytest
from example_helpers import EXAMPLES
from transformers import TrainingArguments

from skill_hf import SkillConfig
from skill_hf.cli import distill, export, settings


sys.path.insert(0, str(EXAMPLES / "study"))

import calibrate_latency  # noqa: E402
import export_student  # noqa: E402
import extract_hidden_states  # noqa: E402
import finetune_ctc  # noqa: E402
import finetune_keyword_spotting  # noqa: E402
import pretrain_teacher  # noqa: E402
import probe_teacher  # noqa: E402
import run_skill  # noqa: E402
import run_study  # noqa: E402
import run_superb  # noqa: E402
import select_audio  # noqa: E402
import select_keywords  # noqa: E402

from skill_hf.cli.settings import ArgumentParser, Range, convert, read_settings  # noqa: E402


# Script -> its settings.
KINDS = {
    distill: distill.KINDS,
    export: (export.ExportArguments,),
    calibrate_latency: (calibrate_latency.CalibrationArguments,),
    export_student: (export_student.DemoArguments,),
    extract_hidden_states: (extract_hidden_states.ExtractArguments,),
    finetune_ctc: (finetune_ctc.CTCModelArguments, finetune_ctc.CTCDataArguments, finetune_ctc.CTCTrainingArguments),
    finetune_keyword_spotting: (
        finetune_keyword_spotting.ModelArguments,
        finetune_keyword_spotting.KeywordDataArguments,
        finetune_keyword_spotting.KeywordTrainingArguments,
    ),
    pretrain_teacher: (pretrain_teacher.PretrainArguments,),
    probe_teacher: (probe_teacher.ProbeArguments,),
    run_skill: distill.KINDS,
    run_study: (run_study.StudyArguments,),
    run_superb: (run_superb.SuperbArguments, run_superb.HeadArguments),
    select_audio: (select_audio.SelectArguments,),
    select_keywords: (select_keywords.SelectArguments,),
}


def numbers_of(script) -> dict[str, tuple[type, Range]]:
    """Name -> type and range of each number among a script's own settings; without a range it fails."""
    found = {}
    for kind in KINDS[script]:
        if kind is SkillConfig:
            continue
        for name, hint in typing.get_type_hints(kind, include_extras=True).items():
            if issubclass(kind, TrainingArguments):
                if name not in settings.TRAINING_RANGES:
                    continue
                hint = Annotated[hint, settings.TRAINING_RANGES[name]]
            ranges = [part for part in walk(hint) if isinstance(part, Range)]
            types = [part for part in walk(hint) if part in (int, float)]
            assert len(ranges) == len(types), f"{kind.__name__}.{name} has no range"
            if types:
                found[name] = types[0], ranges[0]
    return found


def walk(hint):
    """All types and ranges that a hint is made of."""
    yield hint
    for part in typing.get_args(hint):
        yield from walk(part)


# ------------------------------------------------------------------------------------------------------------- numbers
WORDS = ["nan", "inf", "-inf", "NaN", "Infinity", "many", "", " ", "1_000", "0x10", "1e999", "1,5", "٣", "1" * 5000]


@pytest.mark.parametrize("script", KINDS, ids=lambda script: script.__name__)
def test_every_number_of_every_script_has_a_type_and_a_range(script):
    parser = ArgumentParser(KINDS[script])
    for name, (kind, limits) in numbers_of(script).items():
        wrong = [*WORDS, True, {"a": 1}]
        wrong += [str(bound - 1) for bound in (limits.least,) if bound is not None]
        wrong += [str(bound) for bound in (limits.above, limits.below) if bound is not None]
        wrong += [str(bound + 1) for bound in (limits.most,) if bound is not None]
        wrong += ["0.5", "010", str(2**63)] if kind is int else []
        for value in wrong:
            listed = any(typing.get_origin(part) is list for part in walk(parser.fields[name][0]))
            with pytest.raises(ValueError, match=f"^`{name}` must be (an integer|a number) .*, but is ") as caught:
                parser.build({name: [value] if listed else value})
            assert len(str(caught.value)) < 250 and "\n" not in str(caught.value) and str(limits) in str(caught.value)


@pytest.mark.parametrize("script", KINDS, ids=lambda script: script.__name__)
def test_a_wrong_number_ends_each_script_with_one_line(script, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name, (_, limits) = next(iter(numbers_of(script).items()))
    required = [
        word
        for kind in KINDS[script]
        for item in dataclasses.fields(kind)
        if item.init and item.default is item.default_factory is dataclasses.MISSING
        for word in (f"--{item.name}", str(tmp_path / item.name))
    ]
    for words, message in (
        ([f"--{name}", "nan"], (f"error: `{name}` must be an integer ", f"error: `{name}` must be a number ")),
        (["--no_such_option", "1"], "error: There is no option --no_such_option; --help lists all."),
        ([f"--{name}"], f"error: argument --{name}"),
    ):
        assert script.main([*required, *words]) == 2
        output = capsys.readouterr()
        (line,) = output.err.splitlines()
        assert line.startswith(message) and output.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("hint", "value", "converted"),
    [
        (int, "7", 7),
        (int, " -7 ", -7),
        (int, 5.0, 5),
        (float, "1e-4", 1e-4),
        (float, ".5", 0.5),
        (float, 3, 3.0),
        (bool, "yes", True),
        (bool, "False", False),
        (bool, 0, False),
        (int | None, None, None),
        (list[int], ["1", 2.0], [1, 2]),
        (str | None, "3", "3"),
        (dict | str | None, {"a": 1}, {"a": 1}),
        (dict | str | None, '{"a": 1}', '{"a": 1}'),
        (float | None, "2", 2.0),
    ],
)
def test_values_that_are_taken(hint, value, converted):
    result = convert(value, hint)
    assert result == converted and type(result) is type(converted)


@pytest.mark.parametrize(
    ("hint", "value", "wanted"),
    [
        (int, None, "an integer"),
        (int, 4.5, "an integer"),
        (int, True, "an integer"),
        (int, 1e30, "an integer"),
        (int, [1], "an integer"),
        (float, float("nan"), "a finite number"),
        (float, None, "a finite number"),
        (bool, "maybe", "true or false"),
        (bool, 2, "true or false"),
        (bool, None, "true or false"),
        (bool, 1.0, "true or false"),
        (str, 2024, "text"),
        (str, ["a"], "text"),
        (str, "a\0b", "text"),
        (list[int], "1", "a list"),
        (list[int], [1, "x"], "an integer"),
        (list[str], {"a": 1}, "a list"),
        (dict, [1], "a mapping of names to values"),
        (int | None, "none", "an integer"),
    ],
)
def test_values_that_are_not_taken(hint, value, wanted):
    with pytest.raises(settings.Mismatch, match=wanted):
        convert(value, hint)


def test_what_is_near_is_named_and_secrets_are_not(capsys):
    with pytest.raises(ValueError, match="no option --max_secnds; did you mean --max_seconds; --help"):
        ArgumentParser(distill.KINDS).parse(["--max_secnds", "3"])
    with pytest.raises(ValueError, match=r"`hub_token` must be text, but is \(not shown\)"):
        ArgumentParser(distill.KINDS).build({"hub_token": 12345})


# --------------------------------------------------------------------------------------------------------------- files
BOMB = "a: &a [x, x]\n" + "".join(
    f"{new}: &{new} [*{old}, *{old}]\n" for old, new in zip("abcdefghijkl", "bcdefghijklm", strict=True)
)
# Name and content of a file, and what is said of it.
FILES = {
    "given twice": ("a.yaml", "max_steps: 3\nmax_steps: 4", "`max_steps` is set twice, to 3 and 4; keep one"),
    "given twice, JSON": ("a.json", '{"max_steps": 3, "max_steps": 4}', "`max_steps` is set twice, to 3 and 4"),
    "given twice, inside": ("a.yaml", "lr_scheduler_kwargs: {a: 1, a: 2}", "`a` is set twice, to 1 and 2"),
    "given twice, inside JSON": ("a.json", '{"lr_scheduler_kwargs": {"a": 1, "a": 2}}', "`a` is set twice"),
    "UTF-16": ("a.json", '{"max_steps": 3}'.encode("utf-16"), "is not UTF-8 text (byte 0xff at position 0); save"),
    "UTF-16 without mark": ("a.yaml", "max_steps: 3".encode("utf-16-le"), "unacceptable character #x0000"),
    "Latin-1": ("a.yaml", "audio_dir: é".encode("latin-1"), "is not UTF-8 text (byte 0xe9 at position 11)"),
    "aliases": ("a.yaml", BOMB, "aliases (`*name`) are not allowed"),
    "merged aliases": ("a.yaml", "a: &a {max_steps: 3}\n<<: *a", "aliases (`*name`) are not allowed"),
    "deep lists": ("a.yaml", "layer_groups: " + "[" * 40_000 + "]" * 40_000, "has more than 20 levels"),
    "deep names, JSON": ("a.json", '{"a":' * 9000 + "1" + "}" * 9000, "has more than 20 levels"),
    "unclosed": ("a.json", "[" * 50_000, "has more than 20 levels"),
    "large": ("a.yaml", "#" * 100_001, "has more than 100,000 bytes"),
    "a date": (
        "a.yaml",
        "max_steps: 2024-01-01",
        "`max_steps` in {path} must be an integer from -1 to 2147483647, but is '2024-01-01'",
    ),
    "base 60": (
        "a.yaml",
        "max_steps: 1:30",
        "`max_steps` in {path} must be an integer from -1 to 2147483647, but is '1:30'",
    ),
    "octal": (
        "a.yaml",
        "max_steps: 010",
        "`max_steps` in {path} must be an integer from -1 to 2147483647, but is '010'",
    ),
    "hexadecimal": ("a.yaml", "max_steps: 0x10", "but is '0x10'"),
    "grouped digits": ("a.yaml", "max_steps: 1_000", "but is '1_000'"),
    "half a step": (
        "a.yaml",
        "max_steps: 4.5",
        "`max_steps` in {path} must be an integer from -1 to 2147483647, but is 4.5",
    ),
    "half a step, JSON": ("a.json", '{"max_steps": 4.5}', "must be an integer from -1 to 2147483647, but is 4.5"),
    "true for a number": (
        "a.json",
        '{"max_steps": true}',
        "must be an integer from -1 to 2147483647, but is True",
    ),
    "null for a number": ("a.yaml", "seed: ~", "must be an integer from 0 to 4294967295, but is null"),
    "nothing for a number": ("a.yaml", "seed:", "must be an integer from 0 to 4294967295, but is null"),
    "NaN": ("a.json", '{"learning_rate": NaN}', "NaN is not a JSON number"),
    "YAML's NaN": (
        "a.yaml",
        "learning_rate: .nan",
        "`learning_rate` in {path} must be a number of at least 0, but is '.nan'",
    ),
    "infinite": (
        "a.json",
        '{"max_seconds": 1e400}',
        "`max_seconds` in {path} must be a number above 0 and at most 1000000, but is inf",
    ),
    "a long number": ("a.json", '{"max_steps": ' + "9" * 5000 + "}", "{path} cannot be read"),
    "a word for true": ("a.yaml", "contiguous: maybe", "`contiguous` in {path} must be true or false, but is 'maybe'"),
    "number for text": ("a.yaml", "output_dir: 2024", "`output_dir` in {path} must be text, but is 2024"),
    "unknown name": ("a.yaml", "max_step: 3", "There is no setting 'max_step' in {path}; did you mean max_steps;"),
    "a name that is no text": ("a.yaml", "1: 2", "the name 1 is not a string"),
    "a list for a name": ("a.yaml", "? [a]\n: 1", "is not a string"),
    "a Python object": (
        "a.yaml",
        "max_steps: !!python/object/apply:os.getcwd []",
        "could not determine a constructor",
    ),
    "a tag that doesn't fit": ("a.yaml", "max_steps: !!int x", "'x' is not a valid int"),
    "two documents": ("a.yaml", "--- {}\n--- {}", "expected a single document"),
    "nothing": ("a.yaml", "", "must contain a mapping of names to values, but contains nothing"),
    "nothing, JSON": ("a.json", "", "{path} cannot be read"),
    "a list": ("a.json", "[1]", "must contain a mapping of names to values, but contains [1]"),
    "a number": ("a.yaml", "3", "must contain a mapping of names to values, but contains 3"),
    "no such file": ("a.yaml", None, "does not exist; correct its path"),
    "another ending": ("a.toml", "a = 1", "neither an option nor a settings file, which must end in .json"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_wrong_file_is_one_line(tmp_path, capsys, case):
    name, content, message = FILES[case]
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert run_skill.main([str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and str(path) in line and message.replace("{path}", str(path)) in line
    assert len(line) < 700


def test_what_is_no_file_is_not_opened(tmp_path, capsys):
    (tmp_path / "directory.json").mkdir()
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    for name in ("directory.json", "pipe.json", "loop.yaml"):
        assert run_skill.main([str(tmp_path / name)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"The settings file {tmp_path / name}" in line
    assert run_skill.main([str(tmp_path / "pipe.json"), "--max_steps", "3"]) == 2
    assert "does not belong to an option; a settings file must be the only argument" in capsys.readouterr().err


def test_a_file_is_read_as_its_writer_meant_it(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_bytes(
        b"\xef\xbb\xbfaudio_dir: x\nsave_strategy: no\ncontiguous: 'false'\nlearning_rate: 1e-4\nmax_steps: 5.0\n"
        b"output_dir: 2024-01-01\nwarmup_steps: 0.25\nlayer_groups: [[0], [1, 2]]\nnum_clusters: null\n"
    )
    _, data_args, skill_config, training_args = distill.parse([str(path)])[0]
    assert data_args.audio_dir == "x" and training_args.output_dir == "2024-01-01"
    assert training_args.save_strategy == "no" and training_args.learning_rate == 1e-4
    assert training_args.max_steps == 5 and type(training_args.max_steps) is int
    assert skill_config.contiguous is False and skill_config.layer_groups == [[0], [1, 2]]
    path = tmp_path / "a.json"
    path.write_text('{"audio_dir": "x", "max_steps": "4"}')
    assert distill.parse([str(path)])[0][3].max_steps == 4
    assert read_settings(str(path)) == {"audio_dir": "x", "max_steps": "4"}


# --------------------------------------------------------------------------------------------------- how a script ends
@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("a\nb"), 2),
        (OSError(28, "No space left on device"), 2),
        (ImportError("No module named 'x'"), 2),
        (MemoryError(), 2),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"), 2),
    ],
)
def test_a_script_that_fails_says_so_in_one_line(error, status, capsys):
    def body():
        raise error

    assert settings.run_script(body) == status
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")


@pytest.mark.parametrize("error", [RuntimeError("a bug"), TypeError("a bug"), KeyboardInterrupt()])
def test_what_is_no_fault_of_the_input_is_raised(error):
    def body():
        raise error

    with pytest.raises(type(error)):
        settings.run_script(body)
    with pytest.raises(ValueError):
        settings.run_script(lambda: int("x"), is_input=lambda error: False)
    assert settings.run_script(lambda: None) == 0


@pytest.mark.parametrize("name", ["abacus", "cuda:99", "meta", "cpu:x", ""])
def test_a_device_that_cannot_be_used_is_one_error(name):
    with pytest.raises(ValueError, match=f"The device `{name}` cannot be used: "):
        settings.checked_device(name)
    assert settings.checked_device("cpu").type == "cpu"
