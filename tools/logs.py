"""Where the daemon's log goes."""

import logging
import logging.handlers
import os
import sys
from contextlib import suppress
from pathlib import Path

from store.errors import storage

SYSLOG_SOCKET = "/dev/log"

# Priorities of sd-daemon(3) and syslog(3).
_PRIORITIES = {
    logging.DEBUG: 7,
    logging.INFO: 6,
    logging.WARNING: 4,
    logging.ERROR: 3,
    logging.CRITICAL: 2,
}

# What our own lines begin with.
_HERE = {"name": __name__, "levelno": logging.WARNING, "levelname": "WARNING"}


class _LogFile(logging.handlers.WatchedFileHandler):
    """A file, begun anew when it was moved away (logrotate(8)).

    What a full disk has no room for is lost. How many lines that were is said as soon as there
    is room again.
    """

    _lost = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line, or count it."""
        if lost := self._lost:
            self._end_line()
            message = f"lines lost, because this file could not be written: {lost}"
            self._write(logging.makeLogRecord(_HERE | {"msg": message}))
            if self._lost > lost:
                return
            self._lost = 0
        self._write(record)

    def _end_line(self) -> None:
        """End a line that there was half room for."""
        with suppress(OSError), open(self.baseFilename, "ab+", buffering=0) as file:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")

    def _write(self, record: logging.LogRecord) -> None:
        try:
            super().emit(record)
        except OSError:  # it could not be opened anew
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """Count a line, and don't keep it for later: lines come in order or not at all."""
        self._lost += 1
        stream, self.stream = self.stream, None
        with suppress(OSError):
            if stream is not None:
                stream.close()


class _JournalFormatter(logging.Formatter):
    """Each line begins with <N>, which systemd takes for its priority."""

    def format(self, record: logging.LogRecord) -> str:
        prefix = f"<{_PRIORITIES.get(record.levelno, 6)}>"
        return "\n".join(prefix + line for line in super().format(record).split("\n"))


def to_stderr(level: str) -> None:
    """Log to standard error, in the journal's form if that is where it leads."""
    handler = logging.StreamHandler(sys.stderr)
    if _stderr_is_journal():
        handler.setFormatter(_JournalFormatter("%(name)s: %(message)s"))
    else:
        handler.setFormatter(_timed())
    _use(handler, level)


def of_daemon(root: Path, level: str) -> str | None:
    """Log to the system's log, or to a file below ``root`` where there is none.

    Returns:
        The path of that file, or None. It may be moved away at any time (logrotate(8)); a
        new one is begun then.

    Raises:
        StorageFailed: the file cannot be opened.
    """
    if os.path.exists(SYSLOG_SOCKET):
        syslog = logging.handlers.SysLogHandler(
            SYSLOG_SOCKET, facility=logging.handlers.SysLogHandler.LOG_DAEMON
        )
        syslog.setFormatter(logging.Formatter("ctrfs[%(process)d]: %(name)s: %(message)s"))
        _use(syslog, level)
        return None
    path = str(root / "ctrfs.log")
    with storage(f"opening {path}"):
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
        file = _LogFile(path)
    file.setFormatter(_timed())
    _use(file, level)
    return path


def _timed() -> logging.Formatter:
    return logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")


def _use(handler: logging.Handler, level: str) -> None:
    logging.raiseExceptions = False  # a line that can't be logged is no reason for a traceback
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    # Each connection to a registry is a line of its, which would hide ours.
    logging.getLogger("urllib3").setLevel(logging.WARNING)


def _stderr_is_journal() -> bool:
    """systemd names device and inode of the socket that it gave to the service."""
    status = os.fstat(2)
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"
