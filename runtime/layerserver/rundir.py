"""What the layer server has in its run directory, and who may have it."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from runtime import linux
from runtime.layerserver import protocol
from store.errors import StoreInUse


@contextmanager
def claimed(run: Path) -> Iterator[None]:
    """Be the only server of a run directory; the kernel lets go of the lock with the process.

    Raises:
        StoreInUse: another server has it.
    """
    descriptor = os.open(run / protocol.PID_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StoreInUse(f"another layer server serves {run}") from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def make_mountpoint(run: Path) -> Path:
    """An empty directory for the devices; what a killed server left mounted there goes."""
    path = run / protocol.DEVICES
    _unmount(path)
    path.mkdir(mode=0o700, exist_ok=True)
    return path


def listening(run: Path) -> socket.socket:
    """The socket that requests come through."""
    path = run / protocol.SOCKET
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    with protocol.short_path(path) as short:
        listener.bind(short)
    listener.listen(64)
    return listener


def tidy(run: Path) -> None:
    """Remove what a server has left; the lock last, for which the daemon waits."""
    (run / protocol.SOCKET).unlink(missing_ok=True)
    path = run / protocol.DEVICES
    _unmount(path)
    with suppress(OSError):  # not there
        path.rmdir()
    (run / protocol.CONFIG).unlink(missing_ok=True)
    (run / protocol.PID_FILE).unlink(missing_ok=True)
    with suppress(OSError):  # a daemon is there, which removes it
        run.rmdir()


def _unmount(path: Path) -> None:
    while any(mount.target == str(path) for mount in linux.mounts()):
        linux.umount(str(path), linux.MNT_DETACH | linux.UMOUNT_NOFOLLOW)
