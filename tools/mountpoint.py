"""The directory that the tree is mounted on: is it free, and how to make it so."""

import errno
import os
import stat
from pathlib import Path

from runtime import linux
from tools import instance
from tools.instance import CommandFailed

FSTYPE = "fuse.ctrfs"


def prepare(mountpoint: Path) -> bool:
    """Make sure that a tree can be mounted here.

    The mount that a killed daemon left behind is detached, with what was mounted below it;
    processes that have files of it open keep them as they are.

    Returns:
        Whether there was such a mount.

    Raises:
        CommandFailed: no such directory, or a living ctrfs is mounted there.
    """
    stale = False
    while ours(mountpoint):
        if not _dead(mountpoint):
            other = instance.at(mountpoint)
            whose = f" by process {other.pid}" if other else ""
            raise CommandFailed(
                f"a ctrfs is mounted at {mountpoint} already{whose}; use it, or unmount it with"
                f" `ctrfs umount {mountpoint}`",
                errno=errno.EBUSY,
            )
        stale = True
        detach(mountpoint)
    _require_directory(mountpoint)
    return stale


def ours(mountpoint: Path) -> bool:
    """Whether what is mounted last at this very path is a ctrfs, living or dead."""
    kinds = [mount.fstype for mount in linux.mounts() if mount.target == str(mountpoint)]
    return bool(kinds) and kinds[-1] == FSTYPE


def detach(mountpoint: Path) -> None:
    """Take the topmost mount at the path, and all below it, out of the directory tree.

    Raises:
        CommandFailed: the kernel refuses.
    """
    try:
        linux.umount(str(mountpoint), linux.MNT_DETACH | linux.UMOUNT_NOFOLLOW)
    except OSError as error:
        raise CommandFailed(
            f"cannot unmount {mountpoint}: {error.strerror}", errno=error.errno
        ) from error


def _dead(mountpoint: Path) -> bool:
    """Whether the process that served the mount is gone: the kernel then says ENOTCONN."""
    try:
        os.statvfs(mountpoint)
    except OSError as error:
        return error.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    return False


def _require_directory(mountpoint: Path) -> None:
    try:
        mode = mountpoint.stat().st_mode
    except OSError as error:
        advice = "make it with mkdir" if error.errno == errno.ENOENT else "choose another"
        raise CommandFailed(
            f"{mountpoint} cannot be mounted on: {error.strerror}; {advice}", errno=error.errno
        ) from error
    if not stat.S_ISDIR(mode):
        raise CommandFailed(f"{mountpoint} is not a directory", errno=errno.ENOTDIR)
