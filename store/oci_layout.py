"""Images in an OCI image layout on this machine's disk (OCI image-layout.md, version 1)."""

import os
import stat
from pathlib import Path
from typing import BinaryIO

import msgspec

from store.cas import CHUNK
from store.config import Limits
from store.errors import (
    BlobNotFound,
    ImageNotFound,
    InvalidManifest,
    PullCancelled,
    SizeMismatch,
    storage,
)
from store.manifest import OCI_INDEX, Descriptor, Index, check_limit, parse
from store.reference import LayoutSource, Reference

REF_NAME = "org.opencontainers.image.ref.name"


class _LayoutFile(msgspec.Struct):
    version: str = msgspec.field(name="imageLayoutVersion")


class Layout:
    """One image of a layout; see ``Source``."""

    def __init__(self, source: LayoutSource, limits: Limits) -> None:
        self._source = source
        self._limits = limits

    def resolve(self) -> tuple[Descriptor, bytes]:
        """The entry of index.json that carries the tag, or the only one there is."""
        self._check_version()
        data = self._read(self._source.path / "index.json", self._limits.manifest_bytes)
        index = parse(data, OCI_INDEX, f"the index.json of {self._source}")
        if not isinstance(index, Index):
            raise InvalidManifest(f"{self._source.path}/index.json is not an image index")
        descriptor = self._choose(index)
        return descriptor, self.fetch_manifest(descriptor)

    def _check_version(self) -> None:
        data = self._read(self._source.path / "oci-layout", 4096)
        try:
            version = msgspec.json.decode(data, type=_LayoutFile).version
        except msgspec.MsgspecError:
            version = "?"
        if not version.startswith("1."):
            raise InvalidManifest(
                f"{self._source.path} is not an OCI image layout of version 1; "
                "give a directory that skopeo, umoci or buildah wrote as oci:"
            )

    def _choose(self, index: Index) -> Descriptor:
        tag = self._source.tag
        names = [(entry.annotations or {}).get(REF_NAME) for entry in index.manifests]
        if tag is None and len(names) == 1:
            return index.manifests[0]
        # The last one counts when a name is there twice: tools append.
        for entry, name in reversed(list(zip(index.manifests, names, strict=True))):
            if tag is not None and name == tag:
                return entry
        offer = ", ".join(sorted({name for name in names if name})[:30]) or "none with a name"
        raise ImageNotFound(
            f"{self._source} is not there, or is not the only image; the layout has: {offer}"
        )

    def default_name(self, descriptor: Descriptor) -> Reference:
        """``localhost/<directory>:<tag>``."""
        return self._source.default_name((descriptor.annotations or {}).get(REF_NAME))

    def fetch_manifest(self, descriptor: Descriptor) -> bytes:
        """A manifest or index."""
        return self._document(descriptor, self._limits.manifest_bytes, "manifest")

    def fetch_config(self, descriptor: Descriptor) -> bytes:
        """An image configuration."""
        return self._document(descriptor, self._limits.config_bytes, "configuration")

    def _document(self, descriptor: Descriptor, limit: int, kind: str) -> bytes:
        check_limit(descriptor.size, limit, f"the {kind} {descriptor.digest} of {self._source}")
        try:
            data = self._read(self._blob(descriptor), limit)
        except ImageNotFound as error:
            raise BlobNotFound(error.sentence) from None
        descriptor.check(data)
        return data

    def open_blob(
        self, descriptor: Descriptor, offset: int, length: int | None = None
    ) -> "FileBlob":
        """The file, from ``offset`` on."""
        path = self._blob(descriptor)
        try:
            file = _open(path)
        except ImageNotFound as error:
            raise BlobNotFound(error.sentence) from None
        size = os.fstat(file.fileno()).st_size
        if size != descriptor.size:
            file.close()
            raise SizeMismatch(
                f"{path} is {size} bytes long, the manifest names {descriptor.size}; "
                "the layout has to be written again"
            )
        file.seek(offset)
        return FileBlob(file, offset, size - offset if length is None else length)

    def close(self) -> None:
        """Nothing stays open."""

    def _blob(self, descriptor: Descriptor) -> Path:
        return self._source.path / "blobs" / "sha256" / descriptor.digest.removeprefix("sha256:")

    def _read(self, path: Path, limit: int) -> bytes:
        with _open(path) as file, storage(f"reading {path}"):
            data = file.read(limit + 1)
        check_limit(len(data), limit, str(path))
        return data


class FileBlob:
    """A blob that is a file; see ``BlobStream``."""

    def __init__(self, file: BinaryIO, offset: int, length: int) -> None:
        self._file = file
        self._left = length
        self._aborted = False
        self.offset = offset

    def read(self) -> bytes:
        """The next piece."""
        if self._aborted:
            raise PullCancelled("the pull was cancelled")
        with storage("reading the image layout"):
            piece = self._file.read(min(CHUNK, self._left))
        self._left -= len(piece)
        return piece

    def abort(self) -> None:
        """A read from a disk doesn't wait long."""
        self._aborted = True

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _open(path: Path) -> BinaryIO:
    """A regular file; anything else might block, or never end."""
    with storage(f"reading {path}"):
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            raise ImageNotFound(
                f"there is no {path}; give the directory of an OCI image layout"
            ) from None
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise InvalidManifest(f"{path} is not a regular file; the layout can't be used")
        return os.fdopen(fd, "rb", buffering=0)
