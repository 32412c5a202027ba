"""Where images come from: what registries and directories have in common."""

from collections.abc import Callable
from typing import Protocol

from store.manifest import Descriptor
from store.reference import Reference

BlobReader = Callable[[int, int], bytes]
"""Given offset and length, exactly those bytes of one blob, not verified. Raises StoreError."""


class BlobStream(Protocol):
    """The bytes of one blob as they arrive; not verified.

    ``offset`` says where in the blob they begin: where it was asked for, or 0 when the source
    can't begin in the middle.
    """

    offset: int

    def read(self) -> bytes:
        """The next piece; empty at the end.

        Raises:
            ConnectionLost, RegistryTimeout: the rest has to be asked for again.
            PullCancelled: ``abort()`` was called.
        """

    def abort(self) -> None:
        """Make ``read()`` fail now, also one that waits. For other threads."""

    def close(self) -> None:
        """Let go of connection or file."""


class Source(Protocol):
    """One image somewhere. Methods block, and may be called from several threads."""

    def resolve(self) -> tuple[Descriptor, bytes]:
        """The manifest or index that the source's name stands for now.

        Raises:
            ImageNotFound: there is no such image.
            RegistryError: the registry can't be asked, or refuses.
        """

    def default_name(self, descriptor: Descriptor) -> Reference:
        """What an image resolved to ``descriptor`` is called unless the user says otherwise.

        Raises:
            InvalidReference: it has no name that could be used.
        """

    def fetch_manifest(self, descriptor: Descriptor) -> bytes:
        """A manifest or index, verified.

        Raises:
            BlobNotFound, DigestMismatch, SizeMismatch, LimitExceeded, RegistryError
        """

    def fetch_config(self, descriptor: Descriptor) -> bytes:
        """An image configuration, verified. Raises as ``fetch_manifest``."""

    def open_blob(
        self, descriptor: Descriptor, offset: int, length: int | None = None
    ) -> BlobStream:
        """The bytes of a blob from ``offset`` on, ``length`` of them or up to its end.

        A source that can't begin in the middle may send all: see ``BlobStream``.

        Raises:
            BlobNotFound: the source has no such blob.
            SizeMismatch: the source's is of another size.
            RegistryError: the registry can't be asked, or refuses.
        """

    def close(self) -> None:
        """Let go of connections; what still waits in other threads ends soon."""
