"""The kinds of node that the tree is declared with.

A file of the tree is one small class: its ``name``, its docstring (which is its help
text, shown in the README of the directory it stands in), and the few lines that only
it needs. Everything that all files need is in handles.py, once.

Nodes are made anew by each lookup and hold no state; what lasts is in the store and
the runtime. Two nodes with equal ``key`` are the same object to the kernel.
"""

import errno
import inspect
import stat
import time
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, NoReturn

from fs.handles import (
    CommandHandle,
    DocumentHandle,
    Handle,
    HostFileHandle,
    LogHandle,
    SettingHandle,
    StreamHandle,
    TextHandle,
)
from store.errors import CtrfsError

STARTED_NS = time.time_ns()

# How long the kernel may reuse a name or the attributes of a directory without asking.
# Directories here change owner and mode never, and the kernel itself notices entries
# that come and go through the mount; ten seconds only bound how late it sees the
# mtime of a directory in which the daemon made or removed something by itself.
STABLE_SECONDS = 10.0


class TreeError(CtrfsError):
    """An operation that the tree itself refuses."""


@dataclass(frozen=True, slots=True)
class Caller:
    """The process behind a request, as the daemon's namespaces number it."""

    pid: int
    uid: int
    gid: int


class Node:
    """One object in the tree.

    ``mode`` holds the permission bits; the kernel enforces them (default_permissions).
    """

    name: str
    mode: int = 0o444
    file_type: ClassVar[int] = stat.S_IFREG
    attr_timeout: float = 0.0
    entry_timeout: float = STABLE_SECONDS

    def __init__(self, parent: "Directory | None") -> None:
        self.parent = parent
        self.key: Hashable = self.identity()

    def identity(self) -> Hashable:
        """What makes this node the same object after another lookup."""
        return (self.parent.key if self.parent else None, self.name, self.file_type)

    @property
    def path(self) -> str:
        """Path from the root of the mount, without a leading slash."""
        if self.parent is None:
            return ""
        above = self.parent.path
        return f"{above}/{self.name}" if above else self.name

    def exists(self) -> bool:
        """Whether a declared file is there for this very object."""
        return True

    def size(self) -> int:
        """Length in bytes; 0 where it cannot be known before reading."""
        return 0

    async def slow_size(self) -> int | None:
        """The size for nodes that must do blocking work to know it; None for others."""
        return None

    def mtime_ns(self) -> int:
        """When the content last changed, in nanoseconds since the epoch."""
        return self.parent.mtime_ns() if self.parent else STARTED_NS

    def failed(self, sentence: str) -> None:
        """Hook: an operation on this node was refused with ``sentence``."""
        if self.parent:
            self.parent.failed(sentence)

    @classmethod
    def help(cls) -> str:
        """The help text: the docstring, unwrapped from its indentation."""
        return inspect.cleandoc(cls.__doc__ or "")


class Link(Node):
    """A symbolic link."""

    mode = 0o777
    file_type = stat.S_IFLNK
    entry_timeout = 0.0

    async def target(self) -> str:
        """Where the link points. Raises CtrfsError when it can point nowhere."""
        raise NotImplementedError


class FixedLink(Link):
    """A symbolic link whose target is known without work, and so is its size."""

    def where(self) -> str:
        """Where it points. Raises CtrfsError when it can point nowhere."""
        raise NotImplementedError

    async def target(self) -> str:
        """The same, for readlink(2)."""
        return self.where()

    def size(self) -> int:
        """Length of the target."""
        return len(self.where().encode("utf-8", "surrogateescape"))


class Directory(Node):
    """A directory: the files declared for it, and entries that come and go."""

    mode = 0o755
    file_type = stat.S_IFDIR
    attr_timeout = STABLE_SECONDS
    files: ClassVar[tuple[type[Node], ...]] = ()

    @classmethod
    @cache
    def _declared(cls) -> "dict[str, type[Node]]":
        declared: tuple[type[Node], ...] = (Readme, *cls.files)
        return {node.name: node for node in declared}

    def lookup(self, name: str) -> Node | None:
        """The entry called ``name``, or None."""
        declared = self._declared().get(name)
        if declared is None:
            return self.find(name)
        node = declared(self)
        return node if node.exists() else None

    def declared_keys(self) -> Iterable[Hashable]:
        """Keys of the files declared for this directory."""
        return ((self.key, name, node.file_type) for name, node in self._declared().items())

    def listing(self) -> list[str]:
        """Names of all entries, declared ones first."""
        declared = self._declared()
        return [*declared, *(name for name in self.dynamic() if name not in declared)]

    def find(self, name: str) -> Node | None:
        """An entry that is not declared for all directories of this class."""
        return None

    def dynamic(self) -> Iterable[str]:
        """Names that ``find`` knows and a listing shows."""
        return ()

    async def mkdir(self, name: str) -> None:
        """Create the object ``name``."""
        raise TreeError(
            f"nothing can be created in {self.path or '/'}; its README says what is here",
            errno=errno.EPERM,
        )

    async def rmdir(self, name: str) -> None:
        """Destroy the object ``name``."""
        raise TreeError(f"{name} is a fixed part of the tree", errno=errno.EPERM)

    async def rename(self, name: str, target: "Directory", new_name: str) -> None:
        """Give the object ``name`` another name."""
        raise TreeError(f"{name} cannot be renamed or moved", errno=errno.EPERM)


class Mountpoint(Directory):
    """A directory that the kernel serves: what belongs here is mounted when it is used."""

    attr_timeout = 0.0

    def content_id(self) -> Hashable:
        """What would be mounted now; another value means that what is mounted is out of date.
        Raises CtrfsError when there is nothing any more."""
        return None

    async def mount_at(self, target: str) -> None:
        """Mount the content at the host path ``target``, which leads to this node."""
        raise NotImplementedError


class File(Node):
    """Something that can be opened."""

    readable: ClassVar[bool] = True
    writable: ClassVar[bool] = False
    # May hold secrets: only root reads it.
    private: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        who_reads = 0o400 if cls.private else 0o444
        cls.mode = (who_reads if cls.readable else 0) | (0o200 if cls.writable else 0)

    async def open(self, flags: int) -> Handle:
        """A handle for open(2) with ``flags``."""
        raise NotImplementedError

    async def truncate(self) -> None:
        """truncate(2) to nothing; content that cannot be cut ignores it, as cgroupfs does."""


class TextFile(File):
    """Text made from what is in memory, whole, at the moment of the first read."""

    def read(self) -> str:
        """The text. Values, lists and tables come without the last newline."""
        raise NotImplementedError

    def content(self) -> bytes:
        """The bytes of the file."""
        text = self.read()
        return text.encode("utf-8", "surrogateescape") + b"\n" if text else b""

    async def slow_content(self) -> bytes:
        """As content(), for files that must block to know it."""
        return self.content()

    def size(self) -> int:
        """Length of the content in bytes."""
        return len(self.content())

    async def open(self, flags: int) -> Handle:
        """A handle that reads one consistent version."""
        return TextHandle(self)


class BytesFile(TextFile):
    """Bytes that stand elsewhere already, given as they are."""

    def raw(self) -> bytes:
        """The bytes."""
        raise NotImplementedError

    def content(self) -> bytes:
        """The bytes, with nothing added."""
        return self.raw()


class SlowTextFile(TextFile):
    """Text that takes blocking work to make. Its size is not known before it is read."""

    async def slow_content(self) -> bytes:
        """The bytes; runs blocking work in a thread."""
        raise NotImplementedError

    def size(self) -> int:
        """Not known in advance."""
        return 0


class CommandFile(TextFile):
    """A control file: each write is one command, done before write() returns.

    The kernel lets one write at a time into a file, and who waits for another can't be killed. So
    whoever opens it to write while a command runs gets another one (``Adapter.open``).
    """

    writable = True

    async def command(self, text: str, caller: Caller) -> None:
        """Carry out one command; ``text`` comes without its last newline."""
        raise NotImplementedError

    async def open(self, flags: int) -> Handle:
        """A handle that takes commands."""
        return CommandHandle(self)


class SettingFile(TextFile):
    """A value or list that can be written; the new text counts when write() returns."""

    writable = True

    async def replace(self, text: str) -> None:
        """Make ``text`` the content; it comes with its newlines."""
        raise NotImplementedError

    def own(self) -> str:
        """The content as it was written; empty for a default."""
        return self.content().decode()

    async def append(self, text: str) -> None:
        """Add ``text`` to what was written, for O_APPEND."""
        await self.replace(self.own() + text)

    async def truncate(self) -> None:
        """An empty content: back to the default."""
        await self.replace("")

    async def open(self, flags: int) -> Handle:
        """A handle that collects the writes of one open file."""
        return SettingHandle(self, flags)


class DocumentFile(TextFile):
    """A text longer than one write: taken whole when the file is closed."""

    writable = True

    async def store(self, document: bytes) -> None:
        """Take the document, or raise and change nothing."""
        raise NotImplementedError

    def own(self) -> bytes:
        """The document as it was written; empty for a default."""
        return self.content()

    async def open(self, flags: int) -> Handle:
        """A handle that collects the document."""
        return DocumentHandle(self, flags)


class StreamFile(File):
    """A file whose reader waits until there is something to say."""

    async def start(self) -> "Source":
        """The source of one reader, standing at the present."""
        raise NotImplementedError

    async def open(self, flags: int) -> Handle:
        """A handle that blocks, unless O_NONBLOCK is set."""
        return StreamHandle(await self.start(), flags)


class Source:
    """What one reader of a StreamFile reads from."""

    def take(self) -> bytes | None:
        """What can be read now: bytes, b"" at the end, None when there is nothing yet."""
        raise NotImplementedError

    async def ready(self) -> None:
        """Return when take() would give something."""
        raise NotImplementedError

    def close(self) -> None:
        """The reader has gone."""


class LogFile(File):
    """Bytes at offsets that only blocking work can give, growing at the end."""

    async def read_at(self, offset: int, length: int) -> bytes:
        """Up to ``length`` bytes from ``offset``."""
        raise NotImplementedError

    async def open(self, flags: int) -> Handle:
        """A handle that reads what is there at the moment of each read."""
        return LogHandle(self)


class HostFile(File):
    """A regular file of the host, given as it is; its content never changes."""

    attr_timeout = STABLE_SECONDS

    async def open_host(self) -> int:
        """An open descriptor of the file, checked to be what its name says."""
        raise NotImplementedError

    async def open(self, flags: int) -> Handle:
        """A handle whose pages the kernel may keep."""
        return HostFileHandle(await self.open_host())


class Readme(BytesFile):
    """This page: what the files here are, and what can be written to them."""

    name = "README"

    def raw(self) -> bytes:
        """The help of the directory and of each file declared for it."""
        assert self.parent is not None
        return describe(type(self.parent)).encode()

    def mtime_ns(self) -> int:
        """Text from the code is as old as the daemon."""
        return STARTED_NS


def describe(directory: type[Directory]) -> str:
    """The README of a class of directories."""
    parts = [directory.help(), ""]
    for node in directory.files:
        if node.help():
            parts += [f"{node.name}  ({_kind(node)})", _indent(node.help()), ""]
    return "\n".join(parts)


def _kind(node: type[Node]) -> str:
    if issubclass(node, Directory):
        return "directory"
    if issubclass(node, Link):
        return "link"
    assert issubclass(node, File)
    ways = [way for way, able in (("read", node.readable), ("write", node.writable)) if able]
    blocking = ", blocks" if issubclass(node, StreamFile) else ""
    return "-".join(ways) + blocking


def _indent(text: str) -> str:
    return "\n".join(f"    {line}" if line else "" for line in text.splitlines())


def refuse(sentence: str, code: int) -> NoReturn:
    """Raise a TreeError with the sentence and errno."""
    raise TreeError(sentence, errno=code)
