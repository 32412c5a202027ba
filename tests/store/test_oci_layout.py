"""Images in layout directories."""

import json
import os
from pathlib import Path

import msgspec
import pytest

from store.config import Limits
from store.errors import (
    BlobNotFound,
    DigestMismatch,
    ImageNotFound,
    InvalidManifest,
    LimitExceeded,
    PullCancelled,
    SizeMismatch,
)
from store.manifest import Descriptor
from store.oci_layout import Layout
from store.reference import LayoutSource
from tests.support.layouts import OciLayout, tar_of


def open_layout(layout: OciLayout, tag: str | None = None) -> Layout:
    return Layout(LayoutSource(layout.path, tag), Limits())


def layer_of(layout: OciLayout) -> Descriptor:
    manifest = json.loads(layout.blob_path(layout.entries[0]).read_bytes())
    return msgspec.convert(manifest["layers"][0], Descriptor)


@pytest.fixture
def one(layout: OciLayout) -> OciLayout:
    """A layout with one image."""
    layout.tag("v1", layout.image(tar_of({"f": b"x" * 5000})))
    return layout


def test_the_only_image_needs_no_tag(one: OciLayout) -> None:
    for tag in (None, "v1"):
        source = open_layout(one, tag)
        descriptor, data = source.resolve()
        assert descriptor.digest == one.entries[0]["digest"]
        assert data == one.blob_path(one.entries[0]).read_bytes()
        assert str(source.default_name(descriptor)) == "localhost/layout:v1"


def test_several_images(one: OciLayout) -> None:
    one.tag("v2", one.image(tar_of({"g": b""})))
    assert open_layout(one, "v2").resolve()[0].digest == one.entries[1]["digest"]
    with pytest.raises(ImageNotFound, match="has: v1, v2"):
        open_layout(one).resolve()
    with pytest.raises(ImageNotFound, match=r"v3.*has: v1, v2"):
        open_layout(one, "v3").resolve()


def test_the_last_of_equal_tags_counts(one: OciLayout) -> None:
    one.tag("v1", one.image(tar_of({"g": b""})))
    assert open_layout(one, "v1").resolve()[0].digest == one.entries[1]["digest"]


def test_blob(one: OciLayout) -> None:
    stream = open_layout(one).open_blob(layer_of(one), 3)
    whole = one.blob_path({"digest": layer_of(one).digest}).read_bytes()
    assert (stream.offset, stream.read(), stream.read()) == (3, whole[3:], b"")
    stream.abort()
    with pytest.raises(PullCancelled):
        stream.read()
    stream.close()


def test_blob_of_another_size_or_none(one: OciLayout) -> None:
    path = one.blob_path({"digest": layer_of(one).digest})
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(SizeMismatch):
        open_layout(one).open_blob(layer_of(one), 0)
    path.unlink()
    with pytest.raises(BlobNotFound, match=str(path)):
        open_layout(one).open_blob(layer_of(one), 0)


def test_damaged_manifest(one: OciLayout) -> None:
    path = one.blob_path(one.entries[0])
    path.write_bytes(path.read_bytes().replace(b"linux", b"Linux").replace(b"{", b"[", 1))
    with pytest.raises(DigestMismatch):
        open_layout(one).resolve()
    path.unlink()
    with pytest.raises(BlobNotFound):
        open_layout(one).resolve()


def test_no_layout(tmp_path: Path, one: OciLayout) -> None:
    with pytest.raises(ImageNotFound, match="OCI image layout"):
        Layout(LayoutSource(tmp_path / "none"), Limits()).resolve()
    (one.path / "oci-layout").write_text('{"imageLayoutVersion": "9"}')
    with pytest.raises(InvalidManifest, match="version 1"):
        open_layout(one).resolve()


@pytest.mark.parametrize("name", ["oci-layout", "index.json"])
def test_files_that_are_none(one: OciLayout, name: str) -> None:
    (one.path / name).unlink()
    os.mkfifo(one.path / name)
    with pytest.raises(InvalidManifest, match="regular file"):
        open_layout(one).resolve()


def test_documents_that_are_too_long(one: OciLayout) -> None:
    with (one.path / "index.json").open("ab") as file:
        file.truncate(100 << 20)
    with pytest.raises(LimitExceeded, match=r"index\.json"):
        open_layout(one).resolve()
