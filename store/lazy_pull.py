"""Pulling a layer lazily: its table of contents now, its contents when they are read."""

from collections.abc import Sequence
from typing import Protocol

from store.cas import Digest
from store.errors import NotLazy
from store.layers import Layer, Layers
from store.lazy import LazyRecord
from store.manifest import Descriptor
from store.registry import Registry
from store.source import Source
from store.toc import read_toc
from store.unpack import LayerLimits


class Filling(Protocol):
    """Whoever fetches the contents of lazy layers."""

    async def begin(self, diff_id: Digest) -> None:
        """Start to serve and to fill a layer. Raises CtrfsError."""

    async def prefetch(self, diff_id: Digest, ranges: Sequence[tuple[int, int]]) -> None:
        """Bring ranges of a layer's data file soon. Raises CtrfsError."""

    async def complete(self, diff_id: Digest) -> None:
        """Bring all of a layer here. Raises CtrfsError."""


def pull_lazily(
    source: Source,
    origin: str,
    descriptor: Descriptor,
    diff_id: Digest,
    layers: Layers,
    limits: LayerLimits,
) -> Layer:
    """Make an incomplete layer. Blocks while a few requests are answered.

    Args:
        origin: where others find the same source again (``Image.source``).

    Raises:
        NotLazy: the layer, or where it comes from, does not allow it; the sentence says why.
        InvalidLayer, DigestMismatch, LimitExceeded: what it says of itself is wrong.
        RegistryError: the registry can't be asked, or refuses.
    """
    if not isinstance(source, Registry):
        raise NotLazy("it comes from this machine's disk")
    known: list[tuple[int, bytes]] = []

    def read(offset: int, length: int) -> bytes:
        piece = source.fetch_range(descriptor, offset, length)
        known.append((offset, piece))
        return piece

    layout = read_toc(descriptor, read, limits)
    if layout is None:
        raise NotLazy("it has no table of contents, and there is no index of it")
    return layers.add_lazy(diff_id, layout, LazyRecord(descriptor, (origin,)), known)
