"""The rules that all files of the tree keep, tried on every file of the real tree."""

import errno
import os
import re
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.mount import Mount

# A read of these waits for something to happen; they have tests of their own.
BLOCKING = {"events", "wait"}


def nodes(top: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Everything below the mount that the daemon itself serves."""
    device = top.stat().st_dev
    stack = [top]
    while stack:
        directory = stack.pop()
        for name in sorted(os.listdir(directory)):
            path = directory / name
            status = path.lstat()
            if status.st_dev != device:
                continue
            yield path, status
            if stat.S_ISDIR(status.st_mode):
                stack.append(path)


def files(top: Path) -> list[tuple[Path, os.stat_result]]:
    """The regular files among them."""
    return [(path, status) for path, status in nodes(top) if stat.S_ISREG(status.st_mode)]


def readable(top: Path) -> list[Path]:
    """Those that can be read to an end at once."""
    found = [p for p, s in files(top) if s.st_mode & 0o400 and p.name not in BLOCKING]
    assert len(found) > 50
    return found


def writable(top: Path) -> list[Path]:
    """Those that take writes."""
    found = [path for path, status in files(top) if status.st_mode & 0o200]
    assert len(found) > 15
    return found


def read(path: Path, size: int, limit: int = 1 << 30) -> bytes:
    """The file by reads of ``size`` bytes."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        pieces, total = [], 0
        while total < limit and (piece := os.read(descriptor, size)):
            assert len(piece) <= size
            pieces.append(piece)
            total += len(piece)
        return b"".join(pieces)
    finally:
        os.close(descriptor)


def test_an_incomplete_image_is_among_them(used_mount: Mount, lazy_image: str) -> None:
    top = used_mount.path / "images" / lazy_image
    assert {top / "fetch", top / "state", top / "layers/0/lazy", top / "layers/0/fetched"} <= {
        path for path, _ in files(used_mount.path)
    }
    values = {name: (top / name).read_text() for name in ("state", "fetch", "layers/0/fetched")}
    assert re.fullmatch(r"lazy \d\d?%\n", values["state"])
    assert values["fetch"] == ""
    assert 0 < int(values["layers/0/fetched"]) < int((top / "layers/0/size").read_text())
    assert (top / "layers/0/lazy").read_text() == "yes\n"
    assert (top / "layers/0/format").read_text() == "estargz\n"


def test_reads_of_all_sizes_agree(used_mount: Mount) -> None:
    for path in readable(used_mount.path):
        expected = read(path, 1 << 20)
        for size in (4096, 7, 1):
            part = read(path, size, 3000 * size)
            assert part == expected[: len(part)], path
            assert len(part) == min(len(expected), len(part)), path


def test_sizes_are_true_or_zero(used_mount: Mount) -> None:
    for path in readable(used_mount.path):
        assert path.stat().st_size in (len(read(path, 1 << 20)), 0), path


def test_owners_modes_and_times(used_mount: Mount) -> None:
    for path, status in nodes(used_mount.path):
        assert (status.st_uid, status.st_gid) == (0, 0), path
        assert 1_600_000_000 < status.st_mtime < 4_000_000_000, path
        assert not status.st_mode & 0o022 or stat.S_ISLNK(status.st_mode), path


def test_every_directory_explains_its_files(used_mount: Mount) -> None:
    tops = [used_mount.path, *(p for p, s in nodes(used_mount.path) if stat.S_ISDIR(s.st_mode))]
    for directory in tops:
        if directory.name == "rootfs":
            continue
        text = (directory / "README").read_text()
        assert len(text) > 20, directory
        for name in os.listdir(directory):
            path = directory / name
            if name != "README" and path.is_file() and path.parent.name != "sha256":
                assert f"\n{name}  (" in text, path


def test_files_that_cannot_be_written_say_so(used_mount: Mount) -> None:
    for path, status in files(used_mount.path):
        if not status.st_mode & 0o200:
            with pytest.raises(PermissionError):
                os.open(path, os.O_WRONLY)


def test_rubbish_is_refused_and_changes_nothing(used_mount: Mount) -> None:
    for path in writable(used_mount.path):
        before = read(path, 1 << 20) if path.stat().st_mode & 0o400 else b""
        descriptor = os.open(path, os.O_WRONLY)
        with pytest.raises(OSError) as caught:
            try:
                os.write(descriptor, b"\x00\xff\xfe\x80rubbish\x01\n")
            finally:
                os.close(descriptor)  # documents say it here
        assert caught.value.errno in (errno.EINVAL, errno.EBUSY), path
        assert used_mount.last_error().count(str(path.relative_to(used_mount.path))), path
        if path.stat().st_mode & 0o400:
            assert read(path, 1 << 20) == before, path


def test_what_a_shell_writes_in_vain_changes_nothing(
    used_mount: Mount, idle_container: Path
) -> None:
    own_config = (idle_container / "config.json").read_text().replace("/bin/", "/nowhere/")
    for name, good in {
        "image": (idle_container / "image").read_text(),
        "args": "one\ntwo\n",
        "stop_timeout": "5\n",
        "stop_signal": "USR1\n",
        "net/namespace": "host\n",
        "spec": '{"args":["x"]}\n',
        "config.json": own_config,
    }.items():
        path = idle_container / name
        path.write_text(good)
        before = path.read_bytes()
        # A shell does not see that a close fails.
        shell(f"printf '\\0\\377' > {path}")
        assert path.read_bytes() == before, path
        # A default stays one.
        shell(f": > {path}")
        default = path.read_bytes()
        shell(f"printf '\\0\\377' > {path}")
        assert path.read_bytes() == default, path


def shell(command: str) -> None:
    subprocess.run(["bash", "-c", command], capture_output=True)


def test_what_is_read_can_be_written_back(used_mount: Mount, idle_container: Path) -> None:
    for path in writable(idle_container):
        if path.name in ("state", "signal", "config.json"):
            continue
        before = path.read_bytes()
        path.write_bytes(before)
        assert path.read_bytes() == before, path


def test_two_halves_make_a_whole(used_mount: Mount, idle_container: Path) -> None:
    for name, text in {
        "args": b"echo\none two\n",
        "env": b"ONE=1\nTWO=2\n",
        "labels": b"a=b\nc=d\n",
        "hostname": b"somehost\n",
        "workdir": b"/some/where\n",
        "spec": (idle_container / "spec").read_bytes(),
    }.items():
        descriptor = os.open(idle_container / name, os.O_WRONLY | os.O_TRUNC)
        middle = text.index(b"\n") + 1 if text.count(b"\n") > 1 else len(text) // 2
        os.write(descriptor, text[:middle])
        os.write(descriptor, text[middle:])
        os.close(descriptor)
        assert text.strip() in (idle_container / name).read_bytes(), name


def test_appending_adds_lines(used_mount: Mount, idle_container: Path) -> None:
    for name, first, second in (
        ("args", "echo\n", "more\n"),
        ("labels", "a=b\n", "c=d\n"),
        ("env", "AAA=1\n", "BBB=2\n"),
    ):
        (idle_container / name).write_text(first)
        with (idle_container / name).open("a") as file:
            file.write(second)
        text = (idle_container / name).read_text()
        assert first in text and second in text, name


def test_what_may_hold_secrets_is_for_root(used_mount: Mount, idle_container: Path) -> None:
    names = ("env", "spec", "config.json", "log", "log.json", "stdin", "changes", "error")
    for path in (used_mount.path / "errors", *(idle_container / name for name in names)):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


def test_another_user_is_held_to_the_modes(used_mount: Mount) -> None:
    script = (
        "find . -xdev -type f ! -readable -print 2>/dev/null | wc -l;"
        "find . -xdev -type f -writable -print 2>/dev/null | wc -l;"
        "mkdir containers/mine 2>&1; echo start > containers/idle/state"
    )
    command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "sh", "-c", script]
    result = subprocess.run(command, cwd=used_mount.path, capture_output=True, text=True)
    unreadable, can_write, *_ = result.stdout.split("\n")
    assert int(unreadable) > 5
    assert int(can_write) == 0
    assert result.stdout.count("Permission denied") == 1
    assert result.stderr.count("Permission denied") == 1


def test_files_of_a_container_that_has_gone(used_mount: Mount) -> None:
    container = used_mount.path / "containers" / "short"
    container.mkdir()
    descriptors = [
        (path, os.open(path, os.O_RDONLY))
        for path, status in files(container)
        if status.st_mode & 0o400 and path.name not in BLOCKING
    ]
    container.rmdir()
    for path, descriptor in descriptors:
        try:
            os.read(descriptor, 4096)  # an answer or an error, but never a hang or EIO
        except OSError as error:
            assert error.errno in (errno.ENOENT, errno.ESTALE), path
        os.close(descriptor)
    assert not container.exists()


def test_looking_at_everything_has_fetched_nothing(used_mount: Mount, lazy_image: str) -> None:
    assert used_mount.read(f"images/{lazy_image}/state").startswith("lazy ")
