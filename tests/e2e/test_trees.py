"""An image's files, by three ways: as umoci unpacks them, in the image, in a container."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.support.layouts import OciLayout, tar_of
from tests.support.mount import Mount
from tests.support.treediff import tree_diff
from tools.images import run


@pytest.fixture(scope="module")
def unpacked(debian_layout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """umoci's opinion."""
    bundle = tmp_path_factory.mktemp("umoci") / "bundle"
    run("umoci", "unpack", "--image", f"{debian_layout}:latest", bundle)
    return bundle / "rootfs"


def test_image_and_container_have_what_umoci_unpacks(
    mount: Mount, debian: str, unpacked: Path
) -> None:
    mount.pull(debian)
    image = mount.path / "images" / debian / "rootfs"
    assert tree_diff(image, unpacked) == []
    container = mount.container("c", debian, "sh")
    assert tree_diff(container / "rootfs", unpacked) == []
    result = subprocess.run(
        ["diff", "-r", "--no-dereference", image, unpacked], capture_output=True, text=True
    )
    # diff has no way to compare special files but their kind, and says so.
    assert [line for line in result.stdout.splitlines() if " is a " not in line] == []


def test_a_containers_changes_are_its_own(mount: Mount, debian: str) -> None:
    mount.pull(debian)
    code, output = mount.run_container(
        "c",
        debian,
        "sh",
        "-c",
        "echo new > /etc/motd; rm /etc/hostname /etc/passwd- ; rm -r /usr/share/zoneinfo;"
        " chmod 700 /srv; touch /root/x; cat /etc/motd",
    )
    assert (code, output) == (0, "new")
    changes = mount.read("containers/c/changes").splitlines()
    assert {"A /root/x", "D /usr/share/zoneinfo", "C /srv"} <= set(changes)
    image = mount.path / "images" / debian / "rootfs"
    assert not (image / "root/x").exists()
    assert (image / "usr/share/zoneinfo").is_dir()


def test_programs_of_the_image_run(mount: Mount, debian: str) -> None:
    """perl, and the dynamic loader, from EROFS over overlayfs."""
    mount.pull(debian)
    script = "print join ' ', map { $_ * 2 } 1..5"
    assert mount.run_container("c", debian, "perl", "-e", script) == (0, "2 4 6 8 10")


def test_a_name_that_moves_shows_the_new_image(mount: Mount, tmp_path: Path) -> None:
    """Who has a file of the old one open keeps it."""
    layout = OciLayout(tmp_path / "oci")
    for word in (b"old", b"new"):
        layout.tag(word.decode(), layout.image(tar_of({"etc/": b"", "etc/word": word})))
    image = mount.path / "images/localhost/moves:1"
    mount.pull(f"oci:{layout.path}:old as=localhost/moves:1")
    with (image / "rootfs/etc/word").open("rb") as old:
        assert (image / "layers/0/rootfs/etc/word").read_bytes() == b"old"
        mount.pull(f"oci:{layout.path}:new as=localhost/moves:1")
        assert (image / "rootfs/etc/word").read_bytes() == b"new"
        assert (image / "layers/0/rootfs/etc/word").read_bytes() == b"new"
        assert old.read() == b"old"
    image.rmdir()
    mount.pull(f"oci:{layout.path}:old as=localhost/moves:1")
    assert (image / "rootfs/etc/word").read_bytes() == b"old"


def test_the_image_is_read_only_and_harmless(mount: Mount, debian: str) -> None:
    mount.pull(debian)
    image = mount.path / "images" / debian / "rootfs"
    with pytest.raises(OSError, match="Read-only"):
        (image / "etc/passwd").write_text("")
    with pytest.raises(PermissionError):
        (image / "odd/null").open("rb")
    assert os.statvfs(image).f_flag & (os.ST_NOSUID | os.ST_NODEV) == os.ST_NOSUID | os.ST_NODEV


def test_looking_chooses_no_image(mount: Mount, tmp_path: Path) -> None:
    """Until something is put into the root filesystem, the name counts."""
    layout = OciLayout(tmp_path / "oci")
    shell = Path("/bin/busybox").read_bytes()
    for tag in ("old", "new"):
        files = {"etc/": b"", "etc/word": tag.encode(), "bin/": b"", "bin/sh": shell}
        layout.tag(tag, layout.image(tar_of(files)))
    name = "localhost/looked:1"
    mount.pull(f"oci:{layout.path}:old as={name}")
    looked = mount.container("looked", name, "sh", "-c", "read word < /etc/word; echo $word")
    written = mount.container("written", name, "sh", "-c", "read word < /etc/word; echo $word")
    assert (looked / "rootfs/etc/word").read_text() == "old"
    (written / "rootfs/etc/own").write_text("mine")
    mount.pull(f"oci:{layout.path}:new as={name}")
    for container, expected in (("looked", "new"), ("written", "old")):
        mount.write(f"containers/{container}/state", "start")
        mount.read(f"containers/{container}/wait")
        assert mount.read(f"containers/{container}/log") == expected
        mount.remove(container)
    (mount.path / "images" / name).rmdir()
