"""Who a container runs as: names resolved in the image's own /etc/passwd and /etc/group.

These files come from the image and are hostile until proven otherwise: they are opened
inside the root filesystem whatever symbolic links say (openat2(2), RESOLVE_IN_ROOT),
must be regular files, and are read up to a limit. Lines that passwd(5) and group(5) do
not allow are skipped, as the C library does.
"""

import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from runtime import linux
from runtime.errors import InvalidSetting

# A passwd file with 100,000 users has 6 MB.
_MAX_BYTES = 16 << 20
# Linux ends at 2^32 - 2, but tools that store ids in signed integers do not get there.
MAX_ID = (1 << 31) - 1


@dataclass(frozen=True, slots=True)
class User:
    """Numbers for the OCI runtime; ``groups`` are the supplementary ones, own group first."""

    uid: int
    gid: int
    groups: tuple[int, ...]


def resolve_user(root: Path, text: str) -> User:
    """The user that ``USER[:GROUP]`` means in a root filesystem, by docker's rules.

    A number need not be in the files; its group is then 0. Supplementary groups are
    those that list the user, and none when a group is given.

    Raises:
        InvalidSetting: EINVAL, a name is not in the files.
    """
    name, _, group = text.partition(":")
    number = _number(name)
    found: tuple[str, int, int] | None = None
    for fields in _records(root, "etc/passwd", 4, needed=number is None):
        uid, gid = _number(fields[2]), _number(fields[3])
        if uid is not None and gid is not None and (fields[0] == name or uid == number):
            found = fields[0], uid, gid
            break
    if found is None:
        if number is None:
            raise InvalidSetting(f"there is no user {name!r} in the image's /etc/passwd")
        found = "", number, 0
    login, uid, gid = found
    if group:
        gid = _group(root, group)
        return User(uid, gid, (gid,))
    others = (
        other
        for fields in _records(root, "etc/group", 4, needed=False)
        if login and login in fields[3].split(",") and (other := _number(fields[2])) is not None
    )
    return User(uid, gid, tuple(dict.fromkeys((gid, *others))))


def _group(root: Path, name: str) -> int:
    number = _number(name)
    for fields in _records(root, "etc/group", 3, needed=number is None):
        gid = _number(fields[2])
        if gid is not None and (fields[0] == name or gid == number):
            return gid
    if number is None:
        raise InvalidSetting(f"there is no group {name!r} in the image's /etc/group")
    return number


def _number(text: str) -> int | None:
    if text.isascii() and text.isdigit() and len(text) <= 10 and int(text) <= MAX_ID:
        return int(text)
    return None


def _records(root: Path, path: str, fields: int, *, needed: bool) -> Iterator[list[str]]:
    """Lines of at least so many fields; none when there is no such file.

    A file that cannot be read is like none unless a name from it is ``needed``.
    """
    try:
        text = _read(root, path)
    except InvalidSetting:
        if needed:
            raise
        return
    for line in text.split(b"\n"):
        record = line.decode("utf-8", "replace").strip().split(":")
        if len(record) >= fields and record[0]:
            yield record


def _read(root: Path, path: str) -> bytes:
    directory = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # O_PATH first: opening a fifo or a device in earnest can block or do things.
        found = linux.openat2(
            directory, path, os.O_PATH, linux.RESOLVE_IN_ROOT | linux.RESOLVE_NO_MAGICLINKS
        )
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return b""
        raise InvalidSetting(
            f"the image's /{path} cannot be opened: {error.strerror}; set `user` to a number"
        ) from error
    finally:
        os.close(directory)
    try:
        status = os.fstat(found)
        if not stat.S_ISREG(status.st_mode):
            raise InvalidSetting(f"the image's /{path} is no regular file; set `user` to a number")
        if status.st_size > _MAX_BYTES:
            raise InvalidSetting(
                f"the image's /{path} is larger than {_MAX_BYTES} bytes; set `user` to a number"
            )
        with open(f"/proc/self/fd/{found}", "rb") as file:
            return file.read(_MAX_BYTES)
    finally:
        os.close(found)
