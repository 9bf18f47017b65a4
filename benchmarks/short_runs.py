"""
What choices of the method cost in short runs: the held-out distillation loss of students of the demo's teacher (-1 is
the teacher itself). Each part compares settings that differ in one thing, for a few seeds, and appends to a JSON file.

    python benchmarks/short_runs.py cut --steps 70 --output short_runs.json
    python benchmarks/short_runs.py gates --steps 60 150 --rates 0.02 0.15 none --output short_runs.json
    python benchmarks/short_runs.py noise --steps 60 --output short_runs.json
    python benchmarks/short_runs.py chain --steps 300 --sparsity 0.9 --output short_runs.json

`cut`: what the units that the cut keeps are scaled by, after the same first stage. `gates`: the learning rate of
the gates. `noise`: one draw for all micro-batches of a step, or one each. `chain`: the sparsity in one run, or in runs
to 0.5, 0.75 and itself, each from the student of the one before, of a third of the steps each.
"""

import argparse
import contextlib
import json
import logging
import platform
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
import transformers
from transformers import TrainerCallback, set_seed

from skill_hf import SkillConfig, SkillDistillationTrainer, SkillTrainingArguments
from skill_hf.compression.gates import BETA, MAGIC, HardConcreteGate
from skill_hf.data import load_audio_dir
from skill_hf.latency import device_name


REPOSITORY = Path(__file__).resolve().parents[1]
DEMO = REPOSITORY / "examples" / "demo"
DETERMINISTIC = HardConcreteGate.deterministic
CLIP_SECONDS = 1.0  # so that a step takes a quarter of a second
CHAIN = (0.5, 0.75)  # before the sparsity itself
CALIBRATION = {"calibration_samples": 48, "calibration_seconds": 5.0, "num_clusters": 4}


def value_of_shifted(gate: HardConcreteGate) -> torch.Tensor:
    """What the cut folded once: the value of the shifted `log_alpha`, also where the shift closes gates."""
    kept = (DETERMINISTIC(gate) > 0).float()
    return kept * torch.sigmoid(MAGIC * (gate.log_alpha + gate.shift) / BETA)


def one_after_fit(gate: HardConcreteGate) -> torch.Tensor:
    """1 for units that are kept once the gates have been shifted."""
    value = DETERMINISTIC(gate)
    return (value > 0).float() if gate.shift else value


VALUES = {"larger": DETERMINISTIC, "shifted": value_of_shifted, "one": one_after_fit}


class StopBeforeCut(TrainerCallback):
    """Ends a run at its last step of stage 1, once that is saved."""

    class Reached(Exception):
        pass

    def __init__(self, step: int):
        self.step = step

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise self.Reached


def make_trainer(output_dir: str, steps: int, seed: int, recipe: dict, callbacks=None, model=None, **settings):
    set_seed(seed)
    defaults = {
        "per_device_train_batch_size": 8,
        "eval_strategy": "no",
        "logging_steps": 5,
        "save_strategy": "no",
        "learning_rate": 5e-4,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    trainer = SkillDistillationTrainer(
        teacher=str(DEMO / "teacher"),
        skill_config=SkillConfig(**{"final_learning_rate": 5e-4} | CALIBRATION | recipe),
        args=SkillTrainingArguments(output_dir=output_dir, max_steps=steps, seed=seed, **defaults | settings),
        train_dataset=load_audio_dir(DEMO / "audio" / "train"),
        eval_dataset=load_audio_dir(DEMO / "audio" / "heldout"),
        model=model,
        callbacks=callbacks,
    )
    for collator in (trainer.data_collator, trainer.eval_data_collator):
        collator.min_seconds = collator.max_seconds = CLIP_SECONDS
    return trainer


def finish(trainer: SkillDistillationTrainer, **train) -> dict:
    trainer.train(**train)
    rows = [line for line in trainer.state.log_history if "distillation_loss" in line]
    return {
        "loss": trainer.evaluate()["eval_distillation_loss"],
        "late_in_stage_1": [line["distillation_loss"] for line in rows if line["stage"] == 1][-1],
        "sparsity_before_cut": [line["sparsity"] for line in rows if line["stage"] == 1][-1],
        "first_of_stage_2": [line["distillation_loss"] for line in rows if line["stage"] == 2][0],
    }


def compare_values(args, sparsity: float, steps: int, seed: int):
    with tempfile.TemporaryDirectory() as folder:
        recipe = {"target_sparsity": sparsity, "gate_learning_rate": args.rates[0]}
        joint = SkillConfig(**recipe).resolve_steps(steps).joint
        saving = {"save_strategy": "steps", "save_steps": joint}
        first = make_trainer(f"{folder}/first", steps, seed, recipe, [StopBeforeCut(joint)], **saving)
        with contextlib.suppress(StopBeforeCut.Reached):
            first.train()
        for name, value in VALUES.items():
            HardConcreteGate.deterministic = value
            shutil.copytree(f"{folder}/first", f"{folder}/{name}")
            trainer = make_trainer(f"{folder}/{name}", steps, seed, recipe, **saving)
            yield name, finish(trainer, resume_from_checkpoint=True)
        HardConcreteGate.deterministic = DETERMINISTIC


def compare_rates(args, sparsity: float, steps: int, seed: int):
    for rate in args.rates:
        with tempfile.TemporaryDirectory() as folder:
            recipe = {"target_sparsity": sparsity, "gate_learning_rate": rate}
            yield str(rate), finish(make_trainer(folder, steps, seed, recipe))


def compare_noise(args, sparsity: float, steps: int, seed: int):
    for shared in (True, False):
        with tempfile.TemporaryDirectory() as folder:
            recipe = {
                "target_sparsity": sparsity,
                "gate_learning_rate": args.rates[0],
                "shared_gate_noise": shared,
            }
            settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
            name = "one draw a step" if shared else "one draw a micro-batch"
            yield name, finish(make_trainer(folder, steps, seed, recipe, **settings))


def compare_chains(args, sparsity: float, steps: int, seed: int):
    for sparsities in ((sparsity,), (*CHAIN, sparsity)):
        student = None
        for target in sparsities:
            with tempfile.TemporaryDirectory() as folder:
                recipe = {"target_sparsity": target, "gate_learning_rate": args.rates[0], "final_learning_rate": None}
                own = {"model": student, "learning_rate": None}
                trainer = make_trainer(folder, steps // len(sparsities), seed, recipe, **own)
                row = finish(trainer)
                student = trainer.model
        yield " -> ".join(f"{target:g}" for target in sparsities), row


PARTS = {"cut": compare_values, "gates": compare_rates, "noise": compare_noise, "chain": compare_chains}


def main(arguments: list[str] | None = None) -> None:
    def rate(text: str) -> float | None:
        return None if text == "none" else float(text)

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--steps", type=int, nargs="+", default=[60])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.75])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rates", type=rate, nargs="+", default=[None], help="gate_learning_rate; none: the default")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", required=True)
    args = parser.parse_args(arguments)
    logging.getLogger("skill_hf").setLevel(logging.ERROR)
    torch.set_num_threads(args.threads)
    output = Path(args.output)
    machine = {
        "machine": device_name(torch.device("cpu")),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    for steps in args.steps:
        for sparsity in args.sparsity:
            losses: dict[str, list[float]] = {}
            for seed in args.seeds:
                start = time.perf_counter()
                for name, row in PARTS[args.part](args, sparsity, steps, seed):
                    setting = {"part": args.part, "setting": name, "steps": steps, "sparsity": sparsity, "seed": seed}
                    rows = json.loads(output.read_text(encoding="utf-8")) if output.is_file() else []
                    rows.append(setting | row | {"seconds": time.perf_counter() - start} | machine)
                    output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
                    losses.setdefault(name, []).append(row["loss"])
            print(f"{args.part}, {steps} steps, sparsity {sparsity}: held-out loss, mean (lowest, highest)")
            for name, values in losses.items():
                print(f"  {name}: {statistics.mean(values):+.3f} ({min(values):+.3f}, {max(values):+.3f})", flush=True)


if __name__ == "__main__":
    main()
