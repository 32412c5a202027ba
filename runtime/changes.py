"""What a container changed: its overlay's upper directory against the layers below.

An upper directory (filesystems/overlayfs.rst) holds what was made or changed, with
character devices 0:0 for what was deleted, and trusted.overlay.opaque on directories
that replaced one.
"""

import errno
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from runtime import linux
from runtime.errors import RuntimeFailure

_OPAQUE = "trusted.overlay.opaque"
_RESOLVE = linux.RESOLVE_BENEATH | linux.RESOLVE_NO_SYMLINKS
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY


def list_changes(upper: Path, lower: Path) -> bytes:
    r"""`A`, `C` or `D`, a blank and the path, a line each, sorted by path.

    A newline or backslash in a name is written \012 or \134.

    Args:
        upper: the overlay's upper directory.
        lower: the image's merged layers, mounted.

    Raises:
        RuntimeFailure: ENAMETOOLONG, directories nested deeper than a path can say.
    """
    tops = os.open(upper, _DIRECTORY | os.O_CLOEXEC), os.open(lower, _DIRECTORY | os.O_CLOEXEC)
    try:
        found = sorted(_walk(*tops))
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        raise RuntimeFailure(
            "the container made directories too deep to name", errno=errno.ENAMETOOLONG
        ) from None
    finally:
        for descriptor in tops:
            os.close(descriptor)
    return b"".join(kind + b" " + _escape(path) + b"\n" for path, kind in found)


def _walk(upper: int, lower: int) -> Iterator[tuple[bytes, bytes]]:
    """Paths with a leading slash, and what happened to them."""
    pending = [b"."]
    while pending:
        directory = pending.pop()
        above = _open(upper, directory)
        if above is None:
            continue
        below = _open(lower, directory)
        try:
            yield from _compare(directory, above, below, pending)
        finally:
            os.close(above)
            if below is not None:
                os.close(below)


def _compare(
    directory: bytes, above: int, below: int | None, pending: list[bytes]
) -> Iterator[tuple[bytes, bytes]]:
    """The entries of one directory; those that are directories are added to ``pending``."""
    opaque = below is None or _is_opaque(above)
    names = {entry.encode("utf-8", "surrogateescape") for entry in os.listdir(above)}
    for name in names:
        path = directory + b"/" + name
        try:
            status = os.stat(name, dir_fd=above, follow_symlinks=False)
        except FileNotFoundError:
            continue
        whiteout = stat.S_ISCHR(status.st_mode) and status.st_rdev == 0
        existed = below is not None and _exists(below, name)
        if whiteout:
            if existed:
                yield path[1:], b"D"
            continue
        yield path[1:], b"C" if existed else b"A"
        if stat.S_ISDIR(status.st_mode):
            pending.append(path)
    if opaque and below is not None:
        for entry in os.listdir(below):
            name = entry.encode("utf-8", "surrogateescape")
            if name not in names:
                yield (directory + b"/" + name)[1:], b"D"


def _open(top: int, path: bytes) -> int | None:
    """A directory below ``top``; None where there is none, or another kind of file."""
    try:
        return linux.openat2(top, os.fsdecode(path), _DIRECTORY, _RESOLVE)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return None
        raise


def _exists(directory: int, name: bytes) -> bool:
    try:
        os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _is_opaque(directory: int) -> bool:
    try:
        return os.getxattr(directory, _OPAQUE) == b"y"
    except OSError:
        return False


def _escape(path: bytes) -> bytes:
    return re.sub(rb"[\n\\]", lambda match: b"\\%03o" % match[0][0], path)
