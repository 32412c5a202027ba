"""Spans of a layer that arrive together, and are kept together.

Most contents are small, and each write of one lets another thread of the process go first. So what
comes in one piece is verified span by span, and written at once.
"""

from types import TracebackType
from typing import Self

from store.erofs import BLOCK
from store.lazy import INFLATING, LazyLayer

# More is not held in memory before it is written.
_HELD_MAX = 256 << 10


class _Run:
    """Bytes that follow each other, but for gaps of zeros."""

    def __init__(self, start: int) -> None:
        self.start = self.end = start
        self._views: list[bytes | memoryview] = []

    def add(self, start: int, view: memoryview) -> None:
        if start > self.end:
            self._views.append(bytes(start - self.end))
        self._views.append(view)
        self.end = start + len(view)

    @property
    def bytes(self) -> memoryview:
        return memoryview(self._views[0] if len(self._views) == 1 else b"".join(self._views))


class Batch:
    """A context: what was added is kept at its end. One thread at a time.

    Args:
        layer: which takes the spans.
    """

    def __init__(self, layer: LazyLayer) -> None:
        self._layer = layer
        self._numbers: list[int] = []
        self._contents: list[_Run] = []
        self._blob: list[_Run] = []
        self._latest = -1  # the span that has the latest contents
        self._held = 0

    def __enter__(self) -> Self:
        INFLATING.acquire()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._keep()
        finally:
            INFLATING.release()

    def add(self, number: int, blob: memoryview) -> None:
        """Verify a span that is not here yet.

        Args:
            number: above that of the one before.
            blob: its bytes, which must not change as long as the context lasts.

        Raises:
            DigestMismatch: they are wrong; nothing of them is kept.
            StorageFailed: the disk is full or failed.
        """
        layer = self._layer
        contents = layer.verified(number, blob)
        if not layer.has(number):
            for piece, content in contents:
                self._add_content(number, piece.target, content)
        start = layer.table.range_of(number)[0]
        if not self._blob or self._blob[-1].end != start:
            self._blob.append(_Run(start))
        self._blob[-1].add(start, blob)
        self._numbers.append(number)
        self._held += len(blob)
        if self._held > _HELD_MAX:
            self._keep()

    def _add_content(self, number: int, target: int, content: memoryview) -> None:
        """Contents that follow each other are apart by less than a block, where nothing is: unless
        they are of spans between which there is another."""
        runs = self._contents
        if not runs or number > self._latest + 1 or target - runs[-1].end >= BLOCK:
            runs.append(_Run(target))
        runs[-1].add(target, content)
        self._latest = number
        self._held += len(content)

    def _keep(self) -> None:
        layer = self._layer
        for run in self._contents:
            layer.write_contents(run.start, run.bytes)
        for run in self._blob:
            layer.take_raw(run.start, run.bytes)
        layer.arrived(*self._numbers)
        self._numbers.clear()
        self._contents.clear()
        self._blob.clear()
        self._held = 0
