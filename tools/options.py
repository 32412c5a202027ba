"""Where one daemon keeps things and where it shows them."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

DEFAULT_ROOT = Path("/var/lib/ctrfs")
DEFAULT_RUN = Path("/run/ctrfs")


@dataclass(frozen=True, slots=True)
class Options:
    """All paths are absolute.

    Attributes:
        root: content and records; they outlive a reboot.
        run: mounts, sockets and the daemon's pid; a reboot empties it.
        mountpoint: where users see the tree.
        config: the settings' file; None for the default place.
    """

    root: Path
    run: Path
    mountpoint: Path
    config: Path | None

    @classmethod
    def make(cls, root: Path, mountpoint: Path, config: Path | None = None) -> "Options":
        """Options from paths as they were typed."""
        root = Path(os.path.realpath(root))
        return cls(
            root=root,
            run=run_directory(root),
            mountpoint=Path(os.path.realpath(mountpoint)),
            config=Path(os.path.abspath(config)) if config else None,
        )


def run_directory(root: Path) -> Path:
    """The run directory that belongs to a root.

    The default root has the well-known one; for any other it is named by a hash of the
    root's real path, so that several daemons stand side by side and each finds its own
    again after a crash, by whatever name its root was given.
    """
    real = os.path.realpath(root)
    if real == os.path.realpath(DEFAULT_ROOT):
        return DEFAULT_RUN
    digest = hashlib.sha256(os.fsencode(real)).hexdigest()
    return DEFAULT_RUN.with_name(f"{DEFAULT_RUN.name}-{digest[:12]}")
