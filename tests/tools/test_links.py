"""Registries near and far."""

import os
import subprocess
import time
from pathlib import Path

from tools.links import DELAY, Link, loopback, slow


def _get(link: Link, path: str) -> float:
    """Seconds of a request, as a client makes it."""
    script = (
        "import http.client, sys; c = http.client.HTTPConnection(sys.argv[1], timeout=20);"
        "c.request('GET', sys.argv[2]); print(c.getresponse().status)"
    )
    start = time.monotonic()
    command = [*link.client, "/usr/bin/python3", "-c", script, link.host, path]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout in ("200\n", "404\n")
    return time.monotonic() - start


def test_loopback(tmp_path: Path) -> None:
    with loopback(tmp_path / "data", tmp_path / "registry") as link:
        assert link.host.startswith("127.0.0.1:")
        _get(link, "/v2/")
        assert link.requests() == 0
        _get(link, "/v2/some/blobs/sha256:" + 64 * "0")
        assert link.requests() == 1


def test_slow(tmp_path: Path) -> None:
    with slow(tmp_path / "data", tmp_path / "registry") as link:
        # Handshake, request and answer.
        assert _get(link, "/v2/") >= 4 * DELAY
        shaped = subprocess.run(
            [*link.client, "tc", "qdisc", "show"], capture_output=True, text=True, check=True
        )
        assert "rate 100Mbit" in shaped.stdout
        assert _namespaces()
    assert not _namespaces()


def _namespaces() -> list[str]:
    """Those of this process; others may measure, too."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    return [
        line
        for line in listed.stdout.splitlines()
        if line.startswith(f"ctrfs-bench-{os.getpid()}-")
    ]
