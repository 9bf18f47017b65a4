"""Reads files from URLs: allowed protocols, limits of time and size."""

import math
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import fsspec


# What rows of a data set may name without being asked. Others (`reference`, `file`, `memory`, `data`, ...) reach code,
# memory or files of this machine that a data set has no business with.
PROTOCOLS = ("http", "https", "hf")

# A server has this long to begin, and after that must keep up a rate; so one that trickles ends like a silent one.
REMOTE_SECONDS = 10.0
REMOTE_BYTES_PER_SECOND = 64 * 2**10
REMOTE_MAX_BYTES = 256 * 2**20

# A server that did not keep up is not waited for again so soon: a set may have thousands of rows there.
REMOTE_LATE_READS = 3
REMOTE_RETRY_SECONDS = 60.0

_CHUNK_BYTES = 2**20

# Server -> how many reads in a row were late, and when the last one was.
_late: dict[str, tuple[int, float]] = {}


class RemoteFileError(OSError):
    """A URL that is not allowed or cannot be read; the message is the error in one line."""


def is_url(path: str) -> bool:
    """Whether a path has a protocol; all others are paths of local files."""
    return "://" in path and not os.path.isabs(path)


def check_protocols(url: str, protocols: Sequence[str] = ()) -> None:
    """
    Args:
        url (`str`): contains `://`; links of a chain, such as `zip://a.wav::/data/clips.zip`, are separated by `::`.
        protocols (`Sequence[str]`, *optional*): allowed by the user in addition to [`PROTOCOLS`].

    Raises:
        [`RemoteFileError`]: if a protocol is not allowed, or the URL is a chain of default protocols, which is never
            needed.
    """
    if isinstance(protocols, str):
        raise ValueError(f"`protocols` must be a list of names such as ['s3'], but is {protocols!r}.")
    named = [protocol.lower() for protocol in protocols]
    first, *rest = [_protocol(link) for link in url.split("::")]
    # An address such as `http://[::1]/a.wav` is no chain. The last link of one may be a path.
    links = [first] if first in PROTOCOLS else [first, *filter(None, rest)]
    unknown = next((link for link in links if link not in (*PROTOCOLS, *named)), None)
    if unknown is not None:
        raise RemoteFileError(
            f"uses the protocol `{unknown}`, but only paths and {', '.join(PROTOCOLS)} URLs are read; add it to"
            " `protocols` if you trust the dataset"
        )


def read_url(url: str, protocols: Sequence[str] = ()) -> bytes:
    """
    Content of a URL with an allowed protocol.

    Raises:
        [`RemoteFileError`]: if the protocol is not allowed or not installed, there is no such file, the server does
            not begin to answer in [`REMOTE_SECONDS`] or stays below [`REMOTE_BYTES_PER_SECOND`] (or did in the last
            [`REMOTE_RETRY_SECONDS`]), or the content exceeds [`REMOTE_MAX_BYTES`].
    """
    check_protocols(url, protocols)
    protocol = _protocol(url)
    # On the Hub a repository is one, in `hf://datasets/owner/name`.
    server = "/".join(url.split("/")[: 6 if protocol == "hf" else 3])
    num_late, when = _late.get(server, (0, -math.inf))
    if num_late >= REMOTE_LATE_READS and time.monotonic() - when < REMOTE_RETRY_SECONDS:
        raise RemoteFileError(
            f"is on a server that timed out {num_late} times in a row, less than {REMOTE_RETRY_SECONDS:.0f} s ago"
        )
    try:
        if protocol in PROTOCOLS or "::" not in url:
            filesystem = fsspec.filesystem(protocol)  # here, since fsspec keeps one for each thread
            # A stream; by default fsspec would first ask for the size and then for ranges.
            settings = {"block_size": 0} if protocol in ("http", "https") else {}
            content = _read_in_time(lambda: filesystem.open(url, "rb", **settings))
        else:
            content = _read_in_time(lambda: fsspec.open(url, "rb"))
        _late.pop(server, None)
        return content
    except RemoteFileError:
        raise
    except TimeoutError as error:
        _late[server] = (num_late + 1, time.monotonic())
        raise RemoteFileError(str(error)) from error
    except FileNotFoundError as error:
        raise RemoteFileError("does not exist or cannot be reached") from error
    except Exception as error:  # each file system has errors of its own
        raise RemoteFileError(f"cannot be fetched ({_reason(error)})") from error


def _read_in_time(open_file: Callable[[], Any]) -> bytes:
    # Time-outs of the libraries are per packet, per request or for none: only another thread can be left waiting.
    chunks: queue.SimpleQueue = queue.SimpleQueue()
    stopped = threading.Event()

    def read() -> None:
        try:
            with open_file() as file:
                while not stopped.is_set() and (chunk := file.read(_CHUNK_BYTES)):
                    chunks.put(chunk)
            chunks.put(b"")
        except BaseException as error:  # noqa: B036  (raised below, in the thread that waits)
            chunks.put(error)

    start = time.monotonic()
    threading.Thread(target=read, daemon=True, name="skill_hf remote file").start()
    content = bytearray()
    try:
        while True:
            deadline = start + REMOTE_SECONDS + len(content) / REMOTE_BYTES_PER_SECOND
            try:
                chunk = chunks.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise TimeoutError(f"timed out ({len(content)} bytes in {time.monotonic() - start:.0f} s)") from None
            if isinstance(chunk, BaseException):
                raise chunk
            if not chunk:
                return bytes(content)
            content += chunk
            if len(content) > REMOTE_MAX_BYTES:
                raise RemoteFileError(f"is larger than {REMOTE_MAX_BYTES // 2**20} MiB")
    finally:
        stopped.set()


def _protocol(link: str) -> str:
    """`zip` of `zip://a.wav`, `data` of `data:audio/wav;base64,`, `simplecache` of itself, nothing of a path."""
    match = re.match(r"\s*(?:([^/\\?#]*?):(?://|(?=[^/\\]))|([a-zA-Z]+)$)", link)
    return (match.group(1) or match.group(2) or "").lower() if match else ""


def _reason(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
