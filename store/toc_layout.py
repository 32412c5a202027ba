"""Where the contents that a table of contents names go in the data file, and their spans.

The data file has the contents in the order in which they are in the blob, so that spans which
follow each other there fill ranges which follow each other here.
"""

import stat

import msgspec

from store.errors import InvalidLayer, NotLazy
from store.index import Entry
from store.spans import Piece, Span, SpanWriter
from store.tar_header import REBUILD
from store.tar_names import shown
from store.toc_json import Item, RawToc
from store.unpack import LayerLimits, aligned, check_content, check_size

# What one span may inflate to: whoever reads a byte of it holds all of it in memory, and waits
# for all of it. eStargz has 4 MiB unless told otherwise, zstd:chunked less.
SPAN_MAX = 64 << 20

_ZEROS = "zeros"
_DIGEST_PREFIX = "sha256:"
_DIGEST_SIZE = 32


class _Chunk(msgspec.Struct, gc=False):
    """``size`` bytes at ``at`` in a file, ``inner`` bytes into what is at ``start`` in the blob.

    Without ``digest`` they are zeros. ``entry`` is None when nobody wants them.
    """

    start: int
    inner: int
    at: int
    size: int
    digest: bytes
    entry: Entry | None


class Layout:
    """Takes files with their chunks in the table's order.

    Args:
        toc: the table.
        blob_size: in bytes.

    Every method raises InvalidLayer for chunks that can't be as the table says, LimitExceeded
    for too large files, and NotLazy when a chunk can't be verified or is too large to be held
    in memory.
    """

    def __init__(self, toc: RawToc, blob_size: int, limits: LayerLimits) -> None:
        self._end = toc.end
        self._blob_size = blob_size
        self._limits = limits
        self._writer = SpanWriter(toc.codec, blob_size)
        self._chunks: list[_Chunk] = []
        self._sorted = True
        self._last = (0, 0)  # place of the latest chunk in the blob
        # The file whose chunks come now, and how many of its bytes they have.
        self._name = ""
        self._path = b""
        self._size = 0
        self._done = 0
        self._entry: Entry | None = None

    def add(self, entry: Entry, item: Item, *, wanted: bool) -> None:
        """Begin with the next entry; chunks that follow belong to it.

        Args:
            wanted: False for a file that the image does not have.
        """
        self.close()
        self._name = item.name
        self._path = entry.path
        self._size = entry.size if stat.S_ISREG(entry.mode) else 0
        self._done = 0
        self._entry = entry if wanted else None
        if self._size:
            self._take(item)

    def add_chunk(self, item: Item) -> None:
        """A further chunk of the latest entry."""
        if item.name not in ("", self._name):
            raise InvalidLayer(
                f"a chunk of {shown(item.name.encode())} in the layer's table of contents does not "
                f"follow its file; {REBUILD}"
            )
        self._take(item)

    def close(self) -> None:
        """The latest entry has no more chunks."""
        if self._done != self._size:
            raise self._uneven()

    def finish(self) -> tuple[SpanWriter, int]:
        """Give all contents their places; the spans, and the data file's size."""
        self.close()
        if not self._sorted:
            self._chunks.sort(key=lambda chunk: (chunk.start, chunk.inner))
        size = self._place()
        self._add_spans()
        return self._writer, size

    def _take(self, item: Item) -> None:
        left = self._size - self._done
        size = item.chunk_size or left
        if item.chunk_offset != self._done or not 0 < size <= left:
            raise self._uneven()
        if not 0 < item.offset < self._end or item.inner_offset < 0:
            raise InvalidLayer(
                f"{shown(self._path)} in the layer's table of contents has a chunk at "
                f"{item.offset}:{item.inner_offset}, which is not among the {self._end} bytes of "
                "contents; do not trust this image"
            )
        digest = b""
        if item.chunk_type != _ZEROS:
            whole = size == self._size
            digest = self._digest(item.chunk_digest or (item.digest if whole else ""))
            if item.inner_offset + size > SPAN_MAX:
                raise NotLazy(
                    f"{shown(self._path)} in the layer has a chunk that can be inflated only "
                    f"together with {item.inner_offset + size} bytes; at most {SPAN_MAX} are "
                    "held in memory"
                )
        place = item.offset, item.inner_offset
        self._sorted = self._sorted and place > self._last
        self._last = place
        self._chunks.append(
            _Chunk(item.offset, item.inner_offset, self._done, size, digest, self._entry)
        )
        self._done += size

    def _uneven(self) -> InvalidLayer:
        return InvalidLayer(
            f"the chunks of {shown(self._path)} in the layer's table of contents do not add up to "
            f"its {self._size} bytes; do not trust this image"
        )

    def _digest(self, text: str) -> bytes:
        if not text.startswith(_DIGEST_PREFIX):
            raise NotLazy(
                f"the layer's table of contents has no SHA-256 digest for a chunk of "
                f"{shown(self._path)}, without which it can't be verified"
            )
        try:
            digest = bytes.fromhex(text[len(_DIGEST_PREFIX) :])
        except ValueError:
            digest = b""
        if len(digest) != _DIGEST_SIZE:
            raise InvalidLayer(
                f"the layer's table of contents has a digest for a chunk of {shown(self._path)} "
                f"that is none; {REBUILD}"
            )
        return digest

    def _place(self) -> int:
        """Check the chunks' order and give files offsets; the data file's size."""
        end = total = 0
        start = inner_end = 0  # of the chunk before
        entry: Entry | None = None
        done = 0
        for chunk in self._chunks:
            if chunk.start == start and chunk.inner < inner_end:
                raise InvalidLayer(
                    f"two chunks in the layer's table of contents overlap at {chunk.start} in the "
                    "blob; do not trust this image"
                )
            start, inner_end = chunk.start, chunk.inner + chunk.size
            if not chunk.at:
                entry, done = chunk.entry, 0
                if entry is not None:
                    entry.offset = aligned(end)
                    end = entry.offset + entry.size
                    check_content(entry, self._limits)
            if chunk.entry is not entry or chunk.at != done:
                raise InvalidLayer(
                    f"the chunks of {shown((chunk.entry or entry or _NOBODY).path)} in the layer's "
                    f"table of contents are not one after another in the blob; {REBUILD}"
                )
            done += chunk.size
            if chunk.digest:
                total += chunk.size
        check_size(total, self._blob_size, self._limits)
        return aligned(end)

    def _add_spans(self) -> None:
        """One for all chunks with the same start, up to the next start."""
        pieces: list[Piece] = []
        start = size = 0
        for chunk in self._chunks:
            if chunk.start != start:
                self._add_span(start, chunk.start, size, pieces)
                start, size, pieces = chunk.start, 0, []
            if chunk.digest and chunk.entry is not None:
                target = chunk.entry.offset + chunk.at
                pieces.append(Piece(target, chunk.size, chunk.inner, chunk.digest))
                size = chunk.inner + chunk.size
        self._add_span(start, self._end, size, pieces)

    def _add_span(self, start: int, end: int, size: int, pieces: list[Piece]) -> None:
        if pieces:
            self._writer.add(Span(start, min(end, start + _compressed_max(size)), size), pieces)


_NOBODY = Entry(b"", 0)


def _compressed_max(size: int) -> int:
    """More than any compressor needs for ``size`` bytes.

    Deflate's own codes can lengthen data by an eighth, stored blocks by less. What comes after
    that, only headers, needs not be fetched and held by whoever wants the contents.
    """
    return size + size // 4 + (64 << 10)
