"""A file that takes up room, to be given up when there is none left to delete things with.

To delete a record, or only to open the database, SQLite has to write some pages.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# The database's log and its index (-wal, -shm) after a handful of small transactions.
SIZE = 1 << 20


class Ballast:
    """The file ``path``, which is there whenever there is room for it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def keep(self) -> None:
        """Take up the room, if there is any."""
        try:
            fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(fd, 0, SIZE)
            finally:
                os.close(fd)
        except OSError:
            self.drop()

    def drop(self) -> None:
        """Give the room up."""
        with suppress(OSError):
            self._path.unlink(missing_ok=True)

    @contextmanager
    def dropped(self) -> Iterator[None]:
        """Give the room up for as long as the block runs."""
        self.drop()
        try:
            yield
        finally:
            self.keep()
