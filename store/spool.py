"""A layer's archive inflated into a file without a name, and where its entries are in it.

A layer can be written anew in another order only when all of it is known. It is not held
in memory, so that costs as much of the disk as the archive has bytes.
"""

import hashlib
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path

import msgspec

from store.cas import Digest
from store.errors import LimitExceeded, storage
from store.index import Entry
from store.inflate import ChunkReader, inflated
from store.tar import Place, TarParser
from store.tar_names import shown
from store.unpack import (
    LayerLimits,
    Ring,
    attributes_size,
    check_diff_id,
    check_metadata,
    check_size,
)


class Member(msgspec.Struct, gc=False):
    """An entry with the bytes of the archive that say so: its headers are those from ``head`` to
    ``place.start``."""

    entry: Entry
    head: int
    place: Place


class Spool:
    """The archive; close it to give its space back.

    Attributes:
        members: in the archive's order.
        size: of the archive, in bytes.
    """

    def __init__(self, file: FileIO, members: list[Member], size: int) -> None:
        self._file = file
        self.members = members
        self.size = size

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of the archive. For several threads."""
        with storage("reading a temporary file"):
            return os.pread(self._file.fileno(), length, offset)

    def close(self) -> None:
        """Forget the archive."""
        self._file.close()


def spool(
    chunks: Iterator[bytes],
    media_type: str,
    diff_id: Digest,
    limits: LayerLimits,
    directory: Path,
) -> Spool:
    """Inflate and check a layer.

    Args:
        chunks: the layer's blob.
        directory: on the filesystem that the archive shall take space of.

    Raises:
        InvalidLayer, LimitExceeded, UnsupportedMediaType: see their sentences.
        DigestMismatch: the archive is not the one that ``diff_id`` names.
        StorageFailed: there is no room for it.
        Exception: whatever ``chunks`` raises.
    """
    with storage(f"making a temporary file in {directory}"):
        file = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115
    try:
        members, size = _fill(file, chunks, media_type, diff_id, limits, directory)
    except BaseException:
        file.close()
        raise
    return Spool(file, members, size)


def _fill(
    file: FileIO,
    chunks: Iterator[bytes],
    media_type: str,
    diff_id: Digest,
    limits: LayerLimits,
    directory: Path,
) -> tuple[list[Member], int]:
    source = ChunkReader(chunks)
    reader = inflated(source, media_type)
    digest = hashlib.sha256()
    index = _Index(file, limits, directory)
    total = 0
    with ThreadPoolExecutor(1) as hashing, ThreadPoolExecutor(1) as parsing:
        ring = Ring()
        while True:
            buffer = ring.free_buffer()
            count = reader.fill(buffer)
            total += count
            check_size(total, source.consumed, limits)
            view = buffer[:count]
            ring.used(buffer, hashing.submit(digest.update, view), parsing.submit(index.take, view))
            if count < len(buffer):
                break
        ring.drain()
    index.finish()
    check_diff_id(Digest(f"sha256:{digest.hexdigest()}"), diff_id)
    return index.members, total


class _Nowhere:
    """Contents stay where they are in the archive (``tar.Contents``)."""

    def begin(self, entry: Entry) -> int:
        return 0

    def seek(self, position: int) -> None:
        pass

    def write(self, view: memoryview) -> None:
        pass


class _Index:
    """Writes the archive and notes its entries."""

    def __init__(self, file: FileIO, limits: LayerLimits, directory: Path) -> None:
        self._file = file
        self._directory = directory
        self._limits = limits
        self._parser = TarParser(_Nowhere())
        self.members: list[Member] = []
        self._head = 0
        self._metadata = 0
        self._contents = 0

    def take(self, view: memoryview) -> None:
        for entry in self._parser.feed(view):
            place = self._parser.place
            self.members.append(Member(entry, self._head, place))
            self._head = place.start + place.stored + -place.stored % 512
            self._check(entry)
        with storage(f"writing a temporary file in {self._directory}"):
            while view:
                view = view[self._file.write(view) :]

    def _check(self, entry: Entry) -> None:
        self._metadata += len(entry.path) + len(entry.link) + attributes_size(entry)
        self._contents += entry.size
        check_metadata(self._metadata, self._limits)
        if len(self.members) > self._limits.layer_entries:
            raise LimitExceeded(
                f"the layer has more than {self._limits.layer_entries} files and directories; "
                "raise layer_entries in the store's configuration if you trust the image"
            )
        if self._contents > self._limits.layer_bytes:
            raise LimitExceeded(
                f"with {shown(entry.path)} the layer's files have more than "
                f"{self._limits.layer_bytes} bytes; raise layer_bytes in the store's "
                "configuration if you trust the image"
            )

    def finish(self) -> None:
        self._parser.finish()
