import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import BertConfig, BertModel, Wav2Vec2FeatureExtractor, WavLMConfig, WavLMModel

from skill_hf.grouping.layer_similarity import layer_similarity
from skill_hf.grouping.similarity import (
    SIMILARITY_MEASURES,
    DistillationSimilarity,
    FrameCosine,
    LinearCKA,
    MutualKNN,
)
from skill_hf.recipe.skill_config import SIMILARITIES


TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "conv_dim": [32] * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "initializer_range": 0.2,  # so that the layers differ visibly
}
LAYOUTS = {
    "base": {"feat_extract_norm": "group", "do_stable_layer_norm": False},
    "large": {"feat_extract_norm": "layer", "do_stable_layer_norm": True},
}
LENGTHS = [4000, 4000, 4000, 6400, 4000, 5000, 5000]


def make_teacher(layout):
    torch.manual_seed(0)
    return WavLMModel(WavLMConfig(**TINY, **LAYOUTS[layout])).eval()


@pytest.fixture(scope="module", params=LAYOUTS)
def teacher(request):
    return make_teacher(request.param)


@pytest.fixture(scope="module")
def base_teacher():
    return make_teacher("base")


@pytest.fixture(scope="module")
def audio():
    rng = np.random.default_rng(0)
    return [(rng.standard_normal(length) * 0.1).astype(np.float32) for length in LENGTHS]


def similarity_of(teacher, audio, similarity="cka", **kwargs):
    return layer_similarity(teacher, audio, similarity, progress=False, **kwargs)


@torch.no_grad()
def frames_of(teacher, audio):
    """(N, frames, D), float64, each waveform passed on its own."""
    states = [
        torch.stack(teacher(torch.as_tensor(waveform)[None], output_hidden_states=True).hidden_states)[:, 0]
        for waveform in audio
    ]
    return torch.cat(states, dim=1).double()


def random_states(layers=4, frames=300, features=12, seed=0):
    """Layers that share some of their features' variation, float32."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(frames, features, generator=generator)
    own = torch.randn(layers, frames, features, generator=generator)
    mixing = torch.linspace(0.2, 2, layers)[:, None, None]
    return shared + mixing * own


def pairwise(states, function):
    matrix = np.eye(len(states))
    for i in range(len(states)):
        for j in range(i):
            matrix[i, j] = matrix[j, i] = function(states[i], states[j])
    return matrix


def reference_cka(states):
    """By Gram matrices over frames (Kornblith et al., equations 3 and 4), where the package uses cross-products."""
    frames = states.shape[1]
    centring = torch.eye(frames, dtype=torch.float64) - 1 / frames
    grams = [centring @ state @ state.T @ centring for state in states.double()]
    return pairwise(grams, lambda x, y: float((x * y).sum() / (x.norm() * y.norm())))


def reference_cosine(states):
    return pairwise(states.double(), lambda x, y: float(F.cosine_similarity(x, y, dim=-1).mean()))


def reference_distillation(states, l1=1.0, l2=0.0, cosine=1.0):
    def distance(x, y):
        return float(
            l1 * F.l1_loss(x, y) + l2 * F.mse_loss(x, y) + cosine * (1 - F.cosine_similarity(x, y, dim=-1).mean())
        )

    distances = pairwise(states.double(), distance)
    np.fill_diagonal(distances, 0)
    return 1 - distances / distances.max()


def reference_mutual_knn(states, k=10):
    def neighbours(state):
        cosines = F.cosine_similarity(state[:, None], state[None], dim=-1).numpy()
        return [set([j for j in np.argsort(-row) if j != i][:k]) for i, row in enumerate(cosines)]

    sets = [neighbours(state) for state in states.double()]
    return pairwise(sets, lambda a, b: np.mean([len(s & t) / k for s, t in zip(a, b, strict=True)]))


REFERENCES = {
    "cka": reference_cka,
    "cosine": reference_cosine,
    "distillation": reference_distillation,
    "mutual_knn": reference_mutual_knn,
}


def streamed(accumulator, states, sizes):
    for part in states.split(sizes, dim=1):
        accumulator.update(list(part))
    return accumulator.compute()


def test_registry_holds_the_measures_of_the_recipe():
    assert tuple(SIMILARITY_MEASURES) == SIMILARITIES
    assert set(REFERENCES) == set(SIMILARITIES)


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_measures_equal_their_definition(teacher, audio, similarity):
    matrix = similarity_of(teacher, audio, similarity)
    expected = REFERENCES[similarity](frames_of(teacher, audio))
    assert matrix.shape == (4, 4)
    assert matrix.dtype == np.float64
    assert (matrix == matrix.T).all()
    assert (matrix.diagonal() == 1).all()
    assert expected[np.triu_indices(4, 1)].max() < 0.999  # the layers do differ
    # A neighbour at the edge may change by rounding: one of 10 neighbours of 98 frames.
    np.testing.assert_allclose(matrix, expected, atol=2e-3 if similarity == "mutual_knn" else 1e-6)


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_batch_size_does_not_matter(teacher, audio, similarity):
    one, four = (similarity_of(teacher, audio, similarity, batch_size=size) for size in (1, 4))
    np.testing.assert_allclose(one, four, atol=2e-3 if similarity == "mutual_knn" else 1e-6)


def test_batches_hold_neighbours_of_one_length(base_teacher, audio):
    shapes = []
    handle = base_teacher.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_values"].shape)), with_kwargs=True
    )
    similarity_of(base_teacher, audio, batch_size=2)
    handle.remove()
    assert shapes == [(2, 4000), (1, 4000), (1, 6400), (1, 4000), (2, 5000)]


@pytest.mark.parametrize("similarity", ["cka", "cosine", "distillation"])
def test_order_of_waveforms_does_not_matter(base_teacher, audio, similarity):
    forward = similarity_of(base_teacher, audio, similarity)
    backward = similarity_of(base_teacher, audio[::-1], similarity)
    np.testing.assert_allclose(forward, backward, atol=1e-6)


def test_any_iterable_of_waveforms(base_teacher, audio):
    expected = similarity_of(base_teacher, audio)
    np.testing.assert_array_equal(similarity_of(base_teacher, (waveform for waveform in audio)), expected)
    np.testing.assert_array_equal(similarity_of(base_teacher, [waveform.tolist() for waveform in audio]), expected)
    tensors = [torch.from_numpy(waveform).requires_grad_() for waveform in audio]
    np.testing.assert_array_equal(similarity_of(base_teacher, tensors), expected)


def test_rows_of_a_dataset(audio):
    """`audio` goes through the feature extractor; `input_values` did already."""
    teacher = make_teacher("large")
    extractor = Wav2Vec2FeatureExtractor(do_normalize=True)
    shifted = [3 * waveform + 0.5 for waveform in audio]
    rows = [{"audio": {"array": waveform, "sampling_rate": 16_000}} for waveform in shifted]
    expected = similarity_of(teacher, shifted, feature_extractor=extractor)
    np.testing.assert_allclose(similarity_of(teacher, rows, feature_extractor=extractor), expected, atol=1e-6)
    prepared = [extractor(waveform, sampling_rate=16_000) for waveform in shifted]
    prepared = [{"input_values": row.input_values[0]} for row in prepared]
    np.testing.assert_allclose(similarity_of(teacher, prepared, feature_extractor=extractor), expected, atol=1e-6)
    raw = [{"input_values": waveform} for waveform in shifted]
    np.testing.assert_allclose(
        similarity_of(teacher, raw, feature_extractor=extractor), similarity_of(teacher, shifted)
    )


def test_without_embeddings(base_teacher, audio):
    matrix = similarity_of(base_teacher, audio, include_embeddings=False)
    np.testing.assert_allclose(matrix, similarity_of(base_teacher, audio)[1:, 1:], atol=1e-12)


def test_distillation_weights(base_teacher, audio):
    matrix = similarity_of(base_teacher, audio, "distillation", l1_weight=0.5, l2_weight=2.0, cosine_weight=0.3)
    states = frames_of(base_teacher, audio)
    np.testing.assert_allclose(matrix, reference_distillation(states, 0.5, 2.0, 0.3), atol=1e-6)
    assert np.abs(matrix - reference_distillation(states)).max() > 1e-3


def test_seed_reaches_the_sample(base_teacher, audio, monkeypatch):
    sampled = type(
        "Sampled", (MutualKNN,), {"__init__": lambda self, **kw: MutualKNN.__init__(self, max_frames=30, **kw)}
    )
    monkeypatch.setitem(SIMILARITY_MEASURES, "mutual_knn", sampled)
    first, again, other = (similarity_of(base_teacher, audio, "mutual_knn", seed=seed) for seed in (0, 0, 1))
    assert (first == again).all()
    assert (first != other).any()


def test_feature_extractor_normalises(audio):
    teacher = make_teacher("large")  # group norm undoes most of an offset by itself
    extractor = Wav2Vec2FeatureExtractor(do_normalize=True)
    shifted = [3 * waveform + 0.5 for waveform in audio]
    normalised = [(waveform - waveform.mean()) / np.sqrt(waveform.var() + 1e-7) for waveform in shifted]
    matrix = similarity_of(teacher, shifted, feature_extractor=extractor)
    np.testing.assert_allclose(matrix, similarity_of(teacher, normalised), atol=1e-5)
    assert np.abs(matrix - similarity_of(teacher, shifted)).max() > 1e-3


def test_teacher_by_directory_brings_its_feature_extractor(base_teacher, audio, tmp_path):
    extractor = Wav2Vec2FeatureExtractor(do_normalize=True)
    base_teacher.save_pretrained(tmp_path)
    extractor.save_pretrained(tmp_path)
    expected = similarity_of(base_teacher, audio, feature_extractor=extractor)
    np.testing.assert_allclose(similarity_of(tmp_path, audio), expected, atol=1e-6)
    np.testing.assert_allclose(similarity_of(str(tmp_path), audio), expected, atol=1e-6)


def test_half_precision_teacher(base_teacher, audio):
    half = WavLMModel(base_teacher.config).to(torch.bfloat16).eval()
    half.load_state_dict(base_teacher.state_dict())
    np.testing.assert_allclose(similarity_of(half, audio), similarity_of(base_teacher, audio), atol=0.05)


@pytest.mark.parametrize("fails", [False, True])
def test_teacher_runs_in_eval_mode_and_gets_its_modes_back(base_teacher, audio, fails):
    expected = similarity_of(base_teacher, audio)
    teacher = WavLMModel(base_teacher.config)  # layerdrop, dropout and SpecAugment are on by default
    teacher.load_state_dict(base_teacher.state_dict())
    teacher.train()
    teacher.feature_extractor.eval()
    modes = [module.training for module in teacher.modules()]
    if fails:
        with pytest.raises(ValueError, match="1-D"):
            similarity_of(teacher, [*audio, np.zeros((2, 4000))])
    else:
        np.testing.assert_array_equal(similarity_of(teacher, audio), expected)
    assert [module.training for module in teacher.modules()] == modes
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize(
    "audio, message",
    [
        ([], "no audio"),
        ([np.zeros((2, 4000), dtype=np.float32)], r"item 0 .* has shape \(2, 4000\)"),
        (np.zeros(4000, dtype=np.float32), r"1-D waveforms .* has shape \(\)"),
        (["clip.wav"], r"item 0 \(str\) has shape \(\)"),
        ([{"text": "no audio in this row"}], "Waveform 0: A row has neither `audio` nor `input_values`, only text"),
        ([np.ones(4000), np.ones(399)], r"Waveform 1: .* has 399 samples at 16000 Hz, but needs at least 400"),
        ([np.ones(0)], "Waveform 0: .* has 0 samples"),
        ([np.ones(4000, dtype=np.int16)], "Waveform 0: .* contains int16"),
        ([np.full(4000, np.nan)], "Waveform 0: .* contains NaN or infinite samples"),
        ([np.ones(400)], "Hidden state 0 does not vary over 1 frame, so CKA"),
    ],
)
def test_bad_audio(base_teacher, audio, message):
    with pytest.raises(ValueError, match=message):
        similarity_of(base_teacher, audio)


def test_shortest_waveform_has_one_frame(base_teacher):
    assert similarity_of(base_teacher, [np.ones(400)], "cosine").shape == (4, 4)


def test_bad_arguments(base_teacher, audio):
    with pytest.raises(ValueError, match="`similarity` must be one of cka, .* but is 'cca'"):
        similarity_of(base_teacher, audio, "cca")
    with pytest.raises(ValueError, match="`batch_size` must be at least 1, but is 0"):
        similarity_of(base_teacher, audio, batch_size=0)
    text_model = BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8))
    with pytest.raises(ValueError, match="BertModel takes `input_ids`"):
        similarity_of(text_model, audio)
    with pytest.raises(ValueError, match="`l1_weight`, `l2_weight` and `cosine_weight` are all 0"):
        similarity_of(base_teacher, audio, "distillation", l1_weight=0, cosine_weight=0)
    with pytest.raises(ValueError, match="mutual_knn .* needs at least 11 frames, but the audio has 9"):
        similarity_of(base_teacher, [np.ones(3000)], "mutual_knn")


@pytest.mark.parametrize("include_embeddings", [True, False])
def test_hidden_states_that_are_not_finite_are_named(base_teacher, audio, include_embeddings):
    broken = WavLMModel(base_teacher.config)
    broken.encoder.layers[1].final_layer_norm.weight.data[3] = torch.inf
    with pytest.raises(ValueError, match="Hidden state 2 has NaN or infinite values"):
        similarity_of(broken, audio, include_embeddings=include_embeddings)


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("sizes", [1, 64, 100, [1, 63, 200, 36]])
def test_how_frames_are_split_changes_nothing(similarity, sizes, monkeypatch):
    monkeypatch.setattr(SIMILARITY_MEASURES[similarity], "chunk_frames", 64)
    states = random_states()
    whole = streamed(SIMILARITY_MEASURES[similarity](), states, [300])
    np.testing.assert_array_equal(streamed(SIMILARITY_MEASURES[similarity](), states, sizes), whole)
    np.testing.assert_allclose(whole, REFERENCES[similarity](states), atol=1e-6)


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_frames_may_follow_a_result(similarity):
    states = random_states()
    accumulator = SIMILARITY_MEASURES[similarity]()
    accumulator.update(list(states[:, :100]))
    np.testing.assert_allclose(accumulator.compute(), REFERENCES[similarity](states[:, :100]), atol=1e-6)
    accumulator.update(list(states[:, 100:]))
    np.testing.assert_allclose(accumulator.compute(), REFERENCES[similarity](states), atol=1e-6)


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("sizes", [(150, 150), (299, 1), (0, 300), (300, 0)])
def test_an_accumulator_that_absorbs_another_has_seen_both(similarity, sizes):
    states = random_states()
    states[1] += 30.0  # a mean that drifts from one to the other
    states[1][150:] -= 20.0
    parts, start = [], 0
    for size in sizes:
        parts.append(SIMILARITY_MEASURES[similarity]())
        if size:
            parts[-1].update([state[start : start + size] for state in states])
        start += size
    first, second = parts
    first.absorb(second)
    assert first.num_frames == 300
    np.testing.assert_allclose(first.compute(), streamed(SIMILARITY_MEASURES[similarity](), states, 300), atol=1e-6)


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("batch_size", [1, 8])
def test_parts_are_every_second_clip(base_teacher, audio, similarity, batch_size):
    kwargs = {"similarity": similarity, "batch_size": batch_size}
    whole, *halves = similarity_of(base_teacher, audio, num_parts=2, **kwargs)
    np.testing.assert_allclose(whole, similarity_of(base_teacher, audio, **kwargs), atol=1e-6)
    assert len(halves) == 2
    for part, half in enumerate(halves):
        np.testing.assert_allclose(half, similarity_of(base_teacher, audio[part::2], **kwargs), atol=1e-6)


def test_parts_without_enough_audio_are_left_out(base_teacher, audio):
    whole, half = similarity_of(base_teacher, audio[:1], num_parts=2)
    np.testing.assert_array_equal(whole, half)


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_memory_does_not_grow(similarity, monkeypatch):
    monkeypatch.setattr(SIMILARITY_MEASURES[similarity], "chunk_frames", 100)
    accumulator = SIMILARITY_MEASURES[similarity](**({"max_frames": 50} if similarity == "mutual_knn" else {}))

    def held():
        values = [item for value in vars(accumulator).values() for item in (value if type(value) is list else [value])]
        return sum(value.nbytes for value in values if isinstance(value, (torch.Tensor, np.ndarray)))

    for _ in range(2):
        accumulator.update(list(random_states()))
    before = held()
    for _ in range(10):
        accumulator.update(list(random_states()))
    assert held() == before > 0


def test_cka_with_large_means_outliers_and_drift(monkeypatch):
    monkeypatch.setattr(LinearCKA, "chunk_frames", 64)
    states = random_states(frames=500)
    states[:, :, 0] = 50 * states[:, :, 0]  # an outlier dimension
    states += 1e4 * torch.linspace(-1, 1, 12)
    states[:, 100:, 5] += 30  # the mean of the first chunk is not the mean of all
    matrix = streamed(LinearCKA(), states, 70)
    np.testing.assert_allclose(matrix, reference_cka(states), atol=1e-6)


def test_mutual_knn_with_a_large_mean():
    states = random_states() + 1e3
    np.testing.assert_allclose(streamed(MutualKNN(), states, 70), reference_mutual_knn(states), atol=1e-6)


def test_invariances():
    states = random_states()
    rotation = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(1)))[0]
    states[1] = 3 * states[0] @ rotation + 5
    states[2] = -states[0]
    states[3] = 2 * states[0]
    cka, cosine = streamed(LinearCKA(), states, 300), streamed(FrameCosine(), states, 300)
    np.testing.assert_allclose(cka, 1, atol=1e-6)
    assert cka.max() <= 1
    np.testing.assert_allclose(cosine[0, 2:], [-1, 1], atol=1e-6)
    assert cosine[0, 1] < 0.9


def test_distillation_of_equal_layers():
    same = random_states()[:1].expand(3, -1, -1)
    np.testing.assert_array_equal(streamed(DistillationSimilarity(l2_weight=1), same, 100), np.ones((3, 3)))
    states = random_states()
    states[2] = states[0]
    matrix = streamed(DistillationSimilarity(), states, 100)
    assert matrix[0, 2] == pytest.approx(1, abs=1e-6)
    assert matrix.min() == 0


def test_cka_of_a_constant_layer():
    states = random_states()
    states[2] = 0.1
    with pytest.raises(ValueError, match="Hidden state 3 does not vary"):
        streamed(LinearCKA(first_layer=1), states, 100)


@pytest.mark.parametrize("sizes", [7, 300])
def test_mutual_knn_samples_the_frames_of_smallest_keys(sizes, monkeypatch):
    monkeypatch.setattr(MutualKNN, "chunk_frames", 32)
    states = random_states()
    matrix = streamed(MutualKNN(k=5, max_frames=40, seed=3), states, sizes)
    sample = np.sort(np.argsort(np.random.default_rng(3).random(300))[:40])
    np.testing.assert_allclose(matrix, reference_mutual_knn(states[:, sample], k=5), atol=1e-12)


@pytest.mark.parametrize(
    "states, message",
    [
        ([torch.ones(2, 3, 4)], r"the same shape \(frames, features\), but have \[\(2, 3, 4\)\]"),
        ([torch.ones(3, 4), torch.ones(2, 4)], "the same shape"),
        ([], "the same shape"),
        ([torch.ones(3, 12)], "1 hidden states with 12 features do not match the earlier 4 with 12"),
        ([torch.ones(3, 5)] * 4, "4 hidden states with 5 features do not match the earlier 4 with 12"),
    ],
)
def test_shapes_are_checked(states, message):
    accumulator = FrameCosine()
    accumulator.update(list(random_states()))
    with pytest.raises(ValueError, match=message):
        accumulator.update(states)


# ------------------------------------------------------------------------------------------------------- another model
def two_models(similarity):
    """States of 4 layers and of 3 others, which share some variation; of other widths where the measure allows it."""
    states, others = random_states(), random_states(layers=3, seed=1)
    others = 0.5 * others + states[1:]
    states[1] += 30.0
    if not SIMILARITY_MEASURES[similarity].needs_equal_widths:
        others = torch.cat([others, others[..., :5].square()], dim=-1)
    return states, others


def reference_block(similarity, states, others):
    """The block between the models, of a reference for all their layers."""
    rows = len(states)
    if similarity == "distillation":
        # Relative to the farthest pair of those compared.
        together = 1 - reference_distillation(torch.cat([states, others]))
        return 1 - together[:rows, rows:] / together[:rows, rows:].max()
    if states.shape[2] == others.shape[2]:
        return REFERENCES[similarity](torch.cat([states, others]))[:rows, rows:]
    # Features that are zero change no Gram matrix and no cosine.
    padded = F.pad(states, (0, others.shape[2] - states.shape[2]))
    return REFERENCES[similarity](torch.cat([padded, others]))[:rows, rows:]


def streamed_pair(accumulator, states, others, sizes):
    for part, other_part in zip(states.split(sizes, dim=1), others.split(sizes, dim=1), strict=True):
        accumulator.update(list(part), list(other_part))
    return accumulator.compute()


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("sizes", [300, 100, [1, 63, 200, 36]])
def test_layers_of_two_models(similarity, sizes, monkeypatch):
    monkeypatch.setattr(SIMILARITY_MEASURES[similarity], "chunk_frames", 64)
    states, others = two_models(similarity)
    matrix = streamed_pair(SIMILARITY_MEASURES[similarity](), states, others, sizes)
    assert matrix.shape == (4, 3) and matrix.dtype == np.float64
    np.testing.assert_allclose(matrix, reference_block(similarity, states, others), atol=1e-6)


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_a_model_beside_itself_has_its_own_matrix(similarity):
    states = random_states()
    square = streamed(SIMILARITY_MEASURES[similarity](), states, 70)
    rectangular = streamed_pair(SIMILARITY_MEASURES[similarity](), states, states, 70)
    np.testing.assert_allclose(rectangular, square, atol=1e-12)


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_accumulators_of_two_models_absorb_each_other(similarity):
    states, others = two_models(similarity)
    states[2, 150:] -= 20.0
    first, second = (SIMILARITY_MEASURES[similarity]() for _ in range(2))
    first.update(list(states[:, :150]), list(others[:, :150]))
    second.update(list(states[:, 150:]), list(others[:, 150:]))
    first.absorb(second)
    assert first.num_frames == 300
    np.testing.assert_allclose(first.compute(), reference_block(similarity, states, others), atol=1e-6)


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_models_of_other_widths(similarity):
    states, others = random_states(), random_states(features=9)
    accumulator = SIMILARITY_MEASURES[similarity]()
    if not accumulator.needs_equal_widths:
        assert streamed_pair(accumulator, states, others, 100).shape == (4, 4)
        return
    message = f"`{similarity}` compares features one by one, but one model has 12 .* other 9; .* by cka or mutual_knn"
    with pytest.raises(ValueError, match=message):
        accumulator.update(list(states), list(others))


def test_errors_name_the_other_model():
    states, others = random_states(), random_states(layers=3)
    accumulator = LinearCKA(first_layer=1)
    with pytest.raises(ValueError, match="two models have 300 and 299 frames"):
        accumulator.update(list(states), list(others[:, 1:]))
    accumulator.update(list(states), list(others))
    with pytest.raises(ValueError, match="in all calls of `update` or in none"):
        accumulator.update(list(states))
    others[2, 5, 5] = torch.nan
    with pytest.raises(ValueError, match="Hidden state 3 of the other model has NaN"):
        accumulator.update(list(states), list(others))
    others[2] = 0.1
    with pytest.raises(ValueError, match="Hidden state 3 of the other model does not vary"):
        streamed_pair(LinearCKA(first_layer=1), states, others, 100)
