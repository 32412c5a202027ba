"""Layer compression: everything that gzip and zstd streams can be, whole and broken."""

import gzip
import tracemalloc
import zlib
from collections.abc import Iterator

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from store.errors import CtrfsError, InvalidLayer, UnsupportedMediaType
from store.inflate import ChunkReader, inflated

GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"
ZSTD = "application/vnd.oci.image.layer.v1.tar+zstd"
TAR = "application/vnd.oci.image.layer.v1.tar"

CONTENT = b"".join(b"%d\n" % number for number in range(100_000))
SKIPPABLE = b"\x5e\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"hello"


def compress_zstd(data: bytes, **parameters: int | bool) -> bytes:
    return zstandard.ZstdCompressor(**parameters).compress(data)  # type: ignore[arg-type]


def pieces(data: bytes, size: int) -> Iterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


def inflate(data: bytes, media_type: str = GZIP, chunk: int = 4096, buffer: int = 1 << 16) -> bytes:
    reader = inflated(ChunkReader(pieces(data, chunk)), media_type)
    view = memoryview(bytearray(buffer))
    out = bytearray()
    while True:
        count = reader.fill(view)
        out += view[:count]
        if count < len(view):
            return bytes(out)


def gzip_with_all_header_fields() -> bytes:
    raw = gzip.compress(CONTENT)
    flags = 4 | 8 | 16  # extra field, name, comment
    return raw[:3] + bytes([flags]) + raw[4:10] + b"\4\0abcd" + b"name\0comment\0" + raw[10:]


def zstd_without_content_size() -> bytes:
    compressor = zstandard.ZstdCompressor(write_content_size=False).compressobj()
    return compressor.compress(CONTENT) + compressor.flush()


WHOLE = {
    "plain": CONTENT,
    "gzip": gzip.compress(CONTENT),
    "gzip with a name": gzip_with_all_header_fields(),
    "gzip members": b"".join(gzip.compress(part) for part in pieces(CONTENT, 1000)),
    "gzip with an empty member": gzip.compress(CONTENT) + gzip.compress(b""),
    "gzip padded": gzip.compress(CONTENT) + bytes(512),
    "zstd": compress_zstd(CONTENT),
    "zstd without size": zstd_without_content_size(),
    "zstd frames": b"".join(compress_zstd(part) for part in pieces(CONTENT, 10_000)),
    "zstd skippable": SKIPPABLE + compress_zstd(CONTENT) + SKIPPABLE,
    "zstd checksums": compress_zstd(CONTENT, write_checksum=True),
    "zstd stored": compress_zstd(CONTENT, level=-100),
}


@pytest.mark.parametrize("data", WHOLE.values(), ids=list(WHOLE))
def test_whole_streams(data: bytes) -> None:
    for chunk in (1000, 1 << 20):
        assert inflate(data, chunk=chunk) == CONTENT


def test_single_byte_chunks() -> None:
    for name in ("gzip", "zstd skippable", "plain"):
        assert inflate(WHOLE[name], chunk=1) == CONTENT


def test_empty_chunks_and_empty_streams() -> None:
    reader = inflated(ChunkReader(iter([b"", b"\x1f", b"", gzip.compress(b"x")[1:], b""])), GZIP)
    view = memoryview(bytearray(10))
    assert reader.fill(view) == 1
    assert inflate(b"") == b""
    assert inflate(b"ab") == b"ab"


def test_the_bytes_decide_not_the_media_type() -> None:
    docker = "application/vnd.docker.image.rootfs.diff.tar.gzip"
    for media_type in (GZIP, ZSTD, TAR, docker):
        for name in ("plain", "gzip", "zstd"):
            assert inflate(WHOLE[name], media_type) == CONTENT


@pytest.mark.parametrize(
    "media_type",
    [
        "",
        "text/plain",
        GZIP + "+encrypted",
        "application/vnd.oci.image.config.v1+json",
        "a\n" * 500,
    ],
)
def test_unknown_media_types_are_refused(media_type: str) -> None:
    with pytest.raises(UnsupportedMediaType) as caught:
        inflated(ChunkReader(iter([b"x"])), media_type)
    assert "\n" not in caught.value.sentence


@pytest.mark.parametrize("name", ["gzip", "gzip members", "zstd", "zstd checksums", "zstd frames"])
def test_truncated_streams_are_refused(name: str) -> None:
    data = WHOLE[name]
    for cut in {1, 2, 3, 4, 7, 8, len(data) // 2, len(data) - 4}:
        with pytest.raises(InvalidLayer, match=r"cut off"):
            inflate(data[: len(data) - cut])


def test_a_truncated_skippable_frame_is_refused() -> None:
    with pytest.raises(InvalidLayer, match=r"cut off"):
        inflate(WHOLE["zstd"] + SKIPPABLE[:-1])


@pytest.mark.parametrize("name", ["gzip", "zstd"])
def test_what_follows_the_stream_is_refused(name: str) -> None:
    for tail in (b"rubbish, more than a few bytes", CONTENT):
        with pytest.raises(InvalidLayer, match=r"damaged"):
            inflate(WHOLE[name] + tail)


def test_wrong_checksums_are_refused() -> None:
    wrong_crc = bytearray(WHOLE["gzip"])
    wrong_crc[-8] ^= 1
    wrong_length = bytearray(WHOLE["gzip"])
    wrong_length[-1] ^= 1
    wrong_zstd = bytearray(WHOLE["zstd checksums"])
    wrong_zstd[-1] ^= 1
    for data in (wrong_crc, wrong_length, wrong_zstd):
        with pytest.raises(InvalidLayer, match=r"damaged"):
            inflate(bytes(data))


def test_windows_that_would_need_too_much_memory_are_refused() -> None:
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=28)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    data = compressor.compress(CONTENT) + compressor.flush()
    with pytest.raises(InvalidLayer, match=r"128 MiB"):
        inflate(data)


@pytest.mark.parametrize("name", ["gzip", "zstd"])
def test_a_bomb_takes_no_memory(name: str) -> None:
    zeros = bytes(64 << 20)
    bomb = zlib.compress(zeros, 9, 31) if name == "gzip" else compress_zstd(zeros)
    del zeros
    reader = inflated(ChunkReader(iter([bomb])), GZIP)
    view = memoryview(bytearray(1 << 20))
    tracemalloc.start()
    total = 0
    while count := reader.fill(view):
        total += count
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == 64 << 20
    assert peak < 4 << 20


def test_errors_of_the_source_pass_through() -> None:
    class Lost(CtrfsError):
        pass

    def source() -> Iterator[bytes]:
        yield WHOLE["gzip"][:1000]
        raise Lost("the connection is gone")

    reader = inflated(ChunkReader(source()), GZIP)
    with pytest.raises(Lost):
        reader.fill(memoryview(bytearray(1 << 20)))


SMALL = {"gzip": gzip.compress(CONTENT[:3000]), "zstd": SKIPPABLE + compress_zstd(CONTENT[:3000])}


@given(
    name=st.sampled_from(sorted(SMALL)),
    flips=st.lists(st.tuples(st.integers(0, 10_000), st.integers(1, 255)), max_size=4),
    cut=st.integers(0, 10_000),
    chunk=st.sampled_from([1, 7, 4096]),
)
def test_mutated_streams_give_bytes_or_a_domain_error(
    name: str, flips: list[tuple[int, int]], cut: int, chunk: int
) -> None:
    data = bytearray(SMALL[name])
    for place, value in flips:
        data[place % len(data)] ^= value
    del data[len(data) - cut % len(data) :]
    try:
        inflate(bytes(data), chunk=chunk)
    except CtrfsError as error:
        assert error.sentence
