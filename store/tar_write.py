"""Tar headers of our own, where those of the source don't fit."""

import stat
import tarfile

from store.index import Entry


def header_of(entry: Entry) -> bytes:
    """The header of a regular file that is stored without holes, with a pax header if need be."""
    info = tarfile.TarInfo(_text(entry.path))
    info.mode = stat.S_IMODE(entry.mode)
    info.uid, info.gid = entry.uid, entry.gid
    info.size = entry.size
    info.mtime = entry.seconds
    records = {}
    if entry.nanoseconds:
        records["mtime"] = _time(entry.seconds, entry.nanoseconds)
    for name, value in sorted((entry.xattrs or {}).items()):
        records[f"SCHILY.xattr.{_text(name)}"] = _text(value)
    info.pax_headers = records
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _time(seconds: int, nanoseconds: int) -> str:
    """A decimal number; before 1970 the fraction counts from the next second on."""
    if seconds < 0:
        seconds, nanoseconds = seconds + 1, 1_000_000_000 - nanoseconds
        return f"-{-seconds}.{nanoseconds:09}"
    return f"{seconds}.{nanoseconds:09}"
