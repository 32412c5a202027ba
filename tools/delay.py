"""A TCP proxy that makes a link longer, not narrower, and counts what passes.

Each piece is read at once, waits in a queue until it is ``delay`` seconds old, and is then
written, so a stream keeps its throughput. A new connection waits for one round trip more, as
the handshake of a real link of this length would make it wait.

    python -m tools.delay --to HOST:PORT --count FILE [--listen HOST:PORT] [--delay SECONDS]

Once it listens it prints the address, `HOST:PORT`, on a line.
"""

import argparse
import mmap
import os
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path

import trio

PIECE = 64 << 10
# A queue holds at most PIECE * PIECES = 8 MiB, which at 20 ms allow for 400 MB/s. More
# would let the proxy take in what its reader may never ask for.
PIECES = 128

Address = tuple[str, int]


class Counter:
    """Two numbers in a file that other processes can look at at any time.

    Attributes:
        connections: how many were accepted.
        received: bytes that clients were sent.
    """

    _FORMAT = "=QQ"

    def __init__(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            os.ftruncate(descriptor, struct.calcsize(self._FORMAT))
            self._memory = mmap.mmap(descriptor, struct.calcsize(self._FORMAT))
        finally:
            os.close(descriptor)

    @property
    def connections(self) -> int:
        """Connections so far."""
        return self._numbers()[0]

    @property
    def received(self) -> int:
        """Bytes to clients so far."""
        return self._numbers()[1]

    def _numbers(self) -> tuple[int, int]:
        connections, received = struct.unpack(self._FORMAT, self._memory)
        return connections, received

    def add(self, connections: int, received: int) -> None:
        """Only one process may do this."""
        a, b = self._numbers()
        self._memory[:] = struct.pack(self._FORMAT, a + connections, b + received)


async def serve(
    upstream: Address,
    delay: float,
    counter: Counter,
    listen: Address = ("127.0.0.1", 0),
    ready: Callable[[Address], None] = lambda address: None,
) -> None:
    """Accept connections until cancelled.

    Args:
        upstream: where each connection leads.
        delay: of each direction, in seconds.
        counter: counts what passes.
        listen: port 0 takes a free one.
        ready: called with the address once clients can connect.
    """

    async def connection(client: trio.SocketStream) -> None:
        counter.add(1, 0)
        await _connection(client, upstream, delay, counter)

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(
            partial(trio.serve_tcp, connection, listen[1], host=listen[0])
        )
        host, port = listeners[0].socket.getsockname()[:2]
        ready((host, port))


async def _connection(
    client: trio.SocketStream, upstream: Address, delay: float, counter: Counter
) -> None:
    # SYN and the answer to it would each have taken ``delay`` before the first byte was sent.
    first = trio.current_time() + 3 * delay
    try:
        async with await trio.open_tcp_stream(*upstream) as server, trio.open_nursery() as nursery:
            nursery.start_soon(_pipe, client, server, delay, first, lambda count: None)
            nursery.start_soon(
                _pipe, server, client, delay, first, lambda count: counter.add(0, count)
            )
    except* (OSError, trio.BrokenResourceError):
        pass  # one end has gone, and so both do


async def _pipe(
    source: trio.SocketStream,
    sink: trio.SocketStream,
    delay: float,
    first: float,
    count: Callable[[int], None],
) -> None:
    """Pass one direction on until its end, no byte of it before ``first``."""
    send, receive = trio.open_memory_channel[tuple[float, bytes]](PIECES)

    async def read() -> None:
        async with send:
            while piece := await source.receive_some(PIECE):
                await send.send((trio.current_time() + delay, piece))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        async for due, piece in receive:
            await trio.sleep_until(max(due, first))
            await sink.send_all(piece)
            count(len(piece))
    await trio.sleep(delay)
    await sink.send_eof()


def address(text: str) -> Address:
    """`HOST:PORT` as a pair."""
    host, _, port = text.rpartition(":")
    return host, int(port)


def main() -> None:
    """Entry point of the process."""
    parser = argparse.ArgumentParser(prog="tools.delay")
    parser.add_argument("--listen", type=address, default=("127.0.0.1", 0))
    parser.add_argument("--to", type=address, required=True)
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("--count", type=Path, required=True)
    arguments = parser.parse_args()

    def ready(address: Address) -> None:
        print(f"{address[0]}:{address[1]}", flush=True)

    counter = Counter(arguments.count)
    trio.run(serve, arguments.to, arguments.delay, counter, arguments.listen, ready)


if __name__ == "__main__":
    main()
