"""What containers of an image open first, by the digest of its manifest."""

from collections.abc import Sequence

from store.cas import Digest
from store.db import Database

# What runtimes open of every image, whatever its containers do: to look their user up.
LOOKED_UP = ("/etc/passwd", "/etc/group")


class Opened:
    """The records. Safe to use from several threads; methods block shortly."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def get(self, digest: Digest) -> list[str]:
        """Absolute paths in the image, in the order of their first use; empty if unknown."""
        with self._database.transaction() as cursor:
            row = cursor.execute("SELECT paths FROM opened WHERE digest = ?", (digest,)).fetchone()
        text = row[0].decode("utf-8", "surrogateescape") if row else ""
        return text.split("\n") if text else []

    def put(self, digest: Digest, paths: Sequence[str]) -> None:
        """Remember what a container opened, instead of what another did before.

        Raises:
            StorageFailed: it could not be written.
        """
        text = "\n".join(paths).encode("utf-8", "surrogateescape")
        with self._database.transaction() as cursor:
            cursor.execute(
                "INSERT INTO opened (digest, paths) VALUES (?, ?)"
                " ON CONFLICT (digest) DO UPDATE SET paths = excluded.paths",
                (digest, text),
            )
