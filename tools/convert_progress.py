"""How far a conversion is: bars on a terminal, and only what matters elsewhere."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from store.convert import Watcher


class _Lines:
    """Notes, one a line."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def begin(self, what: str, total: int) -> None:
        """Nobody looks."""

    def advance(self, count: int) -> None:
        """Nobody looks."""

    def note(self, sentence: str) -> None:
        """For logs."""
        print(f"ctrfs: {sentence}", file=self._file, flush=True)


class _Bars:
    """A bar for each step."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._task: TaskID | None = None

    def begin(self, what: str, total: int) -> None:
        """The bar of the step before stays as it ended."""
        self._task = self._bars.add_task(escape(what), total=total)

    def advance(self, count: int) -> None:
        """Move the latest bar."""
        if self._task is not None:
            self._bars.advance(self._task, count)

    def note(self, sentence: str) -> None:
        """Above the bars."""
        self._bars.console.print(f"ctrfs: {sentence}", markup=False, highlight=False)


@contextmanager
def progress(file: TextIO) -> Iterator[Watcher]:
    """Whoever shows progress in ``file``, for the time of the block."""
    if not file.isatty():
        yield _Lines(file)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(file=file)) as bars:
        yield _Bars(bars)
