"""The study: its design, the data of its tasks, and a run of it in tiny that is stopped and goes on."""

import csv
import json
import sys

import numpy as np
import pytest
import soundfile
from conftest import tiny_teacher
from example_helpers import EXAMPLES, isolate, save_feature_extractor
from transformers import AutoModel, HubertConfig


sys.path.insert(0, str(EXAMPLES / "study"))

import draw_study  # noqa: E402
import run_study  # noqa: E402
import study_design  # noqa: E402
import study_probes  # noqa: E402
import study_results  # noqa: E402
from pretrain_teacher import HELDOUT_LIBRISPEECH_SPEAKERS  # noqa: E402
from study_design import (  # noqa: E402
    BASELINES,
    HIGHEST,
    METHODS,
    OPTIONS,
    SEEDS,
    SHAPE,
    TEACHERS,
    Block,
    Condition,
    Student,
    at,
    plan,
    recipe,
)

from skill_hf import SkillConfig  # noqa: E402
from skill_hf.distillation.recipe_validation import validate_recipe  # noqa: E402
from skill_hf.models.families import build_student  # noqa: E402


def test_plan_compares_all_methods_at_all_sparsities_on_both_teachers():
    planned = plan()
    conditions = [*at(0.5), *at(0.75), *at(0.9), *at(0.9, 960), *HIGHEST]
    for condition in conditions:
        for method in ("SKILL", *BASELINES):
            assert {Student(method, condition, seed) for seed in SEEDS} <= planned.keys()
    assert {condition.teacher for condition in at(0.5)} == {"wavlm", "hubert"}
    assert len({student.key for student in planned}) == len(planned)


@pytest.mark.parametrize("condition", HIGHEST)
def test_planned_sparsities_can_be_reached(condition):
    teacher = AutoModel.from_pretrained(TEACHERS[condition.teacher])
    validate_recipe(SkillConfig(target_sparsity=condition.sparsity), teacher, build_student(teacher))
    planned = {student.condition.sparsity for student in plan() if student.condition.teacher == condition.teacher}
    assert max(planned) == condition.sparsity


def test_students_of_two_blocks_are_planned_once_and_tested_if_one_block_says_so(monkeypatch):
    (condition,) = at(0.9, teachers=("wavlm",))
    blocks = (
        Block(("SKILL", "one group"), (condition,), (0, 1)),
        Block(("SKILL", "DPHuBERT"), (condition,), (0,), with_tasks=True),
    )
    monkeypatch.setattr(study_design, "BLOCKS", blocks)
    assert [(student.method, student.seed, tested) for student, tested in plan().items()] == [
        ("SKILL", 0, True),
        ("one group", 0, False),
        ("SKILL", 1, False),
        ("one group", 1, False),
        ("DPHuBERT", 0, True),
    ]


@pytest.mark.parametrize(
    "name, twelve, eight",
    [
        ("SKILL", None, None),
        ("DPHuBERT", [[0], [4], [8], [12]], [[0], [3], [5], [8]]),
        ("DistilHuBERT", [[4], [8], [12]], [[3], [5], [8]]),
        ("last layer", [[12]], [[8]]),
        ("every layer", [[layer] for layer in range(13)], [[layer] for layer in range(9)]),
        ("one group", [[*range(13)]], [[*range(9)]]),
        ("early cut", [[*range(4)], [*range(4, 13)]], [[*range(3)], [*range(3, 9)]]),
        ("late cut", [[*range(10)], [*range(10, 13)]], [[*range(7)], [*range(7, 9)]]),
        ("first two apart", [[0, 1], [*range(2, 13)]], [[0, 1], [*range(2, 9)]]),
        ("first apart", [[0], [*range(1, 7)], [*range(7, 13)]], [[0], [*range(1, 5)], [*range(5, 9)]]),
    ],
)
def test_methods_have_the_groups_of_their_names(name, twelve, eight):
    for layers, groups in ((12, twelve), (8, eight)):
        config, _ = recipe(name, 0.9, 240, HubertConfig(num_hidden_layers=layers))
        assert config.layer_groups == groups and config.target_sparsity == 0.9
        assert config.projection_groups == ([[0], [1, 2, 3]] if name == "DPHuBERT" else None)
        assert config.student_layers == ("last" if name == "DistilHuBERT" else "group")


WIDTH_256 = HubertConfig(hidden_size=256)


def fields_of(name: str) -> dict:
    return recipe(name, 0.75, 240, WIDTH_256)[0].to_dict()


def test_tuning_changes_learning_rates_alone():
    (plain, first), (halved, half) = (recipe(name, 0.9, 60, WIDTH_256) for name in ("SKILL", "SKILL + rates halved"))
    rates = {"final_learning_rate": half, "gate_learning_rate": plain.resolve_gate_learning_rate(40)}
    assert half == first / 2 and halved.to_dict() == plain.to_dict() | rates
    gates = recipe("SKILL + gates doubled", 0.9, 60, WIDTH_256)[0]
    assert gates.gate_learning_rate == 2 * halved.gate_learning_rate and gates.final_learning_rate == first
    published, rate = recipe("SKILL + as published", 0.9, 60, WIDTH_256)
    assert (rate, published.final_learning_rate, published.gate_learning_rate) == (2e-4, 1e-4, 0.02)
    assert published.lagrange_multiplier == "learned" and published.resolve_steps(60).sparsity_warmup == 4
    assert recipe("SKILL + as published", 0.9, 240, WIDTH_256)[0].resolve_steps(240).joint == 160
    pre_norm = HubertConfig(hidden_size=256, do_stable_layer_norm=True)
    final = recipe("SKILL + rates halved", 0.9, 60, pre_norm)[0].final_learning_rate
    assert final == pytest.approx(5**0.5 * half)
    assert recipe("SKILL + post-norm rates", 0.9, 60, pre_norm)[1] == first


def test_stages_of_another_length():
    for name, final in (("equal stages", 120), ("longer first stage", 80)):
        fields = fields_of(f"one group + gates doubled + {name}")
        assert fields == fields_of("one group") | {
            "final_steps": final,
            "final_learning_rate": fields["final_learning_rate"],
            "gate_learning_rate": 2 * SkillConfig().resolve_gate_learning_rate(240 - final),
        }


def test_two_layers_learn_as_distilhubert_does_in_one_stage():
    shape, loss = (fields_of(name) for name in (SHAPE, "DistilHuBERT"))
    assert shape == loss | {"final_steps": 240}


# Two groups share a projection, as many as SKILL finds; what has projections cannot get them.
HAVE_PROJECTIONS = ("DPHuBERT", "DistilHuBERT", SHAPE)
CHANGES = [
    (method, option)
    for option in OPTIONS
    for method in METHODS
    if (option != "shared projection" or method == "SKILL")
    and (option != "projections" or method not in HAVE_PROJECTIONS)
]


@pytest.mark.parametrize("method, option", CHANGES)
def test_an_option_changes_a_method(method, option):
    plain, changed = fields_of(method), fields_of(f"{method} + {option}")
    differing = {name for name in plain if plain[name] != changed[name]}
    assert differing == study_design.OPTIONS[option](160).keys()
    both = fields_of(f"{method} + {option} + by size")
    assert both == changed | {"group_weights": "size"}


def test_torn_line_takes_no_other_along(tmp_path, caplog):
    path = tmp_path / "students.1.jsonl"
    run_study.append(path, {"key": "first", "settings": {}})
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"key": "torn", "scor')
    run_study.append(path, {"key": "second", "settings": {}})
    run_study.append(tmp_path / "students.0.jsonl", {"key": "third", "settings": {}})
    assert run_study.read_rows(tmp_path).keys() == {"first", "second", "third"}
    assert "students.1.jsonl has an incomplete line" in caplog.text


def test_first_row_of_a_student_counts_unless_only_the_second_has_scores(tmp_path):
    rows = [
        {"key": "a", "number": 1},
        {"key": "a", "number": 2, "scores": {}},
        {"key": "a", "number": 3, "scores": {}},
        {"key": "a", "number": 4},
        {"key": "b", "number": 5},
        {"key": "b", "number": 6},
    ]
    for row in rows:
        run_study.append(tmp_path / "students.0.jsonl", {"settings": {}} | row)
    assert {key: row["number"] for key, row in run_study.read_rows(tmp_path).items()} == {"a": 2, "b": 5}


def write_clips(directory, rows: list[dict]):
    """An `audiofolder` of noise; `seconds` is the length of a clip."""
    rng = np.random.default_rng(0)
    for row in rows:
        path = directory / row["file_name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, rng.normal(0, 0.1, int(16_000 * row.pop("seconds"))), 16_000)
    with open(directory / "metadata.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return directory


@pytest.fixture(scope="module")
def speech(tmp_path_factory) -> dict:
    """Directories in the form of the real ones; three recordings of a reader are long enough for phonemes."""
    books = [
        {
            "file_name": f"{reader}/{reader}-{index}.wav",
            "speaker": reader,
            "text": ("GOOD MORNING", "A YELLOW HOUSE", "THE CAT")[index % 3],
            "seconds": 3.0 if index < 3 else 0.3,
        }
        for reader, count in [
            *((f"10{number}", 28) for number in range(6)),
            *dict.fromkeys(HELDOUT_LIBRISPEECH_SPEAKERS, 3).items(),
        ]
        for index in range(count)
    ]
    commands = [
        {"file_name": f"{word}/{number}.wav", "speaker": f"s{number}", "label": word, "seconds": 0.3}
        for number in range(40)
        for word in ("yes", "no")
    ]
    commands.append({"file_name": "_silence_/0.wav", "speaker": "", "label": "_silence_", "seconds": 0.3})
    folder = tmp_path_factory.mktemp("speech")
    return {
        "librispeech": write_clips(folder / "books", books),
        "speech_commands": write_clips(folder / "words", commands),
    }


@pytest.fixture(autouse=True)
def isolated(tmp_path_factory, monkeypatch):
    isolate(tmp_path_factory, monkeypatch)


def read_splits(speech) -> tuple[dict, dict[str, str]]:
    """Task -> split -> paths, and the speaker of each path."""
    speaker_of = {
        row["audio"]: row["speaker"]
        for directory, librispeech in ((speech["librispeech"], True), (speech["speech_commands"], False))
        for row in study_probes.read_rows(directory, librispeech)
    }
    splits = study_probes.probe_splits(**speech)
    paths = {
        task: {split: [row["path"] for row in dataset["audio"]] for split, dataset in found.items()}
        for task, found in splits.items()
    }
    return paths, speaker_of


def test_no_clip_and_no_speaker_is_on_two_sides(speech):
    paths, speaker_of = read_splits(speech)
    assert list(paths) == list(study_probes.TASKS)
    for task, found in paths.items():
        clips = [clip for clips in found.values() for clip in clips]
        assert all(found.values()) and len(clips) == len(set(clips))
        speakers = [{speaker_of[clip] for clip in clips} for clips in found.values()]
        if task == "sid":
            assert speakers[0] == speakers[1] and speakers[2] <= speakers[0]
        else:
            assert not speakers[0] & speakers[1] and not (speakers[0] | speakers[1]) & speakers[2]


def test_tests_are_on_speech_that_no_model_was_trained_on(speech):
    paths, speaker_of = read_splits(speech)
    train, heldout = study_probes.speech_to_distil(speech["librispeech"])
    train, heldout = ({row["path"] for row in dataset["audio"]} for dataset in (train, heldout))
    assert not train & heldout
    assert {speaker_of[clip] for clip in heldout} == set(HELDOUT_LIBRISPEECH_SPEAKERS)
    for task in ("sid", "pr"):
        assert not train & set(paths[task]["test"])
    # The teacher has heard two in three speakers of the commands; those who are tested are the others.
    rows = study_probes.read_rows(speech["speech_commands"], False)
    heard = {row["speaker"] for row in rows if row["split"] == "train"}
    for task in ("ks", "asv"):
        assert not heard & {speaker_of[clip] for clip in paths[task]["test"]}


def test_silence_is_no_keyword(speech):
    splits = study_probes.probe_splits(**speech)["ks"]
    assert {label for dataset in splits.values() for label in dataset["label"]} == {"yes", "no"}


def test_draw_depends_on_names_alone():
    rows = [{"file_name": f"{number}.wav"} for number in range(30)]
    chosen = study_probes.draw(rows, 10)
    assert chosen == study_probes.draw(rows[::-1], 10) != rows[:10]
    assert study_probes.draw(rows, 5) == chosen[:5]


@pytest.mark.parametrize("worker", [-1, 2])
def test_worker_that_is_none_is_an_error(speech, worker):
    with pytest.raises(ValueError, match=f"`worker` must be from 0 to 1, but is {worker}"):
        run_study.StudyArguments(**speech, worker=worker, num_workers=2)


def test_directory_without_metadata_is_an_error(speech, tmp_path):
    with pytest.raises(ValueError, match="has no metadata.csv"):
        run_study.StudyArguments(librispeech=tmp_path, speech_commands=speech["speech_commands"])


@pytest.mark.nightly
def test_study_goes_on_where_it_was_and_can_be_drawn(speech, tmp_path, monkeypatch):
    teacher = tmp_path / "teacher"
    tiny_teacher(num_hidden_layers=3).save_pretrained(teacher)
    save_feature_extractor(teacher)
    condition = Condition("wavlm", 0.75, 6)
    for module, name, value in (
        (run_study, "TEACHERS", {"wavlm": teacher}),
        (run_study, "SEEDS", (0,)),
        (study_design, "COMMON", {"calibration_samples": 8, "calibration_seconds": 0.5}),
        (study_design, "BLOCKS", (Block(("SKILL", "DPHuBERT", "SKILL + second speaker"), (condition,), (0,), True),)),
        (study_probes, "LEARNING_RATES", (1e-2,)),
        (study_probes, "STEPS", dict.fromkeys(study_probes.TASKS, 3)),
    ):
        monkeypatch.setattr(module, name, value)
    args = run_study.StudyArguments(**speech, results=tmp_path / "results", max_seconds=0.5, num_threads=1, max_runs=1)

    def rows() -> list[dict]:
        text = (args.results / "students.0.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    run_study.run(args)
    first = rows()
    references = (args.results / "references.wavlm.json").read_bytes()
    run_study.run(args)
    args.max_runs = None
    run_study.run(args)
    assert len(first) == 1 and rows()[0] == first[0]
    assert (args.results / "references.wavlm.json").read_bytes() == references
    assert [row["key"] for row in rows()] == [
        f"wavlm, 0.75, 6, {method}, 0" for method in ("SKILL", "DPHuBERT", "SKILL + second speaker")
    ]
    assert rows()[1]["layer_groups"] == [[0], [1], [2], [3]]
    for row in rows():
        assert row["sparsity_reached"] == pytest.approx(0.75, abs=0.02)
        assert list(row["scores"]) == list(study_probes.METRICS) and np.isfinite(list(row["scores"].values())).all()
        assert len(row["distances"]["cka"]) == 4
        assert len(row["distances_second_speaker"]["cka"]) == 4
        assert row["distances_second_speaker"] != row["distances"]
        assert {"before_cut", "after_cut", "end"} <= row["held_out"].keys()
        assert row["cut"]["step"] == 4 and [step for step, _ in row["losses"]] == [1, 2, 3, 4, 5, 6]

    study = study_results.read_study(args.results)
    assert len(study.rows) == 3
    assert study.references["wavlm"].keys() == {"teacher", "untrained", "fbank", "mfcc"}
    page = tmp_path / "study.md"
    page.write_text("".join(f"<!-- study: {name} -->\n<!-- end -->\n" for name in draw_study.TABLES), encoding="utf-8")
    draw_study.run(draw_study.DrawArguments(args.results, page, tmp_path / "figures"))
    assert (
        page.read_text(encoding="utf-8").count(draw_study.NOTHING) == 10
    )  # unequal groups, second speaker, layers at 240 steps, short runs, and the six tables of recipes before
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {draw_study.PICTURES["distances"].file}
