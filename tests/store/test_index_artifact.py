"""Indexes of layers in a real registry, which has no API for referrers; and one that seems to."""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import requests

from store.config import HostConfig, StoreConfig
from store.errors import (
    DigestMismatch,
    InvalidManifest,
    LimitExceeded,
    RegistryUnauthorized,
    StoreError,
)
from store.index_artifact import (
    ARTIFACT_TYPE,
    CONFIG,
    DOCUMENT_TYPE,
    artifact_of,
    fetch_index,
    find_indexes,
    push_indexes,
    referrers_with,
)
from store.index_document import document_max, encode_index
from store.layer_index import LayerIndex
from store.lazy_pull import LayerIndexes
from store.manifest import OCI_INDEX, OCI_MANIFEST, Descriptor
from store.push import Pusher
from store.reference import parse_reference
from store.registry import Registry as Client
from store.registry import referrers_tag
from store.store import Store
from store.unpack import LayerLimits
from tests.support import proxy as faults
from tests.support import tars
from tests.support.indexing import digest, index_of, table_of
from tests.support.layouts import GZIP, OciLayout, compress
from tests.support.proxy import Endless, Proxy
from tests.support.registry import Registry

ARCHIVE = tars.archive(tars.entry(b"file", data=b"content" * 10_000))
BLOB = compress(ARCHIVE, GZIP)
LAYER = Descriptor(GZIP, digest(BLOB), len(BLOB))
NAME = "indexes/app"


def described(descriptor: dict[str, object]) -> Descriptor:
    return Descriptor(
        str(descriptor["mediaType"]), str(descriptor["digest"]), int(str(descriptor["size"]))
    )


class Pushed:
    """An image in a repository of its own, and its layer's index beside it."""

    def __init__(self, registry: Registry, layout: OciLayout, directory: Path, name: str) -> None:
        self.registry, self.layout, self.name = registry, layout, name
        image = layout.image(ARCHIVE)
        registry.push(layout, image, name, "v1")
        self.image = described(image)
        self.index = index_of(BLOB, ARCHIVE, directory)
        self.document = document_of(self.index, directory)

    def artifact(self, document: bytes | None = None, layer: Descriptor = LAYER) -> bytes:
        """Push an artifact with a document."""
        data = self.document if document is None else document
        blob = described(self.layout.blob(data, DOCUMENT_TYPE))
        return self.manifest(artifact_of(self.image, {layer.content: blob}))

    def manifest(self, data: bytes) -> bytes:
        self.layout.blob(CONFIG, ARTIFACT_TYPE)
        descriptor = self.layout.blob(data, OCI_MANIFEST)
        self.registry.push(self.layout, descriptor, self.name, str(descriptor["digest"]))
        return data

    def refer(self, referrers: bytes) -> None:
        """Push the list of referrers."""
        url = f"{self.registry.url}/v2/{self.name}/manifests/{referrers_tag(self.image.content)}"
        answer = requests.put(url, referrers, headers={"Content-Type": OCI_INDEX}, timeout=10)
        assert answer.status_code == 201, answer.text


def document_of(index: LayerIndex, directory: Path) -> bytes:
    table = table_of(index, directory)
    file = io.BytesIO()
    encode_index(index.entries, table, LAYER.content, digest(ARCHIVE), file)
    table.close()
    return file.getvalue()


_numbers = iter(range(1000))


@pytest.fixture
def pushed(registry: Registry, layout: OciLayout, tmp_path: Path) -> Pushed:
    """A repository of its own for each test."""
    return Pushed(registry, layout, tmp_path, f"{NAME}{next(_numbers)}")


@pytest.fixture
def client(pushed: Pushed, proxy: Proxy, config: StoreConfig) -> Iterator[Client]:
    """A client that goes through the proxy."""
    client = Client(parse_reference(f"{proxy.host}/{pushed.name}:v1"), config)
    yield client
    client.close()


def fetch(client: Client, document: Descriptor) -> LayerIndex:
    return fetch_index(client, document, LAYER, digest(ARCHIVE), LayerLimits())


def test_an_index_is_found_under_the_tag(pushed: Pushed, client: Client, proxy: Proxy) -> None:
    assert find_indexes(client, pushed.image) == {}
    pushed.refer(referrers_with(None, pushed.artifact()))
    found = find_indexes(client, pushed.image)
    assert set(found) == {LAYER.digest}
    index = fetch(client, found[LAYER.content])
    assert (index.format, index.entries) == ("gzip+index", pushed.index.entries)
    (asked, _) = proxy.paths("/referrers/")
    assert f"artifactType={ARTIFACT_TYPE}".replace("/", "%2F") in asked.path


def test_pushing(pushed: Pushed, client: Client, config: StoreConfig) -> None:
    reference = parse_reference(f"{pushed.registry.host}/{pushed.name}:v1")
    pusher = Pusher(reference, config)
    for document in (b"old", pushed.document, pushed.document):
        artifact = push_indexes(pusher, client, pushed.image, {LAYER.content: document})
    pusher.close()
    (found,) = find_indexes(client, pushed.image).values()
    assert fetch(client, found).entries == pushed.index.entries
    referrers = client.fetch_referrers(pushed.image.content, ARTIFACT_TYPE)
    listed = json.loads(referrers or b"")["manifests"]
    assert len(listed) == 2
    assert listed[1]["digest"] == artifact.digest
    # Registries that go by the configuration's type find it as well.
    manifest = json.loads(client.fetch_manifest(artifact))
    assert manifest["config"]["mediaType"] == manifest["artifactType"] == ARTIFACT_TYPE
    assert client.resolve()[0].digest == pushed.image.digest


def test_an_index_is_found_by_the_api(pushed: Pushed, client: Client, proxy: Proxy) -> None:
    proxy.on("/referrers/", faults.body(referrers_with(None, pushed.artifact()), OCI_INDEX))
    (document,) = find_indexes(client, pushed.image).values()
    assert fetch(client, document).entries == pushed.index.entries
    assert not proxy.paths("/manifests/sha256-")


def test_the_latest_artifact_counts_and_others_stay(pushed: Pushed, client: Client) -> None:
    signature = {"mediaType": OCI_MANIFEST, "digest": digest(b"s"), "size": 1, "urls": ["x"]}
    known = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [signature]}
    first, second = pushed.artifact(b"wrong"), pushed.artifact()
    referrers = referrers_with(json.dumps(known).encode(), first)
    referrers = referrers_with(referrers_with(referrers, second), second)
    listed = json.loads(referrers)["manifests"]
    assert listed[0] == signature
    assert [entry["digest"] for entry in listed[1:]] == [digest(first), digest(second)]
    pushed.refer(referrers_with(referrers_with(None, first), second))
    (document,) = find_indexes(client, pushed.image).values()
    assert document.digest == digest(pushed.document)


def test_documents_that_are_wrong(pushed: Pushed, client: Client, proxy: Proxy) -> None:
    pushed.refer(referrers_with(None, pushed.artifact(b"junk" * 100)))
    (document,) = find_indexes(client, pushed.image).values()
    with pytest.raises(StoreError, match=r"damaged|cut off"):
        fetch(client, document)
    huge = Descriptor(DOCUMENT_TYPE, document.digest, document_max(LAYER) + 1)
    with pytest.raises(LimitExceeded):
        fetch(client, huge)
    proxy.on("/blobs/", faults.damaged)
    with pytest.raises(DigestMismatch):
        fetch(client, document)


def test_an_artifact_of_another_image(pushed: Pushed, client: Client) -> None:
    document = described(pushed.layout.blob(pushed.document, DOCUMENT_TYPE))
    other = Descriptor(OCI_MANIFEST, digest(b"other"), 5)
    artifact = pushed.manifest(artifact_of(other, {LAYER.content: document}))
    pushed.refer(referrers_with(None, artifact))
    assert find_indexes(client, pushed.image) == {}


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"\xff", b"[" * 100_000, b'{"manifests": 1}'])
def test_lists_that_are_none(data: bytes, pushed: Pushed, client: Client, proxy: Proxy) -> None:
    proxy.on("/referrers/", faults.body(data, OCI_INDEX))
    with pytest.raises(InvalidManifest):
        find_indexes(client, pushed.image)
    with pytest.raises(InvalidManifest):
        referrers_with(data, b"{}")


def test_registries_that_misbehave(pushed: Pushed, client: Client, proxy: Proxy) -> None:
    proxy.on("/referrers/", faults.status(503), times=1)
    assert find_indexes(client, pushed.image) == {}
    proxy.on("/referrers/", faults.status(403), times=3)
    with pytest.raises(RegistryUnauthorized):
        find_indexes(client, pushed.image)
    proxy.heal()
    endless = Endless(OCI_INDEX, announced=False)
    proxy.on("/referrers/", endless)
    with pytest.raises(LimitExceeded):
        find_indexes(client, pushed.image)
    assert endless.sent < 50 << 20


def mirrored(pushed: Pushed, config: StoreConfig, registry: str, mirror: str) -> Client:
    """A client of an image in a registry that has a mirror."""
    known = msgspec.structs.replace(config, registries={registry: HostConfig(mirrors=(mirror,))})
    return Client(parse_reference(f"{registry}/{pushed.name}:v1"), known)


def test_a_mirror_that_has_the_image_knows_what_refers_to_it(
    pushed: Pushed, proxy: Proxy, config: StoreConfig
) -> None:
    client = mirrored(pushed, config, "out-of-reach.invalid", proxy.host)
    assert find_indexes(client, pushed.image) == {}
    pushed.refer(referrers_with(None, pushed.artifact()))
    assert find_indexes(client, pushed.image)
    client.close()


def test_a_mirror_without_the_image_knows_nothing(
    pushed: Pushed, proxy: Proxy, config: StoreConfig
) -> None:
    pushed.refer(referrers_with(None, pushed.artifact()))
    proxy.on("/manifests/|/referrers/", faults.status(404))
    client = mirrored(pushed, config, pushed.registry.host, proxy.host)
    assert find_indexes(client, pushed.image)
    assert proxy.paths("/manifests/")
    client.close()


def test_an_image_can_be_pulled_without_asking_for_its_index(
    pushed: Pushed, client: Client, proxy: Proxy, store: Store
) -> None:
    proxy.on("/referrers/", faults.status(400))
    assert LayerIndexes(store, client, pushed.image).find(LAYER, digest(ARCHIVE)) is None
