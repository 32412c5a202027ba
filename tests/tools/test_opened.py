"""What a command opens, and how many bytes of a layer that is."""

import gzip
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.layouts import tar_of
from tools.opened import compressed_bytes, opened_files


def test_files_that_a_command_opens(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    shutil.copy(shutil.which("busybox") or "/bin/busybox", tmp_path / "bin/busybox")
    (tmp_path / "bin/cat").symlink_to("/bin/busybox")
    for name in ("read", "not-read"):
        (tmp_path / name).write_text(name)
    (tmp_path / "link").symlink_to("/read")
    assert opened_files(tmp_path, "/bin/cat", "/link") == ["bin/busybox", "read"]


class Stargz:
    """An eStargz layer under construction: members and the table of what is in them."""

    def __init__(self) -> None:
        self.blob = io.BytesIO(gzip.compress(b"a tar header"))
        self.blob.seek(0, io.SEEK_END)
        self.entries: list[dict[str, Any]] = []

    def member(self, size: int) -> int:
        """Append a member of this length; its offset."""
        offset = self.blob.tell()
        self.blob.write(bytes(size))
        return offset

    def finish(self) -> io.BytesIO:
        """Append table and footer."""
        offset = self.blob.tell()
        toc = json.dumps({"version": 1, "entries": self.entries}).encode()
        self.blob.write(gzip.compress(tar_of({"stargz.index.json": toc})))
        extra = b"SG\x16\0" + b"%016xSTARGZ" % offset
        header = b"\x1f\x8b\x08\x04" + bytes(5) + b"\xff" + len(extra).to_bytes(2, "little")
        footer = header + extra + b"\1\0\0\xff\xff" + bytes(8)
        assert len(footer) == 51
        self.blob.write(footer)
        return self.blob


def test_compressed_bytes() -> None:
    layer = Stargz()
    layer.entries = [
        {"name": "dir/", "type": "dir"},
        {"name": "dir/big", "type": "reg", "size": 10, "offset": layer.member(1000)},
        {"name": "dir/big", "type": "chunk", "offset": layer.member(200), "chunkOffset": 5},
        {"name": "dir/empty", "type": "reg"},
        {"name": "dir/link", "type": "hardlink", "linkName": "dir/big"},
        {"name": "dir/one", "type": "reg", "size": 1, "offset": (shared := layer.member(30))},
        {"name": "dir/two", "type": "reg", "size": 1, "offset": shared, "innerOffset": 9},
        {"name": "last", "type": "reg", "size": 1, "offset": layer.member(4)},
    ]
    blob = layer.finish()
    for names, expected in (
        ([], 0),
        (["dir/big"], 1200),
        (["dir/link", "dir/big"], 1200),
        (["dir/empty"], 0),
        (["dir/one", "dir/two"], 30),
        (["last", "dir/one"], 34),
    ):
        assert compressed_bytes(blob, names) == expected, names
    with pytest.raises(KeyError):
        compressed_bytes(blob, ["nowhere"])


def test_other_layers_are_none() -> None:
    with pytest.raises(ValueError, match="eStargz"):
        compressed_bytes(io.BytesIO(gzip.compress(bytes(1000)) * 2), [])
