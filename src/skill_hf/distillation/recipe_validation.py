"""Checks before training that recipe, teacher and student fit together."""

import dataclasses
import logging
import math

from transformers import PreTrainedModel

from ..compression import pruning
from ..compression.budgets import make_budget
from ..compression.gates import OPEN_SHIFT
from ..compression.units import KINDS, units_of
from ..models.families import empty_student, head_of, student_class
from ..models.loading import check_encoder
from ..models.properties import has_gates, receptive_field
from ..recipe.latency_costs import architecture_differences
from ..recipe.schedule import gate_travel
from ..recipe.skill_config import SkillConfig


logger = logging.getLogger(__name__)


def check_recipe(config: SkillConfig) -> None:
    """
    Checks each field of a recipe again, as fields may have been changed since it was created.

    Raises:
        `ValueError`: if `config` is not a [`SkillConfig`], or a field is out of range.
    """
    if not isinstance(config, SkillConfig):
        raise ValueError(f"`skill_config` must be a SkillConfig, but is a {type(config).__name__}.")
    config.validate()


def check_student(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """
    Raises:
        `ValueError`: if `student`, the initial model, is not a student of the teacher's family, has gates or another
            head than the teacher, or cannot be used.
    """
    expected = student_class(teacher.config.model_type, head_of(teacher))
    is_student = isinstance(student, expected)
    if not is_student or has_gates(student):
        raise ValueError(
            f"`model` must be a {expected.__name__} without gates, but is a {type(student).__name__}"
            f"{' with gates' if is_student else ''}."
        )
    check_encoder(student, "`model`")


def validate_recipe(
    config: SkillConfig, teacher: PreTrainedModel, student: PreTrainedModel, sampling_rate: int = 16_000
) -> None:
    """
    Args:
        config ([`SkillConfig`]): the recipe.
        teacher (`PreTrainedModel`): the encoder to distil.
        student (`PreTrainedModel`): the initial model, without gates.
        sampling_rate (`int`, *optional*, defaults to 16000): sampling rate of the audio.

    Raises:
        `ValueError`: if there are more clusters than layers, a group contains a layer that the teacher does not have,
            the student's width or number of classes differs from the teacher's, it has layers that the teacher does
            not have, the budget's clips are too
            short for one frame, latency was measured for a different architecture, or the gates cannot reach the
            sparsity, or whole layers have gates under a head that weighs them, or frames would be masked by an
            embedding that is not there.
    """
    last = teacher.config.num_hidden_layers
    rows = last + int(config.include_embeddings)
    if config.layer_groups is None and config.num_clusters is not None:
        if config.num_clusters > rows:
            raise ValueError(
                f"`num_clusters` is {config.num_clusters}, but the teacher has only {rows} layers to group."
            )
        config.validate_projection_groups(config.num_clusters)
    for group in config.layer_groups or []:
        for layer in group:
            if layer > last:
                raise ValueError(
                    f"`layer_groups` names layer {layer}, but the teacher's hidden states are 0 to {last}."
                )
    head_sizes = {"CTC": ("vocab_size",), None: ()}.get(head_of(teacher), ("num_labels",))
    for name in ("hidden_size", *head_sizes):
        if getattr(student.config, name) != getattr(teacher.config, name):
            raise ValueError(
                f"`model` has `{name}` {getattr(student.config, name)}, but the teacher has"
                f" {getattr(teacher.config, name)}; they must be equal."
            )
    if "layers" in config.pruning_units and head_of(student) and student.config.use_weighted_layer_sum:
        raise ValueError(
            "`pruning_units` contains layers, but the teacher's head weighs the hidden states of all layers"
            " (`use_weighted_layer_sum`): leave them out."
        )
    if max(student.config.remaining_layers) >= last:
        raise ValueError(
            f"`model` has the teacher's layers {student.config.remaining_layers}, but the teacher has only {last}"
            " layers, numbered from 0."
        )
    if config.student_mask_prob and getattr(student.base_model, "masked_spec_embed", None) is None:
        raise ValueError(
            f"`student_mask_prob` is {config.student_mask_prob}, but this teacher has no embedding for masked frames"
            " (`mask_time_prob` and `mask_feature_prob` of its config are 0): set it to 0."
        )
    samples, min_samples = round(config.budget_seconds * sampling_rate), receptive_field(teacher.config)
    if config.budget == "macs" and samples < min_samples:
        raise ValueError(
            f"`budget_seconds` is {config.budget_seconds}, {samples} samples, but the teacher needs {min_samples} for"
            " one frame."
        )
    if config.budget == "latency":
        measured = config.latency_costs["architecture"]
        differing = architecture_differences(measured, teacher.config, sampling_rate)
        if differing:
            raise ValueError(
                f"`latency_costs` were measured for a different teacher: {'; '.join(differing)}. Measure this one with"
                " examples/calibrate_latency.py."
            )
        for units in units_of(student.config):
            if units.kind in config.pruning_units and KINDS[units.kind].part is None and not units.contains:
                raise ValueError(
                    f"`pruning_units` contains {units.kind}, but `latency_costs` do not tell what they cost: leave"
                    " them out, or set another `budget`."
                )
    gated = empty_student(student.config, head_of(student))
    pruning.add_gates(gated.base_model, config.pruning_units, config.width_multiple)
    budget = make_budget(config, sampling_rate)
    max_sparsity = 1 - pruning.min_cost(gated.base_model, budget.unit_costs(gated)) / budget.total(teacher)
    if config.target_sparsity > max_sparsity:
        raise ValueError(
            f"`target_sparsity` is {config.target_sparsity}, but with `pruning_units` {config.pruning_units} no"
            f" more than {max_sparsity:.3f} of this teacher's {budget.quantity} can be removed."
        )


def warn_of_slow_gates(config: SkillConfig, joint_steps: int) -> None:
    """Warns about a `gate_learning_rate` that is too low for any gate to close in `joint_steps` of stage 1."""
    rate = config.gate_learning_rate
    if rate is None or not joint_steps:
        return
    # A unit is as likely open as closed at OPEN_SHIFT.
    drop = min(KINDS[unit].drop_probability for unit in config.pruning_units)
    distance = math.log((1 - drop) / drop) - OPEN_SHIFT
    if gate_travel(rate, joint_steps) < distance:
        logger.warning(
            "`gate_learning_rate` is %g: in the %d steps of stage 1 a gate moves at most %.1f, but needs %.1f to"
            " close, so no gate can close by itself. Leave it out (%.2g would be used), or raise it or"
            " `max_steps`.",
            rate,
            joint_steps,
            gate_travel(rate, joint_steps),
            distance,
            dataclasses.replace(config, gate_learning_rate=None).resolve_gate_learning_rate(joint_steps),
        )
