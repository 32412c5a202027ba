"""One layer blob on its way to disk: inflate, hash, parse and write, all at once.

Three threads share the work, and all that takes time releases the interpreter lock: the
caller's inflates (and waits for the network, inside the caller's iterator), a
second hashes the tar archive, a third parses it and writes the data file. Buffers go
round in a ring, so memory doesn't depend on the layer's size, only (about 0.3 KB
each) on how many files it has.
"""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import msgspec

from store.cas import WRITEBACK, Digest, start_writeback
from store.errors import DigestMismatch, InvalidLayer, LimitExceeded, PullCancelled
from store.index import Entry, IndexWriter
from store.inflate import ChunkReader, inflated
from store.tar import TarParser
from store.tar_names import shown
from store.tree import Tree
from store.tree_builder import Builder

# A buffer is inflated in about 2 ms: long against the 20 µs that handing it on costs,
# short against a pull. Six keep every thread busy when another falls behind for a moment.
BUFFER_SIZE = 1 << 20
BUFFERS = 6

ALIGNMENT = 4096
_ZEROS = memoryview(bytes(ALIGNMENT))
_IOV_MAX = 1024  # what pwritev(2) takes at once
_DATA_MAX = 1 << 43  # half of what 32-bit block numbers and ext4 can address


Count = Annotated[int, msgspec.Meta(ge=1)]


class LayerLimits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one layer may cost. Above any of these it is refused with LimitExceeded."""

    # Inflated, and again for file sizes with holes counted. The largest public images (CUDA
    # with models) have layers of 10 to 30 GB; 64 GiB is what a hostile one may fill.
    layer_bytes: Count = 64 << 30
    # Files and directories. A full Debian desktop has 300,000; a million, which is refused, would
    # take 0.3 GB of memory while the layer is unpacked.
    layer_entries: Count = 900_000
    # Names, link texts and attributes together, which are in memory too. A million names
    # have about 60 MB; attributes are rare and small (a capability has 24 bytes).
    layer_metadata_bytes: Count = 256 << 20
    # Inflated over compressed size, looked at from ratio_floor inflated bytes on. Deflate can
    # reach 1032, zstd 30,000; real layers stay below 20, and those full of zeros (an
    # empty database) seldom exceed a gigabyte.
    layer_ratio: Count = 200
    ratio_floor: Count = 1 << 30


class Unpacked(msgspec.Struct, frozen=True):
    """What a blob turned out to hold: the tree, and the data file's size in bytes.

    ``needs_lower`` says why the layer can't be the lowest one; empty if it can. Then ``tree`` is
    incomplete.
    """

    tree: Tree
    data_size: int
    needs_lower: str


def unpack_blob(
    chunks: Iterator[bytes],
    media_type: str,
    diff_id: Digest,
    data_path: Path,
    index_path: Path,
    limits: LayerLimits,
    cancelled: Callable[[], bool],
) -> Unpacked:
    """Read a blob once; write its data file and index. Neither is synced to disk.

    Raises:
        InvalidLayer, LimitExceeded, UnsupportedMediaType: see their sentences.
        DigestMismatch: the archive is not the one that diff_id names.
        PullCancelled: ``cancelled()`` said so; it is asked for every buffer.
        OSError: from the two files; and whatever ``chunks`` raises.
    """
    source = ChunkReader(chunks)
    reader = inflated(source, media_type)
    digest = hashlib.sha256()
    data_fd = os.open(data_path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with index_path.open("xb") as index_file:
            consumer = _Consumer(DataFile(data_fd), IndexWriter(index_file), limits)
            with ThreadPoolExecutor(1) as hashing, ThreadPoolExecutor(1) as parsing:
                ring = Ring()
                total = 0
                while True:
                    if cancelled():
                        raise PullCancelled("the pull was cancelled")
                    buffer = ring.free_buffer()
                    count = reader.fill(buffer)
                    total += count
                    check_size(total, source.consumed, limits)
                    view = buffer[:count]
                    ring.used(
                        buffer,
                        hashing.submit(digest.update, view),
                        parsing.submit(consumer.take, view),
                    )
                    if count < len(buffer):
                        break
                ring.drain()
            unpacked = consumer.finish()
    finally:
        os.close(data_fd)
    check_diff_id(Digest(f"sha256:{digest.hexdigest()}"), diff_id)
    return unpacked


def check_size(total: int, consumed: int, limits: LayerLimits) -> None:
    """Raises LimitExceeded: so many bytes out of so many are too much."""
    if total > limits.layer_bytes:
        raise LimitExceeded(
            f"the layer unpacks to more than {limits.layer_bytes} bytes; "
            "raise layer_bytes in the store's configuration if you trust the image"
        )
    if total > limits.ratio_floor and total > consumed * limits.layer_ratio:
        raise LimitExceeded(
            f"the layer unpacks to more than {limits.layer_ratio} times its compressed size; "
            "raise layer_ratio in the store's configuration if you trust the image"
        )


def check_metadata(total: int, limits: LayerLimits) -> None:
    """Raises LimitExceeded: names, link texts and attributes of so many bytes are too much."""
    if total > limits.layer_metadata_bytes:
        raise LimitExceeded(
            f"the names and attributes in the layer have more than "
            f"{limits.layer_metadata_bytes} bytes; raise layer_metadata_bytes in the "
            "store's configuration if you trust the image"
        )


def attributes_size(entry: Entry) -> int:
    """Of the entry's extended attributes, names and values, in bytes."""
    return sum(len(name) + len(value) for name, value in (entry.xattrs or {}).items())


def check_content(entry: Entry, limits: LayerLimits) -> None:
    """Raises LimitExceeded: with the entry's content the data file is too large."""
    if entry.offset + entry.size > min(limits.layer_bytes, _DATA_MAX):
        raise LimitExceeded(
            f"{shown(entry.path)} in the layer has {entry.size} bytes, with which the layer's "
            f"files have more than {limits.layer_bytes}; raise layer_bytes in the "
            "store's configuration if you trust the image"
        )


def check_diff_id(found: Digest, diff_id: Digest) -> None:
    """Raises DigestMismatch: the archive is not the one that the image config names."""
    if found != diff_id:
        raise DigestMismatch(
            f"the layer unpacks to an archive with digest {found}, but the image config lists "
            f"{diff_id}; the image has to be built or pushed again"
        )


def aligned(end: int) -> int:
    """Where in the data file the content after one that ends here begins."""
    return end + -end % ALIGNMENT


class Ring:
    """Buffers that come back when the work that uses them is done.

    Waiting raises what the work raised.
    """

    def __init__(self) -> None:
        self._free = [memoryview(bytearray(BUFFER_SIZE)) for _ in range(BUFFERS)]
        self._busy: deque[tuple[memoryview, tuple[Future[Any], ...]]] = deque()

    def free_buffer(self) -> memoryview:
        """A buffer that nobody uses; waits for one."""
        if not self._free:
            self._wait()
        return self._free.pop()

    def used(self, buffer: memoryview, *work: Future[Any]) -> None:
        """The buffer is free again when all of ``work`` is done."""
        self._busy.append((buffer, work))

    def drain(self) -> None:
        """Wait for all work."""
        while self._busy:
            self._wait()

    def _wait(self) -> None:
        buffer, work = self._busy.popleft()
        for future in work:
            future.result()
        self._free.append(buffer)


class _Consumer:
    """Takes the archive's bytes in order, in one thread."""

    def __init__(self, data: "DataFile", index: IndexWriter, limits: LayerLimits) -> None:
        self._data = data
        self._index = index
        self._limits = limits
        self._parser = TarParser(data)
        self._builder = Builder(max_inodes=limits.layer_entries)
        self._add = self._add_to_tree
        self._needs_lower = ""
        self._metadata = 0

    def take(self, view: memoryview) -> None:
        index = self._index.add
        for entry in self._parser.feed(view):
            self._add(entry)
            index(entry)
            self._metadata += len(entry.path) + len(entry.link)
            if entry.xattrs is not None or entry.size > BUFFER_SIZE:
                self._check(entry)
        self._data.flush()
        check_metadata(self._metadata, self._limits)

    def finish(self) -> Unpacked:
        self._parser.finish()
        self._index.close()
        tree = self._builder.finish()
        return Unpacked(tree, self._data.finish(), self._needs_lower or tree.unresolved)

    def _add_to_tree(self, entry: Entry) -> None:
        """Apply the entry as if there were no lower layers.

        What is wrong then may be right over them, where a missing parent turns out to be a
        symbolic link: so that error has to wait until they are known.
        """
        try:
            self._builder.add(entry)
        except InvalidLayer as error:
            if not self._builder.depends:
                raise
            self._needs_lower = error.sentence
            self._add = self._skip

    def _skip(self, entry: Entry) -> None:
        pass

    def _check(self, entry: Entry) -> None:
        self._metadata += attributes_size(entry)
        check_content(entry, self._limits)


class DataFile:
    """The layer's contents in one file, each at a multiple of 4096 (``tar.Contents``).

    Bytes are collected as views and written with few system calls, zeros between
    contents included: so the file is written in one sweep. Only what sparse files leave
    out becomes holes. The kernel is told to start writing to the disk on the way: at the
    end 240 MB are synced in 5 ms instead of 150 ms, so a layer can be durable before it
    appears, at no measurable cost.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._end = 0  # of the latest content
        self._start = 0  # where the collected views go
        self._views: list[memoryview] = []
        self._position = 0
        self._sent = 0  # up to here the kernel is writing back

    def begin(self, entry: Entry) -> int:
        start = aligned(self._end)
        self._end = start + entry.size
        gap = start - self._position
        if gap >= ALIGNMENT:
            self.seek(start)
        elif gap:
            self._views.append(_ZEROS[:gap])
            self._position = start
        return start

    def seek(self, position: int) -> None:
        if position != self._position:
            self.flush()
            self._start = self._position = position

    def write(self, view: memoryview) -> None:
        self._views.append(view)
        self._position += len(view)

    def flush(self) -> None:
        """Write what was collected. Raises OSError."""
        for first in range(0, len(self._views), _IOV_MAX):
            self._write(self._views[first : first + _IOV_MAX])
        self._views.clear()
        if self._start - self._sent >= WRITEBACK:
            start_writeback(self._fd, self._sent, self._start - self._sent)
            self._sent = self._start

    def finish(self) -> int:
        """Round the file up to whole blocks; its size."""
        self.flush()
        size = aligned(self._end)
        os.truncate(self._fd, size)
        return size

    def _write(self, views: list[memoryview]) -> None:
        wanted = sum(map(len, views))
        while wanted:
            done = os.pwritev(self._fd, views, self._start)
            self._start += done
            wanted -= done
            if wanted:  # the disk is full, which the next call says, or a signal came
                rest = memoryview(b"".join(views))[done:]
                views = [rest]
