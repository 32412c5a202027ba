"""Locks: who has them, and for how long."""

import fcntl
import subprocess
import time
from pathlib import Path

import pytest

from store.lock import lock

HOLDER = "exec 9>>{path}; flock 9; echo has it; {then}"


def holder(path: Path, then: str) -> "subprocess.Popen[bytes]":
    """A process that has the lock, and does something then."""
    script = HOLDER.format(path=path, then=then)
    process = subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"has it\n"
    return process


def test_a_lock_that_is_let_go_of_soon_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with holder(path, "sleep 0.1"), path.open("w") as file:
        lock(file.fileno())
        with path.open("w") as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_one_that_is_kept_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    begin = time.monotonic()
    with holder(path, "exec sleep 60") as process, path.open("w") as file:
        try:
            with pytest.raises(BlockingIOError):
                lock(file.fileno())
            assert time.monotonic() - begin < 5
        finally:
            process.kill()
