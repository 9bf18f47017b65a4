"""Writes files and directories that stay intact after a kill or on a full disk, and locks directories."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import filelock
from safetensors import SafetensorError


LOCK_NAME = ".skill_hf.lock"
# Beside what they become: renaming works within one file system only.
WRITING, REPLACED = "_writing", "_replaced"

# DataLoader workers that inherited a lock notice within 5 s that the run was killed.
LOCK_SECONDS = 6.0
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


class StorageError(OSError):
    """Something cannot be written; the message is one line: what, why, and what is safe."""


def is_write_error(error: Exception) -> bool:
    """Whether the operating system refused to write; torch and safetensors raise their own errors for this."""
    if isinstance(error, RuntimeError):
        return any(word in str(error) for word in ("inline_container", "PytorchStreamWriter", "iostream"))
    return isinstance(error, SafetensorError) or (isinstance(error, OSError) and error.errno is not None)


@contextmanager
def explained(what: str, directory: str | os.PathLike, then: str, needed: int | None = None) -> Iterator[None]:
    """
    Turns any error while writing `what`, of `needed` bytes, into `directory` into a `StorageError` that ends with
    `then`.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, StorageError) or not is_write_error(error):
            raise
        raise StorageError(f"{what} could not be written: {reason_of(error, directory, needed)}. {then}") from error


def reason_of(error: Exception, directory: str | os.PathLike, needed: int | None = None) -> str:
    """Why something of `needed` bytes cannot be written, with the free space on the disk."""
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
    if isinstance(error, RuntimeError):  # of torch, which does not say why
        reason = f"a file could not be written to its end, as on a full disk: {reason}"
    name = getattr(error, "filename", None)
    reason = f"{reason}: `{name}`" if name else reason
    with suppress(OSError):
        room = f"{free_bytes(directory) / 1e6:,.1f} MB free"
        reason += f" ({room})" if needed is None else f" ({room}, {needed / 1e6:,.1f} MB needed)"
    return reason


def free_bytes(directory: str | os.PathLike) -> int:
    return shutil.disk_usage(_existing(directory)).free


def require_space(directory: str | os.PathLike, needed: int) -> None:
    """
    Raises:
        `OSError`: if the disk of `directory` has less than `needed` bytes left. Quotas show only while writing.
    """
    if free_bytes(directory) < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _existing(path: str | os.PathLike) -> Path:
    path = Path(path).absolute()
    return next(parent for parent in (path, *path.parents) if parent.exists())


@contextmanager
def exclusive(directory: str | os.PathLike) -> Iterator[None]:
    """
    Holds the lock of `directory`, which the operating system releases if the process is killed.

    Raises:
        `StorageError`: if another process, or another trainer in this process, holds the lock.
    """
    path = Path(directory) / LOCK_NAME
    lock = filelock.FileLock(str(path))
    try:
        lock.acquire(timeout=LOCK_SECONDS)
    except filelock.Timeout:
        raise StorageError(
            f"Another run is writing to `{directory}` (it contains {LOCK_NAME}): wait until it ends, or choose another"
            " `output_dir`."
        ) from None
    except NotImplementedError:  # a file system without locks
        yield
        return
    try:
        yield
    finally:
        with suppress(OSError):  # on Windows a file that is open stays
            path.unlink()
        lock.release()


def sync(directory: Path) -> None:
    """Waits until the files in `directory` are on the disk."""
    for path in [*(path for path in directory.rglob("*") if path.is_file()), directory]:
        if os.name == "nt" and path.is_dir():
            continue
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError as error:
            if error.errno != errno.EINVAL:  # file systems that cannot sync a directory
                raise
        finally:
            os.close(handle)


def unfinished_name(directory: Path) -> Path:
    """Where a directory is written before `replace_directory` moves it into place."""
    return directory.with_name(WRITING) / directory.name


def replace_directory(directory: Path) -> None:
    """
    Replaces `directory` by the complete `unfinished_name(directory)`. If killed at any time, it leaves the old or the
    new directory there, or a state that `finish_replacements` completes.
    """
    unfinished, replaced = unfinished_name(directory), directory.with_name(REPLACED) / directory.name
    sync(unfinished)
    shutil.rmtree(replaced.parent, ignore_errors=True)
    if os.path.lexists(directory):
        replaced.parent.mkdir()
        os.replace(directory, replaced)
    os.replace(unfinished, directory)
    sync_entries(directory.parent)
    shutil.rmtree(replaced.parent, ignore_errors=True)
    shutil.rmtree(unfinished.parent, ignore_errors=True)


def sync_entries(directory: Path) -> None:
    """Waits until the entries of `directory` are on the disk."""
    if os.name == "nt":
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        with suppress(OSError):
            os.fsync(handle)
    finally:
        os.close(handle)


def finish_replacements(parent: Path) -> None:
    """Completes what a killed `replace_directory` started in `parent`, and removes unfinished directories."""
    for replaced in (parent / REPLACED).glob("*"):
        directory = parent / replaced.name
        if not os.path.lexists(directory):
            unfinished = unfinished_name(directory)
            os.replace(unfinished if unfinished.exists() else replaced, directory)
    for name in (REPLACED, WRITING):
        shutil.rmtree(parent / name, ignore_errors=True)


@contextmanager
def written_together(directory: str | os.PathLike) -> Iterator[Path]:
    """
    A new directory whose files are finally moved into `directory`, replacing those with the same name. If something
    fails before, nothing there has changed.
    """
    os.makedirs(directory, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".writing-") as temporary:
        yield Path(temporary)
        for path in sorted(Path(temporary).iterdir()):
            os.replace(path, Path(directory) / path.name)


@contextmanager
def saving(what: str, directory: str | os.PathLike, then: str) -> Iterator[Path]:
    """`written_together` into a locked directory; see `explained` for `what` and `then`."""
    with explained(what, directory, then):
        os.makedirs(directory, exist_ok=True)
        with exclusive(directory), written_together(directory) as unfinished:
            yield unfinished
