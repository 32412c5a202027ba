"""A strict comparison of two directory trees, for tests.

What counts: names, types, modes, owners, sizes, contents, link texts, device numbers,
times to the nanosecond, extended attributes, and which names are one file.
"""

import os
import stat
from collections.abc import Collection, Iterator
from pathlib import Path

_PIECE = 1 << 20


def tree_diff(
    left: Path,
    right: Path,
    *,
    ignore_times: Collection[bytes] = (),
    ignore_xattrs: Collection[str] = (),
    only: Collection[str] | None = None,
) -> list[str]:
    """The differences as lines such as ``usr/bin/su: mode 104755 != 100755``; empty if equal.

    Args:
        ignore_times: paths relative to the root (it is ``b"."``) whose mtime doesn't count.
        ignore_xattrs: names of attributes that don't count.
        only: the facts to compare besides names and contents, for example ``("mode", "owner")``.
    """
    left_facts = dict(_facts(os.fsencode(left), ignore_xattrs))
    right_facts = dict(_facts(os.fsencode(right), ignore_xattrs))
    differences = []
    for path in sorted(left_facts.keys() | right_facts.keys()):
        shown = os.fsdecode(path).encode("utf-8", "backslashreplace").decode()
        mine, other = left_facts.get(path), right_facts.get(path)
        if mine is None or other is None:
            differences.append(f"{shown}: only in {right if mine is None else left}")
            continue
        for name, value in mine.items():
            if (name == "mtime" and path in ignore_times) or (only and name not in only):
                continue
            if other.get(name) != value:
                differences.append(f"{shown}: {name} {value!r} != {other.get(name)!r}")
        if "mode" in mine and mine["mode"] == other["mode"] and stat.S_ISREG(mine["mode"]):
            place = _first_difference(
                os.path.join(os.fsencode(left), path), os.path.join(os.fsencode(right), path)
            )
            if place is not None:
                differences.append(f"{shown}: contents differ from byte {place}")
    return differences


def _facts(root: bytes, ignore_xattrs: Collection[str]) -> Iterator[tuple[bytes, dict[str, int]]]:
    """(relative path, facts) of everything below root, and root itself as ``.``."""
    links: dict[tuple[int, int], bytes] = {}
    pending = [b"."]
    while pending:
        path = pending.pop()
        full = os.path.join(root, path)
        status = os.lstat(full)
        facts: dict[str, object] = {
            "mode": status.st_mode,
            "owner": (status.st_uid, status.st_gid),
            "mtime": status.st_mtime_ns,
            "xattrs": {
                name: os.getxattr(full, name, follow_symlinks=False)
                for name in sorted(os.listxattr(full, follow_symlinks=False))
                if name not in ignore_xattrs
            },
        }
        if stat.S_ISDIR(status.st_mode):
            names = sorted(os.listdir(full), reverse=True)
            pending += [name if path == b"." else os.path.join(path, name) for name in names]
        else:
            facts["size"] = status.st_size
            facts["links"] = status.st_nlink
            # The name by which this file came up first stands for it.
            facts["same as"] = links.setdefault((status.st_dev, status.st_ino), path)
        if stat.S_ISLNK(status.st_mode):
            facts["text"] = os.readlink(full)
        if stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode):
            facts["device"] = status.st_rdev
        yield path, facts  # type: ignore[misc]


def _first_difference(left: bytes, right: bytes) -> int | None:
    position = 0
    with open(left, "rb") as mine, open(right, "rb") as other:
        while True:
            one, two = mine.read(_PIECE), other.read(_PIECE)
            if one != two:
                pairs = zip(one, two, strict=False)
                return position + next((i for i, (a, b) in enumerate(pairs) if a != b), len(one))
            if not one:
                return None
            position += len(one)
