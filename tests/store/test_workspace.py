"""Directories for files on their way: gone at the end, or when the next one comes."""

import os
from contextlib import closing
from pathlib import Path

import pytest

from store.workspace import Workspace

PREFIX = "work-"


def test_it_goes_with_all_that_is_in_it(tmp_path: Path) -> None:
    with closing(Workspace(tmp_path, PREFIX)) as workspace:
        (workspace.path / "sub").mkdir()
        (workspace.path / "sub" / "file").touch()
    assert not list(tmp_path.iterdir())


def test_what_was_abandoned_goes_and_what_is_in_use_stays(tmp_path: Path) -> None:
    abandoned = tmp_path / f"{PREFIX}abandoned"
    abandoned.mkdir()
    (abandoned / "layer").touch()
    other = tmp_path / "else"
    other.mkdir()
    with (
        closing(Workspace(tmp_path, PREFIX)) as first,
        closing(Workspace(tmp_path, PREFIX)) as second,
    ):
        assert set(tmp_path.iterdir()) == {first.path, second.path, other}


def test_what_others_put_there_stays(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").touch()
    (tmp_path / f"{PREFIX}link").symlink_to(kept)
    (tmp_path / f"{PREFIX}file").touch()
    foreign = tmp_path / f"{PREFIX}foreign"
    foreign.mkdir()
    os.chown(foreign, 12345, 12345)
    with closing(Workspace(tmp_path, PREFIX)):
        pass
    assert (kept / "file").exists()
    assert len(list(tmp_path.iterdir())) == 4


def test_one_that_is_taken_for_abandoned_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process may come between the making and the locking."""
    made: list[Path] = []
    real = os.open

    def removed_once(path: Path, flags: int, *rest: int, **more: int) -> int:
        if str(path).startswith(str(tmp_path / PREFIX)) and not made:
            made.append(Path(path))
            Path(path).rmdir()
        return real(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", removed_once)
    with closing(Workspace(tmp_path, PREFIX)) as workspace:
        assert workspace.path.is_dir()
        assert made != [workspace.path]
