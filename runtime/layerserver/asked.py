"""Bringing what somebody asked for by name: all of a layer, or ranges of its data file."""

from collections.abc import Iterable, Iterator

from store.fetcher import Fetcher
from store.lazy import LazyLayer
from store.spans import SpanTable
from store.transfer import side_by_side

# One request: a reader who wants the last of it waits for no more than this.
_PART_BYTES = 8 << 20
# Requests at once. Readers have as many again for themselves (``LazyConfig.requests``).
_PARALLEL = 4
# What a program opens first is wanted in this order, but what lies close together in so many bytes
# of data may come in one request.
_BATCH_BYTES = 4 << 20


async def fetch_ranges(fetcher: Fetcher, ranges: Iterable[tuple[int, int]]) -> None:
    """Wait until ranges (offset, length) of the data file are here.

    Raises:
        StoreError: they can't be had within the time that readers wait.
    """
    table = fetcher.layer.table
    runs = table.runs_for(ranges)
    await _fetch(fetcher, (part for run in runs for part in _parts(table, run)), blob=False)


async def fetch_rest(fetcher: Fetcher) -> None:
    """Wait until everything is here that was missing. Raises as ``fetch_ranges``."""
    layer = fetcher.layer
    parts = (part for run in _missing(layer) for part in _parts(layer.table, run))
    await _fetch(fetcher, parts, blob=True)


def runs_in_order(table: SpanTable, ranges: Iterable[tuple[int, int]]) -> Iterator[range]:
    """The spans of ranges of the data file, nearly in their order."""
    batch: list[tuple[int, int]] = []
    size = 0
    for offset, length in ranges:
        batch.append((offset, length))
        size += length
        if size >= _BATCH_BYTES:
            yield from table.runs_for(batch)
            batch, size = [], 0
    yield from table.runs_for(batch)


async def _fetch(fetcher: Fetcher, parts: Iterator[range], *, blob: bool) -> None:
    async def work() -> None:
        for part in parts:  # each goes to one of those who work
            await fetcher.fetch(part, blob=blob)

    await side_by_side([work] * _PARALLEL)


def _missing(layer: LazyLayer) -> Iterator[range]:
    first = layer.next_absent(0)
    while first < layer.table.spans:
        stop = layer.next_present(first)
        yield range(first, stop)
        first = layer.next_absent(stop)


def _parts(table: SpanTable, spans: range) -> Iterator[range]:
    """Spans in parts that one request brings."""
    first = spans.start
    while first < spans.stop:
        stop = min(table.stop_at(table.range_of(first)[0] + _PART_BYTES), spans.stop)
        yield range(first, stop)
        first = stop
