"""
Describes what can be pruned: each kind of unit with its tensors, the layer that reads it, its norms and its size.

Gates, costs, the cut, the folding of gate values, latency measurements, model card and figures use this table. A new
kind is one more entry of `KINDS`, if the student class can be built from what its `record` writes into the config.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from ..models.configuration_skill_student import CUT_TENSORS, CUT_VALUES, PER_LAYER, READERS


@dataclass(frozen=True)
class Units:
    """
    The units of one kind in one place, such as the heads of a layer. Each can be removed independently.

    Modules and tensors are given by their names in the encoder. Names that do not exist there are ignored, so one
    description fits layers with and without biases or norms.

    Args:
        kind (`str`): key of `KINDS`.
        place (`int`): index of the convolution or layer.
        gate (`str`): name of the gate, in the module that the units belong to.
        size (`int`): number of units; 0 if none is left.
        whole (`int`, *optional*): number of units of the teacher, if known from the config.
        indices (`Sequence[int]`, *optional*): their indices in the teacher, if known from the config.
        tensors (`dict[str, int]`): tensors that are cut -> the dimension.
        reader (`str`, *optional*): linear map or convolution that has them as inputs; gates scale its columns.
        recurs (`bool`):
            How units are laid out in a tensor with more entries than units: interleaved (`True`), such as a dimension
            that recurs in each head, or with the entries of a unit next to each other, such as those of a head.
        norms (`tuple[str, ...]`): layer norms over the units.
        shared (`tuple[str, ...]`): modules shared by all units; removed with the last of them.
        left_bias (`str`, *optional*): module that keeps the bias of `reader` when no unit is left.
        outputs (`tuple[str, ...]`): modules whose outputs the gate scales; removed with the unit.
        bypassed (`str`, *optional*):
            Module that a closed unit replaces by its input. No weight can take up another value of such a gate, so in
            eval mode it is 0 or 1.
        contains (`tuple[str, ...]`): modules all of whose units are removed with this unit.
        inside (`tuple[str, ...]`):
            Gates of other units; if the last of those units is removed, so are these. [`units_of`] adds the gates of
            units that contain these.
    """

    kind: str
    place: int
    gate: str
    size: int
    whole: int | None = None
    indices: Sequence[int] | None = None
    tensors: dict[str, int] = field(default_factory=dict)
    reader: str | None = None
    recurs: bool = False
    norms: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    left_bias: str | None = None
    outputs: tuple[str, ...] = ()
    bypassed: str | None = None
    contains: tuple[str, ...] = ()
    inside: tuple[str, ...] = ()

    @property
    def module(self) -> str:
        """Name of the module that the units belong to."""
        return self.gate.rpartition(".")[0]


@dataclass(frozen=True)
class Kind:
    """
    A kind of unit.

    Args:
        find (`Callable`): (config, place) -> [`Units`] of a stock model or a student, also if none is left.
        record (`Callable`):
            (config, place, kept) writes the remaining units into a student's config, in place. Called from the last
            unit of [`units_of`] to the first: places above may be gone.
        places (`str`): `convolution` or `layer`: where such units are.
        drop_probability (`float`): probability that a unit is closed when its gate is made.
        coarseness (`int`): rank by the size of a unit. The finest kinds compensate for the steps of coarser ones.
        is_default (`bool`): whether it is pruned by default.
        min_open (`int`): units of each place that are never cut.
        first_prunable (`int`): first place that has gates.
        has_multiples (`bool`): whether `width_multiple` applies.
        label (`str`, *optional*):
            Name of the units in tables and figures, in the plural. `None` if the numbers of another kind show them.
        shown_by (`str`, *optional*): that other kind. The config then has a list `removed_KIND` of places without any.
        part (`str`, *optional*): name of their module's latency. `None` if it is not measured.
        shared_cost (`str`, *optional*):
            Name of the latency that all units of a layer share. Kinds of layers with a `part` have one.
        first_measured (`int`): first place whose latency counts.
        products (`Callable`, *optional*):
            (config, frames) -> multiply-accumulates of one unit for that many frames, without those of its weights.
    """

    find: Callable
    record: Callable
    places: str
    drop_probability: float
    coarseness: int
    is_default: bool = False
    min_open: int = 0
    first_prunable: int = 0
    has_multiples: bool = False
    label: str | None = None
    shown_by: str | None = None
    part: str | None = None
    shared_cost: str | None = None
    first_measured: int = 0
    products: Callable | None = None


class Part(NamedTuple):
    """How units affect a tensor: they are cut from dimension `dim`, or the tensor is removed with the last of them."""

    units: Units
    dim: int | None = None


class Factor(NamedTuple):
    """The number of units that a gate leaves or, if `some`, whether any is left (1 or 0)."""

    gate: str
    some: bool = False


def units_of(config) -> list[Units]:
    """All units of a model with this config, of a stock model or a student, in the order of the forward pass."""
    num_places = {"convolution": len(config.conv_dim), "layer": config.num_hidden_layers}
    groups = [kind.find(config, place) for kind in KINDS.values() for place in range(num_places[kind.places])]
    order = list(num_places)
    groups.sort(key=lambda units: (order.index(KINDS[units.kind].places), units.place, units.module))
    containers = defaultdict(list)
    for units in groups:
        for module in units.contains:
            containers[module].append(units)
    return [replace(units, inside=(*units.inside, *_gates_around(units, containers))) for units in groups]


def _gates_around(units: Units, containers: dict[str, list[Units]]) -> Iterator[str]:
    path = units.module.split(".")
    for length in range(1, len(path) + 1):
        for container in containers.get(".".join(path[:length]), ()):
            # A block belongs to the module that it contains.
            if not units.contains or set(units.contains) < set(container.contains):
                yield container.gate


def units_by_kind(config) -> dict[str, list[Units]]:
    """The units of each place, by kind."""
    by_kind = {kind: [] for kind in KINDS}
    for units in units_of(config):
        by_kind[units.kind].append(units)
    return by_kind


def sizes_of(config) -> dict[str, list[int]]:
    """Number of units in each place, by kind."""
    return {kind: [units.size for units in places] for kind, places in units_by_kind(config).items()}


def units_in_teacher(config, num_layers: int | None = None) -> dict[str, list[Units | None]]:
    """
    The units of a student in each place of its teacher, by kind; `None` for a layer that the student lacks.

    Args:
        config (`PreTrainedConfig`): of the student, or of a stock model with all layers.
        num_layers (`int`, *optional*): of the teacher; by default up to the highest layer of the student.
    """
    layers = list(getattr(config, "remaining_layers", range(config.num_hidden_layers)))
    by_kind = units_by_kind(config)
    for name, groups in by_kind.items():
        if KINDS[name].places == "layer":
            of_layer = dict(zip(layers, groups, strict=True))
            by_kind[name] = [of_layer.get(layer) for layer in range(num_layers or layers[-1] + 1)]
    return by_kind


def parts_of(groups: Iterable[Units]) -> dict[str, list[Part]]:
    """Name of a tensor -> the units that it is cut by or removed with, without the units that contain these."""
    parts = defaultdict(list)
    for units in groups:
        for name, dim in units.tensors.items():
            parts[name].append(Part(units, dim))
        parts[f"{units.gate}.log_alpha"].append(Part(units, 0))
        for module in units.shared + units.outputs:
            for kind in ("weight", "bias"):
                parts[f"{module}.{kind}"].append(Part(units))
    return parts


def factors_of(parts: Iterable[Part]) -> tuple[Factor, ...]:
    """Factors that the size of a tensor is proportional to."""
    factors = {}
    for units, dim in parts:
        for gate in units.inside:
            factors.setdefault(gate, Factor(gate, some=True))
        factors[units.gate] = Factor(units.gate, some=dim is None)
    return tuple(factors.values())


def module_at(model, name: str):
    """The module of this name, or `None` if there is none."""
    owner, _, name = name.rpartition(".")
    return getattr(model.get_submodule(owner), name, None)


# ---- The kinds ----


def _conv_channels(config, place: int) -> Units:
    name = f"feature_extractor.conv_layers.{place}"
    norms, reader = (f"{name}.layer_norm",), f"feature_extractor.conv_layers.{place + 1}.conv"
    tensors = {}
    if place + 1 == len(config.conv_dim):
        # The last gate acts after the projection's norm. Before it, a value between 0 and 1 could not be folded into
        # any weight. There it scales the columns of the projection, and the cut convolutions stay stock ones.
        norms, reader = (*norms, "feature_projection.layer_norm"), "feature_projection.projection"
        if getattr(config, "scaled_features", False):
            tensors["feature_extractor.scale"] = 0
    modules = (f"{name}.conv", *norms)
    tensors |= {f"{module}.{kind}": 0 for module in modules for kind in ("weight", "bias")} | {f"{reader}.weight": 1}
    return Units(
        "conv_channels",
        place,
        f"{name}.channel_gate",
        config.conv_dim[place],
        tensors=tensors,
        reader=reader,
        norms=norms,
    )


def _record_channels(config, place: int, kept: Sequence[int]) -> None:
    config.conv_dim = [len(kept) if index == place else size for index, size in enumerate(config.conv_dim)]


def _attention_heads(config, layer: int) -> Units:
    heads = getattr(config, "remaining_heads", None)
    heads = range(config.num_attention_heads) if heads is None else heads[layer]
    name = f"encoder.layers.{layer}.attention"
    return Units(
        "attention_heads",
        layer,
        f"{name}.head_gate",
        len(heads),
        whole=config.num_attention_heads,
        indices=heads,
        tensors=_tensors_of_block(name, "attention"),
        reader=f"{name}.{READERS['attention']}",
        shared=(f"{name}.gru_rel_pos_linear",),
        left_bias=f"{name}.output_bias",
    )


def _record_heads(config, layer: int, kept: Sequence[int]) -> None:
    config.remaining_heads[layer] = [config.remaining_heads[layer][index] for index in kept]


def _value_dims(config, layer: int) -> Units:
    """Unit i is dimension i of the values of every head; [`sort_values`] makes the ones that matter most the first."""
    name, head_dim = f"encoder.layers.{layer}.attention", config.hidden_size // config.num_attention_heads
    heads = getattr(config, "remaining_heads", None)
    sizes = getattr(config, "value_sizes", None)
    has_heads = heads is None or heads[layer]
    return Units(
        "attention_value_dims",
        layer,
        f"{name}.value_gate",
        0 if not has_heads else head_dim if sizes is None else sizes[layer],
        whole=head_dim,
        tensors={f"{name}.{tensor}": CUT_TENSORS["attention"][tensor] for tensor in CUT_VALUES},
        reader=f"{name}.{READERS['attention']}",
        recurs=True,
        inside=(f"{name}.head_gate",),
    )


def _record_value_dims(config, layer: int, kept: Sequence[int]) -> None:
    # Without heads there is nothing to be told.
    size = len(kept) or config.hidden_size // config.num_attention_heads
    config.value_sizes[layer] = size
    if size < config.hidden_size // config.num_attention_heads:
        config.format_version = 3


def _ffn_dims(config, layer: int) -> Units:
    sizes, name = getattr(config, "intermediate_sizes", None), f"encoder.layers.{layer}.feed_forward"
    return Units(
        "ffn_dims",
        layer,
        f"{name}.dim_gate",
        config.intermediate_size if sizes is None else sizes[layer],
        whole=config.intermediate_size,
        tensors=_tensors_of_block(name, "feed_forward"),
        reader=f"{name}.{READERS['feed_forward']}",
        left_bias=f"{name}.output_bias",
    )


def _record_ffn_dims(config, layer: int, kept: Sequence[int]) -> None:
    config.intermediate_sizes[layer] = len(kept)


def _attention_block(config, layer: int) -> Units:
    return _block("attention_blocks", "attention", config, layer)


def _ffn_block(config, layer: int) -> Units:
    return _block("ffn_blocks", "feed_forward", config, layer)


def _block(kind: str, block: str, config, layer: int) -> Units:
    """A block is a single unit that contains others. Its reader may have only a bias left, without inputs."""
    name = f"encoder.layers.{layer}.{block}"
    return Units(
        kind,
        layer,
        f"{name}.block_gate",
        int(layer not in getattr(config, f"removed_{kind}", ())),
        whole=1,
        outputs=(f"{name}.{READERS[block]}", f"{name}.output_bias"),
        contains=(name,),
    )


def _record_attention_block(config, layer: int, kept: Sequence[int]) -> None:
    config.removed_attention_blocks = _removed(config.removed_attention_blocks, layer, kept)


def _record_ffn_block(config, layer: int, kept: Sequence[int]) -> None:
    config.removed_ffn_blocks = _removed(config.removed_ffn_blocks, layer, kept)


def _removed(removed: Iterable[int], layer: int, kept: Sequence[int]) -> list[int]:
    return sorted({*removed} if kept else {*removed, layer})


def _layer(config, layer: int) -> Units:
    """A whole layer with its norms and, in a fine-tuned wav2vec 2.0, its adapter."""
    name = f"encoder.layers.{layer}"
    adapter = tuple(f"adapter_layer.{module}" for module in ("norm", "linear_1", "linear_2"))
    return Units(
        "layers",
        layer,
        f"{name}.layer_gate",
        1,
        whole=1,
        shared=tuple(f"{name}.{module}" for module in ("layer_norm", "final_layer_norm", *adapter)),
        bypassed=name,
        contains=tuple(f"{name}.{block}" for block in READERS),
    )


def _record_layer(config, layer: int, kept: Sequence[int]) -> None:
    if kept:
        return
    for name in PER_LAYER:
        del getattr(config, name)[layer]
    for name in ("removed_attention_blocks", "removed_ffn_blocks"):
        removed = getattr(config, name)
        setattr(config, name, [index - (index > layer) for index in removed if index != layer])
    config.num_hidden_layers -= 1


def _tensors_of_block(name: str, block: str) -> dict[str, int]:
    return {f"{name}.{tensor}": dim for tensor, dim in CUT_TENSORS[block].items()}


def _attention_products(config, frames: int) -> int:
    """Scores and weighted sum of a head, over all pairs of frames."""
    return 2 * frames**2 * (config.hidden_size // config.num_attention_heads)


# Probabilities are those of DPHuBERT (arXiv 2305.17651).
KINDS = {
    "conv_channels": Kind(
        _conv_channels,
        _record_channels,
        "convolution",
        drop_probability=0.01,
        coarseness=1,
        is_default=True,
        min_open=1,  # without a single channel there would be no features at all
        has_multiples=True,
        label="channels",
        part="convolution",
    ),
    "attention_heads": Kind(
        _attention_heads,
        _record_heads,
        "layer",
        drop_probability=0.01,
        coarseness=2,
        is_default=True,
        label="attention heads",
        part="attention",
        shared_cost="any_head",
        first_measured=1,  # layer 0 also makes the position bias of all layers, which no gate changes
        products=_attention_products,
    ),
    "ffn_dims": Kind(
        _ffn_dims,
        _record_ffn_dims,
        "layer",
        drop_probability=0.5,
        coarseness=0,
        is_default=True,
        has_multiples=True,
        label="feed-forward units",
        part="feed_forward",
        shared_cost="any_ffn_dim",
    ),
    "attention_blocks": Kind(
        _attention_block,
        _record_attention_block,
        "layer",
        drop_probability=0.01,
        coarseness=3,
        shown_by="attention_heads",
    ),
    "ffn_blocks": Kind(
        _ffn_block, _record_ffn_block, "layer", drop_probability=0.01, coarseness=3, shown_by="ffn_dims"
    ),
    "layers": Kind(
        _layer,
        _record_layer,
        "layer",
        drop_probability=0.01,
        coarseness=4,
        first_prunable=1,  # without its first layer a model loses most (arXiv 2409.16302), and none may be left
    ),
    "attention_value_dims": Kind(
        _value_dims,
        _record_value_dims,
        "layer",
        drop_probability=0.1,
        coarseness=1,
        min_open=1,
        has_multiples=True,
        label="value dimensions",
    ),
}


def shown_kinds(config, places: str | None = None) -> list[str]:
    """
    Names of the kinds that tables and figures of a student with `config` show: the usual ones, and others of which
    units are removed; of all places or of those in `places`.
    """
    by_kind = units_by_kind(config)
    return [
        name
        for name, kind in KINDS.items()
        if kind.label is not None
        and places in (None, kind.places)
        and (kind.is_default or any(is_cut(units.size, units.whole) for units in by_kind[name]))
    ]


def is_cut(size: int, whole: int | None) -> bool:
    """Whether units of one place were removed alone, not with all others of their layer."""
    return whole is None or size < whole and (size > 0 or whole == 1)


DEFAULT_KINDS = tuple(name for name, kind in KINDS.items() if kind.is_default)

# The latency of a convolution is a sum of two terms: a cost for each pair of input and output channel, and a cost for
# each output channel.
COSTS_OF_CONVOLUTIONS = ("channel_pairs", "conv_channels")
COSTS_OF_LAYERS = tuple(
    cost for name, kind in KINDS.items() if kind.part and kind.places == "layer" for cost in (name, kind.shared_cost)
)
