"""Which bytes of a layer's tar archive are which bytes of its data file."""

from collections import deque
from collections.abc import Iterator

import msgspec

from store.index import Entry
from store.spans import Piece
from store.tar import TarParser
from store.unpack import aligned


class Extent(msgspec.Struct, gc=False):
    """``size`` bytes at ``position`` in the archive are those at ``target`` in the data file."""

    position: int
    target: int
    size: int


class Extents:
    """Extents in order, until pieces are made of them."""

    def __init__(self) -> None:
        self._extents: deque[Extent] = deque()

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._extents)

    def add(self, extent: Extent) -> None:
        """Append one; it lies after the others, in the archive and in the data file."""
        last = self._extents[-1] if self._extents else Extent(0, 0, 0)
        together = last.position + last.size, last.target + last.size
        if last.size and together == (extent.position, extent.target):
            last.size += extent.size
        else:
            self._extents.append(extent)

    def take(self, start: int, end: int) -> list[Piece]:
        """The pieces of a span that holds the archive's bytes ``start`` to ``end``.

        What lies before ``end`` is forgotten.
        """
        pieces = []
        while self._extents and self._extents[0].position < end:
            extent = self._extents[0]
            size = min(extent.size, end - extent.position)
            pieces.append(Piece(extent.target, size, extent.position - start))
            if size == extent.size:
                self._extents.popleft()
            else:
                extent.position += size
                extent.target += size
                extent.size -= size
        return pieces


class Places:
    """A ``tar.Contents`` that knows where ``unpack.DataFile`` puts each content.

    Attributes:
        end: of the latest content in the data file.
        target: where the next bytes of it go.
    """

    def __init__(self) -> None:
        self.end = 0
        self.target = 0

    def begin(self, entry: Entry) -> int:
        """See ``tar.Contents``."""
        self.target = aligned(self.end)
        self.end = self.target + entry.size
        return self.target

    def seek(self, position: int) -> None:
        """See ``tar.Contents``."""
        self.target = position


class TarLayout(Places):
    """Parses an archive for where the contents of its files would go in a data file."""

    def __init__(self) -> None:
        super().__init__()
        self.extents = Extents()
        self._parser = TarParser(self)

    def feed(self, view: memoryview) -> Iterator[Entry]:
        """See ``TarParser.feed``."""
        return self._parser.feed(view)

    def finish(self) -> int:
        """See ``TarParser.finish``; the size of the data file."""
        self._parser.finish()
        return aligned(self.end)

    def write(self, view: memoryview) -> None:
        """See ``tar.Contents``."""
        self.extents.add(Extent(self._parser.position, self.target, len(view)))
        self.target += len(view)
