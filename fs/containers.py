"""containers/: one directory per container; mkdir creates it, rmdir destroys it."""

import errno
import logging
from collections.abc import Callable, Iterable

import msgspec
import trio

from fs.context import Top
from fs.events import EventSource
from fs.handles import Handle
from fs.nodes import (
    STABLE_SECONDS,
    Caller,
    CommandFile,
    Directory,
    DocumentFile,
    Link,
    LogFile,
    Node,
    SettingFile,
    SlowTextFile,
    Source,
    StreamFile,
    TextFile,
    refuse,
)
from fs.stdin import StdinHandle
from runtime.containers import Container
from runtime.settings import SETTINGS, Setting
from runtime.signals import parse_signal
from store.events import rfc3339

log = logging.getLogger(__name__)


class _ContainerFile(TextFile):
    """A file of one container."""

    parent: "ContainerDirectory"

    @property
    def container(self) -> Container:
        """The container; it stays readable by those who have the file open after rmdir."""
        return self.parent.container

    def mtime_ns(self) -> int:
        """When the container last changed its state."""
        return self.container.state_ns


class _StateFile(_ContainerFile):
    """A file that changes with the container's state alone.

    The kernel may keep its attributes, which saves a GETATTR at each open, because they are
    invalidated whenever the state changes: see ContainersDirectory.follow.
    """

    attr_timeout = STABLE_SECONDS


class _SettingFile(_ContainerFile, SettingFile):
    """A setting: what the container will run with, from the image where it was not written."""

    setting: Setting

    def read(self) -> str:
        """The value in force, in the form in which it can be written."""
        return self.container.effective_text(self.setting.name)

    async def replace(self, text: str) -> None:
        """Set it; an empty text goes back to the default."""
        await self.container.set(self.setting.name, text)

    def own(self) -> str:
        """What was written."""
        return self.container.own_text(self.setting.name)

    def mtime_ns(self) -> int:
        """When a setting was last written."""
        return self.container.settings_ns


def _setting_file(setting: Setting) -> type[_SettingFile]:
    """The class of the file for one setting."""
    attributes = {
        "name": setting.name,
        "__doc__": setting.help,
        "setting": setting,
        "private": setting.private,
    }
    return type(setting.name.title(), (_SettingFile,), attributes)


class Spec(_ContainerFile, DocumentFile):
    """All settings as one JSON document. `cp a/spec b/spec` makes b like a. Taken when the
    file is closed; if something in it is wrong, close fails and nothing changes."""

    name = "spec"
    private = True

    def content(self) -> bytes:
        """The settings that were written."""
        return self.container.spec_document()

    async def store(self, document: bytes) -> None:
        """Replace all settings."""
        await self.container.set_spec_document(document)

    def mtime_ns(self) -> int:
        """When a setting was last written."""
        return self.container.settings_ns


class ConfigJson(_ContainerFile, DocumentFile):
    """The OCI runtime configuration that the container will run with, made from the image and
    the settings. Write your own to override it (the root filesystem stays ours); write
    nothing, `: > config.json`, to go back to the generated one. Taken when the file is
    closed."""

    name = "config.json"
    private = True

    def content(self) -> bytes:
        """The document as runc gets it; nothing while the container has no image."""
        return self.container.config_document()

    async def store(self, document: bytes) -> None:
        """Override the generated document."""
        await self.container.set_config_document(document)

    def own(self) -> bytes:
        """The document that was written."""
        return self.container.own_config_document()

    def mtime_ns(self) -> int:
        """When a setting was last written."""
        return self.container.settings_ns


class State(_StateFile, CommandFile):
    """`created`, `running`, `paused` or `stopped`. Write `start`, `stop` (the stop signal, then
    KILL after stop_timeout seconds), `kill`, `pause`, `resume` or `restart`; the write
    returns when it is done."""

    name = "state"

    def read(self) -> str:
        """One word."""
        return self.container.state

    async def command(self, text: str, caller: Caller) -> None:
        """Carry out one word."""
        container = self.container
        commands = {
            "start": container.start,
            "stop": container.stop,
            "kill": container.kill,
            "pause": container.pause,
            "resume": container.resume,
            "restart": container.restart,
        }
        command = commands.get(text.strip())
        if command is None:
            refuse(f"{text[:40]!r} is not one of {', '.join(commands)}", errno.EINVAL)
        await command()


class Pid(_StateFile):
    """Process id of the container's first process as this machine sees it; empty unless it
    runs."""

    name = "pid"

    def read(self) -> str:
        """A number or nothing."""
        return str(self.container.pid or "")


class ExitCode(_StateFile):
    """What the container's first process ended with, 128+N when signal N ended it; empty
    before it has ended."""

    name = "exit_code"

    def read(self) -> str:
        """A number or nothing."""
        code = self.container.exit_code
        return "" if code is None else str(code)


class Error(_ContainerFile):
    """The last command on this container that failed, and why; empty after a successful start."""

    name = "error"
    private = True

    def read(self) -> str:
        """A sentence or nothing."""
        return self.container.error


class _Time(_StateFile):
    def time_ns(self) -> int | None:
        raise NotImplementedError

    def read(self) -> str:
        moment = self.time_ns()
        return rfc3339(moment) if moment else ""


class CreatedAt(_Time):
    """When the container was made, RFC 3339 UTC."""

    name = "created_at"

    def time_ns(self) -> int | None:
        """Nanoseconds since the epoch."""
        return self.container.created_ns


class StartedAt(_Time):
    """When the container last started; empty before."""

    name = "started_at"

    def time_ns(self) -> int | None:
        """Nanoseconds since the epoch."""
        return self.container.started_ns


class FinishedAt(_Time):
    """When the container last ended; empty while it runs."""

    name = "finished_at"

    def time_ns(self) -> int | None:
        """Nanoseconds since the epoch."""
        return self.container.finished_ns


class _EndSource(Source):
    """The exit code, once there is one."""

    def __init__(self, container: Container) -> None:
        self._container = container
        self._given = False

    def take(self) -> bytes | None:
        """The code as a line, once."""
        if self._given:
            return b""
        code = self._container.ended_with()
        if code is None:
            return None
        self._given = True
        return f"{code}\n".encode()

    async def ready(self) -> None:
        """Wait for the end."""
        await self._container.wait()


class Wait(StreamFile):
    """Blocks until the container ends, then gives its exit code. Of a container that has not
    been started it waits for the end of its first run."""

    name = "wait"
    parent: "ContainerDirectory"

    async def start(self) -> Source:
        """One reader."""
        return _EndSource(self.parent.container)

    def mtime_ns(self) -> int:
        """When the container last changed its state."""
        return self.parent.container.state_ns


class Signal(_ContainerFile, CommandFile):
    """Write the name or number of a signal (`TERM`, `SIGHUP`, `15`) to send it to the
    container's first process."""

    name = "signal"
    readable = False

    def content(self) -> bytes:
        """Nothing to read."""
        return b""

    async def command(self, text: str, caller: Caller) -> None:
        """Send one signal."""
        await self.container.signal(parse_signal(text))


class _LogFile(LogFile):
    private = True
    parent: "ContainerDirectory"

    def mtime_ns(self) -> int:
        """When something was last written to it."""
        container = self.parent.container
        return max(container.log.mtime_ns(), container.created_ns)


class Log(_LogFile):
    """What the container wrote to its standard output and error, as it came. `tail -f` follows
    it."""

    name = "log"

    async def slow_size(self) -> int:
        """Bytes of text so far."""
        return await trio.to_thread.run_sync(self.parent.container.log.text_size)

    async def read_at(self, offset: int, length: int) -> bytes:
        """Text from an offset."""
        log = self.parent.container.log
        return await trio.to_thread.run_sync(log.read_text, offset, length)


class LogJson(_LogFile):
    """The same as JSON Lines: `time`, `stream` (stdout or stderr), `text`. Its size is not known
    before it is read."""

    name = "log.json"

    async def read_at(self, offset: int, length: int) -> bytes:
        """JSON from an offset."""
        log = self.parent.container.log
        return await trio.to_thread.run_sync(log.read_json, offset, length)


class Stdin(SettingFile):
    """Standard input of the container. Before the start write `open` or `once` to connect it
    (`none`, the default, gives the process /dev/null); while it runs, what is written goes to
    the process. With `once` it gets end-of-file when the writer closes this file."""

    name = "stdin"
    private = True
    parent: "ContainerDirectory"

    def read(self) -> str:
        """none, open or once."""
        return self.parent.container.effective_text("stdin")

    async def replace(self, text: str) -> None:
        """Choose how it is connected."""
        await self.parent.container.set("stdin", text)

    async def truncate(self) -> None:
        """Opening with `>` cuts nothing."""

    async def open(self, flags: int) -> Handle:
        """A handle that feeds the process while it runs."""
        return StdinHandle(self, self.parent.container, flags)

    def mtime_ns(self) -> int:
        """When a setting was last written."""
        return self.parent.container.settings_ns


class Processes(_ContainerFile, SlowTextFile):
    """The container's processes as ps shows them: PID, PPID, USER, STAT, TIME, COMMAND, with
    numbers as this machine sees them."""

    name = "processes"

    async def slow_content(self) -> bytes:
        """A table, or nothing when it does not run."""
        table = await self.container.processes()
        return f"{table}\n".encode("utf-8", "surrogateescape") if table else b""


class Changes(_ContainerFile, SlowTextFile):
    """What the container changed against its image, `A`, `C` or `D` and the path, a line each."""

    name = "changes"
    private = True

    async def slow_content(self) -> bytes:
        """Sorted by path."""
        return await self.container.changes()


class Opened(_ContainerFile, SlowTextFile):
    """Files of the root filesystem that the container opened in the first seconds of its last run,
    a path a line, in the order of their first use. It is complete after these seconds, or when
    the container has ended; `ctrfs convert --trace` makes images of which they come first."""

    name = "opened"
    private = True

    async def slow_content(self) -> bytes:
        """Absolute paths as the container sees them."""
        return await self.container.opened()


class ContainerRootfs(Link):
    """The container's live root filesystem. It is there before the first start too, so files
    can be put into it; as long as no image is set, there is none."""

    name = "rootfs"
    # Tools go through it for each file; when there is none any more, readlink(2) says so.
    entry_timeout = 1.0
    parent: "ContainerDirectory"

    def exists(self) -> bool:
        """Whether there is an image to have files of."""
        return bool(self.parent.container.effective_text("image"))

    async def target(self) -> str:
        """A directory below /run, mounted."""
        return str(await self.parent.container.rootfs())


class NetNamespace(_SettingFile):
    """The network the container sees: `none` (only a loopback interface) or `host`."""

    name = "namespace"
    setting = SETTINGS["network"]

    @property
    def container(self) -> Container:
        """The container that this network is of."""
        assert isinstance(self.parent, Net)
        return self.parent.parent.container


class Net(Directory):
    """The container's network."""

    name = "net"
    files = (NetNamespace,)
    parent: "ContainerDirectory"


class ContainerDirectory(Directory):
    """One container. Write its settings, then `start` to state. rmdir destroys it with all
    its files; while it runs that is refused with EBUSY. mv renames it when it does not run."""

    files = (
        *(_setting_file(s) for s in SETTINGS.values() if s.name not in ("stdin", "network")),
        Spec,
        ConfigJson,
        State,
        Pid,
        ExitCode,
        Error,
        CreatedAt,
        StartedAt,
        FinishedAt,
        Wait,
        Signal,
        Log,
        LogJson,
        Stdin,
        Processes,
        Changes,
        Opened,
        ContainerRootfs,
        Net,
    )

    def __init__(self, parent: "ContainersDirectory", container: Container) -> None:
        self.container = container
        super().__init__(parent)

    @property
    def name(self) -> str:  # type: ignore[override]
        """The container's present name."""
        return self.container.id

    def identity(self) -> tuple[str, str]:
        """The same container under another name is the same directory."""
        return ("container", self.container.uid)

    def mtime_ns(self) -> int:
        """When a setting or the state last changed."""
        return max(self.container.settings_ns, self.container.state_ns)

    def failed(self, sentence: str) -> None:
        """Keep what went wrong for the file `error`."""
        self.container.error = sentence


class _Event(msgspec.Struct):
    event: str
    id: str = ""


class ContainersDirectory(Directory):
    """Containers. `mkdir NAME` makes one, rmdir destroys it."""

    name = "containers"
    files = ()
    parent: Top

    def find(self, name: str) -> Node | None:
        """The container with this name."""
        containers = self.parent.context.containers
        return ContainerDirectory(self, containers.get(name)) if name in containers else None

    def dynamic(self) -> Iterable[str]:
        """The names of all containers."""
        return self.parent.context.containers.list()

    async def mkdir(self, name: str) -> None:
        """Make a container."""
        await self.parent.context.containers.create(name)

    async def rmdir(self, name: str) -> None:
        """Destroy a container."""
        await self.parent.context.containers.remove(name)

    async def rename(self, name: str, target: Directory, new_name: str) -> None:
        """Rename a container that does not run."""
        if not isinstance(target, ContainersDirectory):
            refuse("a container stays in containers/", errno.EPERM)
        await self.parent.context.containers.rename(name, new_name)

    async def follow(self, changed: Callable[[Directory], None]) -> None:
        """Tell of each container whose state changed, until cancelled."""
        context = self.parent.context
        source = EventSource(context.store.events)
        try:
            while True:
                await source.ready()
                for line in (source.take() or b"").splitlines():
                    event = msgspec.json.decode(line, type=_Event)
                    if event.event.startswith("container.") and event.id in context.containers:
                        changed(ContainerDirectory(self, context.containers.get(event.id)))
        except Exception:
            # The kernel's attributes then live until their timeout, no longer.
            log.exception("following the containers failed")
        finally:
            source.close()

    def mtime_ns(self) -> int:
        """When a container was last made, renamed or removed."""
        return self.parent.context.containers.changed_ns
