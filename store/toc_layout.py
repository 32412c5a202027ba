"""Where the contents that a table of contents names go in the data file, and their spans.

The data file has the contents in the order in which they are in the blob, so that spans which
follow each other there fill ranges which follow each other here.
"""

import stat
from itertools import starmap

from store.errors import InvalidLayer, NotLazy
from store.index import Entry
from store.spans import Codec, Piece, Span, SpanWriter
from store.tar_entry import REBUILD
from store.tar_names import shown
from store.toc_json import Item
from store.unpack import LayerLimits, check_size

# What one span may inflate to: whoever reads a byte of it holds all of it in memory, and waits
# for all of it. eStargz has 4 MiB unless told otherwise, zstd:chunked less.
SPAN_MAX = 64 << 20

_ZEROS = "zeros"
_DIGEST_PREFIX = "sha256:"
_DIGEST_SIZE = 32


class Layout:
    """Takes files with their chunks in the table's order, which must be the blob's.

    Args:
        codec: how chunks are compressed.
        end: where in the blob the files' contents end, in bytes.
        blob_size: in bytes.

    Every method raises InvalidLayer for chunks that can't be as the table says, LimitExceeded
    for too large files, and NotLazy when a chunk can't be verified, is too large to be held in
    memory, or stands elsewhere in the table than in the blob.
    """

    def __init__(self, codec: Codec, end: int, blob_size: int, limits: LayerLimits) -> None:
        self._end = end
        self._blob_size = blob_size
        self._limits = limits
        self._writer = SpanWriter(codec, blob_size)
        self._total = 0  # what comes out of all spans
        # The file whose chunks come now, its place, and how many of its bytes they have.
        self._name = ""
        self._path = b""
        self._target = 0
        self._wanted = True
        self._size = 0
        self._done = 0
        # The span whose chunks come now: what they have of it, and how much somebody wants.
        self._start = 0
        self._inner_end = 0
        self._span_size = 0
        self._pieces: list[tuple[int, int, int, bytes]] = []  # as the fields of Piece

    def add(self, entry: Entry, item: Item, *, wanted: bool = True) -> int:
        """Begin with the next entry, which has its place; chunks that follow belong to it.

        Args:
            wanted: False for a file that the image does not have.

        Returns:
            The place in the blob of the chunk that the item has, 0 if it has none.
        """
        if self._done != self._size:
            raise self._uneven()
        self._name = item.name
        self._path = entry.path
        self._done = self._size = 0
        if not entry.size or not stat.S_ISREG(entry.mode):
            return 0
        self._size = entry.size
        self._wanted = wanted
        if wanted:
            self._target = entry.offset
        self._take(item)
        return item.offset

    def add_chunk(self, item: Item) -> None:
        """A further chunk of the latest entry."""
        if item.name not in ("", self._name):
            raise InvalidLayer(
                f"a chunk of {shown(item.name.encode())} in the layer's table of contents does not "
                f"follow its file; {REBUILD}"
            )
        self._take(item)

    def finish(self) -> SpanWriter:
        """All spans."""
        if self._done != self._size:
            raise self._uneven()
        self._end_span(self._end)
        check_size(self._total, self._blob_size, self._limits)
        return self._writer

    def _take(self, item: Item) -> None:
        done = self._done
        left = self._size - done
        size = item.chunk_size or left
        if item.chunk_offset != done or not 0 < size <= left:
            raise self._uneven()
        start, inner = item.offset, item.inner_offset
        if not 0 < start < self._end or inner < 0:
            raise InvalidLayer(
                f"{shown(self._path)} in the layer's table of contents has a chunk at "
                f"{start}:{inner}, which is not among the {self._end} bytes of contents; "
                "do not trust this image"
            )
        if start != self._start:
            self._end_span(start)
        elif inner < self._inner_end:
            raise InvalidLayer(
                f"{shown(self._path)} in the layer's table of contents has a chunk at "
                f"{start}:{inner}, which overlaps another; do not trust this image"
            )
        end = self._inner_end = inner + size
        self._done = done + size
        if not self._wanted or item.chunk_type == _ZEROS:
            return
        if end > SPAN_MAX:
            raise NotLazy(
                f"{shown(self._path)} in the layer has a chunk that can be inflated only "
                f"together with {end} bytes; at most {SPAN_MAX} are held in memory"
            )
        digest = self._digest(item.chunk_digest or (item.digest if size == self._size else ""))
        self._span_size = end
        self._total += size
        self._pieces.append((self._target + done, size, inner, digest))

    def _end_span(self, next_start: int) -> None:
        """Write the span that ends here, and begin the next."""
        start = self._start
        if next_start < start:
            raise NotLazy(
                f"{shown(self._path)} in the layer's table of contents stands elsewhere than in "
                "the blob"
            )
        if self._pieces:
            size = self._span_size
            end = min(next_start, start + _compressed_max(size))
            if len(self._pieces) == 1:
                target, _, inner, digest = self._pieces[0]
                self._writer.add_content(start, end, size, target, inner, digest)
            else:
                self._writer.add(Span(start, end, size), list(starmap(Piece, self._pieces)))
            self._pieces.clear()
        self._start = next_start

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


def _compressed_max(size: int) -> int:
    """More than any compressor needs for ``size`` bytes.

    Deflate's own codes can lengthen data by an eighth, stored blocks by less. What comes after
    that, only headers, needs not be fetched and held by whoever wants the contents.
    """
    return size + size // 4 + (64 << 10)
