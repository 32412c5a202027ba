"""A file that takes up room, to be given up when there is none left to delete things with.

To delete a record, or only to open the database, SQLite has to write some pages, and to find out
what a filesystem can do, a daemon that starts tries that out in it.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# The database's log and its index (-wal, -shm) after a handful of small transactions, and what a
# daemon needs to start.
SIZE = 1 << 20
_LEAST = 64 << 10


class Ballast:
    """The file ``path``, which is as large as there is room for, up to SIZE. Safe to use from
    several threads."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._users = 0

    @contextmanager
    def dropped(self) -> Iterator[None]:
        """Give the room up for as long as the block, or another, runs."""
        with self._lock:
            self._users += 1
            with suppress(OSError):
                self._path.unlink(missing_ok=True)
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users:
                    self._keep()

    def _keep(self) -> None:
        size = SIZE
        while size >= _LEAST and not self._takes(size):
            size //= 2

    def _takes(self, size: int) -> bool:
        try:
            fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(fd, 0, size)
            finally:
                os.close(fd)
        except OSError:
            with suppress(OSError):
                self._path.unlink(missing_ok=True)
            return False
        return True
