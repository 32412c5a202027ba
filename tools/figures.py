"""The figures of lazy loading, one function each. What they are compared with: Comparison."""

import gzip
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from tools import shelf
from tools.comparison import Case, Comparison
from tools.delay import Counter
from tools.links import proxy
from tools.opened import compressed_bytes, opened_files
from tools.results import MB
from tools.shelf import ESTARGZ, NUMPY, ORDINARY, PRINT
from tools.sides import (
    FIND,
    READ_ALL,
    Containerd,
    Ctrfs,
    cached,
    drop_caches,
    memory,
    overlay,
    timed,
)

# Reads from its image, says so, and stays.
STAYING = ("python3", "-c", "import numpy, time; print(1, flush=True); time.sleep(100000)")
CONTAINERS = 20
# Sizes and formats of the images that they use. All are different layers.
SEVERAL = (
    ("85", ESTARGZ),
    ("150", ESTARGZ),
    ("800", ESTARGZ),
    ("85", "zstd:chunked"),
    ("150", "zstd:chunked"),
)

# What is read from memory takes part of a second, and a median of a few would be chance.
_WARM = 5
# The daemon looks now and then what need not be in memory.
_SETTLE_SECONDS = 3.0

Figure = Callable[[Comparison, Case], None]


def first_line(comparison: Comparison, case: Case) -> None:
    """Name to the first line of output, everything cold."""
    limit = 0.05 if case.link == "slow" else 0.08
    what = "name to first line, print(1)"
    _cold_runs(comparison, case, what, limit, lambda side: side.to_first_line(*PRINT))


def numpy(comparison: Comparison, case: Case) -> None:
    """Name to the end of an import, everything cold."""
    what = "name to end of import numpy"
    _cold_runs(comparison, case, what, 0.12, lambda side: side.to_end(*NUMPY))


def read_all(comparison: Comparison, case: Case) -> None:
    """Name to the end of a container that has read every file once."""
    command = ("sh", "-c", f"cd / && {READ_ALL}")
    what = "name to end of reading every file"
    _cold_runs(comparison, case, what, 0.6, lambda side: side.to_end(*command))


def _cold_runs(
    comparison: Comparison,
    case: Case,
    what: str,
    limit: float,
    run: Callable[[Ctrfs | Containerd], float],
) -> None:
    """From a name to some moment of a container's life, beside containerd, in turns."""
    ours: list[float] = []
    others: list[float] = []
    with comparison.link(case) as link:
        for _ in range(comparison.rounds):
            if comparison.ours:
                ours.append(_cold(run, comparison.ctrfs(link.host, case.size, link.client)))
            if comparison.others:
                others.append(_cold(run, comparison.containerd(link.host, case.size, link.client)))
    comparison.add(case, what, ours, others, limit)


def _cold(run: Callable[[Ctrfs | Containerd], float], side: Ctrfs | Containerd) -> float:
    """Run a container with nothing here: no image, and nothing in the page cache."""
    with side.running():
        drop_caches()
        return run(side)


def again(comparison: Comparison, case: Case) -> None:
    """Reading and finding all files a second time, beside overlayfs over the unpacked tree."""
    sides: list[tuple[Path, list[float]]] = []
    ours: list[float] = []
    others: list[float] = []
    with ExitStack() as stack:
        if comparison.ours:
            link = stack.enter_context(comparison.link(case))
            ctrfs = comparison.ctrfs(link.host, case.size, link.client)
            stack.enter_context(ctrfs.running())
            container, tree = _running_tree(ctrfs)
            sides.append((tree, ours))
        if comparison.others:
            plain = overlay(shelf.tree(case.size), comparison.directory)
            sides.append((stack.enter_context(plain), others))
        for tree, _ in sides:
            _in_tree(tree, READ_ALL)
        if comparison.ours:
            ctrfs.wait_filled()  # checking all of it takes a processor for some seconds
            ctrfs.wait_recorded(container)
        for what, command, cold, limit in (
            ("read every file again, warm", READ_ALL, False, 1.0),
            ("find, warm", FIND, False, 1.0),
            ("find, cold", FIND, True, 1.0),
            ("read every file again, cold", READ_ALL, True, None),
        ):
            for _ in range(comparison.rounds * (1 if cold else _WARM)):
                for tree, times in sides:
                    times.append(_in_tree(tree, command, cold))
            comparison.add(case, f"{what} (overlayfs)", [*ours], [*others], limit)
            ours.clear()
            others.clear()


def _running_tree(ctrfs: Ctrfs) -> tuple[str, Path]:
    """A container that was started and stays, and where its files are."""
    ctrfs.pull()
    container = ctrfs.start("sleep", "100000")
    return container, Path(os.readlink(ctrfs.mount / "containers" / container / "rootfs"))


def _in_tree(tree: Path, command: str, cold: bool = False) -> float:
    """Seconds of a shell command in a directory."""
    if cold:
        drop_caches()
    return timed(lambda: subprocess.run(["sh", "-c", command], cwd=tree, check=True))


def page_cache(comparison: Comparison, case: Case) -> None:
    """Memory that files take after all of an image has been read once: while it is fetched, and
    when it is complete, beside overlayfs over the unpacked tree."""
    lazily: list[float] = []
    complete: list[float] = []
    others: list[float] = []
    for _ in range(comparison.rounds if comparison.ours else 0):
        with comparison.link(case) as link:
            ctrfs = comparison.ctrfs(link.host, case.size, link.client)
            with ctrfs.running():
                _, tree = _running_tree(ctrfs)
                lazily.append(_kept_of(tree))
                ctrfs.wait_filled()
                complete.append(_kept_of(tree))
    if comparison.others:
        with overlay(shelf.tree(case.size), comparison.directory) as tree:
            others = [_kept_of(tree) for _ in range(comparison.rounds)]
    for how, ours in (("complete", complete), ("while fetched", lazily)):
        what = f"page cache of all files, {how} (overlayfs)"
        comparison.add(case, what, ours, others, unit="MB")


def _kept_of(tree: Path) -> float:
    """MB that the page cache has grown by when all files below a directory have been read, and some
    seconds have gone by."""
    drop_caches()
    before = cached()
    _in_tree(tree, READ_ALL)
    time.sleep(_SETTLE_SECONDS)
    return (cached() - before) / MB


def fetched(comparison: Comparison, case: Case) -> None:
    """Bytes from the registry until a line was printed, beside those of the files opened."""
    received: list[float] = []
    requests: list[float] = []
    with comparison.link(case) as link:
        for _ in range(comparison.rounds if comparison.ours else 0):
            count = comparison.directory / "count"
            before = link.requests()
            with proxy(link.host, count, prefix=link.client) as host:
                ctrfs = comparison.ctrfs(host, case.size, link.client)
                with ctrfs.running():
                    drop_caches()
                    ctrfs.to_first_line(*PRINT)
                    received.append(Counter(count).received / MB)
                    requests.append(link.requests() - before)
            count.unlink()
    opened = opened_files(shelf.tree(case.size), *PRINT)
    comparison.shelf.provide(case.size, ESTARGZ)
    (layer,) = comparison.shelf.layers(case.size, ESTARGZ)
    with layer.open("rb") as blob:
        least = compressed_bytes(blob, opened) / MB
    what = f"fetched for print(1) ({len(opened)} files opened)"
    comparison.add(case, what, received, [least], 1.3, unit="MB")
    comparison.add(case, "  requests for blobs", requests, [], unit="", ratio=False)


def listing(comparison: Comparison, case: Case) -> None:
    """Name to the end of `ls -lR` over the files of an image never seen before, beside `ls -lR`
    alone over the same files unpacked on the disk, which tells how fast the machine is."""
    ours: list[float] = []
    others: list[float] = []
    with comparison.link(case) as link:
        for _ in range(comparison.rounds):
            if comparison.ours:
                ctrfs = comparison.ctrfs(link.host, case.size, link.client)
                with ctrfs.running():
                    drop_caches()
                    ours.append(timed(partial(_pull_and_list, ctrfs)))
            if comparison.others:
                drop_caches()
                others.append(timed(partial(_list, shelf.tree(case.size))))
    what = "name to end of ls -lR (ls of unpacked tree)"
    comparison.add(case, what, ours, others, 1.5, ratio=False)


def _pull_and_list(ctrfs: Ctrfs) -> None:
    ctrfs.pull()
    _list(ctrfs.rootfs)


def _list(tree: Path) -> None:
    subprocess.run(["ls", "-lR", tree], stdout=subprocess.DEVNULL, check=True)


def disk(comparison: Comparison, case: Case) -> None:
    """Disk used by an image that was pulled lazily and has filled up, and pulled in full."""
    used: dict[str, list[float]] = {"lazy": [], "full": []}
    with comparison.link(case) as link:
        for mode in (comparison.mode, "full") if comparison.ours else ():
            ctrfs = comparison.ctrfs(link.host, case.size, link.client, mode)
            with ctrfs.running():
                ctrfs.pull()
                ctrfs.wait_filled()
                os.sync()
                used[mode] = [ctrfs.disk() / MB]
    ours, others = used[comparison.mode], used["full"]
    comparison.add(case, "disk, filled up (pulled in full)", ours, others, 1.0, unit="MB")


def server_memory(comparison: Comparison, case: Case) -> None:
    """Resident memory of the layer server with many containers that read from it."""
    if comparison.mode == "full":
        return  # then nothing is served
    resident: list[float] = []
    peak: list[float] = []
    with comparison.link(case) as link:
        for _ in range(comparison.rounds if comparison.ours else 0):
            ctrfs = comparison.ctrfs(link.host, "85", link.client)
            images = [comparison.image(link.host, size, form) for size, form in SEVERAL]
            with ctrfs.running():
                drop_caches()
                _start_many(ctrfs, images)
                servers = ctrfs.layer_servers()
                if not servers:
                    raise RuntimeError("no layer server runs")
                resident.append(sum(memory(pid, "VmRSS") for pid in servers) / MB)
                peak.append(sum(memory(pid, "VmHWM") for pid in servers) / MB)
    what = f"layer server, {CONTAINERS} containers, {len(SEVERAL)} images"
    comparison.add(case, what, resident, [], 60, unit="MB", ratio=False)
    comparison.add(case, "  at its peak", peak, [], unit="MB", ratio=False)


def _start_many(ctrfs: Ctrfs, images: list[str]) -> None:
    """Start containers and return when all have read from their images."""
    names = []
    for image in images:
        ctrfs.image = image
        ctrfs.pull()
    for number in range(CONTAINERS):
        ctrfs.image = images[number % len(images)]
        names.append(ctrfs.start(*STAYING))
    for name in names:
        ctrfs.first_line(name, partial(_has_ended, ctrfs.mount / "containers" / name))


def _has_ended(container: Path) -> bool:
    return (container / "state").read_text() != "running\n"


def convert(comparison: Comparison, case: Case) -> None:
    """`ctrfs convert` to eStargz from layout to layout, beside `gzip -6` of the same tar."""
    ours: list[float] = []
    others: list[float] = []
    sizes: tuple[list[float], list[float]] = ([], [])
    source = shelf.layout(case.size)
    (layer,) = comparison.shelf.layers(case.size, ORDINARY)
    with tempfile.TemporaryDirectory(dir=comparison.directory) as name:
        place = Path(name)
        archive, packed = place / "layer.tar", place / "layer.tar.gz"
        with gzip.open(layer) as blob, archive.open("wb") as file:
            shutil.copyfileobj(blob, file)
        for number in range(comparison.rounds):
            if comparison.ours:
                target = place / str(number)
                drop_caches()
                names = (f"oci:{source}:latest", f"oci:{target}:latest", ESTARGZ)
                ours.append(timed(partial(shelf.convert, *names)))
                blobs = (target / "blobs/sha256").iterdir()
                sizes[0].append(sum(blob.stat().st_size for blob in blobs) / MB)
            if comparison.others:
                drop_caches()
                others.append(timed(lambda: _gzip(archive, packed)))
                sizes[1].append(packed.stat().st_size / MB)
    comparison.add(case, "convert to eStargz (gzip -6)", ours, others, 1.2)
    comparison.add(case, "  size of the layer", *sizes, 1.03, unit="MB")


def _gzip(source: Path, target: Path) -> None:
    with source.open("rb") as archive, target.open("wb") as packed:
        subprocess.run(["gzip", "-6"], stdin=archive, stdout=packed, check=True)


# What single command a figure is about.
MEASURED = {"first-line": "print", "numpy": "numpy", "bytes": "print"}

FIGURES: dict[str, Figure] = {
    "first-line": first_line,
    "numpy": numpy,
    "read-all": read_all,
    "again": again,
    "cache": page_cache,
    "bytes": fetched,
    "disk": disk,
    "convert": convert,
    "ls": listing,
    "memory": server_memory,
}
