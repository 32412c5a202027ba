"""Pulling a layer lazily: its table of contents now, its contents when they are read."""

import logging
import threading
from collections.abc import Sequence
from typing import Protocol

from store.cas import Digest
from store.errors import NotLazy, RegistryError, StoreError
from store.index_artifact import fetch_index, find_indexes
from store.layer_index import LayerIndex
from store.layers import Layer, LazyLayout
from store.lazy import LazyRecord
from store.manifest import Descriptor
from store.registry import Registry
from store.source import Source
from store.store import Store
from store.toc import read_toc

log = logging.getLogger(__name__)


class Filling(Protocol):
    """Whoever fetches the contents of lazy layers."""

    def expect(self, diff_id: Digest) -> None:
        """There is, or will be, something to fetch of a layer. From any thread, at once, and
        without a word if it fails."""

    async def begin(self, diff_id: Digest) -> None:
        """Start to serve a layer. Raises CtrfsError."""

    async def prefetch(self, diff_id: Digest, ranges: Sequence[tuple[int, int]]) -> None:
        """Bring ranges of a layer's data file soon. Raises CtrfsError."""

    async def complete(self, diff_id: Digest) -> None:
        """Bring all of a layer here. Raises CtrfsError."""


class Indexing(Protocol):
    """Whoever makes indexes of layers that were pulled in full."""

    def want(self, descriptor: Descriptor, diff_id: Digest) -> None:
        """Index a layer when there is time."""


class LayerIndexes:
    """The indexes of one image's ordinary layers: those made here, and those in its registry.

    Safe to use from several threads.

    Args:
        store: has those made here.
        source: the image's.
        image: its manifest.
    """

    def __init__(self, store: Store, source: Source, image: Descriptor) -> None:
        self._store = store
        self._source = source
        self._image = image
        self._lock = threading.Lock()
        self._remote: dict[Digest, Descriptor] | None = None

    def find(self, layer: Descriptor, diff_id: Digest) -> tuple[LayerIndex, bool] | None:
        """The index of a layer, and whether it was made here; None if there is none that can be
        had."""
        limits = self._store.config.layers
        own = self._store.indexes.get(layer, diff_id, limits)
        if own is not None:
            return own, True
        if not isinstance(self._source, Registry) or not self._trusted(self._source):
            return None
        try:
            document = self._documents(self._source).get(layer.content)
            if document is None:
                return None
            return fetch_index(self._source, document, layer, diff_id, limits), False
        except RegistryError as error:
            # Many know nothing of referrers, and each says so in another way.
            log.info("no index of %s: %s", layer.digest, error.sentence)
            return None
        except StoreError as error:
            log.warning("the index of %s is not used: %s", layer.digest, error.sentence)
            return None

    @property
    def lack(self) -> str:
        """What is not there when no index is found."""
        if isinstance(self._source, Registry) and not self._trusted(self._source):
            return "an index in the registry is not used for this name (remote_indexes)"
        return "there is no index of it"

    def _trusted(self, source: Registry) -> bool:
        policy = self._store.config.lazy.remote_indexes
        return policy == "always" or (policy == "tag" and not source.by_digest)

    def _documents(self, source: Registry) -> dict[Digest, Descriptor]:
        with self._lock:
            if self._remote is None:
                self._remote = {}
                self._remote = find_indexes(source, self._image)
            return self._remote


class LazyPull:
    """Makes an image's layers that are filled later. Safe to use from several threads.

    Args:
        origin: where others find the same source again (``Image.source``).
        image: its manifest.
        filling: is told of each layer before it is made.
    """

    def __init__(
        self, store: Store, source: Source, origin: str, image: Descriptor, filling: Filling
    ) -> None:
        self._filling = filling
        self._store = store
        self._source = source
        self.origin = origin
        self._indexes = LayerIndexes(store, source, image)

    def layer(self, descriptor: Descriptor, diff_id: Digest) -> Layer:
        """Make an incomplete layer. Blocks while a few requests are answered.

        Raises:
            NotLazy: the layer, or where it comes from, does not allow it; the sentence says why.
            InvalidLayer, DigestMismatch, LimitExceeded: what it says of itself is wrong.
            RegistryError: the registry can't be asked, or refuses.
        """
        source = self._source
        if not isinstance(source, Registry):
            raise NotLazy("it comes from this machine's disk")
        if self._store.layers.was_refused(diff_id, descriptor, self.origin):
            raise NotLazy("what it was loaded by before turned out to be wrong")
        known: list[tuple[int, bytes]] = []

        def read(offset: int, length: int) -> bytes:
            piece = source.fetch_range(descriptor, offset, length)
            known.append((offset, piece))
            return piece

        vouched = True
        layout: LazyLayout | None = read_toc(descriptor, read, self._store.config.layers)
        if layout is None:
            found = self._indexes.find(descriptor, diff_id)
            if found is None:
                raise NotLazy(f"it has no table of contents, and {self._indexes.lack}")
            layout, vouched = found
        record = LazyRecord(descriptor, (self.origin,), vouched)
        return self._store.layers.add_lazy(
            diff_id, layout, record, known, lambda: self._filling.expect(diff_id)
        )
