"""
Fine-tunes a student, or any speech encoder, to recognise keywords.

On the ten keywords of `examples/demo/keywords`, with the student of `make demo`, offline, in two minutes on 2 CPU
cores:

    python examples/finetune_keyword_spotting.py

A student from the Hub on all of Speech Commands, whose test speakers are not in the training set:

    hf download google/speech_commands --repo-type dataset --revision refs/convert/parquet --local-dir speech_commands
    python examples/finetune_keyword_spotting.py --model you/wavlm-base-plus-skill \\
        --dataset_name speech_commands/v0.02 --train_split train --test_split test --label_column label \\
        --num_train_epochs 10 --learning_rate 1e-4 --per_device_train_batch_size 32 --output_dir keywords

Low-rank adapters (LoRA, arXiv 2106.09685) instead of all weights, merged at the end:

    python examples/finetune_keyword_spotting.py --lora --learning_rate 3e-3 --output_dir outputs/keywords-lora

The same architecture with random weights, for comparison:

    python examples/finetune_keyword_spotting.py --from_scratch --output_dir outputs/keywords-from-scratch

The dataset needs a column of audio, at any sampling rate, and a column of labels: names, or classes as stored by
`datasets`. The classifier uses a trained weighted sum of all hidden states, as in SUPERB (arXiv 2105.01051).
`output_dir` then contains a model for `AutoModelForAudioClassification` and `pipeline("audio-classification")`, and
`all_results.json`.
"""

import sys
from collections import Counter
from dataclasses import dataclass, field

import datasets
import numpy as np
import torch
from example_utils import (
    DEMO_DATA,
    REPOSITORY,
    DataArguments,
    FineTuner,
    FineTuningArguments,
    ModelArguments,
    add_lora,
    check_column,
    load_config,
    load_splits,
    pad_clips,
    prepare_model,
    read_clips,
    run,
)
from transformers import AutoModelForAudioClassification, Trainer, pipeline, set_seed

from skill_hf.cli.settings import Seconds
from skill_hf.data import read_audio
from skill_hf.encoders import feature_extractor_for


@dataclass
class KeywordDataArguments(DataArguments):
    label_column: str = field(default="label", metadata={"help": "Name of the keyword column."})
    max_seconds: Seconds = field(default=2.0, metadata={"help": "Length in seconds to crop clips to."})

    def __post_init__(self):
        if self.dataset_name is None:
            self.dataset_name = str(DEMO_DATA / "keywords")


@dataclass
class KeywordTrainingArguments(FineTuningArguments):
    """Defaults for the demo's student and its 400 clips."""

    output_dir: str = field(default=str(REPOSITORY / "outputs" / "keywords"), metadata={"help": "Output directory."})
    num_train_epochs: float = field(default=10, metadata={"help": "Epochs over the training set."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Clips per step and device."})


@dataclass
class KeywordCollator:
    """Pads the clips of one batch."""

    feature_extractor: object

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        labels = torch.tensor([row["labels"] for row in rows])
        return {**pad_clips(rows, self.feature_extractor), "labels": labels}


def label_names(dataset: datasets.Dataset, column: str) -> list[str]:
    """Names of the classes: those that the dataset declares, else all that occur, in order."""
    feature = dataset.features[column]
    if isinstance(feature, datasets.ClassLabel):
        return list(feature.names)
    return sorted({str(label) for label in dataset[column] if label is not None})


def with_labels(dataset: datasets.Dataset, column: str, names: list[str]) -> datasets.Dataset:
    """The clips as `audio` and `labels`, the index of each one's class in `names`."""
    feature, values = dataset.features[column], dataset[column]
    if isinstance(feature, datasets.ClassLabel):
        values = [feature.names[value] if value is not None and value >= 0 else None for value in values]
    known = {name: index for index, name in enumerate(names)}
    labels = [known.get(str(value)) for value in values]
    if None in labels:
        wrong = values[labels.index(None)]
        raise ValueError(f"A clip has the label {wrong!r} in `{column}`, which is not one of: {', '.join(names)}.")
    return dataset.select_columns("audio").add_column("labels", labels)


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float(np.mean(prediction.predictions.argmax(-1) == prediction.label_ids))}


def prepare(model_args: ModelArguments, data_args: KeywordDataArguments, training_args: KeywordTrainingArguments):
    """The trainer, and what holds the adapters if there are any; wrong settings and data raise an error here."""
    set_seed(training_args.seed)
    with training_args.main_process_first(desc="loading the data"):
        train, test = load_splits(data_args)
        for dataset in (train, test):
            check_column(dataset, data_args.label_column, "label_column")
        names = label_names(train, data_args.label_column)
        if len(names) < 2:
            raise ValueError(f"`{data_args.label_column}` has {len(names)} class(es); there must be at least 2.")
        config = load_config(
            model_args.model,
            mask_time_prob=model_args.mask_time_prob,
            use_weighted_layer_sum=True,
            layerdrop=0.0,  # the sum is of all layers; one that is dropped would be missing
            num_labels=len(names),
            label2id={name: index for index, name in enumerate(names)},
            id2label=dict(enumerate(names)),
        )
        feature_extractor = feature_extractor_for(model_args.model, config)
        train, test = (
            read_clips(
                with_labels(dataset, data_args.label_column, names), feature_extractor, config, data_args.max_seconds
            )
            for dataset in (train, test)
        )
    model = prepare_model(model_args, AutoModelForAudioClassification, config)
    adapters = add_lora(model, model_args) if model_args.lora else None
    trainer = FineTuner(
        model=model,
        args=training_args,
        data_collator=KeywordCollator(feature_extractor),
        train_dataset=train,
        eval_dataset=test,
        processing_class=feature_extractor,
        compute_metrics=accuracy,
    )
    return trainer, adapters


def report(trainer: Trainer, data_args: KeywordDataArguments, results: dict) -> None:
    """Prints and saves the results, and classifies a test clip with the model as it was saved."""
    train, test = trainer.train_dataset, trainer.eval_dataset
    largest = Counter(train["labels"]).most_common(1)[0][0]
    results |= {
        "test_clips": len(test),
        "largest_class_accuracy": test["labels"][:].count(largest) / len(test),
        "chance_accuracy": 1 / trainer.model.config.num_labels,
    }
    trainer.save_metrics("all", results, combined=False)
    print(
        f"Accuracy on {len(test)} test clips: {100 * results['eval_accuracy']:.1f} % (always the most frequent"
        f" keyword: {100 * results['largest_class_accuracy']:.1f} %, chance: {100 * results['chance_accuracy']:.1f} %)"
    )
    classifier = pipeline("audio-classification", model=trainer.args.output_dir, device=trainer.args.device)
    clip = test[0]
    audio = read_audio(clip["audio"], classifier.feature_extractor.sampling_rate, data_args.max_seconds)
    scores = ", ".join(f"{guess['label']} {guess['score']:.2f}" for guess in classifier(audio, top_k=3))
    print(f"{trainer.model.config.id2label[clip['labels']]!r} is recognised as: {scores}")


def main(arguments: list[str] | None = None) -> int:
    return run(
        arguments,
        (ModelArguments, KeywordDataArguments, KeywordTrainingArguments),
        "ForSequenceClassification",
        prepare,
        report,
    )


if __name__ == "__main__":
    sys.exit(main())
