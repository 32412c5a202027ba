"""Users from an image's own files, which may be anything."""

import os
from pathlib import Path

import pytest

from runtime.errors import InvalidSetting
from runtime.users import User, resolve_user

ROOT = User(0, 0, (0,))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root directory with users and groups."""
    etc = tmp_path / "root" / "etc"
    etc.mkdir(parents=True)
    (etc / "passwd").write_text(
        "# comment\nroot:x:0:0::/:\n\nbroken\nweb:x:1000:1001::/:\nbig:x:4294967296:1::/:\n"
        "neg:x:-5:1::/:\nweb:x:7:7::/:\n12:x:13:14::/:\n"
    )
    (etc / "group").write_text("root:x:0:\nweb:x:1001:\nx:x:44:a,web\ny:x:55:web\nz:x:abc:web\n")
    return tmp_path / "root"


@pytest.mark.parametrize(
    ("text", "user"),
    [
        ("root", ROOT),
        ("0", ROOT),
        ("web", User(1000, 1001, (1001, 44, 55))),
        ("1000", User(1000, 1001, (1001, 44, 55))),
        ("web:x", User(1000, 44, (44,))),
        ("web:1234", User(1000, 1234, (1234,))),
        ("5:6", User(5, 6, (6,))),
        ("5", User(5, 0, (0,))),
        ("12", User(13, 14, (14,))),
        ("2147483647", User(2147483647, 0, (0,))),
    ],
)
def test_dockers_rules(root: Path, text: str, user: User) -> None:
    assert resolve_user(root, text) == user


@pytest.mark.parametrize("text", ["nobody", "big", "neg", "2147483648", "-1", "web:none", "٣"])
def test_unknown_names(root: Path, text: str) -> None:
    with pytest.raises(InvalidSetting, match="there is no"):
        resolve_user(root, text)


def test_no_files(tmp_path: Path) -> None:
    assert resolve_user(tmp_path, "0") == ROOT
    with pytest.raises(InvalidSetting):
        resolve_user(tmp_path, "root")


def test_links_stay_inside(root: Path, tmp_path: Path) -> None:
    (tmp_path / "passwd").write_text("evil:x:666:666::/:\n")
    for target in (
        "../../passwd",
        "/../passwd",
        str(tmp_path / "passwd"),
        "/proc/1/root/etc/passwd",
    ):
        (root / "etc/passwd").unlink()
        (root / "etc/passwd").symlink_to(target)
        with pytest.raises(InvalidSetting, match="no user 'evil'"):
            resolve_user(root, "evil")
    (root / "lib").mkdir()
    (root / "lib/users").write_text("inner:x:5:5::/:\n")
    (root / "etc/passwd").unlink()
    (root / "etc/passwd").symlink_to("/lib/users")
    assert resolve_user(root, "inner") == User(5, 5, (5,))


def test_a_linked_directory_stays_inside(root: Path) -> None:
    (root / "etc/passwd").unlink()
    (root / "etc/group").unlink()
    (root / "etc").rmdir()
    (root / "etc").symlink_to("/etc")
    with pytest.raises(InvalidSetting, match="cannot be opened: Too many levels"):
        resolve_user(root, "daemon")
    assert resolve_user(root, "0") == ROOT


@pytest.mark.parametrize("kind", ["fifo", "device", "directory", "loop", "huge"])
def test_hostile_files_neither_block_nor_break(root: Path, kind: str) -> None:
    passwd = root / "etc/passwd"
    passwd.unlink()
    if kind == "fifo":
        os.mkfifo(passwd)
    elif kind == "device":
        os.mknod(passwd, 0o20644, os.makedev(1, 5))
    elif kind == "directory":
        passwd.mkdir()
    elif kind == "loop":
        passwd.symlink_to("passwd")
    else:
        passwd.touch()
        os.truncate(passwd, 1 << 40)
    with pytest.raises(InvalidSetting, match="set `user` to a number"):
        resolve_user(root, "web")
    assert resolve_user(root, "1000") == User(1000, 0, (0,))
    assert resolve_user(root, "1000:1001") == User(1000, 1001, (1001,))


def test_rubbish_is_skipped(root: Path) -> None:
    with open(root / "etc/passwd", "ab") as file:
        file.write(b"\xff\xfe:x:1:1\n\0\0\n" + b"long" * 100_000 + b":x:3:3::/:\nlast:x:9:9::/:")
    assert resolve_user(root, "last") == User(9, 9, (9,))
