"""
Types and ranges of settings. A kind is a function of a setting's name and value: it returns the value as a plain
Python type, or raises a `ValueError` that states setting, value and range.
"""

import dataclasses
import json
import math
import numbers
import re
import reprlib
from collections.abc import Callable, Collection, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np


Kind = Callable[[str, Any], Any]


def optional(kind: Kind) -> Kind:
    """`None`, or a value of `kind`."""
    return lambda name, value: None if value is None else kind(name, value)


def one_of(allowed: Sequence[str]) -> Kind:
    def check(name: str, value: Any) -> str:
        if not isinstance(value, str) or value not in allowed:
            refuse(name, f"one of {', '.join(allowed)}", value)
        return str(value)

    return check


def some_of(allowed: Collection[str]) -> Kind:
    """A list or tuple that is not empty and has no repeated entries."""

    def check(name: str, value: Any) -> list[str]:
        listed = isinstance(value, (list, tuple)) and all(isinstance(entry, str) for entry in value)
        if not listed or not value or not set(value) <= set(allowed) or len(set(value)) < len(value):
            refuse(name, f"a list of one or more of {', '.join(allowed)}, without duplicates", value)
        return list(map(str, value))

    return check


def true_or_false(name: str, value: Any) -> bool:
    # Not by its truth: text such as "false" would count as true.
    if not isinstance(value, (bool, np.bool_)):
        refuse(name, "True or False", value)
    return bool(value)


def whole(least: int) -> Kind:
    """A whole number of at least `least`; floats are rejected, even those like 2.0."""

    def check(name: str, value: Any) -> int:
        if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < least:
            refuse(name, f"an integer of at least {least}", value)
        return int(value)

    return check


def number(
    least: float = -math.inf, above: float = -math.inf, below: float = math.inf, most: float = math.inf
) -> Kind:
    """A finite number of at least `least` and at most `most`, above `above` and below `below`."""
    bounds = [
        f"of at least {least:g}" if least > -math.inf else "",
        f"above {above:g}" if above > -math.inf else "",
        f"below {below:g}" if below < math.inf else "",
        f"at most {most:g}" if most < math.inf else "",
    ]
    wanted = f"a finite number {' and '.join(filter(None, bounds))}".rstrip()

    def check(name: str, value: Any) -> float:
        if not isinstance(value, numbers.Real) or isinstance(value, bool):
            refuse(name, wanted, value)
        try:
            converted = float(value)
        except (OverflowError, ValueError):
            refuse(name, wanted, value)
        if not math.isfinite(converted) or not least <= converted <= most or not above < converted < below:
            refuse(name, wanted, value)
        return converted

    return check


def index_groups(name: str, value: Any) -> list[list[int]]:
    """Lists of indices; a string is read as JSON, since a command line has no lists of lists."""
    wanted = "a list of lists of indices such as [[0],[1,2]], without duplicates within a list"
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (json.JSONDecodeError, RecursionError):
            refuse(name, f"JSON, {wanted}", value)

    def is_list(entry: Any) -> bool:
        return isinstance(entry, (list, tuple)) and len(entry) > 0

    def is_index(entry: Any) -> bool:
        return isinstance(entry, numbers.Integral) and not isinstance(entry, bool) and entry >= 0

    if not is_list(value) or not all(is_list(group) and all(map(is_index, group)) for group in value):
        refuse(name, wanted, value)
    if any(len(set(group)) < len(group) for group in value):
        refuse(name, wanted, value)
    return [[int(index) for index in group] for group in value]


def refuse(name: str, wanted: str, value: Any) -> None:
    """Raises the `ValueError` of all kinds; the value may have any length."""
    raise ValueError(f"`{name}` must be {wanted}, but is {reprlib.repr(value)}.")


def help_from_docstring(cls: type) -> type:
    """
    Decorator for a dataclass whose docstring describes its fields as `name (type): text`: the text becomes the `help`
    of each field, shown by [`~transformers.HfArgumentParser`], and is thus written only once.
    """
    texts = dict(re.findall(r"^ {4,8}(\w+) \(`.*\):\s+(.+(?:\n {9,}.+)*)", cls.__doc__ or "", re.MULTILINE))
    for entry in dataclasses.fields(cls):
        if entry.name in texts:
            text = " ".join(texts[entry.name].split())
            text = re.sub(r"\[?`~?([^`]*)`\]?", r"\1", text)
            entry.metadata = MappingProxyType({"help": text.replace("%", "%%")})  # as argparse wants it
    return cls
