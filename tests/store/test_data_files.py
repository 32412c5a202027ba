"""The data files of a layer: where they are cut, and what is in which."""

import os
import random
import stat
from pathlib import Path

import pytest

from store.data_files import DataFiles, OpenData, cuts
from store.index import Entry
from tests.support.contents import contents_at

MIB = 1 << 20
SIZE = 64 << 10
CUTS = (4096, 12288, 40960)


def described(*sizes: int, first: int = 0) -> tuple[list[Entry], int, int]:
    """Files of these sizes, each with a directory and a link, as ``cuts`` takes them."""
    found, end = [], 0
    for number, size in enumerate(sizes):
        found.append(Entry(b"d%d" % number, stat.S_IFDIR | 0o755))
        found.append(Entry(b"%d" % number, stat.S_IFREG, size=size, offset=end if size else 0))
        found.append(Entry(b"l%d" % number, 0, link=b"%d" % number))
        end += -(-size // 4096) * 4096
    return found, first, end


def test_small_layers_have_one_file() -> None:
    assert cuts([], 0, 0) == ()
    assert cuts(*described(3000, 5000, 0, 12 * MIB)) == ()


def test_what_is_wanted_first_has_a_file_of_its_own() -> None:
    assert cuts(*described(3000, 5000, 70, 9000, first=12288)) == (12288,)
    assert cuts(*described(3000, 5000, 0, first=12288)) == ()


def test_what_is_wanted_first_is_cut_small() -> None:
    found = cuts(*described(*[MIB] * 100, first=30 * MIB))
    assert found == (*(n * MIB for n in (4, 8, 12, 16, 20, 24, 28)), 30 * MIB, 46 * MIB, *found[9:])
    assert cuts(*described(*[MIB] * 8, first=5 * MIB)) == (2 * MIB, 4 * MIB, 5 * MIB)
    table, first, size = described(*[100_000] * 20_000, first=200 * MIB)
    assert len(cuts(table, first - first % 102_400, size)) <= 20


def test_the_rest_is_cut_where_contents_begin() -> None:
    sizes = [5 * MIB + 1] * 30
    found = cuts(*described(*sizes, first=0))
    step = 5 * MIB + 4096
    assert found == tuple(range(4 * step, 30 * step, 4 * step))
    found = cuts(*described(*sizes, first=step))
    assert found == tuple(range(step, 30 * step, 4 * step))


def test_there_are_never_many() -> None:
    sizes = [random.Random(1).randrange(1, 40 * MIB) for _ in range(2000)]
    table, first, size = described(*sizes, first=4096)
    found = cuts(table, first, size)
    assert 10 < len(found) <= 13
    starts = {entry.offset for entry in table}
    assert starts.issuperset(found) and list(found) == sorted(set(found))
    assert cuts(*described(1 << 40, 5)) == (1 << 40,)


@pytest.fixture
def files(tmp_path: Path) -> DataFiles:
    found = DataFiles(tmp_path, SIZE, CUTS)
    found.create()
    return found


def test_the_parts_of_a_range(files: DataFiles) -> None:
    assert list(files.parts(0, 4096)) == [(0, 0, 4096)]
    assert list(files.parts(4096, 4097)) == [(1, 4096, 4097)]
    assert list(files.parts(100, 20000)) == [
        (0, 100, 4096),
        (1, 4096, 12288),
        (2, 12288, 20000),
    ]
    assert [number for number, _, _ in files.parts(0, SIZE)] == [0, 1, 2, 3]
    assert list(DataFiles(files.directory, SIZE).parts(5, SIZE)) == [(0, 5, SIZE)]


def test_what_is_written_anywhere_is_read(files: DataFiles) -> None:
    data = OpenData(files)
    wanted = random.Random(2).randbytes(SIZE)
    for start in range(0, SIZE, 7000):
        data.write(start, memoryview(wanted)[start : start + 7000])
    data.sync()
    for start, length in ((0, SIZE), (4095, 2), (12288, 1), (40000, 2000), (SIZE - 5, 100)):
        assert data.read(start, length) == wanted[start : start + length]
        assert contents_at(files, start, length) == wanted[start : start + length]
    data.close()
    for number, path in enumerate(files.paths):
        held = path.read_bytes()
        start, end = (0, *CUTS, SIZE)[number : number + 2]
        assert held == bytes(start) + wanted[start:end] + bytes(SIZE - end)


def test_what_was_written_is_found(files: DataFiles) -> None:
    data = OpenData(files)
    assert data.next_written(0, SIZE) == SIZE
    data.write(16384, memoryview(b"x"))
    assert data.next_written(0, SIZE) == data.next_written(5000, 50000) == 16384
    assert data.next_written(0, 16384) == 16384
    assert data.next_written(0, 9000) == 9000
    assert data.next_written(16390, SIZE) == 16390
    assert data.next_written(20480, SIZE) == SIZE
    data.close()


def test_what_is_wrong_is_named(files: DataFiles) -> None:
    assert files.wrong == ""
    os.truncate(files.paths[2], SIZE - 1)
    assert files.wrong == "data.12288"
    files.paths[1].unlink()
    assert files.wrong == "data.4096"


def test_all_are_opened_or_none(files: DataFiles) -> None:
    files.paths[-1].unlink()
    before = os.listdir("/proc/self/fd")
    with pytest.raises(FileNotFoundError):
        OpenData(files)
    assert len(os.listdir("/proc/self/fd")) == len(before)
