"""A store with one incomplete layer, and how to fetch it."""

import itertools
import re
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import trio

from store.cas import Cas, Digest
from store.config import LazyConfig, StoreConfig
from store.errors import StoreError
from store.fetcher import Fetcher, Slots
from store.layers import Layer, Layers
from store.lazy import LazyLayer, LazyRecord
from store.lender import Lender
from store.manifest import Descriptor
from store.reference import parse_reference
from store.registry import Registry as Source
from tests.support.proxy import Proxy
from tests.support.spans import HandMade, OneFrame, nobody_fills

QUICK = LazyConfig(read_seconds=1.5)


@dataclass
class Place:
    """A store with one incomplete layer, and how to fetch it."""

    root: Path
    made: HandMade | OneFrame
    descriptor: Descriptor
    reference: str
    config: StoreConfig
    failures: list[StoreError] = field(default_factory=list)
    whole: int = 0

    def __post_init__(self) -> None:
        self.layers = Layers(self.root / "layers")
        self.cas = Cas(self.root)

    def add(
        self,
        known: Sequence[tuple[int, bytes]] = (),
        fillable: Callable[[], None] = nobody_fills,
    ) -> Layer:
        """Make the incomplete layer."""
        record = LazyRecord(self.descriptor, (f"docker://{self.reference}",))
        return self.layers.add_lazy(Digest(self.made.diff_id), self.made, record, known, fillable)

    def open_directory(self) -> Path:
        """Where the layer is."""
        layer = self.layers.get(Digest(self.made.diff_id))
        assert layer is not None
        return layer.directory

    def open(self) -> LazyLayer:
        """The layer as a server has it."""
        layer = self.layers.get(Digest(self.made.diff_id)) or self.add()
        return LazyLayer(layer.directory, layer.diff_id)

    def cut_power(self, lost: int, size: int) -> None:
        """The machine went down: what was written of the blob at ``lost`` and of the first ``size``
        bytes of data had not reached the disk."""
        directory = self.open_directory()
        with (directory / "blob").open("r+b") as file:
            file.seek(lost)
            file.write(bytes(100))
        with (directory / "data").open("r+b") as file:
            file.write(bytes(size))
        with (directory / "present").open("r+b") as file:
            file.seek(8)
            file.write(bytes(16))

    @asynccontextmanager
    async def fetching(self, **changes: Any) -> AsyncIterator[Fetcher]:
        """A fetcher, as after the start of a server."""
        source = Source(parse_reference(self.reference), self.config)
        settings = msgspec.structs.replace(QUICK, **changes)
        opened: dict[str, LazyLayer] = {}
        lender = Lender(self.root / "layers", self.cas, opened.get)
        layer = self.open()
        opened[layer.directory.name] = layer
        try:
            async with trio.open_nursery() as nursery:
                yield Fetcher(
                    layer,
                    source,
                    nursery,
                    Slots(8),
                    lender,
                    settings,
                    lambda _, error, reading: self.failures.append(error),
                    self._count_whole,
                )
                nursery.cancel_scope.cancel()
        finally:
            source.close()
            lender.close()
            layer.close()

    def _count_whole(self) -> None:
        self.whole += 1


def asked(proxy: Proxy) -> list[tuple[int, int]]:
    """The byte ranges that were asked for, in order."""
    found = []
    for request in proxy.paths("/blobs/"):
        start, end = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers["Range"]).groups()  # type: ignore[union-attr]
        found.append((int(start), int(end) + 1))
    return found


def disjoint(ranges: list[tuple[int, int]]) -> bool:
    """No byte twice."""
    ordered = sorted(ranges)
    return all(a[1] <= b[0] for a, b in itertools.pairwise(ordered))


async def read_all(fetcher: Fetcher, piece: int = 128 << 10) -> bytes:
    """The data file from its beginning to its end."""
    size = fetcher.layer.size
    return b"".join([await fetcher.read(at, min(piece, size - at)) for at in range(0, size, piece)])


async def finished(place: Place, fetcher: Fetcher) -> None:
    """Bring the rest, verify and complete."""
    limiter = trio.CapacityLimiter(1)
    await fetcher.bring(range(fetcher.layer.table.spans), limiter, blob=True)
    fetcher.layer.verify(lambda: False)
    fetcher.layer.finish(place.cas)
