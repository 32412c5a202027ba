"""Tables of contents: what a lazy layer shows is what the whole layer holds."""

import gzip
import random
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from store.cas import digest_of
from store.errors import (
    DigestMismatch,
    InvalidLayer,
    LimitExceeded,
    NotLazy,
    RegistryTimeout,
    StoreError,
)
from store.manifest import Manifest
from store.spans import Codec, SpanTable
from store.toc import read_toc
from store.tree_builder import Builder
from store.unpack import LayerLimits
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
from tests.support.lazy_check import check_same, filled, placeless, toc_of, unpacked
from tests.support.tars import archive, directory, entry, pax

CODECS = pytest.mark.parametrize("codec", [Codec.GZIP, Codec.ZSTD])
LIMITS = LayerLimits()
NOISE = random.Random(1).randbytes(100_000)

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


def refusal(blob: LazyBlob, error: type[StoreError], limits: LayerLimits = LIMITS) -> str:
    with pytest.raises(StoreError) as caught:
        toc_of(blob, limits)
    assert type(caught.value) is error, caught.value.sentence
    sentence = caught.value.sentence
    assert "\n" not in sentence
    assert len(sentence) < 700
    return sentence


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
    for entries in (list(toc_of(blob).entries), unpacked(blob, tmp_path)[0]):
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
    (item,) = toc_of(blob).entries
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


# --- what is wrong ----------------------------------------------------------------------

BIG = 1 << 62
THREE = archive(
    entry(b"a", data=b"a" * 10_000),
    entry(b"b", data=b"b" * 10_000),
    entry(b"c", data=b"c" * 100),
)


def change(index: int, **fields: Any) -> Callable[[Document], None]:
    """Set fields of one entry."""

    def edit(toc: Document) -> None:
        toc["entries"][index].update(fields)

    return edit


def drop(index: int, *fields: str) -> Callable[[Document], None]:
    """Remove fields of one entry."""

    def edit(toc: Document) -> None:
        for field in fields:
            toc["entries"][index].pop(field, None)

    return edit


def append(**fields: Any) -> Callable[[Document], None]:
    """Add an entry."""
    return lambda toc: toc["entries"].append(fields)


def swap(first: int, second: int) -> Callable[[Document], None]:
    """Exchange two entries."""

    def edit(toc: Document) -> None:
        entries = toc["entries"]
        entries[first], entries[second] = entries[second], entries[first]

    return edit


def overlap(toc: Document) -> None:
    """Both files come from the same bytes."""
    entries = toc["entries"]
    files = [item for item in entries if item["type"] == "reg"]
    files[1]["offset"] = entries[entries.index(files[1]) - 1]["offset"]


# Chunks of 4096 bytes: entries 0 to 2 are a, 3 to 5 are b, 6 is c.
LIES: dict[str, tuple[Callable[[Document], Any], type[StoreError], str]] = {
    "the same bytes twice": (overlap, InvalidLayer, "overlaps another"),
    "overlapping in one member": (
        lambda toc: [change(1, offset=toc["entries"][0]["offset"], innerOffset=4095)(toc)],
        InvalidLayer,
        "overlaps another",
    ),
    "offset past the end": (change(6, offset=1 << 40), InvalidLayer, "not among"),
    "offset in the table": (
        lambda toc: change(6, offset=toc["entries"][6]["offset"] + 10_000)(toc),
        InvalidLayer,
        "not among",
    ),
    "negative offset": (change(0, offset=-1), InvalidLayer, "not among"),
    "no offset": (drop(6, "offset"), InvalidLayer, "not among"),
    "negative inner offset": (change(0, innerOffset=-1), InvalidLayer, "not among"),
    "a chunk is missing": (lambda toc: toc["entries"].pop(1), InvalidLayer, "add up"),
    "the last chunk is missing": (lambda toc: toc["entries"].pop(5), InvalidLayer, "add up"),
    "a chunk too many": (append(type="chunk", name="c", offset=9), InvalidLayer, "add up"),
    "a chunk of a directory": (
        lambda toc: [append(type="dir", name="d")(toc), append(type="chunk", name="d")(toc)],
        InvalidLayer,
        "add up",
    ),
    "a chunk too large": (change(2, chunkSize=BIG), InvalidLayer, "add up"),
    "a negative chunk": (change(2, chunkSize=-1), InvalidLayer, "add up"),
    "a chunk elsewhere in its file": (change(1, chunkOffset=4097), InvalidLayer, "add up"),
    "file larger than its chunks": (change(0, size=10_000_000), LimitExceeded, "layer_bytes"),
    "file smaller than its chunks": (change(0, size=5000), InvalidLayer, "add up"),
    "negative size": (change(0, size=-1), InvalidLayer, "size -1"),
    "a chunk of another file": (change(1, name="b"), InvalidLayer, "follow its file"),
    "chunks in another order": (swap(1, 2), InvalidLayer, "add up"),
    "files in another order": (
        lambda toc: toc["entries"].insert(0, toc["entries"].pop()),
        NotLazy,
        "elsewhere",
    ),
    "a hole of exabytes": (
        append(type="reg", name="z", size=BIG, offset=9, chunkType="zeros"),
        LimitExceeded,
        "layer_bytes",
    ),
    "a huge span": (change(6, innerOffset=64 << 20), NotLazy, "inflated only together"),
    "no digest": (drop(6, "digest", "chunkDigest"), NotLazy, "no SHA-256"),
    "a chunk without digest": (drop(1, "chunkDigest"), NotLazy, "no SHA-256"),
    "another digest": (change(6, chunkDigest="sha512:" + "0" * 128), NotLazy, "no SHA-256"),
    "a short digest": (change(6, chunkDigest="sha256:" + "0" * 62), InvalidLayer, "is none"),
    "a digest of letters": (change(6, chunkDigest="sha256:" + "x" * 64), InvalidLayer, "is none"),
    "spaces in a digest": (change(6, chunkDigest="sha256:" + " " * 64), InvalidLayer, "is none"),
    "..": (append(type="dir", name="a/../../b"), InvalidLayer, "with '..'"),
    ".. that stays within": (append(type="dir", name="x/../a"), NotLazy, "name with '..'"),
    "link to ..": (append(type="hardlink", name="x", linkName="../b"), InvalidLayer, "with '..'"),
    "a name of 256": (append(type="dir", name="d/" + "n" * 256), InvalidLayer, "256 bytes"),
    "a path of 4096": (append(type="dir", name="d/" * 2047 + "xx"), LimitExceeded, "4096 bytes"),
    "a zero byte": (append(type="dir", name="a\0b"), InvalidLayer, "zero byte"),
    "a zero byte in a link": (
        append(type="symlink", name="x", linkName="a\0b"),
        InvalidLayer,
        "zero byte",
    ),
    "a name that was not UTF-8": (append(type="dir", name="caf\ufffd"), NotLazy, "UTF-8"),
    "an empty link": (append(type="symlink", name="x"), InvalidLayer, "text of 0 bytes"),
    "a whiteout in overlayfs' way": (append(type="char", name="x"), InvalidLayer, "0:0"),
    "a device that is none": (
        append(type="block", name="x", devMajor=4096),
        InvalidLayer,
        "device 4096:0",
    ),
    "an owner that is none": (append(type="dir", name="x", uid=-1), InvalidLayer, "owner -1:0"),
    "an unknown type": (append(type="socket\n", name="x"), InvalidLayer, "none of reg"),
    "no type": (append(name="x"), InvalidLayer, "missing required field `type`"),
    "a time that is none": (append(type="dir", name="x", modtime="yesterday"), NotLazy, "time"),
    "the 30th of February": (
        append(type="dir", name="x", modtime="2024-02-30T00:00:00Z"),
        NotLazy,
        "time",
    ),
    "a year too far": (
        append(type="dir", name="x", modtime="10000-01-01T00:00:00Z"),
        NotLazy,
        "time",
    ),
    "an attribute not in base64": (
        append(type="dir", name="x", xattrs={"user.a": "!"}),
        InvalidLayer,
        "base64",
    ),
    "attributes that are none": (append(type="dir", name="x", xattrs=[1]), InvalidLayer, "base64"),
    "an attribute without end": (
        append(type="dir", name="x", xattrs={"user.a": "A" * 2_000_000}),
        LimitExceeded,
        "extended attributes",
    ),
    "an attribute too long": (
        append(type="dir", name="x", xattrs={"user.a": "A" * 100_000}),
        LimitExceeded,
        "extended attributes",
    ),
    "a nameless attribute": (
        append(type="dir", name="x", xattrs={"user.\0": ""}),
        InvalidLayer,
        "zero byte",
    ),
    "text for a number": (change(0, size="1"), InvalidLayer, "can't be understood"),
    "a fraction": (change(0, offset=0.5), InvalidLayer, "can't be understood"),
    "not a number": (change(0, size=float("nan")), InvalidLayer, "can't be understood"),
    "infinite": (change(0, size=float("inf")), InvalidLayer, "can't be understood"),
    "2 to the 63rd": (change(0, size=1 << 63), InvalidLayer, "can't be understood"),
    "a thousand digits": (change(0, size=10**1000), InvalidLayer, "can't be understood"),
    "an entry that is none": (
        lambda toc: toc["entries"].append(7),
        InvalidLayer,
        "can't be understood",
    ),
    "version 2": (lambda toc: toc.update(version=2), NotLazy, "version 2"),
    "no version": (lambda toc: toc.pop("version"), NotLazy, "version 0"),
}


@CODECS
@pytest.mark.parametrize("lie", LIES)
def test_tables_that_lie(codec: Codec, lie: str) -> None:
    edit, error, words = LIES[lie]
    limits = LayerLimits(layer_bytes=1_000_000)
    blob = WRITERS[codec](THREE, chunk_size=4096, edit=edit)
    assert words in refusal(blob, error, limits)


@CODECS
@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"[]",
        b"{",
        b'{"version":1,"entries":{}}',
        b'{"version":1,"entries":[]}]',
        b'{"version":1,"entries":[{"type":"dir","name":"\xff"}]}',
        b'{"version":1,"entries":[{"type":"dir","name":"\\ud800"}]}',
        b'{"version":1,"entries":' + b"[" * 100_000,
        b'{"version":1,"more":' + b'{"a":' * 100_000,
    ],
    ids=range(9),
)
def test_documents_that_are_no_tables(codec: Codec, document: bytes) -> None:
    blob = WRITERS[codec](THREE, document=document)
    assert "can't be understood" in refusal(blob, InvalidLayer)


@CODECS
@pytest.mark.parametrize("document", [b'{"version":1}', b'{"version":1,"entries":null}'])
def test_an_empty_layer(codec: Codec, document: bytes) -> None:
    toc = toc_of(WRITERS[codec](archive(), document=document))
    assert (list(toc.entries), toc.data_size, toc.spans.prefetch_end) == ([], 0, 0)


@CODECS
def test_limits(codec: Codec) -> None:
    blob = WRITERS[codec](THREE, chunk_size=4096)
    toc_of(blob, LayerLimits(layer_entries=3, layer_metadata_bytes=3, layer_bytes=24_676))
    assert "than 2 files" in refusal(blob, LimitExceeded, LayerLimits(layer_entries=2))
    short = LayerLimits(layer_metadata_bytes=2)
    assert "more than 2 bytes" in refusal(blob, LimitExceeded, short)
    assert "layer_bytes" in refusal(blob, LimitExceeded, LayerLimits(layer_bytes=24_675))
    dense = LayerLimits(layer_ratio=2, ratio_floor=10_000)
    assert "layer_ratio" in refusal(blob, LimitExceeded, dense)


def test_millions_of_entries() -> None:
    item = b'{"type":""},'
    document = b'{"version":1,"entries":[' + item * 1_100_000 + b'{"type":""}]}'
    blob = estargz(archive(), document=document)
    few = LayerLimits(layer_entries=1000)
    assert "table of contents has more than" in refusal(blob, LimitExceeded, few)


def test_a_million_files() -> None:
    item = b'{"name":"a","type":"reg"},'
    document = b'{"version":1,"entries":[' + item * 999_999 + item[:-1] + b"]}"
    blob = estargz(archive(), document=document)
    assert "has more than 900000 files" in refusal(blob, LimitExceeded)


@CODECS
def test_names_are_cleaned_and_later_ones_win(codec: Codec) -> None:
    parts = (entry(name, data=name) for name in (b"/a", b"./a", b".//a", b"//b/./a//"))
    toc = toc_of(WRITERS[codec](archive(*parts)))
    assert [item.path for item in toc.entries] == [b"a", b"a", b"a", b"b/a"]
    builder = Builder()
    for item in toc.entries:
        builder.add(item)
    assert builder.finish().root.children[b"a"].size == len(b".//a")


@CODECS
@pytest.mark.parametrize(
    "links",
    [{"x": "x"}, {"x": "y", "y": "x"}, {"x": "nowhere"}, {"x": ".prefetch.landmark"}],
)
def test_hard_links_to_nowhere(codec: Codec, links: dict[str, str]) -> None:
    parts = [entry(name.encode(), b"1", link=to.encode()) for name, to in links.items()]
    toc = toc_of(WRITERS[codec](archive(PREFETCH, *parts)))
    builder = Builder()
    for item in toc.entries:
        builder.add(item)
    tree = builder.finish()
    assert not tree.root.children
    assert "neither before it in the layer nor below" in tree.unresolved


# --- tables that are not there ------------------------------------------------------------


def annotated(blob: LazyBlob, **annotations: str | None) -> LazyBlob:
    """With annotations, whose names end as given, changed or without them."""
    old = blob.layer.annotations or {}
    new = {}
    for key, value in old.items():
        ending = key.rpartition("-")[2].rpartition(".")[2]
        if (found := annotations.get(ending, value)) is not None:
            new[key] = found
    layer = msgspec.structs.replace(blob.layer, annotations=new)
    return LazyBlob(blob.data, layer, blob.diff_id, blob.toc)


@pytest.mark.parametrize("digest", ["", "sha256:" + "0" * 64, "nonsense\n" * 100])
def test_another_table_than_announced(digest: str) -> None:
    refusal(annotated(estargz(THREE), digest=digest), DigestMismatch)
    refusal(annotated(zstd_chunked(THREE), checksum=digest), DigestMismatch)


def test_the_digest_is_checked_before_the_table_is_decoded() -> None:
    for writer in WRITERS.values():
        blob = writer(THREE, document=b"no JSON")
        refusal(annotated(blob, digest="x", checksum="x"), DigestMismatch)


@pytest.mark.parametrize("where", [0, 1, 100, (1 << 64) - 1])
def test_a_footer_that_points_elsewhere(where: int) -> None:
    refusal(estargz(THREE, offset=where), InvalidLayer)


def test_a_layer_compressed_again_has_no_footer() -> None:
    blob = estargz(THREE)
    for data in (blob.data[:-1], blob.data + b"\0", blob.data[-51:], b"x"):
        layer = msgspec.structs.replace(blob.layer, size=len(data))
        refusal(LazyBlob(data, layer, blob.diff_id, blob.toc), NotLazy)


@pytest.mark.parametrize(
    ("position", "error"),
    [
        ("", None),
        ("1:2:3", InvalidLayer),
        ("a:b:c:1", InvalidLayer),
        ("-1:5:5:1", InvalidLayer),
        ("0:5:5:1", InvalidLayer),
        ("99:0:5:1", InvalidLayer),
        ("99:999999999:5:1", NotLazy),
        ("99:5:999999999:1", NotLazy),
        ("99:5:5:2", NotLazy),
        ("99:90000:5:1", InvalidLayer),
        ("999999999999999999:5:5:1", InvalidLayer),
        ("99:50:5:1", DigestMismatch),
    ],
)
def test_positions(position: str, error: type[StoreError] | None) -> None:
    blob = annotated(zstd_chunked(THREE), position=position)
    if error is None:
        assert read_toc(blob.layer, blob.read, LIMITS) is None
    else:
        refusal(blob, error)


def test_a_position_needs_a_digest_and_the_right_length() -> None:
    blob = zstd_chunked(THREE)
    refusal(annotated(blob, checksum=None), NotLazy)
    start, end = blob.toc
    for length in (1, 100_000):
        refusal(annotated(blob, position=f"{start}:{end - start}:{length}:1"), InvalidLayer)


@pytest.mark.parametrize(
    "member",
    [b"\0", b"not gzip", gzip.compress(b""), gzip.compress(bytes(512)), gzip.compress(TREE)],
    ids=["zero", "plain", "empty", "block", "archive"],
)
def test_members_that_are_no_tables(member: bytes) -> None:
    blob = estargz(archive())
    data = blob.data[: blob.toc[0]] + member + blob.data[-51:]
    layer = msgspec.structs.replace(blob.layer, size=len(data))
    refusal(LazyBlob(data, layer, blob.diff_id, blob.toc), InvalidLayer)


def test_a_failing_registry_is_no_wrong_table() -> None:
    def read(offset: int, length: int) -> bytes:
        raise RegistryTimeout("no answer")

    for blob in (estargz(THREE), zstd_chunked(THREE)):
        with pytest.raises(RegistryTimeout):
            read_toc(blob.layer, read, LIMITS)


def test_bytes_other_than_the_table_says_are_refused(tmp_path: Path) -> None:
    other = "sha256:" + "0" * 64
    for writer in WRITERS.values():
        blob = writer(THREE, chunk_size=4096, edit=change(1, chunkDigest=other))
        with pytest.raises(DigestMismatch):
            filled(toc_of(blob), blob, tmp_path)
