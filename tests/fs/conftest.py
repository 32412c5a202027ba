"""The toy tree, mounted once for all tests of the toolkit."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The mountpoint of a served toy tree."""
    mountpoint = tmp_path_factory.mktemp("toy")
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.fs.toy", str(mountpoint)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "ready\n"
        yield mountpoint
    finally:
        process.terminate()
        assert process.wait(10) == 0
        process.stdout.close()
        assert not mountpoint.is_mount()
