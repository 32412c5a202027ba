"""Writing a layer anew so that it can be loaded lazily, on all cores.

The archive is cut into units, each compressed by itself: a chunk of a file begins one. So
they can be compressed in any order, and what comes out does not depend on how many threads do
it. The headers of the source are kept byte for byte.
"""

import hashlib
import os
import stat
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, BinaryIO

import msgspec

from store.cas import Digest, digest_of
from store.estargz import NO_PREFETCH, PREFETCH
from store.index import Entry
from store.lazy_format import Chunk, Compress, FormatWriter, TocWriter
from store.manifest import Descriptor
from store.spool import Member, Spool
from store.tar_header import BLOCK
from store.tar_write import header_of

# What readers have to fetch and inflate to have one byte of a large file; stargz-snapshotter's.
CHUNK_SIZE = 4 << 20

# One call of a thread; small units are put together until it takes some milliseconds.
_JOB_SIZE = 512 << 10

_LANDMARK = b"\x0f"

_Part = bytes | int | tuple[int, int]
"""Bytes as they are, a number of zeros, or offset and length in the spool."""


class WrittenLayer(msgspec.Struct, frozen=True):
    """A layer that was written, as manifest and configuration name it."""

    descriptor: Descriptor
    diff_id: Digest


class _File(msgspec.Struct):
    """An entry on its way into the table of contents."""

    entry: Entry
    missing: int  # bytes that no chunk has yet
    chunks: list[Chunk] = []
    hash: Any = None  # of a file with several chunks


class _Unit(msgspec.Struct):
    """What is compressed by itself. It begins with ``size`` bytes of ``file`` from ``position``
    on, if it begins with a chunk."""

    parts: list[_Part] = []
    length: int = 0
    file: _File | None = None
    position: int = 0
    size: int = 0

    def add(self, part: _Part) -> None:
        """Append bytes of the archive."""
        self.parts.append(part)
        self.length += part if isinstance(part, int) else _length(part)


def _length(part: bytes | tuple[int, int]) -> int:
    return len(part) if isinstance(part, bytes) else part[1]


class _Done(msgspec.Struct):
    """A unit's bytes in the archive and in the blob, and the digest of its chunk."""

    unit: _Unit
    archive: bytes
    blob: bytes
    digest: str


def write_layer(
    spool: Spool,
    first: Sequence[Member],
    rest: Sequence[Member],
    writer: FormatWriter,
    file: BinaryIO,
    advance: Callable[[int], None],
) -> WrittenLayer:
    """Write a layer's blob.

    Args:
        first: the entries that are wanted at start, in order.
        rest: all others.
        file: where the blob goes.
        advance: is told of bytes of the archive that are done.

    Raises:
        NotLazy: the table of contents would be too long, or can't hold what a file has.
        StorageFailed, OSError: the disk.
    """
    output = _Output(writer, file)
    workers = len(os.sched_getaffinity(0))
    pool = ThreadPoolExecutor(workers)
    try:
        work = _Work(spool, writer.compressor)
        jobs: deque[Future[list[_Done]]] = deque()
        planner = _Planner(writer.cut_after, output.expect)
        for units in _batches(planner.units(_items(first, rest, writer.landmark))):
            if len(jobs) > workers + 1:
                advance(output.take(jobs.popleft().result()))
            jobs.append(pool.submit(work, units))
        while jobs:
            advance(output.take(jobs.popleft().result()))
    finally:
        pool.shutdown(cancel_futures=True)
    return output.finish()


def _items(
    first: Sequence[Member], rest: Sequence[Member], landmark: bool
) -> Iterator[tuple[Entry, Member | None]]:
    """The entries, with the landmark where it belongs."""
    for member in first:
        yield member.entry, member
    if first or landmark:
        name = PREFETCH if first else NO_PREFETCH
        yield Entry(name, stat.S_IFREG | 0o444, size=len(_LANDMARK)), None
    for member in rest:
        yield member.entry, member


class _Planner:
    """Cuts the archive into units.

    Args:
        cut_after: whether a unit ends with its chunk.
        expect: is told of each entry, in order.
    """

    def __init__(self, cut_after: bool, expect: Callable[[_File], None]) -> None:
        self._cut_after = cut_after
        self._expect = expect
        self._unit = _Unit()

    def units(self, items: Iterator[tuple[Entry, Member | None]]) -> Iterator[_Unit]:
        for entry, member in items:
            size = entry.size if stat.S_ISREG(entry.mode) else 0
            # A million directories in a row must not become one unit.
            if self._unit.length >= CHUNK_SIZE + _JOB_SIZE:
                yield self._cut()
            self._unit.add(_header(entry, member))
            file = _File(entry, size)
            self._expect(file)
            if size:
                content = iter([_LANDMARK]) if member is None else _content(member)
                yield from self._chunks(file, content)
        if self._unit.length:
            yield self._unit

    def _chunks(self, file: _File, content: Iterator[_Part]) -> Iterator[_Unit]:
        position, size = 0, file.entry.size
        while position < size:
            yield self._cut()
            unit = self._unit
            unit.file, unit.position = file, position
            unit.size = min(CHUNK_SIZE, size - position)
            while unit.length < unit.size:
                unit.add(next(content))
            position += unit.size
        if self._cut_after:
            yield self._cut()
        if size % BLOCK:
            self._unit.add(BLOCK - size % BLOCK)

    def _cut(self) -> _Unit:
        unit, self._unit = self._unit, _Unit()
        return unit


def _header(entry: Entry, member: Member | None) -> _Part:
    if member is None or member.place.segments is not None:
        return header_of(entry)
    return member.head, member.place.start - member.head


def _content(member: Member) -> Iterator[_Part]:
    """The parts of a file's content, cut where its chunks are."""
    position = 0
    for part in _stretches(member):
        length = part if isinstance(part, int) else part[1]
        done = 0
        while done < length:
            step = min(length - done, CHUNK_SIZE - position % CHUNK_SIZE)
            yield step if isinstance(part, int) else (part[0] + done, step)
            done += step
            position += step


def _stretches(member: Member) -> Iterator[int | tuple[int, int]]:
    """Holes and data of a file in turn."""
    place, size = member.place, member.entry.size
    if place.segments is None:
        yield place.start, size
        return
    position, offset = 0, place.start
    for start, length in place.segments:
        if start > position:
            yield start - position
        yield offset, length
        offset += length
        position = start + length
    if position < size:
        yield size - position


def _batches(units: Iterator[_Unit]) -> Iterator[list[_Unit]]:
    """Units put together to jobs."""
    batch: list[_Unit] = []
    length = 0
    for unit in units:
        if not unit.length:
            continue
        batch.append(unit)
        length += unit.length
        if length >= _JOB_SIZE:
            yield batch
            batch, length = [], 0
    if batch:
        yield batch


class _Work:
    """What threads do with a batch. All that takes time in it releases the interpreter lock."""

    def __init__(self, spool: Spool, compressor: Callable[[], Compress]) -> None:
        self._spool = spool
        self._compressor = compressor
        self._local = threading.local()

    def __call__(self, units: list[_Unit]) -> list[_Done]:
        compress: Compress | None = getattr(self._local, "compress", None)
        if compress is None:
            compress = self._local.compress = self._compressor()
        done = []
        for unit in units:
            archive = b"".join(map(self._bytes, unit.parts))
            digest = digest_of(archive[: unit.size]) if unit.size else ""
            done.append(_Done(unit, archive, compress(archive), digest))
        return done

    def _bytes(self, part: _Part) -> bytes:
        if isinstance(part, bytes):
            return part
        return bytes(part) if isinstance(part, int) else self._spool.read(*part)


class _Output:
    """Takes compressed units in order."""

    def __init__(self, writer: FormatWriter, file: BinaryIO) -> None:
        self._writer = writer
        self._file = file
        self._toc = TocWriter(writer)
        self._files: deque[_File] = deque()
        self._blob = hashlib.sha256()
        self._archive = hashlib.sha256()
        self._offset = 0
        self._size = 0

    def expect(self, file: _File) -> None:
        """The next entry of the table; its chunks may come later."""
        self._files.append(file)

    def take(self, batch: list[_Done]) -> int:
        """Write units; how many bytes of the archive they have."""
        before = self._size
        for done in batch:
            start = self._offset
            self._write(done.archive, done.blob)
            if done.unit.file:
                self._add_chunk(done, start)
        while self._files and not self._files[0].missing:
            file = self._files.popleft()
            self._toc.add(file.entry, _digest(file), file.chunks)
        return self._size - before

    def _add_chunk(self, done: _Done, start: int) -> None:
        unit, file = done.unit, done.unit.file
        assert file is not None
        if unit.size < file.entry.size:
            if file.hash is None:
                file.hash = hashlib.sha256()
            file.hash.update(memoryview(done.archive)[: unit.size])
        file.chunks.append(Chunk(unit.position, unit.size, done.digest, start, self._offset))
        file.missing -= unit.size

    def _write(self, archive: bytes, blob: bytes) -> None:
        self._archive.update(archive)
        self._size += len(archive)
        self._blob.update(blob)
        self._offset += len(blob)
        self._file.write(blob)

    def finish(self) -> WrittenLayer:
        """Write the table of contents."""
        ending = self._writer.end(self._toc.finish(), self._offset, self._size)
        self._write(ending.archive, ending.blob)
        descriptor = Descriptor(
            self._writer.media_type,
            f"sha256:{self._blob.hexdigest()}",
            self._offset,
            ending.annotations,
        )
        return WrittenLayer(descriptor, Digest(f"sha256:{self._archive.hexdigest()}"))


def _digest(file: _File) -> str:
    if file.hash is not None:
        return f"sha256:{file.hash.hexdigest()}"
    return file.chunks[0].digest if file.chunks else ""
