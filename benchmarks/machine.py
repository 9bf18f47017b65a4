"""The machine: its name, and its peak arithmetic and memory traffic."""

import os
import platform
from collections.abc import Iterable
from functools import partial

import torch
import transformers
from stopwatch import seconds_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from skill_hf.latency import device_name
from skill_hf.version import __version__


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def describe_machine(device: torch.device) -> dict:
    """Processor, threads and versions."""
    return {
        "processor": device_name(device),
        "device": device.type,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "onnxruntime": _version_of("onnxruntime"),
        "skill_hf": __version__,
    }


def _version_of(package: str) -> str | None:
    try:
        return __import__(package).__version__
    except ImportError:
        return None


def peak_flops(precision: str, device: torch.device, sizes: Iterable[int], repeats: int = 5) -> float:
    """Floating point operations per second of the fastest of several square matrix products, `2 n^3` each."""
    best = 0.0
    for size in sizes:
        left, right = (torch.rand(size, size, device=device).to(DTYPES[precision]) for _ in range(2))
        call = partial(torch.mm, left, right)
        call()
        best = max(best, 2 * size**3 / min(seconds_of(call, device) for _ in range(repeats)))
    return best


def peak_bandwidth(device: torch.device, copied_bytes: int, repeats: int = 5) -> float:
    """Bytes per second, read and written, of the fastest copy of a tensor that no cache holds."""
    source = torch.ones(copied_bytes // 4, device=device)
    target = torch.zeros_like(source)
    call = partial(target.copy_, source)
    call()
    return 2 * copied_bytes / min(seconds_of(call, device) for _ in range(repeats))


class TrafficCounter(TorchDispatchMode):
    """
    Adds up the bytes that each operator reads and writes, as if nothing stayed in a cache: its inputs and its outputs,
    each once. Views move nothing.
    """

    def __init__(self):
        super().__init__()
        self.total_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        taken = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]
        given = [value for value in tree_flatten(output)[0] if isinstance(value, torch.Tensor)]
        is_view = any(argument.alias_info is not None for argument in func._schema.returns) and not (
            func._schema.is_mutable
        )
        if not is_view:
            unique = {(value.data_ptr(), value.shape): value.nbytes for value in taken}
            unique_given = {(value.data_ptr(), value.shape): value.nbytes for value in given}
            self.total_bytes += sum(unique.values()) + sum(unique_given.values())
        return output


@torch.no_grad()
def memory_traffic(call) -> int:
    """Bytes that the operators of one eager `call` read and write; see [`TrafficCounter`]."""
    with TrafficCounter() as counter:
        call()
    return counter.total_bytes
