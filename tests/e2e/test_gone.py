"""Holding on to parts of the tree whose subject goes away must harm nobody else."""

import errno
import os
import signal
import subprocess
from pathlib import Path

import pytest

from runtime import linux
from tests.support.layouts import OciLayout, tar_of
from tests.support.mount import Mount


@pytest.fixture
def layout(tmp_path: Path) -> OciLayout:
    """Images `one` and `two` with that many layers."""
    layout = OciLayout(tmp_path / "oci")
    lower, upper = tar_of({"etc/": b"", "etc/a": b"a"}), tar_of({"etc/": b"", "etc/b": b"b"})
    layout.tag("one", layout.image(lower))
    layout.tag("two", layout.image(lower, upper))
    return layout


def stat_anew(descriptor: int) -> "subprocess.CompletedProcess[str]":
    """stat(2) of an open directory that the kernel may not answer from its cache."""
    return subprocess.run(
        ["stat", "--cached=never", f"/proc/self/fd/{descriptor}/."],
        pass_fds=[descriptor],
        capture_output=True,
        text=True,
    )


def test_directories_of_a_removed_image(mount: Mount, layout: OciLayout) -> None:
    mount.pull(f"oci:{layout.path}:two as=localhost/gone:1")
    image = mount.path / "images/localhost/gone:1"
    held = [os.open(path, os.O_RDONLY) for path in (image, image / "layers", image / "layers/1")]
    image.rmdir()
    for descriptor in held:
        try:
            os.listdir(descriptor)
        except OSError as error:
            assert error.errno in (errno.ENOENT, errno.ESTALE)
        assert "internal error" not in stat_anew(descriptor).stderr
        os.close(descriptor)
    assert mount.read("version")


def test_an_image_that_comes_again_while_its_directory_is_held(
    mount: Mount, layout: OciLayout
) -> None:
    """To the kernel a directory that was removed is dead as long as somebody holds it."""
    image = mount.path / "images/localhost/again:1"
    held = []
    for wanted in ("one", "two"):
        mount.pull(f"oci:{layout.path}:{wanted} as=localhost/again:1")
        assert mount.read("images/localhost/again:1/state") == "complete"
        assert len(os.listdir(image / "layers")) == len(os.listdir(image / "rootfs/etc")) + 1
        held += [os.open(path, os.O_RDONLY) for path in (image, image / "layers")]
        image.rmdir()
    for descriptor in held:
        os.close(descriptor)


def remove_or_give_up(mount: Mount, image: Path) -> None:
    """rmdir(2) in a process of its own; what hangs would keep the test from ending."""
    remover = subprocess.Popen(["rmdir", image])
    try:
        assert remover.wait(10) == 0
    except subprocess.TimeoutExpired:
        subprocess.run(["umount", "-f", mount.path], check=True)
        remover.wait()
        raise


def test_an_image_whose_rootfs_was_unmounted_by_hand(mount: Mount, layout: OciLayout) -> None:
    """The kernel, which has locked the image's directory for rmdir, does not know its rootfs any
    more, so nobody may look that up now."""
    mount.pull(f"oci:{layout.path}:two as=localhost/by-hand:1")
    image = mount.path / "images/localhost/by-hand:1"
    assert (image / "rootfs/etc/a").read_bytes() == b"a"
    linux.umount(str(image / "rootfs"))
    Path("/proc/sys/vm/drop_caches").write_text("2")
    remove_or_give_up(mount, image)
    assert not image.exists()


def test_images_that_come_and_go_while_their_files_are_looked_at(
    mount: Mount, layout: OciLayout
) -> None:
    name = "localhost/comes-and-goes:1"
    image = mount.path / "images" / name
    script = """
        end=$(($(date +%s) + 2))
        look() { while [ $(date +%s) -lt $end ]; do ls "$1/rootfs/etc"; done; }
        look "$1" & look "$1" & look "$1" &
        while [ $(date +%s) -lt $end ]; do
            echo "$2" > "$3/images/pull"
            rmdir "$1" && echo removed
        done
        wait
    """
    worker = subprocess.Popen(
        ["bash", "-c", script, "bash", image, f"oci:{layout.path}:two as={name}", mount.path],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        output, _ = worker.communicate(timeout=20)
    except subprocess.TimeoutExpired:
        subprocess.run(["umount", "-f", mount.path], check=True)
        os.killpg(worker.pid, signal.SIGKILL)
        worker.communicate()
        raise
    assert output.count(b"removed") > 10
    mount.pull(f"oci:{layout.path}:two as={name}")
    assert (image / "rootfs/etc/a").read_bytes() == b"a"


def test_a_layer_that_the_new_image_has_not(mount: Mount, layout: OciLayout) -> None:
    mount.pull(f"oci:{layout.path}:two as=localhost/fewer:1")
    layer = mount.path / "images/localhost/fewer:1/layers/1"
    held = os.open(layer, os.O_RDONLY)
    mount.pull(f"oci:{layout.path}:one as=localhost/fewer:1")
    try:
        names = os.listdir(held)
        assert "digest" not in names or not (layer / "digest").exists()
    except OSError as error:
        assert error.errno in (errno.ENOENT, errno.ESTALE)
    for name in ("digest", "diff_id", "data", "rootfs"):
        with pytest.raises(FileNotFoundError):
            os.stat(layer / name)
    os.close(held)
    (mount.path / "images/localhost/fewer:1").rmdir()
    assert mount.read("version")


def test_links_follow_their_image(mount: Mount, layout: OciLayout) -> None:
    """Two names have one digest, and the one that the link led to goes."""
    for name in ("a", "b"):
        mount.pull(f"oci:{layout.path}:one as=localhost/{name}:1")
    digest = mount.read("images/localhost/a:1/digest")
    link = mount.path / "images/by-digest" / digest
    held = os.open(link, os.O_PATH | os.O_NOFOLLOW)
    first = (link / "digest").resolve().parent
    first.rmdir()
    assert mount.read(f"images/by-digest/{digest}/digest") == digest
    os.close(held)
    (link / "digest").resolve().parent.rmdir()
    assert not link.exists()
