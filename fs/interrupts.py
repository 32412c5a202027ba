"""Letting Ctrl-C and kill reach a process that waits for an answer of ours.

pyfuse3 does not pass on FUSE_INTERRUPT: a process that is blocked in a read or write
here could not even be killed until the request is answered. So while a request waits,
the signals pending for its process are looked at, and when one would act on it the
request is cancelled and answered with EINTR (kernel: Documentation/filesystems/fuse,
"Interrupting filesystem operations"; proc_pid_status(5): SigPnd, ShdPnd, SigBlk, SigIgn).
"""

import glob
import logging
import signal
from contextlib import suppress
from dataclasses import dataclass
from functools import cache

import trio

from fs.inodes import Inodes
from fs.nodes import Node

log = logging.getLogger(__name__)

# A person does not notice 0.1 s, and 500 waiting processes cost 500 reads of 30 µs in
# a thread for each look: 15 % of a core, only while that many wait.
LOOK_SECONDS = 0.1


# Signals that are ignored unless a program asks for them (signal(7)), and those that stop
# and continue a process. A system call of the kernel's own goes on after them: the shell
# that ran `sleep 1 &` and now waits in `echo stop > state` is not to be interrupted by
# SIGCHLD, nor by Ctrl-Z and fg.
_HARMLESS = sum(
    1 << (number - 1)
    for number in (
        *(signal.SIGCHLD, signal.SIGURG, signal.SIGWINCH),
        *(signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU, signal.SIGCONT),
    )
)

# A thread of its own: it must look also when all others hang on a dead disk.
_THREAD = trio.CapacityLimiter(1)


@dataclass(frozen=True, slots=True)
class _Waiter:
    pid: int
    node: Node


class Interrupts:
    """Watches the processes whose requests wait.

    Args:
        inodes: the numbers by which /proc names the files that tasks wait in.
    """

    def __init__(self, inodes: Inodes) -> None:
        self._inodes = inodes
        self._waiting: dict[trio.CancelScope, _Waiter] = {}
        self._someone = trio.Event()

    def watch(self, pid: int, node: Node) -> trio.CancelScope:
        """A scope that is cancelled when the process ``pid`` is to be interrupted.

        The caller enters it, and says ``done`` when the request needs it no more.
        """
        scope = trio.CancelScope()
        self._waiting[scope] = _Waiter(pid, node)
        self._someone.set()
        return scope

    def done(self, scope: trio.CancelScope) -> None:
        """Forget a scope."""
        del self._waiting[scope]

    async def run(self) -> None:
        """Look at the waiting processes until cancelled."""
        before: dict[trio.CancelScope, _Waiter] = {}
        while True:
            if not self._waiting:
                self._someone = trio.Event()
                await self._someone.wait()
            await trio.sleep(LOOK_SECONDS)
            # Only those that were there at the last look as well: short requests, which
            # are nearly all, then cost nothing here.
            old = [(scope, w) for scope, w in before.items() if scope in self._waiting]
            if old:
                for scope in await self._look(old):
                    scope.cancel()
            before = dict(self._waiting)

    async def _look(
        self, waiting: list[tuple[trio.CancelScope, _Waiter]]
    ) -> list[trio.CancelScope]:
        try:
            return await trio.to_thread.run_sync(self._interrupted, waiting, limiter=_THREAD)
        except Exception:
            log.exception("looking at processes that wait failed")
            return []

    def _interrupted(
        self, waiting: list[tuple[trio.CancelScope, _Waiter]]
    ) -> list[trio.CancelScope]:
        found = []
        readers: dict[int, list[int]] | None = None
        for scope, waiter in waiting:
            if waits_for_fuse(waiter.pid) is not False:
                pids = [waiter.pid]
            else:
                # Somebody else uses the descriptor: `cat < wait`, `cat <&3`.
                if readers is None:
                    readers = tasks_in_fuse()
                numbers = self._inodes.held(waiter.node.key)
                pids = [pid for number in numbers for pid in readers.get(number, [])]
            if any(must_stop(pid) for pid in pids):
                found.append(scope)
        return found


def tasks_in_fuse() -> dict[int, list[int]]:
    """Tasks that wait for FUSE in a call on a descriptor, by the inode of its file."""
    tasks: dict[int, list[int]] = {}
    for directory in glob.iglob("/proc/[0-9]*/task/[0-9]*"):
        task = int(directory.rpartition("/")[2])
        if waits_for_fuse(task):
            with suppress(OSError, ValueError, IndexError):
                with open(f"{directory}/syscall") as file:
                    descriptor = int(file.read().split()[1], 16)
                with open(f"{directory}/fdinfo/{descriptor}") as file:
                    fields = dict(line.split(":", 1) for line in file)
                tasks.setdefault(int(fields["ino"]), []).append(task)
    return tasks


def waits_for_fuse(task: int) -> bool | None:
    """Whether the task sleeps in the kernel until a FUSE request is answered.

    None when the kernel does not tell (built without kallsyms, or the task is not
    visible from this pid namespace).
    """
    try:
        with open(f"/proc/{task}/wchan", "rb") as file:
            where = file.read()
    except OSError:
        return False if task else None
    return None if where == b"0" and not _tells_wchan() else where == b"request_wait_answer"


@cache
def _tells_wchan() -> bool:
    """Whether wchan has names at all: some task always sleeps somewhere that has one."""
    for path in glob.iglob("/proc/[0-9]*/wchan"):
        with suppress(OSError), open(path) as file:
            if file.read() not in ("", "0"):
                return True
    return False


def must_stop(pid: int) -> bool:
    """Whether a signal that would end or interrupt the task is pending, or the task is gone.

    The name in the status is the task's own choice and any bytes, so nothing is decoded.
    """
    if pid == 0:
        return False  # a caller in a pid namespace that is not visible from here
    masks = {b"SigPnd": 0, b"ShdPnd": 0, b"SigBlk": 0, b"SigIgn": 0}
    try:
        with open(f"/proc/{pid}/status", "rb") as file:
            for line in file:
                key, _, value = line.partition(b":")
                if key in masks:
                    masks[key] = int(value, 16)
    except OSError:
        return True
    pending = masks[b"SigPnd"] | masks[b"ShdPnd"]
    return bool(pending & ~masks[b"SigBlk"] & ~masks[b"SigIgn"] & ~_HARMLESS)
