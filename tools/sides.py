"""What a benchmark compares: ctrfs and containerd, each with one daemon on an empty store."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from runtime import linux
from tools.images import run
from tools.options import run_directory

READ_ALL = "find . -xdev -type f -print0 | xargs -0 cat > /dev/null"
FIND = "find . -xdev > /dev/null"
# Filling the largest image at 100 Mbit/s takes 70 s.
FILL_SECONDS = 600.0


def timed(function: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def drop_caches() -> None:
    """Make the next read of any file on this machine come from the disk."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def detach(*places: Path) -> None:
    """Unmount all that is mounted at or below these directories, in use or not."""
    for mounted in reversed(linux.mounts()):
        if any(Path(mounted.target).is_relative_to(place) for place in places):
            linux.umount(mounted.target, linux.MNT_DETACH)


@contextmanager
def overlay(tree: Path, directory: Path) -> Iterator[Path]:
    """An overlayfs over a copy of ``tree``, in a new directory below ``directory``."""
    with tempfile.TemporaryDirectory(dir=directory) as place:
        plain = Path(place)
        for name in ("tree", "upper", "work", "merged"):
            (plain / name).mkdir()
        run("cp", "-a", f"{tree}/.", plain / "tree")
        options = f"lowerdir={plain}/tree,upperdir={plain}/upper,workdir={plain}/work"
        linux.mount("overlay", str(plain / "merged"), "overlay", 0, options)
        try:
            yield plain / "merged"
        finally:
            linux.umount(str(plain / "merged"))


def _wait_until(condition: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + FILL_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{otherwise} after {FILL_SECONDS} s")
        time.sleep(0.1)


class Ctrfs:
    """A daemon of ours on a private root.

    Args:
        directory: where root and mountpoint are made.
        image: what to pull and run.
        mode: `lazy` or `full`, how to pull.
        prefix: what to put before the daemon's command.
        config: the daemon's settings.
    """

    def __init__(
        self,
        directory: Path,
        image: str,
        mode: str = "full",
        prefix: tuple[str, ...] = (),
        config: dict[str, Any] | None = None,
    ) -> None:
        self.root = directory / "ctrfs"
        self.mount = directory / "ctr"
        self.image = image
        self.mode = mode
        self.log = directory / "ctrfs.log"
        self.serial = 0
        self._config = directory / "ctrfs.json"
        self._config.write_text(json.dumps(config or {}))
        self._prefix = prefix

    @contextmanager
    def running(self) -> Iterator[None]:
        """Mounted on an empty store."""
        self.mount.mkdir(exist_ok=True)
        command = [*self._prefix, sys.executable, "-m", "tools.ctrfs", "mount", "--foreground"]
        places = ["--config", self._config, "--root", self.root, self.mount]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen([*command, *map(str, places)], stderr=log)
        try:
            while not self.mount.is_mount():
                if self.process.poll() is not None:
                    raise RuntimeError(self.log.read_text())
                time.sleep(0.02)
            (self.mount / "version").read_text()
            yield
        finally:
            try:
                for name in self.containers():
                    self.remove(name)
            finally:
                self.process.terminate()
                self.process.wait()
                self._clean()

    def containers(self) -> list[str]:
        """Names of all containers."""
        with suppress(OSError):  # the daemon has died, which is being told already
            return [name for name in os.listdir(self.mount / "containers") if name != "README"]
        return []

    def _clean(self) -> None:
        """Take away what outlives a daemon, also one that was killed."""
        directory = run_directory(self.root)
        detach(directory, self.mount, self.root)
        for pid in self.layer_servers():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        shutil.rmtree(directory, ignore_errors=True)
        shutil.rmtree(self.root, ignore_errors=True)

    def layer_servers(self) -> list[int]:
        """Process ids of what serves the data of incomplete layers of this root."""
        places = {os.fsencode(path) for path in (self.root, run_directory(self.root))}
        found = []
        for entry in os.listdir("/proc"):
            with suppress(OSError):
                words = Path(f"/proc/{entry}/cmdline").read_bytes().split(b"\0")
                if b"tools.layerserver" in words and any(
                    word.startswith(tuple(places)) for word in words
                ):
                    found.append(int(entry))
        return found

    def write(self, path: str, text: str) -> None:
        """As echo does.

        Raises:
            RuntimeError: it was refused; the message is the last line of `errors`.
        """
        descriptor = os.open(self.mount / path, os.O_WRONLY | os.O_TRUNC)
        try:
            os.write(descriptor, text.encode() + b"\n")
        except OSError as error:
            raise RuntimeError((self.mount / "errors").read_text().splitlines()[-1]) from error
        finally:
            os.close(descriptor)

    def pull(self) -> None:
        """Pull the image; with mode `lazy` until it can be used."""
        self.write("images/pull", f"{self.image} mode={self.mode}")

    @property
    def rootfs(self) -> Path:
        """The image's files."""
        return self.mount / "images" / self.image / "rootfs"

    def wait_filled(self) -> None:
        """Return when every byte of the image is here."""
        state = self.mount / "images" / self.image / "state"
        _wait_until(lambda: state.read_text() == "complete\n", "the image is not filled up")

    def wait_recorded(self, container: str) -> None:
        """Return when it is recorded what a container opens in its first seconds, in which each
        open takes some 4 µs longer."""
        opened = self.mount / "containers" / container / "opened"
        _wait_until(lambda: bool(opened.read_text()), "there is no record of what was opened")

    def disk(self) -> int:
        """Bytes that the store takes on the disk."""
        return sum(
            os.lstat(os.path.join(directory, name)).st_blocks * 512
            for directory, directories, files in os.walk(self.root)
            for name in (*directories, *files)
        )

    def peak_memory(self) -> int:
        """Peak resident memory of the daemon in bytes."""
        return memory(self.process.pid, "VmHWM")

    def start(self, *args: str) -> str:
        """Start a container; its name."""
        self.serial += 1
        name = f"bench-{self.serial}"
        (self.mount / "containers" / name).mkdir()
        self.write(f"containers/{name}/image", self.image)
        self.write(f"containers/{name}/args", "\n".join(args))
        self.write(f"containers/{name}/state", "start")
        return name

    def to_first_line(self, *args: str) -> float:
        """Seconds from the name of an image that may not be here to a line of a container, which
        then ends."""
        begun = time.perf_counter()
        self.pull()
        name = self.start(*args)
        with ThreadPoolExecutor(1) as pool:
            ending = pool.submit(self._wait, name)
            line = self.first_line(name, ending.done)
            ending.result()
        if line is None:
            raise RuntimeError("the container has printed nothing")
        return line - begun

    def to_end(self, *args: str) -> float:
        """Seconds from the name of an image that may not be here to the end of a container."""
        begun = time.perf_counter()
        self.pull()
        self._wait(self.start(*args))
        return time.perf_counter() - begun

    def _wait(self, name: str) -> None:
        container = self.mount / "containers" / name
        code = (container / "wait").read_text()
        if code != "0\n":
            raise RuntimeError(f"exit code {code}{(container / 'log').read_text()}")

    def first_line(self, name: str, ended: Callable[[], bool]) -> float | None:
        """When there is a line in a container's `log`, as `tail -f` sees it; None: it ended."""
        descriptor = os.open(self.mount / "containers" / name / "log", os.O_RDONLY)
        try:
            while True:
                last = ended()
                if b"\n" in os.pread(descriptor, 4096, 0):
                    return time.perf_counter()
                if last:
                    return None
                # A look at the log costs the daemon a fraction of a millisecond.
                time.sleep(0.004)
        finally:
            os.close(descriptor)

    def true(self) -> None:
        """mkdir, settings, start, exit code, rmdir: what `run --rm` does."""
        name = self.start("true")
        assert (self.mount / "containers" / name / "wait").read_text() == "0\n"
        (self.mount / "containers" / name).rmdir()

    def start_to_exit(self) -> float:
        """From `start` written until the exit code was read, seconds."""
        self.serial += 1
        name = f"bench-{self.serial}"
        (self.mount / "containers" / name).mkdir()
        self.write(f"containers/{name}/image", self.image)
        self.write(f"containers/{name}/args", "true")
        wait = self.mount / "containers" / name / "wait"

        def start() -> None:
            self.write(f"containers/{name}/state", "start")
            assert wait.read_text() == "0\n"

        seconds = timed(start)
        (self.mount / "containers" / name).rmdir()
        return seconds

    def remove(self, name: str) -> None:
        """Kill and rmdir."""
        if (self.mount / "containers" / name / "state").read_text() == "running\n":
            self.write(f"containers/{name}/state", "kill")
        (self.mount / "containers" / name).rmdir()


def memory(pid: int, field: str) -> int:
    """Bytes that /proc/PID/status gives for VmRSS, VmHWM …"""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) << 10


def cached() -> int:
    """Bytes of files that the kernel has in memory."""
    values = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return sum(int(values[name].split()[0]) << 10 for name in ("Cached", "Buffers"))


class Containerd:
    """A containerd on a private root.

    Args:
        directory: where its root, state and socket are made.
        image: what to pull and run.
        prefix: what to put before its command and that of its client, which fetches.
    """

    def __init__(self, directory: Path, image: str, prefix: tuple[str, ...] = ()) -> None:
        self.directory = directory / "containerd"
        self.socket = self.directory / "sock"
        self.image = image
        self.serial = 0
        self._prefix = prefix

    @contextmanager
    def running(self) -> Iterator[None]:
        """Serving on an empty store."""
        self.directory.mkdir()
        config = self.directory / "config.toml"
        config.write_text(
            f'version = 2\nroot = "{self.directory}/root"\nstate = "{self.directory}/state"\n'
            'disabled_plugins = ["io.containerd.grpc.v1.cri"]\n'
            f'[grpc]\naddress = "{self.socket}"\n'
        )
        command = [*self._prefix, "containerd", "-c", str(config)]
        with (self.directory / "log").open("ab") as log:
            process = subprocess.Popen(command, stderr=log, stdout=log)
        try:
            while subprocess.run([*self.ctr(), "version"], capture_output=True).returncode:
                if process.poll() is not None:
                    raise RuntimeError((self.directory / "log").read_text())
                time.sleep(0.05)
            yield
        finally:
            self._kill_containers()
            process.terminate()
            process.wait()
            detach(self.directory)
            shutil.rmtree(self.directory)

    def _kill_containers(self) -> None:
        """End what a benchmark that was interrupted leaves running."""
        listed = subprocess.run([*self.ctr(), "tasks", "list", "-q"], capture_output=True)
        for name in listed.stdout.decode().split():
            for action in (("kill", "--signal", "KILL"), ("delete", "--force")):
                subprocess.run([*self.ctr(), "tasks", *action, name], capture_output=True)

    def ctr(self) -> list[str]:
        """The client's command line."""
        return [*self._prefix, "ctr", "-a", str(self.socket)]

    def pull(self) -> None:
        """Pull the image in full and unpack it."""
        run(*self.ctr(), "images", "pull", "--plain-http", self.image)

    def to_first_line(self, *args: str) -> float:
        """As for ctrfs."""
        line, _ = self._run(args)
        return line

    def to_end(self, *args: str) -> float:
        """As for ctrfs."""
        _, end = self._run(args)
        return end

    def _run(self, args: tuple[str, ...]) -> tuple[float, float]:
        """Seconds to the first line, or the end of output, and to the end."""
        self.serial += 1
        begun = time.perf_counter()
        self.pull()
        command = [*self.ctr(), "run", "--rm", self.image, f"bench-{self.serial}", *args]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            line = time.perf_counter() - begun
            process.communicate()
        end = time.perf_counter() - begun
        if process.returncode:
            raise RuntimeError(f"ctr run: exit code {process.returncode}")
        return line, end

    def true(self) -> None:
        """`ctr run --rm IMAGE true`."""
        self.serial += 1
        run(*self.ctr(), "run", "--rm", self.image, f"bench-{self.serial}", "true")
