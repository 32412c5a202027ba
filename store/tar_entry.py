"""From the fields of one tar header to an entry, checked: the same for archives and for tables
of contents, which repeat those fields."""

import stat

from store.errors import InvalidLayer
from store.index import Entry
from store.tar_header import Header, check_numbers, device, hard_link, symlink
from store.tar_names import clean_path, shown

_HARD_LINK = 0

_TYPES = {
    b"0": stat.S_IFREG,
    b"\0": stat.S_IFREG,
    b"7": stat.S_IFREG,  # "contiguous", a regular file everywhere
    b"S": stat.S_IFREG,  # sparse, old GNU format
    b"1": _HARD_LINK,
    b"2": stat.S_IFLNK,
    b"3": stat.S_IFCHR,
    b"4": stat.S_IFBLK,
    b"5": stat.S_IFDIR,
    b"6": stat.S_IFIFO,
}


def entry_path(header: Header) -> bytes:
    """The clean path.

    Raises:
        InvalidLayer, LimitExceeded: it leads out of the layer, or a number of the header is
            beyond what Linux has.
    """
    path = clean_path(header.name)
    if path is None:
        raise InvalidLayer(
            f"{shown(header.name)} in the layer leads out of the image with '..'; "
            "do not trust this image"
        )
    check_numbers(header, path)
    return path


def entry_type(header: Header, path: bytes) -> int:
    """The type bits of st_mode, 0 for a hard link. Raises InvalidLayer."""
    kind = header.kind
    if kind == b"\0" and header.name[-1:] == b"/":
        return stat.S_IFDIR  # v7 archives have no type for directories
    file_type = _TYPES.get(kind)
    if file_type is None:
        raise InvalidLayer(
            f"{shown(path)} in the layer has the tar type {kind!r}, which layers can't hold"
        )
    return file_type


def make_entry(header: Header, path: bytes, file_type: int, offset: int) -> Entry:
    """The entry.

    Args:
        offset: of a regular file's content in the data file.

    Raises:
        InvalidLayer: it links out of the layer, or is a device that Linux does not have.
    """
    if file_type == _HARD_LINK:
        return Entry(path, 0, link=hard_link(header.link, path))
    mode = header.mode & 0o7777
    size = rdev = 0
    link = b""
    if file_type == stat.S_IFREG:
        size = header.size
    elif file_type == stat.S_IFLNK:
        link = symlink(header.link, path)
        size = len(link)
        mode = 0o777  # whatever it says: no system call can make it another
    elif file_type in (stat.S_IFCHR, stat.S_IFBLK):
        rdev = device(header, path)
    return Entry(
        path,
        file_type | mode,
        header.uid,
        header.gid,
        header.seconds,
        header.nanoseconds,
        size,
        offset,
        rdev,
        link,
        header.xattrs,
    )
