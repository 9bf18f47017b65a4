"""
Does pruning find units that can go without loss? Makes two teachers of a WavLM that have such units: in one, some
layers add nothing to their input; in the other, every second attention head does what the head before it does.
Compresses both with the default recipe, and once more with gates that start by importance.

    python examples/study/redundant_units.py

Offline, in about 20 minutes on 2 CPU cores. `--output` saves the results as JSON.
"""

import logging
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from transformers import TrainerCallback, WavLMConfig, WavLMModel, set_seed


sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

from draw_study import spread, table  # noqa: E402
from example_utils import DEMO_DATA, print_table  # noqa: E402
from run_study import machine  # noqa: E402

from skill_hf import SkillConfig, SkillDistillationTrainer, SkillTrainingArguments  # noqa: E402
from skill_hf.cli.settings import Count, Seconds, parse, run_script  # noqa: E402
from skill_hf.data.speech_datasets import load_audio_dir  # noqa: E402
from skill_hf.encoders import feature_extractor_for  # noqa: E402


# How far, at most, a gate starts from the start of all; by default an open gate has a `log_alpha` of 4.6.
SPREAD = 2.0
BATCHES = 8  # for the scores


@dataclass
class RedundancyArguments:
    teacher: str = field(default=str(DEMO_DATA / "teacher"), metadata={"help": "Hub id or directory of a WavLM."})
    audio_dir: str = field(default=str(DEMO_DATA / "audio" / "train"), metadata={"help": "Folder of audio."})
    target_sparsity: float = field(default=0.5, metadata={"help": "Share of the parameters to remove."})
    max_steps: Count = field(default=150, metadata={"help": "Optimizer steps of both stages."})
    batch_size: Count = field(default=4, metadata={"help": "Crops per step."})
    max_seconds: Seconds = field(default=2.0, metadata={"help": "Length of a crop in seconds."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Of the runs, one or more."})
    output: Path | None = field(default=None, metadata={"help": "JSON file for the results."})


# ---- Teachers with units that can go ----


def idle_layers(num_layers: int) -> list[int]:
    return list(range(1, num_layers, 3))


@torch.no_grad()
def with_idle_layers(model: WavLMModel) -> None:
    """Attention and feed-forward blocks of [`idle_layers`] give 0."""
    for index in idle_layers(model.config.num_hidden_layers):
        layer = model.encoder.layers[index]
        for linear in (layer.attention.out_proj, layer.feed_forward.output_dense):
            linear.weight.zero_()
            linear.bias.zero_()


@torch.no_grad()
def with_twin_heads(model: WavLMModel) -> None:
    """
    Head 1 becomes a copy of head 0, 3 of 2 and so on; each has half of the first one's weight in the output. The gates
    of the position bias become constants, since each head's reads features of its own.
    """

    def copy(of_heads: torch.Tensor) -> None:
        of_heads[1::2] = of_heads[::2]

    num_heads = model.config.num_attention_heads
    for layer in model.encoder.layers:
        attention = layer.attention
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
            copy(linear.weight.unflatten(0, (num_heads, -1)))
            copy(linear.bias.unflatten(0, (num_heads, -1)))
        attention.gru_rel_pos_linear.weight.zero_()
        copy(attention.gru_rel_pos_const[0])
        attention.out_proj.weight *= 0.5
        copy(attention.out_proj.weight.T.unflatten(0, (num_heads, -1)))
    copy(model.encoder.layers[0].attention.rel_attn_embed.weight.T)


# ---- Gates that start by importance ----


class StartByImportance(TrainerCallback):
    """
    Moves each gate by its rank among the gates of its kind, by `-SPREAD` to `SPREAD`. Ranks are those of the
    first-order Taylor score, the mean gradient of the loss (Molchanov et al., arXiv 1906.10771), here for `log_alpha`
    of gates with noise: without it the student would be a copy of the teacher, and the gradient 0.
    """

    trainer: SkillDistillationTrainer

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if self.trainer.stage != 1:
            return
        with torch.random.fork_rng(devices=[]):
            for batch in islice(self.trainer.get_train_dataloader(), BATCHES):
                self.trainer.compute_loss(model, batch).backward()
        of_size = defaultdict(list)  # kinds differ in their number of units
        for gate in self.trainer.student.base_model.gating.gates:
            of_size[gate.size].append(gate)
        for gates in of_size.values():
            scores = torch.cat([-gate.log_alpha.grad for gate in gates])
            ranks = scores.argsort().argsort() / max(len(scores) - 1, 1)
            for gate, rank in zip(gates, ranks.split([gate.size for gate in gates]), strict=True):
                gate.log_alpha.data += SPREAD * (2 * rank - 1)
        model.zero_grad()


TEACHERS = {"idle layers": with_idle_layers, "twin heads": with_twin_heads}
STARTS = {"all alike": None, "by importance": StartByImportance}


# ---- What is left ----


def compress(args: RedundancyArguments, train, change, start, seed: int) -> dict:
    """Heads and number of feed-forward units that are left of each layer, and the distillation loss at the end."""
    teacher = WavLMModel.from_pretrained(args.teacher)
    change(teacher)
    set_seed(seed)
    callbacks = [start()] if start else []
    with tempfile.TemporaryDirectory() as directory:
        trainer = SkillDistillationTrainer(
            teacher=teacher,
            skill_config=SkillConfig(
                target_sparsity=args.target_sparsity, calibration_samples=64, calibration_seconds=args.max_seconds
            ),
            args=SkillTrainingArguments(
                output_dir=directory,
                max_steps=args.max_steps,
                per_device_train_batch_size=args.batch_size,
                save_strategy="no",
                logging_steps=max(args.max_steps // 10, 1),
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
                dataloader_pin_memory=False,
                seed=seed,
            ),
            train_dataset=train,
            processing_class=feature_extractor_for(args.teacher, teacher.config),
            callbacks=callbacks,
        )
        trainer.data_collator.max_seconds = args.max_seconds
        for callback in callbacks:
            callback.trainer = trainer
        trainer.train()
    config, loss = trainer.model.config, trainer.record.losses["end"]["distillation_loss"]
    return {"heads": config.remaining_heads, "ffn_dims": list(config.intermediate_sizes), "loss": loss}


def useless_share(row: dict, width: int, num_heads: int) -> float:
    """Share of the units of idle layers that is left, in percent; heads and feed-forward units count alike."""
    shares = [
        share
        for index in idle_layers(len(row["heads"]))
        for share in (len(row["heads"][index]) / num_heads, row["ffn_dims"][index] / width)
    ]
    return 100 * float(np.mean(shares))


def twins_kept(row: dict, num_heads: int) -> tuple[float, float]:
    """
    Pairs of heads of which something is left, in percent of as many as there could be with so many heads in each
    layer; and what is expected if heads are removed at random.
    """
    pairs = num_heads // 2
    most = sum(min(len(heads), pairs) for heads in row["heads"])
    kept = sum(len({head // 2 for head in heads}) for heads in row["heads"])
    # A pair is gone with probability C(n - 2, k) / C(n, k), if k of n heads are left.
    gone = [(num_heads - k) * (num_heads - k - 1) / (num_heads * (num_heads - 1)) for k in map(len, row["heads"])]
    expected = sum(pairs * (1 - share) for share in gone)
    return 100 * kept / max(most, 1), 100 * expected / max(most, 1)


def measure(args: RedundancyArguments) -> dict:
    config, train = WavLMConfig.from_pretrained(args.teacher), load_audio_dir(args.audio_dir)
    rows = [
        {"teacher": teacher, "start": start, "seed": seed, **compress(args, train, change, callback, seed)}
        for seed in args.seeds
        for teacher, change in TEACHERS.items()
        for start, callback in STARTS.items()
    ]
    for row in rows:
        if row["teacher"] == "idle layers":
            row["useless_share"] = useless_share(row, config.intermediate_size, config.num_attention_heads)
        else:
            row["pairs_kept"], row["pairs_by_chance"] = twins_kept(row, config.num_attention_heads)
    names = ("teacher", "audio_dir", "output")
    settings = {name: value for name, value in vars(args).items() if name not in names}
    return {"rows": rows, "settings": settings, "machine": machine(torch.device("cpu"))}


def markdown(results: dict) -> str:
    """A row for each teacher and start, with mean and standard deviation over the seeds."""
    lines = []
    for teacher in TEACHERS:
        for start in STARTS:
            rows = [row for row in results["rows"] if (row["teacher"], row["start"]) == (teacher, start)]
            cells = ([row.get(name, np.nan) for row in rows] for name in ("useless_share", "pairs_kept"))
            chance = [row.get("pairs_by_chance", np.nan) for row in rows]
            loss = spread([row["loss"] for row in rows], 3)
            lines.append([teacher, start, len(rows), *map(spread, cells), spread(chance), loss])
    header = ["teacher", "gates start", "seeds", "useless units left (%) ↓", "pairs of heads kept (%) ↑"]
    return table([*header, "by chance", "loss at the end ↓"], lines, texts=2)


def main(arguments: list[str] | None = None) -> int:
    logging.basicConfig(format="%(message)s")
    return run_script(lambda: print_table(measure, markdown, *parse(arguments, (RedundancyArguments,))))


if __name__ == "__main__":
    sys.exit(main())
