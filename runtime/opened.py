"""Which files of its root filesystem a container opens in its first seconds.

They are what the next container of the image wants first. fanotify(7) tells: notifications of
opens on the overlay's superblock, which the container's own mounts of it share. They hold
nobody up; when they come faster than they are read, the record ends early.
"""

import logging
import os
import stat
import struct
from contextlib import suppress
from pathlib import Path

import trio

from runtime import linux

log = logging.getLogger(__name__)

# fanotify_init(2), fanotify_mark(2)
_CLOEXEC = 0x1
_NONBLOCK = 0x2
_MARK_ADD = 0x1
_MARK_FILESYSTEM = 0x100
_OPEN = 0x20
_OPEN_EXEC = 0x1000
_OVERFLOW = 0x4000

# struct fanotify_event_metadata
_EVENT = struct.Struct("=IBBHQii")
_BUFFER = 64 << 10

# What the kernel puts behind the path of a file that was deleted meanwhile.
_DELETED = " (deleted)"

# A desktop session opens some thousand files at its start. Who opens more, as to copy or to check
# all there is, wants none of them first, and need not share the processor with whoever notes them.
MAX_PATHS = 4_000
# As long as paths can be, on average far less.
_MAX_BYTES = 1 << 20


class Recording:
    """The opens from now on in a mounted root filesystem; call ``close`` at the end.

    Args:
        rootfs: where it is mounted on the host.

    Raises:
        OSError: the kernel can't tell.
    """

    def __init__(self, rootfs: Path) -> None:
        self._prefix = str(rootfs)
        self._paths: dict[str, None] = {}
        self._bytes = 0
        # Opening what was opened must not wait for anything, as a FIFO would make it.
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOATIME
        self._group = linux.fanotify_init(_CLOEXEC | _NONBLOCK, flags)
        try:
            flags = _MARK_ADD | _MARK_FILESYSTEM
            events = _OPEN | _OPEN_EXEC
            linux.fanotify_mark(self._group, flags, events, linux.AT_FDCWD, self._prefix)
        except OSError:
            self.close()
            raise

    async def run(self) -> None:
        """Record until cancelled, or until there is too much."""
        while await self._collect():
            pass

    async def _collect(self) -> bool:
        await trio.lowlevel.wait_readable(self._group)
        return self._drain()

    def _drain(self) -> bool:
        """Note what has come; whether there is room for more."""
        with suppress(BlockingIOError):
            while self._take(os.read(self._group, _BUFFER)):
                if len(self._paths) >= MAX_PATHS or self._bytes >= _MAX_BYTES:
                    return False
            return False
        return True

    def _take(self, events: bytes) -> bool:
        """Note events; whether none was lost."""
        complete = True
        offset = 0
        while offset < len(events):
            length, _, _, _, mask, descriptor, _ = _EVENT.unpack_from(events, offset)
            offset += length
            complete = complete and not mask & _OVERFLOW
            if descriptor >= 0:
                try:
                    self._note(descriptor)
                finally:
                    os.close(descriptor)
        return complete

    def _note(self, descriptor: int) -> None:
        with suppress(OSError):
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            # Opened by the host's path for the root filesystem, or in the container's own mounts.
            path = path.removeprefix(self._prefix).removesuffix(_DELETED)
            if path in self._paths or not path.startswith("/") or "\n" in path:
                return
            status = os.fstat(descriptor)
            # One without a name was the container's own, and is gone.
            if stat.S_ISREG(status.st_mode) and status.st_nlink:
                self._paths[path] = None
                self._bytes += len(path)

    def close(self) -> list[str]:
        """Stop; absolute paths of regular files as the container sees them, in the order of
        their first use."""
        if self._group >= 0:
            self._drain()
            os.close(self._group)
            self._group = -1
        return list(self._paths)
