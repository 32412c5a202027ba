"""Describing layers here and in a process of its own, which must give the same."""

import errno
import os
import signal
import stat
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import msgspec
import pytest

from store.cas import Digest
from store.describer import describing
from store.description import Description, Frame
from store.errors import InvalidLayer, LimitExceeded, StoreError
from store.index import Entry, write_index
from store.layers import Layers
from store.lazy import LazyRecord
from store.manifest import Descriptor
from tests.support.layouts import GZIP, sha256
from tests.support.spans import HandMade, nobody_fills

REG, DIR = stat.S_IFREG | 0o644, stat.S_IFDIR | 0o755
FRAME = Frame(8192, bytes(range(16)))
MANY = [Entry(b"d%d/f%d" % (n % 50, n), REG, size=n, seconds=n) for n in range(3000)]
LAYERS = {
    "many": [Entry(b"", DIR, uid=3), *MANY],
    "empty": [],
    "link to what may be below": [Entry(b"h", 0, link=b"below"), Entry(b"f", REG)],
    "directory may be below": [Entry(b"d/.wh.x", REG), Entry(b"d/f", REG)],
    "through a file": [Entry(b"f", REG), Entry(b"f/g", REG)],
    "too many": [Entry(b"%d" % n, REG) for n in range(4000)],
}


class Layer(msgspec.Struct):
    entries: Sequence[Entry]
    is_large: bool


def described(entries: Sequence[Entry], directory: Path, apart: bool) -> tuple[Description, bytes]:
    directory.mkdir()
    index, image = directory / "index", directory / "meta"
    index.touch()
    with (
        image.open("xb") as meta,
        closing(describing(Layer(entries, apart), index, meta, 3500)) as description,
    ):
        write_index(index, entries, description.block)
        # The directory gets another name meanwhile.
        directory.rename(directory.with_suffix(".named"))
        description.begin(FRAME)
        result = description.result()
    return result, (directory.with_suffix(".named") / "meta").read_bytes()


@pytest.fixture(autouse=True)
def nothing_runs_on() -> Iterator[None]:
    before = children()
    yield
    assert children() == before


def children() -> str:
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text()


@pytest.mark.parametrize("entries", LAYERS.values(), ids=LAYERS)
def test_both_ways_give_the_same(tmp_path: Path, entries: list[Entry]) -> None:
    found: list[object] = []
    for apart in (False, True):
        try:
            found.append(described(entries, tmp_path / str(apart), apart))
        except StoreError as error:
            found.append((type(error), error.sentence))
    assert found[0] == found[1]


def test_what_they_give(tmp_path: Path) -> None:
    assert described(LAYERS["many"], tmp_path / "a", True)[0].inodes == 3051
    assert (
        "below"
        in described(LAYERS["link to what may be below"], tmp_path / "b", True)[0].needs_lower
    )
    assert described(LAYERS["directory may be below"], tmp_path / "c", True)[0].depends
    with pytest.raises(InvalidLayer, match="leads through"):
        described(LAYERS["through a file"], tmp_path / "d", True)
    with pytest.raises(LimitExceeded, match="more than 3500"):
        described(LAYERS["too many"], tmp_path / "e", True)


def test_a_layer_that_is_given_up(tmp_path: Path) -> None:
    index = tmp_path / "index"
    index.touch()
    with (tmp_path / "meta").open("xb") as meta:
        describing(Layer([], True), index, meta, 10).close()


def test_a_process_that_is_killed(tmp_path: Path) -> None:
    index = tmp_path / "index"
    write_index(index, MANY)
    with (
        (tmp_path / "meta").open("xb") as meta,
        closing(describing(Layer(MANY, True), index, meta, 10)) as description,
    ):
        os.kill(int(children().split()[-1]), signal.SIGKILL)
        description.begin(FRAME)
        with pytest.raises(StoreError, match=r"killed by signal 9; .*memory"):
            description.result()


@pytest.mark.parametrize("apart", [False, True])
def test_a_disk_that_is_full(tmp_path: Path, apart: bool) -> None:
    index, full = tmp_path / "index", tmp_path / "full"
    write_index(index, MANY)
    full.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", full], check=True)
    try:
        with (
            pytest.raises(OSError) as caught,
            (full / "meta").open("xb") as meta,
            closing(describing(Layer(MANY, apart), index, meta, 10_000)) as description,
        ):
            description.begin(FRAME)
            description.result()
        assert caught.value.errno == errno.ENOSPC
    finally:
        subprocess.run(["umount", full], check=True)


def test_large_layers_are_made_as_small_ones(tmp_path: Path) -> None:
    made = HandMade({"a": b"a" * 100_000, "b": b"b"})
    record = LazyRecord(Descriptor(GZIP, sha256(made.blob), len(made.blob)), ("docker://x/y:z",))
    found = []
    for made.is_large in (False, True):
        layers = Layers(tmp_path / str(made.is_large))
        layer = layers.add_lazy(Digest(made.diff_id), made, record, [], nobody_fills)
        found.append(
            (
                (layer.directory / "meta.erofs").read_bytes(),
                msgspec.structs.replace(layer.record, instance=""),
                sorted(os.listdir(layer.directory)),
            )
        )
        made.entries.append(Entry(b"a/c", REG))
        layers = Layers(tmp_path / f"{made.is_large} but wrong")
        with pytest.raises(InvalidLayer, match="leads through"):
            layers.add_lazy(Digest(made.diff_id), made, record, [], nobody_fills)
        made.entries.pop()
        assert not list((tmp_path / f"{made.is_large} but wrong").glob("*/index"))
    assert found[0] == found[1]
