"""What follows the contents of a span within it: the headers of the files that come next.

A gzip member holds a content and all headers up to the next one. So the members of one content in
two blobs are the same bytes only if the same files follow, with the same attributes. The file
``tails`` of a layer says which: 8 bytes for each span, a digest of those entries; zeros where none
follow, as in the middle of a file.
"""

import hashlib
import os
import stat
from contextlib import suppress
from pathlib import Path

import msgspec

from store.index import Entry, read_index
from store.spans import SpanTable

_SIZE = 8

_NAME = "tails"


def write_tails(directory: Path, table: SpanTable) -> None:
    """Write the file of a lazy layer, unless it is there. Blocks while it reads the index.

    Raises:
        CorruptContent: the index is damaged.
        OSError: the disk.
    """
    path = directory / _NAME
    if path.exists():
        return
    tails = _Writer(table)
    for entry in read_index(directory / "index"):
        tails.add(entry)
    temporary = directory / f"{_NAME}.tmp"
    temporary.write_bytes(tails.finish())
    temporary.rename(path)


class Tails:
    """The file of a layer, if it has one. Raises OSError: it can't be read."""

    def __init__(self, directory: Path) -> None:
        self._descriptor: int | None = None
        with suppress(FileNotFoundError):
            self._descriptor = os.open(directory / _NAME, os.O_RDONLY | os.O_CLOEXEC)

    def of(self, number: int) -> bytes | None:
        """That of a span; None as long as nobody has written them."""
        if self._descriptor is None:
            return None
        return os.pread(self._descriptor, _SIZE, _SIZE * number)

    def close(self) -> None:
        """Let go of the file."""
        if self._descriptor is not None:
            os.close(self._descriptor)


class _Writer:
    """Takes entries in order, which is that of their contents."""

    def __init__(self, table: SpanTable) -> None:
        self._table = table
        self._tails = bytearray(_SIZE * table.spans)
        self._piece = 0
        self._span: int | None = None  # where the headers go
        self._hash = hashlib.blake2b(digest_size=_SIZE)

    def add(self, entry: Entry) -> None:
        """Add an entry of the index."""
        offset, entry.offset = entry.offset, 0
        self._hash.update(msgspec.msgpack.encode(entry))
        if not (stat.S_ISREG(entry.mode) and entry.size):
            return
        first = self._span_at(offset)
        last = self._span_at(offset + entry.size - 1)
        if first is not None and first != self._span:
            self._end_span(last=False)
        if last is not None:
            self._span = last

    def finish(self) -> bytes:
        """All tails."""
        self._end_span(last=True)
        return bytes(self._tails)

    def _end_span(self, *, last: bool) -> None:
        number = self._span
        # Some writers put headers into frames of their own, which are spans without contents; what
        # comes after the last content may be a table of contents instead.
        apart = not last and number is not None and self._table.is_empty(number + 1)
        if number is not None and not apart:
            self._tails[_SIZE * number : _SIZE * (number + 1)] = self._hash.digest()
        self._hash = hashlib.blake2b(digest_size=_SIZE)

    def _span_at(self, offset: int) -> int | None:
        """The span of the piece that holds a place in the data file; the calls' places grow."""
        while self._piece < self._table.pieces:
            piece = self._table.piece(self._piece)
            if offset < piece.target + piece.size:
                return piece.span if offset >= piece.target else None
            self._piece += 1
        return None
