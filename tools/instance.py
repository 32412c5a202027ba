"""Which daemons run: one pid file a root, locked for as long as its daemon lives.

The file <run>/pid has the daemon's process id in its first line and its mountpoint in
the second. The lock (flock(2)), not the number, says whether that daemon is alive: the
kernel drops it with the process, however that ended, and no other process can be
mistaken for it.
"""

import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from store.errors import CtrfsError, StoreInUse, storage
from store.lock import lock
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
    path = options.run / PID_FILE
    descriptor = _locked(path, options.root)
    try:
        with storage(f"writing {path}"):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, os.fsencode(f"{os.getpid()}\n{options.mountpoint}\n"), 0)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            _prune(options.run)
    finally:
        os.close(descriptor)


def _locked(path: Path, root: Path) -> int:
    """A descriptor of the locked pid file.

    A daemon that ends just now may remove the directory that we made, or the file that we
    opened; then all begins anew.
    """
    while True:
        _make(path.parent, 0o700)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except FileNotFoundError:
            continue
        try:
            lock(descriptor)
        except BlockingIOError:
            other = _read(descriptor)
            os.close(descriptor)
            where = f" (pid {other.pid}, mounted at {other.mountpoint})" if other else ""
            raise StoreInUse(
                f"{root} is in use by another ctrfs{where}; use that mount, unmount it with"
                " `ctrfs umount`, or give this one another --root"
            ) from None
        if _is(descriptor, path):
            return descriptor
        os.close(descriptor)


def _is(descriptor: int, path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False


def _prune(directory: Path) -> None:
    """Remove the empty directories of a tree, leaving what containers that run on need.

    Does not go into what is mounted there.
    """
    with suppress(OSError):
        device = directory.lstat().st_dev
        for entry in os.scandir(directory):
            status = entry.stat(follow_symlinks=False)
            if stat.S_ISDIR(status.st_mode) and status.st_dev == device:
                _prune(Path(entry))
        directory.rmdir()


def _make(directory: Path, mode: int) -> None:
    if directory.is_dir():
        return
    with storage(f"making the directory {directory}"), suppress(FileExistsError):
        directory.mkdir(mode=mode, parents=True)
        directory.chmod(mode)  # whatever the umask took away
    if not directory.is_dir():
        raise CommandFailed(f"{directory} is not a directory", errno=errno.ENOTDIR)


def at(mountpoint: Path) -> Instance | None:
    """The living daemon that was mounted at ``mountpoint``."""
    return next((instance for instance in living() if instance.mountpoint == mountpoint), None)


def living() -> Iterator[Instance]:
    """All living daemons."""
    for path in DEFAULT_RUN.parent.glob(f"{DEFAULT_RUN.name}*/{PID_FILE}"):
        if instance := _alive(path):
            yield instance


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
