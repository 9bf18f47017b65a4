"""
The recipes of papers, as fields of [`SkillConfig`]. They name every field that the paper states, also those that have
the same default today, so that they stay as published when a default changes.
"""

from . import fields


# The loss of DPHuBERT (arXiv 2305.17651, equation 1) of the states that a recipe selects.
_LOSS = {
    "use_projections": True,
    "projection_groups": None,
    "student_layers": "group",
    "group_weights": "equal",
    "normalize_states": False,
    "l1_weight": 1.0,
    "l2_weight": 0.0,
    "cosine_weight": 1.0,
}
# Its pruning and its two stages (section 3.1), for a run of 75 000 steps.
_PRUNING = {
    "target_sparsity": 0.75,
    "budget": "parameters",
    "sparsity_warmup_steps": 5_000,
    "pruning_units": ["conv_channels", "attention_heads", "ffn_dims"],
    "width_multiple": 1,
    "lagrange_multiplier": "learned",
    "gate_learning_rate": 0.02,
    "shared_gate_noise": False,
    "shrink_steps": 0,
    "final_steps": 25_000,
    "final_learning_rate": 1e-4,
    "final_warmup_steps": 5_000,
}


def dphubert_layers(num_layers: int) -> list[list[int]]:
    """
    DPHuBERT (arXiv 2305.17651) distils hidden states 0, 4, 8 and 12 of 12 layers: the first, the last and two between
    them at equal steps. The same of `num_layers`, to the nearest layer: 0, 3, 5 and 8 of 8.

    Raises:
        `ValueError`: if `num_layers` is not an integer of at least 1.
    """
    num_layers = fields.whole(1)("num_layers", num_layers)
    return [[round(num_layers * third / 3)] for third in range(4)]


def skill() -> dict:
    """See [`SkillConfig.skill`]."""
    return _LOSS | _PRUNING | {"layer_groups": None}


def dphubert(num_layers: int) -> dict:
    """See [`SkillConfig.dphubert`]."""
    groups = {"layer_groups": dphubert_layers(num_layers), "projection_groups": [[0], [1, 2, 3]]}
    return _LOSS | _PRUNING | groups


def distilhubert(num_layers: int) -> dict:
    """See [`SkillConfig.distilhubert`]."""
    return _LOSS | {"layer_groups": dphubert_layers(num_layers)[1:], "student_layers": "last"}
