"""What follows from a layer's entries alone: its EROFS image, and what its record says."""

from collections.abc import Iterable
from typing import BinaryIO

import msgspec

from store.erofs import write_image
from store.errors import InvalidLayer
from store.index import Entry
from store.tree import Tree
from store.tree_builder import Builder


class Frame(msgspec.Struct, frozen=True):
    """What an image says of a layer besides its files: the size of the data files in bytes, 16
    bytes to tell images apart, and the cuts of the data files."""

    data_size: int
    identity: bytes
    cuts: tuple[int, ...] = ()


class Description(msgspec.Struct, frozen=True, tag=True):
    """``inodes`` with distinct numbers; the others as in ``layers.LayerRecord``."""

    inodes: int
    depends: bool
    root_depends: bool
    needs_lower: str


def build_tree(entries: Iterable[Entry], max_inodes: int) -> tuple[Tree, str]:
    """A layer's tree as it is without lower layers, and why it needs some if it does.

    Raises:
        InvalidLayer, LimitExceeded: the entries make no sense, or are too many.
    """
    builder = Builder(max_inodes=max_inodes)
    needs_lower = ""
    for entry in entries:
        try:
            builder.add(entry)
        except InvalidLayer as error:
            if not builder.depends:
                raise
            needs_lower = error.sentence  # may be right over lower layers
            break
    tree = builder.finish()
    return tree, needs_lower or tree.unresolved


def describe(tree: Tree, needs_lower: str, meta: BinaryIO, frame: Frame) -> Description:
    """Write the image of a tree that ``build_tree`` made.

    Args:
        meta: an empty file.
    """
    facts = write_image(tree.root, meta, frame.data_size, frame.identity, frame.cuts)
    meta.flush()
    return Description(facts.inodes, tree.depends, tree.root_depends, needs_lower)
