"""
`skill-hf convert`: a pruned model of DPHuBERT's or DiariZen's format as a student, and a student in that format.

Unpruned models of torchaudio, fairseq and s3prl become students, too. Nothing that a file contains is run.
"""

import argparse
from pathlib import Path

from ..conversion.checkpoints import STUDENT_ENTRY, Checkpoint
from ..conversion.converter import convert_checkpoint, convert_student, save_checkpoint
from ..conversion.dphubert_format import ARGUMENTS
from ..files import keep_sources, try_directory
from ..models.loading import load_config, num_parameters, valid_hub_id
from ..models.students import FAMILIES
from .settings import run_script
from .text import Parser


FILE = "dphubert.pth"  # that `--to dphubert` writes


def to_student(args: argparse.Namespace) -> str:
    """Writes a student into `args.output_dir`, and returns what is printed."""
    student, extractor, checkpoint = convert_checkpoint(args.checkpoint, args.config, args.family, args.base_model)
    student.save_pretrained(args.output_dir)
    extractor.save_pretrained(args.output_dir)
    return _describe(student, checkpoint, args.output_dir)


def to_dphubert(args: argparse.Namespace) -> str:
    """Writes a file of DPHuBERT's format into `args.output_dir`, and returns what is printed."""
    for name in ("config", "family", "base_model"):
        if getattr(args, name) is not None:
            raise ValueError(f"--{name} is for the way from a checkpoint to a student; leave it out.")
    content = convert_student(args.checkpoint)
    path = Path(args.output_dir) / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(content, path)
    number = sum(tensor.numel() for tensor in content["state_dict"].values())
    lines = [f"Written to {path}: {len(content['state_dict'])} weights, {number:,} numbers, and their config."]
    architecture = (load_config(args.checkpoint).architectures or [""])[0]
    if not architecture.endswith(("Model", "ForSkillStudent")):
        lines.append(f"It has the encoder alone; the head of {architecture} is left out.")
    if content[STUDENT_ENTRY]["config"].get("masked_group_norm"):
        lines.append("The format has no `masked_group_norm`: clips that are padded come out otherwise.")
    return "\n".join(lines)


TARGETS = {"student": to_student, "dphubert": to_dphubert}


def _describe(student, checkpoint: Checkpoint, directory: str) -> str:
    config = student.config
    heads, units = sum(map(len, config.remaining_heads)), sum(config.intermediate_sizes)
    lines = [
        f"{checkpoint.format}, {checkpoint.family}: {num_parameters(student):,} parameters, {heads} attention heads"
        f" and {units:,} feed-forward units in {config.num_hidden_layers} layers.",
    ]
    if config.scaled_features:
        lines.append("Its last convolution has a factor for each channel, `feature_extractor.scale` in the student.")
    if checkpoint.left_out:
        lines.append(f"Not part of the encoder, and left out: {', '.join(checkpoint.left_out)}.")
    unknown = sorted(str(name) for name in checkpoint.config.keys() - ARGUMENTS)
    if unknown:
        lines.append(f"Arguments of its config that are not known, and were not used: {', '.join(unknown)}.")
    lines.append(
        f"Written to {directory}. AutoModel loads it after `import skill_hf`, or with trust_remote_code=True."
    )
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------- command
def _parse(arguments: list[str] | None, prog: str | None) -> argparse.Namespace:
    parser = Parser(
        prog=prog,
        description="Make a student of a checkpoint of DPHuBERT, DiariZen, torchaudio, fairseq or s3prl, or write a"
        " student in DPHuBERT's format. No code of the file is run.",
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", help="The file; with --to dphubert a student's directory or Hub id.")
    parser.add_argument("--output_dir", required=True, help="Where the student, or the file, goes.")
    parser.add_argument("--to", choices=sorted(TARGETS), default="student", help="What to write; student by default.")
    parser.add_argument("--config", help="JSON file of the model's config, for pruned weights without one.")
    parser.add_argument(
        "--family",
        help=f"Family of the model where the file does not tell HuBERT from others: {', '.join(FAMILIES)}.",
    )
    parser.add_argument("--base_model", help="Hub id of the model's teacher, which the student's config then names.")
    args = parser.parse_args(arguments)
    if args.base_model is not None and valid_hub_id(args.base_model) is None:
        raise ValueError(f"--base_model is {args.base_model!r}, which is not an id on the Hub.")
    return args


def main(arguments: list[str] | None = None, prog: str | None = None) -> int:
    """
    Converts a checkpoint or a student and says what was written.

    Args:
        arguments (`list[str]`, *optional*): the command line; by default that of the process.
        prog (`str`, *optional*): what the help calls the program.

    Returns:
        `int`: the exit code.
    """

    def body() -> None:
        args = _parse(arguments, prog)
        try_directory(args.output_dir)
        source = Path(args.checkpoint)
        keep_sources(args.output_dir, {"checkpoint": source if source.is_dir() else None})
        print(TARGETS[args.to](args), flush=True)

    return run_script(body)
