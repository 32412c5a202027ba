"""Pulling from a real registry: right images, wrong ones, and everything that can happen
on the way."""

import errno
import gzip
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import trio.testing

from store import ballast
from store.cas import Digest, parse_digest
from store.config import HostConfig, StoreConfig
from store.errors import (
    BlobNotFound,
    CorruptContent,
    DigestMismatch,
    ImageNotFound,
    InvalidLayer,
    InvalidManifest,
    InvalidReference,
    LimitExceeded,
    NoMatchingPlatform,
    RegistryError,
    RegistryUnreachable,
    SizeMismatch,
    StoreError,
    UnsupportedMediaType,
)
from store.events import EventLog
from store.index import read_index
from store.platform import parse_platform
from store.pull import PullRequest, Pulls
from store.store import Store
from store.unpack import LayerLimits
from tests.store.conftest import QUICK
from tests.support import proxy as faults
from tests.support import tars
from tests.support.layouts import (
    CONFIG,
    GZIP,
    INDEX,
    MANIFEST,
    PLAIN,
    ZSTD,
    Descriptor,
    OciLayout,
    busybox_layout,
    sha256,
    tar_of,
)
from tests.support.proxy import Endless, Proxy
from tests.support.registry import Registry
from tests.support.stored import stored
from tools.registry import free_port

FILES = {"etc/": b"", "etc/motd": b"hello\n", "bin/": b"", "bin/x": bytes(100_000)}


@dataclass
class Pushed:
    """An image in the registry; ``name`` goes behind the host."""

    name: str
    layout: OciLayout
    descriptor: Descriptor

    @property
    def layers(self) -> list[Descriptor]:
        """The layers' descriptors."""
        manifest = json.loads(self.layout.blob_path(self.descriptor).read_bytes())
        layers: list[Descriptor] = manifest["layers"]
        return layers


@pytest.fixture
def push(
    layout: OciLayout, registry: Registry, request: pytest.FixtureRequest
) -> Callable[[Descriptor], Pushed]:
    """Push an image of the layout to a repository of this test's own."""
    name = "pull/" + "".join(c if c.isalnum() else "-" for c in request.node.name.lower()).strip(
        "-"
    )
    while "--" in name:
        name = name.replace("--", "-")

    def pushed(descriptor: Descriptor) -> Pushed:
        reference = registry.push(layout, descriptor, name, "v1")
        return Pushed(reference.partition("/")[2], layout, descriptor)

    return pushed


@pytest.fixture
def big(layout: OciLayout, push: Callable[[Descriptor], Pushed]) -> Pushed:
    """An image of one layer of 6 MiB that can't be compressed."""
    return push(layout.image(tar_of({"noise": os.urandom(6 << 20)})))


def no_half_things(store: Store) -> None:
    """No temporary file, no half a layer, no image."""
    assert store.images.names() == []
    assert os.listdir(store.root / "ingest") == []
    assert os.listdir(store.root / "layers" / "tmp") == []


async def refused(
    store: Store, source: str, error: type[StoreError], why: str, **request: Any
) -> StoreError:
    """Expect a pull to fail so, and to leave everything as it was."""
    before = list(store.images), stored(store.root)
    with pytest.raises(error, match=why) as caught:
        await Pulls(store).pull(PullRequest(source, **request))
    assert (list(store.images), stored(store.root)) == before
    assert "\n" not in caught.value.sentence
    return caught.value


@pytest.mark.parametrize("kind", [GZIP, ZSTD, PLAIN])
async def test_pull(
    store: Store,
    registry: Registry,
    layout: OciLayout,
    push: Callable[[Descriptor], Pushed],
    kind: str,
) -> None:
    archives = [tar_of(FILES), tar_of({"etc/": b"", "etc/motd": b"changed\n"})]
    pushed = push(layout.image(*archives, kind=kind, container={"Env": ["A=1"]}))
    pulls = Pulls(store)
    image = await pulls.pull(PullRequest(f"{registry.host}/{pushed.name}"))
    assert image.name == f"{registry.host}/{pushed.name}"
    assert image.source == f"docker://{registry.host}/{pushed.name}"
    assert image.digest == pushed.descriptor["digest"] and image.index_digest is None
    assert image.config.config.env == ("A=1",) and str(image.platform) == "linux/amd64"
    assert image.size == sum(store.cas.stat(blob) for blob in image.blobs())
    assert image.diff_ids == tuple(map(sha256, archives))
    assert store.images.get(pushed.descriptor["digest"]) == image
    assert abs(image.pulled_ns - time.time_ns()) < 60e9
    manifest = pushed.layout.blob_path(pushed.descriptor).read_bytes()
    assert store.cas.read(image.digest) == manifest
    for blob in image.blobs():
        store.cas.verify(blob)
    assert len(store.rootfs_layers(image)) == 2
    layer = store.layers.get(image.diff_ids[0])
    assert layer and [entry.path for entry in read_index(layer.index)] == [
        b"etc",
        b"etc/motd",
        b"bin",
        b"bin/x",
    ]
    assert pulls.progress() == [] and pulls.active() == []
    events = [json.loads(line)["event"] for line in store.events.since(0)[0]]
    assert events == ["pull.start", "pull.done"]


async def test_pull_what_skopeo_pushed(store: Store, registry: Registry, tmp_path: Path) -> None:
    busybox_layout(tmp_path / "busybox")
    registry.copy(f"oci:{tmp_path}/busybox:latest", "busybox:1")
    image = await Pulls(store).pull(PullRequest(f"docker://{registry.host}/busybox:1"))
    layer = store.layers.get(image.diff_ids[0])
    assert layer and layer.data_size > 500_000


async def test_as_name(store: Store, registry: Registry, big: Pushed) -> None:
    source = f"{registry.host}/{big.name}"
    image = await Pulls(store).pull(PullRequest(source, as_name="mine"))
    assert store.images.names() == ["docker.io/library/mine:latest"]
    assert image.source == f"docker://{source}"
    for name in ("", "Mine", f"mine@{image.digest}"):
        with pytest.raises(InvalidReference):
            await Pulls(store).pull(PullRequest(source, as_name=name))


async def test_names_that_the_tree_would_hide(
    store: Store, config: StoreConfig, proxy: Proxy, big: Pushed, tmp_path: Path
) -> None:
    source = f"{proxy.host}/{big.name}"
    await refused(store, source, InvalidReference, "hidden behind", as_name="README/x:1")
    assert not proxy.seen
    mirrored = msgspec.structs.replace(
        config, registries={"README": HostConfig(mirrors=(proxy.host,))}
    )
    other = Store(tmp_path / "mirrored", mirrored, EventLog())
    await refused(other, f"README/{big.name}", InvalidReference, "as=NAME")
    image = await Pulls(other).pull(PullRequest(f"README/{big.name}", as_name="x"))
    assert image.name == "docker.io/library/x:latest"
    other.close()


async def test_layout(store: Store, layout: OciLayout) -> None:
    layout.tag("v1", layout.image(tar_of(FILES)))
    source = f"oci:{layout.path}"
    image = await Pulls(store).pull(PullRequest(source))
    assert image.name == "localhost/layout:v1" and image.source == source
    await Pulls(store).pull(PullRequest(f"{source}:v1", as_name="b.example/c:d"))
    assert store.images.names() == ["b.example/c:d", "localhost/layout:v1"]


async def test_by_digest(store: Store, registry: Registry, big: Pushed) -> None:
    name = f"{registry.host}/{big.name.partition(':')[0]}@{big.descriptor['digest']}"
    image = await Pulls(store).pull(PullRequest(name))
    assert image.name == name


async def test_index(
    store: Store,
    registry: Registry,
    layout: OciLayout,
    push: Callable[[Descriptor], Pushed],
) -> None:
    entries = [
        {
            **layout.image(tar_of({cpu: b""}), architecture=cpu),
            "platform": {"os": "linux", "architecture": cpu},
        }
        for cpu in ("s390x", "amd64", "arm64")
    ]
    pushed = push(layout.index(*entries))
    source = f"{registry.host}/{pushed.name}"
    pulls = Pulls(store)
    arm = await pulls.pull(PullRequest(source, parse_platform("linux/arm64"), "arm"))
    assert arm.digest == entries[2]["digest"] and str(arm.platform) == "linux/arm64"
    assert arm.index_digest == pushed.descriptor["digest"]
    assert arm.index_digest and store.cas.contains(arm.index_digest)
    own = await pulls.pull(PullRequest(source, parse_platform("linux/amd64")))
    assert own.digest == entries[1]["digest"]
    await refused(
        store,
        source,
        NoMatchingPlatform,
        "nothing for linux/ppc64le; it has linux/amd64, linux/arm64, linux/s390x",
        platform=parse_platform("linux/ppc64le"),
    )


async def test_other_platform_without_index(
    store: Store, registry: Registry, layout: OciLayout, push: Callable[[Descriptor], Pushed]
) -> None:
    pushed = push(layout.image(tar_of(FILES), architecture="s390x"))
    await refused(
        store, f"{registry.host}/{pushed.name}", NoMatchingPlatform, "platform linux/s390x"
    )


async def test_unknown_image(store: Store, registry: Registry) -> None:
    await refused(store, f"{registry.host}/pull/none", ImageNotFound, "pull/none:latest")


async def test_registry_down(store: Store) -> None:
    await refused(store, f"127.0.0.1:{free_port()}/x", RegistryUnreachable, "can't be reached")


@pytest.mark.parametrize("source", ["", "Not a name", "oci:relative", "docker://"])
async def test_no_names(store: Store, source: str) -> None:
    await refused(store, source, InvalidReference, "not an image")


async def test_layers_of_one_image_and_equal_ones_are_fetched_once(
    store: Store, proxy: Proxy, layout: OciLayout, push: Callable[[Descriptor], Pushed]
) -> None:
    base, empty = tar_of(FILES), tar_of({})
    pushed = push(layout.image(base, empty, tar_of({"a": b""}), empty))
    image = await Pulls(store).pull(PullRequest(f"{proxy.host}/{pushed.name}"))
    assert len(image.layers) == 4
    asked = [seen.path for seen in proxy.paths("/blobs/")]
    assert len(asked) == len(set(asked)) == 4, "three layers and the configuration"


async def test_again_asks_for_the_manifest_only(store: Store, proxy: Proxy, big: Pushed) -> None:
    for _ in range(2):
        await Pulls(store).pull(PullRequest(f"{proxy.host}/{big.name}"))
    assert len(proxy.paths("/blobs/")) == 2 and len(proxy.paths("/manifests/")) == 2


async def test_a_missing_blob_comes_again(store: Store, proxy: Proxy, big: Pushed) -> None:
    request = PullRequest(f"{proxy.host}/{big.name}")
    image = await Pulls(store).pull(request)
    store.cas.delete(image.layers[0].content)
    await Pulls(store).pull(request)
    store.cas.verify(image.layers[0].content)


async def test_a_missing_layer_is_made_from_its_blob(
    store: Store, proxy: Proxy, big: Pushed
) -> None:
    request = PullRequest(f"{proxy.host}/{big.name}")
    image = await Pulls(store).pull(request)
    store.layers.remove(image.diff_ids[0])
    assert store.damaged(image) == (image.layers[0].content,)
    await Pulls(store).pull(request)
    assert store.layers.get(image.diff_ids[0]) and store.damaged(image) == ()
    assert len(proxy.paths(big.layers[0]["digest"])) == 1


@pytest.mark.logs("damaged")
async def test_a_damaged_blob_is_mended(store: Store, proxy: Proxy, big: Pushed) -> None:
    request = PullRequest(f"{proxy.host}/{big.name}")
    image = await Pulls(store).pull(request)
    blob = image.layers[0].content
    path = store.cas.path(blob)
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.write(b"damage")
    # Found when the layer is made anew …
    store.layers.remove(image.diff_ids[0])
    await Pulls(store).pull(request)
    store.cas.verify(blob)
    assert store.layers.get(image.diff_ids[0]) and store.damaged(image) == ()
    # … or by whoever reads it.
    store.cas.path(blob).chmod(0o600)
    store.cas.path(blob).write_bytes(b"damage")
    with pytest.raises(CorruptContent):
        store.cas.open(blob)
    assert store.damaged(image) == (blob,)
    await Pulls(store).pull(request)
    assert store.damaged(image) == ()


async def test_layers_and_configurations_that_are_too_long_are_not_asked_for(
    store: Store, proxy: Proxy, layout: OciLayout
) -> None:
    layer = {"mediaType": GZIP, "digest": "sha256:" + "1" * 64, "size": 1 << 40}
    config = {**layout.document({}, CONFIG), "size": 1 << 30}
    document = {"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": []}
    for number, (change, why) in enumerate(
        (({"layers": [layer]}, "1099511627776 bytes"), ({}, "longer than"))
    ):
        content = json.dumps({**document, **change}).encode()
        proxy.on(f"/manifests/v{number}", faults.body(content, MANIFEST))
        await refused(store, f"{proxy.host}/x:v{number}", LimitExceeded, why)
    assert not proxy.paths("/blobs/")


@pytest.mark.logs(r"is missing or damaged")
@pytest.mark.parametrize("noticed", [True, False])
async def test_a_damaged_layer_is_mended(
    store: Store, proxy: Proxy, big: Pushed, noticed: bool
) -> None:
    request = PullRequest(f"{proxy.host}/{big.name}")
    image = await Pulls(store).pull(request)
    layer = store.layers.get(image.diff_ids[0])
    assert layer and layer.data
    (data,) = layer.data.paths
    os.truncate(data, 4096)
    if noticed:
        with pytest.raises(CorruptContent, match="pull the image again"):
            store.rootfs_layers(image)
        assert store.damaged(image) == (image.layers[0].content,)
    await Pulls(store).pull(request)
    assert store.damaged(image) == () and store.rootfs_layers(image)
    assert data.stat().st_size == layer.data_size
    assert len(proxy.paths("/blobs/" + image.layers[0].digest)) == 1, "the blob is here"


# --- connections that break -----------------------------------------------------------


async def test_a_blob_that_breaks_off_is_continued(store: Store, proxy: Proxy, big: Pushed) -> None:
    blob = big.layers[0]["digest"]
    proxy.on(blob, faults.cut_after(2_000_000), times=2)
    proxy.on(blob, faults.status(503), times=2)
    await Pulls(store).pull(PullRequest(f"{proxy.host}/{big.name}"))
    ranges = [seen.headers.get("Range") for seen in proxy.paths(blob)]
    assert ranges == [None, "bytes=2000000-", "bytes=4000000-", "bytes=4000000-", "bytes=4000000-"]


async def test_a_source_that_can_not_continue(store: Store, proxy: Proxy, big: Pushed) -> None:
    blob = big.layers[0]["digest"]
    proxy.on(blob, faults.cut_after(2_000_000), times=1)
    proxy.on(blob, faults.ignore_range)
    image = await Pulls(store).pull(PullRequest(f"{proxy.host}/{big.name}"))
    store.cas.verify(image.layers[0].content)


async def test_a_blob_that_stalls_is_asked_for_again(
    store: Store, proxy: Proxy, big: Pushed
) -> None:
    proxy.on(big.layers[0]["digest"], faults.stall_after(3_000_000), times=1)
    await Pulls(store).pull(PullRequest(f"{proxy.host}/{big.name}"))
    assert proxy.seen[-1].headers["Range"] == "bytes=3000000-"


async def test_a_registry_that_stops_mid_blob(store: Store, proxy: Proxy, big: Pushed) -> None:
    blob = big.layers[0]["digest"]
    proxy.on(blob, faults.cut_after(2_000_000), times=1)
    proxy.on(blob, faults.status(503), times=QUICK.attempts)
    source = f"{proxy.host}/{big.name}"
    with pytest.raises(RegistryError, match=blob) as caught:
        await Pulls(store).pull(PullRequest(source))
    assert source in caught.value.sentence
    assert store.images.names() == [] and os.listdir(store.root / "layers" / "tmp") == []
    assert len(list(store.cas)) == 2, "manifest and configuration stay for the next attempt too"
    await Pulls(store).pull(PullRequest(source))
    assert proxy.seen[-1].headers["Range"] == "bytes=2000000-", "what had arrived is used"
    assert os.listdir(store.root / "ingest") == []
    events = [json.loads(line)["event"] for line in store.events.since(0)[0]]
    assert events == ["pull.start", "pull.failed", "pull.start", "pull.done"]


@pytest.mark.logs("fetching it anew")
async def test_a_partial_that_was_damaged_is_fetched_anew(
    store: Store, registry: Registry, big: Pushed
) -> None:
    partial = store.root / "ingest" / f"{big.layers[0]['digest'][7:]}.partial"
    partial.write_bytes(big.layout.blob_path(big.layers[0]).read_bytes()[:50_000] + bytes(50_000))
    image = await Pulls(store).pull(PullRequest(f"{registry.host}/{big.name}"))
    store.cas.verify(image.layers[0].content)
    assert os.listdir(store.root / "ingest") == []


# --- content that is wrong ------------------------------------------------------------


async def test_wrong_bytes(store: Store, proxy: Proxy, big: Pushed) -> None:
    blob = big.layers[0]["digest"]
    proxy.on(blob, faults.damaged)
    error = await refused(store, f"{proxy.host}/{big.name}", DigestMismatch, f"for {blob} hash to")
    assert big.name in error.sentence
    assert not store.cas.contains(parse_digest(blob))


async def test_wrong_size(
    store: Store, registry: Registry, layout: OciLayout, push: Callable[[Descriptor], Pushed]
) -> None:
    archive = tar_of(FILES)
    blob = layout.blob(gzip.compress(archive), GZIP)
    for change in (-1, 1):
        layer = {**blob, "size": blob["size"] + change}
        pushed = push(layout.manifest([layer], [sha256(archive)]))
        await refused(
            store, f"{registry.host}/{pushed.name}", SizeMismatch, f"bytes for {blob['digest']}"
        )


async def test_wrong_diff_id(
    store: Store, registry: Registry, layout: OciLayout, push: Callable[[Descriptor], Pushed]
) -> None:
    blob = layout.blob(gzip.compress(tar_of(FILES)), GZIP)
    pushed = push(layout.manifest([blob], [sha256(b"another")]))
    error = await refused(
        store, f"{registry.host}/{pushed.name}", DigestMismatch, sha256(b"another")
    )
    assert pushed.name in error.sentence and blob["digest"] in error.sentence
    assert not store.cas.contains(parse_digest(blob["digest"]))


async def test_truncated_gzip(
    store: Store, registry: Registry, layout: OciLayout, push: Callable[[Descriptor], Pushed]
) -> None:
    archive = tar_of(FILES)
    blob = layout.blob(gzip.compress(archive)[:-10], GZIP)
    pushed = push(layout.manifest([blob], [sha256(archive)]))
    error = await refused(store, f"{registry.host}/{pushed.name}", InvalidLayer, "cut off")
    assert blob["digest"] in error.sentence


async def test_one_bad_layer_ends_the_others(
    store: Store, proxy: Proxy, layout: OciLayout, push: Callable[[Descriptor], Pushed]
) -> None:
    good, bad = tar_of({"noise": os.urandom(3 << 20)}), tar_of(FILES)
    layers = [
        layout.blob(gzip.compress(good, 0), GZIP),
        layout.blob(gzip.compress(bad)[:-10], GZIP),
    ]
    pushed = push(layout.manifest(layers, [sha256(good), sha256(bad)]))
    proxy.on(layers[0]["digest"], faults.stall_after(1 << 20))
    with trio.fail_after(2.5):
        await refused(store, f"{proxy.host}/{pushed.name}", InvalidLayer, "cut off")


async def test_a_bomb(
    tmp_path: Path,
    config: StoreConfig,
    registry: Registry,
    layout: OciLayout,
    push: Callable[[Descriptor], Pushed],
) -> None:
    pushed = push(layout.image(tar_of({"zeros": bytes(20 << 20)})))
    limited = msgspec.structs.replace(config, layers=LayerLimits(layer_bytes=10 << 20))
    store = Store(tmp_path / "limited", limited, EventLog())
    await refused(store, f"{registry.host}/{pushed.name}", LimitExceeded, "layer_bytes")
    store.close()


async def test_manifest_of_100_mb(store: Store, proxy: Proxy, big: Pushed) -> None:
    proxy.on("/manifests/", Endless(MANIFEST, announced=True))
    await refused(store, f"{proxy.host}/{big.name}", LimitExceeded, "longer than")


async def test_a_config_that_claims_to_be_huge(
    store: Store, registry: Registry, layout: OciLayout, push: Callable[[Descriptor], Pushed]
) -> None:
    manifest = json.loads(layout.blob_path(layout.image(tar_of(FILES))).read_bytes())
    manifest["config"]["size"] = 100 << 20
    pushed = push(layout.document(manifest, MANIFEST))
    await refused(store, f"{registry.host}/{pushed.name}", LimitExceeded, "configuration")


@pytest.mark.parametrize(
    ("document", "error", "why"),
    [
        (b"rubbish", InvalidManifest, "can't be understood"),
        (b'{"schemaVersion": 1}', UnsupportedMediaType, "schema 1"),
        (b'{"schemaVersion": 2, "mediaType": "text/x"}', UnsupportedMediaType, "text/x"),
        (b'{"schemaVersion": 2, "manifests": [], "layers": []}', InvalidManifest, "neither"),
        (b'{"schemaVersion": 2, "manifests": []}', NoMatchingPlatform, "nothing for"),
    ],
)
async def test_documents_that_are_none(
    store: Store, proxy: Proxy, document: bytes, error: type[StoreError], why: str
) -> None:
    proxy.on("/manifests/", faults.body(document, "application/json"))
    raised = await refused(store, f"{proxy.host}/pull/odd", error, why)
    assert "pull/odd" in raised.sentence


async def test_unknown_layer_type(
    store: Store, registry: Registry, layout: OciLayout, push: Callable[[Descriptor], Pushed]
) -> None:
    layer = layout.blob(b"?", "application/vnd.example.rar")
    pushed = push(layout.manifest([layer], [sha256(b"?")]))
    await refused(store, f"{registry.host}/{pushed.name}", UnsupportedMediaType, "rar")


async def test_diff_ids_that_do_not_match(
    store: Store, registry: Registry, layout: OciLayout, push: Callable[[Descriptor], Pushed]
) -> None:
    layer = layout.blob(gzip.compress(tar_of(FILES)), GZIP)
    pushed = push(layout.manifest([layer], []))
    await refused(store, f"{registry.host}/{pushed.name}", InvalidManifest, "1 layers")


async def test_an_index_in_an_index_in_an_index(store: Store, layout: OciLayout) -> None:
    entry: Descriptor = layout.image(tar_of(FILES))
    for _ in range(6):
        entry = {**layout.index(entry), "mediaType": INDEX}
    layout.tag("v1", entry)
    await refused(store, f"oci:{layout.path}", InvalidManifest, "index of index")


async def test_a_blob_that_the_registry_lost(store: Store, registry: Registry, big: Pushed) -> None:
    registry.blob_file(big.layers[0]["digest"]).unlink()
    await refused(store, f"{registry.host}/{big.name}", BlobNotFound, big.layers[0]["digest"])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 8 MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", path], check=True)
    yield path
    # A test that fails leaves its store open.
    subprocess.run(["umount", "--lazy", path], check=True)


async def test_disk_full(
    small_disk: Path, config: StoreConfig, registry: Registry, big: Pushed
) -> None:
    store = Store(small_disk, config, EventLog())
    error = await refused(store, f"{registry.host}/{big.name}", StoreError, "free some space")
    assert error.errno == errno.ENOSPC
    store.close()
    disk = os.statvfs(small_disk)
    used = (disk.f_blocks - disk.f_bfree) * disk.f_bsize
    assert used < ballast.SIZE + (256 << 10), "it stays full"


# --- what came with an image that is refused ------------------------------------------

BASE = tar_of({"etc/": b"", "noise": os.urandom(3 << 20)})
# Needs an image of its own above others, because it deletes a name.
DELETES = tars.archive(tars.directory(b"etc"), tars.entry(b".wh.noise"))
# The first can't be read; the second fits on no other layer.
CUT = gzip.compress(tar_of(FILES), mtime=0)[:-10]
OWN = tar_of({"own": b""})
DANGLING = tars.archive(tars.entry(b"link", b"1", link=b"nowhere"))


@pytest.fixture
def put(layout: OciLayout, registry: Registry) -> Callable[..., str]:
    """Push an image of archives, and with ``bad`` of a blob as last layer; its path."""

    def push(name: str, *archives: bytes, bad: bytes = b"") -> str:
        layers = [layout.blob(gzip.compress(archive, 0, mtime=0), GZIP) for archive in archives]
        diff_ids = [sha256(archive) for archive in archives]
        if bad:
            layers.append(layout.blob(bad, GZIP))
            diff_ids.append(sha256(bad))
        manifest = layout.manifest(layers, diff_ids, container={"Cmd": [name]})
        return registry.push(layout, manifest, f"refused/{name}", "1").partition("/")[2]

    return push


async def refused_beside_others(pulls: Pulls, source: str) -> None:
    """Expect a pull to be refused for a bad layer."""
    with pytest.raises(InvalidLayer):
        await pulls.pull(PullRequest(source))


def shared_blob(layout: OciLayout) -> Descriptor:
    """The layer with BASE."""
    return layout.blob(gzip.compress(BASE, 0, mtime=0), GZIP)


async def test_complete_layers_of_a_refused_image_go(
    store: Store, registry: Registry, put: Callable[..., str]
) -> None:
    name = put("whole", BASE, DELETES, DANGLING)
    await refused(store, f"{registry.host}/{name}", InvalidLayer, "nowhere")
    assert list(store.cas) == [] and list(store.layers) == []


async def test_what_images_have_stays(
    store: Store, registry: Registry, put: Callable[..., str]
) -> None:
    good = await Pulls(store).pull(PullRequest(f"{registry.host}/{put('good', BASE, DELETES)}"))
    await Pulls(store).pull(PullRequest(f"{registry.host}/{put('other', DELETES)}"))
    bad = put("bad", BASE, DELETES, tar_of(FILES), DANGLING)
    await refused(store, f"{registry.host}/{bad}", InvalidLayer, "nowhere")
    # Of layers that are all here, with a stack that nobody else has; and under a name that is.
    bad = put("stack", DELETES, DELETES, DANGLING)
    await refused(store, f"{registry.host}/{bad}", InvalidLayer, "nowhere", as_name="x")
    await refused(store, f"{registry.host}/{bad}", InvalidLayer, "nowhere", as_name=good.name)
    for blob in good.blobs():
        store.cas.verify(blob)
    assert len(os.listdir(store.root / "layers" / "chains")) == 1 and store.rootfs_layers(good)


async def test_what_containers_need_stays(
    store: Store, registry: Registry, put: Callable[..., str]
) -> None:
    stack = (Digest(sha256(BASE)), Digest(sha256(DELETES)))
    store.images.pinned = lambda: [stack]
    bad = put("bad", BASE, DELETES, DANGLING)
    with pytest.raises(InvalidLayer):
        await Pulls(store).pull(PullRequest(f"{registry.host}/{bad}"))
    assert {layer.diff_id for layer in store.layers} == set(stack)
    assert len(os.listdir(store.root / "layers" / "chains")) == 1


async def test_what_another_pull_wants_stays(
    store: Store, proxy: Proxy, layout: OciLayout, put: Callable[..., str]
) -> None:
    blob, own = shared_blob(layout)["digest"], layout.blob(gzip.compress(OWN, 0, mtime=0), GZIP)
    good, bad = put("good", BASE, OWN), put("bad", BASE, DANGLING)
    proxy.on(own["digest"], faults.stall, times=1)
    pulls = Pulls(store)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pulls.pull, PullRequest(f"{proxy.host}/{good}"))
        await until(lambda: bool(store.layers.get(Digest(sha256(BASE))) and pulls.active()))
        before = stored(store.root)
        await refused_beside_others(pulls, f"{proxy.host}/{bad}")
        assert [progress.state for progress in pulls.progress()] == ["pulling"]
        assert stored(store.root) == before
    assert len(proxy.paths(blob)) == 1
    (image,) = store.images
    assert store.rootfs_layers(image) and set(image.blobs()) == set(store.cas)


async def test_the_last_of_several_that_are_refused_takes_all_away(
    store: Store, proxy: Proxy, layout: OciLayout, put: Callable[..., str]
) -> None:
    """Also what was there already when it began, because another one had brought it."""
    blob = Digest(shared_blob(layout)["digest"])
    first, last = put("first", BASE, bad=CUT), put("last", BASE, bad=CUT[:-1])
    for bad, times in ((CUT, 1), (CUT[:-1], 2)):
        proxy.on(layout.blob(bad, GZIP)["digest"], faults.stall, times=times)
    before = stored(store.root)
    pulls = Pulls(store)
    ended = []

    async def pull(name: str) -> None:
        await refused_beside_others(pulls, f"{proxy.host}/{name}")
        ended.append((name, store.cas.contains(blob)))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(pull, first)
        await until(lambda: store.cas.contains(blob))
        nursery.start_soon(pull, last)
    assert ended == [(first, True), (last, False)]
    assert stored(store.root) == before


async def test_what_another_pull_has_recorded_stays(
    store: Store, proxy: Proxy, layout: OciLayout, put: Callable[..., str]
) -> None:
    good, bad = put("good", BASE), put("bad", BASE, bad=CUT)
    proxy.on(layout.blob(CUT, GZIP)["digest"], faults.stall, times=1)
    pulls = Pulls(store)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(refused_beside_others, pulls, f"{proxy.host}/{bad}")
        await until(lambda: bool(store.layers.get(Digest(sha256(BASE)))))
        image = await pulls.pull(PullRequest(f"{proxy.host}/{good}"))
        assert len(pulls.progress()) == 1
    assert set(image.blobs()) == set(store.cas) and store.rootfs_layers(image)


async def test_a_pull_that_begins_while_another_is_taken_away(
    store: Store, proxy: Proxy, layout: OciLayout, put: Callable[..., str]
) -> None:
    good, bad = put("good", BASE), put("bad", BASE, bad=CUT)
    proxy.on(layout.blob(CUT, GZIP)["digest"], faults.stall, times=1)
    pulls = Pulls(store)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(refused_beside_others, pulls, f"{proxy.host}/{bad}")
        await until(lambda: bool(store.layers.get(Digest(sha256(BASE)))))
        # Blobs are taken away, layers not yet.
        with store.layers._building:
            await until(lambda: not list(store.cas))
            nursery.start_soon(pulls.pull, PullRequest(f"{proxy.host}/{good}"))
            await until(lambda: len(proxy.paths("/manifests/")) == 2)
            await trio.sleep(0.05)
    (image,) = store.images
    assert set(image.blobs()) == set(store.cas) and store.rootfs_layers(image)
    assert {layer.diff_id for layer in store.layers} == set(image.diff_ids)


@pytest.mark.logs("what came with a refused image stays: removing .* failed")
async def test_what_can_not_be_taken_away_is_logged(
    store: Store, registry: Registry, put: Callable[..., str]
) -> None:
    (store.root / "layers" / "chains" / "rubbish").touch()
    with pytest.raises(InvalidLayer, match="nowhere"):
        await Pulls(store).pull(PullRequest(f"{registry.host}/{put('bad', BASE, DANGLING)}"))


# --- several at once, and ends ---------------------------------------------------------


async def test_twice_at_once_is_one_pull(store: Store, proxy: Proxy, big: Pushed) -> None:
    pulls = Pulls(store)
    request = PullRequest(f"{proxy.host}/{big.name}")
    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(pulls.pull, request)
        await trio.testing.wait_all_tasks_blocked()
        assert len(pulls.progress()) == 1
    assert len(proxy.paths("/manifests/")) == 1


async def test_all_who_wait_get_the_error(store: Store, proxy: Proxy) -> None:
    pulls = Pulls(store)
    proxy.on("/manifests/", faults.status(400))
    caught = []

    async def pull() -> None:
        with pytest.raises(RegistryError) as error:
            await pulls.pull(PullRequest(f"{proxy.host}/x"))
        caught.append(error.value.sentence)

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(pull)
    assert len(caught) == 3 and len(proxy.paths("/manifests/")) == 1


async def test_a_layer_of_two_images_is_fetched_once(
    store: Store, proxy: Proxy, registry: Registry, layout: OciLayout
) -> None:
    base = tar_of({"noise": os.urandom(3 << 20)})
    names = []
    for number in (1, 2):
        descriptor = layout.image(base, tar_of({str(number): b""}))
        registry.push(layout, descriptor, f"pull/shared{number}", "v1")
        names.append(f"{proxy.host}/pull/shared{number}:v1")
    shared = json.loads(layout.blob_path(descriptor).read_bytes())["layers"][0]["digest"]
    pulls = Pulls(store)
    async with trio.open_nursery() as nursery:
        for name in names:
            nursery.start_soon(pulls.pull, PullRequest(name))
    assert len(proxy.paths(shared)) == 1
    assert sorted(store.images.names()) == names


async def stalled(pulls: Pulls, bytes_done: int) -> None:
    """Wait until the one layer under way has got this far."""
    await until(lambda: sum(pull.done for pull in pulls.progress()) >= bytes_done)


async def until(condition: Callable[[], bool]) -> None:
    """Wait until something holds."""
    with trio.fail_after(10):
        while True:
            if condition():
                return
            await trio.sleep(0.005)


async def test_progress(store: Store, proxy: Proxy, big: Pushed) -> None:
    blob = big.layers[0]
    proxy.on(blob["digest"], faults.stall_after(3 << 20))
    pulls = Pulls(store)
    name = f"{proxy.host}/{big.name}"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pulls.pull, PullRequest(name))
        await stalled(pulls, 3 << 20)
        (progress,) = pulls.progress()
        assert progress.line() == f"{name} pulling 49% {3 << 20} {blob['size']}"
        (layer,) = progress.layers
        assert layer.digest == blob["digest"]
        await until(lambda: bool(pulls.active()))
        (image,) = pulls.active()
        assert image.name == name and image.layers[0].digest == blob["digest"]
        assert store.cas.contains(image.digest) and name not in store.images
        nursery.cancel_scope.cancel()
    assert pulls.progress() == [] and pulls.active() == []


@pytest.mark.parametrize("where", ["/v2/", "/manifests/", "/blobs/"])
async def test_a_cancelled_pull_ends_at_once(
    store: Store, proxy: Proxy, big: Pushed, where: str
) -> None:
    proxy.on(where + "$" if where == "/v2/" else where, faults.stall)
    pulls = Pulls(store)
    begin = trio.current_time()
    with trio.move_on_after(0.2) as scope:
        await pulls.pull(PullRequest(f"{proxy.host}/{big.name}"))
    assert scope.cancelled_caught and trio.current_time() - begin < 0.8
    assert pulls.progress() == []
    no_half_things(store)
    last = json.loads(store.events.since(0)[0][-1])
    assert (last["event"], last["error"]) == ("pull.failed", "cancelled")


async def test_a_cancelled_pull_is_continued_by_the_next(
    store: Store, proxy: Proxy, big: Pushed
) -> None:
    proxy.on(big.layers[0]["digest"], faults.stall_after(3 << 20), times=1)
    pulls = Pulls(store)
    request = PullRequest(f"{proxy.host}/{big.name}")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pulls.pull, request)
        await stalled(pulls, 3 << 20)
        begin = trio.current_time()
        nursery.cancel_scope.cancel()
    assert trio.current_time() - begin < 0.6
    assert os.listdir(store.root / "layers" / "tmp") == []
    await pulls.pull(request)
    assert proxy.seen[-1].headers["Range"] == f"bytes={3 << 20}-"


async def test_the_next_one_takes_over_from_a_cancelled_caller(
    store: Store, proxy: Proxy, big: Pushed
) -> None:
    proxy.on(big.layers[0]["digest"], faults.stall_after(3 << 20), times=1)
    pulls = Pulls(store)
    request = PullRequest(f"{proxy.host}/{big.name}")
    first = trio.CancelScope()

    async def leader() -> None:
        with first:
            await pulls.pull(request)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(leader)
        await stalled(pulls, 3 << 20)
        nursery.start_soon(pulls.pull, request)
        await trio.testing.wait_all_tasks_blocked(0.01)
        first.cancel()
    assert store.images.names() == [f"{proxy.host}/{big.name}"]
    assert proxy.seen[-1].headers["Range"] == f"bytes={3 << 20}-"


PROGRAM = """
import sys, trio
from pathlib import Path
from store.config import HostConfig, StoreConfig
from store.events import EventLog
from store.pull import PullRequest, Pulls
from store.store import Store
store = Store(Path(sys.argv[1]), StoreConfig(docker_config="/none"), EventLog())
trio.run(Pulls(store).pull, PullRequest(sys.argv[2]))
"""


async def test_a_pull_that_is_killed_is_continued(
    tmp_path: Path, proxy: Proxy, big: Pushed, config: StoreConfig
) -> None:
    blob = big.layers[0]["digest"]
    proxy.on(blob, faults.stall_after(3 << 20), times=1)
    root = tmp_path / "killed"
    command = [sys.executable, "-c", PROGRAM, str(root), f"{proxy.host}/{big.name}"]
    process = await trio.lowlevel.open_process(command)
    partial = root / "ingest" / f"{blob[7:]}.partial"
    await until(lambda: partial.exists() and partial.stat().st_size >= 3 << 20)
    process.kill()
    await process.wait()
    store = Store(root, config, EventLog())
    assert store.images.names() == [] and os.listdir(root / "layers" / "tmp") == []
    image = await Pulls(store).pull(PullRequest(f"{proxy.host}/{big.name}"))
    assert proxy.seen[-1].headers["Range"] == f"bytes={3 << 20}-"
    store.cas.verify(image.layers[0].content)
    store.close()


async def test_leaving_trio_with_a_stalled_pull_does_not_hang(
    tmp_path: Path, proxy: Proxy, big: Pushed
) -> None:
    proxy.on("/blobs/", faults.stall)
    program = PROGRAM.replace(
        "trio.run(Pulls(store).pull, PullRequest(sys.argv[2]))",
        "async def main():\n"
        "    with trio.move_on_after(0.3):\n"
        "        await Pulls(store).pull(PullRequest(sys.argv[2]))\n"
        "trio.run(main)",
    )
    command = [sys.executable, "-c", program, str(tmp_path / "r"), f"{proxy.host}/{big.name}"]
    begin = time.monotonic()
    await trio.run_process(command)
    assert time.monotonic() - begin < 3
