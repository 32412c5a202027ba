"""Index, manifest and configuration documents, right and wrong."""

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from store.errors import (
    DigestMismatch,
    InvalidManifest,
    InvalidPlatform,
    LimitExceeded,
    NoMatchingPlatform,
    SizeMismatch,
    StoreError,
    UnsupportedMediaType,
)
from store.manifest import (
    DOCKER_CONFIG,
    DOCKER_INDEX,
    DOCKER_MANIFEST,
    OCI_CONFIG,
    OCI_INDEX,
    OCI_MANIFEST,
    Descriptor,
    Index,
    Manifest,
    check_platform,
    check_sizes,
    choose,
    parse,
    parse_config,
)
from store.platform import Platform, host_platform, parse_platform, runnable

HEX = "0" * 64
LAYER = {
    "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
    "digest": f"sha256:{HEX}",
    "size": 3,
}
CONFIG = {"mediaType": OCI_CONFIG, "digest": f"sha256:{HEX}", "size": 2}
IMAGE = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": CONFIG, "layers": [LAYER]}


def parsed(document: Any, media_type: str = OCI_MANIFEST) -> Manifest | Index:
    return parse(json.dumps(document).encode(), media_type, "the manifest of x")


def test_manifest() -> None:
    manifest = parsed(IMAGE)
    assert isinstance(manifest, Manifest)
    assert manifest.layers[0].size == 3 and manifest.config.media_type == OCI_CONFIG


@pytest.mark.parametrize("media_type", ["", "application/json", "text/plain", OCI_MANIFEST])
def test_the_document_itself_says_what_it_is(media_type: str) -> None:
    assert isinstance(parsed(IMAGE, media_type), Manifest)
    plain = {key: value for key, value in IMAGE.items() if key != "mediaType"}
    assert isinstance(parsed(plain, media_type), Manifest)


def test_docker_documents() -> None:
    config = {**CONFIG, "mediaType": DOCKER_CONFIG}
    layer = {**LAYER, "mediaType": "application/vnd.docker.image.rootfs.diff.tar.gzip"}
    document = {**IMAGE, "mediaType": DOCKER_MANIFEST, "config": config, "layers": [layer]}
    assert isinstance(parsed(document, DOCKER_MANIFEST), Manifest)
    index = {"schemaVersion": 2, "mediaType": DOCKER_INDEX, "manifests": []}
    assert isinstance(parsed(index, DOCKER_INDEX), Index)


@pytest.mark.parametrize(
    ("change", "error", "why"),
    [
        ({"schemaVersion": 1}, UnsupportedMediaType, "schema 1"),
        ({"schemaVersion": 3}, InvalidManifest, "schema version 2"),
        ({"mediaType": "application/x"}, UnsupportedMediaType, "application/x"),
        ({"mediaType": DOCKER_MANIFEST}, InvalidManifest, "calls itself"),
        ({"manifests": []}, InvalidManifest, "neither"),
        ({"layers": None, "config": None}, InvalidManifest, "neither"),
        (
            {"config": {**CONFIG, "mediaType": "application/vnd.cncf.helm.config.v1+json"}},
            UnsupportedMediaType,
            "helm",
        ),
        ({"layers": [{**LAYER, "mediaType": "application/x-rar"}]}, UnsupportedMediaType, "x-rar"),
        ({"layers": [{**LAYER, "size": -1}]}, InvalidManifest, "size"),
        ({"layers": [{**LAYER, "size": 1 << 70}]}, InvalidManifest, "size"),
        ({"layers": [{**LAYER, "digest": "sha256:../../x"}]}, InvalidManifest, "digest"),
        ({"layers": [{**LAYER, "digest": f"sha256:{HEX}\n"}]}, InvalidManifest, "digest"),
        ({"layers": [LAYER] * 129}, LimitExceeded, "129 layers"),
        ({"layers": "x"}, InvalidManifest, "layers"),
    ],
)
def test_bad_manifests(change: dict[str, Any], error: type[StoreError], why: str) -> None:
    with pytest.raises(error, match=why) as caught:
        parsed({**IMAGE, **change})
    assert "the manifest of x" in caught.value.sentence and "\n" not in caught.value.sentence


@pytest.mark.parametrize(
    "data", [b"", b"null", b"[]", b"\xff", b'{"a":' * 100_000, b"[" * 4_000_000, b'"x"']
)
def test_rubbish(data: bytes) -> None:
    for media_type in (OCI_MANIFEST, OCI_INDEX):
        with pytest.raises(InvalidManifest):
            parse(data, media_type, "x")


@settings(deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from([*IMAGE, "manifests", "digest", "size", "platform"]),
                inner,
                max_size=6,
            )
        ),
        max_leaves=12,
    ),
    st.sampled_from([OCI_MANIFEST, OCI_INDEX, "", DOCKER_MANIFEST]),
)
def test_any_json_is_taken_or_refused(document: Any, media_type: str) -> None:
    with contextlib.suppress(InvalidManifest, UnsupportedMediaType):
        parsed(document, media_type)


def test_config() -> None:
    manifest = parsed(IMAGE)
    assert isinstance(manifest, Manifest)

    def read(**change: Any) -> Any:
        rootfs = {"type": "layers", "diff_ids": [f"sha256:{HEX}"]}
        document = {"os": "linux", "architecture": "arm64", "rootfs": rootfs, **change}
        return parse_config(json.dumps(document).encode(), manifest, "x")

    config = read(config={"Env": ["A=1"], "Cmd": None, "ExposedPorts": {"80/tcp": {}}})
    assert config.config.env == ("A=1",) and config.config.cmd is None
    assert str(config.platform) == "linux/arm64"
    assert read(config=None).config.env is None
    with pytest.raises(InvalidManifest, match=r"1 layers.* 2 diff_ids"):
        read(rootfs={"type": "layers", "diff_ids": [f"sha256:{HEX}"] * 2})
    with pytest.raises(InvalidManifest, match="diff_ids"):
        read(rootfs={"type": "layers", "diff_ids": [f"sha256:{HEX}\n"]})
    with pytest.raises(InvalidManifest, match="rootfs of type"):
        read(rootfs={"type": "windows", "diff_ids": []})
    with pytest.raises(InvalidManifest, match="Env"):
        read(config={"Env": [1]})


def test_sizes() -> None:
    huge = (1 << 63) - 1
    for sizes, limit, why in (([1, 101], 100, "101 bytes"), ([huge, 1], huge, "any disk")):
        manifest = parsed({**IMAGE, "layers": [{**LAYER, "size": size} for size in sizes]})
        assert isinstance(manifest, Manifest)
        with pytest.raises(LimitExceeded, match=why):
            check_sizes(manifest, limit, "x")
    fitting = parsed(IMAGE)
    assert isinstance(fitting, Manifest)
    check_sizes(fitting, 3, "x")


def test_descriptor_checks_bytes() -> None:
    descriptor = Descriptor("text/plain", f"sha256:{HEX}", 3)
    with pytest.raises(SizeMismatch):
        descriptor.check(b"four")
    with pytest.raises(DigestMismatch):
        descriptor.check(b"abc")


def index_of(*platforms: str | None) -> Index:
    entries = []
    for number, text in enumerate(platforms):
        parts = dict(zip(("os", "architecture", "variant"), (text or "").split("/"), strict=False))
        entry = {"mediaType": OCI_MANIFEST, "digest": f"sha256:{number:064}", "size": 1}
        entries.append({**entry, "platform": parts} if text else entry)
    index = parsed({"schemaVersion": 2, "manifests": entries}, OCI_INDEX)
    assert isinstance(index, Index)
    return index


@pytest.mark.parametrize(
    ("wanted", "platforms", "place"),
    [
        ("linux/amd64", ["linux/arm64", "linux/amd64"], 1),
        ("linux/amd64", ["windows/amd64", "linux/386"], 1),
        ("linux/amd64", ["linux/amd64/v3", "linux/amd64/v1"], 1),
        ("linux/amd64/v3", ["linux/amd64", "linux/amd64/v2", "linux/amd64/v4"], 1),
        ("linux/arm64", ["linux/arm64/v8"], 0),
        ("linux/arm64", ["linux/arm/v7", "linux/arm/v5"], 0),
        ("linux/arm/v6", ["linux/arm/v7", "linux/arm/v5", "linux/arm/v6"], 2),
        ("linux/arm", ["linux/arm/v8", "linux/arm/v6"], 1),
        ("linux/x86_64", ["linux/amd64"], 0),
        ("linux/amd64", ["unknown/unknown", None], 1),
    ],
)
def test_choice(wanted: str, platforms: list[str | None], place: int) -> None:
    chosen = choose(index_of(*platforms), parse_platform(wanted), "x")
    assert chosen.digest == f"sha256:{place:064}"


@pytest.mark.parametrize("platforms", [[], ["linux/arm64", "unknown/unknown"], [None, None]])
def test_no_choice(platforms: list[str | None]) -> None:
    with pytest.raises(NoMatchingPlatform, match="nothing for linux/amd64") as caught:
        choose(index_of(*platforms), parse_platform("linux/amd64"), "x")
    assert "unknown" not in caught.value.sentence


def test_an_image_for_other_machines_is_refused() -> None:
    manifest = parsed(IMAGE)
    assert isinstance(manifest, Manifest)
    rootfs = {"type": "layers", "diff_ids": [f"sha256:{HEX}"]}
    document = {"os": "linux", "architecture": "s390x", "rootfs": rootfs}
    config = parse_config(json.dumps(document).encode(), manifest, "x")
    check_platform(config, Platform("linux", "s390x"), "x")
    with pytest.raises(NoMatchingPlatform, match="platform linux/s390x"):
        check_platform(config, Platform("linux", "amd64"), "x")


def test_platforms() -> None:
    assert host_platform() in runnable(host_platform())
    assert str(parse_platform("linux/aarch64/v8")) == "linux/arm64"
    assert str(parse_platform("Linux/armhf")) == "linux/arm/v7"
    for text in ("", "linux", "linux/", "a/b/c/d", "linux/amd 64", "linux/" + "x" * 65):
        with pytest.raises(InvalidPlatform):
            parse_platform(text)
