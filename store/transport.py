"""HTTP as registries need it: what may be spoken to, with which TLS, for how long.

Credentials are never given to this module's session, only to single requests, and never
follow a redirect to another origin. ~/.netrc is not read.
"""

import email.utils
import ipaddress
import json
import logging
import os
import random
import re
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from http.cookiejar import DefaultCookiePolicy
from typing import BinaryIO, TypeVar
from urllib.parse import SplitResult, urljoin, urlsplit

import requests
import urllib3
from requests.utils import get_environ_proxies
from urllib3.exceptions import (
    HTTPError,
    NewConnectionError,
    ReadTimeoutError,
)

from store.config import HostConfig, Patience
from store.errors import (
    ConnectionLost,
    PullCancelled,
    RegistryError,
    RegistryOverloaded,
    RegistryTimeout,
    RegistryUnreachable,
)

log = logging.getLogger(__name__)

USER_AGENT = "ctrfs/0.1"

# Registries redirect once, to where the blob lies; a second time where that is behind a
# regional name.
MAX_REDIRECTS = 5

# Error documents say what they have to say well below this.
_ERROR_BYTES = 64 << 10

# They come in one piece with the header, or soon after. Whoever sends the rest byte by byte
# costs this and at most one wait for the next byte; then the connection is closed.
_DRAIN_SECONDS = 5.0

# `insecure_skip_verify` is written into the configuration by hand; saying it again for each
# request helps nobody.
urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)

Body = Mapping[str, str] | bytes | BinaryIO

_T = TypeVar("_T")
# What it puts around the words of a failure: its own name for it, and a place in its code.
_OPENSSL = re.compile(r"^\[[^]]*\] | \(_ssl\.c:\d+\)$")
_OVERLOADED = frozenset({429, 500, 502, 503, 504})


def is_loopback(host: str) -> bool:
    """Whether ``host`` (a name or address, without port) can only be this machine."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def split_url(url: str, base: str = "") -> SplitResult:
    """The parts of an address, which may be relative to ``base``; host and port make sense.

    Raises:
        RegistryError: it is no address. Those that registries send us to may be anything.
    """
    try:
        parts = urlsplit(urljoin(base, url))
        _ = parts.port  # looked at only now
    except ValueError as error:
        raise RegistryError(
            f"{url!r:.300} can't be an address ({error}); check the name of the registry, or tell "
            "those who run it"
        ) from None
    return parts


def origin(url: str) -> tuple[str, str]:
    """Scheme and host with port: what credentials belong to. Raises RegistryError."""
    parts = split_url(url)
    return parts.scheme, parts.netloc


def location(response: requests.Response, url: str) -> str:
    """Where the answer to ``url`` sends us.

    Raises:
        RegistryError: to no address, or away from TLS.
    """
    target = split_url(response.headers.get("Location", ""), url).geturl()
    if origin(url)[0] == "https" and origin(target)[0] != "https":
        raise RegistryError(
            f"{origin(url)[1]} redirects from TLS to {target!r:.300}; "
            "that is refused, tell those who run it"
        )
    return target


def pause_before(attempt: int, error: RegistryError, patience: Patience) -> float | None:
    """Seconds to wait after failure number ``attempt`` (from 1) in a row; None: give up."""
    if not error.transient or attempt >= patience.attempts:
        return None
    if error.retry_after > patience.retry_after_seconds:
        return None
    backoff = patience.backoff_seconds * 2.0 ** (attempt - 1)
    return max(error.retry_after, backoff * random.uniform(1.0, 1.5))


class _Session(requests.Session):
    def get_redirect_target(self, resp: requests.Response) -> None:
        """Nowhere. Even where it doesn't follow a redirect, requests would prepare to, which
        fails for targets that are no address, and reads all of the answer's body."""


class Transport:
    """Requests to registries and what they refer to. Safe to use from several threads.

    Args:
        registries: settings by ``host[:port]``.
        patience: how long to wait.
    """

    def __init__(self, registries: Mapping[str, HostConfig], patience: Patience) -> None:
        self._registries = registries
        self.patience = patience
        self._closed = threading.Event()
        self._session = _Session()
        self._session.trust_env = False
        self._session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=()))
        self._session.headers.update({"User-Agent": USER_AGENT, "Accept-Encoding": "identity"})

    def host_config(self, host: str) -> HostConfig:
        """The settings for ``host[:port]``."""
        return self._registries.get(host, HostConfig())

    def close(self) -> None:
        """Close idle connections and end pauses."""
        self._closed.set()
        self._session.close()

    def send(
        self,
        url: str,
        headers: Mapping[str, str],
        body: Body | None = None,
        method: str | None = None,
    ) -> requests.Response:
        """One request, no redirects; the answer's body is not read yet.

        Args:
            body: a form's fields, bytes, or a file from where it stands to its end.
            method: None: GET, or POST when there is a body.

        Raises:
            RegistryError: there is no answer, or this host may not be spoken to so.
            PullCancelled: the transport was closed.
        """
        parts = self._checked(url)
        if self._closed.is_set():
            raise PullCancelled("the pull was cancelled")
        with connection_errors(parts.netloc):
            return self._session.request(
                method or ("GET" if body is None else "POST"),
                url,
                headers=dict(headers),
                data=body,
                stream=True,
                allow_redirects=False,
                timeout=(self.patience.connect_seconds, self.patience.read_seconds),
                verify=self._verify(parts),
                proxies=self._proxies(url, parts),
            )

    def get(self, url: str, headers: Mapping[str, str], method: str = "GET") -> requests.Response:
        """GET or HEAD, following redirects. ``Authorization`` stays with the first origin.

        Raises:
            RegistryError: as ``send``; or redirects that lead nowhere, or away from TLS.
        """
        headers = dict(headers)
        for _ in range(MAX_REDIRECTS):
            response = self.send(url, headers, method=method)
            if response.status_code not in (301, 302, 303, 307, 308):
                return response
            drain(response)
            target = location(response, url)
            if origin(url) != origin(target):
                headers.pop("Authorization", None)
            url = target
        raise RegistryError(
            f"{origin(url)[1]} redirects more than {MAX_REDIRECTS} times; "
            "tell those who run the registry"
        )

    def _checked(self, url: str) -> SplitResult:
        parts = split_url(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
            raise RegistryError(f"{url!r:.300} is no address a registry may send us to")
        if (
            parts.scheme == "http"
            and not is_loopback(parts.hostname)
            and not self.host_config(parts.netloc).plain_http
        ):
            raise RegistryError(
                f"{parts.netloc} would be spoken to without TLS; if you mean that, set plain_http "
                "for it in the configuration"
            )
        return parts

    def _verify(self, parts: SplitResult) -> bool | str:
        config = self.host_config(parts.netloc)
        if config.insecure_skip_verify:
            return False
        return config.ca or _SYSTEM_CAS

    @staticmethod
    def _proxies(url: str, parts: SplitResult) -> dict[str, str]:
        """Proxies from the environment, as every program has them; not for this machine."""
        if parts.hostname and is_loopback(parts.hostname):
            return {}
        return get_environ_proxies(url)

    def read(self, response: requests.Response, limit: int, what: str) -> bytes | None:
        """The whole body, or None when it is longer than ``limit`` bytes.

        Raises:
            RegistryError: it does not arrive whole, or too slowly.
        """
        host = origin(response.url)[1]
        deadline = time.monotonic() + self.patience.document_seconds
        if int_header(response, "Content-Length") > limit:
            return None
        data = bytearray()
        with connection_errors(host):
            while piece := response.raw.read1(limit + 1 - len(data), decode_content=False):
                data += piece
                if len(data) > limit:
                    return None
                if time.monotonic() > deadline:
                    raise RegistryTimeout(f"{host} sends {what} too slowly; try again later")
        return bytes(data)

    def patiently(self, work: Callable[[], _T]) -> _T:
        """Run ``work``, again after pauses while the registry is overloaded or drops connections.

        A registry that can't be reached or doesn't answer is not asked again: somebody waits.

        Raises:
            PullCancelled: the transport was closed meanwhile.
        """
        attempt = 0
        while True:
            try:
                return work()
            except (ConnectionLost, RegistryOverloaded) as error:
                attempt += 1
                pause = pause_before(attempt, error, self.patience)
                if pause is None:
                    raise
                log.info("%s; trying again in %.1f s", error.sentence, pause)
                if self._closed.wait(pause):
                    raise PullCancelled("the pull was cancelled") from None


def drain(response: requests.Response) -> bytes:
    """Read and close an answer whose body is not worth failing for; gives what there was of it.

    A connection can be used again only when the answer before was read to its end, which is
    not worth long waiting either.
    """
    data = bytearray()
    deadline = time.monotonic() + _DRAIN_SECONDS
    with response, suppress(HTTPError, OSError):
        while len(data) < _ERROR_BYTES and time.monotonic() < deadline:
            piece = response.raw.read1(_ERROR_BYTES - len(data), decode_content=False)
            if not piece:
                break
            data += piece
    return bytes(data)


def explain(response: requests.Response, what: str) -> RegistryError:
    """The error for an answer that isn't the one hoped for; reads and closes it."""
    host = origin(response.url)[1]
    status = response.status_code
    said = f"{host} answered {status} {response.reason or ''}".rstrip() + _message(drain(response))
    if status in _OVERLOADED:
        return RegistryOverloaded(f"{what}: {said}; try again later", _retry_after(response))
    return RegistryError(f"{what}: {said}; ask those who run the registry")


def _message(body: bytes) -> str:
    """What an error document says (distribution spec, "Error Codes"), fit for one line."""
    try:
        first = json.loads(body)["errors"][0]
        text = f"{first.get('code', '')}: {first.get('message', '')}"
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return ""
    printable = "".join(letter if letter.isprintable() else " " for letter in text[:300])
    return f" ({printable})"


def _retry_after(response: requests.Response) -> float:
    """Seconds in a Retry-After header (RFC 9110, 10.2.3); 0 without one."""
    value = response.headers.get("Retry-After", "").strip()
    if value.isascii() and value.isdigit():
        return float(value[:9])
    try:
        when = email.utils.parsedate_to_datetime(value)
    except (ValueError, TypeError):
        return 0.0
    return max(0.0, when.timestamp() - time.time())


def int_header(response: requests.Response, name: str) -> int:
    """A header that is a number, or -1."""
    return whole_number(response.headers.get(name, ""))


def whole_number(text: str) -> int:
    """A number from outside that fits into 63 bits, or -1."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else -1


@contextmanager
def connection_errors(host: str) -> Iterator[None]:
    """Turn what goes wrong below HTTP into the store's errors."""
    try:
        yield
    except (requests.exceptions.SSLError, urllib3.exceptions.SSLError) as error:
        if getattr(_innermost(error), "reason", "") == "WRONG_VERSION_NUMBER":
            raise RegistryError(
                f"{host} does not speak TLS; if you trust the way to it, set plain_http for it in "
                "the configuration"
            ) from error
        raise RegistryError(
            f"no trusted TLS connection to {host}: {_reason(error)}; if it has a certificate "
            "authority of its own, name its file as ca in the configuration"
        ) from error
    except (requests.exceptions.Timeout, ReadTimeoutError) as error:
        raise RegistryTimeout(f"{host} did not answer in time; try again later") from error
    except requests.exceptions.ConnectionError as error:
        if _never_connected(error):
            raise RegistryUnreachable(
                f"{host} can't be reached: {_reason(error)}; check the name and the network"
            ) from error
        raise ConnectionLost(f"the connection to {host} broke; try again") from error
    except (requests.RequestException, HTTPError) as error:
        if isinstance(
            error, (urllib3.exceptions.ProtocolError, requests.exceptions.ChunkedEncodingError)
        ):
            raise ConnectionLost(f"the connection to {host} broke; try again") from error
        raise RegistryError(f"{host} can't be asked: {_reason(error)}") from error
    except OSError as error:
        # requests raises a bare one for a CA file that it can't read.
        raise RegistryError(f"{host} can't be asked: {error}") from error


def _never_connected(error: requests.exceptions.ConnectionError) -> bool:
    inner = error.args[0] if error.args else None
    inner = getattr(inner, "reason", inner)
    return isinstance(inner, NewConnectionError | urllib3.exceptions.ProxyError)


def _innermost(error: BaseException) -> BaseException:
    cause = error
    while (inner := cause.__cause__ or cause.__context__) is not None:
        cause = inner
    return cause


def _reason(error: BaseException) -> str:
    """The innermost cause, which is where the system's own words are."""
    cause = _innermost(error)
    words = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
    return _OPENSSL.sub("", words)


def _system_cas() -> bool | str:
    """The machine's bundle of authorities; administrators add their own there. requests would
    take the one of the certifi package."""
    candidates = (
        ssl.get_default_verify_paths().cafile,
        "/etc/ssl/certs/ca-certificates.crt",
        "/etc/pki/tls/certs/ca-bundle.crt",
    )
    return next((path for path in candidates if path and os.path.exists(path)), True)


_SYSTEM_CAS = _system_cas()
