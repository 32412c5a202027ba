"""The documents of an image: index, manifest and configuration.

Sources: OCI image specification 1.1 (descriptor.md, image-index.md, manifest.md,
config.md) and Docker's "Image Manifest V 2, Schema 2", which differ in media types only.
Unknown fields are ignored, as both ask for; what this program uses is checked here, so
that the rest of the store can rely on it.
"""

from collections.abc import Sequence
from typing import Annotated, TypeVar

import msgspec

from store.cas import Digest, digest_of
from store.errors import (
    DigestMismatch,
    InvalidManifest,
    LimitExceeded,
    NoMatchingPlatform,
    SizeMismatch,
    UnsupportedMediaType,
)
from store.inflate import LAYER_MEDIA_TYPES
from store.platform import Platform, runnable

OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
DOCKER_INDEX = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"

INDEXES = frozenset({OCI_INDEX, DOCKER_INDEX})
MANIFESTS = frozenset({OCI_MANIFEST, DOCKER_MANIFEST})
CONFIGS = frozenset({OCI_CONFIG, DOCKER_CONFIG})

_DOCKER_SCHEMA_1 = "application/vnd.docker.distribution.manifest.v1+"

# mount(2) takes a page of options, in which each layer of an overlay needs 25 bytes. Docker builds
# at most 127 layers.
MAX_LAYERS = 128

_Digest = Annotated[str, msgspec.Meta(pattern=r"^sha256:[0-9a-f]{64}\Z")]
# What file offsets and the records of images can hold.
SIZE_MAX = (1 << 63) - 1
_Size = Annotated[int, msgspec.Meta(ge=0, le=SIZE_MAX)]


class Descriptor(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True):
    """Where a piece of content is, and what it must be; ``size`` in bytes."""

    media_type: str
    digest: _Digest
    size: _Size
    annotations: dict[str, str] | None = None
    platform: Platform | None = None
    artifact_type: str | None = None

    @property
    def content(self) -> Digest:
        """The digest, typed."""
        return Digest(self.digest)

    def says_the_same(self, other: "Descriptor") -> bool:
        """Whether both name the same content, and say the same of it in their annotations."""
        return (self.digest, self.annotations) == (other.digest, other.annotations)

    def check(self, data: bytes) -> None:
        """Compare bytes with what the descriptor promises.

        Raises:
            SizeMismatch: it is another number of bytes.
            DigestMismatch: they are other bytes.
        """
        if len(data) != self.size:
            raise SizeMismatch(
                f"{self.digest} is {len(data)} bytes long instead of {self.size}; "
                "the image has to be pushed again"
            )
        found = digest_of(data)
        if found != self.digest:
            raise DigestMismatch(
                f"the bytes received for {self.digest} hash to {found}; the registry or the way "
                "to it is damaged, try again or push the image again"
            )


class Manifest(msgspec.Struct, frozen=True, rename="camel"):
    """One image: its configuration and its layers, bottom first."""

    config: Descriptor
    layers: tuple[Descriptor, ...]


class Index(msgspec.Struct, frozen=True, rename="camel"):
    """Several builds of one image."""

    manifests: tuple[Descriptor, ...]


class _Kind(msgspec.Struct, rename="camel"):
    """The fields by which the documents can be told apart."""

    schema_version: int = 0
    media_type: str = ""
    config: msgspec.Raw = msgspec.Raw()
    layers: msgspec.Raw = msgspec.Raw()
    manifests: msgspec.Raw = msgspec.Raw()

    @property
    def is_index(self) -> bool:
        """It has what only an index has."""
        return _present(self.manifests)

    @property
    def is_manifest(self) -> bool:
        """It has what only a manifest has."""
        return _present(self.layers) or _present(self.config)


def _present(field: msgspec.Raw) -> bool:
    return bytes(field) not in (b"", b"null")


class ContainerConfig(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a container of the image starts from. Absent and null mean the same."""

    user: str | None = msgspec.field(name="User", default=None)
    exposed_ports: dict[str, object] | None = msgspec.field(name="ExposedPorts", default=None)
    env: tuple[str, ...] | None = msgspec.field(name="Env", default=None)
    entrypoint: tuple[str, ...] | None = msgspec.field(name="Entrypoint", default=None)
    cmd: tuple[str, ...] | None = msgspec.field(name="Cmd", default=None)
    volumes: dict[str, object] | None = msgspec.field(name="Volumes", default=None)
    working_dir: str | None = msgspec.field(name="WorkingDir", default=None)
    labels: dict[str, str] | None = msgspec.field(name="Labels", default=None)
    stop_signal: str | None = msgspec.field(name="StopSignal", default=None)


class RootFs(msgspec.Struct, frozen=True):
    """The uncompressed layers, bottom first."""

    type: str
    diff_ids: tuple[_Digest, ...] = ()


class ImageConfig(msgspec.Struct, frozen=True, omit_defaults=True):
    """The configuration of an image."""

    rootfs: RootFs
    os: str = ""
    architecture: str = ""
    variant: str = ""
    created: str | None = None
    author: str | None = None
    container: ContainerConfig | None = msgspec.field(name="config", default=None)

    @property
    def config(self) -> ContainerConfig:
        """What containers start from; empty if the document has nothing."""
        return self.container or _NO_CONFIG

    @property
    def platform(self) -> Platform:
        """What it runs on, in normal form."""
        return Platform(self.os or "linux", self.architecture, self.variant).normal()

    @property
    def diff_ids(self) -> tuple[Digest, ...]:
        """Digests of the uncompressed layers, bottom first."""
        return tuple(map(Digest, self.rootfs.diff_ids))


_NO_CONFIG = ContainerConfig()

_Document = TypeVar("_Document", _Kind, Manifest, Index, ImageConfig)


def _decode(data: bytes, kind: type[_Document], what: str) -> _Document:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidManifest(
            f"{what} can't be understood: {str(error) or 'it is nested too deeply'}; "
            "the image has to be built or pushed again"
        ) from None


def check_limit(size: int, limit: int, what: str) -> None:
    """Refuse a document that is too long to be held in memory.

    Raises:
        LimitExceeded: ``size`` is more than ``limit`` bytes.
    """
    if size > limit:
        raise LimitExceeded(
            f"{what} is longer than {limit} bytes, which no real image needs; if this one does, "
            "raise the limit in the configuration"
        )


def parse(data: bytes, media_type: str, what: str) -> Manifest | Index:
    """A manifest or an index.

    Args:
        data: the document.
        media_type: what the sender called it; may be empty or general.
        what: the document's name for error messages.

    Raises:
        InvalidManifest: it breaks its specification.
        UnsupportedMediaType: it is none of the four kinds.
    """
    kind = _decode(data, _Kind, what)
    declared = _declared(kind, media_type, what)
    # A document that can be read both ways could be checked as one and used as the other
    # (CVE-2021-41190).
    if kind.is_index == kind.is_manifest or kind.schema_version != 2:
        raise InvalidManifest(
            f"{what} is neither a manifest nor an index of schema version 2; "
            "the image has to be built or pushed again"
        )
    if declared in INDEXES:
        return _decode(data, Index, what)
    manifest = _decode(data, Manifest, what)
    _check_manifest(manifest, what)
    return manifest


def _declared(kind: _Kind, media_type: str, what: str) -> str:
    known = INDEXES | MANIFESTS
    if media_type.startswith(_DOCKER_SCHEMA_1) or kind.schema_version == 1:
        raise UnsupportedMediaType(
            f"{what} is in Docker's schema 1, which is obsolete; "
            "push the image again with a current docker or skopeo"
        )
    if kind.media_type and kind.media_type not in known:
        raise UnsupportedMediaType(
            f"{what} has the media type {kind.media_type!r:.200}; "
            "images have OCI or Docker v2 schema 2 manifests"
        )
    if kind.media_type and media_type in known and kind.media_type != media_type:
        raise InvalidManifest(
            f"{what} was sent as {media_type} and calls itself {kind.media_type}; "
            "the image has to be pushed again"
        )
    inferred = OCI_INDEX if kind.is_index else OCI_MANIFEST
    return kind.media_type or (media_type if media_type in known else inferred)


def _check_manifest(manifest: Manifest, what: str) -> None:
    if manifest.config.media_type not in CONFIGS:
        raise UnsupportedMediaType(
            f"{what} is not a container image but something of the type "
            f"{manifest.config.media_type!r:.200}; such content can't be used here"
        )
    if len(manifest.layers) > MAX_LAYERS:
        raise LimitExceeded(
            f"{what} has {len(manifest.layers)} layers, and {MAX_LAYERS} at most can be mounted "
            "together; squash the image"
        )
    for layer in manifest.layers:
        if layer.media_type not in LAYER_MEDIA_TYPES:
            raise UnsupportedMediaType(
                f"the layer {layer.digest} of {what} has the media type "
                f"{layer.media_type!r:.200}; supported are tar, tar+gzip and tar+zstd layers"
            )


def check_sizes(manifest: Manifest, limit: int, what: str) -> None:
    """Refuse an image before anything of it is fetched when its layers can't be unpacked anyway.

    Args:
        limit: what a layer may have inflated; compressing hardly ever makes it longer.

    Raises:
        LimitExceeded: a layer, or all of them, are too long.
    """
    for layer in manifest.layers:
        if layer.size > limit:
            raise LimitExceeded(
                f"the layer {layer.digest} of {what} has {layer.size} bytes; raise layer_bytes "
                f"({limit}) in the store's configuration if you trust the image"
            )
    if sum(layer.size for layer in manifest.layers) > SIZE_MAX:
        raise LimitExceeded(f"{what} has more bytes than any disk; do not trust this image")


def parse_config(data: bytes, manifest: Manifest, what: str) -> ImageConfig:
    """The configuration that belongs to ``manifest``.

    Raises:
        InvalidManifest: it breaks its specification, or its layers are not the manifest's.
    """
    config = _decode(data, ImageConfig, f"the configuration {manifest.config.digest} of {what}")
    if config.rootfs.type != "layers":
        raise InvalidManifest(
            f"the configuration of {what} has a rootfs of type {config.rootfs.type!r:.100} "
            "instead of layers; the image has to be built again"
        )
    if len(config.rootfs.diff_ids) != len(manifest.layers):
        raise InvalidManifest(
            f"{what} has {len(manifest.layers)} layers, but its configuration "
            f"{manifest.config.digest} names {len(config.rootfs.diff_ids)} diff_ids; "
            "the image has to be built again"
        )
    return config


def choose(index: Index, wanted: Platform, what: str) -> Descriptor:
    """The manifest in ``index`` that fits a machine of platform ``wanted`` best.

    An entry that names no platform is taken if it is the only one of its kind and nothing
    else fits: what it is then shows in the image's configuration.

    Raises:
        NoMatchingPlatform: there is none.
    """
    usable = [entry for entry in index.manifests if entry.media_type in INDEXES | MANIFESTS]
    for candidate in runnable(wanted):
        for entry in usable:
            if entry.platform and entry.platform.normal() == candidate:
                return entry
    unnamed = [entry for entry in usable if entry.platform is None]
    if len(unnamed) == 1:
        return unnamed[0]
    raise NoMatchingPlatform(
        f"{what} has nothing for {wanted}; {_offer(usable)}choose another platform"
    )


def _offer(entries: Sequence[Descriptor]) -> str:
    names = {str(entry.platform.normal()) for entry in entries if entry.platform}
    names.discard("unknown/unknown")  # attestations, as buildx makes them
    return f"it has {', '.join(sorted(names)[:30])}: " if names else ""


def check_platform(config: ImageConfig, wanted: Platform, what: str) -> None:
    """Refuse an image that is for other machines.

    Raises:
        NoMatchingPlatform: its configuration names another platform than ``wanted``.
    """
    if config.architecture and config.platform not in runnable(wanted):
        raise NoMatchingPlatform(
            f"{what} is for {config.platform}, not for {wanted}; "
            f"to have it all the same, choose the platform {config.platform}"
        )
