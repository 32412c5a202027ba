"""The table of contents of a lazy layer: everything about its files but their bytes.

It says what the archive in the blob says, entry by entry, and where in the blob each chunk of
a file can be inflated by itself. The manifest has its digest, and it has those of the chunks.
"""

import stat
from collections.abc import Iterator
from functools import cached_property

from store import estargz, zstd_chunked
from store.errors import LimitExceeded
from store.estargz import NO_PREFETCH, PREFETCH, only_steers
from store.index import Entry
from store.manifest import Descriptor
from store.source import BlobReader
from store.spans import SpanWriter
from store.toc_json import CHUNK, Item, RawToc, Times, decode, entry_of
from store.toc_layout import Layout
from store.unpack import LayerLimits, aligned, attributes_size, check_content, check_metadata

__all__ = ["BlobReader", "Toc", "read_toc"]

# Of JSON, in bytes: some 20,000 files.
_LARGE = 6 << 20


def is_announced(layer: Descriptor) -> bool:
    """Whether the layer has a table of contents, as its manifest says."""
    annotations = layer.annotations or {}
    return estargz.DIGEST_ANNOTATION in annotations or any(
        name in annotations for name in zstd_chunked.POSITION_ANNOTATIONS
    )


def read_toc(layer: Descriptor, read: BlobReader, limits: LayerLimits) -> "Toc | None":
    """Fetch the layer's table of contents and verify it; None if none is announced.

    Args:
        read: is asked for the table, and for what says where it is, once each.

    Raises:
        DigestMismatch: it is another one than the manifest names.
        InvalidLayer: it is not where the blob or the manifest says.
        NotLazy: the layer can't be used before all of it is here.
        StoreError: from ``read``.
    """
    # stargz-snapshotter's converter gives zstd:chunked layers the annotation of eStargz as well.
    raw = zstd_chunked.find_toc(layer, read) or estargz.find_toc(layer, read)
    if raw is None:
        return None
    return Toc(raw, layer.size, limits)


class Toc:
    """What a table of contents says, worked out when it is asked for.

    Args:
        raw: the table, verified.
        blob_size: in bytes.

    Attributes:
        format: ``estargz`` or ``zstd:chunked``.
        is_large: there are so many files, or chunks of files, that it takes long.
        first_size: so much of the data files is wanted before the rest, in bytes; known when all
            entries are.

    All that is worked out raises InvalidLayer for a table that contradicts itself or the blob, or
    asks for what no layer may; LimitExceeded when the layer is larger than ``limits`` allow;
    NotLazy when it may be all right but can't be used before all of it is here.
    """

    def __init__(self, raw: RawToc, blob_size: int, limits: LayerLimits) -> None:
        self.format = raw.format
        self.is_large = len(raw.json) > _LARGE
        self._json = raw.json
        self._layout = Layout(raw.codec, raw.end, blob_size, limits)
        self._limits = limits
        # Item by item their entries; chunks that are not a file's first have none.
        self._items: list[Item] = []
        self._entries: list[Entry | None] = []
        self._listed: list[Entry] | None = None
        self._data_end = 0
        self.first_size = 0

    @property
    def entries(self) -> Iterator[Entry]:
        """What ``TarParser`` would have given for the same layer, with places in a data file that
        holds only what an entry names. Worked out one by one, the first time."""
        return self._list() if self._listed is None else iter(self._listed)

    def _list(self) -> Iterator[Entry]:
        entries: list[Entry] = []
        times = Times()
        metadata = 0
        for item in self._decode():
            if item.type == CHUNK:
                self._entries.append(None)
                continue
            entry = entry_of(item, times)
            self._entries.append(entry)
            if only_steers(entry):
                if entry.path == PREFETCH:
                    self.first_size = aligned(self._data_end)
                continue
            self._place(entry)
            entries.append(entry)
            metadata += len(entry.path) + len(entry.link)
            if entry.xattrs is not None:
                metadata += attributes_size(entry)
            if len(entries) > self._limits.layer_entries:
                raise LimitExceeded(
                    f"the layer has more than {self._limits.layer_entries} files and directories; "
                    "raise the limit in the store's configuration if you trust the image"
                )
            yield entry
        check_metadata(metadata, self._limits)
        self._listed = entries

    def _have_entries(self) -> None:
        """Each has its place in the data file then."""
        if self._listed is None:
            for _ in self.entries:
                pass

    def _decode(self) -> list[Item]:
        json, self._json = self._json, b""
        self._items = decode(json, self._limits)
        return self._items

    def _place(self, entry: Entry) -> None:
        if entry.size and stat.S_ISREG(entry.mode):
            entry.offset = aligned(self._data_end)
            self._data_end = entry.offset + entry.size
            check_content(entry, self._limits)

    @property
    def data_size(self) -> int:
        """Of the data file, a multiple of 4096. What no span fills is zeros."""
        self._have_entries()
        return aligned(self._data_end)

    @cached_property
    def spans(self) -> SpanWriter:
        """All of the layer's that hold something of the data file, and where in the blob what is
        wanted at start ends."""
        self._have_entries()
        landmarks: dict[bytes, int] = {}
        layout = self._layout
        for item, entry in zip(self._items, self._entries, strict=True):
            if entry is None:
                layout.add_chunk(item)
            elif only_steers(entry):
                landmarks[entry.path] = layout.add(entry, item, wanted=False)
            else:
                layout.add(entry, item)
        self._items, self._entries = [], []
        spans = layout.finish()
        spans.prefetch_end = 0 if NO_PREFETCH in landmarks else landmarks.get(PREFETCH, 0)
        return spans
