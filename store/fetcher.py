"""Bringing the missing spans of a layer here: once each, and for everybody who waits.

Requests run in tasks of their own, since several readers may want what one of them brings;
the bytes are received, verified and written in a thread per request, and each span can be read
as soon as its own bytes are here.

Of a layer whose spans are inflated in order there is one request at a time, which begins with the
first span that is missing, whatever somebody reads.
"""

import logging
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, closing, nullcontext
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
from store.intake import Intake
from store.lazy import LazyLayer
from store.lender import Borrower, Lender
from store.priority import Nicely
from store.readahead import ReadAhead
from store.source import BlobStream, Source
from store.transfer import interruptible

log = logging.getLogger(__name__)

# Between attempts: soon enough that a registry which restarts is hardly noticed, doubled so that
# one that is down is not asked all the time.
_PAUSE_SECONDS = 0.1
_PAUSE_MAX_SECONDS = 5.0

# Readers come in bursts: who has read a moment ago will read again, and a program that starts
# pauses to compute. What it needs first must not have to share the line, nor the processor.
_QUIET_SECONDS = 1.0

# The kernel tries what it read ahead in vain again at once, page by page. The reader has waited
# already.
AGAIN_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Reading:
    """Somebody reads from ``offset`` in the data file; ``pid`` is 0 if it is not known who."""

    offset: int
    pid: int = 0


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

    @property
    def is_quiet(self) -> bool:
        """Whether no reader has waited for a second."""
        return self.idle_for() >= _QUIET_SECONDS

    async def quiet(self) -> None:
        """Return when no reader has waited for a second."""
        while (left := _QUIET_SECONDS - self.idle_for()) > 0:  # noqa: ASYNC110
            await trio.sleep(left)


@dataclass(slots=True)
class _Failure:
    """Processes have waited in vain: those that were ``told``."""

    until: float
    error: StoreError
    told: set[int]


class _GivenUp:
    """The spans that readers waited for in vain a moment ago."""

    def __init__(self) -> None:
        self._failures: dict[int, _Failure] = {}

    def add(self, spans: Sequence[int], error: StoreError, pid: int) -> None:
        """A process has waited for these."""
        now = trio.current_time()
        self._failures = {
            n: failure for n, failure in self._failures.items() if failure.until > now
        }
        told = {pid}.union(*(self._failures[n].told for n in spans if n in self._failures))
        failure = _Failure(now + AGAIN_SECONDS, error, told)
        self._failures.update(dict.fromkeys(spans, failure))

    def find(self, spans: Iterable[int]) -> _Failure | None:
        """Why one of these need not be waited for."""
        now = trio.current_time()
        found = (self._failures.get(number) for number in spans)
        return next((failure for failure in found if failure and now < failure.until), None)


@dataclass(slots=True)
class _Pending:
    """A span that is on its way; ``pace`` is that of what brings it."""

    pace: Nicely
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
        failed: told about each failure that a reader sees, and about all wrong bytes.
        whole: called when the last missing span has come.

    Attributes:
        doubts: so often was the whole blob found wrong, and some of it has to come again.
        repaired: whether contents on the disk were found wrong and written again; None before they
            were compared with a right blob.
        fillable: the rest may come by itself: it is known by now what other layers have of it.
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
        failed: Callable[[Digest, StoreError, Reading], None],
        whole: Callable[[], None],
    ) -> None:
        self.layer = layer
        self.doubts = 0
        self.repaired: bool | None = None
        self.fillable = False
        self.refused = ""
        self._source = source
        self._nursery = nursery
        self._slots = slots
        self._lender = lender
        self._config = config
        self._failed = failed
        self._whole = whole
        self._pending: dict[int, _Pending] = {}
        self._given_up = _GivenUp()
        self._moved = 0  # rises whenever bytes come
        self._ahead = ReadAhead(layer.table, layer.has)
        self._turn: AbstractAsyncContextManager[object] = (
            trio.Lock() if layer.table.in_order else nullcontext()
        )
        self._token = trio.lowlevel.current_trio_token()

    @property
    def borrows(self) -> bool:
        """Whether bytes of the blob are taken from other layers: not any more when that may be what
        made it wrong."""
        return not self.doubts

    # --- for readers -------------------------------------------------------------------

    async def read(self, offset: int, length: int) -> bytes:
        """Bytes of the data file, fetched if they are not here. Raises as ``wait``."""
        layer = self.layer
        if not layer.complete:
            missing = self.want(layer.table.spans_for(offset, length))
            if missing:
                await self.wait(missing, Reading(offset))
        return layer.read(offset, length)

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

    async def wait(self, missing: Sequence[int], reading: Reading) -> None:
        """Wait as a reader for spans that ``want`` gave back.

        Raises:
            StoreError: they can't be had within the time that readers wait, or could not a moment
                ago.
        """
        known = self._given_up.find(missing)
        if known is not None and reading.pid in known.told:
            raise known.error
        try:
            if self.layer.table.in_order:
                await self._need_all(missing, False, lambda: self.layer.fetched)
            else:
                await self._need(missing)
        except StoreError as error:
            self._given_up.add(missing, error, reading.pid)
            self._failed(self.layer.diff_id, error, reading)
            raise

    # --- for whoever fills -------------------------------------------------------------

    async def fetch(self, spans: range, *, blob: bool = False) -> None:
        """Wait until spans are here, as long as something comes of the layer.

        Args:
            blob: the blob's bytes are wanted as well as the contents.

        Raises:
            StoreError: nothing came within the time that readers wait.
        """
        try:
            await self._need_all(spans, blob, lambda: self._moved)
        except DigestMismatch as error:
            # The others of the request have come.
            wrong = next((n for n in spans if not self.layer.has(n)), spans[0])
            self._failed(self.layer.diff_id, error, Reading(self._place(wrong)))
            raise

    async def bring(
        self, spans: range, limiter: trio.CapacityLimiter, *, blob: bool = False
    ) -> None:
        """Fetch what is missing of ``spans``, once, without patience.

        Args:
            blob: as for ``fetch``.

        Raises:
            StoreError: it failed.
        """
        self._request(spans, limiter, blob=blob)
        waiting = [(number, self._pending[number]) for number in spans if number in self._pending]
        for number, pending in waiting:
            await pending.arrived.wait()
            if isinstance(pending.error, DigestMismatch):
                self._failed(self.layer.diff_id, pending.error, Reading(self._place(number)))
            if pending.error is not None:
                raise pending.error

    def _place(self, number: int) -> int:
        """Where in the data file a span's contents begin."""
        span = self.layer.table.span(number)
        return self.layer.table.piece(span.first).target if span.count else 0

    # --- waiting -----------------------------------------------------------------------

    async def _need(self, spans: Sequence[int], *, blob: bool = False) -> None:
        """Wait as long as readers do."""
        self._slots.used()
        try:
            with trio.fail_after(self._config.read_seconds):
                await self._patiently(spans, blob)
        except trio.TooSlowError:
            raise RegistryTimeout(
                f"bytes of the layer {self.layer.record.blob.digest} did not come within "
                f"{self._config.read_seconds:.0f} seconds; see whether the registry answers"
            ) from None
        finally:
            self._slots.used()

    async def _need_all(
        self, spans: Sequence[int], blob: bool, progress: Callable[[], int]
    ) -> None:
        """Wait for what a slow line may take long for: anew as long as ``progress`` is made."""
        while True:
            before = progress()
            try:
                return await self._need(spans, blob=blob)
            except RegistryError as error:
                if not error.transient or progress() == before:
                    raise

    async def _patiently(self, spans: Sequence[int], blob: bool) -> None:
        pause = _PAUSE_SECONDS
        while True:
            try:
                return await self._arrival(spans, blob)
            except RegistryError as error:
                left = trio.current_effective_deadline() - trio.current_time()
                if not error.transient or left < _PAUSE_SECONDS:
                    raise
                rest = max(pause, min(error.retry_after, _PAUSE_MAX_SECONDS))
            # Until the very end: it may be well again by then.
            await trio.sleep(min(rest, left / 2))
            pause = min(2 * pause, _PAUSE_MAX_SECONDS)

    async def _arrival(self, spans: Sequence[int], blob: bool) -> None:
        is_here = self._is_here(blob)
        for number in spans:
            while not is_here(number):
                pending = self._pending.get(number)
                if pending is None:
                    self._request(range(number, spans[-1] + 1), self._slots.readers, blob=blob)
                    pending = self._pending[number]
                pending.pace.hurry()
                await pending.arrived.wait()
                if pending.error is not None:
                    raise pending.error

    # --- requests ----------------------------------------------------------------------

    def _is_here(self, blob: bool) -> Callable[[int], bool]:
        return self.layer.keeps if blob else self.layer.has

    def _request(self, spans: range, limiter: trio.CapacityLimiter, *, blob: bool = False) -> None:
        """Ask for what is neither here nor on its way, in as few requests as possible."""
        spans = self._needed(spans)
        is_here = self._is_here(blob)
        run: dict[int, _Pending] = {}
        pace = self._pace(limiter)
        for number in spans:
            if not is_here(number) and number not in self._pending:
                run[number] = self._pending[number] = _Pending(pace)
            elif run:
                self._nursery.start_soon(self._run, run, limiter, blob, pace)
                run, pace = {}, self._pace(limiter)
        if run:
            self._nursery.start_soon(self._run, run, limiter, blob, pace)

    def _pace(self, limiter: trio.CapacityLimiter) -> Nicely:
        """For one request: readers wait for theirs from the beginning."""
        pace = Nicely()
        if limiter is self._slots.readers:
            pace.hurry()
        return pace

    async def _run(
        self, wanted: dict[int, _Pending], limiter: trio.CapacityLimiter, blob: bool, pace: Nicely
    ) -> None:
        """One request: for spans without a gap, and for what comes unasked for from a registry
        that sends whole blobs, which is added."""
        error: StoreError | None = None
        numbers = list(wanted)
        try:
            async with self._turn, limiter:
                await self._transfer(range(numbers[0], numbers[-1] + 1), wanted, blob, pace)
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

    def _needed(self, spans: range) -> range:
        """The spans that have to come if these are wanted."""
        if self.layer.table.in_order:
            return range(self.layer.next_absent(0), spans.stop)
        return spans

    def _promise(self, spans: range, pace: Nicely) -> dict[int, _Pending]:
        """Note that spans are on their way; those that were not."""
        fresh = [n for n in spans if n not in self._pending and not self.layer.keeps(n)]
        promised = {number: _Pending(pace) for number in fresh}
        self._pending.update(promised)
        return promised

    def _settle(self, number: int, error: StoreError | None) -> None:
        pending = self._pending.pop(number, None)
        if pending is not None:
            if not self.layer.has(number):
                pending.error = error or ConnectionLost("a request was given up")
            elif not self.layer.keeps(number):
                pending.error = error
            pending.arrived.set()
            if not self._pending and self.layer.whole:
                self._whole()

    async def _transfer(
        self,
        spans: range,
        pending: dict[int, _Pending],
        blob: bool,
        pace: Nicely,
    ) -> None:
        gone = threading.Event()
        streams: list[BlobStream] = []

        def interrupt() -> None:
            gone.set()
            for stream in streams:
                stream.abort()

        def promise(more: range) -> None:
            pending.update(trio.from_thread.run_sync(self._promise, more, pace))

        def moved() -> None:
            self._moved += 1

        def work() -> None:
            with pace:
                bring()

        def bring() -> None:
            for wanted in self._without_borrowed(self._needed(spans), blob):
                start = self.layer.table.range_of(wanted[0])[0]
                end = self.layer.table.range_of(wanted[-1])[1]
                stream = self._source.open_blob(self.layer.record.blob, start, end - start)
                streams.append(stream)
                try:
                    if not gone.is_set():
                        Intake(self.layer, stream, wanted, self._landed, promise, moved).run()
                finally:
                    stream.close()

        await interruptible(work, interrupt)

    def _without_borrowed(self, spans: range, blob: bool) -> Iterator[range]:
        """What is left to ask a registry for after what other layers have. A little of that is
        fetched all the same where a request would have to be cut for it."""
        if (blob and not self.borrows) or not self._lender.can_lend(self.layer):
            if spans:
                yield spans
            return
        run = range(0)
        with closing(self._lender.borrower(self.layer)) as borrower:
            for number in spans:
                if self._borrow(borrower, number, blob):
                    self._landed([number])
                elif run and self.layer.table.are_close(run[-1], number):
                    run = range(run.start, number + 1)
                else:
                    if run:
                        yield run
                    run = range(number, number + 1)
        if run:
            yield run

    def _borrow(self, borrower: Borrower, number: int, blob: bool) -> bool:
        """Take from other layers what they have of a span; whether that is enough."""
        if self.borrows and borrower.take(number):
            return True
        return not blob and borrower.take_contents(number)

    def _landed(self, numbers: list[int]) -> None:
        """From the thread of a request."""
        self._token.run_sync_soon(self._wake, numbers)

    def _wake(self, numbers: list[int]) -> None:
        for number in numbers:
            if self.layer.has(number):  # it may have been forgotten since
                self._settle(number, None)
