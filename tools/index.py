"""`ctrfs index`: make an image's ordinary layers lazy for all machines that pull it."""

import sys
from pathlib import Path

from fs.config import load
from store.cas import Digest
from store.index_image import index_image
from store.platform import parse_platform
from store.reference import RegistrySource, parse_source
from tools.convert_progress import progress
from tools.instance import CommandFailed
from tools.interruption import heed_sigterm
from tools.mounted import find_mount
from tools.places import parse_place


def run(source: str, platform: str | None, mount: Path | None, config_path: Path | None) -> Digest:
    """Index an image; the digest of what was pushed.

    Raises:
        CtrfsError: it could not be done, and nothing was pushed.
        KeyboardInterrupt: SIGINT or SIGTERM came; nothing was pushed.
    """
    heed_sigterm()
    config = load(config_path).store
    place = parse_place(source) or parse_source(_of_mounted(source, mount))
    if not isinstance(place, RegistrySource):
        raise CommandFailed("indexes are kept in registries; name an image in one, as docker://REF")
    wanted = parse_platform(platform) if platform else config.wanted_platform
    with progress(sys.stderr) as watcher:
        return index_image(place.reference, wanted, config, watcher).content


def _of_mounted(name: str, mount: Path | None) -> str:
    """Where an image of a mounted tree came from."""
    path = find_mount(mount) / "images" / name / "source"
    try:
        return path.read_text().strip()
    except (FileNotFoundError, NotADirectoryError):
        raise CommandFailed(
            f"there is no image {name}; pull it first, or write docker://REF"
        ) from None
