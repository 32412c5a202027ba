"""Processes that run containers and are killed: `python -m tests.runtime.victim`.

Each line of standard input is JSON, ``[directory, [[method, name, argument…] …]]``. A process
is forked that opens the room there, prints `open PID`, carries out the calls, prints
`done`, and sleeps. Forking spares the second that Python needs to load all this.
"""

import json
import os
import signal
import sys
from pathlib import Path

import trio

from tests.runtime.support import Room, opened


async def _call(room: Room, method: str, name: str, *arguments: str) -> None:
    if method == "make":
        await room.make(name, *arguments)
    elif method == "set":
        await room.containers.get(name).set(*arguments)
    elif method == "remove":
        await room.containers.remove(name)
    else:
        await getattr(room.containers.get(name), method)(*arguments)


async def _live(directory: Path, calls: list[list[str]]) -> None:
    async with opened(directory) as room:
        print("open", os.getpid(), flush=True)
        for method, name, *arguments in calls:
            await _call(room, method, name, *arguments)
        print("done", flush=True)
        await trio.sleep_forever()


def main() -> None:
    """Fork one for each line."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in iter(sys.stdin.readline, ""):
        directory, calls = json.loads(line)
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            trio.run(_live, Path(directory), calls)


if __name__ == "__main__":
    main()
