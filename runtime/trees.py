"""Deleting directory trees that containers made: as deep and as odd as they like."""

import os
import stat
from contextlib import suppress
from pathlib import Path


def remove_tree(path: Path) -> None:
    """Delete a directory and all below it, which must not be in use.

    No recursion, two descriptors, and no path longer than one name: directories that are
    found are moved up to the top first. Symbolic links are deleted, never followed.

    Raises:
        OSError: something cannot be deleted, for example below a mount.
    """
    try:
        top = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        moved = 0
        while names := os.listdir(top):
            for name in names:
                moved = _remove_entry(top, name, moved)
    finally:
        os.close(top)
    os.rmdir(path)


def _remove_entry(top: int, name: str, moved: int) -> int:
    """Delete one entry; directories in it become entries of ``top`` under new names."""
    if not _is_directory(top, name):
        os.unlink(name, dir_fd=top)
        return moved
    directory = os.open(
        name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=top
    )
    try:
        for child in os.listdir(directory):
            if not _is_directory(directory, child):
                os.unlink(child, dir_fd=directory)
                continue
            try:
                os.rmdir(child, dir_fd=directory)
            except OSError:
                moved += 1
                os.rename(child, _free_name(top, moved), src_dir_fd=directory, dst_dir_fd=top)
    finally:
        os.close(directory)
    os.rmdir(name, dir_fd=top)
    return moved


def _is_directory(parent: int, name: str) -> bool:
    return stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode)


def _free_name(top: int, number: int) -> str:
    """A name that nothing in ``top`` has, whatever the container called its files."""
    name = f".{number}"
    with suppress(FileNotFoundError):
        while True:
            os.stat(name, dir_fd=top, follow_symlinks=False)
            name += "_"
    return name
