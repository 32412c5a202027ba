"""The EROFS writer, judged by the kernel: mount, walk, read, compare with what went in."""

import io
import os
import stat
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from store.data_files import DataFiles
from store.erofs import lacks_acls, write_image
from store.index import Entry
from store.layers import LayerImage
from store.tree_builder import Builder
from tests.support.mounting import mounted_image

REG = stat.S_IFREG | 0o644
DIR = stat.S_IFDIR | 0o755
LNK = stat.S_IFLNK | 0o777


def image_of(entries: Sequence[Entry], data_size: int = 0) -> bytes:
    builder = Builder()
    for entry in entries:
        builder.add(entry)
    file = io.BytesIO()
    facts = write_image(builder.finish().root, file, data_size, bytes(range(16)))
    assert facts.size == len(file.getvalue())
    return file.getvalue()


@contextmanager
def mounted(
    entries: Sequence[Entry], directory: Path, data: bytes | int = b"", *, checked: bool = True
) -> Iterator[Path]:
    """The entries' tree, mounted. ``data`` is the data file or the size of an empty one."""
    meta = directory / "meta.erofs"
    size = data if isinstance(data, int) else len(data)
    device = directory / "data" if size else None
    meta.write_bytes(image_of(entries, size))
    if device is not None:
        with device.open("wb") as file:
            file.write(b"" if isinstance(data, int) else data)
            file.truncate(-(-size // 4096) * 4096)
    if checked:
        check(meta, device)
    files = DataFiles(directory, size) if size else None
    with mounted_image(LayerImage("k", meta, files), directory / "mnt") as path:
        yield path


def check(meta: Path, device: Path | None) -> None:
    command = ["fsck.erofs", *([f"--device={device}"] if device else []), str(meta)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr + result.stdout


def test_an_empty_tree(tmp_path: Path) -> None:
    with mounted([], tmp_path) as path:
        assert os.listdir(path) == []
        assert path.stat().st_mode == stat.S_IFDIR | 0o755
        assert path.stat().st_nlink == 2


@pytest.mark.parametrize("size", [1, 4095, 4096, 4097, 8192, 1 << 20, (1 << 20) + 1])
def test_contents_of_sizes_around_blocks_and_chunks(tmp_path: Path, size: int) -> None:
    content = bytes(range(251)) * (size // 251 + 1)
    data = bytes(4096) + content[:size].ljust(-(-size // 4096) * 4096, b"#")
    entries = [Entry(b"f", REG, size=size, offset=4096), Entry(b"empty", REG)]
    with mounted(entries, tmp_path, data) as path:
        assert (path / "f").read_bytes() == content[:size]
        assert (path / "empty").read_bytes() == b""


def test_whether_anything_has_an_acl(tmp_path: Path) -> None:
    acl = bytes.fromhex("02000000 01000600ffffffff 04000400ffffffff 20000400ffffffff")
    image = tmp_path / "image"
    for name in (b"system.posix_acl_access", b"system.posix_acl_default"):
        image.write_bytes(image_of([Entry(b"d", DIR, xattrs={name: acl}), Entry(b"f", REG)]))
        assert not lacks_acls(image)
    image.write_bytes(image_of([Entry(b"f", REG, xattrs={b"user.a": b"b"})]))
    assert lacks_acls(image)
    image.write_bytes(b"")
    assert not lacks_acls(image)


def test_a_file_far_beyond_32_bits(tmp_path: Path) -> None:
    size = (5 << 40) + 123
    entries = [Entry(b"f", REG, size=size), Entry(b"g", REG, size=5, offset=(5 << 40) + 4096)]
    with mounted(entries, tmp_path, (5 << 40) + 8192) as path:
        with (tmp_path / "data").open("r+b") as file:
            file.seek(5 << 40)
            file.write(b"end")
            file.seek((5 << 40) + 4096)
            file.write(b"other")
        assert (path / "f").stat().st_size == size
        with (path / "f").open("rb") as file:
            file.seek(5 << 40)
            assert file.read() == b"end".ljust(123, b"\0")
        assert (path / "g").read_bytes() == b"other"


@pytest.mark.parametrize("length", [1, 59, 60, 4031, 4032, 4033, 4095])
def test_symbolic_links_of_any_length(tmp_path: Path, length: int) -> None:
    text = b"x" * length
    with mounted([Entry(b"l", LNK, link=text, size=length)], tmp_path) as path:
        assert os.readlink(os.fsencode(path / "l")) == text


# With "." and ".." three bytes and three times twelve are taken: an entry takes 12 + its name.
@pytest.mark.parametrize(
    ("count", "length"),
    [(1, 255), (15, 252), (15, 254), (15, 255), (16, 240), (200, 255), (5000, 8)],
)
def test_directories_around_block_boundaries(tmp_path: Path, count: int, length: int) -> None:
    names = [b"%0*d" % (length, number) for number in range(count)]
    names += [b"!first", b"-", b"..."]  # some sort before "." and some after
    entries = [Entry(b"d/" + name, REG, uid=number) for number, name in enumerate(names)]
    with mounted([Entry(b"d", DIR), *entries], tmp_path) as path:
        directory = os.fsencode(path / "d")
        assert sorted(os.listdir(directory)) == sorted(names)
        for number, name in enumerate(names):
            assert os.lstat(os.path.join(directory, name)).st_uid == number
        with pytest.raises(FileNotFoundError):
            os.lstat(os.path.join(directory, b"missing"))


@pytest.mark.parametrize("used", range(4015, 4115, 7))
def test_every_way_a_directory_can_fill_its_last_block(tmp_path: Path, used: int) -> None:
    """Inlined up to 4032 bytes, then a block of its own, then two."""
    rest = used - 3 - 2 * 12 - 12 * 210
    names = [b"%03d" % number + b"." * (3 if number < 209 else 0) for number in range(210)]
    names[-1] += b"x" * min(255 - 3, max(0, rest - sum(map(len, names))))
    with mounted([Entry(name, REG) for name in names], tmp_path) as path:
        assert sorted(os.listdir(os.fsencode(path))) == names


def test_100_000_files_in_one_directory(tmp_path: Path) -> None:
    entries = [Entry(b"d/file-%06d" % number, REG, seconds=number) for number in range(100_000)]
    with mounted(entries, tmp_path) as path:
        names = os.listdir(path / "d")
        assert len(names) == len(set(names)) == 100_000
        for number in (0, 1, 50_000, 99_999):
            assert (path / f"d/file-{number:06}").stat().st_mtime == number


@pytest.mark.parametrize(
    "sizes", [[0], [1], [4000], [4096], [65535], [30_000, 30_000, 65_000], [10] * 300]
)
def test_extended_attributes_of_any_size(tmp_path: Path, sizes: list[int]) -> None:
    xattrs = {
        b"user.%d" % number: bytes([number % 256]) * size for number, size in enumerate(sizes)
    }
    entries = [
        Entry(b"f", REG, size=3, offset=0, xattrs=xattrs),
        Entry(b"d", DIR, xattrs=xattrs),
        Entry(b"d/x", REG),
        Entry(b"l", LNK, link=b"text", size=4, xattrs={b"trusted.t": b"v" * 3990}),
        Entry(b"after", REG, uid=77),
    ]
    with mounted(entries, tmp_path, b"abc") as path:
        for name in ("f", "d"):
            file = path / name
            assert sorted(map(os.fsencode, os.listxattr(file))) == sorted(xattrs)
            for key, value in xattrs.items():
                assert os.getxattr(file, key) == value
        assert (path / "f").read_bytes() == b"abc"
        assert os.listdir(path / "d") == ["x"]
        assert os.readlink(path / "l") == "text"
        assert os.getxattr(path / "l", "trusted.t", follow_symlinks=False) == b"v" * 3990
        assert (path / "after").stat().st_uid == 77


def test_deep_trees(tmp_path: Path) -> None:
    """2,000 levels, at which fsck.erofs overflows its stack: nothing here recurses."""
    deep = b"/".join([b"d"] * 2000)
    with mounted([Entry(deep + b"/f", REG, uid=9)], tmp_path, checked=False) as path:
        fd = os.open(path, os.O_RDONLY)
        for _ in range(2000):
            inner = os.open("d", os.O_RDONLY, dir_fd=fd)
            os.close(fd)
            fd = inner
        assert os.stat("f", dir_fd=fd).st_uid == 9
        os.close(fd)


def test_extreme_attributes(tmp_path: Path) -> None:
    entries = [
        Entry(b"last-second", REG, seconds=(1 << 63) - 1, nanoseconds=999_999_999),
        Entry(b"first-second", REG, seconds=-(1 << 63)),
        Entry(b"owner", stat.S_IFREG | 0o7777, 0xFFFFFFFE, 0xFFFFFFFE),
        Entry(b"device", stat.S_IFBLK, rdev=0xFFFFFFFF),
    ]
    with mounted(entries, tmp_path) as path:
        seen = subprocess.run(
            ["stat", "-c", "%n %Y %f %u %g %Hr %Lr", *(entry.path.decode() for entry in entries)],
            cwd=path,
            check=True,
            capture_output=True,
            text=True,
        ).stdout.splitlines()
    assert seen == [
        "last-second 9223372036854775807 81a4 0 0 0 0",
        "first-second -9223372036854775808 81a4 0 0 0 0",
        "owner 0 8fff 4294967294 4294967294 0 0",
        "device 0 6000 0 0 4095 1048575",
    ]


def test_the_same_tree_gives_the_same_bytes() -> None:
    entries = [Entry(b"b/x", REG), Entry(b"a", REG, xattrs={b"user.b": b"1", b"user.a": b"2"})]
    other = [Entry(b"a", REG, xattrs={b"user.a": b"2", b"user.b": b"1"}), Entry(b"b/x", REG)]
    assert image_of(entries) == image_of(other)


def test_the_kernel_checks_the_superblock(tmp_path: Path) -> None:
    meta = tmp_path / "meta.erofs"
    image = bytearray(image_of([]))
    image[1024 + 48] ^= 1  # a bit of the UUID, which means nothing but is covered
    meta.write_bytes(image)
    with (
        pytest.raises(OSError, match=r"Bad message"),
        mounted_image(LayerImage("k", meta, None), tmp_path / "mnt"),
    ):
        pass


NAMES = st.binary(min_size=1, max_size=255).filter(
    lambda name: (
        name not in (b".", b"..") and not set(name) & set(b"/\0") and not name.startswith(b".wh.")
    )
)
FILES = st.builds(
    lambda kind, uid, link, xattrs: Entry(
        b"",
        kind,
        uid,
        size=len(link) if kind == LNK else 0,
        link=link if kind == LNK else b"",
        xattrs=xattrs or None,
        rdev=259 if stat.S_ISBLK(kind) else 0,
    ),
    st.sampled_from([REG, DIR, LNK, stat.S_IFIFO, stat.S_IFBLK | 0o600]),
    st.integers(0, 0xFFFFFFFE),
    st.binary(min_size=1, max_size=4095).map(lambda text: text.replace(b"\0", b"0")),
    st.dictionaries(
        st.sampled_from([b"trusted.a", b"trusted.b", b"security.c"]), st.binary(max_size=9000)
    ),
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(tree=st.dictionaries(NAMES, FILES, max_size=60))
def test_any_tree_reads_back(
    tmp_path_factory: pytest.TempPathFactory, tree: dict[bytes, Entry]
) -> None:
    entries = []
    parent = b""
    for name, entry in tree.items():
        entry.path = parent + name
        entries.append(entry)
        if entry.mode == DIR and len(entry.path) < 1000:
            parent = entry.path + b"/"
    with mounted(entries, tmp_path_factory.mktemp("any")) as path:
        for entry in entries:
            file = os.path.join(os.fsencode(path), entry.path)
            status = os.lstat(file)
            assert (status.st_mode, status.st_uid) == (entry.mode, entry.uid)
            found = {
                os.fsencode(key): os.getxattr(file, key, follow_symlinks=False)
                for key in os.listxattr(file, follow_symlinks=False)
            }
            assert found == (entry.xattrs or {})
            if entry.mode == LNK:
                assert os.readlink(file) == entry.link
        assert sum(len(names) + len(files) for _, names, files in os.walk(path)) == len(entries)
