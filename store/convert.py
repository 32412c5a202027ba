"""Converting an image: the same files in layers that can be loaded lazily."""

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec

from store.arrange import Order
from store.cas import Digest, digest_of
from store.config import StoreConfig
from store.errors import DigestMismatch, NotLazy, storage
from store.estargz import DIGEST_ANNOTATION
from store.estargz_writer import SIZE_ANNOTATION, EStargz
from store.lazy_format import Format, FormatWriter
from store.lazy_writer import WrittenLayer, write_layer
from store.manifest import OCI_CONFIG, OCI_MANIFEST, Descriptor
from store.opened import LOOKED_UP
from store.platform import Platform
from store.receive import received
from store.resolve import Found, find
from store.source import Source
from store.spool import spool
from store.tar_names import clean_path
from store.target import Target
from store.zstd_chunked_writer import ZstdChunked

log = logging.getLogger(__name__)

WRITERS: dict[Format, Callable[[], FormatWriter]] = {
    "estargz": EStargz,
    "zstd:chunked": ZstdChunked,
}

# What layers say about a table of contents; those of the source no longer apply.
_STALE = ("io.github.containers.zstd-chunked.", "io.containers.zstd-chunked.")
_STALE_NAMES = (DIGEST_ANNOTATION, SIZE_ANNOTATION)

_DOCKER_LAYER = "application/vnd.docker.image.rootfs."
_OCI_LAYER = "application/vnd.oci.image.layer."


class Watcher(Protocol):
    """Whoever shows how far a conversion is. Amounts are in bytes."""

    def begin(self, what: str, total: int) -> None:
        """A step begins."""

    def advance(self, count: int) -> None:
        """So much more of the step is done."""

    def note(self, sentence: str) -> None:
        """Something that the user should know."""


def convert(
    source: Source,
    target: Target,
    writer: FormatWriter,
    trace: Sequence[bytes],
    platform: Platform,
    config: StoreConfig,
    watcher: Watcher,
    what: str,
) -> Descriptor:
    """Convert an image; its new manifest.

    Args:
        target: entered already.
        trace: paths of files that go first, after what runtimes read, as a container sees them, in
            the order of their use.
        platform: which image of an index.
        what: the source's name for error messages.

    Raises:
        StoreError: it can't be had, converted, or put there; nothing has appeared there.
    """
    found = find(source, platform, what, config.layers.layer_bytes)
    conversion = _Conversion(source, target, writer, config, watcher)
    looked_up = {path.lstrip("/").encode(): None for path in LOOKED_UP}
    missing = looked_up | dict.fromkeys(filter(None, map(clean_path, trace)))
    layers: list[WrittenLayer] = []
    count = len(found.manifest.layers)
    # From the top, since a file of the trace is the one in the highest layer that has it.
    for i in reversed(range(count)):
        layer, diff_id = found.manifest.layers[i], found.config.diff_ids[i]
        layers.append(conversion.layer(layer, diff_id, missing, f"layer {i + 1} of {count}"))
    if strange := missing.keys() - looked_up:
        watcher.note(f"files of the trace that the image does not have: {len(strange)}")
    return conversion.documents(found, layers[::-1])


class _Conversion:
    """Converts the parts of one image."""

    def __init__(
        self,
        source: Source,
        target: Target,
        writer: FormatWriter,
        config: StoreConfig,
        watcher: Watcher,
    ) -> None:
        self._source = source
        self._target = target
        self._writer = writer
        self._config = config
        self._watcher = watcher

    def layer(
        self, layer: Descriptor, diff_id: Digest, missing: dict[bytes, None], label: str
    ) -> WrittenLayer:
        """Convert a layer, or keep it where no table of contents could describe it.

        Args:
            missing: what goes first; what the layer has of it is taken out.
            label: which one it is, for the user.
        """
        self._watcher.begin(f"reading {label}", layer.size)
        limits, workspace = self._config.layers, self._target.workspace
        archive = spool(self._pieces(layer), layer.media_type, diff_id, limits, workspace)
        try:
            first = list(missing)
            for member in archive.members:
                missing.pop(member.entry.path, None)
            front, rest = Order(archive.members).split(first)
            self._watcher.begin(f"writing {label}", archive.size)
            path = workspace / "layer"
            with storage(f"writing {path}"), path.open("wb") as file:
                advance = self._watcher.advance
                written = write_layer(archive, front, rest, self._writer, file, advance)
        except NotLazy as error:
            self._watcher.note(f"{label} is kept as it is: {error.sentence}")
            return WrittenLayer(self._kept(layer), diff_id)
        finally:
            archive.close()
        written = msgspec.structs.replace(written, descriptor=_described(layer, written.descriptor))
        self._watcher.begin(f"storing {label}", written.descriptor.size)
        self._put(written.descriptor, path)
        self._watcher.advance(written.descriptor.size)
        return written

    def _kept(self, layer: Descriptor) -> Descriptor:
        """Bring the blob over, verified."""
        if not self._target.has(layer):
            path = self._target.workspace / "layer"
            digest = hashlib.sha256()
            with storage(f"writing {path}"), path.open("wb") as file:
                for piece in self._pieces(layer):
                    digest.update(piece)
                    file.write(piece)
            if f"sha256:{digest.hexdigest()}" != layer.digest:
                raise DigestMismatch(
                    f"the bytes received for the layer {layer.digest} hash to "
                    f"sha256:{digest.hexdigest()}; try again, or push the image again"
                )
            self._put(layer, path)
        return Descriptor(
            _oci_layer_type(layer.media_type), layer.digest, layer.size, layer.annotations
        )

    def _put(self, blob: Descriptor, path: Path) -> None:
        """Hand a finished file over, under a name that the next one does not take."""
        final = path.with_name(blob.digest)
        path.rename(final)
        self._target.put_blob(blob, final)

    def _pieces(self, blob: Descriptor) -> Iterator[bytes]:
        return received(self._source, blob, self._config.patience, self._watcher.advance)

    def documents(self, found: Found, layers: Sequence[WrittenLayer]) -> Descriptor:
        """Write configuration and manifest, with all in them that is not about layers."""
        config = msgspec.json.decode(found.documents[-1], type=dict[str, Any])
        config["rootfs"]["diff_ids"] = [layer.diff_id for layer in layers]
        data = msgspec.json.encode(config)
        described = Descriptor(OCI_CONFIG, digest_of(data), len(data))
        path = self._target.workspace / "config"
        with storage(f"writing {path}"):
            path.write_bytes(data)
        self._put(described, path)
        # Always OCI's: Docker's manifests have no annotations.
        manifest = msgspec.json.decode(found.documents[-2], type=dict[str, Any])
        manifest["mediaType"] = OCI_MANIFEST
        manifest["config"] = msgspec.to_builtins(described)
        manifest["layers"] = [msgspec.to_builtins(layer.descriptor) for layer in layers]
        data = msgspec.json.encode(manifest)
        platform = found.chosen.platform
        new = Descriptor(OCI_MANIFEST, digest_of(data), len(data), platform=platform)
        self._target.put_manifest(new, data)
        return new


def _described(old: Descriptor, new: Descriptor) -> Descriptor:
    """The new layer with the annotations of the old one that still apply."""
    kept = {
        name: value
        for name, value in (old.annotations or {}).items()
        if not name.startswith(_STALE) and name not in _STALE_NAMES
    }
    return msgspec.structs.replace(new, annotations=kept | (new.annotations or {}))


def _oci_layer_type(media_type: str) -> str:
    """The media type of the same bytes in an OCI manifest."""
    if not media_type.startswith(_DOCKER_LAYER):
        return media_type
    kind, _, compression = media_type.removeprefix(_DOCKER_LAYER).partition(".tar")
    base = "nondistributable.v1.tar" if kind == "foreign.diff" else "v1.tar"
    return _OCI_LAYER + base + compression.replace(".", "+")
