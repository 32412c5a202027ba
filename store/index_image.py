"""Indexing all ordinary layers of an image in a registry, for every machine that pulls it."""

import hashlib
import tempfile
from pathlib import Path

from store.cas import Digest
from store.config import StoreConfig
from store.convert import Watcher
from store.errors import DigestMismatch, NotLazy, storage
from store.index_artifact import push_indexes
from store.indexing import make_document
from store.manifest import Descriptor
from store.platform import Platform
from store.push import Pusher
from store.receive import received
from store.reference import Reference
from store.registry import Registry
from store.resolve import find
from store.toc import is_announced

# Layers pass through here one at a time; /tmp is in memory on many machines.
_WORKSPACE = Path("/var/tmp")


def index_image(
    reference: Reference, platform: Platform, config: StoreConfig, watcher: Watcher
) -> Descriptor:
    """Index an image's layers and push the indexes beside it; their manifest.

    Layers with a table of contents need none, and those that can't have one are noted.

    Raises:
        NotLazy: no layer could be indexed.
        StoreError: it can't be had, indexed, or pushed; nothing was pushed then.
    """
    registry = Registry(reference, config)
    pusher = Pusher(reference, config)
    try:
        what = str(reference)
        found = find(registry, platform, what, config.layers.layer_bytes)
        documents: dict[Digest, bytes] = {}
        for number, layer in enumerate(found.manifest.layers):
            label = f"layer {number + 1} of {len(found.manifest.layers)}"
            if is_announced(layer):
                watcher.note(f"{label} has a table of contents")
                continue
            try:
                document = _document(
                    registry, layer, found.config.diff_ids[number], config, watcher, label
                )
                documents[layer.content] = document
            except NotLazy as error:
                watcher.note(f"{label} can't be indexed: {error.sentence}")
        if not documents:
            raise NotLazy(f"no layer of {what} needs an index, or can have one")
        return push_indexes(pusher, registry, found.chosen, documents)
    finally:
        pusher.close()
        registry.close()


def _document(
    registry: Registry,
    layer: Descriptor,
    diff_id: Digest,
    config: StoreConfig,
    watcher: Watcher,
    label: str,
) -> bytes:
    watcher.begin(f"reading {label}", layer.size)
    with (
        storage(f"writing to {_WORKSPACE}"),
        tempfile.TemporaryFile(dir=_WORKSPACE) as file,
    ):
        digest = hashlib.sha256()
        for piece in received(registry, layer, config.patience, watcher.advance):
            digest.update(piece)
            file.write(piece)
        file.flush()
        if f"sha256:{digest.hexdigest()}" != layer.digest:
            raise DigestMismatch(
                f"the bytes received for the layer {layer.digest} hash to "
                f"sha256:{digest.hexdigest()}; try again, or push the image again"
            )
        watcher.begin(f"indexing {label}", 0)
        path = Path(f"/proc/self/fd/{file.fileno()}")
        return make_document(path, layer, diff_id, config.layers, lambda: False)
