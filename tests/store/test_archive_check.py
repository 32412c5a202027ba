"""Layers that somebody else's index has described, compared with their archives."""

import os
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from store.archive_check import ArchiveCheck
from store.data_files import DataFiles, OpenData
from store.errors import DigestMismatch, InvalidLayer, StoreError
from store.index import Entry, IndexWriter
from tests.support import tars
from tests.support.indexing import unpacked

PIECES = [512, 3 * 512, 1 << 20]

HOLE = 3 << 20


def archives(directory: Path) -> dict[str, bytes]:
    """Archives with one of everything; those with sparse files by GNU tar."""
    tree = directory / "tree"
    (tree / "sub").mkdir(parents=True)
    with (tree / "sparse").open("wb") as file:
        for offset in (0, HOLE, 2 * HOLE):
            file.seek(offset)
            file.write(b"data at %d" % offset * 1000)
        file.truncate(3 * HOLE)
    (tree / "all hole").touch()
    os.truncate(tree / "all hole", HOLE)
    (tree / "sub" / "after").write_bytes(b"after" * 3000)
    os.link(tree / "sub" / "after", tree / "link")
    made = {
        kind: subprocess.run(
            ["tar", "-C", tree, "--sparse", f"--format={kind}", "--sort=name", "-c", "."],
            check=True,
            capture_output=True,
        ).stdout
        for kind in ("gnu", "posix")
    }
    return {"empty": tars.archive(), "by hand": BY_HAND, "long": LONG, **made}


BY_HAND = tars.archive(
    tars.directory(b"./", mode=0o700),
    tars.entry(b"empty"),
    tars.entry(b"file", data=b"content" * 1000, uid=5, mtime=7),
    tars.entry(b"aligned", data=b"4096" * 1024),
    tars.entry(b"hard", b"1", link=b"file"),
    tars.entry(b"symbolic", b"2", link=b"../file"),
    tars.entry(b"device", b"3", device=(1, 3)),
    tars.pax([(b"path", b"n" * 200), (b"SCHILY.xattr.user.a", b"value"), (b"mtime", b"1.5")])
    + tars.entry(b"short", data=b"named by pax"),
    tars.pax([(b"SCHILY.xattr.user.empty", b"")]) + tars.entry(b"bare"),
    tars.entry(b".wh.gone"),
    tars.entry(b"last", data=b"end"),
)
LONG = tars.archive(*(tars.entry(b"f%d" % n, data=b"%d" % n * n) for n in range(3000)))


class Layer:
    """What the honest way makes of an archive, to be lied about."""

    def __init__(self, archive: bytes, directory: Path) -> None:
        self.archive = archive
        self.directory = directory
        self.entries, _ = unpacked(archive, archive, directory)
        self.data = directory / "data"
        (directory / "index").unlink()

    def check(self, size: int = 1 << 20) -> None:
        with (self.directory / "index").open("wb") as file:
            index = IndexWriter(file)
            for entry in self.entries:
                index.add(entry)
            index.close()
        data = OpenData(DataFiles(self.directory, self.data.stat().st_size))
        try:
            check = ArchiveCheck(self.directory / "index", data)
            for at in range(0, len(self.archive), size):
                check.feed(memoryview(self.archive)[at : at + size])
            check.finish()
        finally:
            data.close()

    def change(self, path: bytes, fields: dict[str, object]) -> None:
        """Lie about an entry."""
        number = self.number(path)
        self.entries[number] = msgspec.structs.replace(self.entries[number], **fields)

    def number(self, path: bytes) -> int:
        return next(n for n, entry in enumerate(self.entries) if entry.path == path)

    def entry(self, path: bytes) -> Entry:
        return self.entries[self.number(path)]

    def write(self, offset: int, data: bytes) -> None:
        with self.data.open("r+b") as file:
            file.seek(offset)
            file.write(data)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return archives(tmp_path_factory.mktemp("archives"))


@pytest.fixture
def layer(tmp_path: Path) -> Layer:
    return Layer(BY_HAND, tmp_path)


@pytest.fixture(params=["gnu", "posix"])
def sparse(made: dict[str, bytes], tmp_path: Path, request: pytest.FixtureRequest) -> Layer:
    return Layer(made[request.param], tmp_path)


@pytest.mark.parametrize("size", PIECES)
@pytest.mark.parametrize("name", ["empty", "by hand", "long", "gnu", "posix"])
def test_honest_ones_pass(made: dict[str, bytes], tmp_path: Path, name: str, size: int) -> None:
    Layer(made[name], tmp_path).check(size)


def test_contents_may_be_holes_where_they_are_zeros(tmp_path: Path) -> None:
    layer = Layer(tars.archive(tars.entry(b"zeros", data=bytes(1 << 20))), tmp_path)
    os.truncate(layer.data, 0)
    os.truncate(layer.data, 1 << 20)
    layer.check()


# What tables of contents can't say of an archive.
UNSAID: dict[str, tuple[bytes, dict[str, object]]] = {
    "rounded down": (b"n" * 200, {"seconds": 1, "nanoseconds": 0}),
    "rounded up": (b"n" * 200, {"seconds": 2, "nanoseconds": 0}),
    "an attribute without value": (b"bare", {"xattrs": None}),
}


@pytest.mark.parametrize("what", UNSAID)
def test_what_could_not_be_said_may_differ(layer: Layer, what: str) -> None:
    path, fields = UNSAID[what]
    layer.change(path, fields)
    layer.check()


LIES: dict[str, tuple[bytes, dict[str, object]]] = {
    "mode": (b"file", {"mode": stat.S_IFREG | 0o4755}),
    "kind": (b"empty", {"mode": stat.S_IFIFO | 0o644}),
    "owner": (b"file", {"uid": 0}),
    "group": (b"file", {"gid": 1}),
    "name": (b"file", {"path": b"fil3"}),
    "time": (b"file", {"seconds": 8}),
    "nanoseconds": (b"n" * 200, {"nanoseconds": 1}),
    "size": (b"file", {"size": 6999}),
    "offset": (b"file", {"offset": 4096}),
    "device": (b"device", {"rdev": 5}),
    "link": (b"symbolic", {"link": b"/etc/shadow"}),
    "hard link": (b"hard", {"link": b"last"}),
    "a value": (b"n" * 200, {"xattrs": {b"user.a": b"other"}}),
    "an attribute more": (b"file", {"xattrs": {b"security.capability": b"\1"}}),
    "an attribute less": (b"n" * 200, {"xattrs": None}),
    "too early": (b"n" * 200, {"seconds": 0, "nanoseconds": 0}),
    "too late": (b"n" * 200, {"seconds": 3, "nanoseconds": 0}),
    "the root": (b"", {"mode": stat.S_IFDIR | 0o777}),
    "a whiteout": (b".wh.gone", {"path": b".wh.other"}),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_about_an_entry(layer: Layer, lie: str) -> None:
    path, fields = LIES[lie]
    layer.change(path, fields)
    with pytest.raises(DigestMismatch, match=r"is wrong: .* is another .* mode=full"):
        layer.check()


LANDMARK = b".prefetch.landmark"
STEERING = {
    "a file": (tars.entry(LANDMARK, data=b"\x0f"), True),
    "a large file": (tars.entry(LANDMARK, data=b"important"), False),
    "a directory": (tars.directory(LANDMARK, mode=0o700), False),
    "a link": (tars.entry(LANDMARK, b"2", link=b"file"), False),
    "a table": (tars.entry(b"stargz.index.json", data=b"{}" * 100), True),
    "elsewhere": (tars.entry(b"sub/" + LANDMARK, data=b"\x0f"), False),
}


@pytest.mark.parametrize("what", STEERING)
def test_only_what_steers_the_loading_may_be_left_out(tmp_path: Path, what: str) -> None:
    part, may = STEERING[what]
    file = tars.entry(b"file", data=b"content")
    layer = Layer(tars.archive(file, part), tmp_path)
    layer.check()
    layer.entries.pop()
    if may:
        os.truncate(layer.data, 4096)
        layer.check()
    else:
        with pytest.raises(DigestMismatch, match="is another in the layer"):
            layer.check()


def insert(layer: Layer) -> None:
    layer.entries.insert(2, Entry(b"more", stat.S_IFREG | 0o644))


def append(layer: Layer) -> None:
    layer.entries.append(Entry(b"more", stat.S_IFREG | 0o644))


def repeat(layer: Layer) -> None:
    layer.entries.append(layer.entries[-1])


def remove(layer: Layer) -> None:
    del layer.entries[3]


def remove_last(layer: Layer) -> None:
    layer.entries.pop()


def remove_all(layer: Layer) -> None:
    layer.entries.clear()


def swap(layer: Layer) -> None:
    layer.entries[2:4] = layer.entries[3:1:-1]


@pytest.mark.parametrize("lie", [insert, append, repeat, remove, remove_last, remove_all, swap])
def test_entries_more_fewer_or_elsewhere(layer: Layer, lie: Callable[[Layer], None]) -> None:
    lie(layer)
    with pytest.raises(DigestMismatch, match="is wrong"):
        layer.check()


@pytest.mark.parametrize("path", [b"file", b"aligned", b"n" * 200, b"last"])
@pytest.mark.parametrize("last", [False, True])
def test_other_contents(layer: Layer, path: bytes, last: bool) -> None:
    entry = layer.entry(path)
    layer.write(entry.offset + (entry.size - 1) * last, b"\xff")
    with pytest.raises(DigestMismatch, match="other contents"):
        layer.check()


def test_contents_that_are_missing(layer: Layer) -> None:
    os.truncate(layer.data, layer.entry(b"last").offset)
    with pytest.raises(DigestMismatch, match="other contents"):
        layer.check()


def test_contents_behind_a_files_end(layer: Layer) -> None:
    """A mapping of the file would show them."""
    entry = layer.entry(b"file")
    layer.write(entry.offset + entry.size, b"x")
    with pytest.raises(DigestMismatch, match="where the layer has none"):
        layer.check()
    layer.write(entry.offset + entry.size, b"\0")
    last = layer.entry(b"last")
    layer.write(last.offset + 4095, b"x")
    with pytest.raises(DigestMismatch, match="where the layer has none"):
        layer.check()


def places_in_holes(layer: Layer) -> Iterator[int]:
    start = layer.entry(b"sparse").offset
    for at in (HOLE // 2, HOLE - 1, 2 * HOLE - 1, 3 * HOLE - 1, 2 * HOLE + (64 << 10)):
        yield start + at
    yield layer.entry(b"all hole").offset
    yield layer.entry(b"all hole").offset + HOLE - 1


def test_contents_in_holes(sparse: Layer) -> None:
    for place in places_in_holes(sparse):
        sparse.write(place, b"x")
        with pytest.raises(DigestMismatch, match="where the layer has none"):
            sparse.check()
        sparse.write(place, b"\0")
    sparse.check()


def test_contents_of_sparse_files(sparse: Layer) -> None:
    start = sparse.entry(b"sparse").offset
    for at in (0, HOLE, 2 * HOLE + 10):
        sparse.write(start + at, b"\xff")
        with pytest.raises(DigestMismatch):
            sparse.check()
        sparse.write(start + at, (b"data at %d" % (at - at % HOLE) * 2)[at % HOLE :][:1])
    sparse.check()


def test_an_archive_that_is_cut_off(layer: Layer) -> None:
    layer.archive = layer.archive[: -3 * 512 - 100]
    with pytest.raises(StoreError) as caught:
        layer.check()
    assert isinstance(caught.value, InvalidLayer | DigestMismatch)
