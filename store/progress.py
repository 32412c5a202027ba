"""How far pulls are, for readers that must not wait."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from store.images import Image


class LayerProgress:
    """One layer blob of ``total`` bytes; several pulls may wait for it."""

    def __init__(self, digest: str, total: int) -> None:
        self.digest = digest
        self.total = total
        self._done = 0
        self._measure: Callable[[], int] | None = None

    @property
    def done(self) -> int:
        """Bytes that are here."""
        return self._measure() if self._measure else self._done

    def arrived(self, done: int) -> None:
        """So many bytes are here."""
        self._done = done

    def all_arrived(self) -> None:
        """Every byte is here."""
        self._done = self.total

    @contextmanager
    def measured(self, measure: Callable[[], int]) -> Iterator[None]:
        """While somebody else brings the bytes; ``measure()`` tells how many are here."""
        self._measure = measure
        try:
            yield
        finally:
            self._measure = None


class PullProgress:
    """One pull: ``state`` is ``resolving`` until its layers are known, then ``pulling``.

    ``image`` is what will be recorded at the end, None while resolving.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.state = "resolving"
        self.layers: tuple[LayerProgress, ...] = ()
        self.image: Image | None = None

    @property
    def done(self) -> int:
        """Bytes of layers that are here."""
        return sum(layer.done for layer in self.layers)

    @property
    def total(self) -> int:
        """Bytes of all layers."""
        return sum(layer.total for layer in self.layers)

    @property
    def percent(self) -> int:
        """Of the bytes, rounded down; 100 comes with the last one."""
        return 100 * self.done // self.total if self.total else 0

    def line(self) -> str:
        """Name, state, percent, bytes here and in all, with a space between each."""
        return f"{self.name} {self.state} {self.percent}% {self.done} {self.total}"
