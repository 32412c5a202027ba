"""Incomplete layers: each byte asked for once, verified, and kept, whatever the registry does."""

import os
import random
import re
import stat
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from store import lazy
from store.cas import Digest
from store.config import StoreConfig
from store.data_files import DataFiles
from store.errors import DigestMismatch, InvalidLayer, NotLazy, RegistryTimeout, StoreError
from store.fetcher import AGAIN_SECONDS, Reading, Slots
from store.index import Entry
from store.lazy import LazyLayer, LazyRecord
from store.manifest import Descriptor
from store.priority import Nicely
from store.reference import parse_reference
from store.registry import Registry as Source
from tests.support import proxy as faults
from tests.support.contents import contents
from tests.support.fetching import Place, asked, disjoint, finished, read_all
from tests.support.layouts import GZIP, OciLayout, sha256
from tests.support.proxy import Exchange, Proxy
from tests.support.registry import Registry
from tests.support.spans import CHUNK, HandMade, nobody_fills, take_all, with_other_times
from tools.delay import Counter
from tools.links import proxy as relay


def noise(seed: int, size: int) -> bytes:
    """Bytes that gzip can't make fewer."""
    return random.Random(seed).randbytes(size)


FILES = {
    "a": noise(1, 3 * CHUNK + 1234),
    "b": noise(2, 100),
    "c": b"",
    "d": noise(3, 40 * CHUNK),
    **{f"small/{n}": noise(n + 10, 700) for n in range(50)},
}


@pytest.fixture
def made() -> HandMade:
    """The layer of most tests."""
    return HandMade(FILES, first_size=6 * CHUNK)


async def test_what_is_read_is_fetched_once(place: Place, proxy: Proxy) -> None:
    async with place.fetching() as fetcher:
        assert await read_all(fetcher) == place.made.data
        requests = len(asked(proxy))
        assert await read_all(fetcher, 5000) == place.made.data
        assert len(asked(proxy)) == requests
    assert disjoint(asked(proxy))


async def test_a_read_here_and_there_fetches_nothing_else(place: Place, proxy: Proxy) -> None:
    async with place.fetching() as fetcher:
        for entry in (place.made.entries[3], place.made.entries[0], place.made.entries[-1]):
            assert (
                await fetcher.read(entry.offset, 10)
                == place.made.data[entry.offset : entry.offset + 10]
            )
        assert len(asked(proxy)) == 3
        assert sum(end - start for start, end in asked(proxy)) < 2.1 * CHUNK


async def test_reading_on_asks_for_more_and_more(place: Place, proxy: Proxy) -> None:
    entry = place.made.entries[3]
    async with place.fetching() as fetcher:
        for offset in range(entry.offset, entry.offset + entry.size, 32 << 10):
            await fetcher.read(offset, 32 << 10)
    ranges = asked(proxy)
    assert disjoint(ranges)
    assert len(ranges) <= 8
    assert ranges[-1][1] - ranges[-1][0] > 4 * (ranges[0][1] - ranges[0][0])


async def test_many_readers_of_one_chunk_make_one_request(place: Place, proxy: Proxy) -> None:
    async with place.fetching() as fetcher, trio.open_nursery() as nursery:
        for _ in range(30):
            nursery.start_soon(fetcher.read, 0, 100)
    assert len(asked(proxy)) == 1


async def test_filling_gives_way_until_a_reader_waits_for_it(
    place: Place, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = os.getpriority(os.PRIO_PROCESS, 0)
    priorities: dict[int, int] = {}
    verified, hurry = LazyLayer.verified, Nicely.hurry
    one_came, waits = threading.Event(), threading.Event()

    def verifying(layer: LazyLayer, number: int, blob: memoryview) -> Any:
        contents = verified(layer, number, blob)
        priorities[number] = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        if priorities[number] == 19:
            one_came.set()
            assert waits.wait(10)
        return contents

    def hurried(pace: Nicely) -> None:
        hurry(pace)
        if one_came.is_set():
            waits.set()

    monkeypatch.setattr(LazyLayer, "verified", verifying)
    monkeypatch.setattr(Nicely, "hurry", hurried)
    async with place.fetching() as fetcher, trio.open_nursery() as nursery:
        entry = place.made.entries[3]
        first = fetcher.layer.table.spans_for(entry.offset, entry.size)[0]
        (begun,) = fetcher.layer.table.spans_for(0, 100)
        await fetcher.read(0, 100)
        nursery.start_soon(fetcher.bring, range(first, first + 4), trio.CapacityLimiter(1))
        assert await trio.to_thread.run_sync(one_came.wait, 10)
        await fetcher.wait([first + 3], Reading(0))
    hurried_on = dict.fromkeys(range(first + 1, first + 4), usual)
    assert priorities == {begun: usual, first: 19} | hurried_on


@pytest.mark.parametrize("bit", [1, 2, 4])
async def test_what_says_that_spans_are_here_is_damaged_in_use(place: Place, bit: int) -> None:
    async with place.fetching() as fetcher:
        layer = fetcher.layer
        await fetcher.fetch(range(layer.table.spans - 1), blob=True)
        for number in (3, layer.table.spans - 1):  # one that is here, and one that is not
            with (layer.directory / "present").open("r+b") as file:
                file.seek(number - layer.table.spans, os.SEEK_END)
                (state,) = file.read(1)
                file.seek(-1, os.SEEK_CUR)
                file.write(bytes([state ^ bit]))
            assert not layer.has(number)
        assert not layer.whole
        await fetcher.fetch(range(layer.table.spans), blob=True)
        assert layer.whole and layer.fetched == layer.table.blob_size
        assert await read_all(fetcher) == place.made.data


async def test_requests_under_way_are_bounded(place: Place, proxy: Proxy) -> None:
    under_way = most = 0
    lock, all_there = threading.Lock(), threading.Event()

    def watched(exchange: Exchange) -> None:
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
            if most == 8:
                all_there.set()
        all_there.wait(0.5)
        time.sleep(0.05)  # for one more to come
        with lock:
            under_way -= 1
        exchange.forward()  # with the last byte of which the next may come

    proxy.on("/blobs/", watched)
    async with place.fetching() as fetcher, trio.open_nursery() as nursery:
        for number in range(0, 40, 2):
            nursery.start_soon(fetcher.read, (4 + number) * CHUNK, 10)
    assert most == 8 < len(asked(proxy))


async def test_connections_are_used_again(tmp_path: Path, place: Place, registry: Registry) -> None:
    count = tmp_path / "count"
    with relay(f"127.0.0.1:{registry.port}", count) as host:
        place.reference = re.sub("^[^/]*", host, place.reference)
        async with place.fetching() as fetcher:
            for number in range(0, 40, 4):
                await fetcher.read((4 + number) * CHUNK, 10)
    # A request may still end when the next reader comes.
    assert Counter(count).connections <= 3


async def test_a_token_that_expires_between_chunks(place: Place, proxy: Proxy) -> None:
    proxy.on("/token", faults.body(b'{"token": "new"}', "application/json"))
    challenge = f'Bearer realm="http://{proxy.host}/token",service="here"'
    async with place.fetching() as fetcher:
        assert await fetcher.read(0, 100) == place.made.data[:100]
        proxy.on("/blobs/", faults.status(401, WWW_Authenticate=challenge), 1)
        assert await read_all(fetcher) == place.made.data
    assert place.failures == []
    assert len(proxy.paths("/token")) == 1


async def test_nothing_is_asked_for_again_after_a_restart(place: Place, proxy: Proxy) -> None:
    for offset in range(0, 10 * CHUNK, 3 * CHUNK):
        async with place.fetching() as fetcher:
            assert await fetcher.read(offset, 9) == place.made.data[offset : offset + 9]
    async with place.fetching() as fetcher:
        assert await read_all(fetcher) == place.made.data
    assert disjoint(asked(proxy))


FAULTS: dict[str, tuple[faults.Fault, int]] = {
    "cut": (faults.cut_after(30_000), 3),
    "short body": (faults.cut_after(0), 2),
    "429": (faults.status(429), 2),
    "500": (faults.status(500), 2),
    "503 with a time": (faults.status(503, Retry_After="1"), 1),
    "no ranges": (faults.ignore_range, 1_000_000),
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_passing_faults_only_take_time(place: Place, proxy: Proxy, fault: str) -> None:
    proxy.on("/blobs/", *FAULTS[fault])
    async with place.fetching(read_seconds=20) as fetcher:
        assert await read_all(fetcher) == place.made.data
    assert place.failures == []


async def test_a_registry_without_ranges_sends_a_layer_once(place: Place, proxy: Proxy) -> None:
    proxy.on("/blobs/", faults.ignore_range)
    async with place.fetching() as fetcher:
        assert await fetcher.read(0, 10) == place.made.data[:10]
        with trio.fail_after(5):
            await fetcher.bring(range(fetcher.layer.table.spans), trio.CapacityLimiter(1))
        assert await read_all(fetcher) == place.made.data
    assert len(asked(proxy)) == 1


async def test_wrong_bytes_are_never_given_out_nor_kept(place: Place, proxy: Proxy) -> None:
    proxy.on("/blobs/", faults.damaged, 2)
    async with place.fetching() as fetcher:
        with pytest.raises(DigestMismatch, match="hostile"):
            await fetcher.read(0, 100)
        assert not fetcher.layer.has(fetcher.layer.table.spans_for(0, 1)[0])
        await trio.sleep(AGAIN_SECONDS)
        proxy.on("/blobs/", faults.damaged, 0)
        with pytest.raises(DigestMismatch):
            await fetcher.read(0, 100)
        assert [type(error) for error in place.failures] == 2 * [DigestMismatch]
        await trio.sleep(AGAIN_SECONDS)
        assert await fetcher.read(0, 100) == place.made.data[:100]


async def test_a_registry_that_is_away_is_waited_for(
    place: Place, proxy: Proxy, registry: Registry
) -> None:
    async with place.fetching(read_seconds=0.6) as fetcher:
        assert await fetcher.read(0, 10) == place.made.data[:10]
        proxy.on("/blobs/", faults.status(502), 50)
        begin = trio.current_time()
        with pytest.raises(StoreError) as caught:
            await fetcher.read(20 * CHUNK, 10)
        assert 0.2 < trio.current_time() - begin < 1.5
        assert place.failures == [caught.value]
        # It fails for that read alone: what is here is read, and the rest when it is back.
        assert await fetcher.read(0, 10) == place.made.data[:10]
        proxy.heal()
        await trio.sleep(AGAIN_SECONDS)
        assert await fetcher.read(20 * CHUNK, 10) == place.made.data[20 * CHUNK :][:10]


async def test_no_reader_hangs_longer_than_its_time(place: Place, proxy: Proxy) -> None:
    proxy.on("/blobs/", faults.stall)
    async with place.fetching(read_seconds=0.5) as fetcher:
        begin = trio.current_time()
        with pytest.raises(RegistryTimeout):
            await fetcher.read(0, 10)
        # The kernel asks at once for each page that it did not get: nobody waits for those again.
        for _ in range(20):
            with pytest.raises(RegistryTimeout):
                await fetcher.read(0, 10)
        assert trio.current_time() - begin < 0.9
        assert len(place.failures) == 1
        spans = fetcher.layer.table.spans_for(0, 10)
        for pid, waits in ((7, True), (8, True), (7, False)):  # others have not waited yet
            begin = trio.current_time()
            with pytest.raises(RegistryTimeout):
                await fetcher.wait(fetcher.want(spans), Reading(0, pid))
            assert (trio.current_time() - begin > 0.4) == waits
            assert trio.current_time() - begin < 0.9
        assert len(place.failures) == 3
        proxy.heal()
        await trio.sleep(AGAIN_SECONDS)
        assert await fetcher.read(0, 10) == place.made.data[:10]


async def test_a_slow_line_only_takes_time(place: Place, proxy: Proxy) -> None:
    def slowly(exchange: Exchange) -> None:
        def change(piece: bytes) -> bytes:
            time.sleep(0.35)
            return piece

        exchange.forward(change=change)

    proxy.on("/blobs/", slowly)
    async with place.fetching(read_seconds=0.6) as fetcher:
        begin = trio.current_time()
        wanted = fetcher.layer.table.spans_for(place.made.entries[3].offset, 5 * CHUNK)
        await fetcher.fetch(wanted)
        assert trio.current_time() - begin > 1
        assert all(map(fetcher.layer.has, wanted))
        assert len(asked(proxy)) == 1


async def test_a_line_that_brings_nothing_is_given_up(place: Place, proxy: Proxy) -> None:
    proxy.on("/blobs/", faults.stall_after(100))
    async with place.fetching(read_seconds=0.5) as fetcher:
        begin = trio.current_time()
        with pytest.raises(StoreError):
            await fetcher.fetch(range(5))
        assert trio.current_time() - begin < 4


async def test_one_wrong_chunk_spoils_no_other(place: Place, proxy: Proxy) -> None:
    spoiled = place.made.blob.index(place.made.blob[200_000:200_100])

    def fault(exchange: Exchange) -> None:
        at = [asked(proxy)[-1][0]]

        def change(piece: bytes) -> bytes:
            start, at[0] = at[0], at[0] + len(piece)
            if start <= spoiled < at[0]:
                piece = bytearray(piece)  # type: ignore[assignment]
                piece[spoiled - start] ^= 1  # type: ignore[index]
            return bytes(piece)

        exchange.forward(change=change)

    proxy.on("/blobs/", fault)
    async with place.fetching() as fetcher:
        table = fetcher.layer.table
        limiter = trio.CapacityLimiter(1)
        with pytest.raises(DigestMismatch):
            await fetcher.bring(range(table.spans), limiter)
        missing = [n for n in range(table.spans) if not fetcher.layer.has(n)]
        assert missing == [table.span_at(spoiled)]


async def test_a_whole_layer_is_as_if_pulled_in_full(place: Place, proxy: Proxy) -> None:
    async with place.fetching() as fetcher:
        await fetcher.read(CHUNK, 10)
        await finished(place, fetcher)
        assert fetcher.layer.complete
    assert place.whole == 1
    assert disjoint(asked(proxy))
    directory = place.open_directory()
    assert sorted(os.listdir(directory)) == [
        *("data", "data.2826240", "index", "layer.json", "lazy.json", "meta.erofs", "spans")
    ]
    assert contents(DataFiles(directory, len(place.made.data), (2826240,))) == place.made.data
    assert place.cas.read(Digest(place.descriptor.digest)) == place.made.blob
    assert lazy.is_complete(directory)


async def test_a_server_killed_while_it_completes_goes_on(place: Place) -> None:
    async with place.fetching() as fetcher:
        await fetcher.bring(range(fetcher.layer.table.spans), trio.CapacityLimiter(1))
    directory = place.open_directory()
    with (directory / "blob").open("rb") as file:
        place.cas.adopt(Digest(place.descriptor.digest), file.fileno(), directory / "blob")
    assert not lazy.is_complete(directory)
    assert lazy.settle(directory, place.cas)
    assert lazy.is_complete(directory)


async def test_bytes_between_contents_are_verified_at_the_end(place: Place, proxy: Proxy) -> None:
    proxy.on("/blobs/", faults.damaged, 1)  # the first byte of the blob: a tar header's
    async with place.fetching() as fetcher:
        layer = fetcher.layer
        await fetcher.bring(range(1), trio.CapacityLimiter(1))
        assert layer.has(0)
        await fetcher.bring(range(layer.table.spans), trio.CapacityLimiter(1))
        with pytest.raises(DigestMismatch, match="the layer's blob"):
            layer.verify(lambda: False)
        assert layer.forget_unverified()
        assert not layer.has(0)
        assert layer.has(1)
        await finished(place, fetcher)


async def test_after_a_power_cut_everything_is_verified(place: Place, proxy: Proxy) -> None:
    async with place.fetching() as fetcher:
        await fetcher.read(0, 4 * CHUNK)
        here = [n for n in range(fetcher.layer.table.spans) if fetcher.layer.has(n)]
        lost = next(n for n in here if fetcher.layer.table.span(n).count)
        start, _ = fetcher.layer.table.range_of(lost)
    place.cut_power(start, 8 * CHUNK)
    async with place.fetching() as fetcher:
        assert not fetcher.layer.has(lost)
        assert fetcher.layer.has(lost + 1)
        assert await fetcher.read(0, 4 * CHUNK) == place.made.data[: 4 * CHUNK]


async def test_what_another_image_has_is_not_fetched(
    place: Place, proxy: Proxy, layout: OciLayout, registry: Registry, config: StoreConfig
) -> None:
    async with place.fetching() as fetcher:
        await finished(place, fetcher)
        fetcher._lender.add(fetcher.layer)
    other = HandMade({"new": noise(99, 1000), "d": FILES["d"], "last": noise(98, 100)})
    blob = layout.blob(other.blob, GZIP)
    registry.push(layout, layout.manifest([blob], [other.diff_id]), "fetch/borrower", "v1")
    borrower = Place(
        place.root,
        other,
        msgspec.convert(blob, Descriptor),
        f"{proxy.host}/fetch/borrower:v1",
        config,
    )
    proxy.seen.clear()
    async with borrower.fetching() as fetcher:
        assert await read_all(fetcher) == other.data
        assert sum(end - start for start, end in asked(proxy)) < 3000
        assert not fetcher.layer.whole
        fetcher._lender.add(fetcher.layer)
        await finished(borrower, fetcher)
        assert sum(end - start for start, end in asked(proxy)) < 5000


async def test_what_was_borrowed_wrongly_comes_from_the_registry(place: Place) -> None:
    """The other layer has the same contents, but what lies between them is not the same."""
    odd = HandMade(FILES)
    odd.blob = with_other_times(odd.blob)
    odd.diff_id = sha256(b"another")
    descriptor = Descriptor(GZIP, sha256(odd.blob), len(odd.blob))
    record = LazyRecord(descriptor, ("docker://nowhere.example/x:1",))
    added = place.layers.add_lazy(Digest(odd.diff_id), odd, record, [], nobody_fills)
    lender = LazyLayer(added.directory, added.diff_id)
    take_all(lender, odd.blob)
    lender.finish(place.cas)
    async with place.fetching() as fetcher:
        fetcher._lender.add(lender)
        layer, limiter = fetcher.layer, trio.CapacityLimiter(1)
        fetcher._lender.add(layer)
        await fetcher.bring(range(layer.table.spans), limiter, blob=True)
        with pytest.raises(DigestMismatch, match="the layer's blob"):
            layer.verify(lambda: False)
        assert layer.forget_borrowed() and not layer.forget_borrowed()
        fetcher.doubts = 1  # as whoever completes it does
        await finished(place, fetcher)
    lender.close()
    assert place.cas.read(Digest(place.descriptor.digest)) == place.made.blob


def test_parts_known_from_the_start_are_kept(place: Place) -> None:
    size = len(place.made.blob)
    place.add([(0, place.made.blob[:100]), (size - 5000, place.made.blob[-5000:])])
    layer = place.open()
    assert not layer.has(0) or layer.table.range_of(0)[1] <= 100
    assert layer.has(layer.table.spans - 1)
    assert lazy.fetched(layer.directory) == layer.fetched
    layer.close()


def test_a_layer_is_filled_while_it_is_made(place: Place) -> None:
    diff_id = Digest(place.made.diff_id)

    def fill() -> None:
        assert place.layers.get(diff_id) is None
        layer = LazyLayer(place.root / "layers" / diff_id.removeprefix("sha256:"), diff_id)
        take_all(layer, place.made.blob)
        layer.close()

    added = place.add(fillable=fill)
    assert place.layers.present(diff_id) == added
    layer = place.open()
    assert layer.whole and contents(added.data) == place.made.data
    layer.close()


@pytest.mark.parametrize("early", [True, False])
def test_a_layer_whose_making_fails_leaves_nothing(place: Place, early: bool) -> None:
    entries = [Entry(b"f", stat.S_IFREG | 0o644), Entry(b"f/g", stat.S_IFREG | 0o644)]
    begun = []

    def fill() -> None:
        begun.append(list((place.root / "layers").glob("*/data")))
        if early:
            raise KeyboardInterrupt

    if not early:
        place.made.entries = entries
    with pytest.raises(KeyboardInterrupt if early else InvalidLayer):
        place.add(fillable=fill)
    assert len(begun[0]) == 1
    assert sorted(os.listdir(place.root / "layers")) == ["chains", "tmp"]
    assert os.listdir(place.root / "layers/tmp") == []
    assert place.layers.get(Digest(place.made.diff_id)) is None


def test_a_registry_that_sends_whole_blobs_is_not_lazy(place: Place, proxy: Proxy) -> None:
    proxy.on("/blobs/", faults.ignore_range)
    source = Source(parse_reference(place.reference), place.config)
    with pytest.raises(NotLazy):
        source.fetch_range(place.descriptor, 10, 20)
    source.close()


async def test_waiting_for_quiet_while_time_goes_by(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look at the clock finds it later, so that a second is over between two of them."""
    slots, looks = Slots(1), iter([0.999, 1.001, 1.002])
    monkeypatch.setattr(slots, "idle_for", lambda: next(looks))
    await slots.quiet()
