"""What users, registries and images can get wrong, as a user sees it: errno, a sentence in
`errors`, and everything as it was before."""

import errno
import gzip
import os
import re
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.support import tars
from tests.support.layouts import GZIP, MANIFEST, OciLayout, compress, sha256, tar_of
from tests.support.lazy import estargz
from tests.support.mount import Mount
from tests.support.mounting import mounted
from tests.support.proxy import Endless, Proxy, cut_after, stall, stall_after
from tests.support.registry import Registry
from tests.support.stored import stored
from tools.registry import free_port

FILES = tar_of({"etc/": b"", "etc/name": b"x" * 1000})


@pytest.fixture(autouse=True)
def nothing_changes(mount: Mount) -> Iterator[None]:
    """No image comes, none goes, and no pull stays under way."""
    before = _images(mount)
    yield
    assert _images(mount) - before <= ALLOWED
    assert before <= _images(mount)
    assert mount.read("images/pull") == ""


# Names of images that tests of this module pull on purpose.
ALLOWED = {"localhost/good:1"}


def _images(mount: Mount) -> set[str]:
    found = set()
    for directory, names, files in os.walk(mount.path / "images"):
        if "digest" in files:
            found.add(str(Path(directory).relative_to(mount.path / "images")))
            names.clear()
    return found


def refused(mount: Mount, text: str) -> tuple[int, str]:
    """Write what `images/pull` must refuse, and what then leaves nothing in the store."""
    before = stored(mount.root)
    answer = mount.refused("images/pull", text)
    assert stored(mount.root) == before
    return answer


@pytest.fixture
def layout(tmp_path: Path) -> OciLayout:
    """An empty layout."""
    return OciLayout(tmp_path / "oci")


# --- images that are wrong ------------------------------------------------------------


def wrong_digest(layout: OciLayout) -> dict[str, Any]:
    layer = layout.blob(compress(FILES, GZIP), GZIP)
    path = layout.blob_path(layer)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    return layout.manifest([layer], [sha256(FILES)])


def wrong_diff_id(layout: OciLayout) -> dict[str, Any]:
    layer = layout.blob(compress(FILES, GZIP), GZIP)
    return layout.manifest([layer], [sha256(b"something else")])


def too_small(layout: OciLayout) -> dict[str, Any]:
    layer = layout.blob(compress(FILES, GZIP), GZIP)
    return layout.manifest([{**layer, "size": layer["size"] - 5}], [sha256(FILES)])


def too_large(layout: OciLayout) -> dict[str, Any]:
    layer = layout.blob(compress(FILES, GZIP), GZIP)
    return layout.manifest([{**layer, "size": layer["size"] + 5}], [sha256(FILES)])


def missing_layer(layout: OciLayout) -> dict[str, Any]:
    layer = layout.blob(compress(FILES, GZIP), GZIP)
    layout.blob_path(layer).unlink()
    return layout.manifest([layer], [sha256(FILES)])


def truncated_gzip(layout: OciLayout) -> dict[str, Any]:
    layer = layout.blob(compress(FILES, GZIP)[:-20], GZIP)
    return layout.manifest([layer], [sha256(FILES)])


def unknown_layer_type(layout: OciLayout) -> dict[str, Any]:
    layer = layout.blob(FILES, "application/vnd.example.layer.squashfs")
    return layout.manifest([layer], [sha256(FILES)])


def unknown_manifest_type(layout: OciLayout) -> dict[str, Any]:
    kind = "application/vnd.example.manifest+json"
    return layout.document({"schemaVersion": 2, "mediaType": kind}, kind)


def no_json(layout: OciLayout) -> dict[str, Any]:
    return layout.blob(b"<html>", MANIFEST)


def huge_manifest(layout: OciLayout) -> dict[str, Any]:
    return layout.blob(b" " * (100 << 20), MANIFEST)


def no_such_platform(layout: OciLayout) -> dict[str, Any]:
    manifest = layout.image(FILES, architecture="s390x")
    return layout.index({**manifest, "platform": {"os": "linux", "architecture": "s390x"}})


def bomb(layout: OciLayout) -> dict[str, Any]:
    """512 MiB of zeros in half a megabyte."""
    size = 512 << 20
    start = tars.header(b"zeros", size=size)
    zeros = gzip.compress(bytes(1 << 20), 6, mtime=0)
    layer = layout.blob(gzip.compress(start) + zeros * 512, GZIP)
    return layout.manifest([layer], [sha256(b"never reached")])


@pytest.mark.parametrize(
    ("make", "code", "sentence"),
    [
        (wrong_digest, errno.EIO, "hash|digest"),
        (wrong_diff_id, errno.EIO, "diff|digest"),
        (too_small, errno.EIO, "bytes"),
        (too_large, errno.EIO, "bytes"),
        (missing_layer, errno.ENOENT, "blob"),
        (truncated_gzip, errno.EIO, "cut off"),
        (unknown_layer_type, errno.EOPNOTSUPP, "vnd.example.layer"),
        (unknown_manifest_type, errno.EOPNOTSUPP, "vnd.example.manifest"),
        (no_json, errno.EIO, "JSON"),
        (huge_manifest, errno.EFBIG, "manifest"),
        (no_such_platform, errno.ENOENT, "linux/s390x"),
        (bomb, errno.EFBIG, "layer_ratio"),
    ],
)
def test_wrong_images(
    mount: Mount,
    layout: OciLayout,
    make: Callable[[OciLayout], dict[str, Any]],
    code: int,
    sentence: str,
) -> None:
    layout.tag("bad", make(layout))
    got, said = refused(mount, f"oci:{layout.path}:bad as=localhost/bad")
    assert errno.errorcode[got] == errno.errorcode[code], said
    assert re.search(sentence, said), said
    assert len(said) < 600


# --- archives that are wrong ----------------------------------------------------------


def link(name: bytes, target: bytes) -> bytes:
    return tars.entry(name, b"1", link=target)


@pytest.mark.parametrize(
    ("archive", "sentence"),
    [
        (tars.entry(b"../../etc/passwd", data=b"root::0:0"), "etc/passwd"),
        (tars.entry(b"a/../../b"), "'/a/../../b'"),
        (link(b"out", b"../../etc/shadow"), "shadow"),
        (link(b"dangling", b"nowhere"), "nowhere"),
        (tars.entry(b"file") + tars.entry(b"file/below"), "not a directory"),
        (tars.pax([(b"path", b"n" * 256)]) + tars.entry(b"x"), "255"),
        (tars.entry(b"whiteout", b"3"), "whiteout"),
        (tars.entry(b"loop", b"2", link=b"loop") + tars.entry(b"loop/file"), "symbolic links"),
    ],
)
def test_hostile_archives(mount: Mount, layout: OciLayout, archive: bytes, sentence: str) -> None:
    layout.tag("bad", layout.image(FILES, tars.archive(archive)))
    code, said = refused(mount, f"oci:{layout.path}:bad as=localhost/bad")
    assert code == errno.EIO
    assert sentence in said, said


def test_a_hostile_archive_above_a_lazy_layer(
    mount: Mount, registry: Registry, layout: OciLayout
) -> None:
    blob = estargz(tars.archive(tars.directory(b"etc"), tars.entry(b"etc/noise", data=bytes(9000))))
    lazy = {**layout.blob(blob.data, GZIP), "annotations": blob.layer.annotations}
    dangling = tars.archive(link(b"dangling", b"nowhere"))
    bad = layout.manifest(
        [lazy, layout.blob(compress(dangling, GZIP), GZIP)], [blob.diff_id, sha256(dangling)]
    )
    reference = registry.push(layout, bad, "bad/lazy", "1")
    code, said = refused(mount, reference)
    assert (code, "nowhere" in said) == (errno.EIO, True)
    code, said = refused(mount, f"{reference} mode=full")
    assert (code, "nowhere" in said) == (errno.EIO, True)
    good = registry.push(layout, layout.manifest([lazy], [blob.diff_id]), "good/lazy", "1")
    mount.pull(f"{good} as=localhost/good:1")
    assert mount.read("images/localhost/good:1/layers/0/format") == "estargz"
    assert mount.read("images/localhost/good:1/rootfs/etc/noise") == "\0" * 9000


def test_odd_archives_stay_inside(mount: Mount, layout: OciLayout) -> None:
    """Names and kinds that are unusual, and allowed, end up where a container would see them."""
    rubbish = os.fsencode("caf\udce9")
    archive = tars.archive(
        tars.entry(b"/absolute", data=b"1"),
        tars.directory(b"real"),
        tars.entry(b"way", b"2", link=b"/real"),
        tars.entry(b"way/through", data=b"2"),
        tars.entry(b"out", b"2", link=b"../../../../../../etc"),
        tars.entry(b"null", b"3", device=(1, 3)),
        tars.pax([(b"path", b"n" * 255)]) + tars.entry(b"x", data=b"3"),
        tars.entry(rubbish, data=b"4"),
        tars.entry(b"twice", data=b"first"),
        tars.entry(b"twice", data=b"last"),
        tars.directory(b"turned"),
        tars.entry(b"turned/child", data=b"gone"),
        tars.entry(b"turned", data=b"a file"),
    )
    layout.tag("good", layout.image(archive))
    mount.pull(f"oci:{layout.path}:good as=localhost/good:1")
    rootfs = mount.path / "images/localhost/good:1/rootfs"
    assert (rootfs / "absolute").read_bytes() == b"1"
    assert (rootfs / "real/through").read_bytes() == b"2"
    assert os.readlink(rootfs / "out") == "../../../../../../etc"
    assert stat.S_ISCHR((rootfs / "null").stat().st_mode)
    assert (rootfs / ("n" * 255)).read_bytes() == b"3"
    assert (Path(os.fsdecode(bytes(rootfs) + b"/" + rubbish))).read_bytes() == b"4"
    assert (rootfs / "twice").read_bytes() == b"last"
    assert (rootfs / "turned").read_bytes() == b"a file"


def test_100_000_files_in_one_directory(mount: Mount, layout: OciLayout) -> None:
    entries = [tars.directory(b"many")]
    entries += [tars.header(b"many/file-%06d" % number) for number in range(100_000)]
    layout.tag("good", layout.image(tars.archive(*entries)))
    mount.pull(f"oci:{layout.path}:good as=localhost/good:1")
    many = mount.path / "images/localhost/good:1/rootfs/many"
    assert len(os.listdir(many)) == 100_000
    assert (many / "file-099999").stat().st_size == 0


# --- registries -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reference", "code", "sentence"),
    [
        ("{host}/unknown:1", errno.ENOENT, "unknown"),
        ("{host}/busybox:unknown", errno.ENOENT, "unknown"),
        ("{host}/busybox@sha256:" + "0" * 64, errno.ENOENT, "0000"),
        ("127.0.0.1:{free}/x:1", errno.EHOSTUNREACH, "127.0.0.1"),
        ("oci:/nowhere/at/all:1", errno.ENOENT, "/nowhere/at/all"),
        ("library/UPPER", errno.EINVAL, "UPPER"),
        ("", errno.EINVAL, "reference"),
        ("x:1 platform=vax", errno.EINVAL, "vax"),
        ("x:1 speed=high", errno.EINVAL, "speed=high"),
    ],
)
def test_what_cannot_be_pulled(
    mount: Mount, registry: Registry, reference: str, code: int, sentence: str
) -> None:
    text = reference.format(host=registry.host, free=free_port())
    got, said = refused(mount, text)
    assert errno.errorcode[got] == errno.errorcode[code], said
    assert sentence in said


def test_a_registry_that_stops_in_the_middle(
    mount: Mount, registry: Registry, layout: OciLayout
) -> None:
    archive = tar_of({"noise": os.urandom(3 << 20)})
    reference = registry.push(layout, layout.image(archive), "noise", "1")
    with Proxy(registry.port) as proxy:
        proxy.on("/blobs/", stall_after(1 << 20), times=2)
        proxy.on("/blobs/", stall)
        through = reference.replace(registry.host, proxy.host)
        start = time.monotonic()
        code, said = mount.refused("images/pull", through)
        assert code == errno.ETIMEDOUT
        assert proxy.host in said
        assert time.monotonic() - start < 30
    with Proxy(registry.port) as proxy:
        proxy.on("/blobs/", cut_after(100))
        code, said = mount.refused("images/pull", reference.replace(registry.host, proxy.host))
        assert code == errno.EIO
        assert proxy.host in said


def test_a_manifest_that_never_ends(mount: Mount, registry: Registry) -> None:
    for announced in (True, False):
        with Proxy(registry.port) as proxy:
            endless = Endless(MANIFEST, announced)
            proxy.on("/manifests/", endless)
            code, said = refused(mount, f"{proxy.host}/busybox:1")
            assert code == errno.EFBIG
            assert "manifest" in said
        assert endless.sent < 20 << 20


def test_something_else_listens_there(mount: Mount) -> None:
    """A server that speaks no HTTP."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        port = server.getsockname()[1]
        writer = subprocess.Popen(
            ["sh", "-c", f"echo 127.0.0.1:{port}/x:1 > {mount.path}/images/pull"],
            stderr=subprocess.DEVNULL,
        )
        while writer.poll() is None:
            with suppress(TimeoutError):
                client, _ = server.accept()
                client.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
                client.close()
        assert writer.returncode != 0
    assert f"127.0.0.1:{port}" in mount.last_error()


# --- containers -----------------------------------------------------------------------


def test_a_word_that_is_no_command(mount: Mount, busybox: str) -> None:
    mount.container("c", busybox, "true")
    code, said = mount.refused("containers/c/state", "strat")
    assert code == errno.EINVAL
    assert "'strat'" in said and "start" in said
    assert mount.read("containers/c/state") == "created"
    assert mount.read("containers/c/error") == said


def test_start_twice_and_rmdir_while_it_runs(mount: Mount, busybox: str) -> None:
    path = mount.container("c", busybox, "sh", "-c", "sleep 1000")
    mount.write("containers/c/state", "start")
    pid = mount.read("containers/c/pid")
    code, said = mount.refused("containers/c/state", "start")
    assert (code, "runs already" in said) == (errno.EBUSY, True)
    code, said = mount.refused("containers/c/args", "true")
    assert code == errno.EBUSY
    with pytest.raises(OSError, match="busy"):
        path.rmdir()
    assert "rmdir" in mount.last_error()
    with pytest.raises(OSError, match="busy"):
        path.rename(path.with_name("d"))
    assert mount.read("containers/c/pid") == pid
    with pytest.raises(FileExistsError):
        path.mkdir()


def test_an_image_in_use_stays(mount: Mount, busybox: str) -> None:
    mount.container("c", busybox, "true")
    with pytest.raises(OSError, match="busy"):
        (mount.path / "images" / busybox).rmdir()
    assert "c" in mount.last_error().split("uid 0: ")[1]


def test_an_image_that_is_not_there(mount: Mount) -> None:
    """Settings may be written in any order, before a pull too."""
    mount.container("c", "localhost/not-yet:1", "true")
    code, said = mount.refused("containers/c/state", "start")
    assert code == errno.ENOENT
    assert "localhost/not-yet:1" in said and "pull" in said


def test_nothing_to_run(mount: Mount, layout: OciLayout) -> None:
    layout.tag("good", layout.image(FILES, container={"Labels": {"a": "b"}}))
    mount.pull(f"oci:{layout.path}:good as=localhost/good:1")
    (mount.path / "containers/c").mkdir()
    code, said = mount.refused("containers/c/state", "start")
    assert (code, "image" in said) == (errno.EINVAL, True)
    mount.write("containers/c/image", "localhost/good:1")
    code, said = mount.refused("containers/c/state", "start")
    assert (code, "args" in said) == (errno.EINVAL, True)
    assert mount.read("containers/c/state") == "created"


@pytest.mark.parametrize(
    ("args", "code", "sentence"),
    [
        (("nosuch", "x"), errno.ENOENT, "nosuch"),
        (("/etc/name",), errno.EACCES, "/etc/name"),
        (("/etc",), errno.EACCES, "/etc"),
    ],
)
def test_a_command_that_cannot_run(
    mount: Mount, layout: OciLayout, args: tuple[str, ...], code: int, sentence: str
) -> None:
    archive = tars.archive(tars.directory(b"etc"), tars.entry(b"etc/name", data=b"x", mode=0o644))
    layout.tag("good", layout.image(archive))
    mount.pull(f"oci:{layout.path}:good as=localhost/good:1")
    mount.container("c", "localhost/good:1", *args)
    got, said = mount.refused("containers/c/state", "start")
    assert errno.errorcode[got] == errno.errorcode[code], said
    assert sentence in said
    assert mount.read("containers/c/error") == said
    assert mount.read("containers/c/state") == "created"
    assert mount.read("containers/c/pid") == ""


@pytest.mark.parametrize("name", ["a/b", "..", ".hidden", "x" * 300, "new\nline", "ä ö", "-x"])
def test_names_that_no_container_has(mount: Mount, name: str) -> None:
    before = mount.containers()
    with pytest.raises(OSError):
        (mount.path / "containers" / name).mkdir()
    assert mount.containers() == before


def test_control_directories_cannot_be_removed_file_by_file(mount: Mount, busybox: str) -> None:
    path = mount.container("c", busybox, "true")
    for command in ("rm -rf .", "rm -f args", "touch new", "ln args new", "mv args new"):
        assert subprocess.run(command.split(), cwd=path, capture_output=True).returncode != 0
    assert (path / "args").read_text() == "true\n"
    assert subprocess.run(["mv", path, mount.path], capture_output=True).returncode != 0
    assert mount.containers() == ["c"]


# --- the disk -------------------------------------------------------------------------


def test_disk_full_while_pulling(
    registry: Registry, busybox: str, layout: OciLayout, tmp_path: Path
) -> None:
    archive = tar_of({"noise": os.urandom(24 << 20)})
    reference = registry.push(layout, layout.image(archive), "large", "1")
    full = Mount(tmp_path)
    with mounted("tmpfs", full.root, "tmpfs", "size=16m,mode=0711"):
        try:
            full.start()
            full.pull(busybox)
            code, said = refused(full, reference)
            assert code == errno.ENOSPC
            assert "free some space" in said
            assert full.run_container("c", busybox, "sh", "-c", "echo works") == (0, "works")
            assert not (full.path / "images" / reference).exists()
            (full.path / "containers/c").rmdir()
            fill(full.root)
            (full.path / "images" / busybox).rmdir()
        finally:
            full.destroy()


def test_a_container_that_fills_the_disk_can_be_removed(busybox: str, tmp_path: Path) -> None:
    full = Mount(tmp_path)
    with mounted("tmpfs", full.root, "tmpfs", "size=16m,mode=0711"):
        try:
            full.start()
            full.pull(busybox)
            full.container(
                "greedy", busybox, "sh", "-c", "sleep 0.5; cat /dev/zero > /big; exec sleep 100"
            )
            full.write("containers/greedy/state", "start")
            wait_until(lambda: os.statvfs(full.root).f_bavail == 0)
            full.kill()
            full.start()
            assert full.read("containers/greedy/state") == "running"
            full.write("containers/greedy/state", "kill")
            (full.path / "containers/greedy").rmdir()
            assert full.run_container("next", busybox, "sh", "-c", "echo room") == (0, "room")
        finally:
            full.destroy()


def fill(directory: Path) -> None:
    """Leave no room on a disk."""
    with open(directory / "rest", "wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))


def wait_until(condition: Callable[[], bool]) -> None:
    """Return once the condition holds."""
    for _ in range(500):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("it never was so")
