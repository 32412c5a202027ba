"""The store's settings: registries, limits on what comes from outside, patience."""

from typing import Annotated, Literal

import msgspec

from store.platform import Platform, host_platform
from store.unpack import Count, LayerLimits

Seconds = Annotated[float, msgspec.Meta(gt=0)]
Pause = Annotated[float, msgspec.Meta(ge=0)]


class HostConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How to talk to one registry.

    ``ca`` is a file with the certificates of the authorities to trust for this host, instead
    of the system's. ``mirrors`` are asked first, in order; each is a ``host[:port]`` that may
    have settings of its own. Without ``plain_http`` only loopback addresses may be spoken to
    without TLS.
    """

    ca: str | None = None
    insecure_skip_verify: bool = False
    plain_http: bool = False
    mirrors: tuple[str, ...] = ()


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How long an image's documents may be, in bytes; longer ones are refused, not cut off."""

    # The OCI distribution specification tells registries to accept at least 4 MiB and most
    # accept no more.
    manifest_bytes: Count = 4 << 20
    # Configurations of real images are below 100 KB; one is held in memory per image.
    config_bytes: Count = 4 << 20


class Patience(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How long and how often to try."""

    # Three SYN retransmissions (1 + 2 + 4 s) fit in.
    connect_seconds: Seconds = 10.0
    # Between two pieces of an answer. Registries that fetch a blob from cold storage first
    # were seen to take half a minute.
    read_seconds: Seconds = 60.0
    # For a whole manifest, configuration or token, which are at most some megabytes.
    document_seconds: Seconds = 120.0
    # Attempts in a row without progress. With the pauses below they span half a minute, the
    # time a registry behind a load balancer needs to be restarted.
    attempts: Count = 6
    # Before the second attempt; doubled each time, and up to half of it again by chance so
    # that many clients don't come back at once.
    backoff_seconds: Pause = 0.5
    # A registry that asks for more patience than this (Retry-After) gets an error instead of
    # a user who waits and does not know why.
    retry_after_seconds: Pause = 60.0


Mode = Literal["lazy", "full"]
MODES: tuple[Mode, ...] = ("lazy", "full")


class LazyConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How layers are loaded that are used before all of them is here."""

    # What `images/pull` does unless it is told: `lazy` where a layer allows it, or `full`.
    mode: Mode = "lazy"
    # How contents that are still missing get to the kernel; `auto` is fanotify where the
    # kernel has it (6.14), the store's filesystem takes part, and readers are held back
    # whichever processes are killed (by systemd or a freezer of cgroup v1), else fuse.
    method: Literal["auto", "fuse", "fanotify"] = "auto"
    # How long a read waits for a registry that is away before it fails with EIO. A program
    # whose read fails mostly ends; one that waits goes on when the network is back.
    read_seconds: Seconds = 60.0
    # Requests under way for readers, over all layers. More hide more of the way to the registry;
    # each has a thread and a connection.
    requests: Count = 8
    # Whether the rest of a layer comes by itself while no reader waits, and how many bytes a
    # second that may take (None: as many as there are).
    fill: bool = True
    fill_rate: Count | None = None
    # Whether layers that can't be lazy by themselves are indexed after they were pulled, so
    # that they can be the next time. Takes 6 s of processor time a gigabyte, at low priority.
    index: bool = True
    # Whose word counts for an index that somebody has pushed beside an image, which the image's
    # digest does not cover until all of a layer is here: for references by tag that of
    # whoever may push there, as it does for the tag; for a digest nobody's.
    remote_indexes: Literal["tag", "always", "never"] = "tag"
    # What a container opens in so many seconds after its start is fetched first the next time.
    # Interpreters have loaded their libraries by then, and caches do not follow data for ever.
    record_seconds: Pause = 10.0


class StoreConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All settings of the store."""

    registries: dict[str, HostConfig] = msgspec.field(default_factory=dict)
    # Where `docker login` puts credentials; None: $DOCKER_CONFIG or ~/.docker.
    docker_config: str | None = None
    limits: Limits = msgspec.field(default_factory=Limits)
    layers: LayerLimits = msgspec.field(default_factory=LayerLimits)
    patience: Patience = msgspec.field(default_factory=Patience)
    lazy: LazyConfig = msgspec.field(default_factory=LazyConfig)
    # Layers in transfer at once, over all pulls. Each has a thread that receives and one that
    # unpacks; docker and containerd take three at a time too.
    parallel_layers: Count = 3
    # Image platform to choose; None: this machine's.
    platform: Platform | None = None

    @property
    def wanted_platform(self) -> Platform:
        """The platform to choose where a pull names none."""
        return self.platform or host_platform()
