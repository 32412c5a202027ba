"""The frame of the figures of lazy loading: which sides are measured, on which image and link."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from tools import links
from tools.links import Link
from tools.results import Result, Results
from tools.shelf import ORDINARY, Shelf
from tools.sides import Containerd, Ctrfs

LINKS = {"loopback": links.loopback, "slow": links.slow}


@dataclass(frozen=True, slots=True)
class Case:
    """What is measured, with the image of which size in MB, over which link."""

    figure: str
    size: str
    link: str = "loopback"


# What is measured unless told otherwise, quick ones first.
CASES = (
    Case("first-line", "85"),
    Case("numpy", "85"),
    Case("read-all", "85"),
    Case("again", "85"),
    Case("cache", "85"),
    Case("bytes", "85"),
    Case("disk", "85"),
    Case("convert", "85"),
    Case("ls", "800"),
    Case("memory", ""),
    Case("first-line", "800", "slow"),
    Case("numpy", "800", "slow"),
)


@dataclass(frozen=True, slots=True)
class Comparison:
    """One run of the benchmark.

    Attributes:
        directory: for daemons and their stores, which are empty each time.
        shelf: the images.
        rounds: how often each figure is measured.
        form: the format of the images that ctrfs uses.
        mode: how ctrfs pulls, `lazy` or `full`.
        ours: whether to measure ctrfs.
        others: whether to measure the other side.
        earlier: results that have the other side where it is not measured.
        results: what has been measured.
    """

    directory: Path
    shelf: Shelf
    rounds: int
    form: str
    mode: str
    ours: bool
    others: bool
    earlier: list[Result]
    results: Results = field(default_factory=Results)

    @contextmanager
    def link(self, case: Case) -> Iterator[Link]:
        """The link of a case."""
        with (
            tempfile.TemporaryDirectory(dir=self.directory) as place,
            LINKS[case.link](self.shelf.data, Path(place) / "registry") as link,
        ):
            yield link

    def image(self, host: str, size: str, form: str) -> str:
        """The reference of an image, which is made if it is not there yet."""
        self.shelf.provide(size, form)
        return f"{host}/{self.shelf.name(size, form)}"

    def ctrfs(self, host: str, size: str, prefix: links.Prefix = (), mode: str = "") -> Ctrfs:
        """Our side; make one for each round.

        Args:
            host: the registry.
            size: of the image.
            prefix: what to put before the daemon's command.
            mode: instead of the one of this run.
        """
        image = self.image(host, size, self.form)
        config = {"store": {"registries": {host: {"plain_http": True}}}}
        return Ctrfs(self.directory, image, mode or self.mode, prefix, config)

    def containerd(self, host: str, size: str, prefix: links.Prefix = ()) -> Containerd:
        """The other side, on the ordinary image; arguments as for ctrfs()."""
        return Containerd(self.directory, self.image(host, size, ORDINARY), prefix)

    def add(
        self,
        case: Case,
        what: str,
        ours: list[float],
        others: list[float],
        limit: float | None = None,
        *,
        unit: str = "s",
        ratio: bool = True,
    ) -> None:
        """Report a figure; arguments as in Result. The limit is for the cases in CASES only."""
        result = Result(
            figure=case.figure,
            what=what,
            image=case.size,
            link=case.link,
            format=self.form,
            traced=self.shelf.traced,
            unit=unit,
            ours=ours,
            others=others,
            ratio=ratio,
            limit=limit if case in CASES else None,
        )
        if not others:
            known = [old.others for old in self.earlier if old.same(result) and old.others]
            result = msgspec.structs.replace(result, others=known[0] if known else [])
        self.results.add(result)
