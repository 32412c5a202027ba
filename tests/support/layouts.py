"""Tiny images as OCI layouts, made of any bytes: right ones, and wrong ones on purpose."""

import gzip
import hashlib
import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import zstandard

GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"
ZSTD = "application/vnd.oci.image.layer.v1.tar+zstd"
PLAIN = "application/vnd.oci.image.layer.v1.tar"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"

Descriptor = dict[str, Any]


def sha256(data: bytes) -> str:
    """A digest as it stands in documents."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def tar_of(files: dict[str, bytes]) -> bytes:
    """An archive with these files, and directories for those whose names end with a slash."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name.rstrip("/"))
            member.mode = 0o755
            member.size = len(data)
            member.type = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def compress(archive: bytes, media_type: str) -> bytes:
    """The blob of a layer."""
    if media_type == GZIP:
        return gzip.compress(archive, 1, mtime=0)
    return zstandard.compress(archive) if media_type == ZSTD else archive


class OciLayout:
    """An OCI image layout under construction in ``path``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: list[Descriptor] = []
        self._blobs = path / "blobs" / "sha256"
        self._blobs.mkdir(parents=True)
        (path / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
        self.write_index()

    def write_index(self) -> None:
        """Write index.json anew."""
        document = {"schemaVersion": 2, "manifests": self.entries}
        (self.path / "index.json").write_text(json.dumps(document))

    def blob_path(self, descriptor: Descriptor) -> Path:
        """Where a blob is."""
        return self._blobs / str(descriptor["digest"]).removeprefix("sha256:")

    def blob(self, data: bytes, media_type: str) -> Descriptor:
        """Add a blob."""
        descriptor = {"mediaType": media_type, "digest": sha256(data), "size": len(data)}
        self.blob_path(descriptor).write_bytes(data)
        return descriptor

    def document(self, content: dict[str, Any], media_type: str) -> Descriptor:
        """Add a JSON document."""
        return self.blob(json.dumps(content).encode(), media_type)

    def manifest(
        self,
        layers: list[Descriptor],
        diff_ids: list[str],
        architecture: str = "amd64",
        container: dict[str, Any] | None = None,
        **more: Any,
    ) -> Descriptor:
        """Add a manifest and its configuration."""
        config = {
            "architecture": architecture,
            "os": "linux",
            "config": container or {"Cmd": ["/bin/sh"]},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        }
        content = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": self.document(config, CONFIG),
            "layers": layers,
            **more,
        }
        return self.document(content, MANIFEST)

    def index(self, *manifests: Descriptor) -> Descriptor:
        """Add an index."""
        content = {"schemaVersion": 2, "mediaType": INDEX, "manifests": list(manifests)}
        return self.document(content, INDEX)

    def image(self, *archives: bytes, kind: str = GZIP, **more: Any) -> Descriptor:
        """Add an image whose layers are these archives, bottom first."""
        layers = [self.blob(compress(archive, kind), kind) for archive in archives]
        return self.manifest(layers, [sha256(archive) for archive in archives], **more)

    def tag(self, name: str, descriptor: Descriptor) -> None:
        """Name an image in index.json."""
        annotations = {"org.opencontainers.image.ref.name": name}
        self.entries.append({**descriptor, "annotations": annotations})
        self.write_index()


def busybox_layout(path: Path, tag: str = "latest") -> OciLayout:
    """A layout with one image that can run: the machine's own static busybox as /bin/sh."""
    layout = OciLayout(path)
    busybox = Path(shutil.which("busybox") or "/bin/busybox").read_bytes()
    layout.tag(tag, layout.image(tar_of({"bin/": b"", "bin/sh": busybox, "etc/": b""})))
    return layout
