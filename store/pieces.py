"""Where chunks of lazy layers are that other images may have too: an index by digest.

What it says is a hint and can be lost: whoever takes a chunk from another layer verifies it as
if it had come from a registry.
"""

import logging
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from store.spans import SpanTable

log = logging.getLogger(__name__)

_UNSET = bytes(32)

# Every image has the chunk of an empty line; one of so many layers will be able to lend it.
_MANY = 8

# Kinds of failures that say that the file is none of ours (sqlite.org/rescode.html).
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)

# The pages that lookups of one image need; the kernel keeps the others.
_CACHE_KIB = 512


class Pieces:
    """The index. Safe to use from several threads; methods block shortly.

    Args:
        path: a database file of its own; one that can't be used is made anew.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        try:
            self._connection = _open(path)
        except sqlite3.DatabaseError as error:
            self._connection = _anew(path, error)

    def add(self, layer: str, table: SpanTable) -> None:
        """Enter the chunks of a layer, named by its hexadecimal diff_id, unless it is known."""
        rows = (
            (piece.digest, layer, piece.span)
            for piece in map(table.piece, range(table.pieces))
            if piece.digest != _UNSET
        )
        with self._failures(), self._connection:
            known = self._connection.execute("SELECT 1 FROM layers WHERE layer = ?", (layer,))
            if known.fetchone() is None:
                self._connection.executemany("INSERT OR IGNORE INTO pieces VALUES (?, ?, ?)", rows)
                self._connection.execute("INSERT INTO layers VALUES (?)", (layer,))

    def others(self, layer: str) -> bool:
        """Whether any other layer is known."""
        with self._failures():
            found = self._connection.execute("SELECT 1 FROM layers WHERE layer != ?", (layer,))
            return found.fetchone() is not None
        return False

    def find(self, digest: bytes, besides: str) -> list[tuple[str, int]]:
        """Some layers that have a chunk, other than ``besides``, and the numbers of its spans."""
        with self._failures():
            return self._connection.execute(
                "SELECT layer, span FROM pieces WHERE digest = ? AND layer != ? LIMIT ?",
                (digest, besides, _MANY),
            ).fetchall()
        return []

    def forget(self, layer: str) -> None:
        """Take out a layer that is not here any more."""
        with self._failures(), self._connection:
            self._connection.execute("DELETE FROM pieces WHERE layer = ?", (layer,))
            self._connection.execute("DELETE FROM layers WHERE layer = ?", (layer,))

    @contextmanager
    def _failures(self) -> Iterator[None]:
        """One thread at a time; what fails is lost."""
        with self._lock:
            try:
                yield
            except sqlite3.DatabaseError as error:
                code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)
                if code & 0xFF not in _DAMAGED:
                    log.warning("%s can't be used: %s", self._path, error)
                    return
                self._connection.close()
                self._connection = _anew(self._path, error)

    def close(self) -> None:
        """Close the database."""
        with self._lock:
            self._connection.close()


def _anew(path: Path, error: sqlite3.DatabaseError) -> sqlite3.Connection:
    log.warning("making %s anew: %s", path, error)
    for name in (path, Path(f"{path}-wal"), Path(f"{path}-shm")):
        name.unlink(missing_ok=True)
    return _open(path)


def _open(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, check_same_thread=False)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = OFF")
    connection.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
    connection.execute(
        "CREATE TABLE IF NOT EXISTS pieces (digest BLOB, layer TEXT, span INTEGER,"
        " PRIMARY KEY (digest, layer)) WITHOUT ROWID"
    )
    connection.execute("CREATE TABLE IF NOT EXISTS layers (layer TEXT PRIMARY KEY) WITHOUT ROWID")
    connection.commit()
    return connection
