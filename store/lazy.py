"""A layer that is not all here: what of it has come, and taking in more.

Beside the files of every layer (layers.py), the directory of an incomplete one has

    spans      where its contents come from (spans.py); stays when the layer is complete
    lazy.json  a LazyRecord: the blob, and where it can be had; stays as well
    present    which spans are here; goes when the layer is complete
    blob       the registry's bytes, with holes; moves to the store's content just before
    refused    why the whole blob turned out to be wrong; the layer can't be used then
    unwanted   no image and no container has the layer: it is not filled by itself
    tails      what follows contents in their spans (tails.py), once somebody may borrow them

The data files have their full size from the start, and holes. A span counts as present after its
bytes, verified, are in them and in ``blob``. That order is kept by the page cache when a
process is killed; after the machine went down without notice, what ``present`` claims is
verified again.

``present``, little endian: magic ``ctrfspr2``, 16 bytes of the boot's id, u64 bytes of the
blob that are here; then one byte for each span: 0 missing, 3 here, 5 here from another layer's
blob, 6 its contents are here from another layer, but not the blob's bytes. One flipped bit makes
none of these of another.
"""

import hashlib
import logging
import mmap
import os
import re
import struct
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import msgspec

from store.archive_check import ArchiveCheck
from store.cas import CHUNK, Cas, Digest, sync_directory
from store.data_files import DataFiles, OpenData, Opening, open_all, write_all
from store.errors import (
    CorruptContent,
    DigestMismatch,
    PullCancelled,
    StoreError,
    WrongBlob,
    storage,
)
from store.inflate import ChunkReader, inflated
from store.manifest import Descriptor
from store.span_inflate import Inflater, are_members
from store.spans import Codec, Piece, SpanTable

log = logging.getLogger(__name__)

MAGIC = b"ctrfspr2"
_HEAD = struct.Struct("<8s16sQ")

# What ``present`` says of a span that is here.
_HERE, _BORROWED, _CONTENTS = 3, 5, 6
_HAS = bytes((_HERE, _BORROWED, _CONTENTS))
_STATES = b"\0" + _HAS
# The same without the blob's bytes.
_WITHOUT_BLOB = bytes(_CONTENTS if state in _HAS else 0 for state in range(256))
# Whatever else stands there, by damage to the file, is nothing that is here.
_KEPT = re.compile(b"[\3\5]")
_NOT_KEPT = re.compile(b"[^\3\5]")

_PRESENT = "present"
_REFUSED = "refused"
_UNWANTED = "unwanted"
_INFLATED = 1 << 20

# More at once would come no sooner, and a span of some megabytes is in memory meanwhile.
INFLATING = threading.BoundedSemaphore(len(os.sched_getaffinity(0)))


class LazyRecord(msgspec.Struct, frozen=True):
    """``lazy.json``: the layer's blob, and images that it is a part of (as ``Image.source``).

    ``vouched``: the image's manifest vouches for what says where contents are.
    """

    blob: Descriptor
    sources: tuple[str, ...]
    vouched: bool = True

    def is_for(self, blob: Descriptor, source: str) -> bool:
        """Whether an image from ``source`` with this blob says the same of the layer. What the
        manifest vouches for is in the blob, or is named by its annotations."""
        return self.blob.says_the_same(blob) and (self.vouched or source in self.sources)


def is_complete(directory: Path) -> bool:
    """Whether all of the layer in this directory is here, and has been verified: both files that an
    incomplete one has went when it was."""
    return not (directory / _PRESENT).exists() and not (directory / "blob").exists()


def refusal(directory: Path) -> str:
    """Why the layer can't be used, or an empty string."""
    with suppress(FileNotFoundError):
        return (directory / _REFUSED).read_text()
    return ""


def set_wanted(directory: Path, wanted: bool) -> None:
    """Whether the layer is to be filled by itself. Raises OSError."""
    if wanted:
        (directory / _UNWANTED).unlink(missing_ok=True)
    else:
        (directory / _UNWANTED).touch()


def is_wanted(directory: Path) -> bool:
    """Whether some image or container has the layer."""
    return not (directory / _UNWANTED).exists()


def fetched(directory: Path) -> int | None:
    """Bytes of an incomplete layer's blob that are here; None when it is complete."""
    with suppress(FileNotFoundError), (directory / _PRESENT).open("rb") as file:
        head = file.read(_HEAD.size)
        if len(head) == _HEAD.size:
            return int(_HEAD.unpack(head)[2])
    return None if is_complete(directory) else 0


def read_record(directory: Path) -> LazyRecord:
    """Where the layer's blob comes from.

    Raises:
        CorruptContent: the file is missing or damaged.
    """
    try:
        return msgspec.json.decode((directory / "lazy.json").read_bytes(), type=LazyRecord)
    except (msgspec.MsgspecError, FileNotFoundError) as error:
        raise CorruptContent(
            f"{directory}/lazy.json is missing or damaged ({error}); pull the image again"
        ) from None


def _damaged(file: str, directory: Path) -> CorruptContent:
    return CorruptContent(
        f"{file} of the layer in {directory} is missing or damaged; pull the image again"
    )


def wrong_file(directory: Path) -> str:
    """The name of a file of a lazy layer that can't be as it was written; empty if there is none. A
    blob that is missing may be on its way to the store's content."""
    if is_complete(directory):
        return ""
    try:
        read_record(directory)
    except CorruptContent:
        return "lazy.json"
    try:
        table = SpanTable(directory / "spans")
    except CorruptContent:
        return "spans"
    table.close()
    if wrong := DataFiles(directory, table.data_size, table.cuts).wrong:
        return wrong
    with suppress(FileNotFoundError):
        if (directory / "blob").stat().st_size != table.blob_size:
            return "blob"
    try:
        present = (directory / _PRESENT).read_bytes()
    except FileNotFoundError:
        return "" if is_complete(directory) else _PRESENT
    states = present[_HEAD.size :]
    if present[:8] != MAGIC or len(states) != table.spans or states.translate(None, _STATES):
        return _PRESENT
    return ""


def prepare(directory: Path, record: LazyRecord, known: Sequence[tuple[int, bytes]]) -> None:
    """Make the files of an incomplete layer, but for ``spans`` and the data files, which are there
    already. As yet no image has it.

    Args:
        known: parts of the blob that were read on the way here, with their offsets.
    """
    (directory / "lazy.json").write_bytes(msgspec.json.encode(record))
    with (directory / "blob").open("xb") as blob:
        blob.truncate(record.blob.size)
        for offset, piece in known:
            os.pwrite(blob.fileno(), piece, offset)
    table = SpanTable(directory / "spans")
    try:
        present = bytearray(table.spans)
        total = 0
        touched = {
            number
            for offset, piece in known
            for number in range(table.span_at(offset), table.stop_at(offset + len(piece)))
        }
        for number in touched:
            # What came before or after the contents, as a table of contents at the end.
            if not table.can_verify(number) and _covered(table.range_of(number), known):
                present[number] = _HERE
                total += table.range_of(number)[1] - table.range_of(number)[0]
    finally:
        table.close()
    (directory / _PRESENT).write_bytes(_HEAD.pack(MAGIC, _boot_id(), total) + present)
    set_wanted(directory, wanted=False)


def _covered(span: tuple[int, int], known: Sequence[tuple[int, bytes]]) -> bool:
    start, end = span
    for offset, piece in sorted(known):
        if offset <= start < offset + len(piece):
            start = offset + len(piece)
    return start >= end


def _boot_id() -> bytes:
    return uuid.UUID(Path("/proc/sys/kernel/random/boot_id").read_text().strip()).bytes


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CLOEXEC)


class LazyLayer:
    """An incomplete layer, open. One process at a time; safe to use from several threads.

    Args:
        directory: the layer's.
        diff_id: the layer's.
        open_data: gives descriptors of the data files for reading and writing.

    Attributes:
        complete: all of it is here and verified.
        data: the data files.
        record, table: see the head of the module.

    Raises:
        CorruptContent: a file is missing or damaged.
    """

    def __init__(self, directory: Path, diff_id: Digest, open_data: Opening = open_all) -> None:
        if wrong := wrong_file(directory):
            raise _damaged(wrong, directory)
        self.directory = directory
        self.diff_id = diff_id
        self.record = read_record(directory)
        self.table = SpanTable(directory / "spans")
        self.complete = False
        self._inflater = Inflater(self.table, self.read_blob)
        self._lock = threading.Lock()
        self._here_before = 0  # this span all were here when somebody looked
        with ExitStack() as opened:
            opened.callback(self.table.close)
            with storage(f"opening the layer in {directory}"):
                files = DataFiles(directory, self.table.data_size, self.table.cuts)
                self.data = OpenData(files, open_data)
                opened.callback(self.data.close)
                self._blob = _open(directory / "blob")
                opened.callback(os.close, self._blob)
                self._present = opened.enter_context(self._map_present())
            if self._present[8:24] != _boot_id():
                self._recheck()
            self._opened = opened.pop_all()

    def _map_present(self) -> mmap.mmap:
        with (self.directory / _PRESENT).open("r+b") as file:
            self.identity = os.fstat(file.fileno()).st_ino
            return mmap.mmap(file.fileno(), 0)

    @property
    def size(self) -> int:
        """Of the data files, in bytes."""
        return self.table.data_size

    @property
    def fetched(self) -> int:
        """Bytes of the blob that are here."""
        count: int = _HEAD.unpack_from(self._present, 0)[2]
        return count

    @property
    def whole(self) -> bool:
        """Whether nothing is missing; it may not be verified yet."""
        with self._lock:
            self._here_before = self.next_absent(self._here_before)
            return self._here_before == self.table.spans

    def has(self, number: int) -> bool:
        """Whether the contents of a span are here."""
        return self._present[_HEAD.size + number] in _HAS

    def has_all(self, spans: range) -> bool:
        """Whether the contents of spans are here."""
        at = _HEAD.size
        return not self._present[at + spans.start : at + spans.stop].translate(None, _HAS)

    def keeps(self, number: int) -> bool:
        """Whether all of a span is here, the blob's bytes as well."""
        return self._present[_HEAD.size + number] in (_HERE, _BORROWED)

    def next_absent(self, number: int) -> int:
        """The first span from ``number`` on of which something is missing; the number of spans if
        there is none."""
        return self._next(_NOT_KEPT, number)

    def next_present(self, number: int) -> int:
        """The first span from ``number`` on all of which is here; the number of spans if there is
        none."""
        return self._next(_KEPT, number)

    def _next(self, states: re.Pattern[bytes], number: int) -> int:
        found = states.search(self._present, _HEAD.size + number)
        return found.start() - _HEAD.size if found else self.table.spans

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of the data files, whose spans must be here."""
        return self.data.read(offset, length)

    @property
    def is_there(self) -> bool:
        """Whether its directory still holds this very layer; looks at files."""
        with suppress(FileNotFoundError):
            return (self.directory / _PRESENT).stat().st_ino == self.identity
        return self.complete and self.directory.exists()

    # --- taking in ---------------------------------------------------------------------

    def read_blob(self, number: int) -> bytes | None:
        """The bytes of a span as the registry sent them; None if it did not."""
        if self._present[_HEAD.size + number] != _HERE:
            return None
        return self._pread(number)

    def _pread(self, number: int) -> bytes:
        """What the blob has of a span, be it here or not."""
        start, end = self.table.range_of(number)
        return os.pread(self._blob, end - start, start)

    def take(self, number: int, blob: memoryview, *, borrowed: bool = False) -> None:
        """Verify a span's bytes and keep them.

        Args:
            borrowed: they come from another blob.

        Raises:
            DigestMismatch: they are wrong; nothing was kept.
            StorageFailed: the disk is full or failed.
        """
        if self.keeps(number):
            return
        with INFLATING:
            contents = self.verified(number, blob)
            if not self.has(number):
                self._write_all(contents)
            del contents
        self.take_raw(self.table.range_of(number)[0], blob)
        self.arrived(number, how=_BORROWED if borrowed else _HERE)

    def verified(self, number: int, blob: memoryview) -> list[tuple[Piece, memoryview]]:
        """The contents of a span by its bytes. Raises DigestMismatch: they are wrong."""
        return list(self._inflater.pieces(number, blob))

    def take_contents(self, number: int, contents: Sequence[bytes]) -> None:
        """Verify the contents of a span's pieces, which come from elsewhere, and keep them. The
        blob's bytes are still missing. Raises as ``take``."""
        pieces = self.table.pieces_of(self.table.span(number))
        verified = []
        for piece, content in zip(pieces, contents, strict=True):
            if hashlib.sha256(content).digest() != piece.digest:
                raise DigestMismatch(f"what another layer has of {self.diff_id} is damaged")
            verified.append((piece, memoryview(content)))
        self._write_all(verified)
        with self._lock:
            if not self.has(number):
                self._present[_HEAD.size + number] = _CONTENTS

    def _write_all(self, contents: Sequence[tuple[Piece, memoryview]]) -> None:
        for piece, content in contents:
            self.write_contents(piece.target, content)

    def write_contents(self, offset: int, piece: memoryview) -> None:
        """Put verified bytes in the data files. Raises StorageFailed."""
        with storage(f"writing the layer in {self.directory}"):
            self.data.write(offset, piece)

    def take_raw(self, offset: int, piece: memoryview) -> None:
        """Keep bytes of the blob that nobody reads before the layer is complete."""
        with storage(f"writing the layer in {self.directory}"):
            write_all(self._blob, piece, offset)

    def arrived(self, *numbers: int, how: int = _HERE) -> None:
        """All bytes of these spans are kept."""
        with self._lock:
            fresh = [number for number in numbers if not self.keeps(number)]
            ranges = map(self.table.range_of, fresh)
            # The sum first: a process that dies in between leaves one that is too high, which
            # only a percentage shows.
            self._set_fetched(self.fetched + sum(end - start for start, end in ranges))
            for number in fresh:
                self._present[_HEAD.size + number] = how

    def forget(self, number: int) -> None:
        """A span has to come again."""
        start, end = self.table.range_of(number)
        with self._lock:
            if self.keeps(number):
                self._set_fetched(self.fetched - (end - start))
            self._present[_HEAD.size + number] = 0
            self._here_before = min(self._here_before, number)

    def _set_fetched(self, count: int) -> None:
        struct.pack_into("<Q", self._present, 24, min(max(count, 0), self.table.blob_size))

    def _recheck(self) -> None:
        """After a power cut: what was verified may never have reached the disk."""
        log.info("verifying what is here of %s after a restart of the machine", self.diff_id)
        for number in range(self.table.spans):
            if not self.has(number):
                continue
            kept, borrowed = self.keeps(number), self._is_borrowed(number)
            self.forget(number)
            if kept and self.table.can_verify(number):
                # What holds no contents can't be verified alone, and is short.
                with suppress(DigestMismatch):
                    self.take(number, memoryview(self._pread(number)), borrowed=borrowed)
        self.data.sync()
        os.fsync(self._blob)
        self._present[8:24] = _boot_id()

    # --- the end -----------------------------------------------------------------------

    def verify(self, cancelled: Callable[[], bool]) -> None:
        """Check the whole blob against its digest, what it unpacks to against the diff_id, and
        what was said of it against that.

        Raises:
            WrongBlob: the blob's bytes are not those of its digest.
            DigestMismatch, InvalidLayer, LimitExceeded: they are, and something else is wrong.
            CorruptContent: the layer's index is damaged.
            PullCancelled: ``cancelled()`` returned true.
        """
        blob, archive = hashlib.sha256(), hashlib.sha256()
        check = ArchiveCheck(self.directory / "index", self.data)
        with open(os.dup(self._blob), "rb", buffering=0) as file:
            file.seek(0)

            def chunks() -> Iterator[bytes]:
                while chunk := file.read(CHUNK):
                    if cancelled():
                        raise PullCancelled("the layer is not verified yet")
                    blob.update(chunk)
                    yield chunk

            source = ChunkReader(chunks())
            reader = inflated(source, self.record.blob.media_type)
            buffer = memoryview(bytearray(_INFLATED))
            try:
                while count := reader.fill(buffer):
                    archive.update(buffer[:count])
                    check.feed(buffer[:count])
            except StoreError:
                for _ in chunks():  # the blob's digest says whose fault it is
                    pass
                _compare(self.record.blob.digest, blob.hexdigest(), "the layer's blob", WrongBlob)
                raise
            for _ in chunks():
                pass
        _compare(self.record.blob.digest, blob.hexdigest(), "the layer's blob", WrongBlob)
        _compare(self.diff_id, archive.hexdigest(), "what the blob unpacks to", DigestMismatch)
        check.finish()

    def forget_borrowed(self) -> bool:
        """Forget what came from other layers' blobs; whether there was any."""
        return self._forget_all(self._is_borrowed)

    def _is_borrowed(self, number: int) -> bool:
        return self._present[_HEAD.size + number] == _BORROWED

    def forget_unverified(self) -> bool:
        """Forget the spans of which only the blob's digest covers all, and those that are damaged
        behind their contents; whether there were any. Blocks while it reads the blob."""
        return self._forget_all(self._is_doubtful)

    def _forget_all(self, which: Callable[[int], bool]) -> bool:
        spans = [number for number in range(self.table.spans) if which(number)]
        for number in spans:
            self.forget(number)
        return bool(spans)

    def forget_blob(self) -> bool:
        """Forget the blob's bytes, but not the contents: other bytes may inflate to the same.
        Whether there are any that were verified by what comes out of them."""
        if self.table.in_order:  # each span was verified by its bytes
            return False
        unverified = [n for n in range(self.table.spans) if self.table.is_empty(n)]
        with self._lock:
            states = self._present[_HEAD.size :].translate(_WITHOUT_BLOB)
            self._present[_HEAD.size :] = states
            for number in unverified:
                self._present[_HEAD.size + number] = 0
            self._set_fetched(0)
            self._here_before = 0
        return True

    def repair(self, cancelled: Callable[[], bool]) -> bool:
        """Write contents again that the disk does not have as they were written; whether there
        were any. All of the blob must be here and right.

        Raises:
            DigestMismatch: the contents in the blob are others than the layer's table says.
            CorruptContent: that is damaged.
            StorageFailed: the disk failed.
            PullCancelled: ``cancelled()`` returned true.
        """
        repaired = False
        for number in range(self.table.spans):
            if cancelled():
                raise PullCancelled("the layer is not mended yet")
            if not self.table.is_empty(number):  # else it is as long as it likes
                repaired |= self._repair(number)
        return repaired

    def _repair(self, number: int) -> bool:
        repaired = False
        with storage(f"mending the layer in {self.directory}"):
            for piece, content in self.verified(number, memoryview(self._pread(number))):
                if self.read(piece.target, piece.size) != content:
                    self.write_contents(piece.target, content)
                    repaired = True
        return repaired

    def _is_doubtful(self, number: int) -> bool:
        if self.table.in_order:  # each was verified by its own bytes, which the disk may have lost
            digest = hashlib.sha256(self._pread(number)).digest()
            return digest != self.table.span(number).digest
        if not self.table.can_verify(number):
            return True
        blob = self.read_blob(number)
        # The headers of the files that come next are in the same member as a content.
        return self.table.codec == Codec.GZIP and blob is not None and not are_members(blob)

    def finish(self, cas: Cas) -> None:
        """Make the verified layer complete, durably. May be repeated.

        Raises:
            StorageFailed: the disk failed.
        """
        with storage(f"completing the layer in {self.directory}"):
            self.data.sync()
            cas.adopt(self.record.blob.content, self._blob, self.directory / "blob")
            # Nobody reads the blob: it need not stay in memory beside what is read.
            os.posix_fadvise(self._blob, 0, 0, os.POSIX_FADV_DONTNEED)
            _mark_complete(self.directory)
        self._inflater.close()
        self.complete = True

    def refuse(self, sentence: str) -> None:
        """Remember that the blob is wrong as a whole."""
        temporary = self.directory / f"{_REFUSED}.tmp"
        temporary.write_text(sentence)
        temporary.rename(self.directory / _REFUSED)

    def close(self) -> None:
        """Let go of the files."""
        self._opened.close()


def _compare(wanted: str, found: str, what: str, wrong: type[DigestMismatch]) -> None:
    if wanted != f"sha256:{found}":
        raise wrong(
            f"{what} hashes to sha256:{found} instead of {wanted}; the registry or the way to it "
            "is damaged or hostile, push the image again"
        )


def settle(directory: Path, cas: Cas) -> bool:
    """Complete a layer whose verified blob is in the store's content already, as after a process
    was killed in ``finish``; whether it is complete now.

    Raises:
        StorageFailed: the disk failed.
        CorruptContent: its blob is lost.
    """
    if is_complete(directory):
        return True
    if (directory / "blob").exists():
        return False
    if not cas.contains(read_record(directory).blob.content):
        raise _damaged("blob", directory)
    with storage(f"completing the layer in {directory}"):
        _mark_complete(directory)
    return True


def _mark_complete(directory: Path) -> None:
    set_wanted(directory, wanted=True)  # nothing is left to be held back
    (directory / _PRESENT).unlink(missing_ok=True)
    sync_directory(directory)
