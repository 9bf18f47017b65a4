"""
Uses a student in SpeechBrain: a speaker classifier on its hidden states.

On the demo's held-out speech, with the student of `make demo`, offline:

    pip install speechbrain
    python examples/use_in_speechbrain.py

Any other student or speech encoder, a directory or a Hub id; here it is also trained, and saved as a directory that
`AutoModel` loads:

    python examples/use_in_speechbrain.py --model you/wavlm-base-plus-skill --audio_dir recordings \\
        --device cuda:0 --output_dir wavlm-speakers

Each speaker's last clip is kept for the test.

To use a student in your own recipe, copy `load_encoder`: SpeechBrain's own wrapper accepts students. In YAML:

    encoder: !new:speechbrain.integrations.huggingface.wav2vec2.Wav2Vec2
        source: you/wavlm-base-plus-skill
        save_path: savedir
        output_all_hiddens: True
        freeze: True

after `import skill_hf` in the training script, or with `trust_remote_code: True` if skill-hf is not installed. Four
notes on the wrapper:

- `Brain.fit` sets all of its modules to training mode, even frozen ones, which enables dropout. A frozen encoder is
  therefore not part of `modules`.
- If the model wants normalised audio, the wrapper normalises each row of a batch, padding included. Here clips are
  normalised when they are read, before padding.
- `wav_lens` becomes the attention mask. Students with group norm also need `masked_group_norm` to exclude padding in
  the convolutions.
- In training mode, a model with `layerdrop` returns no hidden states for skipped layers, so their number changes from
  batch to batch. `SkillDistillationTrainer` sets `layerdrop` to 0.

SpeechBrain 1.0 has the same class in `speechbrain.lobes.models.huggingface_transformers.wav2vec2`, but can't be
imported with transformers 5; with transformers 4.57, it loads students with `trust_remote_code`.
"""

import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
from example_utils import DEMO_DATA, DEMO_STUDENT, load_config
from huggingface_hub.constants import HF_HUB_CACHE
from speech_folders import read_metadata, read_speech, speech_info

import skill_hf  # noqa: F401  (makes students known to AutoModel, which the wrapper uses)
from skill_hf.cli.settings import (
    MAX_SECONDS,
    Count,
    NotNegative,
    Range,
    Seed,
    checked_device,
    complain,
    parse,
    run_script,
)
from skill_hf.files import keep_sources, try_directory


try:
    import speechbrain as sb
    from speechbrain.dataio.dataset import DynamicItemDataset
    from speechbrain.dataio.encoder import CategoricalEncoder
    from speechbrain.integrations.huggingface.wav2vec2 import Wav2Vec2
    from speechbrain.nnet.pooling import StatisticsPooling
except ImportError as error:
    if __name__ != "__main__":
        raise
    sys.exit(complain(ImportError(f"SpeechBrain cannot be imported ({error}): pip install speechbrain.")))


MIN_SEGMENT_SECONDS = 0.5


@dataclass
class Arguments:
    model: str = field(
        default=str(DEMO_STUDENT),
        metadata={"help": "Hub id or directory of a speech encoder; the output of `make demo` by default."},
    )
    audio_dir: str = field(
        default=str(DEMO_DATA / "audio" / "heldout"),
        metadata={
            "help": "Directory with the audio and `metadata.csv`, which has the columns `file_name` and `speaker`."
        },
    )
    output_dir: str | None = field(
        default=None, metadata={"help": "Output directory; if set, the student is fine-tuned and saved there."}
    )
    segment_seconds: Annotated[float, Range(MIN_SEGMENT_SECONDS, most=MAX_SECONDS)] = field(
        default=2.0, metadata={"help": "Length in seconds of the segments that clips are cut into."}
    )
    batch_size: Count = field(default=16, metadata={"help": "Segments per batch."})
    num_epochs: Count = field(default=8, metadata={"help": "Epochs over the training segments."})
    learning_rate: NotNegative = field(default=5e-3, metadata={"help": "Learning rate of the classifier."})
    encoder_learning_rate: NotNegative = field(default=1e-4, metadata={"help": "Learning rate of the student."})
    seed: Seed = field(default=0, metadata={"help": "Seed of the weights, the order of the segments and dropout."})
    device: str = field(default="cpu", metadata={"help": "Device, such as `cpu` or `cuda:0`."})


def load_encoder(source: str, freeze: bool = True) -> Wav2Vec2:
    """
    SpeechBrain's wrapper around a student, for clips that are already normalised.

    Args:
        source (`str`): directory or Hub id.
        freeze (`bool`, *optional*, defaults to `True`): whether the weights stay as they are.

    Returns:
        `Wav2Vec2`: `encoder(wavs, wav_lens)` gives all hidden states, `(layers + 1, batch, frames, hidden_size)`;
        `encoder.model` is the student, `encoder.feature_extractor` normalises.
    """
    settings = {"freeze_feature_extractor": True, "output_all_hiddens": True, "dtype": torch.float32}
    encoder = Wav2Vec2(source, save_path=HF_HUB_CACHE, freeze=freeze, **settings)
    encoder.normalize_wav = False
    encoder.model.config.layerdrop = 0.0
    if hasattr(encoder.model.config, "masked_group_norm"):
        encoder.model.config.masked_group_norm = True
    return encoder


class Classifier(torch.nn.Module):
    """Log-probabilities of classes from all hidden states: weighted sum of the layers, statistics, linear."""

    def __init__(self, config, num_classes: int):
        super().__init__()
        self.layer_weights = torch.nn.Parameter(torch.zeros(config.num_hidden_layers + 1))
        self.pooling = StatisticsPooling()
        self.linear = torch.nn.Linear(2 * config.hidden_size, num_classes)

    def forward(self, hidden_states: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        features = torch.einsum("l,lbtd->btd", self.layer_weights.softmax(0), hidden_states)
        return self.linear(self.pooling(features, lengths).squeeze(1)).log_softmax(-1)


class SpeakerBrain(sb.Brain):
    """Learns who speaks a segment; prints the loss and the accuracy of each epoch."""

    def compute_forward(self, batch, stage):
        wavs, lengths = batch.to(self.device).wav
        return self.modules.classifier(self.hparams.encoder(wavs, lengths), lengths)

    def compute_objectives(self, predictions, batch, stage):
        self.correct += (predictions.argmax(-1) == batch.speaker_index).tolist()
        loss = torch.nn.functional.nll_loss(predictions, batch.speaker_index)
        if not math.isfinite(loss):
            raise ValueError(f"The loss is {loss.item()}; nothing was saved. Lower the learning rates.")
        return loss

    def on_stage_start(self, stage, epoch=None):
        self.correct = []

    def on_stage_end(self, stage, stage_loss, epoch=None):
        split = "training" if stage == sb.Stage.TRAIN else "test"
        accuracy = sum(self.correct) / len(self.correct)
        print(f"Epoch {epoch}, {split}: loss {stage_loss:.3f}, {accuracy:.1%} of {len(self.correct)} segments right")

    def init_optimizers(self):
        groups = [{"params": self.modules.classifier.parameters()}]
        if "encoder" in self.modules:
            groups.append({"params": self.modules.encoder.parameters(), "lr": self.hparams.encoder_learning_rate})
        self.optimizer = self.opt_class(groups)
        self.optimizers_dict = {"optimizer": self.optimizer}


def read_splits(args: Arguments, feature_extractor) -> tuple[DynamicItemDataset, DynamicItemDataset, int]:
    """Segments to train on, segments to test on, number of speakers."""
    rate, directory = feature_extractor.sampling_rate, Path(args.audio_dir)
    clips = read_metadata(directory, ["speaker"])
    last_clips = {clip["speaker"]: clip["file_name"] for clip in clips}.values()
    length, shortest = round(args.segment_seconds * rate), round(MIN_SEGMENT_SECONDS * rate)
    train, test = {}, {}
    for clip in clips:
        path = str(directory / clip["file_name"])
        sound = speech_info(path, rate)
        split = test if clip["file_name"] in last_clips else train
        for start in range(0, sound.frames - shortest + 1, length):
            split[f"{clip['file_name']}-{start}"] = {"path": path, "start": start, "speaker": clip["speaker"]}
    if untrained := {row["speaker"] for row in test.values()} - {row["speaker"] for row in train.values()}:
        raise ValueError(f"Each speaker needs two clips, but these have one: {', '.join(sorted(untrained))}.")
    if not test:
        raise ValueError(
            f"The last clips of the speakers are all shorter than {MIN_SEGMENT_SECONDS} s; use longer clips."
        )

    @sb.utils.data_pipeline.takes("path", "start")
    @sb.utils.data_pipeline.provides("wav")
    def read(path, start):
        samples = read_speech(path, rate, start, length)
        return torch.from_numpy(feature_extractor(samples, sampling_rate=rate)["input_values"][0])

    speakers = CategoricalEncoder()
    speakers.expect_len(len(last_clips))
    speakers.update_from_iterable(clip["speaker"] for clip in clips)

    @sb.utils.data_pipeline.takes("speaker")
    @sb.utils.data_pipeline.provides("speaker_index")
    def index(speaker):
        return speakers.encode_label(speaker)

    keys = ["id", "wav", "speaker_index"]
    return *(DynamicItemDataset(split, [read, index], keys) for split in (train, test)), len(speakers)


def prepare(args: Arguments) -> tuple[SpeakerBrain, DynamicItemDataset, DynamicItemDataset]:
    """What is trained, segments to train on, segments to test on."""
    config = load_config(args.model)
    checked_device(args.device)
    if args.output_dir is not None:
        try_directory(args.output_dir)
        keep_sources(args.output_dir, {"model": args.model, "audio_dir": args.audio_dir})
    torch.manual_seed(args.seed)
    encoder = load_encoder(args.model, freeze=args.output_dir is None).to(args.device)
    train, test, num_speakers = read_splits(args, encoder.feature_extractor)
    modules = {"classifier": Classifier(config, num_speakers)}
    if args.output_dir is not None:
        modules["encoder"] = encoder
    brain = SpeakerBrain(
        modules,
        opt_class=lambda groups: torch.optim.Adam(groups, lr=args.learning_rate),
        hparams={"encoder": encoder, "encoder_learning_rate": args.encoder_learning_rate},
        run_opts={"device": args.device},
    )
    return brain, train, test


def main(arguments: list[str] | None = None) -> int:
    return run_script(lambda: run(*parse(arguments, (Arguments,))))


def run(args: Arguments) -> None:
    brain, train, test = prepare(args)
    batches = {"batch_size": args.batch_size}
    brain.fit(
        range(1, args.num_epochs + 1),
        train,
        test,
        progressbar=False,
        train_loader_kwargs={**batches, "shuffle": True},
        valid_loader_kwargs=batches,
    )
    if args.output_dir is not None:
        encoder = brain.hparams.encoder
        if not all(parameter.isfinite().all() for parameter in encoder.model.parameters()):
            raise ValueError("The weights contain NaN or infinite values and are not saved; lower the learning rates.")
        encoder.model.save_pretrained(args.output_dir)
        encoder.feature_extractor.save_pretrained(args.output_dir)
        print(f"The fine-tuned student is in {args.output_dir}; load it with AutoModel.from_pretrained")


if __name__ == "__main__":
    sys.exit(main())
