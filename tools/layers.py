"""What the daemon does about news of the layer server."""

import errno
import logging
import os
import sys
import time
from contextlib import suppress
from functools import partial

import trio

from fs.automount import Automounts
from fs.failures import Failures
from fs.nodes import Caller
from runtime.containers import Containers
from runtime.layerserver.client import LayerClient, LayerServerFailed
from runtime.layerserver.protocol import News
from runtime.rootfs import Rootfs
from store.cas import Digest
from store.errors import StoreError
from store.locate import path_at
from store.store import Store
from tools.options import Options

log = logging.getLogger(__name__)

_LOST = (
    "all processes that guard incomplete layers were killed at once; containers that used them are "
    "ended, because they may have read zeros"
)

_DIED = (
    "the process that serves incomplete layers was killed; a container that read of one then gets "
    "I/O errors until it is started again"
)

# No process, or the kernel does not say which.
_NOBODY = Caller(0, 0, 0)


def client(options: Options, store: Store, level: str, *, background: bool) -> LayerClient:
    """The daemon's connection to its layer server."""
    # -P: nothing is imported from the directory that the daemon was started in.
    command = [sys.executable, "-P", "-m", "tools.layerserver", str(options.root), str(options.run)]
    command += [level, *(["log"] if background else [])]
    directory = options.root / "layers"
    return LayerClient(options.run, directory, store.config, command, silent=background)


class Follower:
    """Passes news on to those whom they concern."""

    def __init__(
        self,
        store: Store,
        rootfs: Rootfs,
        containers: Containers,
        automounts: Automounts,
        failures: Failures,
        nursery: trio.Nursery,
        client: LayerClient,
    ) -> None:
        self._store = store
        self._client = client
        self._recent: dict[tuple[str, int], float] = {}
        self._rootfs = rootfs
        self._containers = containers
        self._automounts = automounts
        self._failures = failures
        self._nursery = nursery

    def heard(self, news: News) -> None:
        """One piece of news."""
        diff_id = Digest(news.diff_id)
        match news.kind:
            case "complete":
                self._store.events.emit("layer.complete", diff_id=diff_id)
                self._nursery.start_soon(self._automounts.refresh_below, "")
            case "refused" | "damaged":
                self._store.layers.refused(diff_id)
                self._failed(news, self._path(diff_id), _NOBODY)
            case "lost":
                self._nursery.start_soon(self._give_up, diff_id)
                self._failed(News("lost", diff_id, _LOST), self._path(diff_id), _NOBODY)
            case "repaired":
                self._nursery.start_soon(partial(self._mount_anew, only_served=False))
                self._failed(news, self._path(diff_id), _NOBODY)
            case "failed" | "attack":
                self._nursery.start_soon(self._read_failed, news)

    async def _read_failed(self, news: News) -> None:
        diff_id = Digest(news.diff_id)
        caller = _caller(news.pid)
        layer = self._store.layers.get(diff_id)
        path = self._path(diff_id)
        with self._failures.coming():
            if layer is not None:
                with suppress(StoreError):  # a damaged index does not name the file
                    name = await trio.to_thread.run_sync(path_at, layer, news.offset)
                    path = f"{path}/{os.fsdecode(name)}"
            self._failed(news, path, caller)

    def _failed(self, news: News, path: str, caller: Caller) -> None:
        if self._is_repeated(path, caller):
            return
        self._store.events.emit(f"layer.{news.kind}", diff_id=news.diff_id, error=news.sentence)
        # Whatever the reason, to the program that reads it is a disk that fails.
        self._failures.add(path, "read", caller, errno.EIO, news.sentence)

    def _is_repeated(self, path: str, caller: Caller) -> bool:
        """Whether this is another part of a read that the kernel has split."""
        now = time.monotonic()
        self._recent = {key: since for key, since in self._recent.items() if since + 1.0 > now}
        return self._recent.setdefault((path, caller.pid), now) != now

    def _path(self, diff_id: Digest) -> str:
        for image in self._store.images:
            if diff_id in image.diff_ids:
                return f"images/{image.name}/layers/{image.diff_ids.index(diff_id)}/rootfs"
        return "images"

    async def _give_up(self, diff_id: Digest) -> None:
        await self._containers.condemn(diff_id, _LOST)
        await self._mount_anew(only_served=False)

    def restarted(self) -> None:
        """The server was replaced: what is mounted of its files is dead."""
        self._store.events.emit("layerserver.start")
        self._nursery.start_soon(self._restarted)

    async def _restarted(self) -> None:
        with suppress(LayerServerFailed):  # it has died again, and the next one comes here too
            if (await self._client.status()).method != "fuse":
                return
            if await self._mount_anew(only_served=True):
                self._failures.add("images", "read", _NOBODY, errno.EIO, _DIED)

    async def _mount_anew(self, *, only_served: bool) -> bool:
        """Whether anything was mounted."""
        forget = partial(self._rootfs.forget_layers, only_served=only_served)
        if not await trio.to_thread.run_sync(forget):
            return False
        await self._automounts.detach_below("")
        await self._containers.detach_idle()
        return True


def _caller(pid: int) -> Caller:
    """A process, which may be gone."""
    with suppress(OSError):
        status = os.stat(f"/proc/{pid}")
        return Caller(pid, status.st_uid, status.st_gid)
    return Caller(pid, 0, 0) if pid else _NOBODY
