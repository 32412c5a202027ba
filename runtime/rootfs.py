"""Root filesystems: overlayfs over one EROFS mount per layer, which all containers share.

    <run>/layers/<key>              a layer's EROFS image, mounted once, read-only
    <run>/layers/<key>.f            the same while its contents come through the layer server
    <run>/data/<key>                a link to the directory with a mounted layer's contents
    <run>/empty                     the lower directory of images that have no layer
    <run>/containers/<uid>/rootfs   a container's overlay

What is mounted is asked of the kernel each time: mounts outlive this process, and the
next one goes on with them.
"""

import errno
import logging
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Literal

from runtime import linux
from runtime.errors import ContainerBusy, MountFailed, Unsupported
from runtime.layerserver.protocol import Device
from store import data_files, lazy
from store.cas import Digest
from store.erofs import lacks_acls
from store.layers import LayerImage

log = logging.getLogger(__name__)

Method = Literal["file", "loop"]

# At the end of the names of layers that the layer server serves; 128 names must stay short.
_SERVED = ".f"

# mount(2) copies one page of options.
_OPTIONS_MAX = os.sysconf("SC_PAGE_SIZE") - 1

# Overlay options, the same whatever the kernel was built with (filesystems/overlayfs.rst):
# - index=off: an index ties the upper directory to these very lower mounts by their file
#   handles, so the container could not start again after its layers were mounted anew.
# - redirect_dir=nofollow, metacopy=off: both make upper directories that only overlayfs
#   understands, and both would follow trusted.overlay.* attributes that a hostile layer
#   brings. Renaming a directory of the image gives EXDEV instead, which mv handles.
# - xino=auto: one st_dev for the whole tree where inode numbers leave room, as find -xdev
#   and du -x expect.
_POLICY = "index=off,redirect_dir=nofollow,metacopy=off"
_WRITABLE_POLICY = f"{_POLICY},xino=auto"

# For layers as well: a view by bind mount has these flags from its first moment, and what a
# container may do with its files depends on the flags of its overlay alone.
_VIEW_FLAGS = linux.MS_RDONLY | linux.MS_NOSUID | linux.MS_NODEV


class Rootfs:
    """Mounts and unmounts. Every method blocks; safe to use from several threads.

    Args:
        run: directory for mountpoints, for this program alone.
        method: how to mount EROFS images. None finds out: straight from the file, which
            kernels from 6.12 can, else through loop devices.
        devices: has an incomplete layer served, and says what to mount for it.
    """

    def __init__(
        self,
        run: Path,
        method: Method | None = None,
        devices: Callable[[Digest], Device] | None = None,
    ) -> None:
        self._layers = run / "layers"
        self._data = run / "data"
        self._empty = run / "empty"
        self._containers = run / "containers"
        self._method: Method | None = method
        self._devices = devices
        self._lock = threading.Lock()
        for directory in (run, self._layers, self._data, self._empty, self._containers):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        # The view of an empty image shows this directory's own attributes.
        self._empty.chmod(0o755)

    @property
    def method(self) -> Method | None:
        """How layers are mounted; None as long as no layer has been."""
        return self._method

    # --- layers ----------------------------------------------------------------------

    def layer(self, image: LayerImage) -> Path:
        """Where a layer is mounted, now if it was not before.

        Raises:
            MountFailed: the kernel refuses the image.
            Unsupported: the kernel has no EROFS, or no way to mount it.
        """
        served = self._served(image)
        target = self._layers / (image.key[: -len(_SERVED)] + _SERVED if served else image.key)
        with self._lock:
            if not linux.is_mountpoint(str(target)):
                target.mkdir(mode=0o700, exist_ok=True)
                files = image.data.paths if image.data else ()
                devices = [Path(served)] * len(files) if served else files
                self._mount_layer(image.meta, devices, str(target))
                if image.data and not served:
                    with suppress(FileExistsError):
                        (self._data / target.name).symlink_to(image.data.directory)
        return target

    def _served(self, image: LayerImage) -> str | None:
        """The file that the layer server serves in place of each data file, if it does."""
        if image.incomplete is None:
            return None
        if self._devices is None:
            raise MountFailed(f"the layer {image.incomplete} is incomplete, and nobody serves it")
        return self._devices(image.incomplete).served

    def forget_layers(self, *, only_served: bool) -> bool:
        """Detach layers so that they are mounted anew: all, or those whose server has died. Who
        uses them keeps them as they are.

        Returns:
            Whether there were any.
        """
        found = False
        with self._lock:
            for mount in linux.mounts():
                path = Path(mount.target)
                served = path.name.endswith(_SERVED)
                if path.parent == self._layers and (served or not only_served):
                    linux.umount(mount.target, linux.MNT_DETACH | linux.UMOUNT_NOFOLLOW)
                    found = True
        return found

    def _mount_layer(self, meta: Path, devices: Sequence[Path], target: str) -> None:
        try:
            if self._method != "loop":
                try:
                    mount_file(meta, devices, target)
                    self._method = "file"
                    return
                except OSError as error:
                    # ENOTBLK: the kernel mounts EROFS from block devices only. EINVAL: not from
                    # files of this file system, for example tmpfs; or the image is bad.
                    if self._method == "file" or error.errno not in (errno.ENOTBLK, errno.EINVAL):
                        raise
            mount_loop(meta, devices, target)
            self._method = "loop"
        except OSError as error:
            raise _layer_failure(meta, error) from error

    def unmount_unused_layers(self) -> None:
        """Unmount the layers that no container needs. Views that are still there keep working.

        Other instances have layers of the same names, and overlays made of them.
        """
        with self._lock:
            mounts = linux.mounts()
            ours = (m for m in mounts if Path(m.target).is_relative_to(self._containers))
            used = {key for mount in ours for key in _lower_keys(mount)}
            for mount in mounts:
                path = Path(mount.target)
                if path.parent == self._layers and path.name not in used:
                    with suppress(OSError):
                        # Detached, because whoever looks at all mounts of the machine (df, a
                        # monitoring agent) makes a plain umount fail for that moment.
                        linux.umount(mount.target, linux.MNT_DETACH | linux.UMOUNT_NOFOLLOW)
                        (self._data / path.name).unlink(missing_ok=True)
                        path.rmdir()

    def release_copies(self) -> None:
        """Let the kernel forget what it has read of the files with layers' contents: EROFS keeps in
        memory what it reads of them. Those of incomplete layers are still to be written."""
        for link in self._data.iterdir():
            directory = Path(os.path.realpath(link))
            if lazy.is_complete(directory):
                for path in directory.glob(f"{data_files.NAME}*"):
                    with suppress(OSError):  # gone; and nothing is lost if it can't be opened
                        _release(path)

    # --- merged trees ----------------------------------------------------------------

    def image_view(self, layers: Sequence[LayerImage], target: str) -> None:
        """Mount the merged layers at ``target``: read-only, no devices, no set-user-ID.

        Args:
            layers: bottom first; one is shown as it is, none is an empty directory.
            target: a directory, which may lie in a FUSE filesystem that this process
                serves in another thread.

        Raises:
            MountFailed, Unsupported: as layer(), and when the target is gone.
        """
        mounted = [self.layer(layer) for layer in layers]
        try:
            if len(mounted) > 1:
                options = f"lowerdir={_lowerdir(mounted)},{_POLICY}"
                self._mount_overlay(target, _VIEW_FLAGS, options)
            else:
                source = str(mounted[0] if mounted else self._empty)
                linux.mount(source, target, "", linux.MS_BIND)
                # Flags of a bind mount count only when it is remounted.
                linux.mount("", target, "", linux.MS_REMOUNT | linux.MS_BIND | _VIEW_FLAGS)
        except OSError as error:
            raise MountFailed(
                f"the image's files cannot be mounted at {target}: {error.strerror}",
                errno=error.errno,
            ) from error

    def unmount_view(self, target: str) -> None:
        """Unmount an image's view, also while somebody looks at it."""
        linux.umount(target, linux.MNT_DETACH | linux.UMOUNT_NOFOLLOW)

    def container_path(self, uid: str) -> Path:
        """Where the root filesystem of a container is mounted, if it is."""
        return self._containers / uid / "rootfs"

    def container(self, uid: str, layers: Sequence[LayerImage], upper: Path, work: Path) -> Path:
        """Mount the root filesystem of a container unless it is there already.

        Args:
            uid: names the mountpoint.
            layers: bottom first.
            upper: takes all changes; must be on a filesystem that can be an upper one.
            work: overlayfs' own, next to ``upper``.

        Raises:
            MountFailed, Unsupported: as layer(), and when ``upper`` cannot be used.
        """
        target = self.container_path(uid)
        if linux.is_mountpoint(str(target)):
            return target
        lowers = [self.layer(layer) for layer in layers] or [self._empty]
        target.mkdir(mode=0o700, parents=True, exist_ok=True)
        options = (
            f"lowerdir={_lowerdir(lowers)},upperdir={_escape(upper)},workdir={_escape(work)},"
            f"{_WRITABLE_POLICY}"
        )
        try:
            self._mount_overlay(str(target), 0, options)
        except OSError as error:
            raise MountFailed(
                f"overlayfs cannot be mounted over {len(lowers)} layers with {upper} on top:"
                f" {error.strerror}; the kernel's log (dmesg) says more",
                errno=error.errno,
            ) from error
        return target

    def _mount_overlay(self, target: str, flags: int, options: str) -> None:
        if len(os.fsencode(options)) > _OPTIONS_MAX:
            raise Unsupported(
                "the image has too many layers for one overlayfs mount, whose options are"
                f" {_OPTIONS_MAX} bytes at most; build it with fewer"
            )
        linux.in_directory(
            str(self._layers), lambda: linux.mount("overlay", target, "overlay", flags, options)
        )

    def is_mounted(self, uid: str) -> bool:
        """Whether the container's root filesystem is mounted."""
        return linux.is_mountpoint(str(self.container_path(uid)))

    def unmount(self, uid: str) -> None:
        """Unmount the root filesystem of a container, if it is mounted.

        Raises:
            ContainerBusy: a process has a file of it open or its working directory there.
        """
        target = str(self.container_path(uid))
        try:
            linux.umount(target)
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise ContainerBusy(
                    f"a process on this machine uses the root filesystem; `fuser -m {target}`"
                    " shows which"
                ) from None
            if error.errno not in (errno.EINVAL, errno.ENOENT):
                raise MountFailed(f"cannot unmount {target}: {error.strerror}") from error

    def detach(self, uid: str) -> None:
        """Take the root filesystem of a container away, also while somebody looks at it."""
        with suppress(OSError):  # it is not mounted
            target = str(self.container_path(uid))
            linux.umount(target, linux.MNT_DETACH | linux.UMOUNT_NOFOLLOW)

    def unmount_idle(self, uid: str) -> None:
        """Unmount it if nobody used it since the last call for it."""
        linux.expire_mount(str(self.container_path(uid)))

    def close(self) -> None:
        """Unmount what no running container needs. Others that are in use stay, too."""
        self.unmount_unused_layers()


def _release(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def mount_file(meta: Path, devices: Sequence[Path], target: str) -> None:
    """Mount an EROFS image straight from its file.

    Data files are named through descriptors: ``device=`` knows no way to write a comma in a path.
    """
    with ExitStack() as held:
        names = []
        for path in devices:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            held.callback(os.close, descriptor)
            names.append(f"/proc/self/fd/{descriptor}")
        linux.mount(str(meta), target, "erofs", _VIEW_FLAGS, _options(meta, names))


def mount_loop(meta: Path, devices: Sequence[Path], target: str) -> None:
    """Mount an EROFS image through loop devices, which go with the mount."""
    with ExitStack() as held:
        names = []
        for path in (meta, *devices):
            descriptor, name = linux.attach_loop(str(path))
            held.callback(os.close, descriptor)
            names.append(name)
        linux.mount(names[0], target, "erofs", _VIEW_FLAGS, _options(meta, names[1:]))


def _options(meta: Path, devices: Sequence[str]) -> str:
    options = [f"device={device}" for device in devices]
    if lacks_acls(meta):
        options.append("noacl")
    return ",".join(options)


def _layer_failure(meta: Path, error: OSError) -> MountFailed | Unsupported:
    if error.errno == errno.ENODEV:
        return Unsupported("this kernel has no EROFS; load it with `modprobe erofs`")
    return MountFailed(
        f"the layer image {meta} cannot be mounted: {error.strerror}; pull the image"
        " again, or see the kernel's log (dmesg)",
        errno=error.errno,
    )


def _lowerdir(layers: Sequence[Path]) -> str:
    """Layers, bottom first, as the option wants them: top first, relative, so that 128 fit."""
    names = (layer.name if layer.name != "empty" else "../empty" for layer in reversed(layers))
    return ":".join(names)


def _lower_keys(mount: linux.Mount) -> list[str]:
    """The layers that an overlay of ours was mounted of."""
    if mount.fstype != "overlay":
        return []
    values = (option.partition("=") for option in mount.options.split(","))
    return [
        Path(name).name
        for key, _, value in values
        if key in ("lowerdir", "lowerdir+")
        for name in value.split(":")
    ]


def _escape(path: Path) -> str:
    """A path in an overlay option, where commas separate and a backslash takes that away."""
    return str(path).replace("\\", "\\\\").replace(",", "\\,").replace(":", "\\:")
