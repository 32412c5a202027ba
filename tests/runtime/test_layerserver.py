"""The layer server: what it answers, what it tells, how it fills, and when it ends."""

import errno
import itertools
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from select import select
from typing import Any

import msgspec
import pytest
import trio

from runtime import fanotify, keeper, linux
from runtime.layerserver import asked, client, fill, protocol, server
from runtime.layerserver.client import LayerClient, LayerServerFailed
from runtime.layerserver.fanotify_serving import any_left, group_name
from runtime.layerserver.protocol import (
    Configure,
    Device,
    Done,
    End,
    Failure,
    Fetch,
    Listen,
    News,
    Open,
    Prefetch,
    Report,
    Status,
)
from runtime.layerserver.server import LayerServer
from runtime.rootfs import mount_file, mount_loop
from store import data_files
from store import lazy as lazy_layer
from store.cas import Digest
from store.config import StoreConfig
from store.errors import RegistryError
from store.images import Image
from store.lazy import LazyLayer
from store.manifest import Descriptor
from tests.runtime.site import Site, push_blobs, until
from tests.support import lazy
from tests.support import proxy as faults
from tests.support.layouts import GZIP, OciLayout, compress, sha256, tar_of
from tests.support.method import Method
from tests.support.mounting import mounted as mounted_at
from tests.support.proxy import Exchange, Proxy
from tests.support.registry import Registry

CHUNK = 64 << 10
PAGE = 4096
FILES = {
    "large": random.Random(1).randbytes(40 * CHUNK),
    **{f"small{n}": random.Random(n).randbytes(3000) for n in range(20)},
}
BLOB = lazy.estargz(tar_of(FILES), chunk_size=CHUNK)
DIFF_ID = BLOB.diff_id


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with Registry(tmp_path_factory.mktemp("registry")) as registry:
        yield registry


@pytest.fixture(scope="module")
def name(registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An image of the one layer, without its host."""
    layout = OciLayout(tmp_path_factory.mktemp("image") / "oci")
    return push_blobs(registry, layout, "layerserver", [(BLOB.data, BLOB.layer, DIFF_ID)])


@pytest.fixture
def front(registry: Registry) -> Iterator[Proxy]:
    with Proxy(registry.port) as proxy:
        yield proxy


@pytest.fixture(params=["fuse", "fanotify"])
def method(request: pytest.FixtureRequest) -> Any:
    return request.param


@asynccontextmanager
async def served(
    directory: Path, front: Proxy, name: str, method: Method | None = None, **settings: Any
) -> AsyncIterator[tuple[Site, Image]]:
    """A site that has pulled the image."""
    site = Site(directory, method, **settings)
    async with site.opened():
        yield site, await site.pull(f"{front.host}/{name}")
    assert site.left() == []


def bytes_asked(front: Proxy, layer: Descriptor = BLOB.layer) -> int:
    found = [request.headers["Range"] for request in front.paths(f"/blobs/{layer.digest}")]
    spans = [re.fullmatch(r"bytes=(\d+)-(\d+)", text) for text in found]
    return sum(int(span[2]) + 1 - int(span[1]) for span in spans if span)


def fetched(site: Site) -> int:
    """Bytes of the layer that are here, or all of them."""
    layer = site.store.layers.get(DIFF_ID)
    assert layer is not None
    here = lazy_layer.fetched(layer.directory)
    return BLOB.layer.size if here is None else here


@pytest.mark.parametrize(
    "message",
    [
        Open("sha256:0"),
        Fetch("x"),
        Fetch("x", ((0, 1), (5, 6))),
        Prefetch("x", ((1, 2),)),
        Configure(StoreConfig()),
        Status(),
        End(),
        Listen(),
    ],
    ids=lambda message: type(message).__name__,
)
def test_requests_are_what_they_were(message: protocol.Request) -> None:
    line = protocol.encode(message)
    assert line.count(b"\n") == 1
    assert protocol.decode_request(line) == message


@pytest.mark.parametrize(
    "message",
    [Done(), Device("/a path\n"), Failure("why\n", 5), Report(1, "fuse", "", {"x": (1, 2)})],
    ids=lambda message: type(message).__name__,
)
def test_answers_are_what_they_were(message: protocol.Answer) -> None:
    line = protocol.encode(message)
    assert line.count(b"\n") == 1
    assert protocol.decode_answer(line) == message


def test_news_are_what_they_were() -> None:
    news = News("attack", DIFF_ID, "wrong bytes", 4096, 71)
    assert protocol.decode_news(protocol.encode(news)) == news


@pytest.mark.parametrize("line", [b"", b"{}", b'{"type":"Other"}', b"[1]", b"\xff", b'"' * 100])
def test_what_is_no_request(line: bytes) -> None:
    with pytest.raises((msgspec.MsgspecError, UnicodeDecodeError)):
        protocol.decode_request(line)


async def test_what_it_answers(tmp_path: Path, front: Proxy, name: str, method: Method) -> None:
    async with served(tmp_path, front, name, method) as (site, _):
        report = await site.client.status()
        assert (report.method, report.layers[DIFF_ID][1]) == (method, BLOB.layer.size)
        assert report.pid == int((site.run / protocol.PID_FILE).read_text())
        device = await site.client.device(DIFF_ID)
        assert (device.served is not None) == (method == "fuse")
        if device.served:
            size = site.store.layers.present(DIFF_ID).data_size
            assert os.stat(device.served).st_size == size
        before = bytes_asked(front)
        await site.client.fetch(DIFF_ID, ((0, 100),))
        assert before < bytes_asked(front) < before + 2 * CHUNK
        assert fetched(site) < BLOB.layer.size / 2
        before = bytes_asked(front)
        await site.client.fetch(DIFF_ID, ())
        await site.client.fetch(DIFF_ID, ((0, 100), (1 << 40, 5)))
        assert bytes_asked(front) == before
        await site.client.prefetch(DIFF_ID, [(30 * CHUNK, 10)])
        await until(lambda: bytes_asked(front) > before)
        await site.client.complete(DIFF_ID)
        assert site.store.layers.present(DIFF_ID).complete
        assert (await site.told("complete")).diff_id == DIFF_ID
        assert not (await site.client.device(DIFF_ID)).served
        await site.client.complete(DIFF_ID)


async def test_ranges_are_asked_for_together(tmp_path: Path, front: Proxy, name: str) -> None:
    async with served(tmp_path, front, name) as (site, image):
        before = len(front.paths("/blobs/"))
        paths = (*(f"/small{n}" for n in range(20)), "/large")
        *small, (large, size) = (site.store.locate(image, path)[DIFF_ID][0] for path in paths)
        far = (large + 5 * CHUNK, large + 30 * CHUNK)
        wanted = ((far[1], 10), *reversed(small), (far[0], 10), (far[1] + 10, 1))
        await site.client.fetch(DIFF_ID, wanted)
        assert len(front.paths("/blobs/")) - before == 3
        assert fetched(site) < BLOB.layer.size / 2
        await site.client.fetch(DIFF_ID, ((large, size),))
        assert len(front.paths("/blobs/")) - before == 3 + 3
        assert bytes_asked(front) <= BLOB.layer.size


async def test_what_was_opened_first_comes_in_few_requests(
    tmp_path: Path, front: Proxy, name: str
) -> None:
    async with served(tmp_path, front, name) as (site, image):
        before = len(front.paths("/blobs/"))
        start = fetched(site)
        small = [site.store.locate(image, f"/small{n}")[DIFF_ID][0] for n in range(20)]
        await site.client.prefetch(DIFF_ID, small[::-2])
        await until(lambda: fetched(site) > start + 15 * 3000)
        assert len(front.paths("/blobs/")) - before == 1


async def test_what_it_refuses(tmp_path: Path, front: Proxy, name: str) -> None:
    async with served(tmp_path, front, name) as (site, _):
        unknown = Digest("sha256:" + "0" * 64)
        for ask in (site.client.begin, site.client.complete, site.client.device):
            with pytest.raises(LayerServerFailed, match="is not here") as caught:
                await ask(unknown)
            assert caught.value.errno == errno.ENOENT
        with pytest.raises(LayerServerFailed):
            await site.client.begin(Digest("sha256:../../etc"))
        front.on("/blobs/", faults.status(503))
        with pytest.raises(LayerServerFailed, match="503"):
            await site.client.fetch(DIFF_ID, ((0, 1),))


async def talk(site: Site, data: bytes) -> bytes:
    """What comes back until the server hangs up."""
    connection = protocol.connect(site.run)
    async with trio.SocketStream(trio.socket.from_stdlib_socket(connection)) as stream:
        await stream.send_all(data)
        await stream.send_eof()
        return b"".join([piece async for piece in stream])


async def test_rubbish_does_no_harm(tmp_path: Path, front: Proxy, name: str) -> None:
    async with served(tmp_path, front, name) as (site, _):
        pid = (await site.client.status()).pid
        for line in (b"", b"no line", b"{}\n", b"\xff\xfe\n", b'{"type":"Unknown"}\n', b"[" * 5000):
            answer = await talk(site, line)
            if answer:
                failure = protocol.decode_answer(answer)
                assert isinstance(failure, Failure)
                assert failure.errno == errno.EINVAL
        assert (await site.client.status()).pid == pid


async def test_who_asks_and_is_killed_does_no_harm(tmp_path: Path, front: Proxy, name: str) -> None:
    async with served(tmp_path, front, name) as (site, _):
        pid = (await site.client.status()).pid
        for request in (Listen(), Status(), Fetch(DIFF_ID, ((0, 1),))):
            connection = protocol.connect(site.run)
            connection.sendall(protocol.encode(request))
            readable, _, _ = await trio.to_thread.run_sync(select, [connection], [], [], 5)
            assert readable
            connection.close()  # with the answer unread: the server's side is reset
            await trio.sleep(0.1)
            assert (await site.client.status()).pid == pid


async def test_what_nobody_waits_for_any_more_is_not_fetched(
    tmp_path: Path, front: Proxy, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asked, "_PART_BYTES", CHUNK)
    site = Site(tmp_path)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(LayerServer(site.root, site.run, site.config).run)
        await until((site.run / protocol.PID_FILE).exists)
        async with site.opened():
            await site.pull(f"{front.host}/{name}")
            front.on("/blobs/", faults.late(0.05))
            async with trio.open_nursery() as waiting:
                waiting.start_soon(site.client.complete, DIFF_ID)
                before = fetched(site)
                await until(lambda: fetched(site) > before)
                waiting.cancel_scope.cancel()
            await trio.sleep(0.5)  # what was under way
            before = bytes_asked(front)
            await trio.sleep(0.5)
            assert bytes_asked(front) == before
            assert fetched(site) < BLOB.layer.size


async def test_a_second_server_is_refused(
    tmp_path: Path, front: Proxy, name: str, method: Method
) -> None:
    async with served(tmp_path, front, name, method) as (site, _):
        command = [*site.command[:-1], "info"]
        second = await trio.run_process(command, check=False, capture_stderr=True)
        assert second.returncode == 1
        assert b"another" in second.stderr and b"one is enough" in second.stderr
        assert b"ERROR" not in second.stderr
        assert b"Traceback" not in second.stderr
        await site.client.fetch(DIFF_ID, ((0, 10),))


async def test_it_does_not_end_while_a_layer_is_mounted(
    tmp_path: Path, front: Proxy, name: str, method: Method
) -> None:
    async with (
        served(tmp_path, front, name, method) as (site, image),
        mounted_layer(site, image) as target,
    ):
        with pytest.raises(LayerServerFailed, match="in use") as caught:
            await site.client._ask(End())
        assert caught.value.errno == errno.EBUSY
        assert await read_file(target / "small3") == FILES["small3"]


@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The small files have a data file of their own."""
    monkeypatch.setattr(data_files, "_PART_MIN", 1 << 20)


@pytest.mark.usefixtures("in_parts")
async def test_any_part_of_a_layer_can_be_read(
    tmp_path: Path, front: Proxy, name: str, method: Method
) -> None:
    async with served(tmp_path, front, name, method) as (site, image):
        async with mounted_layer(site, image) as target:
            assert len(parts(site)) == 2
            for path in ("small3", "large", "small0", "small19"):
                assert await read_file(target / path) == FILES[path]
        await site.client.complete(DIFF_ID)
        for mount in (mount_file, mount_loop):
            async with mounted_layer(site, image, mount) as target:
                for path, content in FILES.items():
                    assert await read_file(target / path) == content


@pytest.mark.usefixtures("in_parts")
@pytest.mark.logs("the layer server has died")
async def test_who_reads_what_is_all_here_needs_no_server(
    tmp_path: Path, front: Proxy, name: str
) -> None:
    async with (
        served(tmp_path, front, name, "fanotify") as (site, image),
        mounted_layer(site, image) as target,
    ):
        large = os.stat(parts(site)[0])
        marked = partial(keeper.marked, group_name(site.run))
        assert len(marked()) == 2
        start, size = layer_cut(site)
        await site.client.fetch(DIFF_ID, ((start, size - start),))
        assert await read_file(target / "small0") == FILES["small0"]
        only_large = {fanotify.FileId(large.st_dev, large.st_ino)}
        await until(lambda: marked() == only_large)
        pid = (await site.client.status()).pid
        os.kill(pid, signal.SIGSTOP)
        for number in range(1, 20):
            path = f"small{number}"
            assert await read_file(target / path) == FILES[path]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read_file, target / "large")
            await trio.sleep(0.2)
            assert nursery.child_tasks, "zeros were read"
            os.kill(pid, signal.SIGKILL)
        assert await read_file(target / "large") == FILES["large"]
        # The next server has marked all, and has taken the marks of what is here away again.
        await until(lambda: marked() == set())


@pytest.mark.usefixtures("in_parts")
async def test_the_last_read_that_waits_frees_the_others(
    tmp_path: Path, front: Proxy, name: str
) -> None:
    async with (
        served(tmp_path, front, name, "fanotify") as (site, image),
        mounted_layer(site, image) as target,
    ):
        marked = partial(keeper.marked, group_name(site.run))
        start, size = layer_cut(site)
        second = start + PAGE
        await site.client.fetch(DIFF_ID, ((second, size - second),))
        assert len(marked()) == 2
        assert await read_file(target / "small0") == FILES["small0"]
        await until(lambda: len(marked()) == 1)


def parts(site: Site) -> tuple[Path, ...]:
    """The layer's data files."""
    data = site.store.layers.present(DIFF_ID).data
    assert data is not None
    return data.paths


def layer_cut(site: Site) -> tuple[int, int]:
    """Where the layer's second data file begins, and their size."""
    layer = site.store.layers.present(DIFF_ID)
    (cut,) = layer.record.cuts
    return cut, layer_size(site)


def layer_size(site: Site) -> int:
    """Of the layer's data, in bytes."""
    return site.store.layers.present(DIFF_ID).data_size


async def read_file(path: Path) -> bytes:
    """All of it, which may take a while."""
    return await trio.to_thread.run_sync(path.read_bytes)


@asynccontextmanager
async def mounted_layer(
    site: Site, image: Image, mount: Callable[..., None] = mount_file
) -> AsyncIterator[Path]:
    """The image's layer, mounted where the server looks for it."""
    (found,) = site.store.rootfs_layers(image)
    served_at = (await site.client.device(DIFF_ID)).served
    target = site.run / "layers" / "x"
    target.mkdir(parents=True)
    assert found.data is not None
    paths = found.data.paths
    devices = [Path(served_at)] * len(paths) if served_at else paths
    await trio.to_thread.run_sync(mount, found.meta, devices, str(target))
    try:
        yield target
    finally:
        linux.umount(str(target))
        target.rmdir()
        target.parent.rmdir()


def test_fanotify_is_not_chosen_where_all_can_be_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper, "holder", lambda: "")
    serving, why = server._choose(tmp_path, tmp_path / "run", StoreConfig(), lambda name: None)
    assert (serving.name, "can't be killed" in why) == ("fuse", True)


async def test_it_ends_when_nobody_needs_it(
    tmp_path: Path, front: Proxy, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with served(tmp_path, front, name) as (site, _):
        pass
    monkeypatch.setattr(server, "_GRACE_SECONDS", 0.3)
    begin = time.monotonic()
    with trio.fail_after(5):
        await LayerServer(site.root, site.run, site.config).run()
    assert time.monotonic() - begin < 3
    assert site.left() == []


async def test_filling_keeps_to_its_rate(tmp_path: Path, front: Proxy, name: str) -> None:
    rate = 200_000
    async with served(tmp_path, front, name, fill=True, fill_rate=rate) as (site, _):
        start, begin = fetched(site), time.monotonic()
        await until(lambda: fetched(site) > start + 3 * CHUNK)
        await trio.sleep(1.0)
        count, seconds = fetched(site) - start, time.monotonic() - begin
        assert count < rate * seconds + 2 * CHUNK
        faster = msgspec.structs.replace(site.config.lazy, fill_rate=None)
        config = msgspec.structs.replace(site.config, lazy=faster)
        await site.client._ask(Configure(config))
        await site.told("complete")


async def test_without_filling_nothing_comes_by_itself(
    tmp_path: Path, front: Proxy, name: str
) -> None:
    async with served(tmp_path, front, name) as (site, _):
        before = bytes_asked(front)
        await trio.sleep(1.5)
        assert bytes_asked(front) == before
        settings = msgspec.structs.replace(site.config.lazy, fill=True)
        config = msgspec.structs.replace(site.config, lazy=settings)
        await site.client._ask(Configure(config))
        await site.told("complete")


async def test_filling_begins_as_soon_as_an_image_has_the_layer(
    tmp_path: Path, front: Proxy, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fill, "_RETRY_SECONDS", 1000.0)
    site = Site(tmp_path, fill=True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(LayerServer(site.root, site.run, site.config).run)
        await until((site.run / protocol.PID_FILE).exists)
        async with site.opened():
            await site.pull(f"{front.host}/{name}")
            await site.told("complete")


async def test_what_nobody_wants_any_more_is_not_filled(
    tmp_path: Path, front: Proxy, name: str
) -> None:
    async with served(tmp_path, front, name, fill=True, fill_rate=100_000) as (site, _):
        (image,) = site.store.images
        start = fetched(site)
        await until(lambda: fetched(site) > start)
        site.store.forget_image(image.name)
        await trio.sleep(1.5)  # what was under way
        before = bytes_asked(front)
        await trio.sleep(1.5)
        assert bytes_asked(front) == before
        again = await site.pull(image.name)
        assert again.diff_ids == image.diff_ids
        await until(lambda: bytes_asked(front) > before)


async def test_what_no_image_has_yet_is_not_filled(
    tmp_path: Path, front: Proxy, registry: Registry
) -> None:
    layout = OciLayout(tmp_path / "oci")
    ordinary = tar_of({"ordinary": b"x" * 10_000})
    blob, digest = compress(ordinary, GZIP), sha256(ordinary)
    layer = Descriptor(GZIP, sha256(blob), len(blob))
    layers = [(BLOB.data, BLOB.layer, DIFF_ID), (blob, layer, digest)]
    pushed = push_blobs(registry, layout, "no-image-yet", layers)
    front.on(f"/blobs/{layer.digest}", faults.cut_after(0))
    site = Site(tmp_path, fill=True)
    async with site.opened():
        with pytest.raises(RegistryError):
            await site.pull(f"{front.host}/{pushed}")
        before = bytes_asked(front)
        await trio.sleep(2.5)
        assert fetched(site) < BLOB.layer.size
        assert bytes_asked(front) == before
        front.heal()
        await site.pull(f"{front.host}/{pushed}")
        await site.told("complete")


async def test_filling_leaves_some_room(
    tmp_path: Path, front: Proxy, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, rest = tmp_path / "disk", tmp_path / "disk/rest"
    disk.mkdir()

    def free() -> int:
        found = os.statvfs(disk)
        return found.f_bavail * found.f_frsize

    with mounted_at("tmpfs", disk, "tmpfs", "size=100m"):
        rest.write_bytes(bytes(95 << 20))
        async with served(disk, front, name, "fuse", fill=True) as (site, _):
            before = bytes_asked(front)
            await trio.sleep(2.0)
            assert bytes_asked(front) == before
            os.truncate(rest, rest.stat().st_size - (6 << 20) + free())
            await until(lambda: bytes_asked(front) > before, 10.0)
            await trio.sleep(1.0)
            assert free() >= 5 << 20
            rest.unlink()
            await site.told("complete")


def spoiled(front: Proxy, place: int) -> faults.Fault:
    """Change one byte of the blob."""

    def fault(exchange: Exchange) -> None:
        asked = front.paths(f"/blobs/{BLOB.layer.digest}")[-1].headers["Range"]
        at = [int(asked.removeprefix("bytes=").partition("-")[0])]

        def change(piece: bytes) -> bytes:
            start, at[0] = at[0], at[0] + len(piece)
            if not start <= place < at[0]:
                return piece
            middle = place - start
            return piece[:middle] + bytes([piece[middle] ^ 4]) + piece[middle + 1 :]

        exchange.forward(change=change)

    return fault


def range_for(site: Site, offset: int) -> tuple[int, int]:
    """Which bytes of the blob hold a place in the data."""
    layer = LazyLayer(site.store.layers.present(DIFF_ID).directory, DIFF_ID)
    found = layer.table.range_of(layer.table.spans_for(offset, 1)[0])
    layer.close()
    return found


def behind_contents(site: Site) -> int:
    """A byte of the blob that holds a tar header: of which no content's digest tells."""
    return range_for(site, 40 * CHUNK)[1] - 20


async def test_all_of_a_layer_at_once_comes_from_another_where_that_has_it(
    tmp_path: Path, front: Proxy, name: str, registry: Registry
) -> None:
    archive = tar_of({**FILES, "more": b"more"})
    other = lazy.estargz(archive, chunk_size=CHUNK)
    layout = OciLayout(tmp_path / "oci")
    pushed = push_blobs(
        registry, layout, "nearly-the-same", [(other.data, other.layer, other.diff_id)]
    )
    async with served(tmp_path, front, name) as (site, _):
        await site.client.complete(DIFF_ID)
        await site.pull(f"{front.host}/{pushed}")
        await site.client.complete(Digest(other.diff_id))
        assert bytes_asked(front, other.layer) < other.layer.size // 4


async def test_other_bytes_that_inflate_to_the_same_come_again(
    tmp_path: Path, front: Proxy, name: str
) -> None:
    """Nothing but the digest of the whole blob tells of the system in a gzip header."""
    async with served(tmp_path, front, name) as (site, image):
        front.on("/blobs/", spoiled(front, range_for(site, CHUNK)[0] + 9))
        await site.client.fetch(DIFF_ID, ((0, layer_size(site)),))
        front.heal()
        await site.client.complete(DIFF_ID)
        assert site.store.percent(image) is None
        assert site.store.cas.read(Digest(BLOB.layer.digest)) == BLOB.data


async def test_contents_that_the_disk_lost_are_written_again(
    tmp_path: Path, front: Proxy, name: str
) -> None:
    async with served(tmp_path, front, name, "fuse") as (site, image):
        await site.client.fetch(DIFF_ID, ((0, layer_size(site)),))
        with parts(site)[0].open("r+b") as data:
            data.write(bytes(CHUNK + 1))
        asked = bytes_asked(front)
        await site.client.complete(DIFF_ID)
        await site.told("repaired")
        assert site.store.percent(image) is None
        assert bytes_asked(front) - asked < CHUNK  # what lies between contents
        async with mounted_layer(site, image) as target:
            assert await read_file(target / "large") == FILES["large"]


async def test_a_blob_that_is_always_wrong_is_refused(
    tmp_path: Path, front: Proxy, name: str
) -> None:
    """Each content is right; a byte of a tar header is not."""
    async with served(tmp_path, front, name) as (site, image):
        front.on("/blobs/", spoiled(front, behind_contents(site)))
        with pytest.raises(LayerServerFailed, match="hashes to") as caught:
            await site.client.complete(DIFF_ID)
        assert caught.value.errno == errno.EIO
        assert "the layer's blob" in (await site.told("refused")).sentence
        assert site.store.damaged(image) == (BLOB.layer.content,)
        assert not site.store.cas.contains(BLOB.layer.content)
    # It is known for good, until it is pulled again.
    front.heal()
    again = Site(tmp_path)
    async with again.opened():
        assert again.store.damaged(image) == (BLOB.layer.content,)
        with pytest.raises(LayerServerFailed, match="hashes to"):
            await again.client.complete(DIFF_ID)
        image = await again.pull(f"{front.host}/{name}")
        assert again.store.damaged(image) == ()
        await again.client.complete(DIFF_ID)
        assert again.store.percent(image) is None


def end_when(site: Site, ready: Callable[[], object]) -> None:
    """Start the server alone and end it once something is so."""
    (site.run / protocol.CONFIG).write_bytes(msgspec.json.encode(site.config))
    with subprocess.Popen(site.command) as process:
        ready()
        process.terminate()
        process.wait(20)


@pytest.mark.parametrize("seconds", [0.1, 0.2, 0.3, 0.4, 0.5])
def test_one_that_is_ended_while_it_starts_leaves_nothing(tmp_path: Path, seconds: float) -> None:
    site = Site(tmp_path)
    end_when(site, partial(time.sleep, seconds))
    site.store.close()
    assert keeper.find(group_name(site.run)) == []


async def test_one_that_is_ended_while_it_loads_leaves_nothing(
    tmp_path: Path, front: Proxy, name: str
) -> None:
    async with served(tmp_path, front, name, "fanotify") as (site, _):
        pass
    group = group_name(site.run)

    def has_begun() -> None:
        while not keeper.is_there(group):
            time.sleep(0.001)

    for _ in range(5):
        await trio.to_thread.run_sync(end_when, site, has_begun)
        assert keeper.find(group) == []


async def test_one_that_was_killed_and_is_not_started_again_leaves_nothing(
    tmp_path: Path, front: Proxy, name: str
) -> None:
    async with served(tmp_path, front, name, "fanotify") as (site, _):
        os.kill((await site.client.status()).pid, 9)
    assert keeper.find(group_name(site.run)) == []


async def test_a_byte_behind_contents_that_is_wrong_once_is_mended(
    tmp_path: Path, front: Proxy, name: str
) -> None:
    async with served(tmp_path, front, name) as (site, image):
        wrong = behind_contents(site)
        front.on("/blobs/", spoiled(front, wrong), times=1)
        await site.client.fetch(DIFF_ID, ((0, 1 << 40),))
        asked = bytes_asked(front)
        await site.client.complete(DIFF_ID)
        assert site.store.percent(image) is None
        assert bytes_asked(front) < asked + 4 * CHUNK
        await site.told("complete")
        assert [news.kind for news in site.news] == ["complete"]


async def test_what_was_known_from_the_start_is_mended(
    tmp_path: Path, front: Proxy, name: str
) -> None:
    async with served(tmp_path, front, name) as (site, image):
        directory = site.store.layers.present(DIFF_ID).directory
        with (directory / "blob").open("r+b") as file:
            file.write(b"\1")  # as if it had come so; the footer and this are here from the start
        await site.client.complete(DIFF_ID)
        assert site.store.percent(image) is None
        assert not [news for news in site.news if news.kind == "refused"]


@pytest.mark.logs("the layer server has died")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
async def test_it_is_started_again(
    tmp_path: Path, front: Proxy, name: str, how: signal.Signals
) -> None:
    async with served(tmp_path, front, name) as (site, _):
        pid = (await site.client.status()).pid
        before = bytes_asked(front)
        await site.client.fetch(DIFF_ID, ((0, 100),))
        os.kill(pid, how)
        await until(lambda: site.restarts == 2)
        assert (await site.client.status()).pid != pid
        after = bytes_asked(front)
        assert after > before
        await site.client.fetch(DIFF_ID, ((0, 100),))
        assert bytes_asked(front) == after


@pytest.mark.logs("the layer server has died")
async def test_who_reads_a_layer_that_was_removed_reads_no_zeros(
    tmp_path: Path, front: Proxy, name: str
) -> None:
    """Its mark is all that tells the next server of that reader."""
    async with served(tmp_path, front, name, "fanotify") as (site, image):
        await site.client.device(DIFF_ID)  # as whoever mounts it
        layers = site.root / "layers"
        with (site.store.layers.present(DIFF_ID).directory / "data").open("rb") as file:
            site.forget(image)
            os.kill((await site.client.status()).pid, signal.SIGKILL)
            await until(lambda: site.restarts == 2)
            with pytest.raises(LayerServerFailed, match="in use"):
                await site.client._ask(End())
            assert any_left(site.run, layers)
            with pytest.raises(OSError, match="Input/output error"):
                await trio.to_thread.run_sync(file.read)
        assert not any_left(site.run, layers)


def _spoilt(path: Path, how: str) -> bytes:
    match how:
        case "ones":
            return b"\xff" * path.stat().st_size
        case "one bit":
            right = path.read_bytes()
            middle = len(right) // 2
            return right[:middle] + bytes([right[middle] ^ 1]) + right[middle + 1 :]
    return b""


@pytest.mark.logs("the layer server has died|is missing or damaged")
@pytest.mark.parametrize(
    ("file", "how"),
    [
        *itertools.product(["present", "spans", "lazy.json", "data", "blob"], ["empty", "gone"]),
        *itertools.product(["present", "spans", "lazy.json"], ["ones"]),
        *itertools.product(["spans", "present"], ["one bit"]),
    ],
)
async def test_a_layer_that_is_damaged_stands_in_nobodys_way(
    tmp_path: Path, front: Proxy, name: str, file: str, how: str
) -> None:
    async with served(tmp_path, front, name, "fanotify") as (site, image):
        await site.client.device(DIFF_ID)
        os.kill((await site.client.status()).pid, signal.SIGKILL)
        path = site.store.layers.present(DIFF_ID).directory / file
        spoilt = _spoilt(path, how)
        path.unlink()
        if how != "gone":
            path.write_bytes(spoilt)
        await until(lambda: site.restarts == 2)
        assert (await site.client.status()).layers == {}
        assert f"{file} of the layer" in (await site.told("damaged")).sentence
        assert site.store.damaged(image)
        again = await site.pull(image.name)
        await site.client.complete(DIFF_ID)
        assert site.store.percent(again) is None
        assert FILES["large"] in (path.parent / "data").read_bytes()


@pytest.mark.logs("the layer server has died")
async def test_one_that_is_killed_when_it_has_completed_a_layer(
    tmp_path: Path, front: Proxy, name: str
) -> None:
    async with served(tmp_path, front, name, "fanotify") as (site, _):
        await site.client.device(DIFF_ID)
        path = site.store.layers.present(DIFF_ID).directory / "data"
        await site.client.complete(DIFF_ID)
        with path.open("rb") as file:  # as just before the mark went
            mark = (fanotify._MARK_ADD, fanotify._PRE_ACCESS, file.fileno(), None)
            linux.fanotify_mark(site.client.held[0], *mark)
        with path.open("rb") as file:
            os.kill((await site.client.status()).pid, signal.SIGKILL)
            await until(lambda: site.restarts == 2)
            data = await trio.to_thread.run_sync(file.read)
        assert FILES["large"] in data


# Greets whoever listens, and dies over any other request.
DYING = """
import os, socket, sys
path, greeting = sys.argv[1:]
if os.path.exists(path):
    os.unlink(path)
listener = socket.socket(socket.AF_UNIX)
listener.bind(path)
listener.listen()
listening = []
while True:
    connection, _ = listener.accept()
    if b"Listen" not in connection.recv(1000):
        break
    connection.sendall(greeting.encode())
    listening.append(connection)
"""


@pytest.mark.logs("the layer server has died|the layer server does not come up")
async def test_one_that_dies_again_and_again_does_not_take_its_daemon_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "_START_SECONDS", 0.2)
    socket, greeting = tmp_path / protocol.SOCKET, protocol.encode(Done()).decode()
    command = [sys.executable, "-c", DYING, str(socket), greeting]
    following = LayerClient(tmp_path, tmp_path / "layers", StoreConfig(), command)
    restarts: list[None] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(following.follow, lambda _: None, lambda: restarts.append(None))
        while len(restarts) < 4:
            with pytest.raises(LayerServerFailed, match="does not answer"):
                await following.status()
        nursery.cancel_scope.cancel()
    await following.end()


async def test_tables_take_no_memory_when_nobody_reads(
    tmp_path: Path, front: Proxy, name: str
) -> None:
    async with served(tmp_path, front, name) as (site, _):
        pid = (await site.client.status()).pid
        found = []
        for _ in range(10):  # it may be let go of before we look
            await site.client.fetch(DIFF_ID, ((0, 100),))
            found.append(resident(pid, "/spans"))
        assert max(found) > 0
        await until(lambda: resident(pid, "/spans") == 0)


def resident(pid: int, name: str) -> int:
    """KiB of mapped files whose names end so that a process has in memory."""
    found = 0
    mapped = Path(f"/proc/{pid}/smaps").read_text()
    for line in mapped.splitlines():
        if "-" in line.partition(" ")[0]:
            counts = line.endswith(name)
        elif counts and line.startswith("Rss:"):
            found += int(line.split()[1])
    return found


async def test_a_layer_that_was_removed(tmp_path: Path, front: Proxy, name: str) -> None:
    async with served(tmp_path, front, name) as (site, image):
        await site.client.fetch(DIFF_ID, ((0, 100),))
        site.forget(image)
        with pytest.raises(LayerServerFailed, match="is not here"):
            await site.client.begin(DIFF_ID)
        image = await site.pull(f"{front.host}/{name}")
        await site.client.complete(DIFF_ID)
        assert site.store.percent(image) is None
