"""What commands that print a result share: options of a few words, tables, and a reader that stops early."""

import argparse
import os
import sys


WIDTH = 100  # columns of the text


class Parser(argparse.ArgumentParser):
    """Raises a `ValueError` of one line, instead of printing the usage and ending the process."""

    def error(self, message: str):
        raise ValueError(f"{message}; --help lists all options.")


def print_result(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # of a reader such as `head`, that has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def align(rows: list[list[str]], gap: str = "   ") -> list[str]:
    """Lines of a table: the first column starts at the left, the others end at the right."""
    first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    return [gap.join([f"{row[0]:<{first}}", *map(str.rjust, row[1:], others)]) for row in rows]


def shorten(text: str, width: int) -> str:
    """At most `width` columns; the end of a path says more than its middle."""
    text = printable(text)
    return text if len(text) <= width else f"{text[: width // 4]}...{text[-(width - width // 4 - 3) :]}"


def printable(text: str) -> str:
    """Names in a file may hold line breaks and codes that a terminal obeys."""
    return "".join(char if char.isprintable() else "?" for char in text)
