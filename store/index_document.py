"""A layer's index as one document, to be given to other machines.

It is a zstd frame of blocks: each a u32 length, little endian, and that many bytes of msgpack.

    head      ``Head``
    entries   ``EntryBlock``s; an empty one is the last
    spans     arrays of ``Point``; an empty one is the last

Where contents lie in the data file follows from their sizes (``unpack.DataFile``), so only
where they lie in the archive has to be told.

A document from outside can say anything about a layer, but nothing that no layer could be:
each entry is one that the tar parser could have made, contents lie one after another in the
archive and spans in the blob, and memory is bounded by the limits for layers and by the
document's length. What a span holds is compared with its digest when it is read, and the whole
layer with the image's digests when it is complete.
"""

import io
import stat
import struct
from collections.abc import Iterable, Iterator
from typing import Annotated, BinaryIO, TypeVar

import msgspec
import zstandard

from store.cas import Digest
from store.entry_check import check_entry
from store.errors import InvalidLayer, LimitExceeded
from store.extents import Extent, Extents
from store.index import Entry
from store.layer_index import (
    FORMATS,
    SPACING,
    SPAN_MAX,
    LayerIndex,
    check_entries,
    check_span,
)
from store.manifest import SIZE_MAX, Descriptor
from store.spans import WINDOW, Codec, Span, SpanTable, SpanWriter
from store.tar_header import BLOCK, SEGMENTS_MAX
from store.tar_names import shown
from store.unpack import (
    LayerLimits,
    aligned,
    attributes_size,
    check_content,
    check_metadata,
    check_size,
)

VERSION = 1
_MAGIC = "ctrfs layer index"

# An index is 1 % of its layer or less, but for tiny ones. One that is larger than the layer
# is of no use, and above the second bound nobody should hold it in memory: that is the
# index of 50 GB.
_DOCUMENT_ROOM = 1 << 20
_DOCUMENT_MAX = 512 << 20

# All spans but the last are at least so long; those of this program are SPACING or more.
_SPAN_MIN = SPACING // 4

# Entries and points of a block: some 100 KB, or 2 MB with their windows.
_ENTRIES = 1024
_POINTS = 64
_BLOCK_MAX = 4 << 20
_BLOCK_WANTED = 1 << 20

# What a piece of a file takes of memory while the document is read, on top of its entry; counted
# like names and attributes.
_EXTENT_COST = 64

# Level 9 against 3: 9 % smaller, 0.05 s more for a layer of 74 MB.
_LEVEL = 9
_ZSTD_WINDOW = 8 << 20

_LENGTH = struct.Struct("<I")
_Count = Annotated[int, msgspec.Meta(ge=0, le=SIZE_MAX)]


class Head(msgspec.Struct, array_like=True):
    """What the document is about."""

    magic: str
    version: int
    blob: str
    blob_size: int
    diff_id: str
    codec: int


class Place(msgspec.Struct, array_like=True, gc=False):
    """Where a content is in the archive: ``gap`` bytes after the one before.

    ``segments`` of a sparse file, which is stored without its holes: (offset in the file, length).
    """

    gap: _Count
    segments: (
        Annotated[list[tuple[_Count, _Count]], msgspec.Meta(max_length=SEGMENTS_MAX)] | None
    ) = None


class EntryBlock(msgspec.Struct, array_like=True):
    """Entries, and the places of those of them that have contents. Offsets are left out (0)."""

    entries: Annotated[list[Entry], msgspec.Meta(max_length=_ENTRIES)]
    places: Annotated[list[Place], msgspec.Meta(max_length=_ENTRIES)]


class Point(msgspec.Struct, array_like=True, gc=False):
    """A ``Span`` as far as its neighbours don't tell it."""

    start: _Count
    size: Annotated[int, msgspec.Meta(ge=0, le=SPAN_MAX)]
    digest: Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
    bits: Annotated[int, msgspec.Meta(ge=0, le=7)] = 0
    lead: Annotated[int, msgspec.Meta(ge=0, le=255)] = 0
    window: Annotated[bytes, msgspec.Meta(max_length=WINDOW)] = b""


_Points = Annotated[list[Point], msgspec.Meta(max_length=_POINTS)]


# --- writing -----------------------------------------------------------------------------


def encode_index(
    entries: Iterable[Entry], table: SpanTable, blob: Digest, diff_id: Digest, file: BinaryIO
) -> None:
    """Write the document for a layer that this program indexed.

    Args:
        entries: of the layer, such as ``index.read_index`` gives.
        table: its spans.
        blob: its digest.
        file: gets the document.

    Raises:
        CorruptContent: the table is damaged.
        OSError: from the file.
    """
    compressor = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True)
    with compressor.stream_writer(file, closefd=False) as writer:
        blocks = _BlockWriter(writer)
        blocks.add(Head(_MAGIC, VERSION, blob, table.blob_size, diff_id, table.codec))
        for entry_block in _entry_blocks(entries, table):
            blocks.add(entry_block)
        blocks.add(EntryBlock([], []))
        for points in _point_blocks(table):
            blocks.add(points)
        blocks.add([])


class _BlockWriter:
    def __init__(self, file: zstandard.ZstdCompressionWriter) -> None:
        self._file = file
        self._encoder = msgspec.msgpack.Encoder()

    def add(self, block: object) -> None:
        encoded = self._encoder.encode(block)
        self._file.write(_LENGTH.pack(len(encoded)) + encoded)


def _point_blocks(table: SpanTable) -> Iterator[list[Point]]:
    points = []
    for number in range(table.spans):
        point = _point(table, number)
        if point.size or table.in_order:  # others fill gaps
            points.append(point)
        if len(points) == _POINTS:
            yield points
            points = []
    if points:
        yield points


def _point(table: SpanTable, number: int) -> Point:
    span = table.span(number)
    return Point(span.start, span.size, span.digest, span.bits, span.lead, table.window(number))


def _entry_blocks(entries: Iterable[Entry], table: SpanTable) -> Iterator[EntryBlock]:
    """The entries with their places, in blocks of at most about ``_BLOCK_WANTED`` bytes."""
    extents = _Ahead(_extents(table))
    block = EntryBlock([], [])
    size = end = 0
    for entry in entries:
        block.entries.append(msgspec.structs.replace(entry, offset=0))
        size += 32 + len(entry.path) + len(entry.link) + attributes_size(entry)
        if stat.S_ISREG(entry.mode) and entry.size:
            place, end = _place(entry, extents, end)
            block.places.append(place)
            size += 12 * len(place.segments or ())
        if len(block.entries) == _ENTRIES or size > _BLOCK_WANTED:
            yield block
            block = EntryBlock([], [])
            size = 0
    if block.entries:
        yield block


def _extents(table: SpanTable) -> Iterator[Extent]:
    """The table's pieces, by where they are in the archive; those of one content that meet at
    the border of two spans are one."""
    start = 0
    last = Extent(0, 0, 0)
    for number in range(table.spans):
        span = table.span(number)
        for piece in table.pieces_of(span):
            position = start + piece.inner
            if (last.position + last.size, last.target + last.size) == (position, piece.target):
                last.size += piece.size
                continue
            if last.size:
                yield last
            last = Extent(position, piece.target, piece.size)
        start += span.size
    if last.size:
        yield last


class _Ahead:
    """An iterator of extents whose next one can be looked at."""

    def __init__(self, extents: Iterator[Extent]) -> None:
        self._extents = extents
        self._next = next(extents, None)

    def before(self, target: int) -> Iterator[Extent]:
        """Take those that begin before this place in the data file."""
        while self._next is not None and self._next.target < target:
            yield self._next
            self._next = next(self._extents, None)


def _place(entry: Entry, extents: _Ahead, end: int) -> tuple[Place, int]:
    """Where the entry's content is, and where it ends."""
    found = list(extents.before(entry.offset + entry.size))
    if not found:
        return Place(0, []), end
    segments = [(extent.target - entry.offset, extent.size) for extent in found]
    gap = found[0].position - end
    end = found[-1].position + found[-1].size
    return Place(gap, None if segments == [(0, entry.size)] else segments), end


# --- reading -----------------------------------------------------------------------------


def decode_index(
    data: bytes, layer: Descriptor, diff_id: Digest, limits: LayerLimits
) -> LayerIndex:
    """The index in a document that anybody may have made.

    Args:
        data: the document.
        layer: that the index is wanted for.
        diff_id: of the layer.

    Raises:
        InvalidLayer, LimitExceeded, NotLazy: it is no index, for another layer, or none that a
            layer can have.
    """
    if len(data) > document_max(layer):
        raise LimitExceeded(f"the index of the layer {layer.digest} has {len(data)} bytes")
    reader = _DocumentReader(data, layer)
    head = reader.block(Head)
    wanted = (_MAGIC, VERSION, layer.digest, layer.size, diff_id)
    if (head.magic, head.version, head.blob, head.blob_size, head.diff_id) != wanted:
        raise reader.wrong("is for another layer or of another version")
    if head.codec not in FORMATS:
        raise reader.wrong("has an unknown codec")
    codec = Codec(head.codec)
    files = _Files(reader, limits)
    while (entry_block := reader.block(EntryBlock)).entries:
        files.take(entry_block)
    spans = _Spans(reader, codec, layer.size, limits)
    while points := reader.points():
        spans.take(points, files.extents)
    table = spans.finish(files.extents)
    reader.finish()
    return LayerIndex(FORMATS[codec], files.entries, table, aligned(files.end))


def document_max(layer: Descriptor) -> int:
    """How many bytes the document for a layer may have."""
    return min(layer.size + _DOCUMENT_ROOM, _DOCUMENT_MAX)


_T = TypeVar("_T")


class _DocumentReader:
    """Reads the blocks of a document."""

    def __init__(self, data: bytes, layer: Descriptor) -> None:
        self._layer = layer
        decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
        self._stream = decompressor.stream_reader(io.BytesIO(data))

    def wrong(self, how: str) -> InvalidLayer:
        return InvalidLayer(
            f"the index of the layer {self._layer.digest} {how}; do not trust who made it"
        )

    def block(self, kind: type[_T]) -> _T:
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size))
        if length > _BLOCK_MAX:
            raise self.wrong("is damaged")
        try:
            return msgspec.msgpack.decode(self._read(length), type=kind)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise self.wrong(f"is damaged ({error})") from None

    def points(self) -> list[Point]:
        return self.block(_Points)

    def finish(self) -> None:
        if self._more(1):
            raise self.wrong("goes on after its end")

    def _read(self, size: int) -> bytes:
        data = self._more(size)
        if len(data) < size:
            raise self.wrong("is cut off")
        return data

    def _more(self, size: int) -> bytes:
        parts = []
        try:
            while size and (part := self._stream.read(size)):
                parts.append(part)
                size -= len(part)
        except zstandard.ZstdError as error:
            raise self.wrong(f"is damaged ({error})") from None
        return b"".join(parts)


class _Files:
    """Checks entries and lays their contents out."""

    def __init__(self, reader: _DocumentReader, limits: LayerLimits) -> None:
        self._reader = reader
        self._limits = limits
        self.entries: list[Entry] = []
        self.extents = Extents()
        self.end = 0  # of the data file
        self._position = 0  # in the archive
        self._metadata = 0

    def take(self, block: EntryBlock) -> None:
        places = iter(block.places)
        for entry in block.entries:
            if entry.offset:
                raise self._reader.wrong("places a content itself")
            check_entry(entry)
            self._metadata += len(entry.path) + len(entry.link) + attributes_size(entry)
            check_metadata(self._metadata, self._limits)
            if stat.S_ISREG(entry.mode) and entry.size:
                self._lay(entry, next(places, None))
        if next(places, None) is not None:
            raise self._reader.wrong("has contents without files")
        self.entries += block.entries
        check_entries(len(self.entries), self._limits)

    def _lay(self, entry: Entry, place: Place | None) -> None:
        if place is None:
            raise self._reader.wrong(f"says not where the content of {shown(entry.path)} is")
        entry.offset = aligned(self.end)
        check_content(entry, self._limits)
        self.end = entry.offset + entry.size
        segments = [(0, entry.size)] if place.segments is None else place.segments
        if segments and place.gap < BLOCK:
            raise self._reader.wrong("has contents that overlap")
        self._position += place.gap
        self._metadata += _EXTENT_COST * len(segments)
        end = 0
        for offset, length in segments:
            if offset < end or not 0 < length <= entry.size - offset:
                raise self._reader.wrong(f"has a senseless sparse map for {shown(entry.path)}")
            self.extents.add(Extent(self._position, entry.offset + offset, length))
            self._position += length
            end = offset + length


class _Spans:
    """Checks points and makes a span table of them."""

    def __init__(
        self, reader: _DocumentReader, codec: Codec, blob_size: int, limits: LayerLimits
    ) -> None:
        self._reader = reader
        self._codec = codec
        self._blob_size = blob_size
        self._limits = limits
        self._writer = SpanWriter(codec, blob_size)
        self._held: Point | None = None  # until the next one says where it ends
        self._archive = 0  # where it begins in the archive

    def take(self, points: list[Point], extents: Extents) -> None:
        for point in points:
            self._add(extents, point.start, _SPAN_MIN)
            if self._held is None and point.start and self._codec == Codec.ZSTD_BLOCKS:
                raise self._reader.wrong("leaves out how the layer begins")
            if self._codec != Codec.DEFLATE and (point.bits or point.lead or point.window):
                raise self._reader.wrong("has bits of another codec")
            self._held = point

    def finish(self, extents: Extents) -> SpanWriter:
        self._add(extents, self._blob_size, 0)
        if extents:
            raise self._reader.wrong("has contents that are in no span")
        return self._writer

    def _add(self, extents: Extents, end: int, least: int) -> None:
        """Add the held point as a span that ends where the next one begins."""
        point = self._held
        if point is None:
            return
        if not any(point.digest):
            raise self._reader.wrong("has a span without a digest")
        plain = self._codec == Codec.PLAIN
        if point.size < least or (plain and point.size != end - point.start):
            raise self._reader.wrong(f"has a span of {point.size} bytes")
        span = Span(
            point.start, end, point.size, point.digest, point.bits, point.lead, point.window
        )
        check_span(span, self._codec)
        begins = self._archive
        self._archive += point.size
        check_size(self._archive, self._blob_size, self._limits)
        self._writer.add(span, extents.take(begins, self._archive))
