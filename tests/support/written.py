"""Layers that our own writers made, for tests."""

import io
from collections.abc import Sequence
from pathlib import Path

from store.arrange import Order
from store.cas import Digest
from store.convert import WRITERS
from store.lazy_format import Format
from store.lazy_writer import write_layer
from store.spool import spool
from store.unpack import LayerLimits
from tests.support.layouts import PLAIN, sha256
from tests.support.lazy import LazyBlob

LIMITS = LayerLimits()


def written(
    archive: bytes,
    form: Format = "estargz",
    first: Sequence[bytes] = (),
    *,
    media_type: str = PLAIN,
    blob: bytes | None = None,
    limits: LayerLimits = LIMITS,
) -> LazyBlob:
    """A layer with the content of ``archive``, converted; ``toc`` is not filled in.

    Args:
        blob: the layer's, of ``media_type``, if it is not the archive itself.
    """
    diff_id = Digest(sha256(archive))
    chunks = iter([archive if blob is None else blob])
    source = spool(chunks, media_type, diff_id, limits, Path("/var/tmp"))
    try:
        file = io.BytesIO()
        front, rest = Order(source.members).split(first)
        layer = write_layer(source, front, rest, WRITERS[form](), file, lambda count: None)
    finally:
        source.close()
    return LazyBlob(file.getvalue(), layer.descriptor, layer.diff_id, (0, 0))
