"""Everything that is kept, under one directory."""

import os
from collections.abc import Hashable, Sequence
from contextlib import suppress
from pathlib import Path

from store.ballast import Ballast
from store.cas import Cas, Digest
from store.config import StoreConfig
from store.db import Database
from store.errors import ImageNotFound, StoreInUse, storage
from store.events import EventLog
from store.images import Image, Images
from store.indexes import Indexes
from store.layers import Layer, LayerImage, Layers
from store.lazy import fetched, set_wanted
from store.locate import Contents, Ranges
from store.lock import lock
from store.opened import LOOKED_UP, Opened


class Store:
    """Blobs, layers, image records and settings; one process at a time uses a directory.

    Args:
        root: the store's directory; made if it is missing.
        config: the settings.
        events: where news goes.

    Raises:
        StoreInUse: another process has it open.
        StorageFailed, CorruptContent: it can't be used.
    """

    def __init__(self, root: Path, config: StoreConfig, events: EventLog) -> None:
        self.root = root
        self.config = config
        self.events = events
        with storage(f"preparing the store in {root}"):
            if not root.exists():
                root.mkdir(parents=True)
                # Containers' root filesystems lie below, and their processes have other users.
                root.chmod(0o711)
            self._lock = _lock(root)
            try:
                self.ballast = Ballast(root / "ballast")
                with self.ballast.dropped():
                    self.db = Database(root / "ctrfs.db")
                self.cas = Cas(root)
                self.images = Images(self.db)
                self.opened = Opened(self.db)
                self.indexes = Indexes(root / "indexes")
                self.layers = Layers(root / "layers", config.layers)
            except BaseException:
                os.close(self._lock)
                raise

    def forget_image(self, name: str) -> None:
        """``Images.remove``, which works on a full disk, too. What is missing of the image's layers
        does not come any more."""
        with self.ballast.dropped():
            self.images.remove(name)
            self.note_wanted()

    def note_wanted(self) -> None:
        """Say of each incomplete layer whether any image or container has it."""
        wanted = {diff_id for image in self.images for diff_id in image.diff_ids}
        wanted.update(diff_id for stack in self.images.pinned() for diff_id in stack)
        for layer in self.layers:
            if layer.record.lazy and not layer.complete:
                with suppress(OSError):  # it goes just now, or the disk is full
                    set_wanted(layer.directory, layer.diff_id in wanted)

    def rootfs_layers(self, image: Image) -> tuple[LayerImage, ...]:
        """What to mount for an image, bottom first. May read and write files.

        Raises:
            CorruptContent: a layer is missing.
            InvalidLayer: the layers don't fit together.
        """
        return self.layers.mountable(image.diff_ids)

    def damaged(self, image: Image) -> tuple[Digest, ...]:
        """Those of an image's blobs that were found damaged, or whose unpacked layers were found
        damaged or missing.

        From memory.
        """
        damaged = set(self.cas.damaged())
        for layer, diff_id in zip(image.layers, image.diff_ids, strict=True):
            if self.layers.get(diff_id) is None:
                damaged.add(layer.content)
        return tuple(digest for digest in image.blobs() if digest in damaged)

    def incomplete(self, image: Image) -> tuple[Digest, ...]:
        """The layers of an image whose contents are not all here; looks at a file for each."""
        return tuple(layer.diff_id for layer in self._layers_of(image) if not layer.complete)

    def files_id(self, diff_ids: Sequence[Digest]) -> Hashable:
        """Another one when these layers are others, are complete, or were made anew. Looks at
        their files."""
        layers = map(self.layers.get, diff_ids)
        return tuple(layer and (layer.identity, layer.complete) for layer in layers)

    def complete(self, diff_ids: Sequence[Digest]) -> bool:
        """Whether all contents of these layers are here."""
        layers = map(self.layers.get, diff_ids)
        return all(layer is not None and layer.complete for layer in layers)

    def percent(self, image: Image) -> int | None:
        """Percent of an image's layers that are here, rounded down; None when all is verified."""
        sizes = {image.diff_ids[n]: layer.size for n, layer in enumerate(image.layers)}
        lacking, complete = 0, True
        for layer in self._layers_of(image):
            here = fetched(layer.directory)
            if here is not None:
                complete = False
                lacking += max(0, sizes[layer.diff_id] - here)
        total = sum(sizes.values())
        return None if complete else min(99, 100 * max(0, total - lacking) // max(1, total))

    def _layers_of(self, image: Image) -> list[Layer]:
        found = (self.layers.get(diff_id) for diff_id in dict.fromkeys(image.diff_ids))
        return [layer for layer in found if layer is not None]

    def locate(self, image: Image, path: str) -> Ranges:
        """Where the contents of a path of an image are. Blocks.

        Raises:
            ImageNotFound: the image has no such path.
            CorruptContent: a layer is missing or damaged.
        """
        return self._contents(image).ranges(path)

    def wanted_first(self, image: Image) -> Ranges:
        """Where the contents are that containers of an image opened first. Blocks.

        Raises:
            CorruptContent: a layer is missing or damaged.
        """
        paths = self.opened.get(image.digest)
        if not paths:
            return {}
        contents = self._contents(image)
        wanted: Ranges = {}
        for path in (*LOOKED_UP, *paths):
            with suppress(ImageNotFound):  # the container made it itself
                for diff_id, ranges in contents.ranges(path).items():
                    wanted.setdefault(diff_id, []).extend(ranges)
        return wanted

    def _contents(self, image: Image) -> Contents:
        layers = [self.layers.present(diff_id) for diff_id in image.diff_ids]
        return Contents(layers)

    def close(self) -> None:
        """Close the database and let other processes in."""
        self.layers.close()
        self.db.close()
        os.close(self._lock)


def _lock(root: Path) -> int:
    """An open file that no other process can lock; the kernel lets go of it with this process."""
    fd = os.open(root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        lock(fd)
    except BlockingIOError:
        os.close(fd)
        raise StoreInUse(
            f"another ctrfs uses {root}; end that one, or take another directory with --root"
        ) from None
    return fd
