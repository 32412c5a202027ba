"""Where the contents of a lazy layer's data file come from: its span table.

A *span* is a range of the blob that can be inflated by itself (or, where ``SpanTable.in_order``,
after all before it); a *piece* is a part of the data file that comes out of one span. Spans cover
the blob without gaps: what holds only tar headers, a table of contents or padding is a span without
pieces. Pieces are sorted by their place in the data file, which is also the order of their spans.

The file ``spans`` of a layer, little endian, made once and then only read, through a mapping,
so that a process can serve many layers without their tables in its memory:

    header    magic ``ctrfsspn``, u32 version, u8 codec, 3 bytes 0, u64 size of the blob, u64 size
              of the data file, u64 blob offset before which spans are wanted at start, u64 number
              of spans, u64 number of pieces, u32 CRC-32 of all that follows, u32 number of cuts
    spans     80 bytes each, see ``Span``
    pieces    64 bytes each, see ``Piece``
    cuts      u64 each, see ``data_files.py``
    windows   the history that spans of codec DEFLATE start from, compressed with zstd
"""

import mmap
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from enum import IntEnum
from itertools import starmap
from pathlib import Path
from typing import BinaryIO

import msgspec
import zstandard
from isal import isal_zlib

from store.errors import CorruptContent, InvalidLayer

MAGIC = b"ctrfsspn"
VERSION = 3

_HEAD = struct.Struct("<8sIB3xQQQQQII")
_SPAN = struct.Struct("<QQQIIQIBB2x32s")
_PIECE = struct.Struct("<QQQI4x32s")
_COUNT_AT = struct.calcsize("<QQQI")  # in a span
_TARGET = struct.Struct("<Q")
_NONE = bytes(32)

# So many bytes of the blob cost less than a request of their own, even where the line is slow.
_GAP = 64 << 10

# A deflate stream looks back at most this far (RFC 1951).
WINDOW = 32 << 10


class Codec(IntEnum):
    """How the spans of a table are inflated: gzip members, zstd frames, raw deflate from a
    recorded state on, not at all, or zstd blocks, each of which needs those before it."""

    GZIP = 1
    ZSTD = 2
    DEFLATE = 3
    PLAIN = 4
    ZSTD_BLOCKS = 5


class Span(msgspec.Struct, gc=False):
    """Bytes ``start`` to ``end`` of the blob.

    ``size`` is how many bytes come out of it that somebody wants: inflating stops there.
    ``digest`` (32 bytes of SHA-256) is that of those bytes; all zeros where each piece has
    its own. For ZSTD_BLOCKS it is that of the blob's bytes instead, so that they can be verified
    before they are inflated. ``bits`` and ``lead`` are for DEFLATE: so many of the highest bits of
    the byte before ``start``, whose value is ``lead``, belong to the span. ``first`` and ``count``
    say which pieces are its own.
    """

    start: int
    end: int
    size: int = 0
    digest: bytes = _NONE
    bits: int = 0
    lead: int = 0
    window: bytes = b""
    first: int = 0
    count: int = 0


class Piece(msgspec.Struct, gc=False):
    """``size`` bytes at ``target`` in the data file, ``inner`` bytes into their inflated span.

    ``digest`` is that of the piece, or all zeros where the span has one.
    """

    target: int
    size: int
    inner: int = 0
    digest: bytes = _NONE
    span: int = 0


class SpanWriter:
    """Collects spans with their pieces, in the blob's order, and writes the table.

    Args:
        codec: of all spans.
        blob_size: in bytes.
    """

    def __init__(self, codec: Codec, blob_size: int) -> None:
        self._codec = codec
        self._blob_size = blob_size
        self._spans = bytearray()
        self._pieces = bytearray()
        self._span_count = self._piece_count = 0
        self._windows = bytearray()
        self._compressor = zstandard.ZstdCompressor(level=3)
        self._end = 0  # of the latest span
        self._target = 0  # end of the latest piece
        self.prefetch_end = 0

    def add(self, span: Span, pieces: list[Piece]) -> None:
        """Append a span; what lies between it and the one before becomes one without pieces.

        Raises:
            InvalidLayer: it overlaps another, leads out of the blob, or its pieces do not
                lie in it in order.
        """
        self._begin(span.start, span.end)
        span.first, span.count = self._piece_count, len(pieces)
        for piece in pieces:
            self._add_piece(span.size, piece.target, piece.size, piece.inner, piece.digest)
        self._append(span)

    def add_content(
        self, start: int, end: int, size: int, target: int, inner: int, digest: bytes
    ) -> None:
        """As ``add`` for a span with one piece, which goes up to the span's ``size``: most are so,
        and there may be a million.

        Raises:
            InvalidLayer: as ``add``.
        """
        usual = self._end == start < end <= self._blob_size and inner < size
        if not usual or target < self._target:
            self.add(Span(start, end, size), [Piece(target, size - inner, inner, digest)])
            return
        number, first = self._span_count, self._piece_count
        self._pieces += _PIECE.pack(target, size - inner, inner, number, digest)
        self._spans += _SPAN.pack(start, end, size, first, 1, len(self._windows), 0, 0, 0, _NONE)
        self._target = target + size - inner
        self._span_count, self._piece_count = number + 1, first + 1
        self._end = end

    def _begin(self, start: int, end: int) -> None:
        if not self._end <= start < end <= self._blob_size:
            raise InvalidLayer(
                f"the layer's table of contents names the bytes {start} to {end}, which "
                f"overlap others or lie outside of the {self._blob_size} bytes of the layer; "
                "do not trust this image"
            )
        if start > self._end:
            self._append(Span(self._end, start))

    def _add_piece(self, most: int, target: int, size: int, inner: int, digest: bytes) -> None:
        if target < self._target or inner + size > most:
            raise InvalidLayer(
                "the layer's table of contents has contents that overlap or are longer than "
                "what holds them; do not trust this image"
            )
        self._target = target + size
        self._pieces += _PIECE.pack(target, size, inner, self._span_count, digest)
        self._piece_count += 1

    def _append(self, span: Span) -> None:
        self._end = span.end
        window = self._compressor.compress(span.window) if span.window else b""
        self._span_count += 1
        self._spans += _SPAN.pack(
            span.start,
            span.end,
            span.size,
            span.first,
            span.count,
            len(self._windows),
            len(window),
            span.bits,
            span.lead,
            span.digest,
        )
        self._windows += window

    def write(
        self,
        file: BinaryIO,
        data_size: int,
        known: Iterable[tuple[int, int]] = (),
        cuts: Sequence[int] = (),
    ) -> None:
        """Write the whole table.

        Args:
            data_size: of the data file, in bytes.
            known: offsets and lengths of what is here already of the blob. What follows all
                contents is cut there, so that nothing of it is fetched again.
            cuts: those of the data files.
        """
        edges = {self._blob_size, *(edge for at, size in known for edge in (at, at + size))}
        for edge in sorted(edge for edge in edges if self._end < edge <= self._blob_size):
            self._append(Span(self._end, edge))
        parts = (self._spans, self._pieces, struct.pack(f"<{len(cuts)}Q", *cuts), self._windows)
        checksum = 0
        for part in parts:
            checksum = isal_zlib.crc32(part, checksum)
        file.write(
            _HEAD.pack(
                MAGIC,
                VERSION,
                self._codec,
                self._blob_size,
                data_size,
                self.prefetch_end,
                self._span_count,
                self._piece_count,
                checksum,
                len(cuts),
            )
        )
        file.writelines(parts)


class SpanTable:
    """A table, mapped into memory. Safe to use from several threads.

    Attributes:
        codec, blob_size, data_size, prefetch_end, cuts: see the head of the module.
        spans, pieces: their numbers.
        in_order: a span can be inflated only after all before it.

    Raises:
        CorruptContent: the file is no such table, cut short, or missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.exists():
            raise self._corrupt()
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < _HEAD.size:
                raise self._corrupt()
            self._map = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        # What a disk has made of it could be anything, and nothing here is looked at twice.
        with memoryview(self._map) as table:
            checksum = isal_zlib.crc32(table[_HEAD.size :])
        self.unload()
        head = _HEAD.unpack_from(self._map, 0)
        if head[:2] != (MAGIC, VERSION) or head[2] not in set(Codec) or head[8] != checksum:
            raise self._corrupt()
        self.codec = Codec(head[2])
        self.in_order = self.codec == Codec.ZSTD_BLOCKS
        self.blob_size: int = head[3]
        self.data_size: int = head[4]
        self.prefetch_end: int = head[5]
        self.spans: int = head[6]
        self.pieces: int = head[7]
        self._pieces_at = _HEAD.size + self.spans * _SPAN.size
        cuts_at = self._pieces_at + self.pieces * _PIECE.size
        self._windows_at = cuts_at + head[9] * _TARGET.size
        if size < self._windows_at:
            raise self._corrupt()
        self.cuts: tuple[int, ...] = struct.unpack_from(f"<{head[9]}Q", self._map, cuts_at)

    def _corrupt(self) -> CorruptContent:
        return CorruptContent(
            f"the span table {self.path} is missing, damaged or of another version; "
            "pull the image again"
        )

    def close(self) -> None:
        """Let go of the mapping."""
        self._map.close()

    def unload(self) -> None:
        """Take up no memory but for what is read from now on, which comes by itself."""
        self._map.madvise(mmap.MADV_DONTNEED)

    def span(self, number: int) -> Span:
        """A span, without its window."""
        fields = _SPAN.unpack_from(self._map, _HEAD.size + number * _SPAN.size)
        start, end, size, first, count, _, _, bits, lead, digest = fields
        return Span(start, end, size, digest, bits, lead, b"", first, count)

    def is_empty(self, number: int) -> bool:
        """Whether a span has no pieces."""
        at = _HEAD.size + number * _SPAN.size + _COUNT_AT
        return self._map[at : at + 4] == b"\0\0\0\0"

    def can_verify(self, number: int) -> bool:
        """Whether a span's bytes can be verified before the whole blob is."""
        return self.in_order or not self.is_empty(number)

    def window(self, number: int) -> bytes:
        """The history that span ``number`` starts from. Raises CorruptContent."""
        fields = _SPAN.unpack_from(self._map, _HEAD.size + number * _SPAN.size)
        at, length = self._windows_at + fields[5], fields[6]
        if not length:
            return b""
        try:
            decompressor = zstandard.ZstdDecompressor()
            window = decompressor.decompress(self._map[at : at + length], max_output_size=WINDOW)
        except zstandard.ZstdError:
            raise self._corrupt() from None
        return window[-WINDOW:]

    def range_of(self, number: int) -> tuple[int, int]:
        """Where a span begins and ends in the blob."""
        start, end = struct.unpack_from("<QQ", self._map, _HEAD.size + number * _SPAN.size)
        return start, end

    def piece(self, number: int) -> Piece:
        """A piece."""
        target, size, inner, span, digest = _PIECE.unpack_from(
            self._map, self._pieces_at + number * _PIECE.size
        )
        return Piece(target, size, inner, digest, span)

    def pieces_of(self, span: Span) -> Iterator[Piece]:
        """The pieces of a span."""
        return map(self.piece, range(span.first, span.first + span.count))

    def spans_for(self, offset: int, length: int) -> range:
        """Numbers of the spans that bytes of the data file come from; empty if from none."""
        first = self._piece_after(offset)
        last = first
        end = offset + length
        while last < self.pieces and self._target(last) < end:
            last += 1
        if first == last:
            return range(0)
        return range(self.piece(first).span, self.piece(last - 1).span + 1)

    def spans_between(self, start: int, end: int) -> range:
        """As ``spans_for`` for a range that may be long, and ends where no piece is."""
        first, stop = self._piece_after(start), self._piece_after(end)
        if first == stop:
            return range(0)
        return range(self.piece(first).span, self.piece(stop - 1).span + 1)

    def runs_for(self, ranges: Iterable[tuple[int, int]]) -> list[range]:
        """Numbers of the spans that ranges (offset, length) of the data file come from, in the
        blob's order, in as few runs as possible: what lies close together is one, with what is
        in between."""
        found = [spans for spans in starmap(self.spans_for, ranges) if spans]
        runs: list[range] = []
        for spans in sorted(found, key=lambda spans: (spans.start, spans.stop)):
            if runs and self.are_close(runs[-1][-1], spans[0]):
                runs[-1] = range(runs[-1].start, max(runs[-1].stop, spans.stop))
            else:
                runs.append(spans)
        return runs

    def are_close(self, before: int, after: int) -> bool:
        """Whether what lies between two spans costs less than a request for the second."""
        return self.range_of(after)[0] - self.range_of(before)[1] <= _GAP

    def stop_at(self, blob_offset: int) -> int:
        """One past the last span that has a byte of the blob before ``blob_offset``, which is above
        0 and may lie behind the blob's end."""
        return self.span_at(min(blob_offset, self.blob_size) - 1) + 1

    def span_at(self, blob_offset: int) -> int:
        """The number of the span that holds a byte of the blob."""
        low, high = 0, self.spans
        while low < high:
            middle = (low + high) // 2
            if self.range_of(middle)[1] <= blob_offset:
                low = middle + 1
            else:
                high = middle
        return low

    def _target(self, number: int) -> int:
        target: int = _TARGET.unpack_from(self._map, self._pieces_at + number * _PIECE.size)[0]
        return target

    def _piece_after(self, offset: int) -> int:
        """The first piece that ends after ``offset``."""
        low, high = 0, self.pieces
        while low < high:
            middle = (low + high) // 2
            piece = self.piece(middle)
            if piece.target + piece.size <= offset:
                low = middle + 1
            else:
                high = middle
        return low
