"""Indexes of ordinary layers that were made here, kept when the layers go.

indexes/<blob hex>    a document as index_document.py describes it
"""

import logging
import os
import tempfile
from pathlib import Path

from store.cas import Digest
from store.errors import StoreError, storage
from store.index_document import decode_index
from store.layer_index import LayerIndex
from store.manifest import Descriptor
from store.unpack import LayerLimits

log = logging.getLogger(__name__)


class Indexes:
    """The directory. Safe to use from several threads.

    Args:
        directory: made if it is missing.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        with storage(f"preparing {directory}"):
            directory.mkdir(mode=0o700, exist_ok=True)
            for unfinished in directory.glob("*.tmp"):
                unfinished.unlink()

    def path(self, blob: Digest) -> Path:
        """Where the index of a layer's blob is, or would be."""
        return self._directory / blob.removeprefix("sha256:")

    def get(self, layer: Descriptor, diff_id: Digest, limits: LayerLimits) -> LayerIndex | None:
        """The index of a layer, if there is one."""
        path = self.path(layer.content)
        try:
            return decode_index(path.read_bytes(), layer, diff_id, limits)
        except FileNotFoundError:
            return None
        except (StoreError, OSError) as error:
            log.warning("the index in %s can't be used and is removed: %s", path, error)
            path.unlink(missing_ok=True)
            return None

    def put(self, blob: Digest, document: bytes) -> None:
        """Keep an index.

        Raises:
            StorageFailed: it could not be written.
        """
        path = self.path(blob)
        with storage(f"writing {path}"):
            fd, name = tempfile.mkstemp(suffix=".tmp", dir=self._directory)
            try:
                with open(fd, "wb") as file:
                    file.write(document)
                    file.flush()
                    os.fsync(fd)
                os.rename(name, path)
            except BaseException:
                Path(name).unlink(missing_ok=True)
                raise
