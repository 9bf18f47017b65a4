"""What a URL in a row may do: nothing but bring audio, in time and within bounds."""

import base64
import contextlib
import http.server
import io
import json
import socket
import threading
import time
import zipfile

import datasets
import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
from transformers import Wav2Vec2FeatureExtractor

from skill_hf.data import (
    AudioError,
    SpeechCollator,
    calibration_waveforms,
    load_speech_dataset,
    read_audio,
    remote_files,
)
from skill_hf.data.remote_files import RemoteFileError, check_protocols


PLAIN = Wav2Vec2FeatureExtractor(do_normalize=False)


def wav() -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.full(16_000, 0.1, np.float32), 16_000, format="WAV", subtype="FLOAT")
    return buffer.getvalue()


class Handler(http.server.BaseHTTPRequestHandler):
    """One path for each way to behave."""

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body=True):
        with contextlib.suppress(OSError):  # the client has gone
            self.answer(body)

    def answer(self, body):
        if self.path == "/silent":
            self.server.stopped.wait(30)
        elif self.path == "/slow_headers":
            self.wfile.write(b"HTTP/1.1 200 OK\r\n")
            while not self.server.stopped.wait(0.05):
                self.wfile.write(b"X")
        elif self.path == "/missing.wav":
            self.send_error(404)
        elif self.path == "/to_a_file":
            self.send_response(302)
            self.send_header("Location", "file:///etc/hostname")
            self.end_headers()
        else:
            self.send_response(200)
            self.end_headers()
            if self.path.startswith("/good") and body:
                self.wfile.write(wav())
            while self.path == "/endless" and body and not self.server.stopped.is_set():
                self.wfile.write(bytes(2**16))
            while self.path == "/trickle" and body and not self.server.stopped.wait(0.05):
                self.wfile.write(b"x")


@pytest.fixture
def server(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.stopped = threading.Event()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(remote_files, "_late", {})
    yield f"http://127.0.0.1:{server.server_port}"
    server.stopped.set()
    server.shutdown()
    server.server_close()


def test_urls_are_read(server):
    for url in (f"{server}/good.wav", f"HTTP{server[4:]}/good.wav?a=b::c"):
        np.testing.assert_array_equal(read_audio({"path": url, "bytes": None}), np.full(16_000, 0.1, np.float32))


@pytest.mark.parametrize("path", ["silent", "slow_headers", "trickle", "endless", "missing.wav", "to_a_file"])
def test_servers_that_misbehave_end_in_time_and_in_one_line(server, monkeypatch, path):
    monkeypatch.setattr(remote_files, "REMOTE_SECONDS", 1.0)
    monkeypatch.setattr(remote_files, "REMOTE_MAX_BYTES", 2**20)
    start = time.monotonic()
    reason = {"endless": "larger than 1 MiB", "missing.wav": "does not exist", "to_a_file": "cannot be|does not"}
    with pytest.raises(AudioError, match=rf"^`{server}/{path}` .*({reason.get(path, 'timed out')})[^\n]*$"):
        read_audio(f"{server}/{path}")
    assert time.monotonic() - start < 15


def test_a_late_server_is_not_waited_for_again(server, monkeypatch):
    monkeypatch.setattr(remote_files, "REMOTE_SECONDS", 1.0)
    rows = [{"audio": f"{server}/silent"}] * 50
    start = time.monotonic()
    collator = SpeechCollator(PLAIN)
    collator(rows)
    assert collator.num_skipped == 50 and time.monotonic() - start < 15
    monkeypatch.setattr(remote_files, "REMOTE_RETRY_SECONDS", 0.0)
    assert len(read_audio(f"{server}/good.wav")) == 16_000


def test_sockets_that_accept_or_refuse(monkeypatch):
    monkeypatch.setattr(remote_files, "REMOTE_SECONDS", 1.0)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(1)
        with pytest.raises(AudioError, match="timed out"):
            read_audio(f"http://127.0.0.1:{silent.getsockname()[1]}/a.wav")
    with pytest.raises(AudioError, match="cannot be"):
        read_audio("http://127.0.0.1:1/a.wav")


# Jinja in a reference runs code in fsspec before 2026.6.
REFERENCE = (
    "data:application/json;base64,"
    + base64.b64encode(
        json.dumps(
            {"version": 1, "templates": {"u": "{{ ().__class__ }}"}, "refs": {"a.wav": "base64:AAAA", "b": ["{{u}}"]}}
        ).encode()
    ).decode()
)

FOREIGN = [
    f"reference://a.wav::{REFERENCE}",
    "REFERENCE://a.wav::x",
    " reference://a.wav",
    "simplecache::http://127.0.0.1/a.wav",
    "filecache::reference://a",
    "zip://a.wav::http://127.0.0.1/a.zip",
    "file:///etc/hostname",
    "local:///etc/hostname",
    "memory://a.wav",
    "data://audio/wav;base64,AAAA",
    "github://a:b@/c",
    "ftp://127.0.0.1/a.wav",
    "s3://bucket/a.wav",
    "dask://a.wav",
    "nonsense://a.wav",
    "://a.wav",
    "dir::file:///etc",
]


@pytest.mark.parametrize("url", FOREIGN)
def test_foreign_protocols_open_nothing(monkeypatch, url):
    def fail(*args, **kwargs):
        raise AssertionError("fsspec was asked")

    for name in ("open", "filesystem", "url_to_fs", "get_fs_token_paths"):
        monkeypatch.setattr(fsspec, name, fail)
        monkeypatch.setattr(fsspec.core, name, fail, raising=False)
    for value in (url, {"path": url, "bytes": None}, {"path": url.encode(), "bytes": None}):
        with pytest.raises(AudioError, match=r"^[^\n]*(uses the protocol|does not exist)[^\n]*$"):
            read_audio(value)


def test_protocols_that_the_user_names(tmp_path):
    with zipfile.ZipFile(tmp_path / "clips.zip", "w") as archive:
        archive.writestr("a.wav", wav())
    url = f"zip://a.wav::{tmp_path}/clips.zip"
    rows = [{"audio": url}] * 3
    assert SpeechCollator(PLAIN, protocols=("zip",))(rows)["input_values"].shape == (3, 16_000)
    assert len(list(calibration_waveforms(rows, 3, 1.0, 0, PLAIN, protocols=["ZIP"]))) == 3
    with pytest.raises(AudioError, match="3 of the 3 clips tried cannot be read.*protocol `zip`"):
        list(calibration_waveforms(rows, 3, 1.0, 0, PLAIN))
    with pytest.raises(RemoteFileError, match="protocol `reference`"):
        check_protocols(f"zip://a.wav::reference://b::{tmp_path}", ["zip"])
    with pytest.raises(AudioError, match="cannot be fetched"):  # named, but not installed or not there
        read_audio("s3://bucket/a.wav", protocols=["s3"])


def test_one_foreign_row_of_twelve_is_left_out(tmp_path, caplog):
    soundfile.write(tmp_path / "a.wav", np.full(16_000, 0.1, np.float32), 16_000)
    lines = ["a.wav"] * 11 + [FOREIGN[0]]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"audio": line}) + "\n" for line in lines))
    for streaming in (False, True):
        dataset = load_speech_dataset(tmp_path, streaming=streaming)
        assert len(list(calibration_waveforms(dataset, 12, 1.0, 0, PLAIN))) == 11
        assert "Left out 1 of 12 clips: row 11" in caplog.text and "protocol `reference`" in caplog.text


CARDS = {
    "a chain": "data_files: 'reference://a.csv::data:application/json;base64,e30='",
    "of a split": "data_files:\n  - split: train\n    path: 'memory://a.csv'",
    "in a list": "data_files:\n  - split: train\n    path: ['a.csv', 'file:///etc/*.csv']",
    "a chain without slashes": "data_files: 'simplecache::a.csv'",
}


@pytest.mark.parametrize("file_name", ["README.md", ".huggingface.yaml"])
@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
def test_a_card_that_names_foreign_files_is_refused(tmp_path, card, file_name, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *args, **kwargs: pytest.fail("it was loaded"))
    soundfile.write(tmp_path / "a.wav", np.zeros(800, np.float32), 16_000)
    (tmp_path / "a.csv").write_text("audio\na.wav\n")
    text = "configs:\n- config_name: default\n  " + card.replace("\n", "\n  ") + "\n"
    (tmp_path / file_name).write_text(f"---\n{text}---\n" if file_name == "README.md" else text)
    with pytest.raises(AudioError, match=r"^The card of the dataset [^\n]* uses the protocol [^\n]*$"):
        load_speech_dataset(tmp_path)


def test_a_card_that_names_its_own_files_is_followed(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    soundfile.write(tmp_path / "a.wav", np.full(800, 0.1, np.float32), 16_000)
    (tmp_path / "b.csv").write_text("audio\na.wav\n")
    (tmp_path / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: b.csv\n---\n")
    assert load_speech_dataset(tmp_path)["audio"] == [str(tmp_path / "a.wav")]


def test_pictures_of_a_row_are_not_opened_either(tmp_path):
    features = datasets.Features(
        {"audio": datasets.Audio(), "picture": datasets.Image(), "more": datasets.List({"x": datasets.Image()})}
    )
    picture = {"bytes": None, "path": FOREIGN[0]}
    rows = {"audio": [{"bytes": wav(), "path": None}], "picture": [picture], "more": [[{"x": picture}]]}
    table = datasets.Dataset.from_dict(rows).data.table.cast(features.arrow_schema)
    pq.write_table(table, tmp_path / "train.parquet")
    for streaming in (False, True):
        (row,) = load_speech_dataset(tmp_path, streaming=streaming)
        assert row["picture"] == picture and row["more"] == [{"x": picture}]
        assert len(read_audio(row["audio"])) == 16_000
