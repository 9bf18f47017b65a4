"""Files that a run writes: checked before anything is computed, written atomically, read with one clear error."""

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
    Checks that files can be written to a directory, which may not exist yet, nor its parents. No files are left there.

    Args:
        path (`str` or `PathLike`): the directory.
        name (`str`, *optional*, defaults to `"output_dir"`): name of the setting, for the error.

    Raises:
        `ValueError`: if it is not a directory or not writable.
    """
    path = Path(path)
    with _named(path, name), _made(path):
        _write_something(path)


def try_file(path: str | os.PathLike, name: str = "output") -> None:
    """
    Checks that a file can be written, like [`try_directory`] for its directory; an existing file is not changed.

    Raises:
        `ValueError`: if it can't be written.
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
    Checks that a run does not overwrite its inputs, through any path, link or mount.

    Args:
        directory (`str` or `PathLike`): the output directory.
        sources (`Mapping`): setting -> input; `None` and anything but local directories are ignored.
        name (`str`, *optional*, defaults to `"output_dir"`): name of the setting of `directory`, for the error.

    Raises:
        `ValueError`: if an input is `directory`, shares a file with it, or is inside a checkpoint there, which would
            be deleted when newer ones are saved.
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
    """
    `path` as an absolute path if it is a local directory, so that it stays valid if the working directory changes.
    """
    return Path(path).absolute() if path and Path(path).is_dir() else None


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except (OSError, ValueError):  # a name with a null byte is a ValueError
        return None
    return status.st_dev, status.st_ino


def _files(directory: Path) -> set[tuple[int, int]]:
    """Identities of the files in a directory, following links."""
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
    """Within this context the directory exists; afterwards it and its parents are removed if they were created."""
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
    Content of a UTF-8 text file.

    Raises:
        `ValueError`: if it can't be read; the message is only the reason.
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
        `ValueError`: if it can't be read; the message is only the reason, in one line.
    """
    try:
        return json.loads(read_text(path, max_bytes))
    except (ValueError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split())[:200]) from error


def read_json(path: str | os.PathLike) -> Any:
    """
    Content of a JSON file written by a run.

    Raises:
        `ValueError`: if it can't be read.
    """
    try:
        return parse_json(path, MAX_OWN_BYTES)
    except ValueError as error:
        raise ValueError(f"{path} is not a readable JSON file ({error}); restore or remove it.") from error


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Writes a file atomically: a killed process, or another one writing it, cannot leave a partial file."""
    path = Path(path)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)
