"""System calls that the standard library lacks. Thin: arguments as in the manual pages.

Every function raises OSError with errno and the path. All of them may block, and those
that take paths may call into a FUSE filesystem: use them in worker threads.
"""

import ctypes
import errno
import fcntl
import os
import re
import signal
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

_T = TypeVar("_T")
_libc = ctypes.CDLL(None, use_errno=True)

# mount(2)
MS_RDONLY = 0x1
MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_REMOUNT = 0x20
MS_BIND = 0x1000
MS_PRIVATE = 0x40000

# umount(2)
MNT_DETACH = 0x2
MNT_EXPIRE = 0x4
UMOUNT_NOFOLLOW = 0x8

# openat2(2)
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08
RESOLVE_IN_ROOT = 0x10
_SYS_OPENAT2 = 437  # the same number on every architecture

# statx(2)
AT_FDCWD = -100
_AT_SYMLINK_NOFOLLOW = 0x100
_AT_NO_AUTOMOUNT = 0x800
_AT_STATX_DONT_SYNC = 0x4000
_STATX_ATTR_MOUNT_ROOT = 0x2000

# unshare(2)
_CLONE_FS = 0x200

# pidfd_getfd(2)
_SYS_PIDFD_GETFD = 438  # the same number on every architecture

# loop(4)
_LOOP_CTL_GET_FREE = 0x4C82
_LOOP_CONFIGURE = 0x4C0A
_LO_FLAGS_READ_ONLY = 1
_LO_FLAGS_AUTOCLEAR = 4
# Between asking for a free loop device and configuring it others may take it.
_LOOP_ATTEMPTS = 64


def _check(result: int, path: str | None = None) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)
    return result


def kernel_version() -> tuple[int, int]:
    """The running kernel's version, for example (6, 1)."""
    match = re.match(r"([0-9]+)\.([0-9]+)", os.uname().release)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def mount(source: str, target: str, fstype: str, flags: int = 0, options: str = "") -> None:
    """mount(2)."""
    arguments = (os.fsencode(source), os.fsencode(target), fstype.encode(), ctypes.c_ulong(flags))
    _check(_libc.mount(*arguments, os.fsencode(options) if options else None), target)


def umount(target: str, flags: int = UMOUNT_NOFOLLOW) -> None:
    """umount2(2)."""
    _check(_libc.umount2(os.fsencode(target), flags), target)


def expire_mount(target: str) -> bool:
    """Unmount ``target`` if nobody used it since the last call of this function.

    umount2(2) with MNT_EXPIRE: the first call marks the mount, any use of it takes the
    mark away, and a call that finds the mark unmounts.

    Returns:
        Whether nothing is mounted there any more.
    """
    try:
        umount(target, MNT_EXPIRE | UMOUNT_NOFOLLOW)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EBUSY):
            return False
        if error.errno in (errno.EINVAL, errno.ENOENT):
            return True
        raise
    return True


def is_mountpoint(path: str) -> bool:
    """Whether something is mounted right at ``path``; bind mounts count too (statx(2))."""
    buffer = ctypes.create_string_buffer(256)
    flags = _AT_SYMLINK_NOFOLLOW | _AT_NO_AUTOMOUNT | _AT_STATX_DONT_SYNC
    try:
        _check(_libc.statx(AT_FDCWD, os.fsencode(path), flags, 0, buffer), path)
    except FileNotFoundError:
        return False
    attributes = struct.unpack_from("=Q", buffer, 8)[0]
    return bool(attributes & _STATX_ATTR_MOUNT_ROOT)


def openat2(directory: int, path: str, flags: int, resolve: int) -> int:
    """openat2(2): a descriptor, close-on-exec."""
    how = struct.pack("=QQQ", flags | os.O_CLOEXEC, 0, resolve)
    number = ctypes.c_long(_SYS_OPENAT2)
    arguments = (directory, os.fsencode(path), how, ctypes.c_size_t(len(how)))
    return _check(_libc.syscall(number, *arguments), path)


def fanotify_init(flags: int, event_flags: int) -> int:
    """fanotify_init(2): a descriptor of a new group."""
    return _check(_libc.fanotify_init(flags, event_flags))


def fanotify_mark(group: int, flags: int, mask: int, directory: int, path: str | None) -> None:
    """fanotify_mark(2); without a path, for what ``directory`` is open on."""
    name = os.fsencode(path) if path else None
    _check(_libc.fanotify_mark(group, flags, ctypes.c_uint64(mask), directory, name), path)


def pidfd_getfd(pidfd: int, number: int) -> int:
    """pidfd_getfd(2): a duplicate, close-on-exec, of a descriptor of another process."""
    call = ctypes.c_long(_SYS_PIDFD_GETFD)
    return _check(_libc.syscall(call, pidfd, number, 0))


def in_directory(directory: str, function: Callable[[], _T]) -> _T:
    """Run ``function`` with ``directory`` as the working directory of it alone.

    A thread of its own gives up sharing the working directory with the process
    (unshare(2) with CLONE_FS) and ends afterwards.
    """
    result: list[_T] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            _check(_libc.unshare(_CLONE_FS))
            os.chdir(directory)
            result.append(function())
        except BaseException as error:  # noqa: BLE001 - handed to the caller
            failure.append(error)

    thread = threading.Thread(target=run, name="in_directory")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return result[0]


def attach_loop(path: str) -> tuple[int, str]:
    """Give the file ``path`` a loop device, read-only, freed with its last user.

    Returns:
        A descriptor that keeps the device, and its path. Close the descriptor once the
        device is mounted.
    """
    backing = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
        try:
            return _configure_loop(control, backing, path)
        finally:
            os.close(control)
    finally:
        os.close(backing)


def _configure_loop(control: int, backing: int, path: str) -> tuple[int, str]:
    # struct loop_config: fd, block_size, struct loop_info64, 8 reserved words.
    flags = _LO_FLAGS_READ_ONLY | _LO_FLAGS_AUTOCLEAR
    name = os.fsencode(path)[:63]
    config = struct.pack(
        "=II 5Q 4I 64s 64s 32s 2Q 64x", backing, 0, *[0] * 8, flags, name, b"", b"", 0, 0
    )
    for _ in range(_LOOP_ATTEMPTS):
        device = f"/dev/loop{fcntl.ioctl(control, _LOOP_CTL_GET_FREE)}"
        descriptor = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.ioctl(descriptor, _LOOP_CONFIGURE, config)
        except OSError as error:
            os.close(descriptor)
            if error.errno != errno.EBUSY:
                raise
        else:
            return descriptor, device
    raise OSError(errno.EBUSY, "all free loop devices were taken by others", path)


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of /proc/self/mountinfo (proc_pid_mountinfo(5))."""

    device: str
    root: str
    target: str
    fstype: str
    source: str
    options: str


def mounts() -> list[Mount]:
    """What is mounted, in the order of mounting."""
    with open("/proc/self/mountinfo", "rb") as file:
        return [_parse_mount(os.fsdecode(line)) for line in file]


def _parse_mount(line: str) -> Mount:
    first, _, second = line.rstrip("\n").partition(" - ")
    fields = first.split(" ")
    fstype, source, options = second.split(" ", 2)
    return Mount(
        device=fields[2],
        root=unescape(fields[3]),
        target=unescape(fields[4]),
        fstype=fstype,
        source=unescape(source),
        options=unescape(options),
    )


def unescape(text: str) -> str:
    r"""Text in which blanks and backslashes stand as \040, as in fstab(5) and /proc."""
    return re.sub(r"\\([0-3][0-7]{2})", lambda match: chr(int(match[1], 8)), text)


def escape(text: str) -> str:
    r"""The reverse of unescape()."""
    return re.sub(r"[ \t\n\\#]", lambda match: f"\\{ord(match[0]):03o}", text)


def is_open_elsewhere(descriptor: int) -> bool:
    """Whether a file is open by another open(2) than this one, as by a mount whose device it is:
    also one that is detached and still in use, which is to be seen nowhere.

    The kernel gives a write lease only where it is not (fcntl(2), F_SETLEASE). Where it gives none,
    as on some network filesystems, nobody is known to have it open.
    """
    # Whoever opens it just now waits for that moment, and we are told with a signal.
    fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except OSError as error:
        return error.errno == errno.EAGAIN
    fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return False
