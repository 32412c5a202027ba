"""In which order the entries of a layer go into one that can be loaded lazily.

What a workload opens goes first, so that it can be fetched in one go. A tar archive means the
same in another order only if

- parents come before what is in them, and the targets of hard links before the links;
- what deletes files of lower layers (``.wh.`` names) comes before what replaces them, where it
  did: some programs apply it to the layer itself when it comes later;
- no name is there twice. A table of contents can't have that anyway.
"""

import stat
from collections.abc import Iterable, Iterator, Sequence

from store.errors import NotLazy
from store.estargz import STEERING, only_steers
from store.index import Entry
from store.spool import Member
from store.tar_names import shown

_WHITEOUT = b".wh."
_OPAQUE = b".wh..wh..opq"
_LOST = "\ufffd"  # Go's JSON has this in place of bytes that are not UTF-8


class Order:
    """The entries of a layer, each name once, and what has to go before what.

    Raises:
        NotLazy: a table of contents could not say what this archive says.
    """

    def __init__(self, members: Iterable[Member]) -> None:
        self._members = _unique(members)
        self._index = {member.entry.path: i for i, member in enumerate(self._members)}
        # By what they delete, and by the directory whose old content they hide.
        self._whiteouts: dict[bytes, int] = {}
        self._opaque: dict[bytes, int] = {}
        self._directories: set[bytes] = set()
        for i, member in enumerate(self._members):
            self._check(i, member.entry)

    def _check(self, i: int, entry: Entry) -> None:
        path = entry.path
        for name in (path, entry.link, *(entry.xattrs or ())):
            if not _is_text(name):
                raise NotLazy(
                    f"{shown(path)} has a name that is not in UTF-8, which tables of contents "
                    "can't hold"
                )
        if _deletes(path.rpartition(b"/")[0]) or (not entry.mode and _deletes(entry.link)):
            raise NotLazy(f"{shown(path)} depends on a name that only deletes another")
        if not entry.mode:
            target = self._index.get(entry.link, i)
            if target >= i or stat.S_ISDIR(self._members[target].entry.mode):
                raise NotLazy(
                    f"{shown(path)} is a hard link to {shown(entry.link)}, which is no file that "
                    "comes before it in the same layer"
                )
        parent, _, name = path.rpartition(b"/")
        if parent not in self._directories:
            self._check_parents(path)
            self._directories.add(parent)
        if name == _OPAQUE:
            self._opaque[parent] = i
        elif name.startswith(_WHITEOUT):
            deleted = name[len(_WHITEOUT) :]
            self._whiteouts[parent + b"/" + deleted if parent else deleted] = i

    def _check_parents(self, path: bytes) -> None:
        for above in _parents(path):
            i = self._index.get(above)
            if i is not None and not stat.S_ISDIR(self._members[i].entry.mode):
                raise NotLazy(
                    f"{shown(path)} leads through {shown(above)}, which is no directory in the "
                    "same layer"
                )

    def split(self, first: Sequence[bytes]) -> tuple[list[Member], list[Member]]:
        """The entries that go first, and the rest in the archive's order.

        Args:
            first: clean paths of regular files, in the order of their use. What the layer does
                not have, and what no container can have opened, is left out.
        """
        taken: dict[int, None] = {}
        for path in first:
            i = self._index.get(path)
            if i is not None and self._is_file(i) and not _deletes(path):
                self._take(i, taken)
        rest = [member for i, member in enumerate(self._members) if i not in taken]
        return [self._members[i] for i in taken], rest

    def _is_file(self, i: int) -> bool:
        mode = self._members[i].entry.mode
        return not mode or stat.S_ISREG(mode)

    def _take(self, i: int, taken: dict[int, None]) -> None:
        """Note entry ``i``, after what has to go before it."""
        for link in reversed(self._chain(i)):
            for needed in self._before(link):
                taken.setdefault(needed)
            taken.setdefault(link)

    def _chain(self, i: int) -> list[int]:
        """The entry; if it is a hard link, its target, and so on."""
        chain = [i]
        while not self._members[chain[-1]].entry.mode:
            chain.append(self._index[self._members[chain[-1]].entry.link])
        return chain

    def _before(self, i: int) -> Iterator[int]:
        path = self._members[i].entry.path
        for above in _parents(path):
            for needed in (self._whiteouts, self._index, self._opaque):
                if needed.get(above, i) < i:
                    yield needed[above]
        if self._whiteouts.get(path, i) < i:
            yield self._whiteouts[path]


def _deletes(path: bytes) -> bool:
    """Whether a part of the path is the name of a whiteout."""
    return path.startswith(_WHITEOUT) or b"/" + _WHITEOUT in path


def _parents(path: bytes) -> Iterator[bytes]:
    """The directories above, the root first."""
    if path:
        yield b""
    end = path.find(b"/")
    while end >= 0:
        yield path[:end]
        end = path.find(b"/", end + 1)


def _unique(members: Iterable[Member]) -> list[Member]:
    """Each name once: the last entry of that name counts.

    A directory keeps the place of its first entry, since what is in it comes after that.
    """
    found: dict[bytes, Member] = {}
    links: set[bytes] = set()
    for member in members:
        entry = member.entry
        path = entry.path
        if only_steers(entry):  # an earlier conversion has put it there
            continue
        if path in STEERING:
            raise NotLazy(f"{shown(path)} has a name that lazy layers have another use for")
        earlier = found.get(path)
        if earlier is not None:
            both = stat.S_ISDIR(entry.mode), stat.S_ISDIR(earlier.entry.mode)
            if any(both) != all(both) or path in links:
                raise NotLazy(f"{shown(path)} is there twice, as different things")
            if not any(both) or path.rpartition(b"/")[2].startswith(_WHITEOUT):
                del found[path]
        if not entry.mode:
            links.add(entry.link)
        found[path] = member
    return list(found.values())


def _is_text(name: bytes) -> bool:
    try:
        return name.isascii() or _LOST not in name.decode()
    except UnicodeDecodeError:
        return False
