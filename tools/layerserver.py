"""The layer server's process: ``python -m tools.layerserver ROOT RUN LEVEL [log]``.

Started by the daemon, and by nobody else. With ``log`` it logs where the daemon does when that
is in the background, else to standard error.
"""

import logging
import signal
import sys
from pathlib import Path

import msgspec
import trio

from runtime.fanotify import EventsTaken
from runtime.layerserver import protocol
from runtime.layerserver.server import LayerServer
from store.config import StoreConfig
from store.errors import CtrfsError, StoreInUse
from tools import logs

log = logging.getLogger(__name__)


def main() -> int:
    """Serve until nobody needs it; returns the exit code."""
    root, run, level, *rest = sys.argv[1:]
    if rest:
        logs.of_daemon(Path(root), level)
    else:
        logs.to_stderr(level)
    # What comes while it starts waits until it can end in order: it has a keeper by then.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        config = msgspec.json.decode((Path(run) / protocol.CONFIG).read_bytes(), type=StoreConfig)
        trio.run(_serve, Path(root), Path(run), config)
    except (EventsTaken, StoreInUse) as error:
        # A daemon that was killed had just started another, which this one's did not see.
        log.info("%s; one is enough", error.sentence)
        return 1
    except CtrfsError as error:
        log.error("%s", error.sentence)
        return 1
    except Exception:
        log.exception("the layer server failed")
        return 1
    return 0


async def _serve(root: Path, run: Path, config: StoreConfig) -> None:
    await LayerServer(root, run, config).run()


if __name__ == "__main__":
    sys.exit(main())
