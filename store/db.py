"""The store's records, in SQLite.

The file's ``user_version`` is the number of migrations that have been applied to it.
Other packages keep their records here too, so all tables are in one list.
"""

import errno
import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from store.errors import CorruptContent, StorageFailed, StoreError, storage

# Never change one that was released: append.
MIGRATIONS: Sequence[str] = (
    """
    CREATE TABLE images (name TEXT PRIMARY KEY, record BLOB NOT NULL) STRICT;
    CREATE TABLE containers (uid TEXT PRIMARY KEY, id TEXT NOT NULL UNIQUE, record BLOB NOT NULL)
        STRICT;
    """,
    "CREATE TABLE opened (digest TEXT PRIMARY KEY, paths BLOB NOT NULL) STRICT;",
)


class Database:
    """One connection that threads share, one transaction at a time.

    Args:
        path: the database file; made if it is missing.
        migrations: statements that lead from each version of the schema to the next.

    Raises:
        CorruptContent: the file is no database, or one that a newer release made.
        StorageFailed: it can't be opened or written.
    """

    def __init__(self, path: Path, migrations: Sequence[str] = MIGRATIONS) -> None:
        self._path = path
        self._lock = threading.Lock()
        with storage(f"opening {path}"):
            # Records hold environments, and those passwords; SQLite's other files follow this.
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        with self._failures():
            self._connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        try:
            with self._failures():
                # A transaction that was acknowledged survives a power cut: one fsync each,
                # 0.2 ms on an SSD, a few on a rotating disk.
                self._connection.execute("PRAGMA journal_mode = WAL")
                self._connection.execute("PRAGMA synchronous = FULL")
                self._connection.execute("PRAGMA foreign_keys = ON")
            self._migrate(migrations)
        except BaseException:
            self._connection.close()
            raise

    def _migrate(self, migrations: Sequence[str]) -> None:
        with self._failures():
            (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        if version > len(migrations):
            raise CorruptContent(
                f"{self._path} was made by a newer release (schema {version}, this one knows "
                f"{len(migrations)}); install that one again"
            )
        for number, statements in enumerate(migrations[version:], version + 1):
            with self.transaction() as cursor:
                # executescript() would commit what is before it.
                for statement in filter(str.strip, statements.split(";")):
                    cursor.execute(statement)
                cursor.execute(f"PRAGMA user_version = {number}")

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Cursor]:
        """A cursor whose changes are durable when the block ends, or undone when it fails.

        Blocks while another thread is in a transaction; don't nest.

        Raises:
            StorageFailed: the change could not be made durable, and was undone.
            CorruptContent: the database file is damaged.
        """
        with self._lock, self._failures():
            cursor = self._connection.cursor()
            cursor.execute("BEGIN IMMEDIATE")
            try:
                yield cursor
                cursor.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    cursor.execute("ROLLBACK")
                raise
            finally:
                cursor.close()

    def close(self) -> None:
        """Close the connection once the transaction under way has ended."""
        with self._lock:
            self._connection.close()

    @contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.IntegrityError:
            raise  # a row that exists already: the caller's to explain
        except sqlite3.DatabaseError as error:
            raise self._explained(error) from error

    def _explained(self, error: sqlite3.DatabaseError) -> StoreError:
        # The low byte is the kind of failure, the others say more (sqlite.org/rescode.html).
        kind = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
        if kind in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            return CorruptContent(
                f"the database {self._path} is damaged ({error}); move it away and pull the "
                "images again"
            )
        if kind == sqlite3.SQLITE_FULL:
            return StorageFailed(
                f"no space left to write {self._path}; free some and try again",
                errno=errno.ENOSPC,
            )
        return StorageFailed(
            f"{self._path} can't be used ({error}); check the file, its directory and the disk"
        )
