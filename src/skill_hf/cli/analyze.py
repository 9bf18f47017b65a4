"""
`skill-hf analyze`: which layers of a speech encoder are alike, on speech of your own.

Prints the similarity of all layers, their groups for every number of groups, and how far these depend on the choice of
clips; with another model the similarity between the layers of both; with two folders of audio the difference between
them. Nothing that a model's directory or repository holds is run.
"""

import argparse
import json
import logging
import os
import textwrap
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from transformers import Wav2Vec2FeatureExtractor

from ..data.collator import calibration_waveforms
from ..data.speech_datasets import load_audio_dir
from ..encoders import feature_extractor_for
from ..files import keep_sources, try_directory, write_json
from ..grouping.clustering import layer_tree
from ..grouping.forward_pass import check_models
from ..grouping.layer_similarity import layer_similarity
from ..grouping.similarity import SIMILARITY_MEASURES
from ..grouping.stability import adjusted_rand_index, all_cuts, mean_differences
from ..losses import term_weights
from ..models.loading import load_model
from ..models.properties import receptive_field
from ..publishing.plots import (
    format_groups,
    plot_cross_similarity,
    plot_groups,
    plot_layer_similarity,
    plot_similarity_difference,
)
from ..recipe.skill_config import LINKAGES, SIMILARITIES, SkillConfig
from .settings import Count, Range, Seconds, Seed, checked, checked_device, require, run_script
from .text import WIDTH, Parser, align, print_result, shorten


# Each part of the audio takes the memory of the measure once.
Parts = Annotated[int, Range(least=0, most=64)]
# Option -> its type; these are read as text, like settings of a file.
OPTIONS = {
    "max_clips": Count,
    "max_seconds": Seconds,
    "num_parts": Parts,
    "batch_size": Count,
    "seed": Seed,
    "contiguous": bool,
    "include_embeddings": bool,
}


def analyze(
    source: str,
    audio_dirs: list[str],
    other: str | None = None,
    skill_config: SkillConfig | None = None,
    *,
    max_clips: int = 256,
    max_seconds: float = 10.0,
    num_parts: int = 4,
    batch_size: int = 8,
    seed: int = 0,
    device: str | None = None,
) -> dict[str, Any]:
    """
    Similarity and groups of a model's layers on one folder of audio or on two.

    Args:
        source (`str`): Hub id or directory of a speech encoder.
        audio_dirs (`list[str]`): one or two folders of audio.
        other (`str`, *optional*): Hub id or directory of another encoder, to compare the layers of both.
        skill_config ([`SkillConfig`], *optional*): recipe; `similarity`, `linkage`, `contiguous`,
            `include_embeddings` and the weights of the loss are read.
        max_clips (`int`, *optional*, defaults to 256): clips of each folder, a sample by `seed` if it has more.
        max_seconds (`float`, *optional*, defaults to 10.0): length in seconds that clips are cropped to.
        num_parts (`int`, *optional*, defaults to 4): disjoint parts of the clips that stability is measured on; each
            takes the memory of the measure once. 0 for none.
        batch_size (`int`, *optional*, defaults to 8): largest number of clips in one forward pass.
        seed (`int`, *optional*, defaults to 0): of the choice of clips and of their crops.
        device (`str`, *optional*): where the models run; by default a GPU if there is one.

    Returns:
        `dict`: what `--json` prints. Layers are named by their hidden state, 0 for the input of the first layer.

    Raises:
        `ValueError`: if a model cannot be loaded, the two cannot be compared, or the audio cannot be read.
    """
    config = SkillConfig() if skill_config is None else skill_config
    _check_audio_dirs(audio_dirs)
    names = [source] if other is None else [source, other]
    device = checked_device(device)
    models = [load_model(name, what=what) for name, what in zip(names, ("The model", "The other model"), strict=False)]
    extractors = [feature_extractor_for(name, model.config) for name, model in zip(names, models, strict=True)]
    check_models(models, extractors, names)
    SIMILARITY_MEASURES[config.similarity].check_widths(*(models[i].config.hidden_size for i in (0, -1)))
    first_layer = 0 if config.include_embeddings else 1
    states = [list(range(first_layer, model.config.num_hidden_layers + 1)) for model in models]
    if len(states[0]) < 2:
        raise ValueError(f"`{source}` has a single layer; compare it with its input by `include_embeddings`.")
    models = [model.to(device) for model in models]

    weights = {f"{term}_weight": weight for term, weight in term_weights(config).items()}
    options = {"similarity": config.similarity, "include_embeddings": config.include_embeddings, "seed": seed}
    options |= {"batch_size": batch_size, "num_parts": num_parts} | weights
    sets, parts = [], {"similarity": [], "similarity_to_other": []}
    for audio_dir in audio_dirs:
        clips = _read_clips(audio_dir, extractors[0].sampling_rate, models, max_clips, max_seconds, seed)
        found = {
            "audio_dir": audio_dir,
            "clips": len(clips),
            "seconds": sum(map(len, clips)) / extractors[0].sampling_rate,
        }
        pairs = {"similarity": None} if other is None else {"similarity": None, "similarity_to_other": models[1]}
        for name, second in pairs.items():
            matrices = layer_similarity(
                models[0],
                clips,
                other=second,
                feature_extractor=extractors[0],
                other_feature_extractor=extractors[-1],
                **options,
            )
            matrix, *matrices = matrices if num_parts else [matrices]
            found[name] = matrix
            parts[name].append(matrices)
        sets.append(found | _group(found["similarity"], parts["similarity"][-1], config, first_layer))
    return {
        "model": source,
        "other": other,
        "measure": config.similarity,
        "linkage": config.linkage,
        "contiguous": config.contiguous,
        "hidden_states": states[0],
        "other_hidden_states": None if other is None else states[1],
        "sets": [{"similarity_to_other": None} | _plain(one) for one in sets],
        "difference": _difference(sets, parts, first_layer) if len(sets) == 2 else None,
    }


def _check_audio_dirs(audio_dirs: list[str]) -> None:
    if not audio_dirs:
        raise ValueError(
            "Layers are compared on speech: give a folder of audio with --audio_dir, or two to see how they differ;"
            " --help lists all options."
        )
    if len(audio_dirs) > 2:
        raise ValueError(f"There are {len(audio_dirs)} --audio_dir, but one or two can be compared; drop the others.")
    if len({os.path.realpath(path) for path in audio_dirs}) < len(audio_dirs):
        raise ValueError(f"Both --audio_dir are {audio_dirs[0]}; name two folders, or drop one.")


def _read_clips(directory: str, rate: int, models: list, max_clips: int, max_seconds: float, seed: int) -> list:
    """Waveforms as they are; each model's feature extractor has yet to prepare them."""
    plain = Wav2Vec2FeatureExtractor(sampling_rate=rate, do_normalize=False)
    least = receptive_field(models[0].config)
    dataset = load_audio_dir(directory)
    return list(calibration_waveforms(dataset, max_clips, max_seconds, seed, plain, min_samples=least))


def _group(similarity: np.ndarray, parts: list[np.ndarray], config: SkillConfig, first_layer: int) -> dict[str, Any]:
    """The tree of the layers, and its groups for every number of them."""
    cuts = [
        {
            "groups": [[row + first_layer for row in group] for group in cut.groups],
            "height": cut.height,
            "silhouette": cut.silhouette,
            "stability": cut.stability,
        }
        for cut in all_cuts(similarity, config, parts)
    ]
    scores = {len(cut["groups"]): cut["silhouette"] for cut in cuts if cut["silhouette"] is not None}
    # As `cluster_layers` chooses.
    chosen = max(scores, key=scores.__getitem__) if scores else len(similarity)
    return {"tree": layer_tree(similarity, config), "num_groups": chosen, "cuts": cuts, "num_parts": len(parts)}


def _difference(sets: list[dict], parts: dict[str, list], first_layer: int) -> dict[str, Any]:
    """How the first set differs from the second."""
    result = {}
    for name in ("similarity", "similarity_to_other"):
        if name not in sets[0]:
            result[name] = None
            continue
        matrix = sets[0][name] - sets[1][name]
        largest = np.unravel_index(np.abs(matrix).argmax(), matrix.shape)
        means = mean_differences(*parts[name]) or (None, None)
        result[name] = {
            "matrix": matrix.tolist(),
            "largest": float(matrix[largest]),
            "largest_at": [int(index) + first_layer for index in largest],
            "mean_between_sets": means[0],
            "mean_within_sets": means[1],
        }
    pairs = zip(*(one["cuts"] for one in sets), strict=True)
    result["agreement"] = [adjusted_rand_index(one["groups"], other["groups"]) for one, other in pairs]
    return result


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Arrays as lists, for JSON."""
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in values.items()}


# ---------------------------------------------------------------------------------------------------------------- text
def format_text(result: dict[str, Any]) -> str:
    """Tables of at most `WIDTH` columns."""
    rows = [("model", result["model"])]
    if result["other"] is not None:
        rows.append(("other model", result["other"]))
    kind = f"{result['measure']}; {result['linkage']} linkage{' of neighbours' * result['contiguous']}"
    rows.append(("similarity", kind))
    blocks = [_named(rows)]
    for one in result["sets"]:
        blocks.append(_named([("audio", one["audio_dir"]), ("", f"{one['clips']} clips, {one['seconds']:,.0f} s")]))
        blocks.append(_matrix("Similarity of the hidden states", one["similarity"], result["hidden_states"]))
        blocks.append(_cuts(one))
        if one["similarity_to_other"] is not None:
            title = "Similarity to the hidden states of the other model (columns)"
            to_other = one["similarity_to_other"]
            blocks.append(_matrix(title, to_other, result["hidden_states"], result["other_hidden_states"]))
            nearest = zip(result["hidden_states"], np.argmax(to_other, axis=1).tolist(), strict=True)
            pairs = [f"{state}: {result['other_hidden_states'][column]}" for state, column in nearest]
            blocks.append(textwrap.fill(f"Most similar hidden state of the other model: {', '.join(pairs)}", WIDTH))
    if result["difference"] is not None:
        blocks += _difference_text(result)
    return "\n\n".join(blocks)


def _named(rows: list[tuple[str, str]]) -> str:
    return "\n".join(f"{name:<12}  {shorten(value, WIDTH - 14)}" for name, value in rows)


def _matrix(title: str, matrix: list, states: list[int], columns: list[int] | None = None, sign: str = "") -> str:
    columns = states if columns is None else columns
    rows = [["", *map(str, columns)]]
    rows += [[str(state), *(f"{value:{sign}.3f}" for value in row)] for state, row in zip(states, matrix, strict=True)]
    lines = align(rows, gap=" ")
    if len(lines[0]) > WIDTH:
        return f"{title}: {len(states)} x {len(columns)} values, in the pictures and in the JSON file of --output_dir"
    return "\n".join([title, *lines])


def _cuts(one: dict[str, Any]) -> str:
    head = ["groups", "height", "silhouette", "stability"]
    rows = [head]
    for number, cut in enumerate(one["cuts"], 1):
        values = [cut[name] for name in head[1:]]
        mark = "*" if number == one["num_groups"] else " "
        rows.append([f"{number:>5}{mark}", *("-" if value is None else f"{value:.3f}" for value in values)])
    lines = align(rows)
    indent = " " * (len(lines[0]) + 3)
    for index, cut in enumerate(one["cuts"], 1):
        text = f"{lines[index]}   {format_groups(cut['groups'])}"
        lines[index] = textwrap.fill(text, WIDTH, subsequent_indent=indent, drop_whitespace=False)
    notes = ["* the largest silhouette"]
    if one["num_parts"] > 1:
        notes.append(f"stability: adjusted Rand index between {one['num_parts']} parts of the clips, 1 if they agree")
    return "\n".join(["Groups of hidden states", *lines, *notes])


def _difference_text(result: dict[str, Any]) -> list[str]:
    difference = result["difference"]
    blocks = []
    for name, columns in (("similarity", None), ("similarity_to_other", result["other_hidden_states"])):
        if difference[name] is None:
            continue
        found = difference[name]
        what = "Similarity" if columns is None else "Similarity to the other model"
        title = f"{what} on the first folder minus that on the second"
        row, column = found["largest_at"]
        lines = [f"largest: {found['largest']:+.3f}, of hidden states {row} and {column}"]
        if found["mean_between_sets"] is not None:
            lines.append(
                f"mean absolute difference: {found['mean_between_sets']:.4f} between parts of the two folders,"
                f" {found['mean_within_sets']:.4f} between parts of one"
            )
        blocks.append("\n".join([_matrix(title, found["matrix"], result["hidden_states"], columns, "+"), *lines]))
    agreement = ", ".join(f"{number}: {value:.2f}" for number, value in enumerate(difference["agreement"], 1))
    blocks.append(textwrap.fill(f"Agreement of the groups (adjusted Rand index), by their number: {agreement}", WIDTH))
    return blocks


# ------------------------------------------------------------------------------------------------------------ pictures
def save(result: dict[str, Any], output_dir: str) -> list[str]:
    """Writes analysis.json and a picture of each matrix and of the groups; returns the names of the files."""
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    first_layer = result["hidden_states"][0]
    names = None if result["other"] is None else _short_names(result["model"], result["other"])
    figures = {}
    for number, one in enumerate(result["sets"], 1):
        end = f"_{number}" if len(result["sets"]) > 1 else ""
        groups = [cut["groups"] for cut in one["cuts"]]
        similarity, tree, chosen = np.array(one["similarity"]), np.array(one["tree"]), one["num_groups"]
        figures[f"layer_similarity{end}"] = plot_layer_similarity(similarity, tree, groups[chosen - 1], first_layer)
        silhouettes, stability = ([cut[name] for cut in one["cuts"]] for name in ("silhouette", "stability"))
        figures[f"layer_groups{end}"] = plot_groups(groups, silhouettes, stability, chosen)
        if names is not None:
            to_other = np.array(one["similarity_to_other"])
            figures[f"cross_similarity{end}"] = plot_cross_similarity(to_other, names, first_layer)
    if result["difference"] is not None:
        sets = _short_names(*(one["audio_dir"] for one in result["sets"]))
        for name, file in (("similarity", "difference"), ("similarity_to_other", "cross_difference")):
            if (found := result["difference"][name]) is not None:
                models = names if name == "similarity_to_other" else None
                matrix = np.array(found["matrix"])
                figures[file] = plot_similarity_difference(matrix, sets, models, first_layer)
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png")
    write_json(folder / "analysis.json", result)
    return ["analysis.json", *(f"{name}.png" for name in figures)]


def _short_names(*paths: str) -> tuple[str, ...]:
    """The ends of paths or of Hub ids, as far as they take to differ; so the labels of a picture name them."""
    parts = [[part for part in Path(path).parts if part != os.sep] or [path] for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(one[-length:]) for one in parts]
        if len(set(names)) == len(names):
            break
    return tuple(shorten(name, 40) for name in names)


# ------------------------------------------------------------------------------------------------------------- command
def _parse(arguments: list[str] | None, prog: str | None) -> argparse.Namespace:
    parser = Parser(
        prog=prog,
        description="Show which layers of a speech encoder are alike, in which groups, and how far that depends on the"
        " audio; between two models, and on two sets of audio, too. No code of a model is run.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("model", help="Hub id or directory of a speech encoder.")
    add(
        "--audio_dir",
        action="append",
        default=[],
        help="Folder of audio, with all below it. Give it twice for the difference of two sets, such as languages.",
    )
    add("--other", help="Hub id or directory of another encoder, such as a student of the model.")
    add("--output_dir", help="Where pictures and analysis.json go; by default nothing is written.")
    add("--json", action="store_true", help="Print one JSON object.")
    add("--similarity", default="cka", help=f"Measure: {', '.join(SIMILARITIES)}; cka by default.")
    add("--linkage", default="average", help=f"Distance of groups: {', '.join(LINKAGES)}; average by default.")
    add("--contiguous", nargs="?", const=True, default=False, help="Group runs of neighbouring layers only.")
    add("--include_embeddings", default=True, help="Whether the input of the first layer takes part; true by default.")
    add("--max_clips", default=256, help="Clips of each folder; 256 by default.")
    add("--max_seconds", default=10.0, help="Length in seconds that clips are cropped to; 10 by default.")
    add(
        "--num_parts",
        default=4,
        help="Parts of the clips that stability is measured on, 4 by default, 0 for none. With cka each takes 0.4 GB"
        " for a Base model, 2.7 GB for a Large one, 16 and 36 GB for XLS-R 1B and 2B.",
    )
    add("--batch_size", default=8, help="Clips in one forward pass; 8 by default.")
    add("--seed", default=0, help="Of the choice of clips and of their crops; 0 by default.")
    add("--device", help="Such as cpu or cuda:1; by default a GPU if there is one.")
    args = parser.parse_args(arguments)
    for name, hint in OPTIONS.items():
        setattr(args, name, checked(name, getattr(args, name), hint))
    return args


def main(arguments: list[str] | None = None, prog: str | None = None) -> int:
    """
    Prints what [`analyze`] finds, and draws it if there is an `output_dir`.

    Args:
        arguments (`list[str]`, *optional*): the command line; by default that of the process.
        prog (`str`, *optional*): what the help calls the program.

    Returns:
        `int`: the exit code.
    """

    def body() -> None:
        args = _parse(arguments, prog)
        recipe = ("similarity", "linkage", "contiguous", "include_embeddings")
        config = SkillConfig(**{name: getattr(args, name) for name in recipe})
        _check_audio_dirs(args.audio_dir)
        if args.output_dir is not None:
            require("matplotlib", "matplotlib", "The pictures need")
            try_directory(args.output_dir)
            folders = dict(zip(("audio_dir", "second audio_dir"), args.audio_dir, strict=False))
            keep_sources(args.output_dir, {"model": args.model, "other": args.other} | folders)
        names = ("max_clips", "max_seconds", "num_parts", "batch_size", "seed", "device")
        options = {name: getattr(args, name) for name in names}
        result = analyze(args.model, args.audio_dir, args.other, config, **options)
        text = json.dumps(result, allow_nan=False) if args.json else format_text(result)
        if args.output_dir is not None:
            files = save(result, args.output_dir)
            if not args.json:
                text += f"\n\n{args.output_dir}: {', '.join(files)}"
        print_result(text)

    logging.basicConfig(format="%(message)s")
    return run_script(body)
