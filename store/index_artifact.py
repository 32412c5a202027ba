"""Indexes of layers in a registry, beside the image that they are for.

They are the layers of a manifest of their own, which refers to the image's manifest by its
``subject`` (OCI image specification 1.1, "Guidelines for Artifact Usage"; distribution
specification 1.1, "Listing Referrers"). The digest of an image covers nothing of that: whoever may
push to the repository can add such a manifest to any image in it. What comes of a wrong one is
limited to what the image's files seem to be until the layer is complete and compared with its
diff_id; whether to accept that is for the caller to decide.
"""

from collections.abc import Mapping
from functools import partial
from io import BytesIO
from typing import Annotated, Any, TypeVar

import msgspec

from store.cas import Digest, digest_of
from store.errors import InvalidManifest, LimitExceeded
from store.index_document import decode_index, document_max
from store.layer_index import LayerIndex
from store.manifest import MAX_LAYERS, OCI_INDEX, OCI_MANIFEST, Descriptor
from store.push import Pusher
from store.registry import Registry, referrers_tag
from store.unpack import LayerLimits

ARTIFACT_TYPE = "application/vnd.ctrfs.layer-index.v1"
DOCUMENT_TYPE = "application/vnd.ctrfs.layer-index.document.v1+zstd"

# Of an artifact's layer: the digest of the image's layer that it is the index of.
LAYER_ANNOTATION = "vnd.ctrfs.layer.digest"

# Registries before version 1.1 want a configuration, and some that list what refers to an image
# take the type of that for the artifact's (google/go-containerregistry).
CONFIG = b"{}"
CONFIG_DESCRIPTOR = Descriptor(ARTIFACT_TYPE, digest_of(CONFIG), len(CONFIG))

# Whoever makes an image's index again adds an artifact. The latest are looked at.
_ARTIFACTS_MAX = 4


class Artifact(msgspec.Struct, frozen=True, rename="camel"):
    """The manifest that an image's indexes are in."""

    schema_version: int
    media_type: str
    artifact_type: str
    config: Descriptor
    layers: Annotated[tuple[Descriptor, ...], msgspec.Meta(max_length=MAX_LAYERS)]
    subject: Descriptor


class Referrers(msgspec.Struct, frozen=True):
    """A list of what refers to a manifest; an OCI index."""

    manifests: tuple[Descriptor, ...]


# --- publishing --------------------------------------------------------------------------


def push_indexes(
    pusher: Pusher, registry: Registry, image: Descriptor, documents: Mapping[Digest, bytes]
) -> Descriptor:
    """Put an image's indexes into the repository that the image is in; the artifact's manifest.

    Where the registry keeps no list of what refers to the image, that under the tag is read and
    written again: of two that do this at once, one may be lost, as the specification says.

    Args:
        pusher, registry: of the same repository.
        image: the manifest of the image.
        documents: from ``encode_index``, by the digests of the layers.

    Raises:
        InvalidManifest, LimitExceeded: the list so far is broken.
        RegistryError: the registry can't be asked, or refuses.
    """
    blobs = {
        layer: Descriptor(DOCUMENT_TYPE, digest_of(document), len(document))
        for layer, document in documents.items()
    }
    pusher.put_blob(CONFIG_DESCRIPTOR.content, len(CONFIG), lambda: BytesIO(CONFIG))
    for layer, blob in blobs.items():
        pusher.put_blob(blob.content, blob.size, partial(BytesIO, documents[layer]))
    artifact = artifact_of(image, blobs)
    pushed = Descriptor(OCI_MANIFEST, digest_of(artifact), len(artifact))
    if not pusher.put_manifest(artifact, OCI_MANIFEST, pushed.digest):
        known = registry.fetch_referrers(image.content, ARTIFACT_TYPE)
        referrers = referrers_with(known, artifact)
        pusher.put_manifest(referrers, OCI_INDEX, referrers_tag(image.content))
    return pushed


def artifact_of(image: Descriptor, documents: Mapping[Digest, Descriptor]) -> bytes:
    """The manifest to push with an image's indexes.

    Args:
        image: the manifest of the image.
        documents: the index of each layer that has one, by the layer's digest; blobs of
            ``DOCUMENT_TYPE``. They and ``CONFIG`` have to be in the repository before.
    """
    layers = tuple(
        Descriptor(DOCUMENT_TYPE, document.digest, document.size, {LAYER_ANNOTATION: layer})
        for layer, document in documents.items()
    )
    subject = Descriptor(image.media_type, image.digest, image.size)
    return msgspec.json.encode(
        Artifact(2, OCI_MANIFEST, ARTIFACT_TYPE, CONFIG_DESCRIPTOR, layers, subject)
    )


def referrers_with(known: bytes | None, artifact: bytes) -> bytes:
    """The list for ``registry.referrers_tag`` with one more artifact, as its last.

    A registry that keeps lists itself says so by a header ``OCI-Subject`` when the artifact is
    pushed; in any other this has to be pushed after it.

    Args:
        known: the list so far, if there is one.

    Raises:
        InvalidManifest: it is none.
    """
    added = Descriptor(
        OCI_MANIFEST, digest_of(artifact), len(artifact), artifact_type=ARTIFACT_TYPE
    )
    document: dict[str, Any] = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": []}
    if known is not None:
        _referrers(known)
        document = msgspec.json.decode(known)  # with all that other clients wrote
    others = [other for other in document["manifests"] if other["digest"] != added.digest]
    document["manifests"] = [*others, msgspec.to_builtins(added)]
    return msgspec.json.encode(document)


# --- finding -----------------------------------------------------------------------------


def find_indexes(registry: Registry, image: Descriptor) -> dict[Digest, Descriptor]:
    """The documents of an image's indexes in its registry, by the layers' digests.

    Args:
        image: the manifest of the image.

    Raises:
        InvalidManifest, LimitExceeded, DigestMismatch: what refers to the image is broken.
        BlobNotFound, RegistryError: it can't be had.
    """
    known = registry.fetch_referrers(image.content, ARTIFACT_TYPE)
    if known is None:
        return {}
    artifacts = [
        referrer
        for referrer in _referrers(known)
        if referrer.artifact_type == ARTIFACT_TYPE and referrer.media_type == OCI_MANIFEST
    ]
    found: dict[Digest, Descriptor] = {}
    for artifact in artifacts[-_ARTIFACTS_MAX:]:
        found |= _documents(registry.fetch_manifest(artifact), image)
    return found


def fetch_index(
    registry: Registry,
    document: Descriptor,
    layer: Descriptor,
    diff_id: Digest,
    limits: LayerLimits,
) -> LayerIndex:
    """The index of a layer.

    Args:
        document: of the index.

    Raises:
        DigestMismatch: the registry has another document.
        InvalidLayer, LimitExceeded, NotLazy: see ``decode_index``.
        BlobNotFound, SizeMismatch, RegistryError: it can't be had.
    """
    if document.size > document_max(layer):
        raise LimitExceeded(
            f"the index of the layer {layer.digest} has {document.size} bytes, which is more than "
            "it can save; push a right one"
        )
    data = registry.fetch_range(document, 0, document.size)
    document.check(data)
    return decode_index(data, layer, diff_id, limits)


def _referrers(data: bytes) -> tuple[Descriptor, ...]:
    return _decode(data, Referrers, "the list of what refers to the image").manifests


def _documents(data: bytes, image: Descriptor) -> dict[Digest, Descriptor]:
    artifact = _decode(data, Artifact, "what has the indexes of the image's layers")
    if artifact.artifact_type != ARTIFACT_TYPE or artifact.subject.digest != image.digest:
        return {}
    return {
        Digest(layer.annotations[LAYER_ANNOTATION]): layer
        for layer in artifact.layers
        if layer.annotations
        and LAYER_ANNOTATION in layer.annotations
        and layer.media_type == DOCUMENT_TYPE
    }


_T = TypeVar("_T")


def _decode(data: bytes, kind: type[_T], what: str) -> _T:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidManifest(
            f"{what} can't be understood: {str(error) or 'it is nested too deeply'}; "
            "push the indexes again"
        ) from None
