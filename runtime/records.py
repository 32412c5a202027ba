"""What is remembered about containers, in the store's database.

A record is written before the command that changed it is acknowledged, and says enough
for the next daemon to go on from any moment at which this one may be killed.
"""

import sqlite3
from typing import Literal

import msgspec

from runtime.errors import ContainerExists
from runtime.processes import Process
from runtime.settings import Settings
from runtime.users import User
from store.cas import Digest
from store.db import Database
from store.errors import CorruptContent
from store.manifest import ImageConfig

State = Literal["created", "running", "paused", "stopped"]


class Pinned(msgspec.Struct, frozen=True):
    """The image that a container's files lie on; its name may mean another one later.

    ``diff_ids`` are bottom first.
    """

    digest: Digest
    diff_ids: tuple[Digest, ...]
    config: ImageConfig


class Run(msgspec.Struct, frozen=True):
    """A run of the container: its monitor, and its first process."""

    conmon: Process
    init: Process


class Starting(msgspec.Struct, frozen=True):
    """A start under way, and what undoing it restores.

    ``mounted`` and ``pinned`` say whether the root filesystem was mounted, and the image
    chosen, before it.
    """

    mounted: bool
    pinned: bool


class Record(msgspec.Struct, kw_only=True):
    """One container. Times are nanoseconds since the epoch."""

    uid: str
    id: str
    created_ns: int
    settings_ns: int
    state_ns: int
    settings: Settings = Settings()
    override: str | None = None
    state: State = "created"
    starting: Starting | None = None
    image: Pinned | None = None
    user: User | None = None
    run: Run | None = None
    started_ns: int | None = None
    finished_ns: int | None = None
    exit_code: int | None = None
    error: str = ""


class Records:
    """The table ``containers``. Every method blocks; safe to use from several threads."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def load(self) -> list[Record]:
        """All records, oldest first.

        Raises:
            CorruptContent: one cannot be read.
        """
        with self._database.transaction() as cursor:
            rows = cursor.execute("SELECT id, record FROM containers ORDER BY rowid").fetchall()
        return [_decode(name, record) for name, record in rows]

    def add(self, record: Record) -> None:
        """Insert a new one.

        Raises:
            ContainerExists: its name is taken.
        """
        row = (record.uid, record.id, msgspec.json.encode(record))
        try:
            with self._database.transaction() as cursor:
                cursor.execute("INSERT INTO containers (uid, id, record) VALUES (?, ?, ?)", row)
        except sqlite3.IntegrityError:
            raise ContainerExists(f"there is a container {record.id} already") from None

    def save(self, record: Record) -> None:
        """Write one that exists."""
        row = (record.id, msgspec.json.encode(record), record.uid)
        with self._database.transaction() as cursor:
            cursor.execute("UPDATE containers SET id = ?, record = ? WHERE uid = ?", row)

    def delete(self, uid: str) -> None:
        """Remove one."""
        with self._database.transaction() as cursor:
            cursor.execute("DELETE FROM containers WHERE uid = ?", (uid,))


def _decode(name: str, record: bytes) -> Record:
    try:
        return msgspec.json.decode(record, type=Record)
    except msgspec.MsgspecError as error:
        raise CorruptContent(
            f"the record of the container {name} can't be read ({error}); remove it from the"
            " table containers"
        ) from None
