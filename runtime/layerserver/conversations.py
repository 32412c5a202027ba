"""What goes through the layer server's socket: requests with their answers, and news."""

import errno
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import msgspec
import trio

from runtime.layerserver import protocol, rundir
from runtime.layerserver.protocol import Answer, Done, Failure, Fetch, Listen, News, Request

_MAX_REQUEST = 16 << 20
# What a listener that does not read may fall behind, before it misses some.
_MAX_NEWS = 1000


class Conversations:
    """All connections of one server.

    Args:
        run: where the socket is.
        answer: answers a request, which is not ``Listen``.
    """

    def __init__(self, run: Path, answer: Callable[[Request], Awaitable[Answer]]) -> None:
        self._run = run
        self._answer = answer
        self._listeners: set[trio.MemorySendChannel[News]] = set()
        self._first: deque[News] = deque(maxlen=_MAX_NEWS)

    @property
    def are_heard(self) -> bool:
        """Whether somebody listens to the news."""
        return bool(self._listeners)

    def tell(self, news: News) -> None:
        """Send news to all who listen; if nobody does, to the next who will."""
        if not self._listeners:
            self._first.append(news)
        for listener in list(self._listeners):
            with suppress(trio.WouldBlock, trio.BrokenResourceError):
                listener.send_nowait(news)

    async def serve(self, task_status: trio.TaskStatus[list[trio.SocketListener]]) -> None:
        """Take connections until cancelled."""
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(rundir.listening(self._run)))
        await trio.serve_listeners(self._converse, [listener], task_status=task_status)

    async def _converse(self, stream: trio.SocketStream) -> None:
        try:
            async with stream:
                await self._exchange(stream)
        except* (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the other side was killed

    async def _exchange(self, stream: trio.SocketStream) -> None:
        line = await _line(stream)
        if not line:
            return
        try:
            request = protocol.decode_request(line)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            refused = Failure(f"the layer server does not know this: {error}", errno.EINVAL)
            await stream.send_all(protocol.encode(refused))
            return
        match request:
            case Listen():
                await self._send_news(stream)
            case Fetch():  # which may take long, and only those who wait for it want it
                async with _while_connected(stream):
                    await stream.send_all(protocol.encode(await self._answer(request)))
            case _:
                await stream.send_all(protocol.encode(await self._answer(request)))

    async def _send_news(self, stream: trio.SocketStream) -> None:
        send, receive = trio.open_memory_channel[News](_MAX_NEWS)
        self._listeners.add(send)
        try:
            await stream.send_all(protocol.encode(Done()))
            while self._first:
                await stream.send_all(protocol.encode(self._first.popleft()))
            async with _while_connected(stream):
                async for news in receive:
                    await stream.send_all(protocol.encode(news))
        finally:
            self._listeners.discard(send)


@asynccontextmanager
async def _while_connected(stream: trio.SocketStream) -> AsyncIterator[None]:
    """What it is around is cancelled when the other side hangs up, which sends nothing more."""
    async with trio.open_nursery() as nursery:

        async def watch() -> None:
            await stream.receive_some(1)
            nursery.cancel_scope.cancel()

        nursery.start_soon(watch)
        yield
        nursery.cancel_scope.cancel()


async def _line(stream: trio.SocketStream) -> bytes:
    """One line, or nothing if there is none within bounds."""
    data = b""
    while not data.endswith(b"\n"):
        piece = await stream.receive_some(1 << 16)
        data += piece
        if not piece or len(data) > _MAX_REQUEST:
            return b""
    return data
