"""Results of benchmarks: a table to read while they come, and JSON to keep."""

import statistics
from pathlib import Path

import msgspec

MB = 1_000_000


class Result(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One figure.

    Attributes:
        figure: its name on the command line.
        what: what was measured, in words.
        image: size in MB, as the command line has it; "" where no image is meant.
        link: `loopback` or `slow`.
        format: of the image that ctrfs used.
        traced: the workload whose trace it was converted with; "" for none.
        unit: of all numbers: `s`, `MB`, or "" for a ratio.
        ours: one number a round.
        others: the same of what it is compared with; empty where there is nothing.
        ratio: whether ``limit`` is for the ratio of the medians, and not for our median.
        limit: at most; None where this is for information.
    """

    figure: str
    what: str
    image: str = ""
    link: str = "loopback"
    format: str = ""
    traced: str = ""
    unit: str = "s"
    ours: list[float] = []
    others: list[float] = []
    ratio: bool = True
    limit: float | None = None

    @property
    def value(self) -> float | None:
        """What the limit is for; None if a side was not measured."""
        if not self.ours or (self.ratio and not self.others):
            return None
        ours = statistics.median(self.ours)
        return ours / statistics.median(self.others) if self.ratio else ours

    @property
    def kept(self) -> bool | None:
        """Whether the value is within the limit; None if there is no value or no limit."""
        if self.value is None or self.limit is None:
            return None
        return self.value <= self.limit

    def same(self, other: "Result") -> bool:
        """Whether the other is the same measurement of the other side."""
        mine = (self.figure, self.what, self.image, self.link)
        return mine == (other.figure, other.what, other.image, other.link)


class Results:
    """Collects results and prints each as a line."""

    def __init__(self) -> None:
        self.all: list[Result] = []
        header = ("what", "image", "link", "ctrfs", "other", "ratio", "at most")
        print(_LINE.format(*header), flush=True)

    def add(self, result: Result) -> None:
        """Print and keep one."""
        self.all.append(result)
        print(_line(result), flush=True)

    def write(self, path: Path) -> None:
        """Keep all as JSON."""
        path.write_bytes(msgspec.json.format(msgspec.json.encode(self.all)))


def read(path: Path) -> list[Result]:
    """What Results.write() wrote."""
    return msgspec.json.decode(path.read_bytes(), type=list[Result])


_LINE = "{:44} {:>5} {:8} {:>25} {:>25} {:>6}  {}"


def _line(result: Result) -> str:
    ratio = result.value if result.ratio else None
    limit = "" if result.limit is None else f"{result.limit:g}"
    if result.limit is not None and not result.ratio:
        limit += f" {result.unit}"
    return _LINE.format(
        f"{result.what}, traced" if result.traced else result.what,
        result.image,
        result.link,
        _numbers(result.ours, result.unit),
        _numbers(result.others, result.unit),
        "" if ratio is None else f"{ratio:.3f}",
        limit + {None: "", True: "  ok", False: "  MISSED"}[result.kept],
    )


def _numbers(numbers: list[float], unit: str) -> str:
    """Median, and in brackets the least and the greatest."""
    if not numbers:
        return "-"
    middle, least, most = map(_short, (statistics.median(numbers), min(numbers), max(numbers)))
    if len(numbers) == 1:
        return f"{middle} {unit}"
    return f"{middle} {unit} ({least}-{most})"


def _short(number: float) -> str:
    return f"{number:.3f}" if number < 10 else f"{number:.1f}"
