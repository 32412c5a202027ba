"""Disks that fill up and files in use: what could not be done has not happened."""

import errno
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from runtime.container import Container
from runtime.errors import ContainerBusy, MountFailed, StartFailed
from runtime.processes import find_processes
from runtime.records import Record, Records
from runtime.steps import Ending, Steps
from store.errors import CtrfsError, StorageFailed
from tests.runtime.support import (
    Room,
    cgroups_of,
    mounts_below,
    opened,
    processes_of,
    text_of,
)


def full_disk(
    monkeypatch: pytest.MonkeyPatch, fails: Callable[[Record], bool] = lambda record: True
) -> None:
    """Saving records fails where ``fails`` says so, from now on."""
    save = Records.save

    def fail(self: Records, record: Record) -> None:
        if fails(record):
            raise StorageFailed("the disk is full", errno=errno.ENOSPC)
        save(self, record)

    monkeypatch.setattr(Records, "save", fail)


def on_disk(room: Room, container: Container) -> Record:
    """The record that the next daemon would find."""
    records = Records(room.store.db).load()
    return next(record for record in records if record.uid == container.uid)


# --- a record that cannot be saved ---------------------------------------------------


async def test_a_start_that_cannot_be_saved_is_undone(
    room: Room, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    container = await room.make("full", "sleep", "100")
    with monkeypatch.context() as patch:
        full_disk(patch, lambda record: record.state == "running")
        with pytest.raises(StorageFailed, match="full"):
            await container.start()
    assert container.state == "created"
    assert container.started_ns is None
    assert not processes_of(place / "run")
    assert not cgroups_of([container.uid])
    assert not find_processes({"conmon", "runc"}, container.uid)
    with pytest.raises(ContainerBusy):
        await container.kill()
    await container.start()
    await container.kill()
    assert container.exit_code == 137


async def test_nothing_is_set_that_cannot_be_saved(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    container = await room.make("kept", "true")
    before = on_disk(room, container)
    with monkeypatch.context() as patch:
        full_disk(patch)
        with pytest.raises(StorageFailed):
            await container.set("args", "false")
        with pytest.raises(StorageFailed):
            await container.set_spec_document(b"{}")
        with pytest.raises(StorageFailed):
            await container.set_config_document(b'{"process": {"args": ["x"]}}')
        with pytest.raises(StorageFailed):
            await container.rootfs()
        with pytest.raises(StorageFailed):
            await room.containers.rename("kept", "other")
    assert container._record == before
    assert "kept" in room.containers


async def test_a_pause_that_cannot_be_saved(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    container = await room.make("ice", "sleep", "100")
    await container.start()
    with monkeypatch.context() as patch:
        full_disk(patch)
        with pytest.raises(StorageFailed):
            await container.pause()
    assert container.state == on_disk(room, container).state == "running"


async def test_an_interrupted_save_is_in_memory_as_well(room: Room) -> None:
    container = await room.make("cut", "true")
    with trio.CancelScope() as scope:
        scope.cancel()
        await container.set("labels", "a=1")
    assert container._record == on_disk(room, container)
    with trio.move_on_after(0.0001):
        await container.set("labels", "a=2")
    assert container._record == on_disk(room, container)


# --- the end of a run ----------------------------------------------------------------


@pytest.mark.logs("how its run ended cannot be found out")
async def test_an_end_that_cannot_be_read_is_tried_again(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    container = await room.make("retry", "sh", "-c", "exit 6")
    ending = Steps.ending
    failures = 0

    def fail_once(self: Steps) -> Any:
        nonlocal failures
        failures += 1
        if failures == 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return ending(self)

    monkeypatch.setattr(Steps, "ending", fail_once)
    await container.start()
    with trio.fail_after(5):
        assert await container.wait() == 6
    assert failures > 1
    assert container.error == ""


@pytest.mark.logs("going on after the last daemon")
async def test_a_run_whose_adoption_failed_is_watched(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Steps) -> bool:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    async with opened(place) as room:
        await (await room.make("a", "sleep", "100")).start()
    with monkeypatch.context() as patch:
        patch.setattr(Steps, "is_frozen", fail)
        async with opened(place) as room:
            container = room.containers.get("a")
            assert container.state == "running"
            assert "Input/output error" in container.error
            with trio.fail_after(5):
                await container.kill()
            await room.containers.remove("a")


async def test_the_end_of_a_run_without_monitor_is_saved_before_it_is_told(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    container = await room.make("orphan", "sleep", "100")
    await container.start()
    run = container._record.run
    assert run is not None
    publish, told = Container._publish, []

    def look(self: Container, ending: Ending) -> None:
        saved = on_disk(room, container)
        told.append((saved.state, saved.exit_code))
        publish(self, ending)

    monkeypatch.setattr(Container, "_publish", look)
    run.conmon.kill(5)
    with trio.fail_after(5):
        assert await container.wait() == 137
    assert told == [("stopped", 137)]


@pytest.mark.logs("its end cannot be saved yet|the disk is full")
async def test_an_end_that_cannot_be_saved_is_told_all_the_same(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    container = await room.make("orphan", "sleep", "100")
    await container.start()
    run = container._record.run
    assert run is not None
    with monkeypatch.context() as patch:
        full_disk(patch)
        run.conmon.kill(5)
        with trio.fail_after(5):
            assert await container.wait() == 137
        async with container._lock:
            pass
    await container.start()
    assert on_disk(room, container).state == "running"


async def test_restart_of_a_container_that_ends_at_this_moment(room: Room) -> None:
    container = await room.make("again", "sh", "-c", "echo run; sleep 100")
    await container.start()
    run = container._record.run
    assert run is not None
    async with trio.open_nursery() as nursery, container._lock:
        nursery.start_soon(container.restart)
        await trio.sleep(0.05)
        run.init.kill(5)
        await container.wait()
    assert container.is_running
    assert container.started_ns and container.started_ns < time.time_ns()


# --- files in use --------------------------------------------------------------------


async def test_no_other_image_while_somebody_is_in_the_rootfs(room: Room) -> None:
    container = await room.make("inside", "true")
    root = await container.rootfs()
    held = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with pytest.raises(ContainerBusy, match="fuser"):
            await container.set("image", "other:1")
        with pytest.raises(ContainerBusy, match="fuser"):
            await container.set_spec_document(b'{"image": "other:1"}')
        assert container.own_text("image") == "box:1\n"
        (root / "put").write_text("by hand\n")
    finally:
        os.close(held)
    assert (await container.rootfs() / "put").read_text() == "by hand\n"
    with pytest.raises(ContainerBusy, match="holds files already"):
        await container.set("image", "other:1")


async def test_an_undone_start_leaves_files_to_those_who_use_them(
    room: Room, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    container = await room.make("held", "nosuch")
    held: list[int] = []
    mount = Steps.mount

    def mount_and_hold(self: Steps, *arguments: Any) -> Path:
        root = mount(self, *arguments)
        held.append(os.open(root / "etc", os.O_RDONLY | os.O_DIRECTORY))
        return root

    with monkeypatch.context() as patch:
        patch.setattr(Steps, "mount", mount_and_hold)
        with pytest.raises(CtrfsError, match="nosuch"):
            await container.start()
    descriptor = os.open("made", os.O_CREAT | os.O_WRONLY, dir_fd=held[0])
    for each in (descriptor, *held):
        os.close(each)
    assert container._record.image is not None
    assert (place / "root/containers" / container.uid / "upper/etc/made").exists()
    await container.set("args", "sh\n-c\nls /etc")
    await container.start()
    await container.wait()
    assert "made" in text_of(container)


# --- the end of the daemon -----------------------------------------------------------


@pytest.mark.logs("bad: its root filesystem stays mounted: cannot unmount")
async def test_one_bad_mount_does_not_spoil_the_end_for_others(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unmount = Steps.unmount
    async with opened(place) as room:
        bad, good = await room.make("bad"), await room.make("good")
        for container in (bad, good):
            await container.rootfs()

        def fail(self: Steps) -> None:
            if self.rootfs_path == room.rootfs.container_path(bad.uid):
                raise MountFailed("cannot unmount it")
            unmount(self)

        monkeypatch.setattr(Steps, "unmount", fail)
    assert mounts_below(place / "run/containers") == [str(room.rootfs.container_path(bad.uid))]


async def test_who_uses_an_image_can_be_asked_while_containers_come(room: Room) -> None:
    container = await room.make("first")
    image = room.store.images.get("box:1")
    uses = Container.uses

    def uses_and_more(self: Container, digest: str) -> bool:
        room.containers._containers[f"more-{len(room.containers.list())}"] = container
        uses(self, digest)
        return False

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Container, "uses", uses_and_more)
        assert room.containers.in_use(image) is None
    del room.containers._containers["more-1"]
    assert room.containers.in_use(image) == "the container first"


# --- file systems that hang ----------------------------------------------------------


async def test_starts_that_hang_leave_threads_for_saving_and_killing(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = await room.make("running", "sleep", "100")
    await running.start()
    stuck = [await room.make(f"stuck{n}", "true") for n in range(50)]
    over = threading.Event()

    def hang(*arguments: object) -> None:
        over.wait()
        raise StartFailed("it hung")

    async def start(container: Container) -> None:
        with pytest.raises(StartFailed):
            await container.start()

    monkeypatch.setattr(Steps, "prepare", hang)
    async with trio.open_nursery() as nursery:
        try:
            for container in stuck:
                nursery.start_soon(start, container)
            await trio.sleep(0.2)
            with trio.fail_after(5):
                await room.containers.create("another")
                await running.kill()
        finally:
            over.set()
    assert running.exit_code == 137


async def test_views_that_a_killed_daemon_left_are_unmounted_before_files_go(
    room: Room, place: Path
) -> None:
    container = await room.make("viewed", "true")
    await container.start()
    await container.wait()
    left = place / "run/containers" / container.uid / "lower-1"
    left.mkdir()
    assert container._record.image is not None
    layers = room.store.layers.mountable(container._record.image.diff_ids)
    room.rootfs.image_view(layers, str(left))
    await room.containers.remove("viewed")
    assert not left.exists()
    assert not mounts_below(place / "run/containers")
