"""Code shared by several examples: models, rows of speech from a dataset, and fine-tuning."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import torch
import transformers
from transformers import Trainer, TrainingArguments

from skill_hf.cli.settings import Count, Positive, Share, parse, require, run_script
from skill_hf.data import AudioError, load_speech_dataset, read_audio
from skill_hf.distillation.checkpointing import last_complete_checkpoint
from skill_hf.files import keep_sources, read_json, try_directory, try_file, write_json
from skill_hf.models import loading
from skill_hf.models.properties import receptive_field


logger = logging.getLogger(__name__)

REPOSITORY = Path(__file__).resolve().parents[1]
DEMO_STUDENT = REPOSITORY / "outputs" / "demo"
DEMO_DATA = REPOSITORY / "examples" / "demo"


def print_table(measure: Callable[..., dict], markdown: Callable[[dict], str], args) -> None:
    """Prints a table of what is measured with `args`, and writes the results to `args.output` unless it is `None`."""
    if args.output is not None:
        try_file(args.output)
    results = measure(args)
    print(markdown(results))
    if args.output is not None:
        write_json(args.output, results)


@dataclass
class ModelArguments:
    model: str = field(
        default=str(DEMO_STUDENT),
        metadata={"help": "Hub id or directory of a speech encoder; the output of `make demo` by default."},
    )
    from_scratch: bool = field(
        default=False, metadata={"help": "Initialise all weights at random and train them all, as a baseline."}
    )
    freeze_feature_encoder: bool = field(default=True, metadata={"help": "Do not train the convolutions."})
    mask_time_prob: Share = field(
        default=0.0,
        metadata={"help": "Share of frames that SpecAugment masks; the model's own value is for pretraining."},
    )
    lora: bool = field(default=False, metadata={"help": "Train only low-rank adapters and the head (needs peft)."})
    lora_rank: Count = field(default=8, metadata={"help": "Rank of the adapters."})
    lora_alpha: Positive = field(
        default=16.0, metadata={"help": "Scale of the adapters: their output is multiplied by alpha / rank."}
    )
    lora_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "out_proj", "intermediate_dense", "output_dense"],
        metadata={"help": "Name suffixes of the linear layers that get an adapter."},
    )


@dataclass
class FineTuningArguments(TrainingArguments):
    """[`~transformers.TrainingArguments`] with other defaults."""

    learning_rate: float = field(default=5e-4, metadata={"help": "Peak learning rate."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Share of all steps (below 1) or a number of steps."})
    logging_steps: float = field(default=50, metadata={"help": "Optimizer steps between log lines."})
    save_strategy: str = field(default="no", metadata={"help": "When to save checkpoints."})
    report_to: str = field(default="none", metadata={"help": "Where to log to."})
    dataloader_pin_memory: bool = field(
        default=torch.cuda.is_available(), metadata={"help": "Whether to use pinned memory."}
    )


@dataclass
class DataArguments:
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Hub id, or a local directory in any format that `datasets` can load; the demo's by default."
        },
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    train_split: str = field(default="train", metadata={"help": "Split to train on; `a+b` concatenates two."})
    test_dataset_name: str | None = field(
        default=None, metadata={"help": "Dataset to test on; the training dataset by default."}
    )
    test_split: str = field(default="test", metadata={"help": "Split to test on."})
    audio_column: str = field(default="audio", metadata={"help": "Name of the audio column."})


def check_demo_student(model: str) -> None:
    """
    Raises:
        `ValueError`: if `model` is what `make demo` leaves, and it has not been run.
    """
    if Path(model) == DEMO_STUDENT and not (DEMO_STUDENT / "config.json").is_file():
        raise ValueError(f"There is no student in {DEMO_STUDENT} yet: run `make demo`, or pass one with `--model`.")


def load_config(model: str, **settings) -> transformers.PreTrainedConfig:
    """
    Configuration of a speech encoder, with `settings` put into it. A student's norm then leaves out padding, so that
    what the network makes of a clip doesn't depend on the others in the batch.

    Raises:
        `ValueError`: if there is no such model, or it takes no waveforms.
    """
    check_demo_student(model)
    config = loading.load_config(model, **settings)
    if not hasattr(config, "feat_extract_norm"):
        raise ValueError(f"`{model}` is a `{config.model_type}`, not a waveform encoder like WavLM.")
    if hasattr(config, "masked_group_norm"):
        config.masked_group_norm = True
    return config


def prepare_model(args: ModelArguments, auto_class, config) -> transformers.PreTrainedModel:
    """The encoder with a new head, in float32 (weights may be stored in half precision)."""
    if args.from_scratch:
        return auto_class.from_config(config, dtype=torch.float32)
    model = loading.load_model(args.model, auto_class, config)  # one that was fine-tuned before has a head of its own
    if args.freeze_feature_encoder:
        model.freeze_feature_encoder()
    return model


def add_lora(model: transformers.PreTrainedModel, args: ModelArguments):
    """
    Puts an adapter on every linear layer that is named, in place, and freezes all else but the head.

    Since the model stays of its class, checkpoints hold all of it, the head's and the layer weights' included, and
    training resumes exactly; `merge_and_unload` of what is returned then leaves an ordinary model.

    Returns:
        `peft.LoraModel`: it shares its modules with `model`.

    Raises:
        `ValueError`: if peft is missing, no layer has such a name, or the adapters would not train.
    """
    require("peft", "peft", "`--lora` needs")
    from peft import LoraConfig, LoraModel

    if model.config.model_type == "wavlm":
        # Its attention hands the weights to `multi_head_attention_forward`: the adapters' forward never runs.
        raise ValueError(
            "The attention of a stock `wavlm` bypasses adapters, so they would not train: convert it to a student"
            " with `WavLMForSkillStudent.from_pretrained(...).save_pretrained(...)`, or leave out `--lora`."
        )
    config = LoraConfig(r=args.lora_rank, lora_alpha=args.lora_alpha, target_modules=args.lora_modules)
    tuner = LoraModel(model, config, adapter_name="default")
    for name, parameter in model.named_parameters():
        if not name.startswith(model.base_model_prefix + "."):
            parameter.requires_grad_(True)
    return tuner


def load_splits(args: DataArguments) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Training and test set, whose column `audio` is not decoded."""
    form = {"config_name": args.dataset_config_name, "audio_column": args.audio_column}
    train = load_speech_dataset(args.dataset_name, split=args.train_split, **form)
    test = load_speech_dataset(args.test_dataset_name or args.dataset_name, split=args.test_split, **form)
    return train, test


def check_column(dataset: datasets.Dataset, column: str, argument: str) -> None:
    if column not in dataset.column_names:
        known = ", ".join(dataset.column_names)
        raise ValueError(f"The dataset has no column `{column}`; set `{argument}` to one of: {known}.")


def read_clips(
    dataset: datasets.Dataset,
    feature_extractor: transformers.Wav2Vec2FeatureExtractor,
    config,
    max_seconds: float | None = None,
) -> datasets.Dataset:
    """
    Decodes, resamples and normalises all clips, into the cache of `datasets`: nothing is left to go wrong in training.

    Args:
        dataset (`datasets.Dataset`): rows with `audio`, not decoded.
        feature_extractor (`Wav2Vec2FeatureExtractor`): names the rate, and normalises.
        config (`PreTrainedConfig`): of the model; names the fewest samples that it takes.
        max_seconds (`float`, *optional*): longer clips are cropped to this length.

    Returns:
        `datasets.Dataset`: the same rows with `input_values` (float32) and `length` (samples), without those whose
        clip cannot be read, each of which is named in a warning.

    Raises:
        [`AudioError`]: if no clip can be read.
    """
    rate, min_samples = feature_extractor.sampling_rate, receptive_field(config)

    def read(rows: dict[str, list]) -> dict[str, list]:
        good = {name: [] for name in (*rows, "input_values", "length")}
        for index, audio in enumerate(rows["audio"]):
            try:
                samples = read_audio(audio, rate, max_seconds, min_samples=min_samples)
            except AudioError as error:
                logger.warning("Left out: %s", error)
                continue
            for name, values in rows.items():
                good[name].append(values[index])
            good["input_values"].append(feature_extractor(samples, sampling_rate=rate)["input_values"][0])
            good["length"].append(len(samples))
        return good

    check_column(dataset, "audio", "audio_column")
    clips = dataset.map(read, batched=True, batch_size=32, writer_batch_size=128, desc="Reading speech")
    if not len(clips):
        raise AudioError(f"None of the {len(dataset)} clips can be read; the warnings above say why.")
    if len(clips) < len(dataset):
        logger.warning("%d of %d clips cannot be read.", len(dataset) - len(clips), len(dataset))
    return clips


def pad_clips(rows: list[dict], feature_extractor: transformers.Wav2Vec2FeatureExtractor) -> dict[str, torch.Tensor]:
    """`input_values` padded to the longest, and `attention_mask` if anything is padded and the model takes one."""
    clips = [{"input_values": row["input_values"]} for row in rows]
    batch = dict(feature_extractor.pad(clips, padding=True, return_tensors="pt"))
    if "attention_mask" in batch and batch["attention_mask"].all():
        del batch["attention_mask"]  # which would only cost time
    return batch


class TrainingError(ValueError):
    """A training that came to nothing, by its settings or its data."""


class FineTuner(Trainer):
    """A trainer that stops at the first loss that is not finite, and saves no weights that are not."""

    began = False

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        self.began = True
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            raise TrainingError(
                f"The loss is {loss.item()} after {self.state.global_step} steps; nothing was saved. Lower"
                f" `learning_rate`, which is {self.args.learning_rate}, or check the model's weights."
            )
        return loss

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        self.check_weights()
        super().save_model(output_dir, _internal_call)

    def check_weights(self) -> None:
        """
        Raises:
            [`TrainingError`]: if a weight is not finite.
        """
        wrong = [name for name, tensor in self.model.named_parameters() if not torch.isfinite(tensor).all()]
        if wrong:
            raise TrainingError(
                f"`{wrong[0]}` and {len(wrong) - 1} other weights contain NaN or infinite values after"
                f" {self.state.global_step} steps; they are not saved. Lower `learning_rate`, which is"
                f" {self.args.learning_rate}."
            )


def check_output(output_dir: str, head: str, sources: dict[str, str | None]) -> None:
    """
    Raises:
        `ValueError`: if `output_dir` can't be written to, is a source, or holds a model without this `head`.
    """
    try_directory(output_dir)
    keep_sources(output_dir, sources)
    config = Path(output_dir) / "config.json"
    if config.is_file():
        found = read_json(config)
        architectures = found.get("architectures") if isinstance(found, dict) else None
        if not (isinstance(architectures, list) and str(architectures[0] if architectures else "").endswith(head)):
            raise ValueError(
                f"`output_dir`, {output_dir}, contains another model ({architectures}), which would be overwritten;"
                " choose another."
            )


def checkpoint_to_resume(args: TrainingArguments) -> str | None:
    """
    Directory of the checkpoint that `resume_from_checkpoint` names; `True` is the last complete one.

    Raises:
        `ValueError`: if there is none.
    """
    named = str(args.resume_from_checkpoint)
    if named.lower() in ("none", "false"):
        return None
    checkpoint = last_complete_checkpoint(args.output_dir) if named.lower() == "true" else named
    if checkpoint is None:
        raise ValueError(
            f"There is no checkpoint to resume from in `output_dir`, {args.output_dir}; leave out"
            " `resume_from_checkpoint`."
        )
    if not (Path(checkpoint) / "trainer_state.json").is_file():
        raise ValueError(f"{checkpoint} is not a checkpoint, since it has no trainer_state.json; correct its path.")
    return checkpoint


def train(trainer: FineTuner, checkpoint: str | None) -> dict[str, float]:
    """Metrics of the training. A checkpoint that can't be loaded is a `ValueError`."""
    try:
        return trainer.train(resume_from_checkpoint=checkpoint).metrics
    except Exception as error:  # what is wrong with a file raises what its reader does
        if checkpoint is None or trainer.began:
            raise
        raise ValueError(f"The checkpoint {checkpoint} cannot be resumed: {error or repr(error)}") from error


def run(arguments: list[str] | None, kinds: tuple, head: str, prepare: Callable, report: Callable) -> int:
    """
    Prepares, trains, merges the adapters if there are any, tests, saves and reports.

    Args:
        arguments (`list[str]`, *optional*): the command line.
        kinds (`tuple`): classes of [`ModelArguments`], [`DataArguments`] and [`FineTuningArguments`].
        head (`str`): how the names of the model classes with this head end, such as `"ForCTC"`.
        prepare (`Callable`): makes a [`FineTuner`], and a `peft.LoraModel` or `None`, of these. What goes wrong until
            the first step is printed as one line; after that, what is neither a [`TrainingError`] nor of the machine
            is raised.
        report (`Callable`): takes the trainer, the data arguments and a dict of results; it prints and saves them.

    Returns:
        `int`: the exit status.
    """
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO)
    trainer = None

    def body() -> None:
        nonlocal trainer
        model_args, data_args, training_args = parse(arguments, kinds)
        sources = {"model": model_args.model, "dataset_name": data_args.dataset_name}
        sources["test_dataset_name"] = data_args.test_dataset_name
        check_output(training_args.output_dir, head, sources)
        checkpoint = checkpoint_to_resume(training_args)
        trainer, adapters = prepare(model_args, data_args, training_args)
        logger.info(
            "%s parameters, of which %s train; %d clips to train on, %d to test on",
            f"{trainer.model.num_parameters():,}",
            f"{trainer.model.num_parameters(only_trainable=True):,}",
            len(trainer.train_dataset),
            len(trainer.eval_dataset),
        )
        results = train(trainer, checkpoint)
        if adapters is not None:
            adapters.merge_and_unload()
        results |= evaluate_and_save(trainer)
        if trainer.is_world_process_zero():
            results |= {
                "model": model_args.model,
                "from_scratch": model_args.from_scratch,
                "lora": model_args.lora,
                "seed": training_args.seed,
                "parameters": trainer.model.num_parameters(),
                "versions": {package.__name__: package.__version__ for package in (torch, transformers, datasets)},
            }
            report(trainer, data_args, results)
        if training_args.push_to_hub:
            trainer.push_to_hub()

    def is_input(error: Exception) -> bool:
        return trainer is None or not trainer.began or isinstance(error, TrainingError)

    return run_script(body, is_input)


def evaluate_and_save(trainer: FineTuner) -> dict[str, float]:
    """
    Metrics of the test set. Weights whose outputs are not finite are not saved; what else goes wrong in the test does
    not cost the training.
    """
    try:
        metrics = trainer.evaluate()
    except Exception:
        trainer.save_model()
        raise
    if not math.isfinite(metrics["eval_loss"]):
        raise TrainingError(
            f"The loss of the test set is {metrics['eval_loss']} after {trainer.state.global_step} steps; nothing was"
            f" saved. Lower `learning_rate`, which is {trainer.args.learning_rate}."
        )
    trainer.save_model()
    return metrics
