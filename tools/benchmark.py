"""ctrfs beside containerd, in one run, on one image and one registry.

Every figure is the median of several rounds in which the two take turns, and what counts
is their ratio: absolute times vary by half from machine to machine. The image is Debian's
minbase with python3 and numpy in one gzip layer of about 80 MB, in a docker-registry on
loopback. Before each cold measurement the page cache is dropped.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from runtime import linux
from tools.images import debian_layout, debian_tree, run
from tools.options import run_directory
from tools.registry import registry

READ_ALL = "find . -xdev -type f -print0 | xargs -0 cat > /dev/null"


def timed(function: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def drop_caches() -> None:
    """Make the next read come from the disk."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


class Ctrfs:
    """A daemon of ours on a private root."""

    def __init__(self, directory: Path, image: str) -> None:
        self.root = directory / "ctrfs"
        self.mount = directory / "ctr"
        self.image = image
        self.log = directory / "ctrfs.log"
        self.serial = 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Mounted on an empty store."""
        self.mount.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "tools.ctrfs", "mount", "--foreground"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, "--root", str(self.root), str(self.mount)], stderr=log
            )
        try:
            while not self.mount.is_mount():
                if self.process.poll() is not None:
                    sys.exit(self.log.read_text())
                time.sleep(0.02)
            (self.mount / "version").read_text()
            yield
        finally:
            for name in os.listdir(self.mount / "containers"):
                if name != "README":
                    self.remove(name)
            self.process.terminate()
            self.process.wait()
            self._clean()

    def _clean(self) -> None:
        directory = run_directory(self.root)
        for mounted in reversed(linux.mounts()):
            if mounted.target.startswith(str(directory)):
                linux.umount(mounted.target, linux.MNT_DETACH)
        shutil.rmtree(directory, ignore_errors=True)
        shutil.rmtree(self.root)

    def write(self, path: str, text: str) -> None:
        """As echo does."""
        descriptor = os.open(self.mount / path, os.O_WRONLY | os.O_TRUNC)
        os.write(descriptor, text.encode() + b"\n")
        os.close(descriptor)

    def pull(self) -> None:
        """Pull the image."""
        self.write("images/pull", self.image)

    def peak_memory(self) -> int:
        """Peak resident memory of the daemon in bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) << 10

    def start(self, *args: str) -> str:
        """Start a container; its name."""
        self.serial += 1
        name = f"bench-{self.serial}"
        (self.mount / "containers" / name).mkdir()
        self.write(f"containers/{name}/image", self.image)
        self.write(f"containers/{name}/args", "\n".join(args))
        self.write(f"containers/{name}/state", "start")
        return name

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


class Containerd:
    """A containerd on a private root."""

    def __init__(self, directory: Path, image: str) -> None:
        self.directory = directory / "containerd"
        self.socket = self.directory / "sock"
        self.image = image
        self.serial = 0

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
        with (self.directory / "log").open("ab") as log:
            process = subprocess.Popen(["containerd", "-c", str(config)], stderr=log, stdout=log)
        try:
            while subprocess.run([*self.ctr(), "version"], capture_output=True).returncode:
                time.sleep(0.05)
            yield
        finally:
            process.terminate()
            process.wait()
            shutil.rmtree(self.directory)

    def ctr(self) -> list[str]:
        """The client's command line."""
        return ["ctr", "-a", str(self.socket)]

    def pull(self) -> None:
        """Pull the image in full and unpack it."""
        run(*self.ctr(), "images", "pull", "--plain-http", self.image)

    def true(self) -> None:
        """`ctr run --rm IMAGE true`."""
        self.serial += 1
        run(*self.ctr(), "run", "--rm", self.image, f"bench-{self.serial}", "true")


class Table:
    """Prints one line for each figure."""

    def __init__(self) -> None:
        print(f"{'what':46} {'ctrfs':>12} {'other':>12} {'ratio':>7}  at most")

    def row(self, what: str, ours: list[float], others: list[float], limit: str) -> None:
        """Two columns of times and their ratio."""
        a, b = statistics.median(ours), statistics.median(others)
        print(f"{what:46} {a:10.3f} s {b:10.3f} s {a / b:7.2f}  {limit}", flush=True)

    def single(self, what: str, value: str, limit: str) -> None:
        """A figure that has nothing beside it."""
        print(f"{what:46} {value:>12} {'':14} {'':>5}  {limit}", flush=True)


def bench_pull(table: Table, directory: Path, image: str, rounds: int) -> None:
    """Full pull, both from an empty store and a cold cache, in turns."""
    ours, others, peaks = [], [], []
    for _ in range(rounds):
        ctrfs, containerd = Ctrfs(directory, image), Containerd(directory, image)
        with ctrfs.running():
            drop_caches()
            ours.append(timed(ctrfs.pull))
            peaks.append(ctrfs.peak_memory())
        with containerd.running():
            drop_caches()
            others.append(timed(containerd.pull))
    table.row("full pull (containerd: pull)", ours, others, "0.40")
    table.single("  peak memory of the daemon", f"{max(peaks) >> 20} MB", "300 MB")


def bench_start(table: Table, ctrfs: Ctrfs, containerd: Containerd, rounds: int) -> None:
    """Containers that end at once, in turns."""
    starts, runs, others = [], [], []
    for _ in range(rounds * 4):
        starts.append(ctrfs.start_to_exit())
        runs.append(timed(ctrfs.true))
        others.append(timed(containerd.true))
    table.row("start of true until exit code (ctr run --rm)", starts, others, "1.00")
    table.row("mkdir, set, start, wait, rmdir (ctr run --rm)", runs, others, "")


def bench_control_files(table: Table, ctrfs: Ctrfs) -> None:
    """The cost of a control file, and of a list of 500 containers."""
    path = ctrfs.mount / "containers" / ctrfs.start("sleep", "1000") / "state"

    def read() -> None:
        descriptor = os.open(path, os.O_RDONLY)
        os.read(descriptor, 4096)
        os.close(descriptor)

    times = [timed(read) for _ in range(2000)]
    table.single(
        "cat state: open, read, close", f"{statistics.median(times) * 1e6:.0f} µs", "300 µs"
    )
    for number in range(500):
        (ctrfs.mount / "containers" / f"idle-{number}").mkdir()
    times = [timed(lambda: os.listdir(ctrfs.mount / "containers")) for _ in range(20)]
    table.single("ls containers, 500 of them", f"{statistics.median(times) * 1e3:.1f} ms", "50 ms")
    listing = ["ls", "-l", str(ctrfs.mount / "containers")]
    times = [timed(lambda: run(*listing)) for _ in range(10)]
    table.single("  ls -l", f"{statistics.median(times) * 1e3:.1f} ms", "")
    for number in range(500):
        (ctrfs.mount / "containers" / f"idle-{number}").rmdir()


def bench_files(table: Table, ctrfs: Ctrfs, directory: Path, rounds: int) -> None:
    """Reading all of a container's files, beside overlayfs over the unpacked tree."""
    ours = Path(os.readlink(ctrfs.mount / "containers" / ctrfs.start("sleep", "1000") / "rootfs"))
    plain = directory / "plain"
    for name in ("tree", "upper", "work", "merged"):
        (plain / name).mkdir(parents=True)
    run("cp", "-a", f"{debian_tree('python', 'python3', 'python3-numpy')}/.", plain / "tree")
    theirs = plain / "merged"
    options = f"lowerdir={plain}/tree,upperdir={plain}/upper,workdir={plain}/work"
    linux.mount("overlay", str(theirs), "overlay", 0, options)

    def times(command: str, tree: Path, cold: bool) -> float:
        if cold:
            drop_caches()
        return timed(lambda: run("sh", "-c", f"cd {tree} && {command}"))

    try:
        for what, command in (("read every file", READ_ALL), ("find", "find . -xdev > /dev/null")):
            for cold in (True, False):
                figures = [
                    (times(command, ours, cold), times(command, theirs, cold))
                    for _ in range(rounds)
                ]
                name = f"{what}, {'cold' if cold else 'warm'} (overlayfs, unpacked)"
                table.row(name, [a for a, _ in figures], [b for _, b in figures], "1.00")
    finally:
        linux.umount(str(theirs))


def main() -> None:
    """Entry point of tools/bench."""
    parser = argparse.ArgumentParser(prog="tools/bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=("pull", "start", "files"))
    arguments = parser.parse_args()
    layout = debian_layout("python", "python3", "python3-numpy")
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ctrfs-bench-")))
        address = stack.enter_context(registry(directory / "registry"))
        image = f"{address}/bench/python:latest"
        run("skopeo", "--insecure-policy", "copy", "--dest-tls-verify=false",
            f"oci:{layout}:latest", f"docker://{image}")  # fmt: skip
        table = Table()
        if arguments.only in (None, "pull"):
            bench_pull(table, directory, image, arguments.rounds)
        if arguments.only == "pull":
            return
        ctrfs, containerd = Ctrfs(directory, image), Containerd(directory, image)
        stack.enter_context(ctrfs.running())
        ctrfs.pull()
        if arguments.only in (None, "start"):
            with containerd.running():
                containerd.pull()
                bench_start(table, ctrfs, containerd, arguments.rounds)
            bench_control_files(table, ctrfs)
        if arguments.only in (None, "files"):
            bench_files(table, ctrfs, directory, arguments.rounds)


if __name__ == "__main__":
    main()
