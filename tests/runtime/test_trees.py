"""Comparing and deleting trees that containers made, however odd."""

import os
from pathlib import Path

import pytest

from runtime.changes import list_changes
from runtime.errors import RuntimeFailure
from runtime.trees import remove_tree


def nest(path: Path, depth: int) -> None:
    """Directories so deep that no path can name them."""
    path.mkdir()
    descriptor = os.open(path, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("d" * 50, dir_fd=descriptor)
        below = os.open("d" * 50, os.O_RDONLY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = below
    os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=descriptor))
    os.close(descriptor)


def test_remove_an_ordinary_tree(tmp_path: Path) -> None:
    top = tmp_path / "top"
    (top / "a/b/c").mkdir(parents=True)
    (top / "a/b/file").write_text("x")
    (top / "empty").mkdir()
    os.mkfifo(top / "fifo")
    os.mknod(top / "a/gone", 0o20000, 0)
    (top / "a/b/c").chmod(0)
    remove_tree(top)
    assert not top.exists()
    remove_tree(top)


def test_links_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/kept").write_text("x")
    top = tmp_path / "top"
    (top / "a").mkdir(parents=True)
    (top / "link").symlink_to(tmp_path / "outside")
    (top / "a/link").symlink_to(tmp_path / "outside")
    remove_tree(top)
    assert (tmp_path / "outside/kept").exists()
    (tmp_path / "alias").symlink_to(tmp_path / "outside")
    with pytest.raises(OSError):
        remove_tree(tmp_path / "alias")
    assert (tmp_path / "outside/kept").exists()


def test_remove_what_is_deeper_than_any_path(tmp_path: Path) -> None:
    nest(tmp_path / "deep", 2000)
    remove_tree(tmp_path / "deep")
    assert not (tmp_path / "deep").exists()


def test_remove_names_that_collide_with_ours(tmp_path: Path) -> None:
    top = tmp_path / "top"
    for name in (".1", ".2", ".1_", "x"):
        for child in (".1", ".2", "y"):
            (top / name / child / "z").mkdir(parents=True)
    remove_tree(top)
    assert not top.exists()


def test_changes(tmp_path: Path) -> None:
    lower, upper = tmp_path / "lower", tmp_path / "upper"
    for top in (lower, upper):
        (top / "both").mkdir(parents=True)
    (lower / "both/changed").write_text("x")
    (lower / "both/deleted").write_text("x")
    (lower / "opaque").mkdir()
    (lower / "opaque/hidden").write_text("x")
    (lower / "opaque/again").write_text("x")
    (lower / "was-file").write_text("x")
    (lower / "kept").write_text("x")
    (upper / "both/changed").write_text("y")
    os.mknod(upper / "both/deleted", 0o20000, 0)
    os.mknod(upper / "never-was", 0o20000, 0)
    os.mknod(upper / "device", 0o20000, os.makedev(1, 3))
    (upper / "opaque").mkdir()
    (upper / "opaque/again").write_text("y")
    os.setxattr(upper / "opaque", "trusted.overlay.opaque", b"y")
    (upper / "was-file").mkdir()
    (upper / "was-file/inside").write_text("y")
    (upper / "new").mkdir()
    (upper / "new/link").symlink_to("/etc")
    (upper / "new\nline\\").write_text("")
    (upper / os.fsdecode(b"\xff")).write_text("")
    assert list_changes(upper, lower).splitlines() == [
        b"C /both",
        b"C /both/changed",
        b"D /both/deleted",
        b"A /device",
        b"A /new",
        b"A /new\\012line\\134",
        b"A /new/link",
        b"C /opaque",
        b"C /opaque/again",
        b"D /opaque/hidden",
        b"C /was-file",
        b"A /was-file/inside",
        b"A /\xff",
    ]


def test_a_linked_directory_below_is_not_followed(tmp_path: Path) -> None:
    lower, upper = tmp_path / "lower", tmp_path / "upper"
    lower.mkdir()
    (lower / "etc").symlink_to("/etc")
    (upper / "etc").mkdir(parents=True)
    (upper / "etc/passwd").write_text("")
    assert list_changes(upper, lower) == b"C /etc\nA /etc/passwd\n"


def test_changes_deeper_than_any_path(tmp_path: Path) -> None:
    (tmp_path / "lower").mkdir()
    nest(tmp_path / "upper", 100)
    with pytest.raises(RuntimeFailure, match="too deep"):
        list_changes(tmp_path / "upper", tmp_path / "lower")
    remove_tree(tmp_path / "upper")  # others choke on it, too
