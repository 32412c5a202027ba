"""A small HTTP proxy that stands before a real registry and misbehaves on demand."""

import http.client
import re
import socket
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

CHUNK = 64 << 10


@dataclass
class Seen:
    """One request that came in."""

    path: str
    headers: dict[str, str]
    method: str


class Exchange:
    """One request and the means to answer it."""

    def __init__(
        self, handler: BaseHTTPRequestHandler, upstream: int, over: threading.Event
    ) -> None:
        self._handler = handler
        self._upstream = upstream
        self.over = over

    def answer(self, status: int, headers: dict[str, str] | None = None, body: bytes = b"") -> None:
        """Answer without asking the registry."""
        self._handler.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            if value:
                self._handler.send_header(key, value)
        self._end_headers()
        self.write(body)

    def _end_headers(self) -> None:
        # Threads that wait for a second request would outlive the test.
        self._handler.send_header("Connection", "close")
        self._handler.end_headers()

    def write(self, data: bytes) -> None:
        """Send a part of a body."""
        self._handler.wfile.write(data)

    def forward(
        self,
        limit: int | None = None,
        change: Callable[[bytes], bytes] = lambda data: data,
        without: tuple[str, ...] = (),
    ) -> None:
        """Pass the registry's answer on, ``limit`` bytes of the body at most.

        Args:
            limit: None for all.
            change: applied to each piece of the body; must keep its length.
            without: request headers that the registry doesn't get.
        """
        connection = http.client.HTTPConnection("127.0.0.1", self._upstream, timeout=30)
        with closing(connection):
            self._pass_on(connection, limit, change, without)

    def _pass_on(
        self,
        connection: http.client.HTTPConnection,
        limit: int | None,
        change: Callable[[bytes], bytes],
        without: tuple[str, ...],
    ) -> None:
        dropped = {"connection", *without}
        sent = {k: v for k, v in self._handler.headers.items() if k.lower() not in dropped}
        # With the client's Host, so that the registry sends it to us for what comes next.
        connection.request(self._handler.command, self._handler.path, self._body(), sent)
        answer = connection.getresponse()
        self._handler.send_response(answer.status)
        for key, value in answer.getheaders():
            self._handler.send_header(key, value)
        self._end_headers()
        left = limit
        while left is None or left > 0:
            piece = answer.read(CHUNK if left is None else min(CHUNK, left))
            if not piece:
                break
            self.write(change(piece))
            left = None if left is None else left - len(piece)

    def _body(self) -> bytes | None:
        length = self._handler.headers.get("Content-Length")
        return self._handler.rfile.read(int(length)) if length else None

    def cut(self) -> None:
        """End the connection as a crash would."""
        self._handler.close_connection = True
        self._handler.wfile.flush()
        self._handler.connection.shutdown(socket.SHUT_RDWR)


Fault = Callable[[Exchange], None]


def cut_after(count: int) -> Fault:
    """Break the connection after this many bytes of the body."""

    def fault(exchange: Exchange) -> None:
        exchange.forward(limit=count)
        exchange.cut()

    return fault


def stall_after(count: int) -> Fault:
    """Send nothing more after this many bytes, for as long as the proxy lives."""

    def fault(exchange: Exchange) -> None:
        exchange.forward(limit=count)
        exchange.over.wait()
        exchange.cut()

    return fault


def late(seconds: float) -> Fault:
    """The answer, after a while."""

    def fault(exchange: Exchange) -> None:
        time.sleep(seconds)
        exchange.forward()

    return fault


def stall(exchange: Exchange) -> None:
    """Never answer."""
    exchange.over.wait()
    exchange.cut()


def status(code: int, **headers: str) -> Fault:
    """Answer with a status; underscores in header names become hyphens."""
    named = {key.replace("_", "-"): value for key, value in headers.items()}
    body = b'{"errors": [{"code": "TEST", "message": "on\\u0007 purpose"}]}'
    return lambda exchange: exchange.answer(code, named, body)


def body(content: bytes, media_type: str) -> Fault:
    """Answer with this document."""
    return lambda exchange: exchange.answer(200, {"Content-Type": media_type}, content)


def damaged(exchange: Exchange) -> None:
    """Pass the answer on with the first byte of each piece changed."""
    exchange.forward(change=lambda data: bytes([data[0] ^ 1]) + data[1:])


def ignore_range(exchange: Exchange) -> None:
    """Send the whole blob, whatever part was asked for."""
    exchange.forward(without=("range",))


def drip(code: int, **headers: str) -> Fault:
    """Answer with a status and a body of one byte every 50 ms, for as long as the proxy lives."""
    named = {key.replace("_", "-"): value for key, value in headers.items()}

    def fault(exchange: Exchange) -> None:
        exchange.answer(code, {**named, "Content-Length": "100000"})
        while not exchange.over.wait(0.05):
            exchange.write(b" ")

    return fault


class Endless:
    """A document that goes on and on: 100 MiB announced, or none in particular.

    ``sent`` counts the bytes that the client let us send.
    """

    def __init__(self, media_type: str, announced: bool) -> None:
        self.sent = 0
        self._headers = {"Content-Type": media_type, "Content-Length": str(100 << 20)}
        self._announced = announced

    def __call__(self, exchange: Exchange) -> None:
        exchange.answer(
            200, self._headers if self._announced else {**self._headers, "Content-Length": ""}
        )
        while self.sent < 100 << 20:
            exchange.write(b" " * CHUNK)
            self.sent += CHUNK


@dataclass
class _Rule:
    pattern: re.Pattern[str]
    fault: Fault
    times: int


@dataclass
class Proxy:
    """Listens on a loopback port; use as a context manager.

    Attributes:
        upstream: the registry's port.
        seen: the requests, in order.
    """

    upstream: int
    seen: list[Seen] = field(default_factory=list)
    _rules: list[_Rule] = field(default_factory=list)
    _over: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __enter__(self) -> "Proxy":
        self._server = _Server(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def host(self) -> str:
        """What stands before the slash in a reference."""
        return f"127.0.0.1:{self._server.server_address[1]}"

    def on(self, pattern: str, fault: Fault, times: int = 1_000_000) -> None:
        """Treat the next requests so whose path matches; rules made earlier come first."""
        self._rules.append(_Rule(re.compile(pattern), fault, times))

    def heal(self) -> None:
        """Treat all further requests well."""
        self._rules.clear()

    def paths(self, pattern: str) -> list[Seen]:
        """The requests whose path matches."""
        return [request for request in self.seen if re.search(pattern, request.path)]

    def _fault(self, path: str) -> Fault:
        with self._lock:
            for rule in self._rules:
                if rule.times and rule.pattern.search(path):
                    rule.times -= 1
                    return rule.fault
        return Exchange.forward

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                proxy.seen.append(Seen(self.path, dict(self.headers.items()), self.command))
                fault = proxy._fault(self.path)
                try:
                    fault(Exchange(self, proxy.upstream, proxy._over))
                except OSError:
                    self.close_connection = True  # the client has gone, as some tests want

            do_HEAD = do_POST = do_PUT = do_GET

            def log_message(self, format: str, *args: object) -> None:
                pass

        return Handler


class _Server(ThreadingHTTPServer):
    daemon_threads = False

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients may go at any time."""
