"""images/: pulling, and all images by their names."""

import errno
from collections.abc import Mapping

import trio

from fs.context import Context, Top
from fs.image import ImageDirectory
from fs.nodes import Caller, CommandFile, Directory, FixedLink, Node, refuse
from store.config import MODES, Mode
from store.errors import CtrfsError, InvalidReference
from store.images import Image
from store.platform import parse_platform
from store.pull import PullRequest
from store.reference import parse_reference

DEFAULT_REGISTRY = "docker.io"
OFFICIAL = "docker.io/library"


class Pull(CommandFile):
    """Write `REF [platform=os/arch[/variant]] [mode=lazy|full] [as=NAME]` to get an image; the
    write returns when containers can start from it. REF is a name as docker knows it
    (`alpine:3.20`, `registry:5000/team/app@sha256:…`, also with `docker://` before it) or
    `oci:/path[:tag]`, an OCI image layout on this machine. With mode=lazy, the default, layers
    that allow it (see `layers/N/lazy`) come as their files are read, and by themselves while
    nobody reads; with mode=full all is here at the end. Ctrl-C ends the pull; what has
    arrived is used by the next one. Reading shows the pulls under way, one a line: name,
    state, percent, bytes here and in all."""

    name = "pull"
    parent: "Images"

    def read(self) -> str:
        """The pulls under way."""
        return "\n".join(progress.line() for progress in self.parent.context.pulls.progress())

    async def command(self, text: str, caller: Caller) -> None:
        """Pull one image. What is mounted of another that had the name goes away."""
        context = self.parent.context
        request = parse_pull(text)
        context.containers.expect_start()
        image = await context.pulls.pull(request)
        await context.automounts.refresh_below(f"{self.parent.path}/{image.name}")


def parse_pull(text: str) -> PullRequest:
    """The request in one line written to `pull`.

    Raises:
        TreeError: EINVAL, no reference, an unknown word, or a bad value.
    """
    words = text.split()
    if not words:
        refuse("write a reference, for example docker.io/library/alpine:3.20", errno.EINVAL)
    options: dict[str, str] = {}
    for word in words[1:]:
        key, equals, value = word.partition("=")
        if not equals or key not in ("platform", "mode", "as") or not value or key in options:
            refuse(
                f"{word!r} is not understood; after REF may stand platform=OS/ARCH, mode=lazy or"
                " mode=full, and as=NAME, each once",
                errno.EINVAL,
            )
        options[key] = value
    platform = options.get("platform")
    return PullRequest(
        source=words[0],
        platform=parse_platform(platform) if platform else None,
        as_name=options.get("as"),
        mode=_mode(options.get("mode")),
    )


def _mode(text: str | None) -> Mode | None:
    for mode in MODES:
        if text == mode:
            return mode
    if text is not None:
        refuse(f"mode={text} is not known; mode=lazy and mode=full are", errno.EINVAL)
    return None


class ShortName(FixedLink):
    """A name that leads to the full one, as docker completes it."""

    def __init__(self, parent: "Namespace", name: str, full_name: str) -> None:
        self.name = name
        self._full_name = full_name
        super().__init__(parent)

    def where(self) -> str:
        """Relative, up to images/ and down again."""
        assert isinstance(self.parent, Namespace)
        return "../" * self.parent.depth + self._full_name


class Namespace(Directory):
    """Images by their full names; a part of a name is a directory. Short names lead to the
    full ones. An image is removed by rmdir of its full name."""

    entry_timeout = 1.0
    attr_timeout = 1.0

    def __init__(self, parent: Directory, prefix: str, context: Context) -> None:
        self.context = context
        self.prefix = prefix
        self.depth = prefix.count("/") + 1 if prefix else 0
        if prefix:
            self.name = prefix.rpartition("/")[2]
        super().__init__(parent)

    def _below(self, path: str) -> bool:
        return any(name.startswith(path + "/") for name in _names(self.context))

    def find(self, name: str) -> Node | None:
        """An image, a part of a name, or a short name."""
        path = f"{self.prefix}/{name}" if self.prefix else name
        if path in _names(self.context):
            return ImageDirectory(self, path, self.context)
        if self._below(path):
            return Namespace(self, path, self.context)
        full = self._complete(path)
        return ShortName(self, name, full) if full else None

    def _complete(self, path: str) -> str | None:
        """The full name, or the start of one, that ``path`` is short for."""
        try:
            full = str(parse_reference(path))
        except InvalidReference:
            full = ""
        if full in _names(self.context):
            return full
        for base in (DEFAULT_REGISTRY, OFFICIAL):
            if not self.prefix and self._below(f"{base}/{path}"):
                return f"{base}/{path}"
        return None

    def dynamic(self) -> list[str]:
        """The next parts of all names that begin with this one."""
        start = f"{self.prefix}/" if self.prefix else ""
        return sorted(
            {
                name[len(start) :].partition("/")[0]
                for name in _names(self.context)
                if name.startswith(start)
            }
        )

    async def rmdir(self, name: str) -> None:
        """Remove an image."""
        node = self.find(name)
        if isinstance(node, Namespace):
            refuse(f"{node.prefix} holds images; rmdir those", errno.ENOTEMPTY)
        if not isinstance(node, ImageDirectory):
            await super().rmdir(name)
            return
        if not node.complete:
            refuse(f"{node.full_name} is being pulled", errno.EBUSY)
        automounts = self.context.automounts
        with automounts.closed(node.path):
            if not await automounts.unmount_below(node.path):
                refuse(f"files of {node.full_name} are in use", errno.EBUSY)
            await trio.to_thread.run_sync(self.context.store.forget_image, node.full_name)


class DigestLink(FixedLink):
    """An image by its digest."""

    def __init__(self, parent: "ByDigest", digest: str, image: Image) -> None:
        self.name = digest
        self._image = image
        super().__init__(parent)

    def where(self) -> str:
        """The image's directory."""
        return f"../{self._image.name}"


class ByDigest(Directory):
    """Images by the digest of their manifest, as links; the digest of an index leads to the
    image that was chosen from it."""

    name = "by-digest"
    attr_timeout = 1.0
    parent: "Images"

    def find(self, name: str) -> Node | None:
        """The image with this digest."""
        try:
            image = self.parent.context.store.images.by_digest(name)
        except CtrfsError:
            return None
        return DigestLink(self, name, image)

    def dynamic(self) -> list[str]:
        """The digests of all manifests."""
        return sorted({image.digest for image in self.parent.context.store.images})


class Images(Namespace):
    """Images. Write a reference to `pull`; the image then stands here as a directory under
    its full name (docker.io/library/alpine:3.20) and is found by short names as docker
    completes them (alpine:3.20). rmdir of the full name removes it."""

    name = "images"
    files = (Pull, ByDigest)

    def __init__(self, parent: Top) -> None:
        super().__init__(parent, "", parent.context)


def _names(context: Context) -> Mapping[str, None]:
    names = dict.fromkeys(context.store.images.names())
    names.update(dict.fromkeys(image.name for image in context.pulls.active()))
    return names
