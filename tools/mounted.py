"""Images of a mounted tree, for commands beside its daemon: they use the tree's own files."""

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from store.cas import digest_of
from store.config import Limits
from store.errors import BlobNotFound, ImageNotFound, storage
from store.layout_writer import LayoutTarget
from store.manifest import OCI_MANIFEST, Descriptor, check_limit
from store.oci_layout import FileBlob, Layout
from store.platform import Platform, parse_platform
from store.reference import LayoutSource, parse_reference
from store.workspace import temporary_workspace
from tools import instance
from tools.instance import CommandFailed

_TAG = "image"


def find_mount(wanted: Path | None) -> Path:
    """The mountpoint of the tree that is meant.

    Raises:
        CommandFailed: none is mounted, or several are and none is named.
    """
    if wanted is not None:
        mountpoint = Path(os.path.realpath(wanted))
        if instance.at(mountpoint) is None:
            raise CommandFailed(f"no ctrfs is mounted at {mountpoint}")
        return mountpoint
    found = sorted(daemon.mountpoint for daemon in instance.living())
    if len(found) > 1:
        names = ", ".join(map(str, found))
        raise CommandFailed(f"several trees are mounted ({names}); name one with --mount")
    if not found:
        raise CommandFailed(
            "no tree is mounted that could have this image; mount one with `ctrfs mount`, or write"
            " docker:// or oci: before the name"
        )
    return found[0]


class MountedImage(Layout):
    """An image of the tree as a ``Source``; see ``mounted_image``."""

    def __init__(self, source: LayoutSource, limits: Limits, name: str) -> None:
        super().__init__(source, limits)
        self._name = name

    def open_blob(self, descriptor: Descriptor, offset: int, length: int | None = None) -> FileBlob:
        """A file below content/."""
        try:
            return super().open_blob(descriptor, offset, length)
        except BlobNotFound:
            raise BlobNotFound(
                f"the layer {descriptor.digest} of {self._name} is not all here yet; wait until"
                " the image's state is complete, or convert it from where it comes from"
            ) from None


@contextmanager
def mounted_image(
    mountpoint: Path, name: str, limits: Limits
) -> Iterator[tuple[MountedImage, Platform]]:
    """An image of the tree, and its platform.

    The tree's content/ is an image layout but for the index, so one is made around it.

    Raises:
        InvalidReference: ``name`` is no name of an image.
        ImageNotFound: the tree has none of this name.
        CommandFailed: not all of it is here, and the rest cannot be fetched.
    """
    reference = parse_reference(name)
    image = mountpoint / "images" / name
    with storage(f"reading {image}"):
        try:
            manifest = (image / "manifest.json").read_bytes()
            platform = parse_platform((image / "platform").read_text().strip())
        except (FileNotFoundError, NotADirectoryError):
            raise ImageNotFound(f"{mountpoint} has no image {reference}; pull it first") from None
    check_limit(len(manifest), limits.manifest_bytes, f"the manifest of {reference}")
    _fetch_all(image, mountpoint)
    entry = Descriptor(_media_type(manifest), digest_of(manifest), len(manifest))
    index = {"schemaVersion": 2, "manifests": [msgspec.to_builtins(entry)]}
    with closing(temporary_workspace()) as temporary:
        directory = temporary.path
        with storage(f"writing to {directory}"):
            (directory / "index.json").write_bytes(msgspec.json.encode(index))
            (directory / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
            (directory / "blobs").symlink_to(mountpoint / "content")
        yield MountedImage(LayoutSource(directory), limits, str(reference)), platform


def _fetch_all(image: Path, mountpoint: Path) -> None:
    """Bring what is missing of a lazy image."""
    try:
        descriptor = os.open(image / "fetch", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(descriptor, b"all\n")
        finally:
            os.close(descriptor)
    except OSError as error:
        raise CommandFailed(
            f"the rest of {image} cannot be fetched: {error.strerror}; the last line of"
            f" {mountpoint}/errors says why",
            errno=error.errno,
        ) from error


class _Typed(msgspec.Struct, rename="camel"):
    media_type: str = OCI_MANIFEST


def _media_type(manifest: bytes) -> str:
    """The type that the manifest gives itself; OCI's need not."""
    with suppress(msgspec.MsgspecError):
        return msgspec.json.decode(manifest, type=_Typed).media_type
    return OCI_MANIFEST


class MountedTarget:
    """A name in the tree as a ``Target``: a layout that its daemon pulls from."""

    def __init__(self, mountpoint: Path, name: str) -> None:
        self._mountpoint = mountpoint
        self._name = str(parse_reference(name))

    def __enter__(self) -> Self:
        self._directory = temporary_workspace()
        self._source = LayoutSource(self._directory.path / "layout", _TAG)
        self._layout = LayoutTarget(self._source).__enter__()
        self.workspace = self._layout.workspace
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._directory.close()

    def has(self, blob: Descriptor) -> bool:
        """The layout is empty."""
        return self._layout.has(blob)

    def put_blob(self, blob: Descriptor, path: Path) -> None:
        """See ``LayoutTarget``."""
        self._layout.put_blob(blob, path)

    def put_manifest(self, manifest: Descriptor, data: bytes) -> None:
        """Let the daemon pull what is whole now.

        Raises:
            CommandFailed: it refuses, and says why.
        """
        self._layout.put_manifest(manifest, data)
        platform = f" platform={manifest.platform}" if manifest.platform else ""
        command = f"{self._source} as={self._name}{platform}\n"
        path = self._mountpoint / "images" / "pull"
        try:
            descriptor = os.open(path, os.O_WRONLY)
            try:
                os.write(descriptor, command.encode())
            finally:
                os.close(descriptor)
        except OSError as error:
            raise CommandFailed(
                self._reason() or f"{path} did not take the image: {error.strerror}",
                errno=error.errno,
            ) from None

    def _reason(self) -> str:
        """What the tree's list of errors says about our own latest write."""
        said = f"by pid {os.getpid()} uid {os.getuid()}: "
        with suppress(OSError):
            for line in reversed((self._mountpoint / "errors").read_text().splitlines()):
                if said in line:
                    return line.partition(said)[2]
        return ""
