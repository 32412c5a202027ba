"""zstd:chunked: a zstd layer with its table of contents in a skippable frame.

Each chunk of a file is a zstd frame. The manifest says where the table is, and its digest: the
blob's own footer, which says the same without a digest, is not needed. Another skippable frame
holds the archive's headers (``tar-split``) for those who want the same archive again; it is not
read here, since the blob itself is kept.

Source: containers/storage, docs/containers-storage-zstd-chunked.md and
pkg/chunked/internal/minimal/compression.go.
"""

import re

import zstandard

from store.cas import digest_of
from store.errors import DigestMismatch, InvalidLayer, NotLazy
from store.inflate import ZSTD_WINDOW
from store.manifest import Descriptor
from store.source import BlobReader
from store.spans import Codec
from store.tar_entry import REBUILD
from store.toc_json import TOC_MAX, RawToc

# Those of containers/storage and those of stargz-snapshotter's converter.
_PREFIXES = ("io.github.containers.zstd-chunked.", "io.containers.zstd-chunked.")
POSITION_ANNOTATION = _PREFIXES[0] + "manifest-position"
POSITION_ANNOTATIONS = tuple(prefix + "manifest-position" for prefix in _PREFIXES)
CHECKSUM_ANNOTATION = _PREFIXES[0] + "manifest-checksum"

# offset:length:length inflated:type
_POSITION = re.compile(r"(\d{1,18}):(\d{1,18}):(\d{1,18}):(\d{1,18})", re.ASCII)
_TYPE = 1  # the only one there is
_FRAME_HEAD = 8  # of a skippable frame


def find_toc(layer: Descriptor, read: BlobReader) -> RawToc | None:
    """The table of contents; None when the layer announces none.

    Only the table is read.

    Raises:
        InvalidLayer: it is not where the manifest says, or not of that length.
        DigestMismatch: it is not the table that the manifest names.
        NotLazy: the manifest has no digest for it, or it is too long to be held in memory.
    """
    annotations = layer.annotations or {}
    for prefix in _PREFIXES:
        if position := annotations.get(prefix + "manifest-position"):
            return _read(layer, read, position, annotations.get(prefix + "manifest-checksum"))
    return None


def _read(layer: Descriptor, read: BlobReader, position: str, digest: str | None) -> RawToc:
    match = _POSITION.fullmatch(position)
    if match is None:
        raise InvalidLayer(
            f"the manifest has {position!r:.100} as the place of the table of contents of the "
            f"layer {layer.digest}, which is none; {REBUILD}"
        )
    offset, length, inflated, kind = map(int, match.groups())
    if kind != _TYPE or digest is None or max(length, inflated) > TOC_MAX:
        raise NotLazy(
            f"the table of contents of the layer {layer.digest} has no digest, a type other than "
            f"{_TYPE}, or more than {TOC_MAX} bytes"
        )
    if not _FRAME_HEAD < offset < offset + length <= layer.size:
        raise InvalidLayer(
            f"the manifest says that the table of contents of the layer {layer.digest} has the "
            f"bytes {offset} to {offset + length} of {layer.size}; do not trust this image"
        )
    compressed = read(offset, length)
    found = digest_of(compressed)
    if found != digest:
        raise DigestMismatch(
            f"the table of contents of the layer {layer.digest} hashes to {found} instead of "
            f"{digest!r:.100}; the registry or the way to it is damaged or hostile"
        )
    json = _inflate(layer, compressed, inflated)
    return RawToc("zstd:chunked", Codec.ZSTD, offset - _FRAME_HEAD, json)


def _inflate(layer: Descriptor, compressed: bytes, size: int) -> bytes:
    decompressor = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW)
    try:
        with decompressor.stream_reader(compressed) as reader:
            json = reader.read(size + 1)
    except zstandard.ZstdError as error:
        raise InvalidLayer(
            f"the table of contents of the layer {layer.digest} is damaged ({error}); {REBUILD}"
        ) from None
    if len(json) != size:
        raise InvalidLayer(
            f"the table of contents of the layer {layer.digest} is not {size} bytes long as the "
            f"manifest says; {REBUILD}"
        )
    return json
