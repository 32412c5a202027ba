"""Lazy pulls from a real registry through a real layer server: by tables of contents, by indexes
made here, and by those that others have pushed."""

import errno
import io
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from runtime.layerserver.client import LayerServerFailed
from runtime.layerserver.protocol import PID_FILE, Device
from runtime.rootfs import Rootfs
from store import indexing
from store.cas import Digest
from store.config import Mode
from store.description import build_tree
from store.errors import InvalidLayer
from store.images import Image
from store.index import Entry, read_index
from store.index_artifact import push_indexes
from store.index_document import encode_index
from store.manifest import Descriptor
from store.push import Pusher
from store.reference import parse_reference
from store.registry import Registry as Client
from store.spans import SpanTable, SpanWriter
from tests.runtime.site import Site, push_blobs, until
from tests.support import lazy, tars
from tests.support import proxy as faults
from tests.support.contents import contents
from tests.support.indexing import digest, index_of, table_of
from tests.support.layouts import GZIP, OciLayout, compress
from tests.support.method import Method
from tests.support.mounting import mounted_stack
from tests.support.proxy import Exchange, Proxy
from tests.support.registry import Registry
from tests.support.treediff import tree_diff
from tests.support.umoci import umoci_unpack
from tools.sides import detach


def noise(seed: int, size: int) -> bytes:
    return random.Random(seed).randbytes(size)


# Some spans of an index.
ARCHIVE = tars.archive(
    tars.directory(b"./"),
    tars.entry(b"first", data=noise(1, 2 << 20)),
    tars.entry(b"middle", data=noise(2, 3 << 20), mode=0o755, uid=7),
    tars.entry(b"last", data=noise(3, 1000)),
)
BLOB = compress(ARCHIVE, GZIP)
LAYER = Descriptor(GZIP, digest(BLOB), len(BLOB))
DIFF_ID = digest(ARCHIVE)


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with Registry(tmp_path_factory.mktemp("registry")) as registry:
        yield registry


@pytest.fixture
def front(registry: Registry) -> Iterator[Proxy]:
    with Proxy(registry.port) as proxy:
        yield proxy


@pytest.fixture
def layout(tmp_path: Path) -> OciLayout:
    return OciLayout(tmp_path / "layout")


_numbers = iter(range(1000))


@pytest.fixture
def name() -> str:
    """A repository for each test."""
    return f"lazy-pull/{next(_numbers)}"


@pytest.fixture
def ordinary(registry: Registry, layout: OciLayout, name: str) -> str:
    """An image of the one ordinary layer, behind the host."""
    return push_blobs(registry, layout, name, [(BLOB, LAYER, DIFF_ID)])


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Indexes are made without waiting for a quiet time."""
    monkeypatch.setattr(indexing, "_QUIET_SECONDS", 0.0)


def whole(site: Site, diff_id: Digest = DIFF_ID) -> bytes:
    """A layer's data file."""
    return contents(site.store.layers.present(diff_id).data)


def honest(directory: Path) -> bytes:
    """The data file as it must be."""
    site_data = bytearray()
    for content in (noise(1, 2 << 20), noise(2, 3 << 20), noise(3, 1000)):
        site_data += content + bytes(-len(content) % 4096)
    return bytes(site_data)


async def test_what_was_pulled_once_is_lazy_the_next_time(
    tmp_path: Path, front: Proxy, ordinary: str, at_once: None
) -> None:
    site = Site(tmp_path)
    async with site.opened():
        image = await site.pull(f"{front.host}/{ordinary}")
        assert site.lazy_layers(image) == [""]
        assert "no index" in site.store.layers.present(DIFF_ID).record.not_lazy
        expected = whole(site)
        path = site.store.indexes.path(LAYER.content)
        await until(path.exists)
        site.forget(image)
        front.seen.clear()
        image = await site.pull(f"{front.host}/{ordinary}")
        assert site.lazy_layers(image) == ["gzip+index"]
        assert not front.paths(f"/blobs/{LAYER.digest}")
        assert site.store.percent(image) == 0
        await site.client.fetch(DIFF_ID, ((1 << 20, 10),))
        percent = site.store.percent(image)
        assert percent is not None and 0 < percent < 60
        await site.client.complete(DIFF_ID)
        assert whole(site) == expected == honest(tmp_path)
        assert site.store.percent(image) is None
        assert site.store.cas.contains(LAYER.content)
        assert os.listdir(path.parent) == [path.name]


async def test_a_full_pull_stays_full(
    tmp_path: Path, front: Proxy, ordinary: str, at_once: None
) -> None:
    site = Site(tmp_path)
    async with site.opened():
        image = await site.pull(f"{front.host}/{ordinary}")
        await until(site.store.indexes.path(LAYER.content).exists)
        site.forget(image)
        image = await site.pull(f"{front.host}/{ordinary}", mode="full")
        assert site.lazy_layers(image) == [""]
        assert site.store.percent(image) is None


async def test_without_index_in_the_settings_none_is_made(
    tmp_path: Path, front: Proxy, ordinary: str, at_once: None
) -> None:
    site = Site(tmp_path, index=False)
    async with site.opened():
        await site.pull(f"{front.host}/{ordinary}")
        await trio.sleep(0.3)
        assert not site.store.indexes.path(LAYER.content).exists()


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut off": lambda data: data[:-10],
    "empty": lambda data: b"",
    "changed": lambda data: data[:50] + bytes([data[50] ^ 1]) + data[51:],
    "junk": lambda data: b"junk" * 100,
    "another's": lambda data: data,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.logs("can't be used and is removed")
async def test_a_damaged_index_is_dropped(
    tmp_path: Path, front: Proxy, ordinary: str, damage: str
) -> None:
    site = Site(tmp_path, index=False)
    document = document_of(tmp_path) if damage != "another's" else other_document(tmp_path)
    path = site.store.indexes.path(LAYER.content)
    path.write_bytes(DAMAGES[damage](document))
    async with site.opened():
        image = await site.pull(f"{front.host}/{ordinary}")
        assert site.lazy_layers(image) == [""]
        assert not path.exists()
        assert whole(site) == honest(tmp_path)


async def test_what_was_opened_first_comes_with_the_next_pull(
    tmp_path: Path, registry: Registry, layout: OciLayout, front: Proxy, name: str
) -> None:
    files = {b"f%d" % n: noise(n, 100_000) for n in range(20)}
    files[b"etc/passwd"] = b"root:x:0:0:root:/:/bin/sh\n"
    archive = tars.archive(*(tars.entry(path, data=data) for path, data in files.items()))
    upper = tars.archive(tars.entry(b"link", b"2", link=b"f7"), tars.entry(b".wh.f9"))
    blobs = converted([archive, upper])
    pushed = push_blobs(registry, layout, name, blobs)
    site = Site(tmp_path, "fuse")  # else looking into the data file would fetch
    async with site.opened():
        image = await site.pull(f"{front.host}/{pushed}")
        site.store.opened.put(image.digest, ["/f3", "/none", "/link", "/f9", "/f12"])
        site.forget(image)
        image = await site.pull(f"{front.host}/{pushed}")
        data = site.store.layers.present(image.diff_ids[0]).directory / "data"

        # Where the user of each container is looked up, besides.
        expected = {b"f3", b"f7", b"f12", b"etc/passwd"}

        def is_here(path: bytes) -> bool:
            ((offset, size),) = site.store.locate(image, os.fsdecode(path))[image.diff_ids[0]]
            with data.open("rb") as file:
                return os.pread(file.fileno(), size, offset) == files[path]

        await until(lambda: all(is_here(path) for path in expected))
        others = set(files) - expected - {b"f9"}
        assert not any(map(is_here, others))
        percent = site.store.percent(image)
        assert percent is not None and percent < 25


# --- indexes of others -------------------------------------------------------------------


def document_of(directory: Path, change: Callable[[list[Entry]], None] | None = None) -> bytes:
    """The index of the layer, or a lie about its entries."""
    index = index_of(BLOB, ARCHIVE, directory)
    entries = list(index.entries)
    if change is not None:
        change(entries)
    table = table_of(index, directory)
    file = io.BytesIO()
    encode_index(entries, table, LAYER.content, DIFF_ID, file)
    table.close()
    return file.getvalue()


def other_document(directory: Path) -> bytes:
    archive = tars.archive(tars.entry(b"other", data=b"x" * 5000))
    blob = compress(archive, GZIP)
    index = index_of(blob, archive, directory)
    table = table_of(index, directory)
    file = io.BytesIO()
    encode_index(index.entries, table, digest(blob), digest(archive), file)
    table.close()
    return file.getvalue()


def with_wrong_digests(directory: Path) -> bytes:
    """An index by which no byte of the layer is right."""
    index = index_of(BLOB, ARCHIVE, directory)
    table = table_of(index, directory)
    writer = SpanWriter(table.codec, table.blob_size)
    for number in range(table.spans):
        span = table.span(number)
        span.digest = bytes([span.digest[0] ^ 1]) + span.digest[1:]
        span.window = table.window(number)
        writer.add(span, list(table.pieces_of(span)))
    with (directory / "wrong").open("wb") as wrong:
        writer.write(wrong, table.data_size)
    table.close()
    table = SpanTable(directory / "wrong")
    file = io.BytesIO()
    encode_index(index.entries, table, LAYER.content, DIFF_ID, file)
    table.close()
    return file.getvalue()


def setuid(entries: list[Entry]) -> None:
    number = next(n for n, entry in enumerate(entries) if entry.path == b"middle")
    entries[number] = msgspec.structs.replace(entries[number], mode=0o104755, uid=0)


def publish(registry: Registry, ordinary: str, site: Site, document: bytes) -> Digest:
    """Push an index beside the image, as anybody may who can push there; the image's digest."""
    reference = parse_reference(f"{registry.host}/{ordinary}")
    pusher, client = Pusher(reference, site.config), Client(reference, site.config)
    try:
        image, _ = client.resolve()
        push_indexes(pusher, client, image, {LAYER.content: document})
        return image.content
    finally:
        pusher.close()
        client.close()


@pytest.mark.parametrize(
    ("policy", "by", "used"),
    [
        ("tag", "tag", True),
        ("tag", "digest", False),
        ("always", "digest", True),
        ("never", "tag", False),
    ],
)
async def test_an_index_in_the_registry_is_used_where_it_is_trusted(
    tmp_path: Path,
    registry: Registry,
    front: Proxy,
    ordinary: str,
    policy: str,
    by: str,
    used: bool,
) -> None:
    site = Site(tmp_path, index=False, remote_indexes=policy)
    image_digest = publish(registry, ordinary, site, document_of(tmp_path))
    name = ordinary if by == "tag" else f"{ordinary.partition(':')[0]}@{image_digest}"
    async with site.opened():
        image = await site.pull(f"{front.host}/{name}")
        assert site.lazy_layers(image) == ["gzip+index" if used else ""]
        assert bool(front.paths("referrers|manifests/sha256-")) == used
        layer = site.store.layers.get(DIFF_ID)
        assert layer and ("remote_indexes" in layer.record.not_lazy) != used
        await site.client.complete(DIFF_ID)
        assert whole(site) == honest(tmp_path)
        assert not site.store.damaged(image)
        assert not [news for news in site.news if news.kind != "complete"]


async def test_an_index_that_lies_about_a_file(
    tmp_path: Path, registry: Registry, front: Proxy, ordinary: str
) -> None:
    site = Site(tmp_path, index=False)
    publish(registry, ordinary, site, document_of(tmp_path, setuid))
    async with site.opened():
        image = await site.pull(f"{front.host}/{ordinary}")
        assert site.lazy_layers(image) == ["gzip+index"]
        with pytest.raises(LayerServerFailed, match="'/middle' is another in the layer"):
            await site.client.complete(DIFF_ID)
        assert "mode=full" in (await site.told("refused")).sentence
        assert site.store.damaged(image) == (LAYER.content,)
        # It is not believed a second time.
        image = await site.pull(f"{front.host}/{ordinary}")
        assert site.lazy_layers(image) == [""]
        assert whole(site) == honest(tmp_path)
        assert not site.store.damaged(image)


@pytest.mark.logs("is fetched once more")
@pytest.mark.parametrize("lie", ["entries", "digests"])
async def test_a_full_pull_heals_what_a_lying_index_did(
    tmp_path: Path, registry: Registry, front: Proxy, ordinary: str, lie: str
) -> None:
    site = Site(tmp_path, index=False)
    document = document_of(tmp_path, setuid) if lie == "entries" else with_wrong_digests(tmp_path)
    publish(registry, ordinary, site, document)
    async with site.opened():
        image = await site.pull(f"{front.host}/{ordinary}")
        assert site.lazy_layers(image) == ["gzip+index"]
        if lie == "digests":
            with pytest.raises(LayerServerFailed, match="hostile"):
                await site.client.fetch(DIFF_ID, ((0, 10),))
            assert (await site.told("attack")).diff_id == DIFF_ID
        image = await site.pull(f"{front.host}/{ordinary}", mode="full")
        assert site.lazy_layers(image) == [""]
        assert whole(site) == honest(tmp_path)
        assert not site.store.damaged(image)
        assert site.store.percent(image) is None


@pytest.mark.logs("is not used")
async def test_an_index_that_is_none_is_not_used(
    tmp_path: Path, registry: Registry, front: Proxy, ordinary: str
) -> None:
    site = Site(tmp_path, index=False)
    publish(registry, ordinary, site, other_document(tmp_path))
    async with site.opened():
        image = await site.pull(f"{front.host}/{ordinary}")
        assert site.lazy_layers(image) == [""]


async def test_tokens_that_expire_while_a_layer_is_read(tmp_path: Path) -> None:
    content = noise(11, 400_000)
    archive = tars.archive(tars.directory(b"./"), tars.entry(b"f", data=content))
    blob = lazy.estargz(archive, chunk_size=64 << 10)
    layout = OciLayout(tmp_path / "image")
    layout.blob(blob.data, blob.layer.media_type)
    manifest = layout.manifest([msgspec.to_builtins(blob.layer)], [blob.diff_id])
    layout.tag("v1", manifest)
    with Registry(tmp_path / "registry", auth="token") as registry, Proxy(registry.port) as front:
        tokens = registry.tokens
        assert tokens
        registry.copy(f"oci:{layout.path}:v1", "open/app:v1")
        challenge = f'Bearer realm="{tokens.url}",service="test",error="invalid_token"'
        site = Site(tmp_path)
        async with site.opened():
            image = await site.pull(f"{front.host}/open/app:v1")
            assert site.lazy_layers(image) == ["estargz"]
            await site.client.fetch(blob.diff_id, ((0, 10),))
            asked = len(tokens.asked)
            await site.client.fetch(blob.diff_id, ((100_000, 10),))
            assert len(tokens.asked) == asked
            front.on("/blobs/", faults.status(401, WWW_Authenticate=challenge), times=1)
            await site.client.complete(blob.diff_id)
            assert len(tokens.asked) == asked + 1
            assert whole(site, blob.diff_id)[: len(content)] == content


# --- layers that need each other ---------------------------------------------------------


def converted(archives: list[bytes]) -> list[tuple[bytes, Any, str]]:
    """The layers as eStargz."""
    blobs = [lazy.estargz(archive, chunk_size=64 << 10) for archive in archives]
    return [(blob.data, blob.layer, blob.diff_id) for blob in blobs]


async def test_a_link_into_a_lower_lazy_layer_brings_both(
    tmp_path: Path, registry: Registry, layout: OciLayout, front: Proxy, name: str
) -> None:
    lower = tars.archive(
        tars.directory(b"./", mtime=5),
        tars.directory(b"d", mtime=6),
        tars.entry(b"d/file", data=noise(5, 200_000), mode=0o4711, uid=3, mtime=7),
        tars.entry(b"d/other", data=noise(6, 100_000), mtime=8),
    )
    upper = tars.archive(
        tars.directory(b"./", mtime=5),
        tars.directory(b"d", mtime=9),
        tars.entry(b"d/own", data=noise(7, 50_000), mtime=9),
        tars.entry(b"d/link", b"1", link=b"d/file"),
        tars.entry(b"d/second", b"1", link=b"d/link"),
    )
    alone = tars.archive(
        tars.directory(b"./", mtime=5), tars.entry(b"alone", data=noise(8, 300_000), mtime=1)
    )
    blobs = converted([lower, alone, upper])
    pushed = push_blobs(registry, layout, name, blobs)
    site = Site(tmp_path)
    async with site.opened():
        image = await site.pull(f"{front.host}/{pushed}")
        assert all(site.lazy_layers(image))
        complete = [site.store.layers.present(diff_id).complete for diff_id in image.diff_ids]
        assert complete == [True, False, True]
        # What is above them is as a container sees it when the rest is here, too.
        await site.client.complete(image.diff_ids[1])
        images = site.store.rootfs_layers(image)
        assert not any(found.incomplete for found in images)
        # The archives' contents, without what eStargz adds.
        reference = umoci_unpack([lower, alone, upper], tmp_path / "umoci")
        with mounted_stack(images, tmp_path / "mounts") as root:
            assert tree_diff(root, reference) == []


async def test_links_from_layer_to_layer(
    tmp_path: Path, registry: Registry, layout: OciLayout, front: Proxy, name: str
) -> None:
    content = noise(9, 200_000)
    archives = [
        tars.archive(tars.directory(b"./"), tars.entry(b"a", data=content)),
        tars.archive(tars.entry(b"b", b"1", link=b"a"), tars.entry(b"x", data=noise(10, 90_000))),
        tars.archive(tars.entry(b"c", b"1", link=b"b"), tars.entry(b".wh.a")),
    ]
    pushed = push_blobs(registry, layout, name, converted(archives))
    site = Site(tmp_path)
    async with site.opened():
        image = await site.pull(f"{front.host}/{pushed}")
        assert all(site.lazy_layers(image))
        with mounted_stack(site.store.rootfs_layers(image), tmp_path / "mounts") as root:
            assert sorted(os.listdir(root)) == ["b", "c", "x"]
            assert (root / "b").read_bytes() == (root / "c").read_bytes() == content


# --- another image that claims the same layer ----------------------------------------------


def mounted_files(site: Site, image: Image) -> Callable[[], Path]:
    """Mounts an image's one layer as the daemon does, in a thread; its files."""

    def device(diff_id: Digest) -> Device:
        return trio.from_thread.run(site.client.device, diff_id)

    rootfs = Rootfs(site.run, None, device)
    return lambda: rootfs.layer(site.store.rootfs_layers(image)[0])


@pytest.mark.logs("is fetched once more")
@pytest.mark.parametrize("reachable", [True, False])
@pytest.mark.parametrize("method", ["fuse", "fanotify"])
@pytest.mark.parametrize("make", [lazy.estargz, lazy.zstd_chunked])
async def test_an_image_that_claims_the_content_of_another(
    tmp_path: Path,
    registry: Registry,
    front: Proxy,
    layout: OciLayout,
    name: str,
    make: Callable[[bytes], lazy.LazyBlob],
    method: Method,
    reachable: bool,
) -> None:
    good = make(tars.archive(tars.entry(b"f", data=b"good" * 100_000)))
    evil = make(tars.archive(tars.entry(b"f", data=b"evil" * 200_000)))
    names = [
        push_blobs(registry, layout, f"{name}/{n}", [(blob.data, blob.layer, good.diff_id)])
        for n, blob in enumerate((evil, good))
    ]
    site = Site(tmp_path, method)
    async with site.opened():
        try:
            claimed = await site.pull(f"{front.host}/{names[0]}")
            before = await trio.to_thread.run_sync(mounted_files(site, claimed))
            with (before / "f").open("rb", buffering=0) as file:
                seen = await trio.to_thread.run_sync(file.read, 4)
                assert seen == b"evil"
                if not reachable:
                    front.on("/", faults.cut_after(0))
                image = await site.pull(f"{registry.host}/{names[1]}")
                # Who reads the wrong one still does, or fails.
                try:
                    seen += await trio.to_thread.run_sync(file.read)
                except OSError as error:
                    assert error.errno == errno.EIO
                assert set(seen) == set(b"evil")
            after = await trio.to_thread.run_sync(mounted_files(site, image))
            assert (after / "f").read_bytes() == b"good" * 100_000
            assert not site.store.damaged(image) and not site.store.incomplete(image)
        finally:
            detach(site.run)
    # The kernel lets go of a device a moment after its mount is gone.
    with trio.fail_after(10):
        await site.client.end()
        while (site.run / PID_FILE).exists():
            await trio.sleep(0.02)
            await site.client.end()


def _setuid(toc: dict[str, Any]) -> None:
    toc["entries"][0]["mode"] |= 0o4000


def _hide(toc: dict[str, Any]) -> None:
    del toc["entries"][1]


def _swap(toc: dict[str, Any]) -> None:
    first, second = toc["entries"][:2]
    first["name"], second["name"] = second["name"], first["name"]


def _nothing(toc: dict[str, Any]) -> None:
    toc["entries"].clear()


@pytest.mark.logs("is fetched once more|is another in the layer|the layer has no")
@pytest.mark.parametrize("lie", [_setuid, _hide, _swap, _nothing])
@pytest.mark.parametrize("mode", ["lazy", "full"])
async def test_a_table_that_lies_is_believed_for_no_other_image(
    tmp_path: Path,
    registry: Registry,
    front: Proxy,
    layout: OciLayout,
    name: str,
    lie: lazy.Edit,
    mode: Mode,
) -> None:
    """Of zstd:chunked, since its table is no part of what the diff_id stands for."""
    files = {"a": noise(1, 3000), "b": noise(2, 3000), "c": noise(3, 3000)}
    archive = tars.archive(*(tars.entry(n.encode(), data=files[n]) for n in files))
    good, evil = lazy.zstd_chunked(archive), lazy.zstd_chunked(archive, edit=lie)
    assert good.diff_id == evil.diff_id and good.data != evil.data
    good_name, evil_name = (
        push_blobs(registry, layout, f"{name}/{n}", [(blob.data, blob.layer, blob.diff_id)])
        for n, blob in enumerate((good, evil))
    )
    site = Site(tmp_path)

    def seen() -> list[tuple[bytes, int, bytes]]:
        layer = site.store.layers.present(good.diff_id)
        data = contents(layer.data)
        entries = read_index(layer.index)
        return [(e.path, e.mode & 0o7777, data[e.offset :][: e.size]) for e in entries]

    async with site.opened():
        image = await site.pull(f"{front.host}/{evil_name}")
        assert site.lazy_layers(image) == ["zstd:chunked"]
        image = await site.pull(f"{front.host}/{good_name}", mode=mode)
        assert site.lazy_layers(image) == [""]
        assert not site.store.damaged(image)
        assert seen() == [(n.encode(), 0o644, files[n]) for n in files]


@pytest.mark.logs("is fetched once more|is another in the layer")
@pytest.mark.parametrize("make", [lazy.estargz, lazy.zstd_chunked])
async def test_a_table_that_lies_is_found_out(
    tmp_path: Path,
    registry: Registry,
    front: Proxy,
    layout: OciLayout,
    name: str,
    make: Callable[..., lazy.LazyBlob],
) -> None:
    blob = make(tars.archive(tars.entry(b"f", data=noise(1, 3000))), edit=_setuid)
    reference = push_blobs(registry, layout, name, [(blob.data, blob.layer, blob.diff_id)])
    site = Site(tmp_path)
    async with site.opened():
        image = await site.pull(f"{front.host}/{reference}")
        with pytest.raises(LayerServerFailed, match="'/f' is another in the layer"):
            await site.client.complete(blob.diff_id)
        assert "mode=full" in (await site.told("refused")).sentence
        assert site.store.damaged(image) == (blob.layer.content,)
        # It is not believed a second time; but the archive is the one that the image names.
        image = await site.pull(f"{front.host}/{reference}")
        assert site.lazy_layers(image) == [""]
        assert not site.store.damaged(image)
        (entry, *_) = read_index(site.store.layers.present(blob.diff_id).index)
        assert entry.mode & 0o7777 == 0o644


def come_in(front: Proxy, pattern: str, count: int) -> bool:
    """Wait, outside of the event loop, for so many requests; whether they came."""
    deadline = time.monotonic() + 10
    while len(front.paths(pattern)) < count:
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.01)
    return True


@pytest.mark.parametrize("method", ["fuse", "fanotify"])
@pytest.mark.parametrize("good", [True, False])
async def test_what_is_wanted_first_comes_while_the_layer_is_made(
    tmp_path: Path,
    front: Proxy,
    registry: Registry,
    layout: OciLayout,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    method: Method,
    good: bool,
) -> None:
    first = tars.entry(b"first", data=noise(1, 100_000))
    rest = tars.entry(b"rest" if good else b"first/rest", data=noise(2, 100_000))
    blob = lazy.estargz(tars.archive(first, lazy.PREFETCH, rest))
    pushed = push_blobs(registry, layout, name, [(blob.data, blob.layer, blob.diff_id)])
    site = Site(tmp_path, method)
    make = build_tree
    directory = site.root / "layers" / blob.diff_id.removeprefix("sha256:")

    def make_late(*arguments: Any) -> Any:
        # Footer, table, and what comes before the landmark.
        assert come_in(front, f"/blobs/{blob.layer.digest}", 3)
        return make(*arguments)

    monkeypatch.setattr("store.describer.build_tree", make_late)
    async with site.opened():
        if good:
            image = await site.pull(f"{front.host}/{pushed}")
            assert site.store.incomplete(image) == (blob.diff_id,)
        else:
            with pytest.raises(InvalidLayer, match="leads through"):
                await site.pull(f"{front.host}/{pushed}")
            assert not directory.exists()
            with trio.fail_after(5):
                while True:
                    if not (await site.client.status()).layers:
                        break
                    await trio.sleep(0.02)
        assert len(front.paths(f"/blobs/{blob.layer.digest}")) == 3


async def test_the_same_layer_from_two_registries_is_one(
    tmp_path: Path, registry: Registry, front: Proxy, layout: OciLayout, name: str
) -> None:
    blob = lazy.estargz(tars.archive(tars.entry(b"f", data=noise(1, 200_000))))
    pushed = push_blobs(registry, layout, name, [(blob.data, blob.layer, blob.diff_id)])
    site = Site(tmp_path)
    async with site.opened():
        await site.pull(f"{front.host}/{pushed}")
        image = await site.pull(f"{registry.host}/{pushed}")
        assert site.store.incomplete(image) == (blob.diff_id,)


# --- being interrupted -------------------------------------------------------------------


@pytest.fixture
def two_layers(registry: Registry, layout: OciLayout, name: str) -> tuple[str, list[Any]]:
    """An image of two lazy layers behind the host, and the layers."""
    archives = [tars.archive(tars.entry(b"f%d" % n, data=noise(n, 200_000))) for n in range(2)]
    blobs = converted(archives)
    return push_blobs(registry, layout, name, blobs), blobs


async def test_a_lazy_layer_does_not_wait_for_those_that_come_in_full(
    tmp_path: Path, registry: Registry, front: Proxy, layout: OciLayout, name: str
) -> None:
    archives = [tars.archive(tars.entry(b"f%d" % n, data=noise(n, 50_000))) for n in range(5)]
    full = [compress(archive, GZIP) for archive in archives[:-1]]
    lazily = converted(archives[-1:])
    blobs: list[Any] = [
        (blob, Descriptor(GZIP, digest(blob), len(blob)), digest(archive))
        for blob, archive in zip(full, archives, strict=False)
    ]
    pushed = push_blobs(registry, layout, name, blobs + lazily)
    table = f"/blobs/{lazily[0][1].digest}"

    def when_the_other_was_asked_for(exchange: Exchange) -> None:
        exchange.forward() if come_in(front, table, 1) else exchange.answer(500)

    for _, layer, _ in blobs:
        front.on(f"/blobs/{layer.digest}", when_the_other_was_asked_for)
    site = Site(tmp_path)
    async with site.opened():
        image = await site.pull(f"{front.host}/{pushed}")
        assert list(map(bool, site.lazy_layers(image))) == [False, False, False, False, True]


def nothing_half_done(site: Site) -> None:
    assert site.store.images.names() == []
    assert site.pulls.progress() == [] and site.pulls.active() == []
    for kept in ("ingest", "layers/tmp"):
        assert os.listdir(site.root / kept) == []
    for path in (site.root / "layers").glob("*/layer.json"):
        assert site.store.layers.usable(Digest(f"sha256:{path.parent.name}"))


@pytest.mark.parametrize("stalls", [0, 1])
async def test_a_pull_that_is_interrupted_leaves_nothing_half_done(
    tmp_path: Path, front: Proxy, two_layers: tuple[str, list[Any]], stalls: int
) -> None:
    name, blobs = two_layers
    site = Site(tmp_path)
    async with site.opened():
        front.on(f"/blobs/{blobs[stalls][1].digest}", faults.stall)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(site.pull, f"{front.host}/{name}")
            await until(lambda: bool(front.paths(f"/blobs/{blobs[stalls][1].digest}")))
            other = Digest(blobs[1 - stalls][2])
            await until(lambda: site.store.layers.get(other) is not None)
            begin = trio.current_time()
            nursery.cancel_scope.cancel()
        assert trio.current_time() - begin < 1
        nothing_half_done(site)
        front.heal()
        front.seen.clear()
        image = await site.pull(f"{front.host}/{name}")
        assert all(site.lazy_layers(image))
        # What had arrived is used.
        assert not front.paths(f"/blobs/{blobs[1 - stalls][1].digest}")
        for diff_id in image.diff_ids:
            await site.client.complete(diff_id)
        assert site.store.percent(image) is None


def stall_in(front: Proxy, end: int) -> faults.Fault:
    """Answer what is asked for behind ``end``, and nothing before."""

    def fault(exchange: Exchange) -> None:
        start = front.seen[-1].headers["Range"].removeprefix("bytes=").partition("-")[0]
        if int(start) < end:
            faults.stall(exchange)
        else:
            exchange.forward()

    return fault


async def test_a_pull_that_is_interrupted_while_it_brings_contents(
    tmp_path: Path, registry: Registry, layout: OciLayout, front: Proxy, name: str
) -> None:
    lower = tars.archive(tars.entry(b"a", data=noise(1, 500_000)))
    upper = tars.archive(tars.entry(b"b", b"1", link=b"a"))
    blobs = converted([lower, upper])
    pushed = push_blobs(registry, layout, name, blobs)
    site = Site(tmp_path, read_seconds=30.0)
    async with site.opened():
        front.on(f"/blobs/{blobs[0][1].digest}", stall_in(front, 400_000))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(site.pull, f"{front.host}/{pushed}")
            await until(lambda: len(front.paths(f"/blobs/{blobs[0][1].digest}")) >= 3)
            nursery.cancel_scope.cancel()
        nothing_half_done(site)
        front.heal()
        image = await site.pull(f"{front.host}/{pushed}")
        assert site.store.complete(image.diff_ids)


async def test_how_far_a_full_pull_of_an_incomplete_layer_is(
    tmp_path: Path, registry: Registry, layout: OciLayout, front: Proxy, name: str
) -> None:
    (blob,) = converted([tars.archive(tars.entry(b"a", data=noise(1, 900_000)))])
    pushed = push_blobs(registry, layout, name, [blob])
    site = Site(tmp_path, read_seconds=30.0)
    async with site.opened():
        image = await site.pull(f"{front.host}/{pushed}")
        await site.client.fetch(image.diff_ids[0], ((0, 100_000),))
        here = site.store.percent(image)
        assert here and here > 5
        front.on("/blobs/", faults.stall)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: site.pull(image.name, mode="full"))
            await until(lambda: [pull.percent for pull in site.pulls.progress()] == [here])
            nursery.cancel_scope.cancel()


async def test_two_pulls_at_once_are_one(
    tmp_path: Path, front: Proxy, two_layers: tuple[str, list[Any]]
) -> None:
    name, blobs = two_layers
    site = Site(tmp_path)
    images = []

    async def pull(**request: Any) -> None:
        images.append(await site.pull(f"{front.host}/{name}", **request))

    async with site.opened():
        await pull()
        once = len(front.seen)
        site.forget(images.pop())
        front.seen.clear()
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(pull)
        assert len(front.seen) == once
        assert len({image.pulled_ns for image in images}) == 1
        site.forget(images.pop())
        front.seen.clear()
        async with trio.open_nursery() as nursery:
            for number in range(3):
                nursery.start_soon(lambda n: pull(as_name=f"name{n}"), number)
        for _, layer, _ in blobs:
            asked = [request.headers["Range"] for request in front.paths(f"/blobs/{layer.digest}")]
            assert len(asked) == len(set(asked))
        assert len(site.store.images.names()) == 3
