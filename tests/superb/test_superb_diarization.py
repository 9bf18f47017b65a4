import json

import datasets
import numpy as np
import pytest
import torch
from conftest import tiny_teacher
from example_helpers import isolate, run_main, save_feature_extractor
from level_encoder import LevelEncoder, make_dataset, training_arguments, write_clip

import skill_hf.superb.registry as registry
from skill_hf.encoders import FilterBank, PretrainedEncoder
from skill_hf.superb.diarization import Diarization
from skill_hf.superb.evaluation import evaluate_task, prepare_examples
from skill_hf.superb.heads import DiarizationHead


FRAME = 0.02


def segment(speaker: str, start: float, end: float) -> dict:
    return {"speaker_id": speaker, "start": start, "end": end}


def dataset_of(speakers: list) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"audio": ["clip.wav"] * len(speakers), "speakers": speakers})


def read(task: Diarization, speakers: list) -> list:
    return task.read({"train": dataset_of(speakers)})["train"]


def make_recordings(directory, number: int, seed: int) -> datasets.Dataset:
    """2 to 3 s of two speakers, whose turns may overlap; the level is 8 for one, 16 for the other, and their sum."""
    rng = np.random.default_rng(seed)
    clips, speakers = [], []
    for _ in range(number):
        levels, turns = np.zeros(int(rng.integers(100, 150)), dtype=int), []
        for name, level in {"Ann": 8, "Bob": 16}.items():
            start = int(rng.integers(0, 50))
            end = start + int(rng.integers(20, 50))
            levels[start:end] += level
            turns.append(segment(name, start * FRAME, end * FRAME))
        clips.append(levels.tolist())
        speakers.append(turns)
    return make_dataset(directory, clips, {"speakers": speakers})


def evaluate(tmp_path, encoder, steps: int) -> dict:
    sizes = {"train": 80, "validation": 8, "test": 8}
    splits = {name: make_recordings(tmp_path / name, size, seed=size) for name, size in sizes.items()}
    task = Diarization("speakers", encoder.frame_seconds, lstm_size=32)
    examples = prepare_examples(task, encoder, splits, tmp_path / "cache")
    return evaluate_task(task, examples, training_arguments(tmp_path / "heads", steps), [2e-2])


def test_encoder_that_hears_who_speaks_makes_no_errors(tmp_path):
    result = evaluate(tmp_path, LevelEncoder(), 100)
    assert result["sd_der"] < 2
    assert result["layer_weights"][1] > 0.5


def test_encoder_that_hears_nothing_is_mostly_wrong(tmp_path):
    assert evaluate(tmp_path, LevelEncoder(deaf=True), 10)["sd_der"] > 25


def test_order_of_speakers_does_not_count():
    torch.manual_seed(0)
    head = DiarizationHead(2, 8, num_speakers=3, lstm_size=4).eval()
    states, num_frames = torch.randn(2, 30, 2, 8), torch.tensor([30, 20])
    labels = (torch.rand(2, 30, 3) > 0.5).float()
    loss = head(states, num_frames, labels)["loss"]
    swapped = torch.stack([labels[0][:, [2, 0, 1]], labels[1][:, [1, 0, 2]]])
    assert torch.allclose(loss, head(states, num_frames, swapped)["loss"])
    # The best of all orders, by hand.
    logits = head(states, num_frames)["logits"]
    orders = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]]
    expected = 0
    for clip, frames in enumerate((30, 20)):
        entropy = torch.nn.functional.binary_cross_entropy_with_logits
        losses = [entropy(logits[clip, :frames], labels[clip, :frames][:, order], reduction="sum") for order in orders]
        assert max(losses) > min(losses) + 1
        expected += min(losses) / 150
    assert torch.allclose(loss, expected)


def test_padding_and_missing_frames_of_labels_do_not_count():
    torch.manual_seed(0)
    head = DiarizationHead(2, 8, num_speakers=2, lstm_size=4).eval()
    states, labels = torch.randn(1, 20, 2, 8), (torch.rand(1, 20, 2) > 0.5).float()
    labels[:, 15:] = 0
    alone = head(states, torch.tensor([20]), labels)
    padded = head(torch.cat([states, torch.randn(1, 5, 2, 8)], 1), torch.tensor([20]), torch.ones(1, 25, 2))
    assert torch.allclose(alone["logits"], padded["logits"][:, :20], atol=1e-6)
    assert (padded["logits"][:, 20:] == -100).all()
    for other in (labels[:, :15], torch.cat([labels, torch.ones(1, 9, 2)], 1)):  # shorter, and longer than the clip
        assert torch.allclose(alone["loss"], head(states, torch.tensor([20]), other)["loss"])


def test_speech_becomes_frames_and_frames_segments():
    task = Diarization("speakers", FRAME)
    [target] = read(task, [[segment("b", 0.1, 0.9), segment("a", 0.5, 1.209)]])
    labels = task.collate([target, []])
    assert labels.shape == (2, 60, 2) and not labels[1].any()
    assert labels[0, :, 1].nonzero().flatten().tolist() == list(range(5, 45))
    assert labels[0, :, 0].nonzero().flatten().tolist() == list(range(25, 60))
    predictions = np.where(labels.numpy() > 0, 3.0, -3.0)
    assert task.score(predictions, [target, []])["sd_der"] == pytest.approx(100 * 0.009 / 1.509)
    # Swapped outputs are as good, and what lasts less than half the filter is nothing.
    noisy = predictions[..., ::-1].copy()
    noisy[1, 10:15] = 3
    noisy[0, 34:38] = -3
    assert task.score(noisy, [target, []])["sd_der"] == pytest.approx(100 * 0.009 / 1.509)
    # Silence misses everything.
    assert task.score(np.full((1, 60, 2), -100.0), [target])["sd_der"] == pytest.approx(100)


def test_units_and_cropped_clips():
    in_samples = Diarization("speakers", FRAME, time_unit=1 / 16_000, max_seconds=2.0)
    [target] = read(in_samples, [[segment("1", 8_000, 64_000), segment("2", 40_000, 48_000), segment("3", 0, 0)]])
    assert target == [{"speaker": "1", "start": 0.5, "end": 2.0}]
    assert in_samples.num_speakers == 1
    with pytest.raises(ValueError, match="`time_unit` must be above 0, but is -1"):
        Diarization("speakers", FRAME, time_unit=-1)


def test_recordings_are_cut_into_chunks_in_training(tmp_path):
    dataset = make_recordings(tmp_path / "data", 1, seed=0)
    task = Diarization("speakers", FRAME, chunk_seconds=1.1)
    examples = prepare_examples(task, LevelEncoder(), {"train": dataset}, tmp_path / "cache")["train"]
    chunks = task.train_examples(examples)
    whole = examples[0]["hidden_states"]
    assert [len(chunk["hidden_states"]) for chunk in chunks] == [55, 55, len(whole) - 110]
    assert (np.concatenate([chunk["hidden_states"] for chunk in chunks]) == whole).all()
    labels = torch.zeros(len(whole))
    heard = torch.from_numpy(np.array(whole[:, 1].argmax(-1)))
    for index, chunk in enumerate(chunks):
        activity = task.collate([chunk["target"]])[0][:55].sum(-1)  # speakers at a time
        labels[55 * index : 55 * index + len(activity)] = activity
    assert labels.tolist() == ((heard % 16 > 0).int() + (heard > 15).int()).tolist()


@pytest.mark.parametrize(
    "value, message",
    [
        (None, "`speakers` in row 1 of the train set must be a list"),
        ([{"speaker_id": "a", "start": 0.0}], "is not a dict with speaker_id, start and end"),
        ([segment(None, 0.0, 1.0)], "`speaker_id` must be a name"),
        ([segment("a", 0.0, None)], "`start` and `end` numbers"),
        ([segment("a", 2.0, 1.0)], "from 2.0 to 1.0; 0 <= start <= end must hold"),
        ([segment("a", -1.0, 1.0)], "row 1 of the train set has a segment from -1.0"),
        ([segment("a", 0.0, float("nan"))], "0 <= start <= end"),
    ],
)
def test_malformed_segments_are_named(value, message):
    task = Diarization("speakers", FRAME)
    rows = [[segment("a", 0.0, 1.0)], value]
    if value is not None and "end" not in value[0]:  # as a data set of rows of this form alone has it
        rows = [value]
        with pytest.raises(ValueError, match=message):
            read(task, rows)
        return
    with pytest.raises(ValueError, match=message):
        read(task, rows)


def test_other_bad_data_is_named(tmp_path):
    task = Diarization("speakers", FRAME)
    with pytest.raises(ValueError, match="no column `speakers`"):
        task.read({"train": dataset_of([[]]).rename_column("speakers", "turns")})
    with pytest.raises(ValueError, match="The train set contains no speech"):
        read(task, [[], []])
    dataset = make_dataset(tmp_path / "data", [[8] * 100], {"speakers": [[segment("a", 0, 200)]]})
    with pytest.raises(
        ValueError, match="row 0 of the train set extends to 200 s, but the clip ends at 2.00 s.*time_unit"
    ):
        prepare_examples(task, LevelEncoder(), {"train": dataset}, tmp_path / "cache")


def test_more_speakers_in_tests_than_in_training_count_in_the_score():
    task = Diarization("speakers", FRAME)
    three = [segment(name, start, start + 1.0) for start, name in enumerate("abc")]
    targets = task.read({"train": dataset_of([three[:2]]), "test": dataset_of([three])})["test"]
    assert task.num_speakers == 2
    assert task.collate(targets).shape == (1, 150, 2)
    predictions = np.where(task.collate(targets).numpy() > 0, 1.0, -1.0)
    assert task.score(predictions, targets)["sd_der"] == pytest.approx(100 / 3)


def test_frame_seconds_are_those_of_the_encoder():
    from transformers import Wav2Vec2FeatureExtractor

    feature_extractor = Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)
    for stride, seconds in (((5, 2, 2, 2, 2, 2, 2), 0.02), ((5, 2, 2, 2, 2, 2, 1), 0.01)):
        encoder = PretrainedEncoder(tiny_teacher(conv_stride=stride), feature_extractor)
        assert encoder.frame_seconds == pytest.approx(seconds)
        minute = encoder.num_frames(60 * 16_000) * encoder.frame_seconds
        assert minute == pytest.approx(60, abs=0.05)
    fbank = FilterBank("fbank")
    assert fbank.num_frames(60 * 16_000) * fbank.frame_seconds == pytest.approx(60, abs=0.05)


def test_registry_hands_the_frames_on():
    task = registry.load_task("sd", dataset_of([[]]), frame_seconds=0.01, time_unit=0.01, max_seconds=5.0)
    assert (task.column, task.frame_seconds, task.time_unit, task.max_seconds) == ("speakers", 0.01, 0.01, 5.0)
    assert (task.lstm_size, task.chunk_frames) == (512, 2000)
    with pytest.raises(ValueError, match="`sd` needs one of the columns speakers"):
        registry.load_task("sd", dataset_of([[]]).remove_columns("speakers"), frame_seconds=0.01)


def test_example_measures_diarization(tmp_path, tmp_path_factory, monkeypatch):
    import run_superb

    isolate(tmp_path_factory, monkeypatch)
    tiny_teacher().save_pretrained(save_feature_extractor(tmp_path / "teacher"))
    for split in ("train", "validation", "test"):
        rows = [
            {"file_name": f"{row}.wav", "speakers": [segment("a", 0, 40), segment("b", 30, 90)]} for row in range(3)
        ]
        for row in rows:
            write_clip(tmp_path / "data" / split / row["file_name"], list(range(1, 31)) + list(range(1, 16)))
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "data" / split / "metadata.jsonl").write_text(lines, encoding="utf-8")
    settings = {
        "task": "sd",
        "model": tmp_path / "teacher",
        "dataset_name": tmp_path / "data",
        "validation_split": "validation",
        "time_unit": 0.01,
        "lstm_size": 8,
        "learning_rates": 1e-3,
        "cache_dir": tmp_path / "cache",
        "output_dir": tmp_path / "out",
        "max_steps": 2,
        "eval_steps": 2,
        "save_steps": 2,
        "use_cpu": True,
    }
    status, _, errors = run_main(run_superb, settings | {"time_unit": 1})
    assert status == 2 and "extends to 90 s, but the clip ends at 0.88 s" in errors[0]
    status, _, errors = run_main(run_superb, settings)
    assert (status, errors) == (0, [])
    results = json.loads((tmp_path / "out" / "teacher" / "all_results.json").read_text(encoding="utf-8"))
    assert 0 <= results["sd"]["scores"]["sd_der"] <= 200
