"""Layers from blob to mount: what the kernel shows is what umoci unpacks."""

import gzip
import hashlib
import os
import stat
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from store.cas import Digest
from store.layers import Layer, Layers
from tests.support.mounting import mounted_image, mounted_stack
from tests.support.tars import archive, directory, entry, pax
from tests.support.treediff import tree_diff
from tests.support.umoci import umoci_unpack

GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"


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
            pax([(b"SCHILY.xattr.security.capability", bytes.fromhex("0100000200200000") + bytes(12))])
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


def check_images(layers: Layers) -> None:
    """fsck.erofs finds nothing wrong in any image of the store."""
    for layer in layers:
        command = ["fsck.erofs", str(layer.directory / "meta.erofs")]
        if layer.data is not None:
            command.insert(1, f"--device={layer.data}")
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr + result.stdout
