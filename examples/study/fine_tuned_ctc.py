"""
Compress a fine-tuned model, or compress the encoder and fine-tune that? Error rates of both on speakers whom no model
has heard, for a small WavLM and speech recognition in characters (CTC).

    python examples/study/fine_tuned_ctc.py --data_dir DIR/speech-commands-test --text_column word

The directory has the audio and a `metadata.csv` with `file_name`, `speaker` and the text. Other defaults are for
single words, clips of one second; sentences need more steps of fewer clips.

Every way consists of the same work on the same audio, `fine_tune_steps` updates with labels and `compress_steps`
updates of compression:

- *one run*: the teacher is fine-tuned once, then compressed with its head, without labels;
- *one run, labels*: the same, and the compression has the loss of the labels, too (`task_weight`);
- *compressed first*: the pretrained encoder is compressed, then the student is fine-tuned as the teacher was.

It takes an hour on 2 cores and may be stopped at any time: finished parts are not repeated, and a part that was
stopped resumes from its last checkpoint. Start the same command twice with `--num_threads 1` to use both cores fully:
a process takes the next part that no other one is working on.

Results are in one JSON file. Without `--data_dir`, their table is printed.
"""

import json
import logging
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import datasets
import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoModel, AutoModelForCTC, TrainerCallback, Wav2Vec2Processor, pipeline, set_seed


sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

from draw_study import number, table  # noqa: E402
from example_utils import REPOSITORY, FineTuner, FineTuningArguments  # noqa: E402
from finetune_ctc import make_tokenizer, normalise_text  # noqa: E402
from pretrain_teacher import HELDOUT_LIBRISPEECH_SPEAKERS, heldout_split  # noqa: E402
from run_study import machine  # noqa: E402
from speech_folders import read_metadata  # noqa: E402
from study_probes import draw  # noqa: E402

from skill_hf import SkillConfig, SkillDistillationTrainer, SkillTrainingArguments  # noqa: E402
from skill_hf.cli.settings import Count, Positive, Share, Whole, parse, run_script  # noqa: E402
from skill_hf.data import SpeechCollator, read_audio  # noqa: E402
from skill_hf.data.audio import audio_seconds  # noqa: E402
from skill_hf.distillation.checkpointing import last_complete_checkpoint  # noqa: E402
from skill_hf.distillation.task_heads import CTC, label_encoder  # noqa: E402
from skill_hf.encoders import feature_extractor_for  # noqa: E402
from skill_hf.files import read_json, try_directory, write_json  # noqa: E402
from skill_hf.metrics import load_metric  # noqa: E402
from skill_hf.models.loading import load_config, load_model  # noqa: E402


logger = logging.getLogger("fine_tuned_ctc")

TEACHER = "teacher"
# Ways to a small fine-tuned model, as rows of the table.
WAYS = {
    "one run": "fine-tuned teacher, one run",
    "one run, labels": "the same, with labels",
    "compressed first": "encoder compressed, then fine-tuned",
}
ENCODER = "encoder"
# Settings that change no number.
FREE = ("data_dir", "work_dir", "results", "num_threads", "max_parts")


@dataclass
class FineTunedArguments:
    data_dir: Path | None = field(
        default=None,
        metadata={
            "help": "Directory with metadata.csv (file_name, speaker, text) and audio; without it, prints results."
        },
    )
    teacher: Path = field(
        default=REPOSITORY / "examples" / "demo" / "teacher", metadata={"help": "Pretrained encoder, a directory."}
    )
    text_column: str = field(default="text", metadata={"help": "Column of metadata.csv with the transcripts."})
    results: Path = field(
        default=REPOSITORY / "examples" / "study" / "results" / "fine_tuned_ctc.json",
        metadata={"help": "JSON file to add results to."},
    )
    work_dir: Path = field(
        default=REPOSITORY / "outputs" / "fine_tuned_ctc", metadata={"help": "Directory for models and checkpoints."}
    )
    sparsity: Share = field(default=0.5, metadata={"help": "Share of parameters to remove."})
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2], metadata={"help": "Of the students; the teacher has the first."}
    )
    fine_tune_steps: Count = field(default=400, metadata={"help": "Updates of a fine-tuning."})
    fine_tune_learning_rate: Positive = field(default=3e-4, metadata={"help": "Its peak learning rate."})
    head_learning_rate: Positive = field(default=1e-2, metadata={"help": "The same of the new head."})
    head_steps: Whole = field(default=150, metadata={"help": "First updates of a fine-tuning, of the head alone."})
    compress_steps: Count = field(default=240, metadata={"help": "Updates of a compression, both stages."})
    compress_learning_rate: Positive = field(default=5e-4, metadata={"help": "Peak learning rate of both stages."})
    task_weight: Positive = field(default=1.0, metadata={"help": "Weight of the labels' loss where they are used."})
    fine_tune_batch_size: Count = field(default=32, metadata={"help": "Clips per update of a fine-tuning."})
    compress_batch_size: Count = field(default=16, metadata={"help": "Clips per update of a compression."})
    bf16: bool = field(
        default=False, metadata={"help": "Train with bfloat16 autocast; slow on CPUs without AMX or AVX512-BF16."}
    )
    calibration_samples: Count = field(default=64, metadata={"help": "Clips to group the layers by."})
    max_test_clips: Count = field(default=600, metadata={"help": "Clips to test on."})
    num_threads: Count = field(default=2, metadata={"help": "CPU threads of this process."})
    max_parts: Whole | None = field(default=None, metadata={"help": "Parts that this process does at most."})

    def __post_init__(self):
        if self.head_steps >= self.fine_tune_steps:
            raise ValueError(
                f"`head_steps` must be below `fine_tune_steps` ({self.fine_tune_steps}), but is {self.head_steps}."
            )
        if len(set(self.seeds)) != len(self.seeds) or not self.seeds:
            raise ValueError(f"`seeds` must be numbers, each once, but is {self.seeds}.")


@dataclass(frozen=True)
class Speech:
    """Clips to train on and to test on: `audio`, not decoded, `labels`, a transcript, and `length` in seconds."""

    train: datasets.Dataset
    test: datasets.Dataset
    minutes: float


@dataclass(frozen=True)
class Part:
    """
    A model to make.

    Args:
        name: of its results and of its directory.
        needs: part whose model it starts from, if any.
        make: trains and saves it, given directories of checkpoints and of the result; returns whether it resumed.
    """

    name: str
    needs: str | None
    make: Callable[[Path, Path], bool]


def read_speech_data(args: FineTunedArguments) -> Speech:
    """
    Clips with a speaker and a transcript. The test is on speakers whom the demo's teacher has never heard, by
    [`heldout_split`]: four readers of LibriSpeech or, in other data, a third of the speakers.

    Raises:
        `ValueError`: if `metadata.csv` lacks a column, or there is nobody to train on or to test on.
    """
    rows = read_metadata(args.data_dir, ["speaker", args.text_column])
    is_librispeech = any(row["speaker"] in HELDOUT_LIBRISPEECH_SPEAKERS for row in rows)
    train, test = [], []
    for row in rows:
        row["labels"] = normalise_text(row[args.text_column])
        if row["labels"] and row["speaker"]:
            split = heldout_split(row["file_name"], row["speaker"], is_librispeech)
            (test if split == "speakers" else train).append(row)
    if not train or not test:
        raise ValueError(
            f"{args.data_dir} has {len(train)} transcribed clips of speakers to train on and {len(test)} of speakers"
            " to test on, but needs some of both: use data of more speakers."
        )
    train, test = (as_rows(args.data_dir, rows) for rows in (train, draw(test, args.max_test_clips)))
    return Speech(train, test, sum(train["length"]) / 60)


def as_rows(directory: Path, rows: list[dict]) -> datasets.Dataset:
    paths = [str((directory / row["file_name"]).resolve()) for row in rows]
    lengths = [audio_seconds(path) for path in tqdm(paths, desc="Checking audio files", unit="file")]
    columns = {"audio": paths, "labels": [row["labels"] for row in rows], "length": lengths}
    return datasets.Dataset.from_dict(columns).cast_column("audio", datasets.Audio(decode=False))


def common_arguments(args: FineTunedArguments, directory: Path, steps: int, batch_size: int, seed: int) -> dict:
    return {
        "output_dir": str(directory),
        "max_steps": steps,
        "per_device_train_batch_size": batch_size,
        "train_sampling_strategy": "group_by_length",
        "save_strategy": "steps",
        "save_steps": max(steps // 8, 1),
        "save_total_limit": 1,
        "logging_steps": max(steps // 20, 1),
        "report_to": "none",
        "bf16": args.bf16,
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "seed": seed,
    }


class HeadFirst(TrainerCallback):
    """
    Trains the head alone for some steps (wav2vec 2.0, arXiv 2006.11477, section 4.3): gradients that come through a
    random head would spoil what the encoder has learned.
    """

    def __init__(self, encoder: nn.Module, steps: int):
        self.parameters = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
        self.steps = steps

    def on_step_begin(self, args, state, control, **kwargs):
        for parameter in self.parameters:
            parameter.requires_grad_(state.global_step >= self.steps)


def fine_tune(args: FineTunedArguments, speech: Speech, source: Path, seed: int, run: Path, output: Path) -> bool:
    """Trains all of an encoder but its convolutions, and a new head, by CTC."""
    set_seed(seed)
    tokenizer = make_tokenizer(speech.train["labels"][:])
    config = load_config(
        source,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        mask_time_prob=0.0,  # so few updates do not overfit
        ctc_loss_reduction="mean",
        ctc_zero_infinity=True,
    )
    feature_extractor = feature_extractor_for(str(source), config)
    processor = Wav2Vec2Processor(feature_extractor=feature_extractor, tokenizer=tokenizer)
    model = load_model(source, AutoModelForCTC, config)
    model.freeze_feature_encoder()
    collator = SpeechCollator(
        feature_extractor, crop="none", max_seconds=60.0, label_encoder=label_encoder(model, CTC, tokenizer)
    )
    head_first = HeadFirst(model.base_model, args.head_steps)
    groups = [
        {"params": head_first.parameters, "lr": args.fine_tune_learning_rate},
        {"params": list(model.lm_head.parameters()), "lr": args.head_learning_rate},
    ]
    trainer = FineTuner(
        model=model,
        optimizers=(torch.optim.AdamW(groups, weight_decay=0.0), None),
        callbacks=[head_first],
        args=FineTuningArguments(
            **common_arguments(args, run, args.fine_tune_steps, args.fine_tune_batch_size, seed),
            learning_rate=args.fine_tune_learning_rate,
            remove_unused_columns=False,
        ),
        data_collator=collator,
        train_dataset=speech.train,
        processing_class=processor,
    )
    checkpoint = last_complete_checkpoint(str(run))
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(str(output))
    return checkpoint is not None


def compress(
    args: FineTunedArguments,
    speech: Speech,
    source: Path,
    seed: int,
    run: Path,
    output: Path,
    task: str = "ctc",
    task_weight: float = 0.0,
) -> bool:
    """Distils and prunes a model with the default recipe, scaled to few steps; labels are read with `task_weight`."""
    trainer = SkillDistillationTrainer(
        teacher=str(source),
        task=task,
        skill_config=SkillConfig(
            target_sparsity=args.sparsity,
            calibration_samples=args.calibration_samples,
            final_learning_rate=args.compress_learning_rate,
            task_weight=task_weight,
        ),
        args=SkillTrainingArguments(
            **common_arguments(args, run, args.compress_steps, args.compress_batch_size, seed),
            learning_rate=args.compress_learning_rate,
            overwrite_output_dir=True,
        ),
        train_dataset=speech.train if task_weight else speech.train.remove_columns("labels"),
    )
    trainer.data_collator.max_seconds = 60.0  # labels of a clip that is cropped would be lost
    checkpoint = last_complete_checkpoint(str(run))
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(str(output))
    return checkpoint is not None


def plan(args: FineTunedArguments, speech: Speech) -> list[Part]:
    """All parts, each after what it needs."""
    models = args.work_dir / "models"

    def part(name: str, needs: str | None, function: Callable, source: Path, seed: int, **settings) -> Part:
        return Part(
            name, needs, lambda run, output: function(args, speech, source, seed, run=run, output=output, **settings)
        )

    parts = [part(TEACHER, None, fine_tune, args.teacher, args.seeds[0])]
    for seed in args.seeds:
        encoder = f"{ENCODER} {seed}"
        parts += [
            part(encoder, None, compress, args.teacher, seed, task=ENCODER),
            part(f"one run {seed}", TEACHER, compress, models / TEACHER, seed),
            part(f"compressed first {seed}", encoder, fine_tune, models / encoder, seed),
        ]
    labels = {"task_weight": args.task_weight}
    parts += [
        part(f"one run, labels {seed}", TEACHER, compress, models / TEACHER, seed, **labels) for seed in args.seeds
    ]
    return parts


def transcribe(model: Path, test: datasets.Dataset) -> list[str]:
    """What a saved model writes of each clip alone: the likeliest token of each frame, repeats and blanks removed."""
    recognizer = pipeline("automatic-speech-recognition", model=str(model))
    rate = recognizer.feature_extractor.sampling_rate
    return [recognizer(read_audio(clip, rate))["text"] for clip in tqdm(test["audio"], desc="Writing down")]


def score(model: Path, test: datasets.Dataset) -> dict[str, float]:
    """Error rates of a saved model in percent; `transcripts.json` beside it has the texts that were compared."""
    said, heard = test["labels"][:], transcribe(model, test)
    write_json(model / "transcripts.json", {"said": said, "heard": heard})
    error_rate = load_metric("error_rate")
    return {
        f"{unit}_error_rate": 100 * error_rate.compute(predictions=heard, references=said, unit=unit)["error_rate"]
        for unit in ("character", "word")
    }


def do(args: FineTunedArguments, speech: Speech, part: Part) -> None:
    """Makes and tests one model, and adds it to the results."""
    run, output = args.work_dir / "runs" / part.name, args.work_dir / "models" / part.name
    start = time.process_time()
    resumed = part.make(run, output)
    seconds = time.process_time() - start
    is_encoder = part.name.startswith(ENCODER)
    model = load_model(output, AutoModel if is_encoder else AutoModelForCTC, new_head=False)
    result = {"parameters": model.num_parameters()} | ({} if is_encoder else score(output, speech.test))
    # The time before a part was stopped is not known.
    result["cpu_seconds"] = None if resumed else round(seconds, 1)
    add_result(args, part.name, result)
    shutil.rmtree(run, ignore_errors=True)
    logger.info("%s: %s", part.name, result)


def settings_of(args: FineTunedArguments, speech: Speech) -> dict:
    """What results must share."""
    settings = {name: value for name, value in asdict(args).items() if name not in FREE}
    settings["teacher"] = args.teacher.name
    clips = {
        "data": args.data_dir.resolve().name,
        "train_clips": len(speech.train),
        "train_minutes": round(speech.minutes, 1),
        "test_clips": len(speech.test),
    }
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return json.loads(json.dumps({"settings": settings, "speech": clips, "machine": machine(device)}))


def read_results(args: FineTunedArguments) -> dict:
    return read_json(args.results) if args.results.is_file() else {}


def add_result(args: FineTunedArguments, name: str, result: dict) -> None:
    with FileLock(f"{args.results}.lock"):
        results = read_results(args)
        results["parts"][name] = result
        write_json(args.results, results)


def start_results(args: FineTunedArguments, speech: Speech) -> None:
    """
    Raises:
        `ValueError`: if the file has results of other settings.
    """
    try_directory(args.results.parent, "results")
    args.results.parent.mkdir(parents=True, exist_ok=True)
    ours = settings_of(args, speech)
    with FileLock(f"{args.results}.lock"):
        results = read_results(args)
        for kind, values in ours.items():
            if results and results.get(kind) != values:
                theirs = results.get(kind) or {}
                name = next(name for name in values if theirs.get(name) != values[name])
                raise ValueError(
                    f"{args.results} has results with `{name}` {theirs.get(name)}, now it is {values[name]}: choose"
                    " another `results` and `work_dir`, or remove both."
                )
        write_json(args.results, ours | {"parts": results.get("parts", {})})


def run(args: FineTunedArguments) -> None:
    if args.data_dir is None:
        print(markdown(read_results(args)))
        return
    try_directory(args.work_dir, "work_dir")
    datasets.disable_progress_bars()
    torch.set_num_threads(args.num_threads)
    speech = read_speech_data(args)
    start_results(args, speech)
    (args.work_dir / "models").mkdir(parents=True, exist_ok=True)
    parts, count = plan(args, speech), 0
    while count != args.max_parts:
        done = read_results(args)["parts"]
        waiting = [part for part in parts if part.name not in done]
        if not waiting:
            print(markdown(read_results(args)))
            return
        for part in waiting:
            if part.needs is None or part.needs in done:
                try:
                    with FileLock(args.work_dir / f"{part.name}.lock", timeout=0):
                        if part.name not in read_results(args)["parts"]:
                            logger.info("%s: %d of %d parts are done", part.name, len(done), len(parts))
                            do(args, speech, part)
                            count += 1
                            break
                except Timeout:  # another process is working on it
                    continue
        else:
            time.sleep(2.0)


def mean_and_range(values: list[float], digits: int = 1) -> str:
    if not values:
        return "–"
    mean = f"{np.mean(values):,.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({number(min(values), digits)}–{number(max(values), digits)})"


def markdown(results: dict) -> str:
    """
    The results as a table: means over the seeds, with the least and the largest value.

    Raises:
        `ValueError`: if there are none.
    """
    if not results.get("parts"):
        raise ValueError("There are no results yet; pass `--data_dir`.")
    parts, settings = results["parts"], results["settings"]

    def minutes(names: list[str]) -> list[float]:
        seconds = [parts[name]["cpu_seconds"] for name in names]
        return [] if None in seconds else [sum(seconds) / 60]

    rows = []
    for way, label in {TEACHER: "fine-tuned teacher", **WAYS}.items():
        names = [way] if way == TEACHER else [f"{way} {seed}" for seed in settings["seeds"]]
        if names := [name for name in names if name in parts]:
            costs = []
            for name in names:
                costs += minutes([name, name.replace(way, ENCODER)] if way == "compressed first" else [name])
            rates = [[parts[name][f"{unit}_error_rate"] for name in names] for unit in ("character", "word")]
            size = np.mean([parts[name]["parameters"] for name in names])
            rows.append([label, len(names), f"{size:,.0f}", *map(mean_and_range, rates), mean_and_range(costs, 0)])
    header = ["", "seeds", "parameters", "character error rate (%)", "word error rate (%)", "CPU minutes"]
    speech, device = results["speech"], results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in device.items() if name != "processor")
    seeds = ", ".join(map(str, settings["seeds"]))
    return (
        f"{table(header, rows)}\n\n"
        f"{speech['data']}: {speech['train_clips']} clips ({speech['train_minutes']:.0f} min) to train on,"
        f" {speech['test_clips']} clips of other speakers to test on; sparsity {settings['sparsity']:g};"
        f" {settings['fine_tune_steps']} updates of {settings['fine_tune_batch_size']} clips in each fine-tuning, the"
        f" first {settings['head_steps']} of the head alone,"
        f" {settings['compress_steps']} of {settings['compress_batch_size']} in each compression; seeds {seeds};"
        f" {'bfloat16' if settings['bf16'] else 'float32'}."
        f" {device['processor']}, {versions}."
    )


def main(arguments: list[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    return run_script(lambda: run(*parse(arguments, (FineTunedArguments,))))


if __name__ == "__main__":
    sys.exit(main())
