"""A container's output, as conmon logs it, read as text and as JSON Lines.

conmon writes the format that Kubernetes defined (kubelet's CRI log format), a line for
each line of output, at most 8 KiB of it at a time:

    2026-01-02T03:04:05.123456789+00:00 stdout F the line
    2026-01-02T03:04:05.123456789+00:00 stderr P a piece that has no newline yet

The files grow to gigabytes while they are read at any offset. So an index of a few
bytes for each block of the file is kept in memory, built as far as somebody reads.
"""

import json
import os
import re
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

# What is read and converted as a whole: a millisecond of work, during which no other thread
# runs. An index of 25,000 entries for a gigabyte would be too much by far.
_BLOCK = 256 << 10

_HEADER = rb"[0-9]{4}-[0-9-]{5}T[0-9:.]{18}[^ \n]{6} std(?:out|err) "
# Anything else in the file is what a full disk or a killed conmon left of a line.
_RECORD = re.compile(
    rb"(?P<time>[0-9]{4}-[0-9-]{5}T[0-9:.]{18})(?P<zone>[^ \n]{6}) std(?P<stream>out|err)"
    rb" (?:F (?P<full>[^\n]*\n)|P (?P<part>[^\n]*)\n)|[^\n]*\n"
)
# Text has a coarser test, made of what the engine skips over fastest. No line that was cut
# and continued by another passes it: the stream's name would not be in its place.
_HEAD = rb".{10}T.{24} std(?:out %c|err %c) "
_HEAD_LENGTH = len("2026-01-02T03:04:05.123456789+00:00 stdout F ")
_FULL, _PART = _HEAD % (b"F", b"F"), _HEAD % (b"P", b"P")
_TEXT = re.compile(rb"(?m)^(?:" + _FULL + rb"([^\n]*\n)|" + _PART + rb"([^\n]*)\n)|^[^\n]*\n")
# The lines whose text is not simply all that follows the header.
_ODD = re.compile(rb"\n(?!" + _FULL + rb")(?:(" + _PART + rb")|([^\n]*))")

# Pieces cut inside a character: the bytes of it that came first, by stream.
_Carried = dict[bytes, bytes]


@dataclass(slots=True)
class _View:
    """One way to show the file: where each block begins in it, and in what is shown.

    ``measure`` says how long what ``convert`` gives will be. All of the file up to ``end``
    has been measured, each byte once; it is shown in ``size`` bytes.
    """

    convert: Callable[[bytes, _Carried], bytes]
    measure: Callable[[bytes, _Carried], int]
    file_offsets: list[int] = field(default_factory=lambda: [0])
    offsets: list[int] = field(default_factory=lambda: [0])
    carried: list[_Carried] = field(default_factory=lambda: [{}])
    end: int = 0
    size: int = 0
    carried_at_end: _Carried = field(default_factory=dict)
    # The block converted last, by its number and end: readers go on where they stopped.
    cached: tuple[int, int, bytes] = (-1, 0, b"")

    def advance(self, file: int) -> bool:
        """Measure the next piece of the file; whether there was one."""
        raw = os.pread(file, _BLOCK, self.end)
        # A line that is not finished yet counts when it is. A block without any newline
        # is nothing that conmon wrote.
        whole = raw.rfind(b"\n") + 1
        if not whole and len(raw) < _BLOCK:
            return False
        if whole:
            self.size += self.measure(raw[:whole], self.carried_at_end)
        self.end += whole or len(raw)
        if self.end - self.file_offsets[-1] >= _BLOCK // 2:
            self.file_offsets.append(self.end)
            self.offsets.append(self.size)
            self.carried.append(dict(self.carried_at_end))
        return True

    def block(self, file: int, number: int) -> bytes:
        """A block as shown, as far as it has been measured."""
        start = self.file_offsets[number]
        known = number + 1 < len(self.file_offsets)
        end = self.file_offsets[number + 1] if known else self.end
        if self.cached[:2] != (number, end):
            raw = os.pread(file, end - start, start)
            raw = raw[: raw.rfind(b"\n") + 1]
            self.cached = (number, end, self.convert(raw, dict(self.carried[number])))
        return self.cached[2]

    def forget(self) -> None:
        """Begin anew."""
        self.file_offsets, self.offsets, self.carried = [0], [0], [{}]
        self.end, self.size, self.carried_at_end = 0, 0, {}
        self.cached = (-1, 0, b"")


class LogReader:
    """The log of one container. Blocks; safe to use from several threads.

    Args:
        path: the file that conmon appends to; it need not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._text = _View(_to_text, _text_length)
        self._json = _View(_to_json, _json_length)

    def mtime_ns(self) -> int:
        """When output last came, in nanoseconds since the epoch; 0 before the first."""
        try:
            return self._path.stat().st_mtime_ns
        except FileNotFoundError:
            return 0

    def text_size(self) -> int:
        """Bytes of output so far."""
        return self._size(self._text)

    def read_text(self, offset: int, length: int) -> bytes:
        """Output, byte for byte, both streams in the order in which they came."""
        return self._read(self._text, offset, length)

    def read_json(self, offset: int, length: int) -> bytes:
        """Lines ``{"time", "stream", "text"}``, one a record of the log.

        ``text`` has its newline if the output had one; bytes that are not UTF-8 show as
        U+FFFD.
        """
        return self._read(self._json, offset, length)

    def _size(self, view: _View) -> int:
        with self._lock, self._opened(view) as file:
            while view.advance(file):
                pass
            return view.size

    def _read(self, view: _View, offset: int, length: int) -> bytes:
        pieces: list[bytes] = []
        with self._lock, self._opened(view) as file:
            while view.size < offset + length and view.advance(file):
                pass
            block = bisect_right(view.offsets, offset) - 1
            while length > 0 and block < len(view.offsets):
                shown = view.block(file, block)
                start = max(offset - view.offsets[block], 0)
                pieces.append(shown[start : start + length])
                length -= len(pieces[-1])
                block += 1
        return b"".join(pieces)

    @contextmanager
    def _opened(self, view: _View) -> Iterator[int]:
        """The file; before the first output, an empty one."""
        path = self._path if self._path.exists() else Path(os.devnull)
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if os.fstat(file).st_size < view.end:
                view.forget()  # somebody cut the file
            yield file
        finally:
            os.close(file)


def _to_text(raw: bytes, _carried: _Carried) -> bytes:
    return _TEXT.sub(rb"\1\2", raw)


def _text_length(raw: bytes, _carried: _Carried) -> int:
    """The length of what _to_text() gives for whole lines."""
    length = len(raw) - _HEAD_LENGTH * raw.count(b"\n")
    for part, rest in _ODD.findall(b"\n" + raw[:-1]):
        # A newline that was not in the output, or a line that is no record.
        length -= 1 if part else len(rest) + 1 - _HEAD_LENGTH
    return length


def _to_json(raw: bytes, carried: _Carried) -> bytes:
    lines: list[str] = []
    for match in _RECORD.finditer(raw):
        stream = match["stream"]
        if stream is None:
            continue
        content = carried.pop(stream, b"") + (match["full"] or match["part"] or b"")
        if match["full"] is None and (cut := _incomplete(content)):
            content, carried[stream] = content[:-cut], content[-cut:]
        zone = match["zone"].decode()
        record = {
            "time": match["time"].decode() + ("Z" if zone == "+00:00" else zone),
            "stream": "std" + stream.decode(),
            "text": content.decode("utf-8", "replace"),
        }
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    return "".join(lines).encode()


def _json_length(raw: bytes, carried: _Carried) -> int:
    return len(_to_json(raw, carried))


def _incomplete(content: bytes) -> int:
    """How many bytes at the end begin a UTF-8 character that is not complete."""
    for length in range(1, min(4, len(content) + 1)):
        byte = content[-length]
        if byte & 0xC0 == 0xC0:
            wanted = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return length if length < wanted else 0
        if byte & 0xC0 != 0x80:
            return 0
    return 0
