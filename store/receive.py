"""The bytes of a blob from its source, for those who take them one after another."""

import logging
import time
from collections.abc import Callable, Iterator

from store.config import Patience
from store.errors import RegistryError, SizeMismatch
from store.manifest import Descriptor
from store.source import Source
from store.transfer import PROGRESS
from store.transport import pause_before

log = logging.getLogger(__name__)


def received(
    source: Source, blob: Descriptor, patience: Patience, advance: Callable[[int], None]
) -> Iterator[bytes]:
    """The pieces of a blob, not verified but for their number. Blocks.

    A connection that breaks is made anew, and goes on where it was.

    Args:
        advance: told how many more bytes have come.

    Raises:
        SizeMismatch: there are more or fewer bytes than the descriptor says.
        BlobNotFound, RegistryError: see ``Source.open_blob``.
    """
    offset = failures = 0
    while offset < blob.size:
        before = offset
        try:
            for piece in _stream(source, blob, offset):
                offset += len(piece)
                if offset > blob.size:
                    break
                advance(len(piece))
                yield piece
            break
        except RegistryError as error:
            failures = 1 if offset - before >= PROGRESS else failures + 1
            pause = pause_before(failures, error, patience)
            if pause is None:
                raise
            log.info("%s; trying again in %.1f s", error.sentence, pause)
            time.sleep(pause)
    if offset != blob.size:
        raise SizeMismatch(
            f"{offset} bytes or more were received for the layer {blob.digest}, the manifest "
            f"names {blob.size}; try again, or push the image again"
        )


def _stream(source: Source, blob: Descriptor, offset: int) -> Iterator[bytes]:
    stream = source.open_blob(blob, offset)
    try:
        # A source that can't begin in the middle sends again what is here already.
        known = offset - stream.offset
        while piece := stream.read():
            if len(piece) > known:
                yield piece[known:]
            known = max(0, known - len(piece))
    finally:
        stream.close()
