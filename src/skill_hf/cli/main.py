"""
`skill-hf COMMAND`, or `python -m skill_hf.cli.main COMMAND`, which is the form that `accelerate launch -m` takes.

A command is one line of `COMMANDS`, and the module of its name in this folder. Its `main(arguments, prog)` returns the
exit code. The module is imported when its command is called.
"""

import importlib
import sys

from ..version import __version__


PROG = "skill-hf"
# Name -> what it does.
COMMANDS = {
    "analyze": "show which layers of a speech encoder are alike, on speech of your own",
    "distill": "distil and prune a speech encoder",
    "export": "write a student as ONNX, as a program of torch.export or as a stock model",
    "info": "show what is left of a student's teacher, or how large an encoder is",
}


def make_help() -> str:
    width = max(map(len, COMMANDS))
    lines = [
        f"usage: {PROG} [-h] [--version] COMMAND ...",
        "",
        "Compress speech encoders by similarity-aware distillation and structured pruning.",
        "",
        "commands:",
        *(f"  {name:<{width}}  {what}" for name, what in COMMANDS.items()),
        "",
        f"`{PROG} COMMAND --help` lists the options of a command.",
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """
    Runs the command that the first argument names with the other arguments.

    Args:
        arguments (`list[str]`, *optional*): by default those of the process.

    Returns:
        `int`: the exit code of the command; 2 if there is no such command.
    """
    name, *others = (sys.argv[1:] if arguments is None else arguments) or [None]
    if name in COMMANDS:
        return importlib.import_module(f"{__package__}.{name}").main(others, prog=f"{PROG} {name}")
    if name in ("-h", "--help"):
        print(make_help())
        return 0
    if name == "--version":
        print(PROG, __version__)
        return 0
    if name is None:
        print(make_help(), file=sys.stderr)
        return 2
    what = "option" if name.startswith("-") else "command"
    print(
        f"error: There is no {what} {name[:80]!r}; the commands are {', '.join(COMMANDS)}. {PROG} --help says more.",
        file=sys.stderr,
    )
    return 2


if __name__ == "__main__":
    sys.exit(main())
