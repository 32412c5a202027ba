"""Commands that go on when the one who gave them does not wait any more."""

import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import trio

from runtime.errors import ContainerBusy
from store.errors import CtrfsError

log = logging.getLogger(__name__)

_T = TypeVar("_T")


class Background:
    """Tasks that belong to the daemon, not to a request.

    Args:
        nursery: ends them when it is cancelled.
    """

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery

    def start_soon(self, function: Callable[..., Awaitable[Any]], *arguments: object) -> None:
        """Run ``function`` for as long as it takes. If it fails, that is logged."""

        async def task() -> None:
            try:
                await function(*arguments)
            except CtrfsError as error:
                log.error("%s", error)
            except Exception:
                log.exception("%s failed unexpectedly", function)

        self._nursery.start_soon(task)

    async def run(self, function: Callable[[], Awaitable[_T]]) -> _T:
        """Run ``function`` and wait for it. When the waiting is cancelled, it goes on.

        Raises:
            ContainerBusy: the daemon is ending.
        """
        results: list[_T] = []
        failures: list[Exception] = []
        ended = trio.Event()
        waiting = True

        async def task() -> None:
            try:
                results.append(await function())
            except CtrfsError as error:
                failures.append(error)
                if not waiting:
                    log.warning("a command nobody waits for any more failed: %s", error)
            except Exception as error:
                failures.append(error)
                if not waiting:
                    log.exception("a command failed unexpectedly")
            finally:
                ended.set()

        self._nursery.start_soon(task)
        try:
            await ended.wait()
        finally:
            waiting = False
        if failures:
            raise failures[0]
        if not results:
            raise ContainerBusy("the daemon is ending; containers run on")
        return results[0]
