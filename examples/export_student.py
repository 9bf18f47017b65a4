"""
Exports a student: to ONNX in float32 and int8, as a program of `torch.export`, and as a stock `WavLMModel`.

For a student of your own, use the command of the package, which has the same options:

    skill-hf export --model someone/wavlm-base-plus-skill --audio_dir recordings/heldout --output_dir exported

This script differs only in its defaults. The student of `make demo`, in every format, compared on the demo's held-out
speech:

    pip install -e ".[export]"
    python examples/export_student.py --formats onnx onnx_int8 torch_export stock --output_dir outputs/exported

A student from the Hub, fine-tuned or not, with all hidden states, compared on your own speech:

    python examples/export_student.py --model someone/wavlm-base-plus-skill --output_hidden_states True \\
        --audio_dir recordings/heldout --output_dir wavlm-base-plus-skill-onnx

`output_dir` then contains `model.onnx`, `model_int8.onnx`, `model.pt2` or the directory `stock`, the feature
extractor, the config, and `export.json` with the size of each file and the difference between its outputs and the
student's. For the comparison each file is loaded again; a float32 file that differs is an error. To use the ONNX file
without this package and without torch:

```python
import onnxruntime
from transformers import AutoFeatureExtractor

extractor = AutoFeatureExtractor.from_pretrained("outputs/exported")
session = onnxruntime.InferenceSession("outputs/exported/model.onnx")
inputs = extractor(waveform, sampling_rate=16_000, return_attention_mask=True, return_tensors="np")
inputs["attention_mask"] = inputs["attention_mask"].astype("int64")
(hidden_states,) = session.run(["last_hidden_state"], dict(inputs))  # (1, frames, hidden size)
```

Pass a batch of clips as a list of waveforms with `padding=True`. The `torch.export` program needs only torch:
`torch.export.load("model.pt2").module()(input_values=..., attention_mask=...)` returns a dict of the outputs.
"""

import sys
from dataclasses import dataclass, field

from example_utils import DEMO_DATA, DEMO_STUDENT, REPOSITORY, check_demo_student

from skill_hf.cli import export


@dataclass
class DemoArguments(export.ExportArguments):
    """By default what `make demo` leaves, compared on the demo's held-out speech."""

    model: str = field(default=str(DEMO_STUDENT), metadata={"help": "Hub id or directory of a student."})
    output_dir: str = field(default=str(REPOSITORY / "outputs" / "exported"), metadata={"help": "Output directory."})
    audio_dir: str = field(
        default=str(DEMO_DATA / "audio" / "heldout"),
        metadata={"help": "Directory of audio to compare outputs on, including its subdirectories."},
    )

    def __post_init__(self):
        check_demo_student(self.model)


def main(arguments: list[str] | None = None) -> int:
    return export.main(arguments, kind=DemoArguments)


if __name__ == "__main__":
    sys.exit(main())
