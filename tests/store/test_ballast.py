"""Room that is kept for a full disk."""

from pathlib import Path

from store.ballast import SIZE, Ballast
from tests.support.mounting import mounted


def test_it_is_there_but_while_somebody_needs_the_room(tmp_path: Path) -> None:
    path = tmp_path / "ballast"
    ballast = Ballast(path)
    with ballast.dropped():
        with ballast.dropped():
            assert not path.exists()
        assert not path.exists()
    assert path.stat().st_size == SIZE


def test_it_is_as_large_as_there_is_room(tmp_path: Path) -> None:
    path = tmp_path / "ballast"
    with mounted("tmpfs", tmp_path, "tmpfs", "size=700k"):
        with Ballast(path).dropped():
            pass
        assert path.stat().st_blocks * 512 == path.stat().st_size == SIZE // 2
        (tmp_path / "more").write_bytes(bytes(160_000))
        with Ballast(path).dropped():
            (tmp_path / "rest").write_bytes(bytes(500_000))
        assert not path.exists()
