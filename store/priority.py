"""Work that must not slow down what somebody waits for."""

import os
import threading
from contextlib import suppress

_LOWEST = 19


class Nicely:
    """A block whose thread has the lowest priority, unless somebody waits for it after all.

    The thread goes on with the one that it had before.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread: int | None = None
        self._before = 0
        self._hurried = False

    def __enter__(self) -> None:
        with self._lock:
            if not self._hurried:
                self._thread = threading.get_native_id()
                self._before = os.getpriority(os.PRIO_PROCESS, self._thread)
                os.setpriority(os.PRIO_PROCESS, self._thread, _LOWEST)

    def __exit__(self, *_: object) -> None:
        self.hurry()

    def hurry(self) -> None:
        """Somebody waits. From any thread, at any time."""
        with self._lock:
            self._hurried = True
            thread, self._thread = self._thread, None
            if thread is not None:
                with suppress(PermissionError):
                    os.setpriority(os.PRIO_PROCESS, thread, self._before)
