"""
From gates to a smaller model: placing gates, the exact expected cost, and the cut.

The gated model in eval mode and the pruned model give the same outputs. Other implementations violate this in two
places: LayerNorm over gated channels (see [`KeptLayerNorm`]), and the relative position embedding, which here does not
belong to a head and stays when layer 0 loses its attention.
"""

import bisect
import copy
import itertools
import math
import re
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import nn

from ..models.properties import has_gates
from .budgets import Left, ParameterBudget, UnitCosts
from .gates import BypassHook, GateHook, Gating, HardConcreteGate, KeptLayerNorm, as_columns, gate_inputs, spread
from .units import DEFAULT_KINDS, KINDS, Units, factors_of, module_at, parts_of, units_of


# A unit that is open in fewer than 1 of 100 steps counts as closed for good. Its weights hardly learn any more and the
# others have learnt to do without it; back to even odds are 4.6 of `log_alpha`, 230 steps all in one direction at the
# recipe's rate of 0.02.
CLOSED_PROBABILITY = 0.01

# Share of the cost asked for within which `fit_gates` leaves it.
FIT_TOLERANCE = 0.002

_LAYER = re.compile(r"encoder\.layers\.(\d+)\.(.+)")
# WavLM's first layer stores what all layers use, whichever layer of the teacher that is.
_OF_FIRST_LAYER = "attention.rel_attn_embed.weight"


def add_gates(student, units: Iterable[str] | None = None, width_multiple: int = 1) -> None:
    """
    Puts a [`HardConcreteGate`] on each of `units`, in place. From then on, gates are drawn at random once per forward
    pass in training, and have deterministic values in eval mode.

    Args:
        student (`WavLMForSkillStudent`): may be pruned already; removed units stay removed.
        units (`Iterable[str]`, *optional*):
            Kinds of units, any of [`KINDS`]: `conv_channels`, `attention_heads`, `ffn_dims`, `attention_value_dims`,
            `attention_blocks`, `ffn_blocks`, `layers`. The first three by default. The first layer is never removed.
        width_multiple (`int`, *optional*, defaults to 1):
            `prune` rounds the channels of a convolution and the units of a feed-forward block to a multiple of this,
            if there are that many. It does not apply to heads.

    Raises:
        `ValueError`: if the student already has gates, or a kind of unit is unknown.
    """
    kinds = list(DEFAULT_KINDS if units is None else units)
    if set(kinds) - set(KINDS) or not kinds:
        raise ValueError(f"`units` must be one or more of {', '.join(KINDS)}, but is {kinds}.")
    if has_gates(student):
        raise ValueError("The student already has gates; call `prune()` before adding new ones.")
    if "attention_value_dims" in kinds:
        sort_values(student)
    for group in units_of(student.config):
        if group.kind in kinds and group.size and group.place >= KINDS[group.kind].first_prunable:
            _add_gate(student, group, width_multiple)
    student.gating = Gating([gate for _, gate in named_gates(student)], kinds, width_multiple)
    student.gating.handle = student.register_forward_pre_hook(student.gating)


@torch.no_grad()
def sort_values(student) -> None:
    """
    Sorts the dimensions of each head's values, in place, by the product of the norms of what they read and write: the
    unit "dimension i of all heads" then is the i-th most important of each. Outputs stay the same, since a head sums
    over these dimensions in any order.
    """
    for layer in student.encoder.layers:
        attention = layer.attention
        if not attention.heads:
            continue
        read, write = attention.v_proj, attention.out_proj
        # (heads, value_size)
        norms = (read.weight.norm(dim=1) * write.weight.norm(dim=0)).unflatten(0, (-1, attention.value_size))
        order = norms.argsort(dim=1, descending=True, stable=True)
        first = torch.arange(len(order), device=order.device)[:, None] * attention.value_size
        order = (order + first).flatten()
        read.weight.copy_(read.weight[order])
        read.bias.copy_(read.bias[order])
        write.weight.copy_(write.weight[:, order])


def _add_gate(student, units: Units, width_multiple: int) -> None:
    kind = KINDS[units.kind]
    multiple_of = width_multiple if kind.has_multiples else 1
    gate = HardConcreteGate(
        units.size, kind.drop_probability, kind.min_open, multiple_of, is_binary=units.bypassed is not None
    ).to(student.device)
    gate.train(student.training)
    _set_module(student, units.gate, gate)
    for name in units.norms:
        norm = module_at(student, name)
        if isinstance(norm, nn.LayerNorm):
            _set_module(student, name, KeptLayerNorm(norm, gate))
    if units.reader is not None:
        gate_inputs(module_at(student, units.reader), gate, units.recurs)
    for name in units.outputs:
        module = module_at(student, name)
        if module is not None:
            module.register_forward_hook(GateHook(gate))
    if units.bypassed is not None:
        # Before the hooks that collect hidden states.
        module_at(student, units.bypassed).register_forward_hook(BypassHook(gate), prepend=True)


def _set_module(student, name: str, module: nn.Module) -> None:
    owner, _, name = name.rpartition(".")
    setattr(student.get_submodule(owner), name, module)


def named_gates(student) -> list[tuple[str, HardConcreteGate]]:
    """Pairs of name (such as `encoder.layers.0.attention.head_gate`) and gate."""
    return [(name, module) for name, module in student.named_modules() if isinstance(module, HardConcreteGate)]


def seed_gates(student, seed: int | None) -> None:
    """Makes the noise of the next forward passes depend only on `seed`; `None` returns to torch's global generator."""
    student.gating.seed = seed


def num_parameters(student) -> int:
    """Number of parameters of the student with all its present units, without gates."""
    return ParameterBudget().total(student)


def num_expected_parameters(student) -> torch.Tensor:
    """
    Expected number of parameters after pruning, a differentiable scalar (float64 if the device supports it). Exact:
    neighbouring gates multiply, for instance `E[channels in] E[channels out] kernel_size` weights of a convolution, a
    closed block costs nothing, and parameters without gates are counted as well. For a student without gates it is the
    number of parameters.
    """
    return expected_cost(student, ParameterBudget().unit_costs(student))


def expected_cost(student, costs: UnitCosts) -> torch.Tensor:
    """
    Expected cost of a model drawn with the gates' probabilities, exact and differentiable. Without gates it is the
    cost of the student that `costs` belong to.

    The cut rounds instead of drawing. With gates of whole blocks the two can differ considerably while gates are
    undecided: a block with an open probability of 0.6 counts 0.6 of its units here, but the cut keeps all of them.
    [`fit_gates`] uses the cost after the cut and corrects the difference.
    """
    gates = dict(named_gates(student))
    if not gates:
        return torch.tensor(costs.count(), dtype=torch.float64)
    # All gates at once: a GPU takes as long for a short tensor.
    log_odds = torch.cat([gate.log_odds() for gate in gates.values()])
    log_odds = log_odds if log_odds.device.type == "mps" else log_odds.double()
    sizes = [gate.size for gate in gates.values()]
    num_open = torch.stack([probabilities.sum() for probabilities in torch.sigmoid(log_odds).split(sizes)])
    log_closed = nn.functional.logsigmoid(-log_odds)
    all_closed = torch.stack([logarithms.sum() for logarithms in log_closed.split(sizes)]).exp()
    return costs.count(dict(zip(gates, map(Left, num_open.unbind(), (1 - all_closed).unbind()), strict=True)))


def cost_after_pruning(student, costs: UnitCosts) -> int:
    """Cost of the model after `prune` now."""
    return costs.count(_left({name: gate.num_open() for name, gate in named_gates(student)}))


def min_cost(student, costs: UnitCosts) -> int:
    """Cost with every gate closed, the lowest that pruning can reach."""
    return costs.count(_left({name: gate.min_open for name, gate in named_gates(student)}))


def _left(numbers: dict[str, int]) -> dict[str, Left]:
    return {name: Left(number, int(number > 0)) for name, number in numbers.items()}


@torch.no_grad()
def fit_gates(student, wanted: int, costs: UnitCosts | None = None) -> float:
    """
    Shifts the `log_alpha` used to choose units by one common value, found by bisection, so that `prune` leaves the
    cost `wanted`. If whole units do not allow that, the finest kind of unit gets an additional shift. Returns the
    common shift.

    The shift only chooses units: `log_alpha` stays, and remaining units keep the larger of their values before and
    after the shift (see [`~skill_hf.compression.gates.HardConcreteGate`]).

    Args:
        student (`WavLMForSkillStudent`): with gates.
        wanted (`int`): cost to be left.
        costs ([`~skill_hf.compression.budgets.UnitCosts`], *optional*): how cost is counted; parameters by default.

    Raises:
        `ValueError`: if even closing every gate leaves more than `wanted`.
    """
    costs = ParameterBudget().unit_costs(student) if costs is None else costs
    minimum = min_cost(student, costs)
    if wanted < minimum:
        raise ValueError(
            f"The gates cannot reach {wanted:,} {costs.quantity}: the parts without gates already take {minimum:,}."
            " Lower `target_sparsity` or add `pruning_units`."
        )
    gates = dict(named_gates(student))
    # A shift moves whole heads, channels and blocks. It stops below the cost that is asked for, and the finest units
    # that can fill what is left.
    shift = _bisect_shift(student, list(gates.values()), wanted, costs, below=True)
    ranks = {units.gate: KINDS[units.kind].coarseness for units in units_of(student.config)}
    for rank in sorted(set(ranks.values())):
        if abs(cost_after_pruning(student, costs) - wanted) <= FIT_TOLERANCE * wanted:
            break
        same_rank = [gate for name, gate in gates.items() if ranks[name] == rank]
        if same_rank:
            _bisect_shift(student, same_rank, wanted, costs)
    return shift


def _bisect_shift(student, gates: list[HardConcreteGate], wanted: int, costs: UnitCosts, below: bool = False) -> float:
    """Changes the shift of `gates` so that `prune` leaves the cost nearest to `wanted`, or just below."""
    start = [gate.shift for gate in gates]

    def cost_at(shift: float) -> int:
        for gate, before in zip(gates, start, strict=True):
            gate.shift = before + shift
        return cost_after_pruning(student, costs)

    reach = 30.0 + max(gate.log_odds().abs().max().item() for gate in gates)
    low, high = -reach, reach
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if cost_at(middle) < wanted else (low, middle)
    shift = low if below else min((low, high), key=lambda shift: abs(cost_at(shift) - wanted))
    cost_at(shift)
    return shift


@torch.no_grad()
def prune(student) -> None:
    """
    Removes every unit whose gate is closed in eval mode, folds the values of open gates into the next linear map, and
    removes the gates, in place. Outputs stay those of the gated student in eval mode.

    Raises:
        `ValueError`: if the student has no gates.
    """
    if not has_gates(student):
        raise ValueError("The student has no gates to prune with; call `add_gates()` first.")
    cut = _cut_of_closed(student)
    _rebuild(student, cut.config, cut(_folded(student)))
    student.gating.handle.remove()
    student.gating = None


@torch.no_grad()
def config_after_pruning(student):
    """Config of the model that `prune` would leave now; `student` has gates and is not changed."""
    return _cut_of_closed(student).config


def _cut_of_closed(student) -> "Cut":
    return Cut(student, {name: gate.deterministic().nonzero().flatten() for name, gate in named_gates(student)})


@torch.no_grad()
def units_to_keep(student, wanted: int, costs: UnitCosts) -> dict[str, torch.Tensor] | None:
    """
    Indices of the units that are not closed for good, ascending, by the name of their gate; `None` if all stay.

    Units are closed for good if their probability to be open is below `CLOSED_PROBABILITY` and they are closed in eval
    mode. The most likely to open among them stay if removing all would go beyond the target, or if the rest would not
    be a multiple of the gate's `multiple_of`.

    Args:
        student (`WavLMForSkillStudent`): with gates.
        wanted (`int`): cost that `prune` is to leave in the end; at least this is left now.
        costs ([`~skill_hf.compression.budgets.UnitCosts`]): how cost is counted.
    """
    gates = named_gates(student)
    probabilities = {gate: gate.open_probability().cpu() for _, gate in gates}
    closed = {gate: (gate.deterministic() == 0).cpu() for _, gate in gates}

    def kept_at(threshold: float) -> dict[HardConcreteGate, torch.Tensor]:
        kept = {gate: ~(closed[gate] & (probabilities[gate] < threshold)) for _, gate in gates}
        for gate, of_gate in kept.items():
            number = math.ceil(int(of_gate.sum()) / gate.multiple_of) * gate.multiple_of
            # The open ones come first, then the likeliest.
            order = (probabilities[gate] + 2.0 * of_gate).argsort(descending=True, stable=True)
            of_gate[order[:number]] = True
        return kept

    def cost_at(threshold: float) -> int:
        kept = kept_at(threshold)
        return costs.count(_left({name: int(kept[gate].sum()) for name, gate in gates}))

    candidates = torch.cat([probabilities[gate][closed[gate]] for _, gate in gates]).unique()
    candidates = [*candidates[candidates < CLOSED_PROBABILITY].tolist(), CLOSED_PROBABILITY]
    number = bisect.bisect_right(candidates, -wanted, key=lambda threshold: -cost_at(threshold))
    kept = kept_at(candidates[max(number - 1, 0)])
    if all(of_gate.all() for of_gate in kept.values()):
        return None
    return {name: kept[gate].nonzero().flatten().to(gate.log_alpha.device) for name, gate in gates}


@torch.no_grad()
def cut_closed_units(student, wanted: int, costs: UnitCosts) -> "Cut | None":
    """
    Removes the units that are closed for good, in place, and keeps the gates of the others ([`units_to_keep`]) with
    their values.

    Outputs in eval mode do not change unless the probabilities of the removed units, which no longer count, add up to
    another open unit. In training, noise is drawn only for the remaining units, so the same seed gives different draws
    than before.

    Args:
        student, wanted, costs: as for [`units_to_keep`].

    Returns:
        [`Cut`] to apply to other tensors that belong to the parameters; `None` if nothing was removed.
    """
    kept = units_to_keep(student, wanted, costs)
    if kept is None:
        return None
    cut = Cut(student, kept)
    _rebuild(student, cut.config, cut(student.state_dict()), keep_gates=True)
    student.gating.gates = [gate for _, gate in named_gates(student)]
    return cut


class Cut:
    """
    A plan for removing some of a student's units. It is applied to the weights, and to other tensors that belong to
    the parameters, such as the moments of an optimizer.

    Args:
        student (`WavLMForSkillStudent`): with gates.
        kept (`dict[str, torch.LongTensor]`): ascending indices of the units that stay, by the name of their gate.

    Attributes:
        config (`WavLMSkillStudentConfig`): config of the smaller student.
    """

    def __init__(self, student, kept: dict[str, torch.Tensor]):
        self.config = copy.deepcopy(student.config)
        groups = units_of(student.config)
        indices = {
            units.gate: kept.get(units.gate, torch.arange(units.size, device=student.device)) for units in groups
        }
        empty = {gate for gate, of_gate in indices.items() if not len(of_gate)}
        for units in groups:
            if empty.intersection(units.inside):
                indices[units.gate] = indices[units.gate][:0]
        for units in reversed(groups):
            KINDS[units.kind].record(self.config, units.place, indices[units.gate].tolist())
        remaining = student.config.remaining_layers
        self._new_index = {remaining.index(layer): new for new, layer in enumerate(self.config.remaining_layers)}
        empty = {gate for gate, of_gate in indices.items() if not len(of_gate)}
        parts = parts_of(groups)
        self._gone = {name for name in parts if any(gate in empty for gate, _ in factors_of(parts[name]))}
        # A projection without inputs leaves its bias.
        self._renamed = {
            f"{units.reader}.bias": f"{units.left_bias}.bias"
            for units in groups
            if units.left_bias is not None and units.gate in empty
        }
        self._places = {
            name: [(dim, units, indices[units.gate]) for units, dim in of_tensor if dim is not None]
            for name, of_tensor in parts.items()
            if name not in self._gone
        }

    def name_of(self, name: str) -> str | None:
        """Name of the parameter `name` in the smaller student; `None` if it is removed."""
        match = _LAYER.fullmatch(name)
        if match is not None and match[2] == _OF_FIRST_LAYER:
            return f"encoder.layers.0.{match[2]}"
        if name in self._gone or match is not None and int(match[1]) not in self._new_index:
            return None
        name = self._renamed.get(name, name)
        return name if match is None else _LAYER.sub(rf"encoder.layers.{self._new_index[int(match[1])]}.\2", name)

    def tensor(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The remaining part of `tensor`, which has the shape of the parameter `name`."""
        for dim, units, indices in self._places.get(name, ()):
            kept = torch.zeros(units.size, dtype=torch.bool, device=indices.device).index_fill(0, indices, True)
            entries = spread(kept, tensor.shape[dim], units.recurs).nonzero().flatten()
            tensor = tensor.index_select(dim, entries)
        return tensor

    def __call__(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The remaining parts of `tensors` (old name -> tensor), under their new names."""
        names = {name: self.name_of(name) for name in tensors}
        return {new: self.tensor(name, tensors[name]) for name, new in names.items() if new is not None}


def _folded(student) -> dict[str, torch.Tensor]:
    """The state dict without gates, with the gates' values in eval mode multiplied into the next linear map."""
    gates = dict(named_gates(student))
    prefixes = tuple(f"{name}." for name in gates)
    state = {name: tensor for name, tensor in student.state_dict().items() if not name.startswith(prefixes)}
    factors = defaultdict(list)
    for units in units_of(student.config):
        if units.gate not in gates:
            continue
        values = gates[units.gate].deterministic()
        if units.reader is not None:
            weight = f"{units.reader}.weight"
            factors[weight].append(as_columns(values, state[weight], units.recurs))
        for module, kind in itertools.product(units.outputs, ("weight", "bias")):
            factors[f"{module}.{kind}"].append(values)
    for name in factors.keys() & state.keys():
        state[name] = state[name] * math.prod(factors[name]).to(state[name].dtype)
    return state


def _rebuild(student, config, state: dict[str, torch.Tensor], keep_gates: bool = False) -> None:
    """
    Rebuilds the student in place with the layers of `config`, gates with the same settings, and the tensors of
    `state`.
    """
    trainable = {name: parameter.requires_grad for name, parameter in student.named_parameters()}
    layers = student.config.remaining_layers
    # The weights are replaced at once: no memory for them, and no draw from the random generator.
    with torch.random.fork_rng(devices=[]):
        with torch.device("meta"):
            rebuilt = type(student)(config)
        if keep_gates:
            add_gates(rebuilt, student.gating.kinds, student.gating.width_multiple)
    rebuilt.load_state_dict(state, assign=True)
    rebuilt.train(student.training)
    checkpointing = any(getattr(module, "gradient_checkpointing", False) for module in student.modules())
    rebuilt.feature_extractor._requires_grad = student.feature_extractor._requires_grad
    for name, child in rebuilt.named_children():
        setattr(student, name, child)
    # The object stays what it is, since a task head on top of the student has the same one.
    vars(student.config).update(vars(config))
    for module in student.modules():
        if hasattr(module, "config"):
            module.config = student.config
    set_trainable(student, trainable, layers)
    # transformers installs the hooks that collect hidden states once; the new layers have none yet.
    student._output_capturing_hooks_installed = False
    if checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})


def set_trainable(student, trainable: dict[str, bool], layers: list[int]) -> None:
    """
    Restores `requires_grad` of each parameter of a pruned student, with or without a head.

    Args:
        student (`PreTrainedModel`): after pruning.
        trainable (`dict[str, bool]`): the values by the parameters' names before pruning.
        layers (`list[int]`): `remaining_layers` of its config before pruning.
    """

    def name_before(match: re.Match) -> str:
        index = 0 if match[2] == _OF_FIRST_LAYER else layers.index(student.config.remaining_layers[int(match[1])])
        return f"encoder.layers.{index}.{match[2]}"

    prefix = "" if student.base_model is student else f"{student.base_model_prefix}."
    before = {f"{prefix}{units.left_bias}.bias": f"{prefix}{units.reader}.bias" for units in units_of(student.config)}
    for name, parameter in student.named_parameters():
        names = [_LAYER.sub(name_before, name) for name in (name, before.get(name, name))]
        parameter.requires_grad_(trainable[names[0] if names[0] in trainable else names[1]])
