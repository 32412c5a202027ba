"""Lazy images on a real mount, from a real registry, served in both ways: browsed and run before
their bytes are here, filled, cut off, and with every process killed."""

import errno
import hashlib
import io
import itertools
import json
import os
import random
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from runtime import keeper
from runtime.cgroups import freezer
from runtime.layerserver.fanotify_serving import group_name
from store.config import StoreConfig
from store.fetcher import AGAIN_SECONDS
from store.index_artifact import push_indexes
from store.index_document import encode_index
from store.manifest import Descriptor
from store.push import Pusher
from store.reference import parse_reference
from store.registry import Registry as Client
from tests.e2e.conftest import check_log
from tests.support import lazy
from tests.support import proxy as faults
from tests.support.indexing import digest, index_of, table_of
from tests.support.layouts import GZIP, ZSTD, OciLayout, compress, sha256, tar_of
from tests.support.mount import Mount
from tests.support.processes import parent
from tests.support.proxy import Proxy
from tests.support.registry import Registry
from tests.support.spans import one_frame
from tests.support.systemd import Systemd

READ_SECONDS = 1.5
SETTINGS: dict[str, Any] = {
    "patience": {"read_seconds": 1.0, "attempts": 2, "backoff_seconds": 0.05},
    "lazy": {"read_seconds": READ_SECONDS, "record_seconds": 2.0},
}


def noise(seed: int, size: int) -> bytes:
    """Bytes that don't compress and are zero nowhere for long."""
    return random.Random(seed).randbytes(size)


def files(seed: int, large: int) -> dict[str, bytes]:
    """A small image: a shell, large files of so many bytes, and many small ones. Two files of zeros
    have the layer's contents lie in three data files."""
    busybox = Path("/bin/busybox").read_bytes()
    made = {"bin/": b"", "bin/busybox": busybox, "data/": b"", "data/empty": b""}
    made |= {f"data/large{n}": noise(seed + n, large + n) for n in range(3)}
    for n in range(150):
        if n % 75 == 0:
            made[f"zeros{n // 75}"] = bytes(17 << 20)
        made[f"data/small{n:03}"] = noise(seed + 100 + n, 50 * n + 1)
    return made


class Image:
    """An image of one lazy layer in the registry."""

    def __init__(
        self,
        registry: Registry,
        directory: Path,
        name: str,
        seed: int,
        write: Callable[..., lazy.LazyBlob] = lazy.estargz,
        large: int = 3_000_000,
    ) -> None:
        self.name = name
        self.files = files(seed, large)
        archive = tar_of(self.files)
        layer = write(archive, chunk_size=256 << 10)
        layout = OciLayout(directory / name)
        layout.blob(layer.data, layer.layer.media_type)
        descriptor = json.loads(msgspec.json.encode(layer.layer))
        container = {"Cmd": ["/bin/busybox", "sh"]}
        manifest = layout.manifest([descriptor], [layer.diff_id], container=container)
        self.reference = registry.push(layout, manifest, f"lazy/{name}", "v1")
        self.layer = layer.layer
        self.diff_id = layer.diff_id
        self.sums = "".join(
            f"{hashlib.sha256(data).hexdigest()}  {path}\n"
            for path, data in sorted(self.files.items())
            if path.startswith("data/") and not path.endswith("/")
        )

    def at(self, host: str) -> str:
        """Its reference."""
        return f"{host}/lazy/{self.name}:v1"


def ordinary(
    media_type: str, packed: Callable[[bytes], bytes], archive: bytes, chunk_size: int
) -> lazy.LazyBlob:
    """A layer without a table of contents."""
    blob = packed(archive)
    descriptor = Descriptor(media_type, digest(blob), len(blob))
    return lazy.LazyBlob(blob, descriptor, digest(archive), (0, 0))


def ordinary_image(registry: Registry, directory: Path) -> Image:
    """An image of one long zstd frame, and its index beside it in the registry."""
    write = partial(ordinary, ZSTD, one_frame)
    image = Image(registry, directory, "one-frame", 4, write, large=12_000_000)
    command = [sys.executable, "-m", "tools.ctrfs", "index", f"docker://{image.reference}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return image


@pytest.fixture(scope="module")
def images(registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Image]:
    """One of each format."""
    directory = tmp_path_factory.mktemp("lazy")
    return {
        "estargz": Image(registry, directory, "estargz", 1),
        "packed": Image(
            registry,
            directory,
            "packed",
            2,
            lambda tar, chunk_size: lazy.estargz(
                tar, chunk_size=chunk_size, min_chunk_size=16 << 10
            ),
        ),
        "zstd": Image(registry, directory, "zstd", 3, lazy.zstd_chunked),
        "one frame": ordinary_image(registry, directory),
    }


@pytest.fixture
def front(registry: Registry) -> Iterator[Proxy]:
    """A proxy before the registry."""
    with Proxy(registry.port) as proxy:
        yield proxy


@pytest.fixture(params=["fuse", "fanotify"])
def method(request: pytest.FixtureRequest) -> str:
    """How layers are served."""
    return cast(str, request.param)


@pytest.fixture
def lazy_mount(method: str, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Mount]:
    """A daemon that serves so, and doesn't fill by itself unless the test says so."""
    fill = request.node.get_closest_marker("fill") is not None
    settings = {**SETTINGS, "lazy": {**SETTINGS["lazy"], "method": method, "fill": fill}}
    mount = Mount(tmp_path)
    mount.config = tmp_path / "config.json"
    mount.config.write_text(json.dumps({"store": settings}))
    try:
        mount.start()
        yield mount
        check_log(mount, 0, request)
    finally:
        mount.destroy()


def forget_caches() -> None:
    """Nothing that was read is in memory any more."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def until(condition: Callable[[], bool], seconds: float = 15.0) -> None:
    """Wait for something."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def ranges(front: Proxy, image: Image) -> list[tuple[int, int]]:
    """What was asked for of the image's layer."""
    found = []
    for request in front.paths(f"/blobs/{image.layer.digest}"):
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("Range", ""))
        assert match, request.headers
        found.append((int(match[1]), int(match[2]) + 1))
    return sorted(found)


def each_once(found: list[tuple[int, int]]) -> bool:
    """No byte was asked for twice."""
    return all(a[1] <= b[0] for a, b in itertools.pairwise(found))


def check_files(image: Image, root: Path) -> None:
    """All files below a directory are right."""
    for path, data in image.files.items():
        if not path.endswith("/"):
            assert (root / path).read_bytes() == data, path


SUMS = "cd /data && /bin/busybox sha256sum $(/bin/busybox ls) | /bin/busybox sed 's,  ,  data/,'"


@pytest.mark.fill
@pytest.mark.parametrize("kind", ["estargz", "packed", "zstd", "one frame"])
def test_used_filled_and_cut_off(
    lazy_mount: Mount, images: dict[str, Image], front: Proxy, kind: str, method: str
) -> None:
    mount, image = lazy_mount, images[kind]
    name = image.at(front.host)
    mount.pull(name)
    here = mount.path / "images" / name
    assert re.fullmatch(r"lazy \d+%", mount.read(f"images/{name}/state"))
    assert int((here / "layers/0/fetched").read_text()) < image.layer.size / 2
    assert (here / "layers/0/lazy").read_text() == "yes\n"
    listed = sorted(os.listdir(here / "rootfs/data"))
    assert listed == sorted(
        path.removeprefix("data/") for path in image.files if path[5:] and path[:5] == "data/"
    )
    assert (here / "rootfs/data/small042").read_bytes() == image.files["data/small042"]
    code, output = mount.run_container("a", name, "/bin/busybox", "sh", "-c", SUMS)
    assert (code, output + "\n") == (0, image.sums)
    until(lambda: mount.read(f"images/{name}/state") == "complete")
    assert each_once(ranges(front, image))
    assert not (here / "layers/0/data").is_symlink() or (here / "layers/0/data").exists()
    digest = image.layer.digest.removeprefix("sha256:")
    content = (mount.path / "content/sha256" / digest).read_bytes()
    assert sha256(content) == image.layer.digest
    requests = len(front.seen)
    front.on("", faults.status(500))
    forget_caches()
    check_files(image, here / "rootfs")
    mount.write("containers/a/state", "start")
    assert mount.read("containers/a/wait") == "0"
    assert mount.read("containers/a/log").count(image.sums.rstrip("\n")) == 2
    assert len(front.seen) == requests


def test_fetch(lazy_mount: Mount, images: dict[str, Image], front: Proxy) -> None:
    mount, image = lazy_mount, images["estargz"]
    name = image.at(front.host)
    mount.pull(name)
    assert mount.read(f"images/{name}/fetch") == ""
    mount.write(f"images/{name}/fetch", "/data/large1")
    front.on("/blobs/", faults.status(500))
    data = image.files["data/large1"]
    assert (mount.path / "images" / name / "rootfs/data/large1").read_bytes() == data
    code, sentence = mount.refused(f"images/{name}/fetch", "/data/nothing")
    assert (code, "has no '/data/nothing'" in sentence) == (errno.ENOENT, True)
    front.heal()
    mount.write(f"images/{name}/fetch", "all")
    assert mount.read(f"images/{name}/state") == "complete"
    assert mount.read(f"images/{name}/fetch") == "all"


def test_a_full_pull_of_what_is_lazy(
    lazy_mount: Mount, images: dict[str, Image], front: Proxy
) -> None:
    mount, image = lazy_mount, images["packed"]
    name = image.at(front.host)
    mount.pull(name)
    mount.pull(f"{name} mode=full")
    assert mount.read(f"images/{name}/state") == "complete"
    assert each_once(ranges(front, image))


def test_the_same_content_in_another_blob(
    lazy_mount: Mount,
    images: dict[str, Image],
    registry: Registry,
    front: Proxy,
    tmp_path: Path,
) -> None:
    mount, first = lazy_mount, images["one frame"]
    write = partial(ordinary, GZIP, lambda archive: compress(archive, GZIP))
    second = Image(registry, tmp_path, "twin", 4, write, large=12_000_000)
    assert second.diff_id == first.diff_id
    mount.pull(first.at(front.host))
    mount.pull(second.at(front.host))
    layer = f"images/{second.at(front.host)}/layers/0"
    assert mount.read(f"{layer}/format") == "gzip"
    assert mount.read(f"{layer}/lazy") == "no: its content came with another image"
    assert mount.read(f"{layer}/fetched") == str(second.layer.size)
    layer = f"images/{first.at(front.host)}/layers/0"
    assert mount.read(f"{layer}/format") == "zstd+index"
    assert mount.read(f"{layer}/lazy") == "yes"


def test_ordinary_images_say_why_they_are_not_lazy(
    lazy_mount: Mount, busybox: str, registry: Registry
) -> None:
    lazy_mount.pull(busybox)
    assert lazy_mount.read(f"images/{busybox}/state") == "complete"
    assert lazy_mount.read(f"images/{busybox}/layers/0/lazy").startswith("no: ")


@pytest.mark.logs("did not come|answered 503|can't be reached")
def test_a_registry_that_goes_away_and_comes_back(
    lazy_mount: Mount, method: str, images: dict[str, Image], front: Proxy
) -> None:
    mount, image = lazy_mount, images["estargz"]
    name = image.at(front.host)
    mount.pull(name)
    rootfs = mount.path / "images" / name / "rootfs/data"
    assert (rootfs / "small001").read_bytes() == image.files["data/small001"]
    front.on("/blobs/", faults.status(503))
    begin = time.monotonic()
    reader = subprocess.Popen(["cat", rootfs / "large2"], stderr=subprocess.PIPE)
    assert b"Input/output error" in reader.communicate()[1]
    assert time.monotonic() - begin < READ_SECONDS + 0.5
    assert (rootfs / "small001").read_bytes() == image.files["data/small001"]
    # FUSE does not say who reads.
    who = f" by pid {reader.pid} uid 0" if method == "fanotify" else ""
    line = f"/images/{name}/layers/0/rootfs/data/large2: read{who}: "
    until(lambda: line in mount.read("errors"))
    assert mount.read("errors").count("layers/0/rootfs") == 1
    time.sleep(AGAIN_SECONDS)
    index = mount.root / "layers" / image.diff_id.removeprefix("sha256:") / "index"
    index.write_bytes(index.read_bytes()[:-1])
    with pytest.raises(OSError, match="Input/output error"):
        (rootfs / "large1").read_bytes()
    until(lambda: f"/images/{name}/layers/0/rootfs: read" in mount.read("errors"))
    front.heal()
    time.sleep(AGAIN_SECONDS)
    assert (rootfs / "large2").read_bytes() == image.files["data/large2"]


@pytest.mark.logs("did not answer|did not come|went on")
def test_one_request_that_stalls_is_sent_again(
    lazy_mount: Mount, images: dict[str, Image], front: Proxy
) -> None:
    mount, image = lazy_mount, images["estargz"]
    name = image.at(front.host)
    mount.pull(name)
    front.on(f"/blobs/{image.layer.digest}", faults.stall, times=1)
    large = mount.path / "images" / name / "rootfs/data/large2"
    begin = time.monotonic()
    assert large.read_bytes() == image.files["data/large2"]
    assert time.monotonic() - begin < READ_SECONDS


def test_convert_brings_what_is_missing(
    lazy_mount: Mount, images: dict[str, Image], front: Proxy, tmp_path: Path
) -> None:
    mount, image = lazy_mount, images["estargz"]
    name = image.at(front.host)
    mount.pull(name)
    assert mount.read(f"images/{name}/state").startswith("lazy")
    command = [sys.executable, "-m", "tools.ctrfs", "convert", name, f"oci:{tmp_path}/out:v1"]
    command += ["--mount", str(mount.path), "--format", "zstd:chunked"]
    assert subprocess.run(command, check=True, capture_output=True).stdout.startswith(b"sha256:")
    until(lambda: mount.read(f"images/{name}/state") == "complete")
    mount.pull(f"oci:{tmp_path}/out:v1 as=again:1")
    check_files(image, mount.path / "images/again:1/rootfs")


@pytest.mark.logs("hostile")
def test_wrong_bytes_reach_nobody(
    lazy_mount: Mount, images: dict[str, Image], front: Proxy
) -> None:
    mount, image = lazy_mount, images["zstd"]
    name = image.at(front.host)
    mount.pull(name)
    path = mount.path / "images" / name / "rootfs/data/large0"
    front.on("/blobs/", faults.damaged)
    with pytest.raises(OSError) as caught:
        path.read_bytes()
    assert caught.value.errno == errno.EIO
    until(lambda: "hostile" in mount.read("errors"))
    assert "/layers/0/rootfs/data/large0: read" in mount.last_error()
    front.heal()
    time.sleep(AGAIN_SECONDS)
    assert path.read_bytes() == image.files["data/large0"]


@pytest.mark.logs("a killed daemon left")
def test_the_daemon_is_killed_and_containers_read_on(
    lazy_mount: Mount, images: dict[str, Image], front: Proxy
) -> None:
    mount, image = lazy_mount, images["estargz"]
    name = image.at(front.host)
    mount.pull(name)
    script = f"/bin/busybox sleep 1; {SUMS}"
    mount.container("a", name, "/bin/busybox", "sh", "-c", script)
    mount.write("containers/a/state", "start")
    mount.kill()
    time.sleep(1.5)
    mount.start()
    assert mount.read("containers/a/wait") == "0"
    assert mount.read("containers/a/log") + "\n" == image.sums
    assert mount.read(f"images/{name}/state").startswith("lazy ")
    assert each_once(ranges(front, image))


DAMAGE: dict[str, Callable[[Path], None]] = {
    "a part gone": lambda layer: layer.joinpath(sorted(os.listdir(layer))[1]).unlink(),
    "present gone": lambda layer: (layer / "present").unlink(),
    "blob gone": lambda layer: (layer / "blob").unlink(),
    "a directory": lambda layer: _replace(layer / "data"),
}


def _replace(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.logs("the layer server has died|is missing or damaged|is not known|removing the layer")
def test_what_is_damaged_when_the_layer_server_dies(
    lazy_mount: Mount, images: dict[str, Image], front: Proxy, damage: str
) -> None:
    """Nothing wrong is read, and what is mounted is right again after the next pull."""
    mount, image, other = lazy_mount, images["estargz"], images["zstd"]
    name = image.at(front.host)
    mount.pull(name)
    mount.pull(other.at(front.host))
    rootfs = mount.path / "images" / name / "rootfs"
    assert (rootfs / "data/small007").read_bytes() == image.files["data/small007"]
    DAMAGE[damage](mount.root / "layers" / image.diff_id.removeprefix("sha256:"))
    kill_layer_server(mount)
    with suppress(OSError):
        assert (rootfs / "data/large1").read_bytes() == image.files["data/large1"]
    until(lambda: "of the layer in" in mount.read("errors"))
    assert mount.read(f"images/{name}/state").startswith("corrupt")
    mount.pull(name)
    until(lambda: _reads(rootfs / "data/large1", image.files["data/large1"]))
    check_files(image, rootfs)
    check_files(other, mount.path / "images" / other.at(front.host) / "rootfs")


def kill_layer_server(mount: Mount) -> None:
    """SIGKILL, and wait for the next one."""
    before = mount.layer_servers()
    for pid in before:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    until(lambda: bool(set(mount.layer_servers()) - set(before)))


@pytest.mark.logs("the layer server has died")
@pytest.mark.parametrize("kind", ["packed", "one frame"])
def test_the_layer_server_is_killed(
    lazy_mount: Mount, images: dict[str, Image], front: Proxy, method: str, kind: str
) -> None:
    mount, image = lazy_mount, images[kind]
    name = image.at(front.host)
    mount.pull(name)
    rootfs = mount.path / "images" / name / "rootfs"
    assert (rootfs / "data/small007").read_bytes() == image.files["data/small007"]
    script = f"/bin/busybox sleep 1; {SUMS}"
    mount.container("a", name, "/bin/busybox", "sh", "-c", script)
    mount.container("idle", name, "/bin/busybox", "true")
    idle = mount.path / "containers/idle/rootfs"
    assert (idle / "data/small008").read_bytes() == image.files["data/small008"]
    mount.write("containers/a/state", "start")
    kill_layer_server(mount)
    code = mount.read("containers/a/wait")
    if method == "fanotify":
        assert code == "0"
        assert mount.read("containers/a/log") + "\n" == image.sums
    else:
        right = set(image.sums.splitlines())
        log = mount.read("containers/a/log").splitlines()
        assert all(line in right for line in log if re.match("[0-9a-f]{64} ", line))
        until(lambda: "until it is started again" in mount.read("errors"))
    # What does not run is made whole.
    until(lambda: _reads(idle / "data/large0", image.files["data/large0"]))
    until(lambda: _reads(rootfs / "data/large1", image.files["data/large1"]))
    mount.write("containers/a/state", "start")
    assert mount.read("containers/a/wait") == "0"


def _reads(path: Path, data: bytes) -> bool:
    try:
        return path.read_bytes() == data
    except OSError:
        return False


@pytest.mark.logs("layer server has died|a killed daemon left")
def test_whichever_process_dies_no_wrong_byte_is_read(
    lazy_mount: Mount, images: dict[str, Image], front: Proxy, method: str
) -> None:
    """20 containers checksum their files while processes are killed at random moments."""
    mount = lazy_mount
    chance = random.Random(7)
    for kind in THREE:
        mount.pull(images[kind].at(front.host))
    kinds = {f"c{n}": THREE[n % 3] for n in range(20)}
    # Each with another order of files, so that there is always something to fetch.
    script = checksums("/bin/busybox sha256sum $f || echo failed")
    for name, kind in kinds.items():
        command = ("/bin/busybox", "sh", "-c", script)
        mount.container(name, images[kind].at(front.host), *command)
        mount.write(f"containers/{name}/state", "start")
    begin(mount, kinds)
    front.on("/blobs/", faults.late(0.15))
    orphan = "c7"
    rounds = [{"server"}, {"daemon"}, {"keeper"}, {"server", "keeper"}, {"monitor"}]
    rounds += [{"server", "daemon", "keeper"}, {"server"}]
    chance.shuffle(rounds)
    for victims in rounds:
        time.sleep(0.05 + chance.random() * 0.2)
        # So that a kill can do harm. With FUSE, all that come after the first fail at once.
        if method == "fanotify" or victims is rounds[0]:
            assert sum(_is(mount, name, "running") for name in kinds) >= 15
        _kill(mount, victims, orphan)
    front.heal()
    right = {
        kind: {f"{sha256(data)[7:]}  {path[5:]}" for path, data in image.files.items()}
        for kind, image in images.items()
    }
    for name, kind in kinds.items():
        mount.read(f"containers/{name}/wait")
        lines = mount.read(f"containers/{name}/log").splitlines()
        sums = [line for line in lines if re.match("[0-9a-f]{64} ", line)]
        assert set(sums) <= right[kind]
        if method == "fanotify" and name != orphan:
            assert "failed" not in lines
            assert len(sums) == 154


THREE = ("estargz", "zstd", "one frame")


def checksums(command: str) -> str:
    """A script that does something with each file at random, once ``begin`` says so."""
    return (
        "trap go=1 USR1; echo ready; until [ $go ]; do /bin/busybox sleep 0.05; done;"
        f" cd /data; for f in $(/bin/busybox ls | /bin/busybox shuf); do {command}; done"
    )


def begin(mount: Mount, names: Iterable[str]) -> None:
    """Have all containers do it at once."""
    for name in names:
        until(partial(_says_ready, mount, name))
    for name in names:
        mount.write(f"containers/{name}/signal", "USR1")


def _says_ready(mount: Mount, name: str) -> bool:
    return mount.read(f"containers/{name}/log") == "ready"


def _is(mount: Mount, name: str, state: str) -> bool:
    return mount.read(f"containers/{name}/state") == state


def _kill(mount: Mount, victims: set[str], orphan: str) -> None:
    """Kill processes at once; a monitor is that of ``orphan``."""
    monitor = 0
    if "monitor" in victims:
        with suppress(FileNotFoundError, ValueError):  # its container has ended
            monitor = parent(int(mount.read(f"containers/{orphan}/pid")))
    if "daemon" in victims:
        mount.kill()
    if "keeper" in victims:
        keeper.stop(group_name(mount.run))
    for pid in [monitor] * bool(monitor) + mount.layer_servers() * ("server" in victims):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    if "daemon" in victims:
        mount.start()


def _answers(mount: Mount) -> bool:
    try:
        return mount.read("version") != ""
    except OSError:
        return False


def _is_gone(pid: int) -> bool:
    """Whether a process has ended, though nobody may have asked how."""
    status = Path(f"/proc/{pid}/status")
    return not status.exists() or "\nState:\tZ" in status.read_text()


def start_idling(mount: Mount, image: str) -> None:
    """A container "runs" that does nothing; its program is here, else it would crash over zeros."""
    script = "/bin/busybox cat /bin/busybox > /dev/null; echo ready; exec /bin/busybox sleep 1000"
    mount.container("runs", image, "/bin/busybox", "sh", "-c", script)
    mount.write("containers/runs/state", "start")
    until(partial(_says_ready, mount, "runs"))


def kill_at_once(mount: Mount, victims: Iterable[int]) -> None:
    """SIGKILL; to the daemon first, or it would see the others die."""
    daemon = mount.pid
    if daemon in victims:
        mount.kill()
    for pid in set(victims) - {daemon}:
        os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("when", ["at once", "later"])
def test_who_reads_on_after_umount_reads_no_zeros(
    lazy_mount: Mount, images: dict[str, Image], front: Proxy, method: str, when: str
) -> None:
    """The mount is detached, so it is to be seen nowhere that somebody has a file of it open."""
    mount, image = lazy_mount, images["estargz"]
    name = image.at(front.host)
    mount.pull(name)
    data = image.files["data/large1"]
    file = (mount.path / "images" / name / "rootfs/data/large1").open("rb")
    with file, ThreadPoolExecutor() as pool:
        if when == "at once":
            front.on("/blobs/", faults.late(0.5))
            read = pool.submit(file.read)
            time.sleep(0.2)
        mount.stop()
        if when == "later":
            assert mount.layer_servers()
            read = pool.submit(file.read)
        assert read.result(30) == data
    if (method, when) == ("fanotify", "later"):  # a server waits some seconds for the next daemon
        until(lambda: not mount.layer_servers(), 30.0)
        assert keeper.find(group_name(mount.run)) == []
        assert not mount.run.exists()


@pytest.mark.logs("layer server has died")
@pytest.mark.parametrize("method", ["fanotify"])
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_who_waits_when_layer_server_and_daemon_end_at_once(
    lazy_mount: Mount, images: dict[str, Image], front: Proxy, how: signal.Signals
) -> None:
    mount, image = lazy_mount, images["estargz"]
    name = image.at(front.host)
    mount.pull(name)
    front.on("/blobs/", faults.late(0.5))
    path = mount.path / "images" / name / "rootfs/data/large1"
    with path.open("rb") as file, ThreadPoolExecutor() as pool:
        read = pool.submit(file.read)
        time.sleep(0.2)
        (server,) = mount.layer_servers()
        os.kill(server, how)
        mount.stop()
        try:
            assert read.result(10) == image.files["data/large1"]
        except TimeoutError:
            mount.start()  # or the reader would keep this test from ending
            raise
    for pid in mount.layer_servers():  # it would wait some seconds for the next daemon
        os.kill(pid, signal.SIGTERM)
    until(lambda: not mount.layer_servers())


@pytest.mark.logs("a killed daemon left")
@pytest.mark.parametrize("method", ["fanotify"])
def test_all_who_guard_a_layer_die_at_once(
    lazy_mount: Mount, images: dict[str, Image], front: Proxy
) -> None:
    """What is read until a server is there again may be zeros: nobody goes on with that."""
    mount, image = lazy_mount, images["estargz"]
    name = image.at(front.host)
    mount.pull(name)
    start_idling(mount, name)
    mount.container("idle", name, "/bin/busybox", "sh", "-c", SUMS)
    for top in (mount.path / "containers/idle/rootfs", mount.path / "images" / name / "rootfs"):
        assert (top / "data/small001").read_bytes() == image.files["data/small001"]
    init = int(mount.read("containers/runs/pid"))
    view = Path(f"/proc/{init}/root/data")
    holders = keeper.find(group_name(mount.run))
    assert len(holders) >= 4
    kill_at_once(mount, {mount.pid, *holders})
    keeper.stop(group_name(mount.run))  # as where no keeper can be frozen
    until(lambda: not keeper.find(group_name(mount.run)))
    assert (view / "large1").read_bytes() == bytes(len(image.files["data/large1"]))
    mount.start()
    until(lambda: mount.read("containers/runs/state") == "stopped")
    until(lambda: _is_gone(init))
    assert "monitor" in mount.read("containers/runs/error")
    until(lambda: "may have read zeros" in mount.read("errors"))
    assert f"/images/{name}/layers/0/rootfs: read" in mount.read("errors")
    for top in (mount.path / "containers/idle/rootfs", mount.path / "images" / name / "rootfs"):
        until(partial(_reads, top / "data/large1", image.files["data/large1"]))
    mount.write("containers/idle/state", "start")
    assert mount.read("containers/idle/wait") == "0"
    assert mount.read("containers/idle/log") + "\n" == image.sums


@pytest.mark.logs("a killed daemon left")
@pytest.mark.parametrize("method", ["fanotify"])
def test_a_frozen_keeper_holds_readers_when_all_others_die(
    lazy_mount: Mount, images: dict[str, Image], front: Proxy
) -> None:
    """It can't be killed: readers wait for the next daemon, and nobody reads zeros."""
    mount, image = lazy_mount, images["estargz"]
    if not _has_frozen_keeper(mount):
        pytest.skip("nothing freezes a process here, and info.json says so")
    name = image.at(front.host)
    mount.pull(name)
    start_idling(mount, name)
    inside = (Path("/proc") / mount.read("containers/runs/pid") / "root/data/large0").open("rb")
    outside = (mount.path / "images" / name / "rootfs/data/large1").open("rb")
    with inside, outside, ThreadPoolExecutor() as pool:
        holders = keeper.find(group_name(mount.run))
        assert len(holders) >= 4
        kill_at_once(mount, {mount.pid, *holders})
        until(lambda: len(keeper.find(group_name(mount.run))) == 1)
        read = [pool.submit(file.read) for file in (inside, outside)]
        time.sleep(0.3)
        assert not any(future.done() for future in read)
        mount.start()
        assert read[0].result(30) == image.files["data/large0"]
        assert read[1].result(30) == image.files["data/large1"]
    assert "may have read zeros" not in mount.read("errors")
    code, log = mount.run_container("sums", name, "/bin/busybox", "sh", "-c", SUMS)
    assert (code, log + "\n") == (0, image.sums)


def _has_frozen_keeper(mount: Mount) -> bool:
    """As everywhere with cgroup v1; elsewhere users are told that there is none."""
    found = json.loads(mount.read("info.json"))["features"]["holder of waiting readers"]
    assert found["ok"] == (freezer() is not None)
    assert found["found"] == ("a frozen process" if freezer() else "processes that can be killed")
    return freezer() is not None


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[Systemd]:
    """The service, under a systemd that starts it again a second after it has died."""
    config = tmp_path / "config.json"
    lazy_settings = {**SETTINGS["lazy"], "method": "fanotify", "fill": False}
    config.write_text(json.dumps({"store": {**SETTINGS, "lazy": lazy_settings}}))
    service = Systemd(tmp_path, config, away=1.0)
    try:
        service.start()
        yield service
    finally:
        service.destroy()


def test_a_service_manager_holds_readers_when_all_who_guard_them_die(
    systemd: Systemd, tmp_path: Path, images: dict[str, Image], front: Proxy
) -> None:
    """Then nobody reads zeros: readers wait for the service to be there again."""
    mount, image = Mount(tmp_path), images["estargz"]
    mount.path = systemd.seen(mount.path)
    found = json.loads(mount.read("info.json"))["features"]["holder of waiting readers"]
    assert found == {"ok": True, "found": "the service manager"}
    name = image.at(front.host)
    mount.pull(name)
    start_idling(mount, name)
    init = systemd.seen(Path("/proc") / mount.read("containers/runs/pid"))
    inside = (init / "root/data/large0").open("rb")
    outside = (mount.path / "images" / name / "rootfs/data/large1").open("rb")
    with inside, outside, ThreadPoolExecutor() as pool:
        assert len(keeper.find(group_name(mount.run))) >= 5
        # All of the service's processes; the container's have a cgroup of their own.
        systemd.systemctl("kill", "--signal=KILL", "ctrfs")
        until(lambda: keeper.find(group_name(mount.run)) == [systemd.pid])
        read = [pool.submit(file.read) for file in (inside, outside)]
        assert init.exists()
        assert read[0].result(30) == image.files["data/large0"]
        assert read[1].result(30) == image.files["data/large1"]
    until(lambda: systemd.shows("NRestarts=1", "ActiveState=active"))
    assert "may have read zeros" not in mount.read("errors")
    assert keeper.is_there(group_name(mount.run))
    passed = systemd.seen(Path("/proc") / systemd.show("MainPID") / "fd")
    assert sum("fanotify" in os.readlink(passed / number) for number in os.listdir(passed)) <= 2
    code, log = mount.run_container("sums", name, "/bin/busybox", "sh", "-c", SUMS)
    assert (code, log + "\n") == (0, image.sums)
    for container in ("runs", "sums"):
        mount.remove(container)
    assert systemd.systemctl("stop", "ctrfs") == ""
    assert systemd.shows("Result=success")
    assert keeper.find(group_name(mount.run)) == []


def test_any_processes_die_under_a_service_manager_and_no_wrong_byte_is_read(
    systemd: Systemd, tmp_path: Path, images: dict[str, Image], front: Proxy
) -> None:
    mount = Mount(tmp_path)
    mount.path = systemd.seen(mount.path)

    def kill(victims: set[int]) -> None:
        for pid in victims - {systemd.pid}:
            os.kill(pid, signal.SIGKILL)
        until(lambda: systemd.shows("ActiveState=active") and _answers(mount))

    def read(path: Path) -> str:
        return systemd.output("cat", tmp_path / "ctr" / path.relative_to(mount.path))

    checksum_while_killed(mount, images, front, kill, read)


@pytest.mark.logs("layer server has died|a killed daemon left")
@pytest.mark.parametrize("method", ["fanotify"])
def test_any_processes_die_beside_a_frozen_keeper_and_no_wrong_byte_is_read(
    lazy_mount: Mount, images: dict[str, Image], front: Proxy
) -> None:
    mount = lazy_mount
    if not _has_frozen_keeper(mount):
        pytest.skip("nothing freezes a process here, and info.json says so")

    def kill(victims: set[int]) -> None:
        ended = mount.pid in victims
        kill_at_once(mount, victims)
        if ended:
            mount.start()

    checksum_while_killed(mount, images, front, kill, Path.read_text)


def checksum_while_killed(
    mount: Mount,
    images: dict[str, Image],
    front: Proxy,
    kill: Callable[[set[int]], None],
    read: Callable[[Path], str],
) -> None:
    """Random sets of all that guard the layers of 20 containers are killed, and then every one.

    A container that loses its monitor is ended when the daemon is back; what it has read
    until then is in a file.

    Args:
        kill: ends processes, and waits until the tree is there again.
        read: reads a file of the tree.
    """
    chance = random.Random(11)
    for kind in THREE:
        mount.pull(images[kind].at(front.host))
    kinds = {f"c{n}": THREE[n % 3] for n in range(20)}
    # Some lose their monitors before they have written a line.
    each = "/bin/busybox sha256sum $f >> /sums || echo failed >> /sums"
    script = f": > /sums; {checksums(each)}"
    for name, kind in kinds.items():
        mount.container(name, images[kind].at(front.host), "/bin/busybox", "sh", "-c", script)
    for name in kinds:
        mount.write(f"containers/{name}/state", "start")
    begin(mount, kinds)
    front.on("/blobs/", faults.late(0.15))
    for all_of_them in (False, True):
        time.sleep(0.05 + chance.random() * 0.2)
        holders = set(keeper.find(group_name(mount.run)))
        assert len(holders) > 10
        kill(holders if all_of_them else set(chance.sample(sorted(holders), 10)))
    assert "may have read zeros" not in mount.read("errors")
    found = 0
    for name, kind in kinds.items():
        until(partial(_is, mount, name, "stopped"))
        sums = read(mount.path / "containers" / name / "rootfs/sums").splitlines()
        right = {f"{sha256(data)[7:]}  {path[5:]}" for path, data in images[kind].files.items()}
        assert set(sums) <= right
        found += len(sums)
        mount.remove(name)
    assert found


def lying_index(directory: Path, archive: bytes, layer: Descriptor) -> bytes:
    """An index of a layer by which anybody may become root."""
    index = index_of(compress(archive, GZIP), archive, directory)
    entries = [
        msgspec.structs.replace(entry, mode=entry.mode | stat.S_ISUID)
        if stat.S_ISREG(entry.mode)
        else entry
        for entry in index.entries
    ]
    table = table_of(index, directory)
    document = io.BytesIO()
    encode_index(entries, table, layer.content, digest(archive), document)
    table.close()
    return document.getvalue()


@pytest.mark.fill
@pytest.mark.logs("is another in the layer")
@pytest.mark.parametrize("method", ["fanotify"])
def test_an_index_that_lies_is_found_out(
    lazy_mount: Mount, registry: Registry, tmp_path: Path
) -> None:
    mount = lazy_mount
    layout = OciLayout(tmp_path / "ordinary")
    archive = tar_of({"bin/": b"", "bin/tool": noise(1, 2_000_000)})
    name = registry.push(layout, layout.image(archive), "lying", "v1")
    blob = compress(archive, GZIP)
    layer = Descriptor(GZIP, digest(blob), len(blob))
    reference, config = parse_reference(name), StoreConfig()
    pusher, client = Pusher(reference, config), Client(reference, config)
    manifest, _ = client.resolve()
    document = lying_index(tmp_path, archive, layer)
    push_indexes(pusher, client, manifest, {layer.content: document})
    pusher.close()
    client.close()
    mount.pull(name)
    assert mount.read(f"images/{name}/layers/0/format") == "gzip+index"
    until(lambda: mount.read(f"images/{name}/state") == f"corrupt {layer.digest}")
    line = mount.last_error()
    assert f"/images/{name}/layers/0/rootfs: read" in line
    assert "index that the layer was loaded by is wrong: '/bin/tool' is another" in line
    for wanted in ("all", "bin/tool"):
        code, sentence = mount.refused(f"images/{name}/fetch", wanted)
        assert (code, "damaged" in sentence) == (errno.EIO, True)
    assert mount.read(f"images/{name}/fetch") == ""
    mount.pull(name)
    assert mount.read(f"images/{name}/fetch") == "all"
    assert mount.read(f"images/{name}/state") == "complete"
    tool = mount.path / "images" / name / "rootfs/bin/tool"
    assert not tool.stat().st_mode & stat.S_ISUID
    assert tool.read_bytes() == noise(1, 2_000_000)


@pytest.mark.parametrize("method", ["fuse"])
def test_files_of_an_image_that_is_being_pulled(
    lazy_mount: Mount, images: dict[str, Image], front: Proxy
) -> None:
    mount, image = lazy_mount, images["zstd"]
    name = image.at(front.host)
    front.on(f"/blobs/{image.layer.digest}", faults.stall_after(1 << 20))
    command = ["sh", "-c", f"echo {name} mode=full > {mount.path}/images/pull"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as writer:
        until(lambda: (mount.path / "images" / name / "state").exists())
        with pytest.raises(OSError, match="busy"):
            os.listdir(mount.path / "images" / name / "rootfs")
        assert "is being pulled" in mount.last_error()
        writer.send_signal(signal.SIGINT)


@pytest.mark.parametrize("method", ["fuse"])
def test_a_lazy_pull_that_is_interrupted(
    lazy_mount: Mount, images: dict[str, Image], front: Proxy
) -> None:
    mount, image = lazy_mount, images["zstd"]
    name = image.at(front.host)
    front.on(f"/blobs/{image.layer.digest}", faults.stall)
    command = ["sh", "-c", f"echo {name} > {mount.path}/images/pull"]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as writer:
        until(lambda: bool(front.paths(f"/blobs/{image.layer.digest}")))
        assert mount.read("images/pull").startswith(name)
        begin = time.monotonic()
        writer.send_signal(signal.SIGINT)
        writer.wait(10)
    assert time.monotonic() - begin < 2
    until(lambda: mount.read("images/pull") == "")
    assert not (mount.path / "images" / name).exists()
    assert os.listdir(mount.root / "layers/tmp") == []
    front.heal()
    mount.pull(name)
    check_files(image, mount.path / "images" / name / "rootfs")
