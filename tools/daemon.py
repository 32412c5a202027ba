"""The process behind a mount: opens the store and the runtime, and serves the tree."""

import logging
import signal
from collections.abc import Callable

import trio

from fs.automount import Automounts
from fs.config import Config, load
from fs.containers import ContainersDirectory
from fs.context import Context
from fs.failures import Failures
from fs.mount import serve
from fs.root import Root
from runtime import features
from runtime.containers import Containers
from runtime.rootfs import Rootfs
from store.events import EventLog
from store.pull import Pulls
from store.store import Store
from tools.options import Options

log = logging.getLogger(__name__)


def run(options: Options, ready: Callable[[], None]) -> None:
    """Serve the tree at ``options.mountpoint`` until SIGTERM or SIGINT, or until it is
    unmounted. Containers run on when it ends.

    Args:
        options: where state and mount are.
        ready: called once the mount answers.

    Raises:
        CtrfsError: the configuration or the state cannot be used.
    """
    trio.run(_serve, options, load(options.config), ready)


async def _serve(options: Options, config: Config, ready: Callable[[], None]) -> None:
    events = EventLog()
    store = await trio.to_thread.run_sync(Store, options.root, config.store, events)
    rootfs = await trio.to_thread.run_sync(Rootfs, options.run)
    containers = Containers(store, rootfs, config.runtime, options.root, options.run)
    mountpoint = str(options.mountpoint)
    automounts = Automounts(mountpoint)
    failures = Failures()
    try:
        async with trio.open_nursery() as nursery, containers.opened():
            context = Context(
                store=store,
                pulls=Pulls(store),
                containers=containers,
                rootfs=rootfs,
                failures=failures,
                automounts=automounts,
                config=config,
                info=await trio.to_thread.run_sync(features.report, config.runtime),
            )
            stop = trio.Event()
            nursery.start_soon(_stop_on_signal, stop)
            root = Root(context)
            follow = ContainersDirectory(root).follow
            await serve(root, mountpoint, failures, automounts, ready, stop, follow)
            nursery.cancel_scope.cancel()
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(rootfs.close)
            await trio.to_thread.run_sync(store.close)


async def _stop_on_signal(stop: trio.Event) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for number in signals:
            log.info("%s: unmounting; containers run on", signal.Signals(number).name)
            stop.set()
