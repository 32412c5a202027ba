"""Bringing the rest of all layers here while no reader waits, and verifying whole ones."""

import logging
import os
import time
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path

import trio

from store.errors import DigestMismatch, StoreError, storage
from store.fetcher import Fetcher, Slots
from store.lazy import is_wanted
from store.spans import SpanTable

log = logging.getLogger(__name__)

# A request that a reader has to share the line with should last no longer than this …
_REQUEST_SECONDS = 0.25
# … within these sizes: below, requests cost more than bytes; above, nothing is gained.
_LEAST, _MOST = 256 << 10, 8 << 20
# After a failure: the registry is away, and nobody waits.
_RETRY_SECONDS = 5.0
# After wrong bytes: who sends them may do so for long, and each is reported.
_RETRY_WRONG_SECONDS = 60.0
# Bytes that filling leaves free, or a twentieth of a small disk.
_RESERVE = 256 << 20


class Filler:
    """Fills layers one after another.

    Args:
        fetchers: the layers, asked anew each time.
        slots: tells whether readers wait.
        complete: called for a layer of which everything is here.

    Attributes:
        fill: whether to fetch; whole layers are completed in any case.
        rate: bytes a second at most, or None.
    """

    def __init__(
        self,
        fetchers: Callable[[], Iterable[Fetcher]],
        slots: Slots,
        complete: Callable[[Fetcher], Awaitable[None]],
    ) -> None:
        self.fill = True
        self.rate: int | None = None
        self._fetchers = fetchers
        self._slots = slots
        self._complete = complete
        self._limiter = trio.CapacityLimiter(1)
        self._length = _LEAST
        self._resting: dict[Fetcher, float] = {}
        self._changed = trio.Event()

    def wake(self) -> None:
        """There may be something to do."""
        self._changed.set()

    async def run(self) -> None:
        """Fill and complete until cancelled."""
        while True:
            fetcher = self._choose()
            if fetcher is None:
                self._changed = trio.Event()
                with trio.move_on_after(_RETRY_SECONDS):
                    await self._changed.wait()
            elif not self._slots.is_quiet:
                await self._slots.quiet()
            elif fetcher.layer.whole:
                await self._complete(fetcher)
            else:
                await self._step(fetcher)

    def _choose(self) -> Fetcher | None:
        """The next layer that lacks something and did not fail just now."""
        now = trio.current_time()
        for fetcher in self._fetchers():
            if fetcher.layer.complete or fetcher.refused:
                continue
            if fetcher.layer.whole or (self.fill and self._may_fill(fetcher, now)):
                return fetcher
        return None

    def _may_fill(self, fetcher: Fetcher, now: float) -> bool:
        """Whether some image has a layer, which did not fail just now."""
        if not fetcher.fillable or self._resting.get(fetcher, now) > now:
            return False
        return is_wanted(fetcher.layer.directory)

    async def _step(self, fetcher: Fetcher) -> None:
        begin = time.monotonic()
        try:
            count = await self._bring(fetcher)
        except StoreError as error:
            log.info("filling %s: %s", fetcher.layer.diff_id, error.sentence)
            wrong = isinstance(error, DigestMismatch)
            self._rest(fetcher, _RETRY_WRONG_SECONDS if wrong else _RETRY_SECONDS)
            return
        if not count:  # the disk is full
            self._rest(fetcher, _RETRY_SECONDS)
            return
        seconds = time.monotonic() - begin
        wanted = count / max(seconds, 0.001) * _REQUEST_SECONDS
        self._length = int(max(_LEAST, min(_MOST, wanted, 2 * self._length)))
        if self.rate:
            await trio.sleep(max(0.0, count / self.rate - seconds))

    def _rest(self, fetcher: Fetcher, seconds: float) -> None:
        self._resting[fetcher] = trio.current_time() + seconds

    async def _bring(self, fetcher: Fetcher) -> int:
        """Fetch the next missing bytes for which the disk has room; how many they were."""
        layer, table = fetcher.layer, fetcher.layer.table
        first = layer.next_absent(0)
        start = table.range_of(first)[0]
        length = min(self._length, self.rate or self._length)
        stop = min(table.stop_at(start + length), layer.next_present(first))
        spans = _fitting(table, range(first, stop), _room(layer.directory))
        if not spans:
            return 0
        await fetcher.bring(spans, self._limiter, blob=True)
        return table.range_of(spans[-1])[1] - start


def _room(directory: Path) -> int:
    """Bytes of the disk that neither hold anything nor are left to readers and containers. Raises
    StorageFailed."""
    with storage(f"looking at the disk of {directory}"):
        disk = os.statvfs(directory)
    reserve = min(_RESERVE, disk.f_blocks * disk.f_frsize // 20)
    return disk.f_bavail * disk.f_frsize - reserve


def _fitting(table: SpanTable, spans: range, room: int) -> range:
    """The first of these spans: as many as there is room for, with what comes out of them."""
    for number in spans:
        span = table.span(number)
        room -= span.end - span.start + span.size
        if room < 0:
            return range(spans.start, number)
    return spans
