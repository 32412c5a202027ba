"""A real systemd that runs ctrfs by the unit in tools/, as process 1 of namespaces of its own.

It sees the machine's files and network, but has its own /run, mounts, processes and cgroups. Of
these it sees version 2 alone: version 1 it would attach controllers to that nobody has mounted,
and they would stay.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from runtime import linux

TOP = Path(__file__).parents[2]
UNIT = TOP / "tools/ctrfs.service"
SYSTEMD = "/lib/systemd/systemd"

# What other units the unit depends on, by itself or as every unit does: empty ones.
_TARGETS = ("sysinit", "basic", "shutdown", "network", "local-fs", "multi-user", "default")

_ENTER = """
echo $$ > "$1/cgroup.procs"
exec unshare --cgroup --mount --uts --ipc --pid --fork --mount-proc sh -euc "$2"
"""
_BOOT = f"""
mount --make-rprivate /
while umount -l /sys/fs/cgroup 2>/dev/null; do :; done
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t tmpfs tmpfs /run
exec {SYSTEMD} --system --log-target=null --show-status=no
"""


class Systemd:
    """Runs one ctrfs service on directories below ``directory``: ``root`` and ``ctr``.

    Args:
        config: the daemon's configuration file.
        away: how long the service stays away when it has died, in seconds.
    """

    def __init__(self, directory: Path, config: Path, away: float) -> None:
        units = directory / "units"
        (units / "ctrfs.service.d").mkdir(parents=True)
        for target in _TARGETS:
            (units / f"{target}.target").write_text("[Unit]\nDefaultDependencies=no\n")
        (units / UNIT.name).write_bytes(UNIT.read_bytes())
        (directory / "ctr").mkdir(exist_ok=True)
        command = f"{sys.executable} -m tools.ctrfs mount --foreground --config {config}"
        (units / "ctrfs.service.d/test.conf").write_text(
            f"[Service]\nWorkingDirectory={TOP}\nRestartSec={away}\nExecStart=\n"
            f"ExecStart={command} --root {directory}/root {directory}/ctr\n"
            f"StandardError=append:{directory}/daemon.log\n"
        )
        hierarchy = next(mount for mount in linux.mounts() if mount.fstype == "cgroup2")
        self._group = Path(hierarchy.target) / f"ctrfs-test-{os.getpid()}"
        self._environment = {
            **os.environ,
            "container": "test",
            "SYSTEMD_UNIT_PATH": str(units),
            "SYSTEMD_GENERATOR_PATH": "/nonexistent",
        }
        self._log = directory / "systemd.log"
        self._process: subprocess.Popen[bytes] | None = None
        self.pid = 0

    def start(self) -> None:
        """Boot, and start the service."""
        self._group.mkdir()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                ["sh", "-euc", _ENTER, "sh", str(self._group), _BOOT],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        self._until(lambda: children.read_text().strip() != "")
        self.pid = int(children.read_text())
        self._until(lambda: "running" in self.systemctl("show", "-p", "SubState", "init.scope"))
        assert self.systemctl("start", "ctrfs") == ""

    @staticmethod
    def _until(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < deadline, "systemd does not come up"
            time.sleep(0.05)

    def output(self, *command: str | Path) -> str:
        """What a command says there, on either stream."""
        done = subprocess.run(
            ["nsenter", "-t", str(self.pid), "-m", "-p", *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
        )
        return done.stdout

    def systemctl(self, *arguments: str) -> str:
        """What systemctl says."""
        return self.output("systemctl", *arguments)

    def show(self, name: str) -> str:
        """A property of the service."""
        return self.systemctl("show", "--value", "-p", name, "ctrfs").strip()

    def shows(self, *properties: str) -> bool:
        """Whether the service has properties, each ``name=value``."""
        lines = self.systemctl("show", "ctrfs").splitlines()
        return all(line in lines for line in properties)

    def seen(self, path: Path) -> Path:
        """A path as it is seen there."""
        return Path(f"/proc/{self.pid}/root{path}")

    def destroy(self) -> None:
        """End everything in there."""
        if self.pid:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
        if self._process is not None:
            self._process.wait(20)
        for group in sorted(self._group.glob("**/"), reverse=True):
            group.rmdir()
