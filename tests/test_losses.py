import dataclasses

import pytest
import torch

from skill_hf import SkillConfig, layer_similarity
from skill_hf.grouping.similarity import DistillationSimilarity
from skill_hf.losses import LOSS_TERMS, LossTerm, distillation_sums, group_means, lagrangian, sparsity_at, term_weights


def test_group_means():
    states = [torch.full((1, 2, 3), float(value)) for value in (1, 2, 6)]
    means = group_means(states, [[0, 2], [1]])
    assert means.shape == (2, 1, 2, 3)
    assert means[0].unique().tolist() == [3.5]
    assert means[1].unique().tolist() == [2.0]


def test_group_means_of_half_precision_are_summed_in_float32():
    states = [torch.full((1, 1, 1), value, dtype=torch.bfloat16) for value in (256.0, 1.0, 1.0)]
    assert group_means(states, [[0, 1, 2]]).item() == pytest.approx(86.0)  # 256 + 1 is 256 in bfloat16


def test_terms_against_the_definition():
    torch.manual_seed(0)
    prediction, target = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4)
    mask = torch.arange(5) < torch.tensor([5, 2, 4])[:, None]
    expected = {"l1": 0.0, "l2": 0.0, "cosine": 0.0}
    for group in range(2):
        for clip, length in enumerate([5, 2, 4]):
            for frame in range(length):
                p, t = prediction[group, clip, frame], target[group, clip, frame]
                expected["l1"] += (p - t).abs().sum() / 4 / 2
                expected["l2"] += ((p - t) ** 2).sum() / 4 / 2
                expected["cosine"] -= (p @ t) / (p.norm() * t.norm()) / 2
    actual = distillation_sums(prediction, target, mask)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value)


def test_padded_frames_never_count():
    torch.manual_seed(0)
    prediction, target = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4)
    mask = torch.arange(5) < torch.tensor([5, 3])[:, None]
    before = distillation_sums(prediction, target, mask)
    prediction[:, 1, 3:] = float("nan")
    prediction.requires_grad_()
    after = distillation_sums(prediction, target, mask)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_sparsity_rises_linearly():
    assert [sparsity_at(step, 0.8, 4) for step in (0, 1, 2, 4, 9)] == pytest.approx([0, 0.2, 0.4, 0.8, 0.8])
    assert sparsity_at(0, 0.8, 0) == 0.8
    assert [sparsity_at(step, 0.8, 4, start=0.4) for step in (0, 1, 4, 9)] == pytest.approx([0.4, 0.5, 0.8, 0.8])


def test_lagrangian_descends_on_size_and_ascends_on_multipliers():
    sparsity = torch.tensor(0.25, requires_grad=True)
    lambda_1, lambda_2 = (torch.tensor(value, requires_grad=True) for value in (2.0, 3.0))
    loss = lagrangian(sparsity, 0.75, lambda_1, lambda_2)
    assert loss.item() == pytest.approx(2 * 0.5 + 3 * 0.25)
    loss.backward()
    assert sparsity.grad.item() == pytest.approx(-2 - 2 * 3 * 0.5)
    # d/d lambda is the gap and its square; the sign is turned, so that descent ascends.
    assert lambda_1.grad.item() == pytest.approx(-0.5)
    assert lambda_2.grad.item() == pytest.approx(-0.25)


def test_every_term_has_a_weight_of_its_name():
    weights = [f"{name}_weight" for name in LOSS_TERMS]
    of_a_head = ["logits_weight", "task_weight"]
    names = [field.name for field in dataclasses.fields(SkillConfig) if field.name.endswith("_weight")]
    assert names == [*weights, *of_a_head]
    assert list(term_weights(SkillConfig()).values()) == [1.0, 0.0, 1.0]
    assert term_weights(SkillConfig()) == {name: term.default_weight for name, term in LOSS_TERMS.items()}
    assert DistillationSimilarity().weights == term_weights(SkillConfig())
    assert DistillationSimilarity(l2_weight=3.0).weights == {"l1": 1.0, "l2": 3.0, "cosine": 1.0}


@pytest.mark.parametrize("similarity", ["cka", "distillation"])
def test_a_weight_of_no_term_is_named(similarity):
    with pytest.raises(TypeError, match="`l3_weight` is not an argument; .* l1_weight, l2_weight, cosine_weight"):
        layer_similarity(None, [], similarity, l3_weight=1.0)


def test_an_added_term_is_weighted_in_loss_and_similarity(monkeypatch):
    largest = LossTerm(
        "largest error",
        lambda prediction, target, error: error.abs().amax(-1),
        lambda frames, others: torch.cdist(frames, others, p=float("inf")).sum(0, dtype=torch.float64),
    )
    monkeypatch.setitem(LOSS_TERMS, "largest", largest)
    frames = torch.randn(5, 3, 4)
    measure = DistillationSimilarity(l1_weight=0.0, cosine_weight=0.0, largest_weight=2.0)
    measure.update(list(frames.unbind(1)))
    distances = (frames[:, :, None] - frames[:, None]).abs().amax(-1).sum(0).double()
    expected = 1 - distances / distances.max()
    torch.testing.assert_close(torch.from_numpy(measure.compute()), expected, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="`cosine_weight` and `largest_weight` are all 0"):
        DistillationSimilarity(l1_weight=0.0, cosine_weight=0.0)
    assert "largest" in distillation_sums(torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4))


@pytest.mark.parametrize("name", LOSS_TERMS)
def test_distance_of_layers_is_the_loss_between_them(name):
    """Shifted by a constant, so that a layer is at distance 0 from itself."""
    frames, others = torch.randn(7, 3, 5), torch.randn(7, 2, 5)
    others[:, 1] = frames[:, 2]
    distances, term = LOSS_TERMS[name].layer_distances(frames, others), LOSS_TERMS[name].loss
    assert distances.shape == (3, 2)
    shift = term(frames[:, 0], frames[:, 0], torch.zeros(7, 5)).sum()
    for i in range(3):
        for j in range(2):
            x, y = frames[:, i], others[:, j]
            expected = term(x, y, x - y).sum() - shift
            torch.testing.assert_close(distances[i, j], expected.double(), atol=1e-5, rtol=1e-5)
