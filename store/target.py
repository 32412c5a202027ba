"""Where an image that was made here goes: a registry, or a layout on disk."""

from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from store.config import StoreConfig
from store.manifest import Descriptor
from store.push import Pusher
from store.reference import Reference
from store.workspace import temporary_workspace


class Target(Protocol):
    """One image in the making; nothing of it is seen under its name before it is whole.

    Use as a context manager: at the end of the block what is not part of a whole image goes.
    Methods raise StorageFailed or RegistryError.

    Attributes:
        workspace: a directory for files on their way here.
    """

    workspace: Path

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...

    def has(self, blob: Descriptor) -> bool:
        """Whether the blob is there already."""

    def put_blob(self, blob: Descriptor, path: Path) -> None:
        """Take over a file in ``workspace``, whose bytes are those of the descriptor."""

    def put_manifest(self, manifest: Descriptor, data: bytes) -> None:
        """Make the image appear, all of whose blobs are there."""


class RegistryTarget:
    """A name in a registry; see ``Target``."""

    def __init__(self, reference: Reference, config: StoreConfig) -> None:
        self._pusher = Pusher(reference, config)

    def __enter__(self) -> Self:
        self._directory = temporary_workspace()
        self.workspace = self._directory.path
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._pusher.close()
        self._directory.close()

    def has(self, blob: Descriptor) -> bool:
        """One request."""
        return self._pusher.has_blob(blob.content, blob.size)

    def put_blob(self, blob: Descriptor, path: Path) -> None:
        """Upload it."""
        self._pusher.put_blob(blob.content, blob.size, lambda: path.open("rb"))
        path.unlink()

    def put_manifest(self, manifest: Descriptor, data: bytes) -> None:
        """Upload it, under the reference's tag."""
        self._pusher.put_manifest(data, manifest.media_type)
