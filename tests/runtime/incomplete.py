"""Mounted layers whose data files are sparse, and processes that read and fill them."""

import os
import random
import select
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from runtime import keeper, linux
from runtime.fanotify import Event, EventsTaken, FileId, PreContentGroup, open_unwatched
from runtime.layerserver.fanotify_serving import group_name
from runtime.processes import identify
from runtime.rootfs import mount_file
from store.cas import digest_of
from store.data_files import open_all
from store.layers import LayerLimits, Layers
from tests.runtime.support import PLAIN_TAR, item, tar_of

PAGE = 4096
SLOTS = 32


def pattern(seed: int, size: int) -> bytes:
    """Bytes of which none is zero."""
    generator = random.Random(seed)
    block = bytes(generator.randrange(1, 256) for _ in range(PAGE - 8))
    pages = (block + f"{page:08}".encode() for page in range(-(-size // PAGE)))
    return b"".join(pages)[:size]


class Incomplete:
    """Some layers. ``name`` is that of the group's memory file."""

    def __init__(self, place: Path, layers: list[dict[str, bytes]]) -> None:
        self.place = place
        self.name = group_name(place)
        self.contents = layers
        self.data = [place / f"data{number}" for number in range(len(layers))]
        self.mounts = [place / f"mount{number}" for number in range(len(layers))]
        self._full: list[int] = []
        self._metas: list[Path] = []
        store = Layers(place / "layers", LayerLimits())
        for files, data in zip(layers, self.data, strict=True):
            blob = tar_of((item(name, tarfile.REGTYPE, 0o755), b) for name, b in files.items())
            diff_id = digest_of(blob)
            store.unpack(iter([blob]), PLAIN_TAR, diff_id, lambda: False)
            (image,) = store.mountable([diff_id])
            assert image.data is not None
            self._full.append(*open_all(image.data.paths, os.O_RDONLY))
            self._metas.append(image.meta)
            with data.open("wb") as file:
                file.truncate(os.fstat(self._full[-1]).st_size)
        status = [data.stat() for data in self.data]
        self.ids = [FileId(s.st_dev, s.st_ino) for s in status]

    def mark(self, group: PreContentGroup) -> None:
        """Mark all data files."""
        for data in self.data:
            with data.open("rb") as file:
                group.mark(file.fileno())

    def mount(self) -> None:
        """Mount all layers."""
        for meta, data, target in zip(self._metas, self.data, self.mounts, strict=True):
            target.mkdir()
            mount_file(meta, (data,), str(target))

    def fill(self, event: Event) -> None:
        """Write what an event waits for, into all layers if it does not say which."""
        for layer, file in enumerate(self.ids):
            if event.file in (file, None):
                start = event.offset - event.offset % PAGE
                self.write(layer, start, event.offset + event.count - start)

    def write(self, layer: int, start: int, length: int) -> None:
        """Put a part of a layer's contents into its data file."""
        (target,) = open_unwatched((self.data[layer],))
        os.pwrite(target, os.pread(self._full[layer], length, start), start)
        os.close(target)

    def serve(self, group: PreContentGroup, seconds: float = 0.0) -> None:
        """Fill until the process ends, with some threads; each event takes a random time."""

        def work(event: Event) -> None:
            time.sleep(random.random() * seconds)
            self.fill(event)
            group.answer(event)

        for event in group.pending():
            threading.Thread(target=work, args=(event,)).start()
        while True:
            select.select([group.fd], [], [])
            new = group.next_event()
            if new is not None:
                threading.Thread(target=work, args=(new,)).start()

    @contextmanager
    def served(self, group: PreContentGroup) -> Iterator[list[Event]]:
        """Fill in a thread meanwhile; the events so far."""
        events: list[Event] = []
        done, stop = os.pipe()

        def work() -> None:
            while done not in select.select([group.fd, done], [], [])[0]:
                event = group.next_event()
                if event is not None:
                    events.append(event)
                    self.fill(event)
                    group.answer(event)

        thread = threading.Thread(target=work)
        thread.start()
        try:
            yield events
        finally:
            os.close(stop)
            thread.join()
            os.close(done)

    def take(self) -> PreContentGroup:
        """The group, from any holder."""
        for pid in keeper.find(self.name):
            taken = keeper.take(pid, self.name)
            if taken is not None:
                try:
                    return PreContentGroup.adopt(*taken)
                except EventsTaken:
                    for descriptor in taken:
                        os.close(descriptor)
                    raise
        raise AssertionError("nobody holds the group")

    def close(self) -> None:
        """End all holders and unmount."""
        keeper.stop(self.name)
        for pid in keeper.find(self.name):
            kill(pid)
        for target in self.mounts:
            if target.is_mount():
                linux.umount(str(target), linux.MNT_DETACH)
        for full in self._full:
            os.close(full)


def fork(function: Callable[[], object]) -> int:
    """A process that runs a function; it fails when that does, or returns False."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = 1 if function() is False else 0
        except BaseException as error:  # noqa: BLE001 - it must not come back
            print(repr(error), file=sys.stderr)
        finally:
            os._exit(code)
    return pid


def kill(pid: int) -> None:
    """SIGKILL, and wait for the end."""
    process = identify(pid)
    if process is not None:
        assert process.kill(5), f"{pid} does not end"
    with suppress(ChildProcessError):
        os.waitpid(pid, 0)


def succeeded(pid: int, seconds: float = 10) -> bool:
    """Wait for a child; whether it ended well."""
    pidfd = os.pidfd_open(pid)
    ended = select.select([pidfd], [], [], seconds)[0]
    os.close(pidfd)
    assert ended, "the process still waits"
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def waits(pid: int) -> bool:
    """Whether a child still runs, after a moment in which it could have ended."""
    time.sleep(0.05)
    return os.waitpid(pid, os.WNOHANG)[0] == 0


def refuse_until_ended(group: PreContentGroup, *readers: int) -> list[bool]:
    """Refuse what comes as long as these children run; whether they ended well."""
    results: dict[int, bool] = {}
    deadline = time.monotonic() + 10
    while len(results) < len(readers):
        assert time.monotonic() < deadline, "a process still waits"
        if select.select([group.fd], [], [], 0.01)[0]:
            group.refuse(event_of(group))
        for pid in set(readers) - set(results):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                results[pid] = status == 0
    return [results[pid] for pid in readers]


def event_of(group: PreContentGroup) -> Event:
    """The next event, which comes soon."""
    assert select.select([group.fd], [], [], 5)[0], "no event came"
    event = group.next_event()
    assert event is not None
    return event


@contextmanager
def next_descriptor(number: int) -> Iterator[None]:
    """Have all lower descriptors in use meanwhile, and this one free."""
    taken = []
    while (descriptor := os.open(os.devnull, os.O_RDONLY)) < number:
        taken.append(descriptor)
    assert descriptor == number, "it is in use"
    os.close(descriptor)
    yield
    for descriptor in taken:
        os.close(descriptor)
