"""What the administrator may set about running containers."""

import msgspec

from store.config import Seconds


class RuntimeConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The section ``runtime`` of the daemon's configuration."""

    # runc is what Debian's containerd uses, too; crun starts faster but its Debian version
    # refuses hosts that mount cgroup v1 and v2 side by side.
    runtime: str = "runc"
    conmon: str = "conmon"
    # Cgroups of containers are made below this one, in every hierarchy. A path of our own
    # at the top needs no agreement with systemd, which leaves unknown cgroups alone.
    cgroup_parent: str = "/ctrfs"
    # A create takes 40 ms on an idle machine. Sixty containers started at once on a slow
    # disk were done within 10 s; what takes a minute hangs, on a bind source for example.
    create_timeout: Seconds = 60.0
