"""One registry, a few real images, and a daemon, shared by all tests of the whole."""

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from tests.support import lazy
from tests.support.layouts import OciLayout, busybox_layout, tar_of
from tests.support.mount import Mount
from tests.support.registry import Registry
from tools import images

# Lines of the daemon's log that no test should cause without saying so.
TROUBLE = re.compile(r" (WARNING|ERROR|CRITICAL) |Traceback")


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """An empty docker-registry."""
    with Registry(tmp_path_factory.mktemp("registry")) as running:
        yield running


@pytest.fixture(scope="session")
def busybox(registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The reference of an image with this machine's busybox, in the registry."""
    layout = busybox_layout(tmp_path_factory.mktemp("busybox") / "oci")
    registry.copy(f"oci:{layout.path}:latest", "busybox:1")
    return f"{registry.host}/busybox:1"


@pytest.fixture(scope="session")
def debian_layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An OCI layout that umoci made from debootstrap's output, and a second layer that
    changes, deletes and adds one of everything."""
    return images.two_layers(images.debian_layout("minbase"), tmp_path_factory.mktemp("debian"))


@pytest.fixture(scope="session")
def debian(registry: Registry, debian_layout: Path) -> str:
    """The reference of that image, pushed by skopeo."""
    registry.copy(f"oci:{debian_layout}:latest", "library/debian:two")
    return f"{registry.host}/library/debian:two"


def write_config(path: Path, registry: Registry, *, fill: bool = True) -> Path:
    """Settings for tests: docker.io is our registry, and nobody waits for long."""
    settings = {
        "store": {
            "registries": {"docker.io": {"mirrors": [registry.host]}},
            "layers": {"ratio_floor": 64 << 20},
            "patience": {"read_seconds": 2.0, "attempts": 3, "backoff_seconds": 0.05},
            "lazy": {"fill": fill},
        }
    }
    path.write_text(json.dumps(settings))
    return path


@pytest.fixture(scope="session")
def shared_mount(
    registry: Registry, busybox: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Mount]:
    """A daemon that has pulled the busybox image."""
    directory = tmp_path_factory.mktemp("shared")
    mount = Mount(directory)
    mount.config = write_config(directory / "config.json", registry)
    try:
        mount.start()
        mount.pull(busybox)
        yield mount
    finally:
        mount.destroy()


@pytest.fixture
def mount(shared_mount: Mount, request: pytest.FixtureRequest) -> Iterator[Mount]:
    """The shared daemon; a test leaves no container and causes no warning in its log."""
    start = shared_mount.log.stat().st_size
    yield shared_mount
    names = set(shared_mount.containers())
    for name in names:
        shared_mount.remove(name)
    check_log(shared_mount, start, request)


@pytest.fixture
def own_mount(
    registry: Registry, busybox: str, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[Mount]:
    """A daemon for one test, which may treat it badly; started, with the busybox image."""
    mount = Mount(tmp_path)
    mount.config = write_config(tmp_path / "config.json", registry)
    try:
        mount.start()
        mount.pull(busybox)
        yield mount
        check_log(mount, 0, request)
    finally:
        mount.destroy()


def check_log(mount: Mount, start: int, request: pytest.FixtureRequest) -> None:
    """Fail if the log, from byte ``start`` on, has trouble that the test doesn't announce."""
    expected = [mark.args[0] for mark in request.node.iter_markers("logs")]
    with mount.log.open("rb") as file:
        file.seek(start)
        lines = file.read().decode("utf-8", "replace").splitlines()
    trouble = [line for line in lines if TROUBLE.search(line)]
    unexpected = [line for line in trouble if not any(re.search(p, line) for p in expected)]
    assert not unexpected, "\n".join(unexpected)


@pytest.fixture(scope="session")
def lazy_image(registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The reference of an image with one lazy layer, in the registry."""
    files = {"etc/": b"", "etc/motd": b"hello\n", "data": random.Random(1).randbytes(1 << 20)}
    layer = lazy.estargz(tar_of(files), chunk_size=64 << 10)
    layout = OciLayout(tmp_path_factory.mktemp("lazy") / "oci")
    layout.blob(layer.data, layer.layer.media_type)
    manifest = layout.manifest([msgspec.to_builtins(layer.layer)], [layer.diff_id])
    return registry.push(layout, manifest, "lazy", "v1")


@pytest.fixture(scope="module")
def used_mount(
    registry: Registry, busybox: str, lazy_image: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Mount]:
    """A daemon with everything that makes files appear: a complete image and one that is not,
    and containers that have not run (`idle`), run (`busy`) and have ended (`done`)."""
    directory = tmp_path_factory.mktemp("used")
    mount = Mount(directory)
    mount.config = write_config(directory / "config.json", registry, fill=False)
    try:
        mount.start()
        mount.pull(busybox)
        mount.pull(lazy_image)
        mount.container("idle", busybox, "sh", "-c", "exit 0")
        mount.container("busy", busybox, "sh", "-c", "echo busy; sleep 1000")
        mount.write("containers/busy/state", "start")
        mount.run_container("done", busybox, "sh", "-c", "echo done; exit 4")
        yield mount
    finally:
        mount.destroy()


@pytest.fixture
def idle_container(used_mount: Mount) -> Path:
    """A container that has not run."""
    return used_mount.path / "containers" / "idle"
