"""All containers of one daemon: making, finding, renaming, removing, and adopting them."""

import logging
import re
import resource
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import trio

from runtime.background import Background
from runtime.config import RuntimeConfig
from runtime.container import Container
from runtime.errors import ContainerBusy, ContainerExists, ContainerNotFound, InvalidName
from runtime.oci import OciRuntime, read_ahead
from runtime.records import Record, Records
from runtime.rootfs import Rootfs
from runtime.steps import Services, prepare_directories, put_aside_orphans
from store.cas import Digest
from store.errors import CtrfsError
from store.images import Image
from store.store import Store

__all__ = ["Container", "Containers"]

log = logging.getLogger(__name__)

# Docker's rule for names, with an upper limit: it is a file name, and mostly the hostname.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
_RESERVED = frozenset({"README"})

# A mounted root filesystem costs little; unmounting one writes back its upper file
# system. So it waits until nobody has looked for one to two of these.
_IDLE_SECONDS = 60.0


class Containers:
    """The containers.

    Args:
        store: images, layers, and the database.
        rootfs: mounts.
        config: settings.
        root: the daemon's directory for what lasts.
        run: its directory for what a reboot may delete.
        held: gives descriptors that the monitors of containers with incomplete layers hold.

    Nothing works before ``opened`` has been entered. What is read is in memory and never
    waits; methods that change something are coroutines of trio.
    """

    def __init__(
        self,
        store: Store,
        rootfs: Rootfs,
        config: RuntimeConfig,
        root: Path,
        run: Path,
        held: Callable[[], tuple[int, ...]] = lambda: (),
    ) -> None:
        self._services = Services(
            store=store,
            rootfs=rootfs,
            runtime=OciRuntime(config, run / "runc"),
            config=config,
            records=Records(store.db),
            root=root / "containers",
            run=run / "containers",
            held=held,
        )
        self._containers: dict[str, Container] = {}
        self._promised: set[str] = set()
        self._background: Background | None = None
        self.changed_ns = time.time_ns()

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        """Load all containers and go on with those that run; leaving lets them run on.

        When it is entered, containers that ended since the last daemon have their exit
        codes, starts that it did not complete are undone, and removals are completed.

        Raises:
            CorruptContent: the records cannot be read.
        """
        _allow_many_descriptors()
        async with trio.open_nursery() as nursery:
            self._background = Background(nursery)
            await trio.to_thread.run_sync(prepare_directories, self._services)
            for record in await trio.to_thread.run_sync(self._services.records.load):
                container = Container(self._services, self._background, record)
                await container.recover()
                self._containers[record.id] = container
            known = [container.uid for container in self._containers.values()]
            await trio.to_thread.run_sync(put_aside_orphans, self._services, known)
            nursery.start_soon(self._unmount_idle)
            self._services.store.images.in_use = self.in_use
            self._services.store.images.pinned = self.pinned
            try:
                yield
            finally:
                with trio.CancelScope(shield=True):
                    for container in list(self._containers.values()):
                        await _unmount_last(container)
                nursery.cancel_scope.cancel()

    async def _unmount_idle(self) -> None:
        while True:
            await trio.sleep(_IDLE_SECONDS)
            for container in list(self._containers.values()):
                await container.unmount_if_idle()

    def expect_start(self) -> None:
        """A container will be started soon: have ready on time what that takes."""
        assert self._background is not None
        self._background.start_soon(trio.to_thread.run_sync, read_ahead, self._services.config)

    async def condemn(self, diff_id: Digest, sentence: str) -> None:
        """Kill the running containers that have a layer: what they read of it may be wrong."""
        for container in list(self._containers.values()):
            if container.is_running and container.has_layer(diff_id):
                log.error("%s: killed: %s", container.id, sentence)
                with suppress(ContainerBusy):  # it has just ended
                    await container.kill()
                container.error = sentence

    async def detach_idle(self) -> None:
        """Take the root filesystems of containers that do not run away, so that their next use
        mounts them anew."""
        for container in list(self._containers.values()):
            await container.detach_if_idle()

    def __contains__(self, name: object) -> bool:
        return name in self._containers

    def list(self) -> list[str]:
        """The names, oldest first."""
        return list(self._containers)

    def get(self, name: str) -> Container:
        """The container with this name.

        Raises:
            ContainerNotFound: there is none.
        """
        try:
            return self._containers[name]
        except KeyError:
            raise ContainerNotFound(f"there is no container {name}") from None

    def in_use(self, image: Image) -> str | None:
        """Which container needs an image, in words."""
        # Asked from other threads, while this one's makes and removes containers.
        for name, container in list(self._containers.items()):
            if container.uses(image.digest):
                return f"the container {name}"
        return None

    def pinned(self) -> Iterator[tuple[Digest, ...]]:
        """The stacks of layers that containers' files lie on, each bottom first."""
        for container in list(self._containers.values()):
            if container.diff_ids is not None:
                yield container.diff_ids

    async def create(self, name: str) -> Container:
        """Make a container.

        Raises:
            InvalidName: it cannot be called so.
            ContainerExists: the name is taken.
        """
        assert self._background is not None
        self._promise(name)
        try:
            now = time.time_ns()
            record = Record(
                uid=secrets.token_hex(8), id=name, created_ns=now, settings_ns=now, state_ns=now
            )
            await trio.to_thread.run_sync(self._services.records.add, record)
            container = Container(self._services, self._background, record)
            self._containers[name] = container
        finally:
            self._promised.discard(name)
        self._changed()
        self._services.store.events.emit("container.create", id=name)
        return container

    async def remove(self, name: str) -> None:
        """Destroy a container with all its files.

        Raises:
            ContainerNotFound: there is none.
            ContainerBusy: it runs, or its root filesystem is in use.
        """
        assert self._background is not None
        container = self.get(name)

        async def remove() -> None:
            await container.remove()
            del self._containers[container.id]
            self._changed()
            await trio.to_thread.run_sync(self._services.store.note_wanted)

        await self._background.run(remove)

    async def rename(self, name: str, new_name: str) -> None:
        """Give a container that does not run another name.

        Raises:
            ContainerNotFound, ContainerBusy, ContainerExists, InvalidName
        """
        container = self.get(name)
        self._promise(new_name)
        try:
            await container.rename(new_name)
            self._containers[new_name] = self._containers.pop(name)
        finally:
            self._promised.discard(new_name)
        self._changed()

    def _promise(self, name: str) -> None:
        """Reserve a name."""
        if not _NAME.fullmatch(name) or name in _RESERVED:
            raise InvalidName(
                f"{name[:80]!r} cannot name a container: up to 128 letters, digits, dots, dashes"
                " and underscores can, a letter or digit first"
            )
        if name in self._containers or name in self._promised:
            raise ContainerExists(f"there is a container {name} already")
        self._promised.add(name)

    def _changed(self) -> None:
        self.changed_ns = time.time_ns()


async def _unmount_last(container: Container) -> None:
    """Unmount at the daemon's end, which one bad mount must not spoil for the others."""
    try:
        await container.unmount()
    except (CtrfsError, OSError) as error:
        log.warning("%s: its root filesystem stays mounted: %s", container.id, error)


def _allow_many_descriptors() -> None:
    """Raise this process' limit as far as it may: each running container holds one open."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
