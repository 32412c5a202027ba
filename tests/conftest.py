"""Order, watchfulness and shared parts of all tests."""

import logging
import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import get_args

import pytest

from runtime import keeper, linux
from runtime.cgroups import Cgroup
from runtime.layerserver.fanotify_serving import group_name
from tests.support import method
from tools.options import run_directory

# The lowest layer first: the first failure is then the cause, not a symptom.
ORDER = ("store", "runtime", "fs", "tools", "e2e")
OURS = ("store", "runtime", "fs", "tools")


def pytest_addoption(parser: pytest.Parser) -> None:
    """One option of our own."""
    parser.addoption(
        "--layers",
        choices=get_args(method.Method),
        help="how incomplete layers are served where a test doesn't choose (as the daemon does)",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Declare our markers, and let all processes of the tests be interrupted."""
    # A shell has what it starts in the background ignore SIGINT, and their children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    method.chosen = config.getoption("--layers")
    config.addinivalue_line("markers", "logs(pattern): the test expects this in a warning")
    config.addinivalue_line("markers", "fill: the test has lazy layers fill by themselves")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the packages from the lowest to the whole."""

    def rank(item: pytest.Item) -> int:
        package = item.path.relative_to(Path(__file__).parent).parts[0]
        return ORDER.index(package) if package in ORDER else len(ORDER)

    items.sort(key=rank)


@pytest.fixture(autouse=True)
def no_unexpected_warnings(
    request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> Iterator[None]:
    """Fail a test in which our code logged a warning that it does not announce."""
    yield
    expected = [mark.args[0] for mark in request.node.iter_markers("logs")]
    for record in caplog.get_records("call"):
        if record.levelno >= logging.WARNING and record.name.split(".")[0] in OURS:
            message = record.getMessage()
            assert any(re.search(p, message) for p in expected), f"unexpected: {message}"


@pytest.fixture(autouse=True, scope="session")
def nothing_left_behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fail the run if mounts or processes of its tests remain."""
    yield
    base = tmp_path_factory.getbasetemp()
    roots = [path.parent for depth in range(1, 5) for path in base.glob("*/" * depth + "ctrfs.db")]
    # Where a daemon has its run directory, and a test that does without one.
    runs = [run for root in roots for run in (run_directory(root), root.parent / "run")]
    places = tuple(f"{place}/" for place in (base, *runs))
    # A monitor may take a moment to end after its container.
    deadline = time.monotonic() + 3
    while (left := _left(places) + _keepers(runs)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left, "left behind:\n" + "\n".join(left)


def _left(places: tuple[str, ...]) -> list[str]:
    """Mounts at, and processes with a word about, any of these places."""
    left = [mount.target for mount in linux.mounts() if mount.target.startswith(places)]
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid():
            with suppress(OSError):
                command = Path(f"/proc/{entry}/cmdline").read_text().replace("\0", " ")
                if any(place in command for place in places):
                    left.append(f"process {entry}: {command}")
    return left


def _keepers(runs: list[Path]) -> list[str]:
    """Processes that hold the events of layers, which say nothing about themselves, and their
    cgroups."""
    left = [f"keeper {pid} of {run}" for run in runs for pid in keeper.find(group_name(run))]
    return left + [f"cgroup of {run}" for run in runs if Cgroup(group_name(run)).exists()]
