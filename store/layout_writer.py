"""Writing images into an OCI image layout (OCI image-layout.md, version 1)."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

from store.errors import InvalidManifest, InvalidReference, storage
from store.manifest import Descriptor
from store.oci_layout import REF_NAME
from store.reference import LayoutSource
from store.workspace import Workspace, lock

# Begins the names of directories in which a writer keeps its blobs, locked as long as it lives.
_WORKSPACE = ".ctrfs-"

# annotations.md; other programs take no other names.
_WORD = r"[A-Za-z0-9]+(?:(?:[-._:@+]|--)[A-Za-z0-9]+)*"
_REF_NAME = re.compile(rf"{_WORD}(?:/{_WORD})*")

_VERSION = b'{"imageLayoutVersion":"1.0.0"}'


class LayoutTarget:
    """One image in a layout, which is made if it is missing; see ``Target``.

    Blobs wait in a hidden directory of the layout until the image is whole. Other images of the
    layout stay, but for the one that had the name.

    Raises:
        InvalidReference: images in layouts have no such names.
    """

    def __init__(self, source: LayoutSource) -> None:
        if source.tag and not _REF_NAME.fullmatch(source.tag):
            raise InvalidReference(
                f"the tag {source.tag!r:.200} may hold letters and digits, and - . _ : @ + /"
                " between them"
            )
        self._source = source
        self._path = source.path
        self._blobs = source.path / "blobs" / "sha256"
        self._waiting: dict[str, Path] = {}

    def __enter__(self) -> Self:
        with storage(f"making the image layout {self._path}"):
            self._is_ours = _make(self._path)
            with _locked(self._path):
                self._directory = Workspace(self._path, _WORKSPACE)
        self.workspace = self._directory.path
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._directory.close()
        if error is not None and self._is_ours:
            # Only what is empty: somebody else may have begun to use it.
            with suppress(OSError):
                self._path.rmdir()

    def has(self, blob: Descriptor) -> bool:
        """Whether a file of its name and size is there."""
        try:
            return self._file(blob).stat().st_size == blob.size
        except FileNotFoundError:
            return False

    def put_blob(self, blob: Descriptor, path: Path) -> None:
        """Keep it until the image is whole."""
        with storage(f"writing {path}"), path.open("rb") as file:
            os.fsync(file.fileno())
        self._waiting[blob.digest] = path

    def put_manifest(self, manifest: Descriptor, data: bytes) -> None:
        """Move the blobs to their places, and then name the image in index.json."""
        path = self.workspace / "manifest"
        with storage(f"writing the image layout {self._path}"):
            path.write_bytes(data)
            self.put_blob(manifest, path)
            with _locked(self._path):
                self._blobs.mkdir(parents=True, exist_ok=True)
                for digest, file in self._waiting.items():
                    file.chmod(0o644)
                    file.rename(self._blobs / digest.removeprefix("sha256:"))
                self._write(self._path / "oci-layout", _VERSION)
                self._write(self._path / "index.json", self._index(manifest))

    def _file(self, blob: Descriptor) -> Path:
        return self._blobs / blob.digest.removeprefix("sha256:")

    def _index(self, manifest: Descriptor) -> bytes:
        """The layout's index with this image in it."""
        path = self._path / "index.json"
        document: dict[str, Any] = {"schemaVersion": 2, "manifests": []}
        if path.exists():
            document = _parsed(path)
        tag = self._source.tag
        annotations = {**(manifest.annotations or {}), **({REF_NAME: tag} if tag else {})}
        entry = msgspec.structs.replace(manifest, annotations=annotations or None)
        document["manifests"] = [
            other for other in document["manifests"] if not _replaced(other, entry, tag)
        ] + [msgspec.to_builtins(entry)]
        return msgspec.json.encode(document)

    def _write(self, path: Path, data: bytes) -> None:
        new = self.workspace / path.name
        with new.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        new.rename(path)


def _make(path: Path) -> bool:
    """Make the directory, or see that it can take an image; whether it was made.

    Raises:
        InvalidManifest: there is something else in it.
    """
    with suppress(FileExistsError):
        path.mkdir(parents=True)
        return True
    if not path.is_dir() or not ((path / "oci-layout").exists() or _is_empty(path)):
        raise InvalidManifest(
            f"{path} is neither an OCI image layout nor an empty directory; choose another one"
        )
    return False


def _is_empty(path: Path) -> bool:
    """Whether there is nothing in it but what others are about to write."""
    return all(entry.name.startswith(_WORKSPACE) for entry in path.iterdir())


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Two that write into one layout must not overwrite each other's index."""
    descriptor = lock(directory, wait=True)
    try:
        yield
    finally:
        os.close(descriptor)


def _parsed(path: Path) -> dict[str, Any]:
    try:
        document = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
        entries = document["manifests"]
        if isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries):
            return document
    except (msgspec.MsgspecError, RecursionError, KeyError):
        pass
    raise InvalidManifest(f"{path} is no image index; repair the layout, or choose another")


def _replaced(other: dict[str, Any], entry: Descriptor, tag: str | None) -> bool:
    name = (other.get("annotations") or {}).get(REF_NAME)
    return name == tag if tag else name is None and other.get("digest") == entry.digest
