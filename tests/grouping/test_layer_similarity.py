"""`layer_similarity` between two models; `test_similarity.py` has the measures, and one model."""

import numpy as np
import pytest
import torch
from conftest import tiny_teacher
from test_similarity import frames_of, similarity_of
from transformers import Wav2Vec2FeatureExtractor

from skill_hf.analysis import layer_distances
from skill_hf.models.families import build_student
from skill_hf.recipe.skill_config import SIMILARITIES


@pytest.fixture(scope="module")
def audio():
    rng = np.random.default_rng(0)
    return [(rng.standard_normal(length) * 0.1).astype(np.float32) for length in (4000, 4000, 4000, 6400, 5000)]


@pytest.fixture(scope="module")
def teacher():
    return tiny_teacher()


@pytest.fixture(scope="module")
def wider():
    return tiny_teacher("large", hidden_size=48, num_hidden_layers=2)


@pytest.fixture(scope="module")
def student(teacher):
    """The teacher with other weights: of the same width, and near to it."""
    student = build_student(teacher)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in student.encoder.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return student.eval()


def hsic_cka(x, y):
    """By the definition of HSIC with linear kernels, in numpy (Kornblith et al., equations 1, 2 and 3)."""
    count = len(x)
    centring = np.eye(count) - np.full((count, count), 1 / count)

    def hsic(k, m):
        return np.trace(k @ centring @ m @ centring) / (count - 1) ** 2

    k, m = x @ x.T, y @ y.T
    return hsic(k, m) / np.sqrt(hsic(k, k) * hsic(m, m))


def test_cka_between_models_of_other_width_depth_and_layout(teacher, wider, audio):
    matrix = similarity_of(teacher, audio, other=wider, batch_size=2)
    rows, columns = (frames_of(model, audio).numpy() for model in (teacher, wider))
    expected = [[hsic_cka(x, y) for y in columns] for x in rows]
    assert matrix.shape == (4, 3) and matrix.dtype == np.float64
    np.testing.assert_allclose(matrix, expected, atol=1e-6)
    assert np.ptp(expected) > 1e-3  # wrong layers would show
    np.testing.assert_allclose(similarity_of(wider, audio, other=teacher), matrix.T, atol=1e-6)


def test_mutual_knn_between_models_of_other_width(teacher, wider, audio):
    def nearest(states):
        unit = states / np.linalg.norm(states, axis=-1, keepdims=True)
        cosines = unit @ unit.T
        np.fill_diagonal(cosines, -np.inf)
        return [set(row) for row in np.argsort(-cosines, axis=1)[:, :10]]

    rows, columns = ([nearest(states) for states in frames_of(model, audio).numpy()] for model in (teacher, wider))
    expected = [[np.mean([len(a & b) / 10 for a, b in zip(x, y, strict=True)]) for y in columns] for x in rows]
    np.testing.assert_allclose(similarity_of(teacher, audio, "mutual_knn", other=wider), expected, atol=2e-3)


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_a_model_beside_itself_has_its_own_matrix(teacher, audio, similarity):
    square = similarity_of(teacher, audio, similarity)
    np.testing.assert_allclose(similarity_of(teacher, audio, similarity, other=teacher), square, atol=1e-9)


def test_the_diagonal_is_what_layer_distances_measures(teacher, student, audio):
    distances = layer_distances(teacher, student, audio, progress=False)
    for similarity, distance in distances.items():
        matrix = similarity_of(teacher, audio, similarity, other=student)
        np.testing.assert_allclose(1 - matrix.diagonal(), distance, atol=1e-6)


def test_without_embeddings_neither_model_has_them(teacher, wider, audio):
    matrix = similarity_of(teacher, audio, other=wider)
    np.testing.assert_allclose(
        similarity_of(teacher, audio, other=wider, include_embeddings=False), matrix[1:, 1:], atol=1e-12
    )


def test_parts_of_the_audio(teacher, wider, audio):
    whole, *halves = similarity_of(teacher, audio, other=wider, num_parts=2)
    np.testing.assert_allclose(whole, similarity_of(teacher, audio, other=wider), atol=1e-6)
    for part, half in enumerate(halves):
        np.testing.assert_allclose(half, similarity_of(teacher, audio[part::2], other=wider), atol=1e-6)


def test_each_model_takes_audio_through_its_own_feature_extractor(teacher, wider, audio, tmp_path):
    plain, normalising = (Wav2Vec2FeatureExtractor(do_normalize=value) for value in (False, True))
    for model, extractor, name in ((teacher, plain, "teacher"), (wider, normalising, "wider")):
        model.save_pretrained(tmp_path / name)
        extractor.save_pretrained(tmp_path / name)
    shifted = [3 * waveform + 0.5 for waveform in audio]
    normalised = [(waveform - waveform.mean()) / np.sqrt(waveform.var() + 1e-7) for waveform in shifted]
    heard = frames_of(wider, normalised).numpy()
    expected = [[hsic_cka(x, y) for y in heard] for x in frames_of(teacher, shifted).numpy()]
    by_name = similarity_of(tmp_path / "teacher", shifted, other=str(tmp_path / "wider"))
    np.testing.assert_allclose(by_name, expected, atol=1e-5)
    given = {"feature_extractor": plain, "other_feature_extractor": normalising}
    np.testing.assert_allclose(similarity_of(teacher, shifted, other=wider, **given), by_name, atol=1e-6)
    # A loaded model without one of its own takes that of the teacher.
    both = similarity_of(teacher, shifted, other=wider, feature_extractor=normalising)
    expected = [[hsic_cka(x, y) for y in heard] for x in frames_of(teacher, normalised).numpy()]
    np.testing.assert_allclose(both, expected, atol=1e-5)
    (tmp_path / "wider" / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match="wider` has no preprocessor_config.json; pass `other_feature_extractor`"):
        similarity_of(teacher, shifted, other=tmp_path / "wider")


@pytest.mark.parametrize("similarity", ["cosine", "distillation"])
def test_other_widths_are_refused_before_any_audio_is_read(teacher, wider, similarity):
    def unread():
        raise AssertionError("was read")
        yield

    message = f"`{similarity}` compares features one by one, but one model has 32 of them and the other 48; "
    with pytest.raises(ValueError, match=message):
        similarity_of(teacher, unread(), similarity, other=wider)


def test_a_broken_layer_of_the_other_model_is_named(teacher, audio):
    broken = tiny_teacher()
    with torch.no_grad():
        broken.encoder.layers[1].final_layer_norm.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="Hidden state 2 of the other model has NaN"):
        similarity_of(teacher, audio, other=broken)


def test_both_models_run_in_eval_mode_and_get_their_modes_back(teacher, audio):
    expected = similarity_of(teacher, audio, other=teacher)
    training = tiny_teacher(hidden_dropout=0.5)
    training.train()
    np.testing.assert_allclose(similarity_of(teacher, audio, other=training), expected, atol=1e-6)
    assert training.training and not teacher.training
    with pytest.raises(ValueError, match="1-D"):
        similarity_of(teacher, [*audio, np.zeros((2, 4000))], other=training)
    assert training.training
