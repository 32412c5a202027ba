"""Writing to the standard input of a container's process."""

from typing import TYPE_CHECKING

from fs.handles import SettingHandle
from runtime.containers import Container

if TYPE_CHECKING:
    from fs.containers import Stdin
    from fs.nodes import Caller


class StdinHandle(SettingHandle):
    """Chooses the mode before the start; feeds the process while it runs."""

    def __init__(self, node: "Stdin", container: Container, flags: int) -> None:
        super().__init__(node, flags)
        self._container = container
        self._fed = False

    async def write(self, offset: int, data: bytes, caller: "Caller") -> int:
        """Give the bytes to the process, or set the mode."""
        if self._container.state in ("running", "paused"):
            await self._container.write_stdin(data)
            self._fed = True
            return len(data)
        return await super().write(offset, data, caller)

    async def flush(self) -> None:
        """Nothing waits to be written."""

    async def release(self) -> None:
        """The writer has gone: end of file, if that was asked for."""
        if self._fed:
            await self._container.stdin_writer_gone()
