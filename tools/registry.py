"""A docker-registry on a free loopback port, for benchmarks."""

import re
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def registry(
    directory: Path, data: Path | None = None, prefix: tuple[str, ...] = ()
) -> Iterator[str]:
    """Run a registry on 127.0.0.1 and any free port; gives its host:port.

    Args:
        directory: for its configuration, its log, and `access.log` with a line a request.
        data: where its content is; None: in ``directory``.
        prefix: what to put before the command, to run it in another network namespace.

    Raises:
        RuntimeError: it does not start; the message has its log.
    """
    directory.mkdir(parents=True)
    config = directory / "config.yml"
    config.write_text(
        "version: 0.1\nlog: {level: info}\n"
        f"storage: {{filesystem: {{rootdirectory: {data or directory / 'data'}}}}}\n"
        'http: {addr: "127.0.0.1:0"}\n'
    )
    command = [*prefix, "docker-registry", "serve", str(config)]
    with (directory / "log").open("wb") as log, (directory / "access.log").open("wb") as access:
        process = subprocess.Popen(command, stdout=access, stderr=log)
    try:
        yield _address(process, directory / "log")
    finally:
        process.terminate()
        process.wait()


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    """Where it listens, once it does: it took any free port, and says which in its log."""
    while not (found := re.search(r"listening on (127\.0\.0\.1:[0-9]+)", log.read_text())):
        if process.poll() is not None:
            raise RuntimeError(f"docker-registry did not start: {log.read_text()}")
        time.sleep(0.02)
    return found[1]
