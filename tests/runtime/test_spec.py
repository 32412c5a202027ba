"""Documents for the OCI runtime, the seccomp profile, and what the runtimes answer."""

import errno
import json
import os
import resource
import time
from contextlib import suppress
from pathlib import Path

import pytest

from runtime import oci, spec
from runtime.config import RuntimeConfig
from runtime.errors import InvalidSetting, Unsupported
from runtime.oci import OciRuntime, explain, find_program
from runtime.seccomp import default_profile
from runtime.settings import Settings, effective, with_text
from runtime.users import User


def document(**settings: str) -> spec.Document:
    """The generated document."""
    written = Settings()
    for name, text in settings.items():
        written = with_text(written, name, text)
    return spec.generate(effective(written, None, "name"), "/ctrfs/1", unified=False)


def test_containerds_defaults() -> None:
    made = document(args="x")
    assert made["process"]["noNewPrivileges"] is True
    assert len(made["process"]["capabilities"]["bounding"]) == 14
    assert "inheritable" not in made["process"]["capabilities"]
    assert "/proc/kcore" in made["linux"]["maskedPaths"]
    assert "/proc/sys" in made["linux"]["readonlyPaths"]
    assert made["linux"]["resources"]["devices"] == [{"allow": False, "access": "rwm"}]
    kinds = {n["type"] for n in made["linux"]["namespaces"]}
    assert kinds == {"pid", "ipc", "uts", "mount", "network"}
    assert "oomScoreAdj" not in made["process"]


def test_on_a_machine_with_cgroup_v2() -> None:
    made = spec.generate(effective(Settings(), None, "n"), "/c", unified=True)
    assert {"type": "cgroup"} in made["linux"]["namespaces"]
    mounted = {m["destination"]: m for m in made["mounts"]}
    assert mounted["/sys/fs/cgroup"]["options"][0] == "ro"


def test_the_hosts_network() -> None:
    made = document(args="x", network="host")
    assert {"type": "network"} not in made["linux"]["namespaces"]
    hosts = next(m for m in made["mounts"] if m["destination"] == "/etc/hosts")
    assert hosts["options"] == ["rbind", "ro"]


def test_no_limit_above_the_daemons() -> None:
    made = document(args="x")
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert made["process"]["rlimits"] == [spec.descriptor_limit(hard)]
    assert spec.descriptor_limit(hard)["soft"] == min(1024, hard)
    assert spec.descriptor_limit(500) == {"type": "RLIMIT_NOFILE", "soft": 500, "hard": 500}


def test_completion() -> None:
    made = document(args="x", user="web")
    assert spec.username(made) == "web"
    done = spec.complete(made, Path("/root"), "/cgroup", User(5, 6, (6, 7)))
    assert done["process"]["user"] == {"uid": 5, "gid": 6, "additionalGids": [6, 7]}
    assert (done["root"]["path"], done["linux"]["cgroupsPath"]) == ("/root", "/cgroup")
    assert spec.username(made) == "web", "the original is as it was"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1",
        '{"process": {"args": []}}',
        '{"process": {"args": ["a\\u0000"]}}',
        '{"process": {"args": [""]}}',
        '{"process": {"args": ["x"], "user": 3}}',
        '{"process": {"args": ["x"]}, "linux": []}',
        '{"process": {"args": ["x"]}, "root": "x"}',
        "[" * 100_000,
    ],
)
def test_overrides_that_no_container_can_run_by(text: str) -> None:
    with pytest.raises(InvalidSetting):
        spec.parse_override(text.encode())


def rule(profile: spec.Document, name: str) -> list[spec.Document]:
    """The rules for one system call."""
    return [r for r in profile["syscalls"] if name in r["names"]]


def test_the_default_profile() -> None:
    profile = default_profile(["CAP_SYS_CHROOT"])
    assert profile["defaultAction"] == "SCMP_ACT_ERRNO"
    for name in ("read", "openat", "execve", "socketpair", "statx", "chroot", "ptrace", "rseq"):
        assert [r["action"] for r in rule(profile, name)] == ["SCMP_ACT_ALLOW"], name
    refused = (
        "mount umount2 setns unshare bpf perf_event_open init_module reboot kexec_load swapon"
        " keyctl io_uring_setup userfaultfd open_by_handle_at settimeofday clock_settime"
    )
    for name in refused.split(" "):
        assert rule(profile, name) == [], name
    assert rule(profile, "clone3")[0]["errnoRet"] == errno.ENOSYS
    assert rule(profile, "clone")[0]["args"][0]["op"] == "SCMP_CMP_MASKED_EQ"


def test_capabilities_bring_their_calls() -> None:
    profile = default_profile(["CAP_SYS_ADMIN", "CAP_SYS_TIME"])
    for name in ("mount", "clone3", "unshare", "clock_settime"):
        assert [r["action"] for r in rule(profile, name)] == ["SCMP_ACT_ALLOW"], name
        assert "args" not in rule(profile, name)[0]


def test_names_stand_once() -> None:
    for one in default_profile(["CAP_SYS_ADMIN", "CAP_BPF", "CAP_SYSLOG"])["syscalls"]:
        assert len(one["names"]) == len(set(one["names"]))


@pytest.mark.parametrize(
    ("message", "code", "sentence"),
    [
        (
            'time="x" level=error msg="runc create failed: unable to start container process:'
            ' exec: \\"a b\\": executable file not found in $PATH"',
            errno.ENOENT,
            "the command 'a b' was not found in the PATH of the image",
        ),
        (
            "runc create failed: unable to start container process: exec: /x: permission denied",
            errno.EACCES,
            "the OCI runtime failed: exec: /x: permission denied",
        ),
        (
            "executable file `x' not found in $PATH: No such file or directory",
            errno.ENOENT,
            "the command 'x' was not found in the image",
        ),
        (
            "time=x level=warning msg=y\nsomething new: no space left on device",
            errno.ENOSPC,
            "the OCI runtime failed: something new: no space left on device",
        ),
        (
            'error mounting "/etc/hosts" to rootfs at "/etc": mount /etc/hosts:/etc (via'
            " /proc/self/fd/6), flags: 0x5000: not a directory",
            errno.EINVAL,
            "'/etc/hosts' cannot be mounted at '/etc' in the container: not a directory",
        ),
        (
            'error mounting "/etc" to rootfs at "/proc/1": "/r/proc/1" cannot be mounted because'
            " it is inside /proc",
            errno.EINVAL,
            "'/etc' cannot be mounted at '/proc/1' in the container: \"/r/proc/1\" cannot be",
        ),
        ("cgroups in hybrid mode not supported, drop …", errno.EOPNOTSUPP, "crun does not work"),
        ("", errno.EIO, "the OCI runtime failed"),
        ("\0\xff\n\n", errno.EIO, "the OCI runtime failed"),
    ],
)
def test_what_runtimes_say(message: str, code: int, sentence: str) -> None:
    found, text = explain(message)
    assert found == code
    assert text.startswith(sentence)
    assert "\n" not in text


def test_programs_that_are_not_there() -> None:
    with pytest.raises(Unsupported, match="apt install nosuch"):
        find_program("nosuch")
    with pytest.raises(Unsupported):
        OciRuntime(RuntimeConfig(runtime="nosuch"), Path("/nowhere")).path()


def test_what_starts_containers_is_read_ahead(tmp_path: Path) -> None:
    program = tmp_path / "runc"
    program.write_bytes(os.urandom(1 << 20))
    program.chmod(0o755)
    with program.open("rb") as file:

        def in_memory() -> bool:
            with suppress(BlockingIOError):
                end = file.seek(0, os.SEEK_END) - 4096
                return os.preadv(file.fileno(), [bytearray(1)], end, os.RWF_NOWAIT) == 1
            return False

        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert not in_memory()
        oci.read_ahead(RuntimeConfig(runtime=str(program), conmon="nosuch"))
        deadline = time.monotonic() + 10
        while not in_memory():
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_documents_are_json() -> None:
    assert json.loads(spec.encode(document(args="é\0"))) == document(args="é\0")
    assert oci.ENVIRONMENT["TZ"] == "UTC"


@pytest.mark.parametrize(
    "rest",
    [
        rb'"args": ["x", "\ud800"]',
        rb'"args": ["x"], "env": ["A=\udfff"]',
        rb'"args": ["x"], "\ud800": 1',
        rb'"args": ["x"], "user": {"username": "\udc80"}',
    ],
)
def test_a_document_that_could_not_be_read_again_is_refused(rest: bytes) -> None:
    with pytest.raises(InvalidSetting, match="UTF-8"):
        spec.parse_override(b'{"process": {' + rest + b"}}")


def test_whole_surrogate_pairs_are_characters() -> None:
    made = spec.parse_override(rb'{"process": {"args": ["\ud83d\ude00"]}}')
    assert spec.encode(made).decode().count("\U0001f600") == 1
