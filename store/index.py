"""The entry index of a layer: every tar entry that counts, in the archive's order.

The file makes it possible to build the layer's file tree again, over any layers
below it, without the blob: see ``tree_builder.py``. It holds names, attributes and where in
the layer's data file each content lies.

Format: 8 bytes magic ``ctrfsidx``, u32 format version, then blocks until the end of the
file. A block is a u32 length and that many bytes of msgpack: an array of entries,
each an array in the order of ``Entry``'s fields. All integers are little endian.
"""

import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import msgspec

from store.errors import CorruptContent

MAGIC = b"ctrfsidx"
VERSION = 1

# Entries of one block are in memory twice (as objects and encoded) while it is written or
# read: 1,024 are about 0.3 MB, and long enough that the cost of a block vanishes.
BLOCK_ENTRIES = 1024

_HEAD = struct.Struct("<8sI")
_LENGTH = struct.Struct("<I")


class Entry(msgspec.Struct, array_like=True, gc=False):
    """One tar entry after all extensions of the format have been applied.

    ``path`` and a hard link's ``link`` are clean: relative to the layer's root, no
    empty, ``.`` or ``..`` components; the root itself is ``b""``. A symlink's ``link`` is
    its text, untouched. ``mode`` is a whole st_mode, or 0 for a hard link. ``seconds`` is
    signed, ``nanoseconds`` 0 to 999,999,999. ``offset`` is the content's place in the data
    file in bytes, a multiple of 4096 (0 when ``size`` is 0). ``rdev`` is encoded as
    Linux does in 32 bits (``tar_header.encode_device``).
    """

    path: bytes
    mode: int
    uid: int = 0
    gid: int = 0
    seconds: int = 0
    nanoseconds: int = 0
    size: int = 0
    offset: int = 0
    rdev: int = 0
    link: bytes = b""
    xattrs: dict[bytes, bytes] | None = None


class IndexWriter:
    """Appends entries to an open file; ``close()`` writes out what is still held.

    Args:
        written: called whenever the file has one more block.
    """

    def __init__(self, file: BinaryIO, written: Callable[[], None] = lambda: None) -> None:
        self._file = file
        self._written = written
        self._encoder = msgspec.msgpack.Encoder()
        self._held: list[Entry] = []
        file.write(_HEAD.pack(MAGIC, VERSION))

    def add(self, entry: Entry) -> None:
        """Append one entry."""
        self._held.append(entry)
        if len(self._held) >= BLOCK_ENTRIES:
            self._flush()

    def close(self) -> None:
        """Write what is still held; the file stays open."""
        if self._held:
            self._flush()

    def _flush(self) -> None:
        encoded = self._encoder.encode(self._held)
        self._file.write(_LENGTH.pack(len(encoded)))
        self._file.write(encoded)
        self._file.flush()
        self._held.clear()
        self._written()


def write_index(
    path: Path, entries: Iterable[Entry], written: Callable[[], None] = lambda: None
) -> None:
    """Write all entries of a layer to a file, from its start; see ``IndexWriter``."""
    with path.open("wb") as file:
        index = IndexWriter(file, written)
        for entry in entries:
            index.add(entry)
        index.close()


def read_index(path: Path) -> Iterator[Entry]:
    """The entries of an index file, in order.

    Raises:
        CorruptContent: the file is not an index of this version, or is cut short.
    """
    for block in read_blocks(path):
        yield from block


def read_blocks(path: Path) -> Iterator[list[Entry]]:
    """The same block by block. Each is read when it is asked for, while others may still come.

    Raises:
        CorruptContent: as ``read_index``.
    """
    decoder = msgspec.msgpack.Decoder(list[Entry])
    with path.open("rb") as file:
        if file.read(_HEAD.size) != _HEAD.pack(MAGIC, VERSION):
            raise _corrupt(path)
        while head := file.read(_LENGTH.size):
            if len(head) != _LENGTH.size:
                raise _corrupt(path)
            try:
                yield decoder.decode(file.read(*_LENGTH.unpack(head)))
            except msgspec.MsgspecError as error:
                raise _corrupt(path) from error


def _corrupt(path: Path) -> CorruptContent:
    return CorruptContent(
        f"the layer index {path} is damaged or of another version; "
        "remove the image and pull it again"
    )
