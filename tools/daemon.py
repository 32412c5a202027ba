"""The process behind a mount: opens the store and the runtime, and serves the tree."""

import logging
import signal
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

import trio

from fs.automount import Automounts
from fs.config import Config, load
from fs.containers import ContainersDirectory
from fs.context import Context
from fs.failures import Failures
from fs.mount import serve
from fs.root import Root
from runtime import fanotify, features
from runtime.containers import Containers
from runtime.layerserver.client import LayerClient
from runtime.rootfs import Rootfs
from store.events import EventLog
from store.indexing import Indexer
from store.pull import Pulls
from store.store import Store
from tools import layers
from tools.options import Options

log = logging.getLogger(__name__)

# What the kernel has read ahead it forgets as well, so not all the time.
_RELEASE_SECONDS = 2.0


def run(options: Options, ready: Callable[[], None], level: str, *, background: bool) -> None:
    """Serve the tree at ``options.mountpoint`` until SIGTERM or SIGINT, or until it is
    unmounted. Containers run on when it ends.

    Args:
        options: where state and mount are.
        ready: called once the mount answers.
        level: the least that the layer server logs.
        background: whether it logs where background daemons do.

    Raises:
        CtrfsError: the configuration or the state cannot be used.
    """
    config = load(options.config)
    events = EventLog()

    async def serve() -> None:
        store = await trio.to_thread.run_sync(Store, options.root, config.store, events)
        client = layers.client(options, store, level, background=background)
        await _serve(options, config, store, client, ready, background=background)

    trio.run(serve)


async def _serve(
    options: Options,
    config: Config,
    store: Store,
    client: LayerClient,
    ready: Callable[[], None],
    *,
    background: bool,
) -> None:
    rootfs = await trio.to_thread.run_sync(
        Rootfs, options.run, None, lambda diff_id: trio.from_thread.run(client.device, diff_id)
    )
    containers = Containers(
        store, rootfs, config.runtime, options.root, options.run, lambda: client.held
    )
    indexer = Indexer(store)
    mountpoint = str(options.mountpoint)
    automounts = Automounts(mountpoint)
    failures = Failures()
    starting = ExitStack()
    try:
        starting.enter_context(store.ballast.dropped())
        if config.store.lazy.method == "fanotify":  # else its server would fail again and again
            await trio.to_thread.run_sync(fanotify.require, options.root)
        async with trio.open_nursery() as nursery, containers.opened():
            follower = layers.Follower(
                store, rootfs, containers, automounts, failures, nursery, client
            )
            # It takes as long to come up as the rest does.
            nursery.start_soon(client.follow, follower.heard, follower.restarted)
            context = Context(
                store=store,
                pulls=Pulls(store, client, indexer),
                containers=containers,
                rootfs=rootfs,
                layers=client,
                failures=failures,
                automounts=automounts,
                config=config,
                info=await trio.to_thread.run_sync(
                    features.report, config.runtime, options.root, config.store.lazy.method
                ),
            )
            if config.store.lazy.mode == "lazy":
                expect = partial(store.layers.expect_lazy, silent=background)
                await trio.to_thread.run_sync(expect)
            nursery.start_soon(indexer.run)
            nursery.start_soon(_release_copies, rootfs)
            await client.wait_until_up()
            starting.close()
            stop = trio.Event()
            nursery.start_soon(_stop_on_signal, stop)
            root = Root(context)
            follow = ContainersDirectory(root).follow
            await serve(root, mountpoint, failures, automounts, ready, stop, follow)
            nursery.cancel_scope.cancel()
    finally:
        starting.close()
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(rootfs.close)
            await client.end()
            await trio.to_thread.run_sync(store.close)


async def _release_copies(rootfs: Rootfs) -> None:
    while True:
        await trio.sleep(_RELEASE_SECONDS)
        await trio.to_thread.run_sync(rootfs.release_copies)


async def _stop_on_signal(stop: trio.Event) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for number in signals:
            log.info("%s: unmounting; containers run on", signal.Signals(number).name)
            stop.set()
