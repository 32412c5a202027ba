"""Describing a large layer in a process of its own.

Python runs one thread at a time. To describe a layer with as many files as a whole toolchain
takes as long as to work out its entries and where their contents come from; so both are done at
once: its tree while there are more and more entries, its image while the contents are laid out.
"""

import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
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

    def close(self) -> None:
        """End what is still being done."""


def describing(layout: Entries, index: Path, meta: BinaryIO, max_inodes: int) -> Describing:
    """Make ready to describe a layer.

    Args:
        index: a file that will hold the entries.
        meta: where the image goes, an empty file.
        max_inodes: the layer is refused if it has more.
    """
    if layout.is_large and len(os.sched_getaffinity(0)) > 1:
        return _Apart(index, meta, max_inodes)
    return _Here(layout, meta, max_inodes)


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

    def close(self) -> None:
        pass


class _Refused(msgspec.Struct, frozen=True, tag=True):
    kind: str
    sentence: str


class _Failed(msgspec.Struct, frozen=True, tag=True):
    errno: int


_REFUSALS = {error.__name__: error for error in (CorruptContent, InvalidLayer, LimitExceeded)}
_ANSWER = msgspec.msgpack.Decoder(Description | _Refused | _Failed)


class _Apart:
    """The side that asks. The process is started before there is anything to do, for until it can
    do it takes a tenth of a second. It is told an empty line for each block of entries that it can
    read already, and the frame in the last line."""

    def __init__(self, index: Path, meta: BinaryIO, max_inodes: int) -> None:
        # By descriptors: the directory that the files are in gets its name meanwhile.
        with index.open("rb") as entries:
            files = (entries.fileno(), meta.fileno())
            # -P: nothing is imported from the directory that this process was started in.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "store.describer", *map(str, (*files, max_inodes))],
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=files,
                start_new_session=True,  # signals from a terminal are for the daemon
            )

    def block(self) -> None:
        self._tell(b"\n")

    def begin(self, frame: Frame) -> None:
        self._tell(msgspec.json.encode(frame) + b"\n")

    def _tell(self, line: bytes) -> None:
        assert self._process.stdin
        with suppress(BrokenPipeError):  # result() says why
            self._process.stdin.write(line)

    def result(self) -> Description:
        assert self._process.stdout
        answer = self._process.stdout.read()
        code = self._process.wait()
        if code < 0:
            raise StoreError(
                f"the process that lists the layer's files was killed by signal {-code}; if the"
                " machine is short of memory, pull again when it has more"
            )
        if not answer:
            raise StoreError("the process that lists the layer's files failed; see the log")
        answered = _ANSWER.decode(answer)
        if isinstance(answered, _Refused):
            raise _REFUSALS[answered.kind](answered.sentence)
        if isinstance(answered, _Failed):
            raise OSError(answered.errno, os.strerror(answered.errno))
        assert isinstance(answered, Description)
        return answered

    def close(self) -> None:
        with suppress(BrokenPipeError), self._process:
            self._process.kill()


def main() -> None:
    """The side that answers, unless the layer is given up meanwhile."""
    index, meta, max_inodes = map(int, sys.argv[1:])
    told = _Told(index)
    answer: Description | _Refused | _Failed
    try:
        tree, needs_lower = build_tree(told.entries(), max_inodes)
        frame = told.frame()
        if frame is None:
            return
        with os.fdopen(meta, "wb") as file:
            answer = describe(tree, needs_lower, file, frame)
    except tuple(_REFUSALS.values()) as error:
        answer = _Refused(type(error).__name__, error.sentence)
    except OSError as error:
        answer = _Failed(error.errno or 0)
    with suppress(BrokenPipeError):
        os.write(sys.stdout.fileno(), msgspec.msgpack.encode(answer))


class _Told:
    """What comes through standard input; see ``_Apart``."""

    def __init__(self, index: int) -> None:
        self._blocks = read_blocks(Path(f"/proc/self/fd/{index}"))
        self._last = b""

    def entries(self) -> Iterator[Entry]:
        """As they come."""
        for line in sys.stdin.buffer:
            if line != b"\n":
                self._last = line
                break
            yield from next(self._blocks)
        for block in self._blocks if self._last else ():
            yield from block

    def frame(self) -> Frame | None:
        """What comes after the entries; None when nothing comes any more."""
        if not self._last:
            for _ in self.entries():  # the tree had no use for these
                pass
        return msgspec.json.decode(self._last, type=Frame) if self._last else None


if __name__ == "__main__":
    main()
