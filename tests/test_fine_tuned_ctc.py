"""`examples/study/fine_tuned_ctc.py` in tiny: stopped and continued, its error rates, its table, its errors."""

import csv
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import tiny_teacher
from example_helpers import EXAMPLES, isolate, run_main, save_feature_extractor
from filelock import FileLock
from transformers import AutoModelForCTC, AutoProcessor, TrainerState

from skill_hf import SkillConfig


sys.path.insert(0, str(EXAMPLES / "study"))

import fine_tuned_ctc  # noqa: E402
from fine_tuned_ctc import FineTunedArguments, HeadFirst, markdown, plan, read_speech_data, run  # noqa: E402
from pretrain_teacher import HELDOUT_LIBRISPEECH_SPEAKERS  # noqa: E402


TEXTS = ("Good, morning", "a yellow house", "the cat", "")


@pytest.fixture(autouse=True)
def isolated(tmp_path_factory, monkeypatch):
    isolate(tmp_path_factory, monkeypatch)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A tiny encoder, and 0.6 s of noise for each clip of four readers, of whom two are tested on."""
    folder = tmp_path_factory.mktemp("fine_tuned")
    tiny_teacher().save_pretrained(folder / "teacher")
    save_feature_extractor(folder / "teacher")
    rng = np.random.default_rng(0)
    (folder / "speech").mkdir()
    readers = ["100", "101", *sorted(HELDOUT_LIBRISPEECH_SPEAKERS)[:2]]
    rows = [
        {"file_name": f"{reader}-{index}.wav", "speaker": reader, "text": text}
        for reader in readers
        for index, text in enumerate(TEXTS)
    ]
    for row in rows:
        soundfile.write(folder / "speech" / row["file_name"], rng.normal(0, 0.1, 9600), 16_000)
    write_metadata(folder / "speech", rows)
    return folder


def write_metadata(directory, rows: list[dict]) -> None:
    with open(directory / "metadata.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def arguments_of(shared, folder, **settings) -> FineTunedArguments:
    small = {"seeds": [0], "fine_tune_steps": 2, "head_steps": 1, "compress_steps": 6}
    small |= {"calibration_samples": 4, "num_threads": 1}
    own = {"data_dir": shared / "speech", "teacher": shared / "teacher"}
    return FineTunedArguments(results=folder / "results.json", work_dir=folder / "work", **own | small | settings)


def edit_distance(first, second) -> int:
    """By the recurrence of Wagner and Fischer (1974)."""
    previous = list(range(len(second) + 1))
    for row, one in enumerate(first, start=1):
        current = [row]
        for column, other in enumerate(second, start=1):
            current.append(min(previous[column] + 1, current[-1] + 1, previous[column - 1] + (one != other)))
        previous = current
    return previous[-1]


def letters(text: str) -> list[str]:
    """With a single space between words, as the metric reads a text."""
    return list(" ".join(text.split()))


@torch.no_grad()
def greedy_text(model, processor, path) -> str:
    """Likeliest token of each frame, without repeats and blanks, written by hand."""
    audio, rate = soundfile.read(path, dtype="float32")
    logits = model(**processor(audio, sampling_rate=rate, return_tensors="pt")).logits[0]
    tokens = [token for token, _ in itertools.groupby(logits.argmax(-1).tolist())]
    vocabulary = {index: token for token, index in processor.tokenizer.get_vocab().items()}
    blank = processor.tokenizer.pad_token_id
    return "".join(vocabulary[token] for token in tokens if token != blank).replace("|", " ").strip()


def test_speakers_of_the_test_are_not_trained_on(shared, tmp_path):
    speech = read_speech_data(arguments_of(shared, tmp_path))
    train, test = (
        {Path(row["path"]).name.split("-")[0] for row in side["audio"]} for side in (speech.train, speech.test)
    )
    assert train == {"100", "101"} and test == set(sorted(HELDOUT_LIBRISPEECH_SPEAKERS)[:2])
    # Texts are normalised, and a clip without one is left out.
    assert set(speech.train["labels"]) == {"GOOD MORNING", "A YELLOW HOUSE", "THE CAT"}
    assert speech.train["length"][:] == pytest.approx([0.6] * 6) and speech.minutes == pytest.approx(0.06)


def test_plan_has_three_ways_for_each_seed(shared, tmp_path):
    parts = plan(arguments_of(shared, tmp_path, seeds=[3, 5]), None)
    names = [part.name for part in parts]
    assert len(set(names)) == len(names) == 1 + 2 * 4
    for index, part in enumerate(parts):
        assert part.needs is None or part.needs in names[:index]
    assert {part.name: part.needs for part in parts if part.name.endswith("5")} == {
        "encoder 5": None,
        "one run 5": "teacher",
        "one run, labels 5": "teacher",
        "compressed first 5": "encoder 5",
    }


def test_head_is_trained_alone_at_first():
    encoder = tiny_teacher()
    encoder.freeze_feature_encoder()
    frozen = {name for name, parameter in encoder.named_parameters() if not parameter.requires_grad}
    callback = HeadFirst(encoder, steps=2)
    trained = []
    for step in range(4):
        callback.on_step_begin(None, TrainerState(global_step=step), None)
        trained.append({name for name, parameter in encoder.named_parameters() if parameter.requires_grad})
    assert trained[:2] == [set(), set()]
    assert trained[2] == trained[3] == dict(encoder.named_parameters()).keys() - frozen and frozen


def test_head_cannot_be_trained_alone_all_the_time(shared, tmp_path):
    with pytest.raises(ValueError, match="`head_steps` must be below `fine_tune_steps` .2., but is 2"):
        arguments_of(shared, tmp_path, head_steps=2)


@pytest.mark.nightly
def test_measurement_goes_on_where_it_was(shared, tmp_path, capsys, monkeypatch):
    args = arguments_of(shared, tmp_path, max_parts=1)

    def results() -> dict:
        return json.loads(args.results.read_text(encoding="utf-8"))

    def killed(*_):
        raise KeyboardInterrupt

    for name in ("teacher", "encoder 0"):
        with monkeypatch.context() as patch:
            patch.setattr(fine_tuned_ctc, "add_result", killed)
            with pytest.raises(KeyboardInterrupt):
                run(args)
        assert name not in results()["parts"]
        run(args)
        assert results()["parts"][name]["cpu_seconds"] is None  # resumed from its checkpoint
    first = results()["parts"]
    args.max_parts = None
    run(args)
    parts, models = results()["parts"], args.work_dir / "models"
    assert {name: parts[name] for name in first} == first and len(first) == 2
    assert parts.keys() == {"teacher", "encoder 0", "one run 0", "one run, labels 0", "compressed first 0"}
    assert not any((args.work_dir / "runs").iterdir())

    # What each was made by.
    for name, weight in (("one run 0", 0.0), ("one run, labels 0", 1.0)):
        assert SkillConfig.from_pretrained(models / name).task_weight == weight
    assert not list((models / "encoder 0").glob("vocab.json"))
    sizes = {name: part["parameters"] for name, part in parts.items()}
    for name in ("one run 0", "one run, labels 0", "compressed first 0"):
        assert sizes[name] == pytest.approx(sizes["teacher"] / 2, rel=0.02)

    # Error rates, by a decoding and a distance of the test's own.
    speech = read_speech_data(args)
    for name in ("teacher", "one run 0", "compressed first 0"):
        model = AutoModelForCTC.from_pretrained(models / name).eval()
        processor = AutoProcessor.from_pretrained(models / name)
        heard = [greedy_text(model, processor, row["path"]) for row in speech.test["audio"]]
        said = speech.test["labels"][:]
        assert json.loads((models / name / "transcripts.json").read_text()) == {"said": said, "heard": heard}
        for unit, split in (("character", letters), ("word", str.split)):
            edits = sum(edit_distance(split(one), split(other)) for one, other in zip(said, heard, strict=True))
            rate = 100 * edits / sum(len(split(text)) for text in said)
            assert parts[name][f"{unit}_error_rate"] == pytest.approx(rate)

    capsys.readouterr()
    run(FineTunedArguments(results=args.results))
    printed = capsys.readouterr().out
    assert printed.count("\n| ") == 5 and "fine-tuned teacher, one run | 1 |" in printed
    assert "6 clips (0 min) to train on, 6 clips of other speakers to test on" in printed

    args.sparsity = 0.75
    with pytest.raises(ValueError, match="results with `sparsity` 0.5, now it is 0.75: choose another `results`"):
        run(args)


def test_a_part_that_another_process_is_working_on_is_left_to_it(shared, tmp_path, monkeypatch):
    args = arguments_of(shared, tmp_path, max_parts=2)
    made = []

    def note(args, speech, part):
        made.append(part.name)
        fine_tuned_ctc.add_result(args, part.name, {})

    monkeypatch.setattr(fine_tuned_ctc, "do", note)
    args.work_dir.mkdir()
    with FileLock(args.work_dir / "teacher.lock"):
        run(args)
    assert made == ["encoder 0", "compressed first 0"]  # what needs no teacher
    run(args)
    assert made[2:] == ["teacher", "one run 0"]


def test_table_has_means_and_ranges_of_what_there_is():
    parts = {
        "teacher": {"parameters": 1000, "character_error_rate": 30.0, "word_error_rate": 70.0, "cpu_seconds": 600.0},
        "encoder 0": {"parameters": 480, "cpu_seconds": 60.0},
    }
    for seed, rate in ((0, 40.0), (1, 43.0)):
        parts[f"one run {seed}"] = dict.fromkeys(("character_error_rate", "word_error_rate"), rate)
        parts[f"one run {seed}"] |= {"parameters": 500 + seed, "cpu_seconds": 120.0}
    parts["compressed first 0"] = parts["one run 0"] | {"parameters": 499, "cpu_seconds": 90.0}
    settings = {"seeds": [0, 1, 2], "fine_tune_steps": 9, "compress_steps": 6, "sparsity": 0.5}
    settings |= {"fine_tune_batch_size": 2, "compress_batch_size": 1, "head_steps": 4, "bf16": True}
    speech = {"data": "speech", "train_clips": 3, "train_minutes": 1.0, "test_clips": 2}
    machine = {"processor": "CPU", "torch": "2"}
    text = markdown({"parts": parts, "settings": settings, "speech": speech, "machine": machine})
    assert text.splitlines()[2:5] == [
        "| fine-tuned teacher | 1 | 1,000 | 30.0 | 70.0 | 10 |",
        "| fine-tuned teacher, one run | 2 | 500 | 41.5 (40.0–43.0) | 41.5 (40.0–43.0) | 2 (2–2) |",
        # The compression of the encoder counts.
        "| encoder compressed, then fine-tuned | 1 | 499 | 40.0 | 40.0 | 2 |",
    ]
    assert "9 updates of 2 clips in each fine-tuning, the first 4 of the head alone, 6 of 1 in each" in text


@pytest.mark.parametrize(
    "settings, error",
    [
        ({"text_column": "words"}, "has no column words"),
        ({"text_column": "speaker", "seeds": [0, 0]}, "`seeds` must be numbers, each once"),
        ({"data_dir": None}, "There are no results yet"),
    ],
)
def test_wrong_settings_are_one_line(shared, tmp_path, settings, error):
    settings = {"data_dir": shared / "speech", "teacher": shared / "teacher"} | settings
    settings = {name: value for name, value in settings.items() if value is not None}
    settings |= {"results": tmp_path / "results.json", "work_dir": tmp_path / "work"}
    status, _, errors = run_main(fine_tuned_ctc, settings)
    assert status == 2 and len(errors) == 1 and error in errors[0]
    assert not (tmp_path / "results.json").exists()


def test_nobody_to_test_on_is_an_error(shared, tmp_path):
    (tmp_path / "speech").mkdir()
    row = {"file_name": "0.wav", "speaker": "0", "text": "A"}
    write_metadata(tmp_path / "speech", [row])
    with pytest.raises(ValueError, match="speakers to train on and .* of speakers to test on, but needs some of both"):
        read_speech_data(arguments_of(shared, tmp_path, data_dir=tmp_path / "speech"))
