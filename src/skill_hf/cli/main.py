"""
`skill-hf COMMAND`, or `python -m skill_hf.cli.main COMMAND`, the form for `accelerate launch -m`.

A command is one line of `COMMANDS` and a module with its name in this folder. The module is imported when the command
is called; its `main(arguments, prog)` returns the exit code.
"""

import importlib
import sys

from ..version import __version__


PROG = "skill-hf"
# Name -> what it does.
COMMANDS = {
    "distill": "distil and prune a speech encoder",
    "export": "export a student to ONNX, torch.export or a stock model",
    "info": "show how much of its teacher a student keeps, or the size of an encoder",
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
    Runs the command named by the first argument, with the other arguments.

    Args:
        arguments (`list[str]`, *optional*): by default `sys.argv[1:]`.

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
        f"error: There is no {what} {name[:80]!r}; the commands are {', '.join(COMMANDS)}. See {PROG} --help.",
        file=sys.stderr,
    )
    return 2


if __name__ == "__main__":
    sys.exit(main())
