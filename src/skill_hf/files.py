"""Files that a run writes: tried before anything is computed, written at once, read with one clear error."""

import contextlib
import json
import os
import stat
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


# Of files that others have written: an index of a hundred thousand weights is smaller.
MAX_FOREIGN_BYTES = 2**24
# Of our own: the log of a run of a million steps is smaller.
MAX_OWN_BYTES = 2**30


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


def keep_sources(
    directory: str | os.PathLike, sources: Mapping[str, str | os.PathLike | None], name: str = "output_dir"
) -> None:
    """
    Makes sure that a run does not overwrite what it is made from, by whatever path, link or mount.

    Args:
        directory (`str` or `PathLike`): where it writes.
        sources (`Mapping`): setting -> what it reads; `None` and what is no local directory are passed over.
        name (`str`, *optional*, defaults to `"output_dir"`): the setting that names `directory`, for the error.

    Raises:
        `ValueError`: if one is `directory`, shares a file with it, or lies in a checkpoint there, which is deleted
            when newer ones are saved.
    """
    ours = Path(os.path.realpath(directory))
    files = _files(ours)
    for source_name, source in sources.items():
        if source is None or not os.path.isdir(source):
            continue
        theirs = Path(os.path.realpath(source))
        relation = None
        if ours == theirs or _identity(ours) == _identity(theirs):
            relation = "is"
        elif ours in theirs.parents and theirs.relative_to(ours).parts[0].startswith("checkpoint-"):
            relation = "contains"
        elif files and files & _files(theirs):  # a data set may have very many
            relation = "shares files with"
        if relation is not None:
            raise ValueError(
                f"`{name}`, {directory}, {relation} the `{source_name}`, {source}, which would be overwritten; choose"
                " another."
            )


def local_directory(path: str | os.PathLike | None) -> Path | None:
    """`path` if it is a local directory, absolute: it stays the same wherever this process goes from here."""
    return Path(path).absolute() if path and Path(path).is_dir() else None


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except (OSError, ValueError):  # a name with a null byte is a ValueError
        return None
    return status.st_dev, status.st_ino


def _files(directory: Path) -> set[tuple[int, int]]:
    """Identities of the files of a directory, links followed."""
    try:
        return {_identity(path) for path in directory.iterdir() if path.is_file()} - {None}
    except (OSError, ValueError):
        return set()


@contextlib.contextmanager
def _named(path: Path, name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # a name with a null byte is a ValueError
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"`{name}`, {path}, cannot be written to ({reason}); choose another.") from error


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


def read_text(path: str | os.PathLike, max_bytes: int = MAX_FOREIGN_BYTES) -> str:
    """
    Content of a text file, in UTF-8.

    Raises:
        `ValueError`: if it can't be read; the message is the reason alone.
    """
    path = Path(path)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # reading from a pipe or a device may never end
            raise ValueError("not a regular file")
        if status.st_size > max_bytes:
            raise ValueError(f"{status.st_size} bytes, more than {max_bytes}")
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from error


def parse_json(path: str | os.PathLike, max_bytes: int = MAX_FOREIGN_BYTES) -> Any:
    """
    Content of a JSON file.

    Raises:
        `ValueError`: if it can't be read; the message is the reason alone, in one line.
    """
    try:
        return json.loads(read_text(path, max_bytes))
    except (ValueError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split())[:200]) from error


def read_json(path: str | os.PathLike) -> Any:
    """
    Content of a JSON file that a run has written.

    Raises:
        `ValueError`: if it can't be read.
    """
    try:
        return parse_json(path, MAX_OWN_BYTES)
    except ValueError as error:
        raise ValueError(f"{path} is not a readable JSON file ({error}); restore or remove it.") from error


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Writes a file at once: a process that is stopped, or another one that writes it too, leaves no half of it."""
    path = Path(path)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)
