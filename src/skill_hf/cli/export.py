"""
`skill-hf export`: to ONNX in float32 and int8, `torch.export` or a stock model of the family; each is compared with
the student.
"""

import logging
import tempfile
import warnings
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import torch
import transformers
from transformers import AutoProcessor, PreTrainedModel

from ..data.collator import calibration_waveforms
from ..data.speech_datasets import load_audio_dir
from ..encoders import feature_extractor_for
from ..export import NamedOutputs, OnnxModel, compare_outputs, export_onnx, export_program, quantize_onnx
from ..files import keep_sources, try_directory, write_json
from ..models.configuration_skill_student import SkillStudentConfig
from ..models.loading import load_config, load_model
from ..models.modeling_skill_student import SkillStudentModel
from .settings import MAX_SECONDS, Count, Range, parse, run_script


logger = logging.getLogger(__name__)

FILES = {"onnx": "model.onnx", "onnx_int8": "model_int8.onnx", "torch_export": "model.pt2", "stock": "stock"}

# What a form in float32 may differ from the student on speech, relative to its largest value.
TOLERANCE = 1e-4

# Shorter clips are left out: an x-vector head makes nothing of a third of a second.
MIN_SECONDS = 0.5


@dataclass
class ExportArguments:
    model: str = field(metadata={"help": "Hub id or directory of a student."})
    output_dir: str = field(metadata={"help": "Output directory."})
    audio_dir: str = field(
        metadata={"help": "Directory of audio to compare outputs on, including its subdirectories."}
    )
    formats: list[str] = field(
        default_factory=lambda: ["onnx"], metadata={"help": "One or more formats.", "choices": list(FILES)}
    )
    output_hidden_states: bool = field(
        default=False, metadata={"help": "Add all hidden states to the outputs of the exported models."}
    )
    max_clips: Count = field(default=10, metadata={"help": "Maximum number of clips to compare on."})
    max_seconds: Annotated[float, Range(MIN_SECONDS, most=MAX_SECONDS)] = field(
        default=10.0, metadata={"help": "Length in seconds to crop clips to."}
    )


def load_student(name: str) -> PreTrainedModel:
    """
    Loads the student in float32, with the head that it was saved with.

    Raises:
        `ValueError`: if there is no student, or weights are missing.
    """
    config = load_config(name)
    if not isinstance(config, SkillStudentConfig):
        raise ValueError(
            f"`{name}` is a `{config.model_type}`, not a student. Convert it with its family's student class, such as"
            " `WavLMForSkillStudent.from_pretrained(...).save_pretrained(...)`."
        )
    architecture = (config.architectures or [None])[0]
    auto_classes = {path.rpartition(".")[2]: name for name, path in config.student_classes().items()}
    if architecture not in auto_classes:
        known = ", ".join(path for path in auto_classes if "Config" not in path)
        raise ValueError(
            f"`architectures` in config.json of `{name}` is {config.architectures}; the supported ones are {known}."
        )
    auto_class = getattr(transformers, auto_classes[architecture])
    return load_model(name, auto_class, new_head=False)


def export(args: ExportArguments, model: PreTrainedModel, audio: list) -> dict[str, dict]:
    """
    Writes all requested formats and compares each with the model.

    Returns:
        `dict[str, dict]`: for each format `file`, `megabytes` (10^6 bytes), `parameters`, `cosine_similarity` of each
        output and, in float32, `largest_difference` over all outputs.

    Raises:
        `RuntimeError`: if a format in float32 differs from the model.
    """
    reference = NamedOutputs(model, args.output_hidden_states)
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(args.output_dir)
        onnx_path = (folder if "onnx" in args.formats else Path(scratch)) / FILES["onnx"]
        if {"onnx", "onnx_int8"} & set(args.formats):
            logger.info("Exporting to ONNX")
            export_onnx(model, onnx_path, args.output_hidden_states)
        for name in dict.fromkeys(args.formats):
            path = folder / FILES[name]
            result = {"file": path.name, "parameters": model.num_parameters()}
            if name == "onnx_int8":
                logger.info("Quantising to int8")
                results[name] = result | quantize_onnx(onnx_path, path, audio)
                continue
            if name == "onnx":
                saved = OnnxModel(path)
            elif name == "torch_export":
                logger.info("Exporting with torch.export")
                export_program(model, path, args.output_hidden_states)
                saved = torch.export.load(path).module()
            else:
                model.to_stock().save_pretrained(path)
                stock = model.stock_class().from_pretrained(path).eval()
                saved, result["parameters"] = NamedOutputs(stock, args.output_hidden_states), stock.num_parameters()
                path = path / "model.safetensors"
            compared = compare_outputs(reference, saved, audio)
            result["megabytes"] = path.stat().st_size / 1e6
            result["largest_difference"] = max(values["largest_difference"] for values in compared.values())
            result["cosine_similarity"] = {name: values["cosine_similarity"] for name, values in compared.items()}
            if not result["largest_difference"] <= TOLERANCE:
                raise RuntimeError(f"{path} differs from the student: {compared}. Please report it.")
            results[name] = result
    return results


def print_table(results: dict[str, dict]) -> None:
    rows = [("format", "file", "MB", "parameters", "largest difference", "lowest cosine similarity")]
    for name, result in results.items():
        difference = result.get("largest_difference")
        rows.append(
            (
                name,
                result["file"],
                f"{result['megabytes']:.2f}",
                f"{result['parameters']:,}",
                "–" if difference is None else f"{difference:.1e}",
                f"{min(result['cosine_similarity'].values()):.5f}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def run(arguments: list[str] | None, prog: str | None = None, kind: type[ExportArguments] = ExportArguments) -> None:
    """Does the work of [`main`]; errors are raised."""
    (args,) = parse(arguments, (kind,), prog)
    try_directory(args.output_dir)
    keep_sources(args.output_dir, {"model": args.model})
    keep_sources(Path(args.output_dir) / FILES["stock"], {"model": args.model})
    model = load_student(args.model)
    if "stock" in args.formats and not isinstance(model, SkillStudentModel):
        raise ValueError(
            f"`stock` exports only encoders without a head, but the model is a {type(model).__name__}; leave it out of"
            " `formats`."
        )
    extractor = feature_extractor_for(args.model, model.config)
    audio = list(
        calibration_waveforms(
            load_audio_dir(args.audio_dir),
            args.max_clips,
            args.max_seconds,
            seed=0,
            feature_extractor=extractor,
            min_samples=round(MIN_SECONDS * extractor.sampling_rate),
        )
    )
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    results = export(args, model, audio)
    for directory in [folder, folder / FILES["stock"]] if "stock" in args.formats else [folder]:
        AutoProcessor.from_pretrained(args.model, trust_remote_code=False).save_pretrained(
            directory
        )  # a tokenizer, too, if there is one
        extractor.save_pretrained(directory)  # of which a processor's file would do for transformers alone
    model.config.to_json_file(folder / "config.json")  # names the labels of a head
    report = {
        "architecture": type(model).__name__,
        "clips": len(audio),
        "seconds": sum(map(len, audio)) / extractor.sampling_rate,
        "formats": results,
        "versions": {name: version(name) for name in ("torch", "transformers", "onnx", "onnxruntime")},
    }
    write_json(folder / "export.json", report)
    print_table(results)
    logger.info("Compared on %d clips, %.0f s of audio; written to %s", len(audio), report["seconds"], folder)


def main(
    arguments: list[str] | None = None, prog: str | None = None, kind: type[ExportArguments] = ExportArguments
) -> int:
    """
    Exports, compares and reports.

    Args:
        arguments (`list[str]`, *optional*): the command line; by default `sys.argv[1:]`.
        prog (`str`, *optional*): what the help calls the program.
        kind (`type`, *optional*, defaults to [`ExportArguments`]): the settings, possibly with other defaults.

    Returns:
        `int`: the exit code.
    """
    logging.basicConfig(format="%(message)s", level=logging.ERROR)
    logging.getLogger("skill_hf").setLevel(logging.INFO)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="torch|transformers|copyreg")  # exporters have much to say
    return run_script(lambda: run(arguments, prog, kind))
