"""Image records."""

import threading
from pathlib import Path

import msgspec
import pytest

from store.cas import Digest, digest_of
from store.config import StoreConfig
from store.db import Database
from store.errors import CorruptContent, ImageInUse, ImageNotFound, InvalidReference, StoreInUse
from store.events import EventLog
from store.images import Image, Images
from store.manifest import ContainerConfig, Descriptor, ImageConfig, RootFs
from store.platform import Platform
from store.store import Store


def image(name: str, text: bytes = b"a", index: bytes | None = None) -> Image:
    layer = digest_of(text + b" layer")
    return Image(
        name=name,
        source=f"docker://{name}",
        digest=digest_of(text),
        index_digest=digest_of(index) if index else None,
        config_digest=digest_of(text + b" config"),
        platform=Platform("linux", "amd64"),
        size=10,
        layers=(Descriptor("application/vnd.oci.image.layer.v1.tar", layer, 5),),
        diff_ids=(layer,),
        pulled_ns=1,
        config=ImageConfig(
            RootFs("layers", (layer,)), container=ContainerConfig(env=("A=1",), cmd=("sh",))
        ),
    )


ALPINE = image("docker.io/library/alpine:3.20", b"alpine", b"alpine index")
OTHER = image("localhost:5000/team/app:latest", b"app")


@pytest.fixture
def images(tmp_path: Path) -> Images:
    images = Images(Database(tmp_path / "db"))
    images.put(ALPINE)
    images.put(OTHER)
    return images


def test_records_last(images: Images, tmp_path: Path) -> None:
    again = Images(Database(tmp_path / "db"))
    assert list(again) == [ALPINE, OTHER]
    assert again.named(ALPINE.name).config.config.env == ("A=1",)


@pytest.mark.parametrize(
    "text",
    [
        "alpine:3.20",
        "library/alpine:3.20",
        "docker.io/library/alpine:3.20",
        ALPINE.digest,
        ALPINE.index_digest,
        f"alpine@{ALPINE.digest}",
        f"alpine:3.20@{ALPINE.index_digest}",
    ],
)
def test_ways_to_say_it(images: Images, text: str) -> None:
    assert images.get(text) == ALPINE


@pytest.mark.parametrize("text", ["alpine", "app", f"sha256:{'0' * 64}", f"app@{ALPINE.digest}"])
def test_what_is_not_here(images: Images, text: str) -> None:
    with pytest.raises(ImageNotFound, match="pull it"):
        images.get(text)


@pytest.mark.parametrize("text", ["", "Alpine", "sha256:0"])
def test_no_names(images: Images, text: str) -> None:
    with pytest.raises(InvalidReference):
        images.get(text)


def test_a_manifest_digest_goes_before_an_index_digest(images: Images) -> None:
    images.put(image("a.example/x:1", b"x", b"app"))
    assert images.by_digest(OTHER.digest) == OTHER


def test_remove(images: Images, tmp_path: Path) -> None:
    images.remove(ALPINE.name)
    assert ALPINE.name not in images and images.names() == [OTHER.name]
    assert Images(Database(tmp_path / "db")).names() == [OTHER.name]
    with pytest.raises(ImageNotFound):
        images.remove(ALPINE.name)


def test_the_last_name_of_an_image_in_use_stays(images: Images) -> None:
    images.in_use = lambda image: "container web" if image.digest == ALPINE.digest else None
    second = msgspec.structs.replace(ALPINE, name="localhost/alpine:latest")
    images.put(second)
    images.remove(second.name)
    with pytest.raises(ImageInUse, match="container web"):
        images.remove(ALPINE.name)
    assert images.get("alpine:3.20") == ALPINE


def test_whoever_is_asked_may_use_the_records(images: Images) -> None:
    second = msgspec.structs.replace(ALPINE, name="localhost/alpine:latest")
    asked: list[str] = []

    def in_use(image: Image) -> str | None:
        asked.append(image.name)
        if len(asked) == 1:
            thread = threading.Thread(target=images.put, args=(second,), daemon=True)
            thread.start()
            thread.join(5)
            assert not thread.is_alive(), "it waits for whoever waits for it"
            return None
        return "container web"

    images.in_use = in_use
    images.remove(ALPINE.name)  # it has got a second name meanwhile
    assert images.names() == sorted([OTHER.name, second.name])
    with pytest.raises(ImageInUse):
        images.remove(second.name)


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    database = Database(tmp_path / "db")
    with database.transaction() as cursor:
        cursor.execute("INSERT INTO images VALUES ('x:1', x'00')")
    with pytest.raises(CorruptContent, match="x:1"):
        Images(database)
    database.close()


def test_blobs() -> None:
    layer = Digest(ALPINE.layers[0].digest)
    assert ALPINE.index_digest
    assert ALPINE.blobs() == (ALPINE.index_digest, ALPINE.digest, ALPINE.config_digest, layer)


def test_one_process_at_a_time_has_the_store(tmp_path: Path, store: Store) -> None:
    with pytest.raises(StoreInUse, match="--root"):
        Store(store.root, StoreConfig(), EventLog())
    Store(tmp_path / "other", StoreConfig(), EventLog()).close()
    assert store.root.stat().st_mode & 0o777 == 0o711
