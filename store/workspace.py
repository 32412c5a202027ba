"""Directories for files on their way, which go with the process that has them or, if that was
killed, when the next one comes."""

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from store.errors import storage

_PREFIX = "ctrfs-work-"


class Workspace:
    """A new directory, locked as long as it is in use, until it is closed.

    Args:
        parent: where it is made, and where those that others left are removed.
        prefix: begins the names of such directories, and of nothing else.

    Raises:
        OSError: it can't be made.
    """

    def __init__(self, parent: Path, prefix: str) -> None:
        _remove_abandoned(parent, prefix)
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
            try:
                self._lock = lock(self.path)
            except (BlockingIOError, FileNotFoundError):
                continue  # somebody has taken it for abandoned
            if self.path.exists():
                return
            os.close(self._lock)

    def close(self) -> None:
        """Delete it with all that is in it."""
        shutil.rmtree(self.path)
        os.close(self._lock)


def temporary_workspace() -> Workspace:
    """A directory for layers: in /var/tmp, since /tmp is in memory on many machines, unless
    $TMPDIR says otherwise.

    Raises:
        StorageFailed: it can't be made.
    """
    default = tempfile.gettempdir()
    parent = Path("/var/tmp" if default == "/tmp" else default)
    with storage(f"making a temporary directory in {parent}"):
        return Workspace(parent, _PREFIX)


def lock(directory: Path, *, wait: bool = False) -> int:
    """A descriptor that has the directory locked. Raises BlockingIOError: another has."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _remove_abandoned(parent: Path, prefix: str) -> None:
    """Remove what was left by those that were killed, as far as it is this user's."""
    for path in parent.glob(f"{prefix}*"):
        with suppress(OSError):  # it is in use
            descriptor = lock(path)
            try:
                if os.fstat(descriptor).st_uid == os.geteuid():
                    shutil.rmtree(path)
            finally:
                os.close(descriptor)
