"""What a deflate span uses of the history before it.

Most of the 32 KiB is never referred to; with zeros in the place of what is not, the windows of a
Debian layer compress to a sixth.
"""

import os
import struct

from store.span_inflate import inflate_deflate
from store.spans import WINDOW, Span

# Enough for as many inflated bytes as can refer to the window, whatever codes they have, unless
# there are blocks with nothing in them.
_READ = 2 * WINDOW

# Windows that tell each place of them from all others, and from what is not of them.
_LOW = bytes(place & 0xFF for place in range(WINDOW))
_HIGH = bytes(place >> 8 for place in range(WINDOW))
_NOT_LOW = bytes(byte ^ 0xFF for byte in _LOW)


def sparse_window(span: Span, fd: int) -> bytes:
    """The span's window, with zeros for what the span does not use.

    Only its first 32 KiB can refer to the window, so they are inflated with windows made for the
    purpose: what differs in the results has come out of them, and from where can be read there.

    Args:
        span: whose bytes are known to be right.
        fd: of the blob.

    Raises:
        OSError: from the file.
    """
    if len(span.window) < WINDOW:
        return span.window
    blob = os.pread(fd, min(_READ, span.end - span.start), span.start)
    start = Span(span.start, span.end, min(span.size, WINDOW), bits=span.bits, lead=span.lead)
    low, high, not_low = (
        inflate_deflate(blob, start, window) for window in (_LOW, _HIGH, _NOT_LOW)
    )
    if len(low) < start.size:
        return span.window
    used = bytearray(WINDOW)
    for place in _places(low, high, not_low):
        used[place] = 0xFF
    return (_number(span.window) & _number(used)).to_bytes(WINDOW, "little")


def _places(low: bytes, high: bytes, not_low: bytes) -> set[int]:
    """The places in the window that bytes have come from.

    Those that are the same whatever the window get a high byte that no place has.
    """
    same = _number(low) ^ _number(not_low) ^ (1 << 8 * len(low)) - 1
    both = bytearray(2 * len(low))
    both[::2] = low
    both[1::2] = (_number(high) | same).to_bytes(len(low), "little")
    found = set(struct.unpack(f"<{len(low)}H", both))
    return {place for place in found if place < WINDOW}


def _number(data: bytes | bytearray) -> int:
    return int.from_bytes(data, "little")
