"""From a layer of which everything is here to one that needs no registry any more."""

import logging
import threading
from collections.abc import Callable
from functools import partial

import trio

from store.cas import Cas
from store.errors import PullCancelled, StorageFailed, StoreError
from store.fetcher import Fetcher
from store.lazy import LazyLayer
from store.priority import Nicely
from store.transfer import interruptible

log = logging.getLogger(__name__)


def _verify(layer: LazyLayer, cancelled: Callable[[], bool]) -> None:
    """As ``LazyLayer.verify``, which takes a processor for some seconds."""
    with Nicely():
        layer.verify(cancelled)


async def complete(fetcher: Fetcher, cas: Cas) -> None:
    """Verify the whole blob and what it unpacks to, and move it to the store's content.

    Afterwards the layer is ``complete``, or ``fetcher.refused`` says why it never will be, or
    some of it is missing again.

    Raises:
        StorageFailed: the disk failed.
        PullCancelled: the caller was cancelled.
    """
    cancelled = threading.Event()
    layer = fetcher.layer
    try:
        await interruptible(partial(_verify, layer, cancelled.is_set), cancelled.set)
        await interruptible(lambda: layer.finish(cas), lambda: None)
    except (StorageFailed, PullCancelled):
        raise
    except StoreError as error:
        if await trio.to_thread.run_sync(layer.forget_borrowed):
            fetcher.borrows = False
            log.info("%s is not all as other layers have it: that is fetched", layer.diff_id)
            return
        # Each content has been verified by its own digest; what lies between has not, and
        # comes once more before the blob is given up.
        if not fetcher.doubted and await trio.to_thread.run_sync(layer.forget_unverified):
            fetcher.doubted = True
            log.warning("%s; what had no digest of its own is fetched again", error.sentence)
            return
        layer.refuse(error.sentence)
        fetcher.refused = error.sentence
