"""The toy tree, mounted once for all tests of the toolkit."""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def toy() -> Iterator[Path]:
    """The mountpoint of a served toy tree, where other users can reach it."""
    mountpoint = Path(tempfile.mkdtemp(prefix="ctrfs-toy-"))
    mountpoint.chmod(0o755)
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
        mountpoint.rmdir()
