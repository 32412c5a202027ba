"""Serving with fanotify: the data files are the devices, and reads of them wait for contents.

The kernel asks before each read of a marked file (runtime/fanotify.py), and the answer is given
when the bytes are in the file. A file loses its mark when all that it holds is here, and when that
is so of all of a layer's, even those who have it mounted need this process no more.

The group of events is held by a keeper, the monitors of containers and the service manager as
well, so this process may be killed: readers wait for the next one.
"""

import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import trio

from runtime import keeper, linux
from runtime.fanotify import Event, FileId, PreContentGroup, file_id, open_unwatched
from runtime.layerserver.protocol import Device
from store import data_files
from store.errors import StoreError
from store.fetcher import Fetcher, Reading
from store.lazy import is_complete

log = logging.getLogger(__name__)

# Readers that wait at once, each with a descriptor; more wait for these.
_SLOTS = 600
# Events answered before other tasks have their turn: readers that find all here come fast.
_TURN = 50


def group_name(run: Path) -> str:
    """What the group of a run directory's layers is called among all processes."""
    return f"ctrfs-{hashlib.sha256(os.fsencode(run)).hexdigest()[:16]}"


def find_group(run: Path) -> PreContentGroup | None:
    """The group of a server before, from whoever holds it. Blocks shortly.

    Raises:
        EventsTaken: another server has it.
        Unsupported: another version of this program made it.
    """
    name = group_name(run)
    for pid in keeper.find(name):
        taken = keeper.take(pid, name)
        if taken is not None:
            return PreContentGroup.adopt(*taken)
    return None


def any_mounted(run: Path) -> bool:
    """Whether a layer is mounted, be it complete or not."""
    mounts = (mount for mount in linux.mounts() if mount.fstype == "erofs")
    return any(Path(mount.target).parent == run / "layers" for mount in mounts)


def any_left(run: Path, layers: Path) -> bool:
    """Whether an incomplete layer may still be read, though no server knows of it.

    Args:
        layers: the directory of all layers.
    """
    return any_mounted(run) or _any_open(keeper.marked(group_name(run)), layers)


def _any_open(files: set[FileId], layers: Path) -> bool:
    """Whether somebody has one of these marked files open. Of one that is in the store no more
    somebody has, or its mark would be gone."""
    gone = set(files)
    for data in _data_files(files, layers):
        if linux.is_open_elsewhere(data.fileno()):
            return True
        gone.remove(file_id(data.fileno()))
    return bool(gone)


def _data_files(files: set[FileId], layers: Path) -> Iterator[BinaryIO]:
    """Those of these files that are data files in the store, open. Reading them may wait."""
    for path in layers.glob(f"*/{data_files.NAME}*") if files else ():
        with suppress(OSError), path.open("rb") as data:  # gone, or in whatever way damaged
            if file_id(data.fileno()) in files:
                yield data


@dataclass(frozen=True, slots=True)
class _Part:
    """One of a layer's data files, and the spans that what it holds comes from."""

    fetcher: Fetcher
    descriptor: int
    spans: range

    @property
    def is_here(self) -> bool:
        """Whether all that it holds is here, and stays as it is. What nobody vouches for may
        be found wrong at the end."""
        layer = self.fetcher.layer
        return layer.record.vouched and layer.has_all(self.spans)


def _parts(fetcher: Fetcher) -> Iterator[_Part]:
    layer = fetcher.layer
    for number, start, end in layer.data.files.parts(0, layer.size):
        spans = layer.table.spans_between(start, end)
        yield _Part(fetcher, layer.data.descriptors[number], spans)


class FanotifyServing:
    """Serves layers by their data files; see ``Serving``.

    Args:
        run: the server's run directory.
        layers: the directory of all layers.
        found: the group of a server before, from ``find_group``.

    Raises:
        OSError, Unsupported: the kernel can't.
    """

    name = "fanotify"

    def __init__(self, run: Path, layers: Path, found: PreContentGroup | None) -> None:
        self._run = run
        self._layers = layers
        self._parts: dict[FileId, _Part] = {}
        self._knows_all = False  # of the layers that were incomplete when this began
        self._room = trio.Event()
        self._is_new = found is None
        self._group = found or PreContentGroup.create(_SLOTS, group_name(run))
        if not keeper.is_there(group_name(run)):
            keeper.start(self._group, group_name(run))

    @property
    def in_use(self) -> bool:
        """Whether a layer is mounted that is not complete, as far as is known, or was detached
        while somebody had a file of it open."""
        incomplete = [part for part in self._parts.values() if not part.fetcher.layer.complete]
        if (incomplete or not self._knows_all) and any_mounted(self._run):
            return True
        if any(linux.is_open_elsewhere(part.descriptor) for part in incomplete):
            return True
        return self._knows_all and _any_open(self._unknown(), self._layers)

    def _unknown(self) -> set[FileId]:
        """Files that a server before has marked, and that are of no layer now that is served."""
        return self._group.marked().difference(self._parts)

    def unguarded(self) -> list[Fetcher]:
        """The layers that were mounted while nobody held the group: all holders were killed.

        Which layer a mount is of cannot be seen, so if anything is mounted it is all.
        """
        if not self._is_new or not any_mounted(self._run):
            return []
        fetchers = dict.fromkeys(part.fetcher for part in self._parts.values())
        return [fetcher for fetcher in fetchers if not fetcher.layer.complete]

    def open_data(self, paths: Sequence[Path]) -> Sequence[int]:
        """Descriptors that raise no events."""
        return open_unwatched(paths)

    def add(self, fetcher: Fetcher) -> None:
        """Mark the layer's files, before anybody mounts them."""
        for part in _parts(fetcher):
            self._parts[file_id(part.descriptor)] = part
            self._group.mark(part.descriptor)
            self._release(part)

    def _release(self, part: _Part) -> None:
        """Take the mark away if nobody has to wait for the file any more."""
        if part.is_here:
            self._group.unmark(part.descriptor)

    def completed(self, fetcher: Fetcher) -> None:
        """Take the marks away: the files are like any others now."""
        for descriptor in fetcher.layer.data.descriptors:
            self._group.unmark(descriptor)

    def _unmark_complete(self) -> None:
        """A server before may have been killed when it had just completed a layer."""
        for data in _data_files(self._unknown(), self._layers):
            if is_complete(Path(data.name).parent):
                self._group.unmark(data.fileno())

    def device(self, fetcher: Fetcher) -> Device:
        """The data files."""
        return Device()

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Answer events until cancelled."""
        self._knows_all = True
        await trio.to_thread.run_sync(self._unmark_complete)
        async with trio.open_nursery() as nursery:
            for event in self._group.pending():
                self._begin(event, nursery)
            task_status.started()
            while True:
                await trio.lowlevel.wait_readable(self._group.fd)
                await self._take(nursery)

    async def _take(self, nursery: trio.Nursery) -> None:
        taken = 0
        while (event := self._group.next_event()) is not None:
            self._begin(event, nursery)
            taken += 1
            if taken % _TURN == 0:
                await trio.lowlevel.checkpoint()
        if not self._group.has_room:
            self._room = trio.Event()
            await self._room.wait()

    def _begin(self, event: Event, nursery: trio.Nursery) -> None:
        """Answer at once, or when what the reader waits for is here."""
        waits = [(part, _want(part.fetcher, event)) for part in self._read_by(event)]
        if not waits:
            log.error("pid %d reads a layer that is not known", event.pid)
            self._group.refuse(event)
        elif any(missing for _, missing in waits):
            nursery.start_soon(self._wait, event, waits)
        else:
            self._let_read(event, waits)

    def _let_read(self, event: Event, waits: list[tuple[_Part, list[int]]]) -> None:
        """What somebody wants to read is here."""
        self._group.answer(event)
        for part, _ in waits:
            self._release(part)

    def _read_by(self, event: Event) -> list[_Part]:
        if event.file is None:  # a predecessor could not record which
            return list(self._parts.values())
        part = self._parts.get(event.file)
        return [part] if part else []

    async def _wait(self, event: Event, waits: list[tuple[_Part, list[int]]]) -> None:
        reading = Reading(event.offset, event.pid)
        try:
            for part, missing in waits:
                await part.fetcher.wait(missing, reading)
        except (StoreError, OSError) as error:
            log.info("a read of a layer fails: %s", error)
            self._group.refuse(event)
        else:
            self._let_read(event, waits)
        self._room.set()

    def close(self) -> None:
        """Let go of the group; the keeper stays if a mount still needs it."""
        if not self.in_use:
            keeper.stop(group_name(self._run))
        self._group.close()


def _want(fetcher: Fetcher, event: Event) -> list[int]:
    """Ask for what is missing of what somebody reads, and reads next; the spans to wait for."""
    layer = fetcher.layer
    # A read may ask for more than there is; one of nothing is about its first byte.
    length = min(max(event.count, 1), layer.size - event.offset)
    if length <= 0:
        return []
    return fetcher.want(layer.table.spans_for(event.offset, length))
