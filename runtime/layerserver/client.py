"""The daemon's side: starts the layer server, asks it, and hears its news.

The server outlives the daemon, and the daemon a server that dies: that one is started again at
once.
"""

import logging
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec
import trio

from runtime import keeper, notify
from runtime.layerserver import protocol, rundir
from runtime.layerserver.fanotify_serving import any_left, group_name
from runtime.layerserver.protocol import (
    Answer,
    Configure,
    Device,
    Done,
    End,
    Failure,
    Fetch,
    Listen,
    News,
    Open,
    Prefetch,
    Ranges,
    Report,
    Request,
    Status,
)
from store.cas import Digest
from store.config import StoreConfig
from store.errors import StoreError

log = logging.getLogger(__name__)

# A Python process takes a quarter of a second to come up, some more on a busy machine.
_START_SECONDS = 30.0
_POLL_SECONDS = 0.01
# Before one that dies as soon as it is started is started again.
_PAUSE_SECONDS = 1.0
_END_SECONDS = 5.0
_HINT_SECONDS = 1.0

# Its buffers of some megabytes come and go in many threads. Without these glibc keeps them, and
# an arena for each thread: 75 MB resident instead of 50 after reading a whole image.
_MALLOC = {
    "MALLOC_ARENA_MAX": "2",
    "MALLOC_MMAP_THRESHOLD_": "131072",
    "MALLOC_TRIM_THRESHOLD_": "131072",
}

# What comes first on a connection that brings news.
_GREETING = protocol.encode(Done())
_GREETING_SECONDS = 5.0


class LayerServerFailed(StoreError):
    """The layer server could not do what it was asked for, or does not come up."""


class LayerClient:
    """One daemon's connection to its layer server. To be used from one trio run.

    Args:
        run: the server's run directory.
        layers: the directory of all layers.
        config: the store's settings.
        command: starts a server.
        silent: it must not keep our standard error open, for whose end somebody waits.
    """

    def __init__(
        self,
        run: Path,
        layers: Path,
        config: StoreConfig,
        command: Sequence[str],
        *,
        silent: bool = False,
    ) -> None:
        self._run = run
        self._layers = layers
        self._config = config
        self._command = command
        self._stderr = subprocess.DEVNULL if silent else None
        self._process: subprocess.Popen[bytes] | None = None
        self._up = trio.Event()
        self._holding = trio.Lock()
        # Descriptors that whoever reads incomplete layers should hold, to pass to monitors.
        self.held: tuple[int, ...] = ()

    # --- requests ----------------------------------------------------------------------

    async def device(self, diff_id: Digest) -> Device:
        """What to mount as the devices of a layer.

        Raises:
            LayerServerFailed: it can't be served.
        """
        answer = await self._ask(Open(diff_id))
        assert isinstance(answer, Device)
        if answer.served is None:
            await self._hold()  # whoever mounts it hands that on to a monitor
        return answer

    def expect(self, diff_id: Digest) -> None:
        """Let the server look at a layer (``store.lazy_pull.Filling``)."""
        with suppress(OSError), protocol.connect(self._run) as connection:
            connection.settimeout(_HINT_SECONDS)
            connection.sendall(protocol.encode(Open(diff_id)))

    async def begin(self, diff_id: Digest) -> None:
        """Start to serve a layer (``store.lazy_pull.Filling``)."""
        await self._ask(Open(diff_id))

    async def complete(self, diff_id: Digest) -> None:
        """Bring all of a layer here (``store.lazy_pull.Filling``)."""
        await self._ask(Fetch(diff_id))

    async def fetch(self, diff_id: Digest, ranges: Ranges) -> None:
        """Bring ranges of a layer's data here, and wait until they are.

        Raises:
            LayerServerFailed: they can't be had.
        """
        await self._ask(Fetch(diff_id, ranges))

    async def prefetch(self, diff_id: Digest, ranges: Sequence[tuple[int, int]]) -> None:
        """Have ranges of a layer's data brought soon (``store.lazy_pull.Filling``)."""
        await self._ask(Prefetch(diff_id, tuple(ranges)))

    async def status(self) -> Report:
        """How the server is. Raises LayerServerFailed."""
        answer = await self._ask(Status())
        assert isinstance(answer, Report)
        return answer

    async def _ask(self, request: Request) -> Answer:
        deadline = trio.current_time() + _START_SECONDS
        while True:
            try:
                answer = await self._exchange(request)
            except (OSError, trio.BrokenResourceError, EOFError) as error:
                # It is being started, or has died over this and will be started again.
                if trio.current_time() > deadline:
                    raise LayerServerFailed(
                        f"the layer server does not answer ({error}); see the daemon's log"
                    ) from None
                await trio.sleep(_POLL_SECONDS)
                continue
            if isinstance(answer, Failure):
                raise LayerServerFailed(answer.sentence, errno=answer.errno)
            return answer

    async def _exchange(self, request: Request) -> Answer:
        async with self._connect() as stream:
            await stream.send_all(protocol.encode(request))
            data = bytearray()
            while not data.endswith(b"\n"):
                piece = await stream.receive_some(1 << 16)
                if not piece:
                    raise EOFError("it hung up")
                data += piece
        return protocol.decode_answer(bytes(data))

    def _connect(self) -> trio.SocketStream:
        # Connecting a Unix socket does not wait for the other side.
        connection = protocol.connect(self._run)
        return trio.SocketStream(trio.socket.from_stdlib_socket(connection))

    # --- the server's life -------------------------------------------------------------

    async def follow(self, heard: Callable[[News], None], restarted: Callable[[], None]) -> None:
        """Keep a server running until cancelled.

        Args:
            heard: called with each of its news.
            restarted: called after one that had died was replaced.
        """
        listening = await self._listening()
        self._up.set()
        with suppress(LayerServerFailed):  # it has died: the next one reads them from the file
            await self._ask(Configure(self._config))  # for one that was here before this daemon
        if self._process is not None:
            restarted()
        while True:
            await self._hold()
            await self._hear(listening, heard)
            log.warning("the layer server has died; it is started again")
            listening = await self._listening()
            restarted()

    async def wait_until_up(self) -> None:
        """Wait for the first server, though not for ever: images in full can do without."""
        with trio.move_on_after(_START_SECONDS):
            await self._up.wait()

    async def _hold(self) -> None:
        """Hold the group of events that readers wait for, so that it outlives the server, and
        the monitors of containers and the service manager can hold it as well."""
        name = group_name(self._run)
        async with self._holding:
            if self.held:
                return
            for pid in await trio.to_thread.run_sync(keeper.find, name):
                taken = await trio.to_thread.run_sync(keeper.take, pid, name)
                if taken is not None:
                    self.held = taken
                    notify.store(name, taken)
                    return

    async def _listening(self) -> trio.SocketStream:
        """A connection that brings news, of a server that is started if there is none."""
        deadline = trio.current_time() + _START_SECONDS
        pause = trio.current_time()
        while True:
            try:
                stream = self._connect()
                if await self._is_greeted(stream):
                    return stream
            except (OSError, trio.BrokenResourceError, trio.TooSlowError) as error:
                is_there = self._process is not None and self._process.poll() is None
                if not is_there and trio.current_time() >= pause:
                    self._process = await trio.to_thread.run_sync(self._start)
                    pause = trio.current_time() + _PAUSE_SECONDS
                if trio.current_time() > deadline:
                    log.error("the layer server does not come up: %s", error)
                    deadline += _START_SECONDS
            await trio.sleep(_POLL_SECONDS)

    @staticmethod
    async def _is_greeted(stream: trio.SocketStream) -> bool:
        """Ask for news; whether they will come. One that is dying may still take connections,
        but answers none."""
        greeting = b""
        try:
            with trio.fail_after(_GREETING_SECONDS):
                await stream.send_all(protocol.encode(Listen()))
                greeting = await stream.receive_some(len(_GREETING))
        finally:
            if greeting != _GREETING:
                await trio.aclose_forcefully(stream)
        return greeting == _GREETING

    def _start(self) -> subprocess.Popen[bytes]:
        # Each time: one that ends in order takes it away.
        (self._run / protocol.CONFIG).write_bytes(msgspec.json.encode(self._config))
        (self._run / protocol.CONFIG).chmod(0o600)
        return subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._stderr,
            env={**os.environ, **_MALLOC},
            start_new_session=True,  # signals from a terminal are for the daemon
        )

    @staticmethod
    async def _hear(stream: trio.SocketStream, heard: Callable[[News], None]) -> None:
        """Pass news on until the server ends."""
        rest = b""
        async with stream:
            while True:
                try:
                    piece = await stream.receive_some(1 << 16)
                except trio.BrokenResourceError:
                    return
                if not piece:
                    return
                *lines, rest = (rest + piece).split(b"\n")
                for line in lines:
                    heard(protocol.decode_news(line))

    async def end(self) -> None:
        """Let the server end, and wait until it has, unless layers are in use."""
        answer: Answer | None = None
        with trio.move_on_after(_END_SECONDS):
            answer = await self._ask_to_end()
        if isinstance(answer, Failure):
            log.info("%s", answer.sentence)
            return
        if answer is not None and self.held:
            # The next one, which may be of another version, begins anew.
            notify.forget(group_name(self._run))
        if answer is None and self._process is not None:
            self._process.terminate()  # it has not come up yet
        if answer is not None or self._process is not None:
            await trio.to_thread.run_sync(self._wait, answer is not None)

    async def _ask_to_end(self) -> Answer | None:
        """The server's answer, also of one that is starting; None if there is none."""
        while True:
            try:
                return await self._exchange(End())
            except (OSError, trio.BrokenResourceError, EOFError):
                if self._process is None or self._process.poll() is not None:
                    return None
            await trio.sleep(_POLL_SECONDS)

    def _wait(self, in_order: bool) -> None:
        """Wait until the server has ended. If it was killed, those who wait for it get another."""
        deadline = time.monotonic() + _END_SECONDS
        if self._process is not None:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_END_SECONDS)
                rundir.tidy(self._run)
                if not any_left(self._run, self._layers):
                    keeper.stop(group_name(self._run))
                elif not in_order:
                    self._start()
                    return
        while (self._run / protocol.PID_FILE).exists() and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
