"""The study: its design, the data of its tasks, and a run of it in tiny that is stopped and goes on."""

import csv
import json
import sys
from collections import Counter

import numpy as np
import pytest
import soundfile
from conftest import tiny_teacher
from example_helpers import EXAMPLES, isolate, save_feature_extractor

from skill_hf import SkillConfig, cluster_layers


sys.path.insert(0, str(EXAMPLES / "study"))

import draw_study  # noqa: E402
import run_study  # noqa: E402
import study_design  # noqa: E402
import study_probes  # noqa: E402
import study_results  # noqa: E402
from pretrain_teacher import HELDOUT_LIBRISPEECH_SPEAKERS  # noqa: E402
from study_design import BASELINES, MEASURES, SEEDS, SPARSITIES, VARIANTS, plan, resolve  # noqa: E402


# Hidden states on a line: the nearer, the more alike.
PLACES = {
    "cka": [0, 1, 2, 10, 11, 12, 13, 20, 21, 22, 23, 24, 25],
    "cosine": [0, 1, 2, 3, 4, 5, 20, 21, 22, 23, 24, 25, 26],
    "distillation": [0, 1, 2, 3, 20, 21, 22, 23, 24, 25, 26, 27, 28],
    "mutual_knn": [0, 1, 10, 11, 20, 21, 30, 31, 40, 41, 50, 51, 52],
}
SIMILARITY = {name: np.exp(-np.abs(np.subtract.outer(places, places)) / 100) for name, places in PLACES.items()}
SKILL = ((0, 1, 2), (3, 4, 5, 6), (7, 8, 9, 10, 11, 12))


def test_plan_has_every_run_once():
    runs = list(plan())
    expected = {(name, sparsity, seed) for name in ("skill", *BASELINES) for sparsity in SPARSITIES for seed in SEEDS}
    expected |= {(name, 0.75, seed) for name in VARIANTS for seed in SEEDS}
    assert len(runs) == len(expected)
    assert set(runs) == expected


def test_plan_begins_with_what_matters():
    runs = list(plan())
    assert runs[:2] == [("skill", 0.75, 0), ("dphubert", 0.75, 0)]
    both = [
        index for index, (name, sparsity, _) in enumerate(runs) if name in ("skill", "dphubert") and sparsity == 0.75
    ]
    baselines = [index for index, (name, sparsity, _) in enumerate(runs) if name in BASELINES[1:] and sparsity == 0.75]
    others = [index for index, (name, sparsity, _) in enumerate(runs) if name in VARIANTS or sparsity == 0.5]
    assert max(both) < min(baselines) <= max(baselines) < min(others)
    # Whenever it stops, SKILL and DPHuBERT, or the other baselines, differ by one seed at most.
    for indices in (both, baselines):
        started = Counter()
        for index in indices:
            started[runs[index][0]] += 1
            assert max(started.values()) - min(started[name] for name in {runs[index][0] for index in indices}) <= 1


@pytest.mark.parametrize(
    "name, groups, student_layers",
    [
        ("skill", SKILL, "group"),
        ("dphubert", ((0,), (4,), (8,), (12,)), "group"),
        ("distilhubert", ((4,), (8,), (12,)), "last"),
        ("last layer", ((12,),), "group"),
        ("every layer", tuple((layer,) for layer in range(13)), "group"),
        ("one group", (tuple(range(13)),), "group"),
        ("measure cosine", (tuple(range(6)), tuple(range(6, 13))), "group"),
        ("measure distillation", (tuple(range(4)), tuple(range(4, 13))), "group"),
        ("measure mutual_knn", ((0, 1), (2, 3), (4, 5), (6, 7), (8, 9), (10, 11, 12)), "group"),
        ("3 clusters", SKILL, "group"),
        ("2 clusters", (SKILL[0] + SKILL[1], SKILL[2]), "group"),
    ],
)
def test_methods_have_the_groups_of_their_names(name, groups, student_layers):
    method = resolve(name, SIMILARITY, seed=0)
    assert method.layer_groups == groups
    assert method.student_layers == student_layers
    assert method.projection_groups == (((0,), (1, 2, 3)) if name == "dphubert" else None)


@pytest.mark.parametrize("linkage", ["single", "complete", "ward"])
def test_linkages_are_those_of_their_names(linkage):
    features = np.random.default_rng(12).normal(size=(13, 3))  # of which every linkage makes groups of its own
    similarity = dict.fromkeys(MEASURES, np.exp(-np.linalg.norm(features[:, None] - features, axis=-1)))
    expected = cluster_layers(similarity["cka"], SkillConfig(linkage=linkage))
    found = resolve(f"linkage {linkage}", similarity, seed=0).layer_groups
    assert [list(group) for group in found] == expected
    assert found != resolve("skill", similarity, seed=0).layer_groups


@pytest.mark.parametrize("name", ("skill", *BASELINES, *VARIANTS))
def test_every_method_is_a_recipe(name):
    method = resolve(name, SIMILARITY, seed=1)
    fields = json.loads(json.dumps(method.fields()))
    SkillConfig(target_sparsity=0.75, **fields)
    if name.endswith("clusters"):
        assert len(method.layer_groups) == int(name.split()[0])


def test_random_groups_have_the_sizes_of_skill_and_differ_by_seed():
    found = [resolve("random groups", SIMILARITY, seed).layer_groups for seed in SEEDS]
    for groups in found:
        assert sorted(map(len, groups)) == [3, 4, 6]
        assert sorted(layer for group in groups for layer in group) == list(range(13))
    assert len(set(found)) == len(SEEDS)
    assert found[2] == resolve("random groups", SIMILARITY, 2).layer_groups


def test_methods_with_the_same_groups_share_a_run():
    def key(name, sparsity=0.75, seed=0):
        return run_study.run_key(resolve(name, SIMILARITY, seed), sparsity, seed)

    assert key("skill") == key("3 clusters")
    others = [key("dphubert"), key("skill", 0.5), key("skill", seed=1), key("distilhubert"), key("last layer")]
    assert len({key("skill"), *others}) == 6


def test_torn_line_takes_no_other_along(tmp_path, caplog):
    path = tmp_path / "runs.1.jsonl"
    run_study.append(path, {"key": "first"})
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"key": "torn", "scor')
    run_study.append(path, {"key": "second"})
    run_study.append(tmp_path / "runs.0.jsonl", {"key": "third"})
    assert run_study.finished(tmp_path) == {"first", "second", "third"}
    assert "torn" in caplog.text


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
    for module in (run_study, study_design):
        monkeypatch.setattr(module, "SEEDS", (0,))
    monkeypatch.setattr(run_study, "CALIBRATION_SIZES", (4, 8))
    monkeypatch.setattr(run_study, "CALIBRATION_SAMPLES", 8)
    monkeypatch.setattr(run_study, "CALIBRATION_SECONDS", 0.5)
    monkeypatch.setattr(study_probes, "LEARNING_RATES", (1e-2,))
    monkeypatch.setattr(study_probes, "STEPS", dict.fromkeys(study_probes.TASKS, 3))
    teacher = tmp_path / "teacher"
    tiny_teacher(num_hidden_layers=7).save_pretrained(teacher)  # the largest number of clusters is 8
    save_feature_extractor(teacher)
    args = run_study.StudyArguments(
        **speech,
        teacher=teacher,
        results=tmp_path / "results",
        max_steps=6,
        max_seconds=0.5,
        num_threads=1,
        max_runs=1,
    )

    def runs() -> list[dict]:
        return [json.loads(line) for line in (args.results / "runs.0.jsonl").read_text(encoding="utf-8").splitlines()]

    run_study.run(args)
    first = runs()
    before = {name: (args.results / name).read_bytes() for name in ("clusters.0.json", "references.json")}
    run_study.run(args)
    assert len(first) == 1 and runs()[0] == first[0]
    assert {name: (args.results / name).read_bytes() for name in before} == before

    study = study_results.read_study(args.results)
    assert [row["layer_groups"] for row in runs()] == [
        [list(group) for group in study.methods[name, 0].layer_groups] for name in ("skill", "dphubert")
    ]
    assert runs()[1]["layer_groups"] == [[0], [2], [5], [7]]
    for row in runs():
        assert row["sparsity_reached"] == pytest.approx(0.75, abs=0.02)
        assert list(row["scores"]) == list(study_probes.METRICS) and np.isfinite(list(row["scores"].values())).all()
        assert len(row["distances"]["cka"]) == 8 and len(row["layer_weights"]["pr"]) == 8
    assert study.references.keys() == {"teacher", "untrained", "fbank", "mfcc"}
    assert set(study.groups[0]["cka"]) == {4, 8}

    page = tmp_path / "study.md"
    page.write_text("".join(f"<!-- study: {name} -->\n<!-- end -->\n" for name in draw_study.TABLES), encoding="utf-8")
    draw_study.run(draw_study.DrawArguments(args.results, page, tmp_path / "figures"))
    assert draw_study.NOTHING not in page.read_text(encoding="utf-8")
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        picture.file for picture in draw_study.PICTURES.values()
    }
