"""The images of the benchmarks of lazy loading: made, pushed and converted once, then kept."""

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tools.images import debian_layout, debian_tree, run
from tools.links import loopback
from tools.opened import opened_files

_PYTHON = ("python3", "python3-numpy")
_TOOLCHAINS = ("gcc", "g++", "clang", "llvm-14-dev", "libclang-14-dev", "golang-1.19", "rustc",
               "python3-scipy", "python3-pandas", "python3-matplotlib")  # fmt: skip
# Name in the cache of trees, and packages, by compressed megabytes.
_IMAGES = {
    "85": ("python", *_PYTHON),
    "150": ("python-gcc", *_PYTHON, "gcc"),
    "800": ("toolchains", *_PYTHON, *_TOOLCHAINS),
}
SIZES = tuple(_IMAGES)

# As pushed by those who know of nothing else.
ORDINARY = "gzip"
ESTARGZ = "estargz"
FORMATS = (ESTARGZ, "zstd:chunked", ORDINARY)

PRINT = ("python3", "-c", "print(1)")
NUMPY = ("python3", "-c", "import numpy")
WORKLOADS = {"print": PRINT, "numpy": NUMPY}


@dataclass(frozen=True, slots=True)
class Shelf:
    """A registry's content in a directory.

    Attributes:
        work: has the content in `registry`; it can be used again and again.
        scratch: for what is needed for the time of a conversion.
        traced: convert with the files first that this one of WORKLOADS opens; empty: as they are.
    """

    work: Path
    scratch: Path
    traced: str = ""

    @property
    def data(self) -> Path:
        """The registry's content."""
        return self.work / "registry"

    def name(self, size: str, form: str) -> str:
        """The reference of an image without its host."""
        traced = f"-{self.traced}" if self.traced and form != ORDINARY else ""
        return f"bench/{size}:{form.replace(':', '-')}{traced}"

    def provide(self, size: str, form: str) -> None:
        """Make, push and convert what is not there yet."""
        if form != ORDINARY:
            self.provide(size, ORDINARY)
        if self._tag(size, form).exists():
            return
        print(f"Making the image of {size} MB, {form} …", file=sys.stderr)
        with (
            tempfile.TemporaryDirectory(dir=self.scratch) as place,
            loopback(self.data, Path(place) / "registry") as link,
        ):
            target = f"docker://{link.host}/{self.name(size, form)}"
            if form == ORDINARY:
                run("skopeo", "--insecure-policy", "copy", "--dest-tls-verify=false",
                    f"oci:{layout(size)}:latest", target)  # fmt: skip
                return
            options: tuple[str, ...] = ()
            if self.traced:
                trace = Path(place) / "trace"
                opened = opened_files(tree(size), *WORKLOADS[self.traced])
                trace.write_text("".join(f"/{path}\n" for path in opened))
                options = ("--trace", str(trace))
            source = f"docker://{link.host}/{self.name(size, ORDINARY)}"
            convert(source, target, form, *options)

    def layers(self, size: str, form: str) -> list[Path]:
        """The registry's files with the layers of an image, the lowest first."""
        manifest = self._blob(self._tag(size, form).read_text())
        layers = json.loads(manifest.read_bytes())["layers"]
        return [self._blob(layer["digest"]) for layer in layers]

    def _tag(self, size: str, form: str) -> Path:
        """The file that has the digest of an image."""
        name, _, tag = self.name(size, form).partition(":")
        return self._content / "repositories" / name / "_manifests/tags" / tag / "current/link"

    def _blob(self, digest: str) -> Path:
        algorithm, _, encoded = digest.partition(":")
        return self._content / "blobs" / algorithm / encoded[:2] / encoded / "data"

    @property
    def _content(self) -> Path:
        return self.data / "docker/registry/v2"


def layout(size: str) -> Path:
    """The ordinary image as an OCI layout, tag `latest`."""
    return debian_layout(*_IMAGES[size])


def tree(size: str) -> Path:
    """The image's files, unpacked."""
    return debian_tree(*_IMAGES[size])


def convert(source: str, target: str, form: str, *options: str) -> None:
    """`ctrfs convert`."""
    command = (sys.executable, "-m", "tools.ctrfs", "convert", source, target)
    run(*command, "--format", form, *options)
