"""How incomplete layers are served in tests that don't choose: as ``pytest --layers`` says.

The tests of incomplete layers run with both ways; the others once, and with this option the
whole suite can be run with either.
"""

import json
from pathlib import Path
from typing import Literal

from runtime import fanotify

Method = Literal["fuse", "fanotify"]

# What the command line said; None: what the daemon chooses itself.
chosen: Method | None = None


def with_method(config: Path | None, root: Path) -> Path | None:
    """A configuration file like the given one that also says which way, if it did not and the
    command line does; it is beside the daemon's root."""
    if chosen is None:
        return config
    if chosen == "fanotify" and fanotify.available(root if root.exists() else root.parent):
        return config  # some tests have their root in memory
    settings = json.loads(config.read_text()) if config else {}
    settings.setdefault("store", {}).setdefault("lazy", {}).setdefault("method", chosen)
    path = root.with_name(f"config-{chosen}.json")
    path.write_text(json.dumps(settings))
    return path
