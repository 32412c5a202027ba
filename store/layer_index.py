"""An index that makes an ordinary layer lazy: its files, and places to enter the blob at.

gzip, zstd and tar layers say nowhere where the bytes of a file are. Whoever reads such a layer
once can write that down: for tar any place will do; for zstd the beginnings of frames; for
gzip the beginnings of deflate blocks, with the 32 KiB of history that each needs. Long zstd
frames can be entered nowhere; they are inflated block by block, as far as somebody reads.
"""

import ctypes
import hashlib
import os
from collections import deque
from collections.abc import Callable
from typing import BinaryIO

import msgspec
import zstandard

from store.cas import Digest
from store.errors import InvalidLayer, LimitExceeded, NotLazy, PullCancelled
from store.extents import TarLayout
from store.gzip_blocks import Boundary, GzipBlocks
from store.index import Entry
from store.inflate import ZSTD_WINDOW, Compression, compression_of
from store.spans import WINDOW, Codec, Span, SpanWriter
from store.sparse_window import sparse_window
from store.unpack import (
    LayerLimits,
    attributes_size,
    check_content,
    check_diff_id,
    check_metadata,
    check_size,
)
from store.zstd_frames import ZstdPart, zstd_parts

# A span ends at the first possible place after so many inflated bytes. Long spans cost bytes that
# nobody asked for, short ones windows. Measured with 229 MB of Debian (74 MB gzip), and the 18
# files that Python reads at its start (0.3 MB):
#
#     spacing       0.5   1     2     4    MiB
#     spans read    2.2   3.1   4.6   8.1  MB
#     windows       0.7   0.4   0.2   0.1  MB, that another machine has to fetch first
#     indexing      1.9   1.5   1.3   1.2  s of one core
SPACING = 1 << 20

# What a span may inflate to. Whoever reads one byte of it needs memory and time for all;
# compressors make no deflate block above 8 MiB (zlib 4, zopfli 1).
SPAN_MAX = 32 << 20

_BUFFER = 1 << 20

_LARGE = 20_000


class LayerIndex(msgspec.Struct, frozen=True):
    """What lazy loading needs to know of a layer.

    ``format`` is one of "gzip+index", "zstd+index", "tar+index". ``entries`` are those of the
    archive, ``spans`` is complete. ``data_size`` is that of the data file, in bytes.
    """

    format: str
    entries: list[Entry]
    spans: SpanWriter
    data_size: int
    first_size: int = 0  # nobody says what is wanted first

    @property
    def is_large(self) -> bool:
        """There are so many files that making an image of them takes long."""
        return len(self.entries) > _LARGE


def build_index(
    blob: BinaryIO,
    blob_size: int,
    media_type: str,
    diff_id: Digest,
    limits: LayerLimits,
    cancelled: Callable[[], bool],
) -> LayerIndex:
    """Read a blob once and index it, in memory for some buffers and the index.

    Args:
        blob: a file, unbuffered, at its beginning.
        blob_size: in bytes.
        media_type: of the layer.

    Raises:
        NotLazy: it has too few places to enter it at.
        InvalidLayer, LimitExceeded, UnsupportedMediaType: see their sentences.
        DigestMismatch: the archive is not the one that diff_id names.
        PullCancelled: ``cancelled()`` said so; it is asked for every MiB.
        OSError: from the file.
    """
    first = blob.read(4)
    blob.seek(0)

    def begin(codec: Codec) -> "_Reading":
        return _Reading(codec, blob_size, blob.fileno(), limits, cancelled)

    match compression_of(first, media_type):
        case Compression.GZIP:
            reading = begin(Codec.DEFLATE)
            _read_gzip(blob, reading)
        case Compression.ZSTD:
            try:
                reading = begin(Codec.ZSTD)
                _read_zstd(blob, blob_size, reading)
            except NotLazy:  # for its long frames
                reading = begin(Codec.ZSTD_BLOCKS)
                _read_zstd(blob, blob_size, reading)
        case Compression.NONE:
            reading = begin(Codec.PLAIN)
            _read_plain(blob, reading)
    return reading.finish(diff_id)


FORMATS = {
    Codec.DEFLATE: "gzip+index",
    Codec.ZSTD: "zstd+index",
    Codec.ZSTD_BLOCKS: "zstd+index",
    Codec.PLAIN: "tar+index",
}


def _read_gzip(blob: BinaryIO, reading: "_Reading") -> None:
    with GzipBlocks(blob) as blocks:
        while not blocks.ended:
            address, room = reading.memory()
            wanted = reading.until_cut
            count, boundary = blocks.inflate(address, min(room, wanted or room), not wanted)
            reading.put(count, blocks.consumed)
            if boundary is not None:
                reading.cut(_span_at(boundary, reading))


def _span_at(boundary: Boundary, reading: "_Reading") -> Span:
    window = b"" if boundary.first else reading.window()
    return Span(boundary.start, 0, bits=boundary.bits, lead=boundary.lead, window=window)


def _read_zstd(blob: BinaryIO, blob_size: int, reading: "_Reading") -> None:
    decompressor = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW)
    stream = decompressor.decompressobj(read_across_frames=True)
    for part in zstd_parts(blob.fileno(), blob_size):
        if not reading.until_cut and (part.opens or reading.codec == Codec.ZSTD_BLOCKS):
            reading.cut(Span(part.start, 0))
        reading.reach(part.end)
        if part.content:
            reading.add(_inflate(stream, blob, part), part.end)


def _inflate(stream: "zstandard.ZstdDecompressionObj", blob: BinaryIO, part: ZstdPart) -> bytes:
    try:
        return stream.decompress(os.pread(blob.fileno(), part.end - part.start, part.start))
    except zstandard.ZstdError as error:
        raise InvalidLayer(
            f"the layer's zstd stream is damaged within its first {part.end} bytes ({error}); "
            "the image has to be built or pushed again"
        ) from error


def _read_plain(blob: BinaryIO, reading: "_Reading") -> None:
    position = 0
    while count := blob.readinto(reading.free()):  # type: ignore[attr-defined]
        if not reading.until_cut:
            reading.cut(Span(position, 0))
        position += count
        reading.put(count, position)


class _Reading:
    """Takes the archive's bytes in order; hashes and parses them and makes the spans.

    The bytes are put into its buffer, behind the history of what was there before.
    """

    def __init__(
        self,
        codec: Codec,
        blob_size: int,
        fd: int,
        limits: LayerLimits,
        cancelled: Callable[[], bool],
    ) -> None:
        self._limits = limits
        self._cancelled = cancelled
        self._buffer = (ctypes.c_ubyte * (WINDOW + _BUFFER))()
        self._view = memoryview(self._buffer).cast("B")
        self._address = ctypes.addressof(self._buffer)
        self._used = WINDOW
        self._total = 0
        self._archive = hashlib.sha256()
        self._spans = _Spans(codec, blob_size, fd)
        self._layout = TarLayout()
        self._entries: list[Entry] = []
        self._metadata = 0
        self.codec = codec

    def memory(self) -> tuple[int, int]:
        """Address and size of what is free of the buffer."""
        return self._address + self._used, len(self._view) - self._used

    def free(self) -> memoryview:
        """What is free of the buffer; never empty."""
        return self._view[self._used :]

    def window(self) -> bytes:
        """The history before the bytes that come next."""
        return bytes(self._view[self._used - min(WINDOW, self._total) : self._used])

    @property
    def until_cut(self) -> int:
        """How many bytes should come before the next span begins."""
        return max(0, SPACING - self._spans.size) if self._spans.open else 0

    def cut(self, span: Span) -> None:
        """A span begins with the next byte."""
        self._spans.begin(span)

    def reach(self, end: int) -> None:
        """So much of the blob has been read, which may have given nothing.

        Raises:
            NotLazy: the current span takes too much of it.
            PullCancelled: see ``build_index``.
        """
        self._check_cancelled()
        self._spans.reach(end)

    def add(self, data: bytes, consumed: int) -> None:
        """These bytes come next; as ``put``."""
        rest = memoryview(data)
        while rest:
            room = self.free()[: len(rest)]
            room[:] = rest[: len(room)]
            rest = rest[len(room) :]
            self.put(len(room), consumed)

    def put(self, count: int, consumed: int) -> None:
        """``count`` bytes have been put into the buffer, ``consumed`` of the blob were read."""
        new = self._view[self._used : self._used + count]
        self._used += count
        self._total += count
        self._spans.take(new)
        if self._used == len(self._view):
            check_size(self._total, consumed, self._limits)
            self._flush()

    def finish(self, diff_id: Digest) -> LayerIndex:
        """All bytes have come."""
        self._flush()
        data_size = self._layout.finish()
        spans = self._spans.finish(self._layout)
        check_diff_id(Digest(f"sha256:{self._archive.hexdigest()}"), diff_id)
        return LayerIndex(FORMATS[self.codec], self._entries, spans, data_size)

    def _flush(self) -> None:
        self._check_cancelled()
        view = self._view[WINDOW : self._used]
        self._archive.update(view)
        for entry in self._layout.feed(view):
            self._check(entry)
        self._spans.settle(self._layout)
        self._view[:WINDOW] = self._view[self._used - WINDOW : self._used]
        self._used = WINDOW

    def _check_cancelled(self) -> None:
        if self._cancelled():
            raise PullCancelled("the pull was cancelled")

    def _check(self, entry: Entry) -> None:
        self._entries.append(entry)
        self._metadata += len(entry.path) + len(entry.link) + attributes_size(entry)
        check_metadata(self._metadata, self._limits)
        check_content(entry, self._limits)
        check_entries(len(self._entries), self._limits)


def check_entries(count: int, limits: LayerLimits) -> None:
    """Raises LimitExceeded: so many entries are too many."""
    if count > limits.layer_entries:
        raise LimitExceeded(
            f"the layer has more than {limits.layer_entries} files and directories; raise "
            "layer_entries in the store's configuration if you trust the image"
        )


def check_span(span: Span, codec: Codec) -> None:
    """Raises NotLazy: the span takes too much memory to read."""
    if span.end - span.start > SPAN_MAX or span.size > SPAN_MAX:
        raise _too_long(codec)


def _too_long(codec: Codec) -> NotLazy:
    parts = "deflate blocks" if codec == Codec.DEFLATE else "zstd frames"
    return NotLazy(
        f"the layer has {parts} of more than {SPAN_MAX >> 20} MiB, which can only be inflated from "
        "their beginning; `ctrfs convert` makes an image that can be loaded lazily"
    )


class _Spans:
    """Makes spans of the bytes between one cut and the next.

    Their pieces are known later than their bytes, when these have been parsed.
    """

    def __init__(self, codec: Codec, blob_size: int, fd: int) -> None:
        self._codec = codec
        self._blob_size = blob_size
        self._fd = fd
        self._writer = SpanWriter(codec, blob_size)
        self._current: Span | None = None
        self._digest = hashlib.sha256()
        self.size = 0
        self._ended: deque[Span] = deque()
        self._settled = 0  # where the first of these begins in the archive

    @property
    def open(self) -> bool:
        """Whether a span has begun."""
        return self._current is not None

    def begin(self, span: Span) -> None:
        """End the current span where this one begins."""
        self._end(span.start)
        self._current = span

    def take(self, view: memoryview) -> None:
        """The next bytes of the current span. Raises NotLazy when they are too many."""
        if self._codec != Codec.ZSTD_BLOCKS:
            self._digest.update(view)
        self.size += len(view)
        if self.size > SPAN_MAX:
            raise _too_long(self._codec)

    def reach(self, end: int) -> None:
        """The current span goes on at least to ``end``. Raises NotLazy when that is too far."""
        if self._current is not None and end - self._current.start > SPAN_MAX:
            raise _too_long(self._codec)

    def settle(self, layout: TarLayout) -> None:
        """The bytes of all spans that have ended are parsed: give them their pieces."""
        while self._ended:
            span = self._ended.popleft()
            end = self._settled + span.size
            pieces = layout.extents.take(self._settled, end)
            span.window = sparse_window(span, self._fd) if pieces else b""
            check_span(span, self._codec)
            if self._codec == Codec.ZSTD_BLOCKS:
                span.digest = self._digest_of_blob(span)
            self._writer.add(span, pieces)
            self._settled = end

    def _digest_of_blob(self, span: Span) -> bytes:
        return hashlib.sha256(os.pread(self._fd, span.end - span.start, span.start)).digest()

    def finish(self, layout: TarLayout) -> SpanWriter:
        """The blob ends."""
        self._end(self._blob_size)
        self.settle(layout)
        return self._writer

    def _end(self, end: int) -> None:
        span = self._current
        if span is not None:
            span.end, span.size, span.digest = end, self.size, self._digest.digest()
            self._ended.append(span)
        self._digest = hashlib.sha256()
        self.size = 0
