"""images/<name>/: everything that one image is."""

import errno
from collections.abc import Hashable, Iterable
from typing import TYPE_CHECKING

import trio

from fs.context import Context
from fs.layers import Layers, RootfsView
from fs.nodes import BytesFile, Caller, CommandFile, Directory, TextFile, refuse
from store.cas import Digest
from store.errors import ImageNotFound
from store.events import rfc3339
from store.images import Image
from store.layers import LayerImage

if TYPE_CHECKING:
    from fs.images import Namespace


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
    """`complete`; `lazy N%` while only so much of the layers is here and the rest comes when it
    is read; `pulling N%`; or `corrupt` with the digests of blobs that were found damaged: pull
    the image again to mend it."""

    name = "state"

    def read(self) -> str:
        """One line."""
        context = self.parent.context
        for progress in context.pulls.progress():
            if progress.name == self.parent.full_name and not self.parent.complete:
                return f"pulling {progress.percent}%"
        image = self.image
        damaged = context.store.damaged(image)
        if damaged:
            return "corrupt " + " ".join(damaged)
        percent = context.store.percent(image)
        return "complete" if percent is None else f"lazy {percent}%"


class Fetch(_Value, CommandFile):
    """Write `all`, or a path in the image, to have the image's content here now, or that of a
    file or of all files below a directory; the write returns when it is. Reading gives
    `all` when everything is here, and nothing before."""

    name = "fetch"

    def read(self) -> str:
        """What can be written back."""
        return "all" if self.parent.context.store.complete(self.image.diff_ids) else ""

    async def command(self, text: str, caller: Caller) -> None:
        """Fetch."""
        context, image = self.parent.context, self.image
        if not text:
            refuse("write all, or a path in the image", errno.EINVAL)
        if text == "all":
            for diff_id in image.diff_ids:
                layer = await trio.to_thread.run_sync(context.store.layers.present, diff_id)
                if not layer.complete:
                    await context.layers.complete(diff_id)
            return
        ranges = await trio.to_thread.run_sync(context.store.locate, image, text)
        for diff_id, wanted in ranges.items():
            await context.layers.fetch(diff_id, tuple(wanted))


class ImageRootfs(RootfsView):
    """The image's files, read-only, all layers merged. They are mounted here when they are
    used, without set-user-ID and devices, and unmounted when they are not."""

    name = "rootfs"
    parent: "ImageDirectory"

    def content_id(self) -> Hashable:
        """The layers, and which of them are still fetched."""
        return self.parent.context.store.files_id(self.parent.image.diff_ids)

    def layers(self) -> tuple[LayerImage, ...]:
        """All layers, bottom first."""
        if not self.parent.complete:
            refuse("the image is being pulled; its files are here when it is", errno.EBUSY)
        return self.parent.context.store.rootfs_layers(self.parent.image)


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
        Fetch,
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
