"""A ctrfs daemon on a private root and mountpoint, as a process of its own."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from runtime import keeper, linux
from runtime.layerserver.fanotify_serving import group_name
from tests.support.method import with_method
from tools.options import run_directory


class Mount:
    """Runs `ctrfs mount --foreground` on directories below ``directory``.

    ``path`` is the mountpoint. Call ``start`` first and ``destroy`` last.
    """

    def __init__(self, directory: Path) -> None:
        self.root = directory / "root"
        self.path = directory / "ctr"
        self.run = run_directory(self.root)
        self.log = directory / "daemon.log"
        self.config: Path | None = None
        self.path.mkdir(exist_ok=True)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The daemon's process id."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start the daemon and wait until the tree answers."""
        command = [sys.executable, "-m", "tools.ctrfs", "mount", "--foreground"]
        command += ["--root", str(self.root)]
        if config := with_method(self.config, self.root):
            command += ["--config", str(config)]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen([*command, str(self.path)], stderr=log)
        deadline = time.monotonic() + 30
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"the daemon did not start:\n{self.log.read_text()}")
            time.sleep(0.02)

    def _answers(self) -> bool:
        try:
            return self.path.is_mount() and (self.path / "version").exists()
        except OSError:
            return False  # the mount of a daemon that was killed, not replaced yet

    def stop(self) -> None:
        """SIGTERM: a clean end, which leaves containers running."""
        assert self._process is not None
        self._process.terminate()
        code = self._process.wait(30)
        self._process = None
        assert code == 0, f"exit code {code}: {self.log.read_text()}"

    def kill(self) -> None:
        """SIGKILL."""
        assert self._process is not None
        self._process.kill()
        self._process.wait(30)
        self._process = None

    def pull(self, reference: str) -> None:
        """Pull an image as a user does."""
        self.write("images/pull", reference)

    def write(self, path: str, text: str) -> None:
        """One write(2) of ``text`` and a newline, as echo does."""
        descriptor = os.open(self.path / path, os.O_WRONLY | os.O_TRUNC)
        try:
            os.write(descriptor, text.encode() + b"\n")
        finally:
            os.close(descriptor)

    def read(self, path: str) -> str:
        """A file of the tree without its last newline."""
        return (self.path / path).read_text().removesuffix("\n")

    def container(self, name: str, image: str, *args: str) -> Path:
        """Make a container."""
        path = self.path / "containers" / name
        path.mkdir()
        self.write(f"containers/{name}/image", image)
        self.write(f"containers/{name}/args", "\n".join(args))
        return path

    def run_container(self, name: str, image: str, *args: str) -> tuple[int, str]:
        """Run a container to its end: exit code and output. The container stays."""
        self.container(name, image, *args)
        self.write(f"containers/{name}/state", "start")
        return int(self.read(f"containers/{name}/wait")), self.read(f"containers/{name}/log")

    def containers(self) -> list[str]:
        """Names of all containers."""
        return [name for name in os.listdir(self.path / "containers") if name != "README"]

    def remove(self, name: str) -> None:
        """End a container, whatever its state, and destroy it."""
        if self.read(f"containers/{name}/state") in ("running", "paused"):
            self.write(f"containers/{name}/state", "kill")
        (self.path / "containers" / name).rmdir()

    def refused(self, path: str, text: str) -> tuple[int, str]:
        """Write what must be refused: the errno, and the sentence in `errors`."""
        try:
            self.write(path, text)
        except OSError as error:
            line = self.last_error()
            assert f" {errno.errorcode[error.errno or 0]} /{path}: write" in line, line
            assert f"by pid {os.getpid()} uid 0: " in line, line
            return error.errno or 0, line.split("uid 0: ", 1)[1]
        raise AssertionError(f"{path} took {text!r}")

    def last_error(self) -> str:
        """The newest line of `errors`."""
        return self.read("errors").splitlines()[-1]

    def destroy(self) -> None:
        """End everything, whatever state it is in, and leave nothing behind."""
        try:
            if self._process is not None:
                for name in self.containers():
                    self.remove(name)
                self.stop()
        finally:
            self._clean_up()

    def _clean_up(self) -> None:
        """What the daemon would have done, had it lived."""
        if self._process is not None:
            self.kill()
        runtime = ["runc", "--root", str(self.run / "runc")]
        if (self.run / "runc").exists():
            for uid in os.listdir(self.run / "runc"):
                subprocess.run([*runtime, "delete", "--force", uid], capture_output=True)
        for pid in self.monitors() + self.layer_servers():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        keeper.stop(group_name(self.run))
        for mounted in reversed(linux.mounts()):
            if mounted.target.startswith((str(self.path), str(self.run), str(self.root))):
                linux.umount(mounted.target, linux.MNT_DETACH)
        shutil.rmtree(self.run, ignore_errors=True)

    def monitors(self) -> list[int]:
        """Processes of containers that have our run directory in their command line."""
        return [pid for pid, command in self._processes() if b"tools.layerserver" not in command]

    def layer_servers(self) -> list[int]:
        """The layer server, if it runs."""
        return [pid for pid, command in self._processes() if b"tools.layerserver" in command]

    def _processes(self) -> list[tuple[int, bytes]]:
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                try:
                    command = (entry / "cmdline").read_bytes()
                    if str(self.run).encode() in command:
                        found.append((int(entry.name), command))
                except OSError:
                    continue
        return found
