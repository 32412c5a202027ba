"""Credentials as docker keeps them, and challenges of registries."""

import base64
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from store.auth import Credentials, find_credentials, parse_challenges
from store.errors import RegistryUnauthorized

AUTH = base64.b64encode(b"ada:pass:word").decode()


def write(directory: Path, document: object) -> str:
    (directory / "config.json").write_text(json.dumps(document))
    return str(directory)


def helper(directory: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    program = directory / "docker-credential-test"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(directory), prepend=":")


@pytest.mark.parametrize("key", ["reg.example", "https://reg.example", "https://reg.example/v2/"])
def test_auths(tmp_path: Path, key: str) -> None:
    directory = write(tmp_path, {"auths": {key: {"auth": AUTH}}})
    assert find_credentials("reg.example", directory) == Credentials("ada", "pass:word")
    assert find_credentials("reg.example:5000", directory) is None


def test_docker_hub_has_a_key_of_its_own(tmp_path: Path) -> None:
    directory = write(tmp_path, {"auths": {"https://index.docker.io/v1/": {"auth": AUTH}}})
    assert find_credentials("docker.io", directory) == Credentials("ada", "pass:word")


def test_identity_token(tmp_path: Path) -> None:
    entry = {"auth": base64.b64encode(b"00000000:").decode(), "identitytoken": "refresh"}
    found = find_credentials("a.example", write(tmp_path, {"auths": {"a.example": entry}}))
    assert found and found.identity_token == "refresh"


def test_where_the_file_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    (home / ".docker").mkdir(parents=True)
    write(home / ".docker", {"auths": {"a.example": {"auth": AUTH}}})
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("DOCKER_CONFIG", raising=False)
    assert find_credentials("a.example", None)
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    assert find_credentials("a.example", None) is None


def test_helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = '{"ServerURL":"x","Username":"ada","Secret":"s3cret"}'
    helper(tmp_path, monkeypatch, f"""[ "$1 $(cat)" = "get a.example" ] && echo '{answer}'""")
    directory = write(tmp_path, {"credHelpers": {"a.example": "test"}})
    assert find_credentials("a.example", directory) == Credentials("ada", "s3cret")
    assert find_credentials("b.example", directory) is None
    directory = write(tmp_path, {"credsStore": "test", "auths": {"a.example": {}}})
    assert find_credentials("a.example", directory) == Credentials("ada", "s3cret")


def test_helper_with_a_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    helper(tmp_path, monkeypatch, """echo '{"Username":"<token>","Secret":"refresh"}'""")
    directory = write(tmp_path, {"credsStore": "test"})
    assert find_credentials("a.example", directory) == Credentials("", "", "refresh")


def test_helper_that_knows_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    helper(tmp_path, monkeypatch, "echo credentials not found in native keychain; exit 1")
    assert find_credentials("a.example", write(tmp_path, {"credsStore": "test"})) is None


@pytest.mark.parametrize(
    ("script", "why"),
    [("exit 1", "failed"), ("echo rubbish", "can't be read"), ("echo '{}'", "can't be read")],
)
def test_broken_helpers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, why: str
) -> None:
    helper(tmp_path, monkeypatch, script)
    with pytest.raises(RegistryUnauthorized, match=why):
        find_credentials("a.example", write(tmp_path, {"credsStore": "test"}))


@pytest.mark.parametrize("name", ["missing", "../../bin/sh", "a b"])
def test_helpers_that_are_not_there(tmp_path: Path, name: str) -> None:
    with pytest.raises(RegistryUnauthorized, match=r"helper|install"):
        find_credentials("a.example", write(tmp_path, {"credsStore": name}))


@pytest.mark.parametrize("text", ["rubbish with s3cret", '{"auths": "s3cret"}', "[" * 100_000])
def test_a_damaged_file_is_named_and_not_quoted(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(RegistryUnauthorized, match=r"config\.json") as caught:
        find_credentials("a.example", str(tmp_path))
    assert "s3cret" not in str(caught.value)


def test_a_damaged_entry_is_named(tmp_path: Path) -> None:
    directory = write(tmp_path, {"auths": {"a.example": {"auth": "%%%"}}})
    with pytest.raises(RegistryUnauthorized, match="docker login"):
        find_credentials("a.example", directory)


def test_credentials_do_not_show() -> None:
    assert "s3cret" not in repr(Credentials("ada", "s3cret", "t0ken"))
    assert "t0ken" not in repr(Credentials("", "", "t0ken"))


@pytest.mark.parametrize(
    ("header", "found"),
    [
        ("", []),
        ("Basic", [("basic", {})]),
        ('Basic realm="a, b"', [("basic", {"realm": "a, b"})]),
        (
            'Bearer realm="https://a/t",service="s",scope="repository:x:pull,push"',
            [
                (
                    "bearer",
                    {"realm": "https://a/t", "service": "s", "scope": "repository:x:pull,push"},
                )
            ],
        ),
        (
            'Basic realm=x, Bearer realm="y\\"z", error=invalid_token',
            [("basic", {"realm": "x"}), ("bearer", {"realm": 'y"z', "error": "invalid_token"})],
        ),
        ('bearer Realm = "y"', [("bearer", {"realm": "y"})]),
    ],
)
def test_challenges(header: str, found: list[tuple[str, dict[str, str]]]) -> None:
    assert [(c.scheme, c.parameters) for c in parse_challenges(header)] == found


@settings(deadline=None)
@given(st.text(max_size=60) | st.text(alphabet='Basic Ber=",\\ ', max_size=60))
def test_any_header_is_read_without_failing(header: str) -> None:
    parse_challenges(header)
