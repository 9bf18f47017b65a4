"""
Measures on this machine how long each unit of a student takes, for recipes with a target in time.

For the shape of a teacher, one clip of 10 seconds, two CPU threads; this takes ten minutes for WavLM Base:

    python examples/calibrate_latency.py --teacher_name_or_path microsoft/wavlm-base-plus \\
        --num_threads 2 --output latency.json

For batches in half precision on a GPU:

    python examples/calibrate_latency.py --teacher_name_or_path microsoft/wavlm-base-plus \\
        --device cuda --dtype float16 --batch_size 16 --output latency.json

Then train a student that needs a quarter of the teacher's time there:

    python examples/run_skill.py --teacher_name_or_path microsoft/wavlm-base-plus --budget latency \\
        --latency_costs latency.json --target_sparsity 0.75 --audio_dir recordings/train --output_dir wavlm-fast

Only the teacher's config is read. Random students of its family are timed part by part, and costs are fitted to these
times; the error of the fit is measured on held-out students. Run nothing else on the machine meanwhile.
"""

import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from example_utils import DEMO_DATA, REPOSITORY, load_config

from skill_hf.cli.settings import Count, Range, Seconds, Seed, parse, run_script
from skill_hf.files import try_file, write_json
from skill_hf.latency import DTYPES, fit_latency


logger = logging.getLogger("calibrate_latency")

# Mean error on held-out architectures, in percent, above which costs are not to be trusted; twice that at worst.
LARGE_ERROR = 10


@dataclass
class CalibrationArguments:
    teacher_name_or_path: str = field(
        default=str(DEMO_DATA / "teacher"),
        metadata={"help": "Hub id or directory of the teacher; the demo's by default."},
    )
    seconds: Seconds = field(default=10.0, metadata={"help": "Length in seconds of the clips."})
    batch_size: Count = field(default=1, metadata={"help": "Clips per batch."})
    device: str = field(default="cpu", metadata={"help": "Device to measure on: cpu or cuda."})
    dtype: str = field(
        default="float32", metadata={"help": "Data type of weights and audio.", "choices": list(DTYPES)}
    )
    num_threads: Annotated[int, Range(1, most=1024)] | None = field(
        default=None, metadata={"help": "CPU threads; all cores by default."}
    )
    num_architectures: Count = field(default=24, metadata={"help": "Number of architectures to fit the costs to."})
    num_heldout: Count = field(
        default=8, metadata={"help": "Number of further architectures to measure the error on."}
    )
    num_runs: Count = field(default=5, metadata={"help": "Forward passes per architecture; the median is used."})
    sampling_rate: Count = field(default=16_000, metadata={"help": "Sampling rate in Hz."})
    seed: Seed = field(default=0, metadata={"help": "Seed for drawing the architectures."})
    output: str = field(default=str(REPOSITORY / "outputs" / "latency.json"), metadata={"help": "Output file."})


def print_costs(costs: dict) -> None:
    """What each unit costs, in microseconds."""
    picoseconds = costs["picoseconds"]
    rows = []
    for index, (pair, channel) in enumerate(
        zip(picoseconds["channel_pairs"], picoseconds["conv_channels"], strict=True), start=1
    ):
        rows.append((f"convolution {index}, per input and output channel", pair))
        rows.append((f"convolution {index}, per output channel in addition", channel))
    rows += [
        ("projection, per input channel", picoseconds["projection"]),
        ("a head", picoseconds["attention_heads"]),
        ("shared by the heads of a layer", picoseconds["any_head"]),
        ("100 feed-forward units", 100 * picoseconds["ffn_dims"]),
        ("a feed-forward block in addition", picoseconds["any_ffn_dim"]),
        ("everything else", picoseconds["fixed"]),
    ]
    cells = [(name, f"{picoseconds / 1e6:,.3f}") for name, picoseconds in rows]
    cells.insert(0, ("what", "microseconds"))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for name, number in cells:
        print(f"{name.ljust(widths[0])}  {number.rjust(widths[1])}")


def run(arguments: list[str] | None) -> None:
    (args,) = parse(arguments, (CalibrationArguments,))
    settings = {name: value for name, value in vars(args).items() if name not in ("teacher_name_or_path", "output")}
    try_file(args.output)  # measuring takes minutes
    costs = fit_latency(load_config(args.teacher_name_or_path), **settings)
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, costs)
    print_costs(costs)
    heldout, unpruned = costs["errors"]["heldout"], costs["errors"]["unpruned"]
    print(
        f"error of the predicted time of a forward pass: {heldout['mean']:.1f} % on average and {heldout['worst']:.1f}"
        f" % at worst for {args.num_heldout} held-out architectures, {unpruned:.1f} % for the unpruned one"
    )
    if heldout["mean"] > LARGE_ERROR or heldout["worst"] > 2 * LARGE_ERROR:
        logger.warning("This error is large. Measure again on an idle machine with more `num_runs`.")
    logger.info("Written to %s; use it with `--budget latency --latency_costs %s`", output, output)


def main(arguments: list[str] | None = None) -> int:
    logging.basicConfig(format="%(message)s", level=logging.ERROR)
    logger.setLevel(logging.INFO)
    return run_script(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
