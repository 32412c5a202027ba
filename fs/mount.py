"""Serving a tree at a mountpoint until told to stop."""

import logging
from collections.abc import Callable

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


async def serve(
    root: Directory,
    mountpoint: str,
    failures: Failures,
    automounts: Automounts,
    ready: Callable[[], None],
    stop: trio.Event,
) -> None:
    """Mount the tree, call ``ready``, and serve until ``stop`` is set or it is unmounted.

    Raises:
        RuntimeError: libfuse cannot mount; it has said why on standard error.
    """
    async with trio.open_nursery() as nursery:
        adapter = Adapter(root, failures, automounts, nursery)
        pyfuse3.init(adapter, mountpoint, set(OPTIONS))
        try:
            nursery.start_soon(adapter.interrupts.run)
            nursery.start_soon(automounts.run)
            nursery.start_soon(_main, nursery.cancel_scope)
            ready()
            await stop.wait()
            nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                await automounts.unmount_below("")
            pyfuse3.close()


async def _main(scope: trio.CancelScope) -> None:
    """Handle requests; when the mount is gone, everything ends."""
    await pyfuse3.main(min_tasks=IDLE_TASKS, max_tasks=MAX_REQUESTS)
    scope.cancel()
