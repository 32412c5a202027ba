"""The content-addressable store: blobs in files that are named by their SHA-256.

On disk, below the store's root:

    content/sha256/<hex>     whole, verified blobs, mode 0444
    ingest/<hex>.partial     the beginning of a blob that is being fetched
    ingest/put-*             small blobs on their way in
    quarantine/<hex>         blobs that were found damaged, kept for whoever wants to know why

A blob comes into ``content`` only by a rename after its bytes have been hashed and are
durable, so what is there was right when it was written. Damage that happens later is
found when the blob is next used for the first time since its file changed or since the
process started; damage below the page cache in between is not.
"""

import contextlib
import ctypes
import hashlib
import logging
import os
import re
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NewType, Self

from store.errors import (
    BlobNotFound,
    CorruptContent,
    DigestMismatch,
    InvalidReference,
    SizeMismatch,
    storage,
)

log = logging.getLogger(__name__)

Digest = NewType("Digest", str)

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_HEX = re.compile(r"[0-9a-f]{64}")

# One read of a file that is hashed or handed on: at 1 MiB, system calls and Python's
# overhead are below 1 % of the hashing, and a pull's memory stays small.
CHUNK = 1 << 20

# Written bytes are sent to the disk in portions of this size, so that the fsync at the end
# waits for little. Measured with a blob of 81 MB: commit takes 5 ms instead of 33 ms.
WRITEBACK = 8 << 20

# A partial that nobody resumed for a week will hardly be missed; the space will.
PARTIAL_SECONDS = 7 * 24 * 3600

_SYNC_FILE_RANGE_WRITE = 2
_libc = ctypes.CDLL(None, use_errno=True)
_sync_file_range = _libc.sync_file_range
_sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)


def parse_digest(text: str) -> Digest:
    """``text`` as a digest.

    Raises:
        InvalidReference: it is not ``sha256:`` and 64 lower-case hexadecimal digits.
    """
    if not _DIGEST.fullmatch(text):
        raise InvalidReference(
            f"{text!r:.200} is not a digest; write sha256: and 64 hexadecimal digits"
        )
    return Digest(text)


def digest_of(data: bytes) -> Digest:
    """The digest of ``data``."""
    return Digest("sha256:" + hashlib.sha256(data).hexdigest())


def start_writeback(fd: int, offset: int, length: int) -> None:
    """Ask the kernel to begin writing a range of a file to the disk, without waiting for it.

    Only a hint (sync_file_range(2), SYNC_FILE_RANGE_WRITE): filesystems that can't take it
    lose nothing but time at the next fsync.
    """
    _sync_file_range(fd, offset, length, _SYNC_FILE_RANGE_WRITE)


def sync_directory(path: Path) -> None:
    """Make renames and new names in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class Cas:
    """Blobs by digest. Safe to use from several threads.

    Args:
        root: the store's directory; made with what is missing in it.
        guest: another process is the store's owner and may be writing now.
    """

    def __init__(self, root: Path, *, guest: bool = False) -> None:
        self._content = root / "content" / "sha256"
        self._ingest = root / "ingest"
        self._quarantine = root / "quarantine"
        self._lock = threading.Lock()
        self._verified: dict[Digest, tuple[int, ...]] = {}
        self._writing: set[Digest] = set()
        with storage(f"preparing the store in {root}"):
            (root / "content").mkdir(mode=0o700, parents=True, exist_ok=True)
            for directory in (self._content, self._ingest, self._quarantine):
                directory.mkdir(mode=0o700, exist_ok=True)
            if not guest:
                self._clean()
            self._damaged = set(_blobs_in(self._quarantine))

    def _clean(self) -> None:
        too_old = time.time() - PARTIAL_SECONDS
        for entry in os.scandir(self._ingest):
            if not entry.name.endswith(".partial") or entry.stat().st_mtime < too_old:
                os.unlink(entry.path)

    def path(self, digest: Digest) -> Path:
        """Where the blob is, or would be. The file there has not been verified: see ``verify``."""
        return self._content / digest.removeprefix("sha256:")

    def contains(self, digest: Digest) -> bool:
        """Whether the blob is here."""
        return self.path(digest).exists()

    def stat(self, digest: Digest) -> int:
        """The blob's size in bytes.

        Raises:
            BlobNotFound: it is not here.
        """
        try:
            return self.path(digest).stat().st_size
        except FileNotFoundError:
            raise _not_found(digest) from None

    def __iter__(self) -> Iterator[Digest]:
        """The digests of all blobs, in no order."""
        return _blobs_in(self._content)

    def damaged(self) -> frozenset[Digest]:
        """Digests of blobs that were found damaged and have not come again since."""
        with self._lock:
            return frozenset(self._damaged)

    def open(self, digest: Digest) -> BinaryIO:
        """The blob as an open file, after its bytes have been checked.

        Raises:
            BlobNotFound: it is not here.
            CorruptContent: its bytes are wrong; it has been moved to quarantine.
        """
        with storage(f"reading the blob {digest}"):
            try:
                file = self.path(digest).open("rb")
            except FileNotFoundError:
                raise _not_found(digest) from None
        try:
            self._check(digest, file)
        except BaseException:
            file.close()
            raise
        return file

    def verify(self, digest: Digest) -> None:
        """Check the blob's bytes, unless that was done since its file last changed.

        Raises:
            BlobNotFound: it is not here.
            CorruptContent: its bytes are wrong; it has been moved to quarantine.
        """
        self.open(digest).close()

    def read(self, digest: Digest) -> bytes:
        """All bytes of a blob, checked; for manifests and configurations.

        Raises:
            BlobNotFound: it is not here.
            CorruptContent: its bytes are wrong; it has been moved to quarantine.
        """
        with self.open(digest) as file:
            return file.read()

    def _check(self, digest: Digest, file: BinaryIO) -> None:
        identity = _identity(file.fileno())
        with self._lock:
            if self._verified.get(digest) == identity:
                return
        hasher = hashlib.sha256()
        with storage(f"reading the blob {digest}"):
            while chunk := file.read(CHUNK):
                hasher.update(chunk)
            file.seek(0)
        if digest != f"sha256:{hasher.hexdigest()}":
            self._isolate(digest, file)
            raise CorruptContent(
                f"the blob {digest} in the store is damaged and was set aside; "
                "pull the images again that use it"
            )
        with self._lock:
            self._verified[digest] = identity

    def _isolate(self, digest: Digest, file: BinaryIO) -> None:
        with self._lock:
            path = self.path(digest)
            with contextlib.suppress(FileNotFoundError):
                # Another thread may have set it aside already, and a good one may have come.
                if path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                    path.rename(self._quarantine / path.name)
                    self._damaged.add(digest)
                    log.error("the blob %s is damaged; it is in %s", digest, self._quarantine)

    def put(self, data: bytes) -> Digest:
        """Store a small blob, durably. Nothing happens when it is here already.

        Raises:
            StorageFailed: it could not be written.
        """
        digest = digest_of(data)
        if self.contains(digest):
            with contextlib.suppress(CorruptContent, BlobNotFound):
                self.verify(digest)
                return digest
        with storage(f"writing the blob {digest} in {self._content}"):
            fd, name = tempfile.mkstemp(prefix="put-", dir=self._ingest)
            try:
                with open(fd, "wb") as file:
                    file.write(data)
                    file.flush()
                    self._adopt(digest, fd, Path(name))
            except BaseException:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name)
                raise
        return digest

    def writer(self, digest: Digest, size: int) -> "Writer":
        """A way to store a blob whose digest is known before its bytes.

        Args:
            digest: what the bytes must hash to.
            size: how many they must be.

        Raises:
            StorageFailed: the temporary file can't be opened.
        """
        with self._lock:
            assert digest not in self._writing, f"two writers of {digest}"
            self._writing.add(digest)
        try:
            with storage(f"writing the blob {digest} in {self._ingest}"):
                return Writer(self, digest, size, self._partial(digest))
        except BaseException:
            self._released(digest)
            raise

    def has_partial(self, digest: Digest) -> bool:
        """Whether the beginning of a blob is here."""
        return self._partial(digest).exists()

    def drop_partial(self, digest: Digest) -> None:
        """Remove the beginning of a blob, which nobody may be writing, if it is here."""
        self._partial(digest).unlink(missing_ok=True)

    def _partial(self, digest: Digest) -> Path:
        return self._ingest / f"{digest.removeprefix('sha256:')}.partial"

    def _released(self, digest: Digest) -> None:
        with self._lock:
            self._writing.discard(digest)

    def _adopt(self, digest: Digest, fd: int, temporary: Path) -> None:
        """Give a complete file with the right bytes its name, durably."""
        os.fchmod(fd, 0o444)
        os.fsync(fd)
        path = self.path(digest)
        temporary.rename(path)
        sync_directory(self._content)
        with self._lock:
            self._verified[digest] = _identity(fd)
            self._damaged.discard(digest)
        with contextlib.suppress(FileNotFoundError):
            (self._quarantine / path.name).unlink()

    def adopt(self, digest: Digest, fd: int, path: Path) -> None:
        """Take over a file on the same filesystem whose bytes were found to be the blob's.

        Args:
            fd: the file, open.
            path: its name, which goes.

        Raises:
            StorageFailed: it could not be made durable.
        """
        with storage(f"writing the blob {digest}"):
            self._adopt(digest, fd, path)

    def delete(self, digest: Digest) -> None:
        """Remove a blob. Files that have it open keep their bytes.

        Raises:
            BlobNotFound: it is not here.
        """
        try:
            self.path(digest).unlink()
        except FileNotFoundError:
            raise _not_found(digest) from None
        with self._lock:
            self._verified.pop(digest, None)


class Writer:
    """One blob on its way into the store; made by ``Cas.writer``, used in a ``with`` block.

    What an earlier attempt left is taken up by going through ``replay()`` before the first
    ``write()``; what has not been replayed by then is dropped. A block that ends without
    ``commit()`` or ``discard()`` leaves what was written for the next attempt, also when the
    process is killed.
    """

    def __init__(self, cas: Cas, digest: Digest, size: int, path: Path) -> None:
        self._cas = cas
        self._digest = digest
        self._size = size
        self._path = path
        self._hasher = hashlib.sha256()
        self._file: BinaryIO | None = open(  # noqa: SIM115 - closed by __exit__
            os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+b", buffering=0
        )
        self.left = min(os.fstat(self._file.fileno()).st_size, size)
        self.offset = 0
        self._sent = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
            self._cas._released(self._digest)

    @property
    def _open(self) -> BinaryIO:
        assert self._file is not None, "the writer is closed"
        return self._file

    def replay(self) -> Iterator[bytes]:
        """The bytes that an earlier attempt left, hashed on the way; ``left`` says how many."""
        while self.offset < self.left:
            with storage(f"reading {self._path}"):
                chunk = self._open.read(min(CHUNK, self.left - self.offset))
            if not chunk:
                break
            self._hasher.update(chunk)
            self.offset += len(chunk)
            yield chunk

    def restart(self) -> None:
        """Begin again with nothing."""
        self._hasher = hashlib.sha256()
        self.offset = self.left = self._sent = 0
        with storage(f"writing {self._path}"):
            self._open.truncate(0)
            self._open.seek(0)

    def write(self, chunk: bytes) -> None:
        """Append ``chunk``.

        Raises:
            SizeMismatch: there is more than the size that was announced.
            StorageFailed: it could not be written.
        """
        if self.offset + len(chunk) > self._size:
            raise SizeMismatch(
                f"the blob {self._digest} is longer than the {self._size} bytes its manifest "
                "names; the image has to be pushed again"
            )
        with storage(f"writing {self._path}"):
            if self.left > self.offset:
                self._open.truncate(self.offset)
                self.left = 0
            rest = memoryview(chunk)
            while rest:
                rest = rest[self._open.write(rest) :]
        self._hasher.update(chunk)
        self.offset += len(chunk)
        if self.offset - self._sent >= WRITEBACK:
            start_writeback(self._open.fileno(), self._sent, self.offset - self._sent)
            self._sent = self.offset

    def commit(self) -> None:
        """Check the blob and put it in the store, durably. A wrong one is thrown away.

        Raises:
            SizeMismatch: bytes are missing.
            DigestMismatch: the bytes are not those of the digest.
            StorageFailed: it could not be made durable.
        """
        if self.offset != self._size:
            raise SizeMismatch(
                f"the blob {self._digest} ended after {self.offset} bytes, its manifest names "
                f"{self._size}; try again, or push the image again"
            )
        found = "sha256:" + self._hasher.hexdigest()
        if found != self._digest:
            self.discard()
            raise DigestMismatch(
                f"the bytes received for {self._digest} hash to {found}; the registry or the way "
                "to it is damaged, try again or push the image again"
            )
        with storage(f"writing the blob {self._digest}"):
            self._open.truncate(self._size)
            self._cas._adopt(self._digest, self._open.fileno(), self._path)
        self._close()

    def discard(self) -> None:
        """Throw away what was written."""
        if self._file is not None:
            self._path.unlink(missing_ok=True)
            self._close()


def _blobs_in(directory: Path) -> Iterator[Digest]:
    for name in os.listdir(directory):
        if _HEX.fullmatch(name):
            yield Digest(f"sha256:{name}")


def _identity(fd: int) -> tuple[int, ...]:
    # The change time moves with every write and can't be set back, unlike the modification
    # time; a rename moves it too on some filesystems, which costs one more check.
    stat = os.fstat(fd)
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _not_found(digest: Digest) -> BlobNotFound:
    return BlobNotFound(f"the blob {digest} is not in the store; pull an image that uses it")
