"""`ctrfs convert`, run as users do."""

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.layouts import PLAIN, OciLayout, busybox_layout
from tests.support.mount import Mount
from tests.support.registry import PASSWORD, USER, Registry
from tests.support.tars import archive, entry
from tools import instance
from tools.sides import Containerd

TOP = Path(__file__).parents[2]
CTRFS = (sys.executable, "-m", "tools.ctrfs")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(TOP)}


def convert(
    directory: Path, *arguments: str | Path, **more: str
) -> subprocess.CompletedProcess[str]:
    """Run `ctrfs convert` in a directory."""
    return subprocess.run(
        [*CTRFS, "convert", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=directory,
        timeout=60,
        env={**ENVIRONMENT, **more},
    )


def converted(directory: Path, *arguments: str | Path, **more: str) -> str:
    """Run it to a good end: the digest that it printed."""
    result = convert(directory, *arguments, **more)
    assert (result.returncode, result.stderr) == (0, ""), result
    digest = result.stdout.removesuffix("\n")
    assert digest.startswith("sha256:")
    assert len(digest) == 71
    return digest


def refused(directory: Path, *arguments: str | Path) -> str:
    """Run it to a bad end: the sentence that it said."""
    result = convert(directory, *arguments)
    assert (result.returncode, result.stdout) == (1, ""), result
    line = result.stderr.removesuffix("\n")
    assert line.startswith("ctrfs: ")
    assert "\n" not in line
    return line


@pytest.fixture
def busybox(tmp_path: Path) -> OciLayout:
    """A layout `in` with an image that can run, tag `latest`."""
    return busybox_layout(tmp_path / "in")


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    """A daemon of our own."""
    mount = Mount(tmp_path)
    try:
        mount.start()
        yield mount
    finally:
        mount.destroy()


def test_from_layout_to_layout(tmp_path: Path, busybox: OciLayout) -> None:
    digest = converted(tmp_path, "oci:in:latest", "oci:out:e")
    assert converted(tmp_path, f"oci:{busybox.path}", "oci:./out:again") == digest
    other = converted(tmp_path, "oci:in", "oci:out:z", "--format", "zstd:chunked")
    assert other != digest
    (tmp_path / "trace").write_text("/bin/sh\n/nowhere\n")
    result = convert(tmp_path, "oci:in", "oci:out:t", "--trace", "./trace")
    assert (result.returncode, result.stderr) == (
        0,
        "ctrfs: files of the trace that the image does not have: 1\n",
    )
    entries = json.loads((tmp_path / "out/index.json").read_text())["manifests"]
    assert [item["digest"] for item in entries] == [
        *(digest, digest, other),
        result.stdout.strip(),
    ]


@pytest.mark.parametrize("auth", [None, "basic", "token"])
def test_through_a_registry(tmp_path: Path, busybox: OciLayout, auth: str | None) -> None:
    docker = tmp_path / "docker"
    docker.mkdir()
    with Registry(tmp_path / "registry", auth=auth) as registry:
        login = {"auths": {registry.host: {"username": USER, "password": PASSWORD}}}
        (docker / "config.json").write_text(json.dumps(login if auth else {}))
        name = f"docker://{registry.host}/private/app:v1"
        more = {"DOCKER_CONFIG": str(docker)}
        digest = converted(tmp_path, "oci:in", name, **more)
        assert converted(tmp_path, name, "oci:out:v1", **more) == digest
    assert "can't be reached" in refused(tmp_path, name, "oci:out:v1")


@pytest.mark.parametrize("form", ["estargz", "zstd:chunked"])
def test_containerd_runs_the_result(tmp_path: Path, busybox: OciLayout, form: str) -> None:
    with Registry(tmp_path / "registry") as registry:
        name = f"{registry.host}/app:v1"
        converted(tmp_path, "oci:in", f"docker://{name}", "--format", form)
        containerd = Containerd(tmp_path, name)
        with containerd.running():
            containerd.to_end("/bin/sh", "-c", "echo hi")  # raises if that fails


def test_images_of_a_mounted_tree(tmp_path: Path, busybox: OciLayout, mount: Mount) -> None:
    mount.pull(f"oci:{busybox.path}:latest as=box:1")
    here = ("--mount", mount.path)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    digest = converted(tmp_path, "box:1", "team/box:lazy", *here, TMPDIR=str(temporary))
    assert mount.read("images/docker.io/team/box:lazy/digest") == digest
    assert mount.run_container("run", "team/box:lazy", "/bin/sh", "-c", "echo hi") == (0, "hi")
    assert converted(tmp_path, "box:1", "oci:out:v1", *here, TMPDIR=str(temporary)) == digest
    assert converted(tmp_path, "oci:in", "box:1", *here) == digest
    assert mount.read("images/box:1/digest") == digest
    assert not list(temporary.iterdir())
    assert "has no image docker.io/library/nowhere:latest" in refused(
        tmp_path, "nowhere", "oci:out:v1", *here
    )
    assert "has no container nobody" in refused(
        tmp_path, "oci:in", "oci:out:v1", "--trace", "nobody", *here
    )
    assert refused(tmp_path, "../content", "oci:out:v1", *here)
    assert "README" in refused(tmp_path, "oci:in", "README/box:1", *here)
    assert "no ctrfs is mounted" in refused(tmp_path, "box:1", "oci:out:v1", "--mount", tmp_path)


def test_what_a_container_opened_comes_first(
    tmp_path: Path, busybox: OciLayout, mount: Mount
) -> None:
    mount.pull(f"oci:{busybox.path}:latest as=box:1")
    assert mount.run_container("web", "box:1", "/bin/sh", "-c", "true") == (0, "")
    assert mount.read("containers/web/opened").splitlines() == ["/bin/sh"]
    converted(tmp_path, "box:1", "oci:out:v1", "--trace", "web", "--mount", mount.path)
    (layer,) = [path for path in (tmp_path / "out/blobs/sha256").iterdir() if is_gzip(path)]
    listed = subprocess.run(["tar", "tzf", layer], check=True, capture_output=True, text=True)
    names = [name.rstrip("/") for name in listed.stdout.split()]
    assert names == ["bin", "bin/sh", ".prefetch.landmark", "etc", "stargz.index.json"]


def is_gzip(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x1f\x8b")


def test_which_mounted_tree(mount: Mount, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from tools.mounted import find_mount

    daemon = instance.at(mount.path)
    assert daemon is not None
    monkeypatch.setattr(instance, "living", lambda: iter([daemon]))
    assert find_mount(None) == mount.path
    other = instance.Instance(1, Path("/other"))
    monkeypatch.setattr(instance, "living", lambda: iter([daemon, other]))
    with pytest.raises(instance.CommandFailed, match=r"several trees .*--mount"):
        find_mount(None)
    monkeypatch.setattr(instance, "living", lambda: iter([]))
    with pytest.raises(instance.CommandFailed, match="no tree is mounted"):
        find_mount(None)


def test_what_is_wrong_with_the_words(tmp_path: Path, busybox: OciLayout) -> None:
    assert "there is no" in refused(tmp_path, "oci:nowhere:latest", "oci:out:v1")
    assert "the layout has: latest" in refused(tmp_path, "oci:in:other", "oci:out:v1")
    assert "image layout" in refused(tmp_path, "oci:", "oci:out:v1")
    assert "image layout" in refused(tmp_path, "oci:in", "oci:out:")
    for tag in ("b/ad tag", "-v1", "v1/", "v..1"):
        assert f"the tag {tag!r} may hold" in refused(tmp_path, "oci:in", f"oci:out:{tag}")
    assert "is not an image reference" in refused(tmp_path, "docker://UPPER", "oci:out:v1")
    name = "docker://127.0.0.1:1/app@sha256:" + "0" * 64
    assert "give the new image a tag" in refused(tmp_path, "oci:in", name)
    assert "linux/riscv64" in refused(
        tmp_path, "oci:in", "oci:out:v1", "--platform", "linux/riscv64"
    )
    assert "there is no file ./trace" in refused(
        tmp_path, "oci:in", "oci:out:v1", "--trace", "./trace"
    )
    (tmp_path / "empty").touch()
    assert "names no files" in refused(tmp_path, "oci:in", "oci:out:v1", "--trace", "./empty")
    assert not (tmp_path / "out").exists()
    assert convert(tmp_path, "oci:in", "oci:out", "--format", "zip").returncode == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(tmp_path: Path, number: signal.Signals) -> None:
    layout = OciLayout(tmp_path / "in")
    noise = os.urandom(1 << 20) * 300
    layout.tag("v1", layout.image(archive(entry(b"f", data=noise)), kind=PLAIN))
    process = subprocess.Popen(
        [*CTRFS, "convert", "oci:in:v1", "oci:out:v1"],
        cwd=tmp_path,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        while not list((tmp_path / "out").glob(".ctrfs-*/layer")):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        output, _ = process.communicate(timeout=20)
    finally:
        process.kill()
    assert (process.returncode, output) == (128 + number, b"")
    assert not (tmp_path / "out").exists()


def test_a_writer_that_was_killed_leaves_nothing_in_the_way(
    tmp_path: Path, busybox: OciLayout
) -> None:
    abandoned = tmp_path / "out/.ctrfs-abandoned"
    abandoned.mkdir(parents=True)
    (abandoned / "layer").write_bytes(b"half")
    converted(tmp_path, "oci:in", "oci:out:v1")
    assert not list((tmp_path / "out").glob(".ctrfs-*"))


def test_two_at_once_into_a_new_layout(tmp_path: Path, busybox: OciLayout) -> None:
    with ThreadPoolExecutor(4) as pool:
        targets = [f"oci:out:v{number}" for number in range(4)]
        digests = set(pool.map(lambda target: converted(tmp_path, "oci:in", target), targets))
    assert len(digests) == 1
    assert sorted(os.listdir(tmp_path / "out")) == ["blobs", "index.json", "oci-layout"]
    for target in targets:
        assert converted(tmp_path, target, "oci:again:v1") in digests


def test_progress_on_a_terminal(tmp_path: Path, busybox: OciLayout) -> None:
    layout = busybox
    layout.tag("odd", layout.image(archive(entry(b"\xff"))))
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*CTRFS, "convert", "oci:in:odd", "oci:out:v1"],
        cwd=tmp_path,
        env={**ENVIRONMENT, "TERM": "xterm", "COLUMNS": "200"},
        stdout=subprocess.PIPE,
        stderr=theirs,
    )
    os.close(theirs)
    shown = b""
    try:
        while piece := os.read(ours, 65536):
            shown += piece
    except OSError:  # how Linux says that the other side is closed
        pass
    os.close(ours)
    assert process.communicate()[0].startswith(b"sha256:")
    text = shown.decode()
    assert "reading layer 1 of 1" in text
    assert "layer 1 of 1 is kept as it is" in text
