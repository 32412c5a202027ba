"""Layers indexed and read back span by span."""

import hashlib
import os
import random
from pathlib import Path

from store.cas import Digest
from store.index import Entry, read_index
from store.layer_index import LayerIndex, build_index
from store.layers import LazyLayout
from store.span_inflate import Inflater
from store.spans import SpanTable
from store.unpack import LayerLimits, unpack_blob

TAR = "application/vnd.oci.image.layer.v1.tar"


def digest(data: bytes) -> Digest:
    return Digest(f"sha256:{hashlib.sha256(data).hexdigest()}")


def index_of(
    blob: bytes, archive: bytes, directory: Path, limits: LayerLimits | None = None
) -> LayerIndex:
    """Index a blob that holds the archive."""
    path = directory / "blob"
    path.write_bytes(blob)
    with path.open("rb", buffering=0) as file:
        return build_index(
            file, len(blob), TAR, digest(archive), limits or LayerLimits(), lambda: False
        )


def content(size: int, seed: int, back: int = 40_000) -> bytes:
    """Bytes of which some repeat, from up to ``back`` bytes before, and some don't."""
    source = random.Random(seed)
    out = bytearray()
    while len(out) < size:
        out += source.randbytes(source.randrange(1, 9000))
        out += out[-source.randrange(1, back) :][:40_000]
        out += b"line %d\n" % source.randrange(100) * source.randrange(300)
    return bytes(out[:size])


def table_of(index: LazyLayout, directory: Path) -> SpanTable:
    """Write the index's span table, and open it."""
    path = directory / "spans"
    with path.open("wb") as file:
        index.spans.write(file, index.data_size)
    return SpanTable(path)


def inflater_of(table: SpanTable, blob: bytes) -> Inflater:
    """For a layer all of which is here."""
    return Inflater(table, lambda number: blob[slice(*table.range_of(number))])


def unpacked(blob: bytes, archive: bytes, directory: Path) -> tuple[list[Entry], bytes]:
    """Entries and data file as the ordinary way gives them."""
    data, entries = directory / "data", directory / "index"
    for path in (data, entries):
        path.unlink(missing_ok=True)
    unpack_blob(iter([blob]), TAR, digest(archive), data, entries, LayerLimits(), lambda: False)
    return list(read_index(entries)), data.read_bytes()


def read_spans(table: SpanTable, blob: bytes, directory: Path) -> bytes:
    """The data file, filled by inflating all spans in random order, or in theirs."""
    path = directory / "lazy"
    path.unlink(missing_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    os.truncate(fd, table.data_size)
    numbers = list(range(table.spans))
    inflater = inflater_of(table, blob)
    if not table.in_order:
        random.Random(table.spans).shuffle(numbers)
    for number in numbers:
        start, end = table.range_of(number)
        for piece, content in inflater.pieces(number, memoryview(blob)[start:end]):
            os.pwrite(fd, content, piece.target)
    os.close(fd)
    return path.read_bytes()
