"""
Shrinking while training, on the demo's teacher and audio: the same recipe with and without `shrink_steps`, for a few
seeds. Prints time of stage 1 and the held-out distillation loss of the finished student, and writes them as JSON.

    python benchmarks/shrinking.py --output shrinking.json
    python benchmarks/shrinking.py --output shrinking.json --dphubert DPHuBERT

The time of such a stage in another shape, for which `run_benchmarks.py --parts training` has timed steps at several
sizes of the student:

    python benchmarks/shrinking.py --read shrinking.json --sizes benchmarks/results/step.json

The runs of a seed differ only in `shrink_steps`. They have more and smaller steps than the demo, since gates need a
few hundred to close. Time is processor time (wall time on a GPU), on one thread unless `--threads` is set; it includes
the teacher's forward pass, which does not shrink. With a clone of DPHuBERT, its step is timed first, in turns with
ours on the unpruned student, to express the time of a shrinking stage as a share of DPHuBERT's.
"""

import argparse
import json
import logging
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from transformers import TrainerCallback, set_seed

from skill_hf.cli import distill
from skill_hf.cli.settings import ArgumentParser
from skill_hf.latency import device_name


REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "benchmarks"))

from inference import Case  # noqa: E402
from machine import peak_flops  # noqa: E402
from training_step import (  # noqa: E402
    DPHUBERT,
    RIVALS,
    Settings,
    average_over_stage,
    is_of_stage,
    measure_training,
)


class StepClock(TrainerCallback):
    """Seconds of processor time of each step of stage 1; other programs on the machine hardly change them."""

    def __init__(self):
        self.seconds = []

    def on_step_begin(self, args, state, control, **kwargs):
        self._start = self._now()

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if model.has_gates:
            self.seconds.append(self._now() - self._start)

    def _now(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()


def demo_settings() -> dict:
    """Those of the demo, wherever this is started."""
    settings = json.loads((REPOSITORY / "examples" / "demo" / "demo.json").read_text(encoding="utf-8"))
    for name in ("teacher_name_or_path", "audio_dir", "eval_audio_dir"):
        settings[name] = str(REPOSITORY / settings[name])
    return settings


def run(seed: int, shrink_steps: int, args: argparse.Namespace, output_dir: str) -> dict:
    """Trains once; seconds of stage 1, its parameters step by step, and the loss of the finished student."""
    settings = demo_settings() | {
        "output_dir": output_dir,
        "max_steps": args.max_steps,
        "final_steps": args.max_steps // 3,  # as in the full recipe
        "per_device_train_batch_size": args.batch_size,
        "max_seconds": args.seconds,
        "min_seconds": args.seconds,
        "gate_learning_rate": args.gate_learning_rate,
        "sparsity_warmup_steps": args.sparsity_warmup_steps,
        "shrink_steps": shrink_steps,
        "seed": seed,
        "eval_on_start": False,
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
    }
    parsed = ArgumentParser(distill.KINDS).build(settings)
    set_seed(seed)
    clock = StepClock()
    trainer = distill.make_trainer(*parsed, distill.StageClock())
    trainer.callback_handler.callbacks.insert(0, clock)
    trainer.train()
    lines = [line for line in trainer.state.log_history if line.get("stage") == 1]
    return {
        "seed": seed,
        "shrink_steps": shrink_steps,
        "stage_1_seconds": sum(clock.seconds),
        "first_step_seconds": statistics.median(clock.seconds[:10]),
        "last_step_seconds": statistics.median(clock.seconds[-10:]),
        "eval_distillation_loss": trainer.evaluate()["eval_distillation_loss"],
        "parameters": trainer.model.num_parameters(),
        "stage_1": [
            {name: line[name] for name in ("step", "num_parameters", "sparsity", "distillation_loss")}
            for line in lines
        ],
    }


def measure_step(args: argparse.Namespace, device: torch.device) -> list[dict]:
    """Rows of DPHuBERT's step and of ours, unpruned, with the demo's teacher and the batches of these runs."""
    settings = Settings(
        teacher=demo_settings()["teacher_name_or_path"],
        pruned="none",
        dphubert=args.dphubert,
        device=device.type,
        threads=args.threads,
        case=Case(args.batch_size, args.seconds),
        precision="fp32",
        runs=25,
        warmup=5,
        seed=args.seeds[0],
    )
    peaks = {"flops": {"fp32": peak_flops("fp32", device, [1024])}}
    return list(measure_training(settings, [DPHUBERT, RIVALS[0]], peaks))


def mean_and_spread(values: list[float]) -> dict[str, float]:
    return {"mean": statistics.mean(values), "std": statistics.stdev(values) if len(values) > 1 else 0.0}


def summarise(runs: list[dict]) -> dict:
    """`shrink_steps` -> mean and standard deviation over seeds; and those of the differences within a seed."""
    measures = ("eval_distillation_loss", "stage_1_seconds")
    plain = {run["seed"]: run for run in runs if run["shrink_steps"] == 0}
    summary = {}
    for steps in sorted({run["shrink_steps"] for run in runs}):
        those = [run for run in runs if run["shrink_steps"] == steps and run["seed"] in plain]
        summary[steps] = {measure: mean_and_spread([run[measure] for run in those]) for measure in measures}
        summary[steps]["time_ratio"] = mean_and_spread(
            [run["stage_1_seconds"] / plain[run["seed"]]["stage_1_seconds"] for run in those]
        )
        summary[steps]["loss_difference"] = mean_and_spread(
            [run["eval_distillation_loss"] - plain[run["seed"]]["eval_distillation_loss"] for run in those]
        )
    return summary


def stage_in_another_shape(run: dict, unpruned: int, training: list[dict]) -> float:
    """
    What stage 1 takes of the peer's time if its student shrinks like that of a run.

    Args:
        of (`dict`): a run.
        unpruned (`int`): parameters of its student before stage 1.
        training (`list[dict]`): rows of a training step in the other shape, of which the first is the peer's.
    """
    peer, *rows = training
    rows = [row for row in rows if is_of_stage(row) and row["precision"] == peer["precision"]]
    steps = run["stage_1"][-1]["step"]
    sizes = [(line["step"] / steps, line["num_parameters"] / unpruned) for line in run["stage_1"]]
    return average_over_stage(rows, [(0.0, 1.0), *sizes]) / peer["median"]


def print_table(summary: dict) -> None:
    print(f"{'shrink_steps':>12}  {'stage 1 (s)':>15}  {'time ratio':>13}  {'held-out loss':>16}  {'difference':>16}")
    for steps, row in summary.items():
        cells = [
            f"{row[name]['mean']:.{digits}f} ± {row[name]['std']:.{digits}f}"
            for name, digits in (
                ("stage_1_seconds", 1), ("time_ratio", 3), ("eval_distillation_loss", 4), ("loss_difference", 4),
            )
        ]  # fmt: skip
        print(f"{steps:>12}  {cells[0]:>15}  {cells[1]:>13}  {cells[2]:>16}  {cells[3]:>16}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--shrink_steps", type=int, nargs="+", default=[0, 20], help="0: never")
    parser.add_argument("--max_steps", type=int, default=390, help="of both stages")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=1.0, help="length of the clips")
    parser.add_argument("--gate_learning_rate", type=float, default=0.2)
    parser.add_argument("--sparsity_warmup_steps", type=int, default=150)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dphubert", help="a clone of github.com/pyf98/DPHuBERT, to time its step")
    parser.add_argument("--output", default="shrinking.json")
    parser.add_argument("--read", help="a result of this command, to print instead of running anything")
    parser.add_argument("--sizes", help="a result of run_benchmarks.py with the training step at several sizes")
    args = parser.parse_args()
    if 0 not in args.shrink_steps:
        parser.error("0 is what the others are compared with: name it in --shrink_steps")
    result = measure(args) if args.read is None else json.loads(Path(args.read).read_text(encoding="utf-8"))
    training = json.loads(Path(args.sizes).read_text(encoding="utf-8"))["training"] if args.sizes else None
    print_result(result, training)


def measure(args: argparse.Namespace) -> dict:
    """Runs everything; what is in the file, which is written after each run."""
    torch.set_num_threads(args.threads)
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("skill_hf.distillation.shrinking").setLevel(logging.INFO)
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result = {"settings": vars(args), "versions": versions, "device": device_name(device), "runs": []}
    if args.dphubert is not None:
        result["step"] = measure_step(args, device)
    for seed in args.seeds:
        for shrink_steps in args.shrink_steps:
            with tempfile.TemporaryDirectory() as output_dir:
                result["runs"].append(run(seed, shrink_steps, args, output_dir))
            result["summary"] = summarise(result["runs"])
            Path(args.output).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def print_result(result: dict, training: list[dict] | None) -> None:
    """Tables of a result, and what its stages would take in the shape of the rows of `training`."""
    settings = result["settings"]
    print(
        f"{result['device']}, {settings['threads']} threads, {result['versions']}, seeds {settings['seeds']},"
        f" {settings['max_steps']} steps\n"
    )
    print_table(result["summary"])
    if "step" in result:
        ratio = result["step"][1]["ratio"]
        print(f"\nOur step on the unpruned student takes {ratio:.2f} of the time of DPHuBERT's; all of stage 1:")
        for steps, row in result["summary"].items():
            print(f"{steps:>12}  {ratio * row['time_ratio']['mean']:.2f}")
    if training is not None:
        unpruned = max(line["num_parameters"] for run in result["runs"] for line in run["stage_1"])
        print("\nOf the peer's time in the other shape:")
        for steps in result["summary"]:
            shares = [
                stage_in_another_shape(run, unpruned, training)
                for run in result["runs"]
                if run["shrink_steps"] == int(steps)  # a string where it was read
            ]
            print("{:>12}  {mean:.2f} ± {std:.2f}".format(steps, **mean_and_spread(shares)))


if __name__ == "__main__":
    main()
