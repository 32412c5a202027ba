"""A lazy layer made by hand, for tests of what fetches and serves: no format announces it."""

import gzip
import hashlib
import io
import stat
import tarfile
import tempfile
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import zstandard

from store.index import Entry
from store.lazy import LazyLayer
from store.spans import Codec, Piece, Span, SpanWriter
from tests.support.indexing import index_of
from tests.support.layouts import GZIP, ZSTD, sha256, tar_of

CHUNK = 64 << 10


def nobody_fills() -> None:
    """For ``Layers.add_lazy``, where a test fetches what it needs itself."""


@dataclass
class HandMade:
    """A gzip layer whose chunks are members of their own, and what a table would say of it.

    ``format``, ``entries``, ``spans``, ``data_size``, ``first_size`` and ``is_large`` make it a
    ``LazyLayout``.

    Attributes:
        blob: the layer.
        diff_id: digest of its archive.
        data: what the data file must hold in the end.
    """

    files: dict[str, bytes]
    blob: bytes = b""
    diff_id: str = ""
    data: bytes = b""
    format: str = "by hand"
    entries: list[Entry] = field(default_factory=list)
    data_size: int = 0
    first_size: int = 0
    is_large: bool = False
    media_type: str = GZIP
    chunk: int = CHUNK

    def __post_init__(self) -> None:
        archive, blob, data = bytearray(), bytearray(), bytearray()
        self._spans: list[tuple[Span, list[Piece]]] = []

        def member(part: bytes) -> tuple[int, int]:
            archive.extend(part)
            start = len(blob)
            blob.extend(gzip.compress(part, 1, mtime=0))
            return start, len(blob)

        for name, content in self.files.items():
            header = tarfile.TarInfo(name)
            header.size, header.mode = len(content), 0o644
            member(header.tobuf())
            place = len(data) if content else 0
            self.entries.append(
                Entry(name.encode(), stat.S_IFREG | 0o644, size=len(content), offset=place)
            )
            for offset in range(0, len(content), self.chunk):
                part = content[offset : offset + self.chunk]
                last = offset + self.chunk >= len(content)
                padded = part + (bytes(-len(content) % 512) if last else b"")
                start, end = member(padded)
                digest = hashlib.sha256(part).digest()
                pieces = [Piece(len(data), len(part), 0, digest)]
                self._spans.append((Span(start, end, len(part)), pieces))
                data += part
            data += bytes(-len(data) % 4096)
        end_of_archive = io.BytesIO()
        tarfile.open(fileobj=end_of_archive, mode="w").close()
        member(end_of_archive.getvalue())
        self.blob, self.data = bytes(blob), bytes(data)
        self.diff_id, self.data_size = sha256(bytes(archive)), len(data)

    @property
    def spans(self) -> SpanWriter:
        """A new table each time."""
        writer = SpanWriter(Codec.GZIP, len(self.blob))
        for span, pieces in self._spans:
            writer.add(span, pieces)
        return writer


def one_frame(archive: bytes) -> bytes:
    """The archive as skopeo compresses it: a zstd frame that does not say how long it is."""
    compressor = zstandard.ZstdCompressor(level=3, write_checksum=True).compressobj()
    return compressor.compress(archive) + compressor.flush()


def skippable(size: int) -> bytes:
    """A zstd frame that holds nothing of the archive."""
    return b"\x5e\x2a\x4d\x18" + size.to_bytes(4, "little") + bytes(size)


class OneFrame:
    """A zstd layer of one frame, which is too long to be a span: the files in it, and its index.

    With the attributes of ``HandMade``.
    """

    media_type = ZSTD
    is_large = False
    first_size = 0

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        archive = tar_of(files)
        self.blob = one_frame(archive)
        self.diff_id = sha256(archive)
        with tempfile.TemporaryDirectory() as directory:
            index = index_of(self.blob, archive, Path(directory))
        self.format, self.entries, self.spans = index.format, index.entries, index.spans
        self.data_size = index.data_size

    @cached_property
    def data(self) -> bytes:
        """What the data file must hold in the end."""
        data = bytearray(self.data_size)
        for entry in self.entries:
            content = self.files[entry.path.decode()]
            data[entry.offset : entry.offset + entry.size] = content
        return bytes(data)


def take_all(layer: LazyLayer, blob: bytes) -> None:
    """Everything that is missing, as the registry sends it."""
    for number in range(layer.table.spans):
        start, end = layer.table.range_of(number)
        piece = memoryview(blob)[start:end]
        if layer.table.span(number).count:
            layer.take(number, piece)
        elif not layer.has(number):
            layer.take_raw(start, piece)
            layer.arrived(number)


def with_other_times(blob: bytes) -> bytes:
    """The blob with another time in each gzip header: as long, and with the same contents."""
    header = gzip.compress(b"", 1, mtime=0)[:9]
    return blob.replace(header, header[:4] + b"\1\2\3\4" + header[8:])
