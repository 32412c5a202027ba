"""The registry client, against a real docker-registry and a proxy that misbehaves."""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from store.config import HostConfig, StoreConfig
from store.errors import (
    BlobNotFound,
    ConnectionLost,
    DigestMismatch,
    ImageNotFound,
    LimitExceeded,
    PullCancelled,
    RegistryError,
    RegistryOverloaded,
    RegistryTimeout,
    RegistryUnauthorized,
    RegistryUnreachable,
    SizeMismatch,
    StoreError,
)
from store.manifest import OCI_MANIFEST, Descriptor
from store.reference import parse_reference
from store.registry import Registry as Client
from tests.support import proxy as faults
from tests.support.layouts import GZIP, OciLayout, tar_of
from tests.support.proxy import Endless, Proxy
from tests.support.registry import USER, Registry, log_in
from tests.support.tokens import TokenServer
from tools.registry import free_port


@pytest.fixture
def image(layout: OciLayout, registry: Registry) -> str:
    """Name and tag of a small image in the registry."""
    descriptor = layout.image(tar_of({"file": b"data" * 1000}))
    layout.tag("v1", descriptor)
    return registry.push(layout, descriptor, "client/app", "v1").partition("/")[2]


_clients: list[Client] = []


@pytest.fixture(autouse=True)
def clients_end() -> Iterator[None]:
    """Close what ``client`` made."""
    yield
    while _clients:
        _clients.pop().close()


def client(host: str, image: str, config: StoreConfig) -> Client:
    """A client for ``host/image``, closed at the end of the test."""
    _clients.append(Client(parse_reference(f"{host}/{image}"), config))
    return _clients[-1]


def blob_of(layout: OciLayout) -> Descriptor:
    """The layer of the layout's image."""
    manifest = json.loads(layout.blob_path(layout.entries[0]).read_bytes())
    return msgspec.convert(manifest["layers"][0], Descriptor)


def contents(source: Client, descriptor: Descriptor, offset: int = 0) -> tuple[int, bytes]:
    stream = source.open_blob(descriptor, offset)
    try:
        return stream.offset, b"".join(iter(stream.read, b""))
    finally:
        stream.close()


def test_resolve_and_fetch(
    layout: OciLayout, registry: Registry, image: str, config: StoreConfig
) -> None:
    source = client(registry.host, image, config)
    descriptor, data = source.resolve()
    assert descriptor.digest == layout.entries[0]["digest"]
    assert descriptor.media_type == OCI_MANIFEST
    assert data == layout.blob_path(layout.entries[0]).read_bytes()
    assert source.fetch_manifest(descriptor) == data
    settings = msgspec.convert(json.loads(data)["config"], Descriptor)
    assert json.loads(source.fetch_config(settings))["os"] == "linux"
    by_digest = client(registry.host, f"client/app@{descriptor.digest}", config)
    assert by_digest.resolve() == (descriptor, data)
    source.close()


def test_blob_from_the_middle(
    layout: OciLayout, registry: Registry, image: str, config: StoreConfig
) -> None:
    source = client(registry.host, image, config)
    descriptor = blob_of(layout)
    whole = contents(source, descriptor)[1]
    assert contents(source, descriptor, 10) == (10, whole[10:])


def test_unknown_names(registry: Registry, image: str, config: StoreConfig) -> None:
    for name in ("client/app:other", "client/none:v1"):
        with pytest.raises(ImageNotFound, match=name):
            client(registry.host, name, config).resolve()
    missing = Descriptor(GZIP, "sha256:" + "0" * 64, 5)
    with pytest.raises(BlobNotFound, match=missing.digest):
        client(registry.host, image, config).open_blob(missing, 0)


def test_a_host_without_a_registry(proxy: Proxy, config: StoreConfig) -> None:
    with pytest.raises(ImageNotFound):
        client(proxy.host, "app:none", config).resolve()
    proxy.on("/v2/$", faults.status(401), times=2)  # the first finds out about TLS
    with pytest.raises(ImageNotFound):
        client(proxy.host, "app:none", config).resolve()
    proxy.on("", faults.status(404))
    with pytest.raises(RegistryError, match="is not a registry"):
        client(proxy.host, "app:none", config).resolve()


def test_registry_down(config: StoreConfig) -> None:
    host = f"127.0.0.1:{free_port()}"
    with pytest.raises(RegistryUnreachable, match=f"{host} can't be reached.*refused"):
        client(host, "app:v1", config).resolve()


def test_unknown_host(config: StoreConfig) -> None:
    with pytest.raises(RegistryUnreachable, match="can't be reached"):
        client("no-such-host.invalid", "app:v1", config).resolve()


def test_a_host_that_can_not_be(config: StoreConfig) -> None:
    with pytest.raises(RegistryError, match="can't be"):
        client("a" * 64 + ".example", "app:v1", config).resolve()


def test_silent_registry(proxy: Proxy, image: str, config: StoreConfig) -> None:
    proxy.on("/manifests/", faults.stall)
    begin = time.monotonic()
    with pytest.raises(RegistryTimeout):
        client(proxy.host, image, config).resolve()
    assert time.monotonic() - begin < 3


@pytest.mark.parametrize("code", [429, 500, 502, 503, 504])
def test_overload_that_passes(proxy: Proxy, image: str, config: StoreConfig, code: int) -> None:
    proxy.on("/manifests/", faults.status(code), times=2)
    client(proxy.host, image, config).resolve()
    assert len(proxy.paths("/manifests/")) == 3


def test_overload_that_stays(proxy: Proxy, image: str, config: StoreConfig) -> None:
    proxy.on("/manifests/", faults.status(503))
    with pytest.raises(RegistryOverloaded, match=r"503.*TEST: on  purpose"):
        client(proxy.host, image, config).resolve()
    assert len(proxy.paths("/manifests/")) == config.patience.attempts


def test_retry_after_is_kept(proxy: Proxy, image: str, config: StoreConfig) -> None:
    proxy.on("/manifests/", faults.status(429, Retry_After="1"), times=1)
    begin = time.monotonic()
    client(proxy.host, image, config).resolve()
    assert time.monotonic() - begin >= 1


def test_too_much_patience_asked_for(proxy: Proxy, image: str, config: StoreConfig) -> None:
    proxy.on("/manifests/", faults.status(429, Retry_After="Fri, 31 Dec 2999 23:59:59 GMT"))
    with pytest.raises(RegistryOverloaded):
        client(proxy.host, image, config).resolve()
    assert len(proxy.paths("/manifests/")) == 1


def test_a_refusal_is_not_repeated(proxy: Proxy, image: str, config: StoreConfig) -> None:
    proxy.on("/manifests/", faults.status(400))
    with pytest.raises(RegistryError, match="400"):
        client(proxy.host, image, config).resolve()
    assert len(proxy.paths("/manifests/")) == 1


def test_cut_manifest(proxy: Proxy, image: str, config: StoreConfig) -> None:
    proxy.on("/manifests/", faults.cut_after(50), times=2)
    client(proxy.host, image, config).resolve()
    proxy.on("/manifests/", faults.cut_after(50))
    with pytest.raises(ConnectionLost):
        client(proxy.host, image, config).resolve()


@pytest.mark.parametrize("announced", [True, False])
def test_manifest_of_100_mb(proxy: Proxy, image: str, config: StoreConfig, announced: bool) -> None:
    endless = Endless(OCI_MANIFEST, announced)
    proxy.on("/manifests/", endless)
    with pytest.raises(LimitExceeded, match=r"client/app:v1.*longer than 4194304"):
        client(proxy.host, image, config).resolve()
    assert endless.sent < 20 << 20


def test_wrong_manifest(proxy: Proxy, image: str, config: StoreConfig, layout: OciLayout) -> None:
    proxy.on("/manifests/", faults.damaged)
    with pytest.raises(DigestMismatch, match="client/app:v1"):
        client(proxy.host, image, config).resolve()
    by_digest = f"client/app@{layout.entries[0]['digest']}"
    with pytest.raises(DigestMismatch, match="client/app@"):
        client(proxy.host, by_digest, config).resolve()


def test_cut_blob_says_so(proxy: Proxy, image: str, config: StoreConfig, layout: OciLayout) -> None:
    proxy.on("/blobs/", faults.cut_after(20))
    with pytest.raises(ConnectionLost):
        contents(client(proxy.host, image, config), blob_of(layout))


def test_blob_of_another_size(
    registry: Registry, image: str, config: StoreConfig, layout: OciLayout
) -> None:
    descriptor = blob_of(layout)
    wrong = msgspec.structs.replace(descriptor, size=descriptor.size + 1)
    for offset in (0, 10):
        with pytest.raises(SizeMismatch, match=descriptor.digest):
            client(registry.host, image, config).open_blob(wrong, offset)


def test_range_ignored(proxy: Proxy, image: str, config: StoreConfig, layout: OciLayout) -> None:
    proxy.on("/blobs/", faults.ignore_range)
    offset, data = contents(client(proxy.host, image, config), blob_of(layout), 10)
    assert offset == 0 and len(data) == blob_of(layout).size


def test_range_refused(proxy: Proxy, image: str, config: StoreConfig, layout: OciLayout) -> None:
    proxy.on("/blobs/", faults.status(416), times=1)
    assert contents(client(proxy.host, image, config), blob_of(layout), 10)[0] == 0


def test_abort_wakes_a_reader(
    proxy: Proxy, image: str, config: StoreConfig, layout: OciLayout
) -> None:
    proxy.on("/blobs/", faults.stall_after(10))
    stream = client(proxy.host, image, config).open_blob(blob_of(layout), 0)
    timer = threading.Timer(0.1, stream.abort)
    timer.start()
    with pytest.raises(PullCancelled):
        list(iter(stream.read, b""))
    timer.join()
    stream.close()


def test_redirects_lose_credentials(tmp_path: Path, layout: OciLayout, config: StoreConfig) -> None:
    with Registry(tmp_path / "basic", auth="basic") as registry, Registry(tmp_path / "cdn") as cdn:
        descriptor = layout.image(tar_of({"f": b"x"}))
        layout.tag("v1", descriptor)
        cdn.push(layout, descriptor, "app", "v1")
        registry.copy(f"oci:{layout.path}:v1", "app:v1")
        blob = blob_of(layout)
        with Proxy(registry.port) as before, Proxy(cdn.port) as other:
            log_in(config, before.host)
            where = f"http://{other.host}/v2/app/blobs/{blob.digest}"
            before.on("/blobs/", faults.status(307, Location=where))
            source = client(before.host, "app:v1", config)
            source.resolve()
            assert len(contents(source, blob)[1]) == blob.size
            assert "Authorization" in before.seen[-1].headers
            assert other.seen and all("Authorization" not in s.headers for s in other.seen)


def test_redirects_without_end(
    proxy: Proxy, image: str, config: StoreConfig, layout: OciLayout
) -> None:
    proxy.on("/blobs/", faults.status(307, Location="/v2/x/blobs/again"))
    with pytest.raises(RegistryError, match="redirects more than"):
        client(proxy.host, image, config).open_blob(blob_of(layout), 0)


@pytest.mark.parametrize(
    "target",
    ["http://192.0.2.1/x", "file:///etc/passwd", "ftp://127.0.0.1/", "http://a:b@127.0.0.1/"],
)
def test_redirects_to_where_we_do_not_go(
    proxy: Proxy, image: str, config: StoreConfig, layout: OciLayout, target: str
) -> None:
    proxy.on("/blobs/", faults.status(307, Location=target))
    with pytest.raises(RegistryError, match=r"without TLS|no address"):
        client(proxy.host, image, config).open_blob(blob_of(layout), 0)


@pytest.mark.parametrize(
    "target", ["http://[x/", "http://127.0.0.1:99999/", "http://127.0.0.1:x/", "//[::1", "http://["]
)
def test_redirects_to_what_is_no_address(
    proxy: Proxy, image: str, config: StoreConfig, layout: OciLayout, target: str
) -> None:
    proxy.on("/blobs/", faults.status(307, Location=target))
    with pytest.raises(RegistryError, match="can't be an address") as caught:
        client(proxy.host, image, config).open_blob(blob_of(layout), 0)
    assert target in caught.value.sentence


@pytest.mark.parametrize("realm", ["http://[x", "https://127.0.0.1:99999/t", "http://127.0.0.1:-1"])
def test_tokens_from_what_is_no_address(
    proxy: Proxy, image: str, config: StoreConfig, realm: str
) -> None:
    proxy.on("/manifests/", faults.status(401, WWW_Authenticate=f'Bearer realm="{realm}"'))
    with pytest.raises(RegistryError, match="can't be an address"):
        client(proxy.host, image, config).resolve()


def test_a_registry_that_is_no_address(image: str, config: StoreConfig) -> None:
    with pytest.raises(RegistryError, match="can't be an address"):
        client("[:::]:5000", image, config).resolve()


@pytest.mark.parametrize("code", [307, 404, 503])
def test_an_error_that_drips_is_not_waited_for(
    proxy: Proxy,
    image: str,
    config: StoreConfig,
    layout: OciLayout,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
) -> None:
    monkeypatch.setattr("store.transport._DRAIN_SECONDS", 0.2)
    proxy.on("/blobs/", faults.drip(code, Location="/v2/x"))
    proxy.on("/v2/x", faults.status(400))
    begin = time.monotonic()
    with pytest.raises(StoreError):
        client(proxy.host, image, config).open_blob(blob_of(layout), 0)
    assert time.monotonic() - begin < 2


def test_a_range_beyond_all_numbers(
    proxy: Proxy, image: str, config: StoreConfig, layout: OciLayout
) -> None:
    number = "9" * 5000
    proxy.on("/blobs/", faults.status(206, Content_Range=f"bytes {number}-{number}/{number}"))
    with pytest.raises(ConnectionLost, match="another range"):
        client(proxy.host, image, config).open_blob(blob_of(layout), 10)


def test_basic(tmp_path: Path, layout: OciLayout, config: StoreConfig) -> None:
    layout.tag("v1", layout.image(tar_of({"f": b"x"})))
    with Registry(tmp_path / "basic", auth="basic") as registry:
        registry.copy(f"oci:{layout.path}:v1", "app:v1")
        with pytest.raises(RegistryUnauthorized, match="docker login"):
            client(registry.host, "app:v1", config).resolve()
        log_in(config, registry.host)
        source = client(registry.host, "app:v1", config)
        source.resolve()
        assert contents(source, blob_of(layout))[1]
        log_in(config, registry.host, password="wrong")
        with pytest.raises(RegistryUnauthorized, match="refuses the credentials") as caught:
            client(registry.host, "app:v1", config).resolve()
        assert "wrong" not in str(caught.value)


def test_credentials_are_looked_for_again_after_a_refusal(
    tmp_path: Path, layout: OciLayout, config: StoreConfig
) -> None:
    layout.tag("v1", layout.image(tar_of({"f": b"x"})))
    for auth in ("basic", "token"):
        with Registry(tmp_path / auth, auth=auth) as registry:
            registry.copy(f"oci:{layout.path}:v1", "private/app:v1")
            source = client(registry.host, "private/app:v1", config)
            with pytest.raises(RegistryUnauthorized, match="docker login"):
                source.resolve()
            for password in ("wrong", "wrong again"):
                log_in(config, registry.host, password=password)
                with pytest.raises(RegistryUnauthorized):
                    source.resolve()
            log_in(config, registry.host)
            source.resolve()


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Registry, TokenServer]]:
    """A registry with a token server, holding open/app:v1 and private/app:v1."""
    layout = OciLayout(tmp_path_factory.mktemp("guarded") / "layout")
    layout.tag("v1", layout.image(tar_of({"f": b"x"})))
    with Registry(tmp_path_factory.mktemp("token"), auth="token") as registry:
        assert registry.tokens
        for name in ("open/app:v1", "private/app:v1"):
            registry.copy(f"oci:{layout.path}:v1", name)
        yield registry, registry.tokens


def test_anonymous_token(guarded: tuple[Registry, TokenServer], config: StoreConfig) -> None:
    registry, tokens = guarded
    tokens.asked.clear()
    source = client(registry.host, "open/app:v1", config)
    descriptor, _ = source.resolve()
    source.fetch_manifest(descriptor)
    question = {"service": "test", "scope": "repository:open/app:pull"}
    assert tokens.asked == [("GET", question, "")], "one token serves all requests"
    with pytest.raises(RegistryUnauthorized, match="docker login"):
        client(registry.host, "private/app:v1", config).resolve()


def test_token_for_a_password(guarded: tuple[Registry, TokenServer], config: StoreConfig) -> None:
    registry, tokens = guarded
    log_in(config, registry.host)
    client(registry.host, "private/app:v1", config).resolve()
    assert tokens.asked[-1][1]["account"] == USER
    log_in(config, registry.host, password="wrong")
    with pytest.raises(RegistryUnauthorized, match="no token"):
        client(registry.host, "private/app:v1", config).resolve()


def test_token_for_a_token(guarded: tuple[Registry, TokenServer], config: StoreConfig) -> None:
    registry, tokens = guarded
    log_in(config, registry.host, identitytoken=tokens.refresh_token)
    client(registry.host, "private/app:v1", config).resolve()
    assert tokens.asked[-1][0] == "POST"


def test_an_expired_token_is_renewed(
    guarded: tuple[Registry, TokenServer], config: StoreConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry, tokens = guarded
    source = client(registry.host, "open/app:v1", config)
    source.resolve()
    before = len(tokens.asked)
    now = time.monotonic()
    monkeypatch.setattr("store.auth.time.monotonic", lambda: now + 1000)
    source.resolve()
    assert len(tokens.asked) == before + 1


def test_a_token_that_the_registry_forgot_is_renewed(
    guarded: tuple[Registry, TokenServer], config: StoreConfig
) -> None:
    registry, tokens = guarded
    challenge = f'Bearer realm="{tokens.url}",service="test",error="invalid_token"'
    with Proxy(registry.port) as proxy:
        source = client(proxy.host, "open/app:v1", config)
        source.resolve()
        proxy.on("/manifests/", faults.status(401, WWW_Authenticate=challenge), times=1)
        source.resolve()
        assert len(proxy.paths("/manifests/")) == 4


def test_tls(tmp_path: Path, layout: OciLayout, config: StoreConfig) -> None:
    layout.tag("v1", layout.image(tar_of({"f": b"x"})))

    def resolve(registry: Registry, **host: object) -> None:
        settings = msgspec.convert(host, HostConfig)
        known = msgspec.structs.replace(config, registries={registry.host: settings})
        client(registry.host, "app:v1", known).resolve()

    with Registry(tmp_path / "tls", tls=True) as registry:
        registry.copy(f"oci:{layout.path}:v1", "app:v1")
        resolve(registry, ca=str(registry.ca))
        with pytest.raises(RegistryError, match=r"no trusted TLS.*: certificate .*certificate; if"):
            resolve(registry)
        with pytest.raises(RegistryError, match="/none"):
            resolve(registry, ca="/none")


@pytest.mark.filterwarnings("ignore::urllib3.exceptions.InsecureRequestWarning")
def test_tls_unverified(tmp_path: Path, config: StoreConfig) -> None:
    with Registry(tmp_path / "tls", tls=True) as registry:
        settings = {registry.host: HostConfig(insecure_skip_verify=True)}
        known = msgspec.structs.replace(config, registries=settings)
        with pytest.raises(ImageNotFound):
            client(registry.host, "app:v1", known).resolve()


def test_no_tls_where_it_is_wanted(config: StoreConfig, registry: Registry) -> None:
    settings = {registry.host: HostConfig(insecure_skip_verify=True)}
    known = msgspec.structs.replace(config, registries=settings)
    with pytest.raises(RegistryError, match=r"does not speak TLS.*plain_http"):
        client(registry.host, "app:v1", known).resolve()


def test_no_tls_beyond_this_machine(config: StoreConfig) -> None:
    with pytest.raises(RegistryError):
        client("192.0.2.1:5000", "app:v1", config)._transport.send("http://192.0.2.1:5000/", {})


def test_mirrors(
    registry: Registry, proxy: Proxy, image: str, config: StoreConfig, layout: OciLayout
) -> None:
    down = f"127.0.0.1:{free_port()}"
    settings = {"main.example": HostConfig(mirrors=(down, proxy.host))}
    known = msgspec.structs.replace(config, registries=settings)
    source = client("main.example", image, known)
    descriptor, _ = source.resolve()
    assert descriptor.digest == layout.entries[0]["digest"]
    assert "ns=main.example" in proxy.seen[-1].path
    assert contents(source, blob_of(layout))[1]


def test_a_broken_mirror_does_no_harm(
    registry: Registry, proxy: Proxy, image: str, config: StoreConfig
) -> None:
    proxy.on("/manifests/", faults.damaged)
    settings = {registry.host: HostConfig(mirrors=(proxy.host,))}
    known = msgspec.structs.replace(config, registries=settings)
    client(registry.host, image, known).resolve()
    assert proxy.paths("/manifests/")
