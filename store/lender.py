"""Chunks that another layer in the store has already, so that no registry need send them.

A span is borrowed as the registry would send it, compressed, when the other blob has one with
the same first chunk and the same length: mostly the same converter has made both of the same
file. Its contents are verified by their digests before they count. What lies between contents
may differ all the same, which the digest of the whole blob tells at the end: then what was
borrowed is fetched after all.
"""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from store import lazy
from store.cas import Cas
from store.errors import CorruptContent, DigestMismatch
from store.lazy import LazyLayer
from store.pieces import Pieces
from store.spans import SpanTable


class Lender:
    """Finds spans in other layers. Safe to use from several threads.

    Args:
        layers: the directory of all layers.
        cas: where the blobs of complete layers are.
        opened: an incomplete layer by its hexadecimal diff_id, if it is open.
    """

    def __init__(self, layers: Path, cas: Cas, opened: Callable[[str], LazyLayer | None]) -> None:
        self._layers = layers
        self._cas = cas
        self._opened = opened
        self._pieces = Pieces(layers / "pieces.db")

    def add(self, layer: LazyLayer) -> None:
        """Have a layer lend what it has, or will have. Blocks."""
        self._pieces.add(layer.directory.name, layer.table)

    def can_lend(self, layer: LazyLayer) -> bool:
        """Whether there is anything to ask for."""
        return self._pieces.others(layer.directory.name)

    def lend(self, layer: LazyLayer, number: int) -> bool:
        """Give a layer a span that it lacks; whether that was possible. Blocks.

        Raises:
            StorageFailed: it could not be written.
        """
        span = layer.table.span(number)
        if not span.count:
            return False
        digest = layer.table.piece(span.first).digest
        for name, other in self._pieces.find(digest, layer.directory.name):
            with suppress(CorruptContent, OSError):  # the other layer may be going just now
                blob = self._read(name, other, span.end - span.start)
                if blob is not None:
                    with suppress(DigestMismatch):
                        layer.take(number, memoryview(blob), borrowed=True)
                        return True
        return False

    def _read(self, name: str, number: int, length: int) -> bytes | None:
        """The bytes of a span of another layer, if there are so many and they are here."""
        opened = self._opened(name)
        if opened is not None and not opened.complete:
            start, end = self._range(name, number, opened.table)
            return opened.read_blob(number) if end - start == length else None
        directory = self._layers / name
        if not directory.is_dir():
            self._pieces.forget(name)
            return None
        if not lazy.is_complete(directory):
            return None
        table = SpanTable(directory / "spans")
        try:
            start, end = self._range(name, number, table)
        finally:
            table.close()
        if end - start != length:
            return None
        descriptor = os.open(
            self._cas.path(lazy.read_record(directory).blob.content), os.O_RDONLY | os.O_CLOEXEC
        )
        try:
            return os.pread(descriptor, length, start)
        finally:
            os.close(descriptor)

    def _range(self, name: str, number: int, table: SpanTable) -> tuple[int, int]:
        """Where a span is in its blob; an empty range if the layer was made anew with others."""
        if number < table.spans:
            return table.range_of(number)
        self._pieces.forget(name)
        return 0, 0

    def close(self) -> None:
        """Close the index."""
        self._pieces.close()
