"""ctrfs beside containerd, in one run, on one image and one registry.

Every figure is the median of several rounds in which the two take turns, and what counts
is their ratio: absolute times vary by half from machine to machine. The image is Debian's
minbase with python3 and numpy in one gzip layer of about 80 MB, in a docker-registry on
loopback. Before each cold measurement the page cache is dropped.
"""

import argparse
import os
import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path

from tools.images import debian_layout, debian_tree, run
from tools.registry import registry
from tools.sides import FIND, READ_ALL, Containerd, Ctrfs, drop_caches, overlay, timed


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

    def times(command: str, tree: Path, cold: bool) -> float:
        if cold:
            drop_caches()
        return timed(lambda: run("sh", "-c", f"cd {tree} && {command}"))

    with overlay(debian_tree("python", "python3", "python3-numpy"), directory) as theirs:
        for what, command in (("read every file", READ_ALL), ("find", FIND)):
            for cold in (True, False):
                figures = [
                    (times(command, ours, cold), times(command, theirs, cold))
                    for _ in range(rounds)
                ]
                name = f"{what}, {'cold' if cold else 'warm'} (overlayfs, unpacked)"
                table.row(name, [a for a, _ in figures], [b for _, b in figures], "1.00")


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
