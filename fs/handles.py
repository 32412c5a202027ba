"""Open files: offsets, partial reads, appends, truncation and blocking, for every kind.

A handle outlives the name it was opened by: it holds its node, and its node holds what
it needs. Nothing here knows what a container or an image is.
"""

import errno
import os
import select
from typing import TYPE_CHECKING

import trio

from store.errors import CtrfsError

if TYPE_CHECKING:
    from fs.nodes import (
        Caller,
        CommandFile,
        DocumentFile,
        LogFile,
        SettingFile,
        Source,
        TextFile,
    )

# A document (config.json, spec) of a container with thousands of mounts is below 1 MiB;
# Linux itself takes at most 6 MiB of arguments and environment in one execve(2).
MAX_TEXT = 8 << 20

# Programs write through buffers of 4, 8, 64 or 128 KiB, and so does the kernel.
FULL_BUFFER = 4096

READABLE = select.POLLIN | select.POLLRDNORM
WRITABLE = select.POLLOUT | select.POLLWRNORM


class HandleError(CtrfsError):
    """A read or write that no file of this kind can do."""

    errno = errno.EINVAL


class Handle:
    """One open file. The adapter calls read and write with the kernel's offsets.

    ``direct_io`` keeps the kernel from caching pages, so each read comes here and the
    size in the attributes does not cut it short.
    """

    direct_io = True
    keep_cache = False

    async def read(self, offset: int, length: int) -> bytes:
        """Up to ``length`` bytes; b"" at the end."""
        raise HandleError("this file cannot be read", errno=errno.EACCES)

    async def write(self, offset: int, data: bytes, caller: "Caller") -> int:
        """Take all of ``data`` or raise."""
        raise HandleError("this file cannot be written", errno=errno.EACCES)

    async def flush(self) -> None:
        """One of the descriptors of this open file is closed; raising fails close(2)."""

    async def release(self) -> None:
        """The last descriptor is gone."""

    def poll(self) -> int:
        """Events of poll(2) that hold now."""
        return READABLE | WRITABLE

    async def ready(self) -> None:
        """Return when poll() would report more than it does now."""
        await trio.sleep_forever()


class TextHandle(Handle):
    """Reads one version of the text; reading at offset 0 again takes a new one.

    That is what seq_file does for /proc and sysfs: a program may keep the file open,
    seek to the start and see the present.
    """

    def __init__(self, node: "TextFile") -> None:
        self._text = node
        self._version: bytes | None = None

    async def read(self, offset: int, length: int) -> bytes:
        """A piece of the version that the reader began with."""
        if self._version is None or offset == 0:
            self._version = await self._text.slow_content()
        return self._version[offset : offset + length]


class CommandHandle(TextHandle):
    """Each write is a command of its own, wherever its offset is."""

    def __init__(self, node: "CommandFile") -> None:
        super().__init__(node)
        self._node = node

    async def write(self, offset: int, data: bytes, caller: "Caller") -> int:
        """Carry out the command."""
        await self._node.command(decode(data).rstrip("\n"), caller)
        return len(data)


class SettingHandle(TextHandle):
    """Writes of one open file add up, so `(echo a; echo b) > list` sets both lines.

    Each write makes what was written so far the content before it returns. With
    O_APPEND each write is added to what is there. A file opened with O_TRUNC and
    closed without a write is emptied. Shells close one descriptor of `> file` before the
    command writes, so what that took away comes back when the write is refused.

    A long list arrives in pieces that end anywhere. When a piece is as long as a full
    buffer, what comes after its last newline waits for the next piece, or for close.
    """

    def __init__(self, node: "SettingFile", flags: int) -> None:
        super().__init__(node)
        self._node = node
        self._append = bool(flags & os.O_APPEND)
        self._emptied = bool(flags & os.O_TRUNC)
        self._before = ""
        self._written = b""
        self._tail = b""

    async def write(self, offset: int, data: bytes, caller: "Caller") -> int:
        """Set or add to the content."""
        self._emptied = False
        before, self._before = self._before, ""
        try:
            return await self._set(offset, data)
        except CtrfsError:
            if before:
                await self._node.replace(before)
            raise

    async def _set(self, offset: int, data: bytes) -> int:
        text = self._tail + data if self._append else self._placed(offset, data)
        lines, newline, tail = text.rpartition(b"\n")
        if len(data) % FULL_BUFFER or not newline:
            lines, newline, tail = text, b"", b""
        await self._apply(lines + newline)
        self._tail = tail
        self._written = text
        return len(data)

    def _placed(self, offset: int, data: bytes) -> bytes:
        if offset not in (0, len(self._written)):
            raise HandleError("write from the start of the file, or append to it")
        text = self._written[:offset] + data
        if len(text) > MAX_TEXT:
            raise HandleError(f"more than {MAX_TEXT} bytes", errno=errno.EFBIG)
        return text

    async def _apply(self, text: bytes) -> None:
        if self._append:
            await self._node.append(decode(text))
        else:
            await self._node.replace(decode(text))

    async def flush(self) -> None:
        """Carry out `: > file`, and take a last line without a newline."""
        if self._emptied:
            self._emptied = False
            self._before = self._node.own()
            await self._node.truncate()
        elif self._tail:
            await self._apply(self._tail if self._append else self._written)
            self._tail = b""


class DocumentHandle(TextHandle):
    """Collects a document and gives it to the node on close."""

    def __init__(self, node: "DocumentFile", flags: int) -> None:
        super().__init__(node)
        self._node = node
        self._append = bool(flags & os.O_APPEND)
        self._emptied = bool(flags & os.O_TRUNC)
        self._before = b""
        self._draft: bytearray | None = None
        self._dirty = False

    async def write(self, offset: int, data: bytes, caller: "Caller") -> int:
        """Put the bytes into the draft."""
        if self._draft is None:
            self._draft = bytearray(b"" if self._emptied else await self._node.slow_content())
        if self._append:
            offset = len(self._draft)
        if offset + len(data) > MAX_TEXT:
            self._draft, self._dirty, self._emptied = None, False, False
            raise HandleError(f"more than {MAX_TEXT} bytes", errno=errno.EFBIG)
        if offset > len(self._draft):
            self._draft += bytes(offset - len(self._draft))
        self._draft[offset : offset + len(data)] = data
        self._dirty = True
        return len(data)

    def cut(self, size: int) -> None:
        """ftruncate(2) of the draft."""
        self._emptied = size == 0
        if self._draft is not None:
            del self._draft[size:]

    async def flush(self) -> None:
        """Hand the draft over. Shells close `> file` before and after the command writes: what
        the first took away comes back when the document is refused."""
        if self._dirty and self._draft is not None:
            self._dirty = False
            before, self._before = self._before, b""
            try:
                decode(bytes(self._draft))
                await self._node.store(bytes(self._draft))
            except CtrfsError:
                if before:
                    await self._node.store(before)
                raise
        elif self._emptied and self._draft is None:
            self._emptied = False
            self._before = self._node.own()
            await self._node.store(b"")


class StreamHandle(Handle):
    """Gives what a source gives, in pieces of any size, and waits in between."""

    def __init__(self, source: "Source", flags: int) -> None:
        self._source = source
        self._nonblocking = bool(flags & os.O_NONBLOCK)
        self._rest: bytes = b""
        self._ended = False

    def _fill(self) -> bool:
        if not self._rest and not self._ended:
            got = self._source.take()
            if got is None:
                return False
            self._rest, self._ended = got, not got
        return True

    async def read(self, offset: int, length: int) -> bytes:
        """The next bytes of the stream; the offset says nothing."""
        while not self._fill():
            if self._nonblocking:
                raise BlockingIOError(errno.EAGAIN, "nothing to read yet")
            await self._source.ready()
        piece, self._rest = self._rest[:length], self._rest[length:]
        return piece

    async def release(self) -> None:
        """Let go of the source."""
        self._source.close()

    def poll(self) -> int:
        """Readable when a read would not wait."""
        return READABLE if self._fill() else 0

    async def ready(self) -> None:
        """Wait for the source."""
        await self._source.ready()


class LogHandle(Handle):
    """Reads at offsets, asking the node each time."""

    def __init__(self, node: "LogFile") -> None:
        self._node = node

    async def read(self, offset: int, length: int) -> bytes:
        """What is there now."""
        return await self._node.read_at(offset, length)


class HostFileHandle(Handle):
    """A file of the host whose content never changes: the kernel may keep its pages."""

    direct_io = False
    keep_cache = True

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    async def read(self, offset: int, length: int) -> bytes:
        """The file's bytes; in a thread, because the disk may have to be asked."""
        return await trio.to_thread.run_sync(os.pread, self._descriptor, length, offset)

    async def release(self) -> None:
        """Close the host's file."""
        os.close(self._descriptor)


def decode(data: bytes) -> str:
    """What was written, as text.

    Raises:
        HandleError: EINVAL, it is not UTF-8.
    """
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise HandleError("what was written is not UTF-8 text") from None
