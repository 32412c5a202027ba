"""What a command opens, and how many compressed bytes of an eStargz layer that is."""

import ctypes
import gzip
import io
import os
import struct
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import msgspec

from runtime import linux

# fanotify(7)
_FAN_CLOEXEC = 0x1
_FAN_NONBLOCK = 0x2
_FAN_UNLIMITED_QUEUE = 0x10
_FAN_MARK_ADD = 0x1
_FAN_MARK_MOUNT = 0x10
_FAN_OPEN = 0x20
_AT_FDCWD = -100
_EVENT = struct.Struct("=IBBHQii")

_FOOTER_BYTES = 51
# As in a container: no language and no time zone, which lead to more files.
_ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
}
_TOC_NAME = "stargz.index.json"

_libc = ctypes.CDLL(None, use_errno=True)


def opened_files(tree: Path, *command: str) -> list[str]:
    """The files that a command opens, the kernel for it included, when it runs on a tree.

    Args:
        tree: a directory that becomes the command's root directory.
        command: must succeed.

    Returns:
        Paths without a leading slash, symbolic links resolved, in the order of opening.
    """
    with tempfile.TemporaryDirectory() as place:
        linux.mount(str(tree), place, "", linux.MS_BIND)
        try:
            group = _watch(place)
            try:
                subprocess.run(
                    ["chroot", place, *command],
                    check=True,
                    stdout=subprocess.DEVNULL,
                    env=_ENVIRONMENT,
                )
                return list(dict.fromkeys(os.path.relpath(path, place) for path in _paths(group)))
            finally:
                os.close(group)
        finally:
            linux.umount(place)


def _watch(mountpoint: str) -> int:
    """A fanotify group that reports each open of a file through this mount."""
    flags = _FAN_CLOEXEC | _FAN_NONBLOCK | _FAN_UNLIMITED_QUEUE
    group = _checked(_libc.fanotify_init(flags, os.O_RDONLY | os.O_CLOEXEC | os.O_LARGEFILE))
    mask = ctypes.c_uint64(_FAN_OPEN)
    mark = (_FAN_MARK_ADD | _FAN_MARK_MOUNT, mask, _AT_FDCWD, os.fsencode(mountpoint))
    _checked(_libc.fanotify_mark(group, *mark))
    return group


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def _paths(group: int) -> Iterator[str]:
    """Paths of all events that wait; an event has an open descriptor of its file."""
    while True:
        try:
            events = os.read(group, 64 << 10)
        except BlockingIOError:
            return
        while events:
            length, _, _, _, _, descriptor, _ = _EVENT.unpack_from(events)
            yield os.readlink(f"/proc/self/fd/{descriptor}")
            os.close(descriptor)
            events = events[length:]


class _Entry(msgspec.Struct):
    """The fields of a TOC entry that say where contents are."""

    name: str
    type: str
    size: int = 0
    linkName: str = ""
    offset: int = 0


class _Toc(msgspec.Struct):
    entries: list[_Entry]


def compressed_bytes(blob: BinaryIO, names: Iterable[str]) -> int:
    """Bytes of an eStargz layer that hold the contents of these files.

    Args:
        blob: the layer, made by ourselves and trusted.
        names: paths without a leading slash; each must be in the layer.

    Raises:
        KeyError: a file is not in the layer.
    """
    entries, end = _toc(blob)
    offsets = sorted({entry.offset for entry in entries if entry.offset})
    lengths = dict(zip(offsets, [*offsets[1:], end], strict=True))
    lengths = {at: after - at for at, after in lengths.items()}
    chunks: dict[str, set[int]] = {}
    links: dict[str, str] = {}
    for entry in entries:
        name = _plain(entry.name)
        if entry.type == "hardlink":
            links[name] = _plain(entry.linkName)
        elif entry.type in ("reg", "chunk"):
            # An empty file has no chunk.
            chunks.setdefault(name, set()).update({entry.offset} - {0})
    # A set, because small files can share a chunk.
    wanted = {offset for name in names for offset in chunks[links.get(name, name)]}
    return sum(map(lengths.__getitem__, wanted))


def _plain(name: str) -> str:
    return os.path.normpath(name).lstrip("/")


def _toc(blob: BinaryIO) -> tuple[list[_Entry], int]:
    """Entries, and where the table of contents begins."""
    end = blob.seek(-_FOOTER_BYTES, os.SEEK_END)
    footer = blob.read(_FOOTER_BYTES)
    mark = footer.find(b"STARGZ")
    if mark < 16:
        raise ValueError("not an eStargz layer: it has no footer")
    offset = int(footer[mark - 16 : mark], 16)
    blob.seek(offset)
    archive = gzip.decompress(blob.read(end - offset))
    with tarfile.open(fileobj=io.BytesIO(archive)) as table:
        file = table.extractfile(_TOC_NAME)
        assert file is not None
        return msgspec.json.decode(file.read(), type=_Toc).entries, offset
