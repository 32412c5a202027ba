"""Layers that are written anew: the same files, and what readers of the formats rely on."""

import gzip
import hashlib
import io
import json
import os
import re
import stat
import struct
import tarfile
import tempfile
import zlib
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from store.cas import Digest
from store.errors import DigestMismatch, InvalidLayer, LimitExceeded, NotLazy, StoreError
from store.lazy_format import Format
from store.lazy_writer import CHUNK_SIZE
from store.manifest import Descriptor
from store.spool import spool
from store.tree import Directory
from store.tree_builder import Builder
from store.unpack import LayerLimits
from tests.support.layouts import GZIP, PLAIN, ZSTD, compress, sha256
from tests.support.lazy import Document, LazyBlob, estargz, zstd_chunked
from tests.support.lazy_check import check_same, toc_of, unpacked
from tests.support.tars import archive, directory, entry, header, padded, pax
from tests.support.written import written

FORMATS: tuple[Format, ...] = ("estargz", "zstd:chunked")
EACH = pytest.mark.parametrize("form", FORMATS)

NOISE = hashlib.shake_128(b"noise").digest(3000)
LARGE = hashlib.shake_128(b"large").digest(2 * CHUNK_SIZE + 100_000)

ODD = archive(
    directory(b"./", mode=0o700, mtime=1_000_000_000),
    directory(b"./d/", mode=0o3771, uid=1, gid=2, mtime=1_100_000_000),
    entry(b"./d/noise", data=NOISE, mode=0o6755, uid=70_000, gid=3, mtime=1),
    entry(b"./d/empty", mtime=-5),
    entry(b"./d/hard", b"1", link=b"./d/noise"),
    entry(b"d/harder", b"1", link=b"d/hard"),
    entry(b"missing/parent/small", data=b"small", mode=0o1),
    entry(b"link", b"2", link=b"d/../d/noise", mode=0o644, mtime=3, uid=5),
    entry(b"null", b"3", device=(1, 3), mode=0o666),
    entry(b"big", b"4", device=(259, 70_001), mode=0o660),
    entry(b"fifo", b"6", mode=0o620),
    entry(b"zeros", data=bytes(50_000)),
    pax(
        [
            (b"SCHILY.xattr.user.a", b"\xff\x00value"),
            (b"mtime", b"-1700000000.25"),
            (b"path", b"long/" * 60 + "ünïcode".encode()),
            (b"comment", b"kept"),
        ]
    ),
    entry(b"short", data=b"x" * 5000),
    entry(b"d/.wh.gone", mode=0),
    entry(b"d/.wh..wh..opq", mode=0),
    entry(b"./large", data=LARGE),
    entry(b"last", data=b"1"),
)


def sparse() -> bytes:
    """Sparse files in GNU's formats: with a hole at each place, across a chunk, and all hole."""
    pieces = [(4096, b"a" * 1000), (CHUNK_SIZE - 10, b"b" * 3000), (2 * CHUNK_SIZE, b"c")]
    size = 3 * CHUNK_SIZE + 17
    numbers = b"%d\n" % len(pieces) + b"".join(b"%d\n%d\n" % (o, len(d)) for o, d in pieces)
    data = padded(numbers) + b"".join(data for _, data in pieces)
    new = [(b"major", b"1"), (b"minor", b"0"), (b"name", b"new"), (b"realsize", b"%d" % size)]
    records = [(b"GNU.sparse." + key, value) for key, value in new]
    records += [(b"SCHILY.xattr.user.a", b"\xff"), (b"mtime", b"12.5")]
    old = b"".join(b"%011o\0%011o\0" % (o, len(d)) for o, d in pieces)
    extra = {386: old.ljust(96, b"\0"), 483: b"%011o\0" % size}
    stored = b"".join(data for _, data in pieces)
    return archive(
        pax(records) + entry(b"GNUSparseFile.0/new", data=data, mode=0o640, uid=7),
        header(b"old", b"S", size=len(stored), magic=b"ustar  \0", raw=extra) + padded(stored),
        header(b"hole", b"S", magic=b"ustar  \0", raw={483: b"%011o\0" % 10_000_000}),
    )


def files(data: bytes) -> dict[str, Any]:
    """Of a tar archive: name to content, or what it is instead, and the attributes of each."""
    found = {}
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for member in tar:
            name = os.path.normpath(member.name)
            file = tar.extractfile(member) if member.isreg() else None
            xattrs = {k: v for k, v in member.pax_headers.items() if k.startswith("SCHILY")}
            found[name] = (
                file.read() if file else member.linkname,
                (member.type if not member.issparse() else b"0", member.mode, member.uid),
                (member.gid, member.mtime, member.devmajor, member.devminor, xattrs),
            )
    return found


def inflated(blob: LazyBlob) -> bytes:
    """The archive, as programs inflate it that know nothing of the formats."""
    if blob.layer.media_type == GZIP:
        return gzip.decompress(blob.data)
    with zstandard.ZstdDecompressor().stream_reader(blob.data, read_across_frames=True) as reader:
        return reader.read()


EXTRA = {".prefetch.landmark", ".no.prefetch.landmark", "stargz.index.json"}


@EACH
@pytest.mark.parametrize("data", [ODD, sparse(), archive(), b""], ids=("odd", "sparse", "none", ""))
def test_other_programs_find_the_same_files(form: Format, data: bytes) -> None:
    blob = written(data, form)
    result = inflated(blob)
    assert sha256(result) == blob.diff_id
    assert (sha256(blob.data), len(blob.data)) == (blob.layer.digest, blob.layer.size)
    after = files(result)
    assert set(after) & EXTRA == (EXTRA - {".prefetch.landmark"} if form == "estargz" else set())
    assert {k: v for k, v in after.items() if k not in EXTRA} == (files(data) if data else {})
    check_same(blob)


@EACH
@pytest.mark.parametrize("kind", [GZIP, ZSTD])
def test_compressed_sources(form: Format, kind: str) -> None:
    assert written(ODD, form, media_type=kind, blob=compress(ODD, kind)) == written(ODD, form)


def test_headers_stay_byte_for_byte() -> None:
    result = inflated(written(ODD, "zstd:chunked"))
    assert result[: len(ODD)] == ODD


@EACH
def test_cores_do_not_matter(form: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for cores in (1, 2, 7):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, n=cores: set(range(n)))
        results.append(written(ODD, form, [b"last"]))
    assert results[0] == results[1] == results[2]


@EACH
def test_converted_twice_is_converted_once(form: Format) -> None:
    once = written(ODD, form, [b"large"])
    for first in FORMATS:
        again = inflated(written(ODD, first, [b"large"]))
        assert written(again, form, [b"large"]).layer == once.layer
    others = estargz(archive(entry(b".prefetch.landmark", data=b"\x0f"), entry(b"f", data=b"1")))
    plain = written(archive(entry(b"f", data=b"1")))
    assert written(inflated(others)).layer == plain.layer
    assert zstd_chunked(ODD).layer != once.layer


# --- eStargz, read as docs/estargz.md says ------------------------------------------------


def stargz_toc(blob: LazyBlob) -> Document:
    """The table of contents by way of the footer, with its digest checked."""
    footer = re.fullmatch(
        rb"\x1f\x8b\x08\x04.{6}\x1a\0SG\x16\0([0-9a-f]{16})STARGZ\x01\0\0\xff\xff\0{8}",
        blob.data[-51:],
        re.DOTALL,
    )
    assert footer
    assert gzip.decompress(blob.data[-51:]) == b""
    member = gzip.decompress(blob.data[int(footer[1], 16) : -51])
    with tarfile.open(fileobj=io.BytesIO(member)) as tar:
        (name,) = tar.getnames()
        assert name == "stargz.index.json"
        file = tar.extractfile(name)
        assert file
        text = file.read()
    annotations = blob.layer.annotations or {}
    assert annotations["containerd.io/snapshot/stargz/toc.digest"] == sha256(text)
    assert annotations["io.containers.estargz.uncompressed-size"] == str(len(inflated(blob)))
    document: Document = json.loads(text)
    assert document["version"] == 1
    return document


def member_at(blob: LazyBlob, offset: int) -> bytes:
    """What the gzip member that begins there holds."""
    return zlib.decompressobj(wbits=31).decompress(blob.data[offset:])


def test_estargz_structure() -> None:
    blob = written(ODD)
    toc = stargz_toc(blob)["entries"]
    offsets = [item["offset"] for item in toc if item.get("offset")]
    assert offsets == sorted(set(offsets)), "each chunk has a member of its own"
    contents: dict[str, bytes] = {}
    for item in toc:
        if item["type"] not in ("reg", "chunk") or not item.get("offset"):
            continue
        name = item["name"]
        size = item.get("chunkSize", item.get("size"))
        data = member_at(blob, item["offset"])[:size]
        assert item["chunkDigest"] == sha256(data)
        assert item.get("chunkOffset", 0) == len(contents.get(name, b""))
        contents[name] = contents.get(name, b"") + data
    digests = {item["name"]: item["digest"] for item in toc if item.get("digest")}
    assert {name: sha256(data) for name, data in contents.items()} == digests
    assert contents["large"] == LARGE
    assert [item["chunkSize"] for item in toc if item["name"] == "large"] == [
        CHUNK_SIZE,
        CHUNK_SIZE,
        100_000,
    ]
    by_name = {item["name"]: item for item in toc if item["type"] != "chunk"}
    assert by_name["./"]["type"] == "dir"
    assert by_name["d/hard"] == {"type": "hardlink", "name": "d/hard", "linkName": "d/noise"}
    odd = by_name["long/" * 60 + "ünïcode"]
    assert odd["modtime"] == "1916-02-18T01:46:39.75Z"
    assert odd["xattrs"] == {"user.a": "/wB2YWx1ZQ=="}
    assert (by_name["big"]["devMajor"], by_name["big"]["devMinor"]) == (259, 70_001)
    assert by_name["d/noise"]["mode"] == 0o6755
    assert "offset" not in by_name["d/empty"]


def test_zstd_chunked_structure() -> None:
    blob = written(ODD, "zstd:chunked")
    annotations = blob.layer.annotations or {}
    prefix = "io.github.containers.zstd-chunked."
    offset, length, size, kind = map(int, annotations[prefix + "manifest-position"].split(":"))
    table = blob.data[offset : offset + length]
    assert annotations[prefix + "manifest-checksum"] == sha256(table)
    assert struct.unpack("<II", blob.data[offset - 8 : offset]) == (0x184D2A50, length)
    footer = blob.data[-72:]
    assert struct.unpack("<II", footer[:8]) == (0x184D2A50, 64)
    assert struct.unpack("<4Q", footer[8:40]) == (offset, length, size, kind)
    assert kind == 1
    assert footer[-8:] == b"GNUlInUx"
    text = zstandard.decompress(table)
    assert len(text) == size
    items = json.loads(text)["entries"]
    contents: dict[str, bytes] = {}
    ends: dict[str, int] = {}
    for number, item in enumerate(items):
        if start := item.get("offset"):
            # A frame has a chunk, the whole chunk, and nothing but the chunk.
            later = [other["offset"] for other in items[number + 1 :] if other.get("offset")]
            same = [other for other in items[number + 1 :] if other["name"] == item["name"]]
            end = ends.setdefault(item["name"], item.get("endOffset", 0))
            data = zstandard.decompress(blob.data[start : later[0] if same else end])
            assert len(data) == item.get("chunkSize", item.get("size"))
            if "chunkSize" in item:
                assert item["chunkDigest"] == sha256(data)
            contents[item["name"]] = contents.get(item["name"], b"") + data
    digests = {item["name"]: item["digest"] for item in items if item.get("digest")}
    assert {name: sha256(data) for name, data in contents.items()} == digests
    assert contents["large"] == LARGE


# --- what goes first ----------------------------------------------------------------------


def names(blob: LazyBlob) -> list[str]:
    """The archive's, in order."""
    with tarfile.open(fileobj=io.BytesIO(inflated(blob))) as tar:
        return tar.getnames()


@EACH
def test_a_trace(form: Format) -> None:
    blob = written(ODD, form, [b"last", b"d/harder", b"nowhere", b"d", b"link", b"d/.wh.gone"])
    assert names(blob)[:7] == [
        *(".", "last", "./d", "./d/noise", "./d/hard", "d/harder"),
        ".prefetch.landmark",
    ]
    check_same(blob)
    toc = toc_of(blob)
    assert 0 < toc.spans.prefetch_end < 10_000
    assert toc_of(written(ODD, form)).spans.prefetch_end == 0
    assert toc_of(written(ODD, form, [b"nowhere"])).spans.prefetch_end == 0


def test_what_deletes_stays_before_what_replaces() -> None:
    data = archive(
        directory(b"a/"),
        entry(b"a/.wh.b"),
        directory(b"a/b/"),
        entry(b"a/b/.wh..wh..opq"),
        entry(b"a/b/.wh.f"),
        entry(b"a/b/.wh.other"),
        entry(b"a/b/f", data=b"1"),
        entry(b"a/b/later", data=b"1"),
        entry(b".wh.a"),
    )
    assert names(written(data, "zstd:chunked", [b"a/b/f"])) == [
        *("a", "a/.wh.b", "a/b", "a/b/.wh..wh..opq", "a/b/.wh.f", "a/b/f", ".prefetch.landmark"),
        *("a/b/.wh.other", "a/b/later", ".wh.a"),
    ]


def test_the_last_entry_of_a_name_counts() -> None:
    data = archive(
        directory(b"d/", mode=0o700),
        entry(b"d/f", data=b"old"),
        directory(b"d/", mode=0o755),
        entry(b"d/f", data=b"new"),
    )
    blob = written(data)
    assert [name for name in names(blob) if name not in EXTRA] == ["d", "d/f"]
    found = files(inflated(blob))
    assert found["d/f"][0] == b"new"
    assert found["d"][1][1] == 0o755


UNFIT = {
    "not in UTF-8": [entry(b"\xff", data=b"1")],
    "not in UTF-8, which": [entry("\ufffd".encode(), data=b"1")],
    "/text' has a name that is not": [entry(b"text", b"2", link=b"\xff")],
    "'/l' is a hard link to '/lower'": [entry(b"l", b"1", link=b"lower")],
    "'/l' is a hard link to '/later'": [entry(b"l", b"1", link=b"later"), entry(b"later")],
    "'/l' is a hard link to '/l'": [entry(b"l", b"1", link=b"l")],
    "'/l' is a hard link to '/d'": [directory(b"d/"), entry(b"l", b"1", link=b"d")],
    "'/a' is there twice": [entry(b"a"), entry(b"l", b"1", link=b"a"), entry(b"a", data=b"1")],
    "'/b' is there twice": [entry(b"b"), directory(b"b/")],
    "'/l/f' leads through '/l'": [entry(b"l", b"2", link=b"d"), entry(b"l/f")],
    "'/x/y/z' leads through '/x'": [entry(b"x/y/z"), entry(b"x")],
    "'/.wh.d/f' depends on a name": [entry(b".wh.d/f")],
    "'/l' depends on a name": [entry(b"d/.wh.f"), entry(b"l", b"1", link=b"d/.wh.f")],
    "'/.prefetch.landmark' has a name": [directory(b".prefetch.landmark/")],
    "'/.no.prefetch.landmark' has a name": [entry(b".no.prefetch.landmark", data=b"longer")],
    "'/old' has a time": [entry(b"old", mtime=-(1 << 60))],
    "'/new' has a time": [entry(b"new", mtime=1 << 60)],
}


@EACH
@pytest.mark.parametrize("why", UNFIT)
def test_what_no_table_can_describe(form: Format, why: str) -> None:
    with pytest.raises(NotLazy, match=re.escape(why)):
        written(archive(*UNFIT[why]), form)


# --- hostile layers -----------------------------------------------------------------------


HOSTILE: dict[str, tuple[bytes, type[StoreError]]] = {
    "out of the image": (archive(entry(b"../f", data=b"1")), InvalidLayer),
    "cut off": (ODD[:5000], InvalidLayer),
    "wrong number or checksum": (b"\1" * 1024, InvalidLayer),
    "character device 0:0": (archive(entry(b"f", b"3", device=(0, 0))), InvalidLayer),
    "more than 3 files": (archive(*[entry(b"%d" % n) for n in range(4)]), LimitExceeded),
    "layer's files have more": (
        archive(header(b"f", b"S", magic=b"ustar  \0", raw={483: b"77777777777\0"})),
        LimitExceeded,
    ),
}


@EACH
@pytest.mark.parametrize("why", HOSTILE)
def test_hostile_layers(form: Format, why: str) -> None:
    data, error = HOSTILE[why]
    with pytest.raises(error, match=why) as caught:
        written(data, form, limits=LayerLimits(layer_entries=3, layer_bytes=1 << 30))
    assert "\n" not in caught.value.sentence


def test_an_archive_of_another_digest(tmp_path: Path) -> None:
    with pytest.raises(DigestMismatch):
        spool(iter([ODD]), PLAIN, written(ODD).diff_id, LayerLimits(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_hundred_megabytes_of_zeros() -> None:
    data = archive(entry(b"zeros", data=bytes(100 << 20)))
    blob = written(data, media_type=GZIP, blob=compress(data, GZIP))
    assert len(blob.data) < 200_000
    assert len(stargz_toc(blob)["entries"]) == 26
    assert sha256(inflated(blob)) == blob.diff_id


@EACH
def test_a_long_row_of_directories(form: Format) -> None:
    blob = written(archive(*[directory(b"%d/" % n) for n in range(20_000)]), form)
    assert len(list(toc_of(blob).entries)) == 20_000
    check_same(blob)


# --- any layer ----------------------------------------------------------------------------


_names = st.sampled_from([b"a", b"b", "ö".encode(), b".wh.a", b".wh..wh..opq", b"x" * 99])
_paths = st.lists(_names, min_size=1, max_size=3).map(b"/".join).filter(lambda p: len(p) < 100)
_entries = st.one_of(
    st.builds(lambda path, size: entry(path, data=NOISE[:size]), _paths, st.integers(0, 3000)),
    st.builds(lambda path, mode: directory(path + b"/", mode=mode), _paths, st.integers(0, 0o7777)),
    st.builds(lambda path, link: entry(path, b"2", link=link), _paths, _paths),
    st.builds(lambda path, link: entry(path, b"1", link=link), _paths, _paths),
)


def _tree(blob: LazyBlob) -> Any:
    """The tree of a whole layer, and the contents of its files; None if it is refused."""
    builder = Builder()
    contents: dict[bytes, bytes] = {}
    try:
        with tempfile.TemporaryDirectory() as directory:
            entries, data = unpacked(blob, Path(directory))
    except InvalidLayer:
        return None
    for item in entries:
        contents.pop(item.path, None)
        if stat.S_ISREG(item.mode):
            contents[item.path] = data[item.offset : item.offset + item.size]
        item.offset = 0
        try:
            builder.add(item)
        except InvalidLayer:
            return None
    root = builder.finish().root
    _forget_opaque(root)
    return root, contents


def _forget_opaque(directory: Directory) -> None:
    """It means nothing in a lowest layer, and depends on the order there."""
    directory.opaque = False
    for node in directory.children.values():
        if isinstance(node, Directory):
            _forget_opaque(node)


@settings(max_examples=80, deadline=None)
@given(st.lists(_entries, max_size=12), st.lists(_paths, max_size=4), st.sampled_from(FORMATS))
def test_any_layer(parts: list[bytes], first: list[bytes], form: Format) -> None:
    """Whatever is put first, the files are the same, or it is refused."""
    data = archive(*parts)
    before = _tree(
        LazyBlob(data, Descriptor(PLAIN, sha256(data), len(data)), Digest(sha256(data)), (0, 0))
    )
    try:
        blob = written(data, form, first)
    except NotLazy:
        return
    if before:
        assert _tree(blob) == before
        check_same(blob)
