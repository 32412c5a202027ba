"""Writing eStargz layers; see ``estargz.py`` for the format.

Each chunk of a file begins a gzip member of its own. Sharing members among small files
(``innerOffset``, stargz-snapshotter 0.13) would save 2 % of the blob. But readers fetch and
inflate whole members, so a small file would cost its neighbours too; the reference's own
verifier (``estargz.Reader.VerifyTOC``) takes an offset that is there twice for an attack, and
containers/storage knows no ``innerOffset``. So the 2 % come from better compression:
Debian's minbase with python3 and numpy, a tar archive of 221 MB in 8,105 members, takes beside
the 82.3 MB of `gzip -6`, in seconds of one core, where `gzip -6` takes 9.6,

    zlib 6         85.7 MB    8.1 s
    isal 3         92.8 MB    1.5 s
    libdeflate 6   84.8 MB    2.9 s
    libdeflate 7   84.5 MB    3.6 s
    libdeflate 8   84.3 MB    5.5 s
    libdeflate 10  82.3 MB   19.8 s

and the table of contents comes on top. Level 10 looks for the best way to encode, which saves
the same 2.4 % in files of every size; those above 1 MiB bring most of it for the time, as
setting it up costs nothing there.
"""

import stat

import deflate

from store.cas import digest_of
from store.estargz import DIGEST_ANNOTATION, TOC_NAME
from store.index import Entry
from store.lazy_format import Chunk, Compress, Ending, Item, chunk_items
from store.tar_header import BLOCK
from store.tar_write import header_of

# Of the archive; podman's storage asks for it.
SIZE_ANNOTATION = "io.containers.estargz.uncompressed-size"

_LEVEL = 7
_LARGE = 1 << 20
_LARGE_LEVEL = 10


class EStargz:
    """See ``FormatWriter``."""

    media_type = "application/vnd.oci.image.layer.v1.tar+gzip"
    landmark = True
    cut_after = False

    def compressor(self) -> Compress:
        """gzip members without time or name."""
        return _member

    def place(self, item: Item, chunks: list[Chunk]) -> list[Item]:
        """The one chunk of a file has its digest twice: readers want it so if any other file
        of the layer has several."""
        if len(chunks) > 1:
            return chunk_items(item, chunks)
        item.offset = chunks[0].offset
        item.chunk_digest = chunks[0].digest
        return [item]

    def end(self, toc: bytes, offset: int, size: int) -> Ending:
        """The table is the archive's last file, in a member of its own; then the footer."""
        head = header_of(Entry(TOC_NAME, stat.S_IFREG | 0o444, size=len(toc)))
        archive = head + toc + bytes(-len(toc) % BLOCK + 2 * BLOCK)
        annotations = {
            DIGEST_ANNOTATION: digest_of(toc),
            SIZE_ANNOTATION: str(size + len(archive)),
        }
        return Ending(archive, _member(archive) + _footer(offset), annotations)


def _member(data: bytes) -> bytes:
    return bytes(deflate.gzip_compress(data, _LARGE_LEVEL if len(data) >= _LARGE else _LEVEL))


def _footer(offset: int) -> bytes:
    """An empty gzip member with an extra field."""
    field = b"%016xSTARGZ" % offset
    extra = b"SG" + len(field).to_bytes(2, "little") + field
    head = b"\x1f\x8b\x08\x04" + bytes(5) + b"\xff" + len(extra).to_bytes(2, "little")
    return head + extra + b"\x01\x00\x00\xff\xff" + bytes(8)
