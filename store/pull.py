"""Pulling images: from a name to a record in the store whose layers can be mounted."""

import time
import weakref
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial

import msgspec
import trio

from store.cas import Digest, digest_of
from store.errors import InvalidReference, StoreError
from store.images import Image
from store.leftovers import Leftovers
from store.manifest import Descriptor
from store.oci_layout import Layout
from store.platform import Platform
from store.progress import LayerProgress, PullProgress
from store.reference import (
    LayoutSource,
    RegistrySource,
    check_own_name,
    parse_reference,
    parse_source,
)
from store.registry import Registry
from store.resolve import Cached, find
from store.source import Source
from store.store import Store
from store.transfer import Transfer, ask, to_end


class PullRequest(msgspec.Struct, frozen=True):
    """What to pull: see ``parse_source`` for ``source``; ``platform`` None is the configured one;
    ``as_name`` None is the source's own name."""

    source: str
    platform: Platform | None = None
    as_name: str | None = None


class _Job:
    """A pull that several callers may wait for."""

    def __init__(self) -> None:
        self.ended = trio.Event()
        self.image: Image | None = None
        self.error: StoreError | None = None


class Pulls:
    """All pulls of a store. To be used from one trio run.

    Work runs in the tasks of those who want it: a pull whose last caller is cancelled
    stops, and nothing of it outlives its callers but content for the next attempt. One that
    is refused leaves nothing.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._jobs: dict[tuple[str, Platform, str | None], _Job] = {}
        self._running: list[PullProgress] = []
        self._locks: dict[str, trio.Lock] = {}
        self._leftovers = Leftovers(store)
        self._slots = trio.Semaphore(store.config.parallel_layers)
        self._layers: weakref.WeakValueDictionary[Digest, LayerProgress] = (
            weakref.WeakValueDictionary()
        )

    def progress(self) -> list[PullProgress]:
        """The pulls under way, oldest first."""
        return list(self._running)

    def active(self) -> list[Image]:
        """The images that are on their way, as far as they are known already."""
        return [pull.image for pull in self._running if pull.image]

    async def pull(self, request: PullRequest) -> Image:
        """Get an image. One that is asked for twice at once is pulled once.

        Raises:
            StoreError: it can't be had; the sentence names image and digest. What was there
                before is as it was.
        """
        source = parse_source(request.source)
        platform = request.platform or self._store.config.wanted_platform
        name = _chosen_name(request.as_name)
        key = (str(source), platform, name)
        while (job := self._jobs.get(key)) is not None:
            await job.ended.wait()
            if job.error:
                raise job.error
            if job.image:
                return job.image
            # Whoever did the work was cancelled: it is ours now.
        job = self._jobs[key] = _Job()
        try:
            job.image = await self._reported(source, platform, name)
        except StoreError as error:
            job.error = error
            raise
        finally:
            del self._jobs[key]
            job.ended.set()
        return job.image

    async def _reported(
        self, described: RegistrySource | LayoutSource, platform: Platform, name: str | None
    ) -> Image:
        """One pull, visible in progress and events."""
        events = self._store.events
        progress = PullProgress(name or str(described).removeprefix("docker://"))
        source = self._open(described)
        begin = time.monotonic()
        self._running.append(progress)
        events.emit("pull.start", name=progress.name, source=str(described))
        why = "cancelled"
        try:
            image = await self._work(source, str(described), platform, name, progress)
            why = ""
        except StoreError as error:
            why = error.sentence
            raise
        finally:
            source.close()
            self._running.remove(progress)
            if why:
                events.emit("pull.failed", name=progress.name, error=why)
        events.emit(
            "pull.done",
            name=image.name,
            digest=image.digest,
            size=image.size,
            seconds=round(time.monotonic() - begin, 3),
        )
        return image

    def _open(self, described: RegistrySource | LayoutSource) -> Source:
        if isinstance(described, LayoutSource):
            return Layout(described, self._store.config.limits)
        return Registry(described.reference, self._store.config)

    async def _work(
        self,
        source: Source,
        origin: str,
        platform: Platform,
        name: str | None,
        progress: PullProgress,
    ) -> Image:
        limit = self._store.config.layers.layer_bytes
        found = await ask(lambda: find(Cached(source, self._store.cas), platform, origin, limit))
        if name is None:
            reference = source.default_name(found.resolved)
            check_own_name(reference)
            name = str(reference)
        image = found.image(name, origin)
        progress.name = image.name
        # An image may hold the same layer several times.
        wanted = tuple(dict.fromkeys(zip(image.layers, image.diff_ids, strict=True)))
        states = [self._layer_progress(layer) for layer, _ in wanted]
        progress.layers = tuple(dict.fromkeys(states))
        async with self._leftovers.gone_if_refused(image, map(digest_of, found.documents)):
            for document in found.documents:
                await to_end(partial(self._store.cas.put, document))
            progress.image = image
            progress.state = "pulling"
            await self._all_layers(source, image.name, wanted, states)
            # Layers that don't fit together are found out now, and what it takes to mount them
            # is made now, not when the first container starts.
            await trio.to_thread.run_sync(self._store.rootfs_layers, image)
            image = msgspec.structs.replace(image, pulled_ns=time.time_ns())
            await to_end(lambda: self._store.images.put(image))
        return image

    async def _all_layers(
        self,
        source: Source,
        name: str,
        wanted: Sequence[tuple[Descriptor, Digest]],
        states: Sequence[LayerProgress],
    ) -> None:
        """Get layers side by side; the first failure ends the others."""
        failure: StoreError | None = None

        async def one(layer: Descriptor, diff_id: Digest, state: LayerProgress) -> None:
            nonlocal failure
            try:
                await self._layer(source, layer, diff_id, state)
            except StoreError as error:
                if failure is None:
                    failure = _named(error, name, layer)
                nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            for (layer, diff_id), state in zip(wanted, states, strict=True):
                nursery.start_soon(one, layer, diff_id, state)
        if failure is not None:
            raise failure

    def _layer_progress(self, layer: Descriptor) -> LayerProgress:
        """One for each blob, so that it is true for all pulls that wait for it."""
        return self._layers.setdefault(layer.content, LayerProgress(layer.digest, layer.size))

    async def _layer(
        self, source: Source, layer: Descriptor, diff_id: Digest, state: LayerProgress
    ) -> None:
        store = self._store
        transfer = Transfer(
            store.cas, store.layers, store.config.patience, source, layer, diff_id, state
        )
        # Blobs before layers before slots, everywhere, so that nobody waits in a circle.
        blob, unpacked = self._alone(f"blob {layer.digest}"), self._alone(f"layer {diff_id}")
        async with blob, unpacked, self._slots:
            await transfer.run()

    @asynccontextmanager
    async def _alone(self, key: str) -> AsyncIterator[None]:
        lock = self._locks.setdefault(key, trio.Lock())
        try:
            async with lock:
                yield
        finally:
            if not lock.locked():
                self._locks.pop(key, None)


def _chosen_name(text: str | None) -> str | None:
    if text is None:
        return None
    reference = parse_reference(text)
    if reference.digest:
        raise InvalidReference(f"as={text:.300} can't hold a digest; give a name with a tag")
    check_own_name(reference)
    return str(reference)


def _named(error: StoreError, name: str, layer: Descriptor) -> StoreError:
    """The error with image and layer in its sentence; what unpacks a layer doesn't know them."""
    missing = [part for part in (name, f"layer {layer.digest}") if part not in error.sentence]
    error.sentence = ": ".join(
        [", ".join(missing), error.sentence] if missing else [error.sentence]
    )
    error.args = (error.sentence,)
    return error
