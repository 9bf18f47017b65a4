"""The metrics of SUPERB: against values worked out by hand, against other formulations, and loaded in either way."""

import doctest
import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import evaluate
import numpy as np
import pytest
from scipy.optimize import brentq

import skill_hf.metrics
from skill_hf.metrics import METRICS, load_metric


DIRECTORY = Path(skill_hf.metrics.__file__).parent

ANN, BOB = "Ann", "Bob"

# What each metric is tried with where any input will do.
INPUTS = {
    "accuracy": {"predictions": ["yes", "no", "up"], "references": ["yes", "no", "down"]},
    "diarization_error_rate": {
        "predictions": [[{"speaker": "1", "start": 0.0, "end": 4.0}], []],
        "references": [
            [{"speaker": ANN, "start": 0.5, "end": 3.0}, {"speaker": BOB, "start": 2.0, "end": 5.0}],
            [{"speaker": BOB, "start": 1.0, "end": 2.0}],
        ],
        "collar": 0.25,
    },
    "equal_error_rate": {"predictions": [0.9, 0.8, 0.7, 0.1], "references": [1, 0, 1, 0]},
    "error_rate": {"predictions": ["A BAT", ""], "references": ["A CAT", "ONE"], "unit": "character"},
    "slot_filling": {"predictions": ["B-a ONE E-a"], "references": ["B-a ON E-a B-b X E-b"]},
    "term_weighted_value": {
        "predictions": [0.4, 0.2, 0.3, 0.1],
        "references": [1, 0, 0, 1],
        "queries": ["a", "a", "b", "b"],
        "prior": 0.5,
        "actual_threshold": 0.15,
    },
}


@pytest.fixture(scope="module", autouse=True)
def caches(tmp_path_factory):
    """Caches of `evaluate` that are empty at first, and no network."""

    def connect(*_):
        raise AssertionError("A metric wants the network.")

    root = tmp_path_factory.mktemp("caches")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate.config, "HF_METRICS_CACHE", str(root / "metrics"))
        patch.setattr(evaluate.config, "HF_MODULES_CACHE", str(root / "modules"))
        patch.setattr(sys, "path", list(sys.path))
        patch.setattr(socket.socket, "connect", connect)
        yield root


def compute(name, predictions, references, **kwargs):
    return load_metric(name).compute(predictions=predictions, references=references, **kwargs)


# --- Loading ---


def test_every_file_is_listed():
    assert {path.stem for path in DIRECTORY.glob("*.py")} - {"__init__"} == set(METRICS) == set(INPUTS)


def test_unknown_metric_is_an_error_that_lists_those_there_are():
    with pytest.raises(ValueError, match=f"no metric 'wer'; the metrics are {', '.join(METRICS)}"):
        load_metric("wer")


@pytest.mark.parametrize(
    ("name", "package"), [("accuracy", "evaluate"), ("accuracy", "sklearn"), ("error_rate", "jiwer")]
)
def test_missing_package_names_the_extra(name, package, monkeypatch):
    monkeypatch.delitem(sys.modules, f"skill_hf.metrics.{name}", raising=False)
    for module in [module for module in sys.modules if module.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{name} needs {package}.*pip install skill-hf\[superb\]"):
        load_metric(name)


@pytest.mark.parametrize("name", METRICS)
def test_evaluate_load_gives_the_same(name):
    ours, theirs = load_metric(name), evaluate.load(str(DIRECTORY / f"{name}.py"))
    assert type(theirs).__module__.startswith("evaluate_modules.")  # a copy, not our class
    assert ours.name == theirs.name == name
    assert ours.compute(**INPUTS[name]) == theirs.compute(**INPUTS[name])


@pytest.mark.parametrize("name", METRICS)
def test_load_metric_leaves_no_file(name, caches):
    before = set(caches.rglob("*.arrow*"))
    metric = load_metric(name)
    metric.add_batch(**{key: value for key, value in INPUTS[name].items() if isinstance(value, list)})
    assert set(caches.rglob("*.arrow*")) == before
    assert len(metric.compute(**{key: value for key, value in INPUTS[name].items() if not isinstance(value, list)}))
    assert set(caches.rglob("*.arrow*")) == before


@pytest.mark.parametrize("name", METRICS)
def test_description_is_complete_and_its_example_runs(name):
    info = load_metric(name).info
    assert "yang2021superb" in info.citation
    assert "percent" in info.description or "between 0 and 1" in info.description
    for block in ("Args:", "Returns:", "Raises:", "Examples:"):
        assert f"\n{block}\n" in info.inputs_description
    example = doctest.DocTestParser().get_doctest(info.inputs_description, {}, name, None, None)
    assert doctest.DocTestRunner().run(example) == doctest.TestResults(0, len(example.examples))
    assert len(example.examples) >= 3


@pytest.mark.parametrize("name", METRICS)
def test_values_are_plain_floats(name):
    result = load_metric(name).compute(**INPUTS[name])
    assert {type(value) for value in result.values()} == {float}
    assert json.loads(json.dumps(result)) == result


@pytest.mark.parametrize("name", METRICS)
def test_batches_give_what_the_whole_set_gives(name):
    inputs = INPUTS[name]
    columns = {key: value for key, value in inputs.items() if isinstance(value, list)}
    settings = {key: value for key, value in inputs.items() if key not in columns}
    metric = load_metric(name)
    for index in range(len(columns["references"])):
        metric.add_batch(**{key: value[index : index + 1] for key, value in columns.items()})
    assert metric.compute(**settings) == metric.compute(**inputs)


@pytest.mark.parametrize("name", METRICS)
def test_nothing_to_score_is_an_error(name):
    empty = {key: [] for key, value in INPUTS[name].items() if isinstance(value, list)}
    with pytest.raises(ValueError, match="nothing|undefined"):
        load_metric(name).compute(**empty)


@pytest.mark.parametrize("name", METRICS)
def test_unequal_lengths_are_an_error(name):
    inputs = INPUTS[name] | {"references": INPUTS[name]["references"] * 2}
    with pytest.raises(ValueError, match="Mismatch in the number"):
        load_metric(name).compute(**inputs)


CHILD = """
import json, socket, sys


def connect(*_):
    raise AssertionError("A metric wants the network.")


socket.socket.connect = connect
import skill_hf.metrics
print(json.dumps("evaluate" in sys.modules))
import evaluate
directory, inputs = sys.argv[1], json.loads(sys.argv[2])
for name, arguments in inputs.items():
    for metric in (skill_hf.metrics.load_metric(name), evaluate.load(f"{directory}/{name}.py")):
        print(json.dumps(metric.compute(**arguments)))
"""


@pytest.mark.nightly
def test_processes_that_share_an_empty_cache_offline(tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", CHILD, str(DIRECTORY), json.dumps(INPUTS)]
    children = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        for _ in range(3)
    ]
    expected = [load_metric(name).compute(**arguments) for name, arguments in INPUTS.items()]
    for child in children:
        output, errors = child.communicate(timeout=600)
        assert child.returncode == 0, errors
        imported_evaluate, *results = map(json.loads, output.splitlines())
        assert not imported_evaluate  # by `import skill_hf.metrics` alone
        assert results[::2] == results[1::2] == expected


# --- Accuracy ---


@pytest.mark.parametrize(
    ("predictions", "references", "expected"),
    [
        (["a", "b", "b", "a"], ["a", "b", "a", "b"], 2 / 4),
        ([0, 1, 2, 3, 3], [0, 1, 2, 3, 4], 4 / 5),
        (np.array([5, 7]), np.array([5, 7]), 1.0),
        (["a"], ["A"], 0.0),
        (["1", "02"], ["1", "2"], 1 / 2),  # strings stay strings
    ],
)
def test_accuracy(predictions, references, expected):
    assert compute("accuracy", predictions, references) == {"accuracy": expected}


@pytest.mark.parametrize(
    ("predictions", "message"),
    [
        ([0.9, 0.2], "`predictions` must contain classes as strings or integers, but item 0 is 0.9"),
        ([1, None], "item 1 is None"),
        ([1, math.nan], "item 1 is nan"),
        ([[0.1, 0.9], [0.8, 0.2]], "don't match the expected format"),
        (["yes", "no"], "don't match the expected format"),
    ],
)
def test_accuracy_needs_classes_of_one_kind(predictions, message):
    with pytest.raises(ValueError, match=message):
        compute("accuracy", predictions, [1, 0])


# --- Error rate ---


@pytest.mark.parametrize(
    ("unit", "references", "predictions", "expected"),
    [
        ("word", ["A B C D", "X"], ["A B C D", "X"], 0),
        ("word", ["A B C D", "X"], ["A B C D", "Y"], 1 / 5),  # not the mean of the rates, (0 + 1) / 2
        ("word", ["A B C"], ["A X C D"], (1 + 1) / 3),  # a substitution and an insertion
        ("word", ["A B C", "D"], ["C", ""], (2 + 1) / 4),  # deletions
        ("word", ["HH AH L OW", "B AY"], ["HH EH L OW", "B AY"], 1 / 6),  # phonemes
        ("word", ["A"], ["B C D"], 3.0),
        ("word", [" A   B\t"], ["A B"], 0),
        ("word", ["a"], ["A"], 1.0),
        ("character", ["CATS", "NO"], ["CUT", "NO"], (1 + 1) / 6),
        ("character", ["A B"], ["AB"], 1 / 3),
        ("character", ["  A  B "], ["A B"], 0),
        ("word", ["A B", ""], ["A B", "C D E"], 3 / 2),  # all that is predicted for an empty reference is inserted
        ("character", ["A B", ""], ["A B", "C D"], 3 / 3),
        ("word", ["A", " "], ["A", ""], 0),
    ],
)
def test_error_rate(unit, references, predictions, expected):
    assert compute("error_rate", predictions, references, unit=unit) == {"error_rate": pytest.approx(expected)}


def edit_distance(reference, prediction):
    """Wagner and Fischer's recursion, one row at a time."""
    row = list(range(len(prediction) + 1))
    for i, true in enumerate(reference, start=1):
        previous, row = row, [i]
        for j, predicted in enumerate(prediction, start=1):
            row.append(min(previous[j] + 1, row[-1] + 1, previous[j - 1] + (true != predicted)))
    return row[-1]


def test_error_rate_of_random_texts():
    rng = np.random.default_rng(0)
    references, predictions = (
        [" ".join(rng.choice(["a", "b", "cd"], rng.integers(1, 12))) for _ in range(40)] for _ in range(2)
    )
    for unit, split in (("word", str.split), ("character", list)):
        edits = sum(edit_distance(split(r), split(p)) for r, p in zip(references, predictions, strict=True))
        expected = edits / sum(len(split(reference)) for reference in references)
        assert compute("error_rate", predictions, references, unit=unit)["error_rate"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("predictions", "references", "unit", "message"),
    [
        (["A"], ["A"], "phoneme", "`unit` must be one of word, character, but is 'phoneme'"),
        (["A", ""], ["", "  "], "word", "all references are empty"),
        (["A", None], ["A", "B"], "word", "`predictions` must contain strings, but item 1 is None"),
        (["A", "B"], ["A", None], "word", "`references` must contain strings, but item 1 is None"),
        ([1], [2], "word", "don't match the expected format"),
    ],
)
def test_error_rate_of_bad_input(predictions, references, unit, message):
    with pytest.raises(ValueError, match=message):
        compute("error_rate", predictions, references, unit=unit)


# --- Equal error rate ---


@pytest.mark.parametrize(
    ("same", "different", "rate", "threshold"),
    [
        ([0.9, 0.8], [0.3, 0.1], 0, 0.8),
        ([0.1, 0.2], [0.7, 0.9], 1, 0.7),
        # From 0.9 on all are accepted at once: both rates run along (0, 1) -> (1, 0).
        ([0.9, 0.9], [0.9, 0.9, 0.9], 1 / 2, 0.9),
        # (false acceptance, false rejection) is (1/4, 1/3) from 0.7 on and (1/4, 0) from 0.4 on. The excess falls from
        # 1/12 to -1/4, so the crossing is a quarter of the way.
        ([0.9, 0.7, 0.4], [0.8, 0.3, 0.2, 0.1], 1 / 4, 0.7 - 0.3 / 4),
        # Ties of both kinds: (0, 1/2) from 0.9 on, (2/3, 0) from 0.5 on: 3/7 of the way, 3/7 * 2/3 = 1/2 - 3/7 * 1/2.
        ([0.9, 0.5], [0.5, 0.5, 0.1], 2 / 7, 0.9 - 0.4 * 3 / 7),
    ],
)
def test_equal_error_rate(same, different, rate, threshold):
    result = compute("equal_error_rate", [*same, *different], [1] * len(same) + [0] * len(different))
    assert result == pytest.approx({"equal_error_rate": rate, "threshold": threshold})


def test_equal_error_rate_of_random_scores():
    """Rates counted trial by trial; no two scores are equal, so both are reached up to one trial."""
    rng = np.random.default_rng(0)
    same, different = rng.normal(1, 1, 300), rng.normal(0, 1, 500)
    result = compute("equal_error_rate", np.append(same, different), [1] * 300 + [0] * 500)

    points = sorted([*same, *different], reverse=True)
    acceptance = [0, *(np.mean(different >= point) for point in points)]
    rejection = [1, *(np.mean(same < point) for point in points)]
    place = brentq(lambda x: np.interp(x, range(801), rejection) - np.interp(x, range(801), acceptance), 0, 800)
    assert result["equal_error_rate"] == pytest.approx(np.interp(place, range(801), acceptance))
    assert np.mean(different >= result["threshold"]) == pytest.approx(result["equal_error_rate"], abs=1 / 500)
    assert np.mean(same < result["threshold"]) == pytest.approx(result["equal_error_rate"], abs=1 / 300)


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([0.1, 0.2], [1, 1], r"at least one trial of each, but contain \[.*1.0.*\]"),
        ([0.1, 0.2], [0, 0], "at least one trial of each"),
        ([0.1, 0.2, 0.3], [0, 1, 2], "must be 0 and 1"),
        ([0.1, 0.2, 0.3], [0, 1, 0.5], "must be 0 and 1"),
        ([0.1, math.nan], [0, 1], "must be finite, but item 1 is nan"),
        ([math.inf, 0.1], [0, 1], "must be finite, but item 0 is inf"),
        ([0.1, None], [0, 1], "must be finite, but item 1 is nan"),
    ],
)
def test_equal_error_rate_of_bad_input(scores, labels, message):
    with pytest.raises(ValueError, match=message):
        compute("equal_error_rate", scores, labels)


# --- Slot filling ---


@pytest.mark.parametrize(
    ("reference", "prediction", "f1", "cer"),
    [
        ("X B-a ONE E-a Y B-b TWO E-b", "X B-a ONE E-a Y B-b TWO E-b", 1, 0),
        ("X B-a ONE E-a", "X ONE", 0, 3 / 3),
        ("B-a ONE E-a", "B-b ONE E-b", 0, 3 / 3),
        # 1 type of 2 and 3 in common. NEW YOK lacks 1 of 8 characters, all 3 of TWO are missed.
        ("B-a NEW YORK E-a B-b TWO E-b", "B-a NEW YOK E-a B-c X E-c B-d X E-d", 2 * 1 / (2 + 3), (1 + 3) / (8 + 3)),
        # Each goes with the nearest of its type; what is left over costs nothing.
        ("B-a ANN E-a B-a BOB E-a", "B-a BOB E-a B-a ANN E-a B-a XXXX E-a", 1, 0),
        # ANN is nearest to both, with 0 and 3 edits.
        ("B-a ANN E-a B-a BOB E-a", "B-a ANN E-a", 1, 3 / 6),
        ("B-a ONE E-a", "B-a ONE E-a B-b TWO E-b", 2 / 3, 0),
        ("B-a A E-a", "B-a BCD E-a", 1, 3 / 1),
        ("B-a ONE E-a", "B-a one E-a", 1, 3 / 3),
        # Marks of other slots within a value are dropped, and make no slot.
        ("B-a NEW YORK E-a", "B-a NEW B-b YORK E-a", 1, 0),
        ("B-a NEW YORK E-a", "B-a NEW B-b YORK E-b E-a", 1, 0),
        ("B-a NEW YORK E-a", "B-a NEW E-b B-b E-b B-c YORK E-a", 1, 0),
        ("B-a NEW B-b YORK E-a", "B-a NEW B-b YORK E-a", 1, 0),
        # The first end counts; no slot without an end.
        ("B-a ONE E-a", "B-a ONE E-a TWO E-a", 1, 0),
        ("B-a ONE E-a", "B-a ONE TWO", 0, 3 / 3),
        ("B-a ONE E-a", "B-b B-a ONE E-a", 1, 0),
        # Words that are glued to the outer side of a mark; runs of space.
        ("B-a ONE E-a", "XB-a ONE E-aY", 1, 0),
        ("B-a ONE  TWO E-a", " B-a  ONE TWO   E-a ", 1, 0),
        ("B-a 5:30; THEN E-a", "B-a 5:30; THEM E-a", 1, 1 / 10),
    ],
)
def test_slot_filling(reference, prediction, f1, cer):
    result = compute("slot_filling", [prediction], [reference])
    assert result == pytest.approx({"slot_type_f1": f1, "slot_value_cer": cer})


def test_slot_filling_averages_f1_over_utterances_and_sums_edits_over_the_set():
    references = ["B-a ABCDEFGH E-a B-b X E-b", "NOTHING HERE", "NOTHING HERE", "B-a XY E-a"]
    predictions = ["B-a ABCDEFGH E-a", "NOTHING", "B-a HERE E-a", "B-a XZ E-a"]
    result = compute("slot_filling", predictions, references)
    expected = {"slot_type_f1": (2 / 3 + 1 + 0 + 1) / 4, "slot_value_cer": (0 + 1 + 1) / (8 + 1 + 2)}
    assert result == pytest.approx(expected)


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        (["B-a ONE E-a"], ["ONE"], "no reference contains a slot"),
        (["B-a ONE E-a"], ["B-a ONE E-b"], "no reference contains a slot"),
        (["X", None], ["X", "B-a ONE E-a"], "`predictions` must contain strings, but item 1 is None"),
    ],
)
def test_slot_filling_of_bad_input(predictions, references, message):
    with pytest.raises(ValueError, match=message):
        compute("slot_filling", predictions, references)


# --- Diarization error rate ---


def turns(*segments):
    return [{"speaker": speaker, "start": start, "end": end} for speaker, start, end in segments]


def diarization(predictions, references, **kwargs):
    """Missed, false alarm, confusion and speech in seconds; that the shares add up is checked here."""
    result = compute("diarization_error_rate", predictions, references, **kwargs)
    parts = [result[name] for name in ("missed", "false_alarm", "confusion")]
    assert result["der"] == pytest.approx(sum(parts))
    return [part * result["reference_seconds"] for part in parts] + [result["reference_seconds"]]


@pytest.mark.parametrize(
    ("reference", "prediction", "expected"),
    [
        ([(ANN, 0, 6), (BOB, 4, 9)], [("2", 0, 6), ("1", 4, 9)], [0, 0, 0, 6 + 5]),
        ([(ANN, 0, 6), (BOB, 4, 9)], [], [11, 0, 0, 11]),
        # Ann 0 - 10, Bob 8 - 14: from 8 to 10 one of two is missed, from 14 to 15 nobody talks.
        ([(ANN, 0, 10), (BOB, 8, 14)], [("1", 0, 9), ("2", 9, 15)], [2, 1, 0, 10 + 6]),
        # One of two predicted for Ann alone is a false alarm.
        ([(ANN, 0, 4)], [("1", 0, 4), ("2", 1, 3)], [0, 2, 0, 4]),
        ([(ANN, 0, 1)], [("1", 0, 1), ("1", 5, 8)], [0, 3, 0, 1]),  # a rate of 3
        # "1" has 5 s with Ann and 4 with Bob, "2" 4 with Ann: 1-Bob and 2-Ann have 8 in common, 1-Ann only 5.
        ([(ANN, 0, 9), (BOB, 9, 13)], [("1", 0, 5), ("2", 5, 9), ("1", 9, 13)], [0, 0, 5, 13]),
        # All for one speaker: the shorter is confused.
        ([(ANN, 0, 6), (BOB, 6, 8)], [("1", 0, 8)], [0, 0, 2, 8]),
        # Segments of one speaker that overlap or touch, and one without length.
        ([(ANN, 0, 3), (ANN, 2, 5), (ANN, 5, 6)], [("1", 0, 6), ("2", 3, 3)], [0, 0, 0, 6]),
    ],
)
def test_diarization(reference, prediction, expected):
    assert diarization([turns(*prediction)], [turns(*reference)]) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("collar", "expected"),
    [
        (0, [1, 0, 0, 10]),
        # Left out: up to 0.5 and from 9.5 on. "1" starts at 1.
        (1, [0.5, 0, 0, 9]),
        (2, [0, 0, 0, 8]),
    ],
)
@pytest.mark.parametrize("reference", [[(ANN, 0, 10)], [(ANN, 0, 5), (ANN, 5, 10)], [(ANN, 0, 7), (ANN, 4, 10)]])
def test_diarization_collar_is_a_total_width_around_boundaries_of_the_reference(reference, collar, expected):
    result = diarization([turns(("1", 1, 10))], [turns(*reference)], collar=collar)
    assert result == pytest.approx(expected)


def test_diarization_maps_speakers_by_recording_and_sums_times():
    references = [turns((ANN, 0, 6), (BOB, 6, 8)), turns((ANN, 0, 1), (BOB, 1, 2)), []]
    predictions = [turns(("1", 0, 6), ("2", 6, 7)), turns(("2", 0, 1), ("1", 1, 2)), turns(("1", 3, 4))]
    assert diarization(predictions, references) == pytest.approx([1, 1, 0, 8 + 2])


def random_turns(rng, speakers):
    """Five turns of each speaker with pauses, so that nothing depends on how touching turns are taken."""
    return turns(
        *(
            (speaker, start, end)
            for speaker in speakers
            for start, end in np.sort(rng.uniform(0, 30, 10)).reshape(5, 2).tolist()
        )
    )


@pytest.mark.parametrize("collar", [0.0, 0.1, 0.5])
def test_diarization_agrees_with_pyannote(collar):
    diarization_module = pytest.importorskip("pyannote.metrics.diarization")
    core = pytest.importorskip("pyannote.core")

    def annotation(segments):
        result = core.Annotation()
        for track, segment in enumerate(segments):
            result[core.Segment(segment["start"], segment["end"]), track] = segment["speaker"]
        return result

    rng = np.random.default_rng(0)
    references = [random_turns(rng, "ABC"[:count]) for count in (1, 2, 3, 3)]
    predictions = [random_turns(rng, "1234"[:count]) for count in (2, 2, 4, 1)]
    theirs = diarization_module.DiarizationErrorRate(collar=collar)
    for reference, prediction in zip(references, predictions, strict=True):
        theirs(annotation(reference), annotation(prediction), uem=core.Segment(0, 30))
    names = ("missed detection", "false alarm", "confusion", "total")
    assert diarization(predictions, references, collar=collar) == pytest.approx([theirs[name] for name in names])


@pytest.mark.parametrize(
    ("prediction", "reference", "collar", "message"),
    [
        ([("1", 2, 1)], [(ANN, 0, 1)], 0, "Recording 0 of `predictions` contains .* finite start <= end"),
        ([], [(ANN, 0, math.nan)], 0, "Recording 0 of `references` contains .* finite start <= end"),
        ([], [(ANN, None, 1)], 0, "Recording 0 of `references` contains"),
        ([("1", 0, math.inf)], [(ANN, 0, 1)], 0, "Recording 0 of `predictions` contains"),
        ([(None, 0, 1)], [(ANN, 0, 1)], 0, "needs a speaker"),
        ([], [(ANN, 0, 1)], -0.1, "`collar` must be a number of seconds, 0 or larger, but is -0.1"),
        ([], [(ANN, 0, 1)], math.nan, "`collar` must be a number of seconds"),
        ([("1", 0, 1)], [], 0, "contain no speech to score"),
        ([("1", 0, 1)], [(ANN, 0, 1)], 2, "contain no speech to score"),
    ],
)
def test_diarization_of_bad_input(prediction, reference, collar, message):
    with pytest.raises(ValueError, match=message):
        compute("diarization_error_rate", [turns(*prediction)], [turns(*reference)], collar=collar)


# --- Term-weighted value ---

EVEN = {"prior": 0.5, "cost_miss": 1.0}  # beta = 1

# Query a: two of four documents hold it; query b: one of three.
SCORES = [0.9, 0.7, 0.6, 0.1, 0.8, 0.5, 0.2]
TRUE = [1, 0, 1, 0, 0, 1, 0]
QUERIES = ["a"] * 4 + ["b"] * 3


def twv(scores, labels, queries, **kwargs):
    return compute("term_weighted_value", scores, labels, queries=queries, **kwargs)


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [
        (1.0, 0),
        # Mean of the queries' 1 - P_miss - P_fa.
        (0.9, ((1 - 1 / 2) + 0) / 2),
        (0.8, ((1 - 1 / 2) + (0 - 1 / 2)) / 2),
        (0.65, ((1 - 1 / 2 - 1 / 2) + (0 - 1 / 2)) / 2),
        (0.5, ((1 - 0 - 1 / 2) + (1 - 0 - 1 / 2)) / 2),
        (0.0, 0),
    ],
)
def test_term_weighted_value_at_a_threshold(threshold, expected):
    result = twv(SCORES, TRUE, QUERIES, actual_threshold=threshold, **EVEN)
    assert result["atwv"] == pytest.approx(expected)
    # The largest of all is that of 0.5.
    assert result["mtwv"] == pytest.approx(1 / 2)
    assert result["threshold"] == 0.5


def test_quesst_settings():
    """MediaEval's scorer is given `C_miss P / (C_miss P + C_fa (1 - P))` = 0.0741289, of which beta is the odds."""
    beta = 1 / 0.0741289 - 1
    assert beta == pytest.approx(12.49, abs=1e-4)
    # One false alarm among 1000 documents comes before the only true one.
    labels = [0, 1] + [0] * 999
    result = twv(np.arange(len(labels), 0, -1), labels, ["a"] * len(labels))
    assert result == {"mtwv": pytest.approx(1 - beta / 1000, abs=1e-6), "threshold": 1000}


def test_term_weighted_value_perfect_and_worst():
    assert twv([2, 1, 3, 0], [1, 0, 1, 0], list("aabb")) == {"mtwv": 1, "threshold": 2}
    worst = twv([1, 2], [1, 0], ["a", "a"], actual_threshold=2)
    assert worst == {"mtwv": 0, "threshold": math.inf, "atwv": pytest.approx(-12.49)}
    # -inf for trials without a score: everything is accepted at last, `1 - beta`.
    assert twv([1, -math.inf], [1, 0], ["a", "a"], actual_threshold=-math.inf)["atwv"] == pytest.approx(1 - 12.49)


def test_term_weighted_value_has_one_threshold_for_all_queries():
    # Each query alone is perfect, but no threshold suits both.
    scores, labels, queries = [4, 3, 2, 1], [1, 0, 1, 0], list("aabb")
    assert twv(scores[:2], labels[:2], queries[:2])["mtwv"] == twv(scores[2:], labels[2:], queries[2:])["mtwv"] == 1
    assert twv(scores, labels, queries)["mtwv"] == 1 / 2


def test_term_weighted_value_accepts_equal_scores_together():
    # At 1 the true one comes with one of two others: 1 - 1/2, in whatever order they stand.
    for order in ([0, 1, 2], [1, 0, 2], [2, 1, 0]):
        scores, labels = np.array([1, 1, 0])[order], np.array([1, 0, 0])[order]
        assert twv(scores, labels, ["a"] * 3, **EVEN) == {"mtwv": 1 / 2, "threshold": 1}


def test_queries_without_a_true_document_are_left_out():
    alone = twv(SCORES, TRUE, QUERIES, actual_threshold=0.65)
    assert twv([*SCORES, 5, 6], [*TRUE, 0, 0], [*QUERIES, "c", "c"], actual_threshold=0.65) == pytest.approx(alone)


def test_query_that_every_document_holds_has_no_false_alarm():
    assert twv([2, 1], [1, 1], ["a", "a"]) == {"mtwv": 1, "threshold": 1}


def test_term_weighted_value_of_random_scores():
    rng = np.random.default_rng(0)
    queries = np.repeat(list("abcdef"), 30)
    labels = rng.random(180) < 0.2
    labels[queries == "f"] = False
    scores = np.round(rng.normal(labels, 0.7), 1)  # with ties

    def at(threshold):
        values = []
        for query in "abcde":
            true, false = scores[(queries == query) & labels], scores[(queries == query) & ~labels]
            values.append(1 - np.mean(true < threshold) - 1.5 * np.mean(false >= threshold))
        return np.mean(values)

    settings = {"prior": 0.4, "cost_false_alarm": 2.0, "cost_miss": 2.0}  # beta = 1.5
    best = max(scores, key=at)
    assert at(best) > 0.3
    for threshold in np.linspace(-2, 3, 11):
        result = twv(scores, labels, queries, actual_threshold=threshold, **settings)
        assert result == pytest.approx({"mtwv": at(best), "threshold": best, "atwv": at(threshold)})


@pytest.mark.parametrize(
    ("scores", "labels", "settings", "message"),
    [
        ([0.1, math.nan], [1, 0], {}, r"must be numbers, but item 1 is NaN"),
        ([0.1, None], [1, 0], {}, r"must be numbers, but item 1 is NaN"),
        ([0.1, 0.2], [1, 2], {}, "must be 0 or 1, but contain .*2"),
        ([0.1, 0.2], [0, 0], {}, "no query has a document that contains it"),
        ([0.1, 0.2], [1, 0], {"prior": 0}, "`prior` must be between 0 and 1, but is 0"),
        ([0.1, 0.2], [1, 0], {"prior": 1}, "`prior` must be between 0 and 1, but is 1"),
        ([0.1, 0.2], [1, 0], {"cost_miss": 0}, "must be above 0, but are 1.0 and 0"),
        ([0.1, 0.2], [1, 0], {"cost_false_alarm": -1}, "must be above 0, but are -1 and 100.0"),
    ],
)
def test_term_weighted_value_of_bad_input(scores, labels, settings, message):
    with pytest.raises(ValueError, match=message):
        twv(scores, labels, ["a", "a"], **settings)
