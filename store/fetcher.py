"""Bringing the missing spans of a layer here: once each, and for everybody who waits.

Requests run in tasks of their own, since several readers may want what one of them brings;
the bytes are received, verified and written in a thread per request, and each span can be read
as soon as its own bytes are here.
"""

import logging
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import trio

from store.cas import Digest
from store.config import LazyConfig
from store.errors import (
    ConnectionLost,
    DigestMismatch,
    RegistryError,
    RegistryTimeout,
    StoreError,
)
from store.lazy import LazyLayer
from store.lender import Lender
from store.readahead import ReadAhead
from store.source import BlobStream, Source
from store.transfer import interruptible

log = logging.getLogger(__name__)

# Between attempts: soon enough that a registry which restarts is hardly noticed, doubled so that
# one that is down is not asked all the time.
_PAUSE_SECONDS = 0.1
_PAUSE_MAX_SECONDS = 5.0


class Slots:
    """Who may send requests: readers first.

    Args:
        count: requests under way at once for readers.
    """

    def __init__(self, count: int) -> None:
        self.readers = trio.CapacityLimiter(count)
        self.last_read = -math.inf

    def used(self) -> None:
        """A reader waits, or did just now."""
        self.last_read = trio.current_time()

    def idle_for(self) -> float:
        """Seconds since a reader last waited; 0 while one does."""
        return 0.0 if self.readers.borrowed_tokens else trio.current_time() - self.last_read


@dataclass(slots=True)
class _Pending:
    """A span that is on its way."""

    arrived: trio.Event = field(default_factory=trio.Event)
    error: StoreError | None = None


class Fetcher:
    """Fetches for one layer.

    Args:
        layer: where the bytes go.
        source: where they come from.
        nursery: runs the requests.
        slots: shared by all layers.
        lender: gives the layer what other layers have.
        config: how long to wait.
        failed: told about each failure that a reader sees.
        whole: called when the last missing span has come.

    Attributes:
        doubted: the whole blob was found wrong once, and some of it fetched again.
        refused: why the blob was found wrong for good; empty if it was not.
    """

    def __init__(
        self,
        layer: LazyLayer,
        source: Source,
        nursery: trio.Nursery,
        slots: Slots,
        lender: Lender,
        config: LazyConfig,
        failed: Callable[[Digest, StoreError], None],
        whole: Callable[[], None],
    ) -> None:
        self.layer = layer
        self.doubted = False
        self.refused = ""
        self._source = source
        self._nursery = nursery
        self._slots = slots
        self._lender = lender
        self._config = config
        self._failed = failed
        self._whole = whole
        self._pending: dict[int, _Pending] = {}
        self._ahead = ReadAhead(layer.table, layer.has)
        self._token = trio.lowlevel.current_trio_token()

    # --- for readers -------------------------------------------------------------------

    async def read(self, offset: int, length: int) -> bytes:
        """Bytes of the data file, fetched if they are not here.

        Raises:
            StoreError: they can't be had within the time that readers wait.
        """
        layer = self.layer
        if not layer.complete:
            await self.need(layer.table.spans_for(offset, length))
        return layer.read(offset, length)

    async def need(self, spans: range) -> None:
        """Wait until spans are here. Raises as ``read``."""
        missing = self.want(spans)
        if missing:
            try:
                await self._patiently(missing)
            finally:
                self._slots.used()

    def want(self, spans: range) -> list[int]:
        """Somebody reads spans: ask for what is missing of them, which is given back, and for
        what will be read next."""
        if not spans:
            return []
        missing = [number for number in spans if not self.layer.has(number)]
        ahead = self._ahead.advance(spans[0], spans[-1])
        if missing:
            self._slots.used()
            # One request for both where they meet.
            last = ahead[-1] if ahead and ahead[0] <= spans[-1] + 1 else missing[-1]
            self._request(range(missing[0], last + 1), self._slots.readers)
        if ahead:
            self._request(ahead, self._slots.readers)
        return missing

    async def _patiently(self, missing: list[int]) -> None:
        deadline = trio.current_time() + self._config.read_seconds
        pause = _PAUSE_SECONDS
        while True:
            try:
                with trio.fail_at(deadline):
                    await self._arrival(missing)
                return
            except trio.TooSlowError:
                error: StoreError = RegistryTimeout(
                    f"bytes of the layer {self.layer.record.blob.digest} did not come within "
                    f"{self._config.read_seconds:.0f} seconds; see whether the registry answers"
                )
                self._failed(self.layer.diff_id, error)
                raise error from None
            except RegistryError as failure:
                error = failure
            except StoreError as failure:
                self._failed(self.layer.diff_id, failure)
                raise
            if not error.transient or trio.current_time() + pause > deadline:
                self._failed(self.layer.diff_id, error)
                raise error
            await trio.sleep(max(pause, min(error.retry_after, _PAUSE_MAX_SECONDS)))
            pause = min(2 * pause, _PAUSE_MAX_SECONDS)

    async def _arrival(self, missing: list[int]) -> None:
        for number in missing:
            while not self.layer.has(number):
                pending = self._pending.get(number)
                if pending is None:
                    self._request(range(number, missing[-1] + 1), self._slots.readers)
                    pending = self._pending[number]
                await pending.arrived.wait()
                if pending.error is not None:
                    raise pending.error

    # --- for whoever fills -------------------------------------------------------------

    async def bring(self, spans: range, limiter: trio.CapacityLimiter) -> None:
        """Fetch what is missing of ``spans``, once, without patience.

        Raises:
            StoreError: it failed.
        """
        waiting = self._request(spans, limiter)
        for number in spans:
            pending = self._pending.get(number)
            if pending is not None and pending not in waiting:
                waiting.append(pending)
        for pending in waiting:
            await pending.arrived.wait()
            if pending.error is not None:
                raise pending.error

    # --- requests ----------------------------------------------------------------------

    def _request(self, spans: range, limiter: trio.CapacityLimiter) -> list[_Pending]:
        """Ask for what is neither here nor on its way, in as few requests as possible; what is
        waited for then."""
        started: list[_Pending] = []
        run: dict[int, _Pending] = {}
        for number in spans:
            if not self.layer.has(number) and number not in self._pending:
                run[number] = self._pending[number] = _Pending()
                started.append(run[number])
            elif run:
                self._nursery.start_soon(self._run, run, limiter)
                run = {}
        if run:
            self._nursery.start_soon(self._run, run, limiter)
        return started

    async def _run(self, wanted: dict[int, _Pending], limiter: trio.CapacityLimiter) -> None:
        """One request: for spans without a gap, and for what comes unasked for from a registry
        that sends whole blobs, which is added."""
        error: StoreError | None = None
        numbers = list(wanted)
        try:
            async with limiter:
                await self._transfer(range(numbers[0], numbers[-1] + 1), wanted)
        except StoreError as failure:
            error = failure
            log.debug("%s: %s", self.layer.diff_id, failure.sentence)
        except OSError as failure:
            error = StoreError(f"a layer can't be fetched: {failure}", errno=failure.errno)
        finally:
            for number, pending in wanted.items():
                # Another request may have the span by now, if it was forgotten again.
                if self._pending.get(number) is pending:
                    self._settle(number, error)

    def _promise(self, spans: range) -> dict[int, _Pending]:
        """Note that spans are on their way; those that were not."""
        fresh = [n for n in spans if n not in self._pending and not self.layer.has(n)]
        promised = {number: _Pending() for number in fresh}
        self._pending.update(promised)
        return promised

    def _settle(self, number: int, error: StoreError | None) -> None:
        pending = self._pending.pop(number, None)
        if pending is not None:
            if not self.layer.has(number):
                pending.error = error or ConnectionLost("a request was given up")
            pending.arrived.set()
            if not self._pending and self.layer.whole:
                self._whole()

    async def _transfer(self, spans: range, pending: dict[int, _Pending]) -> None:
        gone = threading.Event()
        streams: list[BlobStream] = []

        def interrupt() -> None:
            gone.set()
            for stream in streams:
                stream.abort()

        def promise(more: range) -> None:
            pending.update(trio.from_thread.run_sync(self._promise, more))

        def work() -> None:
            for wanted in self._without_borrowed(spans):
                start = self.layer.table.range_of(wanted[0])[0]
                end = self.layer.table.range_of(wanted[-1])[1]
                stream = self._source.open_blob(self.layer.record.blob, start, end - start)
                streams.append(stream)
                try:
                    if not gone.is_set():
                        _Intake(self.layer, stream, wanted, self._landed, promise).run()
                finally:
                    stream.close()

        await interruptible(work, interrupt)

    def _without_borrowed(self, spans: range) -> Iterator[range]:
        """What is left to ask a registry for after what other layers have."""
        # What was borrowed may have been what was wrong.
        if self.doubted or not self._lender.can_lend(self.layer):
            yield spans
            return
        first: int | None = None
        for number in spans:
            if self._lender.lend(self.layer, number):
                self._landed([number])
                if first is not None:
                    yield range(first, number)
                    first = None
            elif first is None:
                first = number
        if first is not None:
            yield range(first, spans[-1] + 1)

    def _landed(self, numbers: list[int]) -> None:
        """From the thread of a request."""
        self._token.run_sync_soon(self._wake, numbers)

    def _wake(self, numbers: list[int]) -> None:
        for number in numbers:
            if self.layer.has(number):  # it may have been forgotten since
                self._settle(number, None)


class _Intake:
    """The answer to one request, taken in span by span, in a thread.

    A registry that can't begin in the middle sends the whole blob: then all of it is taken.
    """

    def __init__(
        self,
        layer: LazyLayer,
        stream: BlobStream,
        wanted: range,
        landed: Callable[[list[int]], None],
        promise: Callable[[range], None],
    ) -> None:
        table = layer.table
        self._layer = layer
        self._stream = stream
        self._landed = landed
        self._number = table.span_at(stream.offset)
        asked = stream.offset == table.range_of(wanted[0])[0]
        self._stop = wanted[-1] + 1 if asked else table.spans
        if not asked:
            promise(range(self._number, table.spans))
        self._buffer = bytearray()
        self._offset = stream.offset  # of what comes next in the blob
        self._error: DigestMismatch | None = None

    def run(self) -> None:
        """Raises StoreError: the first wrong span, or a stream that ended early."""
        while self._number < self._stop:
            piece = self._stream.read()
            if not piece:
                raise self._error or ConnectionLost(
                    f"the registry sent less than it was asked for of "
                    f"{self._layer.record.blob.digest}; try again"
                )
            self._take(memoryview(piece))
        if self._error:
            raise self._error

    def _take(self, piece: memoryview) -> None:
        arrived: list[int] = []
        while piece and self._number < self._stop:
            end = self._layer.table.range_of(self._number)[1]
            part = piece[: end - self._offset]
            piece = piece[len(part) :]
            whole = self._offset + len(part) == end
            if self._add(part, whole):
                arrived.append(self._number)
            self._offset += len(part)
            if whole:
                self._number += 1
        if arrived:
            self._landed(arrived)

    def _add(self, part: memoryview, whole: bool) -> bool:
        """Take a part of the current span; whether it is complete now and right."""
        layer, number = self._layer, self._number
        if layer.has(number):
            return False
        if not layer.table.span(number).count:
            layer.take_raw(self._offset, part)
            if whole:
                layer.arrived(number)
            return whole
        if not whole:
            self._buffer += part
            return False
        try:
            layer.take(number, memoryview(bytes(self._buffer) + part if self._buffer else part))
        except DigestMismatch as error:
            # The others of this answer may be right.
            self._error = self._error or error
            return False
        finally:
            self._buffer.clear()
        return True
