import numpy as np
import pytest
import soundfile
from scipy.signal import convolve
from transformers import Wav2Vec2FeatureExtractor

from skill_hf.data.audio import AudioError
from skill_hf.data.collator import SpeechCollator
from skill_hf.data.distortion import Distortion, add_at_ratio, reverberate


RATE = 16_000


def tone(hertz: float, seconds: float = 1.0) -> np.ndarray:
    return np.sin(2 * np.pi * hertz * np.arange(int(seconds * RATE)) / RATE).astype(np.float32)


@pytest.fixture
def noise_dir(tmp_path):
    directory = tmp_path / "noise"
    directory.mkdir()
    # Shorter than a clip, at another rate, in stereo.
    noise = np.random.default_rng(0).normal(size=(4_000, 2)) * 0.1
    soundfile.write(directory / "noise.wav", noise, 8_000)
    return str(directory)


@pytest.fixture
def reverb_dir(tmp_path):
    directory = tmp_path / "rooms"
    directory.mkdir()
    decay = np.exp(-np.arange(RATE // 2) / 2_000) * np.random.default_rng(0).normal(size=RATE // 2) * 0.3
    decay[0] = 1.0
    soundfile.write(directory / "room.wav", np.concatenate([np.zeros(100), decay]) / 4, RATE)
    return str(directory)


@pytest.mark.parametrize("ratio", [-5.0, 0.0, 20.0])
def test_noise_has_the_wanted_ratio_where_it_sounds(ratio):
    speech, noise = tone(200), np.zeros(RATE, np.float32)
    noise[4_000:9_000] = np.random.default_rng(0).normal(size=5_000) * 7
    added = add_at_ratio(speech, noise, ratio) - speech
    power = np.square(added[4_000:9_000]).mean()
    assert 10 * np.log10(np.square(speech).mean() / power) == pytest.approx(ratio, abs=0.01)
    assert not added[:4_000].any() and not added[9_000:].any()


def test_silence_stays_as_it_is():
    silence, noise = np.zeros(10, np.float32), np.ones(10, np.float32)
    assert add_at_ratio(silence, noise, 0.0) is silence
    assert add_at_ratio(noise, silence, 0.0) is noise
    np.testing.assert_array_equal(reverberate(silence, noise), silence)


def test_reverberation_is_a_convolution_without_delay_and_gain():
    generator = np.random.default_rng(0)
    speech, response = generator.normal(size=3_000).astype(np.float32), generator.normal(size=500) * 0.1
    response[40] = 2.0
    wet = reverberate(speech, response)
    expected = convolve(speech.astype(np.float64), response, method="direct")[40:3_040]
    expected *= np.linalg.norm(speech) / np.linalg.norm(expected)
    assert wet.dtype == np.float32
    np.testing.assert_allclose(wet, expected, atol=1e-4)
    impulse = np.zeros(100)
    impulse[30] = 0.5
    np.testing.assert_allclose(reverberate(speech, impulse), speech, atol=1e-5)


def test_mixing_adds_at_most_half_a_clip_of_another_speaker():
    clips = [tone(200), tone(1_000, 0.7), tone(3_000, 2.0)]
    spectrum = {}
    for seed in range(30):
        distorted = Distortion(mixing_prob=1.0)(clips, RATE, [seed])
        assert [len(clip) for clip in distorted] == [len(clip) for clip in clips]
        added = distorted[0] - clips[0]
        assert 0 < np.count_nonzero(np.abs(added) > 1e-6) <= RATE // 2
        spectrum[seed] = np.abs(np.fft.rfft(added)).argmax()
    # A short part has a blurred peak; both other speakers are heard, the clip itself never.
    peaks = np.array(list(spectrum.values()))
    assert (np.abs(peaks - 1_000) < 100).sum() > 5 and (np.abs(peaks - 3_000) < 100).sum() > 5
    assert not (np.abs(peaks - 200) < 20).any()


def test_shares_of_clips(noise_dir, reverb_dir):
    clips = [tone(200, 0.1)] * 400

    def share(**settings) -> float:
        distorted = Distortion(**settings)(clips, RATE, [1, 2])
        return np.mean([not np.array_equal(*pair) for pair in zip(clips, distorted, strict=True)])

    assert share(noise_dir=noise_dir, noise_prob=0.25) == pytest.approx(0.25, abs=0.08)
    assert share(reverb_dir=reverb_dir, reverb_prob=0.5) == pytest.approx(0.5, abs=0.08)
    assert share(mixing_prob=0.75) == pytest.approx(0.75, abs=0.08)
    assert share(noise_dir=noise_dir, noise_prob=0.0) == 0


def test_it_depends_on_the_seed_alone(noise_dir, reverb_dir):
    distortion = Distortion(noise_dir=noise_dir, reverb_dir=reverb_dir, mixing_prob=0.5)
    clips = [tone(200), tone(300, 0.5)]
    first, again, other = (distortion(clips, RATE, seed) for seed in ([0, 1], [0, 1], [0, 2]))
    assert all(np.array_equal(*pair) for pair in zip(first, again, strict=True))
    assert not all(np.array_equal(*pair) for pair in zip(first, other, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_collator_gives_clean_and_distorted_clips(noise_dir, reverb_dir, workers):
    from torch.utils.data import DataLoader

    extractor = Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)
    rows = [{"audio": tone(200 + 50 * index, 2.5 + index)} for index in range(4)]
    clean = SpeechCollator(extractor, max_seconds=3.0)
    distortion = Distortion(noise_dir=noise_dir, noise_prob=1.0, reverb_dir=reverb_dir, mixing_prob=0.5)
    collator = SpeechCollator(extractor, max_seconds=3.0, distortion=distortion)
    (batch,) = DataLoader(rows, batch_size=4, collate_fn=collator, num_workers=workers)
    # The crops that the teacher hears are those of a run without distortion.
    np.testing.assert_array_equal(batch["input_values"], clean(rows)["input_values"])
    distorted = batch["distorted_values"]
    assert distorted.shape == batch["input_values"].shape
    assert (distorted != batch["input_values"]).any(1).all()
    np.testing.assert_allclose(distorted.mean(1), 0, atol=1e-4)
    np.testing.assert_allclose(distorted.std(1), 1, atol=1e-3)
    np.testing.assert_array_equal(collator(rows)["distorted_values"], distorted)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"noise_prob": 1.5}, "`noise_prob` must be from 0 to 1, but is 1.5"),
        ({"mixing_prob": float("nan")}, "`mixing_prob`"),
        ({"noise_snr": [20.0, 0.0]}, "`noise_snr` must be the lowest and the highest ratio in dB"),
        ({"mixing_snr": [0.0]}, "`mixing_snr`"),
        ({"noise_dir": "nowhere"}, "`nowhere` does not exist"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Distortion(**settings)


def test_a_silent_noise_is_named(tmp_path):
    soundfile.write(tmp_path / "silent.wav", np.zeros(100), RATE)
    with pytest.raises(AudioError, match="silent.wav` is silent"):
        Distortion(noise_dir=str(tmp_path), noise_prob=1.0)([tone(200)], RATE, [0])
