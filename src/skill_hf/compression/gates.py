"""Hard concrete gates: random variables in [0, 1] that are exactly 0 or exactly 1 with positive probability."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn


BETA = 2 / 3  # temperature
LOW, HIGH = -0.1, 1.1  # the interval that the concrete distribution is stretched to before it is clipped
EPSILON = 1e-6
# P(z != 0) = sigmoid(log_alpha - OPEN_SHIFT)
OPEN_SHIFT = BETA * math.log(-LOW / HIGH)
# In eval mode a gate that stays open has the value sigmoid(MAGIC * log_alpha / BETA), as in CoFi (arXiv 2204.00408).
MAGIC = 0.8
# Gates are kept from opening further than most of them start. Beyond, neither the loss nor the sparsity has a gradient
# that could close them, however large the multiplier. The authors of the hard concrete distribution stop at log 100.
MAX_LOG_ALPHA = 4.6


class HardConcreteGate(nn.Module):
    r"""
    One gate for each of `size` units that can be removed.

    In training a gate is `z = clip(s (HIGH - LOW) + LOW, 0, 1)` with
    `s = sigmoid((log u - log(1 - u) + log_alpha) / BETA)` and uniform `u` (Louizos et al., arXiv 1712.01312, equations
    10 to 12). In eval mode the gates with the smallest `log_alpha` are 0, as many as the rounded expected number of
    closed gates; the others are `sigmoid(0.8 log_alpha / BETA)`.

    Args:
        size (`int`): number of units.
        drop_probability (`float`): initial share of closed units in a sample.
        min_open (`int`, *optional*, defaults to 0): number of units that always stay open in eval mode.
        multiple_of (`int`, *optional*, defaults to 1):
            The number of open units in eval mode is rounded to a multiple of this, if there are that many units. A
            `min_open` above 0 is then at least this.
        is_binary (`bool`, *optional*, defaults to `False`):
            Whether open gates have the value 1 in eval mode, for units that no weight can be scaled for.

    Attributes:
        shift (`float`): added by [`fit_gates`] to `log_alpha` only to choose units: a negative shift closes more
            units, but does not scale down those that stay.
    """

    def __init__(
        self, size: int, drop_probability: float, min_open: int = 0, multiple_of: int = 1, is_binary: bool = False
    ):
        super().__init__()
        self.is_binary = is_binary
        mean = math.log((1 - drop_probability) / drop_probability)
        self.log_alpha = nn.Parameter(torch.empty(size).normal_(mean, 0.01))
        self.multiple_of = multiple_of if multiple_of <= size else 1
        self.min_open = max(min_open, self.multiple_of) if min_open else 0
        self.shift = 0.0
        self.value: torch.Tensor | None = None  # drawn once per forward of the model, read wherever the unit acts

    def __getstate__(self):
        # A drawn value hangs in the graph of the last forward and can be neither copied nor pickled.
        return self.__dict__ | {"value": None}

    @property
    def size(self) -> int:
        return self.log_alpha.numel()

    def log_odds(self) -> torch.Tensor:
        """Logit of P(z != 0) of each unit, `(size,)`, including the shift."""
        return self.log_alpha + self.shift - OPEN_SHIFT

    def open_probability(self) -> torch.Tensor:
        """P(z != 0) of each unit, `(size,)` (arXiv 1712.01312, equation 12)."""
        return torch.sigmoid(self.log_odds())

    def num_open(self) -> int:
        """Number of open units in eval mode: the expected number, rounded."""
        multiples = round(self.open_probability().sum().item() / self.multiple_of)
        return max(min(multiples, self.size // self.multiple_of) * self.multiple_of, self.min_open)

    def deterministic(self) -> torch.Tensor:
        """The value in eval mode, `(size,)`."""
        # Many gates are equal, at their limit; unlike `topk`, a stable sort takes the same of them on every device.
        order = self.log_alpha.argsort(descending=True, stable=True)
        kept = torch.zeros_like(self.log_alpha).index_fill(0, order[: self.num_open()], 1.0)
        if self.is_binary:
            return kept
        # The larger of the values before and after the shift: training knew the kept units by the first.
        return kept * torch.sigmoid(MAGIC * (self.log_alpha + max(self.shift, 0.0)) / BETA)

    def extra_repr(self) -> str:
        return f"size={self.size}"


def sample(log_alpha: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """
    A differentiable sample of gates, `(size,)`, for `log_alpha` of the same shape. Noise is drawn on the CPU, so it is
    the same on every device.
    """
    noise = torch.rand(log_alpha.numel(), generator=generator, dtype=torch.float32)
    noise = noise.to(log_alpha.device) * (1 - 2 * EPSILON) + EPSILON
    concrete = torch.sigmoid((torch.logit(noise) + log_alpha) / BETA)
    return (concrete * (HIGH - LOW) + LOW).clamp(0, 1)


def noise_seed(*numbers: int) -> int:
    """
    A 32-bit seed that depends on all `numbers`, such as the run's seed and the step: torch's CPU generator reads only
    32 bits of a seed and would ignore numbers packed into higher bits.
    """
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class KeptLayerNorm(nn.LayerNorm):
    """
    A LayerNorm over gated channels with statistics over open channels only, as after the cut. Other implementations
    normalise over all channels, so their pruned model differs from the gated one.

    It uses the parameters of `norm`, under the same names.
    """

    def __init__(self, norm: nn.LayerNorm, gate: HardConcreteGate):
        super().__init__(norm.normalized_shape, eps=norm.eps, elementwise_affine=True, device="meta")
        self.weight, self.bias = norm.weight, norm.bias
        self._gate = (gate,)  # in a tuple: the gate is registered where it acts, not here a second time

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(..., channels)` -> `(..., channels)`; closed channels become `bias`."""
        kept = (self._gate[0].value > 0).to(torch.float32)
        number = kept.sum().clamp(min=1)
        hidden_states = hidden_states.float()  # as autocast does for the stock LayerNorm
        mean = (hidden_states * kept).sum(-1, keepdim=True) / number
        centred = (hidden_states - mean) * kept
        variance = centred.square().sum(-1, keepdim=True) / number
        return (centred * torch.rsqrt(variance + self.eps) * self.weight + self.bias).to(self.weight.dtype)


class GatedForward:
    """
    Replaces the forward of a linear map or convolution whose inputs have gates. The gate values scale the columns of
    the weight, as after the cut. The product is the same as with scaled inputs, but a weight is smaller than a batch
    of features, and no scaled copy of the features is kept for the gradient.

    A class instead of a closure, so that a deep copy of the model refers to its own gates.

    Args:
        module (`nn.Linear` or `nn.Conv1d`): the module whose weight is scaled.
    """

    def __init__(self, module: nn.Module):
        self.module = module
        self.gates: list[tuple[HardConcreteGate, bool]] = []

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        weight, bias = self.module.weight, self.module.bias
        for gate, recurs in self.gates:
            weight = weight * as_columns(gate.value.to(weight.dtype), weight, recurs)
        if isinstance(self.module, nn.Linear):
            return nn.functional.linear(hidden_states, weight, bias)
        return self.module._conv_forward(hidden_states, weight, bias)


def gate_inputs(module: nn.Module, gate: HardConcreteGate, recurs: bool = False) -> None:
    """Scales the inputs of `module` by `gate`, in place, in addition to its other gates; `recurs` as in [`spread`]."""
    if not isinstance(module.forward, GatedForward):
        module.forward = GatedForward(module)
    module.forward.gates.append((gate, recurs))


def spread(values: torch.Tensor, length: int, recurs: bool) -> torch.Tensor:
    """
    Expands values of units, `(units,)`, to their entries, `(length,)`: each value is repeated in a row or, if they
    recur, the whole sequence of values is repeated.
    """
    number = length // max(len(values), 1)
    return values.repeat(number) if recurs else values.repeat_interleave(number)


def as_columns(values: torch.Tensor, weight: torch.Tensor, recurs: bool) -> torch.Tensor:
    """Values of input units, shaped to multiply `weight`, `(outputs, inputs, ...)`."""
    return spread(values, weight.shape[1], recurs).reshape(-1, *[1] * (weight.dim() - 2))


class GateHook:
    """
    Forward hook that multiplies a module's output by the value of a gate of one unit. A class for the same reason as
    [`GatedForward`].
    """

    def __init__(self, gate: HardConcreteGate):
        self.gate = gate

    def __call__(self, module, args, output: torch.Tensor) -> torch.Tensor:
        return output * self.gate.value.to(output.dtype)


class BypassHook:
    """
    Forward hook that mixes a layer's input with its output by the value of a gate of one unit: the input where the
    gate is 0, the output where it is 1. A class for the same reason as [`GatedForward`].
    """

    def __init__(self, gate: HardConcreteGate):
        self.gate = gate

    def __call__(self, module, args, output: torch.Tensor | tuple) -> torch.Tensor | tuple:
        # Layers of WavLM, and all in transformers 4, return more than the hidden state.
        hidden_states = output if isinstance(output, torch.Tensor) else output[0]
        mixed = torch.lerp(args[0], hidden_states, self.gate.value.to(hidden_states.dtype))
        return mixed if isinstance(output, torch.Tensor) else (mixed, *output[1:])


class Gating:
    """
    The gates of a student and their settings, stored as `gating`. As a forward pre-hook of the student it sets the
    `value` of every gate once per forward pass: a sample in training, otherwise the deterministic value. All gates are
    drawn as one tensor, since on a GPU many short draws would be slow.

    Args:
        gates (`list[HardConcreteGate]`): the gates, in the order of the student's modules.
        kinds (`Sequence[str]`): kinds of units that have gates.
        width_multiple (`int`): the cut rounds widths to multiples of this.

    Attributes:
        seed (`int`, *optional*): seed of the noise; `None` to use torch's global generator.
        common_shift (`torch.Tensor`, *optional*): scalar that is added to every `log_alpha` in training.
        handle: the handle of the hook, once it is registered.
    """

    def __init__(self, gates: list[HardConcreteGate], kinds: Sequence[str], width_multiple: int):
        self.gates, self.kinds, self.width_multiple = gates, kinds, width_multiple
        self.seed: int | None = None
        self.common_shift: torch.Tensor | None = None
        self.handle = None

    def __getstate__(self):
        # As for the value of a gate.
        return self.__dict__ | {"common_shift": None}

    def __call__(self, module, args):
        if not self.gates:
            return
        if not module.training:
            for gate in self.gates:
                gate.value = gate.deterministic()
            return
        generator = None if self.seed is None else torch.Generator().manual_seed(self.seed)
        log_alpha = torch.cat([gate.log_alpha for gate in self.gates])
        if self.common_shift is not None:
            log_alpha = log_alpha + self.common_shift
        values = sample(log_alpha, generator)
        for gate, value in zip(self.gates, values.split([gate.size for gate in self.gates]), strict=True):
            gate.value = value
