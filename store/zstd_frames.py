"""zstd blobs block by block (RFC 8878)."""

import os
from collections.abc import Iterator
from typing import NamedTuple

from store.errors import InvalidLayer
from store.inflate import ZSTD_MAGIC, block_header, frame_header, is_skippable

_BLOCK_HEADER = 3


class ZstdPart(NamedTuple):
    """Bytes ``start`` to ``end`` of a blob: a block, with the frame's header if it is the first and
    its checksum if it is the last; or a whole skippable frame, which has no ``content``.

    ``opens``: it begins a frame.
    """

    start: int
    end: int
    opens: bool
    content: bool


def zstd_parts(fd: int, size: int) -> Iterator[ZstdPart]:
    """A file taken apart. Only headers are read.

    Args:
        fd: of the file.
        size: of the file.

    Raises:
        InvalidLayer: it is no such blob, or cut off.
    """
    end = 0
    while end < size:
        for part in _frame(fd, end):
            if part.end > size:
                raise _cut_off(size)
            yield part
            end = part.end


def _frame(fd: int, start: int) -> Iterator[ZstdPart]:
    magic = int.from_bytes(_read(fd, start, 4), "little")
    if is_skippable(magic):
        end = start + 8 + int.from_bytes(_read(fd, start + 4, 4), "little")
        yield ZstdPart(start, end, opens=True, content=False)
        return
    if magic != ZSTD_MAGIC:
        raise InvalidLayer(
            f"the layer's zstd stream is damaged after {start} bytes; "
            "the image has to be built or pushed again"
        )
    rest, checksum = frame_header(_read(fd, start + 4, 1)[0])
    position = start + 5 + rest
    begin, last = start, False
    while not last:
        length, last = block_header(_read(fd, position, _BLOCK_HEADER))
        position += _BLOCK_HEADER + length + (checksum if last else 0)
        yield ZstdPart(begin, position, opens=begin == start, content=True)
        begin = position


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
