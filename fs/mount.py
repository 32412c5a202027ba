"""Serving a tree at a mountpoint until told to stop."""

import logging
from collections.abc import Awaitable, Callable
from contextlib import ExitStack

import pyfuse3
import trio

from fs.adapter import MAX_REQUESTS, Adapter
from fs.automount import Automounts
from fs.failures import Failures
from fs.nodes import Directory

log = logging.getLogger(__name__)

# pyfuse3 ends a task that waits for a request when more than this many do, and starts one
# when none does. With its default of 1 nearly every request starts and ends a task, which
# costs a stat(2) 108 µs instead of 59 µs; an idle task costs some kilobytes.
IDLE_TASKS = 10

# The kernel checks owners and modes, for all users.
OPTIONS = frozenset({"default_permissions", "allow_other", "fsname=ctrfs", "subtype=ctrfs"})


Follow = Callable[[Callable[[Directory], None]], Awaitable[None]]


async def serve(
    root: Directory,
    mountpoint: str,
    failures: Failures,
    automounts: Automounts,
    ready: Callable[[], None],
    stop: trio.Event,
    follow: Follow | None = None,
) -> None:
    """Mount the tree, call ``ready``, and serve until ``stop`` is set or it is unmounted.

    Args:
        root: the tree.
        mountpoint: where.
        failures: what `errors` shows.
        automounts: what is mounted over nodes of the tree.
        ready: called once it is mounted.
        stop: ends it.
        follow: runs as long as the mount, and calls what it is given for each directory
            whose files have changed by themselves.

    Raises:
        RuntimeError: libfuse cannot mount; it has said why on standard error.
    """
    # libfuse's session must last until the last task that answers a request has ended.
    with ExitStack() as stack:
        async with trio.open_nursery() as nursery:
            adapter = Adapter(root, failures, automounts, nursery)
            pyfuse3.init(adapter, mountpoint, set(OPTIONS))
            # Detaches (MNT_DETACH) the tree with what is still mounted in it.
            stack.callback(pyfuse3.close)
            nursery.start_soon(adapter.interrupts.run)
            nursery.start_soon(automounts.run)
            if follow is not None:
                nursery.start_soon(follow, adapter.changed)
            nursery.start_soon(_main, nursery.cancel_scope)
            ready()
            await stop.wait()
            # The way to what is mounted in the tree leads through the tree: it must be served
            # until those mounts are gone.
            await automounts.unmount_below("")
            nursery.cancel_scope.cancel()


async def _main(scope: trio.CancelScope) -> None:
    """Handle requests; when the mount is gone, everything ends."""
    await pyfuse3.main(min_tasks=IDLE_TASKS, max_tasks=MAX_REQUESTS)
    scope.cancel()
