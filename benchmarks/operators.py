"""Which operators take the time of a forward pass, of torch or of onnxruntime, or of a training step."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


# The first group that one of these words leads to; what is left are sums, products and masks.
GROUPS = {
    "compiled": ("compiledfxgraph",),  # whose names end with a hash, in which any other word may be
    "convolutions": ("conv",),
    "attention": ("attention", "softmax"),
    "quantisation": ("quantizelinear",),
    "optimizer": ("adam",),
    "matrix products": ("mm", "linear", "matmul", "einsum", "dot"),
    "activations": ("gelu", "sigmoid", "relu", "tanh"),
    "norms": ("norm", "var_mean", "rsqrt", "native_batch"),
    "copies": (
        "copy",
        "clone",
        "contiguous",
        "cat",
        "stack",
        "index",
        "gather",
        "select",
        "reorder",
        "to_dense",
        "repeat",
        "tile",
        "transpose",
    ),
}


def group_of(name: str) -> str:
    name = name.removeprefix("aten::").lower()
    return next((group for group, words in GROUPS.items() if any(word in name for word in words)), "other")


def profile_call(call: Callable, device: torch.device, top: int = 12) -> dict:
    """
    Seconds of each group of operators in one `call`, after one that does not count, and of the `top` operators that
    take the most.
    """
    call()
    profiler = start_profile(device)
    call()
    return end_profile(profiler, device, top)


def start_profile(device: torch.device) -> profile:
    """A profiler of torch that has begun; [`end_profile`] ends it."""
    profiler = profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda"))
    profiler.start()
    return profiler


def end_profile(profiler: profile, device: torch.device, top: int = 12) -> dict:
    """As [`profile_call`], of all that was called since [`start_profile`]."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    profiler.stop()
    seconds, counts = Counter(), Counter()
    for event in profiler.key_averages():
        taken = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        seconds[event.key] += taken / 1e6
        counts[event.key] += event.count
    return _summary(seconds, counts, top)


def profile_session(session, call: Callable, top: int = 12) -> dict:
    """As [`profile_call`], of a `call` that runs a session of onnxruntime, whose profiling is then over."""
    call()
    call()
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    last = max(event["ts"] for event in events if event["name"] == "model_run")
    seconds, counts = Counter(), Counter()
    for event in events:
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time") and event["ts"] >= last:
            name = event["args"]["op_name"]
            seconds[name] += event["dur"] / 1e6
            counts[name] += 1
    return _summary(seconds, counts, top)


def _summary(seconds: Counter, counts: Counter, top: int) -> dict:
    groups = Counter()
    for name, taken in seconds.items():
        groups[group_of(name)] += taken
    return {
        "groups": dict(groups.most_common()),
        "operators": [
            {"name": name, "group": group_of(name), "calls": counts[name], "seconds": taken}
            for name, taken in seconds.most_common(top)
        ],
    }
