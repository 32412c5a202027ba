"""The tar parser, on archives by hand and by GNU tar, in pieces of any size."""

import stat
import subprocess
from pathlib import Path

import pytest

from store.errors import CtrfsError, InvalidLayer, LimitExceeded
from store.index import Entry
from store.tar import TarParser
from store.tar_entry import encode_device
from store.tar_names import clean_path, shown
from tests.support.tars import (
    BLOCK,
    END,
    archive,
    directory,
    entry,
    header,
    padded,
    pax,
)

PIECES = (BLOCK, 3 * BLOCK, 1 << 20)


class Memory:
    """``tar.Contents`` in memory."""

    def __init__(self) -> None:
        self.data = bytearray()
        self._at = 0

    def begin(self, entry: Entry) -> int:
        start = -(-len(self.data) // 4096) * 4096
        self.data.extend(bytes(start + entry.size - len(self.data)))
        self._at = start
        return start

    def seek(self, position: int) -> None:
        self._at = position

    def write(self, view: memoryview) -> None:
        self.data[self._at : self._at + len(view)] = view
        self._at += len(view)


def parse(data: bytes, piece: int = 1 << 20) -> tuple[list[Entry], Memory]:
    memory = Memory()
    parser = TarParser(memory)
    view = memoryview(data)
    entries: list[Entry] = []
    for start in range(0, len(data), piece):
        entries += parser.feed(view[start : start + piece])
    parser.finish()
    return entries, memory


def parse_one(data: bytes) -> Entry:
    (found,) = parse(data)[0]
    return found


def contents(data: bytes, piece: int = 1 << 20) -> dict[bytes, bytes]:
    entries, memory = parse(data, piece)
    return {
        item.path: bytes(memory.data[item.offset : item.offset + item.size])
        for item in entries
        if stat.S_ISREG(item.mode)
    }


def refusal(data: bytes) -> str:
    with pytest.raises((InvalidLayer, LimitExceeded)) as caught:
        parse(data)
    sentence = caught.value.sentence
    assert "\n" not in sentence
    assert len(sentence) < 700
    return sentence


@pytest.mark.parametrize("piece", PIECES)
def test_fields_of_every_type(piece: int) -> None:
    data = archive(
        directory(b"d/", mode=0o1777, uid=7, gid=8, mtime=99),
        entry(b"d/f", data=b"hello", mode=0o4755),
        entry(b"d/l", b"2", link=b"../f/./x"),
        entry(b"d/h", b"1", link=b"/d/f"),
        entry(b"c", b"3", device=(4, 70000)),
        entry(b"b", b"4", device=(4095, 1048575)),
        entry(b"p", b"6"),
    )
    entries, memory = parse(data, piece)
    assert [(item.path, stat.S_IFMT(item.mode)) for item in entries] == [
        (b"d", stat.S_IFDIR),
        (b"d/f", stat.S_IFREG),
        (b"d/l", stat.S_IFLNK),
        (b"d/h", 0),
        (b"c", stat.S_IFCHR),
        (b"b", stat.S_IFBLK),
        (b"p", stat.S_IFIFO),
    ]
    d, f, link, hard, c, b, _ = entries
    assert (d.mode & 0o7777, d.uid, d.gid, d.seconds) == (0o1777, 7, 8, 99)
    assert f.mode & 0o7777 == 0o4755
    assert bytes(memory.data[f.offset : f.offset + f.size]) == b"hello"
    assert (link.link, link.size, hard.link) == (b"../f/./x", 8, b"d/f")
    assert (c.rdev, b.rdev) == (encode_device(4, 70000), encode_device(4095, 1048575))


@pytest.mark.parametrize("piece", PIECES)
def test_contents_start_at_whole_blocks_and_are_complete(piece: int) -> None:
    wanted = {b"f%d" % size: b"%d," % size * size for size in (0, 1, 511, 512, 513, 4096, 70001)}
    data = archive(*(entry(name, data=content) for name, content in wanted.items()))
    assert contents(data, piece) == wanted
    assert all(item.offset % 4096 == 0 for item in parse(data)[0])


@pytest.mark.parametrize(
    ("name", "path"),
    [
        (b"a", b"a"),
        (b"./a/", b"a"),
        (b"/etc/passwd", b"etc/passwd"),
        (b"//a//b", b"a/b"),
        (b"a/./b/../c", b"a/c"),
        (b".", b""),
        (b"./", b""),
        (b"/", b""),
        (b"", b""),
        (b".a/..b/...", b".a/..b/..."),
        (b"a/..", b""),
        (b"a//", b"a"),
        (b"./a///", b"a"),
        (b"//", b""),
        (b"a/./", b"a"),
        (b"..", None),
        (b"../../etc/passwd", None),
        (b"a/../../b", None),
    ],
)
def test_clean_path(name: bytes, path: bytes | None) -> None:
    assert clean_path(name) == path


def test_a_name_that_leads_out_is_refused_by_name() -> None:
    assert "'/../../etc/passwd'" in refusal(archive(entry(b"../../etc/passwd", data=b"x")))
    assert "'/a'" in refusal(archive(entry(b"a", b"1", link=b"../../etc/shadow")))


def test_names_are_bytes() -> None:
    name = b"\xff\xfe\n\t\x1b[31m"
    assert parse_one(archive(entry(name))).path == name
    sentence = refusal(archive(entry(name + b"/../../..")))
    assert "\\xff\\xfe\\n\\t\\x1b[31m" in sentence
    assert shown("käse".encode()) == "'/käse'"
    assert len(shown(b"x" * 10_000)) < 210


def test_ustar_prefix_and_star_prefix() -> None:
    plain = header(b"name", prefix=b"some/prefix")
    star = header(b"name", prefix=b"some/prefix", raw={476: b"01234567012 ", 508: b"tar\0"})
    gnu = header(b"name", magic=b"ustar  \0", prefix=b"12345670123")  # times live there
    assert parse_one(archive(plain)).path == b"some/prefix/name"
    assert parse_one(archive(star)).path == b"some/prefix/name"
    assert parse_one(archive(gnu)).path == b"name"


def test_v7_directories_end_in_a_slash() -> None:
    data = archive(header(b"d/", b"\0", magic=b""), header(b"f", b"\0", magic=b""))
    assert [stat.S_IFMT(item.mode) for item in parse(data)[0]] == [stat.S_IFDIR, stat.S_IFREG]


def test_base_256_numbers() -> None:
    item = parse_one(archive(entry(b"f", uid=4294967294, gid=3_000_000, mtime=-(1 << 40))))
    assert (item.uid, item.gid, item.seconds) == (4294967294, 3_000_000, -(1 << 40))


@pytest.mark.parametrize(
    ("text", "seconds", "nanoseconds"),
    [
        (b"12", 12, 0),
        (b"12.", 12, 0),
        (b"12.5", 12, 500_000_000),
        (b"1.0000000019", 1, 1),
        (b"-1.25", -2, 750_000_000),
        (b"-7", -7, 0),
        (b"9223372036854775807.999999999", (1 << 63) - 1, 999_999_999),
    ],
)
def test_pax_times(text: bytes, seconds: int, nanoseconds: int) -> None:
    item = parse_one(archive(pax([(b"mtime", text)]), entry(b"f")))
    assert (item.seconds, item.nanoseconds) == (seconds, nanoseconds)


@pytest.mark.parametrize("piece", PIECES)
def test_pax_records_override_the_header(piece: int) -> None:
    long = b"a" * 200 + b"/" + b"b" * 200
    records = [
        (b"path", long),
        (b"uid", b"4000000000"),
        (b"gid", b"4000000001"),
        (b"size", b"3"),
        (b"uname", b"nobody"),
        (b"SCHILY.xattr.user.a", b"with\0zero\nand =="),
        (b"SCHILY.xattr.security.capability", b"\1\2"),
        (b"comment", b"\xff"),
    ]
    data = archive(pax(records), header(b"short", uid=1) + padded(b"abc"), entry(b"next"))
    (first, second), memory = parse(data, piece)
    assert (first.path, first.uid, first.gid, first.size) == (long, 4000000000, 4000000001, 3)
    assert bytes(memory.data[:3]) == b"abc"
    assert first.xattrs == {b"user.a": b"with\0zero\nand ==", b"security.capability": b"\1\2"}
    assert (second.path, second.xattrs) == (b"next", None)


def test_an_empty_pax_value_leaves_the_header() -> None:
    assert parse_one(archive(pax([(b"path", b""), (b"uid", b"")]), entry(b"f", uid=5))).uid == 5


def test_pax_link_path_and_gnu_long_names() -> None:
    long = b"x" * 150
    data = archive(
        pax([(b"linkpath", long)]),
        entry(b"a", b"2"),
        entry(b"././@LongLink", b"L", long + b"\0"),
        entry(b"././@LongLink", b"K", b"../" + long + b"\0"),
        entry(b"cut", b"2", link=b"cut"),
    )
    first, second = parse(data)[0]
    assert first.link == long
    assert (second.path, second.link) == (long, b"../" + long)


def test_global_headers_are_ignored() -> None:
    data = archive(pax([(b"uid", b"7"), (b"path", b"evil")], b"g"), entry(b"f", uid=1))
    item = parse_one(data)
    assert (item.path, item.uid) == (b"f", 1)
    assert "global pax" in refusal(archive(entry(b"g", b"g", b"nonsense"), entry(b"f")))


def test_attributes_for_overlayfs_and_foreign_ones_are_dropped() -> None:
    names = [
        b"trusted.overlay.redirect",
        b"trusted.overlay.opaque",
        b"user.overlay.metacopy",
        b"system.nfs4_acl",
        b"btrfs.compression",
        b"user.",
    ]
    records = [(b"SCHILY.xattr." + name, b"/etc") for name in names]
    kept = [(b"SCHILY.xattr.trusted.mine", b""), (b"SCHILY.xattr.system.posix_acl_access", b"a")]
    item = parse_one(archive(pax(records + kept), entry(b"f")))
    assert item.xattrs == {b"trusted.mine": b"", b"system.posix_acl_access": b"a"}
    assert parse_one(archive(pax(records), entry(b"f"))).xattrs is None


def test_attributes_beyond_what_the_filesystem_holds() -> None:
    def with_values(*sizes: int) -> bytes:
        records = [(b"SCHILY.xattr.user.%d" % n, bytes(size)) for n, size in enumerate(sizes)]
        return archive(pax(records), entry(b"f"))

    assert parse_one(with_values(65535, 65000)).xattrs
    assert "65535" in refusal(with_values(65536))
    assert "131072" in refusal(with_values(65000, 65000, 65000))


@pytest.mark.parametrize(
    "records",
    [
        [(b"size", b"-1")],
        [(b"uid", b"1x")],
        [(b"mtime", b"1.5.5")],
        [(b"mtime", b"--1")],
        [(b"path", b"a\0b")],
        [(b"linkpath", b"a\0b")],
        [(b"SCHILY.xattr.user.a\0b", b"")],
        [(b"GNU.sparse.map", b"0,1,2"), (b"GNU.sparse.size", b"9")],
        [(b"GNU.sparse.map", b"0,x"), (b"GNU.sparse.size", b"9")],
        [(b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0")],
    ],
)
def test_senseless_pax_values_are_refused(records: list[tuple[bytes, bytes]]) -> None:
    assert "'/f'" in refusal(archive(pax(records), entry(b"f")))


@pytest.mark.parametrize(
    "body", [b"5 a=b", b"6 a=b", b"99 a=b\n", b"a=b\n", b"6 =bc\n", b"6 abc\n", b"0 a=b\n", b"5\n"]
)
def test_broken_pax_records_are_refused(body: bytes) -> None:
    assert "broken record" in refusal(archive(entry(b"x", b"x", body), entry(b"f")))


def test_limits_of_the_format() -> None:
    assert "1048576" in refusal(header(b"x", b"x", size=(1 << 20) + 1))
    assert "4095" in refusal(archive(pax([(b"path", b"a/" * 2049)]), entry(b"f")))
    assert "4294967294" in refusal(archive(entry(b"f", uid=0xFFFFFFFF)))
    assert "4294967294" in refusal(archive(entry(b"f", gid=-1)))
    assert "size" in refusal(archive(header(b"f", size=-1)))
    assert "time" in refusal(archive(header(b"f", mtime=1 << 63)))
    assert "0 bytes" in refusal(archive(entry(b"f", b"2")))
    assert "4096 bytes" in refusal(archive(pax([(b"linkpath", b"a" * 4096)]), entry(b"f", b"2")))
    assert "4095:1048575" in refusal(archive(entry(b"f", b"3", device=(4096, 0))))
    assert "4095:1048575" in refusal(archive(entry(b"f", b"4", device=(0, 1 << 20))))


def test_a_device_that_overlayfs_would_take_for_a_whiteout_is_refused() -> None:
    assert "deleted" in refusal(archive(entry(b"f", b"3", device=(0, 0))))
    assert parse_one(archive(entry(b"f", b"4", device=(0, 0)))).rdev == 0


@pytest.mark.parametrize("kind", [b"V", b"M", b"D", b"A", b"\xff"])
def test_unknown_types_are_refused(kind: bytes) -> None:
    assert "'/f'" in refusal(archive(entry(b"f", kind)))


def test_header_only_types_have_no_content_whatever_their_size_says() -> None:
    for kind in (b"1", b"2", b"3", b"5", b"6"):
        data = archive(header(b"a", kind, size=1024, link=b"x", device=(1, 3)), entry(b"b"))
        assert [item.path for item in parse(data)[0]] == [b"a", b"b"]


# --- where an archive ends --------------------------------------------------------------


def test_the_end_may_be_missing_and_what_follows_it_is_ignored() -> None:
    whole = entry(b"a", data=b"x") + entry(b"b", data=b"y" * 600)
    for tail in (b"", bytes(512), END, END + b"rubbish", END + entry(b"c"), bytes(10240)):
        assert [item.path for item in parse(whole + tail)[0]] == [b"a", b"b"]
    unpadded = entry(b"a") + header(b"b", size=3) + b"abc"
    assert contents(unpadded)[b"b"] == b"abc"
    assert parse(b"")[0] == []


def test_truncated_archives_are_refused() -> None:
    whole = entry(b"a", data=b"x" * 600)
    for cut in (1, 100, 511, 512, 513, 1111):
        assert "cut off" in refusal(whole[:cut])
    assert "cut off" in refusal(whole + pax([(b"uid", b"1")]))
    assert "cut off" in refusal(whole + pax([(b"uid", b"1")])[:600])
    assert "cut off" in refusal(whole + entry(b"x", b"L", b"name"))


def test_damaged_headers_are_refused() -> None:
    good = header(b"a")
    assert "checksum" in refusal(b"b" + good[1:])
    assert "checksum" in refusal(b"not a tar archive at all".ljust(512, b"."))
    assert "after '/a'" in refusal(good + b"x" * 512)
    assert "checksum" in refusal(header(b"a", raw={100: b"8888888\0"}))
    assert "zero block" in refusal(good + bytes(512) + good)


def test_signed_checksums_of_old_programs() -> None:
    block = bytearray(header("ä".encode()))
    block[148:156] = b" " * 8
    signed = sum(byte - 256 if byte > 127 else byte for byte in block)
    block[148:156] = b"%06o\0 " % signed
    assert parse_one(archive(bytes(block))).path == "ä".encode()


# --- sparse files -----------------------------------------------------------------------


def old_sparse(segments: list[tuple[int, int]], size: int, data: bytes) -> bytes:
    """As ``tar --format=gnu --sparse``, with extension blocks after four segments."""
    packed = [b"%011o\0%011o\0" % segment for segment in segments]
    raw = {386: b"".join(packed[:4]), 483: b"%011o\0" % size}
    rest = packed[4:]
    raw[482] = b"\1" if rest else b"\0"
    blocks = header(b"s", b"S", size=len(data), magic=b"ustar  \0", raw=raw)
    while rest:
        part, rest = rest[:21], rest[21:]
        blocks += b"".join(part).ljust(504, b"\0") + (b"\1" if rest else b"\0") + bytes(7)
    return blocks + padded(data)


@pytest.mark.parametrize("piece", PIECES)
@pytest.mark.parametrize("count", [0, 1, 4, 5, 25, 26, 60])
def test_old_gnu_sparse_files(piece: int, count: int) -> None:
    segments = [(1000 * n, 100) for n in range(count)] + [(100_000, 0)]
    data = b"".join(b"%c" % (65 + n % 26) * 100 for n in range(count))
    wanted = bytearray(100_000)
    for n in range(count):
        wanted[1000 * n : 1000 * n + 100] = data[100 * n : 100 * n + 100]
    found = contents(archive(old_sparse(segments, 100_000, data), entry(b"n", data=b"z")), piece)
    assert found == {b"s": bytes(wanted), b"n": b"z"}


def test_senseless_sparse_maps_are_refused() -> None:
    for segments, size, data in (
        ([(0, 10)], 5, b"x" * 10),  # beyond the end
        ([(10, 10), (0, 10)], 50, b"x" * 20),  # backwards
        ([(0, 10), (5, 10)], 50, b"x" * 20),  # overlapping
        ([(0, 10)], 50, b"x" * 11),  # data that belongs nowhere
        ([(0, 10)], 50, b"x" * 9),  # data that isn't there
    ):
        assert "sparse map" in refusal(archive(old_sparse(segments, size, data)))


@pytest.mark.parametrize("body", [b"", b"1\n", b"x\n0\n1\n", b"-1\n", b"99999999\n"])
def test_senseless_maps_before_the_content_are_refused(body: bytes) -> None:
    records = [
        (b"GNU.sparse.major", b"1"),
        (b"GNU.sparse.minor", b"0"),
        (b"GNU.sparse.name", b"s"),
        (b"GNU.sparse.realsize", b"100"),
    ]
    assert "'/s'" in refusal(archive(pax(records), entry(b"f", data=body.ljust(512, b"\0"))))


def with_map(numbers: list[int], data: bytes, size: int) -> bytes:
    """A sparse file in format 1.0: the count, the map, the stored bytes."""
    records = [(b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"), (b"GNU.sparse.name", b"s")]
    records.append((b"GNU.sparse.realsize", b"%d" % size))
    lines = b"".join(b"%d\n" % number for number in [len(numbers) // 2, *numbers])
    return archive(pax(records), entry(b"f", data=padded(lines) + data))


@pytest.mark.parametrize("count", [0, 1, 60, 400])
def test_maps_over_any_number_of_blocks(count: int) -> None:
    numbers = [part for n in range(count) for part in (n * 1000 + 7, 2)]
    wanted = bytearray(500_000)
    for n in range(count):
        wanted[n * 1000 + 7 : n * 1000 + 9] = b"%02d" % (n % 100)
    data = b"".join(b"%02d" % (n % 100) for n in range(count))
    for piece in PIECES:
        assert contents(with_map(numbers, data, 500_000), piece) == {b"s": bytes(wanted)}


def test_a_long_map_is_read() -> None:
    count = 80_000
    data = with_map([part for n in range(count) for part in (n * 9000, 0)], b"", count * 9000)
    assert len(parse(data)[0]) == 1


@pytest.mark.parametrize("version", ["0.1", "1.0"])
def test_sparse_files_in_too_many_pieces_are_refused(version: str) -> None:
    count = 100_001
    if version == "1.0":
        data = with_map([0, 0] * count, b"", 100)
    else:
        data = archive(pax([(b"GNU.sparse.map", b",".join([b"0"] * 2 * count))]), entry(b"f"))
    assert "pieces" in refusal(data)


def test_a_map_that_does_not_end_is_refused() -> None:
    records = [(b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0")]
    for body in (b"1" * 4096, b"50000\n" + b"1\n" * 50000, b"90000\n" + b"0" * 19 + b"\n" * 1000):
        assert "sparse map" in refusal(archive(pax(records), entry(b"f", data=padded(body))))


@pytest.fixture(scope="module")
def sparse_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sparse") / "sparse"
    with path.open("wb") as file:
        for number in range(70):
            file.seek(number * 65536 * 2)
            file.write(b"%d" % number * 3000)
        file.truncate(20_000_000)
    return path


@pytest.mark.parametrize(
    "options",
    [
        ["--format=gnu"],
        ["--format=posix", "--sparse-version=0.0"],
        ["--format=posix", "--sparse-version=0.1"],
        ["--format=posix", "--sparse-version=1.0"],
    ],
    ids=lambda options: options[-1],
)
def test_sparse_files_as_gnu_tar_stores_them(sparse_file: Path, options: list[str]) -> None:
    data = subprocess.run(
        ["tar", "--sparse", *options, "-C", sparse_file.parent, "-cf-", sparse_file.name],
        check=True,
        capture_output=True,
    ).stdout
    assert len(data) < 5_000_000, "tar found no holes"
    for piece in (BLOCK, 1 << 20):
        assert contents(data, piece)[b"sparse"] == sparse_file.read_bytes()


@pytest.mark.parametrize("format", ["v7", "oldgnu", "gnu", "ustar", "posix"])
def test_formats_of_gnu_tar(tmp_path: Path, format: str) -> None:
    name = "n" * 80
    (tmp_path / name).write_text("content")
    (tmp_path / "link").symlink_to("target")
    if format not in ("v7", "ustar"):
        (tmp_path / ("l" * 250)).write_text("long")
    result = subprocess.run(
        ["tar", f"--format={format}", "-C", tmp_path, "-cf-", "."], check=True, capture_output=True
    )
    entries = {item.path: item for item in parse(result.stdout)[0]}
    wanted = {b"", *(path.name.encode() for path in tmp_path.iterdir())}
    assert entries.keys() == wanted
    status = (tmp_path / name).stat()
    item = entries[name.encode()]
    assert (item.mode, item.seconds) == (status.st_mode, int(status.st_mtime))
    assert item.nanoseconds == (status.st_mtime_ns % 10**9 if format == "posix" else 0)


def test_every_refusal_is_a_domain_error() -> None:
    """A byte of every value at every place of a header never gives anything else."""
    block = bytearray(archive(pax([(b"uid", b"1")]), entry(b"name", data=b"x")))
    for place in range(2048):
        for value in (0, 0x20, 0x37, 0x80, 0xFF):
            damaged = block.copy()
            damaged[place] = value
            try:
                parse(bytes(damaged))
            except CtrfsError as error:
                assert error.sentence
