"""Inode numbers: one for each node that the kernel knows, given back when it forgets."""

from collections.abc import Hashable

from fs.nodes import Node

ROOT = 1


class Inodes:
    """Numbers for nodes, counted as the FUSE protocol counts lookups.

    A number is never used twice, so generation numbers are not needed. Two nodes with
    one key share a number as long as the kernel holds it.
    """

    def __init__(self, root: Node) -> None:
        self._nodes: dict[int, Node] = {ROOT: root}
        self._numbers: dict[Hashable, int] = {root.key: ROOT}
        self._lookups: dict[int, int] = {ROOT: 1}
        self._next = ROOT + 1

    def __len__(self) -> int:
        return len(self._nodes)

    def node(self, number: int) -> Node:
        """The node with this number. Raises KeyError when the kernel was never told of it."""
        return self._nodes[number]

    def known(self, key: Hashable) -> int | None:
        """The number of the node with this key, if the kernel holds one."""
        return self._numbers.get(key)

    def held(self, key: Hashable) -> list[int]:
        """All numbers of nodes with this key that the kernel holds."""
        return [number for number, node in self._nodes.items() if node.key == key]

    def number_for_listing(self, node: Node) -> int:
        """A number for a directory entry; it counts as a lookup once ``add`` is called."""
        number = self._numbers.get(node.key)
        if number is None:
            number = self._next
            self._next += 1
        return number

    def add(self, node: Node, number: int | None = None) -> int:
        """Count one lookup of the node and give its number."""
        if number is None:
            number = self.number_for_listing(node)
        # The newest node: an equal key says that it is the same object, not that what it
        # was made from has stayed the same.
        self._nodes[number] = node
        self._numbers[node.key] = number
        self._lookups[number] = self._lookups.get(number, 0) + 1
        return number

    def forget(self, number: int, count: int) -> None:
        """Take back ``count`` lookups; the last one frees the number."""
        if number == ROOT:
            return
        left = self._lookups[number] - count
        if left > 0:
            self._lookups[number] = left
            return
        node = self._nodes.pop(number)
        del self._lookups[number]
        if self._numbers.get(node.key) == number:
            del self._numbers[node.key]

    def retire(self, node: Node) -> None:
        """Whoever looks this node up from now on, or what is in it, gets other numbers: to the
        kernel what has its key is another object then."""
        gone = [key for key in self._numbers if _is_within(key, node.key)]
        for key in gone:
            del self._numbers[key]


def _is_within(key: Hashable, top: Hashable) -> bool:
    """Whether a key is ``top`` or that of something in it (``Node.identity``)."""
    while key != top:
        if not isinstance(key, tuple):
            return False
        key = key[0]
    return True
