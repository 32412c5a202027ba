"""A small tree with one node of each kind, served on a real mount: `python -m tests.fs.toy DIR`."""

import errno
import os
import signal
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import trio

from fs.automount import Automounts
from fs.failures import Failures
from fs.mount import serve
from fs.nodes import (
    Caller,
    CommandFile,
    Directory,
    DocumentFile,
    HostFile,
    Link,
    LogFile,
    Mountpoint,
    Node,
    SettingFile,
    SlowTextFile,
    Source,
    StreamFile,
    TextFile,
    refuse,
)
from runtime import linux

STATE = {"list": "a\nb\n", "document": '{"a": 1}', "log": "", "bell": "", "words": "quiet"}
OBJECTS: dict[str, str] = {}
RANG = trio.Event()


class Value(TextFile):
    """A value."""

    name = "value"

    def read(self) -> str:
        return "forty-two"


class List(SettingFile):
    """A list."""

    name = "list"

    def read(self) -> str:
        return STATE["list"].rstrip("\n")

    async def replace(self, text: str) -> None:
        if "bad" in text:
            refuse("bad is not good", errno.EINVAL)
        STATE["list"] = text


class Private(SettingFile):
    """For root."""

    name = "private"
    private = True

    def read(self) -> str:
        return ""

    async def replace(self, text: str) -> None:
        if text:
            refuse("no", errno.EINVAL)


class Command(CommandFile):
    """A command."""

    name = "command"

    def read(self) -> str:
        return STATE["words"]

    async def command(self, text: str, caller: Caller) -> None:
        if text == "sleep":
            await trio.sleep(60)
        if text == "crash":
            raise ZeroDivisionError
        if text == "ring":
            RANG.set()
        STATE["words"] = text


class Document(DocumentFile):
    """A document."""

    name = "document"

    def content(self) -> bytes:
        return STATE["document"].encode()

    async def store(self, document: bytes) -> None:
        if not document.startswith(b"{"):
            refuse("a document begins with {", errno.EINVAL)
        STATE["document"] = document.decode()


class Bell(Source):
    """Says "rang" once it has rung."""

    given = False

    def take(self) -> bytes | None:
        if self.given:
            return b""
        if not RANG.is_set():
            return None
        self.given = True
        return b"rang\n"

    async def ready(self) -> None:
        await RANG.wait()


class Stream(StreamFile):
    """Blocks until `ring` is written to command."""

    name = "stream"

    async def start(self) -> Source:
        return Bell()


class Slow(SlowTextFile):
    """Takes a while."""

    name = "slow"

    async def slow_content(self) -> bytes:
        await trio.sleep(0.05)
        return b"slow\n" * 10_000


class Log(LogFile):
    """One million digits."""

    name = "log"

    async def slow_size(self) -> int:
        return 1_000_000

    async def read_at(self, offset: int, length: int) -> bytes:
        end = min(offset + length, 1_000_000)
        return b"".join(b"%d" % (i % 10) for i in range(offset, end))


class Host(HostFile):
    """/etc/passwd."""

    name = "host"

    def size(self) -> int:
        return Path("/etc/passwd").stat().st_size

    async def open_host(self) -> int:
        return os.open("/etc/passwd", os.O_RDONLY)


class Passwd(Link):
    """A link."""

    name = "link"

    async def target(self) -> str:
        return "value"


class Etc(Mountpoint):
    """Becomes /etc when it is used."""

    name = "etc"

    async def mount_at(self, target: str) -> None:
        await trio.to_thread.run_sync(linux.mount, "/etc", target, "", linux.MS_BIND)


class Secret(TextFile):
    """For root."""

    name = "secret"
    private = True

    def read(self) -> str:
        return "secret"


class Object(Directory):
    """Comes and goes."""

    files = (Value, Stream)

    def __init__(self, parent: Directory, name: str) -> None:
        self.name = name
        self.made = OBJECTS[name]
        super().__init__(parent)

    def identity(self) -> tuple[str, str]:
        return ("object", self.made)


class Objects(Directory):
    """Objects."""

    name = "objects"
    serial = 0

    def find(self, name: str) -> Node | None:
        return Object(self, name) if name in OBJECTS else None

    def dynamic(self) -> Iterable[str]:
        return list(OBJECTS)

    async def mkdir(self, name: str) -> None:
        if name.startswith("-"):
            refuse("a name does not begin with -", errno.EINVAL)
        Objects.serial += 1
        OBJECTS[name] = str(Objects.serial)

    async def rmdir(self, name: str) -> None:
        del OBJECTS[name]

    async def rename(self, name: str, target: Directory, new_name: str) -> None:
        OBJECTS[new_name] = OBJECTS.pop(name)


class Errors(TextFile):
    """Failures."""

    name = "errors"
    failures: Failures

    def read(self) -> str:
        return self.failures.text()


class Toy(Directory):
    """A toy."""

    name = ""
    files = (
        *(Value, List, Private, Command, Document, Stream, Slow, Log),
        *(Host, Passwd, Etc, Secret, Errors, Objects),
    )


async def main(mountpoint: str) -> None:
    """Serve until SIGTERM."""
    Errors.failures = Failures()
    stop = trio.Event()
    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:

            async def wait_for_signal() -> None:
                async for _ in signals:
                    stop.set()

            nursery.start_soon(wait_for_signal)
            ready = partial(print, "ready", flush=True)
            await serve(Toy(None), mountpoint, Errors.failures, Automounts(mountpoint), ready, stop)
            nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main, sys.argv[1])
