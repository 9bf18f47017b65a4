"""Hidden states of a clip: those that the plain model gives it alone, or filterbanks computed in another way."""

import copy
import math

import numpy as np
import pytest
import torch
from conftest import TINY, WIDE_GROUPS, tiny_teacher, with_noise
from transformers import (
    HubertConfig,
    HubertModel,
    Wav2Vec2ConformerConfig,
    Wav2Vec2ConformerModel,
    Wav2Vec2FeatureExtractor,
    WavLMConfig,
)

from skill_hf.data.batches import make_batches
from skill_hf.encoders import FilterBank, PretrainedEncoder, ignores_padding
from skill_hf.models.families import build_student


LENGTHS = (6000, 9000, 401, 9000, 12_000)
SMALL = TINY | {"num_hidden_layers": 2, "feat_extract_norm": "layer"}


def build(kind: str):
    torch.manual_seed(0)
    if kind == "student":  # its group norm leaves out padding if asked
        student = build_student(tiny_teacher("base", num_hidden_layers=2, masked_group_norm=True))
        assert student.config.masked_group_norm
        return student.eval()
    if kind == "conformer":
        return with_noise(Wav2Vec2ConformerModel(Wav2Vec2ConformerConfig(**SMALL)))
    if kind == "batch_norm":
        model = HubertModel(HubertConfig(**SMALL, conv_pos_batch_norm=True))
        model.encoder.pos_conv_embed.batch_norm.running_mean.normal_()
        return with_noise(model)
    return tiny_teacher(kind, num_hidden_layers=2)


@pytest.fixture(scope="module")
def waveforms() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [3 + 2 * rng.standard_normal(length).astype(np.float32) for length in LENGTHS]


def encoder_of(kind: str, **kwargs) -> PretrainedEncoder:
    return PretrainedEncoder(build(kind), Wav2Vec2FeatureExtractor(do_normalize=True), **kwargs)


@torch.no_grad()
def alone(model, samples: np.ndarray) -> torch.Tensor:
    """`(frames, layers, hidden size)`, without any of the encoder's code."""
    normalised = (samples - samples.mean()) / np.sqrt(samples.var() + 1e-7)
    states = model(torch.from_numpy(normalised)[None], output_hidden_states=True).hidden_states
    return torch.stack(states, dim=2)[0]


# ---------------------------------------------------------------------------------------------------- pretrained ones
@pytest.mark.parametrize("kind", ["base", "large", "student", "conformer", "batch_norm"])
def test_states_are_those_of_the_clip_alone_however_clips_are_batched(kind, waveforms):
    encoder = encoder_of(kind)
    expected = [alone(encoder.model, samples) for samples in waveforms]
    assert (encoder.num_layers, encoder.hidden_size, encoder.sampling_rate) == (3, 32, 16_000)
    prepared = list(enumerate(map(encoder.prepare, waveforms)))
    for most_samples in (1, 20_000, 100_000):
        got = {}
        for batch in make_batches(iter(prepared), most_samples, 4, encoder.equal_lengths):
            names, clips = zip(*batch, strict=True)
            got |= dict(zip(names, encoder(list(clips)), strict=True))
        assert sorted(got) == list(range(len(waveforms)))
        for name, states in got.items():
            assert states.dtype == torch.float32 and not states.requires_grad
            torch.testing.assert_close(states, expected[name], atol=2e-5, rtol=0)
            assert len(states) == encoder.num_frames(len(waveforms[name]))


def test_only_networks_that_ignore_padding_get_clips_of_several_lengths():
    kinds = ("base", "large", "student", "conformer", "batch_norm")
    assert [kind for kind in kinds if not encoder_of(kind).equal_lengths] == ["large", "student"]


@pytest.mark.parametrize("kind", ["base", "conformer", "batch_norm"])
def test_the_others_would_not_stand_it(kind, waveforms):
    """Else they would be slow for nothing."""
    encoder = encoder_of(kind)
    encoder.equal_lengths = False
    padded = encoder([encoder.prepare(samples) for samples in waveforms[:2]])[0]
    assert (padded - alone(encoder.model, waveforms[0])).abs().max() > 0.01


def test_an_unknown_family_is_not_trusted():
    config = WavLMConfig(feat_extract_norm="layer")
    assert ignores_padding(config)
    config.model_type = "conv-everywhere"
    assert not ignores_padding(config)


def test_layers_can_be_chosen(waveforms):
    encoder = encoder_of("large", layers=[2, 0])
    states = encoder([encoder.prepare(waveforms[0])])[0]
    assert encoder.num_layers == states.shape[1] == 2
    torch.testing.assert_close(states, alone(encoder.model, waveforms[0])[:, [2, 0]], atol=2e-5, rtol=0)


def test_the_model_is_put_in_eval_mode_and_keeps_its_dtype(waveforms):
    model = tiny_teacher("large", num_hidden_layers=2, **WIDE_GROUPS)
    exact = PretrainedEncoder(model, Wav2Vec2FeatureExtractor(do_normalize=True))
    model = copy.deepcopy(exact.model).to(torch.bfloat16).train()
    encoder = PretrainedEncoder(model, exact.feature_extractor)
    assert not model.training
    prepared = [exact.prepare(samples) for samples in waveforms[:2]]
    for near, states in zip(encoder(prepared), exact(prepared), strict=True):
        assert near.dtype == torch.float32 and not torch.equal(near, states)
        assert torch.cosine_similarity(near.flatten(), states.flatten(), dim=0) > 0.99


def test_the_feature_extractor_decides_on_normalising(waveforms):
    encoder = PretrainedEncoder(build("large"), Wav2Vec2FeatureExtractor(do_normalize=False))
    np.testing.assert_array_equal(encoder.prepare(waveforms[0]), waveforms[0])


def test_fewest_samples_make_one_frame():
    encoder = encoder_of("large")
    assert encoder.min_samples == 400
    assert (encoder.num_frames(400), encoder.num_frames(399)) == (1, 0)
    assert encoder([encoder.prepare(np.ones(400, dtype=np.float32))])[0].shape == (1, 3, 32)


# --------------------------------------------------------------------------------------------------------- filterbanks
def mel(hertz: float) -> float:
    """Slaney's scale: linear up to 1 kHz, then logarithmic."""
    return 3 * hertz / 200 if hertz < 1000 else 15 + 27 * math.log(hertz / 1000) / math.log(6.4)


def log_mel(samples: np.ndarray, bands: int) -> np.ndarray:
    """By loops and a DFT matrix, in float64: `(frames, bands)`."""
    edges = np.linspace(mel(20), mel(8000), bands + 2)
    hertz = [200 * m / 3 if m < 15 else 1000 * 6.4 ** ((m - 15) / 27) for m in edges]
    frequencies = np.arange(257) * 16_000 / 512
    filters = np.zeros((bands, 257))
    for band in range(bands):
        low, peak, high = hertz[band : band + 3]
        for index, frequency in enumerate(frequencies):
            slope = min((frequency - low) / (peak - low), (high - frequency) / (high - peak))
            filters[band, index] = max(0, slope) * 2 / (high - low)
    window = np.array([math.sin(math.pi * n / 400) ** 2 for n in range(400)])
    transform = np.exp(-2j * math.pi * np.outer(np.arange(257), np.arange(400)) / 512)
    rows = []
    for start in range(0, len(samples) - 399, 160):
        power = np.abs(transform @ (samples[start : start + 400].astype(np.float64) * window)) ** 2
        rows.append(np.log(np.maximum(filters @ power, 1e-6)))
    return np.array(rows)


def cosines(values: np.ndarray, number: int) -> np.ndarray:
    """The orthonormal DCT-II."""
    bands = values.shape[1]
    basis = [[math.cos(math.pi * k * (2 * n + 1) / (2 * bands)) for n in range(bands)] for k in range(number)]
    scale = [math.sqrt((1 if k == 0 else 2) / bands) for k in range(number)]
    return values @ (np.array(basis) * np.array(scale)[:, None]).T


def differences(values: np.ndarray, order: int) -> np.ndarray:
    """Derivative at each inner frame of the polynomial of this order that fits it and two frames on either side."""
    rows = []
    for frame in range(2, len(values) - 2):
        fit = np.polyfit(np.arange(-2, 3), values[frame - 2 : frame + 3], order)
        rows.append(fit[0] * math.factorial(order))
    return np.array(rows)


@pytest.mark.parametrize("kind, bands", [("fbank", 80), ("mfcc", 40)])
def test_filterbanks_equal_an_independent_computation(kind, bands):
    samples = (0.1 * np.random.default_rng(0).standard_normal(4000)).astype(np.float32)
    samples[1000:2000] = 0  # digital silence is finite
    expected = log_mel(samples, bands)
    expected = expected / 4 if kind == "fbank" else cosines(expected, 13) / 10
    (states,) = FilterBank(kind)([samples])
    size = expected.shape[1]
    assert states.shape == (23, 1, 3 * size) and states.dtype == torch.float32
    parts = states[:, 0].numpy().astype(np.float64)
    np.testing.assert_allclose(parts[:, :size], expected, atol=2e-3)
    np.testing.assert_allclose(parts[2:-2, size : 2 * size], differences(expected, 1), atol=2e-3)
    np.testing.assert_allclose(parts[2:-2, 2 * size :], differences(expected, 2), atol=2e-3)
    assert np.isfinite(parts).all()


@pytest.mark.parametrize("kind, size", [("fbank", 240), ("mfcc", 39)])
def test_filterbanks_have_a_frame_each_10_ms(kind, size):
    encoder = FilterBank(kind)
    assert (encoder.num_layers, encoder.hidden_size, encoder.sampling_rate) == (1, size, 16_000)
    lengths = (1040, 1199, 1200, 16_000)
    clips = [np.random.default_rng(length).standard_normal(length).astype(np.float32) for length in lengths]
    together = encoder([encoder.prepare(clip) for clip in clips])
    assert [len(states) for states in together] == [encoder.num_frames(length) for length in lengths] == [5, 5, 6, 98]
    for clip, states in zip(clips, together, strict=True):
        assert torch.equal(states, encoder([clip])[0])


def test_the_shortest_clip_of_filterbanks_has_five_frames():
    encoder = FilterBank("mfcc")
    assert encoder.num_frames(encoder.min_samples) == 5 and encoder.num_frames(encoder.min_samples - 1) == 4
    assert torch.isfinite(encoder([np.ones(encoder.min_samples, dtype=np.float32)])[0]).all()


def test_there_are_two_kinds_of_filterbanks():
    with pytest.raises(ValueError, match="`kind` must be one of fbank, mfcc, but is 'mel'"):
        FilterBank("mel")
