"""mount(2) and umount2(2) for tests, without a program or a daemon in between."""

import ctypes
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from store.layers import LayerImage

_libc = ctypes.CDLL(None, use_errno=True)

_MS_RDONLY = 1
_MNT_DETACH = 2


@contextmanager
def mounted(source: str, target: Path, kind: str, options: str, flags: int = 0) -> Iterator[Path]:
    """A mount for the time of the block. Raises OSError."""
    target.mkdir(parents=True, exist_ok=True)
    result = _libc.mount(
        os.fsencode(source), os.fsencode(target), kind.encode(), flags, options.encode()
    )
    if result:
        number = ctypes.get_errno()
        raise OSError(number, f"mount -t {kind} -o {options}: {os.strerror(number)}")
    try:
        yield target
    finally:
        _libc.umount2(os.fsencode(target), _MNT_DETACH)


@contextmanager
def mounted_image(image: LayerImage, target: Path) -> Iterator[Path]:
    """One layer's EROFS image with its data files."""
    paths = image.data.paths if image.data else ()
    options = ",".join(f"device={path}" for path in paths)
    with mounted(str(image.meta), target, "erofs", options, _MS_RDONLY) as path:
        yield path


@contextmanager
def mounted_stack(images: Sequence[LayerImage], directory: Path) -> Iterator[Path]:
    """Layers merged as a container sees them, bottom first; mounts go below ``directory``."""
    with ExitStack() as stack:
        paths = [
            stack.enter_context(mounted_image(image, directory / f"layer{number}"))
            for number, image in enumerate(images)
        ]
        if len(paths) == 1:
            yield paths[0]
            return
        lower = ":".join(map(str, reversed(paths)))
        yield stack.enter_context(
            mounted("overlay", directory / "merged", "overlay", f"lowerdir={lower}", _MS_RDONLY)
        )
