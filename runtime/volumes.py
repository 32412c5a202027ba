"""The setting ``mounts``: files of the host, or memory, in a container, as fstab(5) lines."""

import posixpath
import re

import msgspec

from runtime.errors import InvalidSetting
from runtime.linux import escape, unescape

_FLAGS = frozenset(
    [
        "ro",
        "rw",
        "nosuid",
        "suid",
        "nodev",
        "dev",
        "noexec",
        "exec",
        "sync",
        "async",
        "dirsync",
        "mand",
        "nomand",
        "noatime",
        "atime",
        "nodiratime",
        "diratime",
        "relatime",
        "norelatime",
        "strictatime",
        "nostrictatime",
    ]
)
_PROPAGATION = frozenset(
    ["private", "shared", "slave", "unbindable", "rprivate", "rshared", "rslave", "runbindable"]
)
_BIND = frozenset(("bind", "rbind"))
_TMPFS = re.compile(
    r"(size|nr_blocks|nr_inodes)=[0-9]{1,18}[kKmMgG%]?|mode=[0-7]{3,4}|(uid|gid)=[0-9]{1,10}"
)
_MAX_PATH = 4095  # PATH_MAX without the last NUL


class Volume(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One mount of a container: the fields of an OCI mount."""

    destination: str
    type: str
    source: str
    options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_target(self.destination)
        if self.type == "bind":
            _check_bind(self.source, self.options)
        elif self.type == "tmpfs":
            _check_tmpfs(self.options)
        else:
            raise InvalidSetting(
                f"a mount of type {self.type[:40]!r} is not possible; bind and tmpfs are"
            )


def _check_target(target: str) -> None:
    if not _is_path(target):
        raise InvalidSetting(
            f"the place {target[:80]!r} in the container is not an absolute path of at most"
            f" {_MAX_PATH} bytes without a zero byte"
        )
    if ".." in target.split("/") or posixpath.normpath(target).strip("/") in ("", ".", "proc"):
        raise InvalidSetting(f"nothing can be mounted at {target[:80]!r} in the container")


def _is_path(text: str) -> bool:
    return text.startswith("/") and "\0" not in text and len(text.encode()) <= _MAX_PATH


def _check_bind(source: str, options: tuple[str, ...]) -> None:
    if not _is_path(source):
        raise InvalidSetting(
            f"the source {source[:80]!r} of a bind mount is not an absolute path of at most"
            f" {_MAX_PATH} bytes without a zero byte"
        )
    for option in options:
        if option not in _FLAGS | _PROPAGATION | _BIND:
            raise InvalidSetting(f"{option[:40]!r} is not an option of a bind mount")


def _check_tmpfs(options: tuple[str, ...]) -> None:
    for option in options:
        if option not in _FLAGS and not _TMPFS.fullmatch(option):
            raise InvalidSetting(f"{option[:40]!r} is not an option of a tmpfs mount")


def parse_volumes(text: str) -> tuple[Volume, ...]:
    """The mounts in fstab(5) lines; empty lines and those that begin with # say nothing.

    Raises:
        InvalidSetting: a line that fstab(5) or a container does not allow.
    """
    lines = (line.strip() for line in text.split("\n"))
    return tuple(_parse_line(line) for line in lines if line and not line.startswith("#"))


def _parse_line(line: str) -> Volume:
    fields = re.split(r"[ \t]+", line)
    if not 3 <= len(fields) <= 6 or not all(re.fullmatch("[0-9]", f) for f in fields[4:]):
        raise InvalidSetting(
            f"{line[:80]!r} is no fstab line; write SOURCE TARGET bind|tmpfs OPTIONS"
        )
    source, target, kind = (unescape(field) for field in fields[:3])
    words = fields[3].split(",") if len(fields) > 3 else []
    options = tuple(unescape(word) for word in words if word not in ("", "defaults"))
    if kind == "none" and _BIND & set(options):
        kind = "bind"
    return Volume(target, kind, source, options)


def format_volumes(volumes: tuple[Volume, ...]) -> str:
    """The reverse of parse_volumes()."""
    return "\n".join(
        " ".join(
            escape(field)
            for field in (v.source, v.destination, v.type, ",".join(v.options or ("defaults",)))
        )
        for v in volumes
    )
