"""
Hidden states of long recordings in windows: how far they are from one pass, and memory and time for 90 minutes.

    python benchmarks/long_recordings.py

The speech is the demo's, joined; the models are the demo's two teachers or `--models`. Memory is that of the process
of `examples/extract_hidden_states.py`, including interpreter and libraries.
"""

import argparse
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile
import torch
import transformers
from tables import table

from skill_hf.data import load_audio_dir, read_audio
from skill_hf.encoders import PretrainedEncoder, feature_extractor_for
from skill_hf.latency import device_name
from skill_hf.models.loading import load_model
from skill_hf.windows import WindowedEncoder


REPOSITORY = Path(__file__).resolve().parents[1]
DEMO = REPOSITORY / "examples" / "demo"
TEACHERS = [DEMO / "teacher", DEMO / "teacher-hubert"]
RATE = 16_000
COMPARED_SECONDS = 180
WINDOWS = ((30, 1), (30, 5), (30, 10), (60, 5))
SCRIPT = REPOSITORY / "examples" / "extract_hidden_states.py"
# Runs the script, which ends with `sys.exit`, and prints its peak memory.
MEASURED = """
import os, runpy, sys
from memory import memory_bytes
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as error:
    assert not error.code
print(memory_bytes("VmHWM"))
"""


def joined_speech(seconds: float) -> np.ndarray:
    speech = [read_audio(row["audio"]) for row in load_audio_dir(DEMO / "audio")]
    return np.resize(np.concatenate(speech), int(seconds * RATE))


def difference(model: str, speech: np.ndarray) -> list[list[str]]:
    """Relative distance of hidden states to those of one pass: mean over frames of norms, first and last state."""
    loaded = load_model(model)
    encoder = PretrainedEncoder(
        loaded, feature_extractor_for(model, loaded.config), [0, loaded.config.num_hidden_layers]
    )
    (whole,) = encoder([encoder.prepare(speech)])
    rows = []
    for window, context in WINDOWS:
        states = torch.cat(list(WindowedEncoder(encoder, window, context)(speech)))
        relative = (states - whole).norm(dim=-1) / whole.norm(dim=-1)
        cosine = torch.nn.functional.cosine_similarity(states, whole, dim=-1)
        first, last = relative.mean(0).tolist()
        name = f"{Path(model).name} ({loaded.config.feat_extract_norm} norm)"
        rows.append([name, f"{window} s", f"{context} s", f"{first:.4f}", f"{last:.4f}", f"{cosine[:, 1].min():.4f}"])
    return rows


def extract(model: str, minutes: float) -> list[str]:
    """Peak memory and time of the script on one recording."""
    with tempfile.TemporaryDirectory() as directory:
        audio = Path(directory) / "audio"
        audio.mkdir()
        soundfile.write(audio / "recording.flac", joined_speech(60 * minutes), RATE)
        words = ["--model", model, "--audio_dir", str(audio), "--output_dir", f"{directory}/states", "--device", "cpu"]
        words += ["--file_format", "npy", "--window_seconds", "30", "--save_dtype", "float16"]
        start = time.perf_counter()
        command = [sys.executable, "-c", MEASURED, str(SCRIPT), *words]
        where = {"cwd": REPOSITORY / "benchmarks", "stdout": subprocess.PIPE, "text": True}
        peak = int(subprocess.run(command, check=True, **where).stdout.split()[-1])
        seconds = time.perf_counter() - start
        (states,) = Path(directory, "states").glob("*.npy")
        shape = np.load(states, mmap_mode="r").shape
    return [Path(model).name, f"{minutes:g} min", str(shape), f"{peak / 1e9:.2f} GB", f"{60 * minutes / seconds:.0f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Hidden states of long recordings in windows.")
    parser.add_argument("--models", nargs="+", default=list(map(str, TEACHERS)), help="Directories or Hub ids.")
    parser.add_argument("--minutes", type=float, nargs="+", default=[5.0, 90.0], help="Lengths for time and memory.")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads.")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    machine = f"{device_name(torch.device('cpu'))}, {args.threads} threads, Python {platform.python_version()}"
    print(f"{machine}, torch {torch.__version__}, transformers {transformers.__version__}; no random numbers\n")
    speech = joined_speech(COMPARED_SECONDS)
    rows = [row for model in args.models for row in difference(model, speech)]
    header = ["model", "window", "context", "first state differs by", "last state", "smallest cosine, last state"]
    print(table(f"Windows against one pass over {COMPARED_SECONDS} s", header, rows), flush=True)
    rows = [extract(args.models[0], minutes) for minutes in sorted(args.minutes)]
    header = ["model", "recording", "hidden states", "peak memory", "times as fast as speech"]
    print("\n" + table("Memory and time in windows of 30 s", header, rows))


if __name__ == "__main__":
    main()
