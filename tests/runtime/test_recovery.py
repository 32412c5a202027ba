"""What the next daemon finds after this one was killed, at any moment."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from runtime.processes import Process, command_line
from runtime.records import Records, Run
from tests.runtime.support import (
    Room,
    cgroups_of,
    mounts_below,
    opened,
    processes_of,
    text_of,
)


class Victims:
    """Processes to be killed."""

    def __init__(self) -> None:
        self._parent = subprocess.Popen(
            [sys.executable, "-m", "tests.runtime.victim"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def begin(self, place: Path, *calls: list[str]) -> int:
        """One that carries out the calls; its process id once it has begun."""
        assert self._parent.stdin and self._parent.stdout
        self._parent.stdin.write(json.dumps([str(place), calls]) + "\n")
        self._parent.stdin.flush()
        word, _, pid = self._parent.stdout.readline().partition(" ")
        assert word == "open"
        return int(pid)

    def done(self) -> None:
        """Wait until the last one has carried them out."""
        assert self._parent.stdout
        assert self._parent.stdout.readline() == "done\n"

    def drain(self) -> None:
        """Forget what one that was killed may have said."""
        assert self._parent.stdout
        os.set_blocking(self._parent.stdout.fileno(), False)
        try:
            self._parent.stdout.read()
        except TypeError:
            pass
        finally:
            os.set_blocking(self._parent.stdout.fileno(), True)

    def run_and_kill(self, place: Path, *calls: list[str]) -> None:
        """One that is killed when it is done."""
        pid = self.begin(place, *calls)
        self.done()
        kill(pid)

    def close(self) -> None:
        """End the parent."""
        assert self._parent.stdin and self._parent.stdout
        self._parent.stdin.close()
        assert self._parent.wait(10) == 0
        self._parent.stdout.close()


def kill(pid: int) -> None:
    """SIGKILL, and wait until it is gone."""
    descriptor = os.pidfd_open(pid)
    signal.pidfd_send_signal(descriptor, signal.SIGKILL)
    os.close(descriptor)
    while Path(f"/proc/{pid}").exists():
        time.sleep(0.001)


@pytest.fixture(scope="module")
def victims() -> Iterator[Victims]:
    """Something to fork victims from."""
    victims = Victims()
    yield victims
    victims.close()


@asynccontextmanager
async def after(place: Path) -> AsyncIterator[Room]:
    """The next daemon; everything is removed in the end, without leftovers."""
    async with opened(place) as room:
        yield room
        for name in room.containers.list():
            if room.containers.get(name).is_running:
                await room.containers.get(name).kill()
            await room.containers.remove(name)
        nothing_left(place)


def nothing_left(place: Path) -> None:
    """No file, process or state of any container is there."""
    assert list((place / "root/containers").iterdir()) == []
    assert list((place / "run/containers").iterdir()) == []
    assert list((place / "run/runc").glob("*")) == []
    assert not processes_of(place / "run")
    assert not [m for m in mounts_below(place) if "/containers/" in m]


def start(name: str, *args: str) -> tuple[list[str], list[str]]:
    """Calls that make and start a container."""
    return ["make", name, *args], ["start", name]


async def test_running_containers_are_adopted(place: Path, victims: Victims) -> None:
    script = "trap 'echo bye; exit 3' TERM; echo up; while :; do sleep 0.01; done"
    victims.run_and_kill(place, *start("a", "sh", "-c", script), *start("b", "sleep", "100"))
    async with after(place) as room:
        a, b = room.containers.get("a"), room.containers.get("b")
        assert (a.state, b.state) == ("running", "running")
        assert a.pid and b.pid and a.pid != b.pid
        assert "sleep 100" in await b.processes()
        assert text_of(a) == "up\n"
        assert (await a.rootfs() / "bin/sh").exists()
        await a.stop()
        assert a.exit_code == 3
        assert text_of(a) == "up\nbye\n"


async def test_exit_codes_of_those_that_ended_meanwhile(place: Path, victims: Victims) -> None:
    script = "sleep 0.2; echo late; exit 44"
    victims.run_and_kill(
        place, *start("now", "sh", "-c", "exit 43"), *start("soon", "sh", "-c", script)
    )
    await trio.sleep(0.5)
    async with after(place) as room:
        for name, code in (("now", 43), ("soon", 44)):
            container = room.containers.get(name)
            assert container.state == "stopped"
            assert container.ended_with() == code
            assert container.finished_ns and container.started_ns
            assert container.finished_ns < time.time_ns()
        assert text_of(room.containers.get("soon")) == "late\n"
        assert not cgroups_of([room.containers.get(n).uid for n in ("now", "soon")])


async def test_an_orderly_end_leaves_containers_running_too(place: Path) -> None:
    async with opened(place) as room:
        container = await room.make("stays", "sleep", "100")
        await container.start()
        pid = container.pid
        await (await room.make("looked-at")).rootfs()
    mounted = mounts_below(place / "run/containers")
    assert mounted == [str(room.rootfs.container_path(container.uid))]
    async with after(place) as room:
        assert room.containers.get("stays").pid == pid


async def test_paused_containers_stay_paused(place: Path, victims: Victims) -> None:
    victims.run_and_kill(place, *start("ice", "sleep", "100"), ["pause", "ice"])
    async with after(place) as room:
        container = room.containers.get("ice")
        assert container.state == "paused"
        await container.resume()
        assert container.state == "running"


async def test_stdin_after_adoption(place: Path, victims: Victims) -> None:
    make, run = start("in", "sh", "-c", "cat; echo end")
    victims.run_and_kill(place, make, ["set", "in", "stdin", "once"], run)
    async with after(place) as room:
        container = room.containers.get("in")
        await container.write_stdin(b"text\n")
        await container.stdin_writer_gone()
        with trio.fail_after(5):
            assert await container.wait() == 0
        assert text_of(container) == "text\nend\n"


async def test_the_monitor_died_meanwhile(place: Path, victims: Victims) -> None:
    victims.run_and_kill(place, *start("lost", "sleep", "100"))
    for pid in processes_of(place / "run"):
        kill(pid)
    async with after(place) as room:
        container = room.containers.get("lost")
        assert container.state == "stopped"
        assert container.exit_code == 137
        assert "monitor (conmon)" in container.error


async def test_process_ids_of_others_are_never_trusted(place: Path) -> None:
    """As after a reboot: the numbers are those of processes that are none of ours."""
    bystander = await trio.lowlevel.open_process(["sleep", "100"])
    try:
        async with opened(place) as room:
            container = await room.make("old", "true")
            await container.start()
            await container.wait()
            record = container._record
        async with opened(place) as room:
            other = Process(bystander.pid, 12345, "another boot")
            record.state, record.run, record.exit_code = "running", Run(other, other), None
            Records(room.store.db).save(record)
            (place / "root/containers" / record.uid / "exit" / record.uid).unlink()
            (place / "run/containers" / record.uid / "bundle/exit").unlink()
        async with after(place) as room:
            container = room.containers.get("old")
            assert container.state == "stopped"
            assert container.exit_code == 255
            assert "not known" in container.error
        assert bystander.poll() is None
    finally:
        bystander.kill()
        await bystander.wait()


@pytest.mark.parametrize("forgotten", [False, True])
async def test_a_removal_that_was_cut_short_is_completed(place: Path, forgotten: bool) -> None:
    async with opened(place) as room:
        container = await room.make("half", "sh", "-c", "mkdir -p /a/b; echo x > /a/b/c")
        await container.start()
        await container.wait()
        async with container._lock:
            state = place / "root/containers" / container.uid
            state.rename(state.with_name(f"{container.uid}.removed"))
            if forgotten:
                Records(room.store.db).delete(container.uid)
    async with after(place) as room:
        assert room.containers.list() == []
        nothing_left(place)


@pytest.mark.logs("no record knows the container")
async def test_files_outlive_the_loss_of_the_database(place: Path) -> None:
    async with opened(place) as room:
        container = await room.make("lost", "sh", "-c", "echo precious > /data")
        await container.start()
        await container.wait()
    for file in (place / "root").glob("ctrfs.db*"):
        file.unlink()
    async with after(place) as room:
        assert room.containers.list() == []
        kept = place / "root/lost+found" / container.uid / "upper/data"
        assert kept.read_text() == "precious\n"


@pytest.mark.logs("runs .* but is not recorded")
async def test_what_runs_outlives_the_loss_of_the_database(place: Path) -> None:
    async with opened(place) as room:
        container = await room.make("lost", "sleep", "100")
        await container.start()
        pid = container.pid
        assert pid is not None
    for file in (place / "root").glob("ctrfs.db*"):
        file.unlink()
    async with opened(place) as room:
        assert room.containers.list() == []
    assert "sleep" in command_line(pid)
    assert "upper" in os.listdir(place / "root/containers" / container.uid)


@pytest.mark.parametrize("command", ["sleep", "true"])
async def test_killed_at_any_moment_of_a_start(place: Path, victims: Victims, command: str) -> None:
    args = ["sleep", "100"] if command == "sleep" else ["sh", "-c", "echo ran"]
    chance = random.Random(command)
    seen = set()
    for turn in range(12):
        pid = victims.begin(place, *start(f"c{turn}", *args))
        await trio.sleep(chance.uniform(0, 0.09))
        kill(pid)
        async with after(place) as room:
            for name in room.containers.list():
                container = room.containers.get(name)
                seen.add(container.state)
                assert container.state in ("created", "running", "stopped")
                await check_usable(container.state, room, name, args)
        victims.drain()
    assert "created" in seen


async def check_usable(state: str, room: Room, name: str, args: list[str]) -> None:
    """Whatever state it is in, it can go on from there."""
    container = room.containers.get(name)
    if state == "running":
        if args[0] == "sleep":
            assert "sleep 100" in await container.processes()
            await container.kill()
        else:
            assert await container.wait() == 0
    elif state == "created":
        assert not cgroups_of([container.uid])
        assert container.exit_code is None
        # The settings may not have come as far as the record.
        await container.set("image", "box:1")
        await container.set("args", "\n".join(args))
    elif state == "stopped":
        assert container.exit_code == 0
    before = text_of(container)
    await container.start()
    if args[0] == "sleep":
        assert container.state == "running"
    else:
        assert await container.wait() == 0
        assert text_of(container) == before + "ran\n"
