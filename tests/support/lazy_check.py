"""Whether a lazy layer shows what the whole layer holds."""

import stat
import tempfile
from pathlib import Path

import msgspec

from store.index import Entry, read_index
from store.spans import SpanTable
from store.toc import Toc, read_toc
from store.unpack import LayerLimits, unpack_blob
from tests.support.indexing import inflater_of
from tests.support.lazy import LazyBlob

LIMITS = LayerLimits()
HIDDEN = {b"stargz.index.json", b".prefetch.landmark", b".no.prefetch.landmark"}


def toc_of(blob: LazyBlob, limits: LayerLimits = LIMITS) -> Toc:
    """All that is in the table, as a pull works it out."""
    toc = read_toc(blob.layer, blob.read, limits)
    assert toc is not None
    assert toc.entries is not None
    assert toc.spans is not None
    return toc


def filled(toc: Toc, blob: LazyBlob, directory: Path) -> bytes:
    """The data file, after all spans have been inflated."""
    path = directory / "spans"
    with path.open("wb") as file:
        toc.spans.write(file, toc.data_size)
    table = SpanTable(path)
    assert (table.blob_size, table.data_size) == (len(blob.data), toc.data_size)
    data = bytearray(toc.data_size)
    inflater = inflater_of(table, blob.data)
    covered = 0
    for number in range(table.spans):
        start, end = table.range_of(number)
        assert start == covered
        covered = end
        for piece, content in inflater.pieces(number, blob.data[start:end]):
            assert not any(data[piece.target : piece.target + piece.size])
            data[piece.target : piece.target + piece.size] = content
    assert covered == len(blob.data)
    table.close()
    return bytes(data)


def unpacked(blob: LazyBlob, directory: Path) -> tuple[list[Entry], bytes]:
    """Entries and data file of the whole layer, less what a lazy one hides."""
    data, index = directory / "data", directory / "index"
    media_type = blob.layer.media_type
    unpack_blob(iter([blob.data]), media_type, blob.diff_id, data, index, LIMITS, lambda: False)
    return [item for item in read_index(index) if item.path not in HIDDEN], data.read_bytes()


def placeless(entries: list[Entry]) -> list[Entry]:
    return [msgspec.structs.replace(item, offset=0) for item in entries]


def contents(entries: list[Entry], data: bytes) -> list[bytes]:
    return [data[e.offset : e.offset + e.size] for e in entries if stat.S_ISREG(e.mode)]


def check_same(blob: LazyBlob) -> None:
    """The lazy layer has the entries and contents of the whole one."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        toc = toc_of(blob)
        entries, data = unpacked(blob, directory)
        assert placeless(list(toc.entries)) == placeless(entries)
        assert contents(list(toc.entries), filled(toc, blob, directory)) == contents(entries, data)
        ends = [0]
        for item in toc.entries:
            if stat.S_ISREG(item.mode) and item.size:
                assert item.offset == -(-ends[-1] // 4096) * 4096
                ends.append(item.offset + item.size)
        assert toc.data_size == -(-ends[-1] // 4096) * 4096
