"""The two ways in which the contents of incomplete layers get to the kernel, as one interface."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import trio

from runtime.layerserver.protocol import Device
from store.fetcher import Fetcher


class Serving(Protocol):
    """One way to serve."""

    name: str

    @property
    def in_use(self) -> bool:
        """Whether somebody depends on this process."""

    def unguarded(self) -> list[Fetcher]:
        """Layers that may have been read while nobody fetched for them."""

    def open_data(self, paths: Sequence[Path]) -> Sequence[int]:
        """Descriptors of data files for reading and writing, with which this process does not
        wait for itself. Raises OSError."""

    def add(self, fetcher: Fetcher) -> None:
        """A layer will be mounted, or is already, from a server before. Raises OSError."""

    def completed(self, fetcher: Fetcher) -> None:
        """All contents of a layer are here, each verified. May be called again."""

    def device(self, fetcher: Fetcher) -> Device:
        """What to mount as the layer's devices."""

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Serve until cancelled; started when it can."""

    def close(self) -> None:
        """Let go of everything that nobody depends on. Called once, whether it ran or not."""
