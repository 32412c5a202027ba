"""eStargz: a gzip layer whose last member but one is its table of contents.

The blob is gzip members back to back: each chunk of a file begins one. The table is a tar
archive with one file, in a member of its own; an empty member after it says where it begins.

Source: stargz-snapshotter, docs/estargz.md and estargz/gzip.go.
"""

import re
import stat
import zlib
from typing import cast

from isal import isal_zlib

from store.cas import digest_of
from store.errors import DigestMismatch, InvalidLayer, NotLazy
from store.index import Entry
from store.manifest import Descriptor
from store.source import BlobReader
from store.spans import Codec
from store.tar_entry import REBUILD
from store.tar_header import BLOCK, Header, block_sum, read_header
from store.toc_json import TOC_MAX, RawToc

TOC_NAME = b"stargz.index.json"
# Contents before the first of these two are wanted at start; the other says that none are, and
# goes first.
PREFETCH = b".prefetch.landmark"
NO_PREFETCH = b".no.prefetch.landmark"
# Names in the root directory that have a use for the loading.
STEERING = frozenset({PREFETCH, NO_PREFETCH, TOC_NAME})
_LANDMARK_SIZE = 1
DIGEST_ANNOTATION = "containerd.io/snapshot/stargz/toc.digest"

FOOTER_SIZE = 51
# gzip with an extra field of subfield SG, 22 bytes long; the time and the system do not matter.
_FOOTER = re.compile(
    rb"\x1f\x8b\x08\x04.{6}\x1a\x00SG\x16\x00([0-9a-f]{16})STARGZ\x01\x00\x00\xff\xff\x00{8}",
    re.DOTALL,
)

# isal's type stubs call this an instance.
_ISAL_ERROR = cast(type[Exception], isal_zlib.error)


def only_steers(entry: Entry) -> bool:
    """Whether an entry is there for the loading alone, and no file of the image."""
    if entry.path not in STEERING or not stat.S_ISREG(entry.mode):
        return False
    return entry.path == TOC_NAME or entry.size <= _LANDMARK_SIZE


def find_toc(layer: Descriptor, read: BlobReader) -> RawToc | None:
    """The table of contents; None when the layer announces none.

    Only the footer and the table are read.

    Raises:
        InvalidLayer: the footer points nowhere, or to something else.
        DigestMismatch: it is not the table that the manifest names.
        NotLazy: the layer has no footer, or a table too long to be held in memory.
    """
    digest = (layer.annotations or {}).get(DIGEST_ANNOTATION)
    if digest is None:
        return None
    end = layer.size - FOOTER_SIZE
    footer = _FOOTER.fullmatch(read(end, FOOTER_SIZE)) if end > 0 else None
    if footer is None:
        raise NotLazy(
            f"the layer {layer.digest} is announced as eStargz but does not end like one; "
            "it was compressed again after it had been made"
        )
    start = int(footer[1], 16)
    if not start < end:
        raise InvalidLayer(
            f"the footer of the layer {layer.digest} says that its table of contents begins at "
            f"{start}, where the blob has ended; do not trust this image"
        )
    if end - start > TOC_MAX:
        raise _too_long(layer)
    json = _json(layer, read(start, end - start))
    found = digest_of(json)
    if found != digest:
        raise DigestMismatch(
            f"the table of contents of the layer {layer.digest} hashes to {found} instead of "
            f"{digest!r:.100}; the registry or the way to it is damaged or hostile"
        )
    return RawToc("estargz", Codec.GZIP, start, json)


def _json(layer: Descriptor, member: bytes) -> bytes:
    """The content of the one file in the archive."""
    header = Header()
    try:
        archive = isal_zlib.decompressobj(wbits=31).decompress(member, TOC_MAX + BLOCK)
        if len(archive) < BLOCK:
            raise _no_toc(layer)
        block = memoryview(archive)[:BLOCK]
        read_header(header, block, block_sum(block))
    except (zlib.error, _ISAL_ERROR, ValueError):
        raise _no_toc(layer) from None
    if header.name != TOC_NAME:
        raise _no_toc(layer)
    if header.size > TOC_MAX:
        raise _too_long(layer)
    json = archive[BLOCK : BLOCK + header.size]
    if len(json) != header.size:
        raise _no_toc(layer)
    return json


def _no_toc(layer: Descriptor) -> InvalidLayer:
    return InvalidLayer(
        f"the layer {layer.digest} has no table of contents where its footer says; {REBUILD}"
    )


def _too_long(layer: Descriptor) -> NotLazy:
    return NotLazy(
        f"the table of contents of the layer {layer.digest} is longer than {TOC_MAX} bytes"
    )
