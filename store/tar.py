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
from typing import Protocol

import msgspec

from store.errors import InvalidLayer, LimitExceeded
from store.index import Entry
from store.tar_entry import REBUILD, make_entry, wrong_size
from store.tar_header import (
    BLOCK,
    SPECIAL_MAX,
    Header,
    Segments,
    apply_pax,
    block_sum,
    check_segments,
    number,
    pax_records,
    read_header,
    senseless,
)
from store.tar_names import shown
from store.tar_sparse import SparseMap

_SPARSE = struct.Struct("12s12s")


class Contents(Protocol):
    """Where file contents go: a data file in which each begins at an aligned place."""

    def begin(self, entry: Entry) -> int:
        """Reserve space for the next content, of an entry that is not empty; returns its offset."""
        ...

    def seek(self, position: int) -> None:
        """Write the next bytes at this place; what is left out reads as zeros."""
        ...

    def write(self, view: memoryview) -> None:
        """Append bytes; the view is valid until the next ``feed()`` returns."""
        ...


class Place(msgspec.Struct, frozen=True, gc=False):
    """Where the content of an entry is: ``stored`` bytes of the archive from ``start`` on.

    ``segments`` says which parts of a sparse file they are; None for one without holes.
    """

    start: int
    stored: int
    segments: Segments | None


class TarParser:
    """Takes an archive in pieces, gives its entries, and passes contents on.

    Args:
        contents: gets each regular file's bytes.

    Attributes:
        position: where the bytes that ``contents`` gets next are in the archive.

    Every method raises InvalidLayer or LimitExceeded for an archive that breaks the
    format or a limit; after that the parser must not be used.
    """

    def __init__(self, contents: Contents) -> None:
        self._contents = contents
        self.position = 0
        self._fed = 0
        self._header = Header()
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
        self._special: dict[bytes, Callable[[bytes], None]] = {
            b"x": self._end_pax,
            b"g": self._end_global,
            b"L": self._end_long_name,
            b"K": self._end_long_link,
        }
        self._zero_blocks = 0
        self._torn = False
        self._fed = 0
        self._position = 0

    @property
    def place(self) -> "Place":
        """Where the content of the entry is that ``feed`` gave last; asked before it goes on."""
        return Place(self._position, self._left, self._header.segments)

    def feed(self, view: memoryview) -> Iterator[Entry]:
        """The entries whose headers are complete with these bytes.

        Args:
            view: the next bytes; all but the last call's must be a multiple of 512 long.
        """
        position, end = 0, len(view)
        base = self._fed
        self._fed += end
        while position < end:
            entry = None
            if self._left:
                step = min(self._left, end - position)
                self.position = base + position
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
                entry = self._read_header(view[position : position + BLOCK])
                position += BLOCK
            if self._gathered is not None and not self._left and not self._padding:
                entry = self._end_gathering()
            if entry is not None:
                self._position = base + position
                yield entry

    def finish(self) -> None:
        """The archive's bytes have ended: complain when it can't have ended here."""
        expected = (self._gathered, self._pax, self._long_name, self._long_link)
        if self._left or self._torn or any(item is not None for item in expected):
            raise InvalidLayer(
                f"the layer's tar archive is cut off at or after {shown(self._name)}; {REBUILD}"
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
            self.position += step
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

    def _read_header(self, block: memoryview) -> Entry | None:
        total = block_sum(block)
        if not total:
            self._zero_blocks += 1
            return None
        if self._zero_blocks:
            raise self._damaged("a zero block in the middle of the archive")
        header = self._header
        try:
            read_header(header, block, total)
        except ValueError:
            raise self._damaged("a header with a wrong number or checksum") from None
        if header.kind in self._special:
            self._gather(header.size, self._special[header.kind])
            return None
        return self._extended(header, block)

    def _damaged(self, what: str) -> InvalidLayer:
        return InvalidLayer(
            f"the layer's tar archive is damaged ({what}, after {shown(self._name)}); {REBUILD}"
        )

    def _end_pax(self, body: bytes) -> None:
        try:
            self._pax = pax_records(body)
        except ValueError:
            raise self._damaged("a pax header with a broken record") from None

    def _end_global(self, body: bytes) -> None:
        try:
            pax_records(body)
        except ValueError:
            raise self._damaged("a global pax header with a broken record") from None

    def _end_long_name(self, body: bytes) -> None:
        self._long_name = body.partition(b"\0")[0]

    def _end_long_link(self, body: bytes) -> None:
        self._long_link = body.partition(b"\0")[0]

    # --- extensions of an entry ---------------------------------------------------

    def _extended(self, header: Header, block: memoryview) -> Entry | None:
        """Apply what came before this header; its entry, unless a sparse map follows."""
        map_follows = False
        if self._pax is not None:
            records, self._pax = self._pax, None
            try:
                map_follows = apply_pax(header, records)
            except ValueError:
                raise senseless(header.name, "pax header") from None
        if self._long_name is not None:
            header.name, self._long_name = self._long_name, None
        if self._long_link is not None:
            header.link, self._long_link = self._long_link, None
        if map_follows:
            self._map = SparseMap(header.name)
            self._gather(BLOCK, self._more_map)
            return None
        if header.kind == b"S":
            header.segments = []
            try:
                header.size = number(bytes(block[483:495]))
            except ValueError:
                raise senseless(header.name, "sparse map") from None
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
                    header.segments.append((number(offset), number(length)))
        except ValueError:
            raise senseless(header.name, "sparse map") from None
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
        header.stored -= BLOCK
        try:
            header.segments = self._map.take(block)
        except ValueError:
            raise senseless(header.name, "sparse map") from None
        if header.segments is not None:
            return self._finished(header)
        if header.stored < BLOCK:
            raise senseless(header.name, "sparse map")
        self._gather(BLOCK, self._more_map)
        return None

    # --- entries ------------------------------------------------------------------

    def _finished(self, header: Header) -> Entry:
        entry = make_entry(
            header.kind,
            header.name,
            header.link,
            header.mode,
            header.uid,
            header.gid,
            header.size,
            header.seconds,
            header.nanoseconds,
            header.major,
            header.minor,
            header.xattrs,
        )
        self._name = entry.path
        if stat.S_ISREG(entry.mode):
            entry.offset = self._begin(header, entry)
        return entry

    def _begin(self, header: Header, entry: Entry) -> int:
        """Reserve the content's place and get ready to take it."""
        if header.stored < 0:
            raise wrong_size(entry.path, header.stored)
        self._segments = None
        if header.segments is not None:
            check_segments(header, entry.path)
            self._segments = iter(header.segments)
            self._segment_left = 0
        self._left = header.stored
        self._padding = -header.stored % BLOCK
        self._base = self._contents.begin(entry) if header.size else 0
        return self._base
