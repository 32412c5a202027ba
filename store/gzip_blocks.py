"""gzip streams inflated block by block: the places at which inflating can begin again.

A deflate stream is a row of blocks, each with codes of its own. Whoever knows where one begins,
to the bit, and the 32 KiB that came out before it can begin there (RFC 1951). zlib stops at
these places if it is called with Z_BLOCK, which Python's module does not offer; so its library
is called here, which works without the interpreter lock. Measured for 74 MB of gzip, 229 MB
inflated, one core: 0.68 s. indexed_gzip needs 0.73 s for its index alone, and then the bytes
have to be inflated again to hash and parse them; rapidgzip needs 0.48 s, but puts its
checkpoints 4 MiB apart and gives them at the end, with the same consequence.
"""

import ctypes
from ctypes.util import find_library
from typing import BinaryIO

import msgspec

from store.errors import InvalidLayer

# A call inflates at most about what comes out of so many bytes, some milliseconds.
_CHUNK = 256 << 10

_Z_NO_FLUSH = 0
_Z_OK = 0
_Z_STREAM_END = 1
_Z_BUF_ERROR = -5
_Z_BLOCK = 5
_GZIP = 15 + 16  # windowBits: the largest window, with gzip's header and trailer
_MAGIC = 0x1F


class _Stream(ctypes.Structure):
    """z_stream of zlib.h."""

    _fields_ = (
        ("next_in", ctypes.c_void_p),
        ("avail_in", ctypes.c_uint),
        ("total_in", ctypes.c_ulong),
        ("next_out", ctypes.c_void_p),
        ("avail_out", ctypes.c_uint),
        ("total_out", ctypes.c_ulong),
        ("msg", ctypes.c_char_p),
        ("state", ctypes.c_void_p),
        ("zalloc", ctypes.c_void_p),
        ("zfree", ctypes.c_void_p),
        ("opaque", ctypes.c_void_p),
        ("data_type", ctypes.c_int),
        ("adler", ctypes.c_ulong),
        ("reserved", ctypes.c_ulong),
    )


_POINTER = ctypes.POINTER(_Stream)


def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(find_library("z") or "libz.so.1")
    library.zlibVersion.restype = ctypes.c_char_p
    library.inflateInit2_.argtypes = (_POINTER, ctypes.c_int, ctypes.c_char_p, ctypes.c_int)
    library.inflate.argtypes = (_POINTER, ctypes.c_int)
    library.inflateReset.argtypes = (_POINTER,)
    library.inflateEnd.argtypes = (_POINTER,)
    return library


class Boundary(msgspec.Struct, frozen=True, gc=False):
    """The beginning of a block: ``bits`` of the highest bits of the byte before ``start``, whose
    value is ``lead``, belong to it. ``first``: it is the first of a member, without history."""

    start: int
    bits: int
    lead: int
    first: bool


class GzipBlocks:
    """Inflates gzip members one after another; checks the CRC and length of each.

    A context manager: its memory is the library's.

    Args:
        blob: to read from; at its beginning.

    Attributes:
        ended: everything has come out.
        consumed: bytes of the blob that went in.
    """

    def __init__(self, blob: BinaryIO) -> None:
        self._blob = blob
        self._zlib = _library()
        self._stream = _Stream()
        # The byte before the chunk is the last of the chunk before: a block may begin in it.
        self._buffer = (ctypes.c_ubyte * (1 + _CHUNK))()
        self._view = memoryview(self._buffer).cast("B")
        self._address = ctypes.addressof(self._buffer) + 1
        self._length = 0  # of the chunk
        self._offset = 0  # of the chunk in the blob
        self._in_member = True
        self.ended = False
        version = self._zlib.zlibVersion()
        size = ctypes.sizeof(_Stream)
        if self._zlib.inflateInit2_(ctypes.byref(self._stream), _GZIP, version, size) != _Z_OK:
            raise MemoryError

    def __enter__(self) -> "GzipBlocks":
        return self

    def __exit__(self, *_: object) -> None:
        self._zlib.inflateEnd(ctypes.byref(self._stream))

    @property
    def consumed(self) -> int:
        return self._offset + self._length - int(self._stream.avail_in)

    def inflate(self, address: int, room: int, stop: bool) -> tuple[int, Boundary | None]:
        """Go on until there is no room, or to the next place where a block begins.

        Args:
            address: of the memory for what comes out, ``room`` bytes.
            stop: whether blocks matter.

        Returns:
            How many bytes came out, and the block that begins after them.

        Raises:
            InvalidLayer: the stream is damaged or cut off.
        """
        stream = self._stream
        stream.next_out, stream.avail_out = address, room
        flush = _Z_BLOCK if stop else _Z_NO_FLUSH
        while not self.ended and stream.avail_out:
            if not stream.avail_in:
                self._read()
            if not self._in_member:
                self._next_member()
                continue
            code = self._zlib.inflate(ctypes.byref(stream), flush)
            if code == _Z_STREAM_END:
                self._in_member = False
            elif code not in (_Z_OK, _Z_BUF_ERROR):
                raise self._damaged((stream.msg or b"").decode() or f"zlib error {code}")
            elif (
                stop and stream.data_type & 0xC0 == 0x80
            ):  # between blocks, and another one follows
                return room - int(stream.avail_out), self._boundary()
        return room - int(stream.avail_out), None

    def _boundary(self) -> Boundary:
        at = self._length - int(self._stream.avail_in)
        bits = int(self._stream.data_type) & 7
        first = not self._stream.total_out
        return Boundary(self._offset + at, bits, self._view[at] if bits else 0, first)

    def _read(self) -> None:
        self._offset += self._length
        self._view[0] = self._view[self._length]
        self._length = self._blob.readinto(self._view[1:])  # type: ignore[attr-defined]
        self._stream.next_in, self._stream.avail_in = self._address, self._length
        if not self._length:
            if self._in_member:
                raise InvalidLayer(
                    f"the layer's gzip stream is cut off after {self._offset} bytes; "
                    "the image has to be built or pushed again"
                )
            self.ended = True

    def _next_member(self) -> None:
        """After a member: skip padding, as gzip(1) does, and begin the next one."""
        if self.ended:
            return
        stream = self._stream
        at = 1 + self._length - stream.avail_in
        rest = bytes(self._view[at : 1 + self._length]).lstrip(b"\0")
        stream.next_in = self._address + self._length - len(rest)
        stream.avail_in = len(rest)
        if rest:
            if rest[0] != _MAGIC:
                raise self._damaged("something else follows it")
            self._zlib.inflateReset(ctypes.byref(stream))
            self._in_member = True

    def _damaged(self, how: str) -> InvalidLayer:
        return InvalidLayer(
            f"the layer's gzip stream is damaged within its first {self.consumed} bytes ({how}); "
            "the image has to be built or pushed again"
        )
