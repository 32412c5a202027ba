"""Which daemons run: one pid file a root, locked for as long as its daemon lives.

The file <run>/pid has the daemon's process id in its first line and its mountpoint in
the second. The lock (flock(2)), not the number, says whether that daemon is alive: the
kernel drops it with the process, however that ended, and no other process can be
mistaken for it. The file itself stays, because a lock on a file that someone else has
just unlinked would guard nothing.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from store.errors import CtrfsError, StoreInUse, storage
from tools.options import DEFAULT_RUN, Options

PID_FILE = "pid"


class CommandFailed(CtrfsError):
    """The command cannot do what it was asked for."""


@dataclass(frozen=True, slots=True)
class Instance:
    """A living daemon."""

    pid: int
    mountpoint: Path


@contextmanager
def claimed(options: Options) -> Iterator[None]:
    """Be the only daemon of ``options.root`` for the time of the block.

    Makes the root (mode 0711: users reach files in it that are theirs, and list nothing)
    and the run directory (0700) where they are missing.

    Raises:
        StoreInUse: another daemon has the root.
        StorageFailed: a directory or the file cannot be made.
    """
    _make(options.root, 0o711)
    _make(options.run, 0o700)
    path = options.run / PID_FILE
    with storage(f"opening {path}"):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            other = _read(descriptor)
            where = f" (pid {other.pid}, mounted at {other.mountpoint})" if other else ""
            raise StoreInUse(
                f"{options.root} is in use by another ctrfs{where}; use that mount, unmount it"
                " with `ctrfs umount`, or give this one another --root"
            ) from None
        with storage(f"writing {path}"):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, os.fsencode(f"{os.getpid()}\n{options.mountpoint}\n"), 0)
        try:
            yield
        finally:
            os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def _make(directory: Path, mode: int) -> None:
    with storage(f"making {directory}"), suppress(FileExistsError):
        directory.mkdir(mode=mode, parents=True)
        directory.chmod(mode)  # whatever the umask took away


def at(mountpoint: Path) -> Instance | None:
    """The living daemon that was mounted at ``mountpoint``."""
    for path in DEFAULT_RUN.parent.glob(f"{DEFAULT_RUN.name}*/{PID_FILE}"):
        instance = _alive(path)
        if instance and instance.mountpoint == mountpoint:
            return instance
    return None


def _alive(path: Path) -> Instance | None:
    """Whose pid file this is, if that daemon lives."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _read(descriptor)
    finally:
        os.close(descriptor)
    return None


def _read(descriptor: int) -> Instance | None:
    """None in the moment between lock and write."""
    pid, _, mountpoint = os.fsdecode(os.pread(descriptor, 8192, 0)).partition("\n")
    return Instance(int(pid), Path(mountpoint.removesuffix("\n"))) if pid else None
