"""Where the registry of a measurement is: on loopback, or at the far end of a slow link.

The slow link is a veth pair between two network namespaces, with a token bucket on each end,
and a proxy before the registry that adds latency (tools/delay.py). Registry and proxy run in
one namespace, the clients in the other; mounts and processes are shared with everyone.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tools.images import run
from tools.registry import registry

RATE = "100mbit"
# Of each direction, so that an answer takes 40 ms, as from a registry on the same continent.
DELAY = 0.020
# RFC 2544 sets these addresses aside for measurements. The link needs two of them.
_REGISTRY = "198.18.0.1"
_CLIENT = "198.18.0.2"
_PORT = 5000

Prefix = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Link:
    """A registry and the way to it.

    Attributes:
        host: `host:port` of the registry for clients.
        client: what to put before the command of a client.
        access_log: the registry's, a line for each request that was answered.
    """

    host: str
    client: Prefix
    access_log: Path

    def requests(self) -> int:
        """How many requests for blobs the registry has answered."""
        lines = self.access_log.read_text(errors="replace").splitlines()
        return sum('"GET /v2/' in line and "/blobs/" in line for line in lines)


@contextmanager
def loopback(data: Path, directory: Path) -> Iterator[Link]:
    """A registry on 127.0.0.1.

    Args:
        data: the registry's content.
        directory: for its configuration and logs.
    """
    with registry(directory, data) as host:
        yield Link(host, (), directory / "access.log")


@contextmanager
def slow(data: Path, directory: Path) -> Iterator[Link]:
    """A registry behind a link of RATE and DELAY; arguments as for loopback()."""
    with ExitStack() as stack:
        server, client = (
            stack.enter_context(_namespace(f"ctrfs-bench-{os.getpid()}-{end}"))
            for end in ("registry", "client")
        )
        run("ip", "link", "add", "link0", "netns", server, "type", "veth",
            "peer", "name", "link0", "netns", client)  # fmt: skip
        for namespace, address in ((server, _REGISTRY), (client, _CLIENT)):
            run("ip", "-n", namespace, "address", "add", f"{address}/30", "dev", "link0")
            run("ip", "-n", namespace, "link", "set", "link0", "up")
            # A burst holds what passes between two ticks of the slowest clock (HZ=100), and
            # the queue 50 ms, about what the modems and switches of such links hold.
            run("tc", "-n", namespace, "qdisc", "add", "dev", "link0", "root", "tbf",
                "rate", RATE, "burst", "128kb", "latency", "50ms")  # fmt: skip
        near = stack.enter_context(registry(directory, data, _inside(server)))
        count = directory / "count"
        host = stack.enter_context(
            proxy(near, count, DELAY, f"{_REGISTRY}:{_PORT}", _inside(server))
        )
        yield Link(host, _inside(client), directory / "access.log")


def _inside(namespace: str) -> Prefix:
    # `ip netns exec` would make a mount namespace as well, and hide the mounts of clients.
    return ("nsenter", f"--net=/run/netns/{namespace}")


@contextmanager
def _namespace(name: str) -> Iterator[str]:
    run("ip", "netns", "add", name)
    try:
        run("ip", "-n", name, "link", "set", "lo", "up")
        yield name
    finally:
        run("ip", "netns", "delete", name)


@contextmanager
def proxy(
    upstream: str, count: Path, delay: float = 0.0, listen: str = "127.0.0.1:0", prefix: Prefix = ()
) -> Iterator[str]:
    """Run tools.delay as a process; gives its `host:port`.

    Args:
        upstream: `host:port` that it leads to.
        count: the file of its Counter.
        delay: of each direction, in seconds.
        listen: where; port 0 is any.
        prefix: what to put before the command.
    """
    command = [*prefix, sys.executable, "-m", "tools.delay", "--to", upstream]
    options = ["--count", str(count), "--delay", str(delay), "--listen", listen]
    with subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().strip()
            if not address:
                raise RuntimeError("the proxy did not start")
            yield address
        finally:
            process.terminate()
