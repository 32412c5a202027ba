"""The answer to one request for spans, taken in as it comes."""

from collections.abc import Callable

from store.batch import Batch
from store.errors import ConnectionLost, DigestMismatch
from store.lazy import LazyLayer
from store.source import BlobStream


class Intake:
    """Verifies and keeps span by span, in a thread.

    A registry that can't begin in the middle sends the whole blob: then all of it is taken.

    Args:
        layer: where the bytes go.
        stream: the answer, which begins at or before the first span.
        wanted: the spans that were asked for.
        landed: told which spans can be read now.
        promise: told of spans that come unasked for, before they do.
        moved: called whenever bytes have come.
    """

    def __init__(
        self,
        layer: LazyLayer,
        stream: BlobStream,
        wanted: range,
        landed: Callable[[list[int]], None],
        promise: Callable[[range], None],
        moved: Callable[[], None],
    ) -> None:
        table = layer.table
        self._layer = layer
        self._stream = stream
        self._landed = landed
        self._moved = moved
        self._number = table.span_at(stream.offset)
        asked = stream.offset == table.range_of(wanted[0])[0]
        self._stop = wanted[-1] + 1 if asked else table.spans
        if not asked:
            promise(range(self._number, table.spans))
        self._buffer = bytearray()
        self._offset = stream.offset  # of what comes next in the blob
        self._error: DigestMismatch | None = None

    def run(self) -> None:
        """Raises StoreError: the first wrong span, or a stream that ended early."""
        while self._number < self._stop:
            piece = self._stream.read()
            if not piece:
                raise self._error or ConnectionLost(
                    f"the registry sent less than it was asked for of "
                    f"{self._layer.record.blob.digest}; try again"
                )
            self._moved()
            self._take(memoryview(piece))
        if self._error:
            raise self._error

    def _take(self, piece: memoryview) -> None:
        arrived: list[int] = []
        with Batch(self._layer) as batch:
            while piece and self._number < self._stop:
                end = self._layer.table.range_of(self._number)[1]
                part = piece[: end - self._offset]
                piece = piece[len(part) :]
                whole = self._offset + len(part) == end
                if self._add(batch, part, whole):
                    arrived.append(self._number)
                self._offset += len(part)
                if whole:
                    self._number += 1
        if arrived:
            self._landed(arrived)

    def _add(self, batch: Batch, part: memoryview, whole: bool) -> bool:
        """Take a part of the current span; whether it is complete now and right."""
        layer, number = self._layer, self._number
        if layer.keeps(number):
            return False
        if not layer.table.can_verify(number):
            layer.take_raw(self._offset, part)
            if whole:
                layer.arrived(number)
            return whole
        if self._buffer or not whole:
            self._buffer += part
        if not whole:
            return False
        blob = memoryview(self._buffer) if self._buffer else part
        self._buffer = bytearray()
        try:
            batch.add(number, blob)
        except DigestMismatch as error:
            if layer.table.in_order:
                raise
            # The others of this answer may be right.
            self._error = self._error or error
            return False
        return True
