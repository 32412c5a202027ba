"""Where in the layers of an image the contents of a path are."""

import errno
import stat
from collections.abc import Iterator, Sequence

from store.cas import Digest
from store.errors import ImageNotFound
from store.index import read_index
from store.layers import Layer
from store.tar_names import PATH_MAX
from store.tree import Directory, Node, lower_view
from store.tree_builder import Builder

Ranges = dict[Digest, list[tuple[int, int]]]

# As the kernel's MAXSYMLINKS.
_LINKS = 40


class Contents:
    """The files of an image, all layers merged. Blocks while it reads.

    Args:
        layers: bottom first.

    Raises:
        CorruptContent: a layer's index is damaged.
        InvalidLayer: the layers don't fit together.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._diff_ids = [layer.diff_id for layer in layers]
        roots: tuple[Directory, ...] = ()  # highest first
        for position, layer in enumerate(layers):
            builder = Builder(roots, position)
            for entry in read_index(layer.index):
                builder.add(entry)
            roots = (builder.finish().root, *roots)
        self._root = _merged(roots)

    def ranges(self, path: str) -> Ranges:
        """Ranges (offset, length) of the layers' data files that hold a file, or all files below
        a directory.

        Raises:
            ImageNotFound: the image has no such path.
        """
        encoded = path.encode("utf-8", "surrogateescape")
        if len(encoded) >= PATH_MAX:
            raise ImageNotFound(
                f"a path has at most {PATH_MAX - 1} bytes", errno=errno.ENAMETOOLONG
            )
        node = self._resolve(encoded)
        if node is None:
            raise ImageNotFound(f"the image has no {path!r:.300}")
        ranges: Ranges = {}
        for file in _files(node):
            if stat.S_ISREG(file.mode) and file.size:
                place = (file.offset, file.size)
                ranges.setdefault(self._diff_ids[file.origin], []).append(place)
        return ranges

    def _resolve(self, path: bytes) -> Node | None:
        """What is at a path, through symbolic links, which never lead out of the image."""
        pending = path.split(b"/")[::-1]
        way: list[Node] = [self._root]
        links = 0
        while pending:
            part = pending.pop()
            if part in (b"", b"."):
                continue
            if part == b"..":
                del way[max(1, len(way) - 1) :]
                continue
            node = _child(way[-1], part)
            if node is None:
                return None
            if not stat.S_ISLNK(node.mode):
                way.append(node)
                continue
            links += 1
            if links > _LINKS:
                return None
            if node.link.startswith(b"/"):
                del way[1:]
            pending += node.link.split(b"/")[::-1]
        return way[-1]


def path_at(layer: Layer, offset: int) -> bytes:
    """The file of a layer whose contents are at ``offset`` in its data file; empty if there is
    none. Blocks while it reads.

    Raises:
        CorruptContent: the layer's index is damaged.
    """
    for entry in read_index(layer.index):
        # The size of a symbolic link is that of its text.
        if stat.S_ISREG(entry.mode) and 0 <= offset - entry.offset < entry.size:
            return entry.path
    return b""


def _merged(directories: tuple[Directory, ...]) -> Directory:
    """Directories of several layers, highest first, as one that has nothing of its own."""
    return Directory(stat.S_IFDIR, lowers=directories)


def _child(parent: Node, name: bytes) -> Node | None:
    if type(parent) is not Directory:
        return None
    node, directories = lower_view(parent, name)
    return _merged(directories) if directories else node


def _files(top: Node) -> Iterator[Node]:
    """All below a merged directory that is none, or ``top`` itself."""
    pending = [top]
    while pending:
        node = pending.pop()
        if type(node) is not Directory:
            yield node
            continue
        names = dict.fromkeys(name for lower in node.lowers for name in lower.children)
        pending += [child for name in names if (child := _child(node, name)) is not None]
