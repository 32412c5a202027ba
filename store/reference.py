"""Image references and where images come from.

The rules are docker's (distribution/reference, "normalized" references): a first part
without dot, colon and capitals that is not ``localhost`` belongs to the path, Docker Hub
is the default registry, ``library/`` goes before its one-part names, ``latest`` is the
default tag.
"""

import os.path
import re
from pathlib import Path

import msgspec

from store.cas import Digest, parse_digest
from store.errors import InvalidReference

DEFAULT_REGISTRY = "docker.io"
DEFAULT_TAG = "latest"

# What stands beside the registries in the tree of images.
RESERVED = frozenset({"README", "pull", "by-digest"})

# Registries and docker refuse longer repository names.
NAME_LENGTH = 255

_LABEL = r"[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?"
_HOST = rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[a-fA-F0-9:]+\])"
_REGISTRY = re.compile(rf"{_HOST}(?::(?P<port>[0-9]{{1,5}}))?")
_USUAL_PORT = 443
_COMPONENT = r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*"
_REPOSITORY = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*")
_TAG = re.compile(r"[a-zA-Z0-9_][a-zA-Z0-9_.-]{0,127}")
_HEX_NAME = re.compile(r"[0-9a-f]{64}")


class Reference(msgspec.Struct, frozen=True):
    """A complete image name; ``str()`` gives it in its one normal form.

    At least one of ``tag`` and ``digest`` is set. With both, the digest decides.
    """

    registry: str
    repository: str
    tag: str | None = None
    digest: Digest | None = None

    @property
    def name(self) -> str:
        """Registry and repository."""
        return f"{self.registry}/{self.repository}"

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        digest = f"@{self.digest}" if self.digest else ""
        return f"{self.name}{tag}{digest}"


def parse_reference(text: str, default_registry: str = DEFAULT_REGISTRY) -> Reference:
    """The reference that ``text`` is short for.

    Raises:
        InvalidReference: docker would not accept it either.
    """
    if _HEX_NAME.fullmatch(text):
        raise _invalid(text, "64 hexadecimal digits are an ID, not a name")
    rest, at, digest_text = text.partition("@")
    digest = parse_digest(digest_text) if at else None
    registry, path = _split_registry(rest, default_registry)
    repository, colon, tag = path.partition(":")
    if colon and not _TAG.fullmatch(tag):
        raise _invalid(text, f"the tag {tag!r:.200} may hold up to 128 letters, digits, _ . and -")
    if registry == DEFAULT_REGISTRY and "/" not in repository:
        repository = f"library/{repository}"
    _check_names(text, registry, repository)
    return Reference(registry, repository, tag or (None if digest else DEFAULT_TAG), digest)


def check_own_name(reference: Reference) -> None:
    """Refuse a name under which an image would not be found in the tree of images.

    Raises:
        InvalidReference: a fixed file stands in its place.
    """
    if reference.registry in RESERVED:
        raise InvalidReference(
            f"{reference} would be hidden behind the file {reference.registry} of the tree; "
            "choose another name with as=NAME"
        )


def _split_registry(rest: str, default: str) -> tuple[str, str]:
    first, slash, path = rest.partition("/")
    is_host = "." in first or ":" in first or first == "localhost" or first != first.lower()
    if not slash or not is_host:
        return default, rest
    return (DEFAULT_REGISTRY if first == "index.docker.io" else first), path


def _check_names(text: str, registry: str, repository: str) -> None:
    match = _REGISTRY.fullmatch(registry)
    if not match or not 0 < int(match["port"] or _USUAL_PORT) < 1 << 16:
        raise _invalid(text, f"{registry!r:.200} is not a host name or address with a port")
    if not _REPOSITORY.fullmatch(repository):
        if repository != repository.lower():
            raise _invalid(text, "repository names must be lower-case")
        raise _invalid(
            text,
            f"the repository {repository!r:.200} may hold a-z, 0-9 and / . _ __ - between",
        )
    if len(registry) + 1 + len(repository) > NAME_LENGTH:
        raise _invalid(text, f"the name is longer than {NAME_LENGTH} characters")


def _invalid(text: str, why: str) -> InvalidReference:
    return InvalidReference(f"{text!r:.300} is not an image reference: {why}")


class RegistrySource(msgspec.Struct, frozen=True):
    """An image in a registry."""

    reference: Reference

    def __str__(self) -> str:
        return f"docker://{self.reference}"


class LayoutSource(msgspec.Struct, frozen=True):
    """An image in an OCI image layout directory; ``tag`` is its ``ref.name`` annotation."""

    path: Path
    tag: str | None = None

    def __str__(self) -> str:
        return f"oci:{self.path}" + (f":{self.tag}" if self.tag else "")

    def default_name(self, tag: str | None) -> Reference:
        """What the image is called unless the user says otherwise.

        Raises:
            InvalidReference: directory and tag don't make a reference.
        """
        try:
            return parse_reference(f"localhost/{self.path.name}:{tag or DEFAULT_TAG}")
        except InvalidReference as error:
            raise InvalidReference(
                f"{self} has no name that can be used here ({error.sentence}); "
                "choose one with as=NAME"
            ) from None


def parse_source(text: str) -> RegistrySource | LayoutSource:
    """Where to get an image: ``REF``, ``docker://REF`` or ``oci:/path[:tag]``.

    The path of a layout ends at the first colon, as for skopeo.

    Raises:
        InvalidReference: it is none of these.
    """
    if text.startswith("oci:"):
        path, colon, tag = text.removeprefix("oci:").partition(":")
        if not path.startswith("/") or "\0" in path or (colon and not tag):
            raise InvalidReference(
                f"{text!r:.300} is not an image layout; write oci:/path or oci:/path:tag"
            )
        return LayoutSource(Path(os.path.normpath(path)), tag or None)
    name = text.removeprefix("docker://")
    scheme, separator, _ = name.partition("://")
    if separator:
        raise _invalid(text, f"leave out {scheme + separator!r:.200}; registries are found without")
    return RegistrySource(parse_reference(name))
