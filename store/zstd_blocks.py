"""Spans of zstd blocks, which are inflated in order.

A block may repeat what came up to 128 MiB before it, and use its predecessor's tables. What is
needed to begin in the middle of a long frame would take as much room as the layer itself, so one
decompressor goes through the blob, span by span. When it is elsewhere than it has to be, as after
the process was started again, it goes once more through what is here already.
"""

import threading
from collections.abc import Callable
from typing import IO, cast

import zstandard

from store.inflate import ZSTD_WINDOW
from store.spans import SpanTable

_READ = 1 << 20


class NotAsTold(Exception):
    """Bytes give less than the table says, or more; or something before them is missing."""


class ZstdBlocks:
    """A decompressor somewhere in a layer's blob. Safe to use from several threads.

    It holds as much history as the layer's compressor chose, mostly 8 MiB.

    Args:
        table: the layer's.
        read_blob: gives the bytes of a span that is here, by its number; None if it is not.
    """

    def __init__(self, table: SpanTable, read_blob: Callable[[int], bytes | None]) -> None:
        self._table = table
        self._read_blob = read_blob
        self._lock = threading.Lock()
        self.close()

    def close(self) -> None:
        """Give back what is held in memory; it can go on nevertheless."""
        self._number = 0  # of the span that comes next
        self._source = _Source()
        self._reader: zstandard.ZstdDecompressionReader | None = None

    def inflate(self, number: int, blob: bytes | memoryview) -> bytearray:
        """What a span inflates to: as many bytes as the table says.

        Args:
            blob: its bytes, verified.

        Raises:
            ZstdError, NotAsTold: they do not inflate to that.
        """
        with self._lock:
            try:
                if number < self._number:
                    self.close()
                while self._number < number:
                    before = self._read_blob(self._number)
                    if before is None:
                        raise NotAsTold(f"span {self._number}, which is before them, is missing")
                    self._next(before)
                return self._next(blob)
            except (zstandard.ZstdError, NotAsTold):
                self.close()
                raise

    def _next(self, blob: bytes | memoryview) -> bytearray:
        if self._reader is None:
            decompressor = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW)
            self._reader = decompressor.stream_reader(
                cast(IO[bytes], self._source), read_size=_READ, read_across_frames=True
            )
        self._source.rest += blob
        inflated = bytearray(self._table.span(self._number).size)
        view = memoryview(inflated)
        while view:
            view = view[self._reader.readinto(view) :]
        # Behind what comes out there may be something that gives nothing, until the next span.
        if len(self._source.rest) > len(blob):
            raise NotAsTold("those before them give more than they should")
        self._number += 1
        return inflated


class _Source:
    """What the decompressor reads from: the bytes that it has been given, and no end."""

    def __init__(self) -> None:
        self.rest = b""

    def read(self, size: int) -> bytes:
        if not self.rest:
            raise NotAsTold("they are too few")
        piece, self.rest = self.rest[:size], self.rest[size:]
        return piece
