"""
Whole evaluations: by an encoder that hears all there is, by one that hears nothing, and by a real one beside a plain
loop in PyTorch; which head is chosen; and what an interruption leaves.
"""

import itertools
import json
import math
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_teacher
from example_helpers import DEMO, read_metadata
from level_encoder import LevelEncoder, make_dataset
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainingArguments, Wav2Vec2FeatureExtractor

from skill_hf.data import read_audio
from skill_hf.encoders import PretrainedEncoder
from skill_hf.superb import evaluation
from skill_hf.superb.evaluation import HiddenStatesCollator, evaluate_task, prepare_examples
from skill_hf.superb.tasks import Classification, Transcription, Verification


KEYWORDS = DEMO / "keywords"
SPLITS = ("train", "validation", "test")


def arguments(directory, steps: int, **kwargs) -> TrainingArguments:
    return TrainingArguments(
        **{
            "output_dir": str(directory),
            "max_steps": steps,
            "per_device_train_batch_size": 8,
            "lr_scheduler_type": "constant",
            "eval_strategy": "steps",
            "eval_steps": steps,
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
        }
        | kwargs
    )


class ClearEncoder(LevelEncoder):
    """Its other hidden state is faint, so that little speech is enough to learn from."""

    def _hear(self, waveform: torch.Tensor) -> torch.Tensor:
        states = super()._hear(waveform)
        states[:, 0] /= 50
        return states


def spoken(level: int, rng) -> list[int]:
    """A clip of 4 to 9 frames with one level."""
    return [level] * int(rng.integers(4, 10))


def class_splits(directory, columns: dict[str, int], rows=(24, 12, 12), offset: int = 0) -> dict:
    """Clips whose level says to which class of each column they belong, all combinations in turn."""
    rng = np.random.default_rng(0)
    combinations = list(itertools.product(*map(range, columns.values())))
    splits = {}
    for split, number in zip(SPLITS, rows, strict=True):
        chosen = [index % len(combinations) for index in range(number)]
        values = {
            column: [f"{column}{combinations[index][at]}" for index in chosen] for at, column in enumerate(columns)
        }
        clips = [spoken(offset + index, rng) for index in chosen]
        splits[split] = make_dataset(directory / split, clips, values)
    return splits


def run(task, encoder, splits, tmp_path, steps: int, rates=(1e-2,), patience=None, **kwargs) -> dict:
    examples = prepare_examples(task, encoder, splits, tmp_path / "cache")
    return evaluate_task(task, examples, arguments(tmp_path / "heads", steps, **kwargs), rates, patience)


# ----------------------------------------------------------------------------------------- one that hears all there is
@pytest.mark.parametrize("name", ["ks", "sid", "er"])
def test_who_hears_every_class_is_always_right(tmp_path, name):
    task = Classification(name, ["label"])
    result = run(task, ClearEncoder(), class_splits(tmp_path, {"label": 4}), tmp_path, 20)
    assert result[f"{name}_accuracy"] == 100
    assert result["validation"] == {"0.01": {f"{name}_accuracy": 100}}
    assert result["num_clips"] == {"train": 24, "validation": 12, "test": 12}
    assert sum(result["layer_weights"]) == pytest.approx(1) and result["layer_weights"][1] > 0.5


def test_who_hears_every_intent_is_always_right(tmp_path):
    columns = {"action": 2, "object": 3, "location": 2}
    task = Classification("ic", list(columns))
    result = run(task, ClearEncoder(), class_splits(tmp_path, columns, (36, 12, 12)), tmp_path, 40)
    assert result["ic_accuracy"] == 100


@pytest.mark.parametrize("x_vector", [True, False])
def test_who_hears_every_speaker_verifies_even_unknown_ones(tmp_path, x_vector):
    known = class_splits(tmp_path / "known", {"speaker": 4}, (16, 8, 8))
    unknown = class_splits(tmp_path / "unknown", {"speaker": 4}, (8, 8, 12), offset=20)
    splits = known | {"test": unknown["test"].map(lambda row: {"speaker": "other " + row["speaker"]})}
    task = Verification("speaker", x_vector=x_vector)
    result = run(task, ClearEncoder(), splits, tmp_path, 10, [1e-4])
    assert result["asv_eer"] == 0


def text_splits(directory, name: str) -> dict:
    """Sentences whose symbols are levels of two frames each, with a frame of silence after each."""
    texts = {
        "pr": ["AH0 T", "T IY1 AH0", "IY1 IY1", "K T", "K IY1 K AH0", "T T T"],
        "asr": ["AB A", "BA", "B A B", "ABBA", "A A", "BAB AB"],
    }[name]
    symbols = sorted({symbol for text in texts for symbol in (text.split() if name == "pr" else text)})
    levels = {symbol: level for level, symbol in enumerate(symbols, 1)}
    chosen = {"train": texts, "validation": texts[3:], "test": texts[:5]}
    return {
        split: make_dataset(
            directory / split,
            [[f for s in (t.split() if name == "pr" else t) for f in (levels[s], levels[s], 0)] for t in texts],
            {"text": texts},
        )
        for split, texts in chosen.items()
    }


@pytest.mark.parametrize("name, lstm_size, metric, steps", [("pr", 0, "pr_per", 60), ("asr", 24, "asr_wer", 100)])
def test_who_hears_every_symbol_makes_no_error(tmp_path, name, lstm_size, metric, steps):
    task = Transcription(name, "text", lstm_size=lstm_size)
    result = run(task, ClearEncoder(), text_splits(tmp_path, name), tmp_path, steps)
    assert result[metric] == 0
    deaf = run(task, LevelEncoder(deaf=True), text_splits(tmp_path, name), tmp_path / "deaf", 20)
    assert deaf[metric] > 50


# ------------------------------------------------------------------------------------------- one that hears nothing
def test_who_hears_nothing_is_right_by_chance(tmp_path):
    """240 guesses at one of four: 25 % with a standard deviation of 2.8."""
    splits = class_splits(tmp_path, {"label": 4}, (64, 16, 240))
    result = run(Classification("ks", ["label"]), LevelEncoder(deaf=True), splits, tmp_path, 30)
    assert abs(result["ks_accuracy"] - 25) < 4 * 100 * math.sqrt(0.25 * 0.75 / 240)


def test_who_hears_nothing_cannot_tell_speakers(tmp_path):
    splits = class_splits(tmp_path, {"speaker": 4}, (32, 16, 80))
    task = Verification("speaker", x_vector=False)
    result = run(task, LevelEncoder(deaf=True), splits, tmp_path, 30)
    assert 43 < result["asv_eer"] < 57


# ------------------------------------------------------------------------------------------------ which head is chosen
def one_class_on(splits, names, label: str):
    """A set whose labels are all wrong but for one class, so that the best on it is the head that has learnt least."""
    return splits | {name: splits[name].map(lambda row: {"label": label}) for name in names}


def test_the_validation_set_chooses_the_learning_rate(tmp_path):
    """With the small one nothing is learnt; `label3` is what that head says of most clips."""
    splits = class_splits(tmp_path, {"label": 4})
    rates = [1e-7, 1e-2]
    fair = run(Classification("ks", ["label"]), ClearEncoder(), splits, tmp_path / "fair", 20, rates)
    assert fair["learning_rate"] == 1e-2 and fair["ks_accuracy"] == 100
    assert list(fair["validation"]) == ["1e-07", "0.01"] and fair["validation"]["1e-07"]["ks_accuracy"] < 100
    results = {}
    for label in ("label0", "label1", "label2", "label3"):
        unfair = one_class_on(splits, ["validation"], label)
        directory = tmp_path / label
        results[label] = run(Classification("ks", ["label"]), ClearEncoder(), unfair, directory, 20, rates)
        scores = {rate: rate_scores["ks_accuracy"] for rate, rate_scores in results[label]["validation"].items()}
        assert scores["0.01"] == 25
        best = max(scores, key=scores.get)
        assert f"{results[label]['learning_rate']:g}" == best
        stored = json.loads((directory / "heads" / f"learning_rate_{best}" / "result.json").read_text())
        assert results[label]["ks_accuracy"] == stored["test"]["ks_accuracy"]
        assert results[label]["layer_weights"] == stored["layer_weights"]
    chosen = {result["learning_rate"]: result["ks_accuracy"] for result in results.values()}
    assert set(chosen) == set(rates) and chosen[1e-7] < 100  # worse on the test set, and chosen all the same


def test_of_equal_learning_rates_the_first_is_taken(tmp_path):
    splits = class_splits(tmp_path, {"label": 2})
    result = run(Classification("ks", ["label"]), ClearEncoder(), splits, tmp_path, 40, [2e-2, 1e-2])
    assert result["validation"]["0.02"] == result["validation"]["0.01"] and result["learning_rate"] == 2e-2


def test_the_smallest_error_rate_is_chosen(tmp_path):
    splits = text_splits(tmp_path, "pr")
    result = run(Transcription("pr", "text"), ClearEncoder(), splits, tmp_path, 40, [1e-7, 1e-2])
    assert result["learning_rate"] == 1e-2 and result["validation"]["1e-07"]["pr_per"] > 0


def test_the_head_that_counts_is_the_best_on_the_validation_set(tmp_path):
    """On labels that are wrong but for one class, a head that has learnt little is best: that of the first score."""
    splits = class_splits(tmp_path, {"label": 4})
    scores = []
    for label in ("label0", "label1", "label2", "label3"):
        unfair = one_class_on(splits, ["validation"], label)
        result = run(
            Classification("ks", ["label"]), ClearEncoder(), unfair, tmp_path / label, 20, [2e-3], eval_steps=2
        )
        scores.append((result["validation"]["0.002"]["ks_accuracy"], result["ks_accuracy"]))
    assert min(scores) == (25, 100)  # what all learn in the end
    assert max(scores)[0] > 25 and max(scores)[1] < 100


@pytest.mark.parametrize("task", [Classification("ks", ["label"]), Verification("label", x_vector=False)])
def test_learning_rates_that_diverge_are_passed_over(tmp_path, task):
    splits = class_splits(tmp_path, {"label": 4})
    result = run(task, ClearEncoder(), splits, tmp_path, 40, [1e38, 1e-2], eval_steps=20)
    assert result["learning_rate"] == 1e-2
    assert math.isnan(result["validation"]["1e+38"][task.metric])
    assert result[task.metric] == (100 if task.name == "ks" else 0)


def test_nothing_but_divergence_is_an_error(tmp_path):
    splits = class_splits(tmp_path, {"label": 4})
    with pytest.raises(ValueError, match=r"Training ks produced NaN with every learning rate \(1e\+38\); try smaller"):
        run(Classification("ks", ["label"]), ClearEncoder(), splits, tmp_path, 20, [1e38])


def test_patience_ends_a_training(tmp_path):
    splits = class_splits(tmp_path, {"label": 2})
    run(Classification("ks", ["label"]), ClearEncoder(), splits, tmp_path, 200, patience=2, eval_steps=10)
    stored = json.loads((tmp_path / "heads" / "learning_rate_0.01" / "result.json").read_text())
    assert stored["validation"]["ks_accuracy"] == 100 and 30 <= stored["steps"] < 200


# ----------------------------------------------------------------------------------------------------------- resuming
class Interruption(TrainerCallback):
    """Stands in for Ctrl-C after a number of optimizer steps."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.fixture
def interrupt(monkeypatch):
    """Interrupts every training from now on at this step; `None` ends that."""
    trainer_class = evaluation.Trainer

    def at(step: int | None):
        class Interrupted(trainer_class):
            def __init__(self, *args, callbacks=(), **kwargs):
                super().__init__(*args, callbacks=[*callbacks, *([Interruption(step)] if step else [])], **kwargs)

        monkeypatch.setattr(evaluation, "Trainer", Interrupted)

    return at


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Task and examples with dropout, so that the state of the random generator counts."""
    directory = tmp_path_factory.mktemp("texts")
    task = Transcription("asr", "text", lstm_size=8)
    return task, prepare_examples(task, ClearEncoder(), text_splits(directory, "asr"), directory / "cache")


def asr_run(texts, directory: Path) -> dict:
    args = arguments(directory, 12, eval_steps=4, per_device_train_batch_size=4)
    return evaluate_task(*texts, args, [3e-3, 1e-2])


@pytest.fixture(scope="module")
def whole(texts, tmp_path_factory):
    """Directory and result of a run that nothing has stopped."""
    directory = tmp_path_factory.mktemp("whole")
    return directory, asr_run(texts, directory)


def weights(directory: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(directory / f"checkpoint-{step}" / "model.safetensors")


@pytest.mark.parametrize("step", [3, 6, 8, 12])
def test_a_training_that_was_stopped_comes_to_the_same_result(texts, whole, tmp_path, interrupt, step):
    interrupt(step)
    with pytest.raises(KeyboardInterrupt):
        asr_run(texts, tmp_path)
    assert not list(tmp_path.rglob("result.json"))
    interrupt(None)
    assert asr_run(texts, tmp_path) == whole[1]
    for rate in ("learning_rate_0.003", "learning_rate_0.01"):
        before, after = weights(whole[0] / rate, 12), weights(tmp_path / rate, 12)
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_checkpoint_that_was_being_written_is_passed_over(texts, whole, tmp_path, interrupt):
    interrupt(9)
    with pytest.raises(KeyboardInterrupt):
        asr_run(texts, tmp_path)
    interrupt(None)
    checkpoint = tmp_path / "learning_rate_0.003" / "checkpoint-8"
    (checkpoint / "trainer_state.json").unlink()  # it is written last
    (checkpoint / "optimizer.pt").write_bytes((checkpoint / "optimizer.pt").read_bytes()[:100])
    assert asr_run(texts, tmp_path) == whole[1]


def test_learning_rates_that_are_finished_are_not_trained_again(texts, whole, tmp_path, interrupt, monkeypatch):
    train = evaluation._train_head

    def stop_at_the_second(task, head, examples, args, learning_rate, *others):
        if learning_rate == 1e-2:
            raise KeyboardInterrupt
        return train(task, head, examples, args, learning_rate, *others)

    monkeypatch.setattr(evaluation, "_train_head", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        asr_run(texts, tmp_path)
    monkeypatch.setattr(evaluation, "_train_head", train)
    results = list(tmp_path.rglob("result.json"))
    assert [path.parent.name for path in results] == ["learning_rate_0.003"]
    before = results[0].stat().st_mtime_ns
    assert asr_run(texts, tmp_path) == whole[1]
    assert results[0].stat().st_mtime_ns == before
    interrupt(1)  # were anything trained, this would end it
    assert asr_run(texts, tmp_path) == whole[1]


def test_patience_goes_on_where_it_was(tmp_path, interrupt):
    splits = class_splits(tmp_path, {"label": 2})
    steps = {}
    for name, stops in (("whole", [None]), ("parts", [25, 35, None])):
        for stop in stops:
            interrupt(stop)
            try:
                (tmp_path / name).mkdir(exist_ok=True)
                run(
                    Classification("ks", ["label"]), ClearEncoder(), splits, tmp_path / name, 100,
                    patience=3, eval_steps=10,
                )  # fmt: skip
            except KeyboardInterrupt:
                assert stop is not None
        stored = json.loads((tmp_path / name / "heads" / "learning_rate_0.01" / "result.json").read_text())
        steps[name] = stored["steps"]
    assert steps["parts"] == steps["whole"] < 100


def test_other_settings_want_another_directory(tmp_path, interrupt):
    splits = class_splits(tmp_path, {"label": 2})
    task = Classification("ks", ["label"])
    examples = prepare_examples(task, ClearEncoder(), splits, tmp_path / "cache")
    interrupt(3)  # what a run that didn't finish has left counts too
    with pytest.raises(KeyboardInterrupt):
        evaluate_task(task, examples, arguments(tmp_path / "heads", 20), [1e-2])
    for changed, message in (
        ({"max_steps": 21}, "`max_steps` 20, not 21"),
        ({"seed": 1}, "`seed` 42, not 1"),
        ({"per_device_train_batch_size": 4}, "`per_device_train_batch_size` 8, not 4"),
        ({"weight_decay": 0.1}, "`weight_decay` 0.0, not 0.1"),
        ({"lr_scheduler_type": "linear"}, "`lr_scheduler_type` 'constant', not 'linear'"),
        ({"eval_steps": 5}, "`eval_steps` 20, not 5"),
    ):
        other = arguments(tmp_path / "heads", 20, **changed)
        with pytest.raises(ValueError, match=f"has results with {message}; choose another directory"):
            evaluate_task(task, examples, other, [1e-2])
    with pytest.raises(ValueError, match="has results with `patience` None, not 3; choose another directory"):
        evaluate_task(task, examples, arguments(tmp_path / "heads", 20), [1e-2], patience=3)
    with pytest.raises(ValueError, match="has results with `model` None, not 'b'; choose another directory"):
        evaluate_task(task, examples, arguments(tmp_path / "heads", 20), [1e-2], settings={"model": "b"})


# ------------------------------------------------------------------------------------------------------- clear errors
def test_no_learning_rate_and_no_validation(tmp_path):
    splits = class_splits(tmp_path, {"label": 2})
    task = Classification("ks", ["label"])
    with pytest.raises(ValueError, match="`learning_rates` is empty; pass at least one"):
        run(task, ClearEncoder(), splits, tmp_path, 2, [])
    with pytest.raises(ValueError, match="`eval_strategy` is no, but the validation set chooses the head"):
        run(task, ClearEncoder(), splits, tmp_path, 2, eval_strategy="no")


class Untouched(LevelEncoder):
    def __call__(self, waveforms):
        raise AssertionError("The labels were to be read first.")


def test_wrong_labels_are_told_before_anything_is_encoded(tmp_path):
    splits = class_splits(tmp_path, {"label": 2})
    wrong = splits | {"test": splits["test"].map(lambda row: {"label": "other"})}
    with pytest.raises(ValueError, match="The test set has 'other' in `label`"):
        prepare_examples(Classification("ks", ["label"]), Untouched(), wrong, tmp_path / "cache")


def test_pairs_that_cannot_be_scored_are_told_before_training(tmp_path):
    splits = class_splits(tmp_path, {"speaker": 4}, (8, 8, 4))
    with pytest.raises(ValueError, match="The test set has no pair of clips of one speaker"):
        prepare_examples(Verification("speaker"), ClearEncoder(), splits, tmp_path / "cache")


# ------------------------------------------------------------------------------------------- a plain loop in PyTorch
@pytest.fixture(scope="module")
def keywords():
    """Real speech: clips of three words."""
    splits = {}
    for split, rows in {"train": slice(0, 8), "validation": slice(8, 11), "test": slice(0, 4)}.items():
        source = KEYWORDS / ("test" if split == "test" else "train")
        chosen = [
            row
            for word in ("go", "no", "yes")
            for row in [row for row in read_metadata(source) if row["label"] == word][rows]
        ]
        columns = {
            "audio": [str(source / row["file_name"]) for row in chosen],
            "label": [row["label"] for row in chosen],
        }
        splits[split] = datasets.Dataset.from_dict(columns).cast_column("audio", datasets.Audio(decode=False))
    return splits


@torch.no_grad()
def mean_states(model, dataset) -> torch.Tensor:
    """`(clips, layers, hidden size)`, without cache, batches or the encoder's code."""
    clips = []
    for row in dataset:
        samples = torch.from_numpy(read_audio(row["audio"]))[None]
        samples = (samples - samples.mean()) / (samples.var(correction=0) + 1e-7).sqrt()
        states = model(samples, output_hidden_states=True).hidden_states
        clips.append(torch.stack(states, dim=2)[0].mean(0))
    return torch.stack(clips)


@pytest.mark.parametrize("layout", ["base", "large"])
def test_keyword_spotting_equals_a_plain_loop(tmp_path, keywords, layout):
    """With all clips in one batch, their order doesn't matter; the start is drawn as `set_seed` and torch would."""
    model = tiny_teacher(layout, num_hidden_layers=2)
    encoder = PretrainedEncoder(model, Wav2Vec2FeatureExtractor(do_normalize=True))
    task = Classification("ks", ["label"])
    examples = prepare_examples(task, encoder, keywords, tmp_path / "cache", cache_dtype="float32")
    args = arguments(tmp_path / "heads", 25, per_device_train_batch_size=24, seed=5)
    result = evaluate_task(task, examples, args, [1e-2])

    states = {split: mean_states(model, dataset) for split, dataset in keywords.items()}
    labels = {
        split: torch.tensor([["go", "no", "yes"].index(label) for label in dataset["label"]])
        for split, dataset in keywords.items()
    }
    scores = torch.zeros(3, requires_grad=True)
    torch.manual_seed(5)
    projector, classifier = torch.nn.Linear(32, 256), torch.nn.Linear(256, 3)
    parameters = [scores, *projector.parameters(), *classifier.parameters()]
    optimizer = torch.optim.Adam(parameters, 1e-2)

    def logits(split: str) -> torch.Tensor:
        return classifier(projector((states[split] * scores.softmax(0)[:, None]).sum(1)))

    for _ in range(25):
        optimizer.zero_grad()
        F.cross_entropy(logits("train"), labels["train"]).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    torch.testing.assert_close(torch.tensor(result["layer_weights"]), scores.softmax(0).detach(), atol=1e-4, rtol=0)
    head = task.build_head(3, 32)
    head.load_state_dict(weights(tmp_path / "heads" / "learning_rate_0.01", 25))
    torch.testing.assert_close(head.classifier.weight, classifier.weight, atol=1e-3, rtol=0)
    for split, dataset in examples.items():
        expected = logits(split).detach()
        batch = HiddenStatesCollator(task)([dataset[item] for item in range(len(dataset))])
        with torch.no_grad():
            got = head(**batch)
        assert got["loss"].item() == pytest.approx(F.cross_entropy(expected, labels[split]).item(), abs=1e-3)
        assert got["logits"][:, 0].tolist() == expected.argmax(-1).tolist()
    accuracy = (logits("test").argmax(-1) == labels["test"]).float().mean().item()
    assert result["ks_accuracy"] == pytest.approx(100 * accuracy)


def test_the_collator_pads_with_zeros_and_keeps_half_precision(tmp_path):
    splits = text_splits(tmp_path, "pr")
    task = Transcription("pr", "text")
    examples = prepare_examples(task, ClearEncoder(), splits, tmp_path / "cache")["train"]
    batch = HiddenStatesCollator(task)([examples[0], examples[4]])
    assert batch["hidden_states"].shape == (2, 12, 2, 32) and batch["hidden_states"].dtype == torch.float16
    assert batch["num_frames"].tolist() == [6, 12]
    assert not batch["hidden_states"][0, 6:].any()
    assert batch["labels"].tolist() == [[1, 4, -100, -100], [3, 2, 3, 1]]
