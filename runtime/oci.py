"""runc and crun by their command line, and what they say in words for people.

Containers are created by conmon, which runs the OCI runtime itself (monitor.py). What
the runtimes do in a millisecond of work but 8 ms of a new process is done here: letting
a created container go, and clearing up after runc. Both depend on two facts that have
held from runc 1.0 to 1.5 and that a test checks against the installed one: a created
container waits in open(2) of ``exec.fifo`` in its state directory for a reader, and
deleting one is removing its cgroups and that directory.
"""

import errno
import json
import os
import re
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

import trio

from runtime.config import RuntimeConfig
from runtime.errors import RuntimeCommandFailed, RuntimeFailure, StartFailed, Unsupported

# runc needs newuidmap and the like nowhere, but finds criu and itself by PATH.
ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "TZ": "UTC"}

_FIFO = "exec.fifo"


class OciRuntime:
    """One OCI runtime and its directory of states.

    Args:
        config: names the program.
        state: its ``--root``, on a filesystem that a reboot empties.
    """

    def __init__(self, config: RuntimeConfig, state: Path) -> None:
        self._name = config.runtime
        self._state = state

    @property
    def is_runc(self) -> bool:
        """Whether runc's own ways can be relied on."""
        return Path(self._name).name == "runc"

    def path(self) -> str:
        """The program.

        Raises:
            Unsupported: it is not installed.
        """
        return find_program(self._name)

    def global_arguments(self) -> list[str]:
        """Arguments that stand before each command."""
        return ["--root", str(self._state)]

    def create_arguments(self, bundle: Path) -> list[str]:
        """Arguments before the create that conmon runs.

        What runc logs would else become the first lines of the container's output.
        """
        log = ["--log", str(bundle / "runtime.log")] if self.is_runc else []
        return [*self.global_arguments(), *log]

    def is_created(self, uid: str) -> bool:
        """Whether a container was created and still waits to be let go."""
        return (self._state / uid / _FIFO).exists()

    def exists(self, uid: str) -> bool:
        """Whether the runtime knows the container."""
        return (self._state / uid).exists()

    async def start(self, uid: str) -> None:
        """Let a created container go.

        Raises:
            StartFailed: it is not there, or its init died.
        """
        if self.is_runc:
            await self._open_fifo(uid)
        else:
            await self._command("start", uid)

    async def _open_fifo(self, uid: str) -> None:
        path = self._state / uid / _FIFO
        try:
            # Does not wait for the writer; reading does.
            reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise StartFailed(f"the created container has gone: {error.strerror}") from error
        try:
            await trio.lowlevel.wait_readable(reader)
            if not os.read(reader, 1):
                raise StartFailed("the created container died before it was started")
        finally:
            os.close(reader)
        with suppress(FileNotFoundError):
            path.unlink()

    async def pause(self, uid: str) -> None:
        """Freeze all its processes."""
        await self._command("pause", uid)

    def delete(self, uid: str, *, hooks: bool) -> None:
        """Forget a container whose processes are gone. Blocks. Idempotent.

        Args:
            hooks: its document has hooks of the user's, which are the runtime's to run.
        """
        if not self.exists(uid):
            return
        if hooks or not self.is_runc:
            self._run(["delete", "--force", uid])
        shutil.rmtree(self._state / uid, ignore_errors=True)

    def _run(self, arguments: list[str]) -> "subprocess.CompletedProcess[bytes]":
        return subprocess.run(
            [self.path(), *self.global_arguments(), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=ENVIRONMENT,
            check=False,
        )

    async def _command(self, *arguments: str) -> None:
        done = await trio.to_thread.run_sync(self._run, list(arguments))
        if done.returncode:
            message = done.stderr.decode("utf-8", "replace")
            code, sentence = explain(message)
            kind = Unsupported if code == errno.EOPNOTSUPP else RuntimeCommandFailed
            raise kind(sentence, errno=code)


def find_program(name: str) -> str:
    """The full path of a program.

    Raises:
        Unsupported: it is not installed.
    """
    found = shutil.which(name, path=ENVIRONMENT["PATH"])
    if found is None:
        raise Unsupported(f"the program {name} is not installed; `apt install {Path(name).name}`")
    return found


def read_ahead(config: RuntimeConfig) -> None:
    """Have what starts containers read from the disk, if it is not in memory. Blocks shortly.
    Where something is missing, the start will say so."""
    for name in (config.conmon, config.runtime):
        with suppress(Unsupported, OSError), open(find_program(name), "rb") as program:
            os.posix_fadvise(program.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


# What the runtimes say, the errno for it, and how to say it. Groups fill the sentence.
_MESSAGES: tuple[tuple[str, int, str], ...] = (
    (
        r'exec: "?(?P<a>[^"]*)"?: executable file not found in \$PATH',
        errno.ENOENT,
        "the command {a!r} was not found in the PATH of the image",
    ),
    (
        r"executable file `(?P<a>[^`']*)[`'] not found",
        errno.ENOENT,
        "the command {a!r} was not found in the image",
    ),
    (
        r'exec: "(?P<a>[^"]*)": (stat|lstat) .*no such file or directory',
        errno.ENOENT,
        "the command {a!r} was not found in the image",
    ),
    (
        r'exec: "(?P<a>[^"]*)": (permission denied|is a directory)',
        errno.EACCES,
        "the command {a!r} cannot be executed: it is a directory, or not executable for the user",
    ),
    (
        r'error mounting "(?P<a>[^"]*)" to rootfs at "(?P<b>[^"]*)":(?:.*:)? (?P<c>[^:]+)$',
        errno.EINVAL,
        "{a!r} cannot be mounted at {b!r} in the container: {c}",
    ),
    (
        r"mkdir (?P<a>/[^:]*): (not a directory|file exists)",
        errno.ENOTDIR,
        "the working directory {a!r} is no directory in the image",
    ),
    (
        r'chdir to cwd \("(?P<a>[^"]*)"\).*: (?P<b>[^:]+)$',
        errno.EACCES,
        "the working directory {a!r} cannot be entered: {b}",
    ),
    (
        r"cgroups in hybrid mode not supported",
        errno.EOPNOTSUPP,
        "crun does not work on machines that use cgroup v1 and v2 together; set the runtime to"
        " runc, or boot with systemd.unified_cgroup_hierarchy=1",
    ),
)
_NOISE = re.compile(
    r"^(runc (create|run|start|pause|resume) failed: |unable to start container process: "
    r"|error during container init: |container_linux\.go:\d+: )+"
)


def explain(message: str) -> tuple[int, str]:
    """The errno and one sentence for what an OCI runtime printed on failure."""
    essence = _essence(message)
    for pattern, code, sentence in _MESSAGES:
        if match := re.search(pattern, essence):
            return code, sentence.format(**match.groupdict())
    code = next((c for text, c in _ERRNO_TEXTS.items() if text in essence.lower()), errno.EIO)
    return code, f"the OCI runtime failed: {essence}" if essence else "the OCI runtime failed"


_ERRNO_TEXTS = {
    os.strerror(code).lower(): code
    for code in (
        errno.ENOENT,
        errno.EACCES,
        errno.EPERM,
        errno.ENOSPC,
        errno.ENOTDIR,
        errno.ENOMEM,
        errno.EBUSY,
        errno.EINVAL,
    )
}


def _essence(message: str) -> str:
    """The last error of a log, without the wrapping that says nothing to users."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    errors = [line for line in lines if "level=error" in line or "level=fatal" in line]
    line = (errors or lines or [""])[-1]
    if match := re.search(r'msg=("(?:[^"\\]|\\.)*")', line):
        with suppress(ValueError):
            line = str(json.loads(match[1]))
    return _NOISE.sub("", line).strip()


def start_failure(message: str) -> RuntimeFailure:
    """The error for a create that printed ``message``."""
    code, sentence = explain(message)
    if code == errno.EOPNOTSUPP:
        return Unsupported(sentence)
    return StartFailed(sentence, errno=code)
