"""The proxy that makes a link longer."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from tools.delay import Address, Counter, serve

DELAY = 0.05
# What a busy machine may add.
PATIENCE = 5.0

Upstream = Callable[[trio.SocketStream], Awaitable[None]]


@asynccontextmanager
async def proxied(upstream: Upstream, counter: Counter) -> AsyncIterator[Address]:
    """A server of the test's own, behind a proxy; gives the proxy's address."""
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_tcp, upstream, 0)
        place = ("127.0.0.1", listeners[0].socket.getsockname()[1])
        yield await _proxy(nursery, place, counter)
        nursery.cancel_scope.cancel()


async def _proxy(nursery: trio.Nursery, upstream: Address, counter: Counter) -> Address:
    send, receive = trio.open_memory_channel[Address](1)
    nursery.start_soon(serve, upstream, DELAY, counter, ("127.0.0.1", 0), send.send_nowait)
    return await receive.receive()


async def echo(stream: trio.SocketStream) -> None:
    while data := await stream.receive_some():
        await stream.send_all(data)


async def whole(stream: trio.SocketStream) -> bytes:
    """All until the end."""
    return b"".join([piece async for piece in stream])


async def test_each_direction_is_delayed(tmp_path: Path) -> None:
    counter = Counter(tmp_path / "count")
    async with proxied(echo, counter) as address, await trio.open_tcp_stream(*address) as stream:
        times = []
        for _ in range(3):
            start = trio.current_time()
            await stream.send_all(b"x")
            assert await stream.receive_some() == b"x"
            times.append(trio.current_time() - start)
    assert times[0] >= 3.9 * DELAY  # with the round trip of the handshake
    assert all(2 * DELAY <= seconds < PATIENCE for seconds in times[1:])


async def test_pieces_do_not_wait_for_each_other(tmp_path: Path) -> None:
    """Kept back one after the other, these would take 50 s."""
    size = 64 << 20

    async def source(stream: trio.SocketStream) -> None:
        await stream.send_all(bytes(size))

    counter = Counter(tmp_path / "count")
    async with proxied(source, counter) as address, await trio.open_tcp_stream(*address) as stream:
        with trio.fail_after(2 * PATIENCE):
            assert len(await whole(stream)) == size
    assert counter.received == size


async def test_what_passes_is_whole_and_in_order_both_ways(tmp_path: Path) -> None:
    data = b"".join(b"%d " % number for number in range(300_000))
    got = []

    async def answer(stream: trio.SocketStream) -> None:
        """Answers only when the client has said that it is done: half a connection ends."""
        got.append(await whole(stream))
        await stream.send_all(data)

    counter = Counter(tmp_path / "count")
    async with proxied(answer, counter) as address:
        for _ in range(2):
            async with await trio.open_tcp_stream(*address) as stream:
                await stream.send_all(data)
                await stream.send_eof()
                assert await whole(stream) == data
    assert got == [data, data]
    assert (counter.connections, counter.received) == (2, 2 * len(data))


async def test_a_slow_reader_holds_the_sender_back(tmp_path: Path) -> None:
    """What nobody has asked for yet is not taken from the registry."""
    size = 200 << 20
    sent = 0

    async def source(stream: trio.SocketStream) -> None:
        nonlocal sent
        while sent < size:
            await stream.send_all(bytes(1 << 20))
            sent += 1 << 20

    counter = Counter(tmp_path / "count")
    async with proxied(source, counter) as address, await trio.open_tcp_stream(*address):
        await trio.sleep(1)
        assert sent < 50 << 20


async def test_an_end_that_breaks_ends_its_connection_alone(tmp_path: Path) -> None:
    counter = Counter(tmp_path / "count")
    async with (
        proxied(echo, counter) as address,
        await trio.open_tcp_stream(*address) as good,
        await trio.open_tcp_stream(*address) as bad,
    ):
        await bad.send_all(b"x")
        bad.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_LINGER, b"\1" + bytes(7))
        await bad.aclose()  # with a reset
        await good.send_all(b"y")
        assert await good.receive_some() == b"y"


async def test_nobody_behind_it(tmp_path: Path) -> None:
    counter = Counter(tmp_path / "count")
    async with trio.open_nursery() as nursery:
        with trio.socket.socket() as unused:
            await unused.bind(("127.0.0.1", 0))
            address = await _proxy(nursery, unused.getsockname(), counter)
            for _ in range(2):
                async with await trio.open_tcp_stream(*address) as stream:
                    assert await whole(stream) == b""
        nursery.cancel_scope.cancel()
