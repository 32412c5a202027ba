"""Describing layers here and in a process of its own, which must give the same."""

import errno
import os
import select
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import msgspec
import pytest

from store.cas import Digest
from store.describer import Describer, Describing
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


@contextmanager
def describing(
    entries: Sequence[Entry], apart: bool, index: Path, most: int
) -> Iterator[Describing]:
    """The image goes beside the index."""
    with (
        closing(Describer()) as describer,
        index.with_name("meta").open("xb") as meta,
        describer.describing(Layer(entries, apart), index, meta, most) as description,
    ):
        yield description


def described(entries: Sequence[Entry], directory: Path, apart: bool) -> tuple[Description, bytes]:
    directory.mkdir()
    index = directory / "index"
    index.touch()
    with describing(entries, apart, index, 3500) as description:
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
    with describing([], True, index, 10):
        pass


def test_a_process_that_is_killed(tmp_path: Path) -> None:
    index = tmp_path / "index"
    write_index(index, MANY)
    with describing(MANY, True, index, 10) as description:
        os.kill(int(children().split()[-1]), signal.SIGKILL)
        description.begin(FRAME)
        with pytest.raises(StoreError, match=r"killed by signal 9; .*memory"):
            description.result()


def test_a_process_that_was_started_ahead(tmp_path: Path) -> None:
    with closing(Describer()) as describer:
        describer.start_ahead()
        ahead = children()

        def describe(name: str, is_large: bool = False) -> Description:
            """In the process, since what the layer has is in the index alone."""
            index = tmp_path / name
            write_index(index, LAYERS[name])
            with (
                index.with_suffix(".meta").open("xb") as meta,
                describer.describing(Layer([], is_large), index, meta, 3500) as description,
            ):
                description.begin(FRAME)
                return description.result()

        assert describe("many").inodes == 3051
        with pytest.raises(InvalidLayer, match="leads through"):
            describe("through a file")
        assert describe("directory may be below").depends
        assert children() == ahead
        pid = int(ahead.split()[-1])
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert describe("empty").inodes == 1
        assert children() != ahead
        # What took much memory goes, and so does what nobody waits for any more.
        for is_large, given_up in ((True, False), (False, True)):
            before = children()
            if given_up:
                (tmp_path / "meta").touch()
                with (
                    (tmp_path / "meta").open("wb") as meta,
                    describer.describing(Layer([], False), tmp_path / "many", meta, 10),
                ):
                    pass
            else:
                describe("link to what may be below", is_large)
            assert children() != before
            assert len(children().split()) == len(ahead.split())


def test_a_process_ends_with_whoever_started_it() -> None:
    code = """
import os
from pathlib import Path
from store.describer import Describer
describer = Describer()
describer.start_ahead()
print(Path(f"/proc/self/task/{os.getpid()}/children").read_text(), flush=True)
os.kill(os.getpid(), 9)
"""
    ended = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=False)
    assert ended.returncode == -9
    with suppress(ProcessLookupError):
        left = os.pidfd_open(int(ended.stdout))
        assert select.select([left], [], [], 10)[0]
        os.close(left)


@pytest.mark.parametrize("apart", [False, True])
def test_a_disk_that_is_full(tmp_path: Path, apart: bool) -> None:
    full = tmp_path / "full"
    full.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", full], check=True)
    try:
        write_index(full / "index", MANY)
        with (
            pytest.raises(OSError) as caught,
            describing(MANY, apart, full / "index", 10_000) as description,
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
