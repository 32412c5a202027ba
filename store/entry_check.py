"""Whether an entry that comes from outside is one that an archive can have."""

import stat

from store.errors import InvalidLayer
from store.index import Entry
from store.tar_entry import is_kept, make_entry
from store.tar_names import shown

_KINDS = {
    stat.S_IFREG: b"0",
    0: b"1",
    stat.S_IFLNK: b"2",
    stat.S_IFCHR: b"3",
    stat.S_IFBLK: b"4",
    stat.S_IFDIR: b"5",
    stat.S_IFIFO: b"6",
}


def check_entry(entry: Entry) -> None:
    """Compare an entry with what the fields of a tar header that would give it do give.

    Where its content lies is not looked at: ``offset`` has to be 0.

    Raises:
        InvalidLayer: no header gives it, or it is what no layer may have.
        LimitExceeded: its path or its attributes are too long.
    """
    kind = _KINDS.get(stat.S_IFMT(entry.mode)) if 0 <= entry.mode < 1 << 16 else None
    nanoseconds = 0 <= entry.nanoseconds < 1_000_000_000
    if kind is None or b"\0" in entry.path or b"\0" in entry.link or not nanoseconds:
        raise _senseless(entry)
    made = make_entry(
        kind,
        entry.path,
        entry.link,
        entry.mode,
        entry.uid,
        entry.gid,
        entry.size,
        entry.seconds,
        entry.nanoseconds,
        entry.rdev >> 8 & 0xFFF,
        entry.rdev & 0xFF | entry.rdev >> 12 & 0xFFF00,
        entry.xattrs,
    )
    if made != entry or not _has_only_kept(entry):
        raise _senseless(entry)


def _has_only_kept(entry: Entry) -> bool:
    try:
        return all(map(is_kept, entry.xattrs or ()))
    except ValueError:
        return False


def _senseless(entry: Entry) -> InvalidLayer:
    return InvalidLayer(
        f"{shown(entry.path)} in the layer's index has a name or attributes that no file in a "
        "layer has; do not trust who made it"
    )
