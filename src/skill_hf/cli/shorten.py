"""
`skill-hf shorten`: a student without some layers of a speech encoder, chosen by similarity on your own speech or by
position. Nothing is trained.
"""

from pathlib import Path

import numpy as np

from ..compression.layer_dropping import ORDERS, block_influence, drop_layers, layers_to_drop
from ..data.collator import calibration_waveforms
from ..data.speech_datasets import load_audio_dir
from ..distillation.task_heads import CTC, TASK_NAMES, load_initial_student
from ..encoders import feature_extractor_for
from ..files import keep_sources, try_directory, write_json
from ..grouping.layer_similarity import layer_similarity
from ..models.families import head_of
from ..models.loading import load_feature_extractor
from ..models.processors import load_tokenizer, save_processor
from ..models.properties import receptive_field
from ..recipe.skill_config import SIMILARITIES
from .settings import Count, Seconds, Seed, checked, run_script
from .text import Parser, align


# Option -> its type; these are read as text, like settings of a file.
OPTIONS = {"num_layers": Count, "max_clips": Count, "max_seconds": Seconds, "batch_size": Count, "seed": Seed}


def shorten(
    source: str,
    num_layers: int,
    order: str = "influence",
    audio_dir: str | None = None,
    similarity: str = "cosine",
    *,
    task: str | None = None,
    max_clips: int = 64,
    max_seconds: float = 10.0,
    batch_size: int = 8,
    seed: int = 0,
) -> tuple:
    """
    A student of `num_layers` layers, the layers that were removed, and the influence of each layer or `None`.

    Args:
        source (`str`): Hub id or directory of a teacher or a student.
        num_layers (`int`): layers to keep.
        order (`str`, *optional*, defaults to `"influence"`): see [`layers_to_drop`].
        audio_dir (`str`, *optional*): folder of audio, for `order="influence"`.
        similarity (`str`, *optional*, defaults to `"cosine"`): measure of a layer's input and output.
        task (`str`, *optional*): that of the head that is kept, as in `skill-hf distill`; by default none.
        max_clips, max_seconds, batch_size, seed: as of `skill-hf analyze`.

    Raises:
        `ValueError`: if the model or the audio cannot be used, or the number of layers is impossible.
    """
    if order == "influence" and audio_dir is None:
        raise ValueError("`--order influence` needs `--audio_dir`, a folder of audio like that to be used later.")
    student = load_initial_student(source, task).eval()
    number = student.config.num_hidden_layers
    if not 1 <= num_layers < number:
        raise ValueError(f"`num_layers` must be from 1 to {number - 1} for this model, but is {num_layers}.")
    influence = None
    if order == "influence":
        extractor = feature_extractor_for(source, student.config)
        rows = load_audio_dir(audio_dir)
        audio = calibration_waveforms(rows, max_clips, max_seconds, seed, extractor, receptive_field(student.config))
        influence = block_influence(
            layer_similarity(student.base_model, audio, similarity, batch_size=batch_size, seed=seed)
        )
    dropped = layers_to_drop(number, number - num_layers, order, influence)
    return drop_layers(student, dropped), dropped, influence


def _parse(arguments: list[str] | None, prog: str | None):
    parser = Parser(prog=prog, description="Remove whole layers of a speech encoder, without training.")
    parser.add_argument("model", help="Hub id or directory of a teacher or a student.")
    parser.add_argument("--num_layers", required=True, help="Layers to keep.")
    parser.add_argument("--output_dir", required=True, help="Where the student goes.")
    parser.add_argument(
        "--order",
        choices=ORDERS,
        default="influence",
        help="Which layers to remove: influence, those that change their input least (default); bottom, from the"
        " second up; top, from the last down.",
    )
    parser.add_argument("--similarity", choices=SIMILARITIES, default="cosine", help="Measure of a layer's influence.")
    parser.add_argument(
        "--task", choices=TASK_NAMES, help="The model's head that goes along; by default, and with `encoder`, none."
    )
    parser.add_argument("--audio_dir", help="Folder of audio to measure influence on.")
    parser.add_argument("--max_clips", default="64", help="Clips of the folder to use; 64 by default.")
    parser.add_argument("--max_seconds", default="10", help="Length in seconds to crop clips to; 10 by default.")
    parser.add_argument("--batch_size", default="8", help="Clips in a forward pass; 8 by default.")
    parser.add_argument("--seed", default="0", help="Random seed of the sample of clips; 0 by default.")
    args = parser.parse_args(arguments)
    for name, hint in OPTIONS.items():
        setattr(args, name, checked(name, getattr(args, name), hint))
    return args


def report(num_layers: int, dropped: list[int], influence: np.ndarray | None) -> str:
    """A line for each layer: its influence, and whether it was removed."""
    rows = [["layer", *([] if influence is None else ["influence"]), ""]]
    for layer in range(num_layers):
        value = [] if influence is None else [f"{influence[layer]:.4f}"]
        rows.append([str(layer + 1), *value, "removed" if layer in dropped else ""])
    return "\n".join(align(rows))


def main(arguments: list[str] | None = None, prog: str | None = None) -> int:
    """
    Removes layers, saves the student and says what was removed.

    Args:
        arguments (`list[str]`, *optional*): the command line; by default that of the process.
        prog (`str`, *optional*): what the help calls the program.

    Returns:
        `int`: the exit code.
    """

    def body() -> None:
        args = vars(_parse(arguments, prog))
        source, output_dir = args.pop("model"), args.pop("output_dir")
        try_directory(output_dir)
        keep_sources(output_dir, {"model": source, "audio_dir": args["audio_dir"]})
        student, dropped, influence = shorten(source, **args)
        student.save_pretrained(output_dir)
        extractor = load_feature_extractor(source)
        if extractor is not None:
            save_processor(output_dir, extractor, load_tokenizer(source) if head_of(student) == CTC else None)
        result = {"removed_layers": [layer + 1 for layer in dropped], "order": args["order"]}
        if influence is not None:
            result |= {"similarity": args["similarity"], "influence": influence.round(6).tolist()}
        write_json(Path(output_dir, "shortened.json"), result)
        print(report(student.config.num_hidden_layers + len(dropped), dropped, influence))
        print(f"\n{student.num_parameters():,} parameters; written to {output_dir}", flush=True)

    return run_script(body)
