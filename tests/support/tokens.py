"""A token server for docker-registry (distribution's spec/auth/token.md), and certificates."""

import base64
import hashlib
import json
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit


def make_certificate(certificate: Path, key: Path) -> None:
    """A self-signed certificate for 127.0.0.1."""
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-keyout", str(key), "-out", str(certificate), "-subj", "/CN=ctrfs test"),
            *("-addext", "subjectAltName=IP:127.0.0.1"),
        ],
        check=True,
        capture_output=True,
    )


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


class TokenServer:
    """Gives signed tokens on a loopback port until ``close()``.

    ``asked`` lists the questions: method, query or form, Authorization. Tokens are valid for
    ``seconds``. ``refresh_token`` is taken in place of a password.
    """

    refresh_token = "a-refresh-token"

    def __init__(self, directory: Path, user: str, password: str) -> None:
        self.certificate = directory / "token.crt"
        self.seconds = 300
        self.asked: list[tuple[str, dict[str, str], str]] = []
        self._key = directory / "token.key"
        self._basic = "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()
        make_certificate(self.certificate, self._key)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    @property
    def url(self) -> str:
        """The realm."""
        return f"http://127.0.0.1:{self._server.server_address[1]}/token"

    def close(self) -> None:
        """End it."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        tokens = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                query = parse_qs(urlsplit(self.path).query)
                self._answer("GET", {key: values[0] for key, values in query.items()})

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"])).decode()
                form = {key: values[0] for key, values in parse_qs(body).items()}
                self._answer("POST", form)

            def _answer(self, method: str, question: dict[str, str]) -> None:
                sent = self.headers.get("Authorization", "")
                tokens.asked.append((method, question, sent))
                status, content = tokens.answer(question, sent)
                body = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        return Handler

    def answer(self, question: dict[str, str], sent: str) -> tuple[int, dict[str, Any]]:
        """Status and document for a question."""
        refresh = question.get("refresh_token", "")
        known = sent == self._basic or refresh == self.refresh_token
        if (sent or refresh) and not known:
            return 401, {"errors": []}
        kind, name, actions = question["scope"].split(":")
        allowed = actions.split(",") if known or not name.startswith("private") else []
        access = [{"type": kind, "name": name, "actions": allowed}]
        return 200, {"token": self._signed(access), "expires_in": self.seconds}

    def _signed(self, access: list[dict[str, Any]]) -> str:
        now = int(time.time())
        pem = self.certificate.read_text().splitlines()
        header = {"typ": "JWT", "alg": "RS256", "x5c": ["".join(pem[1:-1])]}
        claims = {
            "iss": "test",
            "aud": "test",
            "sub": "",
            "exp": now + self.seconds,
            "nbf": now - 5,
            "iat": now,
            "jti": hashlib.sha256(str(time.time_ns()).encode()).hexdigest(),
            "access": access,
        }
        text = ".".join(_base64(json.dumps(part).encode()) for part in (header, claims))
        signature = subprocess.run(
            ["openssl", "dgst", "-sha256", "-sign", str(self._key)],
            input=text.encode(),
            capture_output=True,
            check=True,
        ).stdout
        return f"{text}.{_base64(signature)}"
