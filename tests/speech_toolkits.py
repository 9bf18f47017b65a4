"""What the tests of other toolkits share: students on disk, speech on disk, processes that see a toolkit."""

import os
import subprocess
import sys
from pathlib import Path

import soundfile
import torch
from conftest import padded_batch
from example_helpers import DEMO, EXAMPLES, copy_clips, read_metadata
from test_modeling_wavlm_skill_student import pruned_student
from transformers import AutoModel, Wav2Vec2FeatureExtractor


TESTS = Path(__file__).resolve().parent

# The extensions of torchaudio on PyPI are built for CUDA. Without them it loads beside any build of torch, and what is
# tried here uses none of them.
TORCHAUDIO_EXTENSIONS = "torchaudio/lib/*.so"


def run(script: Path, *arguments, packages: list[Path], **variables: str) -> str:
    """Runs a script in a process that sees what lies in `packages`, with `variables` set; returns what it printed."""
    path = os.pathsep.join(map(str, [*packages, EXAMPLES]))
    process = subprocess.run(
        [sys.executable, "-W", "ignore", *map(str, [script, *arguments])],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | variables,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    return process.stdout


def save_students(root: Path) -> dict[str, Path]:
    """A student of each layout. That of Large wants normalised audio. In training they would skip most layers."""
    for layout in ("base", "large"):
        pruned_student(layout, layerdrop=0.9).save_pretrained(root / layout)
        extractor = Wav2Vec2FeatureExtractor(do_normalize=layout == "large", return_attention_mask=True)
        extractor.save_pretrained(root / layout)
    return {layout: root / layout for layout in ("base", "large")}


@torch.no_grad()
def outputs(directory: Path, input_values, attention_mask, **config) -> tuple[torch.Tensor, torch.Tensor]:
    """What `AutoModel` gives: all hidden states, stacked, and the last one."""
    model = AutoModel.from_pretrained(directory, **config).eval()
    output = model(input_values, attention_mask=attention_mask, output_hidden_states=True)
    return torch.stack(output.hidden_states), output.last_hidden_state


def padded_clips() -> list[torch.Tensor]:
    """The clips of `padded_batch`, without padding."""
    batch = padded_batch()
    return [row[: mask.sum()] for row, mask in zip(batch["input_values"], batch["attention_mask"], strict=True)]


def save_speech(directory: Path) -> list[dict[str, str]]:
    """Three seconds of each of three clips of two speakers of the demo, and `metadata.csv`; returns its rows."""
    source = DEMO / "audio" / "heldout"
    rows = read_metadata(source)
    speakers = sorted({row["speaker"] for row in rows})[:2]
    chosen = [row for speaker in speakers for row in [row for row in rows if row["speaker"] == speaker][:3]]
    copy_clips(source, directory, chosen)
    for row in chosen:
        samples, rate = soundfile.read(directory / row["file_name"], frames=48_000)
        soundfile.write(directory / row["file_name"], samples, rate, format="OGG", subtype="OPUS")
    return chosen


def assert_close(actual: torch.Tensor, expected: torch.Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)
