"""Real docker-registry processes on free loopback ports."""

import http.client
import json
import socket
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests

from store.config import StoreConfig
from tests.support.layouts import Descriptor, OciLayout
from tests.support.tokens import TokenServer, make_certificate
from tools.registry import free_port

USER = "ada"
PASSWORD = "correct horse"
# bcrypt of PASSWORD, the only kind that the registry takes, at the lowest cost.
_HTPASSWD = f"{USER}:$2b$04$abcdefghijklmnopqrstuujydOTSfIH/d5oUHpsygqV5X9xJLQc6e\n"


def log_in(config: StoreConfig, host: str, **entry: str) -> None:
    """Leave credentials for a host where `config` has docker's, as `docker login` does."""
    assert config.docker_config
    directory = Path(config.docker_config)
    directory.mkdir(exist_ok=True)
    found = {"username": USER, "password": PASSWORD} | entry
    (directory / "config.json").write_text(json.dumps({"auths": {host: found}}))


@dataclass
class Registry:
    """A docker-registry on ``directory``; use as a context manager.

    Attributes:
        directory: where its configuration and content are.
        auth: ``"basic"`` (USER, PASSWORD), ``"token"`` (a token server of its own, which gives
            anonymous tokens too, except for repositories that begin with ``private``) or None.
        tls: serve TLS, with a certificate of the authority in ``ca``.
    """

    directory: Path
    auth: str | None = None
    tls: bool = False
    port: int = field(default_factory=free_port)
    tokens: TokenServer | None = None
    _process: subprocess.Popen[bytes] | None = None

    @property
    def host(self) -> str:
        """What stands before the slash in a reference."""
        return f"127.0.0.1:{self.port}"

    @property
    def ca(self) -> Path:
        """The authority's certificate (only with ``tls``)."""
        return self.directory / "tls.crt"

    @property
    def url(self) -> str:
        """Base of the API."""
        return f"{'https' if self.tls else 'http'}://{self.host}"

    def __enter__(self) -> "Registry":
        self.directory.mkdir(parents=True, exist_ok=True)
        if self.auth == "token":
            self.tokens = TokenServer(self.directory, USER, PASSWORD)
        config = self.directory / "registry.yml"
        config.write_text(self._config())
        with (self.directory / "registry.log").open("wb") as log:
            self._process = subprocess.Popen(
                ["docker-registry", "serve", str(config)], stdout=log, stderr=log
            )
        self._wait()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        if self.tokens:
            self.tokens.close()

    def stop(self) -> None:
        """End the process."""
        if self._process:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _config(self) -> str:
        lines = [
            "version: 0.1",
            "log: {level: warn}",
            f"storage: {{filesystem: {{rootdirectory: {self.directory}/data}}, "
            "delete: {enabled: true}}",
            f"http: {{addr: '{self.host}'{self._tls()}}}",
        ]
        if self.auth == "basic":
            passwords = self.directory / "htpasswd"
            passwords.write_text(_HTPASSWD)
            lines.append(f"auth: {{htpasswd: {{realm: test, path: {passwords}}}}}")
        if self.tokens:
            lines.append(
                f"auth: {{token: {{realm: '{self.tokens.url}', service: test, issuer: test, "
                f"rootcertbundle: {self.tokens.certificate}}}}}"
            )
        return "\n".join(lines) + "\n"

    def _tls(self) -> str:
        if not self.tls:
            return ""
        make_certificate(self.directory / "tls.crt", self.directory / "tls.key")
        return f", tls: {{certificate: {self.directory}/tls.crt, key: {self.directory}/tls.key}}"

    def _wait(self) -> None:
        deadline = time.monotonic() + 20
        while True:
            try:
                with socket.create_connection(("127.0.0.1", self.port), 1):
                    return
            except OSError:
                assert self._process is not None
                if self._process.poll() is not None or time.monotonic() > deadline:
                    log = (self.directory / "registry.log").read_text()
                    raise AssertionError(f"docker-registry did not start:\n{log}") from None
                time.sleep(0.02)

    def blob_file(self, digest: str) -> Path:
        """Where the registry keeps a blob, for tests that damage it."""
        name = digest.removeprefix("sha256:")
        return self.directory / f"data/docker/registry/v2/blobs/sha256/{name[:2]}/{name}/data"

    def copy(self, source: str, name: str) -> None:
        """Push with skopeo, from any of its transports."""
        command = ["skopeo", "--insecure-policy", "copy", "--quiet", "--dest-tls-verify=false"]
        if self.auth:
            command += ["--dest-creds", f"{USER}:{PASSWORD}"]
        subprocess.run([*command, source, f"docker://{self.host}/{name}"], check=True)

    def push(self, layout: OciLayout, descriptor: Descriptor, name: str, tag: str) -> str:
        """Push byte for byte, without the checks of skopeo; gives the reference.

        For registries without authentication. Blobs that a manifest names and the layout
        lacks are left out.
        """
        document = _json(layout, descriptor)
        for entry in document.get("manifests", []):
            self.push(layout, entry, name, str(entry["digest"]))
        for blob in [*document.get("layers", []), *filter(None, [document.get("config")])]:
            self._push_blob(name, layout.blob_path(blob).read_bytes(), str(blob["digest"]))
        answer = requests.put(
            f"{self.url}/v2/{name}/manifests/{tag}",
            data=layout.blob_path(descriptor).read_bytes(),
            headers={"Content-Type": descriptor["mediaType"]},
            timeout=10,
        )
        assert answer.status_code == http.client.CREATED, answer.text
        return f"{self.host}/{name}:{tag}"

    def _push_blob(self, name: str, data: bytes, digest: str) -> None:
        begun = requests.post(f"{self.url}/v2/{name}/blobs/uploads/", timeout=10)
        place = begun.headers["Location"]
        joint = "&" if "?" in place else "?"
        answer = requests.put(f"{place}{joint}digest={digest}", data=data, timeout=10)
        assert answer.status_code == http.client.CREATED, answer.text


def _json(layout: OciLayout, descriptor: Descriptor) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(layout.blob_path(descriptor).read_bytes())
    return document
