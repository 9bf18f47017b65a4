"""What `examples/demo/` ships (speech, weights) and the helpers that made it."""

import csv
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch
from scipy.fft import dct
from transformers import WavLMConfig, WavLMModel


EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
DEMO = EXAMPLES / "demo"
AUDIO = DEMO / "audio"
sys.path[:0] = [str(EXAMPLES), str(DEMO)]

import pretrain_teacher  # noqa: E402
import probe_teacher  # noqa: E402
import select_audio  # noqa: E402


SPLITS = ("train", "heldout")


def metadata(split: str) -> list[dict]:
    with open(AUDIO / split / "metadata.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_sizes_are_within_bounds():
    audio = sum(path.stat().st_size for path in AUDIO.rglob("*") if path.is_file())
    weights = [path.stat().st_size for path in DEMO.rglob("*.safetensors")]
    assert 5e6 < audio <= 10e6
    assert len(weights) == 2 and max(weights) <= 16e6


@pytest.mark.parametrize("split", SPLITS)
def test_metadata_matches_the_files(split):
    rows = metadata(split)
    listed = [row["file_name"] for row in rows]
    assert list(rows[0]) == ["file_name", "speaker", "chapter", "text"]
    assert sorted(listed) == sorted(path.name for path in (AUDIO / split).glob("*.ogg"))
    assert len(set(listed)) == len(listed)
    for row in rows:
        assert row["file_name"].startswith(f"{row['speaker']}-{row['chapter']}-")
        assert row["text"].strip()


@pytest.mark.parametrize("split", SPLITS)
def test_audio_is_readable_speech_at_16_khz_mono(split):
    for row in metadata(split):
        audio, rate = sf.read(AUDIO / split / row["file_name"], dtype="float32")
        assert rate == 16_000, row["file_name"]
        assert audio.ndim == 1 and 2 * rate <= len(audio) <= 20 * rate, row["file_name"]
        assert np.isfinite(audio).all() and 0.003 < audio.std() < 0.5, row["file_name"]


def test_heldout_speakers_are_not_in_train():
    speakers = {split: {row["speaker"] for row in metadata(split)} for split in SPLITS}
    assert not speakers["train"] & speakers["heldout"]
    assert speakers["heldout"] == set(pretrain_teacher.HELDOUT_LIBRISPEECH_SPEAKERS)
    assert len(speakers["train"]) == 24


@pytest.mark.parametrize("split, expected", [("train", "train"), ("heldout", "speakers")])
def test_shipped_audio_agrees_with_what_the_teacher_heard(split, expected):
    for row in metadata(split):
        source = f"{row['speaker']}/{row['chapter']}/{row['file_name']}"
        assert pretrain_teacher.heldout_split(source, row["speaker"], librispeech=True) == expected


@pytest.mark.parametrize("split, most", [("train", 1.3), ("heldout", 1.2)])
def test_speakers_are_balanced(split, most):
    seconds = {}
    for row in metadata(split):
        duration = sf.info(AUDIO / split / row["file_name"]).duration
        seconds[row["speaker"]] = seconds.get(row["speaker"], 0) + duration
    assert max(seconds.values()) / min(seconds.values()) < most


def utterances(count: int = 40) -> list[dict]:
    """Speaker `a` has longer utterances than `b` and `c`; 1000 bytes a second."""
    lengths = {"a": 12.0, "b": 4.0, "c": 6.0}
    return [
        {"file_name": f"{speaker}-{i}.ogg", "speaker": speaker, "seconds": s, "bytes": int(1000 * s)}
        for speaker, s in lengths.items()
        for i in range(count)
    ]


def test_select_fills_the_budget_evenly():
    chosen = select_audio.select(utterances(), budget=120_000)
    seconds = {name: sum(row["seconds"] for row in chosen if row["speaker"] == name) for name in "abc"}
    assert 120_000 - 12_000 < sum(row["bytes"] for row in chosen) <= 120_000
    assert max(seconds.values()) - min(seconds.values()) <= 12
    assert len({row["file_name"] for row in chosen}) == len(chosen)


def test_select_depends_on_the_seed_alone():
    first = select_audio.select(utterances(), budget=60_000, seed=1)
    assert select_audio.select(utterances()[::-1], budget=60_000, seed=1) == first
    assert select_audio.select(utterances(), budget=60_000, seed=2) != first


def test_select_goes_on_with_the_others_when_a_speaker_has_no_more():
    rows = [row for row in utterances() if row["speaker"] != "b" or row["file_name"] == "b-0.ogg"]
    chosen = select_audio.select(rows, budget=100_000)
    assert sum(row["speaker"] == "b" for row in chosen) == 1
    assert sum(row["bytes"] for row in chosen) > 100_000 - 12_000


def test_select_refuses_a_budget_that_leaves_a_speaker_out():
    with pytest.raises(ValueError, match="too few"):
        select_audio.select(utterances(), budget=15_000)


@pytest.mark.parametrize(
    "name, speaker, librispeech, expected",
    [
        ("1088/134315/1088-134315-0000.ogg", "1088", True, "train"),
        ("118/47824/118-47824-0003.ogg", "118", True, "train"),
        ("118/47824/118-47824-0011.ogg", "118", True, "recordings"),
        ("226/122538/226-122538-0002.ogg", "226", True, "speakers"),
        ("no/5.ogg", "a", False, "speakers"),
        ("yes/0.ogg", "a", False, "speakers"),
        ("no/5.ogg", "b", False, "train"),
    ],
)
def test_heldout_split_is_stable(name, speaker, librispeech, expected):
    assert pretrain_teacher.heldout_split(name, speaker, librispeech) == expected


@pytest.fixture(scope="module")
def tiny_teacher() -> WavLMModel:
    """Kernels and strides of the demo's teacher, hence its frames, in a width that runs at once."""
    torch.manual_seed(0)
    config = WavLMConfig(
        **{
            **pretrain_teacher.small_config("wavlm", num_hidden_layers=8).to_diff_dict(),
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "conv_dim": [8] * 7,
            "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 2,
        }
    )
    return WavLMModel(config).eval()


@pytest.mark.parametrize("samples", [1200, 15_999, 16_000, 16_079, 16_080, 16_081, 32_000, 48_123, 64_000])
def test_mfcc_has_one_row_for_each_frame_of_the_network(tiny_teacher, samples):
    audio = np.random.default_rng(samples).normal(size=samples).astype(np.float32)
    with torch.no_grad():
        frames = tiny_teacher(torch.from_numpy(audio)[None]).last_hidden_state.shape[1]
    features = pretrain_teacher.mfcc(audio)
    assert features.shape == (frames, 39)
    assert pretrain_teacher.num_frames(samples) == frames
    assert np.isfinite(features).all()


def test_teacher_config_is_within_the_demo_bounds():
    config = pretrain_teacher.small_config("wavlm", num_hidden_layers=8)
    assert config.num_hidden_layers >= 6
    assert 192 <= config.hidden_size <= 320


@pytest.fixture(scope="module")
def speech() -> np.ndarray:
    return probe_teacher.read_audio(AUDIO / "heldout" / metadata("heldout")[0]["file_name"])


def test_log_mel_and_mfcc_come_from_one_spectrum(speech):
    log_mel = probe_teacher.log_mel(speech)
    assert log_mel.shape[1] == 40
    cepstra = dct(log_mel, norm="ortho")[:, :13].mean(0)
    np.testing.assert_allclose(cepstra, pretrain_teacher.mfcc(speech)[:, :13].mean(0), atol=0.1)


def test_mean_hidden_states_is_the_mean_of_every_layer(tiny_teacher, speech):
    clips = [speech[:16_000], speech[16_000:48_000]]
    means = probe_teacher.mean_hidden_states(tiny_teacher.train(), clips)
    assert means.shape == (3, 2, 16)
    wave = torch.from_numpy(clips[1] - clips[1].mean())[None]
    with torch.no_grad():
        states = tiny_teacher.eval()(wave / wave.std(), output_hidden_states=True).hidden_states
    np.testing.assert_allclose(means[:, 1], torch.stack(states)[:, 0].mean(1), atol=1e-3)


def test_segments_do_not_overlap_and_have_a_cap():
    audio = np.arange(9 * 16_000, dtype=np.float32)
    parts = probe_teacher.segments(audio, seconds=2.0, most=3)
    starts = parts[:, 0].astype(int)
    assert parts.shape == (3, 32_000)
    assert starts[0] == 0 and starts[-1] == 3 * 32_000
    assert (np.diff(starts) >= 32_000).all()
    assert len(probe_teacher.segments(audio[:31_999], seconds=2.0, most=3)) == 0


def synthetic(rng, informative: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """200 clips of 4 classes by 20 speakers, each class shifted in its own direction where `informative`."""
    labels, groups = np.arange(200) % 4, np.arange(200) // 10
    features = rng.normal(size=(200, 8))
    if informative:
        features[np.arange(200), labels] += 6.0
    return features, labels, groups


def test_probe_reads_what_is_there_and_nothing_else():
    rng = np.random.default_rng(0)
    assert np.mean(probe_teacher.probe(*synthetic(rng, informative=True))["accuracy"]) > 0.97
    assert np.mean(probe_teacher.probe(*synthetic(rng, informative=False))["accuracy"]) < 0.4


def test_probe_keeps_a_group_on_one_side():
    # Clips of one group and class are alike, yet a class has nothing in common: only a group on both sides would show.
    rng = np.random.default_rng(1)
    _, labels, groups = synthetic(rng, informative=False)
    features = 5 * rng.normal(size=(20, 4, 64))[groups, labels] + 0.1 * rng.normal(size=(200, 64))
    assert np.mean(probe_teacher.probe(features, labels, groups)["accuracy"]) < 0.5


def test_probe_is_reproducible_and_has_five_folds():
    task = synthetic(np.random.default_rng(2), informative=True)
    result = probe_teacher.probe(*task, seed=3)
    assert result == probe_teacher.probe(*task, seed=3)
    assert len(result["accuracy"]) == len(result["C"]) == 5
    assert set(result["C"]) <= set(probe_teacher.C_GRID)


def test_probe_table_and_verdict_name_the_best_layer():
    rng = np.random.default_rng(4)
    features, labels, groups = synthetic(rng, informative=True)
    noise = synthetic(rng, informative=False)[0]
    good, poor = (probe_teacher.probe(x, labels, groups) for x in (features, noise))
    task = {"mfcc": poor, "log_mel": poor, "trained": [poor, good], "untrained": [[poor, poor]], "largest_class": 0.25}
    table = probe_teacher.table({"word": task}).splitlines()
    assert [row for row in table if "**" in row] == [row for row in table if "| trained, hidden state 1 |" in row]
    assert len(table) == 2 + 3 + 2 + 2
    assert "hidden state 1" in probe_teacher.verdict("word", task)
    assert probe_teacher.verdict("word", task).count("better in 5 of 5 folds") == 3
