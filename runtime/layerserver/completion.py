"""From a layer of which everything is here to one that needs no registry any more."""

import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from store.cas import Cas
from store.errors import (
    CorruptContent,
    DigestMismatch,
    PullCancelled,
    StorageFailed,
    StoreError,
    WrongBlob,
)
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
    some of it is missing again, or ``fetcher.repaired`` and to be verified once more.

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
        begin_again = partial(_begin_again, fetcher, error, cancelled.is_set)
        if not await interruptible(begin_again, cancelled.set):
            layer.refuse(error.sentence)
            fetcher.refused = error.sentence


def _begin_again(fetcher: Fetcher, error: StoreError, cancelled: Callable[[], bool]) -> bool:
    """Forget what may be wrong, or mend it; whether there was anything. Blocks. Raises
    as ``complete``."""
    layer = fetcher.layer
    if isinstance(error, WrongBlob):
        # Contents have been verified by their own digests. Other bytes may have come from another
        # blob, or lie between contents, or inflate to the same.
        steps = (layer.forget_borrowed, layer.forget_unverified, layer.forget_blob)
        for forget in steps[fetcher.doubts :]:
            fetcher.doubts += 1
            if forget():
                log.warning("%s; some of it is fetched again", error.sentence)
                return True
        return False
    if fetcher.repaired is not None:
        return False
    repaired = False
    with suppress(DigestMismatch, CorruptContent), Nicely():
        repaired = layer.repair(cancelled)
    fetcher.repaired = repaired
    return repaired
