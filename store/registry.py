"""Images in a registry (OCI distribution specification 1.1, "Pull")."""

import contextlib
import logging
from collections.abc import Callable, Mapping
from typing import TypeVar
from urllib.parse import urlencode

import requests
from urllib3.response import BaseHTTPResponse

from store.auth import Authorizer, find_credentials
from store.cas import CHUNK, Digest, digest_of, parse_digest
from store.config import StoreConfig
from store.errors import (
    BlobNotFound,
    ConnectionLost,
    DigestMismatch,
    ImageNotFound,
    InvalidReference,
    NotLazy,
    PullCancelled,
    RegistryError,
    RegistryUnauthorized,
    SizeMismatch,
    StoreError,
)
from store.manifest import INDEXES, MANIFESTS, OCI_INDEX, Descriptor, check_limit
from store.reference import DEFAULT_REGISTRY, Reference
from store.transport import (
    Body,
    Transport,
    connection_errors,
    drain,
    explain,
    int_header,
    is_loopback,
    origin,
    split_url,
    whole_number,
)

log = logging.getLogger(__name__)

# Docker Hub's name is not the name of its registry.
_DOCKER_HUB = "registry-1.docker.io"

_NO_QUERY: Mapping[str, str] = {}

_ACCEPT = ", ".join(sorted(MANIFESTS | INDEXES))

_T = TypeVar("_T")


class Registry:
    """One image of a registry, or of its mirrors; see ``Source``."""

    def __init__(self, reference: Reference, config: StoreConfig) -> None:
        self._reference = reference
        self._limits = config.limits
        self._transport = Transport(config.registries, config.patience)
        main = reference.registry
        mirrors = self._transport.host_config(main).mirrors
        self._endpoints = [
            Endpoint(self._transport, host, reference, config.docker_config)
            for host in (*mirrors, main)
        ]

    @property
    def by_digest(self) -> bool:
        """Whether the image was asked for by its digest."""
        return self._reference.digest is not None

    def resolve(self) -> tuple[Descriptor, bytes]:
        """What tag or digest stand for now."""
        wanted = self._reference.digest or self._reference.tag or ""
        return self._patiently(lambda endpoint: self._resolve_at(endpoint, wanted))

    def _resolve_at(self, endpoint: "Endpoint", wanted: str) -> tuple[Descriptor, bytes]:
        with self._manifest_answer(endpoint, wanted) as response:
            what = f"the manifest of {self._reference}"
            data = self._document(response, self._limits.manifest_bytes, what)
        media_type = response.headers.get("Content-Type", "").partition(";")[0].strip()
        descriptor = Descriptor(media_type, digest_of(data), len(data))
        promised = self._reference.digest or _header_digest(response)
        if promised and promised != descriptor.digest:
            raise DigestMismatch(
                f"{endpoint.host} sent a manifest for {self._reference} that hashes to "
                f"{descriptor.digest} instead of {promised}; try again, or push the image again"
            )
        return descriptor, data

    def _manifest_answer(self, endpoint: "Endpoint", wanted: str) -> requests.Response:
        response = endpoint.get(f"manifests/{wanted}", {"Accept": _ACCEPT})
        if response.status_code == 404:
            drain(response)
            if not endpoint.is_registry():
                raise RegistryError(
                    f"{endpoint.host} is not a registry: it has no /v2/; check the host in the name"
                )
            raise ImageNotFound(
                f"{endpoint.host} has no image {self._reference}; check the name and the tag"
            )
        if response.status_code != 200:
            raise explain(response, f"the manifest of {self._reference} cannot be had")
        return response

    def default_name(self, descriptor: Descriptor) -> Reference:
        """The reference itself."""
        return self._reference

    def fetch_manifest(self, descriptor: Descriptor) -> bytes:
        """A manifest or index."""
        what = f"the manifest {descriptor.digest} of {self._reference}"
        check_limit(descriptor.size, self._limits.manifest_bytes, what)

        def fetch(endpoint: "Endpoint") -> bytes:
            with self._manifest_answer(endpoint, descriptor.digest) as response:
                data = self._document(response, descriptor.size, what)
            descriptor.check(data)
            return data

        return self._patiently(fetch)

    def fetch_config(self, descriptor: Descriptor) -> bytes:
        """An image configuration."""
        what = f"the configuration {descriptor.digest} of {self._reference}"
        check_limit(descriptor.size, self._limits.config_bytes, what)

        def fetch(endpoint: "Endpoint") -> bytes:
            with self._blob_answer(endpoint, descriptor, 0) as response:
                data = self._document(response, descriptor.size, what)
            descriptor.check(data)
            return data

        return self._patiently(fetch)

    def fetch_referrers(self, subject: Digest, artifact_type: str) -> bytes | None:
        """The index of manifests that refer to another one; not verified. None if there is none.

        Registries before version 1.1 of the specification have no list of them; then clients keep
        one under a tag ("Referrers Tag Schema"). Of a list in several pages, the first is given.

        Args:
            artifact_type: those wanted; others may be in the list too.

        Raises:
            LimitExceeded, RegistryError
        """

        def fetch(endpoint: "Endpoint") -> bytes | None:
            try:
                response = self._referrers_answer(endpoint, subject, artifact_type)
            except ImageNotFound:
                if endpoint is not self._endpoints[-1]:
                    # A mirror that has the image speaks for a registry that may be out of reach.
                    self._manifest_answer(endpoint, subject).close()
                return None
            with response:
                what = f"the list of what refers to {subject}"
                return self._document(response, self._limits.manifest_bytes, what)

        return self._patiently(fetch)

    def _referrers_answer(
        self, endpoint: "Endpoint", subject: Digest, artifact_type: str
    ) -> requests.Response:
        query = {"artifactType": artifact_type}
        response = endpoint.get(f"referrers/{subject}", {"Accept": OCI_INDEX}, query=query)
        if response.status_code == 404:
            drain(response)
            return self._manifest_answer(endpoint, referrers_tag(subject))
        if response.status_code != 200:
            raise explain(response, f"the list of what refers to {subject} cannot be had")
        return response

    def _document(self, response: requests.Response, limit: int, what: str) -> bytes:
        data = self._transport.read(response, limit, what)
        if data is None:
            check_limit(limit + 1, limit, what)
        return data or b""

    def open_blob(
        self, descriptor: Descriptor, offset: int, length: int | None = None
    ) -> "HttpBlob":
        """A blob or a part of it, as the registry or whoever it redirects to sends it."""

        def begin(endpoint: "Endpoint") -> HttpBlob:
            response = self._blob_answer(endpoint, descriptor, offset, length)
            try:
                return HttpBlob(response, _begin(response, descriptor, offset))
            except BaseException:
                response.close()
                raise

        # Without patience: whoever wants a blob counts the attempts to get all of it.
        return self._anywhere(begin)

    def fetch_range(self, descriptor: Descriptor, offset: int, length: int) -> bytes:
        """A part of a blob, not verified.

        Raises:
            NotLazy: the registry only sends whole blobs.
            BlobNotFound, SizeMismatch, RegistryError: see ``Source.open_blob``.
        """

        def fetch() -> bytes:
            stream = self.open_blob(descriptor, offset, length)
            try:
                if stream.offset != offset:
                    raise NotLazy("the registry sends whole blobs only, no parts of them")
                data = bytearray()
                while len(data) < length and (piece := stream.read()):
                    data += piece
            finally:
                stream.close()
            if len(data) < length:
                raise ConnectionLost("the registry sent less than it was asked for; try again")
            return bytes(data[:length])

        return self._transport.patiently(fetch)

    def _blob_answer(
        self, endpoint: "Endpoint", descriptor: Descriptor, offset: int, length: int | None = None
    ) -> requests.Response:
        headers = {}
        if offset or length is not None:
            last = "" if length is None else offset + length - 1
            headers["Range"] = f"bytes={offset}-{last}"
        response = endpoint.get(f"blobs/{descriptor.digest}", headers)
        if response.status_code == 416:
            # A server that won't continue may still begin again.
            drain(response)
            response = endpoint.get(f"blobs/{descriptor.digest}", {})
        if response.status_code == 404:
            drain(response)
            raise BlobNotFound(
                f"{endpoint.host} has no blob {descriptor.digest}, though the manifest of "
                f"{self._reference} names it; push the image again"
            )
        if response.status_code not in (200, 206):
            raise explain(
                response, f"the blob {descriptor.digest} of {self._reference} cannot be had"
            )
        return response

    def _anywhere(self, work: Callable[["Endpoint"], _T]) -> _T:
        """``work`` at the first endpoint where it succeeds; the registry's own error otherwise."""
        for mirror in self._endpoints[:-1]:
            try:
                return work(mirror)
            except PullCancelled:
                raise
            except StoreError as error:
                log.info("the mirror %s does not help: %s", mirror.host, error.sentence)
        return work(self._endpoints[-1])

    def _patiently(self, work: Callable[["Endpoint"], _T]) -> _T:
        return self._transport.patiently(lambda: self._anywhere(work))

    def close(self) -> None:
        """Close idle connections and end pauses."""
        self._transport.close()


def referrers_tag(subject: Digest) -> str:
    """The tag of the list of what refers to a manifest, where the registry keeps none."""
    return subject.replace(":", "-")


class Endpoint:
    """One host that may have the image: the registry, or a mirror of it.

    Args:
        actions: what is going to be done there: ``pull`` or ``pull,push``.
    """

    def __init__(
        self,
        transport: Transport,
        host: str,
        reference: Reference,
        docker_config: str | None,
        actions: str = "pull",
    ) -> None:
        self.host = host
        self._transport = transport
        self._repository = reference.repository
        self._address = _DOCKER_HUB if host == DEFAULT_REGISTRY else host
        # Mirrors of several registries tell them apart by this, as containerd's do.
        self._query = {"ns": reference.registry} if host != reference.registry else {}
        self._scheme: str | None = None
        self._authorizer = Authorizer(
            transport,
            f"repository:{reference.repository}:{actions}",
            lambda: find_credentials(host, docker_config),
        )

    def get(
        self,
        path: str,
        headers: dict[str, str],
        method: str = "GET",
        query: Mapping[str, str] = _NO_QUERY,
    ) -> requests.Response:
        """GET or HEAD of ``/v2/<repository>/<path>``, with credentials if they are wanted.

        Raises:
            RegistryUnauthorized: they are wanted and missing or wrong.
            RegistryError: there is no answer.
        """
        response = self._authorized(
            self.url(path, query), headers, lambda url, sent: self._transport.get(url, sent, method)
        )
        if response is None:
            raise RegistryUnauthorized(
                f"{self.host} does not give out {self._repository}: it does not exist, or you need "
                f"credentials that may read it; run: docker login {self.host}"
            )
        return response

    def send(
        self, method: str, url: str, headers: dict[str, str], body: Callable[[], Body] | None = None
    ) -> requests.Response:
        """A request that changes something, with credentials if they are wanted.

        Args:
            url: from ``url()``, or where the registry has sent us: credentials go to the
                registry itself only.
            body: gives what to send; called once for each attempt.

        Raises:
            RegistryUnauthorized: they are wanted and missing, wrong or not enough.
            RegistryError: there is no answer.
        """

        def send(url: str, headers: dict[str, str]) -> requests.Response:
            return self._transport.send(url, headers, body() if body else None, method)

        if origin(url) != origin(self.url("")):
            return send(url, headers)
        response = self._authorized(url, headers, send)
        if response is None:
            raise RegistryUnauthorized(
                f"{self.host} does not let you push to {self._repository}: you need credentials "
                f"that may write it; run: docker login {self.host}"
            )
        return response

    def url(self, path: str, query: Mapping[str, str] = _NO_QUERY) -> str:
        """The address of ``/v2/<repository>/<path>``. Raises RegistryError."""
        asked = urlencode({**self._query, **query})
        return f"{self._base()}/v2/{self._repository}/{path}{'?' if asked else ''}{asked}"

    def _authorized(
        self,
        url: str,
        headers: dict[str, str],
        ask: Callable[[str, dict[str, str]], requests.Response],
    ) -> requests.Response | None:
        """The answer to ``ask`` with the credentials that are wanted; None: they are not enough."""
        # The first request may be without a token, the second with one that has expired.
        for _ in range(3):
            used = self._authorizer.header()
            sent = {**headers, "Authorization": used} if used else headers
            response = ask(url, sent)
            if origin(response.url) != origin(url) or response.status_code not in (401, 403):
                return response
            drain(response)
            if response.status_code == 403:
                break
            challenge = response.headers.get("WWW-Authenticate", "")
            self._authorizer.challenged(url, challenge, used)
        self._authorizer.refused()
        return None

    def _base(self) -> str:
        if self._scheme is None:
            self._scheme = self._find_scheme()
        return f"{self._scheme}://{self._address}"

    def _find_scheme(self) -> str:
        config = self._transport.host_config(self._address)
        if config.plain_http:
            return "http"
        hostname = split_url(f"//{self._address}").hostname or ""
        if config.ca or config.insecure_skip_verify or not is_loopback(hostname):
            return "https"
        # On this machine both are usual. Servers with TLS answer 400 here, or hang up.
        try:
            with self._transport.send(f"http://{self._address}/v2/", {}) as response:
                return "https" if response.status_code == 400 else "http"
        except ConnectionLost:
            return "https"

    def is_registry(self) -> bool:
        """Whether the API is here at all ("Determining Support"); true when in doubt."""
        try:
            with self._transport.get(f"{self._base()}/v2/", {}) as response:
                return response.status_code != 404
        except RegistryError:
            return True


class HttpBlob:
    """A blob on its way; see ``BlobStream``."""

    def __init__(self, response: requests.Response, offset: int) -> None:
        self.offset = offset
        self._response = response
        self._raw: BaseHTTPResponse = response.raw
        self._host = origin(response.url)[1]
        self._aborted = False

    def read(self) -> bytes:
        """The next piece."""
        try:
            with connection_errors(self._host):
                # As much as has arrived: a slow registry must show in the progress, and what
                # came before a stall must not be lost.
                return self._raw.read1(CHUNK, decode_content=False)
        finally:
            if self._aborted:
                raise PullCancelled("the pull was cancelled") from None

    def abort(self) -> None:
        """Shut the connection down, which wakes up a waiting ``read()``."""
        self._aborted = True
        # It fails if the answer has been read to its end.
        with contextlib.suppress(ValueError, RuntimeError, OSError):
            self._raw.shutdown()

    def close(self) -> None:
        """Give the connection back, or close it if the answer was not read to its end."""
        self._response.close()


def _begin(response: requests.Response, descriptor: Descriptor, offset: int) -> int:
    """Where in the blob an answer begins.

    Raises:
        SizeMismatch: the blob there is of another size than its descriptor says.
        RegistryError: the answer is to another question.
    """
    length = int_header(response, "Content-Length")
    begin, total = 0, length
    if response.status_code == 206:
        unit, _, rest = response.headers.get("Content-Range", "").partition(" ")
        span, _, all_bytes = rest.partition("/")
        first = span.partition("-")[0]
        begin = whole_number(first) if unit == "bytes" else -1
        if begin != offset:
            raise ConnectionLost(f"{origin(response.url)[1]} sent another range")
        total = whole_number(all_bytes)
        if total < 0:
            total = offset + length
    if length >= 0 and total != descriptor.size:
        raise SizeMismatch(
            f"{origin(response.url)[1]} has {total} bytes for {descriptor.digest}, the "
            f"manifest names {descriptor.size}; push the image again"
        )
    return begin


def _header_digest(response: requests.Response) -> Digest | None:
    try:
        return parse_digest(response.headers.get("Docker-Content-Digest", ""))
    except InvalidReference:
        return None
