"""How far beyond what is read is fetched, for layers of which only the spans matter."""

from pathlib import Path

import pytest

from store.readahead import FIRST_BYTES, MAX_BYTES, STREAMS, ReadAhead
from store.spans import Codec, Piece, Span, SpanTable, SpanWriter

SMALL, LARGE = 16 << 10, 1 << 20


def table_of(path: Path, size: int, count: int) -> SpanTable:
    """A layer of spans of the same size, each with one content."""
    writer = SpanWriter(Codec.PLAIN, size * count)
    for number in range(count):
        at = number * size
        writer.add(Span(at, at + size, size), [Piece(at, size, 0, b"d" * 32)])
    with path.open("wb") as file:
        writer.write(file, size * count)
    return SpanTable(path)


@pytest.fixture(params=[SMALL, LARGE])
def table(request: pytest.FixtureRequest, tmp_path: Path) -> SpanTable:
    """64 MiB in small spans, as converted layers have, or in large ones, as an index has."""
    return table_of(tmp_path / "spans", request.param, (64 << 20) // request.param)


def size_of(table: SpanTable) -> int:
    return table.range_of(0)[1]


def test_a_read_here_and_there_fetches_nothing_ahead(table: SpanTable) -> None:
    ahead = ReadAhead(table, lambda number: False)
    step = max(4 * FIRST_BYTES // size_of(table), 2)
    for number in [*range(0, table.spans, step), *range(step // 2, table.spans, step)][::-1]:
        assert not ahead.advance(number, number)


def test_a_span_that_is_read_again_and_again_is_no_stream(table: SpanTable) -> None:
    ahead = ReadAhead(table, lambda number: False)
    assert [len(ahead.advance(7, 7)) for _ in range(3 * STREAMS)] == [0] * 3 * STREAMS


def test_who_reads_on_gets_twice_as_much_each_time_without_gaps(table: SpanTable) -> None:
    ahead = ReadAhead(table, lambda number: False)
    found = [(n, ahead.advance(n, n)) for n in range(table.spans) for _ in range(8)]
    asked = [(n * size_of(table), one) for n, one in found if one]
    ranges = [one for _, one in asked]
    assert [one.stop for one in ranges[:-1]] == [next_one.start for next_one in ranges[1:]]
    assert (ranges[0].start, ranges[-1].stop) == (2, table.spans)
    sizes = [len(one) * size_of(table) for one in ranges]
    wanted = 2 * FIRST_BYTES
    for (read, _), size in zip(asked[:-1], sizes[:-1], strict=True):
        assert min(wanted, MAX_BYTES) <= size <= wanted + size_of(table)
        assert size <= max(MAX_BYTES, read) + size_of(table)
        wanted *= 2
    assert len([size for size in sizes if size < MAX_BYTES]) <= 8
    assert max(sizes) > MAX_BYTES + size_of(table)


def test_nothing_is_asked_for_before_half_of_it_is_read(table: SpanTable) -> None:
    ahead = ReadAhead(table, lambda number: False)
    under_way = range(0)
    for number in range(table.spans):
        found = ahead.advance(number, number)
        if found and under_way:
            assert number >= under_way.start + len(under_way) // 2
        under_way = found or under_way


def test_several_streams_are_kept_apart(table: SpanTable) -> None:
    ahead = ReadAhead(table, lambda number: False)
    starts = [table.spans * n // 4 for n in range(4)]
    most = [0] * 4
    for step in range(table.spans // 8):
        for number, start in enumerate(starts):
            found = ahead.advance(start + step, start + step)
            assert not found or start < found.start <= start + table.spans // 4
            most[number] = max(most[number], len(found))
    assert all(count * size_of(table) >= 16 * FIRST_BYTES for count in most)


def test_reads_elsewhere_do_not_end_a_stream(tmp_path: Path) -> None:
    table = table_of(tmp_path / "spans", SMALL, 16 << 10)
    ahead = ReadAhead(table, lambda number: False)
    found = [ahead.advance(0, 0)]
    for number in range(1, 1000):
        elsewhere = 2000 + 13 * number
        assert not ahead.advance(elsewhere, elsewhere)
        found.append(ahead.advance(number, number))
    assert max(map(len, found)) * SMALL > 4 << 20


def test_reads_in_a_slightly_other_order_are_one_stream(tmp_path: Path) -> None:
    table = table_of(tmp_path / "spans", SMALL, 4 << 10)
    ahead = ReadAhead(table, lambda number: False)
    asked = []
    for number in range(0, 200, 2):
        asked += [ahead.advance(number + 1, number + 1), ahead.advance(number, number)]
    asked = [one for one in asked if one]
    assert len(asked) <= 8
    assert [one.stop for one in asked[:-1]] == [next_one.start for next_one in asked[1:]]


def test_the_last_span_is_the_end(table: SpanTable) -> None:
    ahead = ReadAhead(table, lambda number: False)
    last = table.spans - 1
    ahead.advance(last - 1, last - 1)
    assert not ahead.advance(last, last)
    assert not ahead.advance(last, last)


def test_reading_what_is_here_makes_requests_no_longer(table: SpanTable) -> None:
    here = table.spans // 2
    # The window that leads out of what is here, and the next one, asked for from its first half.
    ahead = ReadAhead(table, lambda number: number < here)
    for number in range(here):
        for found in ahead.advance(number, number):
            assert found <= here + max(2, 6 * FIRST_BYTES // size_of(table))


def test_reading_what_is_here_leads_to_nothing_until_something_is_missing(
    table: SpanTable,
) -> None:
    here = table.spans // 2
    ahead = ReadAhead(table, lambda number: number < here)
    assert not any(ahead.advance(number, number) for number in range(here))
    assert not ahead.advance(here, here)  # may be a file of its own
    assert ahead.advance(here + 1, here + 1)
