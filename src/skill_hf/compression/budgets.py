"""
Costs that a target can be set for: parameters, multiply-accumulates or time. Each is a polynomial in the numbers of
remaining units: the same code computes the gates' expectation, the cut and the minimum for all of them.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..models.properties import has_gates
from .gates import HardConcreteGate
from .macs import count_macs
from .units import COSTS_OF_CONVOLUTIONS, KINDS, Factor, Units, factors_of, parts_of, units_of


class Left(NamedTuple):
    """Units that a gate leaves: their number, and whether there is any. Numbers or tensors."""

    number: int | torch.Tensor
    some: int | torch.Tensor


@dataclass(frozen=True)
class UnitCosts:
    """
    Cost of a student's units: `fixed + sum of terms`. Each term is a cost times the numbers of units that are its
    factors, such as `channels in * channels out * kernel size`.

    Costs are integers, in a sufficiently small unit of measure.

    Args:
        quantity (`str`): what is counted, in the plural.
        terms (`dict[tuple[Factor, ...], int]`): factors -> cost of one unit of each.
        sizes (`dict[str, int]`): number of the student's units, by the name of their gate.
        fixed (`int`, *optional*, defaults to 0): cost that does not depend on any unit.
    """

    quantity: str
    terms: dict[tuple[Factor, ...], int]
    sizes: dict[str, int] = field(repr=False)
    fixed: int = 0

    def count(self, left: Mapping[str, Left] | None = None):
        """
        Cost of a student with the units `left`, by the names of gates. Units without an entry all stay. A tensor if
        `left` has tensors.
        """
        numbers = {gate: Left(size, int(size > 0)) for gate, size in self.sizes.items()} | (left or {})
        total = self.fixed
        for factors, cost in self.terms.items():
            for gate, some in factors:
                cost = cost * numbers[gate][some]
            total = total + cost
        return total


class Budget(ABC):
    """A cost of a model, of which `target_sparsity` is a share."""

    quantity: str  # what is counted, in the plural

    @abstractmethod
    def total(self, model: PreTrainedModel) -> int:
        """Cost of a teacher or student with all its present units; gates cost nothing."""

    @abstractmethod
    def terms(self, student: PreTrainedModel) -> Iterable[tuple[tuple[Factor, ...], int]]:
        """Factors and costs of the units of a student without a head; costs with the same factors are added up."""

    def unit_costs(self, student: PreTrainedModel) -> UnitCosts:
        """
        The costs of a student with or without gates, with or without a head. The part of its `total` that no unit
        changes, such as the head, is `fixed`.
        """
        costs = _summed(self.quantity, self.terms(student.base_model), student.config)
        return _summed(self.quantity, costs.terms.items(), student.config, self.total(student) - costs.count())


def _summed(quantity: str, terms: Iterable, config: PreTrainedConfig, fixed: int = 0) -> UnitCosts:
    summed: dict[tuple[Factor, ...], int] = {}
    for factors, cost in terms:
        if cost:
            summed[factors] = summed.get(factors, 0) + cost
    return UnitCosts(quantity, summed, {units.gate: units.size for units in units_of(config)}, fixed)


class ParameterBudget(Budget):
    quantity = "parameters"

    def total(self, model: PreTrainedModel) -> int:
        return _numel(model) - sum(_numel(gate) for gate in model.modules() if isinstance(gate, HardConcreteGate))

    def terms(self, student: PreTrainedModel) -> Iterator[tuple[tuple[Factor, ...], int]]:
        parts = parts_of(units_of(student.config))
        for name, parameter in student.named_parameters():
            if name in parts and not name.endswith(".log_alpha"):
                yield factors_of(parts[name]), _of_one_unit(parameter, parts[name])


@dataclass(frozen=True)
class MacBudget(Budget):
    """
    Multiply-accumulates of one forward pass over one clip, as counted by [`~skill_hf.analysis.count_macs`].

    Convolutions are counted at their own frame rates. Part of the cost of a head grows with the square of the number
    of frames, so it depends on the length of the clip.

    Args:
        seconds (`float`, *optional*, defaults to 10.0): length of the clip.
        sampling_rate (`int`, *optional*, defaults to 16000): sampling rate in Hz.
    """

    seconds: float = 10.0
    sampling_rate: int = 16_000

    @property
    def quantity(self) -> str:
        return f"multiply-accumulates for {self.seconds:g} seconds of audio"

    def total(self, model: PreTrainedModel) -> int:
        if has_gates(model):
            with torch.device("meta"), torch.random.fork_rng(devices=[]):
                model = type(model)(model.config)
        return count_macs(model, self.seconds, self.sampling_rate)

    def terms(self, student: PreTrainedModel) -> Iterator[tuple[tuple[Factor, ...], int]]:
        groups = units_of(student.config)
        parts, frames_of, frames = parts_of(groups), {}, round(self.seconds * self.sampling_rate)
        for index, layer in enumerate(student.feature_extractor.conv_layers):
            frames = (frames - layer.conv.kernel_size[0]) // layer.conv.stride[0] + 1
            frames_of[f"feature_extractor.conv_layers.{index}.conv"] = frames
        for name, module in student.named_modules():
            parts_of_weight = parts.get(f"{name}.weight", ())
            if isinstance(module, nn.Linear | nn.Conv1d) and parts_of_weight:
                # A map that all units share runs once for each of them.
                sharing = {units.gate for units, _ in parts_of_weight if name in units.shared}
                factors = tuple(
                    Factor(gate, some and gate not in sharing) for gate, some in factors_of(parts_of_weight)
                )
                yield factors, frames_of.get(name, frames) * _of_one_unit(module.weight, parts_of_weight)
        for units in groups:
            products = KINDS[units.kind].products
            if products is not None:
                yield _factors_within(units), products(student.config, frames)


@dataclass(frozen=True)
class LatencyBudget(Budget):
    """
    Time of one forward pass on a device, predicted from the costs that [`~skill_hf.latency.fit_latency`] fitted to
    measurements there. Heads and feed-forward units cost the same in every layer.

    Args:
        picoseconds (`dict`): the entry with this name in the result of `fit_latency`.
        seconds (`float`, *optional*, defaults to 10.0): length of the measured clips.
        batch_size (`int`, *optional*, defaults to 1): number of clips.
    """

    picoseconds: dict
    seconds: float = 10.0
    batch_size: int = 1

    @property
    def quantity(self) -> str:
        clips = "" if self.batch_size == 1 else f"{self.batch_size} clips of "
        return f"predicted picoseconds for {clips}{self.seconds:g} seconds of audio"

    def total(self, model: PreTrainedModel) -> int:
        return self.predict(model.config)

    def predict(self, config: PreTrainedConfig) -> int:
        """Time of a teacher or student with this configuration."""
        return _summed(self.quantity, self._terms(config), config, self.picoseconds["fixed"]).count()

    def terms(self, student: PreTrainedModel) -> Iterator[tuple[tuple[Factor, ...], int]]:
        return self._terms(student.config)

    def _terms(self, config: PreTrainedConfig) -> Iterator[tuple[tuple[Factor, ...], int]]:
        read = ()  # the channels that a convolution reads: of the first one the waveform alone
        pairs, channels = (self.picoseconds[name] for name in COSTS_OF_CONVOLUTIONS)
        for units in units_of(config):
            kind = KINDS[units.kind]
            if kind.places == "convolution":
                written = Factor(units.gate)
                yield (*read, written), pairs[units.place]
                yield (written,), channels[units.place]
                read = (written,)
            elif kind.part is not None:
                yield _factors_within(units), self.picoseconds[units.kind]
                yield _factors_within(units, some=True), self.picoseconds[kind.shared_cost]
        yield read, self.picoseconds["projection"]


def make_budget(config, sampling_rate: int = 16_000) -> Budget:
    """The budget of a recipe, a [`SkillConfig`], for audio of `sampling_rate`."""
    if config.budget == "latency":
        measured_on = config.latency_costs["measured_on"]
        return LatencyBudget(config.latency_costs["picoseconds"], measured_on["seconds"], measured_on["batch_size"])
    return MacBudget(config.budget_seconds, sampling_rate) if config.budget == "macs" else ParameterBudget()


def _factors_within(units: Units, some: bool = False) -> tuple[Factor, ...]:
    """Factors of the cost of `units` alone, by their number or whether there is any."""
    return (*(Factor(gate, some=True) for gate in units.inside), Factor(units.gate, some))


def _of_one_unit(tensor: torch.Tensor, parts: Iterable) -> int:
    """Number of entries of `tensor` that belong to one unit of each kind it is cut by."""
    number = tensor.numel()
    for units, dim in parts:
        number //= 1 if dim is None else units.size
    return number


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
