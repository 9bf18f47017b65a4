"""Speech that is nothing but steps of loudness, and an encoder that hears either all of them or nothing."""

from pathlib import Path

import datasets
import numpy as np
import soundfile
import torch
from transformers import TrainingArguments


RATE, HOP, LEVELS = 16_000, 320, 32

# Vectors of the levels, each largest at its own place, some nearer to each other than others.
CODES = torch.eye(LEVELS) + 0.2 * torch.randn(LEVELS, LEVELS, generator=torch.Generator().manual_seed(0))


class LevelEncoder:
    """
    Two "hidden states": noise, and the loudness of each frame of 20 ms as one of 32 vectors (`deaf`: noise too).
    """

    sampling_rate, min_samples, frame_seconds = RATE, HOP, HOP / RATE
    num_layers, hidden_size, equal_lengths = 2, LEVELS, False

    def __init__(self, deaf: bool = False):
        self.deaf = deaf
        self.generator = torch.Generator().manual_seed(0)

    def prepare(self, samples: np.ndarray) -> np.ndarray:
        return samples

    def num_frames(self, num_samples: int) -> int:
        return num_samples // HOP

    def __call__(self, waveforms: list[np.ndarray]) -> list[torch.Tensor]:
        return [self._hear(torch.from_numpy(waveform)) for waveform in waveforms]

    def _hear(self, waveform: torch.Tensor) -> torch.Tensor:
        levels = (waveform[HOP // 2 :: HOP] * LEVELS).round().long()
        noise = torch.randn(2, len(levels), LEVELS, generator=self.generator)
        heard = noise[1] if self.deaf else CODES[levels]
        return torch.stack([noise[0], heard], dim=1)


def write_clip(path: Path, levels: list[int]) -> Path:
    """One level, 0 to 31, for each frame."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.repeat(np.array(levels) / LEVELS, HOP), RATE, subtype="FLOAT")
    return path


def make_dataset(directory: Path, clips: list[list[int]], columns: dict[str, list]) -> datasets.Dataset:
    """Clips of levels, as files in `directory`, with other columns."""
    paths = [str(write_clip(directory / f"clip{row}.wav", levels)) for row, levels in enumerate(clips)]
    dataset = datasets.Dataset.from_dict({"audio": paths, **columns})
    return dataset.cast_column("audio", datasets.Audio(decode=False))


def training_arguments(directory: Path, steps: int, batch_size: int = 8) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(directory),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        lr_scheduler_type="constant",
        eval_strategy="steps",
        eval_steps=steps,
        save_steps=steps,
        load_best_model_at_end=True,
        remove_unused_columns=False,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
