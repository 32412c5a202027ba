"""The blocking steps in the life of one container: what is done to the machine, and undone.

Each is called in a worker thread, under the container's lock; container.py says when.
"""

import errno
import logging
import os
import signal
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from runtime import monitor, spec
from runtime.cgroups import Cgroup, process_table
from runtime.changes import list_changes
from runtime.config import RuntimeConfig
from runtime.errors import ContainerBusy, StartFailed
from runtime.log import LogReader
from runtime.monitor import Creation, Place
from runtime.oci import OciRuntime, find_program
from runtime.opened import Recording
from runtime.processes import Process, find_processes
from runtime.records import Pinned, Record, Records, Run, Starting
from runtime.rootfs import Rootfs
from runtime.settings import Effective
from runtime.trees import remove_tree
from runtime.users import resolve_user
from runtime.volumes import Volume
from store.errors import storage
from store.store import Store

log = logging.getLogger(__name__)

# A killed process is gone within milliseconds, unless it waits for a disk or a network
# file system in the kernel.
_KILL_SECONDS = 5.0

# After the name of the directory of a container whose removal has begun.
_REMOVED = ".removed"

# What `wait` gives when nobody knows: containerd's number for an unknown exit status.
UNKNOWN_EXIT = 255
_KILLED_EXIT = 137


@dataclass(frozen=True, slots=True)
class Services:
    """What all containers share. ``root`` and ``run`` are the directories of containers;
    ``held`` gives the descriptors that keep the readers of incomplete layers waiting."""

    store: Store
    rootfs: Rootfs
    runtime: OciRuntime
    config: RuntimeConfig
    records: Records
    root: Path
    run: Path
    held: Callable[[], tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Ending:
    """How a run ended: the code, when (nanoseconds since the epoch), and what is odd about it."""

    code: int
    finished_ns: int
    error: str


class Steps:
    """The steps of one container.

    Args:
        services: what it shares with others.
        uid: its name on disk, to conmon, and to the OCI runtime.
    """

    def __init__(self, services: Services, uid: str) -> None:
        self._services = services
        self._uid = uid
        self._state = services.root / uid
        self._run = services.run / uid
        self._place = Place(uid, self._run / "bundle", self._state / "log", self._state / "exit")
        self.cgroup_path = f"{services.config.cgroup_parent.rstrip('/')}/{uid}"
        self._cgroup = Cgroup(self.cgroup_path)
        self.log = LogReader(self._state / "log")
        self._opened = self._state / "opened"
        self._removed = services.root / f"{uid}{_REMOVED}"
        self._lost = services.root.parent / "lost+found" / uid
        self.rootfs_path = services.rootfs.container_path(uid)
        self.attach_path = self._place.attach

    # --- starting --------------------------------------------------------------------

    def prepare(
        self, record: Record, pinned: Pinned, values: Effective, document: spec.Document
    ) -> Creation:
        """Everything up to a conmon that is creating the container; the record is ``starting``.

        Raises:
            CtrfsError, OSError: something is wrong; undo() puts it right.
        """
        services = self._services
        record.starting = Starting(self.is_mounted(), record.image is not None)
        record.image = pinned
        services.records.save(record)
        for volume in values.mounts:
            _check_source(volume)
        root = self.mount(pinned)
        name = spec.username(document)
        record.user = resolve_user(root, name) if name else None
        self._place.clear()
        finished = spec.complete(document, root, self.cgroup_path, record.user)
        (self._place.bundle / "config.json").write_bytes(spec.encode(finished))
        conmon = find_program(services.config.conmon)
        held = () if services.store.complete(pinned.diff_ids) else services.held()
        return monitor.create(conmon, services.runtime, self._place, values.stdin, held)

    def is_mounted(self) -> bool:
        """Whether the root filesystem is there. Does not block."""
        return self._services.rootfs.is_mounted(self._uid)

    def mount(self, pinned: Pinned) -> Path:
        """Mount the root filesystem unless it is there."""
        if self._removed.exists():
            raise ContainerBusy("its files are deleted already; rmdir it once more")
        self._state.mkdir(mode=0o700, parents=True, exist_ok=True)
        upper, work = self._state / "upper", self._state / "work"
        # Overlayfs shows the upper directory's own attributes for the root, not the image's.
        fresh = not upper.exists()
        layers = self._services.store.layers.mountable(pinned.diff_ids)
        if fresh:
            work.mkdir(mode=0o700, exist_ok=True)
            upper.mkdir(mode=0o755)
            if layers:
                _copy_attributes(self._services.rootfs.layer(layers[-1]), upper)
        return self._services.rootfs.container(self._uid, layers, upper, work)

    def record_opened(self) -> Recording | None:
        """Begin to record which files it opens; None where the kernel can't tell."""
        try:
            return Recording(self.rootfs_path)
        except OSError as error:
            log.info("what %s opens is not recorded: %s", self._uid, error)
            return None

    def keep_opened(self, pinned: Pinned, paths: list[str]) -> None:
        """Keep a record with the container, and with the image if it is the first.

        Raises:
            StorageFailed: it could not be written.
        """
        text = "".join(f"{path}\n" for path in paths)
        with storage(f"writing {self._opened}"), suppress(FileNotFoundError):  # removed meanwhile
            self._opened.write_text(text, errors="surrogateescape")
        opened = self._services.store.opened
        if paths and not opened.get(pinned.digest):
            opened.put(pinned.digest, paths)

    def opened(self) -> bytes:
        """What was recorded: a path a line."""
        with suppress(FileNotFoundError):
            return self._opened.read_bytes()
        return b""

    def undo(self, record: Record) -> None:
        """Take back a start that failed at any point; the record is what it was."""
        starting = record.starting
        # What has not got going yet fails without its bundle; what has is found by its
        # arguments, wherever it is; what that has made is in the cgroup.
        self._place.remove()
        programs = (self._services.config.conmon, self._services.config.runtime)
        for process in find_processes({Path(name).name for name in programs}, self._uid):
            process.kill(_KILL_SECONDS)
        self._clear_away(spec_has_hooks=record.override is not None)
        if starting:
            if not starting.mounted:
                self.unmount()
            if not starting.pinned:
                self._unpin(record)
        record.starting = None
        self._services.records.save(record)

    def _unpin(self, record: Record) -> None:
        try:
            self.discard()
        except ContainerBusy:
            return  # the image stays as long as somebody is in its files
        record.image = None
        record.user = None

    def discard(self) -> None:
        """Delete the files that lie on the image, which are none of the user's.

        Raises:
            ContainerBusy: somebody uses the root filesystem; nothing has changed.
        """
        # Never below a live overlay: what its users write would be lost without a word.
        self._services.rootfs.unmount(self._uid)
        remove_tree(self._state / "upper")
        remove_tree(self._state / "work")

    def discard_unused(self) -> bool:
        """As discard(), unless something was put into the root filesystem; whether it was done.

        Raises:
            ContainerBusy: as discard().
        """
        if self.has_own_files():
            return False
        self._services.rootfs.unmount(self._uid)
        if self.has_own_files():  # put there until the moment it was unmounted
            return False
        self.discard()
        return True

    def resolve_start(self, record: Record) -> None:
        """Settle a start during which the daemon was killed.

        If the process had been let go, it is a run like any other; else the start never
        was.
        """
        created = self._place.was_created() and self._services.runtime.exists(self._uid)
        conmon, init = self._place.find_conmon(), self._place.find_init()
        let_go = created and not self._services.runtime.is_created(self._uid)
        if not let_go or not (conmon or self._place.exit()):
            record.error = "the daemon was killed during a start, which was undone"
            self.undo(record)
            return
        nobody = Process(0, 0, "")
        record.run = Run(conmon or nobody, init or nobody)
        record.starting = None
        record.state = "running"
        # Its end is known by the time of a file, too.
        record.started_ns = self._place.created_ns() or time.time_ns()
        record.finished_ns = record.exit_code = None
        self._services.records.save(record)

    # --- the end ---------------------------------------------------------------------

    def ending(self) -> Ending | None:
        """How the run ended, if conmon left word of it. Does not block on anything slow."""
        found = self._place.exit()
        if found is None:
            return None
        code, finished = found
        error = "the kernel killed it or a child of it: out of memory" if self.oom() else ""
        return Ending(code if code >= 0 else UNKNOWN_EXIT, finished, error)

    def oom(self) -> bool:
        """Whether the kernel killed something in it for want of memory."""
        return self._place.out_of_memory()

    def end_without_monitor(self, run: Run) -> Ending:
        """End a run whose conmon is gone and left no exit code."""
        killed = run.init.is_running() and run.init.send(signal.SIGKILL)
        self._cgroup.kill()
        run.init.kill(_KILL_SECONDS)
        what = "its process was killed" if killed else "how its process ended is not known"
        return Ending(
            _KILLED_EXIT if killed else UNKNOWN_EXIT,
            time.time_ns(),
            f"the container's monitor (conmon) ended before the container; {what}",
        )

    def tidy(self, record: Record) -> None:
        """After the end of a run: remove what it left on the machine, and remember it."""
        self._clear_away(spec_has_hooks=record.override is not None)
        self._services.records.save(record)

    def _clear_away(self, *, spec_has_hooks: bool) -> None:
        # A user's own document may have hooks, or leave processes outside of any pid
        # namespace; ours has nothing of the kind.
        self._cgroup.kill()
        if not self._cgroup.destroy():
            log.warning("processes of the container %s do not end; its cgroup stays", self._uid)
        self._services.runtime.delete(self._uid, hooks=spec_has_hooks)

    def has_leftovers(self) -> bool:
        """Whether the daemon was killed before it cleared away after a run."""
        return self._services.runtime.exists(self._uid) or self._cgroup.exists()

    def is_frozen(self) -> bool:
        """Whether it is paused in fact."""
        return self._cgroup.frozen()

    def thaw(self) -> None:
        """Let paused processes go on."""
        self._cgroup.thaw()

    def kill(self, run: Run) -> None:
        """SIGKILL to all processes."""
        run.init.send(signal.SIGKILL)
        self._cgroup.kill()

    # --- looking ---------------------------------------------------------------------

    def processes(self, run: Run) -> str:
        """The table of its processes."""
        return process_table(self._cgroup.pids() or [run.init.pid])

    def changes(self, pinned: Pinned) -> bytes:
        """What it changed against its image."""
        upper = self._state / "upper"
        if not upper.exists():
            return b""
        lower = self._run / f"lower-{time.monotonic_ns()}"
        lower.mkdir(mode=0o700, parents=True)
        rootfs = self._services.rootfs
        try:
            rootfs.image_view(self._services.store.layers.mountable(pinned.diff_ids), str(lower))
            try:
                return list_changes(upper, lower)
            finally:
                rootfs.unmount_view(str(lower))
        finally:
            lower.rmdir()

    def has_own_files(self) -> bool:
        """Whether something was put into its root filesystem."""
        try:
            with os.scandir(self._state / "upper") as entries:
                return next(entries, None) is not None
        except FileNotFoundError:
            return False

    # --- removal ---------------------------------------------------------------------

    def destroy(self, record: Record) -> None:
        """Clear away after its last run, unmount it, delete its files, and forget it.

        The files go first, because on a full disk only that makes room to forget it. Their
        directory, renamed, stays until it is forgotten: it says that a removal has begun.

        Raises:
            ContainerBusy: its root filesystem is in use; nothing has changed.
            StorageFailed: it cannot be forgotten; removing it can be tried again.
        """
        self._clear_away(spec_has_hooks=record.override is not None)
        self._services.rootfs.unmount(self._uid)
        with suppress(FileNotFoundError):
            self._state.rename(self._removed)
        self.complete_removal()

    def complete_removal(self) -> None:
        """The rest of destroy(), which may be repeated."""
        self._delete_run()
        if self._removed.exists():
            for entry in self._removed.iterdir():
                _delete(entry)
        with self._services.store.ballast.dropped():
            self._services.records.delete(self._uid)
        _delete(self._removed)

    def give_up_orphan(self) -> None:
        """Put aside the files of a container that no record knows, unless it runs."""
        conmon = self._place.find_conmon()
        if conmon is not None:
            log.warning(
                "the container %s runs (conmon %d) but is not recorded; end that process, and its"
                " files will be kept in %s",
                self._uid,
                conmon.pid,
                self._lost,
            )
            return
        self.unmount()
        self._delete_run()
        if self._state.exists():
            self._lost.parent.mkdir(mode=0o700, exist_ok=True)
            self._state.rename(self._lost)
            log.warning("no record knows the container %s; its files: %s", self._uid, self._lost)

    def _delete_run(self) -> None:
        for lower in self._run.glob("lower-*"):
            # What changes() has left when the daemon was killed meanwhile.
            with suppress(OSError):  # not mounted (any more)
                self._services.rootfs.unmount_view(str(lower))
        _delete(self._run)

    def unmount(self) -> None:
        """Unmount the root filesystem unless somebody uses it."""
        with suppress(ContainerBusy):
            self._services.rootfs.unmount(self._uid)

    def detach(self) -> None:
        """Unmount the root filesystem, also while somebody uses it."""
        self._services.rootfs.detach(self._uid)

    def unmount_idle(self) -> None:
        """Unmount the root filesystem if nobody has used it since the last call."""
        self._services.rootfs.unmount_idle(self._uid)


def prepare_directories(services: Services) -> None:
    """Make the directories of containers, and complete removals that were cut short."""
    for parent in (services.root, services.run):
        # A program that a container made set-user-ID must be out of reach for users of the host.
        parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        parent.chmod(0o700)
    for removed in services.root.glob(f"*{_REMOVED}"):
        Steps(services, removed.name.removesuffix(_REMOVED)).complete_removal()


def put_aside_orphans(services: Services, known: Iterable[str]) -> None:
    """Look after what is left of containers that no record knows, as after the loss of the
    database. What users may still want is kept."""
    kept = set(known)
    for parent in (services.root, services.run):
        for directory in parent.iterdir():
            if directory.name not in kept:
                Steps(services, directory.name).give_up_orphan()


def _delete(path: Path) -> None:
    """Delete a file or tree; what cannot be deleted is left for the next start."""
    try:
        if path.is_dir() and not path.is_symlink():
            remove_tree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        log.warning("cannot delete %s: %s", path, error.strerror)


def _check_source(volume: Volume) -> None:
    if volume.type != "bind":
        return
    try:
        os.stat(volume.source)
    except OSError as error:
        raise StartFailed(
            f"{volume.source} cannot be mounted at {volume.destination} in the container:"
            f" {error.strerror}",
            errno=error.errno or errno.ENOENT,
        ) from None


def _copy_attributes(source: Path, target: Path) -> None:
    """Give a directory the owner, mode, times and attributes of another."""
    status = source.stat()
    os.chown(target, status.st_uid, status.st_gid)
    os.chmod(target, status.st_mode & 0o7777)
    for name in os.listxattr(source):
        if not name.startswith("trusted.overlay."):
            os.setxattr(target, name, os.getxattr(source, name))
    os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))
