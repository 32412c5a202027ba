"""Signals that end a command: it clears away what it has begun, and says so in its exit code."""

import signal
from types import FrameType


class Terminated(KeyboardInterrupt):
    """SIGTERM came; to be treated as Ctrl-C is."""


def heed_sigterm() -> None:
    """Raise Terminated in the main thread when SIGTERM comes."""
    signal.signal(signal.SIGTERM, _raise)


def _raise(number: int, frame: FrameType | None) -> None:
    raise Terminated
