"""Waking a trio task from any thread."""

from collections.abc import Callable

import trio


class Wakeup:
    """A bell that any thread may ring and tasks of one trio run wait for."""

    def __init__(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._event = trio.Event()

    def ring(self) -> None:
        """Wake all who wait. Harmless when the run is over."""
        try:
            self._token.run_sync_soon(self._wake, idempotent=True)
        except trio.RunFinishedError:
            return

    def _wake(self) -> None:
        self._event.set()
        self._event = trio.Event()

    async def wait(self, condition: Callable[[], bool]) -> None:
        """Return when the condition holds, looking at each ring."""
        while not condition():
            await self._event.wait()
