"""What the writers of the formats of lazy layers have in common: the table of contents.

Each entry is encoded as soon as all of it is known, so that a layer with a million files takes
the memory of the JSON text and no more.
"""

import stat
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Literal, Protocol

import msgspec

from store.errors import NotLazy
from store.index import Entry
from store.tar_names import shown
from store.toc_json import CHUNK, TOC_MAX, VERSION

Format = Literal["estargz", "zstd:chunked"]

Compress = Callable[[bytes], bytes]

_TYPES = {
    0: "hardlink",
    stat.S_IFREG: "reg",
    stat.S_IFLNK: "symlink",
    stat.S_IFCHR: "char",
    stat.S_IFBLK: "block",
    stat.S_IFDIR: "dir",
    stat.S_IFIFO: "fifo",
}
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Chunk(msgspec.Struct, gc=False):
    """A part of a file and where it can be inflated from: bytes ``offset`` to ``end`` of the
    blob. ``position`` and ``size`` are its place in the file."""

    position: int
    size: int
    digest: str
    offset: int
    end: int


class Item(msgspec.Struct, rename="camel", omit_defaults=True, gc=False):
    """An entry of the table; see ``toc_json.Item``."""

    type: str
    name: str
    size: int = 0
    modtime: str = ""
    link_name: str = ""
    mode: int = 0
    uid: int = 0
    gid: int = 0
    dev_major: int = 0
    dev_minor: int = 0
    xattrs: dict[str, bytes] | None = None
    digest: str = ""
    offset: int = 0
    end_offset: int = 0
    chunk_offset: int = 0
    chunk_size: int = 0
    chunk_digest: str = ""


class FormatWriter(Protocol):
    """One format of lazy layers.

    Attributes:
        media_type: of the layer.
        landmark: whether a layer in which nothing goes first says so by a file.
        cut_after: whether what follows a chunk in the archive, its padding and further headers,
            can't be inflated together with it.
    """

    media_type: str
    landmark: bool
    cut_after: bool

    def compressor(self) -> Compress:
        """A function for one thread. What it gives depends on nothing but its input."""

    def place(self, item: Item, chunks: list[Chunk]) -> list[Item]:
        """The items of a file in the table, from its first, where its contents are known."""

    def end(self, toc: bytes, offset: int, size: int) -> "Ending":
        """What ends the layer.

        Args:
            toc: the table.
            offset: of the ending in the blob.
            size: of the archive so far, in bytes.
        """


class Ending(msgspec.Struct, frozen=True):
    """The last bytes of a layer's archive and of its blob, and what the manifest says of it."""

    archive: bytes
    blob: bytes
    annotations: dict[str, str]


class TocWriter:
    """Collects the table.

    Every method raises NotLazy when the table could not say what the layer holds, or when it
    gets longer than readers take it.
    """

    def __init__(self, writer: FormatWriter) -> None:
        self._writer = writer
        self._encoder = msgspec.json.Encoder()
        self._text = bytearray(b'{"version":%d,"entries":[' % VERSION)
        self._first = True

    def add(self, entry: Entry, digest: str, chunks: list[Chunk]) -> None:
        """The next entry; ``digest`` is that of a file's content, ``chunks`` all of it."""
        items = [_item(entry)]
        if chunks:
            items[0].digest = digest
            items = self._writer.place(items[0], chunks)
        for item in items:
            if not self._first:
                self._text += b","
            self._first = False
            self._text += self._encoder.encode(item)
        if len(self._text) > TOC_MAX:
            raise NotLazy(f"its table of contents would have more than {TOC_MAX} bytes")

    def finish(self) -> bytes:
        """The JSON document."""
        return bytes(self._text + b"]}")


def chunk_items(item: Item, chunks: list[Chunk]) -> list[Item]:
    """Items for the chunks of a file that has several, the first of them in its own."""
    items = []
    for chunk in chunks:
        if chunk.position:
            item = Item(CHUNK, item.name)
        item.offset = chunk.offset
        item.chunk_offset = chunk.position
        item.chunk_size = chunk.size
        item.chunk_digest = chunk.digest
        items.append(item)
    return items


def _item(entry: Entry) -> Item:
    kind = stat.S_IFMT(entry.mode)
    # Go programs want a name, so the root directory can't be the empty one.
    item = Item(_TYPES[kind], entry.path.decode() or "./")
    item.link_name = entry.link.decode()
    if not kind:
        return item
    item.mode = entry.mode & 0o7777
    item.uid, item.gid = entry.uid, entry.gid
    item.modtime = _time(entry)
    if kind == stat.S_IFREG:
        item.size = entry.size
    elif kind in (stat.S_IFCHR, stat.S_IFBLK):
        item.dev_major = entry.rdev >> 8 & 0xFFF
        item.dev_minor = entry.rdev & 0xFF | entry.rdev >> 12 & ~0xFF
    if entry.xattrs:
        item.xattrs = {name.decode(): value for name, value in sorted(entry.xattrs.items())}
    return item


def _time(entry: Entry) -> str:
    """RFC 3339; empty for the beginning of 1970, which the formats leave out."""
    if not entry.seconds and not entry.nanoseconds:
        return ""
    try:
        text = _seconds(entry.seconds)
    except OverflowError:
        raise NotLazy(
            f"{shown(entry.path)} has a time that tables of contents can't hold"
        ) from None
    fraction = f"{entry.nanoseconds:09}".rstrip("0")
    return f"{text}.{fraction}Z" if fraction else f"{text}Z"


@lru_cache(maxsize=8192)
def _seconds(seconds: int) -> str:
    """Raises OverflowError for years that have not four digits."""
    return (_EPOCH + timedelta(seconds=seconds)).replace(tzinfo=None).isoformat()
