"""
Models that the demo compares its student with, all on the same held-out audio:

- the student itself right after the cut, before stage 2;
- a student that was pruned at random to the same size and distilled for as many steps;
- a student of the same recipe whose loss sees DPHuBERT's layers instead of groups.
"""

import copy
import logging
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, set_seed

from skill_hf import SkillConfig, SkillDistillationTrainer
from skill_hf.analysis import layer_distances
from skill_hf.compression.pruning import fit_gates
from skill_hf.data import calibration_waveforms
from skill_hf.models.families import build_student
from skill_hf.publishing.plots import plot_layer_distances
from skill_hf.recipe.published_recipes import dphubert_layers


logger = logging.getLogger("skill_hf.demo_comparison")


@torch.no_grad()
def prune_at_random(teacher: PreTrainedModel, units: list[str], num_parameters: int, seed: int = 0) -> PreTrainedModel:
    """A copy of `teacher` with units cut at random, the same share everywhere, down to `num_parameters`."""
    student = build_student(teacher)
    student.add_gates(units)
    gates = [gate for _, gate in student.named_gates()]
    generator = torch.Generator().manual_seed(seed)
    for gate in gates:
        gate.log_alpha.copy_(torch.randn(gate.size, generator=generator))
    fit_gates(student, num_parameters)
    for gate in gates:
        # Wide open or closed: what stays keeps its weights, where a value between 0 and 1 would scale them down.
        gate.log_alpha.copy_(torch.where(gate.deterministic() > 0, 30.0, -30.0))
    student.prune()
    return student


def train_rival(
    trainer: SkillDistillationTrainer, name: str, skill_config: SkillConfig, model: PreTrainedModel | None = None
) -> SkillDistillationTrainer:
    """Trains with the data, the seed and the settings of `trainer`, but another recipe or another student."""
    args = copy.copy(trainer.args)
    args.output_dir = str(Path(trainer.args.output_dir) / "_comparison" / name)
    args.push_to_hub = args.eval_on_start = False
    set_seed(args.seed)
    rival = SkillDistillationTrainer(
        teacher=trainer.teacher,
        skill_config=skill_config,
        args=args,
        train_dataset=trainer.train_dataset,
        eval_dataset=trainer.eval_dataset,
        model=model,
        processing_class=trainer.processing_class,
    )
    rival.data_collator, rival.eval_data_collator = trainer.data_collator, trainer.eval_data_collator
    rival.train()
    return rival


def compare(trainer: SkillDistillationTrainer) -> dict:
    """
    Trains both rivals, prints two tables and writes `layer_distances_compared.png`.

    Args:
        trainer ([`SkillDistillationTrainer`]): after `train()` with `eval_on_start`, and `evaluate()`.

    Returns:
        `dict`: `students` (parameters and held-out distillation loss of each), `dphubert_layers`, `layer_distances`
        (measure -> recipe -> distance at each hidden state; empty on other than the main process) and `seconds`.
    """
    config, total = trainer.skill_config, trainer.steps.total
    dphubert = dphubert_layers(trainer.model.config.num_hidden_layers)
    start = time.perf_counter()
    logger.info("Comparison 1 of 2: pruned at random to the same size, then distilled for %d steps", total)
    # All steps are of the second stage here, at the higher of the two learning rates.
    learning_rate = max(trainer.learning_rates)
    by_chance = train_rival(
        trainer,
        "random",
        replace(config, layer_groups=trainer.layer_groups, final_steps=total, final_learning_rate=learning_rate),
        prune_at_random(trainer.teacher, config.pruning_units, trainer.model.num_parameters(), trainer.args.seed),
    )
    by_chance.evaluate()
    students = {
        name: {"parameters": run.model.num_parameters(), "eval_distillation_loss": logged_loss(run, step)}
        for name, run, step in (
            ("SKILL, both stages", trainer, total),
            ("SKILL, after the cut, before stage 2", trainer, trainer.steps.joint),
            ("pruned at random, same number of steps", by_chance, total),
        )
    }
    seconds = {"random": time.perf_counter() - start}

    start = time.perf_counter()
    logger.info("Comparison 2 of 2: the same recipe, but the loss sees DPHuBERT's layers %s", dphubert)
    rival = train_rival(trainer, "dphubert", replace(config, layer_groups=dphubert, projection_groups=None))
    seconds["dphubert"] = time.perf_counter() - start

    distances = {}
    if trainer.is_world_process_zero():
        groups = {"SKILL": trainer.layer_groups, "DPHuBERT's layers": dphubert}
        distances = measure_distances(dict(zip(groups, (trainer, rival), strict=True)))
        figure = plot_layer_distances(distances["cka"], "distance to the teacher (1 - CKA), held-out audio", groups)
        figure.savefig(Path(trainer.args.output_dir) / "layer_distances_compared.png")
        shutil.rmtree(Path(trainer.args.output_dir) / "_comparison", ignore_errors=True)
        print_losses(students, trainer.layer_groups)
        print_distances(distances["cka"])
    return {
        "students": students,
        "dphubert_layers": dphubert,
        "layer_distances": {
            measure: {name: values.tolist() for name, values in by_model.items()}
            for measure, by_model in distances.items()
        },
        "seconds": seconds,
    }


def logged_loss(trainer: SkillDistillationTrainer, step: int) -> float:
    """Held-out distillation loss that was logged last at `step`; at the end of stage 1, thus the one after the cut."""
    return [
        line["eval_distillation_loss"]
        for line in trainer.state.log_history
        if "eval_distillation_loss" in line and line["step"] == step
    ][-1]


def measure_distances(trainers: dict[str, SkillDistillationTrainer]) -> dict[str, dict[str, np.ndarray]]:
    """Measure -> name -> distance between student and teacher at each hidden state, on all of the held-out audio."""
    measured = {}
    for name, trainer in trainers.items():
        audio = calibration_waveforms(
            trainer.eval_dataset,
            len(trainer.eval_dataset),
            trainer.skill_config.calibration_seconds,
            seed=trainer.args.seed,
            feature_extractor=trainer.processing_class,
        )
        measured[name] = layer_distances(trainer.teacher, trainer.model, audio)
    measures = next(iter(measured.values()))
    return {measure: {name: values[measure] for name, values in measured.items()} for measure in measures}


def print_losses(students: dict[str, dict], layer_groups: list[list[int]]) -> None:
    print(f"\nDistillation loss on held-out speech, over the groups {layer_groups} (-1: the teacher itself)\n")
    width = max(map(len, students))
    print(f"{'student':<{width}}  parameters     loss")
    for name, row in students.items():
        print(f"{name:<{width}}  {row['parameters']:>10,}  {row['eval_distillation_loss']:>7.3f}")


def print_distances(distances: dict[str, np.ndarray]) -> None:
    print("\nDistance between student and teacher at each hidden state (1 - CKA, held-out speech)\n")
    width = max(map(len, distances))
    print(" " * width + "".join(f"{layer:>7}" for layer in range(len(next(iter(distances.values()))))) + "   mean")
    for name, values in distances.items():
        print(f"{name:<{width}}" + "".join(f"{value:>7.3f}" for value in values) + f"{values.mean():>7.3f}")
