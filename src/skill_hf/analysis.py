"""What distillation has left of a teacher: how far the student is from it at every layer, and how much it computes."""

from .compression.macs import count_macs
from .grouping.layer_distances import layer_distances


__all__ = ["count_macs", "layer_distances"]
