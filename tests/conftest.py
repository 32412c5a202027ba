"""Order, watchfulness and shared parts of all tests."""

import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime import linux

# The lowest layer first: the first failure is then the cause, not a symptom.
ORDER = ("store", "runtime", "fs", "tools", "e2e")
OURS = ("store", "runtime", "fs", "tools")


def pytest_configure(config: pytest.Config) -> None:
    """Declare our markers."""
    config.addinivalue_line("markers", "logs(pattern): the test expects this in a warning")


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
def nothing_left_behind() -> Iterator[None]:
    """Fail the run if mounts, monitors or cgroups remain that were not there before."""
    before = _traces()
    yield
    left = _traces() - before
    assert not left, f"left behind: {sorted(left)}"


def _traces() -> set[str]:
    traces = {mount.target for mount in linux.mounts()}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/comm") as file:
                    name = file.read().strip()
            except OSError:
                continue
            if name in ("conmon", "runc", "crun", "docker-registry"):
                traces.add(f"process {name} {entry}")
    if os.path.isdir("/run/netns"):
        traces |= {f"netns {name}" for name in os.listdir("/run/netns")}
    return traces
