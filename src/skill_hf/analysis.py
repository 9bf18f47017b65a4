"""
Groups the layers of a teacher and compares a student with its teacher: the distance at every layer, and the number of
multiply-accumulates.
"""

from .compression.macs import count_macs
from .grouping.layer_distances import layer_distances
from .grouping.stability import adjusted_rand_index, all_cuts


__all__ = ["adjusted_rand_index", "all_cuts", "count_macs", "layer_distances"]
