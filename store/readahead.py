"""Who reads on will read on: how much to fetch beyond what was asked for.

As the kernel's readahead (mm/readahead.c), for spans of a blob: a read near the end of what was
asked for before belongs to a stream, and each time a stream comes past the middle of what
is under way for it, twice as much is asked for. A read elsewhere begins a new stream, and
fetches nothing but itself.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from store.spans import SpanTable

# Beyond what a program that opens files here and there should pay for, less than what a
# request costs on a connection of 20 ms and 100 Mbit/s.
FIRST_BYTES = 64 << 10
# Long enough that requests cost nothing. A reader that stops has wasted this at most, or as much as
# it has read: who has read so much may want everything, and reads faster when all is here.
MAX_BYTES = 8 << 20
# A container has a few processes that read at once.
STREAMS = 16


@dataclass(slots=True)
class _Stream:
    """Blob offsets: ``begin`` of the first read, ``start`` of the farthest, ``end`` of what was
    asked for, ``trigger`` when to ask for more; and ``length``, how much that was."""

    begin: int
    start: int
    end: int
    trigger: int
    length: int


class ReadAhead:
    """The streams of one layer.

    Args:
        table: the layer's.
        has: whether a span is here.
    """

    def __init__(self, table: SpanTable, has: Callable[[int], bool]) -> None:
        self._table = table
        self._has = has
        self._streams: deque[_Stream] = deque(maxlen=STREAMS)

    def advance(self, first: int, last: int) -> range:
        """Somebody reads spans ``first`` to ``last``: the spans to fetch ahead, maybe none."""
        start, _ = self._table.range_of(first)
        _, end = self._table.range_of(last)
        for stream in self._streams:
            if stream.start - stream.length <= start <= stream.end + stream.length:
                # The one that was used last is forgotten last.
                self._streams.remove(stream)
                self._streams.append(stream)
                stream.start = max(start, stream.start)
                if end <= stream.trigger:
                    return range(0)
                return self._extend(stream, max(end, stream.end))
        if not all(map(self._has, range(first, last + 1))):
            self._streams.append(_Stream(start, start, end, end, FIRST_BYTES))
        return range(0)

    def _extend(self, stream: _Stream, start: int) -> range:
        number = self._table.span_at(start)
        most = max(MAX_BYTES, stream.start - stream.begin)
        length = min(2 * stream.length, most)
        stop = self._table.stop_at(start + length) if number < self._table.spans else number
        ahead = range(number, stop)
        # Who reads what is here already has shown no need for more.
        if not all(map(self._has, ahead)):
            stream.length = length
        stream.end = self._table.range_of(stop - 1)[1] if ahead else start
        stream.trigger = start + (stream.end - start) // 2
        return ahead
