"""Builds the file tree of one layer from its entries, alone or over the layers below.

A layer's archive says less than a mountable layer must: it may leave out parent
directories (they keep the attributes that lower layers gave them), delete names that
do not exist, link to files of lower layers, or name a file below a symbolic link. So
the same entries can mean different trees over different lower layers. The rules are
those of umoci and of the OCI image specification ("layer.md"):

- Later entries replace earlier ones; a directory entry for an existing directory
  only changes its attributes.
- ``.wh.NAME`` and ``.wh..wh..opq`` hide what lower layers have, never what this layer has,
  wherever in the archive they stand. Other names that begin with ``.wh..wh.`` are
  left-overs of aufs and ignored with all below them.
- Missing parents are made; a parent that is a symbolic link is followed inside the tree,
  with the root as ``/`` and as its own ``..``. So no entry leads out of the layer, whatever
  links it goes through: there is no real directory involved.
"""

import stat

import msgspec

from store.errors import InvalidLayer, LimitExceeded
from store.index import Entry
from store.tar_names import NAME_MAX, shown
from store.tree import Directory, Node, Tree, files_below, lower_view

WHITEOUT_PREFIX = b".wh."
OPAQUE_MARKER = b".wh..wh..opq"
_RESERVED_PREFIX = b".wh..wh."

# As the kernel (path_resolution(7)); and no path or chain of links that anyone uses has
# more components than this, while a hostile one could cost hours.
_MAX_LINKS = 40
_MAX_STEPS = 4096

# Paths of directories that are kept to find parents at once.
_MAX_KNOWN = 20_000


class Builder:
    """Applies a layer's entries in order.

    Args:
        lowers: roots of the trees of the layers below, highest first.
        position: which layer of its image this is, 0 the lowest.
        max_inodes: LimitExceeded above this many, made-up parents included.
    """

    def __init__(
        self, lowers: tuple[Directory, ...] = (), position: int = 0, max_inodes: int = 1 << 31
    ) -> None:
        self._position = position
        self._room = max_inodes
        self._max_inodes = max_inodes
        self._unresolved = ""
        self._borrowed: list[Node] = []
        # Names that lower layers have, made here only since another name was linked to them.
        self._lent: dict[tuple[int, bytes], tuple[Directory, Node]] = {}
        self._whiteout = Node(stat.S_IFCHR, nlink=0)
        self._whiteouts: list[tuple[Directory, bytes]] = []
        # Whether the tree so far would be another one over other lower layers.
        self.depends = False
        self._root_depends = True
        self._root = _implied(lowers, Entry(b"", 0))
        # Directories by the names that entries called them.
        self._known: dict[bytes, Directory] = {b"": self._root}

    def add(self, entry: Entry) -> None:
        """Apply one entry. Raises InvalidLayer or LimitExceeded."""
        path = entry.path
        parent_path, _, name = path.rpartition(b"/")
        if b".wh." in path and self._apply_marker(entry, parent_path, name):
            return
        if not name:
            self._set_root(entry)
            return
        parent = self._known.get(parent_path)
        if parent is None:
            parent = self._find(parent_path, entry)
        if stat.S_ISDIR(entry.mode):
            self._add_directory(parent, name, entry)
        elif entry.mode:
            self._add_file(parent, name, entry)
        else:
            self._add_link(parent, name, entry)

    def finish(self) -> Tree:
        """The tree; the builder must not be used after that."""
        if self._root.opaque:
            self._hide_below_root()
        for directory, name in self._whiteouts:
            if directory.children.get(name) is self._whiteout:
                if lower_view(directory, name)[0] is None:
                    del directory.children[name]
                else:
                    self._whiteout.nlink += 1
        return Tree(
            self._root,
            self._unresolved,
            tuple(self._borrowed),
            self.depends,
            self._root_depends,
        )

    # --- kinds of entries -----------------------------------------------------------

    def _apply_marker(self, entry: Entry, parent_path: bytes, name: bytes) -> bool:
        """Apply a whiteout or an opaque marker; False when the entry is neither."""
        if name == OPAQUE_MARKER:
            self.depends = True
            directory = self._find_existing(parent_path, entry)
            if directory is not None:
                self._hide_lowers(directory)
            return True
        if any(part.startswith(_RESERVED_PREFIX) for part in entry.path.split(b"/")):
            return True
        if not name.startswith(WHITEOUT_PREFIX):
            return False
        name = name[len(WHITEOUT_PREFIX) :]
        if name in (b"", b".", b".."):
            raise InvalidLayer(
                f"{shown(entry.path)} in the layer marks no name as deleted; do not use this image"
            )
        self.depends = True
        directory = self._find_existing(parent_path, entry)
        if directory is not None:
            self._hide(directory, name)
        return True

    def _hide(self, directory: Directory, name: bytes) -> None:
        existing = directory.children.get(name)
        if existing is None:
            self._cover(directory, name)
            directory.children[name] = self._whiteout
            self._whiteouts.append((directory, name))
        elif self._is_only_below(directory, name, existing):
            self._discard(directory, existing)
            del directory.children[name]
            self._hide(directory, name)
        elif type(existing) is Directory:
            self._hide_lowers(existing)

    def _hide_lowers(self, directory: Directory) -> None:
        """Make a directory opaque; those in it are then merged with nothing."""
        if directory.opaque:
            return
        directory.opaque = True
        self._forget()
        pending = [directory]
        while pending:
            parent = pending.pop()
            for name, child in list(parent.children.items()):
                if self._is_only_below(parent, name, child):
                    self._discard(parent, child)
                    del parent.children[name]
                elif type(child) is Directory and child.lowers:
                    child.lowers = ()
                    pending.append(child)

    def _is_only_below(self, directory: Directory, name: bytes, node: Node) -> bool:
        """True when the name is here only as a copy of a lower layer's."""
        if type(node) is Directory:
            return node.twin
        lent = self._lent.get((id(directory), name))
        return lent is not None and lent[1] is node

    def _hide_below_root(self) -> None:
        """Hide each name below: overlayfs does not look whether a root is opaque."""
        root = self._root
        root.opaque = False
        for name in sorted({name for lower in root.lowers for name in lower.children}):
            existing = root.children.get(name)
            if existing is None:
                self._hide(root, name)
            elif type(existing) is Directory:
                existing.opaque = True
                existing.lowers = lower_view(root, name)[1]

    def _set_root(self, entry: Entry) -> None:
        if not stat.S_ISDIR(entry.mode):
            raise InvalidLayer(
                "the layer's entry for its root '/' is not a directory; do not use this image"
            )
        _set_attributes(self._root, entry)
        self._root_depends = False

    def _add_file(self, parent: Directory, name: bytes, entry: Entry) -> None:
        self._count(name, entry)
        node = Node(
            entry.mode,
            entry.uid,
            entry.gid,
            entry.seconds,
            entry.nanoseconds,
            entry.size,
            entry.offset,
            entry.rdev,
            entry.link,
            entry.xattrs,
            0,
            self._position,
        )
        self._put(parent, name, node)

    def _add_link(self, parent: Directory, name: bytes, entry: Entry) -> None:
        target = self._link_target(entry)
        if target is not None and parent.children.get(name) is not target:
            self._put(parent, name, target)

    def _put(self, parent: Directory, name: bytes, node: Node) -> None:
        """Give a name to a node that is no directory."""
        existing = parent.children.get(name)
        if existing is not None:
            self._discard(parent, existing)
        elif parent.lowers:
            self._cover(parent, name)
        node.nlink += 1
        parent.children[name] = node

    def _add_directory(self, parent: Directory, name: bytes, entry: Entry) -> None:
        existing = parent.children.get(name)
        if type(existing) is Directory:
            _set_attributes(existing, entry)
            existing.twin = False
            return
        self._count(name, entry)
        directory = Directory(entry.mode, nlink=2)
        _set_attributes(directory, entry)
        self._put_directory(parent, name, directory)
        self._remember(entry.path, directory)

    def _put_directory(self, parent: Directory, name: bytes, directory: Directory) -> None:
        existing = parent.children.get(name)
        directory.lowers = lower_view(parent, name)[1]
        if existing is not None:  # which had hidden what lower layers have here
            directory.opaque = True
            self.depends = True
            self._discard(parent, existing)
        else:
            self._cover(parent, name)
        parent.children[name] = directory
        parent.nlink += 1

    def _link_target(self, entry: Entry) -> Node | None:
        """The node that a hard link entry names; None when it isn't to be found."""
        parent_path, _, name = entry.link.rpartition(b"/")
        parent = self._find_existing(parent_path, entry)
        target: Node | None = None
        if parent is not None:
            target = parent.children.get(name) if name else parent
            if target is None:
                target = self._borrow(parent, name, entry)
        if target is None or target is self._whiteout:
            self.depends = True
            self._unresolved = self._unresolved or (
                f"{shown(entry.path)} in the layer is a hard link to {shown(entry.link)}, which is "
                "neither before it in the layer nor below that; the image has to be built again"
            )
            return None
        if type(target) is Directory:
            raise InvalidLayer(
                f"{shown(entry.path)} in the layer is a hard link to the directory "
                f"{shown(entry.link)}; only files can have hard links"
            )
        return target

    def _borrow(self, parent: Directory, name: bytes, entry: Entry) -> Node | None:
        """Take a lower layer's file into this layer, as overlayfs does when one links to it."""
        below = lower_view(parent, name)[0]
        if below is None or type(below) is Directory:
            return below
        self._count(name, entry)
        node = msgspec.structs.replace(below, nlink=1, nid=0)
        if stat.S_ISREG(node.mode) and node.size:
            self._borrowed.append(node)
        parent.children[name] = node
        self._lent[id(parent), name] = parent, node
        return node

    # --- names ----------------------------------------------------------------------

    def _find(self, path: bytes, entry: Entry) -> Directory:
        """The directory, made if it doesn't exist."""
        directory = self._walk(path, entry, make=True)
        assert directory is not None
        return directory

    def _find_existing(self, path: bytes, entry: Entry) -> Directory | None:
        """The directory if this layer or one below has it."""
        return self._known.get(path) or self._walk(path, entry, make=False)

    def _walk(self, path: bytes, entry: Entry, *, make: bool) -> Directory | None:
        """Follow a path component by component, through symbolic links, inside the tree.

        Directories that only lower layers have get a twin in this layer.
        """
        stack = [self._root]
        pending = path.split(b"/")[::-1]
        links = steps = 0
        while pending:
            name = pending.pop()
            steps += 1
            if name == b"..":
                del stack[max(1, len(stack) - 1) :]
                continue
            if name in (b"", b"."):
                continue
            node = self._step(stack[-1], name, entry, make=make)
            if node is None:
                return None
            if type(node) is Directory:
                stack.append(node)
                continue
            if not stat.S_ISLNK(node.mode):
                if not make:
                    return None
                raise InvalidLayer(
                    f"{shown(entry.path)} in the layer leads through {shown(name)}, which is not "
                    "a directory; do not use this image"
                )
            links += 1
            if links > _MAX_LINKS or steps > _MAX_STEPS:
                raise InvalidLayer(
                    f"{shown(entry.path)} in the layer leads through too many symbolic links; "
                    "do not use this image"
                )
            if node.link.startswith(b"/"):
                del stack[1:]
            pending.extend(node.link.split(b"/")[::-1])
        if make:
            self._remember(path, stack[-1])
        return stack[-1]

    def _step(self, parent: Directory, name: bytes, entry: Entry, *, make: bool) -> Node | None:
        """What ``name`` is in a directory of the merged tree."""
        existing = parent.children.get(name)
        if existing is not None and existing is not self._whiteout:
            if make and type(existing) is Directory:
                existing.twin = False
            return existing
        self.depends = True
        below, merged = (None, ()) if existing else lower_view(parent, name)
        if below is not None and not merged:
            return below
        if below is None and not make:
            return None
        self._count(name, entry)
        directory = _implied(merged, entry)
        directory.twin = not make
        self._put_directory(parent, name, directory)
        return directory

    def _remember(self, path: bytes, directory: Directory) -> None:
        # One layer has few directories, but may call them by any number of long names.
        if len(self._known) >= _MAX_KNOWN:
            self._forget()
        self._known[path] = directory

    def _forget(self) -> None:
        self._known = {b"": self._root}

    def _cover(self, parent: Directory, name: bytes) -> None:
        """A name that only lower layers had so far is about to get a node here."""
        below = lower_view(parent, name)[0]
        if below is not None and stat.S_ISLNK(below.mode):
            self._forget()  # paths may have led through that link

    def _discard(self, parent: Directory, node: Node) -> None:
        """A name of ``node`` in ``parent`` is about to be given to another node."""
        if node is self._whiteout:
            return
        if type(node) is Directory:
            parent.nlink -= 1
            for inner in files_below(node):
                inner.nlink -= 1
            self._forget()
        else:
            node.nlink -= 1
            if stat.S_ISLNK(node.mode):
                self._forget()

    def _count(self, name: bytes, entry: Entry) -> None:
        if len(name) > NAME_MAX:
            raise InvalidLayer(
                f"{shown(entry.path)} in the layer has a name of {len(name)} bytes; Linux allows "
                f"{NAME_MAX}"
            )
        self._room -= 1
        if self._room < 0:
            raise LimitExceeded(
                f"the layer has more than {self._max_inodes} files and directories; "
                "raise the limit in the store's configuration if you trust the image"
            )


def _implied(lowers: tuple[Directory, ...], entry: Entry) -> Directory:
    """A directory that the archive doesn't list: as it is below, else 0755 root:root.

    It then gets the time of the entry that needs it, which at least is no invention.
    """
    if not lowers:
        return Directory(
            stat.S_IFDIR | 0o755,
            seconds=entry.seconds,
            nanoseconds=entry.nanoseconds,
            nlink=2,
        )
    model = lowers[0]
    return Directory(
        model.mode,
        model.uid,
        model.gid,
        model.seconds,
        model.nanoseconds,
        xattrs=model.xattrs,
        nlink=2,
        lowers=lowers,
    )


def _set_attributes(directory: Directory, entry: Entry) -> None:
    directory.mode = entry.mode
    directory.uid = entry.uid
    directory.gid = entry.gid
    directory.seconds = entry.seconds
    directory.nanoseconds = entry.nanoseconds
    directory.xattrs = entry.xattrs
