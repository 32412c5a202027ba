"""images/: pulling, and everything an image is, by its name."""

import errno
from collections.abc import Iterable, Mapping

import trio

from fs.context import Context, Top
from fs.nodes import (
    BytesFile,
    Caller,
    CommandFile,
    Directory,
    FixedLink,
    Mountpoint,
    Node,
    TextFile,
    refuse,
)
from store.cas import Digest
from store.errors import CtrfsError, ImageNotFound, InvalidReference
from store.events import rfc3339
from store.images import Image
from store.layers import LayerImage
from store.manifest import Descriptor
from store.platform import parse_platform
from store.pull import PullRequest
from store.reference import parse_reference

DEFAULT_REGISTRY = "docker.io"
OFFICIAL = "docker.io/library"


class Pull(CommandFile):
    """Write `REF [platform=os/arch[/variant]] [mode=full] [as=NAME]` to get an image; the
    write returns when containers can start from it. REF is a name as docker knows it
    (`alpine:3.20`, `registry:5000/team/app@sha256:…`, also with `docker://` before it) or
    `oci:/path[:tag]`, an OCI image layout on this machine. Ctrl-C ends the pull; what has
    arrived is used by the next one. Reading shows the pulls under way, one a line: name,
    state, percent, bytes here and in all."""

    name = "pull"
    parent: "Images"

    def read(self) -> str:
        """The pulls under way."""
        return "\n".join(progress.line() for progress in self.parent.context.pulls.progress())

    async def command(self, text: str, caller: Caller) -> None:
        """Pull one image. What is mounted of another that had the name goes away."""
        context = self.parent.context
        image = await context.pulls.pull(parse_pull(text))
        await context.automounts.refresh_below(f"{self.parent.path}/{image.name}")


def parse_pull(text: str) -> PullRequest:
    """The request in one line written to `pull`.

    Raises:
        TreeError: EINVAL, no reference, an unknown word, or a bad value.
    """
    words = text.split()
    if not words:
        refuse("write a reference, for example docker.io/library/alpine:3.20", errno.EINVAL)
    options: dict[str, str] = {}
    for word in words[1:]:
        key, equals, value = word.partition("=")
        if not equals or key not in ("platform", "mode", "as") or not value or key in options:
            refuse(
                f"{word!r} is not understood; after REF may stand platform=OS/ARCH, mode=full"
                " and as=NAME, each once",
                errno.EINVAL,
            )
        options[key] = value
    platform = options.get("platform")
    if options.get("mode", "full") != "full":
        refuse(f"mode={options['mode']} is not known; mode=full is", errno.EINVAL)
    return PullRequest(
        source=words[0],
        platform=parse_platform(platform) if platform else None,
        as_name=options.get("as"),
    )


class _Value(TextFile):
    """One fact of an image."""

    parent: "ImageDirectory"

    @property
    def image(self) -> Image:
        """The image as it is now. Raises ImageNotFound."""
        return self.parent.image


class ImageDigest(_Value):
    """Digest of the image's manifest."""

    name = "digest"

    def read(self) -> str:
        """sha256:…"""
        return self.image.digest


class Size(_Value):
    """Bytes of all blobs of the image as the registry has them: layers, configuration, manifest."""

    name = "size"

    def read(self) -> str:
        """A number."""
        return str(self.image.size)


class ImagePlatform(_Value):
    """What the image runs on: os/arch[/variant]."""

    name = "platform"

    def read(self) -> str:
        """For example linux/amd64."""
        return str(self.image.platform)


class Created(_Value):
    """When the image was built, as it says itself."""

    name = "created"

    def read(self) -> str:
        """RFC 3339, or nothing."""
        return self.image.config.created or ""


class Pulled(_Value):
    """When the image came here."""

    name = "pulled"

    def read(self) -> str:
        """RFC 3339."""
        return rfc3339(self.image.pulled_ns)


class ImageSource(_Value):
    """Where the image came from; can be written to images/pull again."""

    name = "source"

    def read(self) -> str:
        """A reference with its transport."""
        return self.image.source


class Labels(_Value):
    """The image's labels, `key=value` a line."""

    name = "labels"

    def read(self) -> str:
        """Sorted by key."""
        labels = self.image.config.config.labels or {}
        return "\n".join(f"{key}={value}" for key, value in sorted(labels.items()))


class _Words(_Value):
    def words(self) -> Iterable[str]:
        raise NotImplementedError

    def read(self) -> str:
        return "\n".join(self.words())


class Entrypoint(_Words):
    """The command that the image starts with, one argument a line."""

    name = "entrypoint"

    def words(self) -> Iterable[str]:
        """Arguments."""
        return self.image.config.config.entrypoint or ()


class Cmd(_Words):
    """Arguments that follow the entrypoint unless a container has its own, one a line."""

    name = "cmd"

    def words(self) -> Iterable[str]:
        """Arguments."""
        return self.image.config.config.cmd or ()


class Env(_Words):
    """Environment that containers start from, `NAME=value` a line."""

    name = "env"

    def words(self) -> Iterable[str]:
        """Variables."""
        return self.image.config.config.env or ()


class User(_Value):
    """User and group that containers run as: `user[:group]`, names or numbers."""

    name = "user"

    def read(self) -> str:
        """Nothing means root."""
        return self.image.config.config.user or ""


class Workdir(_Value):
    """Directory that containers start in."""

    name = "workdir"

    def read(self) -> str:
        """Nothing means /."""
        return self.image.config.config.working_dir or ""


class StopSignal(_Value):
    """Signal that asks a container to stop; nothing means TERM."""

    name = "stop_signal"

    def read(self) -> str:
        """A name or number."""
        return self.image.config.config.stop_signal or ""


class ExposedPorts(_Words):
    """Ports that the image says it listens on, `port/protocol` a line."""

    name = "exposed_ports"

    def words(self) -> Iterable[str]:
        """Sorted."""
        return sorted(self.image.config.config.exposed_ports or ())


class Volumes(_Words):
    """Paths that the image says hold data, one a line."""

    name = "volumes"

    def words(self) -> Iterable[str]:
        """Sorted."""
        return sorted(self.image.config.config.volumes or ())


class _Document(_Value, BytesFile):
    """A JSON document of the image, byte for byte as the registry has it."""

    def digest(self) -> Digest | None:
        """Which blob it is."""
        raise NotImplementedError

    def exists(self) -> bool:
        return self.digest() is not None

    def size(self) -> int:
        digest = self.digest()
        return self.parent.context.store.cas.stat(digest) if digest else 0

    async def slow_content(self) -> bytes:
        digest = self.digest()
        if digest is None:
            raise ImageNotFound("the image has no such document any more")
        return await trio.to_thread.run_sync(self.parent.context.store.cas.read, digest)


class IndexJson(_Document):
    """The index (manifest list) that the image was chosen from, as the registry has it; absent
    when the reference led to a manifest directly."""

    name = "index.json"

    def digest(self) -> Digest | None:
        """The index, if there was one."""
        return self.image.index_digest


class ManifestJson(_Document):
    """The manifest, byte for byte as the registry has it."""

    name = "manifest.json"

    def digest(self) -> Digest | None:
        """The manifest."""
        return self.image.digest


class ConfigJson(_Document):
    """The image's configuration, byte for byte as the registry has it."""

    name = "config.json"

    def digest(self) -> Digest | None:
        """The configuration."""
        return self.image.config_digest


class State(_Value):
    """`complete`, `pulling N%`, or `corrupt` with the digests of blobs that were found damaged;
    pull the image again to mend it."""

    name = "state"

    def read(self) -> str:
        """One line."""
        context = self.parent.context
        for progress in context.pulls.progress():
            if progress.name == self.parent.full_name and not self.parent.complete:
                return f"pulling {progress.percent}%"
        damaged = context.store.damaged(self.image)
        return "corrupt " + " ".join(damaged) if damaged else "complete"


class _RootfsView(Mountpoint):
    """Read-only files of layers."""

    parent: "ImageDirectory | LayerDirectory"

    def layers(self) -> tuple[LayerImage, ...]:
        """What to mount, bottom first. May block."""
        raise NotImplementedError

    async def mount_at(self, target: str) -> None:
        rootfs = self.parent.context.rootfs
        await trio.to_thread.run_sync(lambda: rootfs.image_view(self.layers(), target))


class ImageRootfs(_RootfsView):
    """The image's files, read-only, all layers merged. They are mounted here when they are
    used, without set-user-ID and devices, and unmounted when they are not."""

    name = "rootfs"

    def content_id(self) -> tuple[Digest, ...]:
        """The layers."""
        return self.parent.image.diff_ids

    def layers(self) -> tuple[LayerImage, ...]:
        """All layers, bottom first."""
        return self.parent.context.store.rootfs_layers(self.parent.image)


class _LayerValue(TextFile):
    parent: "LayerDirectory"

    @property
    def descriptor(self) -> Descriptor:
        return self.parent.descriptor


class LayerDigest(_LayerValue):
    """Digest of the layer as the registry has it."""

    name = "digest"

    def read(self) -> str:
        """sha256:…"""
        return self.descriptor.digest


class DiffId(_LayerValue):
    """Digest of the layer's uncompressed tar archive."""

    name = "diff_id"

    def read(self) -> str:
        """sha256:…"""
        self.parent.check()
        return self.parent.image.diff_ids[self.parent.number]


class LayerSize(_LayerValue):
    """Bytes of the layer as the registry has it."""

    name = "size"

    def read(self) -> str:
        """A number."""
        return str(self.descriptor.size)


class MediaType(_LayerValue):
    """The layer's media type."""

    name = "media_type"

    def read(self) -> str:
        """As in the manifest."""
        return self.descriptor.media_type


class Format(_LayerValue):
    """How the layer is compressed: `gzip`, `zstd` or `tar`."""

    name = "format"

    def read(self) -> str:
        """One word."""
        kind = self.descriptor.media_type
        return next((word for word in ("gzip", "zstd") if kind.endswith(word)), "tar")


class Fetched(_LayerValue):
    """How many bytes of the layer are here."""

    name = "fetched"

    def read(self) -> str:
        """A number of bytes, as in `size`."""
        context = self.parent.context
        for progress in context.pulls.progress():
            for layer in progress.layers:
                if layer.digest == self.descriptor.content:
                    return str(layer.done)
        return str(
            self.descriptor.size if context.store.cas.contains(self.descriptor.content) else 0
        )


class LayerData(FixedLink):
    """The layer's blob in content/."""

    name = "data"
    parent: "LayerDirectory"

    def where(self) -> str:
        """Relative, so that it holds wherever the tree is mounted."""
        digest = self.parent.descriptor.digest
        return _up(self.parent.path) + "content/" + digest.replace(":", "/")


class LayerRootfs(_RootfsView):
    """The files of this layer alone, read-only. A file that the layer deletes from the ones
    below is a character device 0:0 here."""

    name = "rootfs"
    parent: "LayerDirectory"

    def exists(self) -> bool:
        """Not before the image is here."""
        return self.parent.parent.parent.complete

    def content_id(self) -> tuple[Digest, ...]:
        """The layer and those below it: what it deletes depends on them."""
        return self.parent.image.diff_ids[: self.parent.number + 1]

    def layers(self) -> tuple[LayerImage, ...]:
        """Just the one."""
        self.parent.check()
        return (self.parent.context.store.rootfs_layers(self.parent.image)[self.parent.number],)


class LayerDirectory(Directory):
    """One layer of an image."""

    files = (LayerDigest, DiffId, LayerSize, MediaType, Format, Fetched, LayerData, LayerRootfs)
    parent: "Layers"

    def __init__(self, parent: "Layers", number: int) -> None:
        self.number = number
        self.name = str(number)
        super().__init__(parent)

    @property
    def image(self) -> Image:
        """The image that the layer belongs to."""
        return self.parent.parent.image

    @property
    def context(self) -> Context:
        """What the daemon knows."""
        return self.parent.parent.context

    def check(self) -> None:
        """Make sure that the image, which may be another one by now, has this layer.

        Raises:
            ImageNotFound: it has fewer layers.
        """
        if self.number >= len(self.image.layers):
            raise ImageNotFound(f"the image has no layer {self.number} any more")

    @property
    def descriptor(self) -> Descriptor:
        """What the manifest says of the layer. Raises ImageNotFound."""
        self.check()
        return self.image.layers[self.number]


class Layers(Directory):
    """The image's layers, 0 the lowest."""

    name = "layers"
    parent: "ImageDirectory"

    def find(self, name: str) -> Node | None:
        """A layer by its number."""
        return LayerDirectory(self, int(name)) if name in self.dynamic() else None

    def dynamic(self) -> list[str]:
        """The numbers."""
        return [str(number) for number in range(len(self.parent.image.layers))]


class ImageDirectory(Directory):
    """One image. rmdir removes it, unless a container needs it or its files are in use."""

    files = (
        ImageDigest,
        Size,
        ImagePlatform,
        Created,
        Pulled,
        ImageSource,
        Labels,
        Entrypoint,
        Cmd,
        Env,
        User,
        Workdir,
        StopSignal,
        ExposedPorts,
        Volumes,
        IndexJson,
        ManifestJson,
        ConfigJson,
        State,
        Layers,
        ImageRootfs,
    )
    # An image that is still being pulled goes away again when that fails.
    entry_timeout = 1.0

    def __init__(self, parent: "Namespace", name: str, context: Context) -> None:
        self.context = context
        self.name = name.rpartition("/")[2]
        self.full_name = name
        super().__init__(parent)

    @property
    def complete(self) -> bool:
        """Whether the image is in the store, and not only on its way."""
        return self.full_name in self.context.store.images

    @property
    def image(self) -> Image:
        """The image that has this name now; while it is first pulled, as far as it is known.

        Raises:
            ImageNotFound: it was removed.
        """
        if self.complete:
            return self.context.store.images.named(self.full_name)
        for image in self.context.pulls.active():
            if image.name == self.full_name:
                return image
        raise ImageNotFound(f"the image {self.full_name} is not here any more")

    def mtime_ns(self) -> int:
        """When the image came here."""
        return self.image.pulled_ns


class ShortName(FixedLink):
    """A name that leads to the full one, as docker completes it."""

    def __init__(self, parent: "Namespace", name: str, full_name: str) -> None:
        self.name = name
        self._full_name = full_name
        super().__init__(parent)

    def where(self) -> str:
        """Relative, up to images/ and down again."""
        assert isinstance(self.parent, Namespace)
        return "../" * self.parent.depth + self._full_name


class Namespace(Directory):
    """Images by their full names; a part of a name is a directory. Short names lead to the
    full ones. An image is removed by rmdir of its full name."""

    entry_timeout = 1.0
    attr_timeout = 1.0

    def __init__(self, parent: Directory, prefix: str, context: Context) -> None:
        self.context = context
        self.prefix = prefix
        self.depth = prefix.count("/") + 1 if prefix else 0
        if prefix:
            self.name = prefix.rpartition("/")[2]
        super().__init__(parent)

    def _below(self, path: str) -> bool:
        return any(name.startswith(path + "/") for name in _names(self.context))

    def find(self, name: str) -> Node | None:
        """An image, a part of a name, or a short name."""
        path = f"{self.prefix}/{name}" if self.prefix else name
        if path in _names(self.context):
            return ImageDirectory(self, path, self.context)
        if self._below(path):
            return Namespace(self, path, self.context)
        full = self._complete(path)
        return ShortName(self, name, full) if full else None

    def _complete(self, path: str) -> str | None:
        """The full name, or the start of one, that ``path`` is short for."""
        try:
            full = str(parse_reference(path))
        except InvalidReference:
            full = ""
        if full in _names(self.context):
            return full
        for base in (DEFAULT_REGISTRY, OFFICIAL):
            if not self.prefix and self._below(f"{base}/{path}"):
                return f"{base}/{path}"
        return None

    def dynamic(self) -> list[str]:
        """The next parts of all names that begin with this one."""
        start = f"{self.prefix}/" if self.prefix else ""
        return sorted(
            {
                name[len(start) :].partition("/")[0]
                for name in _names(self.context)
                if name.startswith(start)
            }
        )

    async def rmdir(self, name: str) -> None:
        """Remove an image."""
        node = self.find(name)
        if isinstance(node, Namespace):
            refuse(f"{node.prefix} holds images; rmdir those", errno.ENOTEMPTY)
        if not isinstance(node, ImageDirectory):
            await super().rmdir(name)
            return
        if not node.complete:
            refuse(f"{node.full_name} is being pulled", errno.EBUSY)
        if not await self.context.automounts.unmount_below(node.path):
            refuse(f"files of {node.full_name} are in use", errno.EBUSY)
        await trio.to_thread.run_sync(self.context.store.images.remove, node.full_name)


class DigestLink(FixedLink):
    """An image by its digest."""

    def __init__(self, parent: "ByDigest", digest: str, image: Image) -> None:
        self.name = digest
        self._image = image
        super().__init__(parent)

    def where(self) -> str:
        """The image's directory."""
        return f"../{self._image.name}"


class ByDigest(Directory):
    """Images by the digest of their manifest, as links; the digest of an index leads to the
    image that was chosen from it."""

    name = "by-digest"
    attr_timeout = 1.0
    parent: "Images"

    def find(self, name: str) -> Node | None:
        """The image with this digest."""
        try:
            image = self.parent.context.store.images.by_digest(name)
        except CtrfsError:
            return None
        return DigestLink(self, name, image)

    def dynamic(self) -> list[str]:
        """The digests of all manifests."""
        return sorted({image.digest for image in self.parent.context.store.images})


class Images(Namespace):
    """Images. Write a reference to `pull`; the image then stands here as a directory under
    its full name (docker.io/library/alpine:3.20) and is found by short names as docker
    completes them (alpine:3.20). rmdir of the full name removes it."""

    name = "images"
    files = (Pull, ByDigest)

    def __init__(self, parent: Top) -> None:
        super().__init__(parent, "", parent.context)


def _names(context: Context) -> Mapping[str, None]:
    names = dict.fromkeys(context.store.images.names())
    names.update(dict.fromkeys(image.name for image in context.pulls.active()))
    return names


def _up(path: str) -> str:
    """The way from inside a directory of the tree to its root."""
    return "../" * (path.count("/") + 1)
