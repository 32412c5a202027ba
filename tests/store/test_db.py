"""Records in SQLite."""

import errno
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from store.db import MIGRATIONS, Database
from store.errors import CorruptContent, StorageFailed


def values(database: Database) -> list[str]:
    with database.transaction() as cursor:
        return [name for (name,) in cursor.execute("SELECT name FROM images ORDER BY name")]


def add(database: Database, name: str) -> None:
    with database.transaction() as cursor:
        cursor.execute("INSERT INTO images VALUES (?, ?)", (name, b"record"))


def test_it_keeps_what_was_committed(tmp_path: Path) -> None:
    database = Database(tmp_path / "db")
    add(database, "a")
    database.close()
    database = Database(tmp_path / "db")
    assert values(database) == ["a"]
    database.close()


def test_only_the_owner_can_read_it(tmp_path: Path) -> None:
    database = Database(tmp_path / "db")
    add(database, "a")
    assert [path.stat().st_mode & 0o077 for path in tmp_path.iterdir()] == [0, 0, 0]
    database.close()


def test_a_failed_block_changes_nothing(tmp_path: Path) -> None:
    database = Database(tmp_path / "db")
    with pytest.raises(KeyError), database.transaction() as cursor:
        cursor.execute("INSERT INTO images VALUES ('a', x'00')")
        raise KeyError
    assert values(database) == []
    database.close()


def test_a_row_that_exists_is_the_callers_business(tmp_path: Path) -> None:
    database = Database(tmp_path / "db")
    add(database, "a")
    with pytest.raises(sqlite3.IntegrityError):
        add(database, "a")
    add(database, "b")
    database.close()


def test_threads_share_it(tmp_path: Path) -> None:
    database = Database(tmp_path / "db")

    def add_many(part: str) -> None:
        for number in range(25):
            add(database, f"{part}{number}")

    threads = [threading.Thread(target=add_many, args=(part,)) for part in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(values(database)) == 100
    database.close()


def test_migrations_run_once_and_in_order(tmp_path: Path) -> None:
    database = Database(tmp_path / "db", MIGRATIONS)
    add(database, "a")
    database.close()
    more = [*MIGRATIONS, "ALTER TABLE images ADD note TEXT; UPDATE images SET note = name || '!'"]
    for _ in range(2):
        database = Database(tmp_path / "db", more)
        with database.transaction() as cursor:
            assert cursor.execute("SELECT note FROM images").fetchall() == [("a!",)]
        database.close()


def test_a_failing_migration_leaves_the_version_before_it(tmp_path: Path) -> None:
    Database(tmp_path / "db").close()
    with pytest.raises(StorageFailed):
        Database(tmp_path / "db", [*MIGRATIONS, "CREATE TABLE new (a); SELECT nonsense"])
    database = Database(tmp_path / "db", [*MIGRATIONS, "CREATE TABLE new (a)"])
    database.close()


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    Database(tmp_path / "db", [*MIGRATIONS, "CREATE TABLE new (a)"]).close()
    with pytest.raises(CorruptContent, match="newer release"):
        Database(tmp_path / "db")


def test_rubbish_is_refused(tmp_path: Path) -> None:
    (tmp_path / "db").write_bytes(b"rubbish" * 1000)
    with pytest.raises(CorruptContent, match="damaged"):
        Database(tmp_path / "db")


def test_disk_full(tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", tmp_path], check=True)
    try:
        database = Database(tmp_path / "db")
        with pytest.raises(StorageFailed) as caught, database.transaction() as cursor:
            cursor.execute("INSERT INTO images VALUES ('a', zeroblob(1000000))")
        assert caught.value.errno == errno.ENOSPC
        add(database, "b")
        assert values(database) == ["b"]
        database.close()
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_what_was_acknowledged_survives_kill_9(tmp_path: Path) -> None:
    program = (
        "import itertools, pathlib, sys; from store.db import Database\n"
        "database = Database(pathlib.Path(sys.argv[1]))\n"
        "for number in itertools.count():\n"
        "    with database.transaction() as cursor:\n"
        "        cursor.execute('INSERT INTO images VALUES (?, ?)', (f'{number:09}', b''))\n"
        "    print(number, flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, tmp_path / "db"], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    for _ in range(50):
        last = process.stdout.readline()
    os.kill(process.pid, signal.SIGKILL)
    last = (process.stdout.read().splitlines() or [last])[-1]
    process.stdout.close()
    process.wait()
    database = Database(tmp_path / "db")
    assert len(values(database)) >= int(last) + 1
    database.close()
