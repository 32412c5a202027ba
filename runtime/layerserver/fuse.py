"""Serving with FUSE: the data of incomplete layers are files, which EROFS mounts have as devices.

A directory of files, one a layer, named by the hexadecimal diff_id. A read of bytes that are
not here waits until they are. When this process dies, the kernel answers every read of what it
has not in memory with EIO: nothing wrong can be read.
"""

import errno
import logging
import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path

import pyfuse3
import trio

from runtime.layerserver import protocol, rundir
from runtime.layerserver.protocol import Device
from store.data_files import open_all
from store.errors import StoreError
from store.fetcher import Fetcher

log = logging.getLogger(__name__)

# Readers that wait, each in a task of its own.
_MAX_TASKS = 2000

# Names and attributes never change; what is gone is not asked for again.
_FOREVER = 86400.0

OPTIONS = frozenset({"fsname=ctrfs-layers", "subtype=ctrfs-layers", "default_permissions", "ro"})


class FuseServing:
    """Serves layers as files below a directory; see ``serving.Serving``.

    Args:
        run: the server's run directory.
        find: the fetcher of a layer by its hexadecimal diff_id, or None.
    """

    name = "fuse"

    def __init__(self, run: Path, find: Callable[[str], Fetcher | None]) -> None:
        self._run = run
        self._files = _Files(find)

    @property
    def in_use(self) -> bool:
        """Whether some layer is open, as by a mount."""
        return self._files.in_use

    def unguarded(self) -> list[Fetcher]:
        """None: without its process a layer can't be read at all."""
        return []

    def open_data(self, paths: Sequence[Path]) -> Sequence[int]:
        """Descriptors of data files for reading and writing."""
        return open_all(paths)

    def add(self, fetcher: Fetcher) -> None:
        """A layer is found when it is looked up."""

    def completed(self, fetcher: Fetcher) -> None:
        """Who has it mounted goes on through this process."""

    def device(self, fetcher: Fetcher) -> Device:
        """The layer's file."""
        name = fetcher.layer.directory.name
        return Device(str(self._run / protocol.DEVICES / name))

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Serve until cancelled, or until somebody unmounts the files."""
        mountpoint = await trio.to_thread.run_sync(rundir.make_mountpoint, self._run)
        pyfuse3.init(self._files, str(mountpoint), set(OPTIONS))
        try:
            task_status.started()
            await pyfuse3.main(min_tasks=10, max_tasks=_MAX_TASKS)
        finally:
            pyfuse3.close()

    def close(self) -> None:
        """Nothing is kept."""


class _Files(pyfuse3.Operations):
    """The filesystem."""

    supports_dot_lookup = False
    enable_writeback_cache = False

    def __init__(self, find: Callable[[str], Fetcher | None]) -> None:
        super().__init__()
        self._find = find
        self._inodes: dict[int, Fetcher] = {}
        self._numbers: dict[str, int] = {}
        self._opened: dict[int, int] = {}

    @property
    def in_use(self) -> bool:
        """Whether some layer is open, as by a mount."""
        return any(self._opened.values())

    async def lookup(
        self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """A layer."""
        fetcher = self._find(name.decode("ascii", "replace"))
        if fetcher is None or parent_inode != pyfuse3.ROOT_INODE:
            raise pyfuse3.FUSEError(errno.ENOENT)
        # A layer that was made anew has another file.
        key = f"{fetcher.layer.diff_id} {fetcher.layer.identity}"
        inode = self._numbers.setdefault(key, len(self._numbers) + pyfuse3.ROOT_INODE + 1)
        self._inodes[inode] = fetcher
        return self._attributes(inode)

    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        """Attributes."""
        return self._attributes(inode)

    def _attributes(self, inode: int) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        # A layer that is made anew must be found.
        entry.entry_timeout = 0
        entry.attr_timeout = _FOREVER
        if inode == pyfuse3.ROOT_INODE:
            entry.st_mode = stat.S_IFDIR | 0o700
            return entry
        entry.st_mode = stat.S_IFREG | 0o400
        entry.st_size = self._inodes[inode].layer.size
        entry.st_blocks = -(-entry.st_size // 512)
        return entry

    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        """Open a layer. EROFS keeps what it reads, so the kernel need not keep it here too."""
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise pyfuse3.FUSEError(errno.EROFS)
        self._opened[inode] = self._opened.get(inode, 0) + 1
        return pyfuse3.FileInfo(fh=inode, direct_io=True)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        """Bytes of the data file, verified."""
        fetcher = self._inodes[fh]
        length = min(size, fetcher.layer.size - off)
        if length <= 0:
            return b""
        try:
            return await fetcher.read(off, length)
        except StoreError as error:
            log.debug("a read fails: %s", error.sentence)
        except OSError as error:
            log.error("reading the layer %s: %s", fetcher.layer.diff_id, error)
        # Whatever the reason, to the program that reads it is a disk that fails.
        raise pyfuse3.FUSEError(errno.EIO)

    async def release(self, fh: int) -> None:
        """The mount that had it open is gone."""
        self._opened[fh] -= 1
