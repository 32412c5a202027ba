"""From the bytes of one span to the pieces of the data file, verified.

Memory is bounded by what the span table says comes out, whatever the bytes are.
"""

import hashlib
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import cast

import deflate
import zstandard
from isal import isal_zlib

from store.errors import DigestMismatch
from store.inflate import ZSTD_WINDOW
from store.spans import Codec, Piece, Span, SpanTable
from store.zstd_blocks import NotAsTold, ZstdBlocks

_UNSET = bytes(32)

_PIECE = 1 << 20

# What may stand behind contents in their gzip member: padding, and the headers of files that have
# no contents.
_HEADERS = 16 << 10

# CRC and length after a gzip member.
_TRAILER = 8

# isal's type stubs call this an instance.
_ISAL_ERROR = cast(type[Exception], isal_zlib.error)


class Inflater:
    """Inflates the spans of one layer. Safe to use from several threads.

    Args:
        table: the layer's.
        read_blob: gives the bytes of a span that is here, by its number; None if it is not.
    """

    def __init__(self, table: SpanTable, read_blob: Callable[[int], bytes | None]) -> None:
        self._table = table
        self._blocks = ZstdBlocks(table, read_blob)

    def pieces(self, number: int, blob: bytes | memoryview) -> Iterator[tuple[Piece, memoryview]]:
        """The pieces of a span with their bytes, each checked before it is given out.

        Args:
            number: of the span.
            blob: the span's bytes as the registry has them.

        Raises:
            DigestMismatch: the bytes are not those that the table was made for.
        """
        span = self._table.span(number)
        in_order = self._table.in_order
        if in_order:
            _check(span, blob, span.digest)
        if not span.count:
            return
        inflated = memoryview(self._inflate(number, span, blob))
        if len(inflated) != span.size:
            raise _wrong(span, f"inflate to {len(inflated)} bytes instead of {span.size}")
        if span.digest != _UNSET and not in_order:
            _check(span, inflated, span.digest)
        for piece in self._table.pieces_of(span):
            content = inflated[piece.inner : piece.inner + piece.size]
            if piece.digest != _UNSET:
                _check(span, content, piece.digest)
            elif span.digest == _UNSET:
                raise _wrong(span, "have no digest")
            yield piece, content

    def close(self) -> None:
        """Give back what is held in memory; it can go on nevertheless."""
        self._blocks.close()

    def _inflate(
        self, number: int, span: Span, blob: bytes | memoryview
    ) -> bytes | bytearray | memoryview:
        try:
            match self._table.codec:
                case Codec.GZIP:
                    return _gzip(blob, span.size)
                case Codec.ZSTD:
                    return _zstd(blob, span.size)
                case Codec.DEFLATE:
                    return inflate_deflate(blob, span, self._table.window(number))
                case Codec.PLAIN:
                    return bytes(blob[: span.size])
                case Codec.ZSTD_BLOCKS:
                    return self._blocks.inflate(number, blob)
        except (zlib.error, _ISAL_ERROR, zstandard.ZstdError, NotAsTold) as error:
            raise _wrong(span, f"can't be inflated ({error})") from None


def are_members(blob: bytes) -> bool:
    """Whether these are whole gzip members with right checksums; zeros between are padding."""
    while blob:
        member = zlib.decompressobj(wbits=31)
        try:
            while blob and not member.eof:
                member.decompress(blob, _PIECE)
                blob = member.unconsumed_tail
        except zlib.error:
            return False
        if not member.eof:
            return False
        blob = member.unused_data.lstrip(b"\0")
    return True


def _check(span: Span, data: bytes | memoryview, digest: bytes) -> None:
    found = hashlib.sha256(data).digest()
    if found != digest:
        raise _wrong(span, f"hash to sha256:{found.hex()} instead of sha256:{digest.hex()}")


def _wrong(span: Span, how: str) -> DigestMismatch:
    return DigestMismatch(
        f"the bytes {span.start} to {span.end} of the layer {how}; the registry or the way to it "
        "is damaged or hostile"
    )


def _gzip(blob: bytes | memoryview, size: int) -> bytes | memoryview:
    """Members one after another, until ``size`` bytes are out; zeros between are padding."""
    # Nearly always one, with little behind the contents. libdeflate inflates that in one go, while
    # isal asks for the interpreter's lock every few KiB, and waits for whoever has it.
    with suppress(deflate.DeflateError):
        whole = deflate.gzip_decompress(blob, size + _HEADERS)
        if len(whole) >= size:
            return memoryview(whole)[:size]
    member = isal_zlib.decompressobj(wbits=31)
    first = member.decompress(blob, size)
    if len(first) == size:  # nearly always, and then nothing is copied
        return first
    out = bytearray(first)
    while len(out) < size and (rest := member.unused_data.lstrip(b"\0")):
        member = isal_zlib.decompressobj(wbits=31)
        out += member.decompress(rest, size - len(out))
    return bytes(out)


def _zstd(blob: bytes | memoryview, size: int) -> bytes:
    decompressor = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW)
    with decompressor.stream_reader(bytes(blob), read_across_frames=True) as reader:
        out = bytearray()
        while len(out) < size and (piece := reader.read(size - len(out))):
            out += piece
    return bytes(out)


def inflate_deflate(blob: bytes | memoryview, span: Span, window: bytes) -> bytes:
    """From the middle of a deflate stream, which may be the middle of a byte; then on into the
    gzip members that follow. Raises isal's errors."""
    data = bytes(blob)
    if span.bits:
        before = 8 - span.bits  # bits of the byte that belong to the block before
        blocks = _EMPTY_BLOCKS[before]
        data = blocks[:-1] + bytes([blocks[-1] | span.lead >> before << before]) + data
    # isal needs half the time that zlib does.
    inflater = isal_zlib.decompressobj(-15, window) if window else isal_zlib.decompressobj(-15)
    inflated = inflater.decompress(data, span.size)
    if len(inflated) < span.size and inflater.eof:
        rest = inflater.unused_data[_TRAILER:].lstrip(b"\0")
        return inflated + bytes(_gzip(rest, span.size - len(inflated)))
    return inflated


def _empty_blocks(end: int) -> bytes:
    """Deflate blocks with nothing in them, whose last bit is the one before bit ``end`` (1 to 7)
    of a byte.

    Put before a block that begins there, they keep it where it is: the bytes can't be shifted,
    since stored blocks begin at whole ones. zlib has a call for this (inflatePrime), which
    Python does not offer.
    """
    bits = length = 0
    if end % 2:
        for value, width in _EMPTY_DYNAMIC:
            bits |= value << length
            length += width
    while length % 8 != end:
        bits |= 0b010 << length  # not the last, with the fixed codes, and the end of the block
        length += 10
    return bits.to_bytes(length // 8 + 1, "little")


# An empty block of 91 bits with codes of its own (RFC 1951, 3.2.7): values and their widths.
_EMPTY_DYNAMIC = (
    (0b100, 3),  # not the last, dynamic codes
    (0, 5),  # 257 literal and length codes
    (0, 5),  # 1 distance code
    (14, 4),  # 18 lengths of code length codes follow: 1 for 18 and for 1, 0 for all others
    (1 << 3 * 2 | 1 << 3 * 17, 3 * 18),
    (1 | (138 - 11) << 1, 8),  # 138 codes are not used
    (1 | (117 - 11) << 1, 8),  # nor are 117 more
    (0, 3),  # 255, 256 and the distance code have one bit
    (1, 1),  # 256, the end of the block
)

_EMPTY_BLOCKS = (b"", *map(_empty_blocks, range(1, 8)))
