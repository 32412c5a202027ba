"""Real images for tests and benchmarks, from Debian packages by debootstrap and umoci."""

import os
import re
import shutil
import subprocess
from pathlib import Path

CACHE = Path(os.environ.get("CTRFS_IMAGE_CACHE", "/var/cache/ctrfs-images"))

# What a package manager leaves behind and no image of this kind is shipped with.
_LEFTOVERS = ("var/cache/apt/archives", "var/lib/apt/lists", "var/log")


def run(*command: str | Path) -> str:
    """Run a command and give what it printed.

    Raises:
        RuntimeError: it failed; the message has what it said.
    """
    result = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}: {result.stdout}{result.stderr}")
    return result.stdout


def debian_mirror() -> str:
    """The mirror that this machine's apt uses."""
    sources = [Path("/etc/apt/sources.list"), *Path("/etc/apt/sources.list.d").glob("*")]
    for source in sources:
        if source.exists():
            found = re.search(r"^[^#]*?(https?://\S*/debian/?)(?:\s|$)", source.read_text(), re.M)
            if found:
                return found[1]
    return "http://deb.debian.org/debian"


def debian_tree(name: str, *packages: str) -> Path:
    """A directory with Debian's minbase and ``packages``, kept in the cache."""
    tree = CACHE / f"{name}-tree"
    if not tree.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        unfinished = CACHE / f"{name}-tree.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        include = [f"--include={','.join(packages)}"] if packages else []
        run("debootstrap", "--variant=minbase", *include, "bookworm", unfinished, debian_mirror())
        for leftover in _LEFTOVERS:
            shutil.rmtree(unfinished / leftover)
            (unfinished / leftover).mkdir()
        unfinished.rename(tree)
    return tree


def debian_layout(name: str, *packages: str) -> Path:
    """An OCI layout with one gzip layer of that directory, tag `latest`, kept in the cache."""
    layout = CACHE / f"{name}-oci"
    if not layout.exists():
        tree = debian_tree(name, *packages)
        unfinished = CACHE / f"{name}-oci.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        image = f"{unfinished}:latest"
        run("umoci", "init", "--layout", unfinished)
        run("umoci", "new", "--image", image)
        run("umoci", "insert", "--image", image, tree, "/")
        path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        defaults = ("--config.cmd", "/bin/bash", "--config.env", path)
        run("umoci", "config", "--image", image, *defaults)
        run("umoci", "gc", "--layout", unfinished)
        unfinished.rename(layout)
    return layout


def two_layers(layout: Path, directory: Path) -> Path:
    """A copy of a Debian layout with a second layer on top that has one of everything.

    Args:
        layout: from debian_layout().
        directory: where to work; the result is ``directory/oci``, tag `latest`.
    """
    result = directory / "oci"
    bundle = directory / "bundle"
    shutil.copytree(layout, result)
    run("umoci", "unpack", "--image", f"{result}:latest", bundle)
    change(bundle / "rootfs")
    run("umoci", "repack", "--image", f"{result}:latest", bundle)
    shutil.rmtree(bundle)
    return result


def change(rootfs: Path) -> None:
    """Make every kind of change that a layer can hold to a Debian tree."""
    (rootfs / "etc/issue").unlink()
    shutil.rmtree(rootfs / "usr/share/doc")
    shutil.rmtree(rootfs / "etc/apt")
    (rootfs / "etc/apt").write_text("a directory became a file\n")
    (rootfs / "etc/issue.net").unlink()
    (rootfs / "etc/issue.net").mkdir()
    odd = rootfs / "odd"
    odd.mkdir(mode=0o2755)
    os.chown(odd, 1000, 70000)
    (odd / "setuid").write_bytes(b"x" * 5000)
    (odd / "setuid").chmod(0o4755)
    os.setxattr(odd / "setuid", "user.note", b"\x00binary\xff")
    os.setxattr(
        odd / "setuid", "security.capability", bytes.fromhex("0100000200040000" + "00" * 12)
    )
    os.link(odd / "setuid", odd / "hardlink")
    os.mkfifo(odd / "fifo", 0o600)
    os.mknod(odd / "null", 0o20666, os.makedev(1, 3))
    os.mknod(odd / "loop", 0o60660, os.makedev(7, 200))
    (odd / "link").symlink_to("../" * 300 + "etc/passwd")
    (odd / ("n" * 255)).write_text("a long name\n")
    Path(os.fsdecode(bytes(odd) + b"/not \xff utf-8\n")).write_text("an odd name\n")
    (odd / "empty").touch()
    with (odd / "sparse").open("wb") as file:
        file.truncate(10 << 20)
        file.seek(5 << 20)
        file.write(b"in the middle")
    many = odd / "many"
    many.mkdir()
    for number in range(2000):
        (many / f"file-{number}").touch()
    for path in (odd / "setuid", odd / "empty", many, odd):
        os.utime(path, ns=(1_234_567_890_123_456_789, 1_234_567_890_000_000_000))
