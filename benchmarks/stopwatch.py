"""Times functions in turns, on a CPU or a GPU."""

import time
from collections.abc import Callable

import torch


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """How long `call` takes; on a GPU between two CUDA events, so that what it has queued counts to its end."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def take_turns(
    calls: dict[str, Callable[[], object]], runs: int, warmup: int, device: torch.device
) -> dict[str, list[float]]:
    """
    Seconds of each of `runs` calls, after `warmup` calls that do not count. All take turns (A B C A B C), so that a
    machine that slows down does so for all.
    """
    seconds = {name: [] for name in calls}
    for turn in range(warmup + runs):
        for name, call in calls.items():
            taken = seconds_of(call, device)
            if turn >= warmup:
                seconds[name].append(taken)
    return seconds
