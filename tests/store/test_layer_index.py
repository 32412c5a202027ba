"""Ordinary layers made lazy: what their spans give is what unpacking gives."""

import gzip
import hashlib
import subprocess
import sysconfig
import zlib
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from isal import igzip

from store.cas import Digest
from store.errors import (
    DigestMismatch,
    InvalidLayer,
    LimitExceeded,
    NotLazy,
    PullCancelled,
    UnsupportedMediaType,
)
from store.layer_index import SPACING, SPAN_MAX, build_index
from store.spans import WINDOW
from store.unpack import LayerLimits
from tests.support import tars
from tests.support.indexing import (
    TAR,
    content,
    digest,
    index_of,
    inflater_of,
    read_spans,
    table_of,
    unpacked,
)
from tests.support.spans import skippable

MIB = 1 << 20


def archive_of(*sizes: int) -> bytes:
    files = (
        tars.entry(b"file%d" % number, data=content(size, number))
        for number, size in enumerate(sizes)
    )
    return tars.archive(tars.directory(b"d"), *files, tars.entry(b"d/link", b"1", link=b"file0"))


ARCHIVE = archive_of(10, 3 * MIB, 0, 4096, 700_000, *([5000] * 200), 2 * MIB)


def raw_gzip(data: bytes, compressor: "zlib._Compress", flush_every: int = 0) -> bytes:
    out = bytearray()
    step = flush_every or len(data)
    for start in range(0, len(data), step):
        out += compressor.compress(data[start : start + step])
        if flush_every:
            out += compressor.flush(zlib.Z_SYNC_FLUSH)
    return bytes(out + compressor.flush())


def level(number: int, strategy: int = zlib.Z_DEFAULT_STRATEGY, flush_every: int = 0) -> bytes:
    compressor = zlib.compressobj(number, zlib.DEFLATED, 31, 8, strategy)
    return raw_gzip(ARCHIVE, compressor, flush_every)


def members(size: int) -> bytes:
    parts = (ARCHIVE[start : start + size] for start in range(0, len(ARCHIVE), size))
    return b"".join(gzip.compress(part, 1) for part in parts)


def frames(size: int, between: bytes = b"") -> bytes:
    compressor = zstandard.ZstdCompressor(write_checksum=True)
    parts = (ARCHIVE[start : start + size] for start in range(0, len(ARCHIVE), size))
    return between.join(compressor.compress(part) for part in parts)


def program(*command: str) -> bytes:
    return subprocess.run(
        [*command, "-c"], input=ARCHIVE, stdout=subprocess.PIPE, check=True
    ).stdout


BLOBS: dict[str, Callable[[], bytes]] = {
    "gzip -1": lambda: level(1),
    "gzip -6": lambda: level(6),
    "gzip -9": lambda: level(9),
    "stored": lambda: level(0),
    "huffman only": lambda: level(6, zlib.Z_HUFFMAN_ONLY),
    "fixed codes": lambda: level(6, zlib.Z_FIXED),
    "flushed": lambda: level(6, flush_every=128 << 10),
    "Python's gzip": lambda: gzip.compress(ARCHIVE),
    "gzip program": lambda: program("gzip", "-9n"),
    "isal 0": lambda: igzip.compress(ARCHIVE, 0),
    "isal 1": lambda: igzip.compress(ARCHIVE, 1),
    "isal 3": lambda: igzip.compress(ARCHIVE, 3),
    "members of 64 KiB": lambda: members(64 << 10),
    "members of 5 MiB": lambda: members(5 * MIB),
    "members, padded": lambda: bytes(512).join([members(3 * MIB), gzip.compress(b""), b""]),
    "zstd frames of 100 kB": lambda: frames(100_000),
    "zstd frames of 2 MiB": lambda: frames(2 * MIB, skippable(5)),
    "one short zstd frame": lambda: frames(len(ARCHIVE)),
    "tar": lambda: ARCHIVE,
}


@pytest.mark.parametrize("name", BLOBS)
def test_spans_give_what_unpacking_gives(name: str, tmp_path: Path) -> None:
    blob = BLOBS[name]()
    index = index_of(blob, ARCHIVE, tmp_path)
    table = table_of(index, tmp_path)
    entries, data = unpacked(blob, ARCHIVE, tmp_path)
    assert index.entries == entries
    assert index.data_size == len(data)
    assert read_spans(table, blob, tmp_path) == data
    if name not in ("one short zstd frame", "isal 0"):  # which has one block too
        sizes = [table.span(number).size for number in range(table.spans)]
        assert len(sizes) > 3
        assert max(sizes) < 5 * SPACING
    table.close()


def test_windows_have_what_is_used(tmp_path: Path) -> None:
    for name, used in (("huffman only", False), ("gzip -6", True)):
        table = table_of(index_of(BLOBS[name](), ARCHIVE, tmp_path), tmp_path)
        windows = [table.window(number) for number in range(2, table.spans)]
        assert {len(window) for window in windows} == {WINDOW}
        assert all(any(window) == used for window in windows)
        assert all(window.count(0) > WINDOW // 2 for window in windows)
        table.close()


def test_a_real_tree(tmp_path: Path) -> None:
    command = ["tar", "-cz", "-C", sysconfig.get_path("stdlib"), "encodings", "email", "asyncio"]
    blob = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
    archive = gzip.decompress(blob)
    index = index_of(blob, archive, tmp_path)
    table = table_of(index, tmp_path)
    entries, data = unpacked(blob, archive, tmp_path)
    assert index.entries == entries
    assert read_spans(table, blob, tmp_path) == data
    table.close()


def test_formats(tmp_path: Path) -> None:
    for blob, name in (
        (gzip.compress(ARCHIVE, 1), "gzip+index"),
        (frames(MIB), "zstd+index"),
        (ARCHIVE, "tar+index"),
    ):
        assert index_of(blob, ARCHIVE, tmp_path).format == name


files = st.tuples(st.integers(0, 1_500_000), st.integers(0, 1000))
holes = st.lists(st.tuples(st.integers(1, 100_000), st.integers(1, 100_000)), max_size=5)


def sparse(name: bytes, pairs: list[tuple[int, int]], seed: int) -> bytes:
    """A sparse file in GNU format 0.1: each pair is a hole and bytes after it."""
    segments, end = [], 0
    for hole, length in pairs:
        segments.append((end + hole, length))
        end += hole + length
    size = end + seed % 3 * 5000
    text = b",".join(b"%d,%d" % segment for segment in segments)
    records = [(b"GNU.sparse.size", b"%d" % size), (b"GNU.sparse.numblocks", b"%d" % len(pairs))]
    if text:
        records.append((b"GNU.sparse.map", text))
    else:
        records += [(b"GNU.sparse.offset", b"0"), (b"GNU.sparse.numbytes", b"0")]
    stored = content(sum(length for _, length in pairs), seed)
    return tars.pax(records) + tars.entry(name, data=stored)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.one_of(files, holes), max_size=8),
    st.sampled_from(["gzip", "members", "zstd", "tar"]),
)
def test_random_archives(
    parts: list[tuple[int, int] | list[tuple[int, int]]], compression: str
) -> None:
    archive = tars.archive(
        *(
            sparse(b"sparse%d" % number, part, number)
            if isinstance(part, list)
            else tars.entry(b"file%d" % number, data=content(*part))
            for number, part in enumerate(parts)
        )
    )
    blob = {
        "gzip": lambda: gzip.compress(archive, 1),
        "members": lambda: gzip.compress(archive[:1000], 1) + gzip.compress(archive[1000:], 1),
        "zstd": lambda: zstandard.compress(archive[:5000]) + zstandard.compress(archive[5000:]),
        "tar": lambda: archive,
    }[compression]()
    with TemporaryDirectory() as name:
        directory = Path(name)
        table = table_of(index_of(blob, archive, directory), directory)
        _, data = unpacked(blob, archive, directory)
        assert read_spans(table, blob, directory) == data
        table.close()


def test_a_long_member_of_zeros(tmp_path: Path) -> None:
    size = 300 * MIB
    compressor = zlib.compressobj(1, zlib.DEFLATED, 31)
    digest = hashlib.sha256()
    path = tmp_path / "blob"
    with path.open("wb") as file:
        zeros = (bytes(MIB) for _ in range(size // MIB))
        for part in (tars.header(b"zeros", size=size), *zeros, tars.END):
            digest.update(part)
            file.write(compressor.compress(part))
        file.write(compressor.flush())
    diff_id = Digest(f"sha256:{digest.hexdigest()}")
    with path.open("rb", buffering=0) as file:
        length = path.stat().st_size
        index = build_index(file, length, TAR, diff_id, LayerLimits(), lambda: False)
    table = table_of(index, tmp_path)
    blob = path.read_bytes()
    inflater = inflater_of(table, blob)
    out = 0
    for number in range(table.spans):
        start, end = table.range_of(number)
        for _, piece in inflater.pieces(number, blob[start:end]):
            assert not any(piece[::4096])
            out += len(piece)
    assert out == size == index.data_size
    assert table.spans > 50
    table.close()


def test_wrong_bytes_are_noticed(tmp_path: Path) -> None:
    for blob in (gzip.compress(ARCHIVE, 1), frames(MIB), ARCHIVE):
        table = table_of(index_of(blob, ARCHIVE, tmp_path), tmp_path)
        inflater = inflater_of(table, blob)
        for number in range(table.spans):
            if not table.span(number).count:
                continue
            start, end = table.range_of(number)
            wrong = bytearray(blob[start:end])
            wrong[len(wrong) // 2] ^= 1
            with pytest.raises(DigestMismatch):
                list(inflater.pieces(number, bytes(wrong)))
            with pytest.raises(DigestMismatch):
                list(inflater.pieces(number, blob[start : end - (end - start) // 2]))
        table.close()


def test_what_cannot_be_entered_is_not_lazy(tmp_path: Path) -> None:
    archive = tars.archive(tars.entry(b"zeros", data=bytes(SPAN_MAX + 1)))
    for blob in (
        igzip.compress(archive, 0),
        # Much of the blob gives nothing.
        empty_blocks(SPAN_MAX // 5 + 1),
        skippable(SPAN_MAX) + zstandard.compress(archive),
    ):
        with pytest.raises(NotLazy, match="more than 32 MiB"):
            index_of(blob, archive, tmp_path)


def empty_blocks(count: int) -> bytes:
    body = b"\0\0\0\xff\xff" * count
    return gzip.compress(b"")[:10] + body + gzip.compress(ARCHIVE)[10:]


def test_the_archive_is_compared_with_the_diff_id(tmp_path: Path) -> None:
    for blob in (gzip.compress(ARCHIVE, 1), frames(MIB), ARCHIVE):
        with pytest.raises(DigestMismatch, match="the image config lists"):
            index_of(blob, ARCHIVE + b"x", tmp_path)


@pytest.mark.parametrize("blob", [gzip.compress(ARCHIVE, 1), frames(MIB)], ids=["gzip", "zstd"])
def test_broken_blobs(blob: bytes, tmp_path: Path) -> None:
    for cut in (3, 5, 9, 100, len(blob) // 2, len(blob) - 1):
        with pytest.raises((InvalidLayer, DigestMismatch)):
            index_of(blob[:cut], ARCHIVE, tmp_path)
    for position in range(20, len(blob), len(blob) // 7):
        broken = bytearray(blob)
        broken[position] ^= 0x10
        with pytest.raises((InvalidLayer, DigestMismatch, NotLazy, LimitExceeded)):
            index_of(bytes(broken), ARCHIVE, tmp_path)
    with pytest.raises(InvalidLayer):
        index_of(blob + b"junk", ARCHIVE, tmp_path)


def test_limits(tmp_path: Path) -> None:
    blob = gzip.compress(ARCHIVE, 1)
    limits = LayerLimits()
    for narrow in (
        {"layer_bytes": MIB},
        {"layer_entries": 10},
        {"layer_metadata_bytes": 100},
        {"layer_ratio": 1, "ratio_floor": MIB},
    ):
        with pytest.raises(LimitExceeded, match="if you trust the image"):
            index_of(blob, ARCHIVE, tmp_path, msgspec.structs.replace(limits, **narrow))


def test_cancelling_and_media_types(tmp_path: Path) -> None:
    path = tmp_path / "blob"
    path.write_bytes(ARCHIVE)
    with path.open("rb", buffering=0) as file:
        with pytest.raises(PullCancelled):
            build_index(file, len(ARCHIVE), TAR, digest(ARCHIVE), LayerLimits(), lambda: True)
        with pytest.raises(UnsupportedMediaType):
            build_index(
                file, len(ARCHIVE), "text/plain", digest(ARCHIVE), LayerLimits(), lambda: False
            )


def test_an_empty_archive(tmp_path: Path) -> None:
    archive = tars.archive()
    for blob in (gzip.compress(archive), zstandard.compress(archive), archive):
        index = index_of(blob, archive, tmp_path)
        assert (index.entries, index.data_size) == ([], 0)
        table = table_of(index, tmp_path)
        assert table.range_of(table.spans - 1)[1] == len(blob)
        table.close()
