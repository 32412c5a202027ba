"""The store's settings as they stand in a configuration file."""

import msgspec
import pytest

from store.config import StoreConfig
from store.platform import host_platform, parse_platform


def test_a_file_with_everything() -> None:
    text = b"""{
        "registries": {"reg.example:5000": {"ca": "/ca.pem", "mirrors": ["m.example"]}},
        "limits": {"manifest_bytes": 1000}, "layers": {"layer_bytes": 1000},
        "patience": {"attempts": 2}, "parallel_layers": 1,
        "platform": {"os": "linux", "architecture": "arm64"}
    }"""
    config = msgspec.json.decode(text, type=StoreConfig)
    assert config.registries["reg.example:5000"].mirrors == ("m.example",)
    assert config.limits.manifest_bytes == config.layers.layer_bytes == 1000
    assert config.wanted_platform == parse_platform("linux/arm64")


def test_nothing_need_be_said() -> None:
    assert msgspec.json.decode(b"{}", type=StoreConfig).wanted_platform == host_platform()


@pytest.mark.parametrize("text", [b'{"registry": {}}', b'{"registries": {"a": {"plain": true}}}'])
def test_unknown_words_are_refused(text: bytes) -> None:
    with pytest.raises(msgspec.ValidationError, match="unknown field"):
        msgspec.json.decode(text, type=StoreConfig)


@pytest.mark.parametrize(
    "text",
    [
        b'{"lazy": {"requests": 0}}',
        b'{"lazy": {"read_seconds": 0}}',
        b'{"lazy": {"record_seconds": -1}}',
        b'{"lazy": {"fill_rate": 0}}',
        b'{"patience": {"attempts": 0}}',
        b'{"layers": {"layer_bytes": -1}}',
        b'{"parallel_layers": 0}',
    ],
)
def test_numbers_that_make_no_sense_are_refused(text: bytes) -> None:
    with pytest.raises(msgspec.ValidationError, match=r"Expected `(int|float)` >=? [01]"):
        msgspec.json.decode(text, type=StoreConfig)
