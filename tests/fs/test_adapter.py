"""The adapter and the node toolkit through real system calls on a real mount."""

import errno
import os
import select
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

KINDS = ("README", "value", "list", "command", "document", "slow", "log", "host", "errors")


def whole(path: Path, size: int) -> bytes:
    """Read a file by read(2) of ``size`` bytes each."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        pieces = []
        while piece := os.read(descriptor, size):
            pieces.append(piece)
        return b"".join(pieces)
    finally:
        os.close(descriptor)


def last_error(toy: Path) -> str:
    """The newest line of `errors`."""
    return (toy / "errors").read_text().splitlines()[-1]


def raises(code: int) -> "pytest.RaisesExc[OSError]":
    """Expect an OSError with exactly this errno."""
    return pytest.raises(OSError, check=lambda error: error.errno == code)


@pytest.mark.parametrize("name", KINDS)
def test_reads_of_any_size_give_the_same(toy: Path, name: str) -> None:
    with raises(errno.EACCES):  # so that `errors` is not empty
        (toy / "value").write_text("x")
    expected = whole(toy / name, 1 << 20)
    assert expected
    assert whole(toy / name, 4096) == expected
    if len(expected) < 100_000:
        assert whole(toy / name, 7) == expected
    if len(expected) < 5_000:
        assert whole(toy / name, 1) == expected


@pytest.mark.parametrize("name", [k for k in KINDS if k != "slow"])
def test_size_is_true(toy: Path, name: str) -> None:
    assert (toy / name).stat().st_size == len(whole(toy / name, 1 << 20))


def test_unknown_size_is_read_whole_by_tools(toy: Path) -> None:
    for command in (["cat"], ["head", "-c", "50000"], ["cp", "/dev/stdout"]):
        arguments = [command[0], *command[1:], str(toy / "slow")]
        if command[0] == "cp":
            arguments = ["cp", str(toy / "slow"), "/dev/stdout"]
        assert len(subprocess.run(arguments, capture_output=True, check=True).stdout) == 50_000


def test_reading_again_from_the_start_gives_the_present(toy: Path) -> None:
    descriptor = os.open(toy / "list", os.O_RDONLY)
    (toy / "list").write_text("one\n")
    assert os.pread(descriptor, 100, 0) == b"one\n"
    (toy / "list").write_text("two\n")
    assert os.pread(descriptor, 100, 0) == b"two\n"
    os.close(descriptor)


def test_a_reader_sees_one_version(toy: Path) -> None:
    (toy / "list").write_text("aaaa\n")
    descriptor = os.open(toy / "list", os.O_RDONLY)
    assert os.read(descriptor, 2) == b"aa"
    (toy / "list").write_text("bbbb\n")
    assert os.read(descriptor, 10) == b"aa\n"
    os.close(descriptor)


def test_writes_of_one_file_add_up(toy: Path) -> None:
    subprocess.run(f"(echo one; echo two) > {toy}/list", shell=True, check=True)
    assert (toy / "list").read_text() == "one\ntwo\n"
    subprocess.run(f"echo three >> {toy}/list", shell=True, check=True)
    assert (toy / "list").read_text() == "one\ntwo\nthree\n"
    subprocess.run(f": > {toy}/list", shell=True, check=True)
    assert (toy / "list").read_text() == ""


def test_truncate_empties(toy: Path) -> None:
    (toy / "list").write_text("one\n")
    os.truncate(toy / "list", 0)
    assert (toy / "list").read_text() == ""


def test_a_long_list_arrives_in_pieces(toy: Path) -> None:
    """And the pieces end anywhere, in the middle of a character too."""
    lines = "".join(f"line {number:05} \u00e4\n" for number in range(2000))
    for flags in (os.O_WRONLY | os.O_TRUNC, os.O_WRONLY | os.O_APPEND):
        (toy / "list").write_text("")
        descriptor = os.open(toy / "list", flags)
        data = lines.encode()
        for start in range(0, len(data), 4096):
            os.write(descriptor, data[start : start + 4096])
        os.close(descriptor)
        assert (toy / "list").read_text() == lines


def test_a_last_line_without_a_newline_is_taken_on_close(toy: Path) -> None:
    descriptor = os.open(toy / "list", os.O_WRONLY | os.O_TRUNC)
    text = b"x" * 2000 + b"\n" + b"\xc3\xa4" * 1047 + b"\xc3"
    assert len(text) == 4096
    os.write(descriptor, text)
    assert (toy / "list").read_bytes() == b"x" * 2000 + b"\n"
    os.write(descriptor, b"\xa4")
    os.close(descriptor)
    assert (toy / "list").read_bytes() == text + b"\xa4\n"


def test_a_hole_is_refused(toy: Path) -> None:
    descriptor = os.open(toy / "list", os.O_WRONLY)
    with raises(errno.EINVAL):
        os.pwrite(descriptor, b"x", 10)
    os.close(descriptor)


def test_two_writers_the_last_one_counts(toy: Path) -> None:
    first, second = (os.open(toy / "list", os.O_WRONLY) for _ in range(2))
    os.write(first, b"first\n")
    os.write(second, b"second\n")
    assert (toy / "list").read_text() == "second\n"
    os.close(first)
    os.close(second)


def test_a_failed_write_changes_nothing_and_is_explained(toy: Path) -> None:
    (toy / "list").write_text("good\n")
    with raises(errno.EINVAL):
        (toy / "list").write_text("bad\n")
    assert (toy / "list").read_text() == "good\n"
    line = last_error(toy)
    assert " EINVAL /list: write 'bad' by pid " in line
    assert line.endswith(f"pid {os.getpid()} uid 0: bad is not good")


def test_a_failure_shows_nothing_that_only_root_may_read(toy: Path) -> None:
    with raises(errno.EINVAL):
        (toy / "private").write_text("hunter2\n")
    assert "hunter2" not in last_error(toy)
    assert last_error(toy).endswith("uid 0: no")


def test_a_name_in_an_error_is_one_line(toy: Path) -> None:
    with raises(errno.EINVAL):
        os.mkdir(bytes(toy) + b"/objects/-a\nb\xff")
    assert "/objects/-a\\nb\\udcff: mkdir" in last_error(toy)


def test_binary_rubbish_is_refused(toy: Path) -> None:
    for name in ("list", "command"):
        with raises(errno.EINVAL):
            (toy / name).write_bytes(b"\xff\xfe\x00\x80")
        assert "not UTF-8" in last_error(toy)


def test_a_command_is_done_before_write_returns(toy: Path) -> None:
    (toy / "command").write_text("hello\n")
    assert (toy / "command").read_text() == "hello\n"


def test_an_internal_error_is_eio_without_a_traceback(toy: Path) -> None:
    with raises(errno.EIO):
        (toy / "command").write_text("crash\n")
    assert "internal error" in last_error(toy)
    assert "Traceback" not in (toy / "errors").read_text()


def test_a_document_is_taken_on_close(toy: Path) -> None:
    descriptor = os.open(toy / "document", os.O_WRONLY | os.O_TRUNC)
    os.write(descriptor, b'{"b"')
    os.write(descriptor, b": 2}")
    assert (toy / "document").read_text() == '{"a": 1}'
    os.close(descriptor)
    assert (toy / "document").read_text() == '{"b": 2}'
    (toy / "document").write_text('{"a": 1}')


def test_a_wrong_document_makes_close_fail(toy: Path) -> None:
    descriptor = os.open(toy / "document", os.O_WRONLY | os.O_TRUNC)
    os.write(descriptor, b"[]")
    with raises(errno.EINVAL):
        os.close(descriptor)
    assert (toy / "document").read_text() == '{"a": 1}'


def test_documents_can_be_large_and_copied(toy: Path, tmp_path: Path) -> None:
    big = tmp_path / "big"
    big.write_text("{" + "x" * 1_000_000 + "}")
    subprocess.run(["cp", str(big), str(toy / "document")], check=True)
    assert (toy / "document").read_bytes() == big.read_bytes()
    (toy / "document").write_text('{"a": 1}')
    with raises(errno.EFBIG):
        (toy / "document").write_bytes(b"{" + bytes(9 << 20))
    assert (toy / "document").read_text() == '{"a": 1}'


@pytest.mark.parametrize(
    ("call", "code"),
    [
        (lambda toy: (toy / "value").write_text("x"), errno.EACCES),
        (lambda toy: (toy / "new").write_text("x"), errno.EPERM),
        (lambda toy: (toy / "value").unlink(), errno.EPERM),
        (lambda toy: (toy / "objects").rmdir(), errno.EPERM),
        (lambda toy: (toy / "dir").mkdir(), errno.EPERM),
        (lambda toy: (toy / "value").rename(toy / "other"), errno.EPERM),
        (lambda toy: (toy / "l").symlink_to("value"), errno.EPERM),
        (lambda toy: os.link(toy / "value", toy / "l"), errno.EPERM),
        (lambda toy: os.mkfifo(toy / "fifo"), errno.EPERM),
        (lambda toy: (toy / "value").chmod(0o777), errno.EPERM),
        (lambda toy: os.chown(toy / "value", 1, 1), errno.EPERM),
        (lambda toy: (toy / "nothing").read_text(), errno.ENOENT),
        (lambda toy: (toy / "objects" / "-x").mkdir(), errno.EINVAL),
        (lambda toy: os.rmdir(toy / "objects" / "none"), errno.ENOENT),
        (lambda toy: (toy / ("x" * 256)).stat(), errno.ENAMETOOLONG),
    ],
)
def test_what_means_nothing_is_refused(toy: Path, call: object, code: int) -> None:
    assert callable(call)
    with raises(code):
        call(toy)


def test_touch_and_times(toy: Path) -> None:
    before = (toy / "value").stat().st_mtime_ns
    os.utime(toy / "value")
    assert (toy / "value").stat().st_mtime_ns == before


def test_setting_what_is_so_already_is_accepted(toy: Path, tmp_path: Path) -> None:
    (toy / "list").chmod(0o644)
    os.chown(toy / "list", 0, 0)
    (tmp_path / "list").write_text("copied\n")
    subprocess.run(["cp", "-p", str(tmp_path / "list"), str(toy / "list")], check=True)
    assert (toy / "list").read_text() == "copied\n"


def test_one_user_cannot_take_all_requests(toy: Path) -> None:
    script = f"""
import errno, os, threading
descriptor = os.open({str(toy / "stream")!r}, os.O_RDONLY)
refused = threading.Event()
def read():
    try:
        os.pread(descriptor, 1, 0)
    except BlockingIOError:
        refused.set()
    except InterruptedError:
        pass
threading.stack_size(65536)
for _ in range(1010):
    threading.Thread(target=read, daemon=True).start()
print(refused.wait(20), flush=True)
import time; time.sleep(60)
"""
    command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "/usr/bin/python3"]
    process = subprocess.Popen([*command, "-c", script], stdout=subprocess.PIPE, text=True, cwd="/")
    assert process.stdout is not None
    assert process.stdout.readline() == "True\n"
    assert (toy / "value").read_text() == "forty-two\n"
    process.kill()
    assert process.wait(10) == -signal.SIGKILL
    process.stdout.close()


def test_modes_are_enforced(toy: Path) -> None:
    assert stat.S_IMODE((toy / "secret").stat().st_mode) == 0o400
    script = f"cat {toy}/secret; cat {toy}/value; echo x > {toy}/list"
    result = subprocess.run(
        [
            "setpriv",
            "--reuid=65534",
            "--regid=65534",
            "--clear-groups",
            "sh",
            "-c",
            f"cd /; {script}",
        ],
        capture_output=True,
        text=True,
    )
    assert result.stderr.count("Permission denied") == 2
    assert result.stdout == "forty-two\n"


def test_objects_come_go_and_are_renamed(toy: Path) -> None:
    objects = toy / "objects"
    (objects / "a").mkdir()
    inode = (objects / "a").stat().st_ino
    assert (objects / "a" / "value").read_text() == "forty-two\n"
    (objects / "a").rename(objects / "b")
    assert (objects / "b").stat().st_ino == inode
    assert sorted(os.listdir(objects)) == ["README", "b"]
    (objects / "b").rmdir()
    (objects / "b").mkdir()
    assert (objects / "b").stat().st_ino != inode
    (objects / "b").rmdir()
    made = subprocess.run(
        ["mktemp", "-d", str(objects / "job-XXXX")], capture_output=True, text=True, check=True
    )
    Path(made.stdout.strip()).rmdir()


def test_rm_r_is_refused(toy: Path) -> None:
    (toy / "objects" / "x").mkdir()
    result = subprocess.run(["rm", "-r", str(toy / "objects" / "x")], capture_output=True)
    assert result.returncode != 0
    assert (toy / "objects" / "x" / "value").exists()
    (toy / "objects" / "x").rmdir()


def test_open_files_outlive_their_object(toy: Path) -> None:
    (toy / "objects" / "x").mkdir()
    with (toy / "objects" / "x" / "value").open() as file:
        (toy / "objects" / "x").rmdir()
        assert file.read() == "forty-two\n"
    with raises(errno.ENOENT):
        (toy / "objects" / "x" / "value").read_text()


def test_inode_numbers_are_stable(toy: Path) -> None:
    descriptor = os.open(toy / "value", os.O_RDONLY)
    number = os.fstat(descriptor).st_ino
    os.listdir(toy)
    assert (toy / "value").stat().st_ino == number
    os.close(descriptor)


def test_readme_explains_every_file(toy: Path) -> None:
    text = (toy / "README").read_text()
    assert text.startswith("A toy.\n")
    for name in ("value", "list", "command", "stream", "etc", "objects"):
        assert f"\n{name}  (" in text


def test_link(toy: Path) -> None:
    assert os.readlink(toy / "link") == "value"
    assert (toy / "link").read_text() == "forty-two\n"


# --- blocking -------------------------------------------------------------------------


def blocked_cat(path: Path) -> "subprocess.Popen[bytes]":
    """A cat that sleeps in read(2)."""
    process = subprocess.Popen(["cat", str(path)], stdout=subprocess.PIPE)
    wait_for_fuse(process.pid)
    return process


def wait_for_fuse(pid: int) -> None:
    """Return when the process waits for an answer of the daemon."""
    wait_until(lambda: Path(f"/proc/{pid}/wchan").read_text() == "request_wait_answer")


def wait_until(condition: Callable[[], bool]) -> None:
    """Return when something holds."""
    for _ in range(500):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen in time")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_blocked_reader_can_be_stopped(toy: Path, number: signal.Signals) -> None:
    process = blocked_cat(toy / "stream")
    process.send_signal(number)
    assert process.wait(2) == -number
    assert process.stdout is not None
    process.stdout.close()


def test_a_blocked_writer_can_be_stopped(toy: Path) -> None:
    process = subprocess.Popen(["sh", "-c", f"echo sleep > {toy}/command"])
    output = Path(f"/proc/{process.pid}/fd/1")
    wait_until(lambda: os.readlink(output) == f"{toy}/command")  # or it might wait for its open
    wait_for_fuse(process.pid)
    process.kill()
    assert process.wait(2) == -signal.SIGKILL
    # A killed writer does not wait for the daemon to notice.
    deadline = time.monotonic() + 5
    while " EINTR /command: write 'sleep' by pid " not in last_error(toy):
        assert time.monotonic() < deadline, last_error(toy)
        time.sleep(0.02)


def test_a_reader_of_an_inherited_descriptor_can_be_stopped(toy: Path) -> None:
    with (toy / "stream").open() as file:
        process = subprocess.Popen(["cat"], stdin=file, stdout=subprocess.DEVNULL)
        wait_for_fuse(process.pid)
        time.sleep(0.3)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(2) == -signal.SIGINT


def test_an_ignored_signal_interrupts_nothing(toy: Path) -> None:
    process = subprocess.Popen(
        ["sh", "-c", f"trap '' INT; exec cat {toy}/stream"], stdout=subprocess.DEVNULL
    )
    wait_for_fuse(process.pid)
    process.send_signal(signal.SIGINT)
    time.sleep(0.4)
    assert process.poll() is None
    process.kill()
    process.wait(2)


def test_harmless_signals_interrupt_nothing(toy: Path) -> None:
    """A background job that ends while its shell waits in a write."""
    script = f"sleep 0.3 & echo sleep > {toy}/command"
    process = subprocess.Popen(["bash", "-c", script], stderr=subprocess.DEVNULL)
    wait_for_fuse(process.pid)
    time.sleep(0.8)
    assert process.poll() is None
    process.kill()
    assert process.wait(2) == -signal.SIGKILL


def test_a_process_with_a_name_that_is_no_text(toy: Path) -> None:
    """Any user can have one, and wait under it."""
    script = (
        "import ctypes, sys; ctypes.CDLL(None).prctl(15, b'\\xff\\xfe', 0, 0, 0);"
        f"open({str(toy / 'stream')!r}).read()"
    )
    process = subprocess.Popen([sys.executable, "-c", script])
    wait_for_fuse(process.pid)
    time.sleep(0.4)
    assert (toy / "value").read_text() == "forty-two\n"
    process.kill()
    assert process.wait(2) == -signal.SIGKILL


def test_nonblocking_read_does_not_wait(toy: Path) -> None:
    descriptor = os.open(toy / "stream", os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(BlockingIOError):
        os.read(descriptor, 10)
    os.close(descriptor)


def test_five_hundred_blocked_readers_slow_nobody(toy: Path) -> None:
    script = f"""
import os, threading
def read():
    descriptor = os.open({str(toy / "stream")!r}, os.O_RDONLY)
    try:
        os.read(descriptor, 1)
    except InterruptedError:
        pass
for _ in range(500):
    threading.Thread(target=read, daemon=True).start()
print("started", flush=True)
import time; time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    wchans = ""
    for _ in range(100):
        wchans = "".join(p.read_text() for p in Path(f"/proc/{process.pid}/task").glob("*/wchan"))
        if wchans.count("request_wait_answer") == 500:
            break
        time.sleep(0.1)
    assert wchans.count("request_wait_answer") == 500
    assert (toy / "value").read_text() == "forty-two\n"
    process.kill()
    assert process.wait(5) == -signal.SIGKILL
    process.stdout.close()


def test_poll_and_the_end_of_waiting(toy: Path) -> None:
    """Runs after all others that need the stream to block, for it rings the bell."""
    descriptor = os.open(toy / "stream", os.O_RDONLY)
    poller = select.poll()
    poller.register(descriptor, select.POLLIN)
    assert poller.poll(100) == []
    reader = blocked_cat(toy / "stream")
    ringer = subprocess.Popen(["sh", "-c", f"sleep 0.2; echo ring > {toy}/command"])
    assert poller.poll(5000) == [(descriptor, select.POLLIN)]
    assert os.read(descriptor, 2) == b"ra"
    assert os.read(descriptor, 10) == b"ng\n"
    assert os.read(descriptor, 10) == b""
    os.close(descriptor)
    assert reader.communicate(timeout=2)[0] == b"rang\n"
    assert ringer.wait(2) == 0
    regular = os.open(toy / "value", os.O_RDONLY)
    poller = select.poll()
    poller.register(regular, select.POLLIN)
    assert poller.poll(0) == [(regular, select.POLLIN)]
    os.close(regular)


# --- automount --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        "cat etc/passwd",
        "ls etc",
        "stat -c %i etc",
        "find etc -maxdepth 1 -name passwd",
        "cd etc && cat passwd",
        "cat etc/../etc/passwd",
        "test -d etc",
    ],
)
def test_an_automount_is_there_at_first_use(toy: Path, command: str) -> None:
    if (toy / "etc").is_mount():
        subprocess.run(["umount", str(toy / "etc")], check=True)
    here = subprocess.run(command, shell=True, cwd=toy, capture_output=True)
    there = subprocess.run(command, shell=True, cwd="/", capture_output=True)
    assert here.returncode == 0
    assert (here.stdout, here.stderr) == (there.stdout, there.stderr)


def test_forgotten_numbers_are_given_back(toy: Path) -> None:
    for number in range(300):
        (toy / "objects" / f"o{number}").mkdir()
        (toy / "objects" / f"o{number}" / "value").read_text()
    for number in range(300):
        (toy / "objects" / f"o{number}").rmdir()
    for _ in range(50):
        if os.statvfs(toy).f_files < 100:
            break
        time.sleep(0.1)
    assert os.statvfs(toy).f_files < 100
