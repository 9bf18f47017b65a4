"""
Settings of a command, from the command line or a file, and how a command ends if one is invalid.

Every value is checked here before anything else is done. An error is one line that states the setting, its value and
what it must be; the exit status is then 2. The scripts in `examples/` use this module as well.
"""

import dataclasses
import difflib
import enum
import importlib.util
import json
import math
import os
import re
import reprlib
import sys
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import string_to_bool

from ..encoders import is_out_of_memory


MAX_FILE_BYTES = 100_000
MAX_DEPTH = 20
MAX_SECONDS = 1_000_000  # eleven days
MAX_COUNT = 2**31 - 1
MAX_SEED = 2**32 - 1


@dataclass(frozen=True)
class Range:
    """Range of a number; a bound of `None` means no limit."""

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None

    def __contains__(self, number: float) -> bool:
        return (
            (self.least is None or number >= self.least)
            and (self.above is None or number > self.above)
            and (self.most is None or number <= self.most)
            and (self.below is None or number < self.below)
        )

    def __str__(self) -> str:
        if self.least is not None and self.most is not None:
            return f"from {self.least} to {self.most}"
        bounds = (("at least", self.least), ("above", self.above), ("at most", self.most), ("below", self.below))
        words = " and ".join(f"{words} {bound}" for words, bound in bounds if bound is not None)
        return f"of {words}" if words.startswith("at") else words


# Types of settings: the number of a field, and its range.
Seconds = Annotated[float, Range(above=0, most=MAX_SECONDS)]
Count = Annotated[int, Range(least=1, most=MAX_COUNT)]
Whole = Annotated[int, Range(least=0, most=MAX_COUNT)]
Share = Annotated[float, Range(least=0, most=1)]
Positive = Annotated[float, Range(above=0)]
NotNegative = Annotated[float, Range(least=0)]
Seed = Annotated[int, Range(least=0, most=MAX_SEED)]

# Of fields of `TrainingArguments`, which checks few of them itself.
TRAINING_RANGES = {
    "per_device_train_batch_size": Range(least=1, most=MAX_COUNT),
    "per_device_eval_batch_size": Range(least=1, most=MAX_COUNT),
    "seconds_per_batch": Range(above=0, most=MAX_SECONDS),
    "seconds_per_step": Range(above=0, most=MAX_SECONDS),
    "gradient_accumulation_steps": Range(least=1, most=MAX_COUNT),
    "shuffle_buffer": Range(least=1, most=MAX_COUNT),
    "num_train_epochs": Range(above=0, most=MAX_COUNT),
    "max_steps": Range(least=-1, most=MAX_COUNT),
    "learning_rate": Range(least=0),
    "weight_decay": Range(least=0),
    "max_grad_norm": Range(least=0),
    "warmup_steps": Range(least=0, most=MAX_COUNT),
    "logging_steps": Range(above=0, most=MAX_COUNT),
    "eval_steps": Range(above=0, most=MAX_COUNT),
    "save_steps": Range(above=0, most=MAX_COUNT),
    "save_total_limit": Range(least=1, most=MAX_COUNT),
    "dataloader_num_workers": Range(least=0, most=1024),
    "seed": Range(least=0, most=MAX_SEED),
    "data_seed": Range(least=0, most=MAX_SEED),
}


class ArgumentParser(HfArgumentParser):
    """
    Settings for the fields of some dataclasses. Errors are a `ValueError` of one line, instead of a printed usage with
    a hundred options.
    """

    def __init__(self, kinds, prog: str | None = None):
        super().__init__(kinds, prog=prog)
        self.fields = {}
        for kind in self.dataclass_types:
            hints = typing.get_type_hints(kind, include_extras=True)
            for item in dataclasses.fields(kind):
                if item.init:
                    hint = hints[item.name]
                    if issubclass(kind, TrainingArguments) and item.name in TRAINING_RANGES:
                        hint = Annotated[hint, TRAINING_RANGES[item.name]]
                    self.fields[item.name] = (hint, item.metadata.get("choices"))
        for action in self._actions:
            if action.type in (int, float, string_to_bool):
                action.type = None  # read by `build`, as text of a file is

    def error(self, message: str):
        raise ValueError(message)

    def parse(self, words: list[str]) -> tuple:
        """
        One object of each dataclass, from the words of a command line, or from the file that is its only argument.
        """
        if len(words) == 1 and not words[0].startswith("-"):
            return self.parse_file(words[0])
        return self.parse_words(words)

    def parse_words(self, words: list[str]) -> tuple:
        """One object of each dataclass, from the words of a command line."""
        namespace, unknown = self.parse_known_args(words)
        if unknown:
            option = next((word for word in unknown if word.startswith("--")), None)
            if option is None:
                raise ValueError(
                    f"{show(unknown[0])} does not belong to an option; a settings file must be the only argument."
                )
            name = option[2:].partition("=")[0].replace("-", "_")
            raise ValueError(f"There is no option {option}{self._nearest(name, '--')}; --help lists all.")
        defaults = {action.dest: action.default for action in reversed(self._actions)}  # the first of a name counts
        return self.build({name: value for name, value in vars(namespace).items() if value is not defaults[name]})

    def parse_file(self, path: str) -> tuple:
        """One object of each dataclass, from a JSON or YAML file."""
        settings = read_settings(path)
        for name in settings:
            if name not in self.fields:
                raise ValueError(
                    f"There is no setting {show(name)} in {path}{self._nearest(str(name))}; --help lists all."
                )
        return self.build(settings, f" in {path}")

    def build(self, settings: dict[str, Any], where: str = "") -> tuple:
        """
        Args:
            settings (`dict`): name -> value, or its text as on a command line.
            where (`str`, *optional*): added to the names in errors.

        Raises:
            `ValueError`: if a value has the wrong type or is out of range, a setting is missing, or a dataclass
                rejects it.
        """
        checked = {name: self._checked(name, value, where) for name, value in settings.items()}
        objects = []
        for kind in self.dataclass_types:
            fields = [item for item in dataclasses.fields(kind) if item.init]
            for item in fields:
                required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
                if required and item.name not in checked:
                    raise ValueError(f"`{item.name}` is missing{where}; set it.")
            try:
                objects.append(kind(**{item.name: checked[item.name] for item in fields if item.name in checked}))
            except (TypeError, AttributeError, KeyError, ArithmeticError, RuntimeError, ImportError) as error:
                raise ValueError(f"The settings{where} cannot be used: {error}") from error
            except ValueError as error:
                raise ValueError(f"{error}{f' ({where.strip()})' if where else ''}") from error
        return tuple(objects)

    def _checked(self, name: str, value, where: str):
        hint, choices = self.fields[name]
        if value is not None and choices is not None:
            wrong = [one for one in (value if isinstance(value, list) else [value]) if one not in choices]
            if wrong:
                raise ValueError(f"`{name}`{where} must be one of {', '.join(choices)}, but is {show(wrong[0])}.")
        return checked(name, value, hint, where)

    def _nearest(self, name: str, prefix: str = "") -> str:
        near = difflib.get_close_matches(name, self.fields, n=1)
        return f"; did you mean {prefix}{near[0]}" if near else ""


def parse(arguments: list[str] | None, kinds: tuple, prog: str | None = None) -> tuple:
    """
    Settings from the command line, or from the JSON or YAML file that is its only argument. `prog` is the program name
    in the help.

    Returns:
        `tuple`: one object of each of `kinds`.

    Raises:
        `ValueError`: if one is invalid.
    """
    return ArgumentParser(kinds, prog).parse(sys.argv[1:] if arguments is None else arguments)


# -------------------------------------------------------------------------------------------------------------- values
class Mismatch(Exception):
    """A value that does not fit a setting."""

    def __init__(self, wanted: str, value):
        super().__init__(wanted)
        self.wanted, self.value = wanted, show(value)


def show(value) -> str:
    """A value for a message: short, in one line."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 80
    return "null" if value is None else short.repr(value)


def convert(value, hint, limits: Range | None = None):
    """
    Converts to the type `hint`: a value of this type, its text, or an equal number of another type.

    Raises:
        [`Mismatch`]: if this is not possible.
    """
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return convert(value, parts[0], parts[1])
    if origin in (typing.Union, types.UnionType):
        return _convert_union(value, parts, limits)
    if origin is list or hint is list:
        if not isinstance(value, (list, tuple)):
            raise Mismatch("a list", value)
        return [convert(one, parts[0]) if parts else one for one in value]
    if hint is bool:
        return _boolean(value)
    if hint is int or hint is float:
        return _number(value, hint, limits)
    if hint is str or hint is Path:
        if not isinstance(value, (str, Path)) or "\0" in str(value):
            raise Mismatch("text", value)
        return hint(value)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        known = [one.value for one in hint]
        if value not in (*hint, *known):
            raise Mismatch(f"one of {', '.join(map(str, known))}", value)
        return value
    if origin is dict or hint is dict:
        if not isinstance(value, dict):
            raise Mismatch("a mapping of names to values", value)
        return value
    return value


def checked(name: str, value, hint, where: str = ""):
    """
    The value of the setting `name`, converted to `hint` by [`convert`].

    Raises:
        `ValueError`: if this is not possible; the message adds `where` to the name.
    """
    try:
        return convert(value, hint)
    except Mismatch as mismatch:
        value = "(not shown)" if "token" in name else mismatch.value
        raise ValueError(f"`{name}`{where} must be {mismatch.wanted}, but is {value}.") from None


def _convert_union(value, parts: tuple, limits: Range | None):
    kinds = [kind for kind in parts if kind is not type(None)]
    if value is None and len(kinds) < len(parts):
        return None
    if str in kinds and isinstance(value, str):
        return convert(value, str)
    mismatches = []
    for kind in kinds:
        try:
            return convert(value, kind, limits)
        except Mismatch as mismatch:
            mismatches.append(mismatch)
    if len(mismatches) == 1:
        raise mismatches[0]
    raise Mismatch(" or ".join(mismatch.wanted for mismatch in mismatches), value)


def _boolean(value) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, (str, int)) and str(value).strip().lower() in ("true", "yes", "on", "1"):
        return True
    if isinstance(value, (str, int)) and str(value).strip().lower() in ("false", "no", "off", "0"):
        return False
    raise Mismatch("true or false", value)


def _number(value, kind: type, limits: Range | None):
    wanted = "an integer" if kind is int else "a number"
    if limits is not None:
        wanted += f" {limits}"
    elif kind is int:
        wanted += " of at most 64 bits"
    else:
        wanted = "a finite number"
    number = value
    if isinstance(value, str):
        # Python also reads 1_000 and digits of all scripts; 010 is 8 to some readers of YAML.
        pattern = (
            r"[+-]?(0|[1-9]\d*)" if kind is int else r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?inf(inity)?|nan"
        )
        if len(value) > 400 or not re.fullmatch(pattern, value.strip(), re.ASCII | re.IGNORECASE):
            raise Mismatch(wanted, value)
        number = kind(value)
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise Mismatch(wanted, value)
    if not math.isfinite(number) or abs(number) >= 2**63 and kind is int:
        raise Mismatch(wanted, number if kind is int else f"{number:g}" if isinstance(value, str) else number)
    if kind is int and number != int(number) or limits is not None and number not in limits:
        raise Mismatch(wanted, number)
    return kind(number)


# --------------------------------------------------------------------------------------------------------------- files
class _Loader(yaml.SafeLoader):
    """
    YAML with the scalars of YAML 1.2 only. PyYAML follows 1.1, where `010` is 8, `1:30` is 90, `no` is false and
    2024-01-01 a date. Aliases, with which a short file can expand to gigabytes, are rejected.
    """

    yaml_implicit_resolvers: dict = {}
    yaml_constructors = {
        None: yaml.SafeLoader.construct_undefined,
        "tag:yaml.org,2002:str": yaml.SafeLoader.construct_yaml_str,
        "tag:yaml.org,2002:seq": yaml.SafeLoader.construct_yaml_seq,
    }

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            event = self.get_event()
            raise yaml.composer.ComposerError(None, None, "aliases (`*name`) are not allowed", event.start_mark)
        return super().compose_node(parent, index)


def _construct_mapping(loader: _Loader, node: yaml.MappingNode) -> dict:
    return _unique(
        [(loader.construct_object(key), loader.construct_object(value, deep=True)) for key, value in node.value]
    )


_Loader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)


def _add_scalar(name: str, pattern: str, first: list[str], read: Callable[[str], Any]) -> None:
    """
    Plain text that matches this pattern, which begins with one of `first`, gets the tag `name` and is converted by
    `read`.
    """
    tag, compiled = f"tag:yaml.org,2002:{name}", re.compile(f"^(?:{pattern})$")

    def construct(loader: _Loader, node: yaml.Node):
        text = loader.construct_scalar(node)
        if not compiled.match(text):  # an explicit tag such as `!!int x`
            raise ValueError(f"{show(text)} is not a valid {name}")
        return read(text)

    _Loader.add_implicit_resolver(tag, compiled, first)
    _Loader.add_constructor(tag, construct)


_add_scalar("null", r"~|null|Null|NULL|", ["~", "n", "N", ""], lambda text: None)
_add_scalar("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF"), lambda text: text.lower() == "true")
_add_scalar("int", r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789"), int)
_add_scalar("float", r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789"), float)


def _unique(pairs: list[tuple]) -> dict:
    content = {}
    for key, value in pairs:
        if not isinstance(key, str):
            raise ValueError(f"the name {show(key)} is not a string")
        if key in content:
            raise ValueError(f"`{key}` is set twice, to {show(content[key])} and {show(value)}; keep one")
        content[key] = value
    return content


def _no_constant(text: str):
    raise ValueError(f"{text} is not a JSON number")


def _depth(value) -> int:
    if isinstance(value, (dict, list)):
        return 1 + max(map(_depth, value.values() if isinstance(value, dict) else value), default=0)
    return 0


def read_settings(path: str) -> dict[str, Any]:
    """
    Content of a JSON file, or of a YAML file if the name ends in `.yaml` or `.yml`: UTF-8, of at most 100 kB, without
    repeated names, aliases, or more than 20 levels.

    Raises:
        `ValueError`: if it is anything else.
    """
    file = Path(path)
    if not path.endswith((".json", ".yaml", ".yml")):
        raise ValueError(f"{path} is neither an option nor a settings file, which must end in .json, .yaml or .yml.")
    if not file.is_file():
        what = "is not a file" if file.exists() else "does not exist"
        raise ValueError(f"The settings file {path} {what}; correct its path.")
    with open(file, "rb") as opened:
        content = opened.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise ValueError(f"{path} has more than {MAX_FILE_BYTES:,} bytes, too many for a settings file.")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = f"byte 0x{content[error.start]:02x} at position {error.start}"
        raise ValueError(f"{path} is not UTF-8 text ({byte}); save it as UTF-8.") from None
    try:
        if path.endswith(".json"):
            settings = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
        else:
            settings = yaml.load(text, _Loader)  # noqa: S506 (a safe loader)
        too_deep = _depth(settings) > MAX_DEPTH
    except RecursionError:
        too_deep = True
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if too_deep:
        raise ValueError(f"{path} has more than {MAX_DEPTH} levels, too many for a settings file.")
    if not isinstance(settings, dict):
        what = "nothing" if settings is None else show(settings)
        raise ValueError(f"{path} must contain a mapping of names to values, but contains {what}.")
    return settings


# ------------------------------------------------------------------------------------------------------------ commands
def complain(error: Exception) -> int:
    """Prints the error in one line and returns the exit status."""
    rank = int(os.environ.get("RANK", 0))
    print(f"error{f' (process {rank})' if rank else ''}: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def run_script(body: Callable[[], int | None], is_input: Callable[[Exception], bool] = lambda error: True) -> int:
    """
    Runs a script; errors of its input, of a file or of memory end it with one line.

    Args:
        body (`Callable`): the script; it returns an exit status, or `None` for 0.
        is_input (`Callable`, *optional*): whether a `ValueError` or an `ImportError` was caused by the input; by
            default each was. Others are raised.

    Returns:
        `int`: the exit status, 2 after such a line.
    """
    try:
        return body() or 0
    except OSError as error:
        return complain(error)
    except (ValueError, ImportError) as error:
        if not is_input(error):
            raise
        return complain(error)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return complain(ValueError(f"Out of memory; use smaller batches or shorter clips. ({error})"))


def require(module: str, package: str, what: str) -> None:
    """
    Raises:
        `ValueError`: if this package, which only some scripts need, is missing.
    """
    if importlib.util.find_spec(module) is None:
        raise ValueError(f"{what} {package}, which is not installed: pip install {package}.")


def checked_device(name: str | None) -> torch.device:
    """
    Returns the device with this name; by default a GPU if there is one.

    Raises:
        `ValueError`: if it can't be used.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=name).cpu()  # "meta" has no values
        return torch.device(name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"The device `{name}` cannot be used: {reason}") from error
