"""Chunks that another layer has: found, verified, and given back when they were wrong."""

import os
import random
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from store.cas import Cas, Digest
from store.errors import DigestMismatch, StorageFailed
from store.index import read_index
from store.layers import Layers
from store.lazy import LazyLayer, LazyRecord
from store.lender import Lender
from store.manifest import Descriptor
from store.toc import read_toc
from store.unpack import LayerLimits
from tests.support import lazy, tars
from tests.support.layouts import GZIP, sha256
from tests.support.spans import CHUNK, HandMade, nobody_fills, take_all, with_other_times

SHARED = {name: random.Random(name).randbytes(2 * CHUNK + 100) for name in "xyz"}


class Place:
    """A store, its layers as they are open, and what lends between them."""

    def __init__(self, root: Path) -> None:
        root.mkdir()
        self.root = root
        self.layers = Layers(root / "layers")
        self.cas = Cas(root)
        self.opened: dict[str, LazyLayer] = {}
        self.lender = Lender(root / "layers", self.cas, self.opened.get)

    def add(self, made: HandMade) -> LazyLayer:
        """An incomplete layer that is entered to lend what it will have."""
        descriptor = Descriptor(GZIP, sha256(made.blob), len(made.blob))
        record = LazyRecord(descriptor, ("docker://nowhere.example/x:1",))
        found = self.layers.add_lazy(Digest(made.diff_id), made, record, [], nobody_fills)
        layer = LazyLayer(found.directory, found.diff_id)
        self.opened[found.directory.name] = layer
        self.lender.add(layer)
        return layer

    def close(self, layer: LazyLayer) -> None:
        del self.opened[layer.directory.name]
        layer.close()

    def end(self) -> None:
        for layer in list(self.opened.values()):
            self.close(layer)
        self.lender.close()


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    place = Place(tmp_path / "root")
    yield place
    place.end()


@pytest.fixture
def old() -> HandMade:
    return HandMade({**SHARED, "old": random.Random(1).randbytes(1000)}, first_size=4096)


@pytest.fixture
def new() -> HandMade:
    last = {"last": random.Random(4).randbytes(100)}
    return HandMade({"new": random.Random(2).randbytes(500), **SHARED, **last})


def complete(place: Place, layer: LazyLayer, blob: bytes) -> None:
    take_all(layer, blob)
    layer.verify(lambda: False)
    layer.finish(place.cas)


def lend_all(place: Place, layer: LazyLayer) -> int:
    """How many spans the others had."""
    with closing(place.lender.borrower(layer)) as borrower:
        return sum(map(borrower.take, range(layer.table.spans)))


def test_an_incomplete_layer_lends_what_it_has(place: Place, old: HandMade, new: HandMade) -> None:
    lender, layer = place.add(old), place.add(new)
    assert place.lender.can_lend(layer)
    assert lend_all(place, layer) == 0
    for number in (1, 2):
        start, end = lender.table.range_of(number)
        lender.take(number, memoryview(old.blob)[start:end])
    assert lend_all(place, layer) == 2
    assert layer.directory != lender.directory
    entry = new.entries[1]
    assert layer.read(entry.offset, 2 * CHUNK) == SHARED["x"][: 2 * CHUNK]


@pytest.mark.parametrize("still_open", [True, False])
def test_a_complete_layer_lends_everything(
    place: Place, old: HandMade, new: HandMade, still_open: bool
) -> None:
    lender, layer = place.add(old), place.add(new)
    complete(place, lender, old.blob)
    if not still_open:
        place.close(lender)
    assert lend_all(place, layer) == 9
    take_all(layer, new.blob)
    layer.verify(lambda: False)
    assert layer.read(0, layer.size) == new.data


def test_what_was_borrowed_is_not_lent_on(place: Place, old: HandMade, new: HandMade) -> None:
    lender, layer = place.add(old), place.add(new)
    complete(place, lender, old.blob)
    assert lend_all(place, layer) == 9
    place.layers.remove(lender.diff_id)
    place.close(lender)
    third = place.add(HandMade({"third": b"3", **SHARED}))
    assert lend_all(place, third) == 0


def test_one_layer_has_nothing_to_borrow(place: Place, old: HandMade) -> None:
    layer = place.add(old)
    assert not place.lender.can_lend(layer)
    assert lend_all(place, layer) == 0


def test_a_layer_that_was_removed_is_forgotten(place: Place, old: HandMade, new: HandMade) -> None:
    lender, layer = place.add(old), place.add(new)
    complete(place, lender, old.blob)
    place.close(lender)
    place.layers.remove(Digest(old.diff_id))
    assert place.lender.can_lend(layer)
    assert lend_all(place, layer) == 0
    assert not place.lender.can_lend(layer)


def test_another_one_lends_when_the_first_cannot(
    place: Place, old: HandMade, new: HandMade
) -> None:
    layer = place.add(new)
    others = [HandMade({**SHARED, "more": bytes([n]) * 100}) for n in range(4)]
    opened = [place.add(made) for made in others]
    take_all(opened[2], others[2].blob)
    assert lend_all(place, layer) == 9


def test_content_that_has_gone(place: Place, old: HandMade, new: HandMade) -> None:
    lender, layer = place.add(old), place.add(new)
    complete(place, lender, old.blob)
    place.close(lender)
    blob = place.cas.path(lender.record.blob.content)
    data = blob.read_bytes()
    blob.unlink()
    assert lend_all(place, layer) == 0
    blob.write_bytes(data[: len(data) // 2])
    assert 0 < lend_all(place, layer) < 9


def test_damaged_content_is_not_taken(place: Place, old: HandMade, new: HandMade) -> None:
    lender, layer = place.add(old), place.add(new)
    complete(place, lender, old.blob)
    blob = place.cas.path(lender.record.blob.content)
    data = bytearray(blob.read_bytes())
    start, _ = lender.table.range_of(1)
    data[start + 1000] ^= 1
    blob.chmod(0o600)
    blob.write_bytes(data)
    assert lend_all(place, layer) == 8


@pytest.mark.parametrize("still_open", [True, False])
def test_a_layer_that_was_made_anew_with_other_spans(
    place: Place, old: HandMade, new: HandMade, still_open: bool
) -> None:
    """What the index says of it is wrong, to the point of spans that it does not have."""
    lender, layer = place.add(old), place.add(new)
    place.close(lender)
    other = HandMade({"few": random.Random(3).randbytes(100)})
    other.diff_id = old.diff_id
    place.layers.remove(Digest(old.diff_id))
    again = place.add(other)
    if not still_open:
        take_all(again, other.blob)
        again.finish(place.cas)
        place.close(again)
    assert lend_all(place, layer) == 0
    assert not place.lender.can_lend(layer)


def test_a_full_disk_is_no_reason_to_ask_the_registry(
    place: Place, old: HandMade, new: HandMade
) -> None:
    lender, layer = place.add(old), place.add(new)
    complete(place, lender, old.blob)
    full = os.open("/dev/full", os.O_RDWR)
    kept, layer.data.descriptors = layer.data.descriptors, (full,)
    with pytest.raises(StorageFailed):
        lend_all(place, layer)
    layer.data.descriptors = kept
    os.close(full)


def test_bytes_beside_contents_that_differ_come_again(
    place: Place, old: HandMade, new: HandMade
) -> None:
    odd = HandMade(old.files)
    odd.blob = with_other_times(odd.blob)
    lender, layer = place.add(odd), place.add(new)
    assert odd.blob != old.blob
    take_all(lender, odd.blob)
    assert lend_all(place, layer) == 9
    take_all(layer, new.blob)
    assert layer.whole
    with pytest.raises(DigestMismatch, match="the layer's blob"):
        layer.verify(lambda: False)
    assert layer.forget_borrowed()
    assert layer.has(1) and not layer.has(4)
    assert layer.read(0, layer.size) == new.data
    take_all(layer, new.blob)
    layer.verify(lambda: False)


def test_a_lender_of_an_earlier_run_is_known(place: Place, old: HandMade, new: HandMade) -> None:
    complete(place, place.add(old), old.blob)
    place.end()
    place.lender = Lender(place.root / "layers", place.cas, place.opened.get)
    assert lend_all(place, place.add(new)) == 9


def test_what_was_borrowed_is_still_that_after_a_power_cut(
    place: Place, old: HandMade, new: HandMade
) -> None:
    odd = HandMade(old.files)
    odd.blob = with_other_times(odd.blob)
    lender, layer = place.add(odd), place.add(new)
    take_all(lender, odd.blob)
    assert lend_all(place, layer) == 9
    with (layer.directory / "present").open("r+b") as file:
        file.seek(8)
        file.write(bytes(16))  # another boot
    again = LazyLayer(layer.directory, layer.diff_id)
    take_all(again, new.blob)
    with pytest.raises(DigestMismatch, match="the layer's blob"):
        again.verify(lambda: False)
    assert again.forget_borrowed()
    take_all(again, new.blob)
    again.verify(lambda: False)
    again.close()


def contents_lent(place: Place, layer: LazyLayer) -> int:
    """How many spans got their contents alone."""
    with closing(place.lender.borrower(layer)) as borrower:
        return sum(map(borrower.take_contents, range(layer.table.spans)))


@pytest.mark.parametrize("state", ["open", "complete", "closed"])
def test_contents_are_lent_whatever_is_around_them(
    place: Place, old: HandMade, new: HandMade, state: str
) -> None:
    lender, layer = place.add(old), place.add(new)
    assert contents_lent(place, layer) == 0
    take_all(lender, old.blob)
    if state != "open":
        lender.verify(lambda: False)
        lender.finish(place.cas)
    if state == "closed":
        place.close(lender)
    before = layer.fetched
    assert contents_lent(place, layer) == 9
    assert layer.fetched == before
    entry = new.entries[1]
    assert layer.read(entry.offset, len(SHARED["x"])) == SHARED["x"]
    # The blob is not whole by that, also in the eyes of the next process.
    again = LazyLayer(layer.directory, layer.diff_id)
    for one in (layer, again):
        assert one.has(3) and not one.keeps(3) and not one.whole
        assert one.next_absent(3) == 3 and one.next_present(3) == one.table.spans
    again.close()
    take_all(layer, new.blob)
    assert layer.whole and layer.fetched == len(new.blob)
    layer.verify(lambda: False)


def test_damaged_contents_are_not_taken(place: Place, old: HandMade, new: HandMade) -> None:
    lender, layer = place.add(old), place.add(new)
    complete(place, lender, old.blob)
    lender.data.write(old.entries[0].offset + 1000, memoryview(b"\0"))
    assert contents_lent(place, layer) == 8


def test_contents_of_a_layer_that_has_gone(place: Place, old: HandMade, new: HandMade) -> None:
    lender, layer = place.add(old), place.add(new)
    complete(place, lender, old.blob)
    place.close(lender)
    place.layers.remove(Digest(old.diff_id))
    assert contents_lent(place, layer) == 0
    assert not place.lender.can_lend(layer)


# --- members that go on after their contents ----------------------------------------------


def estargz_place(place: Place, *parts: bytes) -> tuple[LazyLayer, lazy.LazyBlob]:
    """A layer as eStargz, in which a member holds a content and the headers that follow."""
    blob = lazy.estargz(tars.archive(*parts))
    toc = read_toc(blob.layer, blob.read, LayerLimits())
    assert toc is not None
    record = LazyRecord(blob.layer, ("docker://nowhere.example/x:1",))
    found = place.layers.add_lazy(blob.diff_id, toc, record, [], nobody_fills)
    layer = LazyLayer(found.directory, found.diff_id)
    place.opened[found.directory.name] = layer
    return layer, blob


A, B, C, D = (
    tars.entry(n, data=random.Random(n).randbytes(5000)) for n in (b"a", b"b", b"c", b"d")
)
LATER_B = tars.entry(b"b", data=random.Random(b"b").randbytes(5000), mtime=7)


@pytest.mark.parametrize(
    ("ours", "lent"),
    [
        ((A, B, D), [b"a"]),
        ((A, C), [b"c"]),
        ((A, LATER_B, C), [b"b", b"c"]),
        ((A, tars.directory(b"between"), B, C), [b"b", b"c"]),
        ((A, B, C, tars.directory(b"end")), [b"a", b"b"]),
        ((D, A, B, C), [b"a", b"b", b"c"]),
    ],
)
def test_what_follows_must_be_the_same(place: Place, ours: list[bytes], lent: list[bytes]) -> None:
    lender, blob = estargz_place(place, A, B, C)
    layer, own = estargz_place(place, *ours)
    place.lender.add(lender)
    take_all(lender, blob.data)
    assert lend_all(place, layer) == 0  # what follows in it is not known
    place.lender.add(layer)
    lend_all(place, layer)
    entries = read_index(layer.directory / "index")
    spans = {e.path: layer.table.spans_for(e.offset, 1)[0] for e in entries if e.size}
    assert [path for path, number in spans.items() if layer.keeps(number)] == lent
    take_all(layer, own.data)
    layer.verify(lambda: False)
