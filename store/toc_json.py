"""The entries of a table of contents: JSON that eStargz and zstd:chunked have in common.

An item has the fields of the tar header that it stands for, as Go's archive/tar names them; a
regular file's has its first chunk too, and further chunks follow as items of their own.

Sources: stargz-snapshotter's docs/estargz.md and estargz/types.go; containers/storage's
docs/containers-storage-zstd-chunked.md and pkg/chunked/internal/minimal.
"""

import re
from datetime import UTC, datetime
from typing import Annotated

import msgspec

from store.errors import InvalidLayer, LimitExceeded, NotLazy
from store.index import Entry
from store.spans import Codec
from store.tar_entry import REBUILD, XATTR_TOTAL_MAX, is_kept, make_entry
from store.tar_names import clean_path, shown
from store.unpack import LayerLimits

# A table of contents, inflated or not; containers/storage has the same limit. An entry takes
# 300 to 500 bytes, so that this is enough for 300,000 files, as many as in a whole Debian desktop.
TOC_MAX = 150 << 20

VERSION = 1
CHUNK = "chunk"

# The type of a tar header for each type of item.
_KINDS = {
    "reg": b"0",
    "hardlink": b"1",
    "symlink": b"2",
    "char": b"3",
    "block": b"4",
    "dir": b"5",
    "fifo": b"6",
}

# Chunks beyond the first of each file: 64 GiB in chunks of 64 KiB, which zstd:chunked aims at.
_MORE_CHUNKS = 1 << 20
# The shortest item is {"type":""} and a comma.
_ITEM_MIN = 12
# Go's JSON has this in place of bytes that are not UTF-8.
_LOST = "\ufffd"
# Base64, and each byte of a name written as \u00xx, twice as many names as can count.
_XATTRS_MAX = 12 * XATTR_TOTAL_MAX

_TIME = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(Z|[+-]\d\d:\d\d)", re.ASCII)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_NO_TIME = ("", "0001-01-01T00:00:00Z")  # Go's zero value

_Int64 = Annotated[int, msgspec.Meta(ge=-(1 << 63), le=(1 << 63) - 1)]


class RawToc(msgspec.Struct, frozen=True):
    """A table of contents whose digest was right.

    ``end`` is where in the blob the files' contents end, in bytes.
    """

    format: str
    codec: Codec
    end: int
    json: bytes


class Item(msgspec.Struct, rename="camel", gc=False):
    """An entry as it stands in the table, with only its types checked."""

    type: str
    name: str = ""
    size: _Int64 = 0
    modtime: str = ""
    link_name: str = ""
    mode: _Int64 = 0
    uid: _Int64 = 0
    gid: _Int64 = 0
    dev_major: _Int64 = 0
    dev_minor: _Int64 = 0
    # Decoded one at a time: in the table they take a tenth of the memory.
    xattrs: msgspec.Raw = msgspec.Raw()
    digest: str = ""
    offset: _Int64 = 0
    inner_offset: _Int64 = 0
    chunk_offset: _Int64 = 0
    chunk_size: _Int64 = 0
    chunk_digest: str = ""
    chunk_type: str = ""


class _Document(msgspec.Struct):
    version: _Int64 = 0
    entries: list[Item] | None = None


_DOCUMENT = msgspec.json.Decoder(_Document)
_XATTRS = msgspec.json.Decoder(dict[str, bytes] | None)


def decode(json: bytes, limits: LayerLimits) -> list[Item]:
    """The items, in order.

    Raises:
        InvalidLayer: it is no table of contents.
        LimitExceeded: it has too many items.
        NotLazy: it is of a version that is not known.
    """
    most = limits.layer_entries + _MORE_CHUNKS
    if len(json) > _ITEM_MIN * most and json.count(b"{") > most:
        raise LimitExceeded(
            f"the layer's table of contents has more than {most} entries; "
            "raise layer_entries in the store's configuration if you trust the image"
        )
    try:
        document = _DOCUMENT.decode(json)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidLayer(
            "the layer's table of contents can't be understood: "
            f"{str(error) or 'it is nested too deeply'}; {REBUILD}"
        ) from None
    if document.version != VERSION:
        raise NotLazy(
            f"the layer's table of contents is of version {document.version}; "
            f"only version {VERSION} is supported"
        )
    return document.entries or []


class Times(dict[str, tuple[int, int]]):
    """Seconds and nanoseconds of times in RFC 3339, looked up; each is worked out once, since the
    files of a package often have the same. Raises ValueError.

    For one table: kept any longer, what was made between its files would hold on to all the
    memory that was theirs.
    """

    def __missing__(self, text: str) -> tuple[int, int]:
        found = self[text] = _time(text)
        return found


def entry_of(item: Item, times: Times) -> Entry:
    """The entry that an item stands for; it must not be a chunk's.

    Raises:
        InvalidLayer: its type is not known, or it is what no layer may have.
        LimitExceeded: its path or its extended attributes are too long.
        NotLazy: the table has not got all that the archive has.
    """
    name = _bytes(item.name, item)
    kind = _KINDS.get(item.type)
    if kind is None:
        raise InvalidLayer(
            f"{shown(name)} in the layer's table of contents is of a type that is none of "
            f"{', '.join(_KINDS)} and {CHUNK}; {REBUILD}"
        )
    try:
        seconds, nanoseconds = times[item.modtime]
    except ValueError:
        raise NotLazy(
            f"{shown(name)} in the layer's table of contents has a time that can't be understood"
        ) from None
    if ".." in item.name and b".." in name.split(b"/") and clean_path(name) is not None:
        # Nobody who makes tables writes such a name; what it means is for the archive to say.
        raise NotLazy(f"{shown(name)} in the layer's table of contents is a name with '..'")
    return make_entry(
        kind,
        name,
        _bytes(item.link_name, item) if item.link_name else b"",
        item.mode,
        item.uid,
        item.gid,
        item.size,
        seconds,
        nanoseconds,
        item.dev_major,
        item.dev_minor,
        _xattrs(item) if item.xattrs else None,
    )


def _bytes(name: str, item: Item) -> bytes:
    if _LOST in name:
        raise NotLazy(
            f"{shown(item.name.encode())} in the layer has a name that is not in UTF-8, which "
            "tables of contents can't hold"
        )
    if "\0" in name:
        raise InvalidLayer(
            f"{shown(item.name.encode())} in the layer's table of contents has a name with a zero "
            "byte; do not trust this image"
        )
    return name.encode()


def _xattrs(item: Item) -> dict[bytes, bytes] | None:
    if len(item.xattrs) > _XATTRS_MAX:
        raise LimitExceeded(
            f"{shown(item.name.encode())} in the layer's table of contents has extended attributes "
            f"of {len(item.xattrs)} bytes; at most {XATTR_TOTAL_MAX} are supported"
        )
    try:
        found = {
            _bytes(name, item): value for name, value in (_XATTRS.decode(item.xattrs) or {}).items()
        }
        return {name: value for name, value in found.items() if is_kept(name)} or None
    except (msgspec.MsgspecError, ValueError, RecursionError):
        raise InvalidLayer(
            f"{shown(item.name.encode())} in the layer's table of contents has extended attributes "
            f"that are not names with values in base64; {REBUILD}"
        ) from None


def _time(text: str) -> tuple[int, int]:
    if text in _NO_TIME:
        return 0, 0
    match = _TIME.fullmatch(text)
    if not match:
        raise ValueError
    whole, fraction, zone = match.groups()
    nanoseconds = int(fraction.ljust(9, "0")) if fraction else 0
    since = datetime.fromisoformat(whole + zone) - _EPOCH
    return since.days * 86400 + since.seconds, nanoseconds
