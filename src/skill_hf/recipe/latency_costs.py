"""The format of `latency_costs`, measured by `fit_latency`, and the models that they are valid for."""

import json
import math
import reprlib
import textwrap

from transformers import PreTrainedConfig

from ..compression.units import COSTS_OF_CONVOLUTIONS, COSTS_OF_LAYERS
from ..files import parse_json


# What `latency_costs` must hold; a cost is a number, of convolutions one for each.
COSTS = (*COSTS_OF_CONVOLUTIONS, "projection", *COSTS_OF_LAYERS, "fixed")
LATENCY_ENTRIES = {"picoseconds": COSTS, "architecture": ("conv_kernel",), "measured_on": ("batch_size", "seconds")}

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
    """The properties in which a teacher must equal the measured one, for audio of `sampling_rate`."""
    values = {name: getattr(config, name) for name in ARCHITECTURE} | {"sampling_rate": sampling_rate}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def check_latency_costs(name: str, value) -> dict:
    """Checks a result of `fit_latency`, or the path of a JSON file that contains one."""
    try:
        # As it will be read back from skill_config.json: a tuple is a list.
        value = parse_json(value) if isinstance(value, str) else json.loads(json.dumps(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            "`latency_costs` must be a JSON file that examples/calibrate_latency.py has written, or its content"
            f" ({reprlib.repr(value)}: {textwrap.shorten(str(error), 150, placeholder=' ...')})."
        ) from None

    def refuse(name: str, what: str, found):
        raise ValueError(
            f"`{name}` in `latency_costs` must be {what}, but is {reprlib.repr(found)}. Use the output of"
            " examples/calibrate_latency.py unchanged."
        )

    for group, entries in LATENCY_ENTRIES.items():
        found = value.get(group) if isinstance(value, dict) else None
        if not isinstance(found, dict) or not set(found) >= set(entries):
            refuse(group, f"a dict with {', '.join(entries)}", found)
    for name in ("batch_size", "seconds"):
        number = value["measured_on"][name]
        if type(number) not in (int, float) or not 0 < number < math.inf:
            refuse(name, "a number above 0", number)
    convolutions = value["architecture"]["conv_kernel"]
    if not isinstance(convolutions, list):
        refuse("conv_kernel", "a list", convolutions)
    for name in LATENCY_ENTRIES["picoseconds"]:
        costs = value["picoseconds"][name]
        of_convolutions = name in COSTS_OF_CONVOLUTIONS
        listed = costs if of_convolutions else [costs]
        if not isinstance(listed, list) or (of_convolutions and len(listed) != len(convolutions)):
            refuse(name, f"a list with one cost for each of {len(convolutions)} convolutions", costs)
        if not all(type(cost) is int and cost >= 0 for cost in listed):
            refuse(name, "integers of at least 0", costs)
    if not any(cost if type(cost) is int else any(cost) for cost in value["picoseconds"].values()):
        refuse("picoseconds", "above 0 for at least one unit", value["picoseconds"])
    return value
