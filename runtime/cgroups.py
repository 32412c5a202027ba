"""A container's cgroups, on machines with cgroup v1, v2, or both side by side.

The same path is used in every hierarchy (cgroups(7)), so that what an OCI runtime made
can be found, emptied and removed without it.
"""

import errno
import os
import pwd
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Literal

from runtime import linux

Layout = Literal["v2", "hybrid", "v1", "none"]

# A killed process leaves its cgroup when the kernel has taken it apart; large ones need
# a while. After this, removal is left to the next start of the daemon.
_REMOVE_SECONDS = 5.0
_RETRY_SECONDS = 0.002


@cache
def hierarchies() -> tuple[Path, ...]:
    """Mountpoints of all cgroup hierarchies, one for each."""
    found = {
        mount.device: Path(mount.target)
        for mount in linux.mounts()
        if mount.fstype in ("cgroup", "cgroup2") and mount.root == "/"
    }
    return tuple(found.values())


@cache
def freezer() -> Path | None:
    """Where the freezer of cgroup v1 is mounted. What it has frozen does not even die of SIGKILL
    (admin-guide/cgroup-v1/freezer-subsystem.rst), as it does with cgroup v2."""
    for mount in linux.mounts():
        if mount.fstype == "cgroup" and mount.root == "/" and "freezer" in mount.options.split(","):
            return Path(mount.target)
    return None


@cache
def layout() -> Layout:
    """Which versions this machine has mounted where OCI runtimes look."""
    kinds = {m.target: m.fstype for m in linux.mounts() if m.fstype in ("cgroup", "cgroup2")}
    if kinds.get("/sys/fs/cgroup") == "cgroup2":
        return "v2"
    if "cgroup2" in kinds.values():
        return "hybrid"
    return "v1" if kinds else "none"


class Cgroup:
    """One cgroup by its path from the top, in all hierarchies.

    Args:
        path: absolute, for example ``/ctrfs/2f1c``.
    """

    def __init__(self, path: str) -> None:
        self._relative = path.lstrip("/")

    def _directories(self) -> Iterator[Path]:
        for top in hierarchies():
            directory = top / self._relative
            if directory.is_dir():
                yield directory

    def exists(self) -> bool:
        """Whether it is left in some hierarchy."""
        return next(self._directories(), None) is not None

    def pids(self) -> list[int]:
        """All processes in it and below it, in order."""
        found: set[int] = set()
        for directory in self._directories():
            for parent, _, files in os.walk(directory):
                if "cgroup.procs" in files:
                    # ENODEV: removed meanwhile. EOPNOTSUPP: a cgroup of threads, whose
                    # processes are listed above it.
                    with suppress(OSError):
                        found.update(map(int, Path(parent, "cgroup.procs").read_text().split()))
        return sorted(found - {0})

    def frozen(self) -> bool:
        """Whether its processes are stopped by the freezer."""
        for directory in self._directories():
            for name, word in (("freezer.state", "FROZEN"), ("cgroup.freeze", "1")):
                with suppress(OSError):
                    if (directory / name).read_text().strip() == word:
                        return True
        return False

    def thaw(self) -> None:
        """Let frozen processes go on."""
        for directory in self._directories():
            for name, word in (("freezer.state", "THAWED"), ("cgroup.freeze", "0")):
                with suppress(OSError):
                    (directory / name).write_text(word)

    def kill(self) -> None:
        """SIGKILL to everything in it; frozen processes are thawed, to die."""
        self.thaw()
        for pid in self.pids():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def destroy(self) -> bool:
        """Kill what is in it and remove it.

        Returns:
            Whether it is gone.
        """
        deadline = time.monotonic() + _REMOVE_SECONDS
        while not self._remove():
            if time.monotonic() > deadline:
                return False
            self.kill()
            time.sleep(_RETRY_SECONDS)
        return True

    def _remove(self) -> bool:
        gone = True
        for directory in self._directories():
            for parent, _, _ in os.walk(directory, topdown=False):
                try:
                    os.rmdir(parent)
                except OSError as error:
                    gone = gone and error.errno == errno.ENOENT
        return gone


def process_table(pids: list[int]) -> str:
    """The processes as `ps -o pid,ppid,user,stat,time,args` shows them, if any is left."""
    rows = [row for pid in pids if (row := _row(pid)) is not None]
    if not rows:
        return ""
    rows.insert(0, ("PID", "PPID", "USER", "STAT", "TIME", "COMMAND"))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    return "\n".join(
        " ".join(
            (
                row[0].rjust(widths[0]),
                row[1].rjust(widths[1]),
                row[2].ljust(widths[2]),
                row[3].ljust(widths[3]),
                row[4].rjust(widths[4]),
                row[5],
            )
        )
        for row in rows
    )


def _row(pid: int) -> tuple[str, ...] | None:
    """One process from proc_pid_stat(5) and proc_pid_cmdline(5); None when it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes()
        owner = Path(f"/proc/{pid}").stat().st_uid
    except OSError:
        return None
    name = stat[stat.index(b"(") + 1 : stat.rindex(b")")]
    fields = stat[stat.rindex(b")") + 2 :].split()
    seconds = (int(fields[11]) + int(fields[12])) // os.sysconf("SC_CLK_TCK")
    command = arguments.rstrip(b"\0").replace(b"\0", b" ") or b"[" + name + b"]"
    return (
        str(pid),
        fields[1].decode(),
        _user(owner),
        fields[0].decode(),
        f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}",
        # Newlines and escape sequences must not make rows of their own.
        "".join(c if c.isprintable() else "?" for c in command.decode("utf-8", "replace")),
    )


@cache
def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
