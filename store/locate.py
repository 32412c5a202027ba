"""Where in the layers of an image the contents of a path are."""

import stat
from collections.abc import Sequence

from store.cas import Digest
from store.errors import ImageNotFound
from store.index import Entry, read_index
from store.layers import Layer

Ranges = dict[Digest, list[tuple[int, int]]]

# As the kernel's MAXSYMLINKS.
_LINKS = 40
_WHITEOUT = b".wh."
_OPAQUE = b".wh..wh..opq"


class Contents:
    """All paths of an image, merged, with the places of their contents. Blocks while it reads.

    Args:
        layers: bottom first.

    Raises:
        CorruptContent: a layer's index is damaged.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._entries: dict[bytes, tuple[Digest, Entry]] = {}
        for layer in layers:
            for entry in read_index(layer.index):
                self._add(layer.diff_id, entry)

    def _add(self, diff_id: Digest, entry: Entry) -> None:
        parent, _, name = entry.path.rpartition(b"/")
        if name.startswith(_WHITEOUT):
            # What is deleted is fetched in vain at worst, so an opaque directory's other names
            # may stay.
            if name != _OPAQUE:
                gone = name.removeprefix(_WHITEOUT)
                self._entries.pop(b"/".join(filter(None, (parent, gone))), None)
            return
        self._entries[entry.path] = (diff_id, entry)

    def ranges(self, path: str) -> Ranges:
        """Ranges (offset, length) of the layers' data files that hold a file, or all files below
        a directory.

        Raises:
            ImageNotFound: the image has no such path.
        """
        found = self._resolve(path.encode("utf-8", "surrogateescape"))
        ranges: Ranges = {}
        if found is None:
            raise ImageNotFound(f"the image has no {path}")
        if found and not self._is_directory(found):
            self._collect(found, ranges)
            return ranges
        prefix = found + b"/" if found else b""
        for name in self._entries:
            if name.startswith(prefix):
                self._collect(name, ranges)
        return ranges

    def _is_directory(self, path: bytes) -> bool:
        entry = self._entries.get(path)
        return entry is None or stat.S_ISDIR(entry[1].mode)

    def _collect(self, path: bytes, ranges: Ranges) -> None:
        for _ in range(_LINKS):
            diff_id, entry = self._entries[path]
            if entry.mode or entry.link not in self._entries:
                break
            path = entry.link  # a hard link
        if entry.size and stat.S_ISREG(entry.mode):
            ranges.setdefault(diff_id, []).append((entry.offset, entry.size))

    def _resolve(self, path: bytes) -> bytes | None:
        """The path without symbolic links, which never lead out of the image."""
        pending = path.split(b"/")[::-1]
        done: list[bytes] = []
        links = 0
        while pending:
            part = pending.pop()
            if part in (b"", b"."):
                continue
            if part == b"..":
                done = done[:-1]
                continue
            here = b"/".join([*done, part])
            found = self._entries.get(here)
            if found is not None and stat.S_ISLNK(found[1].mode):
                links += 1
                if links > _LINKS:
                    return None
                target = found[1].link
                if target.startswith(b"/"):
                    done = []
                pending += target.split(b"/")[::-1]
                continue
            done.append(part)
        here = b"/".join(done)
        known = not here or here in self._entries
        prefix = here + b"/"
        return here if known or any(name.startswith(prefix) for name in self._entries) else None
