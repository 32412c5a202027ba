"""What containers open first: recorded as they see it, kept for their image, and no burden."""

import os
import subprocess
from pathlib import Path

import msgspec
import pytest
import trio

from runtime import linux, opened
from runtime.opened import Recording
from tests.runtime.support import IMAGE, Room, text_of
from tests.support.mounting import mounted


async def paths_of(room: Room, name: str, last: str = "") -> list[str]:
    """What was recorded of a container, once it is, and with ``last`` in it."""
    container = room.containers.get(name)
    with trio.fail_after(5):
        while True:
            recorded = os.fsdecode(await container.opened()).splitlines()
            if recorded and (not last or last in recorded):
                return recorded
            await trio.sleep(0.01)


async def run(room: Room, name: str, script: str) -> list[str]:
    await room.output(name, "sh", "-c", script)
    return await paths_of(room, name)


async def test_what_a_container_opens_is_recorded_in_order(room: Room) -> None:
    found = await run(
        room, "a", "cat /etc/group /etc/passwd /etc/group; ls /etc; cat < /etc/passwd"
    )
    assert found[0] in ("/bin/sh", "/bin/busybox")
    names = [path for path in found if path.startswith("/etc/")]
    assert names == ["/etc/group", "/etc/passwd"]
    assert len(found) == len(set(found))


async def test_it_is_kept_for_the_image_unless_there_is_a_record(room: Room) -> None:
    image = room.store.images.named(IMAGE)
    assert room.store.opened.get(image.digest) == []
    first = await run(room, "a", "cat /etc/group")
    assert room.store.opened.get(image.digest) == first
    second = await run(room, "b", "cat /etc/passwd")
    assert "/etc/passwd" in second and "/etc/passwd" not in first
    assert room.store.opened.get(image.digest) == first


async def test_only_regular_files_of_the_root_filesystem_count(room: Room, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("of the host\n")
    container = await room.make(
        *("a", "sh", "-c", "cat /dev/null /proc/self/status /mnt/file; ls /etc; ls /tmp"),
        mounts=f"{tmp_path} /mnt bind ro\n",
    )
    await container.start()
    assert await container.wait() == 0
    assert "of the host" in text_of(container)
    found = await paths_of(room, "a")
    assert not [path for path in found if path.startswith(("/dev", "/proc", "/mnt"))]
    assert "/etc" not in found and "/tmp" not in found and "/file" not in found


async def test_odd_names(room: Room) -> None:
    script = r"""echo x > "/tmp/$(printf 'a\377 b')"; echo y > "/tmp/$(printf 'new\nline')" """
    found = await run(room, "a", script)
    assert os.fsdecode(b"/tmp/a\xff b") in found
    assert not [path for path in found if "line" in path]


async def test_a_container_that_runs_on_is_recorded_for_a_while(room: Room) -> None:
    lazy = msgspec.structs.replace(room.store.config.lazy, record_seconds=0.5)
    room.store.config = msgspec.structs.replace(room.store.config, lazy=lazy)
    container = await room.make(
        "a", "sh", "-c", "cat /etc/group; sleep 1; cat /etc/passwd; sleep 9"
    )
    await container.start()
    found = await paths_of(room, "a")
    assert "/etc/group" in found
    await trio.sleep(1.2)
    assert await paths_of(room, "a") == found
    assert "/etc/passwd" not in found


async def test_a_container_that_is_removed_at_once(room: Room) -> None:
    container = await room.make("a", "true")
    await container.start()
    await container.wait()
    await room.containers.remove("a")
    await trio.sleep(0.1)


async def test_the_next_run_has_a_record_of_its_own(room: Room) -> None:
    script = "if [ -e /mark ]; then cat /etc/passwd; else echo > /mark; cat /etc/group; fi"
    assert "/etc/group" in await run(room, "a", script)
    container = room.containers.get("a")
    await container.start()
    await container.wait()
    assert "/etc/group" not in await paths_of(room, "a", "/etc/passwd")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A mounted overlay with some files."""
    for name in ("lower", "upper", "work"):
        (tmp_path / name).mkdir()
    for number in range(300):
        (tmp_path / "lower" / f"file{number:03}").write_text("x")
    return tmp_path


def overlay(tree: Path) -> str:
    return f"lowerdir={tree}/lower,upperdir={tree}/upper,workdir={tree}/work"


def read_all(top: Path) -> None:
    subprocess.run(["sh", "-c", "cat file*"], cwd=top, check=True, stdout=subprocess.DEVNULL)


def test_paths_are_those_in_the_root_filesystem(tree: Path) -> None:
    with mounted("overlay", tree / "merged", "overlay", overlay(tree)) as top:
        recording = Recording(top)
        read_all(top)
        (tree / "lower" / "file000").read_text()  # of another filesystem
        assert recording.close() == [f"/file{number:03}" for number in range(300)]
        assert recording.close() == [f"/file{number:03}" for number in range(300)]


def test_files_that_were_deleted(tree: Path) -> None:
    with mounted("overlay", tree / "merged", "overlay", overlay(tree)) as top:
        recording = Recording(top)
        (top / "new").write_text("x")
        (top / "new").unlink()
        (top / "file000").read_text()
        (top / "file001").read_text()
        (top / "file001").unlink()
        # The next container may want what was deleted of the image.
        assert recording.close() == ["/file000", "/file001"]


async def test_there_is_a_limit(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opened, "MAX_PATHS", 100)
    with mounted("overlay", tree / "merged", "overlay", overlay(tree)) as top:
        recording = Recording(top)
        await trio.to_thread.run_sync(read_all, top)
        with trio.fail_after(5):
            await recording.run()
        assert len(recording.close()) >= 100


def test_nothing_is_held_back_or_kept(tree: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with mounted("overlay", tree / "merged", "overlay", overlay(tree)) as top:
        recording = Recording(top)
        read_all(top)
        recording.close()
        assert len(os.listdir("/proc/self/fd")) == before
        linux.umount(str(top))  # not busy


def test_a_place_that_is_not_there(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(FileNotFoundError):
        Recording(tmp_path / "none")
    assert len(os.listdir("/proc/self/fd")) == before
