"""
What a target can be set on: parameters, multiply-accumulates or time. Each is a polynomial of the numbers of units
that are left, so that one count serves the gates' expectation, the cut and the floor, whatever is counted.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .analysis import count_macs
from .families import empty_student
from .gates import HardConcreteGate
from .skill_config import SkillConfig


@dataclass(frozen=True)
class UnitCosts:
    r"""
    What each unit of a student costs. With `c_i` channels of convolution i (`c_0 = 1`, the waveform; `c_n` the last),
    `h_l` heads and `f_l` feed-forward units of layer l, and `a_l`, `b_l` 1 where the layer has the block, else 0, the
    student costs

        fixed + sum_i c_i (channel_pairs_i c_{i-1} + conv_channels_i) + projection c_n
              + sum_l a_l (attention_heads_l h_l + any_head_l [h_l > 0] + attention_blocks_l)
              + sum_l b_l (ffn_dims_l f_l + any_ffn_dim_l [f_l > 0] + ffn_blocks_l).

    Costs are whole numbers, in units that are small enough for that.

    Args:
        noun (`str`): what is counted, in the plural.
        channel_pairs (`list[int]`): of a channel that goes into a convolution with one that comes out of it.
        conv_channels (`list[int]`): of a channel of each convolution besides.
        projection (`int`): of a channel of the last convolution in the projection behind it.
        attention_heads, any_head, attention_blocks (`list[int]`): of each layer: a head; what all heads of the layer
            share and leave with the last of them; the block besides, with heads or without.
        ffn_dims, any_ffn_dim, ffn_blocks (`list[int]`): the same of feed-forward units.
        fixed (`int`, *optional*, defaults to 0): all that no gate changes.
    """

    noun: str
    channel_pairs: list[int]
    conv_channels: list[int]
    projection: int
    attention_heads: list[int]
    any_head: list[int]
    attention_blocks: list[int]
    ffn_dims: list[int]
    any_ffn_dim: list[int]
    ffn_blocks: list[int]
    fixed: int = 0

    def count(self, student: PreTrainedModel, measure: Callable):
        """
        Cost of what is left of `student` if each gate leaves `measure(gate)`: the number of open units, and whether
        any is open, as numbers or tensors.
        """

        def left(owner: nn.Module, name: str, size: int):
            gate = getattr(owner, name, None)
            return (size, int(size > 0)) if gate is None else measure(gate)

        total, channels = self.fixed, 1
        for index, layer in enumerate(student.feature_extractor.conv_layers):
            before, (channels, _) = channels, left(layer, "channel_gate", layer.conv.out_channels)
            total = total + before * channels * self.channel_pairs[index] + channels * self.conv_channels[index]
        total = total + channels * self.projection
        for index, layer in enumerate(student.encoder.layers):
            attention, feed_forward = layer.attention, layer.feed_forward
            block, _ = left(attention, "block_gate", int(attention.output is not None))
            heads, any_head = left(attention, "head_gate", len(attention.heads))
            shared = any_head * self.any_head[index]
            total = total + block * (heads * self.attention_heads[index] + shared + self.attention_blocks[index])
            dense = feed_forward.intermediate_dense
            block, _ = left(feed_forward, "block_gate", int(feed_forward.output is not None))
            units, any_unit = left(feed_forward, "dim_gate", 0 if dense is None else dense.out_features)
            shared = any_unit * self.any_ffn_dim[index]
            total = total + block * (units * self.ffn_dims[index] + shared + self.ffn_blocks[index])
        return total


class Budget(ABC):
    """Something that a model costs and that `target_sparsity` is a share of."""

    noun: str  # what is counted, in the plural

    @abstractmethod
    def total(self, model: PreTrainedModel) -> int:
        """Cost of a teacher or student as it stands, with all of its units; gates cost nothing."""

    @abstractmethod
    def of_units(self, student: PreTrainedModel) -> UnitCosts:
        """What each unit costs, without the rest."""

    def unit_costs(self, student: PreTrainedModel) -> UnitCosts:
        """The costs of a student with or without gates; what no gate changes is the rest of its `total`."""
        costs = self.of_units(student)
        return replace(costs, fixed=self.total(student) - costs.count(student, lambda gate: (gate.size, 1)))


class ParameterBudget(Budget):
    noun = "parameters"

    def total(self, model: PreTrainedModel) -> int:
        return _numel(model) - sum(gate.size for gate in _gates(model))

    def of_units(self, student: PreTrainedModel) -> UnitCosts:
        hidden_size, convolutions, layers = student.config.hidden_size, _convolutions(student), student.encoder.layers
        return UnitCosts(
            noun=self.noun,
            channel_pairs=[layer.conv.kernel_size[0] for layer in convolutions],
            # A bias, and the weight and bias of a norm.
            conv_channels=[
                (layer.conv.bias is not None) + 2 * (getattr(layer, "layer_norm", None) is not None)
                for layer in convolutions
            ],
            projection=2 + hidden_size,  # the norm before it, and a column
            # Query, key, value (with bias), the columns of the output projection, the constant of the gate.
            attention_heads=[layer.attention.head_dim * (4 * hidden_size + 3) + 1 for layer in layers],
            any_head=[_numel(getattr(layer.attention, "gru_rel_pos_linear", None)) for layer in layers],
            attention_blocks=[hidden_size] * len(layers),
            ffn_dims=[2 * hidden_size + 1] * len(layers),
            any_ffn_dim=[0] * len(layers),
            ffn_blocks=[hidden_size] * len(layers),
        )


@dataclass(frozen=True)
class MacBudget(Budget):
    """
    Multiply-accumulates of one forward over one clip, those that [`~skill_hf.analysis.count_macs`] counts.

    A convolution weighs what it costs at its own frame rate. A head has a part that grows with the square of the
    frames, so its weight depends on the length of the clip.

    Args:
        seconds (`float`, *optional*, defaults to 10.0): length of the clip.
        sampling_rate (`int`, *optional*, defaults to 16000): samples in one of its seconds.
    """

    seconds: float = 10.0
    sampling_rate: int = 16_000

    @property
    def noun(self) -> str:
        return f"multiply-accumulates for {self.seconds:g} seconds of audio"

    def total(self, model: PreTrainedModel) -> int:
        if _gates(model):
            model = empty_student(model.config)
        return count_macs(model, self.seconds, self.sampling_rate)

    def of_units(self, student: PreTrainedModel) -> UnitCosts:
        hidden_size, layers = student.config.hidden_size, student.encoder.layers
        frames, channel_pairs = round(self.seconds * self.sampling_rate), []
        for layer in _convolutions(student):
            kernel, stride = layer.conv.kernel_size[0], layer.conv.stride[0]
            frames = (frames - kernel) // stride + 1
            channel_pairs.append(frames * kernel)

        def head(attention: nn.Module) -> int:
            # Of each frame: query, key, value and output projection; scores and weighted sum over all frames; the gate
            # of the position bias.
            gate = getattr(getattr(attention, "gru_rel_pos_linear", None), "out_features", 0)
            return frames * attention.head_dim * (4 * hidden_size + 2 * frames + gate)

        return UnitCosts(
            noun=self.noun,
            channel_pairs=channel_pairs,
            conv_channels=[0] * len(channel_pairs),
            projection=frames * hidden_size,
            attention_heads=[head(layer.attention) for layer in layers],
            any_head=[0] * len(layers),
            attention_blocks=[0] * len(layers),
            ffn_dims=[2 * frames * hidden_size] * len(layers),
            any_ffn_dim=[0] * len(layers),
            ffn_blocks=[0] * len(layers),
        )


# What time depends on besides the numbers of units.
ARCHITECTURE = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "conv_kernel",
    "conv_stride",
    "conv_bias",
    "feat_extract_norm",
    "feat_extract_activation",
    "do_stable_layer_norm",
    "hidden_act",
    "num_conv_pos_embeddings",
    "num_conv_pos_embedding_groups",
    "add_adapter",
)


def architecture_of(config: PreTrainedConfig, sampling_rate: int = 16_000) -> dict:
    """What a teacher must have in common with the one whose latency was measured, for audio of `sampling_rate`."""
    values = {name: getattr(config, name) for name in ARCHITECTURE} | {"sampling_rate": sampling_rate}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


@dataclass(frozen=True)
class LatencyBudget(Budget):
    """
    Time of one forward on a device, as predicted by the costs that [`~skill_hf.latency.fit_latency`] has fitted to
    measurements there. Heads and feed-forward units cost the same in every layer.

    Args:
        picoseconds (`dict`): what `fit_latency` returns under this name.
        seconds (`float`, *optional*, defaults to 10.0): length of the clips that were measured.
        batch_size (`int`, *optional*, defaults to 1): number of clips.
    """

    picoseconds: dict
    seconds: float = 10.0
    batch_size: int = 1

    @property
    def noun(self) -> str:
        clips = "" if self.batch_size == 1 else f"{self.batch_size} clips of "
        return f"predicted picoseconds for {clips}{self.seconds:g} seconds of audio"

    def total(self, model: PreTrainedModel) -> int:
        return self.total_of(model.config)

    def total_of(self, config: PreTrainedConfig) -> int:
        """Time of a teacher or student with this configuration."""
        student = empty_student(config)
        # There are no gates to be measured.
        return self.picoseconds["fixed"] + self.of_units(student).count(student, lambda gate: (gate.size, 1))

    def of_units(self, student: PreTrainedModel) -> UnitCosts:
        costs, layers = self.picoseconds, len(student.encoder.layers)
        return UnitCosts(
            noun=self.noun,
            channel_pairs=costs["channel_pairs"],
            conv_channels=costs["conv_channels"],
            projection=costs["projection"],
            attention_heads=[costs["attention_heads"]] * layers,
            any_head=[costs["any_head"]] * layers,
            attention_blocks=[0] * layers,  # a block without units adds a bias
            ffn_dims=[costs["ffn_dims"]] * layers,
            any_ffn_dim=[costs["any_ffn_dim"]] * layers,
            ffn_blocks=[0] * layers,
        )


def make_budget(config: SkillConfig, sampling_rate: int = 16_000) -> Budget:
    """What the recipe sets its target on, for audio of `sampling_rate`."""
    if config.budget == "latency":
        measured_on = config.latency_costs["measured_on"]
        return LatencyBudget(config.latency_costs["picoseconds"], measured_on["seconds"], measured_on["batch_size"])
    return MacBudget(config.budget_seconds, sampling_rate) if config.budget == "macs" else ParameterBudget()


def _convolutions(student: PreTrainedModel) -> nn.ModuleList:
    return student.feature_extractor.conv_layers


def _gates(model: nn.Module) -> list[HardConcreteGate]:
    return [module for module in model.modules() if isinstance(module, HardConcreteGate)]


def _numel(module: nn.Module | None) -> int:
    return 0 if module is None else sum(parameter.numel() for parameter in module.parameters())
