"""Processes of others, named so that a reused process id is never mistaken for them."""

import os
import select
import signal
from collections.abc import Collection
from contextlib import suppress
from functools import cache
from pathlib import Path

import msgspec


class Process(msgspec.Struct, frozen=True):
    """A process: its id, when it started (proc_pid_stat(5), field 22), and in which boot."""

    pid: int
    started: int
    boot: str

    def open(self) -> int | None:
        """A pidfd of exactly this process; None when it is gone (a zombie counts as there)."""
        try:
            descriptor = os.pidfd_open(self.pid)
        except OSError:
            return None
        # The descriptor holds on to the id, so what is read now is about what it refers to.
        if identify(self.pid) != self:
            os.close(descriptor)
            return None
        return descriptor

    def is_running(self) -> bool:
        """Whether it has not ended."""
        descriptor = self.open()
        if descriptor is None:
            return False
        try:
            return not wait_for_end(descriptor, 0)
        finally:
            os.close(descriptor)

    def send(self, number: int) -> bool:
        """Send a signal.

        Returns:
            Whether the process was there to get it.
        """
        descriptor = self.open()
        if descriptor is None:
            return False
        try:
            signal.pidfd_send_signal(descriptor, number)
        except ProcessLookupError:
            return False
        finally:
            os.close(descriptor)
        return True

    def kill(self, seconds: float) -> bool:
        """SIGKILL, and wait for the end. Blocks.

        Returns:
            Whether it is gone.
        """
        descriptor = self.open()
        if descriptor is None:
            return True
        try:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            return wait_for_end(descriptor, seconds)
        finally:
            os.close(descriptor)


def wait_for_end(descriptor: int, seconds: float) -> bool:
    """Wait until the process of a pidfd has ended; whether it has."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


def identify(pid: int) -> Process | None:
    """The process that has this id now."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    fields = stat[stat.rindex(b")") + 2 :].split()
    return Process(pid, int(fields[19]), boot_id())


def command_line(pid: int) -> list[str]:
    """The arguments of a process; empty when it is gone."""
    try:
        return os.fsdecode(Path(f"/proc/{pid}/cmdline").read_bytes()).split("\0")[:-1]
    except OSError:
        return []


def find_processes(programs: Collection[str], word: str) -> list[Process]:
    """Processes of these programs that have ``word`` as an argument."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            arguments = command_line(int(entry))
            if arguments and os.path.basename(arguments[0]) in programs and word in arguments:
                found.append(identify(int(entry)))
    return [process for process in found if process is not None]


@cache
def boot_id() -> str:
    """What tells this boot of the machine from others."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
