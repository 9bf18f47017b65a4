"""Trains the small teachers of `examples/demo/` from scratch by masked prediction of clustered targets.

The recipe is HuBERT's (arXiv 2106.07447), for `--family wavlm` with WavLM's utterance mixing (arXiv 2110.13900,
section 3.2), scaled down to a few hours of speech and two CPU cores. Iteration 1 predicts k-means clusters of MFCC;
each later one continues from the weights that it finds and predicts k-means clusters of that network's own hidden
states. `--init_from` starts from another network of this width instead, which may have fewer layers: the study's
teacher grew from the demo's that way.

    python examples/pretrain_teacher.py --output_dir teacher \\
        --librispeech DIR/librispeech-train-clean-5 --speech_commands DIR/speech-commands-test

Both directories have the `audiofolder` format: 16 kHz audio and a `metadata.csv` with `file_name` and `speaker`.
`heldout_split` defines the data that the network never sees, on which `examples/demo/probe_teacher.py` tests it. The
same command resumes an interrupted run.
"""

import json
import logging
import sys
import zipfile
import zlib
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from example_utils import FineTuner
from scipy.fft import dct
from speech_folders import read_metadata, read_speech
from torch import nn
from tqdm.auto import tqdm
from transformers import (
    AutoModel,
    HubertConfig,
    PreTrainedConfig,
    PreTrainedModel,
    TrainingArguments,
    Wav2Vec2FeatureExtractor,
    WavLMConfig,
)
from transformers.audio_utils import mel_filter_bank
from transformers.models.wavlm.modeling_wavlm import _compute_mask_indices
from transformers.trainer_utils import set_seed

from skill_hf.cli.settings import Count, NotNegative, Seconds, Seed, Share, Whole, parse, require, run_script
from skill_hf.distillation.checkpointing import last_complete_checkpoint
from skill_hf.files import keep_sources, try_directory
from skill_hf.models.families import build_student
from skill_hf.models.loading import load_model


logger = logging.getLogger(__name__)

RATE = 16_000
HOP = 320  # samples between two frames of the network (50 Hz)
WINDOW = 400  # samples that one frame sees
HELDOUT_LIBRISPEECH_SPEAKERS = ("1867", "4640", "7367", "226")  # never seen at all


@dataclass
class PretrainArguments:
    librispeech: Path = field(metadata={"help": "Directory with metadata.csv (file_name, speaker) and audio."})
    speech_commands: Path = field(metadata={"help": "The same for one-second clips; clips of one speaker are joined."})
    output_dir: Path = field(metadata={"help": "Output directory for the model, its checkpoints and its log."})
    steps: list[Count] = field(
        default_factory=lambda: [2500, 2500], metadata={"help": "Optimizer steps of each iteration."}
    )
    num_clusters: list[Count] = field(
        default_factory=lambda: [100, 250], metadata={"help": "Clusters that each iteration predicts."}
    )
    target_layer: Whole = field(default=5, metadata={"help": "Hidden state to cluster after iteration 1."})
    crop_seconds: Seconds = field(default=3.0, metadata={"help": "Length of a training crop in seconds."})
    batch_size: Count = field(default=6, metadata={"help": "Crops per step."})
    learning_rate: NotNegative = field(default=6e-4, metadata={"help": "Peak learning rate."})
    family: str = field(
        default="wavlm",
        metadata={
            "help": "wavlm: group norm, post-norm. hubert: layer norm, pre-norm.",
            "choices": ["wavlm", "hubert"],
        },
    )
    mixing_probability: Share | None = field(
        default=None,
        metadata={"help": "Share of crops with a second voice mixed in; by default 0.2 for wavlm, 0 for hubert."},
    )
    unmasked_weight: NotNegative = field(
        default=0.3,
        metadata={"help": "Weight of the loss over unmasked frames; short runs learn faster with it."},
    )
    init_from: Path | None = field(
        default=None,
        metadata={"help": "Model of this width to start from; its hidden states are clustered from iteration 1 on."},
    )
    num_hidden_layers: Count = field(
        default=8, metadata={"help": "Number of layers; those that `init_from` lacks are initialised at random."}
    )
    bf16: bool = field(
        default=False,
        metadata={"help": "Use bfloat16 autocast; ten times slower on CPUs without AMX or AVX512-BF16."},
    )
    seed: Seed = field(default=0, metadata={"help": "Random seed."})
    save_steps: Count = field(default=500, metadata={"help": "Optimizer steps between checkpoints."})

    def __post_init__(self):
        if self.mixing_probability is None:
            self.mixing_probability = 0.2 if self.family == "wavlm" else 0.0
        if len(self.steps) != len(self.num_clusters):
            raise ValueError(
                f"`steps` has {len(self.steps)} entries, but `num_clusters` has {len(self.num_clusters)}; both need"
                " one per iteration."
            )
        if len(self.steps) > 1 and self.target_layer > self.num_hidden_layers:
            raise ValueError(
                f"`target_layer` must be from 0 to `num_hidden_layers` ({self.num_hidden_layers}), but is"
                f" {self.target_layer}."
            )
        if self.crop_seconds * RATE < WINDOW:
            raise ValueError(f"`crop_seconds` must be at least {WINDOW / RATE}, but is {self.crop_seconds}.")


def small_config(family: str, num_hidden_layers: int) -> PreTrainedConfig:
    """
    WavLM Base in small, with a group norm and post-LN layers, or HuBERT Large, with layer norms and pre-LN layers;
    7.1 M parameters with 8 layers of 8 heads.
    """
    large = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}
    config_class, layout = {"wavlm": (WavLMConfig, {}), "hubert": (HubertConfig, large)}[family]
    return config_class(
        hidden_size=256,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=8,
        intermediate_size=1024,
        conv_dim=(128,) * 7,
        num_conv_pos_embeddings=128,
        num_conv_pos_embedding_groups=16,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        feat_proj_dropout=0.0,
        final_dropout=0.0,
        layerdrop=0.0,
        mask_time_length=10,
        mask_time_prob=0.5,
        apply_spec_augment=True,
        **layout,
    )


def heldout_split(name: str, speaker: str, librispeech: bool) -> str:
    """`"train"`, `"recordings"` (the speaker is known, this recording is not) or `"speakers"` (never heard at all)."""
    bucket = zlib.crc32((name if librispeech else speaker).encode())
    if librispeech:
        if speaker in HELDOUT_LIBRISPEECH_SPEAKERS:
            return "speakers"
        return "recordings" if bucket % 5 == 0 else "train"
    return "speakers" if bucket % 3 == 0 else "train"


def read_directory(directory: Path, librispeech: bool) -> list[dict]:
    """Rows of `metadata.csv` with `audio` (float32 at 16 kHz) and `split` added."""
    rows = read_metadata(directory, ["speaker"])
    for row in tqdm(rows, desc=f"reading {directory.name}"):
        row["audio"] = read_speech(directory / row["file_name"], RATE)
        row["split"] = heldout_split(row["file_name"], row["speaker"], librispeech)
    return rows


def training_utterances(args: PretrainArguments) -> list[np.ndarray]:
    """All training audio, each at least as long as a crop."""
    rows = [row for row in read_directory(args.librispeech, True) if row["split"] == "train"]
    utterances = [row["audio"] for row in rows]
    by_speaker = defaultdict(list)
    for row in read_directory(args.speech_commands, False):
        if row["split"] == "train":
            by_speaker[row["speaker"]].append(row["audio"])
    rng = np.random.default_rng(args.seed)
    per_crop = int(np.ceil(args.crop_seconds))
    for clips in by_speaker.values():
        order = rng.permutation(len(clips))
        utterances += [
            np.concatenate([clips[i] for i in order[at : at + per_crop]]) for at in range(0, len(clips), per_crop)
        ]
    minimum = int(args.crop_seconds * RATE)
    if not utterances:
        raise ValueError(f"{args.librispeech} and {args.speech_commands} have no clips to train on; choose others.")
    if empty := sum(not len(audio) for audio in utterances):
        raise ValueError(f"{empty} clips of {args.librispeech} and {args.speech_commands} are empty; leave them out.")
    return [
        np.pad(audio, (0, minimum - len(audio)), mode="wrap") if len(audio) < minimum else audio
        for audio in utterances
    ]


def num_frames(num_samples: int) -> int:
    return (num_samples - WINDOW) // HOP + 1


def mfcc(audio: np.ndarray) -> np.ndarray:
    """13 cepstra with their first and second differences, `(frames, 39)`, on the network's own frame grid."""
    mel = torch.from_numpy(
        mel_filter_bank(257, 40, 20.0, 7600.0, RATE, norm="slaney", mel_scale="slaney").astype(np.float32)
    )
    spectrum = torch.stft(
        torch.from_numpy(np.ascontiguousarray(audio)),
        512,
        160,
        WINDOW,
        torch.hann_window(WINDOW),
        center=False,
        return_complex=True,
    )
    # `stft` centres the window in its 512 samples, so frame i starts 56 samples late: less than the hop of 10 ms.
    log_mel = (spectrum.abs().square().T @ mel).clamp_min(1e-8).log().numpy()
    cepstra = dct(log_mel, norm="ortho")[:, :13]
    first = np.gradient(cepstra, axis=0)
    features = np.concatenate([cepstra, first, np.gradient(first, axis=0)], axis=1)[::2]
    missing = num_frames(len(audio)) - len(features)
    return np.pad(features, ((0, max(missing, 0)), (0, 0)), mode="edge")[: num_frames(len(audio))]


@torch.no_grad()
def hidden_states(model: PreTrainedModel, audio: np.ndarray, layer: int, bf16: bool = False) -> np.ndarray:
    with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
        output = model(normalise(torch.from_numpy(audio)).to(model.device)[None], output_hidden_states=True)
    return output.hidden_states[layer][0].float().cpu().numpy()


def normalise(audio: torch.Tensor) -> torch.Tensor:
    """Zero mean and unit variance over time, as the saved feature extractor does (`do_normalize=True`)."""
    return (audio - audio.mean(-1, keepdim=True)) / torch.sqrt(audio.var(-1, keepdim=True, unbiased=False) + 1e-7)


def cluster_targets(features, utterances, num_clusters: int, seed: int) -> list[np.ndarray]:
    """A cluster index for each frame of each utterance, from k-means on a fifth of the frames."""
    from sklearn.cluster import MiniBatchKMeans

    rng = np.random.default_rng(seed)
    everything = [features(audio).astype(np.float32) for audio in tqdm(utterances, desc="features to cluster")]
    sample = np.concatenate([x[rng.random(len(x)) < 0.2] for x in everything])
    mean, std = sample.mean(0), sample.std(0) + 1e-6
    kmeans = MiniBatchKMeans(num_clusters, batch_size=10_000, n_init=3, max_iter=60, random_state=seed)
    kmeans.fit((sample - mean) / std)
    return [kmeans.predict((x - mean) / std).astype(np.int64) for x in tqdm(everything, desc="assigning clusters")]


class Crops(torch.utils.data.Dataset):
    """Random crops with their cluster indices; every draw comes from torch's global generator, so a run can resume."""

    def __init__(self, utterances, targets, args: PretrainArguments):
        self.utterances, self.targets = utterances, targets
        self.frames = num_frames(int(args.crop_seconds * RATE))
        self.samples = (self.frames - 1) * HOP + WINDOW
        self.mixing_probability = args.mixing_probability

    def __len__(self):
        return len(self.utterances)

    def crop(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        frames = len(self.targets[index])
        start = int(torch.randint(frames - self.frames + 1, ()))
        audio = self.utterances[index][start * HOP : start * HOP + self.samples]
        return torch.from_numpy(audio), torch.from_numpy(self.targets[index][start : start + self.frames])

    def __getitem__(self, index: int) -> dict:
        audio, labels = self.crop(index)
        if torch.rand(()) < self.mixing_probability:
            # WavLM mixes a second voice into less than half of the crop, quieter than the first: the targets stay.
            other, _ = self.crop(int(torch.randint(len(self), ())))
            length = int(torch.randint(self.samples // 10, self.samples // 2, ()))
            to, at = (int(torch.randint(self.samples - length, ())) for _ in range(2))
            decibel = 5 * torch.rand(())
            scale = audio.std() / other.std().clamp_min(1e-4) * 10 ** (-decibel / 20)
            audio = audio.clone()
            audio[to : to + length] += scale * other[at : at + length]
        return {"input_values": normalise(audio), "labels": labels}


class MaskedPrediction(nn.Module):
    """An encoder with a linear classifier; the loss is cross entropy over masked frames, and a little over others."""

    def __init__(self, encoder: PreTrainedModel, num_clusters: int, unmasked_weight: float):
        super().__init__()
        self.unmasked_weight = unmasked_weight
        self.encoder = encoder
        self.classifier = nn.Linear(encoder.config.hidden_size, num_clusters)

    def forward(self, input_values, labels, mask):
        hidden = self.encoder(input_values, mask_time_indices=mask).last_hidden_state
        losses = nn.functional.cross_entropy(
            self.classifier(hidden).float().transpose(1, 2), labels, reduction="none"
        )  # (batch, frames)
        return {"loss": losses[mask].mean() + self.unmasked_weight * losses[~mask].mean()}


def pretrain(encoder, utterances, targets, num_clusters, steps, directory: Path, args: PretrainArguments) -> None:
    """One iteration of masked prediction; `encoder` is trained in place."""

    def collate(rows):
        batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
        shape = tuple(batch["labels"].shape)
        np.random.seed(int(torch.randint(2**31, ())))  # the stock mask sampler draws from numpy's global generator
        config = encoder.config
        mask = _compute_mask_indices(shape, config.mask_time_prob, config.mask_time_length)
        return batch | {"mask": torch.from_numpy(mask)}

    trainer = FineTuner(
        model=MaskedPrediction(encoder, num_clusters, args.unmasked_weight),
        args=TrainingArguments(
            output_dir=str(directory),
            max_steps=steps,
            per_device_train_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            lr_scheduler_type="warmup_stable_decay",
            lr_scheduler_kwargs={"num_decay_steps": steps // 3, "min_lr_ratio": 0.01},
            warmup_steps=min(400, steps // 5),
            weight_decay=0.01,
            adam_beta2=0.98,
            max_grad_norm=1.0,
            bf16=args.bf16,
            use_cpu=not torch.cuda.is_available(),
            logging_steps=50,
            save_steps=args.save_steps,
            save_total_limit=1,
            remove_unused_columns=False,
            report_to="none",
            seed=args.seed,
        ),
        train_dataset=Crops(utterances, targets, args),
        data_collator=collate,
    )
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(str(directory)) if directory.is_dir() else None)
    trainer.check_weights()
    (directory / "log.json").write_text(json.dumps(trainer.state.log_history, indent=1))


def run(args: PretrainArguments) -> None:
    require("sklearn", "scikit-learn", "Clusters need")
    try_directory(args.output_dir)
    keep_sources(
        args.output_dir,
        {name: getattr(args, name) for name in ("librispeech", "speech_commands", "init_from")},
    )
    keep_sources(args.output_dir / "model", {"init_from": args.init_from})
    set_seed(args.seed)
    utterances = training_utterances(args)
    hours = sum(map(len, utterances)) / RATE / 3600
    logger.info("%d utterances, %.2f hours", len(utterances), hours)
    encoder = AutoModel.from_config(small_config(args.family, args.num_hidden_layers))
    if args.init_from is not None:
        grown_from = load_model(str(args.init_from))
        try:
            encoder.load_state_dict(grown_from.state_dict(), strict=False)
        except RuntimeError as error:  # other shapes
            raise ValueError(f"`init_from`, {args.init_from}, has a different size: {error}") from error
    encoder = build_student(encoder)  # the same network, computed faster
    logger.info("%.2f M parameters", encoder.num_parameters() / 1e6)
    for iteration, (steps, num_clusters) in enumerate(zip(args.steps, args.num_clusters, strict=True), start=1):
        directory = args.output_dir / f"iteration-{iteration}"
        finished, targets_file = directory / "model", args.output_dir / f"targets-{iteration}.npz"
        if finished.is_dir():
            encoder = build_student(AutoModel.from_pretrained(finished))
            continue
        if targets_file.is_file():
            targets = read_targets(targets_file, len(utterances))
        else:
            encoder.eval()
            first = iteration == 1 and args.init_from is None
            features = mfcc if first else lambda audio: hidden_states(encoder, audio, args.target_layer, args.bf16)  # noqa: B023
            targets = cluster_targets(features, utterances, num_clusters, args.seed)
            args.output_dir.mkdir(parents=True, exist_ok=True)
            part = targets_file.with_name(f"part-{targets_file.name}")  # numpy adds .npz to other names
            np.savez(part, **{str(i): labels for i, labels in enumerate(targets)})
            part.replace(targets_file)
        logger.info("iteration %d: %d steps, %d clusters", iteration, steps, num_clusters)
        pretrain(encoder, utterances, targets, num_clusters, steps, directory, args)
        encoder.to_stock().save_pretrained(finished)
    # Half precision keeps the repository small; loading for use is float32 (`dtype=torch.float32`).
    encoder.to_stock().half().save_pretrained(args.output_dir / "model")
    Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True).save_pretrained(args.output_dir / "model")


def read_targets(path: Path, number: int) -> list[np.ndarray]:
    """
    Raises:
        `ValueError`: if it can't be read, or is not of `number` utterances.
    """
    try:
        with np.load(path) as stored:
            targets = [stored[name] for name in stored.files]
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read ({error}); remove it to compute it again.") from error
    if len(targets) != number:
        raise ValueError(f"{path} is for {len(targets)} utterances, not {number}; choose another `output_dir`.")
    return targets


def main(arguments: list[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    return run_script(lambda: run(*parse(arguments, (PretrainArguments,))))


if __name__ == "__main__":
    sys.exit(main())
