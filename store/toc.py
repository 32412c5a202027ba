"""The table of contents of a lazy layer: everything about its files but their bytes.

It says what the archive in the blob says, entry by entry, and where in the blob each chunk of
a file can be inflated by itself. The manifest has its digest, and it has those of the chunks.
"""

import msgspec

from store import estargz, zstd_chunked
from store.errors import LimitExceeded
from store.estargz import NO_PREFETCH, PREFETCH, only_steers
from store.index import Entry
from store.manifest import Descriptor
from store.source import BlobReader
from store.spans import SpanWriter
from store.toc_json import CHUNK, RawToc, decode, entry_of
from store.toc_layout import Layout
from store.unpack import LayerLimits, attributes_size, check_metadata

__all__ = ["BlobReader", "Toc", "read_toc"]


class Toc(msgspec.Struct, frozen=True):
    """What a table of contents says.

    Attributes:
        format: ``estargz`` or ``zstd:chunked``.
        entries: what ``TarParser`` would have given for the same layer, with places in a
            data file that holds only what an entry names.
        spans: all of the layer's that hold something of the data file.
        data_size: of the data file, a multiple of 4096. What no span fills is zeros.
    """

    format: str
    entries: list[Entry]
    spans: SpanWriter
    data_size: int


def is_announced(layer: Descriptor) -> bool:
    """Whether the layer has a table of contents, as its manifest says."""
    annotations = layer.annotations or {}
    return estargz.DIGEST_ANNOTATION in annotations or any(
        name in annotations for name in zstd_chunked.POSITION_ANNOTATIONS
    )


def read_toc(layer: Descriptor, read: BlobReader, limits: LayerLimits) -> Toc | None:
    """Fetch the layer's table of contents, verify and check it; None if none is announced.

    Args:
        read: is asked for the table, and for what says where it is, once each.

    Raises:
        DigestMismatch: it is another one than the manifest names.
        InvalidLayer: it contradicts itself or the blob, or asks for what no layer may.
        LimitExceeded: the layer is larger than ``limits`` allow.
        NotLazy: the layer may be all right but can't be used before all of it is here.
        StoreError: from ``read``.
    """
    # stargz-snapshotter's converter gives zstd:chunked layers the annotation of eStargz as well.
    raw = zstd_chunked.find_toc(layer, read) or estargz.find_toc(layer, read)
    if raw is None:
        return None
    layout = Layout(raw, layer.size, limits)
    entries, prefetch_end = _entries(raw, layout, limits)
    spans, data_size = layout.finish()
    spans.prefetch_end = prefetch_end
    return Toc(raw.format, entries, spans, data_size)


def _entries(raw: RawToc, layout: Layout, limits: LayerLimits) -> tuple[list[Entry], int]:
    """The entries, and where in the blob what is wanted at start ends; chunks go to the layout."""
    entries: list[Entry] = []
    landmarks: dict[bytes, int] = {}
    metadata = 0
    for item in decode(raw.json, limits):
        if item.type == CHUNK:
            layout.add_chunk(item)
            continue
        entry = entry_of(item)
        path = entry.path
        if only_steers(entry):
            landmarks[path] = layout.add(entry, item, wanted=False)
            continue
        layout.add(entry, item)
        entries.append(entry)
        metadata += len(path) + len(entry.link)
        if entry.xattrs is not None:
            metadata += attributes_size(entry)
        if len(entries) > limits.layer_entries:
            raise LimitExceeded(
                f"the layer has more than {limits.layer_entries} files and directories; "
                "raise the limit in the store's configuration if you trust the image"
            )
    check_metadata(metadata, limits)
    return entries, 0 if NO_PREFETCH in landmarks else landmarks.get(PREFETCH, 0)
