"""Groups similar layers by agglomerative clustering of a similarity matrix."""

from collections.abc import Callable

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

from ..recipe.skill_config import SkillConfig


PASS = "pass the result of `layer_similarity`"  # the advice of errors


def cluster_layers(similarity_matrix: np.ndarray, skill_config: SkillConfig) -> list[list[int]]:
    """
    Groups layers by cutting the tree of [`layer_tree`].

    The tree is cut into `skill_config.num_clusters` groups, or at height `skill_config.distance_threshold`; otherwise
    into the number of groups, from 2 to N - 1, with the largest mean [`silhouette`] (the smallest number in case of a
    tie). If there are only two layers, each is its own group.

    Args:
        similarity_matrix (`numpy.ndarray` of shape `(N, N)`):
            Symmetric similarity with ones on its diagonal, as returned by [`layer_similarity`].
        skill_config ([`SkillConfig`]):
            Recipe; `linkage`, `num_clusters`, `distance_threshold`, `contiguous` and `layer_groups` are read, and
            `include_embeddings` to check `layer_groups`.

    Returns:
        `list[list[int]]`: row indices, each group sorted, groups by their first row. Explicit `layer_groups` are
        returned unchanged, as hidden-state indices in their own order, since `projection_groups` refers to that order.

    Raises:
        `ValueError`: if the matrix is not a similarity matrix, `num_clusters` is above N, or `layer_groups` contains a
            hidden state that does not exist.
    """
    distance = _distance_matrix(similarity_matrix)
    num_layers = len(distance)
    if skill_config.layer_groups is not None:
        last = num_layers - 1 if skill_config.include_embeddings else num_layers
        largest = max(index for group in skill_config.layer_groups for index in group)
        if largest > last:
            raise ValueError(f"`layer_groups` names hidden state {largest}, but the last hidden state is {last}.")
        return [list(group) for group in skill_config.layer_groups]

    num_clusters = skill_config.num_clusters
    if num_clusters is not None and num_clusters > num_layers:
        raise ValueError(
            f"`num_clusters` ({num_clusters}) exceeds the number of layers to group, {num_layers}; lower it."
        )
    tree = layer_tree(similarity_matrix, skill_config)
    if skill_config.distance_threshold is not None:
        labels = fcluster(tree, skill_config.distance_threshold, criterion="distance")
    elif num_clusters is not None:
        labels = _cut(tree, num_clusters)
    else:
        scores = silhouettes(similarity_matrix, skill_config)
        labels = _cut(tree, max(scores, key=scores.__getitem__) if scores else num_layers)
    return sorted(np.flatnonzero(labels == label).tolist() for label in np.unique(labels))


def layer_tree(similarity_matrix: np.ndarray, skill_config: SkillConfig) -> np.ndarray:
    """
    Tree of agglomerative clustering on the distance 1 - similarity, for the cut and for the dendrogram.

    Args:
        similarity_matrix (`numpy.ndarray` of shape `(N, N)`):
            Symmetric similarity with ones on its diagonal.
        skill_config ([`SkillConfig`]):
            Recipe; `linkage` and `contiguous` are read. `ward` treats the distances as Euclidean.

    Returns:
        `numpy.ndarray` of shape `(N - 1, 4)`, float64: a linkage matrix in the format of `scipy.cluster.hierarchy`.

    Raises:
        `ValueError`: if the matrix is not square, finite and symmetric with ones on its diagonal and at least two
            rows.
    """
    distance = _distance_matrix(similarity_matrix)
    if skill_config.contiguous:
        return _contiguous_linkage(distance, skill_config.linkage)
    return linkage(squareform(distance), method=skill_config.linkage)


def silhouettes(similarity_matrix: np.ndarray, skill_config: SkillConfig) -> dict[int, float]:
    """Mean [`silhouette`] for each number of groups from 2 to N - 1; the arguments are those of [`layer_tree`]."""
    distance, tree = _distance_matrix(similarity_matrix), layer_tree(similarity_matrix, skill_config)
    return {count: silhouette(distance, _cut(tree, count)) for count in range(2, len(distance))}


def silhouette(distance: np.ndarray, labels: np.ndarray) -> float:
    """
    Mean silhouette of a partition, between -1 and 1: how much closer points are to their own group than to the next.

    `s = (b - a) / max(a, b)` where `a` is a point's mean distance to the others in its group and `b` its smallest mean
    distance to another group; 0 for a point alone in its group. Rousseeuw (1987), doi 10.1016/0377-0427(87)90125-7,
    section 2.

    Args:
        distance (`numpy.ndarray` of shape `(N, N)`):
            Symmetric distances with zeros on the diagonal.
        labels (`numpy.ndarray` of shape `(N,)`):
            Group of each point; at least two groups.
    """
    member = labels[:, None] == np.unique(labels)  # (N, K)
    sums = distance @ member  # (N, K)
    sizes = member.sum(0)
    own_size = member @ sizes
    inside = sums[member] / np.maximum(own_size - 1, 1)
    outside = np.where(member, np.inf, sums / sizes).min(1)
    larger = np.maximum(inside, outside)
    scores = np.divide(outside - inside, larger, out=np.zeros(len(labels)), where=(own_size > 1) & (larger > 0))
    return float(scores.mean())


def _cut(tree: np.ndarray, num_clusters: int) -> np.ndarray:
    """
    Labels `(N,)` of exactly `num_clusters` groups. Uses the order of the merges, not their heights: for tied heights,
    fcluster's `maxclust` gives fewer groups and `cut_tree` wrong ones.
    """
    order = np.arange(len(tree), dtype=np.float64)
    return fcluster(tree, num_clusters, criterion="maxclust_monocrit", monocrit=order)


def _average(to_a, to_b, between, size_a, size_b, sizes):
    return (size_a * to_a + size_b * to_b) / (size_a + size_b)


def _single(to_a, to_b, *_):
    return np.minimum(to_a, to_b)


def _complete(to_a, to_b, *_):
    return np.maximum(to_a, to_b)


def _weighted(to_a, to_b, *_):
    return (to_a + to_b) / 2


def _ward(to_a, to_b, between, size_a, size_b, sizes):
    total = size_a + size_b + sizes
    squared = ((size_a + sizes) * to_a**2 + (size_b + sizes) * to_b**2 - sizes * between**2) / total
    # Distances that are not Euclidean may leave it below 0 where the merged pair was not the closest.
    return np.sqrt(np.maximum(squared, 0))


# Distance of the union of groups a and b to every other group, from their distances before the merge: the formulas of
# Lance and Williams (1967), doi 10.1093/comjnl/9.4.373, in the order
# (to_a, to_b, between a and b, size of a, size of b, sizes of the others).
_MERGED_DISTANCE: dict[str, Callable] = {
    "average": _average,
    "single": _single,
    "complete": _complete,
    "weighted": _weighted,
    "ward": _ward,
}


def _contiguous_linkage(distance: np.ndarray, method: str) -> np.ndarray:
    """Linkage matrix `(N - 1, 4)` of repeatedly merging the two closest neighbouring groups."""
    distance = distance.copy()
    num_layers = len(distance)
    nodes = np.arange(num_layers)  # in the order of the layers, as are the rows of `distance`
    sizes = np.ones(num_layers)
    tree = np.empty((num_layers - 1, 4))
    height = 0.0
    for step in range(num_layers - 1):
        gaps = np.diagonal(distance, offset=1)
        a = int(np.argmin(gaps))
        b = a + 1
        # The closest pair need not be neighbours, so a merged group may be closer to its neighbour than its parts were
        # to each other and heights may fall. A cut at a height, and a dendrogram, need them to rise.
        height = max(height, gaps[a])
        size = sizes[a] + sizes[b]
        tree[step] = [nodes[a], nodes[b], height, size]  # earlier layers first: so a dendrogram keeps their order
        merged = _MERGED_DISTANCE[method](distance[a], distance[b], gaps[a], sizes[a], sizes[b], sizes)
        distance[a] = distance[:, a] = merged
        distance[a, a] = 0
        distance = np.delete(np.delete(distance, b, axis=0), b, axis=1)
        nodes[a], sizes[a] = num_layers + step, size
        nodes, sizes = np.delete(nodes, b), np.delete(sizes, b)
    return tree


def _distance_matrix(similarity_matrix: np.ndarray) -> np.ndarray:
    """1 - similarity as an exactly symmetric float64 matrix with a zero diagonal."""
    similarity = np.asarray(similarity_matrix, dtype=np.float64)
    if similarity.ndim != 2 or similarity.shape[0] != similarity.shape[1]:
        raise ValueError(f"The similarity matrix must be square, but has shape {similarity.shape}; {PASS}.")
    if len(similarity) < 2:
        raise ValueError(f"The similarity matrix has fewer than two rows; {PASS} of two or more layers.")
    if not np.isfinite(similarity).all():
        raise ValueError(f"The similarity matrix has NaN or infinite entries; {PASS}.")
    if not np.allclose(similarity, similarity.T, rtol=0, atol=1e-6):
        raise ValueError(f"The similarity matrix must be symmetric; {PASS}.")
    if not np.allclose(similarity.diagonal(), 1, rtol=0, atol=1e-6):
        raise ValueError(f"The similarity matrix must have ones on its diagonal; {PASS}, not distances.")
    distance = np.maximum(1 - (similarity + similarity.T) / 2, 0)
    np.fill_diagonal(distance, 0)
    return distance
