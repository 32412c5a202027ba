"""The fields of one tar header: numbers and pax records."""

import struct
from functools import lru_cache
from zlib import adler32

from store.errors import InvalidLayer, LimitExceeded
from store.tar_entry import REBUILD, is_kept
from store.tar_names import shown

BLOCK = 512

# Bodies of pax headers, GNU long names and sparse maps are held in memory; Go's
# archive/tar refuses them above the same size.
SPECIAL_MAX = 1 << 20

# Pieces of one sparse file; each takes 130 bytes of memory and two system calls. Segments of
# whole 4096-byte blocks, with holes between them, need 12 bytes of a map or more, so that
# maps which fit into SPECIAL_MAX have fewer.
SEGMENTS_MAX = 100_000

# No user and group names (64x): layers go by numbers.
_HEADER = struct.Struct("100s8s8s8s12s12s8sc100s8s64x8s8s155s12x")
_XATTR_PREFIX = b"SCHILY.xattr."

Segments = list[tuple[int, int]]
"""What a sparse file stores: (offset in the file, length), ascending."""


class Header:
    """One entry while its extensions are applied.

    ``size`` is the file's, ``stored`` what the archive holds of it; they differ for sparse
    files, whose ``segments`` say where the stored bytes belong.
    """

    __slots__ = (
        "gid",
        "kind",
        "link",
        "major",
        "minor",
        "mode",
        "name",
        "nanoseconds",
        "seconds",
        "segments",
        "size",
        "stored",
        "uid",
        "xattrs",
    )
    name: bytes
    kind: bytes
    mode: int
    uid: int
    gid: int
    size: int
    stored: int
    seconds: int
    nanoseconds: int
    link: bytes
    major: int
    minor: int
    segments: Segments | None
    xattrs: dict[bytes, bytes] | None


@lru_cache(maxsize=8192)
def number(field: bytes) -> int:
    """A numeric header field: octal text, or binary when the first bit is set.

    Cached since the same owners, modes and times repeat in most archives.
    Raises ValueError.
    """
    if field[0] & 0x80:
        bits = 8 * len(field) - 1
        value = int.from_bytes(field, "big") & (1 << bits) - 1
        return value - (1 << bits) if field[0] & 0x40 else value
    text = field.lstrip(b" \0").partition(b"\0")[0].rstrip(b" ")
    if not text:
        return 0
    if not text.isdigit():
        raise ValueError
    return int(text, 8)


def decimal(text: bytes) -> int:
    """A number in a pax record. Raises ValueError."""
    if not text.isdigit() or len(text) > 20:
        raise ValueError
    return int(text)


def _time(text: bytes) -> tuple[int, int]:
    """Seconds and nanoseconds from a pax time such as ``-12.5``. Raises ValueError."""
    whole, _, fraction = text.partition(b".")
    negative = whole[:1] == b"-"
    seconds = decimal(whole[1:] if negative else whole)
    if fraction and not fraction.isdigit():
        raise ValueError
    nanoseconds = int(fraction[:9].ljust(9, b"0")) if fraction else 0
    if not negative:
        return seconds, nanoseconds
    return (-seconds - 1, 1_000_000_000 - nanoseconds) if nanoseconds else (-seconds, 0)


def block_sum(block: memoryview) -> int:
    """The sum of a block's 512 bytes, 0 only if all are zero.

    The sum of 256 bytes stays below adler32's modulus, so its low half is that plus one.
    """
    return (adler32(block[:256]) & 0xFFFF) + (adler32(block[256:]) & 0xFFFF) - 2


def read_header(header: Header, block: memoryview, total: int) -> None:
    """Fill in the fields that the block itself holds.

    Args:
        total: its ``block_sum``.

    Raises ValueError when the checksum or a number is wrong.
    """
    fields = _HEADER.unpack(block)
    name, mode, uid, gid, size, seconds, checksum, kind, link, magic, *rest = fields
    expected = number(checksum)
    if total - sum(checksum) + 256 != expected:
        _check_signed(bytes(block), expected)
    header.name = name.partition(b"\0")[0]
    header.kind = kind
    header.mode = number(mode)
    header.uid = number(uid)
    header.gid = number(gid)
    header.size = header.stored = number(size)
    header.seconds = number(seconds)
    header.nanoseconds = 0
    header.link = link.partition(b"\0")[0]
    header.major = header.minor = 0
    header.segments = None
    header.xattrs = None
    if magic[:5] == b"ustar":
        _read_ustar(header, magic, rest, bytes(block[508:]))


def _check_signed(block: bytes, expected: int) -> None:
    """Some old programs summed signed characters. Raises ValueError."""
    summed = block[:148] + b" " * 8 + block[156:]
    if sum(byte - 256 if byte > 127 else byte for byte in summed) != expected:
        raise ValueError


def _read_ustar(header: Header, magic: bytes, rest: list[bytes], tail: bytes) -> None:
    """Fields that v7 headers lack. Raises ValueError."""
    major, minor, prefix = rest
    if header.kind in (b"3", b"4"):
        header.major, header.minor = number(major), number(minor)
    if prefix[0] and magic == b"ustar\x0000":
        if tail == b"tar\0":  # star: two times follow a shorter prefix
            prefix = prefix[:131]
        header.name = prefix.partition(b"\0")[0] + b"/" + header.name


def pax_records(body: bytes) -> list[tuple[bytes, bytes]]:
    """``length key=value\\n`` records. Raises ValueError."""
    records = []
    position = 0
    while position < len(body):
        space = body.find(b" ", position, position + 20)
        length = decimal(body[position:space])
        end = position + length
        if space < 0 or end > len(body) or end <= space + 1 or body[end - 1] != 10:
            raise ValueError
        key, equals, value = body[space + 1 : end - 1].partition(b"=")
        if not key or not equals:
            raise ValueError
        records.append((key, value))
        position = end
    return records


def apply_pax(header: Header, records: list[tuple[bytes, bytes]]) -> bool:
    """Override the header by pax records; True when a sparse map begins the content.

    Raises ValueError.
    """
    sparse: dict[bytes, bytes] = {}
    points: list[int] = []
    for key, value in records:
        if key.startswith(_XATTR_PREFIX):
            _add_xattr(header, key[len(_XATTR_PREFIX) :], value)
        elif key in (b"GNU.sparse.offset", b"GNU.sparse.numbytes"):
            points.append(decimal(value))
        elif key.startswith(b"GNU.sparse."):
            sparse[key[11:]] = value
        elif value:  # an empty value takes an earlier one back
            _apply_record(header, key, value)
    return _apply_sparse(header, sparse, points)


def _apply_record(header: Header, key: bytes, value: bytes) -> None:
    if key == b"path":
        header.name = _no_nul(value)
    elif key == b"linkpath":
        header.link = _no_nul(value)
    elif key == b"size":
        header.size = header.stored = decimal(value)
    elif key == b"uid":
        header.uid = decimal(value)
    elif key == b"gid":
        header.gid = decimal(value)
    elif key == b"mtime":
        header.seconds, header.nanoseconds = _time(value)


def _no_nul(value: bytes) -> bytes:
    if b"\0" in value:
        raise ValueError
    return value


def _add_xattr(header: Header, name: bytes, value: bytes) -> None:
    if is_kept(name):
        if header.xattrs is None:
            header.xattrs = {}
        header.xattrs[name] = value


def _apply_sparse(header: Header, sparse: dict[bytes, bytes], points: list[int]) -> bool:
    """GNU sparse formats 0.0 (points), 0.1 (map) and 1.0 (map before the content)."""
    if header.kind not in (b"0", b"\0", b"7") or not (sparse or points):
        return False
    if name := sparse.get(b"name"):
        header.name = _no_nul(name)
    if size := sparse.get(b"realsize", sparse.get(b"size")):
        header.size = decimal(size)
    if sparse.get(b"major") == b"1" and sparse.get(b"minor") == b"0":
        if header.stored < BLOCK:
            raise ValueError
        return True
    if text := sparse.get(b"map"):
        points = [decimal(number) for number in text.split(b",")]
    header.segments = list(zip(points[::2], points[1::2], strict=True))
    return False


def senseless(name: bytes, what: str) -> InvalidLayer:
    return InvalidLayer(f"{shown(name)} in the layer has a {what} that makes no sense; {REBUILD}")


def check_count(count: int, path: bytes) -> None:
    if count > SEGMENTS_MAX:
        raise LimitExceeded(
            f"{shown(path)} in the layer is a sparse file in {count} pieces; at most "
            f"{SEGMENTS_MAX} are supported, store it without holes"
        )


def check_segments(header: Header, path: bytes) -> None:
    check_count(len(header.segments or ()), path)
    end = stored = 0
    for offset, length in header.segments or ():
        if offset < end or length < 0 or offset + length > header.size:
            raise senseless(path, "sparse map")
        end = offset + length
        stored += length
    if stored != header.stored:
        raise senseless(path, "sparse map")
