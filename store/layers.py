"""The unpacked layers in the store, and the images that the kernel mounts of them.

    layers/<diff_id hex>/layer.json   a LayerRecord
                         data         file contents, each at a multiple of 4096; absent if none
                         data.<cut>   of lazy layers, see data_files.py
                         index        the archive's entries (index.py)
                         meta.erofs   the layer as it is when no layer is below it
                         …            of layers that are or were lazy, see lazy.py
    layers/chains/<key>/meta.erofs    a layer as it is above certain others (see ``mountable``)
                        data          its own contents and what it links to in them; mostly absent
    layers/pieces.db                  chunks of lazy layers by digest (pieces.py)
    layers/tmp/                       what is being made; emptied at start

A layer appears by one rename, complete and synced or not at all. That of a lazy one is the rename
of its ``layer.json``, the last of its files: without it a directory is removed. Syncing later, and
rebuilding a layer from its blob after a power failure, would save nothing that can be
measured: the kernel writes the data back while it still comes in (``unpack.DataFile``),
and the last fsync of a 240 MB layer takes 5 ms of 650.
"""

import hashlib
import logging
import os
import secrets
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

import msgspec

from store import data_files, lazy
from store.cas import Digest, sync_directory
from store.data_files import DataFiles, size_of
from store.describer import Describer, Describing
from store.description import Description, Frame, describe
from store.erofs import image_sizes
from store.errors import ContentNeeded, CorruptContent, InvalidLayer, storage
from store.index import Entry, read_index, write_index
from store.lazy import LazyRecord
from store.manifest import Descriptor
from store.spans import SpanWriter
from store.tree import Tree
from store.tree_builder import Builder
from store.unpack import ALIGNMENT, LayerLimits, unpack_blob

__all__ = ["Layer", "LayerImage", "LayerLimits", "Layers"]

logger = logging.getLogger(__name__)

# A mount directory's name is this much of a hash. 96 bits: nobody can make a layer whose name
# equals that of another's layer, and 128 relative names fit into overlayfs' option page.
_KEY_LENGTH = 24


class LayerRecord(msgspec.Struct, frozen=True):
    """``layer.json``."""

    format: int
    diff_id: str
    data_size: int
    inodes: int
    # The tree depends on lower layers / only its root's attributes do.
    depends: bool
    root_depends: bool
    # Why the layer can't be used as the lowest one; empty if it can.
    needs_lower: str
    # In bytes; 0 in records that were written before there was this field.
    index_size: int = 0
    # What made it lazy, as "estargz"; empty for layers that were pulled in full.
    lazy: str = ""
    # Why it was pulled in full though a lazy one was asked for; empty if it was not.
    not_lazy: str = ""
    # Random: tells the layer from another that was in its place, whose mounts may still be there.
    instance: str = ""
    # Those of the data files.
    cuts: tuple[int, ...] = ()


class Layer(msgspec.Struct, frozen=True):
    """A layer that is here. ``data_size`` in bytes; ``data`` is None when it is 0."""

    diff_id: Digest
    directory: Path
    data_size: int
    inodes: int
    record: LayerRecord

    @property
    def data(self) -> DataFiles | None:
        if not self.data_size:
            return None
        return DataFiles(self.directory, self.data_size, self.record.cuts)

    @property
    def index(self) -> Path:
        return self.directory / "index"

    @property
    def complete(self) -> bool:
        """Whether all its contents are here; looks at a file."""
        return lazy.is_complete(self.directory)

    @property
    def identity(self) -> str:
        """Equal for the same files only."""
        return f"{self.diff_id} {self.record.instance}"


class LayerImage(msgspec.Struct, frozen=True):
    """What to mount for a layer: ``meta`` is the EROFS image, ``data`` are its devices (or None).

    Equal keys mean the same image; a key is a good name for a mount directory. ``incomplete``
    names the layer whose contents are not all in ``data`` yet: they must come from whoever
    fetches them.
    """

    key: str
    meta: Path
    data: DataFiles | None
    incomplete: Digest | None = None


class LazyLayout(Protocol):
    """What a table of contents or an index says of a layer."""

    @property
    def format(self) -> str:
        """What says so, as ``estargz``."""

    @property
    def entries(self) -> Iterable[Entry]:
        """As in ``index.py``; they may be worked out one by one."""

    @property
    def spans(self) -> SpanWriter:
        """Where the contents come from."""

    @property
    def data_size(self) -> int:
        """Of the data files, in bytes."""

    @property
    def first_size(self) -> int:
        """So much of them is wanted before the rest; known when all entries are."""

    @property
    def is_large(self) -> bool:
        """Whether there are so many entries that making an image of them takes long; known before
        they are."""


# Of a layer's files. One of another format is removed and made again; chains of another
# format are not looked at, and go with their layers.
_FORMAT = 1


class Layers:
    """All layers in a directory. Safe to use from several threads; one process at a time."""

    def __init__(self, directory: Path, limits: LayerLimits | None = None) -> None:
        self._directory = directory
        self._limits = limits or LayerLimits()
        self._chains = directory / "chains"
        self._temporary = directory / "tmp"
        self._lock = threading.Lock()  # for names to appear and disappear
        self._building = threading.Lock()  # trees take memory: one stack of them at a time
        self._describer = Describer()  # that of the thread that builds
        self._layers: dict[Digest, Layer] = {}
        self._damaged: frozenset[Digest] = frozenset()
        with storage(f"opening {directory}"):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            shutil.rmtree(self._temporary, ignore_errors=True)
            self._temporary.mkdir(mode=0o700, exist_ok=True)
            self._chains.mkdir(mode=0o700, exist_ok=True)
            for path in directory.iterdir():
                if path.is_dir() and path not in (self._chains, self._temporary):
                    self._adopt(path)

    def expect_lazy(self, *, silent: bool) -> None:
        """Lazy layers will be made, and somebody will wait for each: start ahead what that takes
        until ``close``, ``silent`` if it must not write to standard error."""
        with self._building:
            self._describer.start_ahead(silent=silent)

    def close(self) -> None:
        """End what was started ahead."""
        with self._building:
            self._describer.close()

    def get(self, diff_id: Digest) -> Layer | None:
        """The layer, from memory; None when it isn't here or was found damaged."""
        return None if diff_id in self._damaged else self._layers.get(diff_id)

    def usable(self, diff_id: Digest) -> bool:
        """Whether the layer is here with all its files; looks at them."""
        try:
            self.present(diff_id)
        except CorruptContent as error:
            logger.warning("%s", error.sentence)
            return False
        return True

    def __iter__(self) -> Iterator[Layer]:
        return iter(list(self._layers.values()))

    def remove(self, diff_id: Digest) -> None:
        """Delete a layer and the chains it is part of; nothing may have it mounted. Idempotent."""
        with self._building, self._lock, storage(f"removing a layer from {self._directory}"):
            layer = self._layers.pop(diff_id, None)
            self._damaged -= {diff_id}
            if layer is None:
                return
            self._delete_with_chains(layer.directory)

    def remove_chains(self, diff_ids: Sequence[Digest], needed: Sequence[Sequence[Digest]]) -> None:
        """Delete what was made for this stack of layers, but for what ``needed`` stacks share."""
        with self._building, self._lock, storage(f"removing a layer from {self._directory}"):
            for chain in self._chains.iterdir():
                below = (chain / "diff_ids").read_text().split()
                if _begins(diff_ids, below) and not any(_begins(stack, below) for stack in needed):
                    self._delete(chain)

    def unpack(
        self,
        chunks: Iterator[bytes],
        media_type: str,
        diff_id: Digest,
        cancelled: Callable[[], bool],
        not_lazy: str = "",
    ) -> Layer:
        """Make a layer of a blob's bytes, in one pass.

        Args:
            chunks: the blob, verified by the caller or by whoever checks the digest at its end: an
                exception from the iterator abandons the layer. It is advanced only in
                the calling thread.
            media_type: the layer descriptor's.
            diff_id: what the inflated archive must hash to.
            cancelled: asked about every 2 ms of work.
            not_lazy: why it is not lazy, for the record.

        Raises:
            InvalidLayer, LimitExceeded, DigestMismatch, UnsupportedMediaType: the blob is at fault.
            PullCancelled: ``cancelled()`` returned true.
            StoreError: the disk is full or failed, with its errno.

        After an exception nothing is left. A hard link that only a lower layer can
        satisfy is checked by ``mountable``.
        """
        existing = self.get(diff_id)
        if existing is not None:
            return existing
        with self._workspace() as workspace:
            unpacked = unpack_blob(
                chunks,
                media_type,
                diff_id,
                workspace / data_files.NAME,
                workspace / "index",
                self._limits,
                cancelled,
            )
            if not unpacked.data_size:
                (workspace / data_files.NAME).unlink()
            frame = _frame(unpacked.data_size, _hex(diff_id))
            with (workspace / "meta.erofs").open("xb") as meta:
                description = describe(unpacked.tree, unpacked.needs_lower, meta, frame)
            record = _record(workspace, diff_id, unpacked.data_size, description)
            return self._add(workspace, msgspec.structs.replace(record, not_lazy=not_lazy))

    def add_lazy(
        self,
        diff_id: Digest,
        layout: LazyLayout,
        record: LazyRecord,
        known: Sequence[tuple[int, bytes]],
        fillable: Callable[[], None],
    ) -> Layer:
        """Make an incomplete layer, which can be mounted and is filled by whoever serves it.

        Args:
            layout: what is in it.
            record: where its blob can be had.
            known: parts of the blob that were read already, with their offsets.
            fillable: called when the layer has its name and can be filled, so that its first
                contents come while it is made mountable, which takes longer.

        Raises:
            InvalidLayer, LimitExceeded, NotLazy: from the layout, or it makes no sense.
            StoreError: the disk is full or failed, with its errno.
        """
        with self._building, self._workspace() as workspace:
            existing = self.get(diff_id)
            if existing is not None:
                return existing  # a pull that was abandoned went on
            index, most = workspace / "index", self._limits.layer_entries
            index.touch()
            with (
                (workspace / "meta.erofs").open("xb") as meta,
                self._describer.describing(layout, index, meta, most) as description,
                ThreadPoolExecutor(1) as pool,
            ):
                write_index(index, layout.entries, description.block)
                size = layout.data_size
                cuts = data_files.cuts(layout.entries, layout.first_size, size)
                description.begin(_frame(size, _hex(diff_id), cuts))
                # Synced before contents come, for which each sync would wait.
                data = DataFiles(workspace, size, cuts)
                data.create()
                synced = pool.submit(_sync_files, workspace, os.listdir(workspace))
                _write_spans(workspace / "spans", layout, cuts, known)
                lazy.prepare(workspace, record, known)
                names = {*os.listdir(workspace)}.difference(path.name for path in data.paths)
                synced.result()
                directory = self._name_fillable(workspace, diff_id)
                synced = pool.submit(_sync_files, directory, sorted(names))
                try:
                    fillable()
                    self._make_mountable(directory, diff_id, layout, cuts, description, synced)
                except BaseException:
                    self._delete(directory)
                    raise
            return self._layers[diff_id]

    def _name_fillable(self, workspace: Path, diff_id: Digest) -> Path:
        """Give a lazy layer's directory its name. Until it has its record, it is not a layer, and
        its files need not last."""
        directory = self._directory / _hex(diff_id)
        with self._lock:
            if directory.exists():  # damaged
                self._delete_with_chains(directory)
            workspace.rename(directory)
        return directory

    def _make_mountable(
        self,
        directory: Path,
        diff_id: Digest,
        layout: LazyLayout,
        cuts: tuple[int, ...],
        description: Describing,
        synced: Future[None],
    ) -> None:
        """Make a layer of what is filled already, when its files are ``synced``."""
        record = _record(directory, diff_id, layout.data_size, description.result())
        record = msgspec.structs.replace(record, lazy=layout.format, cuts=cuts)
        _sync(directory / "meta.erofs")
        synced.result()
        temporary = directory / "layer.json.tmp"
        temporary.write_bytes(msgspec.json.encode(record))
        _sync(temporary)
        temporary.rename(directory / "layer.json")
        sync_directory(directory)
        sync_directory(self._directory)
        with self._lock:
            self._adopt(directory)
            self._damaged -= {diff_id}

    def _add(self, workspace: Path, record: LayerRecord) -> Layer:
        (workspace / "layer.json").write_bytes(msgspec.json.encode(record))
        self._publish(workspace, self._directory / _hex(record.diff_id))
        layer = self.get(Digest(record.diff_id))
        assert layer is not None
        return layer

    def was_refused(self, diff_id: Digest, blob: Descriptor, source: str) -> bool:
        """Whether a layer was refused as an image from ``source`` with this blob describes it."""
        layer = self._layers.get(diff_id)
        if layer is None or not lazy.refusal(layer.directory):
            return False
        return lazy.read_record(layer.directory).is_for(blob, source)

    def refused(self, diff_id: Digest) -> None:
        """A lazy layer's blob was found to be wrong: it counts as damaged from now on."""
        with self._lock:
            self._damaged |= {diff_id}

    def mountable(self, diff_ids: Sequence[Digest]) -> tuple[LayerImage, ...]:
        """The images to stack for these layers, bottom first, one for each.

        Most layers have one image for all stacks. A layer whose archive leaves out parent
        directories, deletes names, or links to files below needs one that is made
        for the layers below it; it is made once, from the index, and kept. So does
        a topmost layer that doesn't list its root directory, since overlayfs shows the
        topmost root's attributes.

        Raises:
            CorruptContent: a layer isn't here (any more), or its files are not what was written;
                the next pull makes it again from its blob.
            InvalidLayer: the layers don't fit together, as when a hard link's target is nowhere.
            StoreError: the disk is full or failed, with its errno.
        """
        stack = _Stack([self.present(diff_id) for diff_id in diff_ids])
        for position in range(len(diff_ids)):
            stack.images.append(self._image(stack, position))
        return tuple(stack.images)

    def present(self, diff_id: Digest) -> Layer:
        """The layer, after a look at its files: their sizes tell what power cuts and people do.

        Raises:
            CorruptContent: it is missing or damaged.
        """
        layer = self.get(diff_id)
        if layer is None:
            state = "damaged" if diff_id in self._damaged else "missing"
            raise CorruptContent(
                f"the unpacked layer {diff_id} is {state} in {self._directory}; "
                "pull the image again"
            )
        with self._lock, storage(f"looking at the layer in {layer.directory}"):
            # Not while another thread puts a new one in its place.
            wrong = _wrong_file(layer)
            if wrong and self._layers.get(diff_id) is layer:
                self._damaged |= {diff_id}
        if wrong:
            raise CorruptContent(
                f"{wrong} of the unpacked layer {diff_id} is missing or damaged; "
                "pull the image again"
            )
        return layer

    def _image(self, stack: "_Stack", position: int) -> LayerImage:
        layer = stack.layers[position]
        on_top = position == len(stack.layers) - 1
        if position == 0 and layer.record.needs_lower:
            raise InvalidLayer(layer.record.needs_lower)
        if position and (layer.record.depends or (on_top and layer.record.root_depends)):
            return self._chain_image(stack, position)
        return LayerImage(
            _hash(layer.identity)[:_KEY_LENGTH],
            layer.directory / "meta.erofs",
            layer.data,
            _incomplete(layer, layer.data),
        )

    def _chain_image(self, stack: "_Stack", position: int) -> LayerImage:
        layers = stack.layers[: position + 1]
        diff_ids = "\n".join(layer.diff_id for layer in layers)
        key = _hash("\n".join([str(_FORMAT), *(layer.identity for layer in layers)]))
        directory = self._chains / key
        layer = stack.layers[position]
        own = layer.data
        with storage(f"reading the layers in {self._directory}"):
            if not _sound(directory, own):
                with self._building:
                    if not _sound(directory, own):
                        self._delete(directory)
                        self._build_chain(stack, position, directory, diff_ids)
            data = _chain_data(directory, own)
            return LayerImage(
                key[:_KEY_LENGTH], directory / "meta.erofs", data, _incomplete(layer, data)
            )

    def _build_chain(self, stack: "_Stack", position: int, directory: Path, diff_ids: str) -> None:
        try:
            tree = stack.tree(position)
        except CorruptContent:
            if stack.reading:
                with self._lock:
                    self._damaged |= {stack.reading.diff_id}
            raise
        if tree.unresolved:
            raise InvalidLayer(tree.unresolved)
        with self._workspace() as workspace:
            layer = stack.layers[position]
            frame = _frame(layer.data_size, directory.name, layer.record.cuts)
            if tree.borrowed:
                stack.require_content(position)
                data_size = stack.gather_data(position, workspace / data_files.NAME)
                frame = _frame(data_size, directory.name)
            with (workspace / "meta.erofs").open("xb") as meta:
                describe(tree, "", meta, frame)
            (workspace / "diff_ids").write_text(diff_ids)
            self._publish(workspace, directory)

    def _adopt(self, path: Path) -> None:
        """Take a layer's directory into account, or remove it if it can't be used.

        What is lost then is rebuilt from the blob by the next pull.
        """
        try:
            record = msgspec.json.decode((path / "layer.json").read_bytes(), type=LayerRecord)
        except (msgspec.MsgspecError, FileNotFoundError, NotADirectoryError) as error:
            logger.warning("removing the layer in %s: %s", path, error)
        else:
            if record.format == _FORMAT and _hex(record.diff_id) == path.name:
                diff_id = Digest(record.diff_id)
                self._layers[diff_id] = Layer(
                    diff_id, path, record.data_size, record.inodes, record
                )
                if lazy.refusal(path):
                    self._damaged |= {diff_id}
                return
            logger.warning("removing the layer in %s: another version made it", path)
        self._delete(path)

    @contextmanager
    def _workspace(self) -> Iterator[Path]:
        """A directory that is removed at the end unless it was renamed."""
        with storage(f"writing a layer to {self._directory}"):
            path = Path(tempfile.mkdtemp(dir=self._temporary))
            try:
                yield path
            finally:
                shutil.rmtree(path, ignore_errors=True)

    def _publish(self, workspace: Path, target: Path) -> None:
        """Give a finished directory its name, durably, unless another thread was faster."""
        _sync_files(workspace, os.listdir(workspace))
        with self._lock:
            if target.exists():
                if not self._is_damaged(target):
                    return
                self._delete_with_chains(target)
            workspace.rename(target)
            sync_directory(target.parent)
            if target.parent == self._directory:
                self._adopt(target)
                self._damaged -= {Digest(f"sha256:{target.name}")}

    def _is_damaged(self, target: Path) -> bool:
        return target.parent == self._directory and f"sha256:{target.name}" in self._damaged

    def _delete_with_chains(self, directory: Path) -> None:
        """Remove a layer's directory, and the chains it is part of."""
        for chain in self._chains.iterdir():
            if f"sha256:{directory.name}" in (chain / "diff_ids").read_text().split():
                self._delete(chain)
        self._delete(directory)

    def _delete(self, directory: Path) -> None:
        """Remove a directory at one stroke, then its files."""
        with self._workspace() as workspace, suppress(FileNotFoundError):
            directory.rename(workspace / "deleted")


class _Stack:
    """The layers of one image, bottom first, their images, and their trees if needed."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = layers
        self.images: list[LayerImage] = []
        self.reading: Layer | None = None  # whose index is at fault if one is
        self._trees: list[Tree] = []
        self._copies: list[list[_Copy]] = []

    def tree(self, position: int) -> Tree:
        """The tree of a layer over those below it. Raises InvalidLayer."""
        while len(self._trees) <= position:
            number = len(self._trees)
            self.reading = self.layers[number]
            lowers = tuple(tree.root for tree in reversed(self._trees))
            builder = Builder(lowers, number)
            for entry in read_index(self.layers[number].index):
                builder.add(entry)
            tree = builder.finish()
            self._copies.append(_give_places(tree, number, self.layers[number].data_size))
            self._trees.append(tree)
        return self._trees[position]

    def require_content(self, position: int) -> None:
        """Raise ContentNeeded if contents that a layer's data file is made of are not here."""
        needed = {position, *(copy.origin for copy in self._copies[position])}
        incomplete = [self.layers[n].diff_id for n in sorted(needed) if not self.layers[n].complete]
        if incomplete:
            raise ContentNeeded(
                f"the layer {self.layers[position].diff_id} gives files of lower layers another "
                "name, which takes all of their content; pull the image again",
                tuple(incomplete),
            )

    def gather_data(self, position: int, target: Path) -> int:
        """Write a data file with the layer's own contents and those it borrows; its size."""
        own = self.layers[position]
        with target.open("xb") as file:
            if own.data is not None:
                _copy(own.data, 0, own.data_size, file.fileno(), 0)
            end = own.data_size
            for copy in self._copies[position]:
                data = self.images[copy.origin].data
                assert data is not None
                _copy(data, copy.source, copy.size, file.fileno(), copy.target)
                end = copy.target + copy.size
            end += -end % ALIGNMENT
            file.truncate(end)
        return end


class _Copy(msgspec.Struct, frozen=True):
    """Content of the layer at position ``origin`` that another layer needs."""

    origin: int
    source: int
    size: int
    target: int


def _give_places(tree: Tree, position: int, end: int) -> list[_Copy]:
    """Append what a tree borrows to its own data file, which ends at ``end``."""
    copies = []
    for node in tree.borrowed:
        copies.append(_Copy(node.origin, node.offset, node.size, end))
        node.origin = position
        node.offset = end
        end += node.size + -node.size % ALIGNMENT
    return copies


def _copy(data: DataFiles, offset: int, size: int, target_fd: int, target: int) -> None:
    paths = data.paths
    for number, start, end in data.parts(offset, offset + size):
        _copy_range(paths[number], start, end, target_fd, target + start - offset)


def _copy_range(source: Path, start: int, end: int, target_fd: int, target: int) -> None:
    with source.open("rb") as file:
        while start < end:
            done = os.copy_file_range(file.fileno(), target_fd, end - start, start, target)
            if not done:
                raise CorruptContent(f"{source} is shorter than it was; pull the image again")
            start += done
            target += done


def _write_spans(
    path: Path, layout: LazyLayout, cuts: Sequence[int], known: Sequence[tuple[int, bytes]]
) -> None:
    with path.open("xb") as file:
        ranges = [(offset, len(piece)) for offset, piece in known]
        layout.spans.write(file, layout.data_size, ranges, cuts)


def _frame(data_size: int, identity: str, cuts: tuple[int, ...] = ()) -> Frame:
    return Frame(data_size, bytes.fromhex(identity)[:16], cuts)


def _record(
    directory: Path, diff_id: Digest, data_size: int, description: Description
) -> LayerRecord:
    """The record of a layer whose index is written already."""
    return LayerRecord(
        format=_FORMAT,
        diff_id=diff_id,
        data_size=data_size,
        inodes=description.inodes,
        depends=description.depends,
        root_depends=description.root_depends,
        needs_lower=description.needs_lower,
        index_size=(directory / "index").stat().st_size,
        instance=secrets.token_hex(8),
    )


def _wrong_file(layer: Layer) -> str:
    """The name of a file that can't be as it was written; empty if all can, by their sizes."""
    if layer.data is not None and (wrong := layer.data.wrong):
        return wrong
    wanted = layer.record.index_size or max(1, size_of(layer.index))
    if size_of(layer.index) != wanted:
        return "index"
    if not _fits(layer.directory / "meta.erofs", layer.data):
        return "meta.erofs"
    return lazy.wrong_file(layer.directory) if layer.record.lazy else ""


def _fits(meta: Path, data: DataFiles | None) -> bool:
    """Whether an image is whole and made for these data files."""
    try:
        sizes = image_sizes(meta)
    except FileNotFoundError:
        return False
    return sizes == (size_of(meta), [size_of(path) for path in data.paths] if data else [])


def _chain_data(directory: Path, own: DataFiles | None) -> DataFiles | None:
    """The data files of a chain's image: one of its own, or those of the layer."""
    size = size_of(directory / data_files.NAME)
    return DataFiles(directory, size) if size >= 0 else own


def _incomplete(layer: Layer, data: DataFiles | None) -> Digest | None:
    """The layer if contents that an image takes from ``data`` are not all there."""
    return None if data is None or data != layer.data or layer.complete else layer.diff_id


def _sound(directory: Path, own: DataFiles | None) -> bool:
    return _fits(directory / "meta.erofs", _chain_data(directory, own))


def _begins(stack: Sequence[str], beginning: Sequence[str]) -> bool:
    return list(stack[: len(beginning)]) == list(beginning)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _hex(diff_id: str) -> str:
    return diff_id.removeprefix("sha256:")


def _sync_files(directory: Path, names: Sequence[str]) -> None:
    for name in names:
        _sync(directory / name)
    sync_directory(directory)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
