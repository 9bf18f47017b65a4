"""
Measures the time that each unit of a student takes on a device: random architectures are timed part by part, and the
costs of [`~skill_hf.compression.budgets.LatencyBudget`] are fitted to these times by least squares.
"""

import copy
import importlib.metadata
import numbers
import platform
import time
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import nnls
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedModel

from .compression.budgets import LatencyBudget
from .compression.units import COSTS_OF_CONVOLUTIONS, KINDS, sizes_of, units_of
from .models.families import STUDENT_CLASSES, student_config
from .models.properties import receptive_field
from .recipe.latency_costs import architecture_of
from .version import __version__


DTYPES = ("float32", "bfloat16", "float16")
NUM_WARMUPS = 2  # forwards that don't count: kernels are chosen and memory is taken in the first ones
MAX_SECONDS = 3600  # memory grows with the square of the length
PICOSECONDS = 10**12  # in a second
LEAST_SHARE = 0.1  # of the teacher's units in the smallest architectures that are drawn


def fit_latency(
    config: PreTrainedConfig,
    seconds: float = 10.0,
    batch_size: int = 1,
    device: str = "cpu",
    dtype: str = "float32",
    num_threads: int | None = None,
    num_architectures: int = 24,
    num_heldout: int = 8,
    num_runs: int = 5,
    sampling_rate: int = 16_000,
    seed: int = 0,
    progress: bool = True,
) -> dict:
    r"""
    Measures random students of a teacher and fits the cost of each of their units. Their weights are random as well,
    since time depends only on shapes. Each student takes turns with the unpruned one: if the device slows down for a
    while, due to heat or other work, this does not count as a slow architecture.

    The cost model is that of [`UnitCosts`], linear in the numbers of units and in the products of the channels of
    neighbouring convolutions. The time of real kernels has steps, on a CPU at multiples of 16 units. Therefore widths
    of all kinds are drawn, and the error is measured on held-out architectures.

    Args:
        config (`PreTrainedConfig`):
            Configuration of the teacher, or of a student.
        seconds (`float`, *optional*, defaults to 10.0):
            Length in seconds of the clips.
        batch_size (`int`, *optional*, defaults to 1):
            Clips in a forward pass.
        device (`str`, *optional*, defaults to `"cpu"`):
            `cpu`, or `cuda`, optionally with a number.
        dtype (`str`, *optional*, defaults to `"float32"`):
            Dtype of weights and audio: `float32`, `bfloat16` or `float16`.
        num_threads (`int`, *optional*):
            CPU threads; by default PyTorch's current number.
        num_architectures (`int`, *optional*, defaults to 24):
            Number of architectures for the fit, including the unpruned one.
        num_heldout (`int`, *optional*, defaults to 8):
            Number of additional architectures for measuring the error.
        num_runs (`int`, *optional*, defaults to 5):
            Forward passes of each, of which the median is used.
        sampling_rate (`int`, *optional*, defaults to 16000):
            Sampling rate in Hz.
        seed (`int`, *optional*, defaults to 0):
            Seed of the random architectures.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.

    Returns:
        `dict`: the value for `latency_costs` of [`SkillConfig`], in plain JSON types. `picoseconds` are the costs,
        `architecture` is what a teacher must match, `measured_on` the device and the batch. `errors` are the mean and
        worst absolute difference between predicted and measured time of a whole forward pass, in percent of the
        measured time, over the `fitted` and the `heldout` architectures, and for the `unpruned` one. Also: `seed`,
        `num_architectures`, `num_heldout`, `num_runs` and `versions`.

    Raises:
        `ValueError`: if an argument is invalid, the device does not exist, or there is no student class for the
            teacher.
    """
    config = student_config(config)
    for name, value, minimum in (
        ("batch_size", batch_size, 1),
        ("num_threads", 1 if num_threads is None else num_threads, 1),
        ("num_architectures", num_architectures, 5),
        ("num_heldout", num_heldout, 1),
        ("num_runs", num_runs, 1),
        ("sampling_rate", sampling_rate, 1),
        ("seed", seed, 0),
    ):
        _check_whole_number(name, value, minimum)
    samples = _num_samples(seconds, sampling_rate, receptive_field(config))
    if dtype not in DTYPES:
        raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}, but is {dtype!r}.")
    device = _checked_device(device)
    rng = np.random.default_rng(seed)
    architectures = [config]
    architectures += [draw_architecture(config, rng) for _ in range(num_architectures - 1 + num_heldout)]
    with _threads(num_threads), torch.random.fork_rng(devices=[]):
        num_threads = torch.get_num_threads()
        clips = torch.randn(batch_size, samples).to(device, getattr(torch, dtype))
        timings = measure_architectures(architectures, clips, num_runs, progress)
    picoseconds = fit_costs(architectures[:num_architectures], timings[:num_architectures])
    errors = prediction_errors(picoseconds, architectures, timings)
    fitted, heldout = errors[:num_architectures], errors[num_architectures:]
    return {
        "picoseconds": picoseconds,
        "architecture": architecture_of(config, sampling_rate),
        "measured_on": {
            "device": device_name(device),
            "dtype": dtype,
            "num_threads": num_threads,
            "batch_size": batch_size,
            "seconds": seconds,
        },
        "errors": {
            "fitted": {"mean": fitted.mean().item(), "worst": fitted.max().item()},
            "heldout": {"mean": heldout.mean().item(), "worst": heldout.max().item()},
            "unpruned": errors[0].item(),
        },
        "seed": seed,
        "num_architectures": num_architectures,
        "num_heldout": num_heldout,
        "num_runs": num_runs,
        "versions": {"skill-hf": __version__}
        | {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
    }


def draw_architecture(config: PreTrainedConfig, rng: np.random.Generator) -> PreTrainedConfig:
    """The configuration of a random student: each part has lost its own share, drawn around a common one."""
    config, common = copy.deepcopy(config), rng.uniform(LEAST_SHARE, 1)
    groups = units_of(config)
    for name, kind in KINDS.items():
        for units in [units for units in groups if units.kind == name and kind.part]:
            number = round(units.size * common * rng.uniform(0.5, 1.5))
            number = int(np.clip(number, min(1, units.size), units.size))
            drawn = range(number)
            if units.indices is not None:  # the config tells which are left
                drawn = sorted(rng.choice(units.size, number, replace=False).tolist())
            kind.record(config, units.place, drawn)
    return config


def measure_architectures(
    architectures: Sequence[PreTrainedConfig], clips: torch.Tensor, num_runs: int = 5, progress: bool = True
) -> list[dict[str, float]]:
    """
    Seconds of a forward pass and of its parts, named as in [`measure_parts`], for each architecture with random
    weights. Each takes turns with the first one.

    Args:
        architectures (`Sequence[PreTrainedConfig]`): configurations of students.
        clips (`torch.Tensor` of shape `(batch, samples)`): on the device and in the dtype to be measured.
        num_runs (`int`, *optional*, defaults to 5): forward passes of each, of which the median is used.
        progress (`bool`, *optional*, defaults to `True`): whether to show a progress bar.
    """

    def build(architecture: PreTrainedConfig) -> PreTrainedModel:
        with clips.device:
            return STUDENT_CLASSES[architecture.model_type](architecture).to(clips.dtype).eval()

    reference = build(architectures[0])
    bar = tqdm(architectures, desc="Measuring", unit="architecture", disable=not progress)
    timings = [measure_parts(build(architecture), reference, clips, num_runs) for architecture in bar]
    usual = np.median([timing.pop("reference") for timing in timings])
    return [{part: share * usual for part, share in timing.items()} for timing in timings]


def prediction_errors(
    picoseconds: dict, architectures: Sequence[PreTrainedConfig], timings: Sequence[dict[str, float]]
) -> np.ndarray:
    """Differences between predicted and measured time of a whole forward pass, in percent of the measured time."""
    budget = LatencyBudget(picoseconds)
    measured = np.array([timing["whole"] for timing in timings])
    predicted = np.array([budget.predict(architecture) for architecture in architectures]) / PICOSECONDS
    return 100 * np.abs(predicted / measured - 1)


@torch.no_grad()
def measure_parts(
    student: PreTrainedModel, reference: PreTrainedModel, clips: torch.Tensor, num_runs: int = 5
) -> dict[str, float]:
    """
    Time of a forward pass and of its parts, as shares of the forward passes of another model just before and after it;
    medians of `num_runs`. Parts: `whole`, `projection`, and for each layer `convolution.0`, `attention.0`,
    `feed_forward.0`.

    Args:
        student (`PreTrainedModel`): on its device, in eval mode.
        reference (`PreTrainedModel`): the other model, a different object on the same device.
        clips (`torch.Tensor` of shape `(batch, samples)`): on the same device, in the dtype of both.
        num_runs (`int`, *optional*, defaults to 5): forward passes, in addition to uncounted first ones.

    Returns:
        `dict[str, float]`: the shares, and `reference`: the median seconds of the other model.
    """
    parts = {"whole": student, "projection": student.feature_projection}
    for units in units_of(student.config):
        part = KINDS[units.kind].part
        if part is not None:
            parts[f"{part}.{units.place}"] = student.get_submodule(units.module)
    on_gpu = clips.device.type == "cuda"

    def now():
        if not on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    times = {name: [] for name in parts}
    handles = []
    for name, module in parts.items():
        handles.append(module.register_forward_pre_hook(lambda *_, times=times[name]: times.append(now())))
        handles.append(module.register_forward_hook(lambda *_, times=times[name]: times.append(now())))
    others = []  # when the other model's forwards start and end

    def wait() -> None:  # or a GPU's launches would hide behind what the other model left it to do
        if on_gpu:
            torch.cuda.synchronize(clips.device)

    for run in range(NUM_WARMUPS + num_runs):
        wait()
        student(clips)
        if run >= NUM_WARMUPS - 1:  # just before a forward that counts, or after one
            wait()
            others.append(now())
            reference(clips)
            others.append(now())
    for handle in handles:
        handle.remove()
    wait()

    def seconds(events: list) -> list[float]:
        pairs = zip(events[::2], events[1::2], strict=True)
        return [start.elapsed_time(end) / 1e3 if on_gpu else end - start for start, end in pairs]

    # A student may take a batch through its convolutions in parts, which are calls of their own.
    runs = {name: np.reshape(seconds(events), (NUM_WARMUPS + num_runs, -1)).sum(1) for name, events in times.items()}
    other = np.array(seconds(others))
    around = (other[1:] + other[:-1]) / 2
    shares = {name: float(np.median(run[NUM_WARMUPS:] / around)) for name, run in runs.items()}
    return shares | {"reference": float(np.median(other))}


def fit_costs(architectures: Sequence[PreTrainedConfig], timings: Sequence[dict[str, float]]) -> dict:
    """
    Non-negative costs, in whole picoseconds, fitted to the measured times. Each part of a forward pass is fitted
    separately, attention and feed-forward blocks of all layers together; the rest of the whole is constant.
    Differences are weighted as shares of the whole forward pass.

    A convolution's time also grows with the channels that it reads; this is attributed to the convolution that
    produces them.

    Args:
        architectures (`Sequence[PreTrainedConfig]`): configurations of students.
        timings (`Sequence[dict[str, float]]`): seconds of the parts of each, named as in [`measure_parts`].
    """
    whole = np.array([timing["whole"] for timing in timings])
    sizes = [sizes_of(config) for config in architectures]
    channels = np.array([[1, *counts["conv_channels"]] for counts in sizes])
    one = np.ones(len(whole))

    def fit(measured: np.ndarray, *columns: np.ndarray) -> list[int]:
        """Cost of each column; columns have a value for each architecture, or for each layer of each."""
        weight = 1 / whole.reshape(-1, *[1] * (measured.ndim - 1))
        matrix = np.stack([(column * weight).flatten() for column in columns], axis=1)
        scale = matrix.max(axis=0)  # a pair of channels costs some millionth of a block
        values = nnls(matrix / scale, (measured * weight).flatten())[0] / scale
        return [round(value * PICOSECONDS) for value in values]

    def measured(part: str, layers: Sequence[int] = ()) -> np.ndarray:
        names = [f"{part}.{layer}" for layer in layers]
        return np.array([[timing[name] for name in names] if names else timing[part] for timing in timings])

    # The constants of convolutions and projection are among what is left of the whole.
    pair, _ = fit(measured("convolution.0"), channels[:, 1], one)
    pairs, of_channels = [pair], [0]
    for index in range(1, channels.shape[1] - 1):
        before, after = channels[:, index], channels[:, index + 1]
        pair, written, read, _ = fit(measured(f"convolution.{index}"), before * after, after, before, one)
        of_channels[-1] += read
        pairs.append(pair)
        of_channels.append(written)
    costs = dict(zip(COSTS_OF_CONVOLUTIONS, (pairs, of_channels), strict=True))
    costs["projection"], _ = fit(measured("projection"), channels[:, -1], one)
    for name, kind in KINDS.items():
        if kind.part is not None and kind.places == "layer":
            numbers = np.array([counts[name] for counts in sizes])
            first = min(kind.first_measured, numbers.shape[1] - 1)
            numbers, layers = numbers[:, first:], range(first, numbers.shape[1])
            costs[name], costs[kind.shared_cost] = fit(measured(kind.part, layers), numbers, numbers > 0)
    parts = LatencyBudget(costs | {"fixed": 0})
    rest = whole - np.array([parts.predict(config) for config in architectures]) / PICOSECONDS
    (costs["fixed"],) = fit(rest, one)
    return costs


def _check_whole_number(name: str, value, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ValueError(f"`{name}` must be an integer, but is {value!r}.")
    if value < minimum:
        raise ValueError(f"`{name}` must be at least {minimum}, but is {value}.")


def _num_samples(seconds: float, sampling_rate: int, min_samples: int) -> int:
    """Length of the clips in samples, enough for one frame."""
    if isinstance(seconds, bool) or not isinstance(seconds, numbers.Real) or not 0 < seconds <= MAX_SECONDS:
        raise ValueError(f"`seconds` must be a number above 0 and at most {MAX_SECONDS}, but is {seconds!r}.")
    num_samples = round(seconds * sampling_rate)
    if num_samples < min_samples:
        raise ValueError(
            f"`seconds` is {seconds}, {num_samples} samples, but the model needs {min_samples} for one frame."
        )
    return num_samples


def _checked_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"`device` must be cpu or cuda, but is {name!r}.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ValueError(f"`device` is {name}, but PyTorch finds {count} CUDA device{'' if count == 1 else 's'}.")
    return device


def device_name(device: torch.device) -> str:
    """Name of a GPU or a processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    information = Path("/proc/cpuinfo")  # `platform` doesn't know the name on Linux
    lines = information.read_text(encoding="utf-8").splitlines() if information.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), platform.processor() or platform.machine())


@contextmanager
def _threads(number: int | None):
    before = torch.get_num_threads()
    if number is not None:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
