"""`examples/run_superb.py` on tiny models and data, task by task."""

import json
import re
import shutil

import datasets
import numpy as np
import pytest
import soundfile
from conftest import tiny_teacher
from example_helpers import (
    DEMO,
    copy_clips,
    isolate,
    read_metadata,
    run_main,
    save_feature_extractor,
    save_student,
)
from transformers import BertConfig

from skill_hf.superb import PUBLISHED, evaluation, superb_score


KEYWORDS = DEMO / "keywords"

import example_utils  # noqa: E402
import run_superb  # noqa: E402


WORDS = ("go", "no", "yes")
# Two learning rates of four steps, in a second.
SHORT = {
    "max_steps": 4,
    "eval_steps": 2,
    "per_device_train_batch_size": 4,
    "learning_rates": [1e-3, 1e-2],
    "lstm_size": 8,
    "disable_tqdm": True,
    "use_cpu": True,
}
# Rows of each split of the data set with all columns.
SIZES = {"train": 12, "validation": 6, "test": 6}
LEXICON = "GO G OW1\nNO N OW1\nYES Y EH1 S\nUP AH1 P\n"


@pytest.fixture(autouse=True)
def isolated(tmp_path_factory, monkeypatch):
    isolate(tmp_path_factory, monkeypatch)


def columns_of(split: str, rows: int) -> dict[str, list]:
    return {
        "action": [("on", "off")[row % 2] for row in range(rows)],
        "object": [("light", "heat", "fan")[row % 3] for row in range(rows)],
        "location": [("hall", "none")[row // 2 % 2] for row in range(rows)],
        "emotion": [("glad", "sad")[row % 2] for row in range(rows)],
        "speaker_id": [row % 3 for row in range(rows)],
        "text": [" ".join(("go", "no", "yes")[row % 3 :]) for row in range(rows)],
        "clip": [f"{split}/{row}" for row in range(rows)],
    }


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """
    A folder with a `student` and a stock model, `keywords` in folders of audio, and `speech`, parquet with the audio
    inside and every other column.
    """
    folder = tmp_path_factory.mktemp("superb")
    save_student(folder / "student")
    tiny_teacher("large", num_hidden_layers=2).save_pretrained(folder / "stock")
    save_feature_extractor(folder / "stock")
    BertConfig().save_pretrained(folder / "bert")
    for split, number in (("train", 8), ("test", 2)):
        rows = read_metadata(KEYWORDS / split)
        chosen = [row for word in WORDS for row in [row for row in rows if row["label"] == word][:number]]
        copy_clips(KEYWORDS / split, folder / "keywords" / split, chosen)
    (folder / "lexicon.txt").write_text(LEXICON)
    rng = np.random.default_rng(0)
    (folder / "speech").mkdir()
    for split, rows in SIZES.items():
        audio = []
        for row in range(rows):
            path = folder / "clip.flac"
            soundfile.write(path, 0.1 * rng.standard_normal(8000 + 500 * row), 16_000)
            audio.append({"bytes": path.read_bytes(), "path": f"{split}/{row}.flac"})
        dataset = datasets.Dataset.from_dict({"audio": audio, **columns_of(split, rows)})
        dataset.to_parquet(folder / "speech" / f"{split}.parquet")
    (folder / "trials.txt").write_text(
        "1 test/0.flac test/3.flac\n0 0.flac 1.flac\n1 1.flac 4.flac\n0 2.flac 3.flac\n"
    )
    return folder


def settings_of(shared, directory, **settings) -> dict:
    settings = SHORT | {
        "task": "ks",
        "model": shared / "student",
        "dataset_name": shared / "speech",
        "validation_split": "validation",
        "output_dir": directory / "out",
        "cache_dir": directory / "cache",
        **settings,
    }
    return {name: value for name, value in settings.items() if value is not None}


def evaluate(shared, directory, **settings) -> dict:
    """`all_results.json` of the model's folder."""
    status, _, errors = run_main(run_superb, settings_of(shared, directory, **settings))
    assert (status, errors) == (0, [])
    (model_dir,) = (directory / "out").iterdir()
    return json.loads((model_dir / "all_results.json").read_text())


def filled(settings: dict, shared) -> dict:
    return {name: value.format(shared=shared) if isinstance(value, str) else value for name, value in settings.items()}


def keywords_of(shared, **settings) -> dict:
    return {"task": "ks", "dataset_name": shared / "keywords", "validation_split": None, **settings}


@pytest.fixture(scope="module")
def finished(shared, tmp_path_factory):
    """Directory and results of a run on keywords, the validation set of which is held out."""
    directory = tmp_path_factory.mktemp("finished")
    return directory, evaluate(shared, directory, **keywords_of(shared))


# ------------------------------------------------------------------------------------------------------ what it leaves
def test_results_of_keywords(shared, finished):
    directory, results = finished
    assert set(results) == {"ks"}
    keyword_results = results["ks"]
    assert keyword_results["model"] == str(shared / "student") and keyword_results["dataset"] == [
        str(shared / "keywords"),
        None,
    ]
    assert (keyword_results["max_steps"], keyword_results["batch_size"], keyword_results["seed"]) == (4, 4, 42)
    assert 0 < keyword_results["parameters"] < 1e5 and set(keyword_results["versions"]) == {
        "torch",
        "transformers",
        "datasets",
    }
    run = keyword_results["runs"]["test"]
    assert set(keyword_results["runs"]) == {"test"} and keyword_results["scores"] == {
        "ks_accuracy": run["ks_accuracy"]
    }
    assert run["ks_accuracy"] in [pytest.approx(100 * right / 6) for right in range(7)]
    assert run["learning_rate"] in SHORT["learning_rates"] and set(run["validation"]) == {"0.001", "0.01"}
    assert len(run["layer_weights"]) == 3 and sum(run["layer_weights"]) == pytest.approx(1)
    assert run["num_clips"]["test"] == 6
    assert run["num_clips"]["train"] + run["num_clips"]["validation"] == 24 > run["num_clips"]["train"]
    assert {path.name for path in (directory / "out" / "student").iterdir()} == {
        "all_results.json",
        "superb.md",
        "ks",
    }


def test_table_of_keywords(finished):
    directory, results = finished
    page = (directory / "out" / "student" / "superb.md").read_text()
    size = results["ks"]["parameters"] / 1e6
    accuracy = results["ks"]["scores"]["ks_accuracy"]
    assert page.startswith(f"# student, {size:.1f} M parameters\n")
    assert f"| KS acc ↑ | {accuracy:.2f} | {results['ks']['dataset'][0]} |" in page.splitlines()
    assert not any(row.name in page for row in PUBLISHED) and "not use SUPERB's own data" in page


def test_published_rows_stand_beside_superb_s_data_alone(shared, finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "copy")
    results = evaluate(shared, tmp_path / "copy", **keywords_of(shared, superb_data=True))
    page = (tmp_path / "copy" / "out" / "student" / "superb.md").read_text()
    rows = page[page.index("## Comparison with published models") :].splitlines()
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows if row.startswith("| ")][2:]
    assert [row[0] for row in rows] == ["**student**", *(row.name for row in sorted_by_score())]
    accuracy = results["ks"]["scores"]["ks_accuracy"]
    assert rows[0][2:4] == ["–", f"{accuracy:.2f}"] and set(rows[0][4:]) == {"–"}
    assert "not use SUPERB's own data" not in page


def sorted_by_score():
    return sorted(PUBLISHED, key=lambda row: -superb_score(row.results))


def test_another_model_of_the_same_name_wants_another_directory(shared, finished, tmp_path):
    shutil.copytree(shared / "student", tmp_path / "student")
    settings = settings_of(shared, finished[0], **keywords_of(shared, model=tmp_path / "student"))
    status, _, errors = run_main(run_superb, settings)
    assert status == 2 and f"has results of ks by {shared / 'student'}, not by {tmp_path / 'student'}" in errors[0]


def test_held_out_clips_are_of_other_speakers(shared):
    dataset = datasets.Dataset.from_dict({"speaker": [row % 10 for row in range(40)], "label": ["a", "b"] * 20})
    args = run_superb.SuperbArguments(model=str(shared / "student"))
    train, validation = run_superb.hold_out(dataset, args, 0)
    assert set(train["speaker"]).isdisjoint(validation["speaker"]) and len(set(validation["speaker"])) == 2
    assert len(train) + len(validation) == 40
    again = run_superb.hold_out(dataset, args, 0)
    assert again[1]["speaker"] == validation["speaker"]
    renamed = dataset.rename_column("speaker", "who")
    for task in ("ks", "asv"):
        args = run_superb.SuperbArguments(model=str(shared / "student"), task=task, speaker_column="who")
        train, validation = run_superb.hold_out(renamed, args, 0)
        assert set(train["who"]).isdisjoint(validation["who"])
    # Speakers who are to be identified must be in both.
    args = run_superb.SuperbArguments(model=str(shared / "student"), task="sid")
    train, validation = run_superb.hold_out(dataset, args, 0)
    assert len(validation) == 8 and set(validation["speaker"]) <= set(train["speaker"])


def test_no_class_loses_its_last_clip_to_the_validation_set(shared):
    labels = ["rare", *["often"] * 9, *[f"single {i}" for i in range(10)]]
    dataset = datasets.Dataset.from_dict({"label": labels, "row": range(20)})
    args = run_superb.SuperbArguments(model=str(shared / "student"), validation_share=0.4)
    for seed in range(5):
        train, validation = run_superb.hold_out(dataset, args, seed)
        assert set(train["label"]) == set(labels) and set(validation["label"]) == {"often"}
        assert len(validation) == 8 and sorted([*train["row"], *validation["row"]]) == list(range(20))


def test_several_tasks_share_a_table(shared, tmp_path):
    evaluate(shared, tmp_path, task="sid")
    results = evaluate(shared, tmp_path, task="er")
    assert set(results) == {"sid", "er"}
    page = (tmp_path / "out" / "student" / "superb.md").read_text()
    measured = [results["er"]["scores"]["er_accuracy"], results["sid"]["scores"]["sid_accuracy"]]
    assert re.findall(r"^\| (?:ER|SID) acc ↑ \| ([\d.]+) \|", page, re.MULTILINE) == [
        f"{value:.2f}" for value in measured
    ]


# ----------------------------------------------------------------------------------------------------------- the tasks
@pytest.mark.parametrize(
    "settings, metric",
    [
        ({"task": "ic"}, "ic_accuracy"),
        ({"task": "sid"}, "sid_accuracy"),
        ({"task": "asv", "trials": "{shared}/trials.txt"}, "asv_eer"),
        ({"task": "asv", "asv_head": "mean"}, "asv_eer"),
        ({"task": "pr", "lexicon": "{shared}/lexicon.txt", "stress": False, "lstm_size": 0}, "pr_per"),
        ({"task": "asr"}, "asr_wer"),
    ],
)
def test_every_task_runs(shared, tmp_path, settings, metric):
    settings = {
        name: value.format(shared=shared) if isinstance(value, str) else value for name, value in settings.items()
    }
    results = evaluate(shared, tmp_path, **settings)
    task_results = results[settings["task"]]
    assert set(task_results["scores"]) == {metric} and task_results["scores"][metric] >= 0
    run = task_results["runs"]["test"]
    assert run["num_clips"] == SIZES and len(run["layer_weights"]) == 3
    validation = {rate: scores[metric] for rate, scores in run["validation"].items()}
    best = (max if metric.endswith("accuracy") else min)(validation.values())
    assert validation[f"{run['learning_rate']:g}"] == best


def test_folds_are_tested_in_turn(shared, tmp_path):
    folds = ["train", "validation", "test"]
    results = evaluate(shared, tmp_path, task="er", folds=folds, validation_split=None)["er"]
    assert list(results["runs"]) == folds
    accuracies = [run["er_accuracy"] for run in results["runs"].values()]
    assert results["scores"]["er_accuracy"] == pytest.approx(sum(accuracies) / 3)
    for fold, run in results["runs"].items():
        numbers = run["num_clips"]
        assert numbers["test"] == SIZES[fold] and sum(numbers.values()) == sum(SIZES.values())
    assert {path.name for path in (tmp_path / "out" / "student").iterdir()} > {f"er_{fold}" for fold in folds}


def test_filterbanks_are_a_floor(shared, tmp_path):
    results = evaluate(shared, tmp_path, **keywords_of(shared, model="fbank"))["ks"]
    assert results["parameters"] == 0 and results["runs"]["test"]["layer_weights"] == [1.0]
    assert (tmp_path / "out" / "fbank" / "superb.md").read_text().startswith("# fbank\n")


def test_untrained_weights_are_another_floor(shared, finished, tmp_path):
    results = evaluate(shared, tmp_path, **keywords_of(shared, untrained=True))["ks"]
    assert (tmp_path / "out" / "student_untrained_").is_dir()
    assert "# student (untrained), " in (tmp_path / "out" / "student_untrained_" / "superb.md").read_text()
    trained = finished[1]["ks"]
    assert results["parameters"] == trained["parameters"]
    assert results["runs"]["test"]["layer_weights"] != trained["runs"]["test"]["layer_weights"]


def test_columns_can_be_named_and_clips_cropped(shared, tmp_path):
    settings = {"label_column": "emotion", "max_seconds": 0.2, "cache_dtype": "float32", "model": shared / "stock"}
    results = evaluate(shared, tmp_path, **settings)["ks"]
    assert set(results["scores"]) == {"ks_accuracy"} and results["model"] == str(shared / "stock")
    ((index,), *_) = ([path] for path in (tmp_path / "cache").rglob("settings.json") if path.parent.name == "test")
    stored = json.loads(index.read_text())
    assert (stored["max_seconds"], stored["dtype"], stored["mean_over_time"]) == (0.2, "float32", True)


def test_a_model_can_be_the_current_directory(shared, finished, tmp_path, monkeypatch):
    monkeypatch.chdir(shared / "student")
    results = evaluate(shared, tmp_path, **keywords_of(shared, model="."))
    assert (tmp_path / "out" / "student" / "superb.md").is_file()
    assert results["ks"]["scores"] == finished[1]["ks"]["scores"]


def test_evaluations_may_be_further_apart_than_checkpoints_were(shared, tmp_path):
    results = evaluate(shared, tmp_path, **keywords_of(shared, eval_steps=3, max_steps=6, learning_rates=[1e-3]))
    checkpoints = {path.name for path in (tmp_path / "out").rglob("checkpoint-*")}
    assert checkpoints and checkpoints <= {"checkpoint-3", "checkpoint-6"}
    assert set(results) == {"ks"}


# ------------------------------------------------------------------------------------------------------------ resuming
def test_what_is_done_is_not_done_again(shared, finished, monkeypatch):
    directory, before = finished
    files = {path: path.stat().st_mtime_ns for name in ("result.json", "index.csv") for path in directory.rglob(name)}
    assert len(files) == 2 + 3

    def train(*_):
        raise AssertionError("There is nothing left to train.")

    monkeypatch.setattr(evaluation, "_train_head", train)
    assert evaluate(shared, directory, **keywords_of(shared)) == before
    assert {path: path.stat().st_mtime_ns for path in files} == files


@pytest.mark.parametrize("place", ["encoding", "training"])
def test_a_run_that_was_stopped_goes_on(shared, finished, tmp_path, monkeypatch, place):
    calls = []
    owner, name = {
        "encoding": (run_superb.PretrainedEncoder, "__call__"),
        "training": (evaluation.Trainer, "training_step"),
    }[place]
    method = getattr(owner, name)

    def stopped(*args, **kwargs):
        calls.append(place)
        if len(calls) == (2 if place == "encoding" else 7):  # the third step of the second learning rate
            raise KeyboardInterrupt
        return method(*args, **kwargs)

    monkeypatch.setattr(owner, name, stopped)
    with pytest.raises(KeyboardInterrupt):
        run_main(run_superb, settings_of(shared, tmp_path, **keywords_of(shared)))
    assert not list((tmp_path / "out").rglob("all_results.json"))
    monkeypatch.undo()
    results = evaluate(shared, tmp_path, **keywords_of(shared))
    before, after = (results_by_task["ks"]["runs"]["test"] for results_by_task in (finished[1], results))
    assert after == before | {"layer_weights": pytest.approx(before["layer_weights"], abs=1e-5)}


# ----------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    "settings, message",
    [
        ({"task": "vc"}, "invalid choice: 'vc'"),
        ({"model": "no/such-directory/x"}, "The model `no/such-directory/x` cannot be loaded"),
        ({"model": "{shared}/bert"}, "is a `bert`, not a waveform encoder"),
        ({"dataset_name": "{shared}/none"}, "The dataset `.*none`, which is not a local directory, cannot be loaded"),
        ({"train_split": "dev"}, "has no split `dev`; choose from train, validation, test"),
        ({"validation_split": "dev"}, "has no split `dev`"),
        ({"task": "er", "folds": ["train", "dev"], "validation_split": None}, "has no split `dev`"),
        ({"audio_column": "sound"}, "has no column `sound`; choose the audio column from: audio, action"),
        ({}, "`ks` needs one of the columns label, keyword, but the dataset has audio, action"),
        ({"label_column": "colour"}, "The train set has no column `colour`; it has audio, action"),
        ({"label_column": ["action", "object"]}, "`ks` has one label column, but 2 were given"),
        ({"label_column": "clip"}, "The test set has 'test/0' in `clip`, which the training set lacks"),
        ({"task": "asr", "text_column": "words"}, "The train set has no column `words`"),
        ({"task": "asv", "speaker_column": "who"}, "The train set has no column `who`"),
        (
            {"task": "asv", "trials": "{shared}/none.txt"},
            "The trials file .*none.txt does not exist; correct its path",
        ),
        ({"task": "asv", "trials": "{shared}/lexicon.txt"}, "Line 1 of .* must be `1` or `0` and two files"),
        ({"task": "pr", "lexicon": "{shared}/none.txt"}, "The lexicon .*none.txt does not exist"),
        ({"task": "sid", "max_seconds": 0.01}, "None of the 12 clips can be read"),
        ({"task": "sid", "learning_rates": [1e38]}, "Training sid produced NaN with every learning rate"),
        ({"task": "sid", "learning_rates": [1e-3, 0]}, "`learning_rates` must be a number above 0, but is 0"),
        ({"task": "sid", "learning_rates": [-1.0]}, "`learning_rates` must be a number above 0, but is -1.0"),
        ({"validation_share": 1}, "`validation_share` must be a number above 0 and below 1, but is 1.0"),
        ({"task": "er", "folds": ["train"]}, "`folds` needs at least two splits"),
        ({"model": "fbank", "untrained": True}, "`fbank` has no weights to initialise; leave out `--untrained`"),
        ({"cache_dtype": "bfloat16"}, "invalid choice: 'bfloat16'"),
        ({"asv_head": "linear"}, "invalid choice: 'linear'"),
        ({"task": "sid", "eval_strategy": "no"}, "`eval_strategy` is no, but the validation set chooses the head"),
        ({"tsak": "ks"}, "--tsak"),
    ],
)
def test_bad_input_is_one_line(shared, tmp_path, settings, message):
    settings = {
        name: value.format(shared=shared) if isinstance(value, str) else value for name, value in settings.items()
    }
    status, _, errors = run_main(run_superb, settings_of(shared, tmp_path, **settings))
    assert status == 2
    assert len(errors) == 1 and re.search(message, errors[0]), errors
    assert not list(tmp_path.rglob("all_results.json"))


def test_other_settings_want_another_directory(shared, finished, tmp_path):
    directory, before = finished
    for changed, message in (
        ({"max_steps": 6}, "results with `max_steps` 4, not 6; choose another directory"),
        ({"per_device_train_batch_size": 8}, "results with `per_device_train_batch_size` 4, not 8"),
        ({"label_column": "label"}, r"results with `label_column` None, not \['label'\]"),
        ({"train_split": "train[:80%]"}, "results with `cache`"),
    ):
        status, _, errors = run_main(run_superb, settings_of(shared, directory, **keywords_of(shared, **changed)))
        assert status == 2 and len(errors) == 1 and re.search(message, errors[0]), errors
    stored = json.loads((directory / "out" / "student" / "all_results.json").read_text())
    assert stored == before
    # A learning rate more is no other setting.
    shutil.copytree(directory, tmp_path / "copy")
    rates = [*SHORT["learning_rates"], 3e-3]
    more = evaluate(shared, tmp_path / "copy", **keywords_of(shared, learning_rates=rates))["ks"]["runs"]["test"]
    assert set(more["validation"]) == {"0.001", "0.01", "0.003"}
    assert {rate: more["validation"][rate] for rate in ("0.001", "0.01")} == before["ks"]["runs"]["test"]["validation"]


def test_too_few_speakers_to_hold_some_out(shared, tmp_path):
    for rows, message in (
        ([0, 1, 2], "The training set has 1 speakers, too few to hold some out; pass a validation split"),
        ([0], "The training set has 1 speakers, too few"),
    ):
        chosen = [read_metadata(shared / "keywords" / "train")[row] | {"speaker": "ann"} for row in rows]
        directory = tmp_path / f"{len(rows)}"
        for split in ("train", "test"):
            copy_clips(shared / "keywords" / "train", directory / "data" / split, chosen)
        settings = settings_of(shared, directory, **keywords_of(shared) | {"dataset_name": directory / "data"})
        status, _, errors = run_main(run_superb, settings)
        assert status == 2 and errors == [f"error: {message}."] or message in errors[0]


def test_without_a_student_it_says_how_to_make_one(shared, tmp_path, monkeypatch):
    monkeypatch.setattr(example_utils, "DEMO_STUDENT", tmp_path / "demo")
    settings = settings_of(shared, tmp_path, **keywords_of(shared, model=tmp_path / "demo"))
    status, _, errors = run_main(run_superb, settings)
    assert status == 2 and "yet: run `make demo`" in errors[0]


def test_unreadable_clips_are_left_out_and_named(shared, tmp_path, caplog):
    shutil.copytree(shared / "keywords", tmp_path / "keywords")
    path = tmp_path / "keywords" / "test" / read_metadata(shared / "keywords" / "test")[0]["file_name"]
    path.write_text("This is no audio.")
    settings = keywords_of(shared) | {"dataset_name": tmp_path / "keywords"}
    results = evaluate(shared, tmp_path / "run", **settings)["ks"]["runs"]["test"]
    assert results["num_clips"]["test"] == 5
    assert f"Left out: `{path}` cannot be decoded as audio" in caplog.text
