"""What happens, as a stream: one record per event, for everyone who listens."""

import json
import threading
import time
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime

# Readers that are slower than this many events behind lose the oldest ones and are
# told so by the gap in "seq"; 10,000 short records are about 2 MB.
KEPT = 10_000


def rfc3339(ns: int) -> str:
    """A time in nanoseconds since the epoch as RFC 3339 UTC with microseconds."""
    whole, rest = divmod(ns, 1_000_000_000)
    base = datetime.fromtimestamp(whole, UTC).strftime("%Y-%m-%dT%H:%M:%S")
    return f"{base}.{rest // 1000:06d}Z"


class EventLog:
    """The last KEPT events and the callbacks to run when one is added.

    Safe to call from any thread. Callbacks run in the thread that emits and must
    only hand the news on.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lines: deque[bytes] = deque(maxlen=KEPT)
        self._next = 0
        self._listeners: set[Callable[[], None]] = set()

    @property
    def next_seq(self) -> int:
        """Number that the next event will get."""
        return self._next

    def emit(self, kind: str, **fields: object) -> None:
        """Append one event, for example ``emit("container.start", id="web", pid=71)``."""
        with self._lock:
            record = {"seq": self._next, "time": rfc3339(time.time_ns()), "event": kind, **fields}
            self._lines.append(json.dumps(record, ensure_ascii=False).encode() + b"\n")
            self._next += 1
            listeners = list(self._listeners)
        for listener in listeners:
            listener()

    def since(self, seq: int) -> tuple[list[bytes], int]:
        """Events from number ``seq`` on as JSON lines, and the number to ask for next."""
        with self._lock:
            first = self._next - len(self._lines)
            start = max(seq, first) - first
            return list(self._lines)[start:], self._next

    def listen(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Run ``callback`` after each event; the returned function ends that."""
        with self._lock:
            self._listeners.add(callback)

        def stop() -> None:
            with self._lock:
                self._listeners.discard(callback)

        return stop
