"""The last failures, each with what was tried, by whom, and what to do about it."""

import errno
import logging
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import trio

from fs.nodes import Caller
from store.events import rfc3339

log = logging.getLogger(__name__)

KEPT = 1000
# Enough to recognise what was written; the rest of a rejected document helps nobody.
SHOWN_BYTES = 80


class Failures:
    """What the file `errors` at the root shows."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=KEPT)
        self.changed_ns = time.time_ns()
        self._coming: set[trio.Event] = set()

    @contextmanager
    def coming(self) -> Iterator[None]:
        """Around work after which one is added: who reads them meanwhile waits for it."""
        done = trio.Event()
        self._coming.add(done)
        try:
            yield
        finally:
            self._coming.remove(done)
            done.set()

    async def settled(self) -> None:
        """Wait for those that are coming."""
        for done in list(self._coming):
            await done.wait()

    def add(
        self, path: str, operation: str, caller: Caller, code: int, sentence: str, data: bytes = b""
    ) -> None:
        """Append one failure.

        Args:
            path: the file, from the root of the mount.
            operation: "write", "mkdir" …
            caller: who tried.
            code: the errno that it got.
            sentence: what is wrong and what to do.
            data: what was written, if anything was.
        """
        self.changed_ns = time.time_ns()
        what = f" {_shown(data)}" if data else ""
        who = f" by pid {caller.pid} uid {caller.uid}" if caller.pid else ""
        name = errno.errorcode.get(code, str(code))
        line = (
            f"{rfc3339(self.changed_ns)} {name} /{path}: {operation}{what}{who}:"
            f" {' '.join(sentence.split())}"
        )
        self._lines.append(_printable(line))
        log.info("%s", self._lines[-1])

    def text(self) -> str:
        """One failure a line, newest last."""
        return "\n".join(self._lines)


def _printable(line: str) -> str:
    """One line of text, whatever bytes a name in it is made of."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def _shown(data: bytes) -> str:
    text = data[:SHOWN_BYTES].decode("utf-8", "replace").rstrip("\n")
    return repr(text) + ("…" if len(data) > SHOWN_BYTES else "")
