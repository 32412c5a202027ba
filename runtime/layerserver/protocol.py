"""What daemon and layer server say to each other: lines of JSON through a Unix socket.

A connection carries one request and its answer, or after ``listen`` news without end. Byte
ranges are (offset, length) in the layer's data file.
"""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import msgspec

from store.config import StoreConfig

SOCKET = "layers.sock"
PID_FILE = "layers.pid"
CONFIG = "layers.json"
DEVICES = "devices"

Ranges = tuple[tuple[int, int], ...]


class Open(msgspec.Struct, tag=True, frozen=True):
    """Serve a layer; answered by ``Device``."""

    diff_id: str


class Fetch(msgspec.Struct, tag=True, frozen=True):
    """Bring ranges of a layer here, or all of it (None), and answer when they are."""

    diff_id: str
    ranges: Ranges | None = None


class Prefetch(msgspec.Struct, tag=True, frozen=True):
    """Bring ranges soon, in this order, after what the layer itself wants first; answered
    at once."""

    diff_id: str
    ranges: Ranges = ()


class Configure(msgspec.Struct, tag=True, frozen=True):
    """Use other settings from now on."""

    config: StoreConfig


class Status(msgspec.Struct, tag=True, frozen=True):
    """Tell how things are; answered by ``Report``."""


class End(msgspec.Struct, tag=True, frozen=True):
    """End if no layer is in use."""


class Listen(msgspec.Struct, tag=True, frozen=True):
    """Send news on this connection."""


Request = Open | Fetch | Prefetch | Configure | Status | End | Listen


class Done(msgspec.Struct, tag=True, frozen=True):
    """It was done."""


class Device(msgspec.Struct, tag=True, frozen=True):
    """What to mount as the devices of a layer: its data files, which the server fills, or a file of
    the server's own filesystem in place of each, which serves any range of them. In that case
    other mounts are needed once the layer is complete."""

    served: str | None = None


class Failure(msgspec.Struct, tag=True, frozen=True):
    """It could not be done."""

    sentence: str
    errno: int


class Report(msgspec.Struct, tag=True, frozen=True):
    """The server's process id, how it serves (``fuse`` or ``fanotify``, and why not the other),
    and the layers that it knows: bytes here and in all."""

    pid: int
    method: str
    why: str
    layers: dict[str, tuple[int, int]]


Answer = Done | Device | Failure | Report


Kind = Literal["complete", "refused", "damaged", "failed", "attack", "lost", "repaired"]


class News(msgspec.Struct, frozen=True):
    """Something happened to a layer: it is ``complete``, its blob was ``refused`` as a whole, its
    files are ``damaged``, a read ``failed``, bytes were wrong (``attack``), or for a while nobody
    guarded it while it was mounted, so that who read it may have read zeros (``lost``), as from a
    disk that had lost contents, which were written again (``repaired``).

    What failed was a read at ``offset`` of the data file, by process ``pid``, or 0 if that is not
    known.
    """

    kind: Kind
    diff_id: str
    sentence: str = ""
    offset: int = 0
    pid: int = 0


_requests: msgspec.json.Decoder[Request] = msgspec.json.Decoder(Request)
_answers: msgspec.json.Decoder[Answer] = msgspec.json.Decoder(Answer)
_news = msgspec.json.Decoder(News)
_encoder = msgspec.json.Encoder()


def encode(message: Request | Answer | News) -> bytes:
    """One line."""
    return _encoder.encode(message) + b"\n"


def decode_request(line: bytes) -> Request:
    """Raises msgspec.MsgspecError or UnicodeDecodeError."""
    return _requests.decode(line)


def decode_answer(line: bytes) -> Answer:
    """Raises msgspec.MsgspecError."""
    return _answers.decode(line)


def decode_news(line: bytes) -> News:
    """Raises msgspec.MsgspecError."""
    return _news.decode(line)


@contextmanager
def short_path(path: Path) -> Iterator[str]:
    """Another name of a socket's path, since addresses of sockets have 108 bytes at most."""
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


def connect(run: Path) -> socket.socket:
    """A connection to the server of a run directory. Raises OSError: there is none."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        with short_path(run / SOCKET) as path:
            connection.connect(path)
    except BaseException:
        connection.close()
        raise
    return connection
