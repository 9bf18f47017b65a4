"""Audio of every kind in, batches out; all audio is made here."""

import io
import pickle
import tarfile
import zipfile
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from torch.utils.data import DataLoader
from transformers import Wav2Vec2FeatureExtractor

from skill_hf.data import (
    AudioError,
    SpeechCollator,
    calibration_waveforms,
    disable_audio_decoding,
    load_audio_dir,
    load_speech_dataset,
    read_audio,
)


RATE = 16_000
NORMALISING = Wav2Vec2FeatureExtractor(do_normalize=True)
PLAIN = Wav2Vec2FeatureExtractor(do_normalize=False)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def tone(seconds, rate=RATE, frequency=440.0):
    return (0.3 * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def noise(seconds, seed=0):
    return np.random.default_rng(seed).normal(0.1, 0.2, round(seconds * RATE)).astype(np.float32)


def ramp(samples, start=0):
    """Each sample tells its own place, so that a crop tells where it was taken."""
    return np.arange(start, start + samples, dtype=np.float32)


def encoded(samples, rate=RATE, **kwargs):
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, **{"format": "WAV", **kwargs})
    return buffer.getvalue()


def write_wavs(directory, names, seconds=0.5):
    directory.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(names):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(directory / name, noise(seconds, seed), RATE)


def write_bad_files(directory):
    """One file per way to be unusable; name -> words that the error must hold."""
    (directory / "text.wav").write_text("this is no audio")
    (directory / "empty.wav").touch()
    (directory / "header.wav").write_bytes(encoded(np.zeros(0, np.float32)))
    broken = noise(1.0)
    broken[100] = np.nan
    soundfile.write(directory / "nan.wav", broken, RATE, subtype="FLOAT")
    broken[100] = np.inf
    soundfile.write(directory / "inf.wav", broken, RATE, subtype="FLOAT")
    flac = encoded(noise(1.0), format="FLAC")
    (directory / "cut.flac").write_bytes(flac[: len(flac) // 2])
    piped = bytearray(flac)
    piped[21] &= 0xF0  # the number of samples in STREAMINFO: 36 bits from here, 0 for unknown
    piped[22:26] = bytes(4)
    (directory / "piped.flac").write_bytes(piped)
    (directory / "folder.wav").mkdir()
    return {
        "text.wav": "cannot be decoded as audio",
        "empty.wav": "empty",
        "header.wav": "no samples",
        "nan.wav": "NaN or infinite",
        "inf.wav": "NaN or infinite",
        "cut.flac": "cannot be decoded as audio",
        "piped.flac": "does not state its length",
        "folder.wav": "is a directory",
        "missing.wav": "does not exist",
    }


# ---------------------------------------------------------------------------------------------------------- read_audio
@pytest.mark.parametrize(
    ("suffix", "kwargs", "tolerance"),
    [
        ("wav", {}, 1e-4),
        ("wav", {"subtype": "FLOAT"}, 1e-7),
        ("flac", {}, 1e-4),
        ("ogg", {}, 0.02),
        ("opus", {"format": "OGG", "subtype": "OPUS"}, 0.02),
        ("mp3", {}, 0.02),
    ],
)
def test_every_format_is_read(tmp_path, suffix, kwargs, tolerance):
    path = tmp_path / f"clip.{suffix}"
    soundfile.write(path, tone(1.0), RATE, **kwargs)
    from_path = read_audio(path)
    assert from_path.dtype == np.float32 and from_path.shape == (RATE,)
    middle = slice(2000, -2000)  # lossy codecs ring at both ends
    np.testing.assert_allclose(from_path[middle], tone(1.0)[middle], atol=tolerance)
    content = path.read_bytes()
    for value in (str(path), content, {"path": str(path), "bytes": None}, {"path": "gone.wav", "bytes": content}):
        np.testing.assert_array_equal(read_audio(value), from_path)


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
def test_resampling_keeps_a_tone_and_channels_are_averaged(tmp_path, rate):
    stereo = np.stack([tone(1.0, rate), np.zeros(rate, np.float32)], axis=1)
    soundfile.write(tmp_path / "clip.wav", stereo, rate, subtype="FLOAT")
    samples = read_audio(tmp_path / "clip.wav")
    assert samples.dtype == np.float32 and samples.shape == (RATE,)
    np.testing.assert_allclose(samples[500:-500], tone(1.0)[500:-500] / 2, atol=1e-3)


def test_arrays_tensors_and_decoders_are_read():
    mono = noise(0.5)
    for value in (
        mono,
        mono.astype(np.float64),
        mono.tolist(),
        torch.from_numpy(mono),
        np.stack([mono, mono], axis=1),
    ):
        np.testing.assert_allclose(read_audio(value), mono, atol=1e-7)
    np.testing.assert_array_equal(read_audio(mono[None]), mono)
    stereo = torch.from_numpy(np.stack([tone(0.5, 8_000)] * 2))
    decoder = SimpleNamespace(get_all_samples=lambda: SimpleNamespace(data=stereo, sample_rate=8_000))
    by_dict = read_audio({"array": stereo.numpy(), "sampling_rate": 8_000, "path": None})
    assert by_dict.shape == (RATE // 2,)
    np.testing.assert_array_equal(read_audio(decoder), by_dict)


def test_urls_are_read(tmp_path):
    with zipfile.ZipFile(tmp_path / "clips.zip", "w") as archive:
        archive.writestr("a.wav", encoded(noise(0.5), subtype="FLOAT"))
    url = f"zip://a.wav::{tmp_path}/clips.zip"
    np.testing.assert_array_equal(read_audio(url, protocols=("zip",)), noise(0.5))
    with pytest.raises(AudioError, match="uses the protocol `zip`, but only paths and"):
        read_audio(url)


def test_only_the_window_that_is_asked_for_is_read(tmp_path):
    samples = ramp(3 * RATE) / (3 * RATE)
    soundfile.write(tmp_path / "clip.wav", samples, RATE, subtype="FLOAT")
    for value in (tmp_path / "clip.wav", samples):
        np.testing.assert_array_equal(read_audio(value, max_seconds=1.0), samples[:RATE])
        spares = []
        window = read_audio(
            value, max_seconds=1.0, choose_start=lambda spare, spares=spares: spares.append(spare) or 7
        )
        assert spares == [2 * RATE]
        np.testing.assert_array_equal(window, samples[7 : 7 + RATE])
    soundfile.write(tmp_path / "high.wav", tone(3.0, 44_100), 44_100)
    assert read_audio(tmp_path / "high.wav", max_seconds=1.0).shape == (RATE,)


def test_bad_files_raise_one_clear_line(tmp_path):
    for name, reason in write_bad_files(tmp_path).items():
        with pytest.raises(AudioError) as caught:
            read_audio(tmp_path / name)
        message = str(caught.value)
        assert str(tmp_path / name) in message and reason in message and "\n" not in message, name


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (np.array([0.1, np.nan]), "NaN"),
        (np.zeros(0), "0 samples"),
        (np.zeros((2, 3, 4)), "3 axes"),
        (np.array([1, 2, 3]), "int64"),
        ([[0.1, 0.2], [0.3]], "ragged"),
        (None, "no audio"),
        ({"path": None, "bytes": None}, "neither a path nor bytes"),
        ({"array": np.zeros(5), "sampling_rate": None}, "sampling rate None"),
        (b"", "empty"),
    ],
)
def test_bad_values_raise_one_clear_line(value, reason):
    with pytest.raises(AudioError, match=reason):
        read_audio(value)


def test_a_clip_shorter_than_a_frame_is_refused():
    assert len(read_audio(noise(0.025), min_samples=400)) == 400
    with pytest.raises(AudioError, match="399 samples at 16000 Hz.*400"):
        read_audio(noise(0.025)[1:], min_samples=400)


# ------------------------------------------------------------------------------------------------------ load_audio_dir
def test_audio_dir_is_listed_in_order_and_not_decoded(tmp_path):
    write_wavs(tmp_path, ["b.wav", "a/z.WAV", "a/deep/y.flac", ".hidden.wav"])
    soundfile.write(tmp_path / "c.mp3", tone(1.0, 44_100), 44_100)
    (tmp_path / "notes.txt").write_text("not listed")
    dataset = load_audio_dir(tmp_path)
    assert [row["path"] for row in dataset["audio"]] == [
        str(tmp_path / name) for name in ("a/deep/y.flac", "a/z.WAV", "b.wav", "c.mp3")
    ]
    assert dataset["length"] == pytest.approx([0.5, 0.5, 0.5, 1.0], abs=0.1)
    assert dataset[0]["audio"]["bytes"] is None
    assert len(read_audio(dataset[3]["audio"])) == RATE


def test_datasets_keep_their_name_and_no_path(tmp_path):
    write_wavs(tmp_path / "secret" / "speech", ["a.wav"])
    by_directory = load_audio_dir(tmp_path / "secret" / "speech")
    (tmp_path / "secret" / "speech" / "rows.csv").write_text("audio\na.wav\n")
    by_csv = load_speech_dataset(tmp_path / "secret" / "speech")
    for dataset in (by_directory, by_csv, by_csv.shuffle(seed=0).select([0])):
        assert dataset.info.dataset_name == "speech"


def test_unreadable_files_are_left_out_counted_and_named(tmp_path, caplog):
    write_bad_files(tmp_path)
    write_wavs(tmp_path, ["good.wav", "better.wav"])
    dataset = load_audio_dir(tmp_path)
    names = {row["path"].rsplit("/", 1)[1] for row in dataset["audio"]}
    assert {"good.wav", "better.wav"} <= names and not names & {"text.wav", "empty.wav", "header.wav", "piped.flac"}
    (warning,) = caplog.messages
    assert f"Left out {10 - len(dataset)} of 10" in warning
    assert all(name in warning for name in ("text.wav", "empty.wav", "header.wav", "piped.flac", "folder.wav"))


def test_audio_dir_without_audio(tmp_path):
    with pytest.raises(AudioError, match="missing` does not exist"):
        load_audio_dir(tmp_path / "missing")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(AudioError, match="has no file that ends in .wav"):
        load_audio_dir(tmp_path)
    (tmp_path / "text.wav").write_text("no audio")
    with pytest.raises(AudioError, match="None of the 1 audio files.*text.wav"):
        load_audio_dir(tmp_path)


# ------------------------------------------------------------------------------------------------- load_speech_dataset
def make_parquet(root):
    content = pa.array([{"bytes": encoded(noise(0.5, i)), "path": f"{i}.wav"} for i in range(3)])
    table = datasets.Dataset(pa.table({"audio": content, "speaker": [1, 2, 3]}))
    features = datasets.Features({"audio": datasets.Audio(), "speaker": datasets.Value("int64")})
    schema = features.arrow_schema  # carries the feature types, as a file from the Hub does
    pq.write_table(table.data.table.cast(schema), root / "train.parquet")


def make_csv(root):
    write_wavs(root / "clips", ["0.wav", "1.wav", "2.wav"])
    (root / "train.csv").write_text(f"audio,speaker\nclips/0.wav,1\n{root}/clips/1.wav,2\nclips/2.wav,3\n")


def make_jsonl(root):
    write_wavs(root / "clips", ["0.wav", "1.wav", "2.wav"])
    (root / "train.jsonl").write_text("".join(f'{{"audio": "clips/{i}.wav", "speaker": {i}}}\n' for i in range(3)))


def make_saved(root):
    write_wavs(root / "clips", ["0.wav", "1.wav", "2.wav"])
    paths = [str(root / "clips" / f"{i}.wav") for i in range(3)]
    dataset = datasets.Dataset.from_dict({"audio": paths, "speaker": [1, 2, 3]})
    dataset.cast_column("audio", datasets.Audio()).save_to_disk(root)


def make_saved_splits(root):
    make_saved(root / "part")
    datasets.DatasetDict({"train": datasets.load_from_disk(root / "part")}).save_to_disk(root)


def make_audiofolder(root):
    write_wavs(root, ["clips/0.wav", "clips/1.wav", "clips/2.wav", "clips/unlisted.wav"])
    rows = "".join(f"clips/{i}.wav,{i + 1}\n" for i in range(3))
    (root / "metadata.csv").write_text("file_name,speaker\n" + rows)


def make_audiofolder_jsonl(root):
    write_wavs(root / "train", ["0.wav", "1.wav", "2.wav"])
    rows = "".join(f'{{"file_name": "{i}.wav", "speaker": {i}}}\n' for i in range(3))
    (root / "train" / "metadata.jsonl").write_text(rows)


def make_class_folders(root):
    write_wavs(root, ["train/dog/0.wav", "train/dog/1.wav", "train/cat/2.wav", "test/cat/0.wav"])


@pytest.mark.parametrize("streaming", [False, True])
def test_splits_of_a_saved_dataset_are_joined(tmp_path, streaming):
    make_saved(tmp_path / "part")
    part = datasets.load_from_disk(tmp_path / "part")
    datasets.DatasetDict({"one": part, "two": part.select([2])}).save_to_disk(tmp_path / "all")
    joined = load_speech_dataset(tmp_path / "all", split="one+two", streaming=streaming)
    assert [row["speaker"] for row in joined] == [1, 2, 3, 3]
    assert not streaming or joined.num_shards == 4  # for as many workers
    with pytest.raises(AudioError, match="no split `three`; choose from one, two"):
        load_speech_dataset(tmp_path / "all", split="one+three")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        make_parquet,
        make_csv,
        make_jsonl,
        make_saved,
        make_saved_splits,
        make_audiofolder,
        make_audiofolder_jsonl,
        make_class_folders,
    ],
)
def test_every_form_of_dataset_is_read(tmp_path, make, streaming):
    make(tmp_path)
    dataset = load_speech_dataset(tmp_path, streaming=streaming)
    assert isinstance(dataset, datasets.IterableDataset if streaming else datasets.Dataset)
    rows = list(dataset)
    assert len(rows) == 3
    assert all(len(read_audio(row["audio"])) == RATE // 2 for row in rows)
    batches = list(DataLoader(dataset, batch_size=3, collate_fn=SpeechCollator(NORMALISING)))
    assert [batch["input_values"].shape[0] for batch in batches] == [3]
    assert len(list(calibration_waveforms(dataset, 2, 0.25, 0, NORMALISING))) == 2


@pytest.mark.parametrize("streaming", [False, True])
def test_tar_shards_are_read(tmp_path, streaming):
    with tarfile.open(tmp_path / "train-0.tar", "w") as archive:
        for i in range(3):
            for suffix, content in (("flac", encoded(noise(0.5, i), format="FLAC")), ("txt", b"a word")):
                member = tarfile.TarInfo(f"{i}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    rows = list(load_speech_dataset(tmp_path, streaming=streaming, audio_column="flac"))
    assert len(rows) == 3 and all(len(read_audio(row["audio"])) == RATE // 2 for row in rows)


def test_splits_and_columns(tmp_path):
    make_class_folders(tmp_path)
    assert len(load_speech_dataset(tmp_path, split="test")) == 1
    assert len(load_speech_dataset(tmp_path, split="train[:2]+test")) == 3
    for split in ("dev", "train+dev"):
        with pytest.raises(AudioError, match="no split `dev`; choose from train, test"):
            load_speech_dataset(tmp_path, split=split)


def test_the_audio_column_may_have_another_name(tmp_path):
    write_wavs(tmp_path, ["0.wav"])
    (tmp_path / "train.csv").write_text("recording,speaker\n0.wav,1\n")
    for streaming in (False, True):
        dataset = load_speech_dataset(tmp_path, audio_column="recording", streaming=streaming)
        assert next(iter(dataset))["audio"] == str(tmp_path / "0.wav")
    with pytest.raises(AudioError, match="no column `audio`.*recording, speaker"):
        load_speech_dataset(tmp_path)


def test_precomputed_input_values_need_no_audio(tmp_path):
    datasets.Dataset.from_dict({"input_values": [noise(0.5).tolist()] * 2}).save_to_disk(tmp_path)
    dataset = load_speech_dataset(tmp_path)
    batch = SpeechCollator(NORMALISING)(list(dataset))
    np.testing.assert_allclose(batch["input_values"][1, : RATE // 2].numpy(), noise(0.5), atol=1e-7)


def test_datasets_that_cannot_be_used(tmp_path):
    with pytest.raises(AudioError, match="missing`, which is not a local directory, cannot be loaded"):
        load_speech_dataset(tmp_path / "missing")
    (tmp_path / "bare").mkdir()
    with pytest.raises(AudioError, match="bare` cannot be loaded.*any data files"):
        load_speech_dataset(tmp_path / "bare")
    make_saved(tmp_path / "saved")
    with pytest.raises(AudioError, match="no split `test`; choose from train"):
        load_speech_dataset(tmp_path / "saved", split="test")
    for name, content in (("blank", ""), ("header", "audio,speaker\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.csv").write_text(content)
    for streaming, reason in ((False, "corresponds to no data"), (True, "has no rows")):
        with pytest.raises(AudioError, match="blank` cannot be loaded: [^\n]*$"):
            load_speech_dataset(tmp_path / "blank", streaming=streaming)
        with pytest.raises(AudioError, match=f"header` .*{reason}"):
            load_speech_dataset(tmp_path / "header", streaming=streaming)


def test_decoding_is_switched_off(tmp_path):
    make_saved(tmp_path)
    dataset = datasets.load_from_disk(tmp_path)
    for decoding in (dataset, dataset.to_iterable_dataset()):
        assert next(iter(disable_audio_decoding(decoding)))["audio"]["path"].endswith("0.wav")
    rows = [{"audio": noise(0.5)}]
    assert disable_audio_decoding(rows) is rows


# ------------------------------------------------------------------------------------------------------ SpeechCollator
def starts(batch):
    return batch["input_values"][:, 0].tolist()


@pytest.mark.parametrize("kind", ["audio", "input_values"])
def test_random_crops_have_the_length_of_the_shortest_and_no_mask(kind):
    rows = [{kind: ramp(samples)} for samples in (5 * RATE, 3 * RATE, 4 * RATE)]
    batch = SpeechCollator(PLAIN)(rows)
    assert set(batch) == {"input_values"}
    values = batch["input_values"]
    assert values.shape == (3, 3 * RATE) and values.dtype == torch.float32
    assert (values.diff() == 1).all()  # each crop is one run of its clip
    assert values[1, 0] == 0 and values[0, -1] < 5 * RATE and values[2, -1] < 4 * RATE


def test_a_clip_below_min_seconds_is_padded_and_one_above_max_seconds_cropped():
    rows = [{"audio": ramp(RATE, start=1)}, {"audio": ramp(60 * RATE, start=1)}]
    batch = SpeechCollator(PLAIN)(rows)
    assert batch["input_values"].shape == (2, 2 * RATE)
    assert batch["attention_mask"].dtype == torch.int64
    assert batch["attention_mask"].sum(1).tolist() == [RATE, 2 * RATE]
    assert (batch["input_values"][0, RATE:] == 0).all()
    assert SpeechCollator(PLAIN)(rows[1:])["input_values"].shape == (1, round(15.6 * RATE))


def test_evaluation_takes_clips_from_their_beginning_and_pads():
    rows = [{"audio": ramp(samples, start=1)} for samples in (RATE // 2, 2 * RATE, 60 * RATE)]
    collator = SpeechCollator(PLAIN, crop="none", max_seconds=3.0)
    batch = collator(rows)
    assert batch["input_values"].shape == (3, 3 * RATE)
    assert batch["attention_mask"].sum(1).tolist() == [RATE // 2, 2 * RATE, 3 * RATE]
    assert starts(batch) == [1, 1, 1]
    assert ((batch["input_values"] != 0) == batch["attention_mask"].bool()).all()
    assert set(collator(rows[2:])) == {"input_values"}


def test_crops_follow_from_rows_seed_and_epoch_alone():
    rows = [{"audio": ramp(samples)} for samples in (9 * RATE, 3 * RATE, 40 * RATE)]
    first = starts(SpeechCollator(PLAIN)(rows))
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    collator = SpeechCollator(PLAIN)
    collator(rows[::-1])  # what was collated before does not count
    assert starts(collator(rows)) == first
    assert torch.equal(torch.get_rng_state(), state[0]) and (np.random.get_state()[1] == state[1]).all()
    assert starts(SpeechCollator(PLAIN, seed=1)(rows)) != first
    assert starts(SpeechCollator(PLAIN, epoch=1)(rows)) != first
    assert starts(collator([rows[0], rows[2]])) != [first[0], first[2]]


def test_crops_of_a_file_do_not_depend_on_its_directory(tmp_path):
    for directory in ("here", "there"):
        (tmp_path / directory).mkdir()
        soundfile.write(tmp_path / directory / "a.wav", ramp(30 * RATE) / RATE / 30, RATE, subtype="FLOAT")
    here, there = ([{"audio": str(tmp_path / directory / "a.wav")}] for directory in ("here", "there"))
    assert starts(SpeechCollator(PLAIN)(here)) == starts(SpeechCollator(PLAIN)(there))


def test_random_crops_reach_every_part_of_a_clip():
    rows = [{"audio": ramp(10 * RATE)}, {"audio": ramp(2 * RATE)}]
    begin = np.array([starts(SpeechCollator(PLAIN, seed=seed)(rows))[0] for seed in range(200)]) / (8 * RATE)
    # Mean and spread of 200 uniform numbers: 0.5 within 4 standard errors, each quarter hit.
    assert abs(begin.mean() - 0.5) < 4 * (1 / 12 / 200) ** 0.5
    assert (np.histogram(begin, 4, (0, 1))[0] > 25).all()


@pytest.mark.parametrize("crop", ["random", "none"])
def test_each_crop_is_normalised_on_its_own_and_padding_stays_at_the_padding_value(crop):
    rows = [{"audio": noise(seconds, seed)} for seed, seconds in enumerate((1.0, 3.0, 8.0))]
    batch = SpeechCollator(NORMALISING, crop=crop)(rows)
    for values, mask in zip(batch["input_values"], batch["attention_mask"].bool(), strict=True):
        assert values[mask].mean().abs() < 1e-3
        assert (values[mask].var(correction=0) - 1).abs() < 1e-3
        assert (values[~mask] == NORMALISING.padding_value).all()


def test_unreadable_rows_are_left_out_and_named_once(tmp_path, caplog):
    good = {"audio": noise(3.0)}
    bad = [{"audio": str(tmp_path / "missing.wav")}, {"audio": noise(0.02)}, {"audio": None, "text": "a word"}]
    collator = SpeechCollator(NORMALISING)
    for _ in range(2):
        assert collator([bad[0], good, *bad[1:], good])["input_values"].shape == (2, 3 * RATE)
    assert collator.num_skipped == 6
    assert len(caplog.messages) == 3
    for words in ("missing.wav` does not exist", "320 samples at 16000 Hz, but needs", "neither `audio` nor"):
        assert sum(words in message for message in caplog.messages) == 1


@pytest.mark.parametrize("crop", ["random", "none"])
def test_a_batch_with_nothing_readable_has_no_valid_sample(tmp_path, crop):
    good, bad = {"audio": noise(3.0)}, {"audio": str(tmp_path / "missing.wav")}
    collator = SpeechCollator(NORMALISING, crop=crop)
    for rows in ([bad, bad], [good], [bad]):
        batch = collator(rows)
        if rows[0] is good:
            assert set(batch) == {"input_values"} and batch["input_values"].shape == (1, 3 * RATE)
        else:  # no clip of an earlier batch, which would count twice
            assert batch["input_values"].shape == batch["attention_mask"].shape == (1, 2 * RATE)
            assert not batch["input_values"].any() and not batch["attention_mask"].any()
    assert collator.num_skipped == 3


def test_clips_left_out_by_workers_are_counted(tmp_path):
    rows = [{"audio": noise(0.5, seed)} for seed in range(6)] + [{"audio": str(tmp_path / "missing.wav")}] * 5
    collator = SpeechCollator(NORMALISING)
    batches = list(DataLoader(TorchRows(rows), 2, collate_fn=collator, num_workers=2))
    assert collator.num_skipped == 5
    assert sum(batch.get("attention_mask", batch["input_values"] * 0 + 1).any(1).sum() for batch in batches) == 6


@pytest.mark.parametrize(
    ("kwargs", "name"),
    [({"crop": "center"}, "crop"), ({"min_seconds": 20.0}, "min_seconds"), ({"min_seconds": 0}, "min_seconds")]
    + [({"min_seconds": 0.01, "max_seconds": 0.01}, "min_samples")],
)
def test_impossible_values_of_the_collator(kwargs, name):
    with pytest.raises(ValueError, match=name):
        SpeechCollator(NORMALISING, **kwargs)


def test_workers_give_the_same_batches(tmp_path):
    write_wavs(tmp_path, [f"{i}.wav" for i in range(4)], seconds=3.0)
    soundfile.write(tmp_path / "long.wav", noise(5.0), RATE)
    dataset = load_audio_dir(tmp_path)
    collator = SpeechCollator(NORMALISING)
    assert pickle.loads(pickle.dumps(collator)).max_seconds == collator.max_seconds
    runs = [
        [batch["input_values"] for batch in DataLoader(dataset, 2, collate_fn=collator, num_workers=num_workers)]
        for num_workers in (0, 2)
    ]
    assert [len(values) for values in runs[0]] == [2, 2, 1]
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


# ----------------------------------------------------------------------------------------------- calibration_waveforms
class TorchRows(torch.utils.data.Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


class TorchStream(torch.utils.data.IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def test_calibration_is_seeded_cropped_and_normalised():
    rows = [{"audio": noise(3.0, seed)} for seed in range(10)]
    first = list(calibration_waveforms(rows, 4, 2.0, 0, NORMALISING))
    assert len(first) == 4 and all(clip.shape == (2 * RATE,) and clip.dtype == np.float32 for clip in first)
    assert all(abs(clip.mean()) < 1e-3 and abs(clip.var() - 1) < 1e-3 for clip in first)
    again = list(calibration_waveforms(TorchRows(rows), 4, 2.0, 0, NORMALISING))
    assert all((one == other).all() for one, other in zip(first, again, strict=True))
    other_seed = list(calibration_waveforms(rows, 4, 2.0, 1, NORMALISING))
    assert not any((one == other).all() for one in first for other in other_seed)


def test_calibration_never_takes_a_clip_twice_and_streams_from_the_start():
    rows = [{"input_values": np.full(1_000, float(i))} for i in range(20)]
    taken = [int(clip[0]) for clip in calibration_waveforms(rows, 20, 1.0, 0, NORMALISING)]
    assert sorted(taken) == list(range(20)) and taken != sorted(taken)
    assert [int(clip[0]) for clip in calibration_waveforms(TorchStream(rows), 5, 1.0, 0, NORMALISING)] == [
        0,
        1,
        2,
        3,
        4,
    ]


def test_a_crop_depends_on_seed_and_row_alone():
    rows = [{"input_values": ramp(RATE)} for _ in range(6)]
    everything = {int(clip[0]) for clip in calibration_waveforms(TorchStream(rows), 6, 0.5, 0, NORMALISING)}
    rows[2] = {"audio": None}
    fewer = {int(clip[0]) for clip in calibration_waveforms(TorchStream(rows), 6, 0.5, 0, NORMALISING)}
    assert len(everything) == 6 and len(fewer) == 5 and fewer < everything


def test_calibration_replaces_what_it_cannot_read(tmp_path, caplog):
    write_bad_files(tmp_path)
    write_wavs(tmp_path, [f"good{i}.wav" for i in range(8)])
    dataset = datasets.Dataset.from_dict(
        {"audio": [str(tmp_path / name) for name in ["nan.wav", "text.wav", *(f"good{i}.wav" for i in range(8))]]}
    )
    for seed in range(4):
        assert len(list(calibration_waveforms(dataset, 6, 0.5, seed, NORMALISING))) == 6
    caplog.clear()
    assert len(list(calibration_waveforms(dataset, 10, 0.5, 0, NORMALISING))) == 8
    (warning,) = caplog.messages
    assert "Left out 2 of 10 clips" in warning and "nan.wav" in warning and "text.wav" in warning


def test_calibration_stops_where_most_cannot_be_read():
    tried = []

    class Rows(TorchRows):
        def __getitem__(self, index):
            tried.append(index)
            return {"audio": "missing.wav"}

    with pytest.raises(AudioError, match="4 of the 4 clips tried cannot be read; the first: row .*missing.wav"):
        list(calibration_waveforms(Rows(range(100_000)), 3, 1.0, 0, NORMALISING))
    assert len(tried) == 4
    with pytest.raises(AudioError, match="no rows"):
        list(calibration_waveforms([], 3, 1.0, 0, NORMALISING))
