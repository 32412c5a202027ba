"""What containers open first, as it is remembered."""

import os
import sqlite3
from pathlib import Path

import pytest

from store.cas import Digest
from store.db import MIGRATIONS, Database
from store.errors import CorruptContent
from store.opened import Opened

ONE, TWO = (Digest(f"sha256:{letter * 64}") for letter in "12")


def test_records_are_kept_and_replaced(tmp_path: Path) -> None:
    database = Database(tmp_path / "db")
    opened = Opened(database)
    assert opened.get(ONE) == []
    odd = os.fsdecode(b"/odd \xff\xfe name")
    opened.put(ONE, ["/usr/bin/z", "/a", odd])
    opened.put(TWO, ["/b"])
    database.close()
    database = Database(tmp_path / "db")
    opened = Opened(database)
    assert opened.get(ONE) == ["/usr/bin/z", "/a", odd]
    opened.put(ONE, ["/c"])
    assert (opened.get(ONE), opened.get(TWO)) == (["/c"], ["/b"])
    opened.put(ONE, [])
    assert opened.get(ONE) == []
    database.close()


def test_a_database_of_the_first_schema_keeps_its_data(tmp_path: Path) -> None:
    old = Database(tmp_path / "db", MIGRATIONS[:1])
    with old.transaction() as cursor:
        cursor.execute("INSERT INTO images VALUES ('name', x'00ff')")
        cursor.execute("INSERT INTO containers VALUES ('uid', 'id', x'01')")
    old.close()
    database = Database(tmp_path / "db")
    with database.transaction() as cursor:
        assert cursor.execute("SELECT * FROM images").fetchall() == [("name", b"\x00\xff")]
        assert cursor.execute("SELECT * FROM containers").fetchall() == [("uid", "id", b"\x01")]
        assert cursor.execute("PRAGMA user_version").fetchone() == (2,)
    Opened(database).put(ONE, ["/a"])
    database.close()
    with pytest.raises(CorruptContent, match="newer release"):
        Database(tmp_path / "db", MIGRATIONS[:1])


def test_a_migration_is_done_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    Database(tmp_path / "db", MIGRATIONS[:1]).close()
    other = sqlite3.connect(tmp_path / "db")
    other.execute("CREATE TABLE opened (somebody TEXT)")
    other.commit()
    with pytest.raises(Exception, match="opened"):
        Database(tmp_path / "db")
    assert other.execute("PRAGMA user_version").fetchone() == (1,)
    other.execute("DROP TABLE opened")
    other.close()
    Database(tmp_path / "db").close()
