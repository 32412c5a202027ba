"""The file tree of one layer, ready to be written as a filesystem image.

Nothing here keeps references from a child to its parent: the structures are exempt
from garbage collection (``gc=False``), which for a million of them matters.
"""

import stat
from collections.abc import Iterator

import msgspec


class Node(msgspec.Struct, gc=False):
    """An inode of the tree. ``offset`` and ``size`` are those of its content in the data file.

    ``nlink`` counts the names (for a directory, as Unix does). ``origin`` is the position of
    the layer whose data file holds the content. ``nid`` belongs to the EROFS writer.
    """

    mode: int
    uid: int = 0
    gid: int = 0
    seconds: int = 0
    nanoseconds: int = 0
    size: int = 0
    offset: int = 0
    rdev: int = 0
    link: bytes = b""
    xattrs: dict[bytes, bytes] | None = None
    nlink: int = 1
    origin: int = 0
    nid: int = 0


class Directory(Node, gc=False):
    """A directory with its names.

    ``lowers`` are the directories of lower layers that it is merged with, highest first;
    ``opaque`` means that they are hidden. ``twin`` marks one that no entry asked for: it is
    here to hold deleted names, or lower files that got another name.
    """

    children: dict[bytes, Node] = msgspec.field(default_factory=dict)
    lowers: tuple["Directory", ...] = ()
    opaque: bool = False
    twin: bool = False


class Tree(msgspec.Struct, frozen=True, gc=False):
    """A layer's finished tree.

    ``unresolved`` is a sentence about a hard link whose target is neither before it nor
    below it; empty if there is none. ``borrowed`` are nodes whose content lies in a lower
    layer's data file. ``depends`` says that the tree would be another one over
    (other) lower layers; ``root_depends``, that the root directory's attributes would.
    """

    root: Directory
    unresolved: str
    borrowed: tuple[Node, ...]
    depends: bool
    root_depends: bool


def is_whiteout(node: Node) -> bool:
    """True for a deleted name: a character device 0:0, which no layer can hold otherwise."""
    return node.mode == stat.S_IFCHR and node.rdev == 0


def lower_view(directory: Directory, name: bytes) -> tuple[Node | None, tuple[Directory, ...]]:
    """What the layers below show at ``name``, and the directories merged there.

    Follows overlayfs: the highest layer that has the name decides; directories merge down to
    the first that is opaque, or hidden by something that is none.
    """
    if directory.opaque or not directory.lowers:
        return None, ()
    merged: list[Directory] = []
    for lower in directory.lowers:
        node = lower.children.get(name)
        if node is None:
            continue
        if type(node) is not Directory:
            if merged or is_whiteout(node):
                break
            return node, ()
        merged.append(node)
        if node.opaque:
            break
    return (merged[0] if merged else None), tuple(merged)


def files_below(directory: Directory) -> Iterator[Node]:
    pending = [directory]
    while pending:
        for child in pending.pop().children.values():
            if type(child) is Directory:
                pending.append(child)
            else:
                yield child
