import numpy as np
import pytest

from skill_hf import SkillConfig, cluster_layers
from skill_hf.grouping.clustering import layer_tree, silhouettes
from skill_hf.grouping.stability import adjusted_rand_index, all_cuts, mean_differences


def similar_layers(places) -> np.ndarray:
    """Similarity of layers at `places` on a line: the nearer, the more alike."""
    return np.exp(-np.abs(np.subtract.outer(places, places)) / 10)


def partition_of(labels) -> list[list[int]]:
    return [np.flatnonzero(labels == label).tolist() for label in np.unique(labels)]


def test_adjusted_rand_index_is_that_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    values = []
    for _ in range(200):
        size, *counts = rng.integers(1, 14, 3)
        labels = [rng.integers(0, count, size) for count in counts]
        values.append(adjusted_rand_index(*map(partition_of, labels)))
        assert values[-1] == pytest.approx(metrics.adjusted_rand_score(*labels), abs=1e-12)
    assert min(values) < 0 < max(values)


def test_partitions_of_other_layers_are_refused():
    for others in ([[0, 1]], [[0, 1], [2, 2]], [[0, 1], [1, 2]]):
        with pytest.raises(ValueError, match="not partitions of the same layers"):
            adjusted_rand_index([[0], [1, 2]], others)


@pytest.mark.parametrize("recipe", [{}, {"contiguous": True}, {"linkage": "ward"}])
def test_there_is_a_cut_for_every_number_of_groups(recipe):
    similarity = similar_layers([0, 1, 10, 11.5, 2.1, 30])
    config = SkillConfig(**recipe)
    cuts = all_cuts(similarity, config)
    assert [len(cut.groups) for cut in cuts] == [1, 2, 3, 4, 5, 6]
    for count, cut in enumerate(cuts, 1):
        assert cut.groups == cluster_layers(similarity, SkillConfig(**recipe, num_clusters=count))
    assert {count: cut.silhouette for count, cut in enumerate(cuts, 1) if cut.silhouette is not None} == silhouettes(
        similarity, config
    )
    assert [cut.height for cut in cuts] == [*layer_tree(similarity, config)[::-1, 2], 0.0]
    # Where no two heights are equal, the tree has these groups at that height.
    for cut in cuts[:-1] if len({cut.height for cut in cuts}) == len(cuts) else ():
        threshold = SkillConfig(**recipe, distance_threshold=cut.height + 1e-9)
        assert cluster_layers(similarity, threshold) == cut.groups
    assert all(cut.stability is None for cut in cuts)


def test_stability_is_the_mean_agreement_of_parts():
    places = [[0, 1, 10, 11, 30], [0, 1.1, 10, 11.2, 29], [0, 9, 10, 11.5, 30]]
    whole, *parts = map(similar_layers, [[0, 1.2, 10, 11.3, 30], *places])
    assert [cut.stability for cut in all_cuts(whole, SkillConfig(), [parts[0], parts[0]])] == [1.0] * 5
    cuts = all_cuts(whole, SkillConfig(num_clusters=4), parts)
    groups = [[cluster_layers(part, SkillConfig(num_clusters=count)) for part in parts] for count in range(1, 6)]
    for cut, (a, b, c) in zip(cuts, groups, strict=True):
        expected = np.mean([adjusted_rand_index(*pair) for pair in ((a, b), (a, c), (b, c))])
        assert cut.stability == pytest.approx(expected)
    assert cuts[0].stability == cuts[4].stability == 1.0 > cuts[2].stability
    assert all(cut.stability is None for cut in all_cuts(whole, SkillConfig(), parts[:1]))


def test_two_layers():
    cuts = all_cuts(similar_layers([0, 1]), SkillConfig())
    assert [(cut.groups, cut.silhouette) for cut in cuts] == [([[0, 1]], None), ([[0], [1]], None)]


def test_differences_between_sets_and_within_them():
    rng = np.random.default_rng(0)
    base, shift = rng.random((3, 2)), np.array([[0.5, 0], [0, 0], [0, 0]])
    parts, others = [base, base + 0.1], [base + shift, base + shift + 0.1]
    across, within = mean_differences(parts, others)
    # Of the four pairs across, the shifted entry differs by 0.5, 0.6, 0.4 and 0.5, the others by 0, 0.1, 0.1 and 0.
    assert across == pytest.approx((2.0 + 5 * 0.2) / 24)
    assert within == pytest.approx(0.1)
    assert mean_differences(parts, others[:1]) is None
