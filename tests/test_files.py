"""`skill_hf.files`: outputs are tried and left as they were, sources stay, JSON is read with one error."""

import errno
import os

import pytest

from skill_hf.files import keep_sources, read_json, try_directory, try_file, write_json


def listing(root) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


def test_what_can_be_written_is_left_as_it_was(tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "file.json").write_text("1")
    before = listing(tmp_path)
    try_directory(tmp_path / "old")
    try_directory(tmp_path / "new" / "deep")
    try_file(tmp_path / "old" / "file.json")
    try_file(tmp_path / "new" / "file.json")
    assert listing(tmp_path) == before and (tmp_path / "old" / "file.json").read_text() == "1"


# What is in the way -> its path, below a directory that holds `file`.
UNWRITABLE = {
    "a file": "file",
    "a file for a parent": "file/out",
    "a file for an older parent": "file/out/deep",
    "too long a name": "n" * 300,
    "too long a path": "/".join(["directory"] * 1000),
    "a null byte": "a\0b",
    "a link to nowhere": "dangling",
}


@pytest.mark.parametrize("name", UNWRITABLE)
@pytest.mark.parametrize("trial", [try_directory, try_file])
def test_what_cannot_be_written_is_one_error(tmp_path, name, trial):
    (tmp_path / "file").write_text("kept")
    (tmp_path / "dangling").symlink_to("/proc/none/none")
    before = listing(tmp_path)
    # For a file it is a directory that is in the way.
    path = tmp_path if trial is try_file and name == "a file" else f"{tmp_path}/{UNWRITABLE[name]}"
    with pytest.raises(ValueError, match="^`result`, .* cannot be written to .*; choose another.$") as caught:
        trial(path, "result")
    assert "\n" not in str(caught.value)
    assert listing(tmp_path) == before and (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT])
def test_the_reason_is_that_of_the_system(tmp_path, monkeypatch, number):
    def refuse(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("skill_hf.files.tempfile.NamedTemporaryFile", refuse)
    with pytest.raises(ValueError, match=rf"cannot be written to \({os.strerror(number)}\)"):
        try_directory(tmp_path / "out")
    assert listing(tmp_path) == []


def test_sources_are_kept_whatever_the_path(tmp_path, monkeypatch):
    model = tmp_path / "model"
    (model / "checkpoint-3").mkdir(parents=True)
    (tmp_path / "link").symlink_to(model)
    monkeypatch.chdir(tmp_path)
    for path in (
        model,
        "model",
        "./model",
        "model/",
        "link",
        "link/.",
        "model/checkpoint-3/..",
        "../" + tmp_path.name + "/model",
    ):
        for output, source in ((path, model), (model, path)):
            with pytest.raises(
                ValueError, match="`output_dir`, .* is the `model`, .*, which would be overwritten; choose"
            ):
                keep_sources(output, {"data": None, "model": source})
    with pytest.raises(
        ValueError, match="`output_dir`, .* contains the `model`, .*checkpoint-3, which would be overwritten"
    ):
        keep_sources("link", {"model": model / "checkpoint-3"})
    keep_sources(tmp_path / "other", {"model": model})
    keep_sources(tmp_path / "mode", {"model": model})
    keep_sources(tmp_path, {"model": model})
    keep_sources(model / "own", {"model": model})
    keep_sources(tmp_path / "other", {"model": tmp_path / "gone"})
    keep_sources("someone/model", {"model": "someone/model"})  # on the Hub


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_files_that_two_directories_share_are_kept(tmp_path, link):
    for name in ("model", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(name)
    keep_sources(tmp_path / "other", {"model": tmp_path / "model"})
    (tmp_path / "model" / "weights").write_text("")
    link(tmp_path / "model" / "weights", tmp_path / "other" / "weights")
    with pytest.raises(ValueError, match="^`results`, .*other, shares files with the `model`, .*model, which would"):
        keep_sources(tmp_path / "other", {"model": tmp_path / "model"}, "results")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe{\0}\0", b"[" * 100_000, b"1" * 5000])
def test_json_that_cannot_be_read_is_one_error(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a.json is not a readable JSON file \(.*\); restore or remove it"):
        read_json(path)
    with pytest.raises(ValueError, match="is not a readable JSON file"):
        read_json(tmp_path)
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(ValueError, match="not a regular file"):
        read_json(tmp_path / "pipe.json")


def test_json_is_written_at_once(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_json(path, {"ä": [1]})
    assert read_json(path) == {"ä": [1]} and listing(tmp_path) == ["a.json"]

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        write_json(path, {})
    assert read_json(path) == {"ä": [1]}
    assert path.read_bytes().endswith(b"\n")
