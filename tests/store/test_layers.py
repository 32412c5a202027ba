"""Layers from blob to mount: what the kernel shows is what umoci unpacks."""

import errno
import gzip
import hashlib
import itertools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from store.cas import Cas, Digest
from store.errors import (
    CorruptContent,
    CtrfsError,
    DigestMismatch,
    InvalidLayer,
    LimitExceeded,
    PullCancelled,
    StorageFailed,
)
from store.layers import Layer, LayerLimits, Layers
from store.lazy import LazyLayer, LazyRecord
from store.manifest import Descriptor
from tests.support.layouts import GZIP, sha256
from tests.support.mounting import mounted, mounted_stack
from tests.support.spans import HandMade, nobody_fills, take_all
from tests.support.tars import archive, directory, entry, header, pax
from tests.support.treediff import tree_diff
from tests.support.umoci import umoci_unpack


@pytest.fixture
def layers(tmp_path: Path) -> Layers:
    return Layers(tmp_path / "layers")


def diff_id_of(data: bytes) -> Digest:
    return Digest(f"sha256:{hashlib.sha256(data).hexdigest()}")


def unpack(layers: Layers, data: bytes) -> Layer:
    return layers.unpack(iter([gzip.compress(data, 1)]), GZIP, diff_id_of(data), lambda: False)


@contextmanager
def shown(layers: Layers, archives: Sequence[bytes], directory: Path) -> Iterator[Path]:
    """The archives as one mounted stack."""
    diff_ids = [unpack(layers, data).diff_id for data in archives]
    with mounted_stack(layers.mountable(diff_ids), directory) as path:
        yield path


# What umoci gives directories that no archive lists is the time of unpacking.
LONG = b"d" * 250

STACKS: dict[str, list[bytes]] = {
    "all kinds": [
        archive(
            directory(b"./", mode=0o700, mtime=1_000_000_000),
            directory(b"./d/", mode=0o3771, uid=1, gid=2, mtime=1_100_000_000),
            entry(b"./d/f", data=b"x" * 10_000, mode=0o6755, uid=70_000, mtime=1),
            entry(b"./d/empty", mode=0, mtime=2),
            entry(b"./d/hard", b"1", link=b"d/f"),
            entry(b"./hard too", b"1", link=b"./d/f"),
            entry(b"./link", b"2", link=b"d/../d/f", mtime=3, uid=5),
            entry(b"./dangling", b"2", link=b"/../../etc/passwd"),
            entry(b"./null", b"3", device=(1, 3), mode=0o666),
            entry(b"./big", b"4", device=(259, 70_001), mode=0o660),
            entry(b"./fifo", b"6", mode=0o620),
            entry(b"\xff\xfe\n name", data=b"bytes"),
            directory(b"empty/"),
        )
    ],
    "times and owners": [
        archive(
            directory(b"./", mtime=5),
            *(
                pax([(b"mtime", text), (b"uid", owner), (b"gid", owner)])
                + entry(b"f%d" % number, data=b"%d" % number)
                for number, (text, owner) in enumerate(
                    [
                        (b"1700000000.123456789", b"4294967294"),
                        (b"-1.5", b"65536"),
                        (b"4294967296.000000001", b"0"),
                        (b"0", b"1"),
                    ]
                )
            ),
        )
    ],
    "attributes": [
        archive(
            directory(b"./", mtime=5),
            pax([(b"SCHILY.xattr.user.big", b"v" * 3500), (b"SCHILY.xattr.trusted.t", b"\0\1")])
            + entry(b"f", data=b"x"),
            pax(
                [
                    (
                        b"SCHILY.xattr.security.capability",
                        bytes.fromhex("0100000200200000") + bytes(12),
                    )
                ]
            )
            + entry(b"cap", data=b"x"),
            pax([(b"SCHILY.xattr.user.d", b"d")]) + directory(b"d/", mtime=7),
            pax(
                [
                    (
                        b"SCHILY.xattr.system.posix_acl_access",
                        bytes.fromhex(
                            "02000000"
                            "01000600ffffffff"
                            "0200060001000000"
                            "04000400ffffffff"
                            "10000600ffffffff"
                            "20000400ffffffff"
                        ),
                    )
                ]
            )
            + entry(b"acl", data=b"x", mode=0o664),
        )
    ],
    "duplicates: the last wins": [
        archive(
            directory(b"./", mtime=5),
            entry(b"f", data=b"first", mode=0o600),
            entry(b"h", b"1", link=b"f"),
            entry(b"f", data=b"second"),
            directory(b"d/", mode=0o700, mtime=1),
            entry(b"d/x", data=b"x"),
            directory(b"d/", mode=0o711, mtime=2),
            entry(b"becomes-dir", data=b"x"),
            directory(b"becomes-dir/", mtime=3),
            entry(b"becomes-dir/y", data=b"y"),
            directory(b"becomes-dir/", mtime=3),
            directory(b"becomes-file/"),
            entry(b"becomes-file/z", data=b"z"),
            entry(b"becomes-file", data=b"now a file"),
            entry(b"link", b"2", link=b"a"),
            entry(b"link", b"2", link=b"b"),
        )
    ],
    "through links of the layer itself": [
        archive(
            directory(b"./", mtime=5),
            directory(b"usr/", mtime=5),
            directory(b"usr/lib/", mtime=6),
            entry(b"lib", b"2", link=b"usr/lib"),
            entry(b"abs", b"2", link=b"/usr/lib"),
            entry(b"out", b"2", link=b"../../../usr"),
            entry(b"lib/a", data=b"a"),
            entry(b"abs/b", data=b"b"),
            entry(b"out/lib/c", data=b"c"),
            entry(b"hard", b"1", link=b"out/lib/a"),
            directory(b"usr/lib/", mtime=6),
            directory(b"usr/", mtime=5),
            directory(b"./", mtime=5),
        )
    ],
    "whiteouts": [
        archive(
            directory(b"./", mtime=5),
            entry(b"gone", data=b"1"),
            entry(b"stays", data=b"2"),
            directory(b"d/", mtime=6),
            entry(b"d/gone", data=b"3"),
            entry(b"d/stays", data=b"4"),
            directory(b"opaque/", mtime=7),
            entry(b"opaque/old", data=b"5"),
            directory(b"opaque/sub/", mtime=7),
            entry(b"opaque/sub/old", data=b"5"),
            directory(b"whole/", mtime=8),
            entry(b"whole/x", data=b"6"),
            directory(b"again/", mtime=8),
            entry(b"again/old", data=b"7"),
            directory(b"was-dir/", mtime=8),
            entry(b"was-dir/old", data=b"7"),
            entry(b"was-file", data=b"7"),
        ),
        archive(
            directory(b"./", mtime=15),
            entry(b".wh.gone"),
            entry(b".wh.never-was"),
            directory(b"d/", mtime=16),
            entry(b"d/.wh.gone"),
            directory(b"opaque/", mtime=17),
            entry(b"opaque/new", data=b"8"),
            entry(b"opaque/.wh..wh..opq"),
            entry(b".wh.whole"),
            directory(b"again/", mtime=18),
            entry(b"again/new", data=b"9"),
            entry(b".wh.again"),
            entry(b"was-dir", data=b"10"),
            directory(b"was-file/", mtime=19),
            entry(b"was-file/new", data=b"11"),
            directory(b"was-file/", mtime=19),
            directory(b"again/", mtime=18),
            directory(b"opaque/", mtime=17),
            directory(b"d/", mtime=16),
            directory(b"./", mtime=15),
        ),
        archive(directory(b"./", mtime=25), entry(b"whole", data=b"back"), entry(b".wh.stays")),
    ],
    "parents and root as they were": [
        archive(
            pax([(b"SCHILY.xattr.user.r", b"root")]) + directory(b"./", mode=0o711, mtime=5),
            pax([(b"SCHILY.xattr.user.d", b"d")]) + directory(b"d/", mode=0o750, uid=9, mtime=6),
            directory(b"d/e/", mode=0o705, gid=9, mtime=7),
            entry(b"d/e/old", data=b"1"),
        ),
        archive(entry(b"d/e/new", data=b"2"), entry(b"d/e/.wh.old")),
        archive(entry(b"d/e/newer", data=b"3"), entry(b"d/.wh.nothing")),
    ],
    "through links of lower layers": [
        archive(
            directory(b"./", mtime=5),
            directory(b"usr/", mtime=5),
            directory(b"usr/lib/", mtime=6, mode=0o751),
            entry(b"usr/lib/old", data=b"1"),
            entry(b"lib", b"2", link=b"usr/lib"),
        ),
        archive(
            entry(b"lib/new", data=b"2"),
            entry(b"lib/.wh.old"),
            entry(b"hard", b"1", link=b"lib/new"),
        ),
    ],
    "hard links to lower layers": [
        archive(
            directory(b"./", mtime=5),
            directory(b"d/", mtime=6, mode=0o751),
            entry(b"d/f", data=b"content" * 1000, mode=0o4711, uid=3, mtime=7),
            entry(b"d/link", b"2", link=b"f"),
        ),
        archive(entry(b"other", data=b"of the middle" * 500)),
        archive(
            entry(b"own", data=b"own" * 3000),
            entry(b"hard", b"1", link=b"d/f"),
            entry(b"harder", b"1", link=b"hard"),
            entry(b"hardlink", b"1", link=b"d/link"),
            entry(b"another", b"1", link=b"other"),
        ),
    ],
    "a directory over a lower symlink": [
        archive(directory(b"./", mtime=5), entry(b"x", b"2", link=b"y")),
        archive(
            directory(b"./", mtime=5),
            directory(b"x/", mtime=6),
            entry(b"x/f", data=b"1"),
            directory(b"x/", mtime=6),
        ),
    ],
    "long names": [
        archive(
            directory(b"./", mtime=5),
            pax([(b"path", b"n" * 255)]) + entry(b"f", data=b"x"),
            pax([(b"linkpath", b"t" * 4095)]) + entry(b"l", b"2"),
            pax([(b"linkpath", b"t" * 4000)]) + entry(b"m", b"2"),
        )
    ],
}


@pytest.mark.parametrize("archives", STACKS.values(), ids=list(STACKS))
def test_the_mount_equals_umocis_tree(
    layers: Layers, tmp_path: Path, archives: list[bytes]
) -> None:
    reference = umoci_unpack(archives, tmp_path / "umoci")
    with shown(layers, archives, tmp_path / "mounts") as path:
        assert tree_diff(path, reference) == []
    check_images(layers)


def test_what_is_deleted_and_hidden_stays_so_in_the_stack(layers: Layers, tmp_path: Path) -> None:
    """A hard link to a lower file whose other name is then deleted."""
    archives = [
        archive(directory(b"./"), entry(b"a", data=b"shared", mode=0o600)),
        archive(entry(b"b", b"1", link=b"a"), entry(b".wh.a")),
        archive(entry(b".wh.b"), entry(b"c", b"1", link=b"b")),
    ]
    with pytest.raises(InvalidLayer, match=r"'/c' .* hard link to '/b'"):
        layers.mountable([unpack(layers, data).diff_id for data in archives])
    with shown(layers, archives[:2], tmp_path) as path:
        assert (path / "b").read_bytes() == b"shared"


@pytest.mark.parametrize("format", ["gnu", "posix"])
def test_a_real_directory(layers: Layers, tmp_path: Path, format: str) -> None:
    data = subprocess.run(
        ["tar", f"--format={format}", "--xattrs", "-C/", "-cf-", "etc"],
        check=True,
        capture_output=True,
    ).stdout
    reference = umoci_unpack([data], tmp_path / "umoci")
    with shown(layers, [data], tmp_path / "mounts") as path:
        # The archive says nothing about the root.
        differences = tree_diff(path, reference, ignore_times=[b"."])
    assert differences == []
    assert layers.get(diff_id_of(data)).inodes > 500  # type: ignore[union-attr]


def check_images(layers: Layers) -> None:
    """fsck.erofs finds nothing wrong in any image of the store."""
    for layer in layers:
        devices = layer.data.paths if layer.data else ()
        meta = layer.directory / "meta.erofs"
        command = ["fsck.erofs", *(f"--device={path}" for path in devices), str(meta)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr + result.stdout


NAMES = [b"a", b"b", b"c", b"a/a", b"a/b", b"b/a", b"b/a/c", b"c/b", b"a/b/c", b"c/a/b"]


@st.composite
def stacks(draw: st.DrawFn) -> list[bytes]:
    """One to three layers of few names that get in each other's way."""
    archives = []
    files = [b"a"]
    for number in range(draw(st.integers(1, 3))):
        parts = [directory(b"./", mtime=5)] if draw(st.booleans()) else []
        for _ in range(draw(st.integers(1, 7))):
            name = draw(st.sampled_from(NAMES))
            parent, slash, base = name.rpartition(b"/")
            match draw(st.sampled_from("fffdddldlhwwo")):
                case "f":
                    files.append(name)
                    parts.append(entry(name, data=b"%d-%d" % (number, len(parts)), mtime=9))
                case "d":
                    parts.append(directory(name, mode=draw(st.sampled_from([0o755, 0o711]))))
                case "l":
                    link = draw(st.sampled_from([b"a", b"/b", b"../c", b"b/a", b".", b".."]))
                    parts.append(entry(name, b"2", link=link))
                case "h":
                    parts.append(entry(name, b"1", link=draw(st.sampled_from(files))))
                case "w":
                    parts.append(entry(parent + slash + b".wh." + base))
                case _:
                    parts.append(entry(parent + slash + b".wh..wh..opq"))
        archives.append(archive(*parts))
    return archives


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(archives=stacks())
def test_any_stack_equals_umocis_tree(
    tmp_path_factory: pytest.TempPathFactory, archives: list[bytes]
) -> None:
    """What umoci accepts, we accept, and it comes out the same.

    But for two things. Directories have other times where umoci takes the present one.
    And copies of a lower file that a layer links to don't stay one file with all of that
    file's names, only with those of the layer, as always with overlayfs.
    """
    work = tmp_path_factory.mktemp("any")
    try:
        reference = umoci_unpack(archives, work / "umoci")
    except subprocess.CalledProcessError:
        reference = None
    layers = Layers(work / "layers")
    try:
        with shown(layers, archives, work / "mounts") as path:
            if reference is not None:
                assert tree_diff(path, reference, only=("mode", "owner", "size", "text")) == []
            else:
                assert sum(1 for _ in os.walk(path)) > 0
    except InvalidLayer:
        assert reference is None
    check_images(layers)
    shutil.rmtree(work)


ALL_KINDS = STACKS["all kinds"][0][:-1024]
HEADERS = [at for at in range(0, len(ALL_KINDS), 512) if ALL_KINDS[at + 257 : at + 262] == b"ustar"]


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    changes=st.lists(
        st.tuples(
            st.sampled_from(HEADERS),
            st.one_of(st.integers(0, 511), st.sampled_from([0, 124, 135, 156, 257, 345])),
            st.binary(min_size=1, max_size=12),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_a_hostile_archive_is_refused_or_mounts(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int, bytes]]
) -> None:
    """Headers of any content, with right checksums: never anything but a domain error."""
    data = bytearray(ALL_KINDS)
    for header_at, offset, value in changes:
        end = min(offset + len(value), 512)
        data[header_at + offset : header_at + end] = value[: end - offset]
        data[header_at + 148 : header_at + 156] = b" " * 8
        total = sum(data[header_at : header_at + 512])
        data[header_at + 148 : header_at + 156] = b"%06o\0 " % total
    work = tmp_path_factory.mktemp("hostile")
    layers = Layers(work / "layers")
    try:
        with shown(layers, [archive(bytes(data))], work / "mounts") as path:
            for directory_name, _, names in os.walk(os.fsencode(path)):
                for name in names:
                    os.lstat(os.path.join(directory_name, name))
    except CtrfsError as error:
        assert error.sentence
        assert files_in(work / "layers") == [] or len(list(layers)) == 1
    check_images(layers)
    shutil.rmtree(work)


def test_a_link_to_a_lower_file_outlives_its_other_name(layers: Layers, tmp_path: Path) -> None:
    archives = [
        archive(directory(b"./"), entry(b"a", data=b"shared" * 1000, mode=0o600)),
        archive(entry(b"b", b"1", link=b"a"), entry(b".wh.a")),
        archive(entry(b"c", b"1", link=b"b"), entry(b"own", data=b"own")),
        archive(entry(b"d", b"1", link=b"c")),
        archive(entry(b".wh.b"), entry(b"e", b"1", link=b"b")),
    ]
    diff_ids = [unpack(layers, data).diff_id for data in archives]
    with mounted_stack(layers.mountable(diff_ids[:4]), tmp_path) as path:
        assert sorted(os.listdir(path)) == ["b", "c", "d", "own"]
        assert {(path / name).read_bytes() for name in "bcd"} == {b"shared" * 1000}
        assert (path / "d").stat().st_mode & 0o7777 == 0o600
        assert (path / "own").read_bytes() == b"own"
    with pytest.raises(InvalidLayer, match=r"'/e' .* hard link to '/b'"):
        layers.mountable(diff_ids)


def test_layers_in_several_data_files(layers: Layers, tmp_path: Path) -> None:
    """As they are once they were lazy, below others and above others."""
    contents = {name: random.Random(name).randbytes(20_000) for name in "abcxyz"}
    lower = complete_in_parts(layers, tmp_path, {name: contents[name] for name in "abc"})
    own = archive(entry(b"d", b"1", link=b"c"), entry(b"e", b"1", link=b"a"))
    above = complete_in_parts(layers, tmp_path, {name: contents[name] for name in "xyz"})
    stack = [lower, unpack(layers, own).diff_id, above]
    with mounted_stack(layers.mountable(stack), tmp_path / "mounts") as path:
        found = {name.name: name.read_bytes() for name in path.iterdir()}
    assert found == contents | {"d": contents["c"], "e": contents["a"]}
    for diff_id in (lower, above):
        data = layers.present(diff_id).data
        assert data is not None and len(data.paths) == 2
    check_images(layers)


def complete_in_parts(layers: Layers, directory: Path, files: dict[str, bytes]) -> Digest:
    """A layer that came lazily."""
    made = HandMade(files, first_size=4096)
    record = LazyRecord(
        Descriptor(GZIP, sha256(made.blob), len(made.blob)), ("docker://nowhere.example/x:1",)
    )
    diff_id = Digest(made.diff_id)
    added = layers.add_lazy(diff_id, made, record, (), nobody_fills)
    layer = LazyLayer(added.directory, diff_id)
    take_all(layer, made.blob)
    layer.finish(Cas(directory / "cas"))
    layer.close()
    return diff_id


# --- what is shared, what is made for a stack --------------------------------------------

BASE = archive(directory(b"./", mode=0o711), directory(b"d/"), entry(b"d/f", data=b"x"))
COMPLETE = archive(directory(b"./"), directory(b"d/"), entry(b"d/g", data=b"y"))
ROOTLESS = archive(directory(b"d/"), entry(b"d/h", data=b"z"))
IMPLIED = archive(directory(b"./"), entry(b"d/i", data=b"z"))


def test_layers_share_one_image_between_stacks_where_they_can(layers: Layers) -> None:
    base, complete, rootless, implied = (
        unpack(layers, data).diff_id for data in (BASE, COMPLETE, ROOTLESS, IMPLIED)
    )
    alone = [layers.mountable([item])[0] for item in (base, complete, rootless, implied)]
    assert len({image.key for image in alone}) == 4
    assert all(re.fullmatch(r"[0-9a-f]{12,}", image.key) for image in alone)
    assert layers.mountable([base, complete]) == (alone[0], alone[1])
    assert layers.mountable([complete, base]) == (alone[1], alone[0])
    assert layers.mountable([base, rootless, complete]) == (alone[0], alone[2], alone[1])
    on_top = layers.mountable([base, rootless])[1]
    assert on_top.key != alone[2].key
    assert on_top.data == alone[2].data
    assert layers.mountable([base, rootless])[1] == on_top
    assert layers.mountable([base, implied])[1] != alone[3]
    assert layers.mountable([base, implied])[1] != layers.mountable([complete, implied])[1]
    assert layers.mountable([]) == ()


def test_a_chain_outlives_a_restart_and_goes_with_its_layers(
    layers: Layers, tmp_path: Path
) -> None:
    diff_ids = [unpack(layers, data).diff_id for data in (BASE, IMPLIED)]
    images = layers.mountable(diff_ids)
    again = Layers(tmp_path / "layers")
    inode = images[1].meta.stat().st_ino
    assert again.mountable(diff_ids) == images
    assert images[1].meta.stat().st_ino == inode
    again.remove(diff_ids[0])
    again.remove(diff_ids[0])
    assert not images[1].meta.exists()
    assert again.get(diff_ids[0]) is None
    with pytest.raises(CorruptContent, match=diff_ids[0]):
        again.mountable(diff_ids)
    again.remove(diff_ids[1])
    assert files_in(tmp_path / "layers") == []


def test_a_layer_is_found_again(layers: Layers, tmp_path: Path) -> None:
    layer = unpack(layers, BASE)
    assert (layer.data_size, layer.inodes) == (4096, 3)
    assert layers.get(layer.diff_id) == layer
    assert Layers(tmp_path / "layers").get(layer.diff_id) == layer
    empty = unpack(layers, archive())
    assert (empty.data_size, empty.data, empty.inodes) == (0, None, 1)


@pytest.mark.logs(r"removing the layer")
@pytest.mark.parametrize(
    "damage",
    [
        lambda path: (path / "layer.json").unlink(),
        lambda path: (path / "layer.json").write_bytes(b"{"),
        lambda path: (path / "layer.json").write_bytes(
            (path / "layer.json").read_bytes().replace(b'"format":1', b'"format":0')
        ),
        lambda path: path.rename(path.parent / ("0" * 64)),
    ],
    ids=["no record", "broken record", "other version", "other name"],
)
def test_a_layer_that_cannot_be_used_is_removed_and_made_again(
    layers: Layers, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    layer = unpack(layers, BASE)
    damage(layer.directory)
    again = Layers(tmp_path / "layers")
    assert again.get(layer.diff_id) is None
    assert files_in(tmp_path / "layers") == []
    assert unpack(again, BASE).inodes == layer.inodes


def test_a_damaged_index_is_reported(layers: Layers) -> None:
    for damaged in (b"", b"ctrfsidx\2\0\0\0", None):
        diff_ids = [unpack(layers, data).diff_id for data in (BASE, IMPLIED)]
        base = layers.get(diff_ids[0])
        assert base is not None
        base.index.write_bytes(base.index.read_bytes()[:-3] if damaged is None else damaged)
        with pytest.raises(CorruptContent, match=r"index"):
            layers.mountable(diff_ids)
        layers.remove(diff_ids[0])


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 4)


@pytest.mark.logs(r"is missing or damaged|is damaged")
@pytest.mark.parametrize("name", ["data", "index", "meta.erofs"])
@pytest.mark.parametrize("damage", [cut, Path.unlink, lambda path: path.write_bytes(b"")])
def test_a_layer_with_a_damaged_file_is_reported_and_made_again(
    layers: Layers, tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    diff_ids = [unpack(layers, data).diff_id for data in (BASE, IMPLIED)]
    images = layers.mountable(diff_ids)
    layer = layers.get(diff_ids[0])
    assert layer and layers.usable(layer.diff_id)
    damage(layer.directory / name)
    for _ in range(2):
        with pytest.raises(CorruptContent, match="pull the image again"):
            layers.mountable(diff_ids)
    assert layers.get(layer.diff_id) is None
    assert not layers.usable(layer.diff_id)
    again = unpack(layers, BASE)
    assert again == layers.get(layer.diff_id) and again.inodes == layer.inodes
    images_again = layers.mountable(diff_ids)
    # Nobody gets a mount of the damaged one.
    assert not {image.key for image in images_again} & {image.key for image in images}
    with mounted_stack(images_again, tmp_path) as path:
        assert any(path.iterdir())


def test_an_index_of_the_right_size_with_wrong_bytes(layers: Layers) -> None:
    diff_ids = [unpack(layers, data).diff_id for data in (BASE, IMPLIED)]
    layer = layers.get(diff_ids[0])
    assert layer
    layer.index.write_bytes(bytes(layer.index.stat().st_size))
    with pytest.raises(CorruptContent, match="index"):
        layers.mountable(diff_ids)
    assert layers.get(layer.diff_id) is None
    unpack(layers, BASE)
    layers.mountable(diff_ids)


@pytest.mark.parametrize("damage", [cut, Path.unlink])
def test_a_chain_that_is_damaged_is_made_again(
    layers: Layers, damage: Callable[[Path], None]
) -> None:
    diff_ids = [unpack(layers, data).diff_id for data in (BASE, IMPLIED)]
    images = layers.mountable(diff_ids)
    before = images[1].meta.read_bytes()
    damage(images[1].meta)
    assert layers.mountable(diff_ids) == images
    assert images[1].meta.read_bytes() == before


def test_one_layer_unpacked_by_several_threads(layers: Layers, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: unpack(layers, BASE), range(8)))
        stacks = list(
            threads.map(
                lambda _: layers.mountable([found[0].diff_id, unpack(layers, IMPLIED).diff_id]),
                range(8),
            )
        )
    assert len(set(map(repr, found))) == 1
    assert len(set(stacks)) == 1
    assert len(list((tmp_path / "layers" / "chains").iterdir())) == 1


# --- bad input: refused, nothing left -----------------------------------------------------


def files_in(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file()]


DEVICE = entry(b"dev", b"3", device=(0, 0))
BAD = {
    "leads out": (archive(entry(b"../../etc/passwd", data=b"x")), InvalidLayer, "etc/passwd"),
    "link leads out": (archive(entry(b"l", b"1", link=b"../x")), InvalidLayer, "'/l'"),
    "below a file": (
        archive(entry(b"f", data=b"x"), entry(b"f/g", data=b"y")),
        InvalidLayer,
        "'/f/g'",
    ),
    "links in a circle": (
        archive(entry(b"a", b"2", link=b"b"), entry(b"b", b"2", link=b"a"), entry(b"a/f")),
        InvalidLayer,
        "'/a/f'",
    ),
    "hard link to a directory": (
        archive(directory(b"d/"), entry(b"l", b"1", link=b"d")),
        InvalidLayer,
        "'/l'",
    ),
    "root is a file": (archive(entry(b"./", b"2", link=b"x")), InvalidLayer, "'/'"),
    "whiteout device": (archive(DEVICE), InvalidLayer, "'/dev'"),
    "whiteout of nothing": (archive(entry(b"d/.wh.")), InvalidLayer, "'/d/.wh.'"),
    "whiteout of the parent": (archive(entry(b"d/.wh...")), InvalidLayer, "'/d/.wh...'"),
    "name of 256": (
        archive(pax([(b"path", b"d/" + b"n" * 256)]) + entry(b"f")),
        InvalidLayer,
        "256",
    ),
    "truncated": (archive(entry(b"f", data=b"x" * 5000))[:3000], InvalidLayer, "'/f'"),
    "no tar": (b"#!/bin/sh\necho hello\n" * 100, InvalidLayer, "damaged"),
}


@pytest.mark.parametrize(("data", "kind", "words"), BAD.values(), ids=list(BAD))
def test_bad_archives(
    layers: Layers, tmp_path: Path, data: bytes, kind: type[CtrfsError], words: str
) -> None:
    with pytest.raises(kind) as caught:
        unpack(layers, data)
    assert words in caught.value.sentence
    assert "\n" not in caught.value.sentence
    assert files_in(tmp_path / "layers") == []
    assert layers.get(diff_id_of(data)) is None


def test_a_hard_link_to_nothing_is_refused_when_the_stack_is_known(layers: Layers) -> None:
    link = unpack(layers, archive(directory(b"./"), entry(b"l", b"1", link=b"x"))).diff_id
    base = unpack(layers, BASE).diff_id
    for stack in ([link], [base, link]):
        with pytest.raises(InvalidLayer, match=r"'/l' .* hard link to '/x'"):
            layers.mountable(stack)
    directory_below = unpack(layers, archive(directory(b"./"), directory(b"x/"))).diff_id
    with pytest.raises(InvalidLayer, match=r"directory '/x'"):
        layers.mountable([directory_below, link])
    assert layers.mountable([unpack(layers, archive(entry(b"x"))).diff_id, link])


def test_a_wrong_diff_id(layers: Layers, tmp_path: Path) -> None:
    with pytest.raises(DigestMismatch, match=diff_id_of(BASE)):
        layers.unpack(iter([BASE]), GZIP, diff_id_of(b"other"), lambda: False)
    with pytest.raises(DigestMismatch):
        # What follows the end of an archive belongs to it as far as the digest goes.
        layers.unpack(iter([BASE + b"more"]), GZIP, diff_id_of(BASE), lambda: False)
    assert files_in(tmp_path / "layers") == []


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"layer_bytes": 100_000}, "layer_bytes"),
        ({"layer_bytes": 1_300_000}, "'/holes'"),
        ({"layer_entries": 50}, "50"),
        ({"layer_metadata_bytes": 100}, "layer_metadata_bytes"),
        ({"layer_ratio": 50, "ratio_floor": 100_000}, "50"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_limits(tmp_path: Path, limits: dict[str, int], words: str) -> None:
    holes = [(b"GNU.sparse.map", b"0,0"), (b"GNU.sparse.size", b"1500000")]
    data = archive(
        *(entry(b"d%d/f" % number) for number in range(40)),
        entry(b"zeros", data=bytes(1_000_000)),
        pax(holes) + entry(b"holes"),
    )
    unpack(Layers(tmp_path / "plenty"), data)
    layers = Layers(tmp_path / "layers", LayerLimits(**limits))
    with pytest.raises(LimitExceeded) as caught:
        unpack(layers, data)
    assert words in caught.value.sentence
    assert files_in(tmp_path / "layers") == []


def test_a_cancelled_pull_and_a_lost_connection(layers: Layers, tmp_path: Path) -> None:
    class Lost(CtrfsError):
        pass

    def source() -> Iterator[bytes]:
        yield BASE[:1024]
        raise Lost("the connection is gone")

    with pytest.raises(PullCancelled):
        layers.unpack(iter([BASE]), GZIP, diff_id_of(BASE), lambda: True)
    with pytest.raises(Lost):
        layers.unpack(source(), GZIP, diff_id_of(BASE), lambda: False)
    assert files_in(tmp_path / "layers") == []


def test_a_full_disk(tmp_path: Path) -> None:
    with mounted("tmpfs", tmp_path / "disk", "tmpfs", "size=3m") as disk:
        layers = Layers(disk / "layers")
        large = archive(entry(b"f", data=random.Random(1).randbytes(5 << 20)))
        with pytest.raises(StorageFailed, match=r"space") as caught:
            unpack(layers, large)
        assert caught.value.errno == errno.ENOSPC
        assert files_in(disk) == []
        assert unpack(layers, BASE)


def test_a_killed_process_leaves_nothing_for_long(tmp_path: Path) -> None:
    script = f"""
import itertools, os, signal
from pathlib import Path
from store.layers import Layers
from tests.support.tars import entry

def chunks():
    yield entry(b"f", data=bytes(4 << 20))
    yield entry(b"g", data=bytes(4 << 20))
    os.kill(os.getpid(), signal.SIGKILL)

Layers(Path({str(tmp_path / "layers")!r})).unpack(chunks(), {GZIP!r}, "sha256:0", lambda: False)
"""
    result = subprocess.run([sys.executable, "-c", script], check=False)
    assert result.returncode == -signal.SIGKILL
    assert files_in(tmp_path / "layers") != []
    Layers(tmp_path / "layers")
    assert files_in(tmp_path / "layers") == []


# --- size ------------------------------------------------------------------------------------


def test_memory_does_not_grow_with_the_contents(layers: Layers) -> None:
    size = 192 << 20
    block = bytes(1 << 20)
    head = header(b"f", size=size)
    digest = hashlib.sha256(head)
    for _ in range(size >> 20):
        digest.update(block)

    def chunks() -> Iterator[bytes]:
        yield head
        yield from itertools.repeat(block, size >> 20)

    tracemalloc.start()
    layer = layers.unpack(chunks(), GZIP, Digest(f"sha256:{digest.hexdigest()}"), lambda: False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert layer.data_size == size
    assert peak < 16 << 20


def test_holes_take_no_space(layers: Layers, tmp_path: Path) -> None:
    records = [(b"GNU.sparse.map", b"1000000000,3"), (b"GNU.sparse.size", b"5000000000")]
    data = archive(pax(records) + entry(b"holes", data=b"abc"), entry(b"next", data=b"next"))
    layer = unpack(layers, data)
    assert layer.data is not None
    (path,) = layer.data.paths
    assert path.stat().st_blocks * 512 < 100_000
    with mounted_stack(layers.mountable([layer.diff_id]), tmp_path) as path:
        with (path / "holes").open("rb") as file:
            file.seek(999_999_999)
            assert file.read(5) == b"\0abc\0"
            assert file.seek(0, os.SEEK_END) == 5_000_000_000
        assert (path / "next").read_bytes() == b"next"
