"""The content-addressable store."""

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from store.cas import Cas, Digest, digest_of, parse_digest
from store.errors import (
    BlobNotFound,
    CorruptContent,
    DigestMismatch,
    InvalidReference,
    SizeMismatch,
    StorageFailed,
)

DATA = bytes(range(256)) * 1000
DIGEST = digest_of(DATA)


@pytest.fixture
def cas(tmp_path: Path) -> Cas:
    return Cas(tmp_path)


def damage(cas: Cas, digest: Digest) -> None:
    path = cas.path(digest)
    path.chmod(0o644)
    path.write_bytes(b"x" + path.read_bytes()[1:])


def fill(cas: Cas, data: bytes = DATA, digest: Digest = DIGEST) -> None:
    with cas.writer(digest, len(data)) as writer:
        writer.write(data)
        writer.commit()


def test_digest_is_the_files_sha256sum(cas: Cas) -> None:
    digest = cas.put(DATA)
    printed = subprocess.run(["sha256sum", cas.path(digest)], capture_output=True, check=True)
    assert printed.stdout.split()[0].decode() == cas.path(digest).name == digest[7:]
    assert cas.path(digest).stat().st_mode & 0o777 == 0o444


def test_put_twice_and_read(cas: Cas) -> None:
    assert cas.put(DATA) == cas.put(DATA) == DIGEST
    assert cas.read(DIGEST) == DATA
    assert cas.stat(DIGEST) == len(DATA)
    assert list(cas) == [DIGEST]
    with cas.open(DIGEST) as file:
        assert file.read(10) == DATA[:10]


def test_what_is_not_there(cas: Cas) -> None:
    for use in (cas.open, cas.read, cas.stat, cas.verify, cas.delete):
        with pytest.raises(BlobNotFound):
            use(DIGEST)
    assert not cas.contains(DIGEST)


def test_delete(cas: Cas) -> None:
    cas.put(DATA)
    cas.delete(DIGEST)
    assert not cas.contains(DIGEST) and list(cas) == []


@pytest.mark.parametrize("text", ["", "sha256:", "sha256:" + "A" * 64, "sha512:" + "a" * 128])
def test_bad_digests(text: str) -> None:
    with pytest.raises(InvalidReference):
        parse_digest(text)


@pytest.mark.logs("is damaged")
def test_a_damaged_blob_is_set_aside_and_never_served(cas: Cas, tmp_path: Path) -> None:
    fill(cas)
    damage(cas, DIGEST)
    with pytest.raises(CorruptContent, match=DIGEST):
        cas.open(DIGEST)
    assert not cas.contains(DIGEST)
    assert cas.damaged() == {DIGEST}
    assert Cas(tmp_path).damaged() == {DIGEST}, "it is forgotten with the process"
    fill(cas)
    assert cas.read(DIGEST) == DATA
    assert not cas.damaged() and not os.listdir(tmp_path / "quarantine")


@pytest.mark.logs("is damaged")
def test_damage_before_this_process_is_found(cas: Cas, tmp_path: Path) -> None:
    cas.put(DATA)
    damage(cas, DIGEST)
    with pytest.raises(CorruptContent):
        Cas(tmp_path).verify(DIGEST)


@pytest.mark.logs("is damaged")
def test_put_mends_a_damaged_blob(cas: Cas) -> None:
    cas.put(DATA)
    damage(cas, DIGEST)
    cas.put(DATA)
    assert cas.read(DIGEST) == DATA


def test_writer(cas: Cas) -> None:
    with cas.writer(DIGEST, len(DATA)) as writer:
        for begin in range(0, len(DATA), 1000):
            writer.write(DATA[begin : begin + 1000])
        assert not cas.contains(DIGEST), "visible before it was checked"
        writer.commit()
    assert cas.read(DIGEST) == DATA


def test_writer_of_nothing(cas: Cas) -> None:
    empty = digest_of(b"")
    with cas.writer(empty, 0) as writer:
        writer.commit()
    assert cas.read(empty) == b""


def test_wrong_bytes_are_refused_and_thrown_away(cas: Cas, tmp_path: Path) -> None:
    with cas.writer(DIGEST, len(DATA)) as writer:
        writer.write(DATA[:-1] + b"?")
        with pytest.raises(DigestMismatch, match=DIGEST):
            writer.commit()
    assert not cas.contains(DIGEST) and not os.listdir(tmp_path / "ingest")


def test_too_many_and_too_few_bytes(cas: Cas) -> None:
    with cas.writer(DIGEST, len(DATA)) as writer:
        writer.write(DATA)
        with pytest.raises(SizeMismatch):
            writer.write(b"more")
    with cas.writer(DIGEST, len(DATA) + 1) as writer:
        writer.write(DATA)
        with pytest.raises(SizeMismatch):
            writer.commit()


def resumed(cas: Cas) -> tuple[int, bytes]:
    """Finish an interrupted blob; gives what was there, as counted and as replayed."""
    with cas.writer(DIGEST, len(DATA)) as writer:
        left = writer.left
        old = b"".join(writer.replay())
        assert writer.offset == len(old)
        writer.write(DATA[len(old) :])
        writer.commit()
    return left, old


def test_an_interrupted_blob_is_taken_up(cas: Cas, tmp_path: Path) -> None:
    with cas.writer(DIGEST, len(DATA)) as writer:
        writer.write(DATA[:70_000])
    assert resumed(Cas(tmp_path)) == (70_000, DATA[:70_000])
    assert cas.read(DIGEST) == DATA and not os.listdir(tmp_path / "ingest")


def test_an_interrupted_blob_that_is_not_replayed_begins_again(cas: Cas) -> None:
    with cas.writer(DIGEST, len(DATA)) as writer:
        writer.write(b"old" * 10_000)
    fill(cas)
    assert cas.read(DIGEST) == DATA


def test_a_partial_that_is_too_long_counts_as_far_as_the_size(cas: Cas, tmp_path: Path) -> None:
    (tmp_path / "ingest" / f"{DIGEST[7:]}.partial").write_bytes(DATA + b"too much")
    with cas.writer(DIGEST, len(DATA)) as writer:
        assert b"".join(writer.replay()) == DATA
        writer.commit()
    assert cas.read(DIGEST) == DATA


def test_a_damaged_partial_is_found_at_the_end(cas: Cas, tmp_path: Path) -> None:
    (tmp_path / "ingest" / f"{DIGEST[7:]}.partial").write_bytes(bytes(1000))
    with pytest.raises(DigestMismatch):
        resumed(cas)
    assert not os.listdir(tmp_path / "ingest")


def test_start_removes_temporaries_and_old_partials(cas: Cas, tmp_path: Path) -> None:
    ingest = tmp_path / "ingest"
    for name in ("put-abc", "old.partial", "new.partial"):
        (ingest / name).write_bytes(b"x")
    os.utime(ingest / "old.partial", (0, 0))
    Cas(tmp_path)
    assert os.listdir(ingest) == ["new.partial"]


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 256 KiB."""
    path = tmp_path / "tiny"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", path], check=True)
    yield path
    subprocess.run(["umount", path], check=True)


def test_disk_full(tiny: Path) -> None:
    cas = Cas(tiny)
    data = os.urandom(300_000)
    with pytest.raises(StorageFailed, match="free some space") as caught:
        cas.put(data)
    assert caught.value.errno == errno.ENOSPC
    with (
        cas.writer(digest_of(data), len(data)) as writer,
        pytest.raises(StorageFailed, match="free some space"),
    ):
        try:
            writer.write(data)
        finally:
            writer.discard()
    assert not os.listdir(tiny / "ingest")
    cas.put(data[:100_000])
