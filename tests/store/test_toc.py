"""Tables of contents: what a lazy layer shows is what the whole layer holds."""

import random
import stat
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from store.cas import digest_of
from store.errors import InvalidLayer, StoreError
from store.index import Entry, read_index
from store.manifest import Manifest
from store.span_inflate import inflate_pieces
from store.spans import Codec, SpanTable
from store.toc import Toc, read_toc
from store.tree_builder import Builder
from store.unpack import LayerLimits, unpack_blob
from tests.support.layouts import OciLayout
from tests.support.lazy import (
    NO_PREFETCH,
    PREFETCH,
    WRITERS,
    Document,
    LazyBlob,
    estargz,
    zstd_chunked,
)
from tests.support.tars import archive, directory, entry, pax

CODECS = pytest.mark.parametrize("codec", [Codec.GZIP, Codec.ZSTD])
LIMITS = LayerLimits()
NOISE = random.Random(1).randbytes(100_000)
HIDDEN = {b"stargz.index.json", b".prefetch.landmark", b".no.prefetch.landmark"}

TREE = archive(
    directory(b"./", mode=0o700, mtime=1_000_000_000),
    directory(b"./d/", mode=0o3771, uid=1, gid=2, mtime=1_100_000_000),
    entry(b"./d/noise", data=NOISE, mode=0o6755, uid=70_000, gid=3, mtime=1),
    entry(b"./d/empty", mode=0o100644, mtime=-5),
    entry(b"./d/hard", b"1", link=b"./d/noise"),
    entry(b"missing/parent/small", data=b"small", mode=0o1),
    entry(b"link", b"2", link=b"d/../d/noise", mode=0o644, mtime=3, uid=5),
    entry(b"null", b"3", device=(1, 3), mode=0o666),
    entry(b"big", b"4", device=(259, 70_001), mode=0o660),
    entry(b"fifo", b"6", mode=0o620),
    entry(b"zeros", data=b"head" + bytes(50_000) + b"tail"),
    entry(b"only zeros", data=bytes(9_000)),
    pax(
        [
            (b"SCHILY.xattr.user.a", b"\xff\x00value"),
            (b"SCHILY.xattr.trusted.overlay.opaque", b"y"),
            (b"mtime", b"1700000000"),
        ]
    ),
    entry("ünïcode".encode(), data=b"x" * 5000),
    entry(b"d/.wh.gone", mode=0),
    entry(b"d/.wh..wh..opq", mode=0),
    entry(b"./d/noise", data=b"again"),
)


def toc_of(blob: LazyBlob, limits: LayerLimits = LIMITS) -> Toc:
    toc = read_toc(blob.layer, blob.read, limits)
    assert toc is not None
    return toc


def refusal(blob: LazyBlob, error: type[StoreError], limits: LayerLimits = LIMITS) -> str:
    with pytest.raises(StoreError) as caught:
        read_toc(blob.layer, blob.read, limits)
    assert type(caught.value) is error, caught.value.sentence
    sentence = caught.value.sentence
    assert "\n" not in sentence
    assert len(sentence) < 700
    return sentence


def filled(toc: Toc, blob: LazyBlob, directory: Path) -> bytes:
    """The data file, after all spans have been inflated."""
    path = directory / "spans"
    with path.open("wb") as file:
        toc.spans.write(file, toc.data_size)
    table = SpanTable(path)
    assert (table.blob_size, table.data_size) == (len(blob.data), toc.data_size)
    data = bytearray(toc.data_size)
    covered = 0
    for number in range(table.spans):
        start, end = table.range_of(number)
        assert start == covered
        covered = end
        for piece, content in inflate_pieces(table, number, blob.data[start:end]):
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
        assert placeless(toc.entries) == placeless(entries)
        assert contents(toc.entries, filled(toc, blob, directory)) == contents(entries, data)
        ends = [0]
        for item in toc.entries:
            if stat.S_ISREG(item.mode) and item.size:
                assert item.offset == -(-ends[-1] // 4096) * 4096
                ends.append(item.offset + item.size)
        assert toc.data_size == -(-ends[-1] // 4096) * 4096


# --- what is right ----------------------------------------------------------------------


@CODECS
@pytest.mark.parametrize("chunk_size", [4096, 30_000, 4 << 20])
def test_lazy_and_whole_layer_are_the_same(codec: Codec, chunk_size: int) -> None:
    check_same(WRITERS[codec](TREE, chunk_size=chunk_size))


@pytest.mark.parametrize("min_chunk_size", [1, 1000, 1 << 20])
def test_chunks_that_share_a_gzip_member(min_chunk_size: int, tmp_path: Path) -> None:
    files = [entry(b"%d" % number, data=b"%d," % number * 300) for number in range(40)]
    blob = estargz(archive(*files), chunk_size=500, min_chunk_size=min_chunk_size)
    check_same(blob)


def test_a_converter_that_names_its_annotations_otherwise() -> None:
    blob = zstd_chunked(archive(PREFETCH, TREE), prefix="io.containers.zstd-chunked.")
    annotations = blob.layer.annotations
    assert annotations is not None
    annotations["containerd.io/snapshot/stargz/toc.digest"] = "sha256:" + "0" * 64
    assert toc_of(blob).format == "zstd:chunked"
    check_same(blob)


_names = st.sampled_from([b"a", b"b", "ö".encode(), b".wh.a", b".wh..wh..opq", b"x" * 99])
_paths = st.lists(_names, min_size=1, max_size=3).map(b"/".join).filter(lambda p: len(p) < 100)
_data = st.one_of(
    st.binary(max_size=50),
    st.integers(0, 30_000).map(lambda size: NOISE[:size]),
    st.integers(0, 30_000).map(lambda size: bytes(size) + b"end"),
)
_fields = st.fixed_dictionaries(
    {
        "mode": st.integers(0, 0o7777),
        "uid": st.sampled_from([0, 1000, 0xFFFFFFFE]),
        "gid": st.sampled_from([0, 5, 2_000_000]),
        "mtime": st.sampled_from([-1, 0, 1, 1_700_000_000, 1 << 33]),
    }
)
_xattrs = st.lists(
    st.tuples(
        st.sampled_from([b"SCHILY.xattr.user.k", b"SCHILY.xattr.security.capability"]),
        st.binary(max_size=20),
    ),
    max_size=2,
)
_entries = st.one_of(
    st.builds(lambda path, data, more: entry(path, data=data, **more), _paths, _data, _fields),
    st.builds(lambda path, more: directory(path + b"/", **more), _paths, _fields),
    st.builds(lambda path, link: entry(path, b"2", link=link), _paths, _paths),
    st.builds(lambda path, link: entry(path, b"1", link=link), _paths, _paths),
    st.builds(lambda path, more: entry(path, b"6", **more), _paths, _fields),
    st.builds(lambda path: entry(path, b"3", device=(5, 1)), _paths),
    st.builds(lambda xattrs, path: pax(xattrs) + entry(path, data=b"x"), _xattrs, _paths),
    st.just(PREFETCH),
)


def _buildable(data: bytes) -> bool:
    """Whether the archive is no refusal of the tree's builder."""
    builder = Builder()
    try:
        for item in toc_of(estargz(data)).entries:
            builder.add(item)
    except InvalidLayer:
        return False
    return True


@CODECS
@settings(max_examples=60, deadline=None)
@given(
    st.lists(_entries, max_size=12).map(lambda parts: archive(*parts)).filter(_buildable),
    st.sampled_from([700, 4096, 1 << 20]),
)
def test_random_layers(codec: Codec, data: bytes, chunk_size: int) -> None:
    check_same(WRITERS[codec](data, chunk_size=chunk_size))


@CODECS
def test_the_tree_is_that_of_the_whole_layer(codec: Codec, tmp_path: Path) -> None:
    blob = WRITERS[codec](TREE)
    trees = []
    for entries in (toc_of(blob).entries, unpacked(blob, tmp_path)[0]):
        builder = Builder()
        for item in placeless(entries):
            builder.add(item)
        trees.append(builder.finish().root)
    assert trees[0] == trees[1]


def test_only_what_is_needed_is_read_and_once() -> None:
    blob = estargz(TREE)
    asked: list[tuple[int, int]] = []

    def read(offset: int, length: int) -> bytes:
        asked.append((offset, offset + length))
        return blob.read(offset, length)

    read_toc(blob.layer, read, LIMITS)
    assert asked == [(len(blob.data) - 51, len(blob.data)), (blob.toc[0], len(blob.data) - 51)]
    asked.clear()
    blob = zstd_chunked(TREE)
    read_toc(blob.layer, read, LIMITS)
    assert asked == [blob.toc]


@pytest.mark.parametrize("annotations", [None, {}, {"x": "y"}])
def test_no_announcement_no_table(annotations: dict[str, str] | None) -> None:
    blob = estargz(TREE)
    layer = msgspec.structs.replace(blob.layer, annotations=annotations)

    def read(offset: int, length: int) -> bytes:
        raise AssertionError

    assert read_toc(layer, read, LIMITS) is None


@CODECS
def test_landmarks(codec: Codec) -> None:
    first, rest = entry(b"first", data=b"first"), entry(b"rest", data=b"rest")

    def prefetched(*parts: bytes) -> tuple[int, list[bytes]]:
        toc = toc_of(WRITERS[codec](archive(*parts)))
        return toc.spans.prefetch_end, [item.path for item in toc.entries]

    end, names = prefetched(first, PREFETCH, rest)
    assert names == [b"first", b"rest"]
    places = {}
    WRITERS[codec](
        archive(first, PREFETCH, rest),
        edit=lambda toc: places.update({e["name"]: e["offset"] for e in toc["entries"]}),
    )
    assert end == places[".prefetch.landmark"]
    assert prefetched(NO_PREFETCH, first, rest) == (0, [b"first", b"rest"])
    assert prefetched(first, PREFETCH, NO_PREFETCH, rest)[0] == 0
    assert prefetched(first, rest) == (0, [b"first", b"rest"])
    below = entry(b"d/.prefetch.landmark", data=b"\x0f")
    assert prefetched(first, below) == (0, [b"first", b"d/.prefetch.landmark"])


@CODECS
def test_entries_in_another_order_than_their_contents(codec: Codec, tmp_path: Path) -> None:
    names = [b"%d" % number for number in range(5)]
    data = archive(*(entry(name, data=name * 9000) for name in names))

    def reverse(toc: Document) -> None:
        files: list[list[Any]] = []
        for item in toc["entries"]:
            if item["type"] != "chunk":
                files.append([])
            files[-1].append(item)
        toc["entries"] = [item for file in reversed(files) for item in file]

    blob = WRITERS[codec](data, chunk_size=4096, edit=reverse)
    toc = toc_of(blob)
    assert [item.path for item in toc.entries] == names[::-1]
    assert contents(toc.entries, filled(toc, blob, tmp_path)) == [n * 9000 for n in names[::-1]]


@pytest.mark.parametrize(
    ("text", "time"),
    [
        ("", (0, 0)),
        ("1970-01-01T01:00:00+01:00", (0, 0)),
        ("0001-01-01T00:00:00Z", (0, 0)),
        ("2024-02-29T23:59:59.123456789Z", (1709251199, 123456789)),
        ("1969-12-31T23:59:59.5Z", (-1, 500000000)),
        ("9999-12-31T23:59:59-12:00", (253402343999, 0)),
    ],
)
def test_times(text: str, time: tuple[int, int]) -> None:
    blob = estargz(archive(entry(b"f")), edit=lambda toc: toc["entries"][0].update(modtime=text))
    item = toc_of(blob).entries[0]
    assert (item.seconds, item.nanoseconds) == time


def test_what_comes_after_a_chunk_is_not_fetched_with_it(tmp_path: Path) -> None:
    noise = (entry(random.Random(n).randbytes(40).hex().encode(), b"6") for n in range(9000))
    blob = estargz(archive(entry(b"f", data=b"x"), *noise, entry(b"g", data=b"y")))
    toc = toc_of(blob)
    filled(toc, blob, tmp_path)
    table = SpanTable(tmp_path / "spans")
    lengths = [end - start for start, end in map(table.range_of, range(table.spans))]
    assert max(lengths) > 200_000
    wanted = (n for n in range(table.spans) if table.span(n).count)
    assert max(lengths[number] for number in wanted) < 70_000


def test_skopeo_makes_layers_that_can_be_read(tmp_path: Path) -> None:
    layout = OciLayout(tmp_path / "source")
    zeros = entry(b"holes", data=NOISE + bytes(300_000) + NOISE)
    data = archive(TREE.removesuffix(bytes(1024)), zeros)
    layout.tag("t", layout.image(data))
    target = tmp_path / "target"
    copy = ["skopeo", "copy", "-q", "--dest-compress-format=zstd:chunked"]
    subprocess.run([*copy, f"oci:{layout.path}:t", f"oci:{target}:t"], check=True)
    (manifest,) = (
        document
        for path in (target / "blobs/sha256").iterdir()
        if (document := _manifest(path.read_bytes()))
    )
    layer = manifest.layers[0]
    blob = (target / "blobs/sha256" / layer.digest[7:]).read_bytes()
    check_same(LazyBlob(blob, layer, digest_of(data), (0, 0)))


def _manifest(data: bytes) -> Manifest | None:
    try:
        return msgspec.json.decode(data, type=Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None
