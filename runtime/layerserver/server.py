"""The layer server: one process that fetches what is missing of layers, for all who read them.

It knows the layers by the store's files alone, so it can be killed at any time and begin
again. It lives as long as a daemon listens to it or a mount has a layer open.
"""

import errno
import logging
import os
import signal
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path

import msgspec
import trio

from runtime import fanotify, keeper
from runtime.layerserver import protocol, rundir
from runtime.layerserver.asked import fetch_ranges, fetch_rest, runs_in_order
from runtime.layerserver.completion import complete
from runtime.layerserver.conversations import Conversations
from runtime.layerserver.fanotify_serving import FanotifyServing, find_group
from runtime.layerserver.fill import Filler
from runtime.layerserver.fuse import FuseServing
from runtime.layerserver.protocol import (
    Answer,
    Configure,
    Device,
    Done,
    End,
    Failure,
    Fetch,
    Listen,
    News,
    Open,
    Prefetch,
    Ranges,
    Report,
    Request,
    Status,
)
from runtime.layerserver.serving import Serving
from store import lazy
from store.cas import Cas, Digest, parse_digest
from store.config import Patience, StoreConfig
from store.errors import (
    BlobNotFound,
    CorruptContent,
    CtrfsError,
    DigestMismatch,
    PullCancelled,
    StorageFailed,
    StoreError,
)
from store.fetcher import Fetcher, Reading, Slots
from store.lazy import LazyLayer
from store.lender import Lender
from store.open_source import open_source
from store.reference import parse_source
from store.source import Source

log = logging.getLogger(__name__)

# A daemon that was killed comes back sooner; else nobody needs this process.
_GRACE_SECONDS = 10.0
_LOOK_SECONDS = 0.5
# Whoever has just pulled an image may list its files, which shows in no read. Listing one takes
# the kernel and ls 20 µs, more where this process takes its part of the processor …
_LISTING_SECONDS = 50e-6
# … and nobody lists millions of them.
_LISTING_MAX_SECONDS = 5.0
_REPAIRED = (
    "the disk had lost contents of this layer, which are written again; start containers that use "
    "it again, and have the disk looked at"
)
# Requests in the time that a reader waits, if all stall.
_ATTEMPTS = 2


class LayersInUse(CtrfsError):
    """Some mount has a layer open."""

    errno = errno.EBUSY


class LayerServer:
    """Everything of one server.

    Args:
        root: the store's directory.
        run: where socket and devices are; for this process and its daemon alone.
        config: the store's settings.
    """

    def __init__(self, root: Path, run: Path, config: StoreConfig) -> None:
        self._layers = root / "layers"
        self._run = run
        self._cas = Cas(root, guest=True)
        self._fetchers: dict[Digest, Fetcher] = {}
        self._serving, self._why = _choose(root, run, config, self._by_name)
        self._lender = Lender(self._layers, self._cas, self._lazy_layer)
        self._to_enter: set[LazyLayer] = set()
        self._entering = trio.Lock()
        self._completing = trio.Lock()
        self._talks = Conversations(run, self._answer)
        self._slots = Slots(config.lazy.requests)
        self._filler = Filler(self._here, self._slots, self._finish)
        self._use(config)

    def _use(self, config: StoreConfig) -> None:
        """New settings count for layers that are opened from now on."""
        self._config = msgspec.structs.replace(config, patience=_patience(config))
        self._sources: dict[str, Source] = {}
        self._filler.fill = config.lazy.fill
        self._filler.rate = config.lazy.fill_rate

    async def run(self) -> None:
        """Serve until nobody needs it.

        Raises:
            StoreInUse: another server has the directory.
        """
        with rundir.claimed(self._run):
            try:
                async with trio.open_nursery() as self._nursery:
                    self._nursery.start_soon(self._end_on_signal)
                    await self._load()
                    for fetcher in self._serving.unguarded():
                        self._talks.tell(News("lost", fetcher.layer.diff_id))
                    await self._nursery.start(self._serve)
                    self._nursery.start_soon(self._filler.run)
                    await self._nursery.start(self._talks.serve)
                    await self._until_unneeded()
                    self._nursery.cancel_scope.cancel()
            finally:
                self._serving.close()
                self._lender.close()
                rundir.tidy(self._run)

    async def _serve(self, *, task_status: trio.TaskStatus[None]) -> None:
        await self._serving.run(task_status=task_status)
        self._nursery.cancel_scope.cancel()

    async def _end_on_signal(self) -> None:
        with trio.open_signal_receiver(signal.SIGTERM) as signals:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
            async for _ in signals:
                self._nursery.cancel_scope.cancel()

    async def _until_unneeded(self) -> None:
        needed = trio.current_time()
        while trio.current_time() - needed < _GRACE_SECONDS:
            if self._talks.are_heard or self._serving.in_use:
                needed = trio.current_time()
            self._forget_removed()
            for fetcher in self._fetchers.values():
                fetcher.layer.table.unload()
            await trio.sleep(_LOOK_SECONDS)

    def _forget_removed(self) -> None:
        """Layers whose directory is gone need nothing any more."""
        for diff_id, fetcher in list(self._fetchers.items()):
            if not fetcher.layer.is_there:
                log.info("the layer %s was removed", diff_id)
                if fetcher.layer.whole:
                    self._serving.completed(fetcher)
                # Whoever has it mounted still reads on, or fails: holes are never zeros.
                del self._fetchers[diff_id]

    async def _end(self) -> None:
        await trio.lowlevel.checkpoint()  # after the answer
        self._nursery.cancel_scope.cancel()

    def _here(self) -> list[Fetcher]:
        """The layers that have not been removed, or made anew, since they were opened."""
        return [fetcher for fetcher in self._fetchers.values() if fetcher.layer.is_there]

    def _by_name(self, name: str) -> Fetcher | None:
        return self._fetchers.get(Digest(f"sha256:{name}"))

    def _lazy_layer(self, name: str) -> LazyLayer | None:
        fetcher = self._by_name(name)
        return fetcher.layer if fetcher else None

    # --- layers ------------------------------------------------------------------------

    async def _load(self) -> None:
        """Go on with all layers that are incomplete."""
        files = (self._layers.glob(f"*/{name}") for name in ("present", "blob"))
        for directory in sorted({path.parent for path in chain.from_iterable(files)}):
            try:
                await self._open(parse_digest(f"sha256:{directory.name}"))
            except CtrfsError as error:
                log.error("the layer in %s can't be served: %s", directory, error.sentence)

    async def _open(self, diff_id: Digest) -> Fetcher | None:
        """The fetcher of a layer; None if the layer is complete.

        Raises:
            StoreError: it can't be served.
        """
        directory = self._layers / diff_id.removeprefix("sha256:")
        known = self._fetchers.get(diff_id)
        if known is not None:
            if known.layer.is_there:
                self._filler.wake()  # an image may have it by now
                return known
            del self._fetchers[diff_id]
        if not directory.is_dir():
            raise BlobNotFound(f"the layer {diff_id} is not here; pull the image again")
        try:
            layer = await trio.to_thread.run_sync(self._open_layer, directory, diff_id)
        except CorruptContent as error:
            self._talks.tell(News("damaged", diff_id, error.sentence))
            raise
        if layer is None:
            return None
        fetcher = Fetcher(
            layer,
            self._source(layer),
            self._nursery,
            self._slots,
            self._lender,
            self._config.lazy,
            self._failed,
            lambda: self._all_here(diff_id),
        )
        fetcher.refused = lazy.refusal(directory)
        # Another task may have been faster.
        known = self._fetchers.setdefault(diff_id, fetcher)
        if known is fetcher:
            self._serving.add(fetcher)
            self._nursery.start_soon(self._begin, fetcher)
        else:
            layer.close()
        self._slots.used()  # who had it opened will read it
        self._filler.wake()
        return known

    def _open_layer(self, directory: Path, diff_id: Digest) -> LazyLayer | None:
        if lazy.settle(directory, self._cas):
            return None
        return LazyLayer(directory, diff_id, self._serving.open_data)

    def _all_here(self, diff_id: Digest) -> None:
        """Each content was verified by itself: who reads need not wait for the rest."""
        fetcher = self._fetchers.get(diff_id)
        if fetcher is not None and _all_contents(fetcher):
            self._serving.completed(fetcher)
        self._filler.wake()

    async def _begin(self, fetcher: Fetcher) -> None:
        """What a layer wants first is fetched. Later others may borrow from it: that takes a while
        to enter, which the container that starts now must not wait for."""
        layer = fetcher.layer
        await self._enter()
        self._to_enter.add(layer)
        if end := layer.table.prefetch_end:
            await self._prefetch(fetcher, [range(layer.table.stop_at(end))])
        await trio.sleep(min(_LISTING_SECONDS * layer.table.pieces, _LISTING_MAX_SECONDS))
        await self._slots.quiet()
        await self._enter()
        fetcher.fillable = True
        self._filler.wake()

    async def _enter(self, *layers: LazyLayer) -> None:
        """Have layers lend, and know what they can borrow: these and those that wait for it."""
        async with self._entering:
            for layer in self._to_enter.union(layers):
                await trio.to_thread.run_sync(self._lender.add, layer)
                self._to_enter.discard(layer)

    def _source(self, layer: LazyLayer) -> Source:
        """Where the layer comes from. Layers of one image share it with its connections, and
        what it has learned of the registry, as a token."""
        name = layer.record.sources[0]
        if name not in self._sources:
            self._sources[name] = open_source(parse_source(name), self._config)
        return self._sources[name]

    async def _prefetch(self, fetcher: Fetcher, wanted: Iterable[range]) -> None:
        """Bring spans in order. One request at a time: a second would take the processor from the
        container that starts meanwhile, and what it wants first would come no sooner."""
        try:
            for spans in wanted:
                await fetcher.bring(spans, self._slots.readers)
        except StoreError as error:
            log.info("fetching what is wanted first of %s: %s", fetcher.layer.diff_id, error)

    async def _finish(self, fetcher: Fetcher) -> None:
        """Complete a whole layer when there is time; a disk that is full is waited for."""
        try:
            await self._complete(fetcher)
        except (StorageFailed, OSError) as error:
            log.error("the layer %s can't be completed: %s", fetcher.layer.diff_id, error)
            await trio.sleep(_GRACE_SECONDS)
        except PullCancelled:
            return

    async def _complete(self, fetcher: Fetcher) -> None:
        """Complete a whole layer, unless somebody else has.

        Raises:
            StorageFailed, OSError: the disk failed.
            PullCancelled: the caller was cancelled.
        """
        layer = fetcher.layer
        async with self._completing:
            if layer.complete or fetcher.refused or not layer.whole:
                return
            await complete(fetcher, self._cas)
        if layer.complete:
            self._serving.completed(fetcher)
            self._talks.tell(News("complete", layer.diff_id))
        elif fetcher.refused:
            log.error("the layer %s: %s", layer.diff_id, fetcher.refused)
            self._talks.tell(News("refused", layer.diff_id, fetcher.refused))
        elif fetcher.repaired:
            log.error("the layer %s: %s", layer.diff_id, _REPAIRED)
            self._talks.tell(News("repaired", layer.diff_id, _REPAIRED))

    def _failed(self, diff_id: Digest, error: StoreError, reading: Reading) -> None:
        kind: protocol.Kind = "attack" if isinstance(error, DigestMismatch) else "failed"
        log.log(logging.ERROR if kind == "attack" else logging.WARNING, "%s", error.sentence)
        self._talks.tell(News(kind, diff_id, error.sentence, reading.offset, reading.pid))

    # --- requests ----------------------------------------------------------------------

    async def _answer(self, request: Request) -> Answer:
        try:
            match request:
                case Open(diff_id):
                    return await self._device(parse_digest(diff_id))
                case Fetch(diff_id, ranges):
                    await self._fetch(parse_digest(diff_id), ranges)
                case Prefetch(diff_id, ranges):
                    fetcher = await self._open(parse_digest(diff_id))
                    if fetcher is not None:
                        runs = runs_in_order(fetcher.layer.table, ranges)
                        self._nursery.start_soon(self._prefetch, fetcher, runs)
                case Configure(config):
                    self._use(config)
                    self._filler.wake()
                case End():
                    if self._serving.in_use:
                        raise LayersInUse("layers are in use, so their server goes on")
                    self._nursery.start_soon(self._end)
                case Status():
                    return self._report()
                case Listen():
                    raise AssertionError("answered elsewhere")
        except CtrfsError as error:
            return Failure(error.sentence, error.errno)
        except OSError as error:
            return Failure(f"the layer server failed: {error}", error.errno or errno.EIO)
        return Done()

    async def _device(self, diff_id: Digest) -> Device:
        fetcher = await self._open(diff_id)
        if fetcher is None or fetcher.layer.complete or _all_contents(fetcher):
            return Device()
        return self._serving.device(fetcher)

    async def _fetch(self, diff_id: Digest, ranges: Ranges | None) -> None:
        fetcher = await self._open(diff_id)
        if fetcher is None or fetcher.layer.complete:
            return
        layer = fetcher.layer
        if ranges is not None:
            await fetch_ranges(fetcher, ranges)
            return
        await self._enter(layer)
        while not layer.complete:
            if fetcher.refused:
                raise CorruptContent(fetcher.refused)
            if layer.whole:
                await self._complete(fetcher)  # after which it may lack something
                continue
            await fetch_rest(fetcher)

    def _report(self) -> Report:
        layers: dict[str, tuple[int, int]] = {
            diff_id: (fetcher.layer.fetched, fetcher.layer.record.blob.size)
            for diff_id, fetcher in self._fetchers.items()
        }
        return Report(os.getpid(), self._serving.name, self._why, layers)


def _all_contents(fetcher: Fetcher) -> bool:
    return fetcher.layer.whole and fetcher.layer.record.vouched


def _choose(
    root: Path, run: Path, config: StoreConfig, find: Callable[[str], Fetcher | None]
) -> tuple[Serving, str]:
    """How to serve, and why not in the better way.

    Raises:
        Unsupported: the way that is configured is impossible here.
    """
    method = config.lazy.method
    if method == "fuse":
        return FuseServing(run, find), "the configuration says fuse"
    # Who waits for a server that was here before is served by this way alone, and that nothing can
    # be tried out on a full disk does not matter then.
    found = find_group(run)
    if found is None and method == "fanotify":
        fanotify.require(root)
    elif found is None and (why := _why_not_fanotify(root)) is not None:
        return FuseServing(run, find), why
    return FanotifyServing(run, root / "layers", found), ""


def _why_not_fanotify(root: Path) -> str | None:
    why = fanotify.available(root)
    if why is None and not keeper.holder():
        why = (
            "nothing that can't be killed would hold back readers here; run ctrfs as a service of"
            " systemd, or choose fanotify in the configuration"
        )
    return why


def _patience(config: StoreConfig) -> Patience:
    """As for pulls, but a request that stalls leaves its readers time for another."""
    patience, most = config.patience, config.lazy.read_seconds / _ATTEMPTS
    return msgspec.structs.replace(
        patience,
        read_seconds=min(patience.read_seconds, most),
        connect_seconds=min(patience.connect_seconds, most),
    )
