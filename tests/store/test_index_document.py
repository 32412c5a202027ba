"""Indexes that came from another machine, honest and not."""

import gzip
import io
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from store.cas import Digest
from store.errors import CtrfsError, InvalidLayer, LimitExceeded
from store.index import Entry
from store.index_document import decode_index, document_max, encode_index
from store.layer_index import LayerIndex
from store.manifest import Descriptor
from store.unpack import LayerLimits
from tests.support import tars
from tests.support.indexing import TAR, digest, index_of, read_spans, table_of, unpacked

CONTENT = random.Random(1).randbytes(1_500_000)


def sparse_entry() -> bytes:
    records = [
        (b"GNU.sparse.size", b"1000000"),
        (b"GNU.sparse.map", b"4096,10000,20000,5000"),
        (b"SCHILY.xattr.user.note", b"hello"),
    ]
    return tars.pax(records) + tars.entry(b"sparse", data=CONTENT[:15000])


def hole_entry() -> bytes:
    records = [
        (b"GNU.sparse.size", b"9999"),
        (b"GNU.sparse.offset", b"0"),
        (b"GNU.sparse.numbytes", b"0"),
    ]
    return tars.pax(records) + tars.entry(b"hole")


ARCHIVE = tars.archive(
    tars.directory(b"d", mtime=-5),
    tars.entry(b"d/large", data=CONTENT),
    sparse_entry(),
    hole_entry(),
    tars.entry(b"empty"),
    tars.entry(b"link", b"2", link=b"../d"),
    tars.entry(b"hard", b"1", link=b"d/large"),
    tars.header(b"null", b"3", device=(1, 3)),
    *(tars.entry(b"many%d" % number, data=CONTENT[: number * 7]) for number in range(2000)),
    tars.entry(b"last", data=CONTENT),
)
BLOB = gzip.compress(ARCHIVE, 1)
LAYER = Descriptor(media_type=TAR, digest=digest(BLOB), size=len(BLOB))
DIFF_ID = digest(ARCHIVE)


def encoded(
    index: LayerIndex, directory: Path, blob: bytes = BLOB, diff_id: Digest = DIFF_ID
) -> bytes:
    table = table_of(index, directory)
    file = io.BytesIO()
    encode_index(index.entries, table, digest(blob), diff_id, file)
    table.close()
    return file.getvalue()


def decode(data: bytes, **limits: int) -> LayerIndex:
    return decode_index(data, LAYER, DIFF_ID, LayerLimits(**limits))


@pytest.mark.parametrize("compression", ["gzip", "zstd", "tar"])
def test_a_round_trip(compression: str, tmp_path: Path) -> None:
    frames = (ARCHIVE[start : start + 300_000] for start in range(0, len(ARCHIVE), 300_000))
    blob = {"gzip": BLOB, "zstd": b"".join(map(zstandard.compress, frames)), "tar": ARCHIVE}[
        compression
    ]
    index = index_of(blob, ARCHIVE, tmp_path)
    entries, data = unpacked(blob, ARCHIVE, tmp_path)
    document = encoded(index, tmp_path, blob)
    before = (tmp_path / "spans").read_bytes()
    layer = Descriptor(media_type=TAR, digest=digest(blob), size=len(blob))
    decoded = decode_index(document, layer, DIFF_ID, LayerLimits())
    assert (decoded.format, decoded.data_size) == (index.format, index.data_size)
    assert decoded.entries == entries
    table = table_of(decoded, tmp_path)
    assert (tmp_path / "spans").read_bytes() == before
    assert read_spans(table, blob, tmp_path) == data
    table.close()
    assert encoded(decoded, tmp_path, blob) == document


# --- documents that lie -------------------------------------------------------------------

Blocks = list[Any]


def blocks_of(document: bytes) -> Blocks:
    """The document taken apart; bytes, lists and numbers can be changed in place."""
    data = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(document)).read()
    blocks = []
    position = 0
    while position < len(data):
        length = int.from_bytes(data[position : position + 4], "little")
        position += 4
        blocks.append(msgspec.msgpack.decode(data[position : position + length]))
        position += length
    return blocks


def document_of(blocks: Iterable[Any]) -> bytes:
    out = bytearray()
    for block in blocks:
        encoded = msgspec.msgpack.encode(block)
        out += len(encoded).to_bytes(4, "little") + encoded
    return zstandard.compress(bytes(out))


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    directory = tmp_path_factory.mktemp("index")
    return encoded(index_of(BLOB, ARCHIVE, directory), directory)


def entry_named(blocks: Blocks, name: bytes) -> list[Any]:
    for block in blocks[1:]:
        for entry in block[0] if block else ():
            if isinstance(entry, list) and entry[0] == name:
                return entry
    raise KeyError(name)


def set_field(name: bytes, field: str, value: object) -> Callable[[Blocks], None]:
    """Change a field of an entry."""

    def change(blocks: Blocks) -> None:
        entry = entry_named(blocks, name)
        defaults = Entry(b"", 0)
        fields = Entry.__struct_fields__
        entry += [getattr(defaults, each) for each in fields[len(entry) :]]
        entry[fields.index(field)] = value

    return change


PLACES = 1
FIRST = 1  # block of entries


def set_place(number: int, value: object) -> Callable[[Blocks], None]:
    def change(blocks: Blocks) -> None:
        blocks[FIRST][PLACES][number] = value

    return change


def set_point(number: int, field: int, value: object) -> Callable[[Blocks], None]:
    def change(blocks: Blocks) -> None:
        points = next(b for b in blocks[2:] if b and len(b[0]) == 6 and isinstance(b[0][0], int))
        points[number][field] = value

    return change


def cut_points(blocks: Blocks) -> None:
    points = next(b for b in blocks[2:] if b and len(b[0]) == 6 and isinstance(b[0][0], int))
    points.pop()


LIES: dict[str, Callable[[Blocks], Any]] = {
    "another program's": lambda b: b[0].__setitem__(0, "other"),
    "another version": lambda b: b[0].__setitem__(1, 2),
    "another layer": lambda b: b[0].__setitem__(2, digest(b"x")),
    "another size": lambda b: b[0].__setitem__(3, len(BLOB) + 1),
    "another diff_id": lambda b: b[0].__setitem__(4, digest(b"x")),
    "unknown codec": lambda b: b[0].__setitem__(5, 9),
    "codec of members": lambda b: b[0].__setitem__(5, 1),
    "codec without bits": lambda b: b[0].__setitem__(5, 2),
    "no end": lambda b: b.pop(),
    "two ends": lambda b: b.append([]),
    "a name with ..": set_field(b"empty", "path", b"../etc/passwd"),
    "a name from the root": set_field(b"empty", "path", b"/empty"),
    "a name with empty parts": set_field(b"empty", "path", b"a//b"),
    "a name with a NUL": set_field(b"empty", "path", b"a\0b"),
    "a long name": set_field(b"empty", "path", b"a" * 256),
    "a long path": set_field(b"empty", "path", b"a/" * 2048 + b"a"),
    "a hard link out": set_field(b"hard", "link", b"../x"),
    "a hard link with a size": set_field(b"hard", "size", 5),
    "a mode that is none": set_field(b"empty", "mode", 0o170000),
    "a huge mode": set_field(b"empty", "mode", 0o100644 | 1 << 40),
    "a socket": set_field(b"empty", "mode", 0o140644),
    "a negative mode": set_field(b"empty", "mode", -1),
    "a negative size": set_field(b"d/large", "size", -1),
    "a huge size": set_field(b"d/large", "size", 1 << 50),
    "a longer content": set_field(b"last", "size", 1_500_000_000),
    "an offset": set_field(b"d/large", "offset", 4096),
    "a user that is none": set_field(b"empty", "uid", 0xFFFFFFFF),
    "a negative group": set_field(b"empty", "gid", -1),
    "nanoseconds": set_field(b"empty", "nanoseconds", 1_000_000_000),
    "a link's text too long": set_field(b"link", "link", b"x" * 5000),
    "a link's text with a NUL": set_field(b"link", "link", b"..\0d"),
    "a link's size": set_field(b"link", "size", 3),
    "a link's mode": set_field(b"link", "mode", 0o120644),
    "a text of no link": set_field(b"empty", "link", b"x"),
    "a whiteout": set_field(b"null", "rdev", 0),
    "a device number": set_field(b"null", "rdev", 1 << 32),
    "a device of a file": set_field(b"empty", "rdev", 1),
    "overlay's attribute": set_field(b"empty", "xattrs", {b"trusted.overlay.redirect": b"/x"}),
    "an unknown attribute": set_field(b"empty", "xattrs", {b"system.x": b"1"}),
    "a long attribute": set_field(b"empty", "xattrs", {b"user.x": bytes(70_000)}),
    "a place less": lambda b: b[FIRST][PLACES].pop(),
    "a place more": lambda b: b[FIRST][PLACES].append([512]),
    "contents on headers": set_place(1, [0]),
    "a negative gap": set_place(1, [-600]),
    "a huge gap": set_place(0, [1 << 62]),
    "overlapping segments": set_place(1, [512, [[0, 4096], [4095, 1]]]),
    "segments backwards": set_place(1, [512, [[8192, 1], [0, 1]]]),
    "a segment outside": set_place(1, [512, [[999_999, 2]]]),
    "an empty segment": set_place(1, [512, [[5, 0]]]),
    "a span without bytes": set_point(0, 1, 0),
    "short spans": set_point(0, 1, 1000),
    "long spans": set_point(0, 1, 1 << 40),
    "spans backwards": set_point(1, 0, 5),
    "a span outside": set_point(1, 0, len(BLOB)),
    "a short digest": set_point(0, 2, b"x"),
    "no digest": set_point(0, 2, bytes(32)),
    "nine bits": set_point(1, 3, 9),
    "a byte of 256": set_point(1, 4, 256),
    "a long window": set_point(1, 5, bytes(32769)),
    "a span less": cut_points,
    "numbers as text": set_point(0, 0, "10"),
    "a huge block": lambda b: b.insert(1, bytes(5 << 20)),
    "an entry of nothing": lambda b: b[FIRST][0].insert(0, []),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies_are_refused(lie: str, document: bytes) -> None:
    blocks = blocks_of(document)
    assert decode(document_of(blocks)).data_size
    LIES[lie](blocks)
    with pytest.raises((InvalidLayer, LimitExceeded)) as caught:
        decode(document_of(blocks))
    assert "\n" not in caught.value.sentence
    assert len(caught.value.sentence) < 700


def test_limits(document: bytes) -> None:
    for limits in (
        {"layer_bytes": 1 << 20},
        {"layer_entries": 10},
        {"layer_metadata_bytes": 100},
        {"layer_ratio": 1, "ratio_floor": 1 << 20},
    ):
        with pytest.raises(LimitExceeded, match="if you trust the image"):
            decode(document, **limits)


def test_memory_is_bounded(document: bytes) -> None:
    zeros = zstandard.compress(b"\x00\x00\x3f\x00" * (64 << 20))
    with pytest.raises(InvalidLayer):
        decode(zeros)
    blocks = blocks_of(document)
    many = [[b"f%d" % number, 0o100644] for number in range(1024)]
    blocks[FIRST:FIRST] = [[many, []]] * 100
    with pytest.raises(LimitExceeded, match="more than 50000 files"):
        decode(document_of(blocks), layer_entries=50_000)
    with pytest.raises(LimitExceeded, match="bytes"):
        decode(bytes(document_max(LAYER) + 1))


def test_broken_documents(document: bytes) -> None:
    for cut in (0, 1, 10, len(document) // 2, len(document) - 5):
        with pytest.raises(InvalidLayer):
            decode(document[:cut])
    with pytest.raises(InvalidLayer):
        decode(b"junk" * 10)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, Descriptor, Digest]:
    """An index of some hundred bytes, inflated; its layer and diff_id."""
    directory = tmp_path_factory.mktemp("small")
    archive = tars.archive(
        tars.directory(b"d"), sparse_entry(), tars.entry(b"d/link", b"2", link=b"../sparse")
    )
    layer = Descriptor(media_type=TAR, digest=digest(archive), size=len(archive))
    diff_id = digest(archive)
    document = encoded(index_of(archive, archive, directory), directory, archive, diff_id)
    raw = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(document)).read()
    return raw, layer, diff_id


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_mutated_documents_give_an_index_or_a_domain_error(
    small: tuple[bytes, Descriptor, Digest], data: st.DataObject
) -> None:
    raw, layer, diff_id = bytearray(small[0]), *small[1:]
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        decode_index(zstandard.compress(bytes(raw), 1), layer, diff_id, LayerLimits())
    except CtrfsError as error:
        assert "\n" not in error.sentence
