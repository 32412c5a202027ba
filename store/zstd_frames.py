"""zstd blobs frame by frame (RFC 8878): the only places where such a blob can be entered."""

import os
from collections.abc import Iterator

from store.errors import InvalidLayer
from store.inflate import ZSTD_MAGIC, block_header, frame_header

_BLOCK_HEADER = 3


def zstd_frames(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """Where each frame begins and ends in a file, skippable ones included.

    Only headers are read.

    Args:
        fd: of the file.
        size: of the file.

    Raises:
        InvalidLayer: the last one is cut off.
    """
    start = 0
    while start < size:
        end = _frame_end(fd, start)
        if end > size:
            raise _cut_off(size)
        yield start, end
        start = end


def _frame_end(fd: int, start: int) -> int:
    if int.from_bytes(_read(fd, start, 4), "little") != ZSTD_MAGIC:
        # A skippable frame; anything else fails when it is decompressed.
        return start + 8 + int.from_bytes(_read(fd, start + 4, 4), "little")
    rest, checksum = frame_header(_read(fd, start + 4, 1)[0])
    position = start + 5 + rest
    last = False
    while not last:
        length, last = block_header(_read(fd, position, _BLOCK_HEADER))
        position += _BLOCK_HEADER + length
    return position + checksum


def _read(fd: int, offset: int, size: int) -> bytes:
    data = os.pread(fd, size, offset)
    if len(data) < size:
        raise _cut_off(offset)
    return data


def _cut_off(size: int) -> InvalidLayer:
    return InvalidLayer(
        f"the layer's zstd stream is cut off after {size} bytes; "
        "the image has to be built or pushed again"
    )


class Section:
    """Bytes ``start`` to ``end`` of a file, to be read once."""

    def __init__(self, fd: int, start: int, end: int) -> None:
        self._fd = fd
        self._position = start
        self._end = end

    def read(self, size: int) -> bytes:
        data = os.pread(self._fd, min(size, self._end - self._position), self._position)
        self._position += len(data)
        return data
