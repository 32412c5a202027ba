"""Mounting the content of Mountpoint nodes over them when it is used, and not longer.

An image's rootfs is a directory of the tree whose content the kernel serves: the first
use mounts it, and it is unmounted when nobody has used it for a while.
"""

import errno
import logging
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from weakref import WeakValueDictionary

import trio

from fs.nodes import Mountpoint, refuse
from runtime import linux
from store.errors import CtrfsError

log = logging.getLogger(__name__)

# An idle mount costs a superblock and dentries; an image that is looked at again after
# a minute or two is mounted again in a few milliseconds.
EXPIRE_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class _Mounted:
    node: Mountpoint
    target: str
    content_id: Hashable

    def is_current(self) -> bool:
        """Whether a new mount would show the same."""
        try:
            return self.node.content_id() == self.content_id
        except CtrfsError:
            return False


class Automounts:
    """What is mounted over the nodes of one tree.

    Args:
        mountpoint: where the tree itself is mounted.
    """

    def __init__(self, mountpoint: str) -> None:
        self._mountpoint = mountpoint.rstrip("/")
        self._locks: WeakValueDictionary[Hashable, trio.Lock] = WeakValueDictionary()
        self._mounted: dict[Hashable, _Mounted] = {}
        self._mounting: set[str] = set()  # targets
        self._closed: set[str] = set()  # paths at and below which nothing is mounted

    async def mount(self, node: Mountpoint) -> None:
        """Mount the content of the node unless it is there already.

        Raises:
            CtrfsError: it cannot be mounted.
        """
        target = self._target(node.path)
        async with self._lock(node.key):
            if any(_is_below(target, path) for path in self._closed):
                refuse("it is being removed", errno.EBUSY)
            self._mounting.add(target)
            try:
                if not await trio.to_thread.run_sync(linux.is_mountpoint, target):
                    content_id = node.content_id()
                    await node.mount_at(target)
                    self._mounted[node.key] = _Mounted(node, target, content_id)
            finally:
                self._mounting.remove(target)

    @contextmanager
    def closed(self, path: str) -> Iterator[None]:
        """While something is removed, nothing is mounted at or below its path."""
        target = self._target(path)
        self._closed.add(target)
        try:
            yield
        finally:
            self._closed.remove(target)

    async def unmount_below(self, path: str) -> bool:
        """Unmount all at and below a path of the tree; False if some of it is in use.

        The caller may answer a process for which the kernel has locked directories on the way, as
        rmdir(2) does. So this neither looks for a mount that is gone, which the kernel could not
        find without those locks, nor waits for who may be looking.
        """
        if any(_is_below(target, self._target(path)) for target in self._mounting):
            return False
        for key, target in self._below(path):
            lock = self._lock(key)
            if lock.locked():
                return False
            async with lock:
                try:
                    await trio.to_thread.run_sync(_unmount, target)
                except OSError as error:
                    log.debug("%s stays mounted: %s", target, error)
                    return False
                self._mounted.pop(key, None)
        return True

    async def refresh_below(self, path: str) -> None:
        """Detach what shows another content than a new mount would.

        Those who have files of it open keep them as they are.
        """
        await self._detach(path, lambda mounted: not mounted.is_current())

    async def detach_below(self, path: str) -> None:
        """Detach everything: what is mounted does not work any more."""
        await self._detach(path, lambda mounted: True)

    async def _detach(self, path: str, unwanted: Callable[[_Mounted], bool]) -> None:
        for key, target in self._below(path):
            async with self._lock(key):
                mounted = self._mounted.get(key)
                if mounted is not None and unwanted(mounted):
                    flags = linux.MNT_DETACH | linux.UMOUNT_NOFOLLOW
                    with suppress(OSError):  # somebody has unmounted it by hand
                        await trio.to_thread.run_sync(linux.umount, target, flags)
                    del self._mounted[key]

    def _below(self, path: str) -> list[tuple[Hashable, str]]:
        top = self._target(path)
        return [
            (key, mounted.target)
            for key, mounted in self._mounted.items()
            if _is_below(mounted.target, top)
        ]

    def _target(self, path: str) -> str:
        return f"{self._mountpoint}/{path}".rstrip("/")

    async def run(self) -> None:
        """Unmount what has not been used, until cancelled."""
        while True:
            await trio.sleep(EXPIRE_SECONDS)
            for key, target in self._below(""):
                async with self._lock(key):
                    if await trio.to_thread.run_sync(linux.expire_mount, target):
                        self._mounted.pop(key, None)

    def _lock(self, key: Hashable) -> trio.Lock:
        """One for each node, as long as somebody uses it."""
        return self._locks.setdefault(key, trio.Lock())


def _is_below(target: str, top: str) -> bool:
    """Whether a path is ``top`` or below it."""
    return target == top or target.startswith(top + "/")


def _unmount(target: str) -> None:
    """Unmount a target if it is mounted. Raises OSError: it is in use."""
    if any(mount.target == target for mount in linux.mounts()):
        linux.umount(target)
