"""From the fields of a tar header to an entry, checked: the same for archives and for tables of
contents, which repeat those fields."""

import stat

from store.errors import InvalidLayer, LimitExceeded
from store.index import Entry
from store.tar_names import NAME_MAX, PATH_MAX, clean_path, shown

# What to do about most broken archives.
REBUILD = "the image has to be built or pushed again"

# Extended attributes of one file, names and values. The kernel allows 64 KiB for a value
# and for the list of names; an EROFS value's length has 16 bits.
XATTR_VALUE_MAX = 65535
XATTR_TOTAL_MAX = 128 << 10

# Those the overlay driver acts on. In a layer they would be commands to it: a
# redirect shows any directory of the layers below under another name.
_OVERLAY_XATTRS = (b"trusted.overlay.", b"user.overlay.")
_XATTR_NAMESPACES = (b"user.", b"trusted.", b"security.")
_ACLS = (b"system.posix_acl_access", b"system.posix_acl_default")

_HARD_LINK = 0

_TYPES = {
    b"0": stat.S_IFREG,
    b"\0": stat.S_IFREG,
    b"7": stat.S_IFREG,  # "contiguous", a regular file everywhere
    b"S": stat.S_IFREG,  # sparse, old GNU format
    b"1": _HARD_LINK,
    b"2": stat.S_IFLNK,
    b"3": stat.S_IFCHR,
    b"4": stat.S_IFBLK,
    b"5": stat.S_IFDIR,
    b"6": stat.S_IFIFO,
}


def make_entry(
    kind: bytes,
    name: bytes,
    link: bytes,
    mode: int,
    uid: int,
    gid: int,
    size: int,
    seconds: int,
    nanoseconds: int,
    major: int,
    minor: int,
    xattrs: dict[bytes, bytes] | None,
) -> Entry:
    """The entry that fields as they stand in a header mean; ``offset`` is left 0.

    Raises:
        InvalidLayer: it leads or links out of the layer, or is what Linux does not have.
        LimitExceeded: its path or its attributes are too long.
    """
    path = clean_path(name)
    if path is None:
        raise InvalidLayer(
            f"{shown(name)} in the layer leads out of the image with '..'; do not trust this image"
        )
    if len(path) > NAME_MAX:
        _check_path(path)
    # The highest number means "leave it" to chown(2).
    if not (0 <= uid < 0xFFFFFFFF and 0 <= gid < 0xFFFFFFFF):
        raise InvalidLayer(
            f"{shown(path)} in the layer has owner {uid}:{gid}; "
            "Linux has numbers from 0 to 4294967294"
        )
    if not 0 <= size < 1 << 63:
        raise wrong_size(path, size)
    if not -(1 << 63) <= seconds < 1 << 63:
        raise InvalidLayer(f"{shown(path)} in the layer has a time beyond what Linux can hold")
    if xattrs is not None:
        _check_xattrs(xattrs, path)
    file_type = _TYPES.get(kind)
    mode &= 0o7777
    rdev = 0
    if kind == b"\0" and name[-1:] == b"/":
        file_type = stat.S_IFDIR  # v7 archives have no type for directories
    if file_type == stat.S_IFREG:
        return Entry(path, file_type | mode, uid, gid, seconds, nanoseconds, size, xattrs=xattrs)
    if file_type == _HARD_LINK:
        return Entry(path, 0, link=_hard_link(link, path))
    if file_type is None:
        raise InvalidLayer(
            f"{shown(path)} in the layer has the tar type {kind!r}, which layers can't hold"
        )
    if file_type == stat.S_IFLNK:
        link = _symlink(link, path)
        mode = 0o777  # whatever it says: no system call can make it another
    else:
        link = b""
        if file_type in (stat.S_IFCHR, stat.S_IFBLK):
            rdev = _device(file_type, major, minor, path)
    return Entry(
        path,
        file_type | mode,
        uid,
        gid,
        seconds,
        nanoseconds,
        len(link),
        0,
        rdev,
        link,
        xattrs,
    )


def is_kept(xattr: bytes) -> bool:
    """Whether EROFS can hold an attribute of this name and overlayfs takes it not for its own.

    Others (``system.nfs4_acl``, ``btrfs.compression``) belong to filesystems that the image
    was built on; container runtimes drop what the filesystem refuses.

    Raises ValueError: no attribute can have the name.
    """
    if b"\0" in xattr or len(xattr) > NAME_MAX:
        raise ValueError
    if xattr.startswith(_OVERLAY_XATTRS):
        return False
    return xattr in _ACLS or (xattr.startswith(_XATTR_NAMESPACES) and not xattr.endswith(b"."))


def encode_device(major: int, minor: int) -> int:
    """Device numbers in 32 bits as the kernel's new_encode_dev() does: 12 and 20 bits."""
    return minor & 0xFF | major << 8 | (minor & ~0xFF) << 12


def wrong_size(path: bytes, size: int) -> InvalidLayer:
    return InvalidLayer(
        f"{shown(path)} in the layer has the size {size}, which no file has; {REBUILD}"
    )


def _check_path(path: bytes) -> None:
    if len(path) >= PATH_MAX:
        raise LimitExceeded(
            f"{shown(path)} in the layer has a path of {len(path)} bytes; Linux allows 4095"
        )
    longest = max(map(len, path.split(b"/")))
    if longest > NAME_MAX:
        raise InvalidLayer(
            f"{shown(path)} in the layer has a name of {longest} bytes; Linux allows {NAME_MAX}"
        )


def _check_xattrs(xattrs: dict[bytes, bytes], path: bytes) -> None:
    total = 0
    for name, value in xattrs.items():
        total += len(name) + len(value)
        if len(value) > XATTR_VALUE_MAX or total > XATTR_TOTAL_MAX:
            raise LimitExceeded(
                f"{shown(path)} in the layer has extended attributes of {total} bytes or more; "
                f"supported are {XATTR_VALUE_MAX} in one and {XATTR_TOTAL_MAX} together"
            )


def _hard_link(target: bytes, path: bytes) -> bytes:
    clean = clean_path(target)
    if clean is None:
        raise InvalidLayer(
            f"{shown(path)} in the layer is a hard link to {shown(target)}, which leads out of "
            "the image with '..'; do not trust this image"
        )
    return clean


def _symlink(target: bytes, path: bytes) -> bytes:
    if not target or len(target) >= PATH_MAX:
        raise InvalidLayer(
            f"{shown(path)} in the layer is a symbolic link with a text of {len(target)} bytes; "
            "Linux allows 1 to 4095"
        )
    return target


def _device(file_type: int, major: int, minor: int, path: bytes) -> int:
    if not (0 <= major < 1 << 12 and 0 <= minor < 1 << 20):
        raise InvalidLayer(
            f"{shown(path)} in the layer is the device {major}:{minor}; "
            "Linux has numbers up to 4095:1048575"
        )
    if file_type == stat.S_IFCHR and not major and not minor:
        raise InvalidLayer(
            f"{shown(path)} in the layer is the character device 0:0, by which overlayfs "
            "marks deleted files; a layer marks them by names that begin with '.wh.'"
        )
    return encode_device(major, minor)
