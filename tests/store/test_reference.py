"""Names of images, as docker understands them."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from store.errors import InvalidReference
from store.reference import LayoutSource, Reference, RegistrySource, parse_reference, parse_source

HEX = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("text", "full"),
    [
        ("alpine", "docker.io/library/alpine:latest"),
        ("alpine:3.20", "docker.io/library/alpine:3.20"),
        ("library/alpine", "docker.io/library/alpine:latest"),
        ("docker.io/alpine", "docker.io/library/alpine:latest"),
        ("index.docker.io/alpine", "docker.io/library/alpine:latest"),
        ("team/app:v1", "docker.io/team/app:v1"),
        ("localhost/app", "localhost/app:latest"),
        ("localhost:5000/app", "localhost:5000/app:latest"),
        ("host:5000/app:1", "host:5000/app:1"),
        ("127.0.0.1:5000/a/b/c", "127.0.0.1:5000/a/b/c:latest"),
        ("[::1]:5000/app", "[::1]:5000/app:latest"),
        ("ghcr.io/a/b-c__d.e_f:T.a_g-1", "ghcr.io/a/b-c__d.e_f:T.a_g-1"),
        ("Upper/app", "Upper/app:latest"),
        (f"alpine@sha256:{HEX}", f"docker.io/library/alpine@sha256:{HEX}"),
        (f"alpine:3@sha256:{HEX}", f"docker.io/library/alpine:3@sha256:{HEX}"),
        ("a" * 128, f"docker.io/library/{'a' * 128}:latest"),
        ("app:" + "t" * 128, f"docker.io/library/app:{'t' * 128}"),
    ],
)
def test_normal_form(text: str, full: str) -> None:
    assert str(parse_reference(text)) == full
    assert str(parse_reference(full)) == full


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "may hold"),
        ("Alpine", "lower-case"),
        ("docker.io/Team/app", "lower-case"),
        (HEX, "an ID"),
        ("app:", "tag"),
        ("app:" + "t" * 129, "tag"),
        ("app:.x", "tag"),
        ("a//b", "may hold"),
        ("/a", "may hold"),
        ("a/", "may hold"),
        ("a..b", "may hold"),
        ("a___b", "may hold"),
        ("../../etc/passwd", "host name"),
        ("host.example/../x", "may hold"),
        ("-host.example/x", "host name"),
        ("host.example:0/x", "with a port"),
        ("host.example:65536/x", "with a port"),
        ("[::1]:99999/x", "with a port"),
        ("user@host/x", "not a digest"),
        ("app@sha256:" + HEX[:-1], "not a digest"),
        ("app@md5:" + HEX[:32], "not a digest"),
        ("app\n", "may hold"),
        ("app:1\n", "tag"),
        ("x" * 300, "longer than"),
        ("häuser/app", "may hold"),
        ("https://host.example/app", "may hold|host name"),
    ],
)
def test_refused(text: str, why: str) -> None:
    with pytest.raises(InvalidReference, match=why):
        parse_reference(text)


_part = st.from_regex(r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*", fullmatch=True).filter(
    lambda part: len(part) < 40
)
_references = st.builds(
    Reference,
    registry=st.from_regex(r"[a-z0-9]{1,20}\.[a-z]{2,5}(:[1-6][0-9]{0,3})?", fullmatch=True),
    repository=st.lists(_part, min_size=1, max_size=4).map("/".join),
    tag=st.from_regex(r"[a-zA-Z0-9_][a-zA-Z0-9_.-]{0,127}", fullmatch=True),
    digest=st.none() | st.just(f"sha256:{HEX}"),
)


@settings(deadline=None)
@given(_references)
def test_every_reference_reads_back(reference: Reference) -> None:
    assert parse_reference(str(reference)) == reference


@settings(deadline=None)
@given(st.text(max_size=80) | st.text(alphabet="aA0./:@-_[]\n", max_size=40))
def test_any_text_is_refused_or_has_one_normal_form(text: str) -> None:
    try:
        reference = parse_reference(text)
    except InvalidReference:
        return
    assert parse_reference(str(reference)) == reference
    parts = str(reference).split("/")
    assert all(parts) and ".." not in parts and "." not in parts
    assert "\n" not in str(reference) and " " not in str(reference)


def test_sources() -> None:
    plain = RegistrySource(parse_reference("alpine"))
    assert parse_source("alpine") == parse_source("docker://alpine") == plain
    assert str(plain) == "docker://docker.io/library/alpine:latest"
    assert parse_source("oci:/a/b") == LayoutSource(Path("/a/b"))
    assert parse_source("oci:/a//b/../c/:v1") == LayoutSource(Path("/a/c"), "v1")
    assert str(parse_source("oci:/a/b:v1")) == "oci:/a/b:v1"


def test_a_scheme_that_images_have_not() -> None:
    with pytest.raises(InvalidReference, match="leave out 'https://'"):
        parse_source("https://host.example:5000/app:1")


@pytest.mark.parametrize("text", ["oci:", "oci:relative", "oci:/a:", "oci:/a\0b", "ftp://x/y"])
def test_bad_sources(text: str) -> None:
    with pytest.raises(InvalidReference):
        parse_source(text)


def test_names_of_layouts() -> None:
    source = LayoutSource(Path("/srv/app"))
    assert str(source.default_name("v1")) == "localhost/app:v1"
    assert str(source.default_name(None)) == "localhost/app:latest"
    for path, tag in (("/srv/My App", None), ("/", None), ("/srv/app", "docker.io/x:1")):
        with pytest.raises(InvalidReference, match="as=NAME"):
            LayoutSource(Path(path)).default_name(tag)
