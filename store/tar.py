"""A tar archive as it streams by: its entries, and its contents into a data file.

Understands v7, ustar, star, pax and GNU archives as Go's archive/tar does, because that is
what other container runtimes read layers with; where the two could differ in
meaning, the archive is refused. Names are bytes throughout.

- Global pax headers are checked and otherwise ignored (containerd and umoci do).
- Two zero blocks end the archive and what follows is ignored; so does the end of
  the input at a header's place, with or without zero blocks.
- A name may not lead above the root with ``..``; a leading ``/`` is dropped.

Sources: POSIX pax(1) "EXTENDED DESCRIPTION"; GNU tar manual, "Basic Tar Format" and
"Storing Sparse Files"; star(5).
"""

import stat
import struct
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Protocol
from zlib import adler32

from store.errors import InvalidLayer, LimitExceeded
from store.index import Entry

BLOCK = 512

# Kernel limits (limits.h): a component, and what a system call takes with its NUL.
NAME_MAX = 255
PATH_MAX = 4096

# Bodies of pax headers, GNU long names and sparse maps are held in memory; Go's
# archive/tar refuses them above the same size.
SPECIAL_MAX = 1 << 20

# Extended attributes of one file, names and values. The kernel allows 64 KiB for a value
# and for the list of names; an EROFS value's length has 16 bits.
XATTR_VALUE_MAX = 65535
XATTR_TOTAL_MAX = 128 << 10

_HEADER = struct.Struct("100s8s8s8s12s12s8sc100s8s64x8s8s155s12x")
_CHECKSUM = slice(148, 156)
_SPARSE = struct.Struct("12s12s")
_XATTR_PREFIX = b"SCHILY.xattr."

# Those the overlay driver acts on. In a layer they would be commands to it: a
# redirect shows any directory of the layers below under another name.
_OVERLAY_XATTRS = (b"trusted.overlay.", b"user.overlay.")
_XATTR_NAMESPACES = (b"user.", b"trusted.", b"security.")
_ACLS = (b"system.posix_acl_access", b"system.posix_acl_default")

_TYPES = {
    b"0": stat.S_IFREG,
    b"\0": stat.S_IFREG,
    b"7": stat.S_IFREG,  # "contiguous", a regular file everywhere
    b"S": stat.S_IFREG,  # sparse, old GNU format
    b"2": stat.S_IFLNK,
    b"3": stat.S_IFCHR,
    b"4": stat.S_IFBLK,
    b"5": stat.S_IFDIR,
    b"6": stat.S_IFIFO,
}

_REBUILD = "the image has to be built or pushed again"

Segments = list[tuple[int, int]]
"""What a sparse file stores: (offset in the file, length), ascending."""


class Contents(Protocol):
    """Where file contents go: a data file in which each begins at an aligned place."""

    def begin(self, size: int) -> int:
        """Reserve ``size`` bytes for the next content; returns its offset."""
        ...

    def seek(self, position: int) -> None:
        """Write the next bytes at this place; what is left out reads as zeros."""
        ...

    def write(self, view: memoryview) -> None:
        """Append bytes; the view is valid until the next ``feed()`` returns."""
        ...


def shown(name: bytes) -> str:
    """A name from an archive as text for a message: one line, at most 200 characters."""
    text = name.decode("utf-8", "backslashreplace")
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return f"'/{text}'" if len(text) <= 200 else f"'/{text[:200]}…'"


def clean_path(name: bytes) -> bytes | None:
    """The name without leading ``/``, empty, ``.`` and ``..`` components.

    None when ``..`` leads above the root.
    """
    if name[:2] == b"./":
        name = name[2:]
    if name[-1:] == b"/":
        name = name[:-1]
    if name[:1] not in (b"/", b".", b"") and b"/." not in name and b"//" not in name:
        return name
    parts: list[bytes] = []
    for part in name.split(b"/"):
        if part == b"..":
            if not parts:
                return None
            parts.pop()
        elif part not in (b"", b"."):
            parts.append(part)
    return b"/".join(parts)


def encode_device(major: int, minor: int) -> int:
    """Device numbers in 32 bits as the kernel's new_encode_dev() does: 12 and 20 bits."""
    return minor & 0xFF | major << 8 | (minor & ~0xFF) << 12


@lru_cache(maxsize=8192)
def _number(field: bytes) -> int:
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


def _decimal(text: bytes) -> int:
    """A number in a pax record. Raises ValueError."""
    if not text.isdigit() or len(text) > 20:
        raise ValueError
    return int(text)


def _time(text: bytes) -> tuple[int, int]:
    """Seconds and nanoseconds from a pax time such as ``-12.5``. Raises ValueError."""
    whole, _, fraction = text.partition(b".")
    negative = whole[:1] == b"-"
    seconds = _decimal(whole[1:] if negative else whole)
    if fraction and not fraction.isdigit():
        raise ValueError
    nanoseconds = int(fraction[:9].ljust(9, b"0")) if fraction else 0
    if not negative:
        return seconds, nanoseconds
    return (-seconds - 1, 1_000_000_000 - nanoseconds) if nanoseconds else (-seconds, 0)


def _pax_records(body: bytes) -> list[tuple[bytes, bytes]]:
    """``length key=value\\n`` records. Raises ValueError."""
    records = []
    position = 0
    while position < len(body):
        space = body.find(b" ", position, position + 20)
        length = _decimal(body[position:space])
        end = position + length
        if space < 0 or end > len(body) or end <= space + 1 or body[end - 1] != 10:
            raise ValueError
        key, equals, value = body[space + 1 : end - 1].partition(b"=")
        if not key or not equals:
            raise ValueError
        records.append((key, value))
        position = end
    return records


class _Header:
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


class TarParser:
    """Takes an archive in pieces, gives its entries, and passes contents on.

    Args:
        contents: gets each regular file's bytes.

    Every method raises InvalidLayer or LimitExceeded for an archive that breaks the
    format or a limit; after that the parser must not be used.
    """

    def __init__(self, contents: Contents) -> None:
        self._contents = contents
        self._header = _Header()
        self._name = b""  # of the latest entry, for messages
        # The body that comes next: what is left of it, and then up to the block's end.
        self._left = 0
        self._padding = 0
        # A body that is part of the format is gathered; any other goes to contents.
        self._gathered: bytearray | None = None
        self._then: Callable[[bytes], Entry | None] = self._end_pax
        self._segments: Iterator[tuple[int, int]] | None = None
        self._segment_left = 0
        self._base = 0
        # Extensions for the next entry.
        self._pax: list[tuple[bytes, bytes]] | None = None
        self._long_name: bytes | None = None
        self._long_link: bytes | None = None
        self._zero_blocks = 0
        self._torn = False

    def feed(self, view: memoryview) -> Iterator[Entry]:
        """The entries whose headers are complete with these bytes.

        Args:
            view: the next bytes; all but the last call's must be a multiple of 512 long.
        """
        position, end = 0, len(view)
        while position < end:
            entry = None
            if self._left:
                step = min(self._left, end - position)
                self._take(view[position : position + step])
                position += step
            elif self._padding:
                step = min(self._padding, end - position)
                self._padding -= step
                position += step
            elif self._zero_blocks == 2:
                return
            elif end - position < BLOCK:
                self._torn = True
                return
            else:
                entry = self._read_header(view, position)
                position += BLOCK
            if self._gathered is not None and not self._left and not self._padding:
                entry = self._end_gathering()
            if entry is not None:
                yield entry

    def finish(self) -> None:
        """The archive's bytes have ended: complain when it can't have ended here."""
        expected = (self._gathered, self._pax, self._long_name, self._long_link)
        if self._left or self._torn or any(item is not None for item in expected):
            raise InvalidLayer(
                f"the layer's tar archive is cut off at or after {shown(self._name)}; {_REBUILD}"
            )

    # --- bodies -------------------------------------------------------------------

    def _take(self, view: memoryview) -> None:
        self._left -= len(view)
        if self._gathered is not None:
            self._gathered += view
        elif self._segments is None:
            self._contents.write(view)
        else:
            self._take_sparse(view)

    def _take_sparse(self, view: memoryview) -> None:
        assert self._segments is not None
        while view:
            if not self._segment_left:
                offset, self._segment_left = next(self._segments)
                self._contents.seek(self._base + offset)
                continue
            step = min(self._segment_left, len(view))
            self._contents.write(view[:step])
            self._segment_left -= step
            view = view[step:]

    def _gather(self, size: int, then: Callable[[bytes], Entry | None]) -> None:
        """Collect the next ``size`` bytes and call ``then`` with them."""
        if not 0 <= size <= SPECIAL_MAX:
            raise LimitExceeded(
                f"an extended tar header after {shown(self._name)} has {size} bytes; "
                f"at most {SPECIAL_MAX} are supported"
            )
        self._gathered = bytearray()
        self._left = size
        self._padding = -size % BLOCK
        self._then = then

    def _end_gathering(self) -> Entry | None:
        assert self._gathered is not None
        body = bytes(self._gathered)
        self._gathered = None
        return self._then(body)

    # --- headers ------------------------------------------------------------------

    def _read_header(self, view: memoryview, at: int) -> Entry | None:
        # Sums of 256 bytes stay below adler32's modulus, so its low half is the sum plus one.
        total = (adler32(view[at : at + 256]) & 0xFFFF) - 2
        total += adler32(view[at + 256 : at + BLOCK]) & 0xFFFF
        if not total:
            self._zero_blocks += 1
            return None
        if self._zero_blocks:
            raise self._damaged("a zero block in the middle of the archive")
        fields = _HEADER.unpack_from(view, at)
        name, mode, uid, gid, size, seconds, checksum, kind, link, magic, *ustar = fields
        header = self._header
        try:
            expected = _number(checksum)
            if total - sum(checksum) + 256 != expected:
                _check_signed(bytes(view[at : at + BLOCK]), expected)
            header.name = name.partition(b"\0")[0]
            header.kind = kind
            header.mode = _number(mode)
            header.uid = _number(uid)
            header.gid = _number(gid)
            header.size = header.stored = _number(size)
            header.seconds = _number(seconds)
            header.nanoseconds = 0
            header.link = link.partition(b"\0")[0]
            header.major = header.minor = 0
            header.segments = None
            header.xattrs = None
            if magic[:5] == b"ustar":
                _read_ustar(header, magic, ustar, bytes(view[at + 508 : at + BLOCK]))
        except ValueError:
            raise self._damaged("a header with a wrong number or checksum") from None
        if kind in b"xgLK":
            self._gather(header.size, self._special[kind])
            return None
        return self._extended(header, view[at : at + BLOCK])

    def _damaged(self, what: str) -> InvalidLayer:
        return InvalidLayer(
            f"the layer's tar archive is damaged ({what}, after {shown(self._name)}); {_REBUILD}"
        )

    @property
    def _special(self) -> dict[bytes, Callable[[bytes], None]]:
        return {
            b"x": self._end_pax,
            b"g": self._end_global,
            b"L": self._end_long_name,
            b"K": self._end_long_link,
        }

    def _end_pax(self, body: bytes) -> None:
        try:
            self._pax = _pax_records(body)
        except ValueError:
            raise self._damaged("a pax header with a broken record") from None

    def _end_global(self, body: bytes) -> None:
        try:
            _pax_records(body)
        except ValueError:
            raise self._damaged("a global pax header with a broken record") from None

    def _end_long_name(self, body: bytes) -> None:
        self._long_name = body.partition(b"\0")[0]

    def _end_long_link(self, body: bytes) -> None:
        self._long_link = body.partition(b"\0")[0]

    # --- extensions of an entry ---------------------------------------------------

    def _extended(self, header: _Header, block: memoryview) -> Entry | None:
        """Apply what came before this header; its entry, unless a sparse map follows."""
        map_follows = False
        if self._pax is not None:
            records, self._pax = self._pax, None
            try:
                map_follows = _apply_pax(header, records)
            except ValueError:
                raise _senseless(header.name, "pax header") from None
        if self._long_name is not None:
            header.name, self._long_name = self._long_name, None
        if self._long_link is not None:
            header.link, self._long_link = self._long_link, None
        if map_follows:
            self._map = b""
            self._gather(BLOCK, self._more_map)
            return None
        if header.kind == b"S":
            header.segments = []
            try:
                header.size = _number(bytes(block[483:495]))
            except ValueError:
                raise _senseless(header.name, "sparse map") from None
            return self._more_segments(bytes(block[386:483]))
        return self._finished(header)

    def _more_segments(self, block: bytes) -> Entry | None:
        """Old GNU format: pairs of numbers, then a byte that says whether a block follows."""
        header = self._header
        assert header.segments is not None
        count = len(block) // _SPARSE.size
        try:
            for offset, length in _SPARSE.iter_unpack(block[: count * _SPARSE.size]):
                if offset[0] or length[0]:
                    header.segments.append((_number(offset), _number(length)))
        except ValueError:
            raise _senseless(header.name, "sparse map") from None
        if not block[count * _SPARSE.size]:
            return self._finished(header)
        if len(header.segments) * _SPARSE.size > SPECIAL_MAX:
            raise LimitExceeded(
                f"{shown(header.name)} in the layer has a sparse map of more than "
                f"{SPECIAL_MAX} bytes; store the file without holes or in fewer pieces"
            )
        self._gather(BLOCK, self._more_segments)
        return None

    def _more_map(self, block: bytes) -> Entry | None:
        """GNU format 1.0: decimal lines before the content, padded to a block."""
        header = self._header
        self._map += block
        header.stored -= BLOCK
        count, newline, rest = self._map.partition(b"\n")
        try:
            wanted = 2 * _decimal(count) if newline else 1
            numbers = rest.split(b"\n", wanted)
            if newline and len(numbers) > wanted:
                values = [_decimal(number) for number in numbers[:wanted]]
                header.segments = list(zip(values[::2], values[1::2], strict=True))
                return self._finished(header)
        except ValueError:
            raise _senseless(header.name, "sparse map") from None
        if len(self._map) > SPECIAL_MAX or header.stored < BLOCK:
            raise _senseless(header.name, "sparse map")
        self._gather(BLOCK, self._more_map)
        return None

    # --- entries ------------------------------------------------------------------

    def _finished(self, header: _Header) -> Entry:
        path = clean_path(header.name)
        if path is None:
            raise InvalidLayer(
                f"{shown(header.name)} in the layer leads out of the image with '..'; "
                "do not trust this image"
            )
        self._name = path
        _check_numbers(header, path)
        kind = header.kind
        if kind == b"\0" and header.name[-1:] == b"/":
            kind = b"5"  # v7 archives have no type for directories
        size = offset = rdev = 0
        link = b""
        file_type = _TYPES.get(kind)
        if file_type == stat.S_IFREG:
            size = header.size
            offset = self._begin(header, path)
        elif kind == b"1":
            return Entry(path, 0, link=_hard_link(header.link, path))
        elif file_type == stat.S_IFLNK:
            link = _symlink(header.link, path)
            size = len(link)
        elif file_type in (stat.S_IFCHR, stat.S_IFBLK):
            rdev = _device(header, path)
        elif file_type is None:
            raise InvalidLayer(
                f"{shown(path)} in the layer has the tar type {kind!r}, which layers can't hold"
            )
        return Entry(
            path,
            file_type | header.mode & 0o7777,
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

    def _begin(self, header: _Header, path: bytes) -> int:
        """Reserve the content's place and get ready to take it."""
        self._segments = None
        if header.segments is not None:
            _check_segments(header, path)
            self._segments = iter(header.segments)
            self._segment_left = 0
        self._left = header.stored
        self._padding = -header.stored % BLOCK
        self._base = self._contents.begin(header.size) if header.size else 0
        return self._base


def _check_signed(block: bytes, expected: int) -> None:
    """Some old programs summed signed characters. Raises ValueError."""
    summed = block[:148] + b" " * 8 + block[156:]
    if sum(byte - 256 if byte > 127 else byte for byte in summed) != expected:
        raise ValueError


def _read_ustar(header: _Header, magic: bytes, rest: list[bytes], tail: bytes) -> None:
    """Fields that v7 headers lack. Raises ValueError."""
    major, minor, prefix = rest
    if header.kind in (b"3", b"4"):
        header.major, header.minor = _number(major), _number(minor)
    if prefix[0] and magic == b"ustar\x0000":
        if tail == b"tar\0":  # star: two times follow a shorter prefix
            prefix = prefix[:131]
        header.name = prefix.partition(b"\0")[0] + b"/" + header.name


def _apply_pax(header: _Header, records: list[tuple[bytes, bytes]]) -> bool:
    """Override the header by pax records; True when a sparse map begins the content.

    Raises ValueError.
    """
    sparse: dict[bytes, bytes] = {}
    points: list[int] = []
    for key, value in records:
        if key.startswith(_XATTR_PREFIX):
            _add_xattr(header, key[len(_XATTR_PREFIX) :], value)
        elif key in (b"GNU.sparse.offset", b"GNU.sparse.numbytes"):
            points.append(_decimal(value))
        elif key.startswith(b"GNU.sparse."):
            sparse[key[11:]] = value
        elif value:  # an empty value takes an earlier one back
            _apply_record(header, key, value)
    return _apply_sparse(header, sparse, points)


def _apply_record(header: _Header, key: bytes, value: bytes) -> None:
    if key == b"path":
        header.name = _no_nul(value)
    elif key == b"linkpath":
        header.link = _no_nul(value)
    elif key == b"size":
        header.size = header.stored = _decimal(value)
    elif key == b"uid":
        header.uid = _decimal(value)
    elif key == b"gid":
        header.gid = _decimal(value)
    elif key == b"mtime":
        header.seconds, header.nanoseconds = _time(value)


def _no_nul(value: bytes) -> bytes:
    if b"\0" in value:
        raise ValueError
    return value


def _add_xattr(header: _Header, name: bytes, value: bytes) -> None:
    """Keep an attribute that EROFS can hold and overlayfs does not take for its own.

    Others (``system.nfs4_acl``, ``btrfs.compression``) belong to filesystems that the image
    was built on; container runtimes drop what the filesystem refuses.
    """
    if b"\0" in name or len(name) > NAME_MAX:
        raise ValueError
    if name.startswith(_OVERLAY_XATTRS):
        return
    if name in _ACLS or (name.startswith(_XATTR_NAMESPACES) and not name.endswith(b".")):
        if header.xattrs is None:
            header.xattrs = {}
        header.xattrs[name] = value


def _apply_sparse(header: _Header, sparse: dict[bytes, bytes], points: list[int]) -> bool:
    """GNU sparse formats 0.0 (points), 0.1 (map) and 1.0 (map before the content)."""
    if header.kind not in (b"0", b"\0", b"7") or not (sparse or points):
        return False
    if name := sparse.get(b"name"):
        header.name = _no_nul(name)
    if size := sparse.get(b"realsize", sparse.get(b"size")):
        header.size = _decimal(size)
    if sparse.get(b"major") == b"1" and sparse.get(b"minor") == b"0":
        if header.stored < BLOCK:
            raise ValueError
        return True
    if text := sparse.get(b"map"):
        points = [_decimal(number) for number in text.split(b",")]
    header.segments = list(zip(points[::2], points[1::2], strict=True))
    return False


def _senseless(name: bytes, what: str) -> InvalidLayer:
    return InvalidLayer(f"{shown(name)} in the layer has a {what} that makes no sense; {_REBUILD}")


def _check_numbers(header: _Header, path: bytes) -> None:
    if len(path) >= PATH_MAX:
        raise LimitExceeded(
            f"{shown(path)} in the layer has a path of {len(path)} bytes; Linux allows 4095"
        )
    # The highest number means "leave it" to chown(2).
    if not (0 <= header.uid < 0xFFFFFFFF and 0 <= header.gid < 0xFFFFFFFF):
        raise InvalidLayer(
            f"{shown(path)} in the layer has owner {header.uid}:{header.gid}; "
            "Linux has numbers from 0 to 4294967294"
        )
    if not 0 <= header.size < 1 << 63 or header.stored < 0:
        raise InvalidLayer(f"{shown(path)} in the layer has the size {header.size}")
    if not -(1 << 63) <= header.seconds < 1 << 63:
        raise InvalidLayer(f"{shown(path)} in the layer has a time beyond what Linux can hold")
    if header.xattrs is not None:
        _check_xattrs(header.xattrs, path)


def _check_xattrs(xattrs: dict[bytes, bytes], path: bytes) -> None:
    total = 0
    for name, value in xattrs.items():
        total += len(name) + len(value)
        if len(value) > XATTR_VALUE_MAX or total > XATTR_TOTAL_MAX:
            raise LimitExceeded(
                f"{shown(path)} in the layer has extended attributes of {total} bytes or more; "
                f"supported are {XATTR_VALUE_MAX} in one and {XATTR_TOTAL_MAX} together"
            )


def _check_segments(header: _Header, path: bytes) -> None:
    end = stored = 0
    for offset, length in header.segments or ():
        if offset < end or length < 0 or offset + length > header.size:
            raise _senseless(path, "sparse map")
        end = offset + length
        stored += length
    if stored != header.stored:
        raise _senseless(path, "sparse map")


def _hard_link(target: bytes, path: bytes) -> bytes:
    clean = clean_path(target)
    if clean is None:
        raise InvalidLayer(
            f"{shown(path)} in the layer is a hard link to {shown(target)}, which leads out of "
            "the image with '..'; do not trust this image"
        )
    return clean


def _symlink(target: bytes, path: bytes) -> bytes:
    if not target or len(target) >= PATH_MAX:
        raise InvalidLayer(
            f"{shown(path)} in the layer is a symbolic link with a text of {len(target)} bytes; "
            "Linux allows 1 to 4095"
        )
    return target


def _device(header: _Header, path: bytes) -> int:
    if not (0 <= header.major < 1 << 12 and 0 <= header.minor < 1 << 20):
        raise InvalidLayer(
            f"{shown(path)} in the layer is the device {header.major}:{header.minor}; "
            "Linux has numbers up to 4095:1048575"
        )
    if header.kind == b"3" and not header.major and not header.minor:
        raise InvalidLayer(
            f"{shown(path)} in the layer is the character device 0:0, by which overlayfs "
            "marks deleted files; a layer marks them by names that begin with '.wh.'"
        )
    return encode_device(header.major, header.minor)
