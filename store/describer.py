"""Describing a layer in a process of its own.

Python runs one thread at a time. To describe a layer takes as long as to work out its entries and
where their contents come from; so both are done at once: its tree while there are more and more
entries, its image while the contents are laid out.
"""

import os
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Protocol

import msgspec

from store.description import Description, Frame, build_tree, describe
from store.errors import CorruptContent, InvalidLayer, LimitExceeded, StoreError
from store.index import Entry, read_blocks


class Entries(Protocol):
    """A layer's; see ``layers.LazyLayout``."""

    @property
    def is_large(self) -> bool:
        """Whether there are many, before they are asked for."""

    @property
    def entries(self) -> Iterable[Entry]:
        """All of them."""


class Describing(Protocol):
    """The description of a layer, in the making."""

    def block(self) -> None:
        """There is one more block of entries in the index."""

    def begin(self, frame: Frame) -> None:
        """All entries are in the index."""

    def result(self) -> Description:
        """Wait for it.

        Raises:
            InvalidLayer, LimitExceeded: the entries make no sense, or are too many.
            OSError: from writing the image.
        """


class Describer:
    """Describes layers, one after another. To be used by one thread at a time.

    Until a process can do anything takes as long as to describe a small layer. So those are
    described here, unless there is a process that was started ahead.
    """

    def __init__(self) -> None:
        self._ahead = self._silent = False
        self._process: _Apart | None = None

    def start_ahead(self, *, silent: bool = False) -> None:
        """Have a process from now on; it takes some megabytes of memory.

        Args:
            silent: it logs nothing, and holds nobody's standard error open.
        """
        self._silent = silent
        self._ahead = _can_do_both()
        if self._ahead and self._process is None:
            self._process = _Apart(silent)

    @contextmanager
    def describing(
        self, layout: Entries, index: Path, meta: BinaryIO, max_inodes: int
    ) -> Iterator[Describing]:
        """Make ready to describe a layer. What is still being done at the end is given up.

        Args:
            index: a file that will hold the entries.
            meta: where the image goes, an empty file.
            max_inodes: the layer is refused if it has more.
        """
        process = self._take(layout.is_large)
        if process is None:
            yield _Here(layout, meta, max_inodes)
            return
        try:
            process.take(index, meta, max_inodes)
            yield process
        finally:
            if process.is_free and not layout.is_large:
                self._process = process
            else:  # it has taken much memory, or goes on with what nobody wants
                process.close()
                self._process = _Apart(self._silent) if self._ahead else None

    def _take(self, is_large: bool) -> "_Apart | None":
        process, self._process = self._process, None
        if process is not None:
            if process.is_free:
                return process
            process.close()
        wanted = self._ahead or (is_large and _can_do_both())
        return _Apart(self._silent) if wanted else None

    def close(self) -> None:
        """End the process."""
        self._ahead = False
        if self._process is not None:
            self._process.close()
            self._process = None


def _can_do_both() -> bool:
    """Whether another process can do something while this one does."""
    return len(os.sched_getaffinity(0)) > 1


class _Here:
    """Describes when the result is asked for."""

    def __init__(self, layout: Entries, meta: BinaryIO, max_inodes: int) -> None:
        self._layout = layout
        self._meta = meta
        self._max_inodes = max_inodes
        self._frame = Frame(0, b"")

    def block(self) -> None:
        pass

    def begin(self, frame: Frame) -> None:
        self._frame = frame

    def result(self) -> Description:
        tree, needs_lower = build_tree(self._layout.entries, self._max_inodes)
        return describe(tree, needs_lower, self._meta, self._frame)


class _Refused(msgspec.Struct, frozen=True, tag=True):
    kind: str
    sentence: str


class _Failed(msgspec.Struct, frozen=True, tag=True):
    errno: int


_REFUSALS = {error.__name__: error for error in (CorruptContent, InvalidLayer, LimitExceeded)}
_ANSWER = msgspec.msgpack.Decoder(Description | _Refused | _Failed)


# Of what is said at once.
_MESSAGE_MAX = 64 << 10
_BLOCK = b"block"


class _Apart:
    """The side that asks. It says how many inodes a layer may have, with the descriptors of its
    files; then whenever there is a block of entries to read; and the frame at last."""

    def __init__(self, silent: bool) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._busy = False
        with theirs:
            # -P: nothing is imported from the directory that this process was started in.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "store.describer"],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL if silent else None,
                start_new_session=True,  # signals from a terminal are for the daemon
            )

    @property
    def is_free(self) -> bool:
        """Whether it is there, and has nothing to do."""
        return not self._busy and self._process.poll() is None

    def take(self, index: Path, meta: BinaryIO, max_inodes: int) -> None:
        """Begin with a layer."""
        self._busy = True
        # By descriptors: the directory that the files are in gets its name meanwhile.
        with index.open("rb") as entries, suppress(ConnectionError):  # result() says why
            files = [entries.fileno(), meta.fileno()]
            socket.send_fds(self._socket, [str(max_inodes).encode()], files)

    def block(self) -> None:
        self._tell(_BLOCK)

    def begin(self, frame: Frame) -> None:
        self._tell(msgspec.json.encode(frame))

    def _tell(self, message: bytes) -> None:
        with suppress(ConnectionError):  # result() says why
            self._socket.send(message)

    def result(self) -> Description:
        answer = b""
        with suppress(ConnectionError):
            answer = self._socket.recv(_MESSAGE_MAX)
        if not answer:
            raise StoreError(self._failure())
        self._busy = False
        answered = _ANSWER.decode(answer)
        if isinstance(answered, _Refused):
            raise _REFUSALS[answered.kind](answered.sentence)
        if isinstance(answered, _Failed):
            raise OSError(answered.errno, os.strerror(answered.errno))
        assert isinstance(answered, Description)
        return answered

    def _failure(self) -> str:
        code = self._process.wait()
        if code < 0:
            return (
                f"the process that lists the layer's files was killed by signal {-code}; if the"
                " machine is short of memory, pull again when it has more"
            )
        return "the process that lists the layer's files failed; see the log"

    def close(self) -> None:
        """End it, whatever it does."""
        self._socket.close()
        self._process.kill()
        self._process.wait()


def main() -> None:
    """The side that answers, as long as somebody may ask."""
    with socket.socket(fileno=os.dup(sys.stdin.fileno())) as asked:
        while (layer := _Layer.told(asked)) is not None:
            asked.send(msgspec.msgpack.encode(layer.answer()))


class _Layer:
    """One that is told of through a socket; see ``_Apart``."""

    def __init__(self, asked: socket.socket, max_inodes: int, index: int, meta: int) -> None:
        self._asked = asked
        self._max_inodes = max_inodes
        self._index = index
        self._meta = meta
        self._frame = b""

    @classmethod
    def told(cls, asked: socket.socket) -> "_Layer | None":
        """The next one; None when nobody asks any more."""
        message, files, _, _ = socket.recv_fds(asked, _MESSAGE_MAX, 2)
        return cls(asked, int(message), *files) if message else None

    def answer(self) -> Description | _Refused | _Failed:
        """What comes of it, when all has been told."""
        try:
            with os.fdopen(self._index, "rb"), os.fdopen(self._meta, "wb") as meta:
                tree, needs_lower = build_tree(self._entries(), self._max_inodes)
                return describe(tree, needs_lower, meta, self._told_frame())
        except tuple(_REFUSALS.values()) as error:
            self._told_frame()
            return _Refused(type(error).__name__, error.sentence)
        except OSError as error:
            self._told_frame()
            return _Failed(error.errno or 0)

    def _entries(self) -> Iterator[Entry]:
        """As they come."""
        blocks = read_blocks(Path(f"/proc/self/fd/{self._index}"))
        while self._is_block():
            yield from next(blocks)
        for block in blocks:
            yield from block

    def _is_block(self) -> bool:
        """Wait for what is told next."""
        message = self._asked.recv(_MESSAGE_MAX)
        if not message:
            sys.exit()  # it was given up
        if message != _BLOCK:
            self._frame = message
        return message == _BLOCK

    def _told_frame(self) -> Frame:
        """What is told after the entries, for which the tree may have no use."""
        while not self._frame:
            self._is_block()
        return msgspec.json.decode(self._frame, type=Frame)


if __name__ == "__main__":
    main()
