"""Rooms that are clean before and after each test."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.runtime.support import Room, cgroups_of, mounts_below, opened, processes_of, sweep


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A directory for a room, swept afterwards whatever happened."""
    directory = tmp_path / "room"
    directory.mkdir()
    try:
        yield directory
    finally:
        sweep(directory)


@pytest.fixture
async def room(place: Path) -> AsyncIterator[Room]:
    """A room with the base image. All containers are removed, and nothing of them is left."""
    async with opened(place) as room:
        uids = []
        yield room
        for name in room.containers.list():
            container = room.containers.get(name)
            uids.append(container.uid)
            if container.is_running:
                await container.kill()
            await room.containers.remove(name)
        assert list((place / "root" / "containers").iterdir()) == []
        assert list((place / "run" / "containers").iterdir()) == []
        assert list((place / "run" / "runc").glob("*")) == []
        assert not cgroups_of(uids)
        assert not processes_of(place / "run")
    assert not mounts_below(place)
