"""
Time and memory of the full recipe on paper, from measured training steps.

    python benchmarks/predict_cost.py --measured benchmarks/results/step_h200.json

The file is written by `run_benchmarks.py --parts training` with the rivals `skill` and `skill, pruned`. Nothing is run
but arithmetic: models are built without weights. What is assumed is printed with the table, and each assumption is a
constant of this file.
"""

import argparse
import functools
import json
import sys
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tables import table
from transformers import PreTrainedModel, Wav2Vec2Config, Wav2Vec2Model, WavLMConfig, WavLMModel

from skill_hf import SkillConfig, SkillTrainingArguments
from skill_hf.compression.macs import count_macs


SECONDS_PER_STEP = 640.0
CLIP_SECONDS = 15.6
LARGE = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "do_stable_layer_norm": True,
    "feat_extract_norm": "layer",
}
MODELS = {
    "WavLM Base+": (WavLMModel, WavLMConfig, {}),
    "WavLM Large": (WavLMModel, WavLMConfig, LARGE),
    "XLS-R 300M": (Wav2Vec2Model, Wav2Vec2Config, LARGE | {"conv_bias": True}),
}

# Bytes of a parameter and what belongs to it: the student in fp32 with its gradient and AdamW's two moments.
BYTES_STUDENT, BYTES_TEACHER = 16, {"fp32": 4, "bf16": 2}
# Memory traffic of an H200 in relation to an H100 (4.8 and 3.35 TB/s in their data sheets); their arithmetic is equal.
H200_TO_H100 = 4.8 / 3.35
# Shares of the peak that a step without any waiting for launches reaches: in fp32 measured, in bf16 not known.
SHARE_OF_PEAK = {"fp32": 0.75, "bf16": 0.35}
# Bytes per second at which GPUs of one machine exchange gradients, none of which is hidden behind the step.
LINK = 200e9
# What a GPU offers, in bytes, and the part of it that a step may fill.
GPU_MEMORY, FILLED = 80e9, 0.85


@functools.cache
def macs_of_clip(model: PreTrainedModel) -> int:
    return count_macs(model, CLIP_SECONDS)


@dataclass(frozen=True)
class Measured:
    """
    Steps of one precision. A batch takes at least as long as launching its kernels, which does not depend on its
    length or on the width of the student, and as its arithmetic; and at most as much longer than the measured batch as
    it has more audio.
    """

    precision: str
    median: float  # seconds
    launching: float  # seconds
    flops: float  # per second
    seconds_of_audio: float
    activation_bytes: float  # of the unpruned student
    pruned_share: float  # of these bytes that a pruned student needs
    base: PreTrainedModel

    @classmethod
    def read(cls, results: dict, precision: str, base: PreTrainedModel) -> "Measured":
        rows = {row["size"]: row for row in results["training"] if _is_ours(row, precision)}
        if rows.keys() < {"unpruned", "pruned"}:
            raise ValueError(f"There are no steps in {precision} of the rivals `skill` and `skill, pruned`.")
        whole, pruned = rows["unpruned"], rows["pruned"]
        # A line through both points: what is left at no arithmetic at all is the time of launching.
        slope = max(whole["median"] - pruned["median"], 0.0) / (whole["macs"] - pruned["macs"])
        clips, seconds = map(float, whole["case"].split("x"))
        fixed = {row["size"]: _fixed_bytes(row, precision) for row in (whole, pruned)}
        activations = whole["peak_bytes"] - fixed["unpruned"]
        return cls(
            precision=precision,
            median=whole["median"],
            launching=pruned["median"] - slope * pruned["macs"],
            flops=results["peaks"]["flops"][precision] * SHARE_OF_PEAK[precision],
            seconds_of_audio=clips * seconds,
            activation_bytes=activations,
            pruned_share=(pruned["peak_bytes"] - fixed["pruned"]) / activations,
            base=base,
        )

    def step(self, model: PreTrainedModel, seconds: float) -> tuple[float, float]:
        """
        Least and most seconds of a forward and backward pass over `seconds` of audio, of teacher and unpruned student.
        """
        layers = model.config.num_hidden_layers / self.base.config.num_hidden_layers
        macs = macs_of_clip(model)
        # A backward pass costs twice a forward pass.
        arithmetic = 2 * 4 * seconds / CLIP_SECONDS * macs / self.flops
        longer = seconds / self.seconds_of_audio * macs / macs_of_clip(self.base)
        least = max(self.launching * layers, arithmetic)
        return least, max(least, self.median * max(longer, layers))

    def memory(self, model: PreTrainedModel, seconds: float) -> float:
        """Bytes of a step over `seconds` of audio."""
        size = model.config.num_hidden_layers * model.config.hidden_size
        size /= self.base.config.num_hidden_layers * self.base.config.hidden_size
        activations = self.activation_bytes * seconds / self.seconds_of_audio
        return _bytes_of_weights(model.num_parameters(), self.precision) + size * activations


def _is_ours(row: dict, precision: str) -> bool:
    return row["kind"] == "skill" and not row["checkpointing"] and row["precision"] == precision


def _bytes_of_weights(parameters: int, precision: str) -> float:
    return (BYTES_STUDENT + BYTES_TEACHER[precision]) * parameters


def _fixed_bytes(row: dict, precision: str) -> float:
    return BYTES_STUDENT * row["student_parameters"] + BYTES_TEACHER[precision] * row["teacher_parameters"]


@functools.cache
def build(name: str) -> PreTrainedModel:
    cls, config, changes = MODELS[name]
    with torch.device("meta"):
        return cls(config(**changes))


def predict(measured: Measured, model: PreTrainedModel, num_gpus: int) -> dict:
    """Hours of the full recipe on `num_gpus`, with as few accumulated batches as fit into their memory."""
    steps = SkillConfig().resolve_steps(SkillTrainingArguments("unused").max_steps).total
    accumulated = 1
    while measured.memory(model, SECONDS_PER_STEP / num_gpus / accumulated) > FILLED * GPU_MEMORY:
        accumulated += 1
    seconds = SECONDS_PER_STEP / num_gpus / accumulated
    exchange = 2 * 4 * model.num_parameters() / LINK if num_gpus > 1 else 0.0
    least, most = (accumulated * step + exchange for step in measured.step(model, seconds))
    return {
        "batch": f"{accumulated} x {seconds:.0f} s",
        "memory": measured.memory(model, seconds),
        "step": (least, most),
        "hours": (steps * least / 3600, steps * most * H200_TO_H100 / 3600),
    }


def lines(results: dict) -> Iterator[list[str]]:
    base = build("WavLM Base+")
    for precision in ("fp32", "bf16"):
        measured = Measured.read(results, precision, base)
        for name in MODELS:
            model = build(name)
            for num_gpus in (1, 4, 8):
                found = predict(measured, model, num_gpus)
                yield [
                    name,
                    precision,
                    str(num_gpus),
                    found["batch"],
                    f"{found['memory'] / 1e9:.0f} GB",
                    _bounds(f"{1000 * step:.0f}" for step in found["step"]) + " ms",
                    _bounds(f"{hours:.1f}" for hours in found["hours"]),
                    _bounds(f"{hours * num_gpus:.1f}" for hours in found["hours"]),
                ]


def _bounds(texts: Iterable[str]) -> str:
    return " to ".join(dict.fromkeys(texts))


def assumptions(results: dict) -> str:
    where = f"{results['machine']['processor']}, {', '.join(_cases(results))}"
    bullets = [
        f"Steps were measured on {where}. The hours begin there and end on an H100, if all of the time were memory"
        " traffic.",
        f"The recipe: {SECONDS_PER_STEP:g} s of audio a step, in clips of {CLIP_SECONDS:g} s; the student is unpruned"
        " to the end.",
        "At least, a step takes the larger of launching its kernels, as measured, per layer, whatever the batch, and"
        f" of its arithmetic, at {SHARE_OF_PEAK['fp32']:.0%} (fp32, measured) or {SHARE_OF_PEAK['bf16']:.0%} (bf16, a"
        " guess) of the measured peak. At most, it takes as much longer than the measured step as it has more"
        " arithmetic.",
        f"Memory: {BYTES_STUDENT} bytes for each parameter of the student, 4 or 2 for the teacher's, activations as"
        " measured, in proportion to audio, layers and width.",
        f"GPUs exchange 4 bytes for each parameter, twice, at {LINK / 1e9:g} GB/s, not hidden behind the step.",
        f"A GPU has {GPU_MEMORY / 1e9:g} GB, of which {FILLED:.0%} are filled. Reading the audio is not included.",
    ]
    return "\n".join(textwrap.fill(text, 119, initial_indent="- ", subsequent_indent="  ") for text in bullets)


def _cases(results: dict) -> list[str]:
    return sorted({f"{row['case']} s" for row in results["training"]})


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Predicts time and memory of the full recipe.")
    parser.add_argument("--measured", type=Path, required=True, help="Results of run_benchmarks.py --parts training.")
    path = parser.parse_args(arguments).measured
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        rows = list(lines(results))
    except (OSError, ValueError, KeyError) as error:
        print(f"error: {path} has no measured training steps to predict from: {error}", file=sys.stderr)
        return 2
    header = ["teacher", "precision", "GPUs", "batches", "memory of each", "step", "hours", "GPU hours"]
    print(table("The full recipe, predicted", header, rows))
    print(f"\n{assumptions(results)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
