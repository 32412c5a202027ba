"""Layers of one long zstd frame: spans that are inflated in order, fetched as far as is read."""

import hashlib
import io
import random
import time
from functools import cache, partial
from pathlib import Path

import pytest
import trio

from store.cas import Digest
from store.errors import DigestMismatch, InvalidLayer, RegistryTimeout, StoreError, WrongBlob
from store.fetcher import AGAIN_SECONDS
from store.index_document import decode_index, encode_index
from store.layer_index import LayerIndex
from store.manifest import Descriptor
from store.spans import Codec, Piece, Span, SpanTable, SpanWriter
from store.unpack import LayerLimits
from tests.support import proxy as faults
from tests.support import tars
from tests.support.contents import contents
from tests.support.fetching import Place, asked, disjoint, finished, read_all
from tests.support.indexing import (
    content,
    digest,
    index_of,
    inflater_of,
    read_spans,
    table_of,
    unpacked,
)
from tests.support.layouts import ZSTD, tar_of
from tests.support.proxy import Exchange, Proxy
from tests.support.spans import OneFrame, one_frame, skippable, take_all

MIB = 1 << 20


far = partial(content, back=4 * MIB)

FILES = {
    "first": far(100_000, 1),
    "large": far(20 * MIB, 2),
    "empty": b"",
    **{f"small{number}": far(5000, number) for number in range(300)},
    "zeros": bytes(3 * MIB),
    "larger": far(24 * MIB, 3),
    "last": far(10, 4),
}


@cache
def long_frame() -> OneFrame:
    return OneFrame(FILES)


@pytest.fixture
def made() -> OneFrame:
    """The layer of these tests."""
    return long_frame()


# --- indexes ------------------------------------------------------------------------------


def frames(archive: bytes, lengths: list[int]) -> bytes:
    """Frames of these lengths and one for the rest, with skippable ones between."""
    blob, start = bytearray(), 0
    for length in (*lengths, len(archive) - sum(lengths)):
        blob += one_frame(archive[start : start + length]) + skippable(3)
        start += length
    return bytes(blob)


def checked(blob: bytes, archive: bytes, directory: Path) -> SpanTable:
    """The span table of an index, compared with what unpacking gives, and with that of another
    machine which got the index as a document."""
    index = index_of(blob, archive, directory)
    table = table_of(index, directory)
    entries, data = unpacked(blob, archive, directory)
    assert (index.entries, index.data_size) == (entries, len(data))
    assert index.format == "zstd+index"
    assert read_spans(table, blob, directory) == data
    there = table_of(decoded(document_of(index, table, blob, archive), blob, archive), directory)
    assert read_spans(there, blob, directory) == data
    there.close()
    return table


def document_of(index: LayerIndex, table: SpanTable, blob: bytes, archive: bytes) -> bytes:
    document = io.BytesIO()
    encode_index(index.entries, table, digest(blob), digest(archive), document)
    return document.getvalue()


def decoded(document: bytes, blob: bytes, archive: bytes) -> LayerIndex:
    layer = Descriptor(media_type=ZSTD, digest=digest(blob), size=len(blob))
    return decode_index(document, layer, digest(archive), LayerLimits())


@pytest.mark.parametrize("lengths", [[], [0], [40 * MIB], [100_000, 0, 35 * MIB]])
def test_spans_give_what_unpacking_gives(lengths: list[int], tmp_path: Path) -> None:
    archive = tar_of(FILES)
    table = checked(frames(archive, lengths), archive, tmp_path)
    assert table.in_order
    sizes = [table.span(number).size for number in range(table.spans)]
    assert len(sizes) > 40
    assert max(sizes) <= MIB + (128 << 10)
    table.close()


def test_what_gives_nothing_at_the_end_is_a_span_too(tmp_path: Path) -> None:
    archive = tars.archive(tars.entry(b"zeros", data=bytes(40 * MIB - 3 * tars.BLOCK)))
    blob = one_frame(archive) + skippable(5)
    table = table_of(index_of(blob, archive, tmp_path), tmp_path)
    assert table.span(table.spans - 1).size == 0
    document = document_of(index_of(blob, archive, tmp_path), table, blob, archive)
    there = table_of(decoded(document, blob, archive), tmp_path)
    assert [there.span(n) for n in range(there.spans)] == [
        table.span(n) for n in range(table.spans)
    ]
    there.close()
    table.close()


def test_an_index_that_leaves_out_how_the_layer_begins(tmp_path: Path) -> None:
    archive = tar_of(FILES)
    blob = one_frame(archive)
    table = table_of(index_of(blob, archive, tmp_path), tmp_path)
    writer = SpanWriter(table.codec, len(blob))
    for number in range(1, table.spans):
        writer.add(table.span(number), [])
    table.close()
    with (tmp_path / "spans").open("wb") as file:
        writer.write(file, 0)
    table = SpanTable(tmp_path / "spans")
    table.in_order = False  # so that no point is made of the gap
    document = document_of(LayerIndex("zstd+index", [], writer, 0), table, blob, archive)
    with pytest.raises(InvalidLayer, match="leaves out how the layer begins"):
        decoded(document, blob, archive)
    table.close()


def test_short_frames_are_entered_anywhere(tmp_path: Path) -> None:
    archive = tar_of(FILES)
    table = checked(frames(archive, [30 * MIB]), archive, tmp_path)
    assert not table.in_order
    table.close()


def test_any_span_may_be_wanted_next(made: OneFrame, tmp_path: Path) -> None:
    table = table_of(made, tmp_path)
    inflater = inflater_of(table, made.blob)
    for number in (0, 1, 2, 40, 3, 3, 41, 0, table.spans - 1):
        start, end = table.range_of(number)
        for piece, found in inflater.pieces(number, made.blob[start:end]):
            assert found == made.data[piece.target : piece.target + piece.size]
    table.close()


def test_wrong_bytes_are_noticed_before_they_are_used(made: OneFrame, tmp_path: Path) -> None:
    table = table_of(made, tmp_path)
    inflater = inflater_of(table, made.blob)
    for number in range(table.spans):
        start, end = table.range_of(number)
        right = made.blob[start:end]
        for place in (0, len(right) // 2, len(right) - 1):
            wrong = bytearray(right)
            wrong[place] ^= 1
            with pytest.raises(DigestMismatch, match="hash to"):
                list(inflater.pieces(number, bytes(wrong)))
        with pytest.raises(DigestMismatch):
            list(inflater.pieces(number, right[:-1]))
        for piece, found in inflater.pieces(number, right):
            assert found == made.data[piece.target : piece.target + piece.size]
    table.close()


@pytest.mark.parametrize("more", [1, MIB])
def test_a_table_that_wants_more_than_comes_out(more: int, tmp_path: Path) -> None:
    blob = one_frame(FILES["large"])
    with (tmp_path / "spans").open("wb") as file:
        writer = SpanWriter(Codec.ZSTD_BLOCKS, len(blob))
        size = len(FILES["large"]) + more
        span = Span(0, len(blob), size, hashlib.sha256(blob).digest())
        writer.add(span, [Piece(0, size)])
        writer.write(file, size)
    table = SpanTable(tmp_path / "spans")
    with pytest.raises(DigestMismatch, match="too few"):
        list(inflater_of(table, blob).pieces(0, blob))
    table.close()


def test_a_table_that_wants_less_than_comes_out(made: OneFrame, tmp_path: Path) -> None:
    """What is not taken must not pile up in memory."""
    blob = made.blob
    with (tmp_path / "spans").open("wb") as file:
        writer = SpanWriter(Codec.ZSTD_BLOCKS, len(blob))
        step = 4 * MIB
        for target, start in enumerate(range(0, len(blob), step)):
            part = blob[start : start + step]
            digest = hashlib.sha256(part).digest()
            writer.add(Span(start, start + len(part), 10, digest), [Piece(10 * target, 10)])
        writer.write(file, 10 * target + 10)
    table = SpanTable(tmp_path / "spans")
    inflater = inflater_of(table, blob)
    assert len(list(inflater.pieces(0, blob[:step]))) == 1
    with pytest.raises(DigestMismatch, match="give more"):
        list(inflater.pieces(1, blob[step : 2 * step]))
    table.close()


# --- fetching -----------------------------------------------------------------------------


def place_of(made: OneFrame, name: str) -> int:
    """Where a file begins in the data file."""
    return next(entry.offset for entry in made.entries if entry.path == name.encode())


async def test_what_is_before_a_file_comes_with_it(
    place: Place, proxy: Proxy, made: OneFrame
) -> None:
    async with place.fetching() as fetcher:
        assert await fetcher.read(0, 100) == FILES["first"][:100]
        assert await fetcher.read(place_of(made, "larger"), 9) == FILES["larger"][:9]
        assert len(asked(proxy)) == 2
        for name in ("large", "small0", "small299", "zeros"):
            size = len(FILES[name])
            assert await fetcher.read(place_of(made, name), size) == FILES[name]
        assert len(asked(proxy)) == 2
        assert not fetcher.layer.whole
        assert await read_all(fetcher) == made.data
        assert fetcher.layer.whole
    assert disjoint(asked(proxy))


async def test_readers_everywhere_at_once(place: Place, proxy: Proxy, made: OneFrame) -> None:
    places = random.Random(1).sample(range(0, made.data_size, 4096), 200)

    async with place.fetching() as fetcher, trio.open_nursery() as nursery:

        async def read(at: int) -> None:
            assert await fetcher.read(at, 5000) == made.data[at : at + 5000]

        for at in places:
            nursery.start_soon(read, at)
    assert disjoint(asked(proxy))


async def test_filling_from_several_sides(place: Place, proxy: Proxy, made: OneFrame) -> None:
    async with place.fetching() as fetcher, trio.open_nursery() as nursery:
        spans = fetcher.layer.table.spans
        for first in range(spans - 1, 0, -7):
            nursery.start_soon(lambda part: fetcher.fetch(part, blob=True), range(first, spans))
        nursery.start_soon(fetcher.read, place_of(made, "last"), 10)
    assert place.whole == 1
    assert disjoint(asked(proxy))


def test_what_the_disk_lost_is_mended(place: Place, made: OneFrame) -> None:
    place.add()
    layer = place.open()
    take_all(layer, made.blob)
    with (layer.directory / "blob").open("r+b") as blob:
        blob.seek(MIB)
        blob.write(bytes(100))
    with pytest.raises(WrongBlob):
        layer.verify(lambda: False)
    assert layer.forget_unverified()
    start, end = layer.table.range_of(layer.next_absent(0))
    assert start <= MIB < end
    take_all(layer, made.blob)
    layer.data.write(place_of(made, "larger"), memoryview(bytes(2 * MIB)))
    with pytest.raises(DigestMismatch, match="other contents"):
        layer.verify(lambda: False)
    assert layer.repair(lambda: False)
    assert not layer.repair(lambda: False)
    layer.verify(lambda: False)
    layer.close()


async def test_a_restart_goes_on_where_it_was(place: Place, proxy: Proxy, made: OneFrame) -> None:
    for at in (0, 9 * MIB, 2 * MIB, 30 * MIB, 31 * MIB):
        async with place.fetching() as fetcher:
            assert await fetcher.read(at, 9) == made.data[at : at + 9]
    async with place.fetching() as fetcher:
        assert await read_all(fetcher) == made.data
    assert disjoint(asked(proxy))


FAULTS: dict[str, tuple[faults.Fault, int]] = {
    "cut": (faults.cut_after(3_000_000), 3),
    "short body": (faults.cut_after(0), 2),
    "429": (faults.status(429), 2),
    "500": (faults.status(500), 2),
    "no ranges": (faults.ignore_range, 1_000_000),
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_passing_faults_only_take_time(
    place: Place, proxy: Proxy, made: OneFrame, fault: str
) -> None:
    proxy.on("/blobs/", *FAULTS[fault])
    async with place.fetching(read_seconds=20) as fetcher:
        at = place_of(made, "larger")
        assert await fetcher.read(at, 100) == FILES["larger"][:100]
        assert await read_all(fetcher) == made.data
    assert place.failures == []


async def test_a_wrong_span_stops_what_needs_it(place: Place, proxy: Proxy, made: OneFrame) -> None:
    wrong = len(made.blob) // 4

    def fault(exchange: Exchange) -> None:
        at = asked(proxy)[-1][0]

        def change(piece: bytes) -> bytes:
            nonlocal at
            start, at = at, at + len(piece)
            if start <= wrong < at:
                return piece[: wrong - start] + b"!" + piece[wrong - start + 1 :]
            return piece

        exchange.forward(change=change)

    proxy.on("/blobs/", fault)
    async with place.fetching() as fetcher:
        layer = fetcher.layer
        for _ in range(2):
            with pytest.raises(DigestMismatch, match="hostile"):
                await fetcher.read(place_of(made, "last"), 10)
            assert layer.next_absent(0) == layer.table.span_at(wrong)
            assert layer.next_present(layer.next_absent(0)) == layer.table.spans
            await trio.sleep(AGAIN_SECONDS)
        assert await fetcher.read(0, 1000) == made.data[:1000]
        proxy.heal()
        assert await fetcher.read(place_of(made, "last"), 10) == FILES["last"]
        assert [type(error) for error in place.failures] == 2 * [DigestMismatch]
        await finished(place, fetcher)


async def test_a_reader_waits_as_long_as_something_comes(
    place: Place, proxy: Proxy, made: OneFrame
) -> None:
    def slowly(exchange: Exchange) -> None:
        def change(piece: bytes) -> bytes:
            time.sleep(0.02)
            return piece

        exchange.forward(change=change)

    proxy.on("/blobs/", slowly)
    async with place.fetching(read_seconds=1.0) as fetcher:
        begin = trio.current_time()
        assert await fetcher.read(place_of(made, "last"), 10) == FILES["last"]
        assert trio.current_time() - begin > 2
    assert place.failures == []


async def test_a_line_that_stalls_is_given_up(place: Place, proxy: Proxy, made: OneFrame) -> None:
    proxy.on("/blobs/", faults.stall_after(5_000_000))
    async with place.fetching(read_seconds=0.5) as fetcher:
        with trio.fail_after(10), pytest.raises(StoreError) as caught:
            await fetcher.read(place_of(made, "last"), 10)
        assert isinstance(caught.value, RegistryTimeout)
        assert await fetcher.read(0, 1000) == made.data[:1000]
        proxy.heal()
        await trio.sleep(AGAIN_SECONDS)
        assert await fetcher.read(place_of(made, "last"), 10) == FILES["last"]


async def test_a_whole_layer_is_as_if_pulled_in_full(
    place: Place, proxy: Proxy, made: OneFrame
) -> None:
    async with place.fetching() as fetcher:
        await fetcher.read(5 * MIB, 10)
        await finished(place, fetcher)
        assert fetcher.layer.complete
    assert place.whole == 1
    assert disjoint(asked(proxy))
    layer = place.layers.get(Digest(made.diff_id))
    assert layer is not None and contents(layer.data) == made.data
    assert place.cas.read(Digest(place.descriptor.digest)) == made.blob


async def test_after_a_power_cut_everything_is_verified(
    place: Place, proxy: Proxy, made: OneFrame
) -> None:
    async with place.fetching() as fetcher:
        await fetcher.read(20 * MIB, 10)
        here = fetcher.layer.next_absent(0)
        lost = here // 2
        start, _ = fetcher.layer.table.range_of(lost)
    place.cut_power(start, 20 * MIB)
    async with place.fetching() as fetcher:
        layer = fetcher.layer
        assert layer.next_absent(0) == lost
        assert layer.next_present(lost) == layer.table.spans
        assert await read_all(fetcher) == made.data
        await finished(place, fetcher)
