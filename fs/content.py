"""content/: the blobs of the store by their digest."""

import os
from collections.abc import Iterable

import trio

from fs.context import Context, Top
from fs.nodes import Directory, HostFile, Node
from store.cas import Cas, Digest, parse_digest
from store.errors import InvalidReference


class Blob(HostFile):
    """One blob. It is checked against its name before the first byte is given out."""

    def __init__(self, parent: "Sha256", digest: Digest) -> None:
        self._cas = parent.cas
        self._digest = digest
        self.name = digest.partition(":")[2]
        super().__init__(parent)

    def size(self) -> int:
        """Length of the blob."""
        return self._cas.stat(self._digest)

    async def open_host(self) -> int:
        """The verified file of the store."""
        return await trio.to_thread.run_sync(self._open_verified)

    def _open_verified(self) -> int:
        self._cas.verify(self._digest)
        return os.open(self._cas.path(self._digest), os.O_RDONLY | os.O_CLOEXEC)


class Sha256(Directory):
    """Blobs by the 64 hexadecimal digits of their SHA-256: `sha256sum` of a file here prints
    its name."""

    name = "sha256"
    mode = 0o700
    parent: "Content"

    @property
    def cas(self) -> Cas:
        """The store's content."""
        return self.parent.context.store.cas

    def find(self, name: str) -> Node | None:
        """The blob with this digest."""
        try:
            digest = parse_digest(f"sha256:{name}")
        except InvalidReference:
            return None
        return Blob(self, digest) if self.cas.contains(digest) else None

    def dynamic(self) -> Iterable[str]:
        """All blobs."""
        return (digest.partition(":")[2] for digest in self.cas)


class Content(Directory):
    """The content-addressable store: manifests, configurations and layers as the registry
    has them. Only root can look in, because they hold all files of images, also those that
    the images themselves keep from others."""

    name = "content"
    mode = 0o700
    files = (Sha256,)
    parent: Top

    @property
    def context(self) -> Context:
        """What the daemon knows."""
        return self.parent.context
