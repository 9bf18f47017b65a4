"""Time of a forward pass: models x precisions x modes, in turn, for several batch sizes."""

import copy
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
from compared_models import ComparedModel
from machine import DTYPES, memory_traffic
from operators import profile_call, profile_session
from stopwatch import seconds_of, take_turns

from skill_hf import WavLMForSkillStudent
from skill_hf.compression.macs import count_macs
from skill_hf.export import export_onnx, quantize_onnx


logger = logging.getLogger("benchmarks")

SAMPLING_RATE = 16_000
PRECISIONS = ("fp32", "bf16", "int8")
MODES = ("eager", "fused", "compiled", "onnx")
# bf16 is no type of onnxruntime's CPU kernels, int8 none of the models'.
FORMS = (
    ("fp32", "eager"),
    ("fp32", "fused"),
    ("fp32", "compiled"),
    ("fp32", "onnx"),
    ("bf16", "eager"),
    ("bf16", "fused"),
    ("bf16", "compiled"),
    ("int8", "onnx"),
)
BASELINE = ("stock", "fp32", "eager")


@dataclass(frozen=True)
class Case:
    """A batch of `clips` of `seconds` each."""

    clips: int
    seconds: float

    @classmethod
    def parse(cls, text: str) -> "Case":
        """`"4x10"` is 4 clips of 10 seconds."""
        match = re.fullmatch(r"(\d+)x(\d+(?:\.\d+)?)", text)
        if not match or not int(match[1]) or not float(match[2]):
            raise ValueError(f"A case of `--cases` must be clips x seconds such as 4x10, but is `{text}`.")
        return cls(int(match[1]), float(match[2]))

    def __str__(self) -> str:
        return f"{self.clips}x{self.seconds:g}"

    def noise(self, seed: int, device: torch.device) -> torch.Tensor:
        samples = round(self.seconds * SAMPLING_RATE)
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(self.clips, samples, generator=generator).to(device)


def is_supported(precision: str, mode: str, one: ComparedModel, device: torch.device) -> bool:
    """Files for onnxruntime are of our models and stock ones, and for the CPU; only students can be fused."""
    if mode == "fused" and not isinstance(one.model, WavLMForSkillStudent):
        return False
    if mode == "onnx" and (device.type != "cpu" or one.model is not one.counted):
        return False
    return (precision, mode) in FORMS


class OnnxFiles:
    """
    Exported models, each written once: sessions of onnxruntime with as many threads as torch has.

    Args:
        directory (`str`): for files.
        seed (`int`): of the noise whose ranges int8 is scaled by.
    """

    def __init__(self, directory: str, seed: int):
        self.directory, self.seed = Path(directory), seed

    def session(self, one: ComparedModel, precision: str, profiled: bool = False):
        import onnxruntime

        path = self.directory / f"{one.name}.onnx"
        if not path.exists():
            logger.info("Exporting %s to ONNX", one.name)
            export_onnx(one.model, path)
        if precision == "int8":
            quantized = path.with_suffix(".int8.onnx")
            if not quantized.exists():
                quantize_onnx(path, quantized, [Case(1, 1.0).noise(self.seed, torch.device("cpu"))[0]])
            path = quantized
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.enable_profiling = profiled
        options.profile_file_prefix = str(self.directory / one.name)
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def measure_inference(
    models: list[ComparedModel],
    names: list[str],
    cases: list[Case],
    precisions: list[str],
    modes: list[str],
    device: torch.device,
    files: OnnxFiles,
    runs: int,
    warmup: int,
    seed: int,
    peaks: dict,
) -> Iterator[dict]:
    """
    A row for each model, precision and mode of each case. `ratio` is how many times faster than the stock model in
    float32 and eager mode it is, in the same case.

    Args:
        models (`list[ComparedModel]`): on `device`; the first is the stock one.
        names (`list[str]`): of those that are measured; what ratios are to is measured without its name, too.
        cases, precisions, modes: as on the command line.
        device (`torch.device`): where they run.
        files (`OnnxFiles`): of the models.
        runs, warmup (`int`): calls that count, and calls before them that do not.
        seed (`int`): of the audio, which is noise.
        peaks (`dict`): `flops` of each precision and `bandwidth`, of the same run.
    """
    # Each model's copy is compiled again, and none may fall back to eager mode because there are many.
    torch._dynamo.config.recompile_limit = 1000
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    copies = {"fp32": {one.name: one.model for one in models}}
    if "bf16" in precisions:
        copies["bf16"] = {one.name: copy.deepcopy(one.model).to(torch.bfloat16) for one in models}
    sessions = {}
    for case in cases:
        torch._dynamo.reset()
        input_values = case.noise(seed, device)
        calls, counted = {}, {}
        for one in models:
            for precision, mode in FORMS:
                key = (one.name, precision, mode)
                wanted = one.name in names and precision in precisions and mode in modes
                if not (wanted and is_supported(precision, mode, one, device)) and key != BASELINE:
                    continue
                counted[key] = one
                if mode == "onnx":
                    if key not in sessions:
                        sessions[key] = files.session(one, precision)
                    calls[key] = _onnx_call(sessions[key], input_values)
                else:
                    calls[key] = _torch_call(copies[precision][one.name], mode, input_values.to(DTYPES[precision]))
        logger.info("Inference, %s: %d forms", case, len(calls))
        first = {key: seconds_of(call, device) for key, call in calls.items()}
        taken = take_turns(calls, runs, max(warmup - 1, 0), device)
        baseline = median(taken[BASELINE])
        for key, seconds in taken.items():
            name, precision, mode = key
            middle, macs = median(seconds), case.clips * count_macs(counted[key].counted, case.seconds)
            peak = peaks["flops"].get(precision)
            traffic = memory_traffic(calls[key]) if mode == "eager" else None
            yield {
                "case": str(case),
                "clips": case.clips,
                "clip_seconds": case.seconds,
                "model": name,
                "precision": precision,
                "mode": mode,
                "first_seconds": first[key],
                "seconds": seconds,
                "median": middle,
                "ratio": baseline / middle,
                "macs": macs,
                "bound": 2 * macs / peak if peak else None,
                "share_of_flops": 2 * macs / peak / middle if peak else None,
                "traffic_bytes": traffic,
                "share_of_bandwidth": traffic / peaks["bandwidth"] / middle if traffic else None,
            }


def profile_inference(
    models: list[ComparedModel],
    case: Case,
    precisions: list[str],
    modes: list[str],
    device: torch.device,
    files: OnnxFiles,
    seed: int,
) -> Iterator[dict]:
    """Where the time of each model goes, a row for each precision and mode but compiled ones; arguments as above."""
    input_values = case.noise(seed, device)
    for one in models:
        for precision, mode in FORMS:
            wanted = precision in precisions and mode in modes and mode != "compiled"
            if not (wanted and is_supported(precision, mode, one, device)):
                continue
            row = {"case": str(case), "model": one.name, "precision": precision, "mode": mode}
            if mode == "onnx":
                session = files.session(one, precision, profiled=True)
                yield row | profile_session(session, _onnx_call(session, input_values))
            else:
                model = one.model if precision == "fp32" else copy.deepcopy(one.model).to(DTYPES[precision])
                yield row | profile_call(_torch_call(model, mode, input_values.to(DTYPES[precision])), device)


def _torch_call(model: torch.nn.Module, mode: str, input_values: torch.Tensor) -> Callable:
    if mode == "fused":
        model = copy.deepcopy(model).fuse()
    if mode == "compiled":
        model = torch.compile(model, dynamic=False)

    @torch.no_grad()
    def call():
        return model(input_values)

    return call


def _onnx_call(session, input_values: torch.Tensor) -> Callable:
    inputs = {
        "input_values": input_values.numpy(),
        "attention_mask": torch.ones(input_values.shape, dtype=torch.long).numpy(),
    }
    return partial(session.run, None, inputs)
