"""Who we are to a registry: credentials as `docker login` leaves them, and tokens.

Sources: docker's config.json (auths, credsStore, credHelpers), the protocol of
docker-credential-helpers, and the distribution project's token authentication
(spec/auth/token.md, spec/auth/oauth.md).
"""

import base64
import binascii
import os
import re
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlencode

import msgspec

from store.errors import RegistryError, RegistryUnauthorized
from store.reference import DEFAULT_REGISTRY
from store.transport import Transport, explain, origin, split_url

# What `docker login` without a server writes down.
_DOCKER_HUB_KEY = "https://index.docker.io/v1/"

# Helpers ask keyrings and cloud metadata services; those answer in seconds or not at all.
HELPER_SECONDS = 30

_CONFIG_BYTES = 1 << 20
_TOKEN_BYTES = 1 << 20

# The specification's lifetime for a token that names none; and how much earlier we ask anew,
# for clocks and the time a request is on its way.
_TOKEN_SECONDS = 60
_TOKEN_MARGIN = 10

_HELPER_NAME = re.compile(r"[A-Za-z0-9._-]+")
_CHALLENGE = re.compile(r"\s*,?\s*([A-Za-z][A-Za-z0-9_-]*)(?:\s+|$)(?!=)")
_PARAMETER = re.compile(
    r'\s*,?\s*([A-Za-z][A-Za-z0-9_-]*)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,"]*))'
)


class Credentials(msgspec.Struct, frozen=True):
    """A user name and password, or an identity token (a refresh token of OAuth)."""

    username: str
    password: str
    identity_token: str = ""

    def __repr__(self) -> str:
        return f"<credentials of {self.username or 'a token'}>"

    @property
    def basic(self) -> str:
        """The value of an Authorization header (RFC 7617)."""
        pair = f"{self.username}:{self.password}".encode()
        return "Basic " + base64.b64encode(pair).decode()


class _Auth(msgspec.Struct):
    auth: str = ""
    username: str = ""
    password: str = ""
    identity_token: str = msgspec.field(name="identitytoken", default="")


class _DockerConfig(msgspec.Struct):
    auths: dict[str, _Auth] = {}
    store: str = msgspec.field(name="credsStore", default="")
    helpers: dict[str, str] = msgspec.field(name="credHelpers", default_factory=dict)


class _HelperAnswer(msgspec.Struct):
    username: str = msgspec.field(name="Username")
    secret: str = msgspec.field(name="Secret")


def find_credentials(registry: str, directory: str | None) -> Credentials | None:
    """What `docker login` left for a registry; None: nothing, so we are anonymous.

    Args:
        registry: ``host[:port]``.
        directory: where config.json is; None: $DOCKER_CONFIG or ~/.docker.

    Raises:
        RegistryUnauthorized: the file or the helper it names can't be used.
    """
    base = directory or os.environ.get("DOCKER_CONFIG") or os.path.expanduser("~/.docker")
    path = Path(base) / "config.json"
    config = _read_config(path)
    if config is None:
        return None
    keys = [_DOCKER_HUB_KEY] if registry == DEFAULT_REGISTRY else []
    keys += [registry, f"https://{registry}", f"https://{registry}/v1/", f"https://{registry}/v2/"]
    for key in keys:
        if key in config.helpers:
            return _ask_helper(config.helpers[key], key)
    for key in keys:
        found = config.auths.get(key)
        if found and (found.auth or found.username or found.identity_token):
            return _decoded(found, path, key)
    return _ask_helper(config.store, keys[0]) if config.store else None


def _read_config(path: Path) -> _DockerConfig | None:
    try:
        with path.open("rb") as file:
            data = file.read(_CONFIG_BYTES)
        return msgspec.json.decode(data, type=_DockerConfig)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, msgspec.MsgspecError, RecursionError) as error:
        # Not the error's text: it may quote the file.
        raise RegistryUnauthorized(
            f"{path} can't be read as docker's configuration ({type(error).__name__}); "
            "repair it or move it away"
        ) from None


def _decoded(found: _Auth, path: Path, key: str) -> Credentials:
    username, password = found.username, found.password
    if found.auth:
        try:
            pair = base64.b64decode(found.auth, validate=True).decode().rstrip("\0")
        except (binascii.Error, UnicodeDecodeError):
            pair = ""
        username, colon, password = pair.partition(":")
        if not colon:
            raise RegistryUnauthorized(
                f"the entry for {key} in {path} is damaged; run docker login again"
            )
    return Credentials(username, password, found.identity_token)


def _ask_helper(name: str, key: str) -> Credentials | None:
    if not _HELPER_NAME.fullmatch(name):
        raise RegistryUnauthorized(f"{name!r:.100} is not the name of a credential helper")
    program = f"docker-credential-{name}"
    try:
        done = subprocess.run(
            [program, "get"],
            input=key.encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=HELPER_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RegistryUnauthorized(
            f"{program}, which docker's configuration names for {key}, can't be asked "
            f"({type(error).__name__}); install it or take it out of the configuration"
        ) from None
    if done.returncode:
        # All helpers say "credentials not found in native keychain" for a host they don't
        # know, and only there is going on without credentials right.
        if b"credentials not found" in done.stdout:
            return None
        raise RegistryUnauthorized(f"{program} failed for {key}; run it by hand to see why")
    try:
        answer = msgspec.json.decode(done.stdout, type=_HelperAnswer)
    except msgspec.MsgspecError:
        raise RegistryUnauthorized(f"{program} gave an answer that can't be read") from None
    if answer.username == "<token>":
        return Credentials("", "", answer.secret)
    return Credentials(answer.username, answer.secret)


class Challenge(msgspec.Struct, frozen=True):
    """One way to authenticate that a WWW-Authenticate header offers (RFC 9110, 11.6.1)."""

    scheme: str
    parameters: dict[str, str]


def parse_challenges(header: str) -> list[Challenge]:
    """The challenges of a WWW-Authenticate header; what can't be read is left out."""
    found: list[Challenge] = []
    position = 0
    while match := _CHALLENGE.match(header, position):
        position = match.end()
        parameters: dict[str, str] = {}
        while pair := _PARAMETER.match(header, position):
            position = pair.end()
            value = re.sub(r"\\(.)", r"\1", pair[2]) if pair[2] is not None else pair[3]
            parameters[pair[1].lower()] = value
        found.append(Challenge(match[1].lower(), parameters))
    return found


class _Token(msgspec.Struct):
    token: str = ""
    access_token: str = ""
    expires_in: float = _TOKEN_SECONDS


class Authorizer:
    """The Authorization header for one repository on one host. Safe for several threads.

    Args:
        transport: for the token server.
        scope: what a token is asked for, ``repository:<name>:pull``.
        find: looks for credentials; called when the registry wants some, and again after it
            has refused them.
    """

    def __init__(
        self, transport: Transport, scope: str, find: Callable[[], Credentials | None]
    ) -> None:
        self._transport = transport
        self._scope = scope
        self._find = find
        self._lock = threading.Lock()
        self._header: str | None = None
        self._bearer: Challenge | None = None
        self._expires = float("inf")
        self._looked = False
        self._credentials: Credentials | None = None

    def header(self) -> str | None:
        """The header's value, renewed when it is about to expire; None: nothing is needed yet.

        Raises:
            RegistryError: no token is to be had.
        """
        with self._lock:
            if self._bearer and time.monotonic() > self._expires:
                self._fetch_token(self._bearer)
            return self._header

    def challenged(self, url: str, header: str, used: str | None) -> None:
        """Prepare for the next request, after a 401.

        Args:
            url: what was asked for.
            header: the answer's WWW-Authenticate.
            used: the Authorization that was sent.

        Raises:
            RegistryUnauthorized: there is nothing (else) that could be sent.
            RegistryError: the token server fails.
        """
        with self._lock:
            if used != self._header:
                return  # another thread has been here meanwhile
            try:
                self._meet(parse_challenges(header), url, used)
            except RegistryUnauthorized:
                self._forget()
                raise

    def refused(self) -> None:
        """What was sent is not enough; there may be other credentials by the next request."""
        with self._lock:
            self._forget()

    def _forget(self) -> None:
        self._header, self._bearer, self._looked = None, None, False

    def _meet(self, challenges: list[Challenge], url: str, used: str | None) -> None:
        offers = {challenge.scheme: challenge for challenge in challenges}
        if bearer := offers.get("bearer"):
            self._bearer = self._named(bearer, url)
            self._fetch_token(self._bearer)
        elif "basic" in offers and used is None:
            self._header = self._known(url).basic
        elif used is None:
            raise RegistryUnauthorized(
                f"{origin(url)[1]} lets nobody in, nor says what it wants; ask those who run it"
            )
        else:
            raise RegistryUnauthorized(
                f"{origin(url)[1]} refuses the credentials from docker's configuration; "
                "run docker login again"
            )

    def _known(self, url: str) -> Credentials:
        credentials = self._credentials_now()
        if credentials is None:
            host = origin(url)[1]
            raise RegistryUnauthorized(f"{host} wants credentials; run: docker login {host}")
        return credentials

    def _credentials_now(self) -> Credentials | None:
        if not self._looked:
            self._credentials = self._find()
            self._looked = True
        return self._credentials

    def _named(self, bearer: Challenge, url: str) -> Challenge:
        """The challenge, if tokens may be fetched where it says."""
        realm = bearer.parameters.get("realm", "")
        scheme, host = origin(realm)
        if not host or (scheme != "https" and origin(url)[0] == "https"):
            raise RegistryError(
                f"{origin(url)[1]} sends us to {realm!r:.200} for a token, which is no safe "
                "address; tell those who run the registry"
            )
        return bearer

    def _fetch_token(self, bearer: Challenge) -> None:
        realm = bearer.parameters["realm"]
        question = {"service": bearer.parameters.get("service", ""), "scope": self._scope}
        credentials = self._credentials_now()
        if credentials and credentials.identity_token:
            form = {
                "grant_type": "refresh_token",
                "refresh_token": credentials.identity_token,
                "client_id": "ctrfs",
                **question,
            }
            response = self._transport.send(realm, {}, form)
        else:
            headers = {}
            if credentials:
                headers["Authorization"] = credentials.basic
                question["account"] = credentials.username
            joint = "&" if split_url(realm).query else "?"
            response = self._transport.send(realm + joint + urlencode(question), headers)
        if response.status_code in (400, 401, 403):
            response.close()
            raise RegistryUnauthorized(
                f"{origin(realm)[1]} gives no token for {self._scope}; the image does not "
                "exist, or you may not read it: run docker login again"
            )
        if response.status_code != 200:
            raise explain(response, f"no token from {origin(realm)[1]}")
        with response:
            self._take_token(self._transport.read(response, _TOKEN_BYTES, "a token"), realm)

    def _take_token(self, data: bytes | None, realm: str) -> None:
        try:
            token = msgspec.json.decode(data or b"", type=_Token)
        except (msgspec.MsgspecError, RecursionError):
            token = _Token()
        text = token.token or token.access_token
        if not text or not text.isascii() or not text.isprintable():
            raise RegistryError(
                f"{origin(realm)[1]} gave no token that can be read; "
                "tell those who run the registry"
            )
        self._header = f"Bearer {text}"
        self._expires = time.monotonic() + max(token.expires_in - _TOKEN_MARGIN, _TOKEN_MARGIN)
