"""The OCI runtime document (config.json) of a container.

Defaults are containerd's (its oci package, as `ctr run` uses them): capabilities, masked
and read-only paths, devices, mounts, noNewPrivileges, seccomp. Where this differs, the
reason stands next to it. Runtime specification: config.md, config-linux.md.
"""

import json
import resource
from functools import cache
from pathlib import Path
from typing import Any

from runtime.errors import InvalidSetting
from runtime.seccomp import default_profile
from runtime.settings import Effective
from runtime.users import User
from runtime.volumes import Volume

Document = dict[str, Any]

_CAPABILITIES = (
    "CAP_AUDIT_WRITE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_MKNOD",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
)
_MASKED = (
    "/proc/acpi",
    "/proc/asound",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
)
_READONLY = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")
# select(2) and programs that close "all" descriptors expect no more; what needs more
# raises it, up to the hard limit of this daemon. containerd's hard limit is 1024, too,
# which stops servers for no gain.
_SOFT_DESCRIPTORS = 1024
_HOST_NETWORK_FILES = ("/etc/hosts", "/etc/resolv.conf")


def _system_mounts() -> list[Document]:
    # Unlike `ctr run` there is no tmpfs on /run: it would hide what the image has there.
    return [
        _mount("/proc", "proc", "proc", "nosuid", "noexec", "nodev"),
        _mount("/dev", "tmpfs", "tmpfs", "nosuid", "strictatime", "mode=755", "size=65536k"),
        _mount(
            "/dev/pts",
            "devpts",
            "devpts",
            *("nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"),
        ),
        _mount(
            "/dev/shm",
            "tmpfs",
            "shm",
            *("nosuid", "noexec", "nodev", "mode=1777", "size=65536k"),
        ),
        _mount("/dev/mqueue", "mqueue", "mqueue", "nosuid", "noexec", "nodev"),
        _mount("/sys", "sysfs", "sysfs", "nosuid", "noexec", "nodev", "ro"),
    ]


def _mount(destination: str, kind: str, source: str, *options: str) -> Document:
    return {"destination": destination, "type": kind, "source": source, "options": list(options)}


def _volume(volume: Volume) -> Document:
    options = list(volume.options)
    if volume.type == "bind" and not {"bind", "rbind"} & set(options):
        options.insert(0, "rbind")
    return _mount(volume.destination, volume.type, volume.source or "tmpfs", *options)


def generate(values: Effective, cgroup_path: str, unified: bool) -> Document:
    """The document for these settings, with the user still by name.

    Args:
        values: the settings in force.
        cgroup_path: where the container's cgroup goes, from the top of the hierarchies.
        unified: whether this machine has cgroup v2 alone.

    ``process.user.username`` and ``root.path`` are completed by complete().
    """
    namespaces = ["pid", "ipc", "uts", "mount"]
    mounts = _system_mounts()
    if values.network == "none":
        namespaces.append("network")
    else:
        mounts += [
            _mount(f, "bind", f, "rbind", "ro") for f in _HOST_NETWORK_FILES if Path(f).exists()
        ]
    if unified:
        # Programs size themselves by their memory.max; on v1 this would be a dozen mounts
        # of all controllers, 3 ms of each start, for what /proc/self/cgroup says as well.
        namespaces.append("cgroup")
        mounts.append(
            _mount("/sys/fs/cgroup", "cgroup", "cgroup", "ro", "nosuid", "noexec", "nodev")
        )
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return {
        "ociVersion": "1.0.2",
        "process": {
            "terminal": False,
            "user": {"uid": 0, "gid": 0, "username": values.user},
            "args": list(values.args),
            "env": list(values.env),
            "cwd": values.workdir,
            "capabilities": {
                kind: list(_CAPABILITIES) for kind in ("bounding", "effective", "permitted")
            },
            "rlimits": [descriptor_limit(hard)],
            "noNewPrivileges": True,
        },
        "root": {"path": "", "readonly": values.readonly},
        "hostname": values.hostname,
        "mounts": mounts + [_volume(volume) for volume in values.mounts],
        "linux": {
            "cgroupsPath": cgroup_path,
            "resources": {"devices": [{"allow": False, "access": "rwm"}]},
            "namespaces": [{"type": kind} for kind in namespaces],
            "maskedPaths": list(_MASKED),
            "readonlyPaths": list(_READONLY),
            "seccomp": _seccomp(),
        },
    }


def descriptor_limit(hard: int) -> Document:
    """The limit on open descriptors: never above ``hard``, which may not be raised."""
    return {"type": "RLIMIT_NOFILE", "soft": min(_SOFT_DESCRIPTORS, hard), "hard": hard}


@cache
def _seccomp() -> Document:
    return default_profile(_CAPABILITIES)


def parse_override(document: bytes) -> Document:
    """A document of the user's own.

    Raises:
        InvalidSetting: it is not JSON, or lacks what no container can be without.
    """
    try:
        parsed = json.loads(document)
    except (ValueError, RecursionError) as error:
        raise InvalidSetting(f"this is no JSON document: {error}") from None
    process = parsed.get("process") if isinstance(parsed, dict) else None
    arguments = process.get("args") if isinstance(process, dict) else None
    if not isinstance(process, dict) or not isinstance(arguments, list) or not arguments:
        raise InvalidSetting("config.json needs process.args, a list of strings")
    if not all(isinstance(a, str) and "\0" not in a for a in arguments) or not arguments[0]:
        raise InvalidSetting("process.args in config.json is not a list of strings")
    if process.get("terminal"):
        raise InvalidSetting("process.terminal is not possible yet; leave it out of config.json")
    for key in ("root", "linux"):
        if not isinstance(parsed.setdefault(key, {}), dict):
            raise InvalidSetting(f"{key!r} in config.json is not an object")
    if not isinstance(process.setdefault("user", {}), dict):
        raise InvalidSetting("process.user in config.json is not an object")
    override: Document = parsed
    _check_encodable(override)
    return override


def _check_encodable(override: Document) -> None:
    """What JSON can escape and UTF-8 cannot say would make each later reading fail."""
    try:
        json.dumps(override, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise InvalidSetting(f"config.json cannot be written as UTF-8 text: {error}") from None


def complete(document: Document, root: Path, cgroup_path: str, user: User | None) -> Document:
    """The document as the OCI runtime gets it.

    Args:
        document: generated, or the user's own.
        root: where the root filesystem is mounted; always ours.
        cgroup_path: always ours too, so that leftovers can be found and removed.
        user: what ``process.user.username`` means in the image; None if it has none.
    """
    process = document["process"]
    if user is not None:
        numbers = {"uid": user.uid, "gid": user.gid, "additionalGids": list(user.groups)}
        rest = {k: v for k, v in process["user"].items() if k != "username"}
        process = {**process, "user": {**rest, **numbers}}
    return {
        **document,
        "process": process,
        "root": {**document["root"], "path": str(root)},
        "linux": {**document["linux"], "cgroupsPath": cgroup_path},
    }


def username(document: Document) -> str | None:
    """The user that is still to be resolved inside the image."""
    name = document["process"]["user"].get("username")
    return name if isinstance(name, str) and name else None


def encode(document: Document) -> bytes:
    """The document's bytes."""
    return (
        json.dumps(document, indent=2, ensure_ascii=False).encode("utf-8", "surrogateescape")
        + b"\n"
    )
