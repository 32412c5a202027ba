"""conmon: the small process that stays with a container when this one goes.

It creates the container through the OCI runtime, holds its standard streams, appends
its output to the log, and when it ends has the log complete before it writes the exit
code to a file by rename. What is relied on, from the source of conmon 2.0 to 2.2:

- It forks itself away and writes its process id to ``--conmon-pidfile`` before the parent
  exits.
- One line of JSON comes through the pipe ``_OCI_SYNCPIPE``: ``{"pid": N}``, or -1 and the
  runtime's message. It may also end without a word.
- With ``--full-attach`` the attach socket is ``attach`` in the bundle; SOCK_SEQPACKET, at
  most 32 KiB a packet, and paths of any length.
- On out-of-memory it makes a file ``oom`` in its working directory.
- SIGKILL leaves no exit file; the container's output then breaks with SIGPIPE.
"""

import errno
import json
import os
import shutil
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import trio

from runtime.errors import StartFailed
from runtime.oci import ENVIRONMENT, OciRuntime, start_failure
from runtime.processes import Process, command_line, identify
from runtime.settings import Stdin

_CONMON_PID = "conmon.pid"
_INIT_PID = "init.pid"
_COMPLAINTS = "conmon.err"
_LOG_LINK = "log"
_MAX_REPORT = 64 << 10


@dataclass(frozen=True, slots=True)
class Place:
    """Where the files of one container's run are.

    ``uid`` names it to conmon and the OCI runtime; ``bundle`` is emptied for each run;
    ``exits`` is a directory for the exit file, which outlives a reboot.
    """

    uid: str
    bundle: Path
    log: Path
    exits: Path

    @property
    def attach(self) -> Path:
        """The socket for standard input."""
        return self.bundle / "attach"

    @property
    def exit_file(self) -> Path:
        """Where conmon leaves the exit code."""
        return self.exits / self.uid

    def remove(self) -> None:
        """Delete what a run, or an attempt at one, has left."""
        shutil.rmtree(self.bundle, ignore_errors=True)
        self.exit_file.unlink(missing_ok=True)

    def clear(self) -> None:
        """Make room for a run."""
        self.remove()
        self.bundle.mkdir(mode=0o700, parents=True)
        self.exits.mkdir(mode=0o700, parents=True, exist_ok=True)
        # conmon ends the path of a log at a colon; a link in its working directory has none.
        (self.bundle / _LOG_LINK).symlink_to(self.log)

    def exit(self) -> tuple[int, int] | None:
        """The exit code that conmon wrote, and when; None when it has written nothing."""
        for path in (self.exit_file, self.bundle / "exit"):
            with suppress(FileNotFoundError, ValueError):
                return int(path.read_text()), path.stat().st_mtime_ns
        return None

    def out_of_memory(self) -> bool:
        """Whether the kernel killed something in the container for want of memory."""
        return (self.bundle / "oom").exists()

    def find_conmon(self) -> Process | None:
        """The conmon that was started in this bundle, if it is one and runs."""
        found = _read_process(self.bundle / _CONMON_PID)
        return found if found and self.uid in command_line(found.pid) else None

    def find_init(self) -> Process | None:
        """The container's first process, if it runs; it is known by its cgroup."""
        found = _read_process(self.bundle / _INIT_PID)
        if found is None:
            return None
        try:
            mine = self.uid in Path(f"/proc/{found.pid}/cgroup").read_text()
        except OSError:
            return None
        return found if mine else None

    def was_created(self) -> bool:
        """Whether the OCI runtime got as far as saying what the first process is."""
        return (self.bundle / _INIT_PID).exists()

    def created_ns(self) -> int | None:
        """When it did, just before the process was let go."""
        with suppress(FileNotFoundError):
            return (self.bundle / _INIT_PID).stat().st_mtime_ns
        return None


def _read_process(path: Path) -> Process | None:
    try:
        return identify(int(path.read_text()))
    except (FileNotFoundError, ValueError):
        return None


@dataclass(frozen=True, slots=True)
class Creation:
    """A conmon that is creating a container, and the pipe it reports through.

    ``conmon`` is None when it has failed and ended already.
    """

    conmon: Process | None
    report: int
    place: Place

    async def init(self, seconds: float) -> Process:
        """Wait until the container is created; its first process, not let go yet.

        Raises:
            StartFailed, Unsupported: the OCI runtime refused, or took too long.
        """
        line = b""
        with trio.move_on_after(seconds) as scope:
            while b"\n" not in line and len(line) < _MAX_REPORT:
                await trio.lowlevel.wait_readable(self.report)
                piece = os.read(self.report, _MAX_REPORT)
                if not piece:
                    break
                line += piece
        if scope.cancelled_caught:
            raise StartFailed(
                f"the container was not created within {seconds:.0f} seconds; is a file system"
                " of its mounts hanging?",
                errno=errno.ETIMEDOUT,
            )
        pid, message = _parse_report(line)
        init = identify(pid) if pid > 0 else None
        if init is None:
            raise start_failure(message or self._complaints())
        return init

    def _complaints(self) -> str:
        """What conmon itself had to say."""
        with suppress(OSError):
            return (self.place.bundle / _COMPLAINTS).read_text(errors="replace")
        return ""

    def close(self) -> None:
        """Let go of the pipe."""
        os.close(self.report)


def _parse_report(line: bytes) -> tuple[int, str]:
    try:
        report = json.loads(line.decode("utf-8", "replace"), strict=False)
        return int(report["pid"]), str(report.get("message", ""))
    except (ValueError, KeyError, TypeError):
        # conmon 2.1 escapes messages with control characters in ways that are not JSON.
        return -1, line.decode("utf-8", "replace")


def create(
    conmon: str, runtime: OciRuntime, place: Place, stdin: Stdin, held: tuple[int, ...] = ()
) -> Creation:
    """Start a conmon that creates the container of ``place`` from its bundle. Blocks shortly.

    Args:
        conmon: the program.
        held: descriptors that it is to hold as long as it runs.

    Raises:
        Unsupported: the OCI runtime is not installed.
    """
    report, inherited = os.pipe2(os.O_CLOEXEC)
    try:
        with open(place.bundle / _COMPLAINTS, "wb") as complaints:
            # It goes away from us by a fork of its own; what ends here is the first one.
            subprocess.run(
                [conmon, *_arguments(runtime, place, stdin)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=complaints,
                env={**ENVIRONMENT, "_OCI_SYNCPIPE": str(inherited)},
                pass_fds=(inherited, *held),
                cwd=place.bundle,
                check=False,
            )
    except BaseException:
        os.close(report)
        raise
    finally:
        os.close(inherited)
    os.set_blocking(report, False)
    return Creation(place.find_conmon(), report, place)


def _arguments(runtime: OciRuntime, place: Place, stdin: Stdin) -> list[str]:
    arguments = ["--cid", place.uid, "--cuuid", place.uid, "--runtime", runtime.path()]
    arguments += [f"--runtime-arg={a}" for a in runtime.create_arguments(place.bundle)]
    arguments += ["--bundle", str(place.bundle), "--full-attach"]
    arguments += ["--conmon-pidfile", str(place.bundle / _CONMON_PID)]
    arguments += ["--container-pidfile", str(place.bundle / _INIT_PID)]
    arguments += ["--log-path", f"k8s-file:{_LOG_LINK}", "--exit-dir", str(place.exits)]
    # Written before the other and mostly in memory: a full disk does not lose the code.
    arguments += ["--persist-dir", str(place.bundle)]
    # An fsync of the log at each end can take seconds on a busy disk, and only a crash
    # of the whole machine could lose what it saves.
    arguments += ["--no-sync-log"]
    if stdin != "none":
        arguments.append("--stdin")
    if stdin == "open":
        arguments.append("--leave-stdin-open")
    return arguments


class Attachment:
    """A connection to conmon that feeds a container's standard input.

    conmon sends all output to whoever is connected, and waits when that is not read: so
    ``drain`` must run as long as the connection is open.
    """

    # The kernel keeps packets whole and conmon cuts what is longer than 32 KiB.
    _PACKET = 16 << 10

    def __init__(self, socket: trio.socket.SocketType) -> None:
        self._socket = socket
        self._sending = trio.Lock()

    @classmethod
    async def connect(cls, path: Path) -> "Attachment":
        """Connect to the socket of a running container.

        Raises:
            OSError: conmon is gone.
        """
        # sun_path has 108 bytes; through a descriptor every path fits.
        directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            socket = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_SEQPACKET)
            try:
                await socket.connect(f"/proc/self/fd/{directory}/{path.name}")
            except BaseException:
                socket.close()
                raise
        finally:
            os.close(directory)
        return cls(socket)

    async def send(self, data: bytes) -> None:
        """Give the process ``data``; waits while it does not read.

        Raises:
            OSError: conmon is gone, or the connection was closed meanwhile.
        """
        async with self._sending:
            for start in range(0, len(data), self._PACKET):
                try:
                    await self._socket.send(data[start : start + self._PACKET])
                except trio.ClosedResourceError:
                    raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE)) from None

    async def drain(self) -> None:
        """Throw away the output that conmon sends, until the connection ends."""
        with suppress(OSError, trio.ClosedResourceError):
            # Of a packet, what does not fit into the buffer is gone.
            while await self._socket.recv(1):
                pass

    def close(self) -> None:
        """End the connection; conmon then ends standard input unless told to leave it open."""
        self._socket.close()
