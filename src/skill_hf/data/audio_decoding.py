"""Decodes stored audio block by block to its real end; in some formats the header's length is only an estimate."""

import contextlib
import io
import mmap
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile


# What libsndfile reports for a stream whose header leaves the length open.
UNKNOWN_FRAMES = 2**63 - 1

# Values that one block holds at most, over all channels: 1 MiB.
BLOCK_VALUES = 2**18


class DecodingError(ValueError):
    """Stored audio that cannot be decoded; the message gives the reason and what to do, in one line."""


class AudioStream:
    """
    Audio while it is decoded.

    Attributes:
        rate (`int`): in Hz, of all blocks.
        frames (`int`, *optional*): length in samples per channel; `None` if it is only known after decoding.
    """

    def __init__(self, sound: soundfile.SoundFile, content: bytes | mmap.mmap | None):
        self.rate = sound.samplerate
        self.frames: int | None = sound.frames
        self._sound = sound
        self._parts = None
        if sound.format == "OGG":
            links = _ogg_links(content)
            if len(links) > 1:
                self._parts = lambda: _ogg_blocks(content, links)
        elif sound.format == "MP3" and not _mp3_has_exact_length(content):
            self._parts = lambda: _mp3_blocks(content)
        if self._parts is not None:
            self.frames = None

    def num_frames(self) -> int:
        """Length in samples per channel; decodes everything if it is not known otherwise."""
        return sum(map(len, self.blocks())) if self.frames is None else self.frames

    def blocks(self, start: int = 0, length: int | None = None) -> Iterator[np.ndarray]:
        """Arrays of shape `(samples, channels)`, float32, from `start` to the end or for `length` samples."""
        if self._parts is None:
            self._sound.seek(start)
            parts = _blocks(self._sound, length)
        else:
            parts = _skip(self._parts(), start)
        for block in parts:
            if length is not None:
                block = block[:length]
                length -= len(block)
            if len(block):
                yield block
            if length == 0:
                return


@contextlib.contextmanager
def open_stored(stored: str | bytes) -> Iterator[AudioStream]:
    """
    Args:
        stored (`str` or `bytes`): path of a local file, or the content of one.

    Raises:
        [`DecodingError`]: if it does not exist, is not a file, or contains no audio; also during decoding.
    """
    with contextlib.ExitStack() as stack:
        if isinstance(stored, str):
            check_file(stored)
            size, opened = os.path.getsize(stored), os.fsencode(stored)
            if stored.lower().endswith(".raw"):  # which soundfile takes for samples without a header
                opened = io.BytesIO(Path(stored).read_bytes())
        else:
            size, opened = len(stored), io.BytesIO(stored)
        if not size:
            raise DecodingError("is empty (0 bytes); leave it out")
        try:
            sound = stack.enter_context(soundfile.SoundFile(opened))
            if sound.frames == 0:
                raise DecodingError("has a header but no samples; leave it out")
            if sound.frames == UNKNOWN_FRAMES:
                raise DecodingError("does not state its length; encode it again to a file, not a pipe")
            content = stored if isinstance(stored, bytes) else None
            if content is None and sound.format in ("OGG", "MP3"):
                file = stack.enter_context(open(stored, "rb"))
                content = stack.enter_context(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            yield AudioStream(sound, content)
        except (soundfile.SoundFileError, OSError) as error:
            reason = getattr(error, "error_string", "") or str(error)
            raise DecodingError(
                f"cannot be decoded as audio ({reason.strip()}); convert it to WAV or FLAC, or leave it out"
            ) from error


def check_file(path: str) -> None:
    """Raises a [`DecodingError`] unless `path` is a regular file: opening a FIFO or a device may block forever."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        what = "is a broken link" if os.path.islink(path) else "does not exist"
        raise DecodingError(f"{what}; correct its path") from None
    except (OSError, ValueError) as error:  # a loop of links, a name too long, no permission, a zero byte
        reason = getattr(error, "strerror", None) or str(error)
        raise DecodingError(f"cannot be opened ({reason}); correct its path") from None
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "directory", stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket"}
        raise DecodingError(f"is a {kinds.get(stat.S_IFMT(mode), 'device')}, not a file; leave it out")


def _blocks(sound: soundfile.SoundFile, length: int | None = None) -> Iterator[np.ndarray]:
    most = max(1, BLOCK_VALUES // sound.channels)
    while True:
        block = sound.read(most if length is None else min(most, length), dtype="float32", always_2d=True)
        if not len(block):
            return
        yield block
        length = None if length is None else length - len(block)


def _skip(blocks: Iterator[np.ndarray], start: int) -> Iterator[np.ndarray]:
    for block in blocks:
        if start < len(block):
            yield block[start:]
        start = max(0, start - len(block))


def _same_rate(sound: soundfile.SoundFile, rate: int | None) -> int:
    if rate not in (None, sound.samplerate):
        raise DecodingError(
            f"changes its sampling rate from {rate} to {sound.samplerate} Hz; encode it again at one rate"
        )
    return sound.samplerate


# ---- Ogg: a file may be a chain of streams, of which libsndfile reads the first ----


def _ogg_links(content: bytes | mmap.mmap) -> list[int]:
    """Start of each stream of a chain: first pages of a stream (RFC 3533) that follow other pages."""
    links, end = [], -1
    page = content.find(b"OggS\0\x02")
    while page >= 0:
        if page != end:  # otherwise it is multiplexed with the page before
            links.append(page)
        num_segments = content[page + 26] if page + 27 <= len(content) else 0
        end = page + 27 + num_segments + sum(content[page + 27 : page + 27 + num_segments])
        page = content.find(b"OggS\0\x02", page + 27)
    return links


def _ogg_blocks(content: bytes | mmap.mmap, links: list[int]) -> Iterator[np.ndarray]:
    rate = None
    for start, end in zip(links, [*links[1:], len(content)], strict=True):
        with soundfile.SoundFile(io.BytesIO(content[start:end])) as sound:
            rate = _same_rate(sound, rate)
            yield from _blocks(sound)


# ---- mp3: without a header of its own a file's length is an estimate from its size and first frame ----

_ID3V1_BYTES = 128
# Headers of frames are 4 bytes; side information of 9, 17 or 32 bytes, all 0 in one that holds the length, follows.
_XING = re.compile(rb"\xff[\xe2-\xff]..(?:..)?\0{9}(?:\0{8}|\0{23})?(?:Xing|Info)", re.DOTALL)
_SYNC = re.compile(rb"\xff[\xe2-\xff]")
_LARGEST_FRAME = 2881
_KILOBITS = {
    "1": (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    "2": (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_RATES = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}


class _ForwardSound(soundfile.SoundFile):
    """Reads forward only: otherwise soundfile seeks after each read, which fails if the file ends early."""

    def seekable(self) -> bool:
        return False


class _EndlessFile(io.BytesIO):
    """Reports a length so large that the decoder ends before an estimated number of frames is reached."""

    _at_end = False

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at_end = whence == os.SEEK_END
        return 2**40 if self._at_end else super().seek(offset, whence)

    def tell(self) -> int:
        return 2**40 if self._at_end else super().tell()


def _mp3_has_exact_length(content: bytes | mmap.mmap) -> bool:
    """Whether the file states its number of bytes of frames, and has that many."""
    claimed = _mp3_claimed_end(content, _after_id3(content, 0))
    return claimed is not None and 0 <= _mp3_end(content) - claimed <= _LARGEST_FRAME


def _mp3_claimed_end(content: bytes | mmap.mmap, start: int) -> int | None:
    match = _XING.match(content, start)
    if match is None:
        return None
    flags = int.from_bytes(content[match.end() : match.end() + 4], "big")
    if flags & 3 != 3:  # the number of frames and of bytes
        return None
    return start + int.from_bytes(content[match.end() + 8 : match.end() + 12], "big")


def _mp3_end(content: bytes | mmap.mmap) -> int:
    """End of the frames, where tags begin."""
    end = len(content)
    if content[max(0, end - _ID3V1_BYTES) : end].startswith(b"TAG"):
        end -= _ID3V1_BYTES
    footer = content[max(0, end - 32) : end]
    if footer.startswith(b"APETAGEX"):
        has_header = footer[23] & 0x80
        end -= int.from_bytes(footer[12:16], "little") + (32 if has_header else 0)
    return max(0, end)


def _after_id3(content: bytes | mmap.mmap, start: int) -> int:
    while content[start : start + 3] == b"ID3" and len(header := content[start : start + 10]) == 10:
        size = 0
        for byte in header[6:]:
            size = size << 7 | byte & 0x7F
        start += 10 + size + (10 if header[5] & 0x10 else 0)
    return start


def _mp3_frame_bytes(header: bytes) -> int:
    """Length of a layer III frame with its header; 0 if it is not one."""
    if len(header) < 4 or header[0] != 0xFF or header[1] & 0xE0 != 0xE0:
        return 0
    version, layer = header[1] >> 3 & 3, header[1] >> 1 & 3
    bitrate, rate, padding = header[2] >> 4, header[2] >> 2 & 3, header[2] >> 1 & 1
    if version == 1 or layer != 1 or bitrate in (0, 15) or rate == 3:
        return 0
    kilobits = _KILOBITS["1" if version == 3 else "2"][bitrate]
    return (144_000 if version == 3 else 72_000) * kilobits // _RATES[version][rate] + padding


def _next_mp3_frame(content: bytes | mmap.mmap, start: int, end: int) -> int | None:
    """The next position where two frames follow each other; a single match may be a tag, a picture or noise."""
    position = start
    while (position := _after_id3(content, position)) < end:
        size = _mp3_frame_bytes(content[position : position + 4])
        following = position + size
        if size and (_mp3_frame_bytes(content[following : following + 4]) or following == end):
            return position
        candidates = [match.start() for match in [_SYNC.search(content, position + 1, end)] if match]
        tag = content.find(b"ID3", position + 1, end)
        if tag >= 0:
            candidates.append(tag)
        if not candidates:
            return None
        position = min(candidates)
    return None


def _joined_frames(sound: soundfile.SoundFile) -> Iterator[np.ndarray]:
    """Blocks read frame by frame: an error, such as a cut frame, loses everything of the same read."""
    samples = 576 if sound.samplerate <= 24_000 else 1152
    frames, failed = [], False
    while not failed:
        try:
            frames.append(sound.read(samples, dtype="float32", always_2d=True))
            failed = not len(frames[-1])
        except soundfile.SoundFileError:
            failed = True
        if frames and (failed or len(frames) * samples * sound.channels >= BLOCK_VALUES):
            yield np.concatenate(frames)
            frames = []


def _mp3_blocks(content: bytes | mmap.mmap) -> Iterator[np.ndarray]:
    rate, end = None, _mp3_end(content)
    position = _next_mp3_frame(content, 0, end)
    while position is not None:
        claimed = _mp3_claimed_end(content, position)
        rest = content[position:end]
        file = io.BytesIO(rest) if claimed is not None else _EndlessFile(rest)
        with contextlib.suppress(soundfile.SoundFileError), _ForwardSound(file) as sound:
            rate = _same_rate(sound, rate)
            yield from _joined_frames(sound)
        # The decoder stops where frames of another kind begin, or none; it has read the 4 bytes of a header there.
        stopped = position + max(file.tell() - 4, _mp3_frame_bytes(content[position : position + 4]), 1)
        position = _next_mp3_frame(content, claimed if claimed is not None and claimed < end else stopped, end)
