"""
Distils and prunes a speech encoder with SKILL, from audio to a directory that loads with `AutoModel`.

WavLM Base+ on LibriSpeech, the published recipe (640 s of audio per step) on 4 GPUs:

    accelerate launch --multi_gpu --num_processes 4 --mixed_precision fp16 examples/run_skill.py \\
        --teacher_name_or_path microsoft/wavlm-base-plus \\
        --dataset_name openslr/librispeech_asr --dataset_config_name all \\
        --train_split train.clean.100+train.clean.360+train.other.500 --eval_split validation.clean \\
        --seconds_per_batch 160 --seconds_per_step 640 --dataloader_num_workers 8 \\
        --target_sparsity 0.75 --output_dir wavlm-base-plus-skill

A short run on a CPU, on a local folder of audio (wav, flac, mp3, ogg, opus; any rate and number of channels):

    python examples/run_skill.py --teacher_name_or_path microsoft/wavlm-base-plus \\
        --audio_dir recordings/train --eval_audio_dir recordings/heldout \\
        --max_steps 300 --per_device_train_batch_size 8 --max_seconds 3 --output_dir wavlm-small

All settings in one JSON or YAML file with the same names:

    python examples/run_skill.py recipe.json

Add `--resume_from_checkpoint auto` to resume a run that was stopped, or to start it if there is no checkpoint yet
(with `True` that is an error), `--overwrite_output_dir` to replace an earlier run in `output_dir`, `--push_to_hub` to
publish the student. `--target_sparsity 0.5 0.75 0.9` makes three students, each the start of the next, in folders
`sparsity-0.5` and so on of `output_dir`. With no arguments at all: the demo of `examples/demo/`, offline, in about 14
minutes on 2 CPU cores; `--demo hubert` runs it on the second teacher, a small HuBERT. Further arguments change its
settings.

Exit codes: 0 if the student is saved, 2 after a line that begins with `error`, 130 after Ctrl-C and 75 after SIGTERM.
Both signals write a checkpoint first.

`output_dir` then contains the student, its model card, `layer_similarity.png` (teacher's layers and their tree),
`architecture.png` (what is left of each layer), `layer_distances.png` (student and teacher at every layer),
`training.png` and `all_results.json`.
"""

import json
import sys
from pathlib import Path

from skill_hf.cli import distill


REPOSITORY = Path(__file__).resolve().parents[1]
DEMO_SETTINGS = REPOSITORY / "examples" / "demo" / "demo.json"
# Name of a demo -> what it changes in these settings.
DEMOS = {
    "wavlm": {},
    "hubert": {"teacher_name_or_path": "examples/demo/teacher-hubert", "output_dir": "outputs/demo-hubert"},
}


def demo_arguments(demo: str = "wavlm") -> list[str]:
    """The command line that stands for the settings of one of `DEMOS`, wherever this is started."""
    settings = json.loads(DEMO_SETTINGS.read_text(encoding="utf-8")) | DEMOS[demo]
    for name in ("teacher_name_or_path", "audio_dir", "eval_audio_dir", "output_dir"):
        settings[name] = str(REPOSITORY / settings[name])
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def main(arguments: list[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else arguments
    if words and words[0] != "--demo":
        return distill.main(words)
    demo = words[1] if len(words) > 1 else "wavlm"
    if demo not in DEMOS:
        print(f"error: `--demo` must be one of {', '.join(DEMOS)}, but is {demo!r}.", file=sys.stderr)
        return 2
    sys.path.insert(0, str(REPOSITORY / "examples" / "demo"))
    from demo_comparison import compare

    return distill.main([*demo_arguments(demo), *words[2:]], report=lambda trainer: {"comparison": compare(trainer)})


if __name__ == "__main__":
    sys.exit(main())
