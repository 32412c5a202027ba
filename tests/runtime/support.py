"""A machine room for tests: a store with small images, and containers that run on it."""

import io
import os
import shutil
import signal
import tarfile
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import msgspec

from runtime import linux
from runtime.cgroups import hierarchies
from runtime.config import RuntimeConfig
from runtime.container import Container
from runtime.containers import Containers
from runtime.processes import command_line
from runtime.rootfs import Method, Rootfs
from runtime.trees import remove_tree
from store.cas import digest_of
from store.config import StoreConfig
from store.events import EventLog
from store.images import Image
from store.manifest import ContainerConfig, ImageConfig, RootFs
from store.platform import host_platform
from store.store import Store

APPLETS = (
    "sh",
    "cat",
    "chmod",
    "dd",
    "echo",
    "env",
    "false",
    "grep",
    "head",
    "hostname",
    "id",
    "ip",
    "kill",
    "ls",
    "mkdir",
    "mount",
    "mv",
    "printf",
    "pwd",
    "readlink",
    "rm",
    "seq",
    "sleep",
    "stat",
    "tail",
    "test",
    "touch",
    "tr",
    "true",
    "umount",
    "wc",
    "yes",
)
PASSWD = "root:x:0:0:root:/root:/bin/sh\nweb:x:1000:1001::/:/bin/sh\nodd:x:abc:1::/:\n"
GROUP = "root:x:0:\nweb:x:1001:\nmedia:x:44:web,other\nlogs:x:55:web\n"
PLAIN_TAR = "application/vnd.oci.image.layer.v1.tar"
IMAGE = "docker.io/library/box:1"


def tar_of(entries: Iterable[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    """An archive."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for entry, content in entries:
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def item(
    name: str,
    kind: bytes = tarfile.REGTYPE,
    mode: int = 0o644,
    link: str = "",
    device: tuple[int, int] = (0, 0),
) -> tarfile.TarInfo:
    """One entry's header."""
    entry = tarfile.TarInfo(name)
    entry.type, entry.mode, entry.linkname = kind, mode, link
    entry.devmajor, entry.devminor = device
    return entry


def base_layer() -> bytes:
    """Directories, busybox with its names, users and groups."""
    entries = [
        (item(f"{d}/", tarfile.DIRTYPE, 0o755), b"") for d in ("", "bin", "etc", "root", "dev")
    ]
    entries += [(item(f"{d}/", tarfile.DIRTYPE, 0o555), b"") for d in ("proc", "sys")]
    entries.append((item("tmp/", tarfile.DIRTYPE, 0o1777), b""))
    busybox = Path(shutil.which("busybox") or "").read_bytes()
    entries.append((item("bin/busybox", mode=0o755), busybox))
    entries += [(item(f"bin/{name}", tarfile.LNKTYPE, link="bin/busybox"), b"") for name in APPLETS]
    entries.append((item("etc/passwd"), PASSWD.encode()))
    entries.append((item("etc/group"), GROUP.encode()))
    return tar_of(entries)


def add_image(
    store: Store, name: str, layers: Iterable[bytes], config: ContainerConfig | None = None
) -> Image:
    """Put an image into a store, without a registry."""
    diff_ids = []
    for layer in layers:
        diff_id = digest_of(layer)
        store.layers.unpack(iter([layer]), PLAIN_TAR, diff_id, lambda: False)
        diff_ids.append(diff_id)
    platform = host_platform()
    image_config = ImageConfig(
        rootfs=RootFs("layers", tuple(diff_ids)),
        os=platform.os,
        architecture=platform.architecture,
        container=config,
    )
    digest = digest_of(msgspec.json.encode(image_config))
    image = Image(
        name=name,
        source=name,
        digest=digest,
        index_digest=None,
        config_digest=digest,
        platform=platform,
        size=0,
        layers=(),
        diff_ids=tuple(diff_ids),
        pulled_ns=time.time_ns(),
        config=image_config,
    )
    store.images.put(image)
    return image


class Room:
    """Everything that containers need, below one directory."""

    def __init__(
        self, directory: Path, config: RuntimeConfig | None = None, method: Method | None = None
    ) -> None:
        self.root = directory / "root"
        self.run = directory / "run"
        self.config = config or RuntimeConfig()
        self.events = EventLog()
        self.store = Store(self.root, StoreConfig(), self.events)
        self.rootfs = Rootfs(self.run, method)
        self.containers = Containers(self.store, self.rootfs, self.config, self.root, self.run)

    def add_base(self) -> Image:
        """The image that most tests use."""
        config = ContainerConfig(env=("PATH=/bin", "FROM_IMAGE=1"), cmd=("true",))
        return add_image(self.store, IMAGE, [base_layer()], config)

    async def make(self, name: str, *args: str, **settings: str) -> Container:
        """A container of the base image, not started."""
        container = await self.containers.create(name)
        await container.set("image", "box:1")
        if args:
            await container.set("args", "".join(f"{a}\0" for a in args))
        for key, value in settings.items():
            await container.set(key, value)
        return container

    async def output(self, name: str, *args: str, **settings: str) -> str:
        """What a container prints, once it has ended well."""
        container = await self.make(name, *args, **settings)
        await container.start()
        code = await container.wait()
        text = text_of(container)
        assert code == 0, (code, text)
        return text

    def close(self) -> None:
        """As the daemon does at its end."""
        self.rootfs.close()
        self.store.close()


@asynccontextmanager
async def opened(directory: Path, config: RuntimeConfig | None = None) -> AsyncIterator[Room]:
    """A room with the base image, whose containers are left as they are."""
    room = Room(directory, config)
    try:
        if IMAGE not in room.store.images:
            room.add_base()
        async with room.containers.opened():
            yield room
    finally:
        room.close()


def text_of(container: Container) -> str:
    """All output so far."""
    return container.log.read_text(0, 1 << 30).decode()


def mounts_below(directory: Path) -> list[str]:
    """Mountpoints, deepest first."""
    prefix = f"{directory}/"
    return [m.target for m in reversed(linux.mounts()) if m.target.startswith(prefix)]


def processes_of(directory: Path) -> list[int]:
    """The conmon processes of containers whose files are below a directory."""
    pids = (int(name) for name in os.listdir("/proc") if name.isdigit())
    return [pid for pid in pids if any(str(directory) in word for word in command_line(pid)[1:])]


def cgroups_of(uids: Iterable[str]) -> list[Path]:
    """Cgroups that containers have left."""
    return [c for uid in uids for h in hierarchies() if (c := h / "ctrfs" / uid).exists()]


def sweep(directory: Path) -> None:
    """End and unmount everything that a test left, whatever state it is in."""
    containers = directory / "root" / "containers"
    uids = [path.name for path in containers.iterdir()] if containers.exists() else []
    for pid in processes_of(directory / "run"):
        if "--cid" in command_line(pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    for cgroup in cgroups_of(uids):
        for member in (cgroup / "cgroup.procs").read_text().split():
            with suppress(ProcessLookupError):
                os.kill(int(member), signal.SIGKILL)
    deadline = time.monotonic() + 5
    while (left := cgroups_of(uids)) and time.monotonic() < deadline:
        for cgroup in left:
            with suppress(OSError):
                cgroup.rmdir()
        time.sleep(0.01)
    for target in mounts_below(directory):
        linux.umount(target, linux.MNT_DETACH)
    remove_tree(directory)
