"""Reads of sparse layers that wait: on real EROFS mounts, with processes that are killed."""

import errno
import mmap
import os
import random
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from runtime import cgroups, keeper
from runtime.cgroups import hierarchies
from runtime.errors import Unsupported
from runtime.fanotify import EventsTaken, PreContentGroup, available
from tests.runtime.incomplete import (
    PAGE,
    SLOTS,
    Incomplete,
    event_of,
    fork,
    kill,
    next_descriptor,
    pattern,
    refuse_until_ended,
    succeeded,
    waits,
)

Server = Callable[[Callable[[PreContentGroup], object]], int]

SIZE = 1 << 20
ONE = {"a": pattern(1, SIZE), "b": pattern(2, SIZE)}
TWO = {"a": pattern(3, SIZE), "b": pattern(4, SIZE)}


@pytest.fixture(autouse=True)
def possible(place: Path) -> None:
    """Pass over where the kernel has no such events; the code says then why."""
    why_not = available(place)
    if why_not:
        pytest.skip(why_not)


@pytest.fixture
def layers(place: Path) -> Iterator[Incomplete]:
    """Two layers, not mounted yet."""
    layers = Incomplete(place, [ONE, TWO])
    yield layers
    layers.close()


@pytest.fixture
def group(layers: Incomplete) -> Iterator[PreContentGroup]:
    """A group of this process, with both layers mounted."""
    group = PreContentGroup.create(SLOTS, layers.name)
    layers.mark(group)
    layers.mount()
    yield group
    group.close()


def reads(layers: Incomplete, layer: int, name: str, start: int = 0, length: int = PAGE) -> int:
    """A process that succeeds when it reads what is right."""
    path = layers.mounts[layer] / name
    expected = layers.contents[layer][name][start : start + length]

    def read() -> bool:
        descriptor = os.open(path, os.O_RDONLY)
        # Without readahead there is one event.
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        return os.pread(descriptor, length, start) == expected

    return fork(read)


def test_a_read_waits_for_the_contents(layers: Incomplete, group: PreContentGroup) -> None:
    assert group.next_event() is None
    reader = reads(layers, 1, "b", SIZE - PAGE - 10, 2 * PAGE)
    event = event_of(group)
    assert event.file == layers.ids[1]
    assert event.pid == reader
    assert event.count == 2 * PAGE
    assert group.pending() == [event]
    assert waits(reader)
    layers.fill(event)
    group.answer(event)
    assert succeeded(reader)
    assert group.pending() == []
    assert succeeded(reads(layers, 1, "b", SIZE - PAGE))  # in the page cache


def test_a_refused_read_fails_and_can_be_repeated(
    layers: Incomplete, group: PreContentGroup
) -> None:
    def fails() -> bool:
        try:
            os.pread(os.open(layers.mounts[0] / "a", os.O_RDONLY), PAGE, 0)
        except OSError as error:
            return error.errno == errno.EIO
        return False

    assert refuse_until_ended(group, fork(fails)) == [True]
    reader = reads(layers, 0, "a")
    event = event_of(group)
    layers.fill(event)
    group.answer(event)
    assert succeeded(reader)


def test_the_descriptor_of_an_event_is_good_for_filling(
    place: Path, group: PreContentGroup
) -> None:
    path = place / "big"
    with path.open("wb") as file:
        file.truncate(5 << 30)
        group.mark(file.fileno())
    reader = fork(lambda: os.pread(os.open(path, os.O_RDONLY), 4, 4 << 30) == b"here")
    event = event_of(group)
    assert (event.offset, event.count) == (4 << 30, PAGE)
    os.pwrite(event.number, b"here", event.offset)
    group.answer(event)
    assert succeeded(reader)
    with pytest.raises(OSError):
        os.fstat(event.number)


def test_a_killed_reader_takes_no_answer(layers: Incomplete, group: PreContentGroup) -> None:
    first, second = reads(layers, 0, "a"), reads(layers, 0, "b")
    event = event_of(group)
    kill(first)
    kill(second)
    group.answer(event)
    assert group.next_event() is None


def test_events_wait_for_a_free_slot(layers: Incomplete) -> None:
    group = PreContentGroup.create(1, layers.name)
    layers.mark(group)
    layers.mount()
    readers = [reads(layers, 0, "a"), reads(layers, 0, "b")]
    for _ in readers:
        event = event_of(group)
        assert not group.has_room
        assert group.next_event() is None
        layers.fill(event)
        group.answer(event)
        assert group.has_room
    assert all(succeeded(reader) for reader in readers)
    group.close()


def test_unmarked_files_are_read_without_us(layers: Incomplete, group: PreContentGroup) -> None:
    reader = reads(layers, 0, "a")
    waiting = event_of(group)
    layers.write(0, 0, layers.data[0].stat().st_size)
    with layers.data[0].open("rb") as file:
        group.unmark(file.fileno())
        group.unmark(file.fileno())
    assert waits(reader)
    group.answer(waiting)
    assert succeeded(reader)
    assert succeeded(reads(layers, 0, "b", 0, SIZE))
    assert group.next_event() is None
    other = reads(layers, 1, "a")
    assert event_of(group).file == layers.ids[1]
    kill(other)


def test_writing_raises_no_events(layers: Incomplete, group: PreContentGroup) -> None:
    """As many threads as may be write, while others read and wait for some of them."""
    size = layers.data[0].stat().st_size
    starts = list(range(0, size, 16 * PAGE))
    random.shuffle(starts)

    def prefetch(share: list[int]) -> None:
        for start in share:
            layers.write(0, start, 16 * PAGE)

    writers = [threading.Thread(target=prefetch, args=(starts[n::20],)) for n in range(20)]
    with layers.served(group) as events:
        readers = [reads(layers, 0, name, 0, SIZE) for name in ONE for _ in range(3)]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        assert all(succeeded(reader) for reader in readers)
    assert events
    assert {event.pid for event in events} <= set(readers)


def by_mmap(path: Path) -> bytes:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as memory:
        return memory[:]


def by_pages(path: Path) -> bytes:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as memory:
        memory.madvise(mmap.MADV_RANDOM)
        pages = {start: memory[start : start + PAGE] for start in reversed(range(0, SIZE, PAGE))}
    return b"".join(pages[start] for start in sorted(pages))


def by_populating(path: Path) -> bytes:
    populate_read = 22
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as memory:
        memory.madvise(populate_read)
        return memory[:]


def by_advice(path: Path) -> bytes:
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
        return file.read()


def by_splice(path: Path) -> bytes:
    parts = []
    source, sink = os.pipe()
    with path.open("rb") as file:
        while length := os.splice(file.fileno(), sink, 16 * PAGE):
            while length:
                parts.append(os.read(source, length))
                length -= len(parts[-1])
    return b"".join(parts)


def by_sendfile(path: Path) -> bytes:
    target = os.memfd_create("target")
    with path.open("rb") as file:
        while os.sendfile(target, file.fileno(), None, 3 * SIZE):
            pass
    return os.pread(target, 2 * SIZE, 0)


def _gives(way: Callable[[Path], bytes], path: Path, expected: bytes) -> bool:
    return way(path) == expected


WAYS: tuple[Callable[[Path], bytes], ...] = (
    Path.read_bytes,
    by_mmap,
    by_pages,
    by_populating,
    by_advice,
    by_splice,
    by_sendfile,
)


def test_all_ways_to_read_wait(place: Path) -> None:
    files = {way.__name__: pattern(number, SIZE) for number, way in enumerate(WAYS)}
    files["busybox"] = Path(shutil.which("busybox") or "").read_bytes()
    layers = Incomplete(place, [files])
    group = PreContentGroup.create(SLOTS, layers.name)
    layers.mark(group)
    layers.mount()
    top = layers.mounts[0]
    try:
        with layers.served(group) as events:
            for way in WAYS:
                path = top / way.__name__
                before = len(events)
                assert succeeded(fork(partial(_gives, way, path, files[way.__name__]))), way
                assert len(events) > before, way
            # Not from here: the thread that fills would wait for the vfork(2) of this one.
            assert succeeded(fork(lambda: os.execv(top / "busybox", ["true"])))
    finally:
        layers.close()
        group.close()


# --- readers of events that are killed ----------------------------------------------------


@pytest.fixture
def server(layers: Incomplete) -> Iterator[Server]:
    """Forks what makes a group, marks and mounts, has a keeper hold it, and then does more."""
    pids = []

    def start(then: Callable[[PreContentGroup], object]) -> int:
        ready, tell = os.pipe()

        def run() -> None:
            # Numbers of events that are free in the process of the test.
            while os.open(os.devnull, os.O_RDONLY) < 200:
                pass
            group = PreContentGroup.create(SLOTS, layers.name)
            layers.mark(group)
            layers.mount()
            keeper.start(group, layers.name)
            os.write(tell, b"x")
            then(group)

        pids.append(fork(run))
        os.close(tell)
        assert os.read(ready, 1) == b"x"
        os.close(ready)
        return pids[-1]

    yield start
    for pid in pids:
        kill(pid)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def reads_one_and_dies(group: PreContentGroup) -> None:
    event_of(group)
    die()


def test_events_outlive_their_reader(layers: Incomplete, server: Server) -> None:
    victim = server(reads_one_and_dies)
    first = reads(layers, 0, "a")
    os.waitpid(victim, 0)
    second = reads(layers, 1, "a")
    group = layers.take()
    (inherited,) = group.pending()
    assert inherited.inherited
    assert inherited.file == layers.ids[0]
    assert inherited.pid == first
    own = event_of(group)
    assert not own.inherited
    assert waits(first) and waits(second)
    for event in (inherited, own):
        layers.fill(event)
        group.answer(event)
    assert succeeded(first) and succeeded(second)
    group.close()


@pytest.mark.parametrize("refused", [False, True])
def test_events_with_the_same_number(layers: Incomplete, server: Server, refused: bool) -> None:
    victim = server(reads_one_and_dies)
    first = reads(layers, 0, "a")
    os.waitpid(victim, 0)
    group = layers.take()
    (inherited,) = group.pending()
    second = reads(layers, 1, "a")
    with next_descriptor(inherited.number):
        own = event_of(group)
    assert own.number == inherited.number
    layers.fill(own)
    group.answer(own)
    assert waits(first) and waits(second)
    if refused:
        group.refuse(inherited)
        assert refuse_until_ended(group, first, second) == [False, False]
    else:
        layers.fill(inherited)
        group.answer(inherited)
        assert succeeded(first) and succeeded(second)
    group.close()


def test_death_before_the_file_is_stored(
    layers: Incomplete, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def serve(group: PreContentGroup) -> None:
        monkeypatch.setattr(os, "fstat", lambda _: die())
        event_of(group)

    victim = server(serve)
    reader = reads(layers, 1, "a")
    os.waitpid(victim, 0)
    group = layers.take()
    (event,) = group.pending()
    assert event.file is None
    layers.fill(event)
    group.answer(event)
    assert succeeded(reader)
    group.close()


def test_death_between_answer_and_note(
    layers: Incomplete, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def serve(group: PreContentGroup) -> None:
        monkeypatch.setattr(PreContentGroup, "_clear", lambda *_: die())
        event = event_of(group)
        layers.fill(event)
        group.answer(event)

    victim = server(serve)
    reader = reads(layers, 0, "a")
    os.waitpid(victim, 0)
    assert succeeded(reader)
    group = layers.take()
    (event,) = group.pending()
    reader = reads(layers, 0, "b")
    with next_descriptor(event.number):
        other = event_of(group)
    group.answer(event)
    assert waits(reader)
    layers.fill(other)
    group.answer(other)
    assert succeeded(reader)
    assert group.pending() == []
    group.close()


def test_one_process_at_a_time(layers: Incomplete, server: Server) -> None:
    victim = server(lambda _: signal.pause())
    with pytest.raises(EventsTaken):
        layers.take()
    kill(victim)
    group = layers.take()
    with pytest.raises(EventsTaken):
        layers.take()
    group.close()


def test_kills_at_any_moment(layers: Incomplete, server: Server) -> None:
    """Servers and readers are killed again and again; nobody reads a wrong byte."""

    def reader(seed: int) -> None:
        generator = random.Random(seed)
        for _ in range(25):
            layer, name = generator.randrange(2), generator.choice("ab")
            start, length = generator.randrange(SIZE), generator.choice((1, PAGE, SIZE // 3))
            expected = layers.contents[layer][name][start : start + length]
            descriptor = os.open(layers.mounts[layer] / name, os.O_RDONLY)
            assert os.pread(descriptor, length, start) == expected
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)

    victim = server(lambda group: layers.serve(group, 0.02))
    generator = random.Random(5)
    readers = [fork(partial(reader, seed)) for seed in range(8)]
    for number in range(10):
        time.sleep(generator.random() * 0.05)
        kill(victim)
        if number % 3 == 0:
            kill(readers.pop())
            readers.insert(0, fork(partial(reader, number)))
        victim = fork(lambda: layers.serve(layers.take(), 0.02))
    assert all(succeeded(pid, 30) for pid in readers)
    kill(victim)


def test_without_a_holder_holes_are_read_as_zeros(layers: Incomplete, server: Server) -> None:
    """What the holders are for; and that these tests would see a zero."""
    victim = server(lambda _: signal.pause())
    reader = reads(layers, 0, "a")
    assert waits(reader)
    kill(victim)
    assert waits(reader)
    keeper.stop(layers.name)
    assert keeper.find(layers.name) == []
    assert not succeeded(reader)
    path = layers.mounts[1] / "a"
    assert succeeded(fork(lambda: path.read_bytes() == bytes(SIZE)))


# --- keepers and limits -------------------------------------------------------------------


def test_a_keeper_is_small_and_found(layers: Incomplete) -> None:
    group = PreContentGroup.create(SLOTS, layers.name)
    pid = keeper.start(group, layers.name)
    assert keeper.find(layers.name) == [pid]
    assert keeper.find(layers.name + "x") == []
    memory = Path(f"/proc/{pid}/smaps_rollup").read_text().split()
    assert int(memory[memory.index("Pss:") + 1]) < 1000  # KiB
    group.close()
    assert keeper.find(layers.name) == [pid]
    keeper.stop(layers.name)
    assert keeper.find(layers.name) == []
    assert keeper.take(pid, layers.name) is None


def test_a_keeper_that_is_frozen_cannot_be_killed(layers: Incomplete, server: Server) -> None:
    victim = server(lambda _: signal.pause())
    reader = reads(layers, 0, "a")
    assert waits(reader)
    kill(victim)
    (pid,) = keeper.find(layers.name)
    frozen = [top / layers.name for top in hierarchies() if (top / layers.name).exists()]
    assert bool(frozen) == keeper.can_freeze() == (cgroups.freezer() is not None)
    os.kill(pid, signal.SIGKILL)
    if not frozen:  # with cgroup v2 alone nothing keeps a process from being killed
        assert not succeeded(reader)
        return
    assert waits(reader)
    group = layers.take()
    with layers.served(group):
        assert succeeded(reader)
    group.close()
    keeper.stop(layers.name)
    assert keeper.find(layers.name) == []
    assert not frozen[0].exists()


def test_no_keeper_is_frozen_below_a_service_manager(
    layers: Incomplete, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has to be able to end what it has started."""
    monkeypatch.setenv("NOTIFY_SOCKET", "/nowhere")
    group = PreContentGroup.create(SLOTS, layers.name)
    pid = keeper.start(group, layers.name)
    group.close()
    kill(pid)
    assert keeper.find(layers.name) == []


def test_a_holder_that_opens_and_closes_other_files_is_found(layers: Incomplete) -> None:
    def busy() -> None:
        while True:
            files = [os.open(os.devnull, os.O_RDONLY) for _ in range(20)]
            for file in files:
                os.close(file)

    group = PreContentGroup.create(SLOTS, layers.name)
    pid = fork(busy)
    try:
        found = [keeper.find(layers.name) for _ in range(50)]
    finally:
        kill(pid)
        group.close()
    assert found == [[pid]] * 50


def test_a_holder_of_several_groups(layers: Incomplete) -> None:
    """As a service manager is, that runs several daemons."""
    names = [layers.name, f"{layers.name}-other"]
    groups = [PreContentGroup.create(SLOTS, name) for name in names]
    pid = fork(signal.pause)
    for name, group in zip(names, groups, strict=True):
        taken = keeper.take(pid, name)
        assert taken is not None
        assert marks(taken[0]) == marks(group.fd)
        for descriptor in taken:
            os.close(descriptor)
        group.close()
    kill(pid)


def marks(group: int) -> str:
    return Path(f"/proc/self/fdinfo/{group}").read_text().partition("fanotify ino:")[2]


def test_what_others_name_alike_is_no_holder(layers: Incomplete) -> None:
    def pretend() -> None:
        os.closerange(3, 1000)
        os.memfd_create(layers.name)
        signal.pause()

    pid = fork(pretend)
    time.sleep(0.1)
    assert keeper.find(layers.name) == []
    assert keeper.take(pid, layers.name) is None
    kill(pid)


def test_descriptors_of_another_version_are_refused(layers: Incomplete) -> None:
    group = PreContentGroup.create(SLOTS, layers.name)
    os.pwrite(group.slots_fd, b"ctrfs events 0\n", 0)
    with pytest.raises(Unsupported, match="another version"):
        PreContentGroup.adopt(group.fd, group.slots_fd)
    group.close()


def test_too_few_descriptors_are_refused() -> None:
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    with pytest.raises(Unsupported, match=f"{allowed} are allowed"):
        PreContentGroup.create(allowed, "ctrfs-test")


def test_not_on_every_filesystem() -> None:
    assert "ext4" in (available(Path("/dev/shm")) or "")
