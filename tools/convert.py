"""`ctrfs convert`: from any place an image can be to any other, made fit for lazy loading."""

import errno
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from fs.config import load
from store.cas import Digest
from store.config import StoreConfig
from store.convert import WRITERS, convert
from store.errors import InvalidReference, LimitExceeded, storage
from store.layout_writer import LayoutTarget
from store.lazy_format import Format
from store.open_source import open_source
from store.platform import Platform, parse_platform
from store.reference import LayoutSource
from store.source import Source
from store.target import RegistryTarget, Target
from tools.convert_progress import progress
from tools.instance import CommandFailed
from tools.interruption import heed_sigterm
from tools.mounted import MountedTarget, find_mount, mounted_image
from tools.places import parse_place

# A trace has a line for each file that a workload opens; ten times a desktop's have less.
_TRACE_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Request:
    """What the user wrote; None for what was left out."""

    source: str
    target: str
    format: Format
    trace: str | None = None
    platform: str | None = None
    mount: Path | None = None
    config: Path | None = None


def run(request: Request) -> Digest:
    """Convert an image; the digest of the new manifest.

    Raises:
        CtrfsError: it could not be done, and nothing has appeared at the target.
        KeyboardInterrupt: SIGINT or SIGTERM came; nothing has appeared.
    """
    heed_sigterm()
    config = load(request.config).store
    platform = parse_platform(request.platform) if request.platform else None
    trace = _trace(request) if request.trace else []
    with ExitStack() as stack:
        source, default = stack.enter_context(_source(request, config))
        target = stack.enter_context(_target(request, config))
        watcher = stack.enter_context(progress(sys.stderr))
        manifest = convert(
            source,
            target,
            WRITERS[request.format](),
            trace,
            platform or default,
            config,
            watcher,
            request.source,
        )
    return manifest.content


@contextmanager
def _source(request: Request, config: StoreConfig) -> Iterator[tuple[Source, Platform]]:
    """The source, and the platform to choose from it unless the user says otherwise."""
    place = parse_place(request.source)
    if place is None:
        mountpoint = find_mount(request.mount)
        with mounted_image(mountpoint, request.source, config.limits) as found:
            yield found
        return
    source = open_source(place, config)
    try:
        yield source, config.wanted_platform
    finally:
        source.close()


def _target(request: Request, config: StoreConfig) -> Target:
    place = parse_place(request.target)
    if isinstance(place, LayoutSource):
        return LayoutTarget(place)
    if place is None:
        return MountedTarget(find_mount(request.mount), request.target)
    if place.reference.digest:
        raise InvalidReference(
            f"{request.target} names what is there already; give the new image a tag"
        )
    return RegistryTarget(place.reference, config)


def _trace(request: Request) -> list[bytes]:
    """The paths that a container opened, or those in a file."""
    text = request.trace or ""
    if "/" in text:
        path, missing = Path(text), f"there is no file {text}"
    else:
        mountpoint = find_mount(request.mount)
        path = mountpoint / "containers" / text / "opened"
        missing = f"{mountpoint} has no container {text}; a file must be given with a slash"
    with storage(f"reading {path}"):
        try:
            with path.open("rb") as file:
                data = file.read(_TRACE_BYTES + 1)
        except FileNotFoundError:
            raise CommandFailed(missing, errno=errno.ENOENT) from None
    if len(data) > _TRACE_BYTES:
        raise LimitExceeded(f"{path} has more than {_TRACE_BYTES} bytes, which no trace has")
    if not data.strip():
        raise CommandFailed(f"{path} names no files, so there is nothing to put first")
    return [line for line in data.split(b"\n") if line]
