"""One clip, of every kind and in every state, to samples or to one clear line."""

import io
import math
import os
import socket
import time
import tracemalloc
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from transformers import Wav2Vec2FeatureExtractor

from skill_hf.data import SpeechCollator, calibration_waveforms
from skill_hf.data.audio import MAX_RATE, MIN_RATE, AudioError, audio_seconds, open_clip, read_audio
from skill_hf.data.audio_decoding import _mp3_frame_bytes, open_stored
from skill_hf.data.batches import checked_input_values


RATE = 16_000
PLAIN = Wav2Vec2FeatureExtractor(do_normalize=False)
SECONDS = 4


def speech(rate=RATE, seconds=SECONDS, seed=0):
    """Quiet, then loud: a variable bit rate varies, so that a length that is estimated from the start is far off."""
    samples = np.random.default_rng(seed).normal(0, 0.2, seconds * rate).astype(np.float32)
    samples[: len(samples) // 2] *= 1e-3
    return samples


def encoded(samples, rate=RATE, **kwargs):
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, **{"format": "WAV", **kwargs})
    return buffer.getvalue()


def mp3(samples, rate=RATE, mode="VARIABLE"):
    return encoded(samples, rate, format="MP3", subtype="MPEG_LAYER_III", bitrate_mode=mode)


def ogg(samples, rate=RATE, subtype="VORBIS"):
    return encoded(samples, rate, format="OGG", subtype=subtype)


def without_xing(content):
    """The frames of an mp3 without the first, which tells their number."""
    return content[_mp3_frame_bytes(content) :]


def stereo(samples):
    return np.stack([samples, samples], axis=1)


QUIET_FIRST, LOUD_FIRST = speech(), speech()[::-1].copy()
SAMPLES = SECONDS * RATE
NOISE = np.random.default_rng(0).bytes(20_000)
ID3 = b"ID3\x04\0\0\0\0\x20\x00" + NOISE[:4096]
ID3V1 = b"TAG" + bytes(125)
APE = b"APETAGEX" + (2000).to_bytes(4, "little") + (2032).to_bytes(4, "little") + bytes(16)
APE_TAG = NOISE[:2000] + APE

# Content -> seconds of one channel that are in it.
STREAMS = {
    "wav": (encoded(QUIET_FIRST), 1),
    "flac": (encoded(QUIET_FIRST, format="FLAC"), 1),
    "mp3": (mp3(QUIET_FIRST), 1),
    "mp3, constant rate": (mp3(QUIET_FIRST, mode="CONSTANT"), 1),
    "mp3 without a length, estimated too long": (without_xing(mp3(QUIET_FIRST)), 1),
    "mp3 without a length, estimated too short": (without_xing(mp3(LOUD_FIRST)), 1),
    "mp3 without a length, constant rate": (without_xing(mp3(LOUD_FIRST, mode="CONSTANT")), 1),
    "mp3 without a length, 44.1 kHz": (without_xing(mp3(speech(44_100)[::-1].copy(), 44_100)), 1),
    "mp3, two joined": (mp3(QUIET_FIRST) + mp3(LOUD_FIRST), 2),
    "mp3, two joined without lengths": (without_xing(mp3(QUIET_FIRST)) + without_xing(mp3(LOUD_FIRST)), 2),
    "mp3, joined, one without a length": (mp3(QUIET_FIRST) + without_xing(mp3(LOUD_FIRST)), 2),
    "mp3, joined, the other without one": (without_xing(mp3(QUIET_FIRST)) + mp3(LOUD_FIRST), 2),
    "mp3, mono and stereo joined": (mp3(QUIET_FIRST) + mp3(stereo(LOUD_FIRST)), 2),
    "mp3, mono and stereo without lengths": (without_xing(mp3(LOUD_FIRST)) + without_xing(mp3(stereo(LOUD_FIRST))), 2),
    "mp3 with tags between": (ID3 + mp3(QUIET_FIRST) + ID3V1 + ID3 + mp3(LOUD_FIRST) + APE_TAG + ID3V1, 2),
    "mp3 with tags between, no lengths": (
        ID3 + without_xing(mp3(LOUD_FIRST)) + ID3 + without_xing(mp3(LOUD_FIRST)),
        2,
    ),
    "mp3 with noise between": (mp3(LOUD_FIRST) + NOISE + mp3(LOUD_FIRST), 2),
    "mp3 with noise between, no lengths": (without_xing(mp3(LOUD_FIRST)) + NOISE + without_xing(mp3(LOUD_FIRST)), 2),
    "ogg": (ogg(QUIET_FIRST), 1),
    "ogg, chained": (ogg(QUIET_FIRST) + ogg(LOUD_FIRST), 2),
    "ogg, the same twice": (ogg(LOUD_FIRST) * 2, 2),
    "ogg, three, mono and stereo": (ogg(LOUD_FIRST) + ogg(stereo(LOUD_FIRST)) + ogg(LOUD_FIRST), 3),
    "opus": (ogg(QUIET_FIRST, subtype="OPUS"), 1),
    "opus, chained": (ogg(QUIET_FIRST, subtype="OPUS") * 2, 2),
    "vorbis and opus": (ogg(QUIET_FIRST) + ogg(QUIET_FIRST, subtype="OPUS"), 2),
}


@pytest.mark.parametrize("content, parts", STREAMS.values(), ids=STREAMS)
def test_audio_is_read_to_its_real_end(tmp_path, content, parts):
    path = tmp_path / "clip.wav"  # what it is called does not matter
    path.write_bytes(content)
    whole = read_audio(str(path))
    # A decoder's delay is 1105 samples, and is left in where no header names it; so is the last frame's padding.
    assert parts * SAMPLES - 16 <= len(whole) <= parts * (SAMPLES + 2400)
    loud = np.abs(whole).reshape(-1)[: len(whole) // 100 * 100].reshape(-1, 100).max(axis=1) > 0.1
    assert loud.mean() == pytest.approx(0.5, abs=0.03)
    np.testing.assert_array_equal(read_audio(content), whole)
    assert audio_seconds(str(path)) == pytest.approx(len(whole) / RATE, abs=1e-3)

    # A crop is a part of the whole, wherever it begins.
    spares = []
    last = read_audio(str(path), max_seconds=1.0, choose_start=lambda spare: spares.append(spare) or spare)
    with open_stored(content) as stream:
        assert spares == [stream.num_frames() - stream.rate]
    assert len(last) == RATE
    if spares[0] + RATE == len(whole):  # at the rate of the model
        np.testing.assert_allclose(last, whole[-RATE:], atol=0.02)
        np.testing.assert_allclose(read_audio(content, max_seconds=1.5), whole[: RATE * 3 // 2], atol=1e-6)


CUT = {
    "mp3": mp3(LOUD_FIRST),
    "mp3 without a length": without_xing(mp3(LOUD_FIRST)),
    "mp3, joined": mp3(QUIET_FIRST) + mp3(LOUD_FIRST),
    "ogg": ogg(LOUD_FIRST),
    "ogg, chained": ogg(LOUD_FIRST) + ogg(LOUD_FIRST),
    "opus": ogg(LOUD_FIRST, subtype="OPUS"),
    "wav": encoded(LOUD_FIRST),
    "flac": encoded(LOUD_FIRST, format="FLAC"),
}


@pytest.mark.parametrize("content", CUT.values(), ids=CUT)
@pytest.mark.parametrize("share", [0.001, 0.01, 0.3, 0.7, 0.95])
def test_cut_files_give_what_is_there_or_one_line(content, share):
    content = content[: int(len(content) * share)]
    try:
        samples = read_audio(content)
    except AudioError as error:
        assert "\n" not in str(error) and len(str(error)) < 300
        # The first page of an Ogg file may be larger than what is there; a FLAC decoder loses track.
        assert share < 0.3 or content[:4] == b"fLaC" or (share < 0.7 and content[:4] == b"OggS")
    else:
        assert np.isfinite(samples).all() and len(samples) > 0.2 * share * SAMPLES
        spare = []
        read_audio(content, max_seconds=0.01, choose_start=lambda n: spare.append(n) or n)
        assert spare == [max(0, len(samples) - 160)]  # crops reach the real end


def test_a_stream_that_changes_its_rate_is_refused():
    for content in (
        ogg(speech(8_000), 8_000) + ogg(QUIET_FIRST),
        mp3(QUIET_FIRST) + mp3(speech(44_100), 44_100),
        without_xing(mp3(QUIET_FIRST)) + without_xing(mp3(speech(44_100), 44_100)),
    ):
        with pytest.raises(AudioError, match=r"changes its sampling rate from \d+ to \d+ Hz; encode it again"):
            read_audio(content)


def test_noise_is_no_audio():
    rng = np.random.default_rng(1)
    heads = (
        b"",
        b"RIFF\0\0\0\0WAVE",
        b"fLaC",
        b"OggS\0\x02",
        b"ID3\x04\0\0\0\0\0\0",
        b"\xff\xfb\x90\x00",
        b"FORM",
        b"caff",
    )
    for head in heads:
        with pytest.raises(AudioError, match=r"^[^\n]*$"):
            read_audio(head + rng.bytes(5_000))
    for size in range(0, 60, 7):
        with pytest.raises(AudioError, match=r"^[^\n]*$"):
            read_audio(encoded(QUIET_FIRST)[: min(size, 44)])


def test_a_header_that_promises_too_much_costs_no_memory():
    flac = bytearray(encoded(QUIET_FIRST, format="FLAC"))
    flac[21] |= 0x0F  # 2**36 - 1 samples
    flac[22:26] = b"\xff" * 4
    tracemalloc.start()
    for settings in ({}, {"max_seconds": 1.0, "choose_start": lambda spare: spare}):
        with pytest.raises(AudioError, match="cannot be decoded as audio"):
            read_audio(bytes(flac), **settings)
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


# ---- Rates ----

GOOD_RATES = [16_000, 44_100.0, np.int64(8_000), np.float32(22_050), torch.tensor(48_000), np.array(11_025), MIN_RATE]
BAD_RATES = [
    *(None, "16000", "fast", b"16000", math.nan, math.inf, -math.inf, 0, 0.5, 1, -16_000, 1_999, MAX_RATE + 1),
    *(
        10_000_019,
        2**31 - 1,
        10**400,
        16_000.5,
        True,
        [16_000],
        (16_000,),
        {},
        {"rate": 1},
        1j,
        object(),
        Decimal(16_000),
    ),
    *(np.nan, np.array([16_000]), np.array([]), torch.tensor([8_000, 8_000]), np.datetime64("2020")),
]


@pytest.mark.parametrize("rate", GOOD_RATES, ids=repr)
def test_rates_of_any_kind_of_number(rate):
    samples = read_audio({"array": np.ones(int(rate) // 10, np.float32), "sampling_rate": rate})
    assert len(samples) == pytest.approx(RATE / 10, abs=1)


@pytest.mark.parametrize("rate", BAD_RATES, ids=lambda rate: repr(rate)[:20])
def test_rates_that_are_none(rate):
    with pytest.raises(
        AudioError, match=r"^A clip without a path \(dict\) has the sampling rate [^\n]{,250} from 2000 to 384000.$"
    ):
        read_audio({"array": np.ones(1_000, np.float32), "sampling_rate": rate})


@pytest.mark.parametrize("rate", [1, 1_999, 400_000, 10_000_019, 2**31 - 1])
def test_rates_of_a_header(rate):
    content = bytearray(encoded(np.ones(1_000, np.float32)))
    content[24:28] = rate.to_bytes(4, "little")
    with pytest.raises(AudioError, match=f"has the sampling rate {rate}; it must be"):
        read_audio(bytes(content))


@pytest.mark.parametrize("rate", [2_000, 8_000, 10_007, 11_025, 22_050, 44_099, 44_100, 48_000, 96_001, 383_987])
def test_resampling_keeps_tones_and_lets_none_fold(rate):
    """At any ratio, in no time: 44 099 and 16 000 have no common factor."""
    start = time.perf_counter()
    time_in, time_out = np.arange(2 * rate) / rate, np.arange(2 * RATE) / RATE
    for frequency in (300.0, 0.4 * min(rate, RATE)):
        tone = np.sin(2 * np.pi * frequency * time_in).astype(np.float32)
        samples = read_audio({"array": tone, "sampling_rate": rate})
        assert samples.shape == (2 * RATE,) and samples.dtype == np.float32
        middle = slice(RATE // 2, -RATE // 2)
        np.testing.assert_allclose(samples[middle], np.sin(2 * np.pi * frequency * time_out)[middle], atol=1e-3)
    if rate > 17_000:
        above = np.sin(2 * np.pi * min(9_000.0, rate / 2 - 100) * time_in).astype(np.float32)
        assert np.abs(read_audio({"array": above, "sampling_rate": rate})[RATE // 2 : -RATE // 2]).max() < 1e-3
    assert time.perf_counter() - start < 20


# ---- Values ----


class Exploding:
    """A decoder that fails in a way of its own."""

    def get_all_samples(self):
        raise RuntimeError("two\nlines")


class Lying:
    def __array__(self, *args, **kwargs):
        raise KeyError("nothing here")


class NoPath(os.PathLike):
    def __fspath__(self):
        raise TypeError("no path")


ONES = np.ones(1_000, np.float32)

BAD_VALUES = {
    "None": (None, "no audio"),
    "a number": (0.5, "0 axes"),
    "an integer": (7, "int64"),
    "True": (True, "bool"),
    "NaN": (math.nan, "0 axes"),
    "a set": ({0.5}, "objects"),
    "an object": (object(), "objects"),
    "a function": (print, "objects"),
    "a tuple with a label": ((ONES, 3), "ragged"),
    "a tuple with a rate": ((torch.ones(1, 1_000), 16_000, "text"), "cannot be read|ragged"),
    "a ragged list": ([[0.1, 0.2], [0.3]], "ragged"),
    "ragged input_values": ([[0.1] * 500, [0.3] * 400], "ragged"),
    "a list with None": ([0.1, None], "objects"),
    "a list of text": (["0.1", "0.2"], "<U3"),
    "a list of bytes": ([b"0.1"], "S3"),
    "a nested list": ([[[0.1]]], "3 axes"),
    "an empty list": ([], "0 samples"),
    "an empty nested list": ([[], []], "0 samples"),
    "whole numbers": ([1, 2, 3], "int64"),
    "int16": (np.ones(9, np.int16), "int16"),
    "bools": (np.ones(9, bool), "bool"),
    "complex": (np.ones(9, complex), "complex128"),
    "dates": (np.ones(9, "datetime64[s]"), "datetime64"),
    "records": (np.zeros(3, [("a", "f4")]), "void|V4|a"),
    "objects": (np.array([0.5, "x"], object), "objects"),
    "no channels": (np.zeros((0, 5)), "0 samples"),
    "too many axes": (np.zeros((2, 2, 2)), "3 axes"),
    "with NaN": (np.array([0.1, np.nan]), "NaN"),
    "with infinity": (np.array([[0.1, np.inf], [0.1, -np.inf], [0, 0]]), "NaN or infinite"),
    "too large for float32": (np.full(9, 1e300), "infinite"),
    "on no device": (torch.ones(1_000, device="meta"), "meta"),
    "a whole tensor": (torch.ones(9, dtype=torch.int32), "int32"),
    "a complex tensor": (torch.ones(9, dtype=torch.complex64), "complex64"),
    "a sparse tensor": (torch.eye(5).to_sparse(), "cannot be read"),
    "a decoder that fails": (Exploding(), "RuntimeError: two lines"),
    "an array that fails": (Lying(), "KeyError"),
    "a path that fails": (NoPath(), "TypeError: no path"),
    "empty text": ("", "does not exist"),
    "text": ("this is a sentence\nof two lines", "does not exist"),
    "a zero byte": ("a\0b.wav", "null"),
    "a long name": ("a" * 5_000, "too long"),
    "a lone surrogate": ("a\ud800.wav", "cannot be opened"),
    "no bytes": (b"", "empty"),
    "bytes of text": (b"hello", "cannot be decoded as audio"),
    "nothing in a dict": ({}, "neither a path nor bytes"),
    "null everywhere": ({"path": None, "bytes": None, "array": None, "sampling_rate": None}, "neither a path"),
    "a path that is a number": ({"path": 5}, "int for `path`"),
    "a path that is a list": ({"path": ["a.wav"]}, "list for `path`"),
    "bytes that are text": ({"bytes": "RIFF", "path": None}, "str for `bytes`"),
    "bytes that are a list": ({"bytes": [82, 73], "path": "a.wav"}, "list for `bytes`"),
    "bytes that are NaN": ({"bytes": math.nan, "path": None}, "float for `bytes`"),
    "an array that is text": ({"array": "abc", "sampling_rate": 16_000}, "U3"),
    "an array of None": ({"array": [None], "sampling_rate": 16_000}, "objects"),
    "an array without a rate": ({"array": ONES}, "sampling rate None"),
}


@pytest.mark.parametrize("value, reason", BAD_VALUES.values(), ids=BAD_VALUES)
def test_bad_values_are_one_line_everywhere(value, reason):
    with pytest.raises(AudioError, match=reason) as caught:
        read_audio(value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    good = {"audio": np.full(3 * RATE, 0.1, np.float32)}
    collator = SpeechCollator(PLAIN)
    assert collator([good, {"audio": value}, good])["input_values"].shape[0] == 2
    assert collator.num_skipped == 1
    assert len(list(calibration_waveforms([good, {"audio": value}], 2, 1.0, 0, PLAIN))) == 1
    with pytest.raises(ValueError, match=r"^[^\n]*$"):
        list(checked_input_values([good, {"audio": value}], None, 400))
    batch = collator([good, {"input_values": value}])
    assert batch["input_values"].shape[0] == 1


GOOD_VALUES = {
    "float16": ONES.astype(np.float16),
    "float64": ONES.astype(np.float64),
    "longdouble": ONES.astype(np.longdouble),
    "big endian": ONES.astype(">f4"),
    "read only, strided": np.broadcast_to(np.float32(1), 1_000),
    "a tuple": tuple(ONES.tolist()),
    "bfloat16": torch.ones(1_000, dtype=torch.bfloat16),
    "a gradient": torch.ones(1_000, requires_grad=True),
    "channels first": torch.ones(2, 1_000),
    "channels last": np.ones((1_000, 3)),
    "two lists": [[1.0] * 1_000, [1.0] * 1_000],
    "numpy floats": list(ONES),
    "a decoder": SimpleNamespace(get_all_samples=lambda: SimpleNamespace(data=torch.ones(1, 1_000), sample_rate=RATE)),
    "bytearray": bytearray(encoded(ONES, subtype="FLOAT")),
    "memoryview": memoryview(encoded(ONES, subtype="FLOAT")),
    "bytes win over a path": {"path": "gone.wav", "bytes": encoded(ONES, subtype="FLOAT")},
    "an array and null bytes": {"array": ONES, "sampling_rate": RATE, "bytes": None, "path": None},
}


@pytest.mark.parametrize("value", GOOD_VALUES.values(), ids=GOOD_VALUES)
def test_good_values(value):
    np.testing.assert_array_equal(read_audio(value), ONES)


@pytest.mark.parametrize(
    "row", [None, 5, "a.wav", b"x", (ONES, 1), [ONES], ONES, {}, {"text": "a"}, {1: 2}], ids=lambda row: str(type(row))
)
def test_rows_that_are_none(row):
    with pytest.raises(AudioError, match=r"^row 0: A row (is a|has neither)[^\n]*$|1 of the 1"):
        list(calibration_waveforms([row], 1, 1.0, 0, PLAIN))
    collator = SpeechCollator(PLAIN)
    assert not collator([row])["attention_mask"].any() and collator.num_skipped == 1


@pytest.mark.parametrize("rate", [0, -1, 1.5, 2**40, math.nan, "16000", None, True, [16_000]])
def test_rates_to_read_at_that_are_none(rate):
    """The clip is not to blame."""
    with pytest.raises(ValueError, match="^`sampling_rate` must be an integer from") as refused:
        read_audio(ONES, sampling_rate=rate)
    assert not isinstance(refused.value, AudioError)


@pytest.mark.parametrize("seconds", [0, -1, math.nan, "3", None, [1.0]])
def test_seconds(seconds):
    if seconds is not None:
        with pytest.raises(ValueError, match="`max_seconds` must be a number of seconds above 0"):
            read_audio(ONES, max_seconds=seconds)
    for name in ("max_seconds", "min_seconds"):
        with pytest.raises(ValueError, match=name):
            SpeechCollator(PLAIN, **{name: seconds})
    assert len(read_audio(ONES, max_seconds=math.inf)) == 1_000


# ---- Paths ----


@pytest.mark.parametrize(
    "kind", ["directory", "fifo", "socket", "device", "loop", "dangling", "null", "inside a file"]
)
def test_paths_that_are_no_files_never_hang(tmp_path, kind):
    path = tmp_path / "a.wav"
    opened = None
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        opened = socket.socket(socket.AF_UNIX)
        previous = Path.cwd()
        os.chdir(tmp_path)  # names of sockets are short
        opened.bind("a.wav")
        os.chdir(previous)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "dangling":
        path.symlink_to(tmp_path / "gone")
    elif kind == "null":
        path.symlink_to("/dev/null")
    else:
        path.write_text("x")
        path = path / "b.wav"
    words = {
        "directory": "is a directory",
        "fifo": "is a FIFO",
        "socket": "is a socket",
        "dangling": "is a broken link",
    }
    words |= {"device": "is a device", "null": "is a device", "loop": "cannot be opened", "inside a file": "not exist"}
    for value in (path, str(path), {"path": str(path), "bytes": None}, {"path": os.fsencode(path)}):
        with pytest.raises(AudioError, match=words[kind]):
            read_audio(value)
    if opened:
        opened.close()


def test_names_of_any_bytes(tmp_path):
    name = os.fsencode(tmp_path) + b"/caf\xe9 \n\x1b[2J.wav"
    with open(name, "wb") as file:
        file.write(encoded(ONES, subtype="FLOAT"))
    for value in (os.fsdecode(name), Path(os.fsdecode(name)), {"path": os.fsdecode(name), "bytes": None}):
        np.testing.assert_array_equal(read_audio(value), ONES)
    with open(name, "wb"):
        pass
    with pytest.raises(AudioError, match="caf.*is empty") as caught:
        read_audio(os.fsdecode(name))
    assert str(caught.value).isprintable()  # no line break, no escape sequence, nothing that cannot be written


@pytest.mark.parametrize("name", ["a.raw", "a.RAW", "a", "a.txt", "a.wav.gz", "a::b.wav", "file:a.wav", "data:a"])
def test_the_name_of_a_file_decides_nothing(tmp_path, monkeypatch, name):
    (tmp_path / name).write_bytes(encoded(ONES, subtype="FLOAT"))
    monkeypatch.chdir(tmp_path)
    np.testing.assert_array_equal(read_audio(name), ONES)
    (tmp_path / name).write_bytes(NOISE)
    with pytest.raises(AudioError, match="cannot be decoded as audio"):
        read_audio(name)


# ---- Checks of a whole clip ----


def test_levels():
    with open_clip(np.zeros(1_000, np.float32)) as clip:
        assert clip.levels().silent and not clip.levels().cancelled
    loud = QUIET_FIRST
    for content, cancelled in (
        (np.stack([loud, -loud], axis=1), True),
        (np.stack([loud, -0.99 * loud], axis=1), True),
        (np.stack([loud, loud], axis=1), False),
        (np.stack([loud, np.zeros_like(loud)], axis=1), False),
        (loud, False),
    ):
        with open_clip(encoded(content, subtype="FLOAT")) as clip:
            assert clip.levels().cancelled == cancelled and not clip.levels().silent


def test_calibration_warns_of_silence_and_of_channels_that_cancel(caplog):
    silent = {"audio": np.zeros(RATE, np.float32)}
    loud = {"audio": QUIET_FIRST}
    opposite = {"audio": np.stack([QUIET_FIRST, -QUIET_FIRST])}
    assert len(list(calibration_waveforms([silent, silent, silent, loud], 4, 1.0, 0, PLAIN))) == 4
    assert caplog.messages == ["3 of 4 clips are completely silent; check the recordings."]
    caplog.clear()
    assert len(list(calibration_waveforms([silent, opposite, loud, loud], 4, 1.0, 0, PLAIN))) == 4
    (message,) = caplog.messages
    assert message.startswith("In 1 of 4 clips the channels cancel out when averaged") and "row 1" in message


def test_calibration_of_a_long_clip_takes_little_memory(tmp_path):
    path = tmp_path / "long.wav"
    minute = np.stack([speech(48_000, 60)] * 2, axis=1)
    with soundfile.SoundFile(path, "w", 48_000, 2) as file:
        for _ in range(4):
            file.write(minute)
    del minute
    tracemalloc.start()
    (clip,) = calibration_waveforms([{"audio": str(path)}], 1, 5.0, 0, PLAIN)
    assert len(clip) == 5 * RATE
    assert tracemalloc.get_traced_memory()[1] < 30e6  # the whole clip would take 92 MB
    tracemalloc.stop()


def test_calibration_finds_what_is_bad_anywhere_in_a_clip(tmp_path):
    samples = speech(seconds=60)
    samples[-5] = np.nan
    soundfile.write(tmp_path / "a.wav", samples, RATE, subtype="FLOAT")
    with pytest.raises(AudioError, match="row 0: .* NaN"):
        list(calibration_waveforms([{"audio": str(tmp_path / "a.wav")}], 1, 1.0, 0, PLAIN))
