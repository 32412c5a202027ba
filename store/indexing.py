"""Making indexes of layers that were pulled in full, one after another, while nothing is pulled."""

import io
import logging
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec
import trio

from store.cas import Digest
from store.errors import NotLazy, PullCancelled, StoreError, storage
from store.index_document import encode_index
from store.layer_index import build_index
from store.manifest import Descriptor
from store.priority import Nicely
from store.spans import SpanTable
from store.store import Store
from store.transfer import interruptible
from store.unpack import LayerLimits

log = logging.getLogger(__name__)

# A pull is mostly followed by a start, whose time counts; an index is for some other day.
_QUIET_SECONDS = 5.0


def make_document(
    blob: Path,
    descriptor: Descriptor,
    diff_id: Digest,
    limits: LayerLimits,
    cancelled: Callable[[], bool],
) -> bytes:
    """Index a layer; the document as it is kept and pushed. Blocks.

    Args:
        blob: the layer's, in a file.

    Raises:
        NotLazy, InvalidLayer, LimitExceeded, DigestMismatch, PullCancelled: see ``build_index``.
        StorageFailed: the blob can't be read.
    """
    with storage(f"indexing {blob}"), blob.open("rb", buffering=0) as file:
        index = build_index(
            file, descriptor.size, descriptor.media_type, diff_id, limits, cancelled
        )
        with tempfile.TemporaryDirectory(prefix="ctrfs-index-") as directory:
            path = Path(directory) / "spans"
            with path.open("wb") as spans:
                index.spans.write(spans, index.data_size)
            table = SpanTable(path)
            try:
                document = io.BytesIO()
                encode_index(index.entries, table, descriptor.content, diff_id, document)
            finally:
                table.close()
    return document.getvalue()


class _Wanted(msgspec.Struct, frozen=True):
    descriptor: Descriptor
    diff_id: Digest


class Indexer:
    """Indexes layers in the background. To be used from one trio run."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._send, self._receive = trio.open_memory_channel[_Wanted](10_000)

    def want(self, descriptor: Descriptor, diff_id: Digest) -> None:
        """Index a layer when there is time, unless it has an index or too many are wanted."""
        if self._store.config.lazy.index and not self._has(descriptor):
            with suppress(trio.WouldBlock):
                self._send.send_nowait(_Wanted(descriptor, diff_id))

    def _has(self, descriptor: Descriptor) -> bool:
        return self._store.indexes.path(descriptor.content).exists()

    async def run(self) -> None:
        """Index what is wanted, until cancelled."""
        async for wanted in self._receive:
            await trio.sleep(_QUIET_SECONDS)
            gone = not self._store.cas.contains(wanted.descriptor.content)
            if gone or self._has(wanted.descriptor):
                continue
            try:
                await self._index(wanted)
            except NotLazy as error:
                log.info("no index of %s: %s", wanted.descriptor.digest, error.sentence)
            except PullCancelled:
                await trio.lowlevel.checkpoint()  # it is we who were cancelled
            except (StoreError, OSError) as error:
                log.warning("no index of %s: %s", wanted.descriptor.digest, error)

    async def _index(self, wanted: _Wanted) -> None:
        cancelled = threading.Event()
        descriptor = wanted.descriptor

        def work() -> None:
            with Nicely():
                document = make_document(
                    self._store.cas.path(descriptor.content),
                    descriptor,
                    wanted.diff_id,
                    self._store.config.layers,
                    cancelled.is_set,
                )
            self._store.indexes.put(descriptor.content, document)

        await interruptible(work, cancelled.set)
