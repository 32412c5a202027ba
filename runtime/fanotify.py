"""fanotify pre-content events: readers of a file wait until its contents are there.

The sparse data file of an incomplete layer is marked in a group. A read of it, also one
that comes through an EROFS mount of which the file is the device, then waits until the
group has answered; before it answers, the contents have been written into the file.

The group belongs to whoever has its descriptor. While one process has it, events wait; when
the last one is gone the kernel lets all reads through, and holes read as zeros. So other
processes hold the descriptor as well (keeper.py), and the one that reads events may die at
any moment without a loss:

- Events wait in the kernel until they are read. They are read one at a time, straight into
  a slot of a shared memory file that the holders have, too: no instruction of ours lies
  between taking the event and having it recorded.
- What was read and not answered is found in the slots by the successor (adopt(), pending()).
  The kernel knows an event by the number of the descriptor that its first reader got, and
  takes an answer with this number from any process that has the group.

Rules for the users of this module:

- A file is marked before it is mounted or opened by its readers. Whether a file raises
  events is decided when it is opened (FMODE_NONOTIFY_PERM in the kernel's sources), so what
  was opened while there was no mark never waits.
- A mark is removed when all contents are there, not before, and is not set again while the
  file is mounted.
- The process that reads events touches a marked file through the descriptor of an event or
  open_unwatched() only, and never truncates it: truncate(2) and ftruncate(2) raise an event
  whatever the descriptor.
"""

import errno
import fcntl
import mmap
import os
import resource
import select
import struct
import tempfile
import threading
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

from runtime import linux
from runtime.errors import RuntimeFailure, Unsupported

# fanotify_init(2). Events that a limited queue has no room for would be let through.
_CLOEXEC = 0x1
_NONBLOCK = 0x2
_CLASS_NOTIF = 0x0
CLASS_PRE_CONTENT = 0x8
_UNLIMITED_QUEUE = 0x10
_UNLIMITED_MARKS = 0x20

# fanotify_mark(2)
_MARK_ADD = 0x1
_MARK_REMOVE = 0x2
_OPEN = 0x20
_OPEN_EXEC = 0x1000
_PRE_ACCESS = 0x0010_0000

# fanotify(7): struct fanotify_event_metadata (length, version, reserved, length of itself, mask,
# fd, pid) and struct fanotify_event_info_range (type, pad, length, pad, offset, count).
_METADATA = struct.Struct("=IBBHQii")
_RANGE = struct.Struct("=BBHIQQ")
_RECORD = _METADATA.size + _RANGE.size

# struct fanotify_response. An answer of FAN_DENY has an errno in its upper byte.
_RESPONSE = struct.Struct("=iI")
_ALLOW = 1
_DENY_EIO = 2 | errno.EIO << 24

# A slot is the kernel's record, then which file it is about, then whether that was stored.
_SLOT = 128
_FILE = struct.Struct("=QQ")
_FILE_AT = _RECORD
_FILE_KNOWN_AT = _FILE_AT + _FILE.size
_MAGIC = b"ctrfs events 1\n"
_MAP_LOCKED = 0x2000

# How long a kernel without such events is waited for.
_PROBE_SECONDS = 2.0
_PROBE = b"filled"

# Descriptors for everything but events.
_OTHER_DESCRIPTORS = 256


class EventsTaken(RuntimeFailure):
    """Another process reads the events of a group."""

    errno = errno.EBUSY


class FileId(NamedTuple):
    """Which file: st_dev and st_ino."""

    device: int
    inode: int


@dataclass(frozen=True, slots=True)
class Event:
    """A process waits for ``count`` bytes at ``offset`` of a file.

    The range may be empty and may reach beyond the end of the file.

    Attributes:
        number: how the kernel knows the event. It is also a descriptor of the file that
            raises no events, open until the answer, unless ``inherited``.
        inherited: read by a predecessor.
        file: None when a predecessor died before it could store that.
        pid: of the process that waits, in the pid namespace of the event's first reader; 0
            for one that is not in it.
    """

    slot: int
    number: int
    inherited: bool
    file: FileId | None
    offset: int
    count: int
    pid: int


class PreContentGroup:
    """A group, and the events that it has read and not answered.

    One process at a time can have it open so; the others are mere holders. Two would answer
    each other's events, which have the same numbers. The methods can be called from several
    threads.

    Attributes:
        fd: the group's descriptor, readable when there are events. Holders need it and
            ``slots_fd``.
        slots_fd: the memory file with the slots.
    """

    def __init__(self, fd: int, slots_fd: int) -> None:
        self.fd = fd
        self.slots_fd = slots_fd
        # Opened anew for a lock that no holder inherits.
        self._own_fd = os.open(f"/proc/self/fd/{slots_fd}", os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(self._own_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._own_fd)
            raise EventsTaken("another process answers the reads of incomplete layers") from None
        # Locked into memory: a page fault in a dying process would turn the kernel's copy of
        # the event into a refusal of the read.
        flags = mmap.MAP_SHARED | mmap.MAP_POPULATE | _MAP_LOCKED
        self._memory = mmap.mmap(self._own_fd, 0, flags=flags)
        self._lock = threading.Lock()
        self._free: list[int] = []
        self._unanswered: dict[int, Event] = {}
        # How many of these have this number, and with what others of it were finished.
        self._waiting: Counter[int] = Counter()
        self._finished: dict[int, list[tuple[Event, int]]] = {}
        for slot in range(_SLOT, len(self._memory), _SLOT):
            if self._is_used(slot):
                self._register(self._recorded(slot, inherited=True))
            else:
                self._clear(slot)

    @classmethod
    def create(cls, slots: int, name: str) -> Self:
        """A new group.

        Args:
            slots: how many events can be in work at once; the others wait.
            name: of the memory file, by which holders are found.

        Raises:
            Unsupported: too few descriptors are allowed; an event that gets none would be
                refused.
            OSError: the kernel has no pre-content events.
        """
        allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if slots + _OTHER_DESCRIPTORS > allowed:
            raise Unsupported(
                f"{slots} readers at once need {slots + _OTHER_DESCRIPTORS} descriptors, but"
                f" {allowed} are allowed; raise the limit (ulimit -n)"
            )
        flags = CLASS_PRE_CONTENT | _UNLIMITED_QUEUE | _UNLIMITED_MARKS
        fd = linux.fanotify_init(flags | _CLOEXEC | _NONBLOCK, _event_flags())
        slots_fd = os.memfd_create(name, os.MFD_CLOEXEC)
        # Nobody executes it, so no event comes of this mark, which shows whose slots they are.
        linux.fanotify_mark(fd, _MARK_ADD, _OPEN_EXEC, slots_fd, None)
        os.ftruncate(slots_fd, (slots + 1) * _SLOT)
        os.pwrite(slots_fd, _MAGIC, 0)
        return cls(fd, slots_fd)

    @classmethod
    def adopt(cls, fd: int, slots_fd: int) -> Self:
        """The group of a predecessor that is gone, from the descriptors that a holder had.

        They belong to the new object, unless this raises.

        Raises:
            EventsTaken: the predecessor, or another successor, still lives.
            Unsupported: they are not of a group that this version made.
        """
        if os.pread(slots_fd, len(_MAGIC), 0) != _MAGIC:
            raise Unsupported(
                "the waiting reads were recorded by another version of ctrfs; stop the"
                " containers of incomplete images and the service, then start it again"
            )
        return cls(fd, slots_fd)

    def mark(self, descriptor: int) -> None:
        """Have readers of this open file wait, those that open it from now on.

        Raises:
            Unsupported: its filesystem has no pre-content events.
        """
        try:
            linux.fanotify_mark(self.fd, _MARK_ADD, _PRE_ACCESS, descriptor, None)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            raise Unsupported(
                "this filesystem has no pre-content events; ext4, XFS and Btrfs have them"
            ) from None

    def unmark(self, descriptor: int) -> None:
        """Let readers of this open file go on by themselves; those that wait already wait on."""
        with suppress(FileNotFoundError):
            linux.fanotify_mark(self.fd, _MARK_REMOVE, _PRE_ACCESS, descriptor, None)

    def marked(self) -> set[FileId]:
        """The files that are marked. One without a name is as long as somebody has it open."""
        return marks(Path(f"/proc/self/fdinfo/{self.fd}")) - {file_id(self.slots_fd)}

    def pending(self) -> list[Event]:
        """Events that are not answered; at first, those that the predecessor left."""
        with self._lock:
            return list(self._unanswered.values())

    @property
    def has_room(self) -> bool:
        """Whether a slot is free. Without, next_event() gives none, also when there are some."""
        return bool(self._free)

    def next_event(self) -> Event | None:
        """The next event, if there is one. Never blocks.

        Raises:
            OSError: the kernel could not open the file for us, say for want of descriptors;
                that reader has failed with EPERM.
        """
        with self._lock:
            if not self._free:
                return None
            slot = self._free[-1]
            try:
                # Room for one record: the kernel puts in as many as fit.
                os.readv(self.fd, [memoryview(self._memory)[slot : slot + _RECORD]])
            except BlockingIOError:
                return None
            self._free.pop()
            number = _METADATA.unpack_from(self._memory, slot)[5]
            _FILE.pack_into(self._memory, slot + _FILE_AT, *file_id(number))
            self._memory[slot + _FILE_KNOWN_AT] = 1
            event = self._recorded(slot, inherited=False)
            self._register(event)
        return event

    def answer(self, event: Event) -> None:
        """Let the reader go on: what it waits for is in the file. Closes ``event.number``."""
        self._finish(event, _ALLOW)

    def refuse(self, event: Event) -> None:
        """Let the reader fail with EIO. Closes ``event.number``.

        What was read ahead may then be tried again alone, as an event of its own.
        """
        self._finish(event, _DENY_EIO)

    def _register(self, event: Event) -> None:
        self._unanswered[event.slot] = event
        self._waiting[event.number] += 1

    def _finish(self, event: Event, response: int) -> None:
        """Answer, unless another event has the same number.

        A predecessor's event and one of our own can have the same number, and the kernel
        gives an answer to either. So all of them are answered once all are finished, and
        refused if one is to be.
        """
        number = event.number
        with self._lock:
            del self._unanswered[event.slot]
            self._waiting[number] -= 1
            self._finished.setdefault(number, []).append((event, response))
            if self._waiting[number]:
                return
            del self._waiting[number]
            finished = self._finished.pop(number)
            packed = _RESPONSE.pack(number, max(response for _, response in finished))
            for _ in finished:
                # The reader was killed, or the predecessor had answered.
                with suppress(FileNotFoundError):
                    os.write(self.fd, packed)
            # The descriptor is closed last: as long as a slot has the number, no new event
            # of this process gets it.
            for done, _ in finished:
                self._clear(done.slot)
            if not all(done.inherited for done, _ in finished):
                os.close(number)

    def _is_used(self, slot: int) -> bool:
        return any(self._memory[slot : slot + 4])

    def _recorded(self, slot: int, *, inherited: bool) -> Event:
        _, _, _, _, _, number, pid = _METADATA.unpack_from(self._memory, slot)
        _, _, _, _, offset, count = _RANGE.unpack_from(self._memory, slot + _METADATA.size)
        file = None
        if self._memory[slot + _FILE_KNOWN_AT]:
            file = FileId(*_FILE.unpack_from(self._memory, slot + _FILE_AT))
        return Event(slot, number, inherited, file, offset, count, pid)

    def _clear(self, slot: int) -> None:
        """Free a slot. In this order: one in use never names the file of an earlier event."""
        self._memory[slot + _FILE_KNOWN_AT] = 0
        self._memory[slot : slot + 4] = bytes(4)
        self._free.append(slot)

    def close(self) -> None:
        """Let go of the group; if nobody else holds it, all readers go on."""
        self._memory.close()
        for descriptor in (self._own_fd, self.slots_fd, self.fd):
            os.close(descriptor)


def marks(group: Path) -> set[FileId]:
    """The files that are marked in a group, its own slots among them.

    Args:
        group: its descriptor's file in ``/proc/PID/fdinfo``.

    Raises:
        OSError: the process or the descriptor is gone.
    """
    found = set()
    for line in group.read_text().splitlines():
        if line.startswith("fanotify ino:"):
            inode, device = (int(word.partition(":")[2], 16) for word in line.split()[1:3])
            found.add(FileId(os.makedev(device >> 20, device & 0xFFFFF), inode))
    return found


def file_id(descriptor: int) -> FileId:
    """Which file a descriptor is of."""
    status = os.fstat(descriptor)
    return FileId(status.st_dev, status.st_ino)


def open_unwatched(paths: Sequence[Path]) -> list[int]:
    """Descriptors for reading and writing that raise no events, whoever has marked the files.

    The kernel makes such descriptors for listeners only: this listens to its own open(). One
    listener for all, since it takes the kernel some 20 ms to let go of one.

    Raises:
        OSError: open(2), or the kernel has no fanotify.
    """
    group = linux.fanotify_init(_CLASS_NOTIF | _CLOEXEC | _NONBLOCK, _event_flags())
    opened: list[int] = []
    try:
        for path in paths:
            linux.fanotify_mark(group, _MARK_ADD, _OPEN, linux.AT_FDCWD, str(path))
            with path.open("rb", buffering=0) as file:
                opened.append(_heard_open(group, file_id(file.fileno())))
    except BaseException:
        for descriptor in opened:
            os.close(descriptor)
        raise
    finally:
        os.close(group)
    return opened


def _heard_open(group: int, file: FileId) -> int:
    """The descriptor of a file that somebody has opened. Others may have opened others."""
    while True:
        descriptor = int(_METADATA.unpack(os.read(group, _METADATA.size))[5])
        if file_id(descriptor) == file:
            return descriptor
        os.close(descriptor)


def require(directory: Path) -> None:
    """Raises Unsupported: pre-content events cannot be used for layers in ``directory``."""
    why = available(directory)
    if why is not None:
        raise Unsupported(f"layers can't be served with fanotify: {why}")


def available(directory: Path) -> str | None:
    """Why pre-content events cannot be used for files in ``directory``; None when they can."""
    try:
        group = PreContentGroup.create(1, "ctrfs-probe")
        try:
            with tempfile.NamedTemporaryFile(dir=directory, prefix=".probe-") as file:
                group.mark(file.fileno())
                held_up = _probe(group, file.name)
        finally:
            group.close()
    except Unsupported as error:
        return str(error)
    except OSError as error:
        return f"fanotify's pre-content events, of Linux 6.14, failed here: {error}"
    return None if held_up else "this kernel's fanotify holds up no reads"


def _probe(group: PreContentGroup, path: str) -> bool:
    """Whether a read of a marked, empty file sees what is written while it waits."""
    got: list[bytes] = []
    with open(path, "rb", buffering=0) as file:
        reader = threading.Thread(target=lambda: got.append(file.read(len(_PROBE))))
        reader.start()
        select.select([group.fd], [], [], _PROBE_SECONDS)
        event = group.next_event()
        if event is not None:
            os.pwrite(event.number, _PROBE, 0)
            group.answer(event)
        reader.join()
    return got == [_PROBE]


def _event_flags() -> int:
    """How descriptors of events are opened."""
    # With O_LARGEFILE, or nothing beyond 2 GiB could be written. Its value differs between
    # architectures, and C libraries say 0; the kernel shows it.
    null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    large = fcntl.fcntl(null, fcntl.F_GETFL)
    os.close(null)
    return os.O_RDWR | os.O_CLOEXEC | large
