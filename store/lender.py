"""Chunks that another layer in the store has already, so that no registry need send them.

A span is borrowed as the registry would send it, compressed, when the other blob has one with the
same first chunk, the same files after it (``tails.py``) and the same length: mostly the same
converter has made both of the same file. Its contents are verified by their digests before they
count. Something may differ all the same, as a name of an owner, which the digest of the whole blob
tells at the end: then what was borrowed is fetched after all.

Where that is not possible, whoever reads gets the contents alone from another layer's data file,
and the registry is asked for the blob's bytes when there is time.
"""

import os
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

from store import lazy
from store.cas import Cas
from store.data_files import DataFiles, OpenData, open_all
from store.errors import CorruptContent, DigestMismatch
from store.lazy import LazyLayer
from store.pieces import Pieces
from store.spans import Piece, SpanTable
from store.tails import Tails, write_tails


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
        with suppress(CorruptContent, OSError):  # it lends no spans then
            write_tails(layer.directory, layer.table)
        self._pieces.add(layer.directory.name, layer.table)

    def can_lend(self, layer: LazyLayer) -> bool:
        """Whether there is anything to ask for."""
        return self._pieces.others(layer.directory.name)

    def borrower(self, layer: LazyLayer) -> "Borrower":
        """What a layer borrows with: for one thread and a few seconds, to be closed."""
        return Borrower(self._pieces, self._other, layer)

    def close(self) -> None:
        """Close the index."""
        self._pieces.close()

    def _other(self, name: str) -> "_Open | _Complete":
        """Another layer. Raises FileNotFoundError: it is gone, or incomplete and not open."""
        opened = self._opened(name)
        if opened is not None and not opened.complete:
            return _Open(opened)
        directory = self._layers / name
        if not directory.is_dir():
            self._pieces.forget(name)
            raise FileNotFoundError
        if not lazy.is_complete(directory):
            raise FileNotFoundError
        return _Complete(directory, self._cas)


class Borrower:
    """Takes from other layers what one layer lacks. Methods block, and raise StorageFailed when it
    could not be written."""

    def __init__(
        self, pieces: Pieces, find: Callable[[str], "_Open | _Complete"], layer: LazyLayer
    ) -> None:
        self._pieces = pieces
        self._find = find
        self._layer = layer
        self._others: dict[str, _Open | _Complete] = {}
        self._tails = Tails(layer.directory)

    def close(self) -> None:
        """Let go of the other layers."""
        for other in self._others.values():
            other.close()
        self._tails.close()

    def take(self, number: int) -> bool:
        """Take a span as the registry would send it; whether that was possible."""
        layer = self._layer
        span = layer.table.span(number)
        tail = self._tails.of(number)
        if not span.count or tail is None:
            return False
        digest = layer.table.piece(span.first).digest
        for name, there in self._pieces.find(digest, layer.directory.name):
            with suppress(CorruptContent, OSError):  # the other layer may be going just now
                other = self._other(name, there)
                start, end = other.table.range_of(there)
                if end - start != span.end - span.start or other.tails.of(there) != tail:
                    continue
                blob = other.read_blob(there)
                if blob is not None:
                    with suppress(DigestMismatch):
                        layer.take(number, memoryview(blob), borrowed=True)
                        return True
        return False

    def take_contents(self, number: int) -> bool:
        """Take the contents of a span, without the blob's bytes; whether that was possible."""
        contents = []
        for piece in self._layer.table.pieces_of(self._layer.table.span(number)):
            content = self._content(piece)
            if content is None:
                return False
            contents.append(content)
        with suppress(DigestMismatch):
            if contents:
                self._layer.take_contents(number, contents)
                return True
        return False

    def _content(self, piece: Piece) -> bytes | None:
        """The bytes of a piece from another layer's data file; they are not verified."""
        for name, number in self._pieces.find(piece.digest, self._layer.directory.name):
            with suppress(CorruptContent, OSError):
                other = self._other(name, number)
                for found in other.table.pieces_of(other.table.span(number)):
                    if (found.digest, found.size) == (piece.digest, piece.size):
                        return other.read(found.target, found.size)
        return None

    def _other(self, name: str, number: int) -> "_Open | _Complete":
        """Another layer that has a span.

        Raises:
            FileNotFoundError: the span is not here, or the layer is gone or was made anew.
        """
        other = self._others.get(name)
        if other is None:
            other = self._others[name] = self._find(name)
        if number >= other.table.spans:
            self._pieces.forget(name)
            raise FileNotFoundError
        if not other.has(number):
            raise FileNotFoundError
        return other


class _Open:
    """An incomplete layer, which somebody else has opened."""

    def __init__(self, layer: LazyLayer) -> None:
        self.table = layer.table
        self.tails = Tails(layer.directory)
        self.has = layer.has
        self.read = layer.read
        self.read_blob = layer.read_blob

    def close(self) -> None:
        self.tails.close()


class _Complete:
    """A complete layer."""

    def __init__(self, directory: Path, cas: Cas) -> None:
        self.table = SpanTable(directory / "spans")
        self.tails = Tails(directory)
        with ExitStack() as opened:
            opened.callback(self.table.close)
            opened.callback(self.tails.close)
            files = DataFiles(directory, self.table.data_size, self.table.cuts)
            data = OpenData(files, partial(open_all, flags=os.O_RDONLY))
            opened.callback(data.close)
            self.read = data.read
            self._blob = -1
            with suppress(FileNotFoundError):
                blob = cas.path(lazy.read_record(directory).blob.content)
                self._blob = os.open(blob, os.O_RDONLY | os.O_CLOEXEC)
                opened.callback(os.close, self._blob)
            self._opened = opened.pop_all()

    def has(self, number: int) -> bool:
        return True

    def read_blob(self, number: int) -> bytes | None:
        if self._blob < 0:
            return None
        start, end = self.table.range_of(number)
        return os.pread(self._blob, end - start, start)

    def close(self) -> None:
        self._opened.close()
