"""Spans that are kept together."""

import random
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from store import batch
from store.batch import Batch
from store.cas import Digest
from store.errors import DigestMismatch
from store.layers import Layers
from store.lazy import LazyLayer, LazyRecord
from store.manifest import Descriptor
from tests.support.layouts import GZIP, sha256
from tests.support.spans import HandMade, nobody_fills

# Chunks that share blocks, and files that leave gaps between theirs.
FILES = {f"{n}": random.Random(n).randbytes(n * 711 % 9000) for n in range(60)}
MADE = HandMade(FILES, chunk=1000, first_size=100_000)


@pytest.fixture
def layer(tmp_path: Path) -> Iterator[LazyLayer]:
    """Of which nothing is here."""
    layers = Layers(tmp_path)
    descriptor = Descriptor(GZIP, sha256(MADE.blob), len(MADE.blob))
    record = LazyRecord(descriptor, ("docker://nowhere.example/x:1",))
    diff_id = Digest(MADE.diff_id)
    directory = layers.add_lazy(diff_id, MADE, record, (), nobody_fills).directory
    opened = LazyLayer(directory, diff_id)
    assert len(opened.data.descriptors) == 2
    yield opened
    opened.close()


def with_contents(layer: LazyLayer) -> list[int]:
    return [n for n in range(layer.table.spans) if layer.table.span(n).count]


def blob_of(layer: LazyLayer, number: int) -> memoryview:
    start, end = layer.table.range_of(number)
    return memoryview(MADE.blob)[start:end]


def keep(layer: LazyLayer, numbers: Iterable[int]) -> None:
    with Batch(layer) as together:
        for number in numbers:
            together.add(number, blob_of(layer, number))


def contents_of(layer: LazyLayer) -> bytes:
    return layer.data.read(0, layer.size)


@pytest.mark.parametrize("held", [1, 3000, 1 << 20])
@pytest.mark.parametrize("seed", range(5))
def test_whatever_comes_together(
    layer: LazyLayer, monkeypatch: pytest.MonkeyPatch, held: int, seed: int
) -> None:
    monkeypatch.setattr(batch, "_HELD_MAX", held)
    chance = random.Random(seed)
    left = with_contents(layer)
    while left:
        some = sorted(chance.sample(left, min(len(left), chance.randrange(1, 60))))
        keep(layer, some)
        left = [number for number in left if number not in some]
        for number in with_contents(layer):
            assert layer.keeps(number) == (number not in left)
    assert contents_of(layer) == MADE.data
    kept = (layer.directory / "blob").read_bytes()
    for number in with_contents(layer):
        start, end = layer.table.range_of(number)
        assert kept[start:end] == blob_of(layer, number)
    ranges = map(layer.table.range_of, with_contents(layer))
    assert layer.fetched == sum(end - start for start, end in ranges)


def test_contents_from_elsewhere_stay(layer: LazyLayer) -> None:
    """What lies between others that come together is not written over."""
    numbers = with_contents(layer)
    for number in numbers[1::3]:
        pieces = layer.table.pieces_of(layer.table.span(number))
        found = [MADE.data[piece.target :][: piece.size] for piece in pieces]
        layer.take_contents(number, found)
    keep(layer, [number for number in numbers if not layer.has(number)])
    assert contents_of(layer) == MADE.data
    keep(layer, numbers[1::3])
    assert contents_of(layer) == MADE.data and all(map(layer.keeps, numbers))


def test_a_wrong_one_spoils_no_other(layer: LazyLayer) -> None:
    numbers = with_contents(layer)
    wrong = numbers[7]
    with Batch(layer) as together:
        for number in numbers[:20]:
            if number != wrong:
                together.add(number, blob_of(layer, number))
                continue
            with pytest.raises(DigestMismatch):
                together.add(number, blob_of(layer, numbers[8]))
    assert [number for number in numbers if layer.keeps(number)] == [
        number for number in numbers[:20] if number != wrong
    ]
    piece = next(layer.table.pieces_of(layer.table.span(wrong)))
    assert layer.read(piece.target, piece.size) == bytes(piece.size)


def test_what_was_right_is_kept_when_a_wrong_one_ends_it(layer: LazyLayer) -> None:
    numbers = with_contents(layer)
    with pytest.raises(DigestMismatch), Batch(layer) as together:
        together.add(numbers[0], blob_of(layer, numbers[0]))
        together.add(numbers[1], blob_of(layer, numbers[5]))
    assert layer.keeps(numbers[0]) and not layer.has(numbers[1])
    keep(layer, numbers[1:])
    assert contents_of(layer) == MADE.data
