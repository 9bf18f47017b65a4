import numpy as np
import pytest
import torch
from scipy.cluster.hierarchy import cophenet, dendrogram, is_monotonic, is_valid_linkage
from scipy.spatial.distance import squareform
from transformers import WavLMConfig, WavLMModel

from skill_hf.grouping.clustering import _MERGED_DISTANCE, cluster_layers, layer_tree, silhouette
from skill_hf.grouping.layer_similarity import layer_similarity
from skill_hf.recipe.skill_config import LINKAGES, SkillConfig


def random_similarity(num_layers, seed):
    """Uniform off-diagonal entries: no ties, no geometry."""
    rng = np.random.default_rng(seed)
    return 1 - squareform(rng.uniform(0.05, 1, num_layers * (num_layers - 1) // 2))


def planted_similarity(groups, inside=0.9, outside=0.3, noise=0.03, seed=0):
    num_layers = sum(map(len, groups))
    rng = np.random.default_rng(seed)
    similarity = outside + squareform(rng.uniform(-noise, noise, num_layers * (num_layers - 1) // 2))
    for group in groups:
        similarity[np.ix_(group, group)] += inside - outside
    np.fill_diagonal(similarity, 1)
    return similarity


BETWEEN = {"average": np.mean, "single": np.min, "complete": np.max}


def reference_merges(similarity, linkage, contiguous=False):
    """Partitions into N, N - 1, ..., 1 groups with the height of each merge, group distances from their definition."""
    groups = [[i] for i in range(len(similarity))]
    yield groups, 0.0
    while len(groups) > 1:
        pairs = [
            (BETWEEN[linkage](1 - similarity[np.ix_(groups[a], groups[b])]), a, b)
            for a in range(len(groups))
            for b in ([a + 1] if contiguous else range(a + 1, len(groups)))
            if b < len(groups)
        ]
        height, a, b = min(pairs)
        groups = sorted([sorted(groups[a] + groups[b]), *(g for i, g in enumerate(groups) if i not in (a, b))])
        yield groups, height


def is_run(group):
    return group == list(range(group[0], group[-1] + 1))


@pytest.mark.parametrize("contiguous", [False, True])
@pytest.mark.parametrize("linkage", BETWEEN)
def test_groups_equal_those_of_the_definition(linkage, contiguous):
    for seed in range(5):
        similarity = random_similarity(9, seed)
        for groups, _ in reference_merges(similarity, linkage, contiguous):
            recipe = SkillConfig(linkage=linkage, contiguous=contiguous, num_clusters=len(groups))
            assert cluster_layers(similarity, recipe) == groups


@pytest.mark.parametrize("contiguous", [False, True])
@pytest.mark.parametrize("linkage", BETWEEN)
def test_heights_are_the_distances_of_the_merged_groups(linkage, contiguous):
    similarity = random_similarity(9, 0)
    heights = [height for _, height in reference_merges(similarity, linkage, contiguous)][1:]
    tree = layer_tree(similarity, SkillConfig(linkage=linkage, contiguous=contiguous))
    np.testing.assert_allclose(tree[:, 2], np.maximum.accumulate(heights), atol=1e-12)


@pytest.mark.parametrize("contiguous", [False, True])
@pytest.mark.parametrize("linkage", BETWEEN)
def test_distance_threshold(linkage, contiguous):
    similarity = random_similarity(9, 1)
    merges = list(reference_merges(similarity, linkage, contiguous))
    heights = np.maximum.accumulate([height for _, height in merges])
    for threshold in (0.01, 0.2, 0.4, 0.6, 0.8, 1.5):
        recipe = SkillConfig(linkage=linkage, contiguous=contiguous, distance_threshold=threshold)
        expected = merges[np.flatnonzero(heights <= threshold)[-1]][0]
        assert cluster_layers(similarity, recipe) == expected


def test_every_linkage_of_a_recipe_has_its_formula():
    assert tuple(_MERGED_DISTANCE) == LINKAGES


@pytest.mark.parametrize("linkage", LINKAGES)
def test_contiguous_equals_unrestricted_on_a_line(linkage):
    """On a line the closest groups are neighbours, so the restriction changes nothing."""
    points = np.sort(np.random.default_rng(0).uniform(0, 1, 12))
    similarity = 1 - np.abs(points[:, None] - points)
    free, restricted = (layer_tree(similarity, SkillConfig(linkage=linkage, contiguous=c)) for c in (False, True))
    np.testing.assert_allclose(np.sort(restricted[:, :2]), np.sort(free[:, :2]))
    np.testing.assert_allclose(restricted[:, 2:], free[:, 2:], atol=1e-12)


@pytest.mark.parametrize("linkage", LINKAGES)
def test_contiguous_groups_are_runs(linkage):
    for seed in range(10):
        similarity = random_similarity(9, seed)
        recipe = SkillConfig(linkage=linkage, contiguous=True)
        assert is_valid_linkage(layer_tree(similarity, recipe))
        assert is_monotonic(layer_tree(similarity, recipe))
        for count in range(1, 10):
            groups = cluster_layers(similarity, SkillConfig(linkage=linkage, contiguous=True, num_clusters=count))
            assert len(groups) == count
            assert all(is_run(group) for group in groups)
            assert sorted(sum(groups, [])) == list(range(9))


def test_contiguous_where_the_closest_layers_are_no_neighbours():
    similarity = planted_similarity([[0, 2], [1, 3]])
    assert cluster_layers(similarity, SkillConfig(num_clusters=2)) == [[0, 2], [1, 3]]
    assert all(is_run(group) for group in cluster_layers(similarity, SkillConfig(num_clusters=2, contiguous=True)))
    # Once 0 and 1 (distance 0.5) are one, they are at (0.1 + 0.6) / 2 = 0.35 from 2: below the merge before.
    distance = np.array([[0, 0.5, 0.1], [0.5, 0, 0.6], [0.1, 0.6, 0]])
    tree = layer_tree(1 - distance, SkillConfig(contiguous=True))
    np.testing.assert_allclose(tree, [[0, 1, 0.5, 2], [3, 2, 0.5, 3]])


@pytest.mark.filterwarnings("error")
def test_contiguous_ward_on_distances_that_are_not_euclidean():
    # 0 and 1 are far apart, yet both beside 3: after their merge the squared distance to 3 would be negative.
    distance = squareform([0.5, 0.9, 0.01, 0.9, 0.01, 0.9])
    tree = layer_tree(1 - distance, SkillConfig(linkage="ward", contiguous=True))
    np.testing.assert_allclose(tree, [[0, 1, 0.5, 2], [2, 3, 0.9, 2], [4, 5, 0.9, 4]])


@pytest.mark.parametrize("contiguous", [False, True])
@pytest.mark.parametrize("linkage", LINKAGES)
@pytest.mark.parametrize("levels", [1, 2, 3])
def test_ties_leave_the_number_of_groups_exact(linkage, contiguous, levels):
    rng = np.random.default_rng(levels)
    similarity = 1 - squareform(rng.integers(1, levels + 1, 66) / 4)
    for count in range(1, 13):
        recipe = SkillConfig(linkage=linkage, contiguous=contiguous, num_clusters=count)
        assert len(cluster_layers(similarity, recipe)) == count


@pytest.mark.parametrize("cut", [{}, {"num_clusters": 3}, {"distance_threshold": 0.3}])
@pytest.mark.parametrize("contiguous", [False, True])
@pytest.mark.parametrize("linkage", LINKAGES)
def test_planted_runs_are_found(linkage, contiguous, cut):
    groups = [[0, 1, 2], [3, 4, 5, 6], [7, 8, 9, 10, 11]]
    recipe = SkillConfig(linkage=linkage, contiguous=contiguous, **cut)
    assert cluster_layers(planted_similarity(groups), recipe) == groups


@pytest.mark.parametrize("cut", [{}, {"num_clusters": 3}, {"distance_threshold": 0.3}])
@pytest.mark.parametrize("linkage", LINKAGES)
def test_planted_groups_are_found_and_sorted(linkage, cut):
    groups = [[0, 3, 8, 11], [1, 6], [2, 4, 5, 7, 9, 10]]
    assert cluster_layers(planted_similarity(groups), SkillConfig(linkage=linkage, **cut)) == groups


@pytest.mark.parametrize("contiguous", [False, True])
def test_automatic_cut_has_the_largest_silhouette(contiguous):
    for seed in range(5):
        similarity = random_similarity(8, seed)
        scores = {}
        for count in range(2, 8):
            groups = cluster_layers(similarity, SkillConfig(num_clusters=count, contiguous=contiguous))
            labels = [next(k for k, group in enumerate(groups) if row in group) for row in range(8)]
            scores[silhouette(1 - similarity, np.array(labels))] = groups
        assert cluster_layers(similarity, SkillConfig(contiguous=contiguous)) == scores[max(scores)]


def test_silhouette_by_hand():
    # Points 0, 1 and 4, 6 on a line, and 20 alone.
    points = np.array([0, 1, 4, 6, 20.0])
    distance = np.abs(points[:, None] - points)
    expected = [(5 - 1) / 5, (4 - 1) / 4, (3.5 - 2) / 3.5, (5.5 - 2) / 5.5, 0]
    assert silhouette(distance, np.array([0, 0, 1, 1, 2])) == pytest.approx(np.mean(expected))
    assert silhouette(np.zeros((4, 4)), np.array([0, 0, 1, 1])) == 0


def test_silhouette_equals_that_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    for seed in range(20):
        distance = 1 - random_similarity(10, seed)
        labels = rng.permutation(np.r_[:4, rng.integers(0, 4, 6)])
        expected = metrics.silhouette_score(distance, labels, metric="precomputed")
        assert silhouette(distance, labels) == pytest.approx(expected, abs=1e-12)


def test_few_layers():
    similarity = random_similarity(2, 0)
    assert cluster_layers(similarity, SkillConfig()) == [[0], [1]]
    assert cluster_layers(similarity, SkillConfig(num_clusters=1)) == [[0, 1]]
    assert cluster_layers(similarity, SkillConfig(num_clusters=2, contiguous=True)) == [[0], [1]]
    assert cluster_layers(planted_similarity([[0], [1, 2]]), SkillConfig()) == [[0], [1, 2]]


def test_negative_similarity():
    similarity = np.array([[1, 0.9, -0.8], [0.9, 1, -0.7], [-0.8, -0.7, 1]])
    assert cluster_layers(similarity, SkillConfig()) == [[0, 1], [2]]
    assert layer_tree(similarity, SkillConfig())[-1, 2] == pytest.approx(1.75)


def test_explicit_groups_switch_clustering_off():
    similarity = random_similarity(13, 0)
    groups = [[8], [12, 4], [0]]
    assert cluster_layers(similarity, SkillConfig(layer_groups=groups)) == groups
    assert layer_tree(similarity, SkillConfig(layer_groups=groups)).shape == (12, 4)
    assert cluster_layers(similarity, SkillConfig(layer_groups=[[13]], include_embeddings=False)) == [[13]]
    with pytest.raises(ValueError, match="`layer_groups` names hidden state 99, but the last hidden state is 12"):
        cluster_layers(similarity, SkillConfig(layer_groups=[[0], [99]]))
    with pytest.raises(ValueError, match="names hidden state 14, but the last hidden state is 13"):
        cluster_layers(similarity, SkillConfig(layer_groups=[[14]], include_embeddings=False))


def test_more_clusters_than_layers():
    with pytest.raises(ValueError, match=r"`num_clusters` \(5\) exceeds the number of layers to group, 4"):
        cluster_layers(random_similarity(4, 0), SkillConfig(num_clusters=5))


@pytest.mark.parametrize(
    "matrix, message",
    [
        (np.ones((2, 3)), r"square, but has shape \(2, 3\)"),
        (np.ones(4), r"square, but has shape \(4,\)"),
        (np.ones((1, 1)), "fewer than two rows"),
        (np.array([[1, np.nan], [np.nan, 1]]), "NaN or infinite"),
        (np.array([[1, 0.5], [0.4, 1]]), "symmetric"),
        (np.array([[0, 0.5], [0.5, 0]]), "ones on its diagonal"),
    ],
)
@pytest.mark.parametrize("function", [cluster_layers, layer_tree])
def test_bad_matrices(function, matrix, message):
    with pytest.raises(ValueError, match=message):
        function(matrix, SkillConfig())


@pytest.mark.parametrize("contiguous", [False, True])
@pytest.mark.parametrize("linkage", LINKAGES)
def test_tree_makes_a_dendrogram(linkage, contiguous):
    similarity = random_similarity(9, 0)
    before = similarity.copy()
    tree = layer_tree(similarity, SkillConfig(linkage=linkage, contiguous=contiguous))
    leaves = dendrogram(tree, no_plot=True)["leaves"]
    assert sorted(leaves) == list(range(9))
    if contiguous:
        assert leaves == list(range(9))
    assert cophenet(tree).shape == (36,)
    np.testing.assert_array_equal(similarity, before)


def test_layers_of_a_model():
    torch.manual_seed(0)
    config = WavLMConfig(
        hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=96, conv_dim=[32] * 7
    )
    audio = np.random.default_rng(0).standard_normal((3, 8000))
    similarity = layer_similarity(WavLMModel(config), audio, progress=False)
    groups = cluster_layers(similarity, SkillConfig())
    assert sorted(sum(groups, [])) == [0, 1, 2, 3, 4]
    assert 2 <= len(groups) <= 4
