"""Uploads, to a real docker-registry and through a proxy that misbehaves."""

import io
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import pytest

from store.cas import Digest, digest_of
from store.config import StoreConfig
from store.errors import (
    InvalidReference,
    RegistryError,
    RegistryOverloaded,
    RegistryUnauthorized,
    RegistryUnreachable,
)
from store.manifest import OCI_MANIFEST, Descriptor
from store.push import Pusher
from store.reference import parse_reference
from store.registry import Registry as Client
from tests.support import proxy as faults
from tests.support.layouts import CONFIG, GZIP, compress, sha256, tar_of
from tests.support.proxy import Proxy
from tests.support.registry import Registry, log_in
from tools.registry import free_port

ARCHIVE = tar_of({"file": b"data" * 1000})
LAYER = compress(ARCHIVE, GZIP)

Open = Callable[[str], Pusher]


@pytest.fixture
def pusher(config: StoreConfig) -> Iterator[Open]:
    """Makes clients for references, closed at the end."""
    made = []

    def make(reference: str) -> Pusher:
        made.append(Pusher(parse_reference(reference), config))
        return made[-1]

    yield make
    for one in made:
        one.close()


def put(pusher: Pusher, data: bytes) -> Digest:
    digest = digest_of(data)
    pusher.put_blob(digest, len(data), lambda: io.BytesIO(data))
    return digest


def put_image(pusher: Pusher, name: str | None = None, **more: object) -> bytes:
    """Push a small image; its manifest."""
    settings = {"os": "linux", "rootfs": {"type": "layers", "diff_ids": [sha256(ARCHIVE)]}}
    config = json.dumps(settings).encode()
    put(pusher, LAYER)
    put(pusher, config)
    manifest = json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": {"mediaType": CONFIG, "digest": sha256(config), "size": len(config)},
            "layers": [{"mediaType": GZIP, "digest": sha256(LAYER), "size": len(LAYER)}],
            **more,
        }
    ).encode()
    pusher.put_manifest(manifest, OCI_MANIFEST, name)
    return manifest


def pulled(reference: str, config: StoreConfig) -> tuple[bytes, bytes]:
    """Manifest and layer, as our own client gets them."""
    source = Client(parse_reference(reference), config)
    try:
        _, data = source.resolve()
        stream = source.open_blob(Descriptor(GZIP, sha256(LAYER), len(LAYER)), 0)
        layer = b"".join(iter(stream.read, b""))
        stream.close()
        return data, layer
    finally:
        source.close()


def test_an_image(registry: Registry, pusher: Open, config: StoreConfig) -> None:
    reference = f"{registry.host}/push/app:v1"
    manifest = put_image(pusher(reference))
    assert pulled(reference, config) == (manifest, LAYER)


def test_by_digest(registry: Registry, pusher: Open, config: StoreConfig) -> None:
    client = pusher(f"{registry.host}/push/app:other")
    untagged = put_image(client, annotations={"a": "b"})
    subject = {"mediaType": OCI_MANIFEST, "digest": sha256(untagged), "size": len(untagged)}
    artifact = json.dumps({**json.loads(untagged), "subject": subject}).encode()
    # Debian's docker-registry is older than the referrers API.
    assert not client.put_manifest(artifact, OCI_MANIFEST, digest_of(artifact))
    reference = f"{registry.host}/push/app@{digest_of(artifact)}"
    assert pulled(reference, config) == (artifact, LAYER)
    with pytest.raises(InvalidReference, match="tag"):
        put_image(pusher(reference))


def test_a_file_from_disk(registry: Registry, pusher: Open) -> None:
    client = pusher(f"{registry.host}/push/file:v1")
    opened: list[BinaryIO] = []
    with tempfile.NamedTemporaryFile() as file:
        data = bytes(range(256)) * 40_000
        file.write(data)
        file.flush()

        def open_file() -> BinaryIO:
            opened.append(Path(file.name).open("rb"))  # noqa: SIM115
            return opened[-1]

        assert not client.has_blob(digest_of(data), len(data))
        client.put_blob(digest_of(data), len(data), open_file)
        assert client.has_blob(digest_of(data), len(data))
        client.put_blob(digest_of(data), len(data), open_file)
    assert len(opened) == 1, "what is there is not sent again"
    assert opened[0].closed
    assert registry.blob_file(digest_of(data)).read_bytes() == data


def test_other_bytes_than_promised(registry: Registry, pusher: Open) -> None:
    client = pusher(f"{registry.host}/push/wrong:v1")
    with pytest.raises(RegistryError, match="DIGEST_INVALID"):
        client.put_blob(digest_of(b"right"), 5, lambda: io.BytesIO(b"wrong"))


def test_a_manifest_without_its_blobs(registry: Registry, pusher: Open) -> None:
    document = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": {"mediaType": CONFIG, "digest": sha256(b"nowhere"), "size": 7},
        "layers": [],
    }
    client = pusher(f"{registry.host}/push/empty:v1")
    with pytest.raises(RegistryError, match="MANIFEST_BLOB_UNKNOWN"):
        client.put_manifest(json.dumps(document).encode(), OCI_MANIFEST)


def test_nobody_there(pusher: Open) -> None:
    with pytest.raises(RegistryUnreachable):
        put(pusher(f"127.0.0.1:{free_port()}/app:v1"), LAYER)


def test_basic_authentication(tmp_path: Path, pusher: Open, config: StoreConfig) -> None:
    with Registry(tmp_path / "basic", auth="basic") as registry:
        reference = f"{registry.host}/app:v1"
        with pytest.raises(RegistryUnauthorized, match="docker login"):
            put(pusher(reference), LAYER)
        log_in(config, registry.host, password="wrong")
        with pytest.raises(RegistryUnauthorized, match="refuses the credentials") as caught:
            put(pusher(reference), LAYER)
        assert "wrong" not in str(caught.value)
        log_in(config, registry.host)
        manifest = put_image(pusher(reference))
        assert pulled(reference, config) == (manifest, LAYER)


def test_token_authentication(tmp_path: Path, pusher: Open, config: StoreConfig) -> None:
    with Registry(tmp_path / "token", auth="token") as registry:
        assert registry.tokens
        reference = f"{registry.host}/private/app:v1"
        with pytest.raises(RegistryUnauthorized, match="docker login"):
            put(pusher(reference), LAYER)
        log_in(config, registry.host)
        registry.tokens.asked.clear()
        manifest = put_image(pusher(reference))
        assert [question["scope"] for _, question, _ in registry.tokens.asked] == [
            "repository:private/app:pull,push"
        ], "one token serves all requests"
        assert pulled(reference, config) == (manifest, LAYER)


STUMBLES = {"503": faults.status(503), "429": faults.status(429), "cut": faults.Exchange.cut}


@pytest.mark.parametrize("how", STUMBLES)
def test_a_registry_that_stumbles(
    proxy: Proxy, pusher: Open, config: StoreConfig, how: str
) -> None:
    reference = f"{proxy.host}/push/stumbles-{how}:v1"
    fault = STUMBLES[how]
    proxy.on("digest=", fault, times=2)
    proxy.on("/manifests/", fault, times=1)
    manifest = put_image(pusher(reference))
    assert pulled(reference, config) == (manifest, LAYER)
    assert len([seen for seen in proxy.seen if seen.method == "PUT"]) == 6


def test_patience_ends(proxy: Proxy, pusher: Open, config: StoreConfig) -> None:
    proxy.on("uploads/", faults.status(500))
    with pytest.raises(RegistryOverloaded, match=r"was not pushed .* \(TEST: on  purpose\)"):
        put(pusher(f"{proxy.host}/push/never:v1"), LAYER + b"never")
    assert len(proxy.paths("uploads/")) == config.patience.attempts


def test_forbidden(proxy: Proxy, pusher: Open) -> None:
    proxy.on("uploads/", faults.status(403))
    with pytest.raises(RegistryUnauthorized, match="does not let you push to push/forbidden"):
        put(pusher(f"{proxy.host}/push/forbidden:v1"), b"forbidden")


@pytest.mark.parametrize("place", ["http://[:::]/", "ftp://127.0.0.1/", "http://example.invalid/"])
def test_sent_to_nowhere(proxy: Proxy, pusher: Open, place: str) -> None:
    proxy.on("uploads/", faults.status(202, Location=place))
    with pytest.raises(RegistryError, match=r"address|without TLS"):
        put(pusher(f"{proxy.host}/push/nowhere:v1"), b"nowhere")


def test_credentials_stay_with_the_registry(
    proxy: Proxy, pusher: Open, registry: Registry, config: StoreConfig
) -> None:
    log_in(config, proxy.host)
    proxy.on("", faults.status(401, WWW_Authenticate='Basic realm="x"'), times=2)
    with Proxy(registry.port) as elsewhere:
        place = f"http://{elsewhere.host}/upload?state=1"
        proxy.on("uploads/", faults.status(202, Location=place))
        elsewhere.on("", faults.status(201))
        put(pusher(f"{proxy.host}/push/elsewhere:v1"), b"elsewhere")
        (upload,) = elsewhere.seen
    assert upload.path == f"/upload?state=1&digest={digest_of(b'elsewhere').replace(':', '%3A')}"
    assert "Authorization" not in upload.headers
    assert "Authorization" in proxy.paths("uploads/")[0].headers
