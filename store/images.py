"""Records of the images that are here, by name.

All of them are in memory, so that reading never waits; changes go to the database first.
"""

import threading
from collections.abc import Callable, Iterable, Iterator

import msgspec

from store.cas import Digest, parse_digest
from store.db import Database
from store.errors import CorruptContent, ImageInUse, ImageNotFound
from store.manifest import Descriptor, ImageConfig
from store.platform import Platform
from store.reference import Reference, parse_reference


class Image(msgspec.Struct, frozen=True):
    """One image under one name.

    ``digest`` is the manifest's, ``index_digest`` that of the index it was chosen from;
    ``layers`` and ``diff_ids`` are bottom first; ``size`` counts the bytes of all blobs, one
    that is used twice once; ``pulled_ns`` is in nanoseconds since the epoch.
    """

    name: str
    source: str
    digest: Digest
    index_digest: Digest | None
    config_digest: Digest
    platform: Platform
    size: int
    layers: tuple[Descriptor, ...]
    diff_ids: tuple[Digest, ...]
    pulled_ns: int
    config: ImageConfig

    def blobs(self) -> tuple[Digest, ...]:
        """Digests of everything the image consists of, each once."""
        documents = (self.index_digest, self.digest, self.config_digest)
        layers = (layer.content for layer in self.layers)
        return tuple(dict.fromkeys(digest for digest in (*documents, *layers) if digest))


class Images:
    """The image records. Safe to use from several threads.

    ``in_use`` is asked before an image goes that has no other name: it answers with who
    needs it (``"container web"``), or None. ``pinned`` tells on which stacks of layers the files
    of containers lie, whatever the names of their images mean by now.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._lock = threading.Lock()
        self._images: dict[str, Image] = {}
        self.in_use: Callable[[Image], str | None] = lambda image: None
        self.pinned: Callable[[], Iterable[tuple[Digest, ...]]] = tuple
        with database.transaction() as cursor:
            rows = cursor.execute("SELECT name, record FROM images").fetchall()
        for name, record in rows:
            self._images[name] = _decode(name, record)

    def __contains__(self, name: object) -> bool:
        return name in self._images

    def __iter__(self) -> Iterator[Image]:
        """All images, sorted by name."""
        images = self._images
        return iter([images[name] for name in sorted(images)])

    def names(self) -> list[str]:
        """The full names, sorted."""
        return sorted(self._images)

    def named(self, name: str) -> Image:
        """The image with exactly this full name.

        Raises:
            ImageNotFound: there is none.
        """
        try:
            return self._images[name]
        except KeyError:
            raise _not_found(name) from None

    def by_digest(self, text: str) -> Image:
        """The image whose manifest, or else whose index, has this digest.

        Raises:
            ImageNotFound: there is none.
            InvalidReference: ``text`` is no digest.
        """
        digest = parse_digest(text)
        found = [image for image in self if digest in (image.digest, image.index_digest)]
        if not found:
            raise _not_found(text)
        return min(found, key=lambda image: image.digest != digest)

    def get(self, text: str) -> Image:
        """The image that a user means: a full or short name, as docker completes it, or a digest.

        Raises:
            ImageNotFound: there is none.
            InvalidReference: ``text`` is no reference.
        """
        if text.startswith("sha256:"):
            return self.by_digest(text)
        reference = parse_reference(text)
        image = self._images.get(str(reference))
        if image is None and reference.digest:
            image = self._of_repository(reference, reference.digest)
        if image is None:
            raise _not_found(text)
        return image

    def _of_repository(self, wanted: Reference, digest: Digest) -> Image | None:
        for image in self:
            if digest in (image.digest, image.index_digest):
                reference = parse_reference(image.name)
                if reference.name == wanted.name:
                    return image
        return None

    def put(self, image: Image) -> None:
        """Record an image; its blobs and layers must be durable. Replaces one of the same name.

        Raises:
            StorageFailed: the record could not be written.
        """
        record = msgspec.json.encode(image)
        with self._lock:
            with self._database.transaction() as cursor:
                cursor.execute(
                    "INSERT INTO images (name, record) VALUES (?, ?)"
                    " ON CONFLICT (name) DO UPDATE SET record = excluded.record",
                    (image.name, record),
                )
            # Readers have no lock: they see the old dictionary or the new one.
            self._images = {**self._images, image.name: image}

    def remove(self, name: str) -> None:
        """Forget an image by its full name. Its content stays until it is collected.

        Raises:
            ImageNotFound: there is none.
            ImageInUse: it has no other name and something needs it.
        """
        while True:
            images = self._images
            self._refuse_if_used(name, images)
            with self._lock:
                if self._images is not images:
                    continue  # the answer may be another by now
                with self._database.transaction() as cursor:
                    cursor.execute("DELETE FROM images WHERE name = ?", (name,))
                self._images = {key: value for key, value in images.items() if key != name}
                return

    def _refuse_if_used(self, name: str, images: dict[str, Image]) -> None:
        """Without the lock: whoever answers may use the records, or wait for one who does."""
        image = images.get(name)
        if image is None:
            raise _not_found(name)
        names = [other.name for other in images.values() if other.digest == image.digest]
        user = self.in_use(image) if len(names) == 1 else None
        if user:
            raise ImageInUse(f"the image {name} is used by {user}; remove that first")


def _decode(name: str, record: bytes) -> Image:
    try:
        return msgspec.json.decode(record, type=Image)
    except msgspec.MsgspecError as error:
        raise CorruptContent(
            f"the record of the image {name} can't be read ({error}); "
            "remove it from the table images and pull the image again"
        ) from None


def _not_found(name: str) -> ImageNotFound:
    return ImageNotFound(f"the image {name} is not here; pull it first")
