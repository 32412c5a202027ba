"""Settings as text, there and back; and what cannot be one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.errors import InvalidSetting
from runtime.settings import (
    SETTINGS,
    Settings,
    decode_settings,
    effective,
    effective_text,
    encode_settings,
    own_text,
    with_text,
)
from runtime.signals import parse_signal, signal_name
from store.manifest import ContainerConfig, ImageConfig, RootFs


def shown(name: str, text: str) -> str:
    """What the file of a setting shows after a text was written to it."""
    return effective_text(effective(with_text(Settings(), name, text), None, "c"), name)


def image(**config: object) -> ImageConfig:
    """An image's configuration."""
    return ImageConfig(rootfs=RootFs("layers"), container=ContainerConfig(**config))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("image", "alpine:3.20\n", "alpine:3.20"),
        ("args", "sh\n-c\necho hi\n", "sh\n-c\necho hi"),
        ("args", "sh\n\nx\n", "sh\n\nx"),
        ("args", "sh\0-c\0echo a\necho b\0", "sh\0-c\0echo a\necho b\0"),
        ("args", "a\0b", "a\nb"),
        ("args", "a\0b\0\n", "a\nb"),
        ("args", " a b \n", " a b "),
        ("workdir", "/a/b\n", "/a/b"),
        ("workdir", "/a//b/../c/", "/a/c"),
        ("workdir", "//", "/"),
        ("user", "web:media\n", "web:media"),
        ("hostname", "web-1.example\n", "web-1.example"),
        ("mounts", "/a /b bind ro\n", "/a /b bind ro"),
        ("mounts", "# c\n\n/a\\040b\t/c none rbind,rslave 0 0\n", "/a\\040b /c bind rbind,rslave"),
        ("mounts", "tmpfs /t tmpfs\n", "tmpfs /t tmpfs defaults"),
        ("mounts", "/\\043a /b bind defaults", "/\\043a /b bind defaults"),
        ("readonly", "1\n", "1"),
        ("readonly", "0", "0"),
        ("labels", "a=b\nc=\n", "a=b\nc="),
        ("labels", "a=b\nc\0", "a=b\nc\0"),
        ("stop_signal", "SIGINT\n", "INT"),
        ("stop_signal", "9", "KILL"),
        ("stop_signal", "rtmin+3", "RTMIN+3"),
        ("stop_timeout", "30\n", "30"),
        ("stop_timeout", "0.25", "0.25"),
        ("stdin", "once\n", "once"),
        ("network", "host\n", "host"),
    ],
)
def test_what_is_written_reads_back(name: str, text: str, value: str) -> None:
    if name == "labels" and "\0" in text:
        value = "a=b\nc\0"
    assert shown(name, text) == value
    assert shown(name, value + "\n") == value
    settings = with_text(Settings(), name, text)
    assert with_text(Settings(), name, own_text(settings, name)) == settings
    assert with_text(settings, name, "\n") == Settings()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("image", "two words"),
        ("image", "x\x1b[31m"),
        ("args", "\0"),
        ("args", "\n\nx"),
        ("args", "x" * 200_000),
        ("env", "=x"),
        ("env", " A=1"),
        ("env", "A\x01=1"),
        ("workdir", "relative"),
        ("workdir", "/a\nb"),
        ("workdir", "/" + "x" * 5000),
        ("user", "a b"),
        ("user", "a:b:c"),
        ("user", ":group"),
        ("user", "2147483648"),
        ("user", "0:4294967295"),
        ("hostname", "-x"),
        ("hostname", "a_b_"),
        ("hostname", "x" * 65),
        ("hostname", "a/b"),
        ("mounts", "/a /b"),
        ("mounts", "/a b bind"),
        ("mounts", "a /b bind"),
        ("mounts", "/a / bind"),
        ("mounts", "/a /b/../.. bind"),
        ("mounts", "/a /proc bind"),
        ("mounts", "/dev/sda /b ext4"),
        ("mounts", "/a /b bind upperdir=/x"),
        ("mounts", "t /b tmpfs size=-1"),
        ("mounts", "t /b tmpfs mode=abc"),
        ("mounts", "/a /b bind ro x y"),
        ("mounts", "/a\\000 /b bind"),
        ("readonly", "yes"),
        ("labels", "novalue"),
        ("labels", "=x"),
        ("stop_signal", "0"),
        ("stop_signal", "65"),
        ("stop_signal", "FOO"),
        ("stop_signal", "RTMAX-99"),
        ("stop_timeout", "-1"),
        ("stop_timeout", "1e3"),
        ("stop_timeout", "nan"),
        ("stop_timeout", "9999999"),
        ("stdin", "yes"),
        ("network", "bridge"),
        ("nonsense", "x"),
    ],
)
def test_what_cannot_be_set(name: str, text: str) -> None:
    with pytest.raises(InvalidSetting) as failure:
        with_text(Settings(), name, text)
    assert "\n" not in failure.value.sentence
    assert failure.value.sentence.isprintable()


def test_nothing_but_comments_is_nothing() -> None:
    assert with_text(Settings(), "mounts", "# none\n") == Settings()


@given(name=st.sampled_from(sorted(SETTINGS)), text=st.text())
def test_any_text_is_taken_or_refused_and_then_reads_back(name: str, text: str) -> None:
    try:
        settings = with_text(Settings(), name, text)
    except InvalidSetting:
        return
    assert with_text(Settings(), name, own_text(settings, name)) == settings
    assert decode_settings(encode_settings(settings)) == settings


@given(st.lists(st.text(st.characters(exclude_characters="\0", codec="utf-8"))))
def test_arguments_of_any_kind(arguments: list[str]) -> None:
    arguments = ["command", *arguments]
    settings = with_text(Settings(), "args", "".join(f"{a}\0" for a in arguments))
    assert settings.args == tuple(arguments)
    assert with_text(Settings(), "args", own_text(settings, "args")) == settings


def test_defaults_come_from_the_image() -> None:
    config = image(
        user="web",
        env=("PATH=/bin", "A=1", "B=2"),
        entrypoint=("/entry",),
        cmd=("run", "it"),
        working_dir="srv",
        labels={"x": "1", "y": "2"},
        stop_signal="SIGQUIT",
    )
    settings = with_text(Settings(), "env", "B=3\nA\nC=4\n")
    settings = with_text(settings, "labels", "y=3")
    values = effective(settings, config, "name")
    assert values.args == ("/entry", "run", "it")
    assert values.env == ("PATH=/bin", "B=3", "C=4")
    assert values.workdir == "/srv"
    assert values.user == "web"
    assert values.hostname == "name"
    assert values.labels == {"x": "1", "y": "3"}
    assert values.stop_signal == "QUIT"
    assert values.stop_timeout == 10
    assert (values.stdin, values.network, values.readonly) == ("none", "none", False)
    only = effective(with_text(Settings(), "args", "mine"), config, "name")
    assert only.args == ("mine",)


def test_an_image_without_anything() -> None:
    values = effective(Settings(), image(), "a_long-name.")
    assert values.args == ()
    assert values.env[0].startswith("PATH=/usr/local/sbin:")
    assert (values.workdir, values.user) == ("/", "0")
    assert values.hostname == "a_long-name"
    assert effective(Settings(), image(stop_signal="rubbish"), "x").stop_signal == "TERM"


def test_reading_env_gives_what_can_be_written_back() -> None:
    config = image(env=("A=1", "B=two\nlines"))
    values = effective(Settings(), config, "x")
    text = effective_text(values, "env")
    again = effective(with_text(Settings(), "env", text + "\n"), config, "x")
    assert again.env == values.env


def test_the_spec_document() -> None:
    settings = Settings()
    for name, text in (
        ("image", "a:1"),
        ("args", "a\nb"),
        ("env", "A=1\nB"),
        ("workdir", "/w"),
        ("user", "u:g"),
        ("hostname", "h"),
        ("mounts", "/a /b bind ro"),
        ("readonly", "1"),
        ("labels", "k=v"),
        ("stop_signal", "INT"),
        ("stop_timeout", "1.5"),
        ("stdin", "open"),
        ("network", "host"),
    ):
        settings = with_text(settings, name, text)
    assert decode_settings(encode_settings(settings)) == settings
    assert encode_settings(Settings()) == b"{}\n"


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe\x00",
        b'{"unknown": 1}',
        b'{"args": "x"}',
        b'{"args": []}',
        b'{"args": ["a\\u0000b"]}',
        b'{"env": ["=1"]}',
        b'{"user": "a b"}',
        b'{"image": ""}',
        b'{"stop_timeout": -1}',
        b'{"stop_signal": "NO"}',
        b'{"network": "bridge"}',
        b'{"mounts": [{"destination": "/", "type": "bind", "source": "/a"}]}',
        b'{"mounts": [{"destination": "/a", "type": "bind", "source": "/a", "x": 1}]}',
        b'{"labels": {"a": 1}}',
        b'{"labels": {"": "x"}}',
        b'{"hostname": "a\\nb"}',
        b"[" * 100_000,
    ],
)
def test_documents_that_are_none(document: bytes) -> None:
    with pytest.raises(InvalidSetting):
        decode_settings(document)


def test_signals() -> None:
    assert parse_signal("TERM") == parse_signal("sigterm\n") == parse_signal("15") == 15
    assert parse_signal("RTMIN") == 34
    assert parse_signal("SIGRTMAX") == 64
    assert signal_name(15) == "TERM"
    for number in range(1, 65):
        assert parse_signal(signal_name(number)) == number


def test_every_setting_explains_itself() -> None:
    assert set(SETTINGS) == set(Settings.__struct_fields__)
    assert all(len(setting.help) > 20 for setting in SETTINGS.values())


@pytest.mark.parametrize("name", sorted(SETTINGS))
@pytest.mark.parametrize("text", ["a\ud800", "/a\udcff", "K=\ud800", "/a\ud800 /b bind"])
def test_halves_of_surrogate_pairs_are_refused(name: str, text: str) -> None:
    with pytest.raises(InvalidSetting):
        with_text(Settings(), name, text)


@pytest.mark.parametrize(
    "document",
    [
        rb'{"args": ["\ud800"]}',
        rb'{"labels": {"a": "x\u0000b=y"}}',
        rb'{"labels": {"a\u0000": "x"}}',
        rb'{"env": ["A=\u0000"]}',
        rb'{"mounts": [{"type": "bind", "source": "/a\u0000", "destination": "/b"}]}',
    ],
)
def test_documents_with_what_no_setting_can_hold(document: bytes) -> None:
    with pytest.raises(InvalidSetting):
        decode_settings(document)
