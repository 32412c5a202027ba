"""kill -9 of the daemon loses nothing: not a pull, not a container, not an exit code."""

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.support.layouts import GZIP, OciLayout, compress, sha256, tar_of
from tests.support.mount import Mount
from tests.support.proxy import Proxy, stall_after
from tests.support.registry import Registry

STALE = pytest.mark.logs("detached the mount that a killed daemon left")


@STALE
def test_a_killed_pull_goes_on_where_it_was(
    own_mount: Mount, registry: Registry, tmp_path: Path
) -> None:
    layout = OciLayout(tmp_path / "oci")
    content = random.Random(1).randbytes(8 << 20)
    archive = tar_of({"big": content, "end": b"here"})
    layer = layout.blob(compress(archive, GZIP), GZIP)
    reference = registry.push(layout, layout.manifest([layer], [sha256(archive)]), "big", "1")
    with Proxy(registry.port) as proxy:
        proxy.on(layer["digest"], stall_after(4 << 20), times=1)
        through = reference.replace(registry.host, proxy.host)
        pull = ["sh", "-c", f"echo {through} > {own_mount.path}/images/pull"]
        writer = subprocess.Popen(pull, stderr=subprocess.DEVNULL)
        _wait_until(lambda: _partial_bytes(own_mount.root) >= 2 << 20)
        assert through in own_mount.read("images/pull")
        own_mount.kill()
        assert writer.wait(10) != 0
        own_mount.start()
        assert own_mount.read("images/pull") == ""
        before = len(proxy.seen)
        subprocess.run(pull, check=True)
        ranges = [request.headers.get("Range", "") for request in proxy.seen[before:]]
        assert any(value.startswith("bytes=") for value in ranges), ranges
        rootfs = own_mount.path / "images" / through / "rootfs"
        assert (rootfs / "big").read_bytes() == content
        assert (rootfs / "end").read_bytes() == b"here"


def _partial_bytes(root: Path) -> int:
    return sum(path.stat().st_size for path in (root / "ingest").iterdir() if path.is_file())


def _wait_until(holds: object, seconds: float = 20) -> None:
    assert callable(holds)
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@STALE
def test_20_running_containers(own_mount: Mount, busybox: str) -> None:
    """Some go on, some are killed while no daemon runs, some end by themselves then."""
    names = [f"c{number}" for number in range(20)]
    for name in names:
        script = f"echo up {name}; while [ ! -e /go ]; do sleep 0.05; done; echo end {name}; exit 7"
        own_mount.container(name, busybox, "sh", "-c", script)
        own_mount.write(f"containers/{name}/state", "start")
    pids = {name: int(own_mount.read(f"containers/{name}/pid")) for name in names}
    roots = {name: (own_mount.path / "containers" / name / "rootfs").resolve() for name in names}
    waiter = subprocess.Popen(["cat", own_mount.path / "containers/c0/wait"])

    own_mount.kill()
    assert waiter.wait(10) != 0
    killed, ended, running = names[:5], names[5:10], names[10:]
    for name in killed:
        os.kill(pids[name], signal.SIGKILL)
    for name in ended:
        (roots[name] / "go").touch()
    for name in killed + ended:
        _wait_until(lambda pid=pids[name]: not Path(f"/proc/{pid}").exists())

    own_mount.start()
    assert sorted(own_mount.containers()) == sorted(names)
    for name in killed:
        assert own_mount.read(f"containers/{name}/state") == "stopped"
        assert own_mount.read(f"containers/{name}/wait") == "137"
        assert own_mount.read(f"containers/{name}/log") == f"up {name}"
    for name in ended:
        assert own_mount.read(f"containers/{name}/exit_code") == "7"
        assert own_mount.read(f"containers/{name}/log") == f"up {name}\nend {name}"
    for name in running:
        assert own_mount.read(f"containers/{name}/state") == "running"
        assert int(own_mount.read(f"containers/{name}/pid")) == pids[name]
        (own_mount.path / "containers" / name / "rootfs/go").touch()
        assert own_mount.read(f"containers/{name}/wait") == "7"
        assert own_mount.read(f"containers/{name}/log") == f"up {name}\nend {name}"
    for name in names:
        own_mount.remove(name)


@STALE
@pytest.mark.logs("")
def test_at_any_moment_of_a_containers_life(own_mount: Mount, busybox: str) -> None:
    """The daemon is killed again and again while containers are made, run and destroyed. After
    each restart every container is in one clear state, and can be used and destroyed."""
    chance = random.Random(7)
    for round_number in range(6):
        script = (
            "for i in 1 2 3 4 5 6 7 8; do mkdir $i || exit; echo $IMAGE > $i/image;"
            " printf '%s\\n' sh -c 'echo out; exit 5' > $i/args; echo start > $i/state || exit;"
            " cat $i/wait || exit; rmdir $i || exit; done"
        )
        user = subprocess.Popen(
            ["sh", "-c", script],
            cwd=own_mount.path / "containers",
            env={**os.environ, "IMAGE": busybox},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(0.05 + chance.random() * 0.4)
        own_mount.kill()
        output, _ = user.communicate(timeout=20)
        assert set(output.split()) <= {b"5"}
        own_mount.start()
        for name in own_mount.containers():
            _use_and_destroy(own_mount, name, round_number)
        assert own_mount.containers() == []
        assert own_mount.monitors() == []
        assert not list((own_mount.root / "containers").iterdir())


def _use_and_destroy(mount: Mount, name: str, round_number: int) -> None:
    state = mount.read(f"containers/{name}/state")
    assert state in ("created", "running", "stopped"), round_number
    if state == "running":
        assert mount.read(f"containers/{name}/wait") == "5"
        state = "stopped"
    if state == "stopped":
        assert mount.read(f"containers/{name}/exit_code") == "5"
        assert mount.read(f"containers/{name}/log") == "out"
    else:
        assert mount.read(f"containers/{name}/pid") == ""
    mount.remove(name)


def test_sigterm_leaves_containers_running(own_mount: Mount, busybox: str) -> None:
    own_mount.container("c", busybox, "sh", "-c", "echo up; sleep 1000")
    own_mount.write("containers/c/state", "start")
    pid = int(own_mount.read("containers/c/pid"))
    own_mount.stop()
    assert not own_mount.path.is_mount()
    assert Path(f"/proc/{pid}").exists()
    own_mount.start()
    assert int(own_mount.read("containers/c/pid")) == pid
    assert own_mount.read("containers/c/state") == "running"
