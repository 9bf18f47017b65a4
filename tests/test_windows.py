"""Hidden states in windows against those of one pass."""

import io

import numpy as np
import pytest
import soundfile
import torch
from conftest import tiny_teacher
from example_helpers import DEMO, read_metadata
from transformers import Wav2Vec2FeatureExtractor

from skill_hf.data import read_audio
from skill_hf.data.audio import AudioError
from skill_hf.encoders import PretrainedEncoder
from skill_hf.models.families import build_student
from skill_hf.windows import WindowedEncoder


HELDOUT = DEMO / "audio" / "heldout"


@pytest.fixture(scope="module")
def speech() -> np.ndarray:
    """11.3 seconds at 16 kHz."""
    clips = [read_audio(HELDOUT / row["file_name"]) for row in read_metadata(HELDOUT)[:6]]
    return np.resize(np.concatenate(clips), int(11.3 * 16_000))


def encoder(layout: str, normalise: bool = False) -> PretrainedEncoder:
    student = build_student(tiny_teacher(layout))
    return PretrainedEncoder(student, Wav2Vec2FeatureExtractor(do_normalize=normalise, return_attention_mask=True))


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize(("window", "context", "batch_size"), [(4, 1, 1), (5, 2, 3), (3, 1, 2), (12, 5, 1)])
def test_what_is_local_is_the_same_as_in_one_pass(speech, normalise, window, context, batch_size):
    """Hidden state 0 of a model with layer norms depends on 0.2 s of audio around a frame, here."""
    whole = encoder("large", normalise)
    (expected,) = whole([whole.prepare(speech)])
    windows = WindowedEncoder(whole, window, context, batch_size)
    parts = list(windows(speech))
    assert len(parts) == (1 if window == 12 else len(range(0, 12 - window, window - 2 * context)) + 1)
    states = torch.cat(parts)
    assert states.shape == expected.shape and windows.num_frames(speech) == len(expected)
    torch.testing.assert_close(states[:, 0], expected[:, 0], atol=2e-4, rtol=1e-4)


def test_a_window_around_everything_is_one_pass(speech):
    for layout in ("base", "large"):
        whole = encoder(layout)
        (expected,) = whole([whole.prepare(speech)])
        (states,) = WindowedEncoder(whole, 12, 1)(speech)
        torch.testing.assert_close(states, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 44_100])
@pytest.mark.parametrize("form", ["WAV", "FLAC", "MP3"])
def test_files_of_any_rate_have_the_frames_of_one_pass(speech, rate, form):
    import soxr

    file = io.BytesIO()
    stereo = np.stack([soxr.resample(speech, 16_000, rate)] * 2, axis=1)
    soundfile.write(file, stereo, rate, format=form)
    whole = encoder("large")
    (expected,) = whole([whole.prepare(read_audio(file.getvalue()))])
    windows = WindowedEncoder(whole, 4, 1)
    states = torch.cat(list(windows(file.getvalue())))
    assert abs(len(states) - len(expected)) <= 1  # the length is rounded when the rate changes
    assert windows.num_frames(file.getvalue()) == len(states)
    frames = min(len(states), len(expected))
    # The resampler's filter begins anew in each window, in what is not kept.
    torch.testing.assert_close(states[:frames, 0], expected[:frames, 0], atol=5e-3, rtol=1e-2)


@pytest.mark.parametrize(("window", "context"), [(10, 5), (1, 1), (10, 0)])
def test_windows_that_keep_nothing_are_refused(window, context):
    with pytest.raises(ValueError, match=rf"`window_seconds` \({window}\) must be more than twice"):
        WindowedEncoder(encoder("base"), window, context)


def test_a_recording_of_less_than_a_frame_is_named():
    with pytest.raises(AudioError, match="needs at least 400"):
        list(WindowedEncoder(encoder("base"))(np.zeros(399, np.float32)))
