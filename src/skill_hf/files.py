"""Files that a run writes: tried before anything is computed, written at once, read with one clear error."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def try_directory(path: str | os.PathLike, name: str = "output_dir") -> None:
    """
    Tries whether files can be written into a directory, which may be missing together with its parents. Nothing is
    left there.

    Args:
        path (`str` or `PathLike`): the directory.
        name (`str`, *optional*, defaults to `"output_dir"`): the setting that names it, for the error.

    Raises:
        `ValueError`: if it is something else or can't be written to.
    """
    path = Path(path)
    with _named(path, name), _made(path):
        _write_something(path)


def try_file(path: str | os.PathLike, name: str = "output") -> None:
    """
    Tries whether a file can be written, as [`try_directory`] does for its directory; one that exists is not changed.

    Raises:
        `ValueError`: if it can't.
    """
    path = Path(path)
    with _named(path, name), _made(path.parent):
        _write_something(path.parent)
        if path.is_dir():
            raise IsADirectoryError(None, "it is a directory")
        if path.exists() and not os.access(path, os.W_OK):
            raise PermissionError(None, "it is read-only")
        if not path.exists():
            with open(path, "xb"):  # its name may be too long
                pass
            path.unlink()


def _write_something(directory: Path) -> None:
    with tempfile.NamedTemporaryFile(dir=directory, prefix=".try-") as file:
        file.write(b"0" * 4096)  # a full disk may still have room for an empty file
        file.flush()
        os.fsync(file.fileno())


def keep_sources(output_dir: str | os.PathLike, sources: Mapping[str, str | os.PathLike | None]) -> None:
    """
    Makes sure that a run does not overwrite what it is made from.

    Args:
        output_dir (`str` or `PathLike`): where it writes.
        sources (`Mapping`): setting -> what it reads; `None` and what is no local directory are passed over.

    Raises:
        `ValueError`: if one is `output_dir`, by whatever path or link, or a checkpoint in it, which is deleted when
            newer ones are saved.
    """
    output = os.path.realpath(output_dir)
    for name, source in sources.items():
        if source is None or not os.path.isdir(source):
            continue
        path = os.path.realpath(source)
        same = path == output or os.path.isdir(output) and os.path.samefile(path, output)
        folder, last = os.path.split(path)
        if same or last.startswith("checkpoint-") and folder == output:
            what = "is" if same else "holds"
            raise ValueError(
                f"`output_dir`, {output_dir}, {what} the `{name}`, {source}, which would be overwritten; name another."
            )


@contextlib.contextmanager
def _named(path: Path, name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # a name with a null byte is a ValueError
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"`{name}`, {path}, cannot be written to ({reason}); name another.") from error


@contextlib.contextmanager
def _made(directory: Path) -> Iterator[None]:
    """A directory that exists meanwhile; it and its parents are removed if they were missing."""
    missing = []
    for parent in (directory, *directory.parents):
        if parent.exists():
            break
        missing.append(parent)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for parent in missing:
            with contextlib.suppress(OSError):  # another process may use it by now
                parent.rmdir()


def read_json(path: str | os.PathLike) -> Any:
    """
    Content of a JSON file.

    Raises:
        `ValueError`: if it can't be read.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{path} is no JSON file that can be read ({reason}); restore or remove it.") from error


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Writes a file at once: a process that is stopped, or another one that writes it too, leaves no half of it."""
    path = Path(path)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)
