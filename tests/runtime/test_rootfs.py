"""Root filesystems on the running kernel, with layers from files and from loop devices."""

import errno
import os
import shutil
import stat
import subprocess
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime import linux
from runtime.errors import ContainerBusy, MountFailed, Unsupported
from runtime.rootfs import Method, Rootfs
from store.cas import digest_of
from store.layers import LayerImage, LayerLimits, Layers
from tests.runtime.support import PLAIN_TAR, item, mounts_below, tar_of
from tests.support import tars

BASE = tar_of(
    [
        (item("./", tarfile.DIRTYPE, 0o711), b""),
        (item("etc/", tarfile.DIRTYPE, 0o755), b""),
        (item("etc/os"), b"base\n"),
        (item("etc/gone"), b"x"),
        (item("big"), b"0123456789" * 100_000),
        (item("suid", mode=0o4755), b"#!/bin/sh\n"),
        (item("null", tarfile.CHRTYPE, 0o666, device=(1, 3)), b""),
    ]
)
TOP = tar_of(
    [
        (item("./", tarfile.DIRTYPE, 0o755), b""),
        (item("etc/", tarfile.DIRTYPE, 0o755), b""),
        (item("etc/os"), b"top\n"),
        (item("etc/.wh.gone"), b""),
    ]
)


class Stack:
    """Unpacked layers and the mounts over them."""

    def __init__(self, place: Path, method: Method | None) -> None:
        self.place = place
        self.run = place / "run"
        self.layers = Layers(place / "layers", LayerLimits())
        self.rootfs = Rootfs(self.run, method)
        self.upper, self.work, self.target = place / "upper", place / "work", place / "view"
        for directory in (self.upper, self.work, self.target):
            directory.mkdir()

    def images(self, *archives: bytes) -> tuple[LayerImage, ...]:
        """Layers of these archives, bottom first."""
        diff_ids = [digest_of(archive) for archive in archives]
        for archive, diff_id in zip(archives, diff_ids, strict=True):
            self.layers.unpack(iter([archive]), PLAIN_TAR, diff_id, lambda: False)
        return self.layers.mountable(diff_ids)


@pytest.fixture(params=["file", "loop"])
def stack(place: Path, request: pytest.FixtureRequest) -> Iterator[Stack]:
    """Layers mounted in each of the ways."""
    stack = Stack(place, request.param)
    yield stack
    assert stack.rootfs.method in (request.param, None)


def test_a_view_of_two_layers(stack: Stack) -> None:
    stack.rootfs.image_view(stack.images(BASE, TOP), str(stack.target))
    assert (stack.target / "etc/os").read_text() == "top\n"
    assert not (stack.target / "etc/gone").exists()
    assert (stack.target / "big").read_bytes() == b"0123456789" * 100_000
    check_view_flags(stack.target)


def test_a_view_of_one_layer(stack: Stack) -> None:
    stack.rootfs.image_view(stack.images(BASE), str(stack.target))
    assert stat.S_IMODE(stack.target.stat().st_mode) == 0o711
    assert (stack.target / "etc/os").read_text() == "base\n"
    check_view_flags(stack.target)


ACL = "system.posix_acl_access"
# user::rw-, user:1:rw-, group::r--, mask::rw-, other::r--
ACCESS = bytes.fromhex(
    "02000000 01000600ffffffff 0200060001000000 04000400ffffffff 10000600ffffffff 20000400ffffffff"
)


def test_acls_of_a_layer(stack: Stack) -> None:
    archive = tars.archive(
        tars.pax([(f"SCHILY.xattr.{ACL}".encode(), ACCESS)]) + tars.entry(b"f", mode=0o664)
    )
    stack.rootfs.image_view(stack.images(archive), str(stack.target))
    assert os.getxattr(stack.target / "f", ACL) == ACCESS


def test_a_layer_without_acls_is_not_asked_for_those_of_each_file(stack: Stack) -> None:
    images = stack.images(BASE)
    stack.rootfs.image_view(images, str(stack.target))
    with pytest.raises(OSError) as failure:
        os.getxattr(stack.target / "etc/os", ACL)
    assert failure.value.errno == errno.EOPNOTSUPP
    assert "user::rw-" in subprocess.check_output(
        ["getfacl", "-p", stack.target / "etc/os"], text=True
    )
    root = stack.rootfs.container("c1", images, stack.upper, stack.work)
    with (root / "etc/os").open("a") as file:
        file.write("mine\n")
    for path in (root / "etc/os", root / "new"):
        path.touch()
        os.setxattr(path, ACL, ACCESS)
        assert os.getxattr(path, ACL) == ACCESS


def check_view_flags(target: Path) -> None:
    """Nothing in a view can be written, run with privileges, or used as a device."""
    flags = os.statvfs(target).f_flag
    assert flags & os.ST_RDONLY and flags & os.ST_NOSUID and flags & os.ST_NODEV
    with pytest.raises(OSError) as failure:
        (target / "new").write_text("x")
    assert failure.value.errno == errno.EROFS
    with pytest.raises(OSError) as failure:
        os.open(target / "null", os.O_RDONLY)
    assert failure.value.errno == errno.EACCES


def test_a_view_of_no_layer(stack: Stack) -> None:
    stack.rootfs.image_view((), str(stack.target))
    assert list(stack.target.iterdir()) == []
    assert stat.S_IMODE(stack.target.stat().st_mode) == 0o755
    assert os.statvfs(stack.target).f_flag & os.ST_RDONLY


def test_a_container_writes_to_its_upper_directory(stack: Stack) -> None:
    images = stack.images(BASE, TOP)
    root = stack.rootfs.container("c1", images, stack.upper, stack.work)
    assert root == stack.rootfs.container_path("c1")
    assert stack.rootfs.is_mounted("c1")
    (root / "etc/os").write_text("mine\n")
    (root / "big").unlink()
    assert (stack.upper / "etc/os").read_text() == "mine\n"
    assert stack.rootfs.container("c1", images, stack.upper, stack.work) == root
    stack.rootfs.unmount("c1")
    stack.rootfs.unmount("c1")
    assert not stack.rootfs.is_mounted("c1")
    root = stack.rootfs.container("c1", images, stack.upper, stack.work)
    assert (root / "etc/os").read_text() == "mine\n"
    assert not (root / "big").exists()


def test_a_container_of_no_layer(stack: Stack) -> None:
    root = stack.rootfs.container("c1", (), stack.upper, stack.work)
    assert list(root.iterdir()) == []
    (root / "x").write_text("x")
    assert (stack.upper / "x").exists()


def test_privileges_of_files_count_in_containers_and_not_in_views(stack: Stack) -> None:
    program = Path(shutil.which("id") or "").read_bytes()
    images = stack.images(BASE, tar_of([(item("id", mode=0o4755), program)]))
    root = stack.rootfs.container("c1", images, stack.upper, stack.work)
    stack.rootfs.image_view(images, str(stack.target))
    for top, expected in ((root, "0\n"), (stack.target, "1000\n")):
        done = subprocess.run(["./id", "-u"], cwd=top, user=1000, capture_output=True, check=True)
        assert done.stdout.decode() == expected
    os.close(os.open(root / "null", os.O_RDONLY))


def test_layers_are_mounted_once_also_by_many_threads(stack: Stack) -> None:
    images = stack.images(BASE, TOP)
    uids = [f"c{n}" for n in range(8)]

    def mount(uid: str) -> None:
        upper, work = stack.place / f"{uid}u", stack.place / f"{uid}w"
        upper.mkdir()
        work.mkdir()
        stack.rootfs.container(uid, images, upper, work)

    threads = [threading.Thread(target=mount, args=(uid,)) for uid in uids]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    targets = mounts_below(stack.run)
    assert len([t for t in targets if "/layers/" in t]) == 2
    assert len([t for t in targets if "/containers/" in t]) == 8


def test_unused_layers_are_unmounted_and_used_ones_are_not(stack: Stack) -> None:
    images = stack.images(BASE, TOP)
    stack.rootfs.image_view(images[:1], str(stack.target))
    linux.umount(str(stack.target))
    stack.rootfs.container("c1", images, stack.upper, stack.work)
    stack.rootfs.close()
    assert len(mounts_below(stack.run / "layers")) == 2
    stack.rootfs.unmount("c1")
    stack.rootfs.close()
    assert mounts_below(stack.run) == []
    assert list((stack.run / "layers").iterdir()) == []


def test_what_was_read_is_in_memory_once(stack: Stack) -> None:
    (image,) = stack.images(BASE)
    assert image.data
    (data,) = image.data.paths
    stack.rootfs.image_view((image,), str(stack.target))
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")
    assert (stack.target / "big").read_bytes() == b"0123456789" * 100_000
    assert cached(data) > 900_000
    present = data.with_name("present")
    present.touch()  # while a layer is incomplete, the layer server writes to the file
    Rootfs(stack.run, None).release_copies()
    assert cached(data) > 900_000
    present.unlink()
    Rootfs(stack.run, None).release_copies()  # as of the next process
    assert cached(data) == 0
    assert (stack.target / "big").read_bytes() == b"0123456789" * 100_000
    assert cached(data) == 0
    stack.rootfs.unmount_view(str(stack.target))
    stack.rootfs.close()
    assert os.listdir(stack.run / "data") == []


def cached(path: Path) -> int:
    """Bytes of a file that are in memory."""
    command = ["fincore", "--bytes", "--noheadings", "--output", "RES", str(path)]
    return int(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


def test_the_next_process_goes_on_with_what_is_mounted(stack: Stack) -> None:
    images = stack.images(BASE, TOP)
    root = stack.rootfs.container("c1", images, stack.upper, stack.work)
    before = linux.mounts()
    following = Rootfs(stack.run, stack.rootfs.method)
    assert following.is_mounted("c1")
    assert following.container("c1", images, stack.upper, stack.work) == root
    assert [m.target for m in linux.mounts()] == [m.target for m in before]
    following.close()
    assert len(mounts_below(stack.run / "layers")) == 2


def test_a_hundred_and_twenty_eight_layers(stack: Stack) -> None:
    archives = [tar_of([(item(f"f{n:03}"), str(n).encode())]) for n in range(128)]
    root = stack.rootfs.container("c1", stack.images(*archives), stack.upper, stack.work)
    assert sorted(p.name for p in root.iterdir()) == [f"f{n:03}" for n in range(128)]
    assert (root / "f127").read_text() == "127"


def test_too_many_layers_are_refused(stack: Stack) -> None:
    image = stack.images(BASE)[0]
    with pytest.raises(Unsupported, match="too many layers"):
        stack.rootfs.image_view([image] * 300, str(stack.target))
    assert mounts_below(stack.target.parent / "view") == []


def test_a_used_root_cannot_be_unmounted(stack: Stack) -> None:
    root = stack.rootfs.container("c1", stack.images(BASE), stack.upper, stack.work)
    with subprocess.Popen(["sleep", "100"], cwd=root) as process:
        with pytest.raises(ContainerBusy, match="fuser"):
            stack.rootfs.unmount("c1")
        process.kill()
    stack.rootfs.unmount("c1")


def test_idle_roots_are_unmounted(stack: Stack) -> None:
    root = stack.rootfs.container("c1", stack.images(BASE), stack.upper, stack.work)
    stack.rootfs.unmount_idle("c1")
    (root / "etc/os").read_text()
    stack.rootfs.unmount_idle("c1")
    assert stack.rootfs.is_mounted("c1")
    # That was a look as well.
    stack.rootfs.unmount_idle("c1")
    stack.rootfs.unmount_idle("c1")
    assert not stack.rootfs.is_mounted("c1")
    stack.rootfs.unmount_idle("c1")


def test_a_damaged_image(stack: Stack) -> None:
    image = stack.images(BASE)[0]
    image.meta.chmod(0o600)
    image.meta.write_bytes(bytes(8192))
    with pytest.raises(MountFailed, match="pull the image again"):
        stack.rootfs.layer(image)
    assert mounts_below(stack.run) == []


def test_a_target_that_is_not_there(stack: Stack) -> None:
    with pytest.raises(MountFailed) as failure:
        stack.rootfs.image_view(stack.images(BASE, TOP), str(stack.place / "nowhere"))
    assert failure.value.errno == errno.ENOENT


@pytest.mark.parametrize("method", ["file", "loop"])
def test_odd_paths(tmp_path: Path, method: Method) -> None:
    place = tmp_path / "a,b:c\\d e"
    place.mkdir()
    stack = Stack(place, method)
    try:
        root = stack.rootfs.container("c1", stack.images(BASE, TOP), stack.upper, stack.work)
        (root / "new").write_text("x")
        assert (stack.upper / "new").exists()
        stack.rootfs.image_view(stack.images(BASE), str(stack.target))
        assert (stack.target / "big").stat().st_size == 1_000_000
        assert (stack.target / "big").read_bytes()[:10] == b"0123456789"
    finally:
        for target in mounts_below(place):
            linux.umount(target, linux.MNT_DETACH)


def test_loop_devices_are_freed(place: Path) -> None:
    stack = Stack(place, "loop")
    stack.rootfs.layer(stack.images(BASE)[0])

    def backed() -> bool:
        files = Path("/sys/block").glob("loop*/loop/backing_file")
        return any(str(place) in file.read_text() for file in files)

    assert backed()
    stack.rootfs.close()
    assert not backed()


def test_the_way_to_mount_is_found_out(place: Path) -> None:
    """From files here; from loop devices on a file system that EROFS cannot read files of."""
    on_disk = Stack(place, None)
    on_disk.rootfs.layer(on_disk.images(BASE)[0])
    assert on_disk.rootfs.method == ("file" if linux.kernel_version() >= (6, 12) else "loop")
    memory = place / "memory"
    memory.mkdir()
    linux.mount("tmpfs", str(memory), "tmpfs")
    in_memory = Stack(memory, None)
    layer = in_memory.rootfs.layer(in_memory.images(BASE)[0])
    assert (layer / "etc/os").read_text() == "base\n"
    assert in_memory.rootfs.method == "loop"
