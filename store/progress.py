"""How far pulls are, for readers that must not wait."""

from store.images import Image


class LayerProgress:
    """One layer blob; several pulls may wait for it. ``done`` and ``total`` are bytes.

    ``stage`` is ``waiting``, ``fetching``, ``unpacking`` (all bytes are here) or ``done``.
    """

    def __init__(self, digest: str, total: int) -> None:
        self.digest = digest
        self.total = total
        self.done = 0
        self.stage = "waiting"

    def unpacking(self) -> None:
        """The bytes are here."""
        self.done = self.total
        self.stage = "unpacking"

    def finished(self) -> None:
        """The layer is here and can be used."""
        self.done = self.total
        self.stage = "done"


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
