"""From a source to the documents of one image: index, manifest, configuration."""

import time
from typing import Protocol

import msgspec

from store.cas import Cas, Digest
from store.errors import BlobNotFound, CorruptContent, InvalidManifest
from store.images import Image
from store.manifest import (
    Descriptor,
    ImageConfig,
    Index,
    Manifest,
    check_platform,
    check_sizes,
    choose,
    parse,
    parse_config,
)
from store.platform import Platform
from store.source import Source

# An index may name another one (OCI image-index.md); nobody nests deeper than this.
MAX_INDEXES = 3


# Documents up to this size are taken from the store; all real ones are smaller.
DOCUMENT = 1 << 20


class Found(msgspec.Struct, frozen=True):
    """One image, as far as its documents tell.

    ``resolved`` is what the source's name stands for, ``chosen`` the manifest in it;
    ``documents`` are the bytes of all of them, for the store.
    """

    resolved: Descriptor
    chosen: Descriptor
    manifest: Manifest
    config: ImageConfig
    documents: tuple[bytes, ...]

    def image(self, name: str, source: str) -> Image:
        """The record of the image under a name."""
        manifest = self.manifest
        blobs = {self.chosen.digest: self.chosen.size, manifest.config.digest: manifest.config.size}
        blobs.update((layer.digest, layer.size) for layer in manifest.layers)
        has_index = self.resolved.digest != self.chosen.digest
        return Image(
            name=name,
            source=source,
            digest=self.chosen.content,
            index_digest=self.resolved.content if has_index else None,
            config_digest=manifest.config.content,
            platform=self.config.platform,
            size=sum(blobs.values()),
            layers=manifest.layers,
            diff_ids=self.config.diff_ids,
            pulled_ns=time.time_ns(),
            config=self.config,
        )


class Documents(Protocol):
    """The part of ``Source`` that this module needs."""

    def resolve(self) -> tuple[Descriptor, bytes]: ...

    def fetch_manifest(self, descriptor: Descriptor) -> bytes: ...

    def fetch_config(self, descriptor: Descriptor) -> bytes: ...


class Cached:
    """A source's documents, from the store where they are here already."""

    def __init__(self, source: Source, cas: Cas) -> None:
        self._source = source
        self._cas = cas

    def resolve(self) -> tuple[Descriptor, bytes]:
        """What the name stands for is always asked anew."""
        return self._source.resolve()

    def fetch_manifest(self, descriptor: Descriptor) -> bytes:
        """See ``Source.fetch_manifest``."""
        return self._known(descriptor) or self._source.fetch_manifest(descriptor)

    def fetch_config(self, descriptor: Descriptor) -> bytes:
        """See ``Source.fetch_config``."""
        return self._known(descriptor) or self._source.fetch_config(descriptor)

    def _known(self, descriptor: Descriptor) -> bytes | None:
        # A name that leads to something longer than a document must get the source's refusal.
        try:
            if self._cas.stat(descriptor.content) == descriptor.size <= DOCUMENT:
                return self._cas.read(descriptor.content)
        except (BlobNotFound, CorruptContent):
            pass
        return None


def find(source: Documents, platform: Platform, what: str, layer_bytes: int) -> Found:
    """Ask a source for the image that fits a platform.

    Args:
        source: where to ask.
        platform: what the image has to run on.
        what: the image's name for error messages.
        layer_bytes: what a layer may have.

    Raises:
        NoMatchingPlatform: there is none.
        InvalidManifest, UnsupportedMediaType, LimitExceeded: a document can't be used.
        ImageNotFound, BlobNotFound, DigestMismatch, SizeMismatch, RegistryError: see ``Source``.
    """
    resolved, data = source.resolve()
    chosen, documents = resolved, [data]
    document = parse(data, resolved.media_type, _document_name(what, resolved.content))
    while isinstance(document, Index):
        if len(documents) > MAX_INDEXES:
            raise InvalidManifest(
                f"{what} is an index of indexes of indexes; the image has to be built again"
            )
        chosen = choose(document, platform, what)
        data = source.fetch_manifest(chosen)
        documents.append(data)
        document = parse(data, chosen.media_type, _document_name(what, chosen.content))
    check_sizes(document, layer_bytes, what)
    data = source.fetch_config(document.config)
    config = parse_config(data, document, what)
    check_platform(config, platform, what)
    return Found(resolved, chosen, document, config, (*documents, data))


def _document_name(what: str, digest: Digest) -> str:
    return f"the manifest {digest} of {what}"
