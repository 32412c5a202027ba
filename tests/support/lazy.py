"""Layers with tables of contents, made from archives the slow and plain way.

They follow what estargz.Writer of stargz-snapshotter and pkg/chunked/compressor of
containers/storage write, but for the chunks' sizes: those are all the same here.
"""

import base64
import gzip
import hashlib
import io
import json
import struct
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import zstandard

from store.cas import Digest
from store.manifest import Descriptor
from store.spans import Codec
from tests.support import tars

Document = dict[str, Any]
Edit = Callable[[Document], object]

GZIP_LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
ZSTD_LAYER = "application/vnd.oci.image.layer.v1.tar+zstd"

PREFETCH = tars.entry(b".prefetch.landmark", data=b"\x0f")
NO_PREFETCH = tars.entry(b".no.prefetch.landmark", data=b"\x0f")

_TYPES = {
    tarfile.REGTYPE: "reg",
    tarfile.AREGTYPE: "reg",
    tarfile.LNKTYPE: "hardlink",
    tarfile.SYMTYPE: "symlink",
    tarfile.CHRTYPE: "char",
    tarfile.BLKTYPE: "block",
    tarfile.DIRTYPE: "dir",
    tarfile.FIFOTYPE: "fifo",
}
_XATTR = "SCHILY.xattr."


@dataclass(frozen=True)
class LazyBlob:
    """A layer blob, how a manifest describes it, and the range of its table of contents."""

    data: bytes
    layer: Descriptor
    diff_id: Digest
    toc: tuple[int, int]

    def read(self, offset: int, length: int) -> bytes:
        """A ``BlobReader``."""
        assert 0 <= offset < offset + length <= len(self.data)
        return self.data[offset : offset + length]


@dataclass
class _Output:
    """A blob in the making: members (or frames) one after another."""

    compress: Callable[[bytes], bytes]
    data: bytearray = field(default_factory=bytearray)
    plain: Any = field(default_factory=hashlib.sha256)
    pending: bytearray = field(default_factory=bytearray)

    def write(self, data: bytes | memoryview) -> None:
        self.plain.update(data)
        self.pending += data

    def cut(self) -> int:
        """End the member; where the next one begins."""
        if self.pending:
            self.data += self.compress(bytes(self.pending))
            self.pending.clear()
        return len(self.data)


def estargz(
    archive: bytes,
    *,
    chunk_size: int = 4 << 20,
    min_chunk_size: int = 0,
    edit: Edit | None = None,
    document: bytes | None = None,
    offset: int | None = None,
) -> LazyBlob:
    """An eStargz layer.

    Args:
        min_chunk_size: a member is ended only when it has this many compressed bytes.
        edit: changes the table before it is written.
        document: is written in its place.
        offset: what the footer says instead of where the table is.
    """
    output = _Output(lambda data: gzip.compress(data, 6, mtime=0))
    toc = _table(archive, output, _EStargzChunks(chunk_size, min_chunk_size), _whole_seconds)
    start = output.cut()
    if edit:
        edit(toc)
    text = json.dumps(toc, indent="\t").encode() if document is None else document
    output.write(tars.archive(tars.entry(b"stargz.index.json", data=text)))
    end = output.cut()
    extra = b"SG\x16\x00%016xSTARGZ" % (start if offset is None else offset)
    head = b"\x1f\x8b\x08\x04" + bytes(5) + b"\xff" + struct.pack("<H", len(extra))
    data = bytes(output.data) + head + extra + b"\x01\x00\x00\xff\xff" + bytes(8)
    annotations = {"containerd.io/snapshot/stargz/toc.digest": _digest(text)}
    return _blob(data, GZIP_LAYER, annotations, output, (start, end))


def zstd_chunked(
    archive: bytes,
    *,
    chunk_size: int = 64 << 10,
    prefix: str = "io.github.containers.zstd-chunked.",
    edit: Edit | None = None,
    document: bytes | None = None,
) -> LazyBlob:
    """A zstd:chunked layer; chunks of zeros only are left out of it."""
    output = _Output(zstandard.ZstdCompressor(level=3).compress)
    toc = _table(archive, output, _ZstdChunks(chunk_size), _nanoseconds)
    output.write(tars.END)
    start = output.cut() + 8
    if edit:
        edit(toc)
    text = json.dumps(toc).encode() if document is None else document
    compressed = zstandard.ZstdCompressor(level=3).compress(text)
    tar_split = b"not read"
    numbers = (start, len(compressed), len(text), 1, start + len(compressed) + 8, 8, 8)
    footer = struct.pack("<7Q", *numbers) + b"GNUlInUx"
    data = bytes(output.data) + b"".join(map(_skippable, (compressed, tar_split, footer)))
    annotations = {
        prefix + "manifest-position": ":".join(map(str, numbers[:4])),
        prefix + "manifest-checksum": _digest(compressed),
    }
    return _blob(data, ZSTD_LAYER, annotations, output, (start, start + len(compressed)))


WRITERS: dict[Codec, Callable[..., LazyBlob]] = {Codec.GZIP: estargz, Codec.ZSTD: zstd_chunked}


def _blob(
    data: bytes,
    media_type: str,
    annotations: dict[str, str],
    output: _Output,
    toc: tuple[int, int],
) -> LazyBlob:
    layer = Descriptor(media_type, _digest(data), len(data), annotations)
    return LazyBlob(data, layer, Digest("sha256:" + output.plain.hexdigest()), toc)


def _skippable(data: bytes) -> bytes:
    return struct.pack("<II", 0x184D2A50, len(data)) + data


def _digest(data: bytes | memoryview) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


@dataclass
class _EStargzChunks:
    """The first chunk is in the file's own item; the last has no size unless it is full."""

    size: int
    minimum: int
    start: int = 0
    inner: int = 0

    def write(self, output: _Output, item: Document, content: memoryview) -> list[Document]:
        items = [item]
        for at in range(0, len(content), self.size):
            if at:
                items.append({"name": item["name"], "type": "chunk", "chunkOffset": at})
            chunk = content[at : at + self.size]
            if len(chunk) == self.size:
                items[-1]["chunkSize"] = self.size
            landmark = item["name"].endswith("prefetch.landmark")
            written = len(output.compress(bytes(output.pending)))
            if landmark or not self.start or written >= self.minimum:
                self.start = output.cut()
            if output.pending:
                items[-1]["innerOffset"] = len(output.pending)
            items[-1]["offset"] = self.start
            items[-1]["chunkDigest"] = _digest(chunk)
            output.write(chunk)
        if item["type"] == "reg":
            item["digest"] = _digest(content)
        return items


@dataclass
class _ZstdChunks:
    """A file in one chunk has none of the chunks' fields."""

    size: int

    def write(self, output: _Output, item: Document, content: memoryview) -> list[Document]:
        chunks: list[Document] = []
        for at in range(0, len(content), self.size):
            chunk = content[at : at + self.size]
            fields = {"offset": output.cut(), "chunkDigest": _digest(chunk)}
            fields |= {"chunkOffset": at, "chunkSize": len(chunk)}
            if not any(chunk):
                fields["chunkType"] = "zeros"
            chunks.append(fields)
            output.write(chunk)
        if not chunks:
            return [item]
        item |= {"digest": _digest(content), "offset": chunks[0]["offset"]}
        item["endOffset"] = output.cut()
        if len(chunks) == 1:
            return [item]
        more = {"type": "chunk", "name": item["name"]}
        return [item | chunks[0], *(more | chunk for chunk in chunks[1:])]


def _table(
    archive: bytes,
    output: _Output,
    chunks: _EStargzChunks | _ZstdChunks,
    time: Callable[[tarfile.TarInfo], str],
) -> Document:
    """Write an archive but for its end; its table of contents."""
    entries: list[Document] = []
    view = memoryview(archive)
    with tarfile.open(fileobj=io.BytesIO(archive), errorlevel=2) as tar:
        for info in tar:
            size = info.size if info.isreg() else 0
            end = info.offset_data + size
            output.write(view[info.offset : info.offset_data])
            entries += chunks.write(output, _item(info, time), view[info.offset_data : end])
            output.write(bytes(-size % tars.BLOCK))
    return {"version": 1, "entries": entries}


def _item(info: tarfile.TarInfo, time: Callable[[tarfile.TarInfo], str]) -> Document:
    fields: Document = {
        "name": info.name + "/" * info.isdir(),
        "type": _TYPES[info.type],
        "size": info.size if info.isreg() else 0,
        "modtime": time(info),
        "linkName": info.linkname,
        "mode": info.mode,
        "uid": info.uid,
        "gid": info.gid,
        "devMajor": info.devmajor,
        "devMinor": info.devminor,
        "xattrs": {
            key[len(_XATTR) :]: base64.b64encode(value.encode(errors="surrogateescape")).decode()
            for key, value in info.pax_headers.items()
            if key.startswith(_XATTR)
        },
    }
    return {key: value for key, value in fields.items() if value}


def _whole_seconds(info: tarfile.TarInfo) -> str:
    seconds = round(Decimal(info.pax_headers.get("mtime", info.mtime)))
    return _rfc3339(seconds) + "Z" if seconds else ""


def _nanoseconds(info: tarfile.TarInfo) -> str:
    seconds, nanoseconds = divmod(
        int(Decimal(info.pax_headers.get("mtime", info.mtime)).scaleb(9)), 10**9
    )
    fraction = f"{nanoseconds:09}".rstrip("0")
    return _rfc3339(seconds + 5400) + ("." + fraction) * bool(fraction) + "+01:30"


def _rfc3339(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")
