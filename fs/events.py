"""Listening to what happens in the store and the runtime."""

from fs.nodes import Source
from fs.wakeup import Wakeup
from store.events import EventLog


class EventSource(Source):
    """The events from the moment on when it is made."""

    def __init__(self, events: EventLog) -> None:
        self._events = events
        self._next = events.next_seq
        self._wakeup = Wakeup()
        self._stop = events.listen(self._wakeup.ring)

    def take(self) -> bytes | None:
        """Whole lines, or None."""
        lines, self._next = self._events.since(self._next)
        return b"".join(lines) or None

    async def ready(self) -> None:
        """Wait for an event."""
        await self._wakeup.wait(lambda: self._events.next_seq > self._next)

    def close(self) -> None:
        """Stop listening."""
        self._stop()
