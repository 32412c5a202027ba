"""From the bytes of one span to the pieces of the data file, verified.

Memory is bounded by what the span table says comes out, whatever the bytes are.
"""

import hashlib
import zlib
from collections.abc import Iterator
from typing import cast

import zstandard
from isal import isal_zlib

from store.errors import DigestMismatch
from store.inflate import ZSTD_WINDOW
from store.spans import Codec, Piece, Span, SpanTable

_UNSET = bytes(32)

# isal's type stubs call this an instance.
_ISAL_ERROR = cast(type[Exception], isal_zlib.error)


def inflate_pieces(
    table: SpanTable, number: int, blob: bytes | memoryview
) -> Iterator[tuple[Piece, memoryview]]:
    """The pieces of a span with their bytes, each checked before it is given out.

    Args:
        table: the layer's.
        number: of the span.
        blob: the span's bytes as the registry has them.

    Raises:
        DigestMismatch: the bytes are not those that the table was made for.
    """
    span = table.span(number)
    if not span.count:
        return
    inflated = memoryview(_inflate(table, number, span, blob))
    if len(inflated) != span.size:
        raise _wrong(span, f"inflate to {len(inflated)} bytes instead of {span.size}")
    if span.digest != _UNSET:
        _check(span, inflated, span.digest)
    for piece in table.pieces_of(span):
        content = inflated[piece.inner : piece.inner + piece.size]
        if piece.digest != _UNSET:
            _check(span, content, piece.digest)
        elif span.digest == _UNSET:
            raise _wrong(span, "have no digest")
        yield piece, content


def _check(span: Span, data: memoryview, digest: bytes) -> None:
    found = hashlib.sha256(data).digest()
    if found != digest:
        raise _wrong(span, f"hash to sha256:{found.hex()} instead of sha256:{digest.hex()}")


def _wrong(span: Span, how: str) -> DigestMismatch:
    return DigestMismatch(
        f"the bytes {span.start} to {span.end} of the layer {how}; the registry or the way to it "
        "is damaged or hostile"
    )


def _inflate(table: SpanTable, number: int, span: Span, blob: bytes | memoryview) -> bytes:
    try:
        match table.codec:
            case Codec.GZIP:
                return _gzip(blob, span.size)
            case Codec.ZSTD:
                return _zstd(blob, span.size)
            case Codec.DEFLATE:
                return _deflate(blob, span, table.window(number))
            case Codec.PLAIN:
                return bytes(blob[: span.size])
    except (zlib.error, _ISAL_ERROR, zstandard.ZstdError) as error:
        raise _wrong(span, f"can't be inflated ({error})") from None


def _gzip(blob: bytes | memoryview, size: int) -> bytes:
    """Members one after another, until ``size`` bytes are out."""
    out = bytearray()
    rest = bytes(blob)
    while rest and len(out) < size:
        member = isal_zlib.decompressobj(wbits=31)
        out += member.decompress(rest, size - len(out))
        rest = member.unused_data
    return bytes(out)


def _zstd(blob: bytes | memoryview, size: int) -> bytes:
    decompressor = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW)
    with decompressor.stream_reader(bytes(blob), read_across_frames=True) as reader:
        out = bytearray()
        while len(out) < size and (piece := reader.read(size - len(out))):
            out += piece
    return bytes(out)


def _deflate(blob: bytes | memoryview, span: Span, window: bytes) -> bytes:
    """From the middle of a deflate stream, which may be the middle of a byte.

    zlib has a call to put bits in front (inflatePrime) that Python does not offer: the whole
    span is shifted instead, which takes 1 ms for 4 MiB.
    """
    data = bytes(blob)
    if span.bits:
        whole = int.from_bytes(bytes([span.lead]) + data, "little") >> (8 - span.bits)
        data = whole.to_bytes(len(data) + 1, "little")
    inflater = zlib.decompressobj(-15, zdict=window) if window else zlib.decompressobj(-15)
    return inflater.decompress(data, span.size)
