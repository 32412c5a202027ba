"""The index of chunks by digest, which may be lost and must not be believed."""

import sqlite3
import threading
from pathlib import Path

import pytest

from store.pieces import Pieces
from store.spans import Codec, Piece, Span, SpanTable, SpanWriter

D = [bytes([n]) * 32 for n in range(5)]


def table_of(path: Path, *digests: bytes) -> SpanTable:
    """A layer whose chunks have these digests."""
    writer = SpanWriter(Codec.PLAIN, 100 * len(digests))
    for n, digest in enumerate(digests):
        writer.add(Span(100 * n, 100 * n + 100, 100), [Piece(4096 * n, 100, 0, digest)])
    with path.open("wb") as file:
        writer.write(file, 4096 * len(digests))
    return SpanTable(path)


@pytest.fixture
def pieces(tmp_path: Path) -> Pieces:
    """Chunks 1, 2 in the layer a; 2, 3 and one without a digest in b."""
    pieces = Pieces(tmp_path / "pieces.db")
    pieces.add("a", table_of(tmp_path / "a", D[1], D[2]))
    pieces.add("b", table_of(tmp_path / "b", D[3], D[0], D[2], D[2]))
    return pieces


def test_chunks_of_other_layers_are_found(pieces: Pieces, tmp_path: Path) -> None:
    assert pieces.find(D[1], "b") == [("a", 0)]
    assert pieces.find(D[2], "b") == [("a", 1)]
    assert pieces.find(D[2], "a") == [("b", 2)]
    assert pieces.find(D[1], "a") == []
    assert pieces.find(D[4], "a") == []
    pieces.close()
    again = Pieces(tmp_path / "pieces.db")
    assert again.find(D[3], "a") == [("b", 0)]
    again.close()


def test_what_has_no_digest_of_its_own_is_not_entered(pieces: Pieces) -> None:
    assert pieces.find(D[0], "a") == []
    pieces.close()


def test_a_layer_is_entered_once_and_forgotten(pieces: Pieces, tmp_path: Path) -> None:
    pieces.add("a", table_of(tmp_path / "other", D[4]))
    assert pieces.find(D[4], "b") == []
    assert pieces.others("a") and pieces.others("b")
    pieces.forget("a")
    pieces.forget("a")
    assert pieces.find(D[1], "b") == []
    assert pieces.others("a") and not pieces.others("b")
    pieces.add("a", table_of(tmp_path / "again", D[4]))
    assert pieces.find(D[4], "b") == [("a", 0)]
    pieces.close()


@pytest.mark.logs("making .* anew")
@pytest.mark.parametrize(
    "junk", [b"this is no database" * 500, b"SQLite format 3\0" + b"\xff" * 5000]
)
def test_a_damaged_file_is_made_anew(tmp_path: Path, junk: bytes) -> None:
    path = tmp_path / "pieces.db"
    path.write_bytes(junk)
    pieces = Pieces(path)
    pieces.add("a", table_of(tmp_path / "a", D[1]))
    assert pieces.find(D[1], "b") == [("a", 0)]
    pieces.close()


@pytest.mark.logs("making .* anew")
def test_a_file_that_was_damaged_in_the_middle(pieces: Pieces, tmp_path: Path) -> None:
    path = tmp_path / "pieces.db"
    digests = [n.to_bytes(32, "big") for n in range(1, 3000)]
    pieces.add("many", table_of(tmp_path / "many", *digests))
    pieces.close()
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xa5" * (size - 8192))
    pieces = Pieces(path)
    # Wrong answers would be found out by their digests; there may be none, but no failure.
    for digest in digests[::100]:
        pieces.find(digest, "a")
    pieces.add("new", table_of(tmp_path / "new", D[4]))
    assert pieces.find(D[4], "a") == [("new", 0)]
    pieces.close()


@pytest.mark.logs("can't be used")
def test_what_cannot_be_written_is_lost(pieces: Pieces, tmp_path: Path) -> None:
    other = sqlite3.connect(tmp_path / "pieces.db")
    other.execute("DROP TABLE layers")
    other.commit()
    other.close()
    pieces.add("new", table_of(tmp_path / "new", D[4]))
    assert pieces.find(D[4], "a") == []
    assert pieces.find(D[1], "b") == [("a", 0)]
    pieces.close()


@pytest.mark.logs("can't be used")
def test_it_has_no_answers_once_it_is_closed(pieces: Pieces) -> None:
    pieces.close()
    assert pieces.find(D[1], "b") == []
    assert not pieces.others("a")


def test_several_threads(pieces: Pieces, tmp_path: Path) -> None:
    tables = [table_of(tmp_path / f"t{n}", D[1], D[3]) for n in range(8)]
    wrong: list[object] = []

    def work(number: int) -> None:
        for _ in range(20):
            pieces.add(f"t{number}", tables[number])
            found = pieces.find(D[1], "a")
            if any(span for _, span in found):
                wrong.append(found)
            pieces.forget(f"t{number}")

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert pieces.find(D[1], "x") == [("a", 0)]
    pieces.close()
