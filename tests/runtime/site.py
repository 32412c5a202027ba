"""A store, the layer server of it as a process of its own, and pulls that use it."""

import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import trio

from runtime import linux
from runtime.layerserver.client import LayerClient
from runtime.layerserver.protocol import News
from store.cas import Digest
from store.config import LazyConfig, Patience, StoreConfig
from store.events import EventLog
from store.images import Image
from store.indexing import Indexer
from store.pull import PullRequest, Pulls
from store.store import Store
from tests.support import method as layers
from tests.support.layouts import OciLayout
from tests.support.method import Method
from tests.support.registry import Registry

QUICK = Patience(backoff_seconds=0.01, attempts=3, read_seconds=1.0, connect_seconds=2.0)


class Site:
    """What the daemon has, without its tree.

    Attributes:
        news: all that the server told.
        restarts: how often a server was replaced.
    """

    def __init__(self, directory: Path, method: Method | None = None, **lazy: Any) -> None:
        self.root = directory / "root"
        self.run = directory / "run"
        self.run.mkdir(exist_ok=True)
        (self.run / "pid").touch()  # as of a daemon
        settings = LazyConfig(
            method=method or layers.chosen or "auto",
            **{"read_seconds": 2.0, "fill": False, **lazy},
        )
        self.config = StoreConfig(
            patience=QUICK, docker_config=str(directory / "docker"), lazy=settings
        )
        self.events = EventLog()
        self.store = Store(self.root, self.config, self.events)
        self.command = [
            *(sys.executable, "-m", "tools.layerserver"),
            *(str(self.root), str(self.run), "critical"),
        ]
        self.client = LayerClient(self.run, self.root / "layers", self.config, self.command)
        self.indexer = Indexer(self.store)
        self.pulls = Pulls(self.store, self.client, self.indexer)
        self.news: list[News] = []
        self.restarts = 0

    def _restarted(self) -> None:
        self.restarts += 1

    def _heard(self, news: News) -> None:
        self.news.append(news)
        if news.kind in ("refused", "damaged"):  # as the daemon does
            self.store.layers.refused(Digest(news.diff_id))

    @asynccontextmanager
    async def opened(self) -> AsyncIterator["Site"]:
        """Run the server, as the daemon does."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.indexer.run)
                nursery.start_soon(self.client.follow, self._heard, self._restarted)
                await self.client.status()
                try:
                    yield self
                finally:
                    nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                await self.client.end()
            for descriptor in self.client.held:
                os.close(descriptor)
            self.client.held = ()
            self.store.close()

    async def pull(self, reference: str, **request: Any) -> Image:
        return await self.pulls.pull(PullRequest(reference, **request))

    async def told(self, kind: str, count: int = 1) -> News:
        """The news of this kind, once it has come."""
        await until(lambda: sum(news.kind == kind for news in self.news) >= count)
        return next(news for news in self.news if news.kind == kind)

    def lazy_layers(self, image: Image) -> list[str]:
        """What made each layer lazy; empty where nothing did."""
        found = [self.store.layers.get(diff_id) for diff_id in image.diff_ids]
        return [layer.record.lazy if layer else "missing" for layer in found]

    def forget(self, image: Image) -> None:
        """Remove an image with its layers and blobs, as if it had never been here."""
        self.store.images.remove(image.name)
        for diff_id in set(image.diff_ids):
            self.store.layers.remove(diff_id)
        for blob in set(image.blobs()):
            if self.store.cas.contains(blob):
                self.store.cas.delete(blob)

    def left(self) -> list[str]:
        """Files in the run directory, and mounts below it."""
        mounts = [mount.target for mount in linux.mounts() if str(self.run) in mount.target]
        return sorted({*os.listdir(self.run)} - {"pid"}) + mounts


async def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait for something."""
    with trio.fail_after(seconds):
        while True:
            if condition():
                return
            await trio.sleep(0.01)


def push_blobs(
    registry: Registry, layout: OciLayout, name: str, blobs: list[tuple[bytes, Any, str]]
) -> str:
    """Push an image of these layers: blob, descriptor, diff_id; what follows the host."""
    descriptors = []
    for data, descriptor, _ in blobs:
        layout.blob(data, descriptor.media_type)
        descriptors.append(msgspec.to_builtins(descriptor))
    manifest = layout.manifest(descriptors, [diff_id for _, _, diff_id in blobs])
    return registry.push(layout, manifest, name, "v1").partition("/")[2]
