"""What the study compares: the methods, their groups of layers, and the order in which they are run."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from skill_hf import SkillConfig, cluster_layers


SEEDS = (0, 1, 2, 3, 4)
SPARSITIES = (0.75, 0.5, 0.9)
CALIBRATION_SIZES = (16, 32, 64, 128, 256, 512)
CALIBRATION_SAMPLES = 256
CALIBRATION_SECONDS = 2.5
MEASURES = ("cka", "cosine", "distillation", "mutual_knn")
LINKAGES = ("average", "single", "complete", "ward")
CLUSTER_NUMBERS = (2, 3, 4, 6, 8)

BASELINES = ("dphubert", "distilhubert", "last layer", "every layer", "one group", "random groups")
VARIANTS = (
    *(f"measure {measure}" for measure in MEASURES[1:]),
    *(f"linkage {linkage}" for linkage in LINKAGES[1:]),
    *(f"{number} clusters" for number in CLUSTER_NUMBERS),
)


@dataclass(frozen=True)
class Method:
    """
    What the loss sees, as fields of [`~skill_hf.SkillConfig`].

    Args:
        layer_groups: groups of hidden states.
        projection_groups: groups that share a projection; by default each has its own.
        student_layers: what predicts a group.
    """

    layer_groups: tuple[tuple[int, ...], ...]
    projection_groups: tuple[tuple[int, ...], ...] | None = None
    student_layers: str = "group"

    def fields(self) -> dict:
        return {
            "layer_groups": [list(group) for group in self.layer_groups],
            "projection_groups": self.projection_groups and [list(group) for group in self.projection_groups],
            "student_layers": self.student_layers,
        }


def method_of(recipe: SkillConfig) -> Method:
    """What the loss of a recipe with groups set by hand sees."""
    sharing = recipe.projection_groups and tuple(map(tuple, recipe.projection_groups))
    return Method(tuple(map(tuple, recipe.layer_groups)), sharing, recipe.student_layers)


def groups_of(name: str, similarity: dict[str, np.ndarray]) -> list[list[int]]:
    """Groups of a method that clusters: `skill` itself and [`VARIANTS`]."""
    kind, _, value = name.rpartition(" ")
    measure, linkage, number = "cka", "average", None
    if kind == "measure":
        measure = value
    elif kind == "linkage":
        linkage = value
    elif value == "clusters":
        number = int(kind)
    return cluster_layers(similarity[measure], SkillConfig(linkage=linkage, num_clusters=number))


def resolve(name: str, similarity: dict[str, np.ndarray], seed: int) -> Method:
    """
    Args:
        name (`str`): `skill`, or one of [`BASELINES`] or [`VARIANTS`].
        similarity (`dict[str, np.ndarray]`): measure -> matrix of the hidden states of the calibration set of `seed`.
        seed (`int`): of random groups.
    """
    num_layers = len(similarity["cka"]) - 1
    if name == "dphubert":
        return method_of(SkillConfig.dphubert(num_layers))
    if name == "distilhubert":
        return method_of(SkillConfig.distilhubert(num_layers))
    if name == "last layer":
        return Method(((num_layers,),))
    if name == "every layer":
        return Method(tuple((layer,) for layer in range(num_layers + 1)))
    if name == "one group":
        return Method((tuple(range(num_layers + 1)),))
    skill = groups_of("skill", similarity)
    if name == "random groups":  # of the sizes that SKILL's have
        order = np.random.default_rng(seed).permutation(num_layers + 1)
        parts = np.split(order, np.cumsum([len(group) for group in skill])[:-1])
        return Method(tuple(sorted(tuple(sorted(part.tolist())) for part in parts)))
    groups = skill if name == "skill" else groups_of(name, similarity)
    return Method(tuple(map(tuple, groups)))


def plan() -> Iterator[tuple[str, float, int]]:
    """
    Method, sparsity and seed of every run, what matters most first; seeds take turns, so that a study that is stopped
    early compares all methods of a block on the same seeds.
    """
    blocks = [
        (("skill", "dphubert"), (0.75, 0.9)),
        (BASELINES[1:], (0.75,)),
        (BASELINES[1:], (0.9,)),
        (("skill", *BASELINES), (0.5,)),
        (VARIANTS, (0.75,)),
    ]
    for methods, sparsities in blocks:
        for seed in SEEDS:
            for sparsity in sparsities:
                for method in methods:
                    yield method, sparsity, seed
