"""From the bytes of a layer blob to the bytes of its tar archive.

What compression a blob has is read off its first bytes, as containerd does: registries
hold Docker layers whose media type says gzip and whose bytes are not. That is safe,
because a layer counts only if the inflated bytes hash to the image's diff_id.

Memory is bounded whatever the blob claims: output goes into the caller's buffer, and
a zstd frame that wants a larger window than ``ZSTD_WINDOW`` is refused.
"""

import io
from collections.abc import Callable, Iterator
from enum import Enum
from gzip import BadGzipFile
from typing import IO, Protocol, cast

import zstandard
from isal import igzip, isal_zlib

from store.errors import InvalidLayer, UnsupportedMediaType

LAYER_MEDIA_TYPES = frozenset(
    f"{base}{suffix}"
    for base, suffixes in {
        "application/vnd.oci.image.layer.v1.tar": ("", "+gzip", "+zstd"),
        "application/vnd.oci.image.layer.nondistributable.v1.tar": ("", "+gzip", "+zstd"),
        "application/vnd.docker.image.rootfs.diff.tar": ("", ".gzip", ".zstd"),
        "application/vnd.docker.image.rootfs.foreign.diff.tar": ("", ".gzip", ".zstd"),
    }.items()
    for suffix in suffixes
)

# `zstd -d` refuses larger windows too unless told otherwise; `zstd --ultra --long` makes them.
ZSTD_WINDOW = 128 << 20

# isal's type stubs call this an instance.
_IGZIP_ERROR = cast(type[Exception], isal_zlib.error)

_GZIP_MAGIC = b"\x1f\x8b"
ZSTD_MAGIC = 0xFD2FB528
_ZSTD_SKIPPABLE = 0x184D2A50  # the low four bits are free


class Inflated(Protocol):
    """The inflated bytes: ``fill(buffer)`` says how many were put in; less than asked only at
    the end."""

    def fill(self, buffer: memoryview) -> int: ...


class ChunkReader(io.RawIOBase):
    """An iterator of byte chunks as a file; ``consumed`` counts the bytes handed out."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        super().__init__()
        self._chunks = chunks
        self._current = memoryview(b"")
        self.consumed = 0

    def readable(self) -> bool:
        return True

    def peek(self, size: int) -> bytes:
        """The next ``size`` bytes without taking them; fewer at the end."""
        while len(self._current) < size:
            chunk = next(self._chunks, None)
            if chunk is None:
                break
            self._current = memoryview(bytes(self._current) + chunk)
        return bytes(self._current[:size])

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        while not self._current:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._current = memoryview(chunk)
        count = min(len(buffer), len(self._current))
        buffer[:count] = self._current[:count]
        self._current = self._current[count:]
        self.consumed += count
        return count


class Compression(Enum):
    """What a layer is compressed with."""

    GZIP = "gzip"
    ZSTD = "zstd"
    NONE = "tar"


def compression_of(first: bytes, media_type: str) -> Compression:
    """What a blob is that begins with these bytes (4, or all of a shorter blob).

    Raises:
        UnsupportedMediaType: ``media_type`` is not that of a layer this program knows.
    """
    if media_type not in LAYER_MEDIA_TYPES:
        raise UnsupportedMediaType(
            f"layers of media type {media_type!r:.200} can't be used; "
            "supported are tar, tar+gzip and tar+zstd layers"
        )
    if first.startswith(_GZIP_MAGIC):
        return Compression.GZIP
    if len(first) == 4 and _is_zstd(first):
        return Compression.ZSTD
    return Compression.NONE


def inflated(source: ChunkReader, media_type: str) -> Inflated:
    """The reader for what ``source`` begins with.

    Raises:
        UnsupportedMediaType: ``media_type`` is not that of a layer this program knows.
    """
    match compression_of(source.peek(4), media_type):
        case Compression.GZIP:
            return _Gzip(source)
        case Compression.ZSTD:
            return _Zstd(source)
        case Compression.NONE:
            return _Plain(source)


def _is_zstd(first: bytes) -> bool:
    magic = int.from_bytes(first, "little")
    return magic == ZSTD_MAGIC or is_skippable(magic)


class _Readable(Protocol):
    def readinto(self, buffer: memoryview, /) -> int | None: ...


def _fill(source: _Readable, buffer: memoryview) -> int:
    done = 0
    while done < len(buffer):
        count = source.readinto(buffer[done:])
        if not count:
            break
        done += count
    return done


class _Plain:
    def __init__(self, source: ChunkReader) -> None:
        self._source = source

    def fill(self, buffer: memoryview) -> int:
        return _fill(self._source, buffer)


class _Gzip:
    """gzip members one after another (RFC 1952); CRC and length of each are checked.

    Zero bytes after the last member are padding, as for gzip(1); anything else there is
    refused.
    """

    def __init__(self, source: ChunkReader) -> None:
        self._source = source
        self._file: _Readable = igzip.IGzipFile(fileobj=source, mode="rb")  # type: ignore[no-untyped-call]

    def fill(self, buffer: memoryview) -> int:
        try:
            return _fill(self._file, buffer)
        except EOFError as error:
            raise InvalidLayer(
                f"the layer's gzip stream is cut off after {self._source.consumed} bytes; "
                "the image has to be built or pushed again"
            ) from error
        except (BadGzipFile, _IGZIP_ERROR) as error:
            raise InvalidLayer(
                f"the layer's gzip stream is damaged within its first {self._source.consumed} "
                f"bytes ({error}); the image has to be built or pushed again"
            ) from error


class _Zstd:
    """zstd frames and skippable frames one after another (RFC 8878)."""

    def __init__(self, source: ChunkReader) -> None:
        self._source = source
        self._frames = _FrameWalker(source)
        decompressor = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW)
        self._reader = decompressor.stream_reader(
            cast(IO[bytes], self._frames),
            read_across_frames=True,
            read_size=256 << 10,
            closefd=False,
        )

    def fill(self, buffer: memoryview) -> int:
        try:
            done = _fill(self._reader, buffer)
        except zstandard.ZstdError as error:
            raise InvalidLayer(
                f"the layer's zstd stream is damaged or needs a window of more than "
                f"{ZSTD_WINDOW >> 20} MiB within its first {self._source.consumed} bytes "
                f"({error}); the image has to be built or pushed again"
            ) from error
        if done < len(buffer):
            self._frames.check_end()
        return done


def is_skippable(magic: int) -> bool:
    """Whether a zstd frame that begins so holds no contents."""
    return magic & 0xFFFFFFF0 == _ZSTD_SKIPPABLE


def frame_header(flags: int) -> tuple[int, int]:
    """What the first byte after a zstd frame's magic says: how many more bytes its header has,
    and how many its checksum."""
    single_segment = flags >> 5 & 1
    content_size = (single_segment, 2, 4, 8)[flags >> 6]
    dictionary = (0, 1, 2, 4)[flags & 3]
    return (1 - single_segment) + content_size + dictionary, 4 * (flags >> 2 & 1)


def block_header(item: bytes) -> tuple[int, bool]:
    """What the three bytes before a zstd block say: its size, and whether it is the last one."""
    header = int.from_bytes(item, "little")
    last, kind, size = header & 1, header >> 1 & 3, header >> 3
    return 1 if kind == 1 else size, bool(last)  # 1: one byte, repeated


class _FrameWalker:
    """Hands on the source's bytes and follows the zstd framing as they pass.

    The zstandard library reports the end of its input and the end of a frame alike, so
    a blob that is cut off would look complete. Only headers are looked at: a few
    bytes for each block of up to 128 KiB.
    """

    def __init__(self, source: ChunkReader) -> None:
        self._source = source
        self._skip = 0
        self._held = b""
        self._wanted = 4
        self._next: Callable[[bytes], None] = self._magic
        self._checksum = 0

    def read(self, size: int) -> bytes:
        buffer = bytearray(size)
        count = self._source.readinto(buffer)
        data = bytes(memoryview(buffer)[:count])
        self._walk(data)
        return data

    def check_end(self) -> None:
        """Raises InvalidLayer when the source did not end after a whole frame."""
        if self._skip or self._held or self._next != self._magic:
            raise InvalidLayer(
                f"the layer's zstd stream is cut off after {self._source.consumed} bytes; "
                "the image has to be built or pushed again"
            )

    def _walk(self, data: bytes) -> None:
        position = 0
        while position < len(data):
            if self._skip:
                step = min(self._skip, len(data) - position)
                self._skip -= step
                position += step
                continue
            step = min(self._wanted - len(self._held), len(data) - position)
            self._held += data[position : position + step]
            position += step
            if len(self._held) == self._wanted:
                item, self._held = self._held, b""
                self._next(item)

    def _expect(self, wanted: int, then: Callable[[bytes], None]) -> None:
        self._wanted = wanted
        self._next = then

    def _magic(self, item: bytes) -> None:
        if int.from_bytes(item, "little") == ZSTD_MAGIC:
            self._expect(1, self._descriptor)
        else:  # anything else than a skippable frame makes the decompressor fail
            self._expect(4, self._skippable)

    def _skippable(self, item: bytes) -> None:
        self._skip = int.from_bytes(item, "little")
        self._expect(4, self._magic)

    def _descriptor(self, item: bytes) -> None:
        self._skip, self._checksum = frame_header(item[0])
        self._expect(3, self._block)

    def _block(self, item: bytes) -> None:
        self._skip, last = block_header(item)
        if last:
            self._skip += self._checksum
            self._expect(4, self._magic)
