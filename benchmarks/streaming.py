"""
Training from a stream: whether it waits for data, by format of the audio, and whether memory stays flat.

    python benchmarks/streaming.py

Three parquet shards of the demo's speech are written for each format and read by two workers; the teacher is the
demo's. A step of the first part has 8 crops of 4 s, as a short run on a CPU; one of the second is as small as
possible, so that 2000 of them take minutes.
"""

import argparse
import io
import platform
import tempfile
from pathlib import Path

import datasets
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
import soxr
import torch
import transformers
from tables import table
from transformers import PrinterCallback, TrainerCallback, set_seed

from skill_hf import SkillConfig, SkillDistillationTrainer, SkillTrainingArguments
from skill_hf.data import load_audio_dir, load_speech_dataset, read_audio
from skill_hf.latency import device_name


DEMO = Path(__file__).resolve().parents[1] / "examples" / "demo"
RATE = 16_000
# Name -> rate, channels, and arguments of soundfile.
FORMATS = {
    "FLAC, 16 kHz": (16_000, 1, {"format": "FLAC"}),
    "mp3, 44.1 kHz, stereo": (44_100, 2, {"format": "MP3"}),
    "Opus, 48 kHz": (48_000, 1, {"format": "OGG", "subtype": "OPUS"}),
}
SHARDS, ROWS = 3, 100
WORKERS = 2


def write_stream(directory: Path, name: str) -> Path:
    """The demo's training clips in a format, again and again, in uneven shards."""
    rate, channels, settings = FORMATS[name]
    clips = []
    for row in load_audio_dir(DEMO / "audio" / "train"):
        samples = soxr.resample(read_audio(row["audio"]), RATE, rate)
        content = io.BytesIO()
        soundfile.write(content, np.repeat(samples[:, None], channels, axis=1), rate, **settings)
        clips.append({"bytes": content.getvalue(), "path": None})
    features = datasets.Features({"audio": datasets.Audio()})
    directory.mkdir()
    for shard in range(SHARDS):
        rows = [clips[index % len(clips)] for index in range(ROWS + 10 * shard)]
        content = pa.table({"audio": rows}).cast(features.arrow_schema)
        pq.write_table(content, directory / f"train-{shard}-of-{SHARDS}.parquet", row_group_size=10)
    return directory


class Memory(TrainerCallback):
    """Resident memory of the process and its workers, in MiB, by step."""

    def __init__(self, every: int):
        self.every, self.taken = every, {}

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every == 0:
            process = psutil.Process()
            processes = [process, *process.children(recursive=True)]
            self.taken[state.global_step] = [sum(one.memory_info().rss for one in processes) / 2**20, len(processes)]


def train(stream: Path, steps: int, size: int, seconds: float, seed: int, callbacks=()) -> SkillDistillationTrainer:
    set_seed(seed)
    with tempfile.TemporaryDirectory() as directory:
        trainer = SkillDistillationTrainer(
            teacher=str(DEMO / "teacher"),
            skill_config=SkillConfig(calibration_samples=16, calibration_seconds=2.5, num_clusters=4, final_steps=0),
            args=SkillTrainingArguments(
                output_dir=directory,
                max_steps=steps,
                per_device_train_batch_size=size,
                dataloader_num_workers=WORKERS,
                logging_steps=max(steps // 8, 1),
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
                seed=seed,
            ),
            train_dataset=load_speech_dataset(stream, streaming=True),
            callbacks=list(callbacks),
        )
        trainer.remove_callback(PrinterCallback)  # which prints the lines of the log
        trainer.data_collator.max_seconds = seconds
        trainer.train()
    return trainer


def main() -> None:
    parser = argparse.ArgumentParser(description="Waiting for data and memory of training from a stream.")
    parser.add_argument("--steps", type=int, default=40, help="Steps for each format; 0 for memory alone.")
    parser.add_argument("--memory_steps", type=int, default=2000, help="Steps of the second part; 0 to leave it out.")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads.")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, datasets {datasets.__version__}"
    machine = f"{device_name(torch.device('cpu'))}, {args.threads} threads, Python {platform.python_version()}"
    print(f"{machine}, {versions}; seed {args.seed}\n", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        streams = {name: write_stream(Path(directory) / str(index), name) for index, name in enumerate(FORMATS)}
        rows = []
        for name, stream in streams.items() if args.steps else ():
            # Without the first line of the log, in which the workers start.
            logs = [line for line in train(stream, args.steps, 8, 4.0, args.seed).state.log_history if "loss" in line]
            shares = [line["data_wait_share"] for line in logs[1:]]
            speed = sum(line["audio_hours_per_hour"] for line in logs[1:]) / len(shares)
            mean = sum(shares) / len(shares)
            rows.append([name, f"{mean:.1%}", f"{max(shares):.1%}", f"{speed:.0f}"])
        header = ["audio", "share of a step that waits", "largest of a log line", "hours of audio an hour"]
        if rows:
            print(table(f"Waiting for data, {WORKERS} workers", header, rows), flush=True)
        if args.memory_steps:
            memory = Memory(max(args.memory_steps // 8, 1))
            train(streams["FLAC, 16 kHz"], args.memory_steps, 2, 0.5, args.seed, [memory])
            rows = [[str(step), f"{taken:.0f} MiB", str(number)] for step, (taken, number) in memory.taken.items()]
            print("\n" + table("Memory of the process and its workers", ["step", "resident", "processes"], rows))


if __name__ == "__main__":
    main()
