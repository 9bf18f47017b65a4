"""
From gates to a smaller model: where each prunable unit's gate acts, the exact expected cost, and the cut.

The gated model in eval mode and the pruned model give the same outputs. Two places where the peers break this:
LayerNorm over gated channels (see [`~skill_hf.gates.KeptLayerNorm`]), and the relative position embedding, which here
belongs to no head and stays when layer 0 loses its attention.
"""

import bisect
import copy
import math
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import nn

from .budgets import ParameterBudget, UnitCosts
from .gates import DrawHook, GatedForward, GateHook, HardConcreteGate, KeptLayerNorm


# Probability that a unit is closed to begin with (DPHuBERT, arXiv 2305.17651).
DROP_PROBABILITY = {
    "conv_channels": 0.01,
    "attention_heads": 0.01,
    "ffn_dims": 0.5,
    "attention_blocks": 0.01,
    "ffn_blocks": 0.01,
}

# A unit that is open in fewer than 1 of 100 steps counts as closed for good. Its weights hardly learn any more and the
# others have learnt to do without it; back to even odds are 4.6 of `log_alpha`, 230 steps all in one direction at the
# recipe's rate of 0.02.
CLOSED_PROBABILITY = 0.01

# Share of the cost asked for within which `fit_gates` leaves it.
FIT_TOLERANCE = 0.002


def add_gates(
    student, units: Iterable[str] = ("conv_channels", "attention_heads", "ffn_dims"), width_multiple: int = 1
) -> None:
    """
    Puts a [`~skill_hf.gates.HardConcreteGate`] on each of `units`, in place. From then on a forward in training draws
    the gates at random, once per forward; in eval mode their deterministic values count.

    Args:
        student (`WavLMForSkillStudent`): may be pruned already; what was cut stays cut.
        units (`Iterable[str]`):
            Any of `conv_channels`, `attention_heads`, `ffn_dims`, `attention_blocks`, `ffn_blocks`.
        width_multiple (`int`, *optional*, defaults to 1):
            What `prune` rounds the channels of a convolution and the units of a feed-forward block to a multiple of,
            where there are as many. Heads have a width of their own.

    Raises:
        `ValueError`: if the student has gates already, or a unit is unknown.
    """
    units = list(units)
    unknown = set(units) - set(DROP_PROBABILITY)
    if unknown or not units:
        raise ValueError(f"`units` must be some of {', '.join(DROP_PROBABILITY)}, but is {units}.")
    if named_gates(student):
        raise ValueError("The student has gates already; call `prune()` before adding new ones.")

    def new_gate(owner: nn.Module, name: str, unit: str, size: int, min_open: int = 0) -> HardConcreteGate:
        multiple_of = width_multiple if unit in ("conv_channels", "ffn_dims") else 1
        gate = HardConcreteGate(size, DROP_PROBABILITY[unit], min_open, multiple_of).to(student.device)
        gate.train(student.training)
        setattr(owner, name, gate)
        return gate

    def act_on_inputs(module: nn.Module, gate: HardConcreteGate, repeats: int = 1) -> None:
        module.forward = GatedForward(module, gate, repeats)

    if "conv_channels" in units:
        conv_layers = student.feature_extractor.conv_layers
        for index, layer in enumerate(conv_layers):
            # Without a single channel there would be no features at all.
            gate = new_gate(layer, "channel_gate", "conv_channels", layer.conv.out_channels, min_open=1)
            if isinstance(getattr(layer, "layer_norm", None), nn.LayerNorm):
                layer.layer_norm = KeptLayerNorm(layer.layer_norm, gate)
            if index + 1 < len(conv_layers):
                act_on_inputs(conv_layers[index + 1].conv, gate)
        # The last gate acts behind the projection's norm: before it, a value between 0 and 1 could be folded into
        # nothing. There it scales the columns of the projection, and the cut convolutions stay stock ones.
        projection = student.feature_projection
        projection.layer_norm = KeptLayerNorm(projection.layer_norm, gate)
        act_on_inputs(projection.projection, gate)
    for layer in student.encoder.layers:
        attention, feed_forward = layer.attention, layer.feed_forward
        if "attention_heads" in units and attention.heads:
            gate = new_gate(attention, "head_gate", "attention_heads", len(attention.heads))
            act_on_inputs(attention.out_proj, gate, attention.head_dim)
        if "attention_blocks" in units and attention.output is not None:
            gate = new_gate(attention, "block_gate", "attention_blocks", 1)
            attention.output.register_forward_hook(GateHook(gate))
        if "ffn_dims" in units and feed_forward.intermediate_dense is not None:
            gate = new_gate(feed_forward, "dim_gate", "ffn_dims", feed_forward.intermediate_dense.out_features)
            act_on_inputs(feed_forward.output_dense, gate)
        if "ffn_blocks" in units and feed_forward.output is not None:
            gate = new_gate(feed_forward, "block_gate", "ffn_blocks", 1)
            feed_forward.output.register_forward_hook(GateHook(gate))
    student._gate_settings = {"units": units, "width_multiple": width_multiple}
    student._gate_draw = DrawHook([gate for _, gate in named_gates(student)])
    student._gate_draw_handle = student.register_forward_pre_hook(student._gate_draw)


def named_gates(student) -> list[tuple[str, HardConcreteGate]]:
    """Pairs of name (such as `encoder.layers.0.attention.head_gate`) and gate."""
    return [(name, module) for name, module in student.named_modules() if isinstance(module, HardConcreteGate)]


def seed_gates(student, seed: int | None) -> None:
    """Makes the noise of the next forwards a function of `seed` alone; `None` returns to torch's global generator."""
    student._gate_draw.seed = seed


def num_parameters(student) -> int:
    """Number of parameters of the student as it stands, with all of its units; gates don't count."""
    return ParameterBudget().total(student)


def num_expected_parameters(student) -> torch.Tensor:
    """
    Expected number of parameters of the model that pruning would leave, a differentiable scalar (float64 where the
    device has it). Exact: neighbouring gates multiply, for instance `E[channels in] E[channels out] kernel_size`
    weights of a convolution, a closed block costs nothing, and all that has no gate is counted too. Without gates it
    is the number of parameters.
    """
    return expected_cost(student, ParameterBudget().unit_costs(student))


def expected_cost(student, costs: UnitCosts) -> torch.Tensor:
    """
    Expected cost of a model that is drawn by the gates' probabilities, as exact and as differentiable.

    The cut rounds instead of drawing. With gates of whole blocks the two can be far apart while gates are undecided: a
    block that is open with a probability of 0.6 counts 0.6 of its units here, but the cut keeps it with all of them.
    [`fit_gates`] goes by what the cut leaves and makes up for the difference.
    """
    gates = [gate for _, gate in named_gates(student)]
    if not gates:
        return torch.tensor(costs.count(student, lambda gate: (gate.size, 1)), dtype=torch.float64)
    # All gates at once: a GPU takes as long for a short tensor.
    log_odds = torch.cat([gate.log_odds() for gate in gates])
    log_odds = log_odds if log_odds.device.type == "mps" else log_odds.double()
    sizes = [gate.size for gate in gates]
    num_open = torch.stack([of.sum() for of in torch.sigmoid(log_odds).split(sizes)])
    all_closed = torch.stack([of.sum() for of in nn.functional.logsigmoid(-log_odds).split(sizes)]).exp()
    expected = dict(zip(gates, zip(num_open.unbind(), (1 - all_closed).unbind(), strict=True), strict=True))
    return costs.count(student, expected.__getitem__)


def cost_after_pruning(student, costs: UnitCosts) -> int:
    """Cost of the model that `prune` would leave now."""
    return costs.count(student, lambda gate: (gate.num_open(), gate.num_open() > 0))


def min_cost(student, costs: UnitCosts) -> int:
    """Cost of what would be left with every gate closed: no sparsity beyond it can be reached."""
    return costs.count(student, lambda gate: (gate.min_open, gate.min_open > 0))


@torch.no_grad()
def fit_gates(student, wanted: int, costs: UnitCosts | None = None) -> float:
    """
    Shifts the `log_alpha` that units are chosen by, all by one common number that is found by bisection, so that
    `prune` leaves what was asked for; where whole units do not allow that, those of the finest kind of unit by a
    further one. Returns the common shift.

    The shift chooses units and does nothing else: `log_alpha` stays, and units that are kept keep the larger of their
    values before and after it (see [`~skill_hf.gates.HardConcreteGate`]).

    Args:
        student (`WavLMForSkillStudent`): with gates.
        wanted (`int`): what is to be left.
        costs ([`~skill_hf.budgets.UnitCosts`], *optional*): in which it is counted; parameters by default.

    Raises:
        `ValueError`: if even closing every gate leaves more than `wanted`.
    """
    costs = ParameterBudget().unit_costs(student) if costs is None else costs
    least = min_cost(student, costs)
    if wanted < least:
        raise ValueError(
            f"No setting of the gates leaves {wanted:,} {costs.noun}: what has no gate is {least:,} already. Lower"
            " `target_sparsity` or add `pruning_units`."
        )
    gates = [gate for _, gate in named_gates(student)]
    # A shift moves whole heads, channels and blocks. It stops below the cost that is asked for, and the finest units
    # that can fill what is left.
    shift = _bisect_shift(student, gates, wanted, costs, below=True)
    for kind in (".dim_gate", ".channel_gate", ".head_gate", ".block_gate"):
        if abs(cost_after_pruning(student, costs) - wanted) <= FIT_TOLERANCE * wanted:
            break
        of_kind = [gate for name, gate in named_gates(student) if name.endswith(kind)]
        if of_kind:
            _bisect_shift(student, of_kind, wanted, costs)
    return shift


def _bisect_shift(student, gates: list[HardConcreteGate], wanted: int, costs: UnitCosts, below: bool = False) -> float:
    """Adds to the shift of `gates` what makes `prune` leave the cost nearest to `wanted`, or just below."""
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
    Cuts every unit whose gate is closed in eval mode, folds the values of the open gates into the next linear map, and
    removes the gates, in place. The outputs are those of the gated student in eval mode.

    Raises:
        `ValueError`: if the student has no gates.
    """
    if not hasattr(student, "_gate_draw"):
        raise ValueError("The student has no gates to prune by; call `add_gates()` first.")
    cut = Cut(student, {name: gate.deterministic().nonzero().flatten() for name, gate in named_gates(student)})
    _rebuild(student, cut.config, cut(_folded(student)))
    student._gate_draw_handle.remove()
    del student._gate_draw, student._gate_draw_handle, student._gate_settings


@torch.no_grad()
def shrink(student, wanted: int, costs: UnitCosts) -> "Cut | None":
    """
    Cuts the units that are closed for good, in place, and keeps the gates of the others with their values.

    Closed for good are units that are open with a probability below `CLOSED_PROBABILITY` and closed in eval mode.
    Where all of them are more than the target asks for, those most likely to open stay, and so they do where the rest
    would be no multiple of the gate's `multiple_of`. The outputs in eval mode remain what they are as long as the
    probabilities of the units that go, which are counted no more, do not sum up to another whole unit that is open. In
    training the noise of the gates is drawn for the units that there are, so that the draws of one seed are others
    than before.

    Args:
        student (`WavLMForSkillStudent`): with gates.
        wanted (`int`): cost that `prune` shall leave in the end; no less is left now.
        costs ([`~skill_hf.budgets.UnitCosts`]): in which it is counted.

    Returns:
        [`Cut`] to be applied to whatever else belongs to the parameters; `None` if nothing was cut.
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
        left = {gate: int(kept.sum()) for gate, kept in kept_at(threshold).items()}
        return costs.count(student, lambda gate: (left[gate], int(left[gate] > 0)))

    candidates = torch.cat([probabilities[gate][closed[gate]] for _, gate in gates]).unique()
    candidates = [*candidates[candidates < CLOSED_PROBABILITY].tolist(), CLOSED_PROBABILITY]
    number = bisect.bisect_right(candidates, -wanted, key=lambda threshold: -cost_at(threshold))
    kept = kept_at(candidates[max(number - 1, 0)])
    if all(of_gate.all() for of_gate in kept.values()):
        return None
    cut = Cut(student, {name: kept[gate].nonzero().flatten().to(gate.log_alpha.device) for name, gate in gates})
    _rebuild(student, cut.config, cut(student.state_dict()), student._gate_settings)
    student._gate_draw.gates = [gate for _, gate in named_gates(student)]
    return cut


class Cut:
    """
    What is left of a student if some of its units go: a plan that is applied to its weights, and to any other tensors
    that belong to its parameters, such as the moments of an optimizer.

    Args:
        student (`WavLMForSkillStudent`): with gates.
        kept (`dict[str, torch.LongTensor]`): ascending indices of the units that stay, by the name of their gate.

    Attributes:
        config (`WavLMSkillStudentConfig`): of the student that is left.
    """

    def __init__(self, student, kept: dict[str, torch.Tensor]):
        self.config = config = copy.deepcopy(student.config)
        self._places: dict[str, list[tuple[int, torch.Tensor]]] = defaultdict(list)
        self._gone: set[str] = set()
        self._renamed: dict[str, str] = {}
        names = list(student.state_dict())

        def units_left(gate: str, size: int) -> torch.Tensor:
            return kept[gate] if gate in kept else torch.arange(size, device=student.device)

        def take(name: str, dim: int, indices: torch.Tensor) -> None:
            self._places[name].append((dim, indices))

        def drop(prefix: str, *, but: tuple[str, ...] = ()) -> None:
            but = tuple(prefix + name for name in but)
            self._gone.update(name for name in names if name.startswith(prefix) and not name.startswith(but))

        def leave_bias(block: str, projection: str) -> None:
            """A projection without inputs leaves its bias, if it has not done so already."""
            self._renamed[f"{block}{projection}.bias"] = f"{block}output_bias.bias"

        config.conv_dim = []
        indices = None
        for index, layer in enumerate(student.feature_extractor.conv_layers):
            prefix = f"feature_extractor.conv_layers.{index}."
            if indices is not None:
                take(f"{prefix}conv.weight", 1, indices)
            indices = units_left(f"{prefix}channel_gate", layer.conv.out_channels)
            for name in ("conv.weight", "conv.bias", "layer_norm.weight", "layer_norm.bias", "channel_gate.log_alpha"):
                take(prefix + name, 0, indices)
            config.conv_dim.append(len(indices))
        for name in ("layer_norm.weight", "layer_norm.bias"):
            take(f"feature_projection.{name}", 0, indices)
        take("feature_projection.projection.weight", 1, indices)

        for index, layer in enumerate(student.encoder.layers):
            attention, feed_forward = layer.attention, layer.feed_forward
            prefix = f"encoder.layers.{index}.attention."
            block = units_left(f"{prefix}block_gate", int(attention.output is not None))
            heads = units_left(f"{prefix}head_gate", len(attention.heads))
            if not len(block):
                heads = heads[:0]
                drop(prefix, but=("rel_attn_embed",))
            elif not len(heads):
                leave_bias(prefix, "out_proj")
                drop(prefix, but=("rel_attn_embed", "out_proj.bias", "output_bias", "block_gate"))
            else:
                dims = torch.arange(attention.head_dim, device=heads.device)
                rows = (heads[:, None] * attention.head_dim + dims).flatten()
                for name in ("q_proj", "k_proj", "v_proj"):
                    take(f"{prefix}{name}.weight", 0, rows)
                    take(f"{prefix}{name}.bias", 0, rows)
                take(f"{prefix}gru_rel_pos_const", 1, heads)
                take(f"{prefix}out_proj.weight", 1, rows)
                take(f"{prefix}head_gate.log_alpha", 0, heads)
            config.remaining_heads[index] = [attention.heads[head] for head in heads.tolist()]
            _record_removed(config.removed_attention_blocks, index, not len(block))

            prefix = f"encoder.layers.{index}.feed_forward."
            dense = feed_forward.intermediate_dense
            block = units_left(f"{prefix}block_gate", int(feed_forward.output is not None))
            units = units_left(f"{prefix}dim_gate", 0 if dense is None else dense.out_features)
            if not len(block):
                units = units[:0]
                drop(prefix)
            elif not len(units):
                leave_bias(prefix, "output_dense")
                drop(prefix, but=("output_dense.bias", "output_bias", "block_gate"))
            else:
                take(f"{prefix}intermediate_dense.weight", 0, units)
                take(f"{prefix}intermediate_dense.bias", 0, units)
                take(f"{prefix}output_dense.weight", 1, units)
                take(f"{prefix}dim_gate.log_alpha", 0, units)
            config.intermediate_sizes[index] = len(units)
            _record_removed(config.removed_ffn_blocks, index, not len(block))

    def name_of(self, name: str) -> str | None:
        """What the parameter `name` is called in the student that is left; `None` if it is gone."""
        return None if name in self._gone else self._renamed.get(name, name)

    def tensor(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """What is left of `tensor`, which has the shape of the parameter `name`."""
        for dim, indices in self._places.get(name, ()):
            tensor = tensor.index_select(dim, indices)
        return tensor

    def __call__(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What is left of `tensors`, by the names of before, under their new names."""
        left = {name: tensor for name, tensor in tensors.items() if name not in self._gone}
        return {self.name_of(name): self.tensor(name, tensor) for name, tensor in left.items()}


def _folded(student) -> dict[str, torch.Tensor]:
    """The state dict without gates, with the gates' values in eval mode multiplied into the next linear map."""
    gates = dict(named_gates(student))
    prefixes = tuple(f"{name}." for name in gates)
    state = {name: tensor for name, tensor in student.state_dict().items() if not name.startswith(prefixes)}

    def value(name: str, size: int) -> torch.Tensor:
        return gates[name].deterministic() if name in gates else torch.ones(size, device=student.device)

    def scale(name: str, by: torch.Tensor) -> None:
        if name in state:
            state[name] = state[name] * by.to(state[name].dtype)

    conv_layers = student.feature_extractor.conv_layers
    for index, layer in enumerate(conv_layers):
        channels = value(f"feature_extractor.conv_layers.{index}.channel_gate", layer.conv.out_channels)
        if index + 1 < len(conv_layers):
            scale(f"feature_extractor.conv_layers.{index + 1}.conv.weight", channels[:, None])
        else:
            scale("feature_projection.projection.weight", channels)
    for index, layer in enumerate(student.encoder.layers):
        attention, dense = layer.attention, layer.feed_forward.intermediate_dense
        prefix = f"encoder.layers.{index}.attention."
        block, heads = value(f"{prefix}block_gate", 1), value(f"{prefix}head_gate", len(attention.heads))
        scale(f"{prefix}out_proj.weight", heads.repeat_interleave(attention.head_dim) * block)
        for name in ("out_proj.bias", "output_bias.bias"):
            scale(prefix + name, block)
        prefix = f"encoder.layers.{index}.feed_forward."
        block = value(f"{prefix}block_gate", 1)
        units = value(f"{prefix}dim_gate", 0 if dense is None else dense.out_features)
        scale(f"{prefix}output_dense.weight", units * block)
        for name in ("output_dense.bias", "output_bias.bias"):
            scale(prefix + name, block)
    return state


def _rebuild(student, config, state: dict[str, torch.Tensor], gates: dict | None = None) -> None:
    """Gives the student, in place, the layers of `config`, gates by these settings, and the tensors of `state`."""
    trainable = {name: parameter.requires_grad for name, parameter in student.named_parameters()}
    # The weights are replaced at once: no memory for them, and no draw from the random generator.
    with torch.random.fork_rng(devices=[]):
        with torch.device("meta"):
            rebuilt = type(student)(config)
        if gates is not None:
            add_gates(rebuilt, **gates)
    rebuilt.load_state_dict(state, assign=True)
    rebuilt.train(student.training)
    checkpointing = any(getattr(module, "gradient_checkpointing", False) for module in student.modules())
    rebuilt.feature_extractor._requires_grad = student.feature_extractor._requires_grad
    for name, child in rebuilt.named_children():
        setattr(student, name, child)
    set_trainable(student, trainable)
    # The object stays what it is, since a task head on top of the student has the same one.
    vars(student.config).update(vars(config))
    for module in student.modules():
        if hasattr(module, "config"):
            module.config = student.config
    # transformers installs the hooks that collect hidden states once; the new layers have none yet.
    student._output_capturing_hooks_installed = False
    if checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})


def set_trainable(student, trainable: dict[str, bool]) -> None:
    """Has each parameter of a pruned student require a gradient if it did before, by its name of then."""
    for name, parameter in student.named_parameters():
        if name not in trainable:  # the bias that a projection has left
            projection = "out_proj" if ".attention." in name else "output_dense"
            name = name.replace("output_bias", projection)
        parameter.requires_grad_(trainable[name])


def _record_removed(removed: list[int], index: int, gone: bool) -> None:
    if gone and index not in removed:
        removed.append(index)
        removed.sort()
