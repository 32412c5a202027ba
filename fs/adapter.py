"""Between the kernel and the nodes: pyfuse3's requests in terms of nodes and handles.

Written once for all files; knows nothing of containers or images. What it adds is what
the protocol needs: inode numbers, open handles, errno, interruption, poll, and the
record of what failed.
"""

import errno
import logging
import os
import stat
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import NoReturn

import pyfuse3
import trio
from pyfuse3 import (
    EntryAttributes,
    FileHandleT,
    FileInfo,
    FileNameT,
    FlagT,
    FUSEError,
    InodeT,
    ModeT,
    PollHandle,
    ReaddirToken,
    RequestContext,
    SetattrFields,
)

from fs.automount import Automounts
from fs.failures import Failures
from fs.handles import DocumentHandle, Handle
from fs.inodes import Inodes
from fs.interrupts import Interrupts
from fs.nodes import Caller, CommandFile, Directory, File, Link, Mountpoint, Node
from store.errors import CtrfsError

log = logging.getLogger(__name__)

# pyfuse3 handles this many requests at once; the next waits. Blocked readers count, so
# it must exceed all that may ever wait; a waiting task costs about 10 kB.
MAX_REQUESTS = 10_000

NAME_MAX = 255

# To look for what is not there, or not any more, is no failure to keep for anybody.
QUIET = frozenset({"lookup", "stat", "list", "readlink"})

# Operations that were meant to change something.
COMMANDS = frozenset({"write", "close", "change", "mkdir", "rmdir", "rename"})

# One user's blocked readers must leave room for everybody else's requests.
MAX_READS_PER_USER = 1000


@dataclass(slots=True)
class _Open:
    """A handle with what the adapter must remember from open(2)."""

    inode: InodeT
    node: Node
    handle: Handle
    caller: Caller
    poll_wanted: PollHandle | None = None
    poller: trio.CancelScope | None = None
    closed: bool = False


@dataclass(slots=True)
class _Listing:
    """An open directory: its node, and its entries as they were at the first read."""

    node: Directory
    caller: Caller
    names: list[str] = field(default_factory=list)


class _Attempt:
    """Runs an operation that may fail or wait: records failures, honours interruption.

    Leaving it always ends in the body's own result or in FUSEError.
    """

    __slots__ = (
        "_caller",
        "_data",
        "_failures",
        "_interrupts",
        "_name",
        "_node",
        "_operation",
        "_scope",
    )

    def __init__(
        self,
        failures: Failures,
        interrupts: Interrupts,
        operation: str,
        node: Node,
        caller: Caller,
        name: str,
        data: bytes,
    ) -> None:
        self._failures = failures
        self._interrupts = interrupts
        self._operation = operation
        self._node = node
        self._caller = caller
        self._name = name
        self._data = data

    async def __aenter__(self) -> None:
        self._scope = self._interrupts.watch(self._caller.pid, self._node)
        self._scope.__enter__()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._interrupts.done(self._scope)
        self._scope.__exit__(kind, error, trace)
        if self._scope.cancelled_caught:
            if self._operation in COMMANDS:
                self._add(errno.EINTR, "a signal interrupted it before it was done")
            raise FUSEError(errno.EINTR)
        if isinstance(error, Exception) and not isinstance(error, FUSEError):
            raise FUSEError(self._record(error)) from error

    def _record(self, error: Exception) -> int:
        if isinstance(error, CtrfsError):
            code, sentence = error.errno, error.sentence
        elif isinstance(error, BlockingIOError):
            return errno.EAGAIN
        elif isinstance(error, OSError):
            code, sentence = error.errno or errno.EIO, error.strerror or str(error)
        else:
            log.error(
                "%s of /%s failed unexpectedly", self._operation, self._node.path, exc_info=error
            )
            code, sentence = errno.EIO, "internal error; the daemon's log has the details"
        if self._operation in QUIET and code in (errno.ENOENT, errno.ESTALE):
            return code
        self._add(code, sentence)
        if self._operation in COMMANDS:
            self._node.failed(sentence)
        return code

    def _add(self, code: int, sentence: str) -> None:
        path = f"{self._node.path}/{self._name}".strip("/")
        # What only root may read is not shown to others by way of an error.
        shown = self._data if self._node.mode & 0o004 else b""
        self._failures.add(path, self._operation, self._caller, code, sentence, shown)


class Adapter(pyfuse3.Operations):
    """pyfuse3's view of a tree of nodes.

    Args:
        root: the root directory.
        failures: where failed operations are recorded.
        automounts: mounts what Mountpoint nodes stand for.
        nursery: lives as long as the mount; runs what waits on behalf of poll(2).
    """

    supports_dot_lookup = False
    enable_writeback_cache = False

    def __init__(
        self,
        root: Directory,
        failures: Failures,
        automounts: Automounts,
        nursery: trio.Nursery,
    ) -> None:
        super().__init__()
        self.inodes = Inodes(root)
        self.interrupts = Interrupts(self.inodes)
        self._failures = failures
        self._automounts = automounts
        self._nursery = nursery
        self._open: dict[int, _Open] = {}
        self._listings: dict[int, _Listing] = {}
        self._reads: Counter[int] = Counter()
        self._busy: set[int] = set()  # inodes that are written; the kernel lets one in at a time
        self._next_handle = 1

    # --- failures ------------------------------------------------------------------

    def _attempt(
        self,
        operation: str,
        node: Node,
        ctx: RequestContext | Caller,
        name: str = "",
        data: bytes = b"",
    ) -> "_Attempt":
        caller = ctx if isinstance(ctx, Caller) else _caller(ctx)
        return _Attempt(self._failures, self.interrupts, operation, node, caller, name, data)

    # --- names and attributes ------------------------------------------------------

    def _node(self, inode: int) -> Node:
        try:
            return self.inodes.node(inode)
        except KeyError:
            raise FUSEError(errno.ESTALE) from None

    def _directory(self, inode: int) -> Directory:
        node = self._node(inode)
        if not isinstance(node, Directory):
            raise FUSEError(errno.ENOTDIR)
        return node

    async def _attributes(
        self, node: Node, number: int, *, listing: bool = False
    ) -> EntryAttributes:
        """What stat(2) shows; in a listing without sizes that take work to know, because the
        kernel will ask again for those (their timeout is 0)."""
        size = None if listing else await node.slow_size()
        entry = EntryAttributes()
        entry.st_ino = InodeT(number)
        entry.st_mode = ModeT(node.file_type | node.mode)
        entry.st_nlink = 2 if node.file_type == stat.S_IFDIR else 1
        entry.st_uid = entry.st_gid = 0
        entry.st_size = node.size() if size is None else size
        entry.st_blocks = (entry.st_size + 511) // 512
        entry.st_mtime_ns = entry.st_ctime_ns = entry.st_atime_ns = node.mtime_ns()
        entry.entry_timeout = node.entry_timeout
        entry.attr_timeout = node.attr_timeout
        return entry

    async def _child_attributes(self, node: Node) -> EntryAttributes:
        """Attributes of a node that the kernel learns of by this reply."""
        number = self.inodes.add(node)
        try:
            return await self._attributes(node, number)
        except BaseException:
            self.inodes.forget(number, 1)
            raise

    async def lookup(
        self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext
    ) -> EntryAttributes:
        """Find an entry; inside an automount, have the kernel go there instead."""
        parent = self._directory(parent_inode)
        async with self._attempt("lookup", parent, ctx):
            await self._enter(parent)
            child = parent.lookup(_text(name))
            if child is None:
                raise FUSEError(errno.ENOENT)
            if isinstance(child, CommandFile) and self._is_written(child):
                self.inodes.retire(child)  # each who comes now gets one, since all may write
            return await self._child_attributes(child)

    def _is_written(self, node: Node) -> bool:
        return any(self._node(inode).key == node.key for inode in self._busy)

    async def forget(self, inode_list: Sequence[tuple[InodeT, int]]) -> None:
        """The kernel gives numbers back."""
        for number, count in inode_list:
            self.inodes.forget(number, count)

    async def getattr(self, inode: InodeT, ctx: RequestContext) -> EntryAttributes:
        """stat(2)."""
        node = self._node(inode)
        async with self._attempt("stat", node, ctx):
            await self._enter(node)
            return await self._attributes(node, inode)

    def changed(self, directory: Directory) -> None:
        """Have the kernel ask anew for the attributes of the files declared for a directory."""
        for key in directory.declared_keys():
            number = self.inodes.known(key)
            if number is not None:
                # The kernel may have dropped the inode, and say so (FORGET) only after this.
                with suppress(FileNotFoundError):
                    pyfuse3.invalidate_inode(InodeT(number), attr_only=True)

    async def _enter(self, node: Node) -> None:
        """Mount what belongs at an automount and send the caller around again.

        ESTALE makes the kernel repeat the whole path walk (retry_estale in fs/namei.c),
        which then crosses into the new mount.
        """
        if isinstance(node, Mountpoint):
            await self._automounts.mount(node)
            raise FUSEError(errno.ESTALE)

    async def setattr(
        self,
        inode: InodeT,
        attr: EntryAttributes,
        fields: SetattrFields,
        fh: FileHandleT | None,
        ctx: RequestContext,
    ) -> EntryAttributes:
        """truncate(2) empties what can be emptied. Times are the content's own: setting
        them, or the mode and owner to what they are, is accepted for the sake of `touch`,
        `cp -p` and editors, and changes nothing."""
        node = self._node(inode)
        async with self._attempt("change", node, ctx):
            if _changes_owner_or_mode(node, attr, fields):
                raise CtrfsError("owner and mode are fixed in this tree", errno=errno.EPERM)
            if fields.update_size:
                await self._truncate(node, attr.st_size, fh)
            return await self._attributes(node, inode)

    async def _truncate(self, node: Node, size: int, fh: FileHandleT | None) -> None:
        if not isinstance(node, File) or not node.writable:
            raise CtrfsError("this file cannot be written", errno=errno.EACCES)
        handle = self._open[fh].handle if fh is not None else None
        if isinstance(handle, DocumentHandle):
            handle.cut(size)
        elif size == 0:
            await node.truncate()

    async def readlink(self, inode: InodeT, ctx: RequestContext) -> FileNameT:
        """Where a link points."""
        node = self._node(inode)
        if not isinstance(node, Link):
            raise FUSEError(errno.EINVAL)
        async with self._attempt("readlink", node, ctx):
            return FileNameT((await node.target()).encode())

    async def access(self, inode: InodeT, mode: ModeT, ctx: RequestContext) -> bool:
        """Never asked: the kernel checks modes itself (default_permissions)."""
        return True

    async def statfs(self, ctx: RequestContext) -> pyfuse3.StatvfsData:
        """The tree itself takes no space."""
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = 4096
        data.f_blocks = data.f_bfree = data.f_bavail = 0
        data.f_files = len(self.inodes)
        data.f_ffree = data.f_favail = 0
        data.f_namemax = NAME_MAX
        return data

    # --- directories ---------------------------------------------------------------

    async def opendir(self, inode: InodeT, ctx: RequestContext) -> FileHandleT:
        """Begin a listing."""
        node = self._directory(inode)
        async with self._attempt("list", node, ctx):
            await self._enter(node)
            number = self._new_handle()
            self._listings[number] = _Listing(node, _caller(ctx))
            return FileHandleT(number)

    async def readdir(self, fh: FileHandleT, start_id: int, token: ReaddirToken) -> None:
        """Entries from ``start_id`` on, each with its attributes (READDIRPLUS)."""
        listing = self._listings[fh]
        async with self._attempt("list", listing.node, listing.caller):
            if start_id == 0:
                listing.names = listing.node.listing()
            for position in range(start_id, len(listing.names)):
                if not await self._reply_entry(listing, position, token):
                    return

    async def _reply_entry(self, listing: _Listing, position: int, token: ReaddirToken) -> bool:
        """Add one entry to a reply; False when it is full."""
        name = listing.names[position]
        try:
            child = listing.node.lookup(name)
            if child is None:
                return True  # it went away since the listing began
            entry = await self._attributes(child, 0, listing=True)
        except CtrfsError:
            return True  # as above: its subject is gone
        number = self.inodes.number_for_listing(child)
        entry.st_ino = InodeT(number)
        encoded = FileNameT(name.encode("utf-8", "surrogateescape"))
        if not pyfuse3.readdir_reply(token, encoded, entry, position + 1):
            return False
        self.inodes.add(child, number)
        return True

    async def releasedir(self, fh: FileHandleT) -> None:
        """The listing is done."""
        del self._listings[fh]

    async def mkdir(
        self, parent_inode: InodeT, name: FileNameT, mode: ModeT, ctx: RequestContext
    ) -> EntryAttributes:
        """mkdir(2) creates an object."""
        parent = self._directory(parent_inode)
        async with self._attempt("mkdir", parent, ctx, _text(name)):
            await parent.mkdir(_text(name))
            child = parent.lookup(_text(name))
            if child is None:
                raise FUSEError(errno.ENOENT)
            return await self._child_attributes(child)

    async def rmdir(self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext) -> None:
        """rmdir(2) destroys an object with all that is in it, as in cgroupfs."""
        parent = self._directory(parent_inode)
        async with self._attempt("rmdir", parent, ctx, _text(name)):
            child = parent.lookup(_text(name))
            if child is None:
                raise FUSEError(errno.ENOENT)
            if not isinstance(child, Directory):
                raise FUSEError(errno.ENOTDIR)
            await parent.rmdir(_text(name))
            # To the kernel a directory that was removed stays dead as long as somebody holds it.
            self.inodes.retire(child)
            return

    async def rename(
        self,
        parent_inode_old: InodeT,
        name_old: FileNameT,
        parent_inode_new: InodeT,
        name_new: FileNameT,
        flags: FlagT,
        ctx: RequestContext,
    ) -> None:
        """rename(2) of an object that allows it."""
        old, new = self._directory(parent_inode_old), self._directory(parent_inode_new)
        async with self._attempt("rename", old, ctx, _text(name_old)):
            if flags & pyfuse3.RENAME_EXCHANGE:
                raise CtrfsError("two names cannot be exchanged here", errno=errno.EINVAL)
            if old.lookup(_text(name_old)) is None:
                raise FUSEError(errno.ENOENT)
            await old.rename(_text(name_old), new, _text(name_new))
            return

    async def unlink(self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext) -> None:
        """Files come and go with their directory."""
        await self._refuse(
            parent_inode, name, "rm", "files here go with their directory: rmdir it", ctx
        )

    async def create(
        self,
        parent_inode: InodeT,
        name: FileNameT,
        mode: ModeT,
        flags: FlagT,
        ctx: RequestContext,
    ) -> tuple[FileInfo, EntryAttributes]:
        """No file can be made; one that stands here already is opened by lookup and open."""
        await self._refuse(parent_inode, name, "create", "no file can be created here", ctx)

    async def mknod(
        self,
        parent_inode: InodeT,
        name: FileNameT,
        mode: ModeT,
        rdev: int,
        ctx: RequestContext,
    ) -> EntryAttributes:
        """As create."""
        await self._refuse(parent_inode, name, "mknod", "no file can be created here", ctx)

    async def symlink(
        self, parent_inode: InodeT, name: FileNameT, target: FileNameT, ctx: RequestContext
    ) -> EntryAttributes:
        """As create."""
        await self._refuse(parent_inode, name, "symlink", "no link can be created here", ctx)

    async def link(
        self,
        inode: InodeT,
        new_parent_inode: InodeT,
        new_name: FileNameT,
        ctx: RequestContext,
    ) -> EntryAttributes:
        """As create."""
        await self._refuse(new_parent_inode, new_name, "link", "no link can be created here", ctx)

    async def _refuse(
        self, parent_inode: int, name: bytes, operation: str, sentence: str, ctx: RequestContext
    ) -> NoReturn:
        parent = self._directory(parent_inode)
        async with self._attempt(operation, parent, ctx, _text(name)):
            raise CtrfsError(sentence, errno=errno.EPERM)

    # --- open files ----------------------------------------------------------------

    def _new_handle(self) -> int:
        number = self._next_handle
        self._next_handle += 1
        return number

    async def open(self, inode: InodeT, flags: FlagT, ctx: RequestContext) -> FileInfo:
        """open(2). Root passes the kernel's check of modes, so what a file cannot do at
        all is refused here, as kernfs does."""
        node = self._node(inode)
        if not isinstance(node, File):
            raise FUSEError(errno.EISDIR)
        access = flags & os.O_ACCMODE
        if isinstance(node, CommandFile) and access != os.O_RDONLY and inode in self._busy:
            self.inodes.retire(node)
            raise FUSEError(errno.ESTALE)  # the kernel looks it up again: see _enter
        async with self._attempt("open", node, ctx):
            if access != os.O_RDONLY and not node.writable:
                raise CtrfsError("this file cannot be written", errno=errno.EACCES)
            if access != os.O_WRONLY and not node.readable:
                raise CtrfsError("this file cannot be read", errno=errno.EACCES)
            handle = await node.open(flags)
            number = self._new_handle()
            self._open[number] = _Open(inode, node, handle, _caller(ctx))
            return FileInfo(
                fh=FileHandleT(number), direct_io=handle.direct_io, keep_cache=handle.keep_cache
            )

    async def read(self, fh: FileHandleT, off: int, size: int) -> bytes:
        """read(2)."""
        opened = self._open[fh]
        uid = opened.caller.uid
        self._reads[uid] += 1
        try:
            async with self._attempt("read", opened.node, opened.caller):
                if uid != 0 and self._reads[uid] > MAX_READS_PER_USER:
                    raise FUSEError(errno.EAGAIN)
                return await opened.handle.read(off, size)
        finally:
            self._reads[uid] -= 1

    async def write(self, fh: FileHandleT, off: int, buf: bytes) -> int:
        """write(2)."""
        opened = self._open[fh]
        self._busy.add(opened.inode)
        try:
            async with self._attempt("write", opened.node, opened.caller, data=buf):
                return await opened.handle.write(off, buf, opened.caller)
        finally:
            self._busy.discard(opened.inode)

    async def flush(self, fh: FileHandleT) -> None:
        """close(2) of one descriptor."""
        opened = self._open[fh]
        async with self._attempt("close", opened.node, opened.caller):
            await opened.handle.flush()
            return

    async def fsync(self, fh: FileHandleT, datasync: bool) -> None:
        """What was taken is durable already."""

    async def fsyncdir(self, fh: FileHandleT, datasync: bool) -> None:
        """As fsync."""

    async def release(self, fh: FileHandleT) -> None:
        """The last descriptor is gone."""
        opened = self._open.pop(fh)
        opened.closed = True
        if opened.poller:
            opened.poller.cancel()
        try:
            await opened.handle.release()
        except Exception:
            # Nobody waits for the result, and it must not end the mount.
            log.exception("closing /%s failed", opened.node.path)

    # --- poll ----------------------------------------------------------------------

    async def poll(
        self,
        inode: InodeT,
        fh: FileHandleT,
        poll_handle: PollHandle | None,
        ctx: RequestContext,
    ) -> int:
        """poll(2): what holds now, and a promise to tell when that changes."""
        opened = self._open[fh]
        async with self._attempt("poll", opened.node, ctx):
            if poll_handle is not None:
                opened.poll_wanted = poll_handle
                if opened.poller is None:
                    opened.poller = trio.CancelScope()
                    self._nursery.start_soon(self._notify, opened, opened.poller)
            return opened.handle.poll()

    async def _notify(self, opened: _Open, scope: trio.CancelScope) -> None:
        with scope:
            try:
                await opened.handle.ready()
            except CtrfsError:
                pass  # its subject has gone, which a read will tell
            except Exception:
                log.exception("waiting for /%s failed", opened.node.path)
        opened.poller = None
        if not opened.closed and opened.poll_wanted is not None:
            opened.poll_wanted.notify()
            opened.poll_wanted = None


def _changes_owner_or_mode(node: Node, attr: EntryAttributes, fields: SetattrFields) -> bool:
    return (
        (fields.update_mode and stat.S_IMODE(attr.st_mode) != node.mode)
        or (fields.update_uid and attr.st_uid != 0)
        or (fields.update_gid and attr.st_gid != 0)
    )


def _caller(ctx: RequestContext) -> Caller:
    return Caller(ctx.pid, ctx.uid, ctx.gid)


def _text(name: bytes) -> str:
    """The name as text. The kernel lets names of up to 1024 bytes through to FUSE."""
    if len(name) > NAME_MAX:
        raise FUSEError(errno.ENAMETOOLONG)
    return name.decode("utf-8", "surrogateescape")
