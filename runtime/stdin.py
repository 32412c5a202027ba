"""Standard input of a container's process, for any number of writers."""

from pathlib import Path

import trio

from runtime.background import Background
from runtime.errors import StdinClosed
from runtime.monitor import Attachment


class Stdin:
    """Connects to the container's monitor when something is written for the first time.

    Args:
        socket: the monitor's, which is there while the container runs.
    """

    def __init__(self, socket: Path, background: Background) -> None:
        self._socket = socket
        self._background = background
        self._lock = trio.Lock()
        self._attachment: Attachment | None = None
        self._ended = False

    async def send(self, data: bytes, name: str) -> None:
        """Give the process ``data``. Waits while it does not read.

        Args:
            name: the container's, for sentences.

        Raises:
            StdinClosed: end-of-file was sent, or the process has just ended.
        """
        if self._ended:
            raise StdinClosed(f"standard input of {name} was closed by its first writer")
        try:
            attachment = await self._attach()
            await attachment.send(data)
        except OSError as error:
            raise StdinClosed(f"{name} takes no input any more: {error.strerror}") from error

    async def _attach(self) -> Attachment:
        async with self._lock:
            if self._attachment is None:
                self._attachment = await Attachment.connect(self._socket)
                self._background.start_soon(self._attachment.drain)
            return self._attachment

    def end(self) -> None:
        """Send end-of-file, if anything was written before."""
        if self._attachment is not None:
            self.close()
            self._ended = True

    def reopen(self) -> None:
        """A run begins."""
        self.close()
        self._ended = False

    def close(self) -> None:
        """The run has ended."""
        if self._attachment is not None:
            self._attachment.close()
            self._attachment = None
