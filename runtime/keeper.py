"""Keepers: idle processes that hold the descriptors of a group of fanotify events.

A group lives as long as any process has its descriptor (fanotify.py). A keeper is a
``sleep infinity`` that has inherited it and the memory file of its slots; 0.1 MB of memory
are its own. A conmon that inherits both holds them just as well, and so does the service
manager to which they were sent (notify.py). Holders need not know that they are: they are
found by the name of the memory file, and their descriptors are duplicated with pidfd_getfd(2).

Without a service manager all holders could be killed at once, and then holes read as zeros. So a
keeper is frozen where that makes it immortal: with cgroup v1. It ends when it is thawed.
"""

import errno
import logging
import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

from runtime import linux, notify
from runtime.cgroups import Cgroup, freezer
from runtime.errors import RuntimeFailure
from runtime.fanotify import CLASS_PRE_CONTENT, FileId, PreContentGroup, file_id, marks
from runtime.oci import find_program
from runtime.processes import command_line, identify

log = logging.getLogger(__name__)

# PROC_PID_INIT_INO (include/linux/proc_ns.h)
_FIRST_PID_NAMESPACE = 0xEFFFFFFC


def can_freeze() -> bool:
    """Whether keepers are frozen, so that nobody can kill them."""
    return _usable_freezer() is not None


def holder() -> str:
    """What holds groups and can't be killed, in words; empty if nothing does."""
    if notify.is_managed():
        return "the service manager"
    return "a frozen process" if can_freeze() else ""


def _usable_freezer() -> Path | None:
    """Not below a service manager, which holds the group better and has to be able to end what it
    has started; nor in a container, which could not end with such a process in it."""
    if notify.is_managed() or os.stat("/proc/self/ns/pid").st_ino != _FIRST_PID_NAMESPACE:
        return None
    top = freezer()
    return top if top and os.access(top, os.W_OK) else None


def start(group: PreContentGroup, name: str) -> int:
    """Start a keeper, which stays until somebody ends it. Blocks shortly.

    Args:
        name: of the group's memory file.

    Returns:
        Its process id. It is no child of this process.

    Raises:
        Unsupported: there is no program ``sleep``.
        RuntimeFailure: the machine can have no more processes.
    """
    started = subprocess.run(
        ["sh", "-c", '"$0" infinity >/dev/null 2>&1 & echo $!', find_program("sleep")],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        pass_fds=(group.fd, group.slots_fd),
        start_new_session=True,
        cwd="/",
        check=False,
    )
    if started.returncode:
        raise RuntimeFailure(f"cannot start a process: {started.stderr.decode().strip()}")
    pid = int(started.stdout)
    if top := _usable_freezer():
        try:
            _freeze(pid, top / name)
        except OSError as error:
            log.warning("the keeper %d can be killed, since it can't be frozen: %s", pid, error)
    return pid


def _freeze(pid: int, directory: Path) -> None:
    directory.mkdir(exist_ok=True)
    (directory / "cgroup.procs").write_text(str(pid))
    (directory / "freezer.state").write_text("FROZEN")


def stop(name: str) -> None:
    """End the keepers of the group whose memory file has this name; other holders stay."""
    for pid in find(name):
        process = identify(pid)
        if process and _is_keeper(pid):
            process.send(signal.SIGKILL)
    Cgroup(name).destroy()


def is_there(name: str) -> bool:
    """Whether the group has a keeper; other holders don't count."""
    return any(_is_keeper(pid) for pid in find(name))


def _is_keeper(pid: int) -> bool:
    return command_line(pid)[-1:] == ["infinity"]


def find(name: str) -> list[int]:
    """The processes, but for this one, that hold the group whose memory file has this name.

    Anybody can name a memory file so: only processes of our own user count, with a group of
    a kind that the kernel makes for root alone.
    """
    pids = [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]
    return [pid for pid in pids if pid != os.getpid() and _held(pid, name)]


def marked(name: str) -> set[FileId]:
    """The files that are marked in the group whose memory file has this name, as ``find``."""
    for pid in find(name):
        taken = take(pid, name)
        if taken:
            try:
                return marks(Path(f"/proc/self/fdinfo/{taken[0]}")) - {file_id(taken[1])}
            finally:
                for descriptor in taken:
                    os.close(descriptor)
    return set()


def take(pid: int, name: str) -> tuple[int, int] | None:
    """Duplicates of a holder's descriptors, for PreContentGroup.adopt().

    Returns:
        The group and its slots; None when the process holds them no more.
    """
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    try:
        # Should another process have the number by now, pidfd_getfd() will not look there.
        held = _held(pid, name)
        return _duplicates(pidfd, held) if held else None
    finally:
        os.close(pidfd)


def _duplicates(pidfd: int, held: tuple[int, int]) -> tuple[int, int] | None:
    try:
        group = linux.pidfd_getfd(pidfd, held[0])
        try:
            return group, linux.pidfd_getfd(pidfd, held[1])
        except OSError:
            os.close(group)
            raise
    except OSError as error:
        if error.errno not in (errno.ESRCH, errno.EBADF):
            raise
        return None


def _held(pid: int, name: str) -> tuple[int, int] | None:
    """The numbers of the two descriptors in another process."""
    process = Path(f"/proc/{pid}")
    slots: dict[FileId, int] = {}
    groups: list[int] = []
    with suppress(OSError):
        if process.stat().st_uid != os.geteuid():
            return None
        for number in map(int, os.listdir(process / "fd")):
            with suppress(OSError):  # the process may be closing this one
                link = os.readlink(process / f"fd/{number}")
                if link == f"/memfd:{name} (deleted)":
                    # One with a lock is what the reader of the events has for itself.
                    if not _facts(process, number, "lock:"):
                        status = (process / f"fd/{number}").stat()
                        slots[FileId(status.st_dev, status.st_ino)] = number
                elif link == "anon_inode:[fanotify]" and _is_for_root(process, number):
                    groups.append(number)
        # A service manager may hold those of several daemons.
        for group in groups if slots else ():
            for mark in marks(process / f"fdinfo/{group}"):
                if mark in slots:
                    return group, slots[mark]
    return None


def _facts(process: Path, number: int, key: str) -> list[str]:
    """What follows a key in lines of what the kernel says about a descriptor."""
    lines = (process / f"fdinfo/{number}").read_text().splitlines()
    return [line.removeprefix(key) for line in lines if line.startswith(key)]


def _is_for_root(process: Path, number: int) -> bool:
    """Whether a group has a class that needs CAP_SYS_ADMIN: ``fanotify flags:3b event-flags:…``."""
    flags = _facts(process, number, "fanotify flags:")
    return bool(flags) and bool(int(flags[0].split()[0], 16) & CLASS_PRE_CONTENT)
