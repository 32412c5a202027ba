"""Whole images converted: what stays, what changes, and what other programs make of them."""

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from store.config import StoreConfig
from store.convert import WRITERS, convert
from store.errors import (
    DigestMismatch,
    InvalidLayer,
    InvalidManifest,
    NoMatchingPlatform,
    RegistryUnauthorized,
    StoreError,
)
from store.layout_writer import LayoutTarget
from store.lazy_format import Format
from store.manifest import Descriptor as Described
from store.oci_layout import Layout
from store.platform import Platform
from store.reference import LayoutSource, parse_reference
from store.registry import Registry as Client
from store.source import Source
from store.target import RegistryTarget, Target
from tests.support.layouts import GZIP, PLAIN, ZSTD, Descriptor, OciLayout, sha256, tar_of
from tests.support.proxy import Proxy, cut_after
from tests.support.registry import Registry, log_in
from tests.support.tars import archive, directory, entry
from tests.support.treediff import tree_diff

LINUX = Platform("linux", "amd64")
FORMATS: tuple[Format, ...] = ("estargz", "zstd:chunked")

# What eStargz adds to the root directory.
EXTRA = (".no.prefetch.landmark", ".prefetch.landmark", "stargz.index.json")

LOWER = archive(
    directory(b"bin/"),
    entry(b"bin/sh", data=b"#!" * 5000, mode=0o755),
    entry(b"bin/other", data=b"other"),
    directory(b"etc/"),
    entry(b"etc/gone", data=b"gone"),
    entry(b"etc/config", data=b"lower"),
)
UPPER = archive(
    directory(b"etc/", mode=0o700),
    entry(b"etc/.wh.gone"),
    entry(b"etc/config", data=b"upper"),
    entry(b"etc/hard", b"1", link=b"etc/config"),
)
TOC = "containerd.io/snapshot/stargz/toc.digest"


class Notes:
    """A watcher that keeps what it is told."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, int]] = []
        self.done: list[int] = []
        self.notes: list[str] = []

    def begin(self, what: str, total: int) -> None:
        self.steps.append((what, total))
        self.done.append(0)

    def advance(self, count: int) -> None:
        self.done[-1] += count

    def note(self, sentence: str) -> None:
        self.notes.append(sentence)


Run = Callable[..., Described]


@pytest.fixture
def notes() -> Notes:
    return Notes()


@pytest.fixture
def run(config: StoreConfig, notes: Notes) -> Run:
    """Converts from a source to a target."""

    def run(
        source: Source,
        target: Target,
        form: Format = "estargz",
        trace: tuple[bytes, ...] = (),
        platform: Platform = LINUX,
    ) -> Described:
        try:
            with target:
                return convert(
                    source, target, WRITERS[form](), trace, platform, config, notes, "the image"
                )
        finally:
            source.close()

    return run


@pytest.fixture
def result(tmp_path: Path) -> Path:
    """Where a new layout goes."""
    return tmp_path / "result"


def of(layout: OciLayout, config: StoreConfig, tag: str = "v1") -> Layout:
    return Layout(LayoutSource(layout.path, tag), config.limits)


def to(path: Path, tag: str | None = "new") -> LayoutTarget:
    return LayoutTarget(LayoutSource(path, tag))


def blob(path: Path, digest: str) -> Path:
    return path / "blobs/sha256" / digest.removeprefix("sha256:")


def document(path: Path, digest: str) -> Any:
    return json.loads(blob(path, digest).read_bytes())


def unpacked(path: Path, tag: str, directory: Path) -> Path:
    """The root filesystem that umoci makes of an image, without what eStargz adds."""
    image = f"{path}:{tag}"
    subprocess.run(["umoci", "unpack", "--image", image, directory], check=True)
    for name in EXTRA:
        (directory / "rootfs" / name).unlink(missing_ok=True)
    return directory / "rootfs"


@pytest.fixture
def image(layout: OciLayout) -> OciLayout:
    """A layout with an image of two layers, and more in its documents than we know of."""
    layers = [layout.blob(data, PLAIN) for data in (LOWER, UPPER)]
    layers[0]["annotations"] = {"kept": "yes", TOC: sha256(b"stale")}
    manifest = layout.manifest(
        layers,
        [sha256(LOWER), sha256(UPPER)],
        container={"Cmd": ["/bin/sh"], "Labels": {"a": "b"}, "Unknown": {"x": [1, None]}},
        annotations={"org.opencontainers.image.title": "kept"},
    )
    layout.tag("v1", manifest)
    return layout


def test_what_stays_and_what_changes(
    image: OciLayout, run: Run, result: Path, config: StoreConfig, notes: Notes
) -> None:
    new = run(of(image, config), to(result))
    before = document(image.path, image.entries[0]["digest"])
    after = document(result, new.digest)
    (named,) = json.loads((result / "index.json").read_text())["manifests"]
    assert (named["digest"], named["size"]) == (new.digest, new.size)
    assert after["annotations"] == before["annotations"]
    assert [layer["mediaType"] for layer in after["layers"]] == [GZIP, GZIP]
    assert after["layers"][0]["annotations"]["kept"] == "yes"
    assert after["layers"][0]["annotations"][TOC] != sha256(b"stale")
    old_config = document(image.path, before["config"]["digest"])
    new_config = document(result, after["config"]["digest"])
    assert new_config["rootfs"].pop("diff_ids") != old_config["rootfs"].pop("diff_ids")
    assert new_config == old_config
    assert sorted(path.name for path in result.iterdir()) == ["blobs", "index.json", "oci-layout"]
    assert notes.notes == []
    assert [what for what, _ in notes.steps] == [
        *("reading layer 2 of 2", "writing layer 2 of 2", "storing layer 2 of 2"),
        *("reading layer 1 of 2", "writing layer 1 of 2", "storing layer 1 of 2"),
    ]
    for (what, total), done in zip(notes.steps, notes.done, strict=True):
        # Converting leaves the old archive's end out and puts a landmark in.
        assert done == total or what.startswith("writing")


def test_the_same_files(image: OciLayout, run: Run, result: Path, config: StoreConfig) -> None:
    run(of(image, config), to(result), trace=(b"/etc/config", b"/bin/other"))
    mine = unpacked(result, "new", result.with_name("mine"))
    theirs = unpacked(image.path, "v1", result.with_name("theirs"))
    assert tree_diff(mine, theirs, ignore_times=[b"."]) == []
    assert (mine / "etc/config").read_text() == "upper"
    assert not (mine / "etc/gone").exists()


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("kind", [PLAIN, GZIP, ZSTD])
def test_the_same_digest(
    layout: OciLayout, run: Run, tmp_path: Path, config: StoreConfig, form: Format, kind: str
) -> None:
    layout.tag("v1", layout.image(LOWER, UPPER, kind=kind))
    trace = (b"/etc/config", b"/bin/sh", b"/nowhere")
    one = run(of(layout, config), to(tmp_path / "1"), form, trace)
    two = run(of(layout, config), to(tmp_path / "2"), form, trace)
    again = Layout(LayoutSource(tmp_path / "1", "new"), config.limits)
    assert one == two == run(again, to(tmp_path / "1", "again"), form, trace)


def test_files_of_a_trace_come_first_in_the_layer_that_shows_them(
    image: OciLayout, run: Run, result: Path, config: StoreConfig, notes: Notes
) -> None:
    trace = (b"/etc/config", b"/bin/sh", b"/etc/gone/way", b"//bin/../etc/hard")
    new = run(of(image, config), to(result), trace=trace)
    order = []
    for layer in document(result, new.digest)["layers"]:
        listed = subprocess.run(
            ["tar", "tzf", blob(result, layer["digest"])], check=True, capture_output=True
        )
        order.append(listed.stdout.decode().split())
    assert order[0][:4] == ["bin/", "bin/sh", ".prefetch.landmark", "bin/other"]
    assert order[1][:4] == ["etc/", "etc/config", "etc/hard", ".prefetch.landmark"]
    assert notes.notes == ["files of the trace that the image does not have: 1"]


def test_where_runtimes_look_for_users_comes_first_without_being_asked_for(
    layout: OciLayout, run: Run, result: Path, config: StoreConfig, notes: Notes
) -> None:
    users = archive(entry(b"bin/sh"), entry(b"etc/passwd", data=b"root"), entry(b"usr"))
    layout.tag("v1", layout.image(users))
    new = run(of(layout, config), to(result))
    (layer,) = document(result, new.digest)["layers"]
    listed = subprocess.run(
        ["tar", "tzf", blob(result, layer["digest"])], check=True, capture_output=True
    )
    assert listed.stdout.split()[:3] == [b"etc/passwd", b".prefetch.landmark", b"bin/sh"]
    assert notes.notes == []


def test_a_layer_that_cannot_be_described_is_kept(
    layout: OciLayout, run: Run, result: Path, config: StoreConfig, notes: Notes
) -> None:
    odd = archive(entry(b"not \xff utf-8", data=b"odd"))
    layout.tag("v1", layout.image(LOWER, odd, UPPER))
    old = document(layout.path, layout.entries[0]["digest"])["layers"]
    new = document(result, run(of(layout, config), to(result)).digest)["layers"]
    assert new[1] == old[1]
    assert new[0] != old[0]
    assert TOC in new[2]["annotations"]
    (note,) = notes.notes
    assert note.startswith("layer 2 of 3 is kept as it is: '/not \\xff utf-8' has a name")
    mine = unpacked(result, "new", result.with_name("mine"))
    theirs = unpacked(layout.path, "v1", result.with_name("theirs"))
    assert tree_diff(mine, theirs, ignore_times=[b"."]) == []


def test_dockers_media_types_become_ocis(
    layout: OciLayout, run: Run, result: Path, config: StoreConfig
) -> None:
    docker = "application/vnd.docker."
    odd = archive(entry(b"\xff", data=b"odd"))
    layers = [layout.blob(data, f"{docker}image.rootfs.diff.tar") for data in (LOWER, odd)]
    manifest = layout.manifest(layers, [sha256(LOWER), sha256(odd)])
    content = document(layout.path, manifest["digest"])
    content["mediaType"] = f"{docker}distribution.manifest.v2+json"
    content["config"]["mediaType"] = f"{docker}container.image.v1+json"
    layout.tag("v1", layout.document(content, content["mediaType"]))
    new = document(result, run(of(layout, config), to(result), "zstd:chunked").digest)
    assert new["mediaType"] == "application/vnd.oci.image.manifest.v1+json"
    assert new["config"]["mediaType"] == "application/vnd.oci.image.config.v1+json"
    assert [layer["mediaType"] for layer in new["layers"]] == [ZSTD, PLAIN]


def test_an_image_without_layers(
    layout: OciLayout, run: Run, result: Path, config: StoreConfig
) -> None:
    layout.tag("v1", layout.manifest([], []))
    assert document(result, run(of(layout, config), to(result)).digest)["layers"] == []


def test_one_platform_of_an_index(
    layout: OciLayout, run: Run, result: Path, config: StoreConfig
) -> None:
    builds = [
        {**layout.image(data, architecture=name), "platform": {"os": "linux", "architecture": name}}
        for name, data in (("amd64", LOWER), ("arm64", UPPER))
    ]
    layout.tag("v1", layout.index(*builds))
    run(of(layout, config), to(result), platform=Platform("linux", "arm64"))
    (entry,) = json.loads((result / "index.json").read_text())["manifests"]
    assert entry["platform"] == {"os": "linux", "architecture": "arm64"}
    with pytest.raises(NoMatchingPlatform):
        run(of(layout, config), to(result), platform=Platform("linux", "riscv64"))


# --- layouts ------------------------------------------------------------------------------


def names(path: Path) -> dict[str | None, str]:
    entries = json.loads((path / "index.json").read_text())["manifests"]
    key = "org.opencontainers.image.ref.name"
    return {entry.get("annotations", {}).get(key): entry["digest"] for entry in entries}


def test_other_images_of_a_layout_stay(image: OciLayout, run: Run, config: StoreConfig) -> None:
    path = image.path
    extra = {**json.loads((path / "index.json").read_text()), "annotations": {"x": "y"}}
    (path / "index.json").write_text(json.dumps(extra))
    old = image.entries[0]["digest"]
    one = run(of(image, config), to(path, "one"))
    two = run(of(image, config), to(path, "two"), "zstd:chunked")
    assert names(path) == {"v1": old, "one": one.digest, "two": two.digest}
    run(of(image, config), to(path, "one"), "zstd:chunked")
    assert names(path) == {"v1": old, "one": two.digest, "two": two.digest}
    run(of(image, config), to(path, "v1"))
    assert names(path) == {"v1": one.digest, "one": two.digest, "two": two.digest}
    for _ in range(2):
        run(of(image, config, "two"), to(path, None))
    assert len(json.loads((path / "index.json").read_text())["manifests"]) == 4
    assert json.loads((path / "index.json").read_text())["annotations"] == {"x": "y"}
    inspected = subprocess.run(
        ["skopeo", "inspect", "--raw", f"oci:{path}:v1"], check=True, capture_output=True
    )
    assert sha256(inspected.stdout) == one.digest


def test_what_is_no_layout(image: OciLayout, run: Run, tmp_path: Path, config: StoreConfig) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    for path in (tmp_path / "full", tmp_path / "full/file"):
        with pytest.raises(InvalidManifest, match="neither an OCI image layout nor an empty"):
            run(of(image, config), to(path))
    (tmp_path / "empty").mkdir()
    run(of(image, config), to(tmp_path / "empty"))
    (tmp_path / "empty/index.json").write_text('{"manifests": 1}')
    with pytest.raises(InvalidManifest, match="no image index"):
        run(of(image, config), to(tmp_path / "empty"))
    assert not [path for path in (tmp_path / "empty").iterdir() if path.name.startswith(".")]


def fails(run: Run, source: Source, target: Target, error: type[BaseException]) -> str:
    with pytest.raises(error) as caught:
        run(source, target)
    if isinstance(caught.value, StoreError):
        assert "\n" not in caught.value.sentence
    return str(caught.value)


def test_nothing_half_done_is_left(
    layout: OciLayout, run: Run, tmp_path: Path, config: StoreConfig, notes: Notes
) -> None:
    layout.tag("hostile", layout.image(archive(entry(b"../f")), UPPER))
    layout.tag("good", layout.image(LOWER, UPPER))
    layers = document(layout.path, layout.image(LOWER)["digest"])["layers"]
    layout.tag("wrong", layout.manifest(layers, [sha256(UPPER)]))
    new, old = tmp_path / "new", tmp_path / "old"
    run(of(layout, config, "good"), to(old))
    before = sorted(old.rglob("*"))
    for path in (new, old):
        assert "out of the image" in fails(
            run, of(layout, config, "hostile"), to(path), InvalidLayer
        )
        fails(run, of(layout, config, "wrong"), to(path), DigestMismatch)

    def interrupt(what: str, total: int) -> None:
        if what == "writing layer 1 of 2":
            raise KeyboardInterrupt

    notes.begin = interrupt  # type: ignore[method-assign]
    for path in (new, old):
        fails(run, of(layout, config, "good"), to(path), KeyboardInterrupt)
    assert not new.exists()
    assert sorted(old.rglob("*")) == before


# --- registries ---------------------------------------------------------------------------


@pytest.fixture(params=[None, "basic", "token"])
def guarded(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Registry]:
    """A registry with each kind of authentication."""
    with Registry(tmp_path / "guarded", auth=request.param) as registry:
        yield registry


def test_to_a_registry_and_back(
    image: OciLayout, run: Run, result: Path, config: StoreConfig, guarded: Registry
) -> None:
    name = parse_reference(f"{guarded.host}/private/app:v1")
    if guarded.auth:
        with pytest.raises(RegistryUnauthorized):
            run(of(image, config), RegistryTarget(name, config))
        log_in(config, guarded.host)
    new = run(of(image, config), RegistryTarget(name, config))
    source = Client(name, config)
    again = run(source, to(result))
    assert again == new, "what was converted is converted already"
    there = parse_reference(f"{guarded.host}/private/other:v1")
    assert run(Client(name, config), RegistryTarget(there, config), "zstd:chunked") != new
    command = ["skopeo", "--insecure-policy", "copy", "--quiet", "--src-tls-verify=false"]
    if guarded.auth:
        command += ["--src-creds", "ada:correct horse"]
    shutil.rmtree(result)
    subprocess.run([*command, f"docker://{name}", f"oci:{result}:x"], check=True)
    mine = unpacked(result, "x", result.with_name("mine"))
    theirs = unpacked(image.path, "v1", result.with_name("theirs"))
    assert tree_diff(mine, theirs, ignore_times=[b"."]) == []


def test_a_connection_that_breaks(
    layout: OciLayout, registry: Registry, run: Run, config: StoreConfig, result: Path
) -> None:
    layer = tar_of({"f": b"x" * 3_000_000})
    descriptor = layout.image(layer, kind=PLAIN)
    layout.tag("v1", descriptor)
    registry.push(layout, descriptor, "convert/breaks", "v1")
    with Proxy(registry.port) as proxy:
        proxy.on(f"/blobs/{sha256(layer)}", cut_after(1_000_000), times=2)
        source = Client(parse_reference(f"{proxy.host}/convert/breaks:v1"), config)
        broken = run(source, to(result))
        assert "Range" not in proxy.paths(sha256(layer))[0].headers
        assert len(proxy.paths(sha256(layer))) == 3
    assert broken == run(of(layout, config), to(result, "whole"))


def test_a_registry_without_a_layer(
    layout: OciLayout, registry: Registry, run: Run, config: StoreConfig, result: Path
) -> None:
    descriptor: Descriptor = layout.image(LOWER, UPPER)
    layout.tag("v1", descriptor)
    registry.push(layout, descriptor, "convert/lost", "v1")
    layers = document(layout.path, descriptor["digest"])["layers"]
    registry.blob_file(layers[0]["digest"]).write_bytes(b"damaged")
    name = parse_reference(f"{registry.host}/convert/lost:v1")
    target = RegistryTarget(parse_reference(f"{registry.host}/convert/new:v1"), config)
    with pytest.raises(StoreError):
        run(Client(name, config), target)
    client = Client(parse_reference(f"{registry.host}/convert/new:v1"), config)
    with pytest.raises(StoreError, match="has no image"):
        client.resolve()
    client.close()
