"""Where the contents of an image's paths are: what the kernel shows in the mounted layers."""

import os
import stat
from collections.abc import Sequence
from pathlib import Path

import pytest

from store.cas import Digest
from store.errors import ImageNotFound
from store.layers import Layer, Layers
from store.locate import Contents, Ranges, path_at
from tests.store.test_layers import STACKS, unpack
from tests.support.contents import contents_at
from tests.support.mounting import mounted_stack
from tests.support.tars import archive, directory, entry


@pytest.fixture
def layers(tmp_path: Path) -> Layers:
    return Layers(tmp_path / "layers")


class Image:
    """Layers of these archives, bottom first."""

    def __init__(self, layers: Layers, archives: Sequence[bytes]) -> None:
        stack = [unpack(layers, data) for data in archives]
        self.layers: dict[Digest, Layer] = {layer.diff_id: layer for layer in stack}
        self.contents = Contents(stack)

    def data(self, ranges: Ranges) -> list[bytes]:
        """What is in the data files there, sorted."""
        found = []
        for diff_id, places in ranges.items():
            data = self.layers[diff_id].data
            assert data is not None
            found += [contents_at(data, offset, length) for offset, length in places]
        return sorted(found)

    def read(self, path: str) -> list[bytes]:
        return self.data(self.contents.ranges(path))

    def has(self, path: str) -> bool:
        try:
            self.contents.ranges(path)
        except ImageNotFound as error:
            assert path in error.sentence
            return False
        return True


def files_below(top: Path) -> list[Path]:
    """All regular files that are not empty."""
    found = [Path(parent) / name for parent, _, names in os.walk(top) for name in names]
    status = [(path, path.lstat()) for path in found]
    return [path for path, s in status if stat.S_ISREG(s.st_mode) and s.st_size]


@pytest.mark.parametrize("name", STACKS)
def test_every_path_of_the_mounted_layers(layers: Layers, tmp_path: Path, name: str) -> None:
    image = Image(layers, STACKS[name])
    images = layers.mountable(list(image.layers))
    with mounted_stack(images, tmp_path / "mounts") as root:
        for parent, names, files in os.walk(root):
            for path in [Path(parent), *(Path(parent) / one for one in names + files)]:
                shown = str(path.relative_to(root))
                if path.is_symlink():
                    continue  # where it leads is not inside here for the kernel
                below = files_below(path) if path.is_dir() else [path] * path.is_file()
                wanted = sorted(file.read_bytes() for file in below)
                assert image.read(f"/{shown}") == list(filter(None, wanted)), shown
            for missing in (f"{parent}/none", f"{parent}/none/none"):
                assert not image.has(missing.removeprefix(str(root)))


LINKS = archive(
    directory(b"a"),
    directory(b"a/b"),
    entry(b"a/b/file", data=b"content"),
    entry(b"a/absolute", b"2", link=b"/a/b/file"),
    entry(b"a/relative", b"2", link=b"b/file"),
    entry(b"a/up", b"2", link=b"../a/./b//file"),
    entry(b"a/out", b"2", link=b"../../../../a/b/file"),
    entry(b"directory", b"2", link=b"a/b"),
    entry(b"chain", b"2", link=b"directory/../absolute"),
    entry(b"loop", b"2", link=b"loop"),
    entry(b"one", b"2", link=b"two/x"),
    entry(b"two", b"2", link=b"one/x"),
    entry(b"dangling", b"2", link=b"a/none"),
    entry(b"into", b"2", link=b"a/b/file/more"),
    entry(b"hard", b"1", link=b"a/b/file"),
    entry(b"hard to link", b"1", link=b"chain"),
    *(entry(b"n%d" % n, b"2", link=b"n%d" % (n + 1)) for n in range(41)),
    entry(b"n41", data=b"far"),
)


@pytest.mark.parametrize(
    "path",
    [
        *("a/b/file", "/a/b/file", "/a/absolute", "/a/relative", "/a/up", "/a/out", "/hard"),
        *("/directory/file", "/chain", "/../../a/b/file", "//a/./b/../b/file", "/hard to link"),
        *("/directory", "/a/b/", "/a"),
    ],
)
def test_paths_and_links_lead_to_the_file(layers: Layers, path: str) -> None:
    assert Image(layers, [LINKS]).read(path) == [b"content"]


@pytest.mark.parametrize(
    "path",
    ["/none", "/a/none", "/loop", "/one", "/two/file", "/dangling", "/into", "/hard/x", "/n0"],
)
def test_what_leads_nowhere(layers: Layers, path: str) -> None:
    assert not Image(layers, [LINKS]).has(path)


def test_as_many_links_as_the_kernel_follows(layers: Layers) -> None:
    assert Image(layers, [LINKS]).read("/n1") == [b"far"]


def test_the_root_is_everything_once(layers: Layers) -> None:
    image = Image(layers, [archive(entry(b"a", data=b"1"), entry(b"d/b", data=b"2"))])
    for path in ("/", "", ".", "/..", "/d/.."):
        assert image.read(path) == [b"1", b"2"]


def test_names_that_are_not_utf_8(layers: Layers) -> None:
    name = b"\xff\xfe \xc3\xa4\n"
    image = Image(layers, [archive(entry(b"d/" + name, data=b"odd"))])
    assert image.read(os.fsdecode(b"/d/" + name)) == [b"odd"]


def test_upper_layers_hide_and_replace(layers: Layers) -> None:
    lower = archive(
        *(entry(b"%s/f" % name, data=name) for name in (b"gone", b"opaque", b"file", b"kept")),
        entry(b"deleted", data=b"deleted"),
        entry(b"changed", data=b"old"),
    )
    upper = archive(
        entry(b".wh.gone"),
        entry(b"opaque/.wh..wh..opq"),
        entry(b"opaque/new", data=b"new"),
        entry(b"file", data=b"now a file"),
        entry(b".wh.deleted"),
        entry(b"changed", data=b"changed"),
        entry(b"kept/g", data=b"more"),
    )
    image = Image(layers, [lower, upper])
    for path in ("/gone", "/gone/f", "/opaque/f", "/file/f", "/deleted", "/.wh.gone"):
        assert not image.has(path)
    assert image.read("/opaque") == [b"new"]
    assert image.read("/file") == [b"now a file"]
    assert image.read("/changed") == [b"changed"]
    assert image.read("/kept") == [b"kept", b"more"]
    assert image.read("/kept/f") == [b"kept"]


def test_a_whiteout_hides_nothing_of_its_own_layer(layers: Layers) -> None:
    lower = archive(entry(b"f", data=b"old"))
    upper = archive(entry(b"f", data=b"new"), entry(b".wh.f"))
    assert Image(layers, [lower, upper]).read("/f") == [b"new"]


def test_a_name_that_was_deleted_and_came_back(layers: Layers) -> None:
    stack = [
        archive(entry(b"d/f", data=b"first")),
        archive(entry(b".wh.d")),
        archive(entry(b"d/g", data=b"third")),
    ]
    image = Image(layers, stack)
    assert image.read("/d") == [b"third"]
    assert not image.has("/d/f")


def test_a_hard_link_keeps_what_its_other_name_lost(layers: Layers) -> None:
    lower = archive(
        entry(b"a", data=b"old"),
        entry(b"b", b"1", link=b"a"),
        entry(b"c", data=b"c"),
        entry(b"d", b"1", link=b"c"),
    )
    upper = archive(entry(b"a", data=b"new"), entry(b".wh.c"))
    image = Image(layers, [lower, upper])
    assert image.read("/a") == [b"new"]
    assert image.read("/b") == [b"old"]
    assert image.read("/d") == [b"c"]


def test_a_hard_link_to_a_lower_layer(layers: Layers) -> None:
    lower, upper = archive(entry(b"a", data=b"old")), archive(entry(b"b", b"1", link=b"a"))
    image = Image(layers, [lower, upper])
    assert image.read("/b") == [b"old"]
    assert list(image.contents.ranges("/b")) == list(image.layers)[:1]


def test_an_entry_below_a_link_is_where_the_link_leads(layers: Layers) -> None:
    lower = archive(directory(b"usr"), directory(b"usr/lib"), entry(b"lib", b"2", link=b"usr/lib"))
    image = Image(layers, [lower, archive(entry(b"lib/x.so", data=b"code"))])
    assert image.read("/usr/lib/x.so") == [b"code"]
    assert image.read("/lib/x.so") == [b"code"]


def test_one_layer_twice(layers: Layers) -> None:
    one, other = archive(entry(b"f", data=b"1")), archive(entry(b"f", data=b"2"))
    assert Image(layers, [one, other, one]).read("/f") == [b"1"]


def test_nothing_to_fetch(layers: Layers) -> None:
    image = Image(layers, [archive(entry(b"empty"), directory(b"d"), entry(b"p", b"6"))])
    for path in ("/", "/empty", "/d", "/p"):
        assert image.contents.ranges(path) == {}


def test_which_file_is_at_an_offset(layers: Layers) -> None:
    data = archive(
        entry(b"link", b"2", link=b"d/a"),
        directory(b"d"),
        entry(b"d/a", data=b"x" * 5000),
        entry(b"empty"),
        entry(b"b", data=b"y" * 10),
    )
    layer = unpack(layers, data)
    assert [path_at(layer, at) for at in (0, 4999, 8192, 8201)] == [b"d/a", b"d/a", b"b", b"b"]
    # Padding, and what lies behind all contents.
    assert [path_at(layer, at) for at in (5000, 8202, 1 << 40)] == [b"", b"", b""]
