"""What the documentation shows, typed letter by letter."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import write_config
from tests.support.registry import Registry

SESSION = r"""
ctrfs mount /ctr
echo docker.io/library/alpine:3.20 > /ctr/images/pull
cat /ctr/images/alpine:3.20/rootfs/etc/os-release
mkdir /ctr/containers/hello && cd /ctr/containers/hello
echo alpine:3.20 > image
printf '%s\n' sh -c 'echo hi; exit 3' > args
echo start > state
cat wait            # 3
cat log             # hi
cd / && rmdir /ctr/containers/hello
"""

# The session uses the places that a user's daemon has, so it gets a mount namespace in which
# they are others.
PLACES = ("/ctr", "/etc/ctrfs", "/var/lib/ctrfs", "/run")


def test_first_session(
    registry: Registry, debian_layout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.copy(f"oci:{debian_layout}:latest", "library/alpine:3.20")
    lines = ["set -eu"]
    made = []
    for place in map(Path, PLACES):
        if not place.exists():
            place.mkdir()
            made.append(place)
        private = tmp_path / place.relative_to("/")
        private.mkdir(parents=True)
        lines.append(f"mount --bind {private} {place}")
    write_config(tmp_path / "etc/ctrfs/config.json", registry)
    script = tmp_path / "ctrfs"
    script.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m tools.ctrfs "$@"\n')
    script.chmod(0o755)
    top = Path(__file__).parents[2]
    monkeypatch.setenv("PYTHONPATH", str(top))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    try:
        result = subprocess.run(
            ["unshare", "--mount", "bash", "-c", "\n".join(lines) + SESSION + "ctrfs umount /ctr"],
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
    finally:
        for place in made:
            place.rmdir()
    assert result.returncode == 0, result.stderr
    release, _, rest = result.stdout.rpartition('bugs.debian.org/"\n')
    assert "Debian GNU/Linux" in release
    assert rest == "3\nhi\n"
    assert result.stderr == ""
    assert not (tmp_path / "run/ctrfs").exists()
