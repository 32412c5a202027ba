"""Cgroups, processes, what the machine has, and the other OCI runtime."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import trio

from runtime import fanotify, features, keeper, linux
from runtime.cgroups import Cgroup, hierarchies, layout, process_table
from runtime.config import RuntimeConfig
from runtime.errors import Unsupported
from runtime.processes import Process, identify
from tests.runtime.support import Room, opened, text_of
from tests.support.mounting import mounted


def test_processes_are_known_by_more_than_their_number() -> None:
    with subprocess.Popen(["sleep", "100"]) as child:
        process = identify(child.pid)
        assert process is not None and process.is_running()
        impostor = Process(process.pid, process.started + 1, process.boot)
        other_boot = Process(process.pid, process.started, "other")
        for wrong in (impostor, other_boot):
            assert not wrong.is_running()
            assert not wrong.send(signal.SIGKILL)
            assert wrong.kill(0)
        assert child.poll() is None
        assert process.kill(5)
        assert not process.is_running()
    assert identify(child.pid) is None
    assert not process.send(signal.SIGTERM)


def test_a_cgroup_with_processes_is_destroyed() -> None:
    cgroup = Cgroup(f"/ctrfs/test-{os.getpid()}")
    assert not cgroup.exists()
    assert cgroup.destroy()
    nested = [top / f"ctrfs/test-{os.getpid()}" / "nested" for top in hierarchies()]
    # A cpuset on v1 takes processes only once it has been told its processors.
    usable = [path for path in nested if "cpuset" not in str(path)]
    for path in usable:
        path.mkdir(parents=True)
    with subprocess.Popen(["sleep", "100"]) as child:
        for path in usable:
            (path / "cgroup.procs").write_text(str(child.pid))
        assert cgroup.exists()
        assert cgroup.pids() == [child.pid]
        assert not cgroup.frozen()
        assert cgroup.destroy()
        assert child.wait(5) == -signal.SIGKILL
    assert not cgroup.exists()
    assert cgroup.pids() == []


def test_the_process_table() -> None:
    name = "\x1b[31m\n"
    with subprocess.Popen(["sleep", "100", name], executable=sys.executable) as child:
        child.kill()
    with subprocess.Popen(["sh", "-c", "read x", name], stdin=subprocess.PIPE) as child:
        time.sleep(0.05)
        lines = process_table([child.pid, 999_999_999]).split("\n")
        assert lines[0].split() == ["PID", "PPID", "USER", "STAT", "TIME", "COMMAND"]
        assert lines[1].split()[:3] == [str(child.pid), str(os.getpid()), "root"]
        assert lines[1].endswith("sh -c read x ?[31m?")
        assert len(lines) == 2
    assert process_table([]) == ""


def test_what_this_machine_has(tmp_path: Path) -> None:
    root = tmp_path / "not" / "yet"
    found = {check.name: check for check in features.checks(RuntimeConfig(), root)}
    assert all(check.ok for check in found.values() if check.required)
    assert found["conmon"].found.startswith("conmon version 2.")
    assert found["EROFS from loop devices"].ok
    assert found["EROFS from files"].ok == (linux.kernel_version() >= (6, 12))
    assert all(check.advice for check in found.values())
    report = features.report(RuntimeConfig(), root, "auto")
    assert features.report(RuntimeConfig(), root, "fuse")["layer_serving"] == "fuse"
    assert report["kernel"] == os.uname().release


@pytest.mark.parametrize("held", [True, False])
def test_fanotify_is_chosen_where_readers_are_held_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: bool
) -> None:
    monkeypatch.setattr(keeper, "holder", lambda: "somebody" if held else "")
    monkeypatch.setattr(fanotify, "available", lambda place: None)
    expected = {"auto": "fanotify" if held else "fuse", "fuse": "fuse", "fanotify": "fanotify"}
    for method, serving in expected.items():
        report = features.report(RuntimeConfig(), tmp_path, method)
        assert report["layer_serving"] == serving


def test_no_layer_can_be_mounted_from_a_file_on_a_tmpfs(tmp_path: Path) -> None:
    with mounted("tmpfs", tmp_path, "tmpfs", "size=1m"):
        assert features.report(RuntimeConfig(), tmp_path, "auto")["layer_mounts"] == "loop"
        assert not list(tmp_path.iterdir())


def test_what_is_missing_is_found_missing(tmp_path: Path) -> None:
    config = RuntimeConfig(runtime="nosuch", conmon="nosuch-either")
    found = {check.name: check for check in features.checks(config, tmp_path)}
    assert not found["nosuch"].ok and found["nosuch"].required
    assert not found["nosuch-either"].ok
    if layout() == "hybrid":
        crun = {c.name: c for c in features.checks(RuntimeConfig(runtime="crun"), tmp_path)}
        assert not crun["runtime and cgroups"].ok


async def test_runc_agrees_with_what_is_done_without_it(room: Room) -> None:
    async def runc(*arguments: str) -> str:
        command = ["runc", "--root", str(room.run / "runc"), *arguments]
        done = await trio.run_process(
            command, capture_stdout=True, capture_stderr=True, check=False
        )
        return (done.stdout + done.stderr).decode()

    container = await room.make("c", "sleep", "100")
    await container.start()
    assert '"status": "running"' in await runc("state", container.uid)
    await container.pause()
    await container.resume()
    assert '"status": "running"' in await runc("state", container.uid)
    await container.kill()
    await container.rootfs()  # waits until all is cleared away
    assert "does not exist" in await runc("state", container.uid)


async def run_with_crun(directory: Path) -> None:
    """The whole life of a container, by crun."""
    async with opened(directory, RuntimeConfig(runtime="crun")) as room:
        container = await room.make("c", "sh", "-c", "echo by crun; read x; exit 7", stdin="open")
        await container.start()
        await container.pause()
        await container.resume()
        await container.write_stdin(b"go\n")
        assert await container.wait() == 7
        assert text_of(container) == "by crun\n"
        bad = await room.make("bad", "nosuch")
        with pytest.raises(Exception, match="'nosuch' was not found"):
            await bad.start()
        assert bad.state == "created"
        for name in ("c", "bad"):
            await room.containers.remove(name)
        assert list((directory / "run/runc").glob("*")) == []


def test_crun(place: Path) -> None:
    """In a mount namespace without the v2 hierarchy where crun refuses v1 and v2 together."""
    hide = "umount /sys/fs/cgroup/unified; " if layout() == "hybrid" else ""
    code = (
        "import sys, trio; from pathlib import Path;"
        "from tests.runtime.test_machine import run_with_crun;"
        "trio.run(run_with_crun, Path(sys.argv[1]))"
    )
    command = f'{hide}exec "$0" -c "$1" "$2"'
    subprocess.run(
        ["unshare", "--mount", "sh", "-c", command, sys.executable, code, str(place)], check=True
    )


async def test_crun_where_it_does_not_work(place: Path) -> None:
    async with opened(place, RuntimeConfig(runtime="crun")) as room:
        container = await room.make("c", "true")
        if layout() == "hybrid":
            with pytest.raises(Unsupported, match="set the runtime to runc"):
                await container.start()
            assert container.state == "created"
        else:
            await container.start()
            assert await container.wait() == 0
        await room.containers.remove("c")


async def test_a_runtime_that_is_not_installed(place: Path) -> None:
    for config in (RuntimeConfig(runtime="nosuch"), RuntimeConfig(conmon="nosuch")):
        async with opened(place, config) as room:
            container = await room.make("c", "true")
            with pytest.raises(Unsupported, match="apt install nosuch"):
                await container.start()
            assert container.state == "created"
            await room.containers.remove("c")


async def test_long_paths_and_colons(place: Path) -> None:
    deep = place / ("x" * 100) / "with:colon,comma"
    deep.mkdir(parents=True)
    async with opened(deep) as room:
        container = await room.make("c", "sh", "-c", "read x; echo got $x", stdin="once")
        await container.start()
        await container.write_stdin(b"it\n")
        assert await container.wait() == 0
        assert text_of(container) == "got it\n"
        await room.containers.remove("c")


async def test_the_cost_of_a_monitor(room: Room) -> None:
    container = await room.make("small", "sleep", "100")
    await container.start()
    run = container._record.run
    assert run is not None
    assert proportional_kilobytes(run.conmon.pid) < 4096


def proportional_kilobytes(pid: int) -> int:
    """Memory of a process, with what it shares divided among those who share it."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
