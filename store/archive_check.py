"""Whether a layer is what its archive says, after somebody else has said it.

An index that nobody vouches for can show any files, as long as their bytes occur in the blob. When
all of the blob is here and is the one that the image names, the archive in it is parsed and
compared with the index and the data file that were used until then.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from store.cas import CHUNK
from store.errors import DigestMismatch
from store.extents import Places
from store.index import Entry, read_index
from store.tar import TarParser
from store.tar_names import shown
from store.unpack import aligned


class ArchiveCheck(Places):
    """Takes the archive in pieces.

    Args:
        index: the layer's index.
        data_fd: its data file.

    Every method raises DigestMismatch at the first difference, and InvalidLayer or
    LimitExceeded for an archive that can't be a layer's.
    """

    def __init__(self, index: Path, data_fd: int) -> None:
        super().__init__()
        self._entries: Iterator[Entry] = iter(read_index(index))
        self._data_fd = data_fd
        self._parser = TarParser(self)
        self._checked = 0  # up to here the data file is right

    def feed(self, view: memoryview) -> None:
        """The next bytes."""
        for entry in self._parser.feed(view):
            if next(self._entries, None) != entry:
                raise _wrong(f"{shown(entry.path)} is another in the layer")

    def finish(self) -> None:
        """The archive has ended."""
        self._parser.finish()
        for entry in self._entries:
            raise _wrong(f"the layer has no {shown(entry.path)}")
        self._skip_to(aligned(self.end))

    def write(self, view: memoryview) -> None:
        """See ``tar.Contents``."""
        self._skip_to(self.target)
        if os.pread(self._data_fd, len(view), self.target) != bytes(view):
            raise _wrong("the layer has other contents")
        self.target += len(view)
        self._checked = self.target

    def _skip_to(self, position: int) -> None:
        """What lies between contents must be zeros; holes are, and are not looked at."""
        while self._checked < position:
            try:
                start = os.lseek(self._data_fd, self._checked, os.SEEK_DATA)
            except OSError:  # nothing but a hole up to the end
                start = position
            if start >= position:
                break
            start = max(start, self._checked)
            piece = os.pread(self._data_fd, min(CHUNK, position - start), start)
            if any(piece):
                raise _wrong("it puts contents where the layer has none")
            self._checked = start + len(piece)
        self._checked = max(self._checked, position)


def _wrong(what: str) -> DigestMismatch:
    return DigestMismatch(
        f"the index that the layer was loaded by is wrong: {what}; whoever pushed it made a "
        "mistake or is hostile: pull the image with mode=full"
    )
