"""Locks that the kernel lets go of with the process that has them."""

import fcntl
import time

_SECONDS = 0.5


def lock(descriptor: int) -> None:
    """Lock an open file for this process alone; see flock(2).

    Waits for half a second: a child that a killed process was just starting holds its locks until
    it executes its program.

    Raises:
        BlockingIOError: another process has it.
    """
    end = time.monotonic() + _SECONDS
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                raise
        time.sleep(0.01)
