"""Running the daemon: in the foreground, or in the background once the mount answers."""

import logging
import os
import signal
import sys
from collections.abc import Callable

from runtime import notify
from store.errors import CtrfsError
from tools import logs, mountpoint
from tools.instance import CommandFailed, claimed
from tools.options import Options

log = logging.getLogger(__name__)

# What a background daemon tells its starter when all is well; no sentence looks like this.
READY = b"\n"


def foreground(options: Options, level: str) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        CtrfsError: it cannot be served.
    """
    notify.close_passed()
    logs.to_stderr(level)
    with claimed(options):
        _serve(options, notify.ready, level, background=False)


def background(options: Options, level: str) -> None:
    """Start a daemon and return once its mount answers.

    Raises:
        CommandFailed: with the daemon's own sentence on why it could not start.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        os._exit(_Daemon(options, level, writing).live())
    os.close(writing)
    try:
        with os.fdopen(reading, "rb") as pipe:
            answer = pipe.read()
        if not answer:
            raise CommandFailed(_untold_end(os.waitpid(pid, 0)[1]))
        if answer != READY:
            raise CommandFailed(os.fsdecode(answer))
        os.statvfs(options.mountpoint)  # waits for the first answer
    except KeyboardInterrupt:
        os.kill(pid, signal.SIGTERM)
        os.waitpid(pid, 0)
        raise
    except OSError as error:
        raise CommandFailed(f"{options.mountpoint} does not answer: {error.strerror}") from error


class _Daemon:
    """The background process.

    Args:
        pipe: leads to the starter, which waits for READY or the sentence of a failure.
    """

    def __init__(self, options: Options, level: str, pipe: int) -> None:
        self._options = options
        self._level = level
        self._pipe: int | None = pipe
        self._log_path: str | None = None

    def live(self) -> int:
        """From the fork to the end; returns the exit code."""
        # Until the log is open, what is told to the starter is all there is to say.
        logging.getLogger().addHandler(logging.NullHandler())
        os.setsid()
        os.chdir("/")
        os.umask(0o022)
        for descriptor in (0, 1):
            _redirect(descriptor, os.devnull)
        try:
            with claimed(self._options):
                self._log_path = logs.of_daemon(self._options.root, self._level)
                _serve(self._options, self._ready, self._level, background=True)
        except CtrfsError as error:
            self._tell(os.fsencode(error.sentence))
            log.error("%s", error.sentence)
            return 1
        except SystemExit as end:
            return int(end.code or 0)
        except BaseException as error:
            log.exception("the daemon failed")
            where = self._log_path or "the system's log"
            self._tell(f"the daemon failed, {where} says where: {error!r}".encode())
            return 1
        return 0

    def _ready(self) -> None:
        # Until now libfuse could complain to the user's terminal.
        _redirect(2, self._log_path or os.devnull)
        self._tell(READY)

    def _tell(self, message: bytes) -> None:
        if self._pipe is not None:
            os.write(self._pipe, message)
            os.close(self._pipe)
            self._pipe = None


def _redirect(descriptor: int, path: str) -> None:
    opened = os.open(path, os.O_RDWR | os.O_APPEND)
    os.dup2(opened, descriptor)
    os.close(opened)


def _untold_end(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
    return f"the daemon ended {how} before it was ready; `ctrfs mount --foreground` shows its log"


def _serve(options: Options, ready: Callable[[], None], level: str, *, background: bool) -> None:
    # Before the daemon listens to signals itself, one that ends it must tidy up all the same.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    # Imported here because the other commands need none of it.
    from tools import daemon

    if mountpoint.prepare(options.mountpoint):
        log.warning("detached the mount that a killed daemon left at %s", options.mountpoint)
    try:
        daemon.run(options, ready, level, background=background)
    except BaseExceptionGroup as group:
        raise _ours(group) or group from group
    except RuntimeError as error:  # libfuse has said why on standard error
        raise CommandFailed(f"cannot mount at {options.mountpoint}: {error}") from error


def _ours(group: BaseExceptionGroup[BaseException]) -> CtrfsError | None:
    """The failure with a sentence that trio's nurseries have wrapped in groups, if it is one."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    if isinstance(error, RuntimeError):
        return CommandFailed(f"the tree cannot be mounted: {error}")
    return error if isinstance(error, CtrfsError) else None
