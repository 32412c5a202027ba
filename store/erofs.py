"""Writes the EROFS image that holds a layer's names, attributes and extents.

The image has no file contents: a regular file is one chunk, an extent of one of the layer's
data files (data_files.py), which the kernel reads as the image's extra devices. All else
follows the kernel's fs/erofs/erofs_fs.h (see also Documentation/filesystems/erofs.rst):

    block 0   superblock at 1024, device slots from 1152 on
    block 1…  inodes in slots of 32 bytes, each followed by its attributes and by
              its chunk index or, if that fits into the block, its last bytes
    then      those of plain files, which have contents and no attributes, 42 in a block
    then      blocks of directories and symbolic links that don't fit there

Cost: about 2 µs an inode; most are plain files, which are all alike. The same tree gives the same
bytes.
"""

import stat
import struct
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import msgspec

from store.tree import Directory, Node

BLOCK = 4096
_SLOT = 32

_MAGIC = 0xE0F5E1E2
_SUPER_OFFSET = 1024
_COMPAT_CHECKSUM = 0x1
_COMPAT_MTIME = 0x2
_INCOMPAT_CHUNKED = 0x4
_INCOMPAT_DEVICE_TABLE = 0x8
_SUPER = struct.Struct("<IIIBBHQQIIII16s16sIHHHBBIQ24x")
# Places of fields.
_SUPER_BLOCKS, _SUPER_LABEL, _SUPER_INCOMPAT, _SUPER_DEVICES = 9, 13, 14, 16
_LABEL = b"ctrfs"
# Nothing in the image has an ACL. Mounted with that knowledge it says so once: `ls -l`, which
# asks for that of each file as long as there may be some, takes a fifth less.
_LABEL_NO_ACLS = b"ctrfs noacl"
_DEVICE = struct.Struct("<64sII56x")
_DEVICES_MAX = (BLOCK - _SUPER_OFFSET - _SUPER.size) // _DEVICE.size  # in block 0
_INODE = struct.Struct("<HHHHQIIIIqII16x")
_CHUNK = struct.Struct("<HHI")
# A plain file's inode with its chunk, and what is unused of the last of three slots.
_FILE = struct.Struct("<HHHHQIIIIqII16xHHI24x")
_FILES = BLOCK // _FILE.size
# The number of an inode that has no place yet, while its other names are met.
_UNPLACED = 1
_DIRENT = struct.Struct("<QHBx")
_XATTR_HEAD = struct.Struct("<IB7x")
_XATTR = struct.Struct("<BBH")

# Of a mode. Names in this module are found faster than those of another.
_TYPE, _REGULAR = 0o170000, stat.S_IFREG

_PLAIN, _INLINE, _CHUNKS = 0, 2, 4
_CHUNK_INDEXES = 0x20

_FILE_TYPES = {
    stat.S_IFREG: 1,
    stat.S_IFDIR: 2,
    stat.S_IFCHR: 3,
    stat.S_IFBLK: 4,
    stat.S_IFIFO: 5,
    stat.S_IFLNK: 7,
}

# Longest first: the two ACLs are whole names.
_XATTR_INDEXES = (
    (b"system.posix_acl_default", 3),
    (b"system.posix_acl_access", 2),
    (b"security.", 6),
    (b"trusted.", 4),
    (b"user.", 1),
)
_ACLS = frozenset(name for name, _ in _XATTR_INDEXES[:2])
_OPAQUE = {b"trusted.overlay.opaque": b"y"}

_ZEROS = bytes(BLOCK)
_FLUSH = 4096  # pieces of an inode area held before they are written: about 1 MB


class ImageFacts(msgspec.Struct, frozen=True):
    """What was written: ``inodes`` with distinct numbers, ``size`` in bytes."""

    inodes: int
    size: int


def write_image(
    root: Directory, file: BinaryIO, data_size: int, uuid: bytes, cuts: Sequence[int] = ()
) -> ImageFacts:
    """Write the image of a tree.

    Args:
        root: the tree; its nodes' ``nid`` are overwritten.
        file: empty, open for writing at its start.
        data_size: size of each data file in bytes; 0 when there is none.
        uuid: 16 bytes to tell images apart.
        cuts: where the second data file and those after it begin.
    """
    layout = _Layout(root, cuts)
    total = layout.inode_blocks + layout.blocks
    file.write(_head(layout, total, data_size, uuid))
    _write_inodes(layout, file)
    _write_files(layout, file)
    for owner in layout.owners:
        _write_blocks(layout, owner, file)
    return ImageFacts(layout.inodes, total * BLOCK)


def image_sizes(path: Path) -> tuple[int, list[int]] | None:
    """What an image and its data files must have in bytes, as its head says; None: it is none.

    Raises:
        OSError: it can't be read.
    """
    block = _first_block(path)
    if len(block) < BLOCK:
        return None
    fields = _SUPER.unpack_from(block, _SUPER_OFFSET)
    if fields[0] != _MAGIC:
        return None
    data_sizes = []
    if fields[_SUPER_INCOMPAT] & _INCOMPAT_DEVICE_TABLE:
        for number in range(min(fields[_SUPER_DEVICES], _DEVICES_MAX)):
            slot = _DEVICE.unpack_from(block, _device_slot(number))
            data_sizes.append(slot[1] * BLOCK)
    return fields[_SUPER_BLOCKS] * BLOCK, data_sizes


def lacks_acls(path: Path) -> bool:
    """Whether an image of ours says that nothing in it has an ACL. Raises OSError."""
    block = _first_block(path)
    if len(block) < BLOCK:
        return False
    label: bytes = _SUPER.unpack_from(block, _SUPER_OFFSET)[_SUPER_LABEL]
    return label.rstrip(b"\0") == _LABEL_NO_ACLS


def _first_block(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(BLOCK)


class _Layout:
    """Gives every inode its place.

    ``order`` are the inodes as they will lie, those of one directory together in the
    order of their names, up to the block ``files_at``; ``files`` likewise those of plain files.
    ``owners`` have blocks behind the ``inode_blocks``, ``blocks`` in all. A directory's ``size``
    becomes that of its entries, the ``offset`` of an owner its first block, counted from there.
    ``acls`` tells whether anything has one. ``cuts`` are those of the data files.
    """

    def __init__(self, root: Directory, cuts: Sequence[int]) -> None:
        self.cuts = cuts
        self.order: list[Node] = []
        self.files: list[Node] = []
        self.parents: dict[int, int] = {}
        self.owners: list[Node] = []
        self.blocks = 0
        self.acls = False
        self._end = BLOCK
        self._place(root)
        self.parents[root.nid] = root.nid
        pending = [root]
        while pending:
            directory = pending.pop()
            below: list[Directory] = []
            for child in directory.children.values():
                if child.nid:  # another name of a file that has its place
                    continue
                if child.size and not child.xattrs and child.mode & _TYPE == _REGULAR:
                    child.nid = _UNPLACED
                    self.files.append(child)
                    continue
                self._place(child)
                if type(child) is Directory:
                    self.parents[child.nid] = directory.nid
                    below.append(child)
            pending.extend(reversed(below))
        self.files_at = -(-self._end // BLOCK)
        slot = self.files_at * (BLOCK // _SLOT)
        for number, node in enumerate(self.files):
            block, place = divmod(number, _FILES)
            node.nid = slot + block * (BLOCK // _SLOT) + place * (_FILE.size // _SLOT)
        self.inode_blocks = self.files_at + -(-len(self.files) // _FILES)
        self.inodes = len(self.order) + len(self.files)

    def _place(self, node: Node) -> None:
        need = _INODE.size
        kind = node.mode & _TYPE
        if type(node) is Directory or node.xattrs:
            need += len(_xattrs(node))
            self.acls = self.acls or not _ACLS.isdisjoint(node.xattrs or ())
        if kind == _REGULAR:
            if node.size:
                need = -(-need // _CHUNK.size) * _CHUNK.size + _CHUNK.size
        elif type(node) is Directory:
            node.children = dict(sorted(node.children.items()))
            node.size = _directory_size(node)
            need = self._place_data(node, need)
        elif kind == stat.S_IFLNK:
            need = self._place_data(node, need)
        start = self._end
        # The kernel wants inlined data within one block, and is faster with whole inodes there.
        if need <= BLOCK < start % BLOCK + need:
            start += -start % BLOCK
        node.nid = start // _SLOT
        end = start + need
        self._end = end + -end % _SLOT
        self.order.append(node)

    def _place_data(self, node: Node, need: int) -> int:
        """Give blocks to what can't be inlined; the bytes needed with what can."""
        blocks = node.size // BLOCK
        tail = node.size % BLOCK
        if need + tail > BLOCK:
            blocks += tail > 0
            tail = 0
        if blocks:
            node.offset = self.blocks
            self.blocks += blocks
            self.owners.append(node)
        return need + tail


# --- directories and attributes --------------------------------------------------------


def _splits(names: Sequence[bytes]) -> Iterator[tuple[int, int, int]]:
    """Cut a directory's names into blocks: (first, one past the last, bytes used)."""
    first = used = 0
    for number, name in enumerate(names):
        need = _DIRENT.size + len(name)
        if used + need > BLOCK:
            yield first, number, used
            first, used = number, 0
        used += need
    yield first, len(names), used


def _directory_size(directory: Directory) -> int:
    names = directory.children
    size = sum(map(len, names)) + _DIRENT.size * len(names) + 2 * _DIRENT.size + 3
    if size <= BLOCK:
        return size
    splits = list(_splits(sorted((b".", b"..", *names))))
    return BLOCK * (len(splits) - 1) + splits[-1][2]


def _directory_blocks(directory: Directory, parent: int) -> list[bytes]:
    """The directory's entries, in blocks of which only the last may be short."""
    types = _FILE_TYPES
    entries = [
        (name, node.nid, types[node.mode & _TYPE]) for name, node in directory.children.items()
    ]
    entries += ((b".", directory.nid, 2), (b"..", parent, 2))
    entries.sort()
    if directory.size <= BLOCK:
        return [_dirents(entries)]
    blocks = [
        _dirents(entries[first:last])
        for first, last, _ in _splits([name for name, _, _ in entries])
    ]
    return [block.ljust(BLOCK, b"\0") for block in blocks[:-1]] + blocks[-1:]


def _dirents(entries: Sequence[tuple[bytes, int, int]]) -> bytes:
    pack = _DIRENT.pack
    offset = _DIRENT.size * len(entries)
    pieces = []
    for name, nid, file_type in entries:
        pieces.append(pack(nid, offset, file_type))
        offset += len(name)
    pieces.extend([name for name, _, _ in entries])
    return b"".join(pieces)


def _xattrs(node: Node) -> bytes:
    """The attributes as they follow the inode; empty when there are none."""
    xattrs = node.xattrs or {}
    if type(node) is Directory and node.opaque and node.lowers:
        xattrs = xattrs | _OPAQUE
    if not xattrs:
        return b""
    pieces = [_XATTR_HEAD.pack(0, 0)]
    for name, value in sorted(xattrs.items()):
        prefix, index = next(item for item in _XATTR_INDEXES if name.startswith(item[0]))
        entry = _XATTR.pack(len(name) - len(prefix), index, len(value)) + name[len(prefix) :]
        entry += value
        pieces.append(entry.ljust(-(-len(entry) // 4) * 4, b"\0"))
    return b"".join(pieces)


# --- writing -----------------------------------------------------------------------------


def _write_inodes(layout: _Layout, file: BinaryIO) -> None:
    pieces: list[bytes] = []
    position = BLOCK
    for number, node in enumerate(layout.order, 1):
        gap = node.nid * _SLOT - position
        if gap:
            pieces.append(_ZEROS[:gap])
        piece = _inode(node, number, layout)
        pieces.append(piece)
        position += gap + len(piece)
        if len(pieces) > _FLUSH:
            file.write(b"".join(pieces))
            pieces.clear()
    pieces.append(bytes(layout.files_at * BLOCK - position))
    file.write(b"".join(pieces))


def _write_files(layout: _Layout, file: BinaryIO) -> None:
    pack = _FILE.pack
    cuts = layout.cuts
    shape = _CHUNKS << 1 | 1
    number = len(layout.order) + 1
    for first in range(0, len(layout.files), _FILES):
        pieces = [
            pack(
                shape,
                0,
                node.mode,
                0,
                node.size,
                _chunk_format(node.size),
                number,
                node.uid,
                node.gid,
                node.seconds,
                node.nanoseconds,
                node.nlink,
                0,
                bisect_right(cuts, node.offset) + 1,
                node.offset // BLOCK,
            )
            for number, node in enumerate(layout.files[first : first + _FILES], number + first)
        ]
        file.write(b"".join(pieces).ljust(BLOCK, b"\0"))


def _inode(node: Node, number: int, layout: _Layout) -> bytes:
    """An inode with what follows it."""
    xattrs = _xattrs(node) if type(node) is Directory or node.xattrs else b""
    kind = node.mode & _TYPE
    location, data_layout, tail = node.rdev, _PLAIN, b""
    if kind == _REGULAR:
        if node.size:
            data_layout = _CHUNKS
            location = _chunk_format(node.size)
            device = bisect_right(layout.cuts, node.offset) + 1
            tail = _CHUNK.pack(0, device, node.offset // BLOCK)
            if (_INODE.size + len(xattrs)) % _CHUNK.size:
                tail = b"\0\0\0\0" + tail
    elif type(node) is Directory or kind == stat.S_IFLNK:
        location = layout.inode_blocks + node.offset
        tail_size = node.size % BLOCK
        if tail_size and _INODE.size + len(xattrs) + tail_size <= BLOCK:
            data_layout = _INLINE
            tail = _data(node, layout)[-1]
    return (
        _INODE.pack(
            data_layout << 1 | 1,
            (len(xattrs) - _XATTR_HEAD.size) // 4 + 1 if xattrs else 0,
            node.mode,
            0,
            node.size,
            location,
            number,
            node.uid,
            node.gid,
            node.seconds,
            node.nanoseconds,
            node.nlink,
        )
        + xattrs
        + tail
    )


def _chunk_format(size: int) -> int:
    """One chunk, large enough for a file."""
    return _CHUNK_INDEXES | max(0, (size - 1).bit_length() - 12)


def _data(node: Node, layout: _Layout) -> list[bytes]:
    if type(node) is Directory:
        return _directory_blocks(node, layout.parents[node.nid])
    return [node.link]


def _write_blocks(layout: _Layout, node: Node, file: BinaryIO) -> None:
    """Write what of a node's data is not inlined."""
    blocks = _data(node, layout)
    tail = node.size % BLOCK
    if tail and _INODE.size + len(_xattrs(node)) + tail <= BLOCK:
        blocks.pop()
    for block in blocks:
        file.write(block.ljust(BLOCK, b"\0"))


def _head(layout: _Layout, blocks: int, data_size: int, uuid: bytes) -> bytes:
    """Block 0."""
    devices = len(layout.cuts) + 1 if data_size else 0
    block = bytearray(BLOCK)

    def put_super(checksum: int) -> None:
        _SUPER.pack_into(
            block,
            _SUPER_OFFSET,
            _MAGIC,
            checksum,
            _COMPAT_CHECKSUM | _COMPAT_MTIME,
            12,
            0,
            BLOCK // _SLOT,  # the root is the first inode
            layout.inodes,
            0,
            0,
            blocks,
            0,
            0,
            uuid,
            _LABEL if layout.acls else _LABEL_NO_ACLS,
            _INCOMPAT_CHUNKED | (_INCOMPAT_DEVICE_TABLE if devices else 0),
            0,
            devices,
            (_SUPER_OFFSET + _SUPER.size) // _DEVICE.size,
            0,
            0,
            0,
            0,
        )

    put_super(0)
    for number in range(devices):
        _DEVICE.pack_into(block, _device_slot(number), b"data", -(-data_size // BLOCK), 0)
    put_super(_crc32c(bytes(block[_SUPER_OFFSET:])))
    return bytes(block)


def _device_slot(number: int) -> int:
    return _SUPER_OFFSET + _SUPER.size + number * _DEVICE.size


def _crc32c_table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


_CRC32C_TABLE = _crc32c_table()


def _crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli) without the final inversion, as the kernel's crc32c(~0, …)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _CRC32C_TABLE[(crc ^ byte) & 0xFF]
    return crc
