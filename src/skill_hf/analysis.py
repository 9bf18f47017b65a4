"""Compares a student with its teacher: the distance at every layer, and the number of multiply-accumulates."""

from .compression.macs import count_macs
from .grouping.layer_distances import layer_distances


__all__ = ["count_macs", "layer_distances"]
