"""Whether a layer is what its archive says, after a table of contents or an index has said it.

Either can show any files, as long as their bytes occur in the blob. When all of the blob is here
and is the one that the image names, the archive in it is parsed and compared with the index and
the data file that were used until then: only that makes a layer what its diff_id stands for, which
any other image may name as well.
"""

from collections.abc import Iterator
from pathlib import Path

import msgspec

from store.cas import CHUNK
from store.data_files import OpenData
from store.errors import DigestMismatch
from store.estargz import only_steers
from store.extents import Places
from store.index import Entry, read_index
from store.tar import TarParser
from store.tar_names import shown
from store.unpack import aligned


class ArchiveCheck(Places):
    """Takes the archive in pieces.

    Args:
        index: the layer's index.
        data: its contents.

    Every method raises DigestMismatch at the first difference, and InvalidLayer or
    LimitExceeded for an archive that can't be a layer's.
    """

    def __init__(self, index: Path, data: OpenData) -> None:
        super().__init__()
        self._said: Iterator[Entry] = iter(read_index(index))
        self._next = next(self._said, None)
        self._data = data
        self._parser = TarParser(self)
        self._checked = 0  # up to here the contents are right
        self._left_out = False  # the content that comes now

    def feed(self, view: memoryview) -> None:
        """The next bytes."""
        for entry in self._parser.feed(view):
            if self._is_left_out(entry):
                continue
            if self._next is None or not _is_same(self._next, entry):
                raise _wrong(f"{shown(entry.path)} is another in the layer")
            self._next = next(self._said, None)

    def finish(self) -> None:
        """The archive has ended."""
        self._parser.finish()
        if self._next is not None:
            raise _wrong(f"the layer has no {shown(self._next.path)}")
        self._skip_to(aligned(self.end))

    def _is_left_out(self, entry: Entry) -> bool:
        """Tables of contents do not list themselves, nor what else only steers the loading."""
        return only_steers(entry) and (self._next is None or self._next.path != entry.path)

    def begin(self, entry: Entry) -> int:
        """See ``tar.Contents``."""
        self._left_out = self._is_left_out(entry)
        return 0 if self._left_out else super().begin(entry)

    def write(self, view: memoryview) -> None:
        """See ``tar.Contents``."""
        if self._left_out:
            return
        self._skip_to(self.target)
        if self._data.read(self.target, len(view)) != bytes(view):
            raise _wrong("the layer has other contents")
        self.target += len(view)
        self._checked = self.target

    def _skip_to(self, position: int) -> None:
        """What lies between contents must be zeros; holes are, and are not looked at."""
        while self._checked < position:
            start = self._data.next_written(self._checked, position)
            if start >= position:
                break
            piece = self._data.read(start, min(CHUNK, position - start))
            if any(piece):
                raise _wrong("it puts contents where the layer has none")
            self._checked = start + len(piece)
        self._checked = max(self._checked, position)


def _is_same(said: Entry, entry: Entry) -> bool:
    """Whether an entry is as it was said, but for what tables of contents can't say: eStargz has
    times in seconds, rounded, and Go's archive/tar knows no extended attribute without a value."""
    if said == entry:
        return True
    time = {}
    if entry.nanoseconds and not said.nanoseconds and said.seconds - entry.seconds in (0, 1):
        time = {"seconds": said.seconds, "nanoseconds": 0}
    xattrs = entry.xattrs
    if xattrs != said.xattrs and xattrs is not None:
        xattrs = {name: value for name, value in xattrs.items() if value} or None
    return said == msgspec.structs.replace(entry, xattrs=xattrs, **time)


def _wrong(what: str) -> DigestMismatch:
    return DigestMismatch(
        f"the table of contents or index that the layer was loaded by is wrong: {what}; whoever "
        "made it made a mistake or is hostile: pull the image with mode=full"
    )
