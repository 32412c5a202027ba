"""Another implementation's opinion: layers unpacked by umoci."""

import gzip
import hashlib
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

_OCI = "application/vnd.oci.image"


def umoci_unpack(archives: Sequence[bytes], directory: Path) -> Path:
    """Make an OCI layout of tar archives (bottom first), let umoci unpack it; the root filesystem.

    Args:
        directory: an empty or missing directory for layout and bundle.

    Raises:
        subprocess.CalledProcessError: umoci refuses the image.
    """
    layout = directory / "layout"
    blobs = layout / "blobs" / "sha256"
    blobs.mkdir(parents=True)

    def put(data: bytes, kind: str) -> dict[str, object]:
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        return {"mediaType": kind, "digest": f"sha256:{digest}", "size": len(data)}

    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {},
        "rootfs": {
            "type": "layers",
            "diff_ids": [f"sha256:{hashlib.sha256(data).hexdigest()}" for data in archives],
        },
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": f"{_OCI}.manifest.v1+json",
        "config": put(json.dumps(config).encode(), f"{_OCI}.config.v1+json"),
        "layers": [put(gzip.compress(data, 1), f"{_OCI}.layer.v1.tar+gzip") for data in archives],
    }
    descriptor = put(json.dumps(manifest).encode(), f"{_OCI}.manifest.v1+json")
    descriptor["annotations"] = {"org.opencontainers.image.ref.name": "test"}
    (layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [descriptor]}))
    (layout / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    bundle = directory / "bundle"
    subprocess.run(
        ["umoci", "unpack", "--image", f"{layout}:test", bundle], check=True, capture_output=True
    )
    return bundle / "rootfs"
