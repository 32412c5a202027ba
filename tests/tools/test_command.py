"""The command `ctrfs`, run as users and service managers do."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from runtime import keeper, linux
from runtime.layerserver import rundir
from runtime.layerserver.fanotify_serving import group_name
from tests.support.method import with_method
from tools.ctrfs import main
from tools.logs import SYSLOG_SOCKET
from tools.mountpoint import FSTYPE
from tools.options import DEFAULT_RUN, run_directory

TOP = Path(__file__).parents[2]
CTRFS = (sys.executable, "-m", "tools.ctrfs")


def ctrfs(*arguments: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
    """Run the command to its end. A daemon that keeps its output open makes this time out."""
    if "mount" in arguments[:-1] and "--config" not in arguments:
        config = with_method(None, Path(arguments[-1]).with_name("root"))
        arguments += ("--config", config) if config else ()
    return subprocess.run(
        [*CTRFS, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=TOP,
        timeout=60,
        env={**os.environ, **more},
    )


def refusal(*arguments: str | Path) -> str:
    """Run the command, which must fail, and give its one line."""
    result = ctrfs(*arguments)
    assert result.returncode == 1, result
    assert result.stdout == ""
    line = result.stderr.removesuffix("\n")
    assert "\n" not in line, line
    return line


Place = Callable[[str], tuple[Path, Path]]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """Makes a root and a mountpoint; whatever is mounted there is unmounted at the end."""
    made = []

    def make(name: str) -> tuple[Path, Path]:
        root, mountpoint = tmp_path / name / "root", tmp_path / name / "ctr"
        mountpoint.mkdir(parents=True)
        made.append((root, mountpoint))
        return root, mountpoint

    yield make
    for root, mountpoint in made:
        if any(mount.target == str(mountpoint) for mount in linux.mounts()):
            assert ctrfs("umount", mountpoint).returncode == 0
        # A layer server whose daemon was killed would wait a while for the next one.
        for pid in pids(root) + pids(root, "layers.pid"):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        keeper.stop(group_name(run_directory(root)))
        rundir.tidy(run_directory(root))
        shutil.rmtree(run_directory(root), ignore_errors=True)


def pids(root: Path, file: str = "pid") -> list[int]:
    """The daemon that has the root, if one does; or another process, by its pid file."""
    try:
        return [int((run_directory(root) / file).read_text().split("\n")[0])]
    except FileNotFoundError:
        return []


def test_in_the_background_and_back(place: Place) -> None:
    root, mountpoint = place("a")
    start = time.monotonic()
    result = ctrfs("mount", "--root", root, mountpoint)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert (mountpoint / "version").read_text() == "0.1.0\n"
    assert root.stat().st_mode & 0o777 == 0o711
    run = run_directory(root)
    assert run.stat().st_mode & 0o777 == 0o700
    (pid,) = pids(root)
    assert os.getsid(pid) == pid
    assert os.readlink(f"/proc/{pid}/cwd") == "/"
    assert {os.readlink(f"/proc/{pid}/fd/{number}") for number in (0, 1)} == {"/dev/null"}
    result = ctrfs("umount", mountpoint)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert not mountpoint.is_mount()
    assert not Path(f"/proc/{pid}").exists() or _is_zombie(pid)
    assert not run.exists()
    assert time.monotonic() - start < 20


def _is_zombie(pid: int) -> bool:
    return ") Z " in Path(f"/proc/{pid}/stat").read_text()


def test_where_the_log_goes(place: Place) -> None:
    root, mountpoint = place("a")
    assert ctrfs("mount", "--root", root, mountpoint).returncode == 0
    with pytest.raises(OSError):
        (mountpoint / "images/pull").write_text("RUBBISH\n")
    log = root / "ctrfs.log"
    # With a system's log that one has it, and there is no file.
    assert ("RUBBISH" in log.read_text()) if log.exists() else Path(SYSLOG_SOCKET).exists()


def test_several_side_by_side(place: Place) -> None:
    places = [place(name) for name in ("a", "b", "c")]
    for root, mountpoint in places:
        assert ctrfs("mount", "--root", root, mountpoint).returncode == 0
    (places[1][1] / "containers/only-here").mkdir()
    assert ctrfs("umount", places[0][1]).returncode == 0
    assert (places[1][1] / "containers/only-here").is_dir()
    assert not (places[2][1] / "containers/only-here").exists()
    (places[1][1] / "containers/only-here").rmdir()


def test_one_daemon_a_root(place: Place) -> None:
    root, mountpoint = place("a")
    _, other = place("b")
    assert ctrfs("mount", "--root", root, mountpoint).returncode == 0
    alias = root.with_name("alias")
    alias.symlink_to(root)
    line = refusal("mount", "--root", alias, other)
    assert str(root) in line and str(mountpoint) in line and "--root" in line
    assert not other.is_mount()
    assert (mountpoint / "version").exists()


def test_one_tree_a_mountpoint(place: Place) -> None:
    root, mountpoint = place("a")
    other, _ = place("b")
    assert ctrfs("mount", "--root", root, mountpoint).returncode == 0
    line = refusal("mount", "--root", other, mountpoint)
    assert "already" in line and f"ctrfs umount {mountpoint}" in line
    assert (mountpoint / "version").exists()


def test_bad_mountpoints(place: Place, tmp_path: Path) -> None:
    root, _ = place("a")
    assert "mkdir" in refusal("mount", "--root", root, tmp_path / "nowhere")
    (tmp_path / "file").touch()
    assert "not a directory" in refusal("mount", "--root", root, tmp_path / "file")
    assert "not a directory" in refusal("mount", "--root", tmp_path / "file", tmp_path).lower()
    assert "no ctrfs is mounted" in refusal("umount", tmp_path)
    assert not run_directory(root).exists()


def test_bad_settings(place: Place, tmp_path: Path) -> None:
    root, mountpoint = place("a")
    config = tmp_path / "config.json"
    config.write_text('{"store": {"no_such_setting": 1}}')
    for extra in ([], ["--foreground", "--log-level", "error"]):
        line = refusal("mount", *extra, "--root", root, "--config", config, mountpoint)
        assert str(config) in line and "no_such_setting" in line
    config.unlink()
    assert str(config) in refusal("mount", "--root", root, "--config", config, mountpoint)
    assert not mountpoint.is_mount()


def test_a_way_of_serving_layers_that_is_impossible(place: Place, tmp_path: Path) -> None:
    root, mountpoint = place("a")
    config = tmp_path / "config.json"
    config.write_text('{"store": {"lazy": {"method": "fanotify"}}}')
    root.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", root], check=True)
    try:
        line = refusal("mount", "--root", root, "--config", config, mountpoint)
        assert "fanotify: this filesystem has no pre-content events; ext4" in line
        assert not mountpoint.is_mount()
    finally:
        subprocess.run(["umount", root], check=True)


def test_a_disk_that_is_full(place: Place, tmp_path: Path) -> None:
    root, mountpoint = place("a")
    root.mkdir()
    disk = tmp_path / "disk"
    with disk.open("wb") as file:
        file.truncate(16 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", disk], check=True)
    subprocess.run(["mount", "-o", "loop", disk, root], check=True)
    try:
        for _ in range(3):
            assert ctrfs("mount", "--root", root, mountpoint).returncode == 0
            fill(root / "rest")
            info = json.loads((mountpoint / "info.json").read_text())
            assert info["features"]["overlayfs"]["ok"]
            assert ctrfs("umount", mountpoint).returncode == 0
            fill(root / "rest")
        result = ctrfs("doctor", "--root", root)
        assert result.returncode == 1
        assert "No space left on device" in result.stdout + result.stderr
        assert "Traceback" not in result.stderr
    finally:
        # A test that fails leaves a tree mounted.
        subprocess.run(["umount", "--lazy", root], check=True)


def fill(path: Path) -> None:
    """Write to a file until nothing more goes onto its disk."""
    with suppress(OSError), path.open("ab", buffering=0) as file:
        while file.write(bytes(4096)):
            pass


def test_a_killed_daemons_mount_is_taken_over(place: Place) -> None:
    root, mountpoint = place("a")
    assert ctrfs("mount", "--root", root, mountpoint).returncode == 0
    os.kill(pids(root)[0], signal.SIGKILL)
    _wait_until(lambda: not _answers(mountpoint))
    assert ctrfs("mount", "--root", root, mountpoint).returncode == 0
    assert _answers(mountpoint)
    targets = [mount for mount in linux.mounts() if mount.target == str(mountpoint)]
    assert [mount.fstype for mount in targets] == [FSTYPE]


def test_a_killed_daemons_mount_is_unmounted(place: Place) -> None:
    root, mountpoint = place("a")
    assert ctrfs("mount", "--root", root, mountpoint).returncode == 0
    os.kill(pids(root)[0], signal.SIGKILL)
    _wait_until(lambda: not _answers(mountpoint))
    result = ctrfs("umount", mountpoint)
    assert result.returncode == 0 and "until the next `ctrfs mount`" in result.stderr
    assert not mountpoint.is_mount()
    assert os.listdir(mountpoint) == []


def _answers(mountpoint: Path) -> bool:
    try:
        os.statvfs(mountpoint)
    except OSError:
        return False
    return True


def _wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_unmounting_while_somebody_is_in_there(place: Place) -> None:
    root, mountpoint = place("a")
    assert ctrfs("mount", "--root", root, mountpoint).returncode == 0
    with subprocess.Popen(["cat", mountpoint / "events"], stderr=subprocess.DEVNULL) as reader:
        time.sleep(0.2)
        assert ctrfs("umount", mountpoint).returncode == 0
        assert reader.wait(10) != 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_in_the_foreground_under_a_service_manager(
    place: Place, tmp_path: Path, number: signal.Signals
) -> None:
    """sd_notify(3) when the mount answers and when there is something to hold, the journal's
    prefixes, and a clean end."""
    root, mountpoint = place("a")
    config = tmp_path / "config.json"
    config.write_text('{"store": {"lazy": {"method": "fanotify"}}}')
    address = tmp_path / "notify"
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager,
        (tmp_path / "journal").open("w+b") as journal,
    ):
        manager.bind(str(address))
        manager.settimeout(20)
        status = os.fstat(journal.fileno())
        daemon = subprocess.Popen(
            [
                *CTRFS,
                "mount",
                "--foreground",
                "--root",
                str(root),
                "--config",
                str(config),
                str(mountpoint),
            ],
            cwd=TOP,
            stderr=journal,
            env={
                **os.environ,
                "NOTIFY_SOCKET": str(address),
                "JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}",
            },
        )
        told = {manager.recv(200) for _ in range(2)}
        stored = f"FDSTORE=1\nFDNAME={group_name(run_directory(root))}\nFDPOLL=0".encode()
        assert told == {b"READY=1", stored}
        assert (mountpoint / "version").exists()
        with pytest.raises(OSError):
            (mountpoint / "images/pull").write_text("RUBBISH\n")
        daemon.send_signal(number)
        assert daemon.wait(20) == 0
        assert (
            manager.recv(200) == stored.replace(b"FDSTORE", b"FDSTOREREMOVE").split(b"\nFDPOLL")[0]
        )
        assert not mountpoint.is_mount()
        journal.seek(0)
        lines = journal.read().decode().splitlines()
    assert any("RUBBISH" in line for line in lines)
    assert all(line[:3] in ("<6>", "<4>", "<7>") for line in lines), lines


def test_without_rights(place: Place) -> None:
    root, mountpoint = place("a")
    for arguments in (["mount", "--root", root, mountpoint], ["umount", mountpoint]):
        child = os.fork()
        if child == 0:
            os.setuid(65534)
            os._exit(main([str(word) for word in arguments]))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    assert not root.exists()


def test_version_and_usage() -> None:
    assert ctrfs("version").stdout == "ctrfs 0.1.0\n"
    assert ctrfs().returncode == 2
    assert ctrfs("mount").returncode == 2
    assert "mount" in ctrfs("--help").stdout


def test_doctor_finds_this_machine_fit() -> None:
    result = ctrfs("doctor")
    assert result.returncode == 0, result.stdout
    assert "kernel" in result.stdout
    assert os.uname().release in result.stdout


def test_doctor_says_what_to_do_about_what_is_missing(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text('{"runtime": {"runtime": "no-such-runc", "conmon": "/no/such/conmon"}}')
    result = ctrfs("doctor", "--config", config)
    assert result.returncode == 1
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    for name in ("no-such-runc", "conmon"):
        (number,) = (i for i, line in enumerate(lines) if line.startswith(f"MISSING {name}"))
        assert f"apt install {name}" in lines[number + 1]


def test_run_directories(tmp_path: Path) -> None:
    assert run_directory(Path("/var/lib/ctrfs")) == DEFAULT_RUN
    other = run_directory(tmp_path)
    assert other.parent == DEFAULT_RUN.parent
    assert other != run_directory(tmp_path / "x")
