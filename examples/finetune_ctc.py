"""
Fine-tunes a student, or any speech encoder, for speech recognition in characters (CTC, Graves et al. 2006).

On the 25 minutes of `examples/demo/audio`, with the student of `make demo`, offline (from so little speech, a small
network learns some spelling but no words; results are in `examples/README.md`):

    python examples/finetune_ctc.py

A student from the Hub on 100 hours of LibriSpeech:

    accelerate launch examples/finetune_ctc.py --model you/wavlm-base-plus-skill \\
        --dataset_name openslr/librispeech_asr --dataset_config_name all \\
        --train_split train.clean.100 --test_split test.clean --text_column text \\
        --num_train_epochs 30 --learning_rate 1e-4 --per_device_train_batch_size 16 --mask_time_prob 0.05 \\
        --save_strategy steps --output_dir ctc

`--lora` trains only low-rank adapters and the head; `--from_scratch` trains the same architecture from random weights.

The dataset needs a column of audio, at any sampling rate, and a column of transcripts. Characters are those of the
training transcripts, in capitals, without punctuation and symbols; combining marks such as the vowels of Hindi are
kept. `output_dir` then contains a model for `AutoModelForCTC`, its `Wav2Vec2Processor`, and `all_results.json`. The
model works directly with `pipeline("automatic-speech-recognition")`; error rates are those of this pipeline, which
processes each test clip alone.
"""

import itertools
import json
import logging
import re
import sys
import tempfile
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path

import datasets
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
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCTC,
    Trainer,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2Processor,
    pipeline,
    set_seed,
)

from skill_hf.cli.settings import Seconds, Share, require
from skill_hf.data import read_audio
from skill_hf.encoders import feature_extractor_for


logger = logging.getLogger("example_utils")

PAD, UNKNOWN, SPACE = "<pad>", "<unk>", "|"  # the padding token is CTC's blank, too

APOSTROPHES = str.maketrans(dict.fromkeys("\u2019\u02bc\uff07", "'"))
JOINERS = "\u200c\u200d"  # part of the spelling of Persian, Sinhala and others
EMOJI_MARK = re.compile("[\ufe00-\ufe0f\u20e3\U000e0100-\U000e01ef]")  # selectors of a variant, a key's frame


@dataclass
class CTCModelArguments(ModelArguments):
    mask_time_prob: Share = field(default=0.1, metadata={"help": "Share of frames that SpecAugment masks."})


@dataclass
class CTCDataArguments(DataArguments):
    text_column: str = field(default="text", metadata={"help": "Name of the transcript column."})
    max_seconds: Seconds = field(
        default=20.0, metadata={"help": "Training clips longer than this, in seconds, are left out."}
    )

    def __post_init__(self):
        if self.dataset_name is None:
            self.dataset_name = str(DEMO_DATA / "audio" / "train")
            self.test_dataset_name = str(DEMO_DATA / "audio" / "heldout")
            self.test_split = "train"  # the one split of a folder


@dataclass
class CTCTrainingArguments(FineTuningArguments):
    """Defaults for the demo's student and its 25 minutes of speech."""

    output_dir: str = field(default=str(REPOSITORY / "outputs" / "ctc"), metadata={"help": "Output directory."})
    num_train_epochs: float = field(default=30, metadata={"help": "Epochs over the training set."})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Clips per step and device."})
    train_sampling_strategy: str = field(
        default="group_by_length",
        metadata={"help": "Sampling of clips; grouping clips of similar length reduces padding."},
    )


@dataclass
class CTCCollator:
    """
    Pads the clips and the labels of one batch; padded labels are -100, which the loss leaves out.
    """

    processor: Wav2Vec2Processor

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        batch = pad_clips(rows, self.processor.feature_extractor)
        labels = [torch.tensor(row["labels"]) for row in rows]
        batch["labels"] = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
        return batch


def normalise_text(text: str | None) -> str:
    """
    Capitals, digits and apostrophes, single spaces between words; empty if there is no text.

    Punctuation and symbols (Unicode's categories P and S) become spaces; letters, digits and the marks on them stay,
    in every script. Apostrophes stay beside a letter, joiners between two of them. All is in NFC, so that a letter
    with its accent has one spelling. NFKC would change more than that: it splits vowels of Thai and Lao in two, and
    makes a mark without a letter of a spacing accent.
    """
    text = unicodedata.normalize("NFC", text or "").translate(APOSTROPHES)
    kept = []
    for character in text:
        category = unicodedata.category(character)
        if character in JOINERS or character == "'":
            kept.append(character)
        elif category[0] in "PSZ" or category == "Cc":
            kept.append(" ")
        elif category[0] == "M":
            # What makes an emoji of a character is a mark, too; and a mark needs something to stand on.
            if not EMOJI_MARK.match(character) and kept and kept[-1] != " ":
                kept.append(character)
        elif category not in ("Cf", "Cs"):  # neither directions nor half a character
            kept.append(character)
    text = re.sub(r"(?<=[\s'])'+(?=[\s'])", " ", f" {''.join(kept)} ")
    text = re.sub(rf"(?<![^\s'])[{JOINERS}]+|[{JOINERS}]+(?![^\s'])", "", text)
    return " ".join(unicodedata.normalize("NFC", text.upper()).split())


def make_tokenizer(texts: list[str]) -> Wav2Vec2CTCTokenizer:
    """A tokenizer of the characters that occur in `texts`, with blank, unknown and the space between words."""
    characters = sorted(set().union(*texts) - {" "})
    vocabulary = {token: index for index, token in enumerate([PAD, UNKNOWN, SPACE, *characters])}
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "vocab.json"
        path.write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
        return Wav2Vec2CTCTokenizer(
            str(path),
            pad_token=PAD,
            unk_token=UNKNOWN,
            word_delimiter_token=SPACE,
            bos_token=None,  # CTC has no use for these two; the model would still have outputs for them
            eos_token=None,
        )


def frames_needed(labels: list[int]) -> int:
    """Fewest frames that CTC can write `labels` with: one each, and a blank between two that are the same."""
    return len(labels) + sum(left == right for left, right in itertools.pairwise(labels))


def keep(dataset: datasets.Dataset, wanted: list[bool], why: str) -> datasets.Dataset:
    """The rows that are wanted; how many are not goes into the log."""
    kept = dataset.select([index for index, good in enumerate(wanted) if good])
    if len(kept) < len(dataset):
        logger.warning("Left out %d of %d clips: %s.", len(dataset) - len(kept), len(dataset), why)
    if not len(kept):
        raise ValueError(f"None of the {len(dataset)} clips can be used: {why}.")
    return kept


def with_transcripts(dataset: datasets.Dataset, column: str) -> datasets.Dataset:
    """The clips that have a transcript, as `audio` and a normalised `text`."""
    check_column(dataset, column, "text_column")
    texts = [normalise_text(text) for text in dataset[column]]
    dataset = dataset.select_columns("audio").add_column("text", texts)
    return keep(dataset, [bool(text) for text in texts], "they have no transcript")


def prepare(model_args: CTCModelArguments, data_args: CTCDataArguments, training_args: CTCTrainingArguments):
    """The trainer, and what holds the adapters if there are any; wrong settings and data raise an error here."""
    require("jiwer", "jiwer", "The error rates need")
    set_seed(training_args.seed)
    # The loss is infinite for a clip with too few frames for its transcript; one in a million must not end a run.
    config = load_config(
        model_args.model,
        mask_time_prob=model_args.mask_time_prob,
        ctc_loss_reduction="mean",
        ctc_zero_infinity=True,
    )
    feature_extractor = feature_extractor_for(model_args.model, config)
    with training_args.main_process_first(desc="loading the data"):
        train, test = (with_transcripts(dataset, data_args.text_column) for dataset in load_splits(data_args))
        tokenizer = make_tokenizer(train["text"][:])
        train, test = (
            read_clips(split.add_column("labels", tokenizer(split["text"][:]).input_ids), feature_extractor, config)
            for split in (train, test)
        )
    config.vocab_size, config.pad_token_id = len(tokenizer), tokenizer.pad_token_id
    model = prepare_model(model_args, AutoModelForCTC, config)
    # Test clips all stay: leaving out the hard ones would flatter the error rates.
    lengths = torch.tensor(train["length"][:])
    short_enough = lengths <= data_args.max_seconds * feature_extractor.sampling_rate
    train = keep(train, short_enough.tolist(), f"they are longer than {data_args.max_seconds} s")
    frames = model._get_feat_extract_output_lengths(torch.tensor(train["length"][:])).tolist()
    enough = [frames_needed(labels) <= number for labels, number in zip(train["labels"], frames, strict=True)]
    train = keep(train, enough, "they have too few frames for their transcripts")
    adapters = add_lora(model, model_args) if model_args.lora else None
    processor = Wav2Vec2Processor(feature_extractor=feature_extractor, tokenizer=tokenizer)
    trainer = FineTuner(
        model=model,
        args=training_args,
        data_collator=CTCCollator(processor),
        train_dataset=train,
        eval_dataset=test,
        processing_class=processor,
    )
    return trainer, adapters


def report(trainer: Trainer, data_args: CTCDataArguments, results: dict) -> None:
    """Writes down every test clip with the model as it was saved; prints and saves the error rates."""
    import jiwer

    # A processor's file holds this, too; releases of transformers before 5 look for a file of its own.
    trainer.processing_class.feature_extractor.save_pretrained(trainer.args.output_dir)
    test = trainer.eval_dataset
    recognizer = pipeline("automatic-speech-recognition", model=trainer.args.output_dir, device=trainer.args.device)
    rate = recognizer.feature_extractor.sampling_rate
    heard = [recognizer(read_audio(clip, rate))["text"] for clip in tqdm(test["audio"], desc="Writing down")]
    said = test["text"][:]
    results |= {
        "test_clips": len(test),
        "character_error_rate": jiwer.cer(said, heard),
        "word_error_rate": jiwer.wer(said, heard),
        "characters_written": sum(map(len, heard)) / sum(map(len, said)),
    }
    trainer.save_metrics("all", results, combined=False)
    for index in range(min(3, len(test))):
        print(f"said:  {said[index]}\nheard: {heard[index]}")
    print(
        f"{len(test)} test clips: loss {results['eval_loss']:.3f}, character error rate"
        f" {100 * results['character_error_rate']:.1f} %, word error rate {100 * results['word_error_rate']:.1f} %"
        " (an empty transcript: 100 % of both)"
    )
    print(f"pipeline(model={trainer.args.output_dir!r}): {recognizer(read_audio(test[0]['audio'], rate))}")


def main(arguments: list[str] | None = None) -> int:
    return run(arguments, (CTCModelArguments, CTCDataArguments, CTCTrainingArguments), "ForCTC", prepare, report)


if __name__ == "__main__":
    sys.exit(main())
