"""Tar archives made by hand, also such as no program would make."""

import io
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path

BLOCK = 512
END = bytes(2 * BLOCK)


def header(
    name: bytes,
    kind: bytes = b"0",
    *,
    size: int = 0,
    mode: int = 0o644,
    uid: int = 0,
    gid: int = 0,
    mtime: int = 0,
    link: bytes = b"",
    device: tuple[int, int] = (0, 0),
    magic: bytes = b"ustar\x0000",
    prefix: bytes = b"",
    raw: Mapping[int, bytes] | None = None,
) -> bytes:
    """One header block with a right checksum.

    Args:
        raw: bytes to put at these offsets before the checksum is made.
    """
    block = bytearray(BLOCK)
    fields = (
        (0, name, 100),
        (100, b"%07o" % mode, 8),
        (108, number(uid, 8), 8),
        (116, number(gid, 8), 8),
        (124, number(size, 12), 12),
        (136, number(mtime, 12), 12),
        (156, kind, 1),
        (157, link, 100),
        (257, magic, 8),
        (329, number(device[0], 8), 8),
        (337, number(device[1], 8), 8),
        (345, prefix, 155),
    )
    for offset, value, width in fields:
        assert len(value) <= width, (offset, value)
        block[offset : offset + len(value)] = value
    for offset, value in (raw or {}).items():
        block[offset : offset + len(value)] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def number(value: int, width: int) -> bytes:
    """Octal if it fits, else base-256."""
    text = b"%0*o" % (width - 1, value) if value >= 0 else b""
    if text and len(text) < width:
        return text
    return (value & (1 << 8 * width - 1) - 1 | 1 << 8 * width - 1).to_bytes(width, "big")


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


def entry(name: bytes, kind: bytes = b"0", data: bytes = b"", **fields: object) -> bytes:
    """A header and its content."""
    return header(name, kind, size=len(data), **fields) + padded(data)  # type: ignore[arg-type]


def pax(records: Iterable[tuple[bytes, bytes]], kind: bytes = b"x") -> bytes:
    """A pax header for the next entry."""
    return entry(b"PaxHeaders/0", kind, b"".join(pax_record(*record) for record in records))


def pax_record(key: bytes, value: bytes) -> bytes:
    rest = b" " + key + b"=" + value + b"\n"
    length = len(rest)
    while len(b"%d" % length) + len(rest) != length:
        length = len(b"%d" % length) + len(rest)
    return b"%d" % length + rest


def directory(name: bytes, *, mode: int = 0o755, **fields: object) -> bytes:
    return header(name, b"5", mode=mode, **fields)  # type: ignore[arg-type]


def archive(*parts: bytes) -> bytes:
    """Entries and the two zero blocks at the end."""
    return b"".join(parts) + END


def of_directory(path: Path, *, format: int = tarfile.PAX_FORMAT) -> bytes:
    """An archive of a directory's content, root included, as Python's tarfile makes it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        tar.add(path, arcname=".")
    return buffer.getvalue()
