"""What lies in a store's directories."""

import os
from pathlib import Path


def stored(root: Path) -> set[str]:
    """Everything below content/, ingest/ and layers/, by its path below the store's root; but for
    the layer server's hints, which appear when it comes up."""
    found = set()
    for kept in ("content", "ingest", "layers"):
        for directory, names, files in os.walk(root / kept):
            found |= {str(Path(directory, name).relative_to(root)) for name in (*names, *files)}
    return {name for name in found if not name.startswith("layers/pieces.db")}
