"""Giving images to a registry (OCI distribution specification 1.1, "Push")."""

from collections.abc import Callable
from typing import BinaryIO
from urllib.parse import urlencode

import requests

from store.cas import Digest
from store.config import StoreConfig
from store.errors import InvalidReference
from store.reference import Reference
from store.registry import Endpoint
from store.transport import Body, Transport, drain, explain, int_header, location, split_url


class Pusher:
    """Puts blobs and manifests into the repository of one reference. Mirrors are not asked.

    Methods block, may be called from several threads, and try again while the registry is
    overloaded or drops connections. They raise RegistryError: the registry can't be asked, or
    refuses; RegistryUnauthorized when credentials are missing or not enough.
    """

    def __init__(self, reference: Reference, config: StoreConfig) -> None:
        self.reference = reference
        self._transport = Transport(config.registries, config.patience)
        self._endpoint = Endpoint(
            self._transport, reference.registry, reference, config.docker_config, "pull,push"
        )

    def has_blob(self, digest: Digest, size: int) -> bool:
        """Whether the repository has a blob of this digest and ``size`` in bytes."""
        return self._transport.patiently(lambda: self._has(digest, size))

    def _has(self, digest: Digest, size: int) -> bool:
        response = self._endpoint.get(f"blobs/{digest}", {}, "HEAD")
        if response.status_code not in (200, 404):
            raise explain(response, self._not_pushed(f"the blob {digest}"))
        drain(response)
        return response.status_code == 200 and int_header(response, "Content-Length") == size

    def put_blob(self, digest: Digest, size: int, open: Callable[[], BinaryIO]) -> None:
        """Upload a blob unless it is there.

        Args:
            size: in bytes.
            open: gives a file that stands at the blob's first byte, and has nothing after its
                last one; it is called for each attempt, and the file closed after it.
        """
        if not self.has_blob(digest, size):
            self._transport.patiently(lambda: self._upload(digest, size, open))

    def _upload(self, digest: Digest, size: int, open: Callable[[], BinaryIO]) -> None:
        what = self._not_pushed(f"the blob {digest}")
        start = self._endpoint.url("blobs/uploads/")
        response = self._endpoint.send("POST", start, {})
        if response.status_code != 202:
            raise explain(response, what)
        drain(response)
        place = location(response, start)
        joint = "&" if split_url(place).query else "?"
        headers = {"Content-Type": "application/octet-stream"}
        url = place + joint + urlencode({"digest": digest})
        with open() as file:

            def body() -> Body:
                file.seek(0)
                return file if size else b""

            self._expect_created(self._endpoint.send("PUT", url, headers, body), what)

    def put_manifest(self, data: bytes, media_type: str, name: str | None = None) -> bool:
        """Put a manifest or index, whose blobs must be there.

        Args:
            name: a tag, or the digest of ``data``; None: what the reference says.

        Returns:
            Whether the registry keeps the list of what refers to the manifest's ``subject``
            (the answer has OCI-Subject); where it does not, that list is up to the caller
            ("Pushing Manifests with Subject").

        Raises:
            InvalidReference: there is neither a name nor a tag.
        """
        name = name or self.reference.tag
        if name is None:
            raise InvalidReference(
                f"{self.reference} names what is there already; push to a name with a tag"
            )
        url = self._endpoint.url(f"manifests/{name}")
        headers = {"Content-Type": media_type}
        what = self._not_pushed("the manifest")

        def put() -> bool:
            response = self._endpoint.send("PUT", url, headers, lambda: data)
            self._expect_created(response, what)
            return "OCI-Subject" in response.headers

        return self._transport.patiently(put)

    def _expect_created(self, response: requests.Response, what: str) -> None:
        if response.status_code not in (200, 201, 202, 204):
            raise explain(response, what)
        drain(response)

    def _not_pushed(self, what: str) -> str:
        return f"{what} was not pushed to {self.reference}"

    def close(self) -> None:
        """Close idle connections and end pauses."""
        self._transport.close()
