"""The files that hold the contents of a layer's files.

A layer that was pulled in full has one, ``data``. That of a lazy layer is cut where the contents
of a file begin, and what lies from a cut to the next one is in ``data.<cut>``: a part of which all
is here can then be read like any file, while each read of the others waits for an answer
(runtime/layerserver/fanotify_serving.py). Such an answer takes two changes of process, and
nearly all reads find what they want here already.

All have the size of the whole, with holes for what is in the others, so that an offset means the
same in each of them.
"""

import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import msgspec

from store.index import Entry

NAME = "data"

# Parts of less would soon be complete, and there are descriptors and a mark for each.
_PART_MIN = 16 << 20
# What is wanted first is read while it comes.
_FIRST_PART_MIN = 2 << 20
# The EROFS image names each as a device, in its first block.
_FIRST_PARTS, _PARTS = 8, 12


def cuts(entries: Iterable[Entry], first: int, size: int) -> tuple[int, ...]:
    """Where to cut a data file.

    Args:
        entries: those of the layer, whose contents lie in this order.
        first: so many bytes are wanted before all others; 0 if that is not known.
        size: of the data file, in bytes.
    """
    found: list[int] = []
    of_first = max(_FIRST_PART_MIN, first // _FIRST_PARTS)
    of_rest = max(_PART_MIN, (size - first) // _PARTS)
    at = min(of_first, first) or of_rest
    if at < size:
        for entry in entries:
            if entry.offset >= at:
                found.append(entry.offset)
                end = entry.offset + of_first
                at = min(end, first) if entry.offset < first else entry.offset + of_rest
    return tuple(found)


class DataFiles(msgspec.Struct, frozen=True):
    """Those in a layer's directory: of ``size`` bytes each, cut at ``cuts``, ascending."""

    directory: Path
    size: int
    cuts: tuple[int, ...] = ()

    @property
    def paths(self) -> tuple[Path, ...]:
        """In the order of what they hold."""
        return (self.directory / NAME, *(self.directory / f"{NAME}.{cut}" for cut in self.cuts))

    def parts(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Which files hold a range: their numbers, and what begins and ends where in each."""
        number = bisect_right(self.cuts, start)
        for cut in self.cuts[number:]:
            if cut >= end:
                break
            yield number, start, cut
            start = cut
            number += 1
        yield number, start, end

    def create(self) -> None:
        """Make the files, empty. Raises OSError."""
        for path in self.paths:
            with path.open("xb") as file:
                file.truncate(self.size)

    @property
    def wrong(self) -> str:
        """The name of one that is missing or cut short, so that it would read as zeros; empty if
        there is none."""
        return next((path.name for path in self.paths if size_of(path) != self.size), "")


def size_of(path: Path) -> int:
    """In bytes; -1 if there is no such file."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return -1


Opening = Callable[[Sequence[Path]], Sequence[int]]


def open_all(paths: Sequence[Path], flags: int = os.O_RDWR) -> Sequence[int]:
    """A descriptor of each file, or none. Raises OSError."""
    descriptors = []
    with ExitStack() as opened:
        for path in paths:
            descriptors.append(os.open(path, flags | os.O_CLOEXEC))
            opened.callback(os.close, descriptors[-1])
        opened.pop_all()
    return descriptors


class OpenData:
    """Data files that are open. Safe to use from several threads.

    Args:
        files: which.
        opened: gives a descriptor of each file.

    Attributes:
        descriptors: of ``files.paths``.

    Raises:
        OSError: from opening.
    """

    def __init__(self, files: DataFiles, opened: Opening = open_all) -> None:
        self.files = files
        self.descriptors = tuple(opened(files.paths))

    def read(self, offset: int, length: int) -> bytes:
        """Bytes at ``offset``. Raises OSError."""
        parts = self.files.parts(offset, offset + length)
        pieces = [os.pread(self.descriptors[n], end - start, start) for n, start, end in parts]
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def write(self, offset: int, data: memoryview) -> None:
        """Put bytes at ``offset``. Raises OSError."""
        for number, start, end in self.files.parts(offset, offset + len(data)):
            write_all(self.descriptors[number], data[start - offset : end - offset], start)

    def sync(self) -> None:
        """Have all on the disk. Raises OSError."""
        for descriptor in self.descriptors:
            os.fsync(descriptor)

    def next_written(self, start: int, end: int) -> int:
        """Where in a range the first bytes are that were written; ``end`` if none were."""
        for number, part, stop in self.files.parts(start, end):
            try:
                found = os.lseek(self.descriptors[number], part, os.SEEK_DATA)
            except OSError:  # nothing but a hole up to the end
                continue
            if found < stop:
                return found
        return end

    def close(self) -> None:
        """Let go of the files."""
        for descriptor in self.descriptors:
            os.close(descriptor)


def write_all(descriptor: int, data: memoryview, offset: int) -> None:
    """pwrite(2) all of it. Raises OSError."""
    while data:
        done = os.pwrite(descriptor, data, offset)
        offset += done
        data = data[done:]
