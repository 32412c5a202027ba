"""Readers that wait: many at once, without blocking, polled, and interrupted at any moment."""

import errno
import json
import os
import select
import signal
import socket
import statistics
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.layouts import OciLayout, tar_of
from tests.support.mount import Mount

READERS = 500


@pytest.fixture
def sleeper(mount: Mount, busybox: str) -> Iterator[Path]:
    """A running container."""
    path = mount.container("sleeper", busybox, "sh", "-c", "echo up; sleep 1000")
    mount.write("containers/sleeper/state", "start")
    yield path


def test_500_blocked_readers_slow_nothing(mount: Mount, sleeper: Path) -> None:
    script = f"for i in $(seq {READERS}); do cat wait & done; wait"
    readers = subprocess.Popen(
        ["bash", "-c", script], cwd=sleeper, stdout=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while _blocked_readers(readers.pid) < READERS:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    times = []
    for _ in range(50):
        start = time.perf_counter()
        assert mount.read("containers/sleeper/state") == "running"
        times.append(time.perf_counter() - start)
    assert statistics.median(times) < 0.02
    mount.write("containers/sleeper/state", "kill")
    output, _ = readers.communicate(timeout=60)
    assert output == "137\n" * READERS


def _blocked_readers(parent: int) -> int:
    """Children of ``parent`` that wait in a read on FUSE."""
    count = 0
    for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        wchan = Path(f"/proc/{pid}/wchan").read_text()
        count += wchan in ("request_wait_answer", "fuse_simple_request")
    return count


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("name", ["containers/sleeper/wait", "events"])
def test_a_signal_ends_a_reader(
    mount: Mount, sleeper: Path, name: str, number: signal.Signals
) -> None:
    times = []
    for _ in range(3):
        reader = subprocess.Popen(["cat", mount.path / name], stdout=subprocess.DEVNULL)
        time.sleep(0.15)
        assert reader.poll() is None
        start = time.monotonic()
        reader.send_signal(number)
        assert reader.wait(10) == -number
        times.append(time.monotonic() - start)
    assert statistics.median(times) < 0.3


def test_ctrl_c_ends_a_command(mount: Mount, sleeper: Path) -> None:
    """The stop of a process that ignores its stop signal takes 10 s; its writer can leave."""
    writer = subprocess.Popen(["sh", "-c", "echo stop > state"], cwd=sleeper)
    time.sleep(0.3)
    assert writer.poll() is None
    start = time.monotonic()
    writer.send_signal(signal.SIGINT)
    assert writer.wait(10) != 0
    assert time.monotonic() - start < 1
    assert mount.read("containers/sleeper/state") == "running"


def test_a_kill_does_not_wait_for_a_stop(mount: Mount, sleeper: Path) -> None:
    """The kernel would let one write at a time into one file, and who waits can't be killed."""
    stopper = subprocess.Popen(["sh", "-c", "echo stop > state"], cwd=sleeper)
    time.sleep(0.3)
    assert stopper.poll() is None
    start = time.monotonic()
    mount.write("containers/sleeper/state", "kill")
    assert stopper.wait(10) == 0
    assert time.monotonic() - start < 5  # of the 10 s that a stop takes
    assert mount.read("containers/sleeper/state") == "stopped"


def test_a_pull_does_not_wait_for_another(mount: Mount, tmp_path: Path) -> None:
    layout = OciLayout(tmp_path / "oci")
    layout.tag("a", layout.image(tar_of({"a": b"a"})))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        name = f"127.0.0.1:{silent.getsockname()[1]}/nothing:1"
        puller = subprocess.Popen(["sh", "-c", f"echo {name} > {mount.path}/images/pull"])
        while not mount.read("images/pull").startswith(name):
            assert puller.poll() is None
        mount.pull(f"oci:{layout.path}:a as=localhost/beside:1")
        assert mount.read("images/pull").startswith(name)
        puller.send_signal(signal.SIGINT)
        assert puller.wait(10) != 0


def test_many_at_once_write_to_one_file(mount: Mount, busybox: str) -> None:
    again = mount.path / "images" / busybox / "source"
    script = 'for i in 1 2 3 4 5; do echo "$0" > images/pull || exit; done'
    command = ["sh", "-c", script, again.read_text()]
    writers = [
        subprocess.Popen(command, cwd=mount.path, stderr=subprocess.PIPE, text=True)
        for _ in range(20)
    ]
    for writer in writers:
        _, complaints = writer.communicate(timeout=60)
        assert (writer.returncode, complaints) == (0, "")


def test_without_blocking(mount: Mount, sleeper: Path) -> None:
    for name in ("containers/sleeper/wait", "events"):
        descriptor = os.open(mount.path / name, os.O_RDONLY | os.O_NONBLOCK)
        try:
            with pytest.raises(BlockingIOError) as caught:
                os.read(descriptor, 100)
            assert caught.value.errno == errno.EAGAIN
        finally:
            os.close(descriptor)


def test_poll(mount: Mount, sleeper: Path) -> None:
    """poll(2), select(2) and epoll(7) wake up with the event and not before."""
    descriptors = {
        name: os.open(mount.path / name, os.O_RDONLY | os.O_NONBLOCK)
        for name in ("containers/sleeper/wait", "events")
    }
    try:
        poll = select.poll()
        epoll = select.epoll()
        for descriptor in descriptors.values():
            poll.register(descriptor, select.POLLIN)
            epoll.register(descriptor, select.EPOLLIN)
        assert poll.poll(100) == []
        assert select.select([*descriptors.values()], [], [], 0.1)[0] == []
        assert epoll.poll(0.1) == []
        killer = subprocess.Popen(["sh", "-c", "sleep 0.2; echo kill > state"], cwd=sleeper)
        assert poll.poll(10_000) != []
        assert killer.wait(10) == 0
        assert sorted(select.select([*descriptors.values()], [], [], 5)[0]) == sorted(
            descriptors.values()
        )
        assert len(epoll.poll(5)) == 2
        epoll.close()
        assert os.read(descriptors["containers/sleeper/wait"], 100) == b"137\n"
        lines = os.read(descriptors["events"], 1 << 16).splitlines()
        assert "sleeper" in {json.loads(line).get("id") for line in lines}
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)


def test_tail_follows_a_log(mount: Mount, busybox: str) -> None:
    mount.container("c", busybox, "sh", "-c", "for i in 1 2 3; do echo $i; sleep 0.3; done")
    mount.write("containers/c/state", "start")
    with subprocess.Popen(
        ["tail", "-n", "+1", "-s", "0.1", "-f", "log"],
        cwd=mount.path / "containers/c",
        stdout=subprocess.PIPE,
        text=True,
    ) as tail:
        assert tail.stdout is not None
        assert [tail.stdout.readline() for _ in range(3)] == ["1\n", "2\n", "3\n"]
        tail.terminate()
