"""The groups of layers for every number of groups, and how far they depend on the audio."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy.special import comb

from ..recipe.skill_config import SkillConfig
from .clustering import cluster_layers, layer_tree, silhouettes


@dataclass
class Cut:
    """
    One cut of the tree of layers.

    Args:
        groups (`list[list[int]]`): rows of the similarity matrix, as [`cluster_layers`] gives them.
        height (`float`): distance (1 - similarity) of the last merge that gave these groups; 0 for one layer each.
        silhouette (`float`, *optional*): mean silhouette; `None` for one group and for one group per layer.
        stability (`float`, *optional*): mean adjusted Rand index of the groups that any two parts of the audio give by
            themselves; `None` without two parts.
    """

    groups: list[list[int]]
    height: float
    silhouette: float | None
    stability: float | None


def all_cuts(similarity: np.ndarray, skill_config: SkillConfig, parts: Sequence[np.ndarray] = ()) -> list[Cut]:
    """
    The groups for every number of them, from one group of all N layers to N groups of one.

    Stability compares clusterings of disjoint samples, as von Luxburg (arXiv 1007.1075, section 2) describes. A part
    has less audio than the whole, so that the groups of the whole are steadier than this says.

    Args:
        similarity (`numpy.ndarray` of shape `(N, N)`): of all audio.
        skill_config ([`SkillConfig`]): recipe; `linkage` and `contiguous` are read.
        parts (`Sequence[numpy.ndarray]`, *optional*): similarity of disjoint parts of the audio, each of shape
            `(N, N)`, as [`layer_similarity`] gives them with `num_parts`.

    Raises:
        `ValueError`: if a matrix is not a similarity matrix of two layers or more.
    """
    tree, scores = layer_tree(similarity, skill_config), silhouettes(similarity, skill_config)
    num_layers = len(tree) + 1
    cuts = []
    for count in range(1, num_layers + 1):
        config = dataclasses.replace(skill_config, num_clusters=count, distance_threshold=None, layer_groups=None)
        groups, *groups_of_parts = [cluster_layers(matrix, config) for matrix in (similarity, *parts)]
        agreements = [adjusted_rand_index(*pair) for pair in combinations(groups_of_parts, 2)]
        height = float(tree[num_layers - 1 - count, 2]) if count < num_layers else 0.0
        cuts.append(Cut(groups, height, scores.get(count), float(np.mean(agreements)) if agreements else None))
    return cuts


def adjusted_rand_index(groups: list[list[int]], others: list[list[int]]) -> float:
    r"""
    How far two partitions of the same layers agree: 1 if they are equal, 0 on average if they are drawn at random.

    `(n - e) / (m - e)` with `n` the number of pairs of layers that both partitions keep together, `a` and `b` those
    that either does, `e = a b / (N (N - 1) / 2)` the number expected by chance and `m = (a + b) / 2`; Hubert and
    Arabie (1985), doi 10.1007/BF01908075, equation 5. Two partitions of one group, or of one group per layer, agree.

    Args:
        groups, others (`list[list[int]]`): partitions, each with every layer in exactly one group.

    Raises:
        `ValueError`: if they are not partitions of the same layers.
    """
    layers = [sorted(layer for group in partition for layer in group) for partition in (groups, others)]
    if layers[0] != layers[1] or len(set(layers[0])) != len(layers[0]):
        raise ValueError(f"{groups} and {others} are not partitions of the same layers; give each layer one group.")
    shared = sum(comb(len(set(group) & set(other)), 2) for group in groups for other in others)
    pairs, other_pairs = (sum(comb(len(group), 2) for group in partition) for partition in (groups, others))
    expected = pairs * other_pairs / max(comb(len(layers[0]), 2), 1)
    largest = (pairs + other_pairs) / 2
    return float((shared - expected) / (largest - expected)) if largest > expected else 1.0


def mean_differences(parts: Sequence[np.ndarray], other_parts: Sequence[np.ndarray]) -> tuple[float, float] | None:
    """
    How far two sets of audio differ, beside how far parts of the same set do. Both compare parts of one size, so that
    chance alone makes them equal.

    Args:
        parts, other_parts (`Sequence[numpy.ndarray]`): similarity of disjoint parts of either set, each of shape
            `(N, M)`.

    Returns:
        `tuple[float, float]`: mean absolute difference of entries between a part of one set and a part of the other,
        and between two parts of the same set. `None` without two parts of each set.
    """
    if min(len(parts), len(other_parts)) < 2:
        return None
    across = [np.abs(one - other).mean() for one in parts for other in other_parts]
    within = [np.abs(one - other).mean() for same in (parts, other_parts) for one, other in combinations(same, 2)]
    return float(np.mean(across)), float(np.mean(within))
