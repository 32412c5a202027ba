"""What is in a layer's data files."""

import os
from functools import partial

from store.data_files import DataFiles, OpenData, open_all


def contents(files: DataFiles | None) -> bytes:
    """All of it."""
    return contents_at(files, 0, files.size) if files else b""


def contents_at(files: DataFiles, offset: int, length: int) -> bytes:
    """A range."""
    data = OpenData(files, partial(open_all, flags=os.O_RDONLY))
    try:
        return data.read(offset, length)
    finally:
        data.close()
