"""
Measures speed and memory, prints tables of ratios, and writes all results, with every measured time, to a JSON file.

A quick version, some minutes on 2 CPU cores:

    python benchmarks/run_benchmarks.py --quick

Everything, on a quiet machine (hours on 2 cores), including a comparison with DPHuBERT's own code:

    git clone https://github.com/pyf98/DPHuBERT
    python benchmarks/run_benchmarks.py --dphubert DPHuBERT --threads 2

One part:

    python benchmarks/run_benchmarks.py --parts inference --cases 4x10 --precisions fp32 --modes eager
    python benchmarks/run_benchmarks.py --parts training --training_case 4x5 --training_precisions bf16
    python benchmarks/run_benchmarks.py --parts clustering --measures cka cosine distillation mutual_knn
    python benchmarks/run_benchmarks.py --parts inference --cases 4x10 --models wavlm-base-plus-skill --profile

On a GPU, add `--device cuda`; times are then measured with CUDA events.
"""

import dataclasses
import json
import logging
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import HfArgumentParser


sys.path.insert(0, str(Path(__file__).resolve().parent))

from clustering_time import measure_clustering  # noqa: E402
from compared_models import PRUNED_SHAPES, ComparedModel, make_compared_models, make_teacher  # noqa: E402
from dphubert_clone import DPHuBERT, check_agreement  # noqa: E402
from inference import MODES, PRECISIONS, Case, OnnxFiles, measure_inference, profile_inference  # noqa: E402
from machine import DTYPES, describe_machine, peak_bandwidth, peak_flops  # noqa: E402
from tables import render  # noqa: E402
from training_step import (  # noqa: E402
    DPHUBERT,
    PLAIN,
    RIVALS,
    Settings,
    average_over_stage,
    is_of_stage,
    measure_training,
)

from skill_hf.grouping.similarity import SIMILARITY_MEASURES  # noqa: E402


logger = logging.getLogger("benchmarks")

PARTS = ("inference", "training", "clustering")
CASES = tuple(f"{clips}x{seconds}" for clips in (1, 4, 16) for seconds in (2, 10, 30))
QUICK = {
    "cases": ["1x2", "4x10"],
    "modes": ["eager"],
    "precisions": ["fp32", "bf16"],
    "training_precisions": ["fp32"],
    "training_rivals": [rival.name for rival in RIVALS if not rival.compiled],
}


@dataclass
class BenchmarkArguments:
    """What is measured, and against what."""

    parts: list[str] = field(
        default_factory=lambda: list(PARTS), metadata={"help": f"What to measure: {', '.join(PARTS)}."}
    )
    teacher: str | None = field(
        default=None,
        metadata={"help": "Hub id or directory of a stock WavLM; random weights in the shape of Base+ by default."},
    )
    pruned: list[str] = field(
        default_factory=lambda: list(PRUNED_SHAPES),
        metadata={"help": f"Pruned shapes of Base+ to compare: {', '.join(PRUNED_SHAPES)}, or none."},
    )
    models: list[str] = field(
        default_factory=list, metadata={"help": "Directories of students of your own to compare, too."}
    )
    dphubert: str | None = field(
        default=None, metadata={"help": "A clone of github.com/pyf98/DPHuBERT, whose own code is then measured, too."}
    )
    device: str = field(default="cpu", metadata={"help": "cpu or cuda."})
    threads: int = field(default=2, metadata={"help": "Threads of torch and onnxruntime."})
    runs: int = field(default=5, metadata={"help": "Times that everything is measured; the median counts."})
    warmup: int = field(default=2, metadata={"help": "Times before that which do not count."})
    gemm_sizes: list[int] = field(
        default_factory=lambda: [1024, 2048, 4096],
        metadata={"help": "Sizes of the square matrix products whose best is the peak of arithmetic."},
    )
    copied_megabytes: int = field(
        default=1024,
        metadata={
            "help": "Size of the copy that is the peak of memory traffic, above the last cache of the processor."
        },
    )
    seed: int = field(default=0, metadata={"help": "Seed of the weights and of the audio, which is noise."})
    quick: bool = field(default=False, metadata={"help": "Few cases, nothing compiled or exported."})
    cases: list[str] = field(
        default_factory=lambda: list(CASES), metadata={"help": "Batches of inference, clips x seconds."}
    )
    precisions: list[str] = field(
        default_factory=lambda: list(PRECISIONS), metadata={"help": f"Of inference: {', '.join(PRECISIONS)}."}
    )
    modes: list[str] = field(
        default_factory=lambda: list(MODES),
        metadata={"help": f"Of inference: {', '.join(MODES)}. int8 runs as onnx alone, bf16 as all others."},
    )
    only: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names of the models of inference to measure; all by default. Ratios are to stock in any case."
        },
    )
    profile: bool = field(
        default=False,
        metadata={
            "help": "Show which operators take the time of the first case, in all modes but `compiled`, and of a step."
        },
    )
    training_case: str = field(default="4x5", metadata={"help": "Batch of the training step, clips x seconds."})
    training_precisions: list[str] = field(
        default_factory=lambda: list(DTYPES), metadata={"help": f"Of the training step: {', '.join(DTYPES)}."}
    )
    training_rivals: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names of rivals in the training step, beside the peer; by default all of ours. With a clone of"
            " DPHuBERT `plain peer` is one that can be named."
        },
    )
    training_compiler: str = field(
        default="inductor", metadata={"help": "Backend of `torch.compile` for the rival that is compiled."}
    )
    schedule: list[str] = field(
        default_factory=lambda: ["0:1", "0.1:0.25", "1:0.25"],
        metadata={
            "help": "Sizes of the student in a stage that shrinks, for its average step: share of the stage that is"
            " over, then share of the teacher's parameters that are left."
        },
    )
    measures: list[str] = field(
        default_factory=lambda: ["cka"], metadata={"help": f"Of clustering: {', '.join(SIMILARITY_MEASURES)}."}
    )
    clustering_case: str = field(default="8x10", metadata={"help": "Audio of clustering, clips x seconds."})
    output: str = field(default="benchmarks.json", metadata={"help": "Where the JSON file is written."})

    def __post_init__(self):
        if self.quick:
            for name, value in QUICK.items():
                setattr(self, name, value)
        if self.pruned == ["none"]:
            self.pruned = []
        for name, allowed in (
            ("parts", PARTS),
            ("pruned", PRUNED_SHAPES),
            ("precisions", PRECISIONS),
            ("modes", MODES),
            ("training_precisions", DTYPES),
            ("training_rivals", [rival.name for rival in (PLAIN, *RIVALS)]),
            ("measures", SIMILARITY_MEASURES),
        ):
            for value in getattr(self, name) or ():
                if value not in allowed:
                    raise ValueError(f"`--{name}` must be some of {', '.join(allowed)}, but holds `{value}`.")
        for name, least in (("threads", 1), ("runs", 1), ("warmup", 0), ("copied_megabytes", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"`--{name}` must be at least {least}, but is {getattr(self, name)}.")
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"`--device` must be cpu or cuda, but is `{self.device}`.")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("`--device` is cuda, but torch finds no GPU.")
        for case in (*self.cases, self.training_case, self.clustering_case):
            Case.parse(case)
        self.parse_schedule()

    def parse_schedule(self) -> list[tuple[float, float]]:
        """Pairs of share of the stage and share of the parameters."""
        try:
            pairs = [tuple(map(float, pair.split(":"))) for pair in self.schedule]
            good = pairs and all(0 <= time <= 1 and 0 <= share <= 1 for time, share in pairs)
        except ValueError:
            good = False
        if not good:
            raise ValueError(f"`--schedule` must be pairs of shares such as 0:1 0.1:0.25, but is {self.schedule}.")
        return pairs


def main(arguments: list[str] | None = None) -> dict:
    """Measures, prints, writes; returns what is in the file."""
    (args,) = HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses(arguments)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logger.setLevel(logging.INFO)
    device = torch.device(args.device)
    threads = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    try:
        return measure(args, device)
    finally:
        torch.set_num_threads(threads)


def measure(args: BenchmarkArguments, device: torch.device) -> dict:
    logger.info("Peaks of this machine")
    results = {
        "machine": describe_machine(device),
        "settings": dataclasses.asdict(args),
        "peaks": {
            "flops": {precision: peak_flops(precision, device, args.gemm_sizes) for precision in DTYPES},
            "bandwidth": peak_bandwidth(device, args.copied_megabytes * 10**6),
        },
    }
    results |= {name: [] for name in ("models", "inference", "training", "stages", "clustering", "profiles")}

    def keep(name: str, row: dict) -> None:
        results[name].append(row)
        Path(args.output).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")

    teacher = make_teacher(args.teacher, args.seed)
    if "inference" in args.parts:
        with tempfile.TemporaryDirectory() as directory:
            measure_models(args, teacher, device, OnnxFiles(directory, args.seed), results["peaks"], keep)
    if "clustering" in args.parts:
        logger.info("Clustering")
        case = Case.parse(args.clustering_case)
        for row in measure_clustering(
            teacher.to(device), case, args.measures, device, args.runs, args.warmup, args.seed
        ):
            keep("clustering", row)
    del teacher
    if "training" in args.parts:
        for precision in args.training_precisions:
            logger.info("Training step, %s", precision)
            measure_stage(args, precision, results["peaks"], keep)
    print(render(results))
    logger.info("All times are in %s", args.output)
    return results


def measure_models(args, teacher, device: torch.device, files: OnnxFiles, peaks: dict, keep: Callable) -> None:
    """Inference of all models, and its profiles."""
    models = models_of_inference(args, teacher, device)
    cases = [Case.parse(case) for case in args.cases]
    for one in models:
        keep("models", one.describe(cases[0].seconds))
    names = args.only or [one.name for one in models]
    forms = {"precisions": args.precisions, "modes": args.modes, "device": device, "files": files, "seed": args.seed}
    for row in measure_inference(models, names, cases, runs=args.runs, warmup=args.warmup, peaks=peaks, **forms):
        keep("inference", row)
    if args.profile:
        for row in profile_inference(models, cases[0], **forms):
            keep("profiles", row)


def models_of_inference(args: BenchmarkArguments, teacher, device: torch.device) -> list[ComparedModel]:
    """Ours and stock, and DPHuBERT's twin of each of ours if there is a clone, whose outputs agree."""
    models = make_compared_models(teacher, args.pruned, args.models, args.seed)
    if args.dphubert is not None:
        clone, clip = DPHuBERT(args.dphubert), Case(2, 1.5).noise(args.seed, torch.device("cpu"))
        for one in models[1:]:
            twin = clone.build(one.model)
            difference = check_agreement(one.name, one.model, twin, clip)
            about = f"DPHuBERT's model with the weights of `{one.name}` (outputs differ by {difference:.0e})"
            models.append(ComparedModel(f"dphubert:{one.name}", twin, about, one.model))
    if args.only is not None:
        unknown = set(args.only) - {one.name for one in models}
        if unknown:
            raise ValueError(
                f"`--only` names {', '.join(sorted(unknown))}; there are {', '.join(one.name for one in models)}."
            )
        models = [models[0], *(one for one in models[1:] if one.name in args.only)]
    for one in models:
        one.model.to(device)
    return models


def measure_stage(args: BenchmarkArguments, precision: str, peaks: dict, keep) -> None:
    """All rivals of the training step in one precision, and the average of a stage that shrinks."""
    pruned = (args.models or args.pruned or [None])[0]
    rivals = [PLAIN if args.dphubert is None else DPHUBERT]
    names = args.training_rivals or [rival.name for rival in RIVALS]
    rivals += [rival for rival in (PLAIN, *RIVALS) if rival.name in names and rival not in rivals]
    if pruned is None and any(rival.size != "unpruned" for rival in rivals):
        raise ValueError("The training step at smaller sizes needs a pruned shape or a student: name one.")
    settings = Settings(
        teacher=args.teacher,
        pruned=pruned,
        dphubert=args.dphubert,
        device=args.device,
        threads=args.threads,
        case=Case.parse(args.training_case),
        precision=precision,
        runs=args.runs,
        warmup=args.warmup,
        seed=args.seed,
        profile=args.profile,
        compiler=args.training_compiler,
    )
    rows = list(measure_training(settings, rivals, peaks))
    for row in rows:
        profile = row.pop("profile")
        keep("training", row)
        if profile is not None:
            one = {"case": row["case"], "model": row["rival"], "precision": precision, "mode": "training step"}
            keep("profiles", one | profile)
    sizes = [row for row in rows if is_of_stage(row)]
    if len(sizes) > 1:
        average = average_over_stage(sizes, args.parse_schedule())
        keep("stages", {"precision": precision, "average": average, "ratio": average / rows[0]["median"]})


if __name__ == "__main__":
    main()
