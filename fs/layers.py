"""images/<name>/layers/: the layers of one image."""

from collections.abc import Hashable
from typing import TYPE_CHECKING

import trio

from fs.context import Context
from fs.nodes import Directory, FixedLink, Mountpoint, Node, TextFile
from store import lazy
from store.cas import Digest
from store.errors import ImageNotFound
from store.images import Image
from store.layers import Layer, LayerImage
from store.manifest import Descriptor

if TYPE_CHECKING:
    from fs.image import ImageDirectory


class RootfsView(Mountpoint):
    """Read-only files of layers."""

    parent: "ImageDirectory | LayerDirectory"

    def layers(self) -> tuple[LayerImage, ...]:
        """What to mount, bottom first. May block."""
        raise NotImplementedError

    async def mount_at(self, target: str) -> None:
        rootfs = self.parent.context.rootfs
        await trio.to_thread.run_sync(lambda: rootfs.image_view(self.layers(), target))


class _LayerValue(TextFile):
    parent: "LayerDirectory"

    @property
    def descriptor(self) -> Descriptor:
        return self.parent.descriptor

    @property
    def digest(self) -> Digest:
        return self.parent.descriptor.content

    def is_loaded_by(self, layer: Layer) -> bool:
        """Whether a lazy layer comes from this blob, and not from another image's of the same
        content."""
        return lazy.read_record(layer.directory).blob.digest == self.digest


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
    """How the layer is packed: `gzip`, `zstd` or `tar`, or what makes it lazy: `estargz`,
    `zstd:chunked`, or `gzip+index` and the like."""

    name = "format"

    def read(self) -> str:
        """One word."""
        layer = self.parent.layer
        if layer is not None and layer.record.lazy and self.is_loaded_by(layer):
            return layer.record.lazy
        kind = self.descriptor.media_type
        return next((word for word in ("gzip", "zstd") if kind.endswith(word)), "tar")


class Fetched(_LayerValue):
    """How many bytes of the layer's blob are here. Contents that were taken from another image's
    layer do not count: the blob's bytes come when there is time."""

    name = "fetched"

    def read(self) -> str:
        """A number of bytes, as in `size`."""
        context = self.parent.context
        for progress in context.pulls.progress():
            for moving in progress.layers:
                if moving.digest == self.digest:
                    return str(moving.done)
        layer = self.parent.layer
        here = lazy.fetched(layer.directory) if layer is not None else None
        if here is None:
            here = self.descriptor.size if context.store.cas.contains(self.digest) else 0
        return str(here)


class Lazy(_LayerValue):
    """Whether the layer can be used before all of it is here: `yes`, or `no` and why."""

    name = "lazy"

    def read(self) -> str:
        """One line."""
        layer = self.parent.layer
        if layer is None:
            return ""
        if not layer.record.lazy:
            return f"no: {layer.record.not_lazy or 'it was pulled with mode=full'}"
        return "yes" if self.is_loaded_by(layer) else "no: its content came with another image"


class LayerData(FixedLink):
    """The layer's blob in content/, where it is when all of it is here."""

    name = "data"
    parent: "LayerDirectory"

    def where(self) -> str:
        """Relative, so that it holds wherever the tree is mounted."""
        digest = self.parent.descriptor.digest
        return _up(self.parent.path) + "content/" + digest.replace(":", "/")


class LayerRootfs(RootfsView):
    """The files of this layer alone, read-only. A file that the layer deletes from the ones
    below is a character device 0:0 here."""

    name = "rootfs"
    parent: "LayerDirectory"

    def exists(self) -> bool:
        """Not before the image is here."""
        return self.parent.parent.parent.complete

    def content_id(self) -> Hashable:
        """The layer and those below it, since what it deletes depends on them, and whether it is
        still fetched."""
        store, diff_ids = self.parent.context.store, self.parent.image.diff_ids
        return store.files_id(diff_ids[: self.parent.number + 1])

    def layers(self) -> tuple[LayerImage, ...]:
        """Just the one."""
        self.parent.check()
        return (self.parent.context.store.rootfs_layers(self.parent.image)[self.parent.number],)


class LayerDirectory(Directory):
    """One layer of an image."""

    files = (
        LayerDigest,
        DiffId,
        LayerSize,
        MediaType,
        Format,
        Lazy,
        Fetched,
        LayerData,
        LayerRootfs,
    )
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
    def layer(self) -> Layer | None:
        """The layer in the store; None as long as it is not there. Raises ImageNotFound."""
        self.check()
        return self.context.store.layers.get(self.image.diff_ids[self.number])

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


def _up(path: str) -> str:
    """The way from inside a directory of the tree to its root."""
    return "../" * (path.count("/") + 1)
