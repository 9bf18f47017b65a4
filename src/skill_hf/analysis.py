"""
How the layers of a teacher group, and what distillation has left of it: how far the student is from it at every layer,
and how much it computes.
"""

from .compression.macs import count_macs
from .grouping.layer_distances import layer_distances
from .grouping.stability import adjusted_rand_index, all_cuts


__all__ = ["adjusted_rand_index", "all_cuts", "count_macs", "layer_distances"]
