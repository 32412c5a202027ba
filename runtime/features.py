"""What this machine has of what containers need, found by trying where that is possible."""

import errno
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from runtime import fanotify, keeper, linux
from runtime.cgroups import layout
from runtime.config import RuntimeConfig
from runtime.errors import RuntimeFailure
from runtime.oci import ENVIRONMENT, find_program
from runtime.rootfs import mount_file, mount_loop
from store.erofs import write_image
from store.errors import storage
from store.tree import Directory

# EROFS learned to take file contents from another file or device in 5.16.
_OLDEST_KERNEL = (5, 16)
_PRE_CONTENT = "fanotify pre-content events"
_HOLDER = "holder of waiting readers"
_CAP_SYS_ADMIN = 21
_CAP_SYS_RESOURCE = 24


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked for.

    Attributes:
        name: what it is.
        ok: whether it is there.
        required: whether nothing works without it.
        found: what was found, in a few words.
        advice: what to do if it is missing, and what it would give.
    """

    name: str
    ok: bool
    required: bool
    found: str
    advice: str


def checks(config: RuntimeConfig, root: Path) -> list[Check]:
    """Look for everything. Blocks for some milliseconds; mounts and unmounts on the way.

    Args:
        config: names the programs to look for.
        root: where images and containers are kept, or will be. Filesystems differ: EROFS
            cannot be mounted from files on a tmpfs.

    Raises:
        StorageFailed: nothing can be written there, and so nothing be tried.
    """
    doing = f"trying out what the filesystem of {root} can do"
    with storage(doing), _directory_at(root) as directory:
        return _checks(config, directory)


@contextmanager
def _directory_at(root: Path) -> Iterator[Path]:
    """A new directory on the filesystem of a directory that may not be there yet."""
    existing = next(path for path in (root, *root.absolute().parents) if path.is_dir())
    with tempfile.TemporaryDirectory(prefix=".probe-", dir=existing) as directory:
        yield Path(directory)


def _checks(config: RuntimeConfig, place: Path) -> list[Check]:
    from_files = _erofs(place, "EROFS from files", mount_file, required=False)
    return [
        _kernel(),
        _capability(_CAP_SYS_ADMIN, "CAP_SYS_ADMIN", required=True),
        _fuse(),
        from_files,
        _erofs(place, "EROFS from loop devices", mount_loop, required=not from_files.ok),
        _overlay(place),
        _pre_content(place),
        _holder(),
        _cgroups(),
        _seccomp(),
        _program(config.conmon, required=True),
        _program(config.runtime, required=True),
        _hybrid_crun(config),
        _capability(_CAP_SYS_RESOURCE, "CAP_SYS_RESOURCE", required=False),
    ]


def report(config: RuntimeConfig, root: Path, serving: str) -> dict[str, object]:
    """The same for programs, as in info.json.

    Args:
        serving: how incomplete layers are served, as it is configured (``LazyConfig.method``).
    """
    found = checks(config, root)
    methods = {c.name: c.ok for c in found}
    return {
        "kernel": os.uname().release,
        "architecture": os.uname().machine,
        "cgroups": layout(),
        "layer_mounts": "file" if methods["EROFS from files"] else "loop",
        "layer_serving": _serving(methods, serving),
        "features": {
            c.name: {
                "ok": c.ok,
                "found": c.found,
                **({} if c.ok else {"required": c.required, "advice": c.advice}),
            }
            for c in found
        },
    }


def _kernel() -> Check:
    return Check(
        "kernel",
        linux.kernel_version() >= _OLDEST_KERNEL,
        True,
        os.uname().release,
        "boot a kernel of version 5.16 or newer; Debian 12 has one",
    )


def _capability(number: int, name: str, *, required: bool) -> Check:
    held = 0
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith("CapEff:"):
                held = int(line.split()[1], 16)
    ok = bool(held >> number & 1)
    advice = (
        "run as root, outside of an unprivileged container"
        if required
        else "without it containers cannot get limits above those of the daemon"
    )
    return Check(name, ok, required, "held" if ok else "not held", advice)


def _fuse() -> Check:
    ok = os.path.exists("/dev/fuse")
    return Check(
        "FUSE", ok, True, "/dev/fuse" if ok else "no /dev/fuse", "load it: `modprobe fuse`"
    )


def _erofs(
    place: Path,
    name: str,
    mount: Callable[[Path, Sequence[Path], str], None],
    *,
    required: bool,
) -> Check:
    def attempt(directory: Path) -> None:
        meta, target = directory / "meta.erofs", directory / "target"
        target.mkdir()
        with open(meta, "wb") as file:
            write_image(Directory(mode=0o40755), file, 0, bytes(16))
        mount(meta, (), str(target))
        linux.umount(str(target))

    ok, found = _attempt(attempt, place)
    if found == os.strerror(errno.ENODEV):
        advice = "load EROFS: `modprobe erofs`"
    else:
        advice = (
            "one of the two ways is enough; files need Linux 6.12, loop devices /dev/loop-control"
        )
    return Check(name, ok, required, found, advice)


def _overlay(place: Path) -> Check:
    def attempt(directory: Path) -> None:
        for name in ("lower", "upper", "work", "target"):
            (directory / name).mkdir()
        options = ",".join(f"{name}dir={directory}/{name}" for name in ("lower", "upper", "work"))
        linux.mount("overlay", str(directory / "target"), "overlay", 0, options)
        linux.umount(str(directory / "target"))

    ok, found = _attempt(attempt, place)
    advice = "load it: `modprobe overlay`; its upper directory cannot lie on overlayfs or NFS"
    return Check("overlayfs", ok, True, found, advice)


def _serving(methods: dict[str, bool], configured: str) -> str:
    if configured != "auto":
        return configured
    return "fanotify" if methods[_PRE_CONTENT] and methods[_HOLDER] else "fuse"


def _pre_content(place: Path) -> Check:
    why = fanotify.available(place)
    return Check(
        _PRE_CONTENT,
        why is None,
        False,
        why or "works",
        "without them incomplete layers are served with FUSE, and a container that runs on one has"
        " to be started again after its layer server was killed; they need Linux 6.14 and ext4,"
        " XFS or Btrfs",
    )


def _holder() -> Check:
    found = keeper.holder()
    return Check(
        _HOLDER,
        bool(found),
        False,
        found or "processes that can be killed",
        "run ctrfs as a service of systemd: if all processes that serve incomplete layers with"
        " fanotify are killed at once, whoever reads on gets zeros until the next mount, so they"
        " are served with FUSE unless the configuration says fanotify",
    )


def _attempt(function: Callable[[Path], None], place: Path) -> tuple[bool, str]:
    """Whether something works in a directory of its own, and in words."""
    with tempfile.TemporaryDirectory(dir=place) as directory:
        try:
            function(Path(directory))
        except OSError as error:
            return False, error.strerror or str(error)
    return True, "works"


def _cgroups() -> Check:
    found = layout()
    words = {"v2": "v2", "v1": "v1", "hybrid": "v1 and v2 together", "none": "not mounted"}
    return Check(
        "cgroups",
        found != "none",
        True,
        words[found],
        "mount them: `mount -t cgroup2 cgroup2 /sys/fs/cgroup`",
    )


def _seccomp() -> Check:
    ok = os.path.exists("/proc/sys/kernel/seccomp/actions_avail")
    return Check(
        "seccomp",
        ok,
        True,
        "filters" if ok else "no filters",
        "boot a kernel with CONFIG_SECCOMP_FILTER, as all distributions have",
    )


def _program(name: str, *, required: bool) -> Check:
    advice = f"`apt install {Path(name).name}`"
    try:
        path = find_program(name)
        done = subprocess.run(
            [path, "--version"], capture_output=True, text=True, env=ENVIRONMENT, check=False
        )
    except (RuntimeFailure, OSError) as error:
        return Check(Path(name).name, False, required, str(error), advice)
    with suppress(IndexError):
        return Check(Path(name).name, True, required, done.stdout.splitlines()[0], advice)
    return Check(Path(name).name, False, required, "does not tell its version", advice)


def _hybrid_crun(config: RuntimeConfig) -> Check:
    refused = Path(config.runtime).name == "crun" and layout() == "hybrid"
    return Check(
        "runtime and cgroups",
        not refused,
        True,
        "crun with v1 and v2 together" if refused else "fit together",
        "set the runtime to runc, or boot with systemd.unified_cgroup_hierarchy=1",
    )
