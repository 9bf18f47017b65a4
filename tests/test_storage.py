"""Files that a kill at any instant leaves whole, and locks."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from skill_hf import storage


class Kill(BaseException):
    pass


def make(directory: Path, content: str) -> Path:
    directory.mkdir(parents=True)
    (directory / "a").write_text(content)
    (directory / "b").write_text(content)
    return directory


def contents(directory: Path) -> set[str]:
    return {path.read_text() for path in directory.iterdir()}


# ------------------------------------------------------------------------------------------------------- replacements
def count_operations(monkeypatch, stop: int | None = None) -> list[str]:
    """Counts what changes the disk; the one with the number `stop` does not happen, as if the process was killed."""
    done = []

    def counted(module, name):
        original = getattr(module, name)

        def operation(*args, **kwargs):
            if len(done) == stop:
                raise Kill
            done.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, operation)

    counted(os, "replace")
    counted(shutil, "rmtree")
    counted(Path, "mkdir")
    return done


@pytest.mark.parametrize("old", ["old", None])
def test_killed_at_any_instant_a_directory_is_the_old_or_the_new_one(tmp_path, old):
    outcomes = []
    while not outcomes or outcomes[-1] != "ended":
        folder = tmp_path / str(len(outcomes))
        directory = folder / "checkpoint-6"
        make(folder / storage.WRITING / "checkpoint-6", "new")
        if old:
            make(directory, old)
        with pytest.MonkeyPatch.context() as patch:
            count_operations(patch, stop=len(outcomes))
            try:
                storage.replace_directory(directory)
                outcome = "ended"
            except Kill:
                outcome = "killed"
        storage.finish_replacements(folder)
        left = [contents(path) for path in folder.iterdir()]
        assert left in ([{"old"}], [{"new"}]) or not (left or old), len(outcomes)
        outcomes.append(outcome)
    assert left == [{"new"}]
    assert len(outcomes) > (5 if old else 3)


def test_what_was_never_finished_is_removed(tmp_path):
    make(tmp_path / storage.WRITING / "checkpoint-6", "half")
    make(tmp_path / "checkpoint-4", "old")
    storage.finish_replacements(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]


def test_files_appear_together_or_not_at_all(tmp_path):
    make(tmp_path / "student", "old")
    with pytest.raises(Kill), storage.written_together(tmp_path / "student") as unfinished:
        (unfinished / "a").write_text("new")
        raise Kill
    assert contents(tmp_path / "student") == {"old"}
    with storage.written_together(tmp_path / "student") as unfinished:
        (unfinished / "a").write_text("new")
    assert (tmp_path / "student" / "a").read_text() == "new"
    assert (tmp_path / "student" / "b").read_text() == "old"
    assert len(list((tmp_path / "student").iterdir())) == 2


# --------------------------------------------------------------------------------------------- what cannot be written
@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "x"), "No space left on device: `x`"),
        (OSError(errno.EROFS, "Read-only file system"), "Read-only file system"),
        (
            RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 246208 vs 246100"),
            "as on a full disk: [enforce fail at inline_container.cc:672] . unexpected pos",
        ),
        (SafetensorError("Error while serializing: I/O error: No space left"), "No space left"),
    ],
)
def test_errors_of_writing_are_explained(tmp_path, error, words):
    with pytest.raises(storage.StorageError) as explained, storage.explained("`x`", tmp_path, "All is safe."):
        raise error
    message = str(explained.value)
    assert message.startswith("`x` could not be written: ") and message.endswith(" MB free). All is safe.")
    assert words in message and "\n" not in message


def test_a_disk_that_is_too_small_is_an_error_of_writing(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    storage.require_space(tmp_path / "not" / "there", free // 2)
    words = r"No space left on device \([\d,.]+ MB free, [\d,.]+ MB needed\). All is safe."
    with (
        pytest.raises(storage.StorageError, match=words),
        storage.explained("`x`", tmp_path, "All is safe.", 2 * free),
    ):
        storage.require_space(tmp_path, 2 * free)


@pytest.mark.parametrize("error", [RuntimeError("a bug"), ValueError("input"), OSError("of the network")])
def test_other_errors_are_not(tmp_path, error):
    with pytest.raises(type(error)) as raised, storage.explained("`x`", tmp_path, "All is safe."):
        raise error
    assert raised.value is error


# -------------------------------------------------------------------------------------------------------------- locks
def test_one_run_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "LOCK_SECONDS", 0.1)
    refused = pytest.raises(storage.StorageError, match="Another run is writing to")
    with storage.exclusive(tmp_path), refused, storage.exclusive(tmp_path):
        pass
    with storage.exclusive(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


# The module alone: it imports nothing of the package.
HOLD = """
import importlib.util, sys, time
spec = importlib.util.spec_from_file_location("storage", sys.argv[1])
storage = importlib.util.module_from_spec(spec)
spec.loader.exec_module(storage)
with storage.exclusive(sys.argv[2]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_lock_of_a_killed_run_is_free(tmp_path, monkeypatch):
    command = [sys.executable, "-c", HOLD, storage.__file__, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "held\n"
            monkeypatch.setattr(storage, "LOCK_SECONDS", 0.1)
            with pytest.raises(storage.StorageError, match="Another run"), storage.exclusive(tmp_path):
                pass
        finally:
            process.send_signal(signal.SIGKILL)
    monkeypatch.undo()
    with storage.exclusive(tmp_path):
        pass
