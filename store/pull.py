"""Pulling images: from a name to a record in the store whose layers can be mounted."""

import errno
import logging
import time
import weakref
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial

import msgspec
import trio

from store.cas import Digest, digest_of
from store.config import Mode
from store.errors import (
    DISK_ERRORS,
    ContentNeeded,
    CorruptContent,
    InvalidLayer,
    InvalidReference,
    NotLazy,
    StoreError,
)
from store.images import Image
from store.layers import Layer
from store.lazy import fetched, read_record, refusal
from store.lazy_pull import Filling, Indexing, LazyPull
from store.leftovers import Leftovers
from store.manifest import Descriptor
from store.open_source import open_source
from store.platform import Platform
from store.progress import LayerProgress, PullProgress
from store.reference import (
    LayoutSource,
    RegistrySource,
    check_own_name,
    parse_reference,
    parse_source,
)
from store.resolve import Cached, find
from store.source import Source
from store.store import Store
from store.toc import is_announced
from store.transfer import Transfer, ask, side_by_side, to_end

log = logging.getLogger(__name__)

_DESCRIBED_OTHERWISE = "an image that is here claims the same content and says otherwise what it is"


class PullRequest(msgspec.Struct, frozen=True):
    """What to pull: see ``parse_source`` for ``source``; ``platform`` and ``mode`` None are the
    configured ones; ``as_name`` None is the source's own name."""

    source: str
    platform: Platform | None = None
    as_name: str | None = None
    mode: Mode | None = None


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

    Args:
        filling: brings the contents of lazy layers; without it all layers are pulled in full.
        indexing: is told of layers that could be lazy if they had an index.
    """

    def __init__(
        self, store: Store, filling: Filling | None = None, indexing: Indexing | None = None
    ) -> None:
        self._store = store
        self._filling = filling
        self._indexing = indexing
        self._jobs: dict[tuple[str, Platform, str | None, Mode], _Job] = {}
        self._running: list[PullProgress] = []
        self._locks: dict[str, trio.Lock] = {}
        self._leftovers = Leftovers(store)
        self._slots = trio.Semaphore(store.config.parallel_layers)
        # Lazy layers are ready soon, and need not wait for those that come in full.
        self._lazy_slots = trio.Semaphore(store.config.parallel_layers)
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
        mode = request.mode or self._store.config.lazy.mode
        key = (str(source), platform, name, mode)
        while (job := self._jobs.get(key)) is not None:
            await job.ended.wait()
            if job.error:
                raise job.error
            if job.image:
                return job.image
            # Whoever did the work was cancelled: it is ours now.
        job = self._jobs[key] = _Job()
        try:
            job.image = await self._reported(source, platform, name, mode)
        except StoreError as error:
            job.error = error
            raise
        finally:
            del self._jobs[key]
            job.ended.set()
        return job.image

    async def _reported(
        self,
        described: RegistrySource | LayoutSource,
        platform: Platform,
        name: str | None,
        mode: Mode,
    ) -> Image:
        """One pull, visible in progress and events."""
        events = self._store.events
        progress = PullProgress(name or str(described).removeprefix("docker://"))
        source = open_source(described, self._store.config)
        begin = time.monotonic()
        self._running.append(progress)
        events.emit("pull.start", name=progress.name, source=str(described))
        why = "cancelled"
        try:
            image = await self._work(source, str(described), platform, name, mode, progress)
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

    async def _work(
        self,
        source: Source,
        origin: str,
        platform: Platform,
        name: str | None,
        mode: Mode,
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
        pairs = zip(image.layers, image.diff_ids, strict=True)
        wanted = tuple(
            {(layer.digest, diff_id): (layer, diff_id) for layer, diff_id in pairs}.values()
        )
        states = [self._layer_progress(layer) for layer, _ in wanted]
        progress.layers = tuple(dict.fromkeys(states))
        filling = self._filling if mode == "lazy" else None
        lazily = LazyPull(self._store, source, origin, found.chosen, filling) if filling else None
        async with self._leftovers.gone_if_refused(image, map(digest_of, found.documents)):
            progress.state = "pulling"
            part = _Part(source, origin, image.name, lazily)
            await side_by_side(
                (
                    partial(self._keep, found.documents, image, progress),
                    partial(self._all_layers, part, wanted, states),
                )
            )
            await self._make_mountable(image)
            if filling:
                await self._serve(filling, image)
            image = msgspec.structs.replace(image, pulled_ns=time.time_ns())
            await to_end(lambda: self._store.images.put(image))
            await to_end(partial(self._have_filled, image, filling))
        self._have_indexed(wanted)
        return image

    async def _keep(self, documents: Sequence[bytes], image: Image, progress: PullProgress) -> None:
        for document in documents:
            await to_end(partial(self._store.cas.put, document))
        # Not before: who sees the image reads them.
        progress.image = image

    def _have_filled(self, image: Image, filling: Filling | None) -> None:
        """The rest of lazy layers may come as well, now that there is an image that has them."""
        self._store.note_wanted()
        if filling is not None:
            for diff_id in self._store.incomplete(image):
                filling.expect(diff_id)

    def _have_indexed(self, layers: Sequence[tuple[Descriptor, Digest]]) -> None:
        """Ordinary layers that were pulled in full can be lazy the next time."""
        for layer, diff_id in layers:
            in_full = self._store.cas.contains(layer.content)
            if self._indexing is not None and in_full and not is_announced(layer):
                self._indexing.want(layer, diff_id)

    async def _make_mountable(self, image: Image) -> None:
        """Layers that don't fit together are found out now, and what it takes to mount them
        is made now, not when the first container starts."""
        try:
            # Each layer may need others.
            while (needed := await trio.to_thread.run_sync(self._needed, image)) is not None:
                for diff_id in needed.diff_ids:
                    await self._complete(Digest(diff_id))
        except InvalidLayer as error:
            _name(error, image.name)
            raise

    def _needed(self, image: Image) -> ContentNeeded | None:
        try:
            self._store.rootfs_layers(image)
        except ContentNeeded as needed:
            return needed
        return None

    async def _serve(self, filling: Filling, image: Image) -> None:
        """Have lazy layers served, and what is wanted first of them fetched."""
        incomplete = await trio.to_thread.run_sync(self._store.incomplete, image)
        for diff_id in incomplete:
            await filling.begin(diff_id)
        if incomplete:
            first = await trio.to_thread.run_sync(self._store.wanted_first, image)
            for diff_id, ranges in first.items():
                await filling.prefetch(diff_id, ranges)

    async def _complete(self, diff_id: Digest) -> None:
        if self._filling is None:
            raise CorruptContent(f"the layer {diff_id} is incomplete and nobody can fetch the rest")
        await self._filling.complete(diff_id)

    async def _all_layers(
        self,
        part: "_Part",
        wanted: Sequence[tuple[Descriptor, Digest]],
        states: Sequence[LayerProgress],
    ) -> None:
        """Get layers side by side; the first failure ends the others."""

        async def one(layer: Descriptor, diff_id: Digest, state: LayerProgress) -> None:
            try:
                await self._layer(part, layer, diff_id, state)
            except StoreError as error:
                _name(error, part.name, f"layer {layer.digest}")
                raise

        await side_by_side(
            partial(one, layer, diff_id, state)
            for (layer, diff_id), state in zip(wanted, states, strict=True)
        )

    def _layer_progress(self, layer: Descriptor) -> LayerProgress:
        """One for each blob, so that it is true for all pulls that wait for it."""
        return self._layers.setdefault(layer.content, LayerProgress(layer.digest, layer.size))

    async def _layer(
        self, part: "_Part", layer: Descriptor, diff_id: Digest, state: LayerProgress
    ) -> None:
        # Blobs before layers before slots, everywhere, so that nobody waits in a circle.
        blob, unpacked = self._alone(f"blob {layer.digest}"), self._alone(f"layer {diff_id}")
        async with blob, unpacked:
            not_lazy = ""
            if part.lazily and not self._store.cas.contains(layer.content):
                async with self._lazy_slots:
                    not_lazy = await self._layer_lazily(part.lazily, layer, diff_id, state)
                if not not_lazy:
                    return
            async with self._slots:
                await self._layer_in_full(part, layer, diff_id, state, not_lazy)

    async def _layer_lazily(
        self,
        lazily: LazyPull,
        layer: Descriptor,
        diff_id: Digest,
        state: LayerProgress,
    ) -> str:
        """Have a layer that is filled when it is read; why that is impossible, or nothing."""
        layers = self._store.layers
        known = layers.get(diff_id)
        if known is None or not await to_end(lambda: layers.usable(diff_id)):
            if self._is_described_otherwise(layer, diff_id):
                return _DESCRIBED_OTHERWISE
            try:
                await ask(lambda: lazily.layer(layer, diff_id))
            except NotLazy as error:
                return error.sentence
        elif known.complete:
            # Another blob of the same content; this image's own is not needed for anything.
            return "its content is here already"
        elif not read_record(known.directory).is_for(layer, lazily.origin):
            return _DESCRIBED_OTHERWISE
        state.all_arrived()
        return ""

    def _is_described_otherwise(self, layer: Descriptor, diff_id: Digest) -> bool:
        """Whether an image that is here has a layer of the same content that this one must not
        make for it, before it is verified."""
        return any(
            not other.says_the_same(layer)
            for image in self._store.images
            for other, content in zip(image.layers, image.diff_ids, strict=True)
            if content == diff_id
        )

    async def _layer_in_full(
        self,
        part: "_Part",
        layer: Descriptor,
        diff_id: Digest,
        state: LayerProgress,
        not_lazy: str,
    ) -> None:
        store = self._store
        known = store.layers.get(diff_id)
        if known is not None and not known.complete:
            await self._complete_or_give_up(known, layer, part.origin, state)
        transfer = Transfer(
            store.cas,
            store.layers,
            store.config.patience,
            part.source,
            layer,
            diff_id,
            state,
            not_lazy,
        )
        await transfer.run()

    async def _complete_or_give_up(
        self, known: Layer, blob: Descriptor, origin: str, state: LayerProgress
    ) -> None:
        """Bring the rest of an incomplete layer, which verifies its diff_id. The layer is made
        anew when what stands in the way need not be this image's blob: what it was loaded by was
        found wrong, or nobody vouches for that, or another image says it that claims the same
        diff_id."""
        record = read_record(known.directory)

        def here() -> int:
            """As if the same part were here of this image's blob, which may be another."""
            count = fetched(known.directory)
            return blob.size if count is None else blob.size * count // record.blob.size

        try:
            with state.measured(here):
                await self._complete(known.diff_id)
        except StoreError as error:
            foreign = not record.is_for(blob, origin) and error.errno not in DISK_ERRORS
            hopeless = record.vouched and not refusal(known.directory)
            if not foreign and (error.errno != errno.EIO or hopeless):
                raise
            log.warning("the layer %s is fetched once more: %s", known.diff_id, error.sentence)
            self._store.layers.refused(known.diff_id)

    @asynccontextmanager
    async def _alone(self, key: str) -> AsyncIterator[None]:
        lock = self._locks.setdefault(key, trio.Lock())
        try:
            async with lock:
                yield
        finally:
            if not lock.locked():
                self._locks.pop(key, None)


class _Part(msgspec.Struct, frozen=True):
    """What all layers of one image have in common; ``lazily`` is None to pull them in full."""

    source: Source
    origin: str
    name: str
    lazily: LazyPull | None


def _chosen_name(text: str | None) -> str | None:
    if text is None:
        return None
    reference = parse_reference(text)
    if reference.digest:
        raise InvalidReference(f"as={text:.300} can't hold a digest; give a name with a tag")
    check_own_name(reference)
    return str(reference)


def _name(error: StoreError, *names: str) -> None:
    """Put image and layer into an error's sentence; what unpacks a layer doesn't know them."""
    missing = [name for name in names if name not in error.sentence]
    error.sentence = ": ".join(
        [", ".join(missing), error.sentence] if missing else [error.sentence]
    )
    error.args = (error.sentence,)
