"""Containers on the installed runc and conmon: running, output, exit codes, commands."""

import errno
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from runtime.errors import (
    ContainerBusy,
    ContainerExists,
    ContainerNotFound,
    InvalidName,
    InvalidSetting,
    StdinClosed,
)
from store.cas import digest_of
from store.errors import CtrfsError, ImageInUse, ImageNotFound
from tests.runtime.support import (
    IMAGE,
    Room,
    add_image,
    base_layer,
    item,
    mounts_below,
    tar_of,
    text_of,
)
from tests.support.processes import parent


def events_of(room: Room) -> list[str]:
    """The kinds of all events so far."""
    return [json.loads(line)["event"] for line in room.events.since(0)[0]]


def content(path: str) -> str:
    """A file's text."""
    return Path(path).read_text()


async def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    """Wait until ``condition()`` holds."""
    with trio.fail_after(seconds):
        # Nothing tells of what a process in a container does.
        while not condition():  # noqa: ASYNC110
            await trio.sleep(0.005)


# --- running -------------------------------------------------------------------------


async def test_a_first_run(room: Room) -> None:
    container = await room.make("hello", "sh", "-c", "echo hi; echo oops >&2; exit 3")
    assert container.state == "created"
    assert container.pid is None
    assert container.ended_with() is None
    await container.start()
    assert await container.wait() == 3
    assert container.state == "stopped"
    assert container.exit_code == container.ended_with() == 3
    # Two pipes: which of them conmon reads first is up to it.
    assert sorted(text_of(container).splitlines()) == ["hi", "oops"]
    assert container.error == ""
    assert container.started_ns and container.finished_ns
    assert container.created_ns < container.started_ns <= container.finished_ns
    kinds = [kind for kind in events_of(room) if kind.startswith("container.")]
    assert kinds == ["container.create", "container.start", "container.exit"]


async def test_the_images_command_runs_when_args_are_not_set(room: Room) -> None:
    assert await room.output("default") == ""


async def test_a_second_run_continues_the_log_and_the_files(room: Room) -> None:
    container = await room.make("twice", "sh", "-c", "echo x >> /state; cat /state")
    for _ in range(2):
        await container.start()
        assert await container.wait() == 0
    assert text_of(container) == "x\nx\nx\n"


async def test_ended_by_a_signal(room: Room) -> None:
    container = await room.make("sig", "sleep", "100")
    await container.start()
    await container.signal(signal.SIGKILL)
    assert container.exit_code == 128 + signal.SIGKILL


async def test_signals_reach_the_process(room: Room) -> None:
    script = "trap 'echo got; exit 5' USR1; echo ready; while :; do sleep 0.01; done"
    container = await room.make("usr1", "sh", "-c", script)
    await container.start()
    await until(lambda: "ready" in text_of(container))
    await container.signal(signal.SIGUSR1)
    assert await container.wait() == 5
    assert text_of(container) == "ready\ngot\n"
    with pytest.raises(ContainerBusy):
        await container.signal(signal.SIGUSR1)


async def test_processes_that_end_at_once_have_all_their_output_and_code(room: Room) -> None:
    container = await room.make("quick", "sh", "-c", "printf %s end; exit 7")
    for turn in range(1, 16):
        await container.start()
        assert await container.wait() == 7
        assert text_of(container) == "end" * turn


async def test_a_hundred_megabytes_of_output(room: Room) -> None:
    script = "yes 0123456789abcdefghijklmnopqrstuvwxyz | head -c 100000000; echo; exit 9"
    container = await room.make("loud", "sh", "-c", script)
    await container.start()
    assert await container.wait() == 9
    line = b"0123456789abcdefghijklmnopqrstuvwxyz\n"
    expected_end = (line * (100_000_000 // len(line) + 1))[:100_000_000] + b"\n"
    assert container.log.text_size() == len(expected_end)
    for offset in (0, 50_000_001, 99_999_900):
        assert container.log.read_text(offset, 200) == expected_end[offset : offset + 200]


async def test_binary_output(room: Room) -> None:
    script = r"printf 'a\000b\r\n\377\376'; printf 'no newline at the end'"
    container = await room.make("binary", "sh", "-c", script)
    await container.start()
    await container.wait()
    assert container.log.read_text(0, 1000) == b"a\0b\r\n\xff\xfeno newline at the end"


async def test_partial_lines_and_both_streams_in_json(room: Room) -> None:
    script = "printf one; sleep 0.05; echo two; sleep 0.05; echo three >&2"
    container = await room.make("json", "sh", "-c", script)
    await container.start()
    await container.wait()
    lines = [json.loads(line) for line in container.log.read_json(0, 10_000).splitlines()]
    assert [(line["stream"], line["text"]) for line in lines] == [
        ("stdout", "one"),
        ("stdout", "two\n"),
        ("stderr", "three\n"),
    ]
    assert all(line["time"].endswith("Z") for line in lines)


async def test_no_trace_of_the_runtime_in_the_output(room: Room) -> None:
    container = await room.make("clean", "true")
    document = json.loads(container.config_document())
    document["process"]["capabilities"]["bounding"].append("CAP_NOT_KNOWN")
    await container.set_config_document(json.dumps(document).encode())
    await container.start()
    await container.wait()
    assert text_of(container) == ""


async def test_twenty_at_once(room: Room) -> None:
    containers = [await room.make(f"c{n}", "sh", "-c", f"echo {n}; exit {n}") for n in range(20)]
    async with trio.open_nursery() as nursery:
        for container in containers:
            nursery.start_soon(container.start)
    for number, container in enumerate(containers):
        assert await container.wait() == number
        assert text_of(container) == f"{number}\n"


# --- failures to start ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "settings", "code", "sentence"),
    [
        (("nosuch",), {}, errno.ENOENT, "'nosuch' was not found in the PATH"),
        (("/no/such",), {}, errno.ENOENT, "'/no/such' was not found"),
        (("/etc",), {}, errno.EACCES, "'/etc' cannot be executed"),
        (("/etc/passwd",), {}, errno.EACCES, "'/etc/passwd' cannot be executed"),
        (("true",), {"user": "nobody"}, errno.EINVAL, "no user 'nobody'"),
        (("true",), {"user": "web:nogroup"}, errno.EINVAL, "no group 'nogroup'"),
        (("true",), {"workdir": "/etc/passwd"}, errno.ENOTDIR, "'/etc/passwd' is no directory"),
        (("true",), {"mounts": "/no/such /x bind"}, errno.ENOENT, "/no/such cannot be mounted"),
        (("true",), {"mounts": "/tmp /etc/passwd bind"}, errno.EINVAL, "'/etc/passwd'"),
    ],
)
async def test_a_failed_start_says_why_and_changes_nothing(
    room: Room,
    place: Path,
    args: tuple[str, ...],
    settings: dict[str, str],
    code: int,
    sentence: str,
) -> None:
    container = await room.make("bad", *args, **settings)
    before = mounts_below(place / "run" / "containers")
    with pytest.raises(CtrfsError) as failure:
        await container.start()
    assert failure.value.errno == code
    assert sentence in failure.value.sentence
    assert "\n" not in failure.value.sentence
    assert container.state == "created"
    assert container.exit_code is None
    assert mounts_below(place / "run" / "containers") == before
    assert not list((place / "run" / "runc").glob("*"))
    assert not (place / "root" / "containers" / container.uid / "upper").exists()
    # It can be put right and started.
    await container.set("args", "true")
    for name in settings:
        await container.set(name, "")
    await container.start()
    assert await container.wait() == 0


async def test_a_failed_start_of_a_stopped_container(room: Room) -> None:
    container = await room.make("bad2", "sh", "-c", "rm /bin/sh; exit 2")
    await container.start()
    assert await container.wait() == 2
    with pytest.raises(CtrfsError, match="'sh' was not found"):
        await container.start()
    assert container.state == "stopped"
    assert container.exit_code == 2
    assert "D /bin/sh" in (await container.changes()).decode()


async def test_no_image_and_unknown_image(room: Room) -> None:
    container = await room.containers.create("none")
    with pytest.raises(InvalidSetting, match="no image is set"):
        await container.start()
    assert container.config_document() == b""
    await container.set("image", "unknown:1")
    with pytest.raises(ImageNotFound):
        await container.start()
    assert container.state == "created"


async def test_start_twice(room: Room) -> None:
    container = await room.make("once", "sleep", "100")
    outcomes: list[str] = []

    async def start() -> None:
        try:
            await container.start()
            outcomes.append("started")
        except ContainerBusy as error:
            outcomes.append(error.sentence)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(start)
        nursery.start_soon(start)
    assert sorted(outcomes) == ["once runs already", "started"]


# --- commands ------------------------------------------------------------------------


async def test_stop_uses_the_signal_and_does_not_wait_longer_than_needed(room: Room) -> None:
    script = "trap 'echo bye; exit 4' INT; echo ready; while :; do sleep 0.01; done"
    container = await room.make("polite", "sh", "-c", script, stop_signal="INT")
    await container.start()
    await until(lambda: "ready" in text_of(container))
    began = time.monotonic()
    await container.stop()
    assert time.monotonic() - began < 3
    assert container.exit_code == 4
    assert text_of(container) == "ready\nbye\n"


async def test_stop_kills_what_ignores_the_signal(room: Room) -> None:
    script = "trap '' TERM; echo ready; while :; do sleep 0.01; done"
    container = await room.make("stubborn", "sh", "-c", script, stop_timeout="0.3")
    await container.start()
    await until(lambda: "ready" in text_of(container))
    began = time.monotonic()
    await container.stop()
    assert 0.3 <= time.monotonic() - began < 3
    assert container.exit_code == 137


async def test_a_stop_goes_on_when_its_caller_has_gone(room: Room) -> None:
    container = await room.make("left", "sleep", "100", stop_timeout="0.2")
    await container.start()
    with trio.move_on_after(0.02):
        await container.stop()
    assert container.state == "running"
    assert await container.wait() == 137


async def test_a_start_is_complete_when_its_caller_has_gone(room: Room) -> None:
    container = await room.make("gone", "sleep", "100")
    with trio.move_on_after(0.005):
        await container.start()
    await until(lambda: container.state == "running")
    await container.kill()


async def test_kill_during_stop_and_stop_twice(room: Room) -> None:
    container = await room.make("both", "sleep", "100", stop_timeout="60")
    await container.start()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(container.stop)
        nursery.start_soon(container.stop)
        await trio.sleep(0.05)
        with trio.fail_after(5):
            await container.kill()
    assert container.exit_code == 137
    with pytest.raises(ContainerBusy, match="does not run, it is stopped"):
        await container.stop()
    with pytest.raises(ContainerBusy):
        await container.kill()


async def test_restart(room: Room) -> None:
    script = "echo run; trap 'exit 0' TERM; while :; do sleep 0.01; done"
    container = await room.make("again", "sh", "-c", script)
    await container.restart()
    first = container.pid
    await until(lambda: text_of(container) == "run\n")
    await container.restart()
    assert container.state == "running"
    assert container.pid != first
    await until(lambda: text_of(container) == "run\nrun\n")


async def test_pause_and_resume(room: Room) -> None:
    script = "while :; do echo x; sleep 0.01; done"
    container = await room.make("ice", "sh", "-c", script)
    with pytest.raises(ContainerBusy):
        await container.pause()
    await container.start()
    await until(lambda: container.log.text_size() > 4)
    await container.pause()
    assert container.state == "paused"
    with pytest.raises(ContainerBusy, match="paused already"):
        await container.pause()
    with pytest.raises(ContainerBusy):
        await container.start()
    await trio.sleep(0.05)
    size = container.log.text_size()
    await trio.sleep(0.1)
    assert container.log.text_size() == size
    await container.resume()
    assert container.state == "running"
    await until(lambda: container.log.text_size() > size)
    with pytest.raises(ContainerBusy, match="not paused"):
        await container.resume()


async def test_pause_of_one_that_has_just_ended(room: Room) -> None:
    container = await room.make("gone", "sleep", "100")
    await container.start()
    assert container.pid is not None
    monitor = parent(container.pid)
    os.kill(monitor, signal.SIGSTOP)  # or the end might be known before
    try:
        os.kill(container.pid, signal.SIGKILL)
        status = Path(f"/proc/{container.pid}/status")
        await until(lambda: "State:\tZ" in status.read_text())
        with pytest.raises(ContainerBusy, match="has just ended"):
            await container.pause()
    finally:
        os.kill(monitor, signal.SIGCONT)
    assert await container.wait() == 137


async def test_a_paused_container_can_be_killed_and_stopped(room: Room) -> None:
    container = await room.make(
        "cold", "sh", "-c", "trap 'exit 6' TERM; while :; do sleep 0.01; done"
    )
    await container.start()
    await trio.sleep(0.05)
    await container.pause()
    with trio.fail_after(5):
        await container.stop()
    assert container.exit_code == 6
    await container.start()
    await container.pause()
    with trio.fail_after(5):
        await container.signal(signal.SIGKILL)
    assert container.exit_code == 137


async def test_waiting(room: Room) -> None:
    container = await room.make("waited", "sh", "-c", "exit 8")
    codes: list[int] = []

    async def wait() -> None:
        codes.append(await container.wait())

    async with trio.open_nursery() as nursery:
        for _ in range(50):
            nursery.start_soon(wait)
        await trio.sleep(0.01)
        assert codes == []
        await container.start()
    assert codes == [8] * 50


async def test_waiting_for_a_container_that_is_removed(room: Room) -> None:
    container = await room.make("never")
    with pytest.RaisesGroup(ContainerNotFound):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(container.wait)
            await trio.sleep(0.01)
            await room.containers.remove("never")


# --- making, renaming, removing ------------------------------------------------------


async def test_names(room: Room) -> None:
    for name in ("", ".x", "-x", "a/b", "a b", "é", "x" * 129, "README", "a\n"):
        with pytest.raises(InvalidName):
            await room.containers.create(name)
    await room.containers.create("job-aB_3.x")
    with pytest.raises(ContainerExists):
        await room.containers.create("job-aB_3.x")
    assert room.containers.list() == ["job-aB_3.x"]
    assert "job-aB_3.x" in room.containers
    with pytest.raises(ContainerNotFound):
        room.containers.get("other")


async def test_the_same_name_twice_at_once(room: Room) -> None:
    refused = 0

    async def create() -> None:
        nonlocal refused
        try:
            await room.containers.create("same")
        except ContainerExists:
            refused += 1

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(create)
    assert refused == 4


async def test_remove_while_it_runs(room: Room) -> None:
    container = await room.make("busy", "sleep", "100")
    await container.start()
    with pytest.raises(ContainerBusy, match="is running and cannot be removed"):
        await room.containers.remove("busy")
    assert container.state == "running"
    await container.kill()
    await room.containers.remove("busy")
    assert "busy" not in room.containers
    with pytest.raises(ContainerNotFound):
        await container.start()
    await room.containers.create("busy")


async def test_remove_while_somebody_is_in_its_rootfs(room: Room) -> None:
    container = await room.make("inside", "true")
    root = await container.rootfs()
    held = os.open(root / "etc/passwd", os.O_RDONLY)
    with pytest.raises(ContainerBusy, match="fuser"):
        await room.containers.remove("inside")
    assert "inside" in room.containers
    assert (root / "bin/sh").exists()
    os.close(held)
    await room.containers.remove("inside")


async def test_rename(room: Room) -> None:
    container = await room.make("before", "hostname")
    other = await room.make("other", "sleep", "100")
    await other.start()
    with pytest.raises(ContainerBusy):
        await room.containers.rename("other", "else")
    with pytest.raises(ContainerExists):
        await room.containers.rename("before", "other")
    with pytest.raises(ContainerNotFound):
        await room.containers.rename("nobody", "x")
    await room.containers.rename("before", "after")
    assert room.containers.get("after") is container
    assert container.id == "after"
    assert room.containers.list() == ["other", "after"]
    await container.start()
    assert await container.wait() == 0
    assert text_of(container) == "after\n"


async def test_images_in_use(room: Room) -> None:
    container = await room.make("user", "true")
    with pytest.raises(ImageInUse, match="the container user"):
        room.store.images.remove(IMAGE)
    await container.set("image", "")
    room.store.images.remove(IMAGE)
    room.add_base()


async def test_layers_below_containers_are_pinned(room: Room) -> None:
    container = await room.make("user", "true")
    assert list(room.store.images.pinned()) == [], "it may get another image yet"
    await container.start()
    await container.wait()
    replaced = room.store.images.get(IMAGE)
    add_image(room.store, IMAGE, [tar_of([])])
    assert list(room.store.images.pinned()) == [replaced.diff_ids]
    room.add_base()


# --- settings in force ---------------------------------------------------------------


async def test_environment_workdir_hostname(room: Room) -> None:
    text = await room.output(
        "env",
        *("sh", "-c", "env; pwd; hostname"),
        env="A=1\nB=x y\nFROM_IMAGE\n",
        workdir="/made/here",
        hostname="my.host",
    )
    lines = text.splitlines()
    assert "A=1" in lines and "B=x y" in lines and "PATH=/bin" in lines
    assert not any(line.startswith("FROM_IMAGE") for line in lines)
    assert lines[-2:] == ["/made/here", "my.host"]


@pytest.mark.parametrize(
    ("user", "expected"),
    [
        ("", "uid=0(root) gid=0(root) groups=0(root)"),
        ("web", "uid=1000(web) gid=1001(web) groups=44(media),55(logs),1001(web)"),
        ("1000", "uid=1000(web) gid=1001(web) groups=44(media),55(logs),1001(web)"),
        ("web:media", "uid=1000(web) gid=44(media) groups=44(media)"),
        ("4321:99", "uid=4321 gid=99 groups=99"),
        ("4321", "uid=4321 gid=0(root) groups=0(root)"),
    ],
)
async def test_users(room: Room, user: str, expected: str) -> None:
    text = (await room.output("user", "id", user=user)).strip()
    # busybox lists groups in the order it gets them.
    head, _, groups = text.partition(" groups=")
    wanted_head, _, wanted = expected.partition(" groups=")
    assert head == wanted_head
    assert sorted(set(groups.split(","))) == sorted(wanted.split(","))
    document = json.loads(room.containers.get("user").config_document())
    assert "username" not in document["process"]["user"]


async def test_readonly(room: Room) -> None:
    script = "echo x > /new || echo refused; echo x > /tmp/y || echo refused; echo z > /dev/shm/z"
    text = await room.output("ro", "sh", "-c", script, readonly="1")
    assert text.count("refused\n") == 2


async def test_mounts(room: Room, tmp_path: Path) -> None:
    shared = tmp_path / "with space"
    shared.mkdir()
    (shared / "in").write_text("from outside")
    source = str(shared).replace(" ", r"\040")
    mounts = f"{source} /data bind rw\n{source} /look bind ro\ntmpfs /mem tmpfs size=1m,mode=700\n"
    script = (
        "cat /data/in; echo inside > /data/out; (echo no > /look/x) 2>/dev/null || echo refused;"
        "ls -ld /mem"
    )
    text = await room.output("m", "sh", "-c", script, mounts=mounts)
    assert text.startswith("from outside")
    assert "refused\ndrwx------" in text
    assert (shared / "out").read_text() == "inside\n"


async def test_networks(room: Room) -> None:
    assert "eth" not in await room.output("alone", "ip", "link")
    text = await room.output(
        "host", "sh", "-c", "readlink /proc/self/ns/net; cat /etc/hosts", network="host"
    )
    assert text == os.readlink("/proc/self/ns/net") + "\n" + content("/etc/hosts")


async def test_what_a_container_may_not_do(room: Room) -> None:
    script = (
        "exec 2>/dev/null; mount -t tmpfs x /tmp && echo mounted;"
        "echo 1 > /proc/sys/kernel/panic && echo sysctl;"
        "cat /proc/kcore | head -c 1 | wc -c; grep -E '^(NoNewPrivs|Seccomp):' /proc/self/status;"
        "grep CapEff /proc/self/status; ls /proc | grep -c '^[0-9]'"
    )
    lines = (await room.output("jail", "sh", "-c", script)).splitlines()
    assert not {"mounted", "sysctl"} & set(lines)
    assert "NoNewPrivs:\t1" in lines
    assert "Seccomp:\t2" in lines
    assert "CapEff:\t00000000a80425fb" in lines
    assert int(lines[-1]) < 6


async def test_descriptor_limit(room: Room) -> None:
    assert await room.output("limit", "sh", "-c", "ulimit -n") == "1024\n"


async def test_settings_are_fixed_after_the_start(room: Room) -> None:
    container = await room.make("fixed", "true")
    before = container.settings_ns
    await container.set("labels", "a=1")
    assert container.settings_ns > before
    await container.start()
    await container.wait()
    for name in ("args", "image", "labels", "stdin"):
        with pytest.raises(ContainerBusy, match="copy its `spec`"):
            await container.set(name, "x=y")
    with pytest.raises(ContainerBusy):
        await container.set_spec_document(b"{}")
    with pytest.raises(ContainerBusy):
        await container.set_config_document(b"")
    copy = await room.containers.create("copy")
    await copy.set_spec_document(container.spec_document())
    assert copy.own_text("labels") == "a=1\n"
    await copy.start()
    assert await copy.wait() == 0


async def test_a_document_of_ones_own(room: Room) -> None:
    container = await room.make("own", "true", user="web")
    document = json.loads(container.config_document())
    assert document["process"]["user"]["username"] == "web"
    document["process"]["args"] = ["sh", "-c", "id -u; echo $X"]
    document["process"]["env"] = ["PATH=/bin", "X=own"]
    document["root"]["path"] = "/"
    document["linux"]["cgroupsPath"] = "/somewhere"
    await container.set_config_document(json.dumps(document).encode())
    shown = json.loads(container.config_document())
    assert shown["root"]["path"].endswith("/rootfs")
    assert shown["linux"]["cgroupsPath"] == f"/ctrfs/{container.uid}"
    await container.start()
    assert await container.wait() == 0
    assert text_of(container) == "1000\nown\n"


async def test_a_document_of_ones_own_can_be_dropped_and_is_checked(room: Room) -> None:
    container = await room.make("own2", "echo", "generated")
    generated = container.config_document()
    for bad in (b"\xff\xfe", b"{", b"[]", b'{"process": {}}', b'{"process": {"args": [1]}}'):
        with pytest.raises(InvalidSetting):
            await container.set_config_document(bad)
    terminal = json.dumps({"process": {"args": ["x"], "terminal": True}}).encode()
    with pytest.raises(InvalidSetting, match="terminal"):
        await container.set_config_document(terminal)
    assert container.config_document() == generated
    await container.set_config_document(b'{"process": {"args": ["x"]}}')
    with pytest.raises(CtrfsError):
        await container.start()
    assert container.state == "created"
    await container.set_config_document(b"\n")
    assert container.config_document() == generated


# --- standard input ------------------------------------------------------------------


async def test_stdin_once(room: Room) -> None:
    container = await room.make("cat", "sh", "-c", "cat; echo end", stdin="once")
    await container.start()
    await container.write_stdin(b"hello ")
    await container.write_stdin(b"world\n")
    await container.stdin_writer_gone()
    with trio.fail_after(5):
        assert await container.wait() == 0
    assert text_of(container) == "hello world\nend\n"
    with pytest.raises(ContainerBusy):
        await container.write_stdin(b"late")


async def test_stdin_open_stays_open(room: Room) -> None:
    container = await room.make(
        "lines", "sh", "-c", "while read x; do echo got $x; done", stdin="open"
    )
    await container.start()
    for word in ("one", "two"):
        await container.write_stdin(f"{word}\n".encode())
        await container.stdin_writer_gone()
    await until(lambda: text_of(container) == "got one\ngot two\n")
    assert container.state == "running"


async def test_stdin_waits_for_a_slow_reader_and_loses_nothing(room: Room) -> None:
    container = await room.make("slow", "sh", "-c", "sleep 0.2; wc -c", stdin="once")
    await container.start()
    piece = bytes(range(256)) * 4096
    for _ in range(4):
        await container.write_stdin(piece)
    await container.stdin_writer_gone()
    with trio.fail_after(10):
        await container.wait()
    assert text_of(container).strip() == str(4 * len(piece))


async def test_stdin_while_the_process_writes_much(room: Room) -> None:
    container = await room.make("echo", "cat", stdin="once")
    await container.start()
    piece = b"x" * 99_999 + b"\n"
    with trio.fail_after(20):
        for _ in range(50):
            await container.write_stdin(piece)
        await container.stdin_writer_gone()
        await container.wait()
    assert container.log.text_size() == 50 * len(piece)


async def test_stdin_closed_and_none(room: Room) -> None:
    container = await room.make("closed", "sleep", "100", stdin="once")
    await container.start()
    await container.write_stdin(b"x")
    await container.stdin_writer_gone()
    with pytest.raises(StdinClosed):
        await container.write_stdin(b"y")
    none = await room.make("none", "sh", "-c", "readlink /proc/self/fd/0; sleep 100")
    await none.start()
    with pytest.raises(InvalidSetting, match="no standard input"):
        await none.write_stdin(b"x")
    await until(lambda: "/dev/null" in text_of(none))


# --- looking -------------------------------------------------------------------------


async def test_processes(room: Room) -> None:
    container = await room.make("ps", "sh", "-c", "sleep 77 & sleep 78 & wait", user="web")
    assert await container.processes() == ""
    await container.start()
    await trio.sleep(0.1)
    table = (await container.processes()).splitlines()
    assert table[0].split() == ["PID", "PPID", "USER", "STAT", "TIME", "COMMAND"]
    assert len(table) == 4
    assert str(container.pid) == table[1].split()[0]
    assert {line.split(None, 5)[5] for line in table[2:]} == {"sleep 77", "sleep 78"}


async def test_changes(room: Room) -> None:
    script = (
        "echo x > /new; mkdir -p /d/e; rm /etc/group; echo y >> /etc/passwd; rm -r /root;"
        "mkdir /root"
    )
    container = await room.make("changed", "sh", "-c", script)
    assert await container.changes() == b""
    await container.start()
    await container.wait()
    changes = (await container.changes()).decode().splitlines()
    expected = {"A /new", "A /d", "A /d/e", "C /etc", "D /etc/group", "C /etc/passwd", "C /root"}
    assert expected <= set(changes)
    assert [line[2:] for line in changes] == sorted(line[2:] for line in changes)


async def test_rootfs_before_during_and_after(room: Room) -> None:
    container = await room.make("files", "sh", "-c", "cat /put; echo made > /made; sleep 100")
    root = await container.rootfs()
    (root / "put").write_text("by hand\n")
    with pytest.raises(ContainerBusy, match="holds files already"):
        await container.set("image", "other:1")
    await container.start()
    await until(lambda: (root / "made").exists())
    await until(lambda: text_of(container) == "by hand\n")
    await container.kill()
    assert (await container.rootfs() / "made").read_text() == "made\n"


async def test_an_unused_rootfs_does_not_hold_the_image(room: Room) -> None:
    container = await room.make("free")
    await container.rootfs()
    await container.set("image", "other:1")
    with pytest.raises(ImageNotFound):
        await container.rootfs()


async def test_a_tag_that_moves_does_not_move_the_container(room: Room) -> None:
    container = await room.make("kept", "sh", "-c", "echo run; test -e /new && echo moved")
    await container.start()
    await container.wait()
    add_image(room.store, IMAGE, [base_layer(), tar_of([(item("new"), b"")])])
    await container.start()
    await container.wait()
    assert text_of(container) == "run\nrun\n"


async def test_no_rootfs_without_image(room: Room) -> None:
    container = await room.containers.create("bare")
    with pytest.raises(ContainerNotFound, match="no image yet"):
        await container.rootfs()
    assert container.error == ""
    assert await container.changes() == b""


# --- the monitor ---------------------------------------------------------------------


async def test_a_killed_monitor_ends_the_container(room: Room) -> None:
    container = await room.make("orphan", "sleep", "100")
    await container.start()
    run = container._record.run
    assert run is not None and container.pid is not None
    pid = container.pid
    os.kill(run.conmon.pid, signal.SIGKILL)
    with trio.fail_after(10):
        assert await container.wait() == 137
    assert "monitor (conmon) ended before the container" in container.error
    assert not run.init.is_running(), pid
    await container.start()
    assert container.error == ""


async def test_out_of_memory_is_named(room: Room) -> None:
    container = await room.make("greedy", "sh", "-c", "tail /dev/zero")
    document = json.loads(container.config_document())
    document["linux"]["resources"]["memory"] = {"limit": 16 << 20}
    await container.set_config_document(json.dumps(document).encode())
    await container.start()
    assert await container.wait() == 137
    assert "out of memory" in container.error


@pytest.mark.logs("killed: they may have read zeros")
async def test_containers_of_a_layer_that_was_read_wrongly_are_ended(room: Room) -> None:
    running, stopped = await room.make("a", "sleep", "100"), await room.make("b", "true")
    await running.start()
    await stopped.start()
    await stopped.wait()
    await room.containers.condemn(digest_of(b"another layer"), "they may have read zeros")
    assert running.is_running
    (diff_id,) = room.store.images.named(IMAGE).diff_ids
    await room.containers.condemn(diff_id, "they may have read zeros")
    assert (running.state, running.exit_code) == ("stopped", 137)
    assert running.error == "they may have read zeros"
    assert (stopped.exit_code, stopped.error) == (0, "")
