"""One layer on its way from a source into the store.

Two threads work on it: one receives, hashes the blob and writes it to the store's
content; the other unpacks the same bytes into the layer. Both end with the task that
started them, whatever happens: a cancelled task shuts the connection and breaks the pipe,
which wakes up whoever waits.
"""

import logging
import math
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import outcome
import trio

from store.cas import CHUNK, Cas, Digest, Writer
from store.config import Patience
from store.errors import (
    BlobNotFound,
    CorruptContent,
    DigestMismatch,
    InvalidLayer,
    PullCancelled,
    RegistryError,
    StoreError,
)
from store.layers import Layers
from store.manifest import Descriptor
from store.progress import LayerProgress
from store.source import BlobStream, Source
from store.transport import pause_before

log = logging.getLogger(__name__)

# Bytes between the two threads: enough that neither waits for a hiccup of the other, and
# little against what unpacking holds anyway.
PIPE_BYTES = 8 << 20

# A connection that brought this much before it broke was worth it: attempts are counted
# anew. Less would let a hostile registry keep us busy for ever at no cost.
PROGRESS = 1 << 20

_T = TypeVar("_T")

# Transfers have slots, which bound their threads; what trio's limiter for everything else
# would bound is the number of control files that can be used meanwhile.
_threads = trio.CapacityLimiter(math.inf)


async def ask(work: Callable[[], _T]) -> _T:
    """Run a question to a source in a thread. A cancelled caller leaves it there: it ends at
    its timeout and changes nothing."""
    return await trio.to_thread.run_sync(work, abandon_on_cancel=True, limiter=_threads)


async def to_end(work: Callable[[], _T]) -> _T:
    """Run something short in a thread, to its end."""
    return await trio.to_thread.run_sync(work, limiter=_threads)


async def side_by_side(tasks: Iterable[Callable[[], Awaitable[None]]]) -> None:
    """Run tasks until all have ended; the first StoreError ends the others, and is raised."""
    failure: StoreError | None = None

    async def run(task: Callable[[], Awaitable[None]]) -> None:
        nonlocal failure
        try:
            await task()
        except StoreError as error:
            failure = failure or error
            nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        for task in tasks:
            nursery.start_soon(run, task)
    if failure is not None:
        raise failure


async def interruptible(work: Callable[[], _T], interrupt: Callable[[], None]) -> _T:
    """Run ``work`` in a thread, to its end. When the caller is cancelled meanwhile,
    ``interrupt()`` is called, which must bring that end about soon."""
    ended = False

    async def watch() -> None:
        try:
            await trio.sleep_forever()
        finally:
            if not ended:
                interrupt()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        result = await trio.to_thread.run_sync(outcome.capture, work, limiter=_threads)
        ended = True
        nursery.cancel_scope.cancel()
    return result.unwrap()


class Pipe:
    """Pieces of bytes from one thread to another, about PIPE_BYTES on the way at most."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._pieces: deque[bytes] = deque()
        self._held = 0
        self._ended = False
        self._broken = False
        self._unwanted = False

    def put(self, piece: bytes) -> None:
        """Hand a piece on; waits while the other side is behind.

        Raises:
            PullCancelled: the pipe was broken.
        """
        with self._changed:
            while self._held >= PIPE_BYTES and not (self._broken or self._unwanted):
                self._changed.wait()
            if self._broken:
                raise PullCancelled("the pull was cancelled")
            if not self._unwanted:
                self._pieces.append(piece)
                self._held += len(piece)
                self._changed.notify_all()

    def end(self) -> None:
        """There is no more."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def leave(self) -> None:
        """Nobody reads any more; what is put from now on is dropped."""
        with self._changed:
            self._unwanted = True
            self._pieces.clear()
            self._changed.notify_all()

    def abort(self) -> None:
        """Make both sides fail."""
        with self._changed:
            self._broken = True
            self._changed.notify_all()

    def is_broken(self) -> bool:
        """Whether ``abort()`` was called."""
        return self._broken

    def __iter__(self) -> Iterator[bytes]:
        """The pieces; raises PullCancelled when the pipe was broken."""
        while True:
            with self._changed:
                while not (self._pieces or self._ended or self._broken):
                    self._changed.wait()
                if self._broken:
                    raise PullCancelled("the pull was cancelled")
                if not self._pieces:
                    return
                piece = self._pieces.popleft()
                self._held -= len(piece)
                self._changed.notify_all()
            yield piece


@dataclass(frozen=True, slots=True)
class Transfer:
    """One blob and the layer in it: where they come from, where they go, who is told, and why
    the layer is not lazy.

    Nobody else may work on the same blob or layer meanwhile.
    """

    cas: Cas
    layers: Layers
    patience: Patience
    source: Source
    descriptor: Descriptor
    diff_id: Digest
    progress: LayerProgress
    not_lazy: str = ""

    @property
    def digest(self) -> Digest:
        """The blob's digest."""
        return self.descriptor.content

    async def run(self) -> None:
        """Fetch and unpack what is missing.

        Raises:
            StoreError: it failed. What was fetched stays if the registry is at fault, for the
                next attempt, and goes if the content or the disk is.
        """
        usable = self.layers.get(self.diff_id) is not None and await to_end(
            lambda: self.layers.usable(self.diff_id)
        )
        if not usable and self.cas.contains(self.digest):
            try:
                await self._unpack_from_store()
            except (CorruptContent, BlobNotFound) as error:
                log.warning("%s", error.sentence)
        if not self.cas.contains(self.digest):
            await self._fetch()
        self.progress.all_arrived()

    async def _unpack_from_store(self) -> None:
        self.progress.all_arrived()
        cancelled = threading.Event()

        def unpack() -> None:
            with self.cas.open(self.digest) as file:
                self.unpack(iter(lambda: file.read(CHUNK), b""), cancelled.is_set)

        await interruptible(unpack, cancelled.set)

    def unpack(self, pieces: Iterator[bytes], cancelled: Callable[[], bool]) -> None:
        """Make the layer from the blob's bytes."""
        media_type = self.descriptor.media_type
        self.layers.unpack(pieces, media_type, self.diff_id, cancelled, self.not_lazy)

    async def _fetch(self) -> None:
        attempt = await self._attempt()
        if isinstance(attempt.received, DigestMismatch) and attempt.resumed:
            # What had lain here for a while may have been damaged by a power cut.
            log.warning("%s; fetching it anew", attempt.received.sentence)
            attempt = await self._attempt()
        if attempt.received is not None:
            raise attempt.received
        if attempt.unpacked is not None:
            # The blob is what the manifest names, and useless.
            await to_end(lambda: self.cas.delete(self.digest))
            raise attempt.unpacked

    async def _attempt(self) -> "_Attempt":
        with await to_end(lambda: self.cas.writer(self.digest, self.descriptor.size)) as writer:
            attempt = _Attempt(self, writer)
            await attempt.run()
        return attempt


class _Attempt:
    """Receiving and unpacking at once. ``received`` and ``unpacked`` say why each failed."""

    def __init__(self, transfer: Transfer, writer: Writer) -> None:
        self._transfer = transfer
        self._writer = writer
        self._pipe = Pipe()
        self.resumed = writer.left > 0
        self.received: StoreError | None = None
        self.unpacked: StoreError | None = None

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            if self._transfer.layers.get(self._transfer.diff_id) is None:
                nursery.start_soon(self._unpack, nursery.cancel_scope)
            else:
                self._pipe.leave()
            try:
                await self._receive()
            except StoreError as error:
                self.received = error
                self._pipe.abort()
        if nursery.cancel_scope.cancelled_caught:
            self.received = self.unpacked
        if self.received and not isinstance(self.received, RegistryError):
            await to_end(self._writer.discard)

    async def _unpack(self, scope: trio.CancelScope) -> None:
        pipe = self._pipe
        try:
            await interruptible(
                lambda: self._transfer.unpack(iter(pipe), pipe.is_broken), pipe.abort
            )
        except PullCancelled:
            pass  # receiving has failed, and knows why
        except (InvalidLayer, DigestMismatch) as error:
            # Whether the blob was built so or damaged on its way shows at its end.
            self.unpacked = error
        except StoreError as error:
            self.unpacked = error
            scope.cancel()
        pipe.leave()

    async def _receive(self) -> None:
        await interruptible(self._replay, self._pipe.abort)
        failures = 0
        while self._writer.offset < self._transfer.descriptor.size:
            before = self._writer.offset
            try:
                await self._receive_rest()
                break
            except RegistryError as error:
                failures = 1 if self._writer.offset - before >= PROGRESS else failures + 1
                pause = pause_before(failures, error, self._transfer.patience)
                if pause is None:
                    raise
                log.info("%s; trying again in %.1f s", error.sentence, pause)
            await trio.sleep(pause)
        self._pipe.end()
        self._transfer.progress.all_arrived()
        await to_end(self._writer.commit)

    def _replay(self) -> None:
        for piece in self._writer.replay():
            self._hand_on(piece)

    def _hand_on(self, piece: bytes) -> None:
        self._transfer.progress.arrived(self._writer.offset)
        self._pipe.put(piece)

    async def _receive_rest(self) -> None:
        stream = await self._open()

        def interrupt() -> None:
            self._pipe.abort()
            stream.abort()

        try:
            await interruptible(lambda: self._copy(stream), interrupt)
        finally:
            stream.close()

    async def _open(self) -> BlobStream:
        gone = threading.Event()

        def open_blob() -> BlobStream:
            stream = self._transfer.source.open_blob(self._transfer.descriptor, self._writer.offset)
            if gone.is_set():
                stream.close()
            return stream

        try:
            return await ask(open_blob)
        except trio.Cancelled:
            gone.set()
            raise

    def _copy(self, stream: BlobStream) -> None:
        # A source that can't begin in the middle sends again what is here already.
        known = self._writer.offset - stream.offset
        while piece := stream.read():
            if known:
                skipped = min(known, len(piece))
                known -= skipped
                piece = piece[skipped:]
            if piece:
                self._writer.write(piece)
                self._hand_on(piece)
