"""What tests of `skill-hf distill` share: a tiny teacher, folders of noise, the settings of a run of six steps."""

import json

import numpy as np
import soundfile
from conftest import tiny_teacher
from transformers import Wav2Vec2FeatureExtractor


# Six steps, four of them in stage 1, in a second or two.
SHORT = {
    "max_steps": 6,
    "per_device_train_batch_size": 2,
    "max_seconds": 0.5,
    "min_seconds": 0.25,
    "calibration_samples": 4,
    "calibration_seconds": 0.5,
    "target_sparsity": 0.3,
    "learning_rate": 1e-3,
    "gate_learning_rate": 0.1,
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
    "dataloader_pin_memory": False,
}


def write_audio(directory, number=6, seconds=0.7):
    """Noise that is louder in each clip, in files of several rates, formats and numbers of channels."""
    directory.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for index in range(number):
        rate, suffix, channels = [(16_000, "wav", 1), (44_100, "flac", 2), (8_000, "ogg", 1)][index % 3]
        samples = 0.02 * (index + 1) * rng.standard_normal((int(seconds * rate), channels))
        soundfile.write(directory / f"{index}.{suffix}", samples, rate)
    return directory


def write_inputs(folder):
    """Fills a folder with `teacher`, `audio` and `heldout`."""
    tiny_teacher(num_hidden_layers=2).save_pretrained(folder / "teacher")
    Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True).save_pretrained(folder / "teacher")
    write_audio(folder / "audio")
    write_audio(folder / "heldout", number=3)
    return folder


def command_line(settings) -> list[str]:
    words = []
    for name, value in settings.items():
        if name == "layer_groups":
            value = json.dumps(value)
        if value is not None:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def on_folder(shared, folder, **settings) -> dict:
    """Settings of a short run on the shared folder of audio."""
    return SHORT | {
        "teacher_name_or_path": str(shared / "teacher"),
        "audio_dir": str(shared / "audio"),
        "output_dir": str(folder),
        **settings,
    }


def results_of(output_dir) -> dict:
    return json.loads((output_dir / "all_results.json").read_text())
