"""Every failure the store can report, as one tree.

An error carries what a user of the mounted tree gets: the errno the system call
returns, and one sentence that says what is wrong and what to do about it. Nothing
here knows about FUSE; the adapter in fs/ turns these into replies.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager


class CtrfsError(Exception):
    """Base of all failures that are part of the interface.

    Args:
        sentence: one sentence for the user, without a trailing newline.

    The class attribute ``errno`` is the default; a subclass or an instance may
    narrow it (``SomeError("…", errno=errno.EBUSY)``).
    """

    errno: int = errno.EIO

    def __init__(self, sentence: str, *, errno: int | None = None) -> None:
        super().__init__(sentence)
        self.sentence = sentence
        if errno is not None:
            self.errno = errno


class StoreError(CtrfsError):
    """Base of the store's failures."""


class StoreInUse(StoreError):
    """Another process has the store open."""

    errno = errno.EBUSY


class StorageFailed(StoreError):
    """The disk below the store is full, over quota, read-only or broken."""


@contextmanager
def storage(doing: str) -> Iterator[None]:
    """Turn an OSError in the block into StorageFailed with the same errno.

    Args:
        doing: what the block does, for the sentence: ``"writing /var/lib/…"``.
    """
    try:
        yield
    except OSError as error:
        code = error.errno or 0
        remedy = _REMEDIES.get(code, _CHECK_PATH if code in _PATH_ERRORS else _CHECK_DISK)
        raise StorageFailed(
            f"{doing} failed: {error.strerror}; {remedy}", errno=error.errno
        ) from error


_CHECK_DISK = "look into the kernel's log for what is wrong with the disk"
_REMEDIES = {
    errno.ENOSPC: "free some space there and try again",
    errno.EDQUOT: "raise the quota or free some space there and try again",
    errno.EROFS: "mount the filesystem read-write",
    errno.EACCES: "run ctrfs as root",
    errno.EPERM: "run ctrfs as root",
}
_CHECK_PATH = "see whether the path is right"
_PATH_ERRORS = frozenset(
    {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG}
)

# What is wrong here, wherever the bytes come from.
DISK_ERRORS = frozenset(_REMEDIES)


# --- names and input ---------------------------------------------------------------


class InvalidReference(StoreError):
    """The text is not an image reference."""

    errno = errno.EINVAL


class InvalidPlatform(StoreError):
    """The text is not os/arch[/variant]."""

    errno = errno.EINVAL


class ImageNotFound(StoreError):
    """No image of this name is here, or the registry has none."""

    errno = errno.ENOENT


class ImageInUse(StoreError):
    """The image is needed by a container or a running pull."""

    errno = errno.EBUSY


class NoMatchingPlatform(StoreError):
    """The index lists no manifest for the platform asked for."""

    errno = errno.ENOENT


# --- content -----------------------------------------------------------------------


class BlobNotFound(StoreError):
    """No blob with this digest is in the store or in the source."""

    errno = errno.ENOENT


class DigestMismatch(StoreError):
    """Bytes do not hash to the digest they were asked for by."""


class WrongBlob(DigestMismatch):
    """All of a blob is here, and is another."""


class SizeMismatch(StoreError):
    """A blob is shorter or longer than its descriptor says."""


class CorruptContent(StoreError):
    """Content in the store is no longer what was written."""


class UnsupportedMediaType(StoreError):
    """A manifest or layer of a kind this program cannot use."""

    errno = errno.EOPNOTSUPP


class InvalidManifest(StoreError):
    """A manifest, index or image config that breaks its specification."""


class InvalidLayer(StoreError):
    """A layer archive that is damaged or hostile."""


class NotLazy(StoreError):
    """The layer cannot be loaded lazily, only in full."""

    errno = errno.EOPNOTSUPP


class ContentNeeded(StoreError):
    """Layers must be complete before others can be mounted on them: ``diff_ids``."""

    def __init__(self, sentence: str, diff_ids: tuple[str, ...]) -> None:
        super().__init__(sentence)
        self.diff_ids = diff_ids


class LimitExceeded(StoreError):
    """Something from outside is larger than a configured limit."""

    errno = errno.EFBIG


# --- registries --------------------------------------------------------------------


class RegistryError(StoreError):
    """The registry answered in a way that cannot be used.

    ``transient`` says that the same request may well succeed later, ``retry_after`` after
    how many seconds the registry wants to be asked again (0 if it did not say).
    """

    transient = False
    retry_after = 0.0


class RegistryUnreachable(RegistryError):
    """No connection to the registry."""

    errno = errno.EHOSTUNREACH
    transient = True


class RegistryTimeout(RegistryError):
    """The registry stopped answering."""

    errno = errno.ETIMEDOUT
    transient = True


class ConnectionLost(RegistryError):
    """The connection ended in the middle of an answer."""

    transient = True


class RegistryOverloaded(RegistryError):
    """The registry asks for patience (429) or fails for now (5xx)."""

    errno = errno.EBUSY
    transient = True

    def __init__(self, sentence: str, retry_after: float = 0.0) -> None:
        super().__init__(sentence)
        self.retry_after = retry_after


class RegistryUnauthorized(RegistryError):
    """Credentials are missing, wrong, or not enough."""

    errno = errno.EACCES


class PullCancelled(StoreError):
    """Nobody waits for this pull any more."""

    errno = errno.EINTR
